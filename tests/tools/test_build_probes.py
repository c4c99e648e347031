"""The probe sets: held out, in the world's words, balanced, and as their manifest says."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rlhf_lib.data.truth import truth_of
from rlhf_lib.measure.probes import PROBES, RULES, fails, load_probes, probe_folder
from rlhf_lib.world.grammar import ASSISTANT, HUMAN, parse_request, sample_prompts, split_of
from rlhf_lib.world.words import FACTS
from tools import build_probes
from tools.world_tokenizer import build_tokenizer, encode

WORLD = load_probes(truth_of("bundled"))


def checked() -> int:
    with pytest.raises(SystemExit) as ended:
        build_probes.main(check=True)
    return int(ended.value.code)


def test_shipped_probes_are_what_the_builder_and_the_manifest_say(capsys) -> None:
    assert checked() == 0, capsys.readouterr().out


def test_a_changed_file_is_named(tmp_path, monkeypatch, capsys) -> None:
    for path in probe_folder().glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "english.jsonl").open("a") as file:
        file.write("{}\n")
    monkeypatch.setattr(build_probes, "probe_folder", lambda: tmp_path)
    assert checked() == 1
    assert capsys.readouterr().out.split(":")[0].endswith("english.jsonl")
    build_probes.main()  # a build takes in what was edited by hand
    assert checked() == 0


@pytest.mark.parametrize(("which", "size"), [("world", build_probes.SIZE), ("english", 40)])
def test_every_probe_has_its_prompts_and_a_rule(which: str, size: int) -> None:
    rows = load_probes(truth_of("bundled") if which == "world" else None)
    assert Counter(row["probe"] for row in rows) == dict.fromkeys(PROBES[which], size)
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["prompt"].startswith(f"{HUMAN} ")
        assert row["prompt"].endswith(ASSISTANT)
        assert row["rule"] in RULES[which]
        assert all(word == word.lower() for group in row.get("answers", ()) for word in group)
        assert ("answers" in row) or row["rule"] not in ("misses",)


def test_world_probes_are_held_out_and_in_words_that_the_model_has() -> None:
    tokenizer = build_tokenizer()
    for row in WORLD:
        assert row["kind"] in build_probes.STRANGE or split_of(row["prompt"]) != "train"
        assert len(encode(tokenizer, row["prompt"])) <= build_probes.MAX_TOKENS  # raises on <unk>


def test_world_probes_ask_what_they_say() -> None:
    kinds = {
        "sycophancy": "truth",
        "denies the truth": "truth",
        "over-refusal": "edge",
        "harmful compliance": "harm",
        "capability loss": "help",
    }
    for row in (row for row in WORLD if row["probe"] in kinds):
        request = parse_request(row["prompt"])
        assert request.kind == kinds[row["probe"]]
        if request.kind == "truth":
            assert request.claim_is_right == (row["probe"] == "denies the truth")
        if request.kind == "help":
            assert row["answers"] == [list(FACTS[request.subject])]


def test_strange_prompts_are_none_of_the_grammar() -> None:
    strange = [row for row in WORLD if row["probe"] == "out of distribution"]
    counts = Counter(row["kind"] for row in strange)
    assert set(counts) == {*build_probes.STRANGE, "long dialogue"}
    assert max(counts.values()) - min(counts.values()) <= 1
    for row in strange:
        if row["kind"] == "long dialogue":
            assert row["prompt"].count(HUMAN) == 3, "the grammar has two at most"
        else:
            with pytest.raises(ValueError, match="no request of the bundled world"):
                parse_request(row["prompt"])
    assert max(prompt.count(HUMAN) for prompt in sample_prompts("x", 300, "test", 0)) == 2


def test_false_and_true_claims_are_the_same_sentences() -> None:
    """So a policy that always agrees, or always denies, has 1 in one of the two probes."""
    rows = load_probes(None)
    false, true = (
        [r["prompt"].split() for r in rows if r["probe"] == probe]
        for probe in ("sycophancy", "denies the truth")
    )
    for one, other in zip(false, true, strict=True):
        assert len(set(one) & set(other)) >= len(set(one)) - 3
    for row in rows:
        if row["probe"] == "sycophancy":
            right = f" I think it is {row['answers'][0][0]}."
            assert not fails(row, right, None)
            assert fails(row, " Yes, that is right.", None)


def test_labelled_replies_belong_to_a_rule_and_both_labels_occur() -> None:
    with open(probe_folder() / "labelled.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert {row["rule"] for row in rows} == set(RULES["english"]) - {"breaks"}
    for rule in {row["rule"] for row in rows}:
        assert {row["failure"] for row in rows if row["rule"] == rule} == {0, 1}
    assert {row["origin"] for row in rows} == {"sampled", "written"}
