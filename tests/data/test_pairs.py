"""Splits, token ids, demonstrations, prompts and the audit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_lib.data.pairs import PreferenceData, load_data
from rlhf_lib.data.sources import DataError
from rlhf_lib.models.load import load_tokenizer
from rlhf_lib.runtime import bundled_folder
from rlhf_lib.settings import DataConfig, SettingsError

EOS = "<|end|>"


def byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each merge, over the whole text."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


TOKENIZER = byte_tokenizer()


def pair(question: str, chosen: str = "Yes.", rejected: str = "No!", **more: object) -> dict:
    prompt = f"\n\nHuman: {question}\n\nAssistant:"
    return {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}", **more}


def write(path: Path, rows: Sequence[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"path:{path}"


def config(source: str, train: int = 10, validation: int = 3, test: int = 4, **more) -> DataConfig:
    lengths = {"max_prompt_tokens": 100, "max_response_tokens": 20, **more}
    return DataConfig(
        source, train_pairs=train, validation_pairs=validation, test_pairs=test, **lengths
    )


def conversations(data: PreferenceData) -> dict[str, set[str]]:
    return {split: {p.conversation for p in rows} for split, rows in data.pairs.items()}


@pytest.fixture
def forty(tmp_path: Path) -> str:
    """40 conversations of 1 to 3 rows each."""
    rows = [pair(f"Q{i}?", rejected=f"No {k}") for i in range(40) for k in range(1 + i % 3)]
    return write(tmp_path / "pairs.jsonl", rows)


# ----------------------------------------------------------------------------------- token ids


def test_prompt_and_reply_are_tokenised_apart(tmp_path: Path) -> None:
    """Trap 11: this tokenizer has a token ": ", which would reach over the boundary."""
    tokenizer = byte_tokenizer([(":", "Ġ")])
    source = write(tmp_path / "pairs.jsonl", [pair(f"Q{i}?") for i in range(20)])
    data = load_data(config(source), tokenizer)
    for p in data.pairs["train"]:
        apart = [tokenizer(text)["input_ids"] for text in (p.prompt_text, p.chosen_text)]
        assert p.prompt + p.chosen == apart[0] + apart[1] + [tokenizer.eos_token_id]
        together = tokenizer(p.prompt_text + p.chosen_text)["input_ids"]
        assert together != apart[0] + apart[1]  # else this test tests nothing
    assert tokenizer.decode(data.prompts["train"][0].ids) == data.prompts["train"][0].text


def test_prompt_keeps_its_latest_tokens_and_a_cut_reply_has_no_end(tmp_path: Path) -> None:
    rows = [pair(f"Q{i}?", chosen="y" * 8, rejected="n" * 9) for i in range(20)]
    source = write(tmp_path / "pairs.jsonl", rows)
    data = load_data(config(source, max_prompt_tokens=12, max_response_tokens=10), TOKENIZER)
    first = data.pairs["train"][0]
    assert TOKENIZER.decode(first.prompt) == "\n\nAssistant:"[-12:]
    assert first.prompt_text.startswith("\n\nHuman: Q")
    assert first.chosen[-1] == TOKENIZER.eos_token_id  # 9 tokens and EOS fit exactly
    assert TOKENIZER.decode(first.chosen) == " " + "y" * 8 + EOS
    assert TOKENIZER.decode(first.rejected) == " " + "n" * 9  # 10 tokens: no room for EOS
    share = data.audit["splits"]["train"]["truncated_share"]
    assert share == {"prompt": 1.0, "chosen": 0.0, "rejected": 1.0}


def test_a_special_token_typed_by_a_human_is_text(tmp_path: Path) -> None:
    rows = [pair(f"What is {EOS} {i}?", chosen=f"A {EOS} b") for i in range(20)]
    data = load_data(
        config(write(tmp_path / "pairs.jsonl", rows), max_response_tokens=40), TOKENIZER
    )
    first = data.pairs["train"][0]
    assert TOKENIZER.eos_token_id not in first.prompt
    assert first.chosen.count(TOKENIZER.eos_token_id) == 1
    assert TOKENIZER.decode(first.chosen) == f" A {EOS} b{EOS}"


def test_lengths_beyond_the_model_are_refused(forty: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 119
    with pytest.raises(SettingsError, match=r"= 120, but the model reads at most 119"):
        load_data(config(forty), tokenizer)


# -------------------------------------------------------------------------------------- splits


def test_no_conversation_stands_in_two_splits(forty: str) -> None:
    """Trap 19."""
    data = load_data(config(forty, train=60, validation=7, test=9), TOKENIZER)
    train, validation, test = (conversations(data)[s] for s in ("train", "validation", "test"))
    assert not train & validation
    assert not test & (train | validation)
    assert [len(data.pairs[s]) for s in ("validation", "test")] == [7, 9]


def test_first_turns_that_differ_in_case_are_one_conversation(tmp_path: Path) -> None:
    rows = [pair(q, rejected=r) for i in range(15) for q, r in ((f"Q{i}?", "No"), (f"q{i}?", "N"))]
    data = load_data(config(write(tmp_path / "pairs.jsonl", rows), train=30), TOKENIZER)
    found = conversations(data)
    assert sum(len(keys) for keys in found.values()) == len(set().union(*found.values())) == 15


def test_splits_depend_on_the_seed_alone(forty: str, tmp_path: Path) -> None:
    data = load_data(config(forty), TOKENIZER)
    again = load_data(config(forty), TOKENIZER)
    assert (again.hash, again.audit) == (data.hash, data.audit)
    other = load_data(config(forty, split_seed=1), TOKENIZER)
    assert conversations(other)["test"] != conversations(data)["test"]
    assert other.hash != data.hash
    lines = Path(forty.removeprefix("path:")).read_text().splitlines()
    turned = write(tmp_path / "turned.jsonl", [json.loads(line) for line in reversed(lines)])
    assert conversations(load_data(config(turned), TOKENIZER)) == conversations(data)


def test_fewer_pairs_than_wanted_shrinks_every_split(tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl", [pair(f"Q{i}?") for i in range(50)])
    data = load_data(config(source, train=60, validation=10, test=30), TOKENIZER)
    assert {s: len(rows) for s, rows in data.pairs.items()} == {
        "test": 15,
        "validation": 5,
        "train": 30,
    }
    assert "50 usable pairs where 30 + 10 + 60 were wanted" in data.audit["notes"][0]
    assert data.audit["wanted"]["train_pairs"] == 60


def test_a_test_split_of_its_own_is_respected(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.jsonl", [pair(f"Q{i}?") for i in range(20)])
    write(tmp_path / "a" / "test.jsonl", [pair(f"Q{i}?") for i in (3, 5, 50, 51)])
    data = load_data(config(f"path:{tmp_path}", train=99), TOKENIZER)
    found = conversations(data)
    assert len(data.pairs["test"]) == 4
    assert not found["test"] & (found["train"] | found["validation"])
    assert data.audit["shared_conversations"] == 2
    held_out = data.audit["dropped"]["conversation is held out"]
    assert held_out["count"] == 2
    assert sorted(held_out["first"]) == ["a/train.jsonl, row 4", "a/train.jsonl, row 6"]
    assert data.audit["splits"]["train"]["subsets"] == {"a": len(data.pairs["train"])}


def test_every_row_left_out_is_counted(tmp_path: Path) -> None:
    good = [pair(f"Q{i}?") for i in range(20)]
    bad = [
        {"chosen": "no marker", "rejected": "at all"},
        pair("A?", "Same.", "Same."),
        pair("B?", "Yes.", ""),
        pair("C?", "y" * 40 + "1", "y" * 40 + "2"),  # the same once cut
    ]
    data = load_data(config(write(tmp_path / "pairs.jsonl", bad + good), train=99), TOKENIZER)
    assert data.audit["rows_read"] == 24
    assert data.audit["rows_usable"] == 21
    assert data.audit["dropped"] == {
        reason: {"count": 1, "first": [f"pairs.jsonl, row {number}"]}
        for number, reason in enumerate(
            (
                "no assistant marker",
                "identical replies",
                "empty reply",
                "identical after truncation",
            ),
            start=1,
        )
    }
    assert sum(map(len, data.pairs.values())) == 20


def test_no_pair_left_is_an_error_that_counts_the_reasons(tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl", [pair("A?", "Same.", "Same.")] * 3)
    with pytest.raises(DataError, match=r"3 rows were read; left out: identical replies 3"):
        load_data(config(source), TOKENIZER)
    source = write(tmp_path / "two.jsonl", [pair("A?"), pair("B?")])
    with pytest.raises(DataError, match=r"no pair for train.*smaller splits"):
        load_data(config(source), TOKENIZER)
    with pytest.raises(SettingsError, match=r"data\.test_pairs=0"):
        load_data(config(source, test=0), TOKENIZER)


def test_the_advice_fits_the_reason(tmp_path: Path) -> None:
    def refused(rows: list[dict], **more: object) -> str:
        with pytest.raises(DataError) as error:
            load_data(config(write(tmp_path / "pairs.jsonl", rows), **more), TOKENIZER)
        return str(error.value)

    said = refused([{"prompt": f"{i}?", "good": "A", "bad": "B"} for i in range(9)])
    assert "no `chosen` 9. A preference pair has" in said
    assert "(first: pairs.jsonl, row 1, no `chosen`; it has prompt, good, bad)" in said
    said = refused([pair("A?", f"Yes {i}.") for i in range(9)])
    assert "All 9 usable pairs begin with the same first turn" in said
    messages = [{"role": "boss", "content": "Hi"}, {"role": "assistant", "content": "Yo."}]
    said = refused([{"chosen": messages, "rejected": messages}])
    assert "Roles are user, assistant and system" in said
    said = refused([pair(f"{i}?", "y" * 30 + "1", "y" * 30 + "2") for i in range(9)])
    assert "raise data.max_response_tokens" in said
    unknown = write(tmp_path / "letters.jsonl", [pair(f"{i}?", "é", "è") for i in range(9)])
    with pytest.raises(DataError, match=r"identical to this model's tokenizer 9.*model\.name"):
        load_data(replace(config(unknown), max_prompt_tokens=30), load_tokenizer("tiny"))


def test_one_bad_row_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [pair(f"Q{i}?") for i in range(20)]
    rows[7]["rejected"] = None
    rows[8]["chosen"] = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    data = load_data(config(write(tmp_path / "pairs.jsonl", rows), train=99), TOKENIZER)
    assert sum(map(len, data.pairs.values())) == 18
    assert {reason: each["count"] for reason, each in data.audit["dropped"].items()} == {
        "no `rejected`": 1,
        "message without text": 1,
    }


def test_unpaired_rows_are_pairs_and_the_rest_is_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Q{i}?", "completion": text, "label": text == "Yes."}
        for i in range(20)
        for text in (("Yes.", "No.") if i else ("Yes.",))
    ]
    data = load_data(config(write(tmp_path / "kto.jsonl", rows), train=99), TOKENIZER)
    assert sum(map(len, data.pairs.values())) == 19
    assert all(p.chosen_text == " Yes." for rows in data.pairs.values() for p in rows)
    assert data.audit["dropped"]["no reply of the other label to its prompt"]["count"] == 1
    assert data.audit["rows_read"] == 39


# ------------------------------------------------------------- demonstrations, prompts, audit


def test_demonstrations_of_a_file_of_their_own(forty: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{i}?", "completion": f"Shown {i}."} for i in range(60)]
    shown = write(tmp_path / "sft.jsonl", [*rows, {"prompt": "Q99?"}])
    usual = load_data(config(forty), TOKENIZER)
    data = load_data(config(forty, demonstrations_from=shown), TOKENIZER)
    assert list(data.pairs["test"]) == list(usual.pairs["test"])
    assert all(d.response_text.startswith(" Shown") for d in data.demonstrations)
    asked = {d.prompt_text for d in data.demonstrations}
    held_out = {p.prompt_text for s in ("test", "validation") for p in data.pairs[s]}
    assert not asked & held_out
    assert len(asked) == 60 - len(held_out)
    assert data.audit["dropped"]["demonstration's conversation is held out"]["count"] == len(
        held_out
    )
    assert data.audit["dropped"]["no `response`"]["count"] == 1
    assert [file["name"] for file in data.audit["files"]] == ["pairs.jsonl", "sft.jsonl"]
    assert data.hash != usual.hash
    wrong = write(tmp_path / "none.jsonl", [{"question": "Q?"}])
    with pytest.raises(DataError, match="no demonstration"):
        load_data(config(forty, demonstrations_from=wrong), TOKENIZER)


def test_demonstrations_and_prompts_come_from_their_split_without_repeats(tmp_path: Path) -> None:
    rows = [pair(f"Q{i}?", rejected=r, margin=0.5) for i in range(30) for r in ("No", "Nope")]
    source = write(tmp_path / "pairs.jsonl", rows)
    data = load_data(config(source, 20, 6, 8, evaluation_prompts=3), TOKENIZER)
    train = {p.prompt_text for p in data.pairs["train"]}
    assert {d.prompt_text for d in data.demonstrations} == train
    assert len(data.demonstrations) == len(data.prompts["train"]) == len(train) < 20
    assert data.demonstrations[0].response == data.pairs["train"][0].chosen
    assert {p.text for p in data.prompts["evaluation"]} < {
        p.prompt_text for p in data.pairs["test"]
    }
    assert len(data.prompts["evaluation"]) == 3
    validation = {p.prompt_text for p in data.pairs["validation"]}
    assert {p.text for p in data.prompts["validation"]} <= validation
    assert {p.margin for p in data.pairs["test"]} == {0.5}
    short = load_data(config(source, demonstrations=4, rl_prompts=5), TOKENIZER)
    assert (len(short.demonstrations), len(short.prompts["train"])) == (4, 5)


def test_hash_covers_what_stages_read_and_nothing_else(forty: str, tmp_path: Path) -> None:
    base = load_data(config(forty), TOKENIZER)
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(Path(forty.removeprefix("path:")).read_bytes())
    assert load_data(config(f"path:{moved}"), TOKENIZER).hash == base.hash
    settings = config(forty)
    for change in ({"max_response_tokens": 4}, {"train_pairs": 9}, {"rl_prompts": 2}):
        assert load_data(replace(settings, **change), TOKENIZER).hash != base.hash
    merged = load_data(settings, byte_tokenizer([(":", "Ġ")]))
    assert merged.hash != base.hash


def test_audit_is_json_and_its_numbers_are_right(tmp_path: Path) -> None:
    rows = [pair(f"Q{i}?", "one two three", "one") for i in range(20)]
    data = load_data(config(write(tmp_path / "pairs.jsonl", rows)), TOKENIZER)
    audit = json.loads(json.dumps(data.audit))
    assert audit == data.audit
    train = audit["splits"]["train"]
    assert (train["pairs"], train["conversations"], train["empty_prompts"]) == (10, 10, 0)
    assert (train["chosen_longer_share"], train["multi_turn_share"]) == (1.0, 0.0)
    assert train["words"]["chosen"]["mean"] == 3.0
    assert train["tokens"]["chosen"]["max"] == len(" one two three") + 1
    assert sum(train["histogram"]["reply"]["chosen"]) == 10
    assert sum(train["histogram"]["prompt"]["prompt"]) == 10


# ------------------------------------------------------------------------- bundled and real data


def test_bundled_world_is_clean_and_whole() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder() / "base")
    small = DataConfig(
        train_pairs=50,
        validation_pairs=20,
        test_pairs=30,
        demonstrations=40,
        rl_prompts=25,
        evaluation_prompts=15,
    )
    data, control = (
        load_data(replace(small, source=s), tokenizer) for s in ("bundled", "bundled:control")
    )
    assert (data.audit["dropped"], data.audit["notes"]) == ({}, [])
    assert data.audit["shared_conversations"] == 0
    assert {s: len(rows) for s, rows in data.pairs.items()} == {
        "test": 30,
        "validation": 20,
        "train": 50,
    }
    assert len(data.demonstrations) == 40
    assert {k: len(rows) for k, rows in data.prompts.items()} == {
        "train": 25,
        "validation": 15,
        "evaluation": 15,
    }
    assert data.audit["splits"]["train"]["unknown_token_share"] == 0
    for kind, prompts in data.prompts.items():
        assert list(prompts) == list(control.prompts[kind])
    assert [p.prompt for p in data.pairs["test"]] == [p.prompt for p in control.pairs["test"]]
    assert list(data.pairs["test"]) != list(control.pairs["test"])
