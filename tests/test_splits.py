"""The judge's pairs: kept for it alone, by conversation."""

from __future__ import annotations

import pytest

from rlhf_lib.data import load_data
from rlhf_lib.models import load_tokenizer
from rlhf_lib.profiles import load_profile


@pytest.mark.parametrize("judge_pairs", [0, 40])
def test_conversations_of_the_judges_pairs_are_in_no_other_split(judge_pairs: int) -> None:
    profile = load_profile("smoke", [f"data.judge_pairs={judge_pairs}"])
    data = load_data(profile.data, load_tokenizer(profile.model.name))
    assert ("judge" in data.pairs) is (judge_pairs > 0)
    found = {split: {p.conversation for p in pairs} for split, pairs in data.pairs.items()}
    judge = found.pop("judge", set())
    assert len(data.pairs.get("judge", ())) == judge_pairs
    for split, others in found.items():
        assert others, split
        assert not judge & others, split
