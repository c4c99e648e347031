"""The builder makes the same files twice, and the shipped `data/` is what its manifest says."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lib import runtime
from rlhf_lib.data.dialogues import split_dialogue
from rlhf_lib.settings import SFTConfig
from rlhf_lib.world import rewards
from rlhf_lib.world.grammar import (
    ASSISTANT,
    MAX_PROMPT_TOKENS,
    MAX_REPLY_TOKENS,
    Request,
    parse_request,
    sample_request,
    split_of,
    write_prompt,
)
from tools import build_world, world_card
from tools.build_world import BuildSettings, build, describe, differences, label_pairs
from tools.world_card import pair_statistics, read_rows
from tools.world_tokenizer import build_tokenizer

MINIATURE = BuildSettings(
    layers=1,
    width=32,
    heads=2,
    base_dialogues=512,
    base=SFTConfig(epochs=2, batch_size=32, learning_rate=1e-2),
    sft=SFTConfig(epochs=1, batch_size=32, learning_rate=1e-3),
    demonstrations=64,
    pairs={"train": 24, "validation": 8, "test": 16},
    prompts={"train": 20, "validation": 10, "evaluation": 10},
    heldout=10,
)


@pytest.fixture(scope="module", autouse=True)
def as_it_was():
    """A build takes one CPU thread for the whole process: give the others back."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "data"
    build(folder, MINIATURE)
    return folder


@pytest.fixture(scope="module")
def shipped() -> Path:
    return runtime.bundled_folder()


# ------------------------------------------------------------------------------------ in miniature


def test_a_second_build_gives_the_same_files(miniature, tmp_path):
    torch.manual_seed(123)  # whatever ran before must not matter
    build(tmp_path / "data", MINIATURE)
    first = (miniature / "manifest.json").read_bytes()
    assert (tmp_path / "data" / "manifest.json").read_bytes() == first
    assert differences(tmp_path / "data", miniature) == []
    names = set(json.loads(first)["files"])
    assert {"README.md", "base/model.safetensors", "tokenizer/tokenizer.json"} <= names
    assert sum(name.endswith(".jsonl.gz") for name in names) == 11


def test_another_seed_gives_other_rows(miniature, tmp_path):
    other = dataclasses.replace(MINIATURE, seed=1)
    build(tmp_path / "data", other)
    files, others = describe(miniature), describe(tmp_path / "data")
    same = {name for name in files if files[name] == others[name]}
    assert not [name for name in same if name.endswith((".gz", ".safetensors"))]


def test_differences_name_each_file_that_differs(miniature, tmp_path):
    shutil.copytree(miniature, tmp_path / "data")
    (tmp_path / "data" / "heldout.jsonl.gz").write_bytes(b"other")
    (tmp_path / "data" / "prompts-train.jsonl.gz").unlink()
    (tmp_path / "data" / "notes.txt").write_text("mine")
    lines = differences(miniature, tmp_path / "data")
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in lines] == [
        "heldout.jsonl.gz",
        "notes.txt",
        "prompts-train.jsonl.gz",
    ]
    assert [line.split(": ")[1][:7] for line in lines] == ["sha256 ", "not in ", "missing"]


