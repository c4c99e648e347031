"""The judge's pairs: kept for it alone, by conversation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_lib.data.pairs import load_data
from rlhf_lib.models.load import load_tokenizer
from rlhf_lib.profiles import load_profile
from rlhf_lib.settings import SettingsError


@pytest.mark.parametrize("judge_pairs", [0, 40])
def test_conversations_of_the_judges_pairs_are_in_no_other_split(
    judge_pairs: int, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = []
    for i in range(400):  # two pairs of each conversation
        prompt = f"\n\nHuman: what is {i // 2}?\n\nAssistant:"
        rows.append({"chosen": f"{prompt} {i}", "rejected": f"{prompt} no {i}"})
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    profile = load_profile("smoke", [f"data.source=path:{file}", f"data.judge_pairs={judge_pairs}"])
    data = load_data(profile.data, tiny_tokenizer)
    assert ("judge" in data.pairs) is (judge_pairs > 0)
    found = {split: {p.conversation for p in pairs} for split, pairs in data.pairs.items()}
    judge = found.pop("judge", set())
    assert len(data.pairs.get("judge", ())) == judge_pairs
    for split, others in found.items():
        assert others, split
        assert not judge & others, split


def test_the_bundled_world_keeps_no_pairs_for_a_judge() -> None:
    profile = load_profile("smoke", ["data.judge_pairs=40"])
    with pytest.raises(SettingsError, match=r"data\.judge_pairs=40.*leave it at 0"):
        load_data(profile.data, load_tokenizer(profile.model.name))