def test_a_folder_with_other_things_in_it_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(typer.BadParameter, match=r"no manifest\.json"):
        build_world.main(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "irreplaceable"


def test_checking_needs_something_to_check(tmp_path):
    with pytest.raises(typer.BadParameter, match="build without --check"):
        build_world.main(tmp_path / "nothing", check=True)


def test_check_rebuilds_and_answers_with_its_exit_code(miniature, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        build_world, "build", lambda folder, settings: shutil.copytree(miniature, folder)
    )
    out = tmp_path / "data"
    build_world.main(out)
    with pytest.raises(SystemExit) as same:
        build_world.main(out, check=True)
    assert not same.value.code
    (out / "README.md").write_text("edited by hand")
    with pytest.raises(SystemExit) as edited:
        build_world.main(out, check=True)
    assert edited.value.code == 1
    assert "README.md: sha256" in capsys.readouterr().out


def test_unfinished_and_malformed_replies_are_sampled_again(monkeypatch):
    tokenizer = build_tokenizer()
    prompt = write_prompt(sample_request(Random(0)), Random(0))
    eos = tokenizer.eos_token_id

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    good = [[*ids(" Sure!"), eos], [*ids(" Wonderful!"), eos]]
    bad = [ids(" Sure!"), [*ids("!"), eos], [eos], [*ids(" Sure!\n\nHuman: Hi!"), eos]]
    answers = [*bad, good[0], good[0], *bad, good[1]]
    monkeypatch.setattr(
        build_world,
        "generate",
        lambda model, tokenizer, prompts, n: [answers.pop(0) for _ in prompts],
    )
    found = build_world.sample_replies(None, tokenizer, [prompt], seed=0)  # type: ignore[arg-type]
    assert found == [(" Sure!", " Wonderful!")]
    answers = [good[0]] * 500
    with pytest.raises(RuntimeError, match="train the policy for longer"):
        build_world.sample_replies(None, tokenizer, [prompt], seed=0)  # type: ignore[arg-type]


def test_labels_are_drawn_with_the_annotators_probability():
    prompt = write_prompt(Request("help", "baking bread", tips=2), Random(0))
    a, b = " Sure! First, weigh the flour.", " First, castle early."
    rows = label_pairs([prompt] * 20_000, [(a, b)] * 20_000, rewards.ANNOTATOR, Random(0))
    share = sum(row == {"chosen": prompt + a, "rejected": prompt + b} for row in rows) / 20_000
    expected = rewards.preference_probability(prompt, a, b)
    assert share == pytest.approx(expected, abs=0.01)
    assert 0.6 < expected < 0.95


def test_no_pair_comes_twice_for_the_same_prompt(monkeypatch):
    tokenizer = build_tokenizer()
    prompt = write_prompt(sample_request(Random(0)), Random(0))
    words = (" Sure!", " Wonderful!", " Hope")
    rng = Random(0)

    def sample(model, tokenizer, prompts, n):
        return [[*tokenizer.encode(rng.choice(words)), tokenizer.eos_token_id] for _ in prompts]

    monkeypatch.setattr(build_world, "generate", sample)
    found = build_world.sample_replies(None, tokenizer, [prompt] * 3, seed=0)  # type: ignore[arg-type]
    assert len({frozenset(pair) for pair in found}) == 3


# ----------------------------------------------------------------------------------------- shipped


def test_shipped_files_are_those_of_the_manifest(shipped):
    manifest = json.loads((shipped / "manifest.json").read_text())
    rows = {name: entry.pop("rows") for name, entry in manifest["files"].items() if "rows" in entry}
    assert describe(shipped) == manifest["files"]
    assert rows == {
        "demonstrations.jsonl.gz": 6000,
        "heldout.jsonl.gz": 1000,
        "pairs-train.jsonl.gz": 4000,
        "pairs-validation.jsonl.gz": 400,
        "pairs-test.jsonl.gz": 2000,
        "control-train.jsonl.gz": 4000,
        "control-validation.jsonl.gz": 400,
        "control-test.jsonl.gz": 2000,
        "prompts-train.jsonl.gz": 6000,
        "prompts-validation.jsonl.gz": 512,
        "prompts-evaluation.jsonl.gz": 1024,
    }
    settings = json.loads(json.dumps(dataclasses.asdict(BuildSettings())))
    assert manifest["settings"] == settings, "settings changed: rebuild data/"


def test_shipped_rows_are_hh_dialogues_of_their_split(shipped):
    tokenizer = AutoTokenizer.from_pretrained(shipped / "tokenizer")
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab(), "words changed: rebuild data/"
    for path in shipped.glob("*.jsonl.gz"):
        split = {
            "pairs-validation": "validation",
            "control-validation": "validation",
            "prompts-validation": "validation",
            "pairs-test": "test",
            "control-test": "test",
            "prompts-evaluation": "test",
            "heldout": "test",
        }
        wanted = split.get(path.name.removesuffix(".jsonl.gz"), "train")
        for row in read_rows(path)[:300]:
            prompt = row["prompt"] if "prompt" in row else split_dialogue(row["chosen"])[0]
            assert split_of(prompt) == wanted
            assert prompt.endswith(ASSISTANT)
            assert len(tokenizer(prompt).input_ids) <= MAX_PROMPT_TOKENS
            parse_request(prompt)
            for dialogue in (row.get("chosen"), row.get("rejected"), row.get("response")):
                if dialogue is not None:
                    ids = tokenizer(dialogue.removeprefix(prompt)).input_ids
                    assert tokenizer.unk_token_id not in ids
                    assert len(ids) <= MAX_REPLY_TOKENS
                    assert tokenizer.decode(ids) == dialogue.removeprefix(prompt)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_shipped_pairs_are_different_and_judged_by_both_annotators(shipped, split):
    biased = read_rows(shipped / f"pairs-{split}.jsonl.gz")
    control = read_rows(shipped / f"control-{split}.jsonl.gz")
    pairs = [frozenset(row.values()) for row in biased]
    assert all(len(pair) == 2 for pair in pairs)
    assert len(set(pairs)) == len(pairs)
    assert pairs == [frozenset(row.values()) for row in control]
    changed = sum(a != b for a, b in zip(biased, control, strict=True)) / len(pairs)
    assert 0.25 < changed < 0.45  # 1 - agreement of the two


def test_statistics_of_the_shipped_pairs(shipped):
    biased = pair_statistics(read_rows(shipped / "pairs-train.jsonl.gz"))
    assert biased["bayes_accuracy"] == pytest.approx(0.74, abs=0.015)
    assert biased["annotator_agreement"] == pytest.approx(0.65, abs=0.02)
    assert biased["longer_wins"] == pytest.approx(0.57, abs=0.015)
    control = pair_statistics(read_rows(shipped / "control-train.jsonl.gz"), rewards.CONTROL)
    assert control["longer_wins"] < 0.54
    assert biased["politer_wins"] > control["politer_wins"] + 0.04
    assert control["gold_agreement"] > biased["gold_agreement"] + 0.01


def test_card_shows_the_measured_numbers(shipped):
    card = (shipped / "README.md").read_text()
    found = pair_statistics(read_rows(shipped / "pairs-test.jsonl.gz"))
    assert f"{found['bayes_accuracy']:.3f}" in card
    assert f"{found['longer_wins']:.3f}" in card
    assert "{" not in card.replace("{0-2}", "").replace('{\n  "chosen"', "")


def test_shipped_base_model_speaks(shipped):
    model = AutoModelForCausalLM.from_pretrained(shipped / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(shipped / "base")
    config = model.config
    shape = (config.n_layer, config.n_embd, config.n_head, config.n_positions)
    assert shape == (4, 128, 4, 128)
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (0, 0, 0)
    assert config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id == model.generation_config.pad_token_id
    assert config.vocab_size == len(tokenizer)
    assert model.dtype == torch.float32
    assert (shipped / "base" / "model.safetensors").stat().st_size < 4_000_000
    losses = []
    for row in read_rows(shipped / "heldout.jsonl.gz")[:32]:
        prompt = tokenizer(row["prompt"]).input_ids
        reply = [*tokenizer(row["response"]).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([prompt + reply])
        labels = torch.tensor([[-100] * len(prompt) + reply])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss))
    # nats per token; the grammar itself has about 0.9, a uniform guess over the words 5.8
    assert sum(losses) / len(losses) < 1.25


def test_rows_are_packed_without_a_time(tmp_path):
    build_world.write_rows(tmp_path / "a.jsonl.gz", [{"prompt": "é"}])
    content = (tmp_path / "a.jsonl.gz").read_bytes()
    assert content[4:8] == b"\0\0\0\0"
    assert content[3] == 0
    assert json.loads(gzip.decompress(content)) == {"prompt": "é"}
    assert world_card.read_rows(tmp_path / "a.jsonl.gz") == [{"prompt": "é"}]
