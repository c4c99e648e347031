"""Settings records, their hash, and the error for a name that does not exist."""

from __future__ import annotations

import dataclasses

import pytest

from rlhf_lib.settings import Profile, as_dict, content_hash, unknown


def test_an_unknown_name_lists_all_known_ones() -> None:
    error = unknown("stage", "pppo", ["ppo", "grpo", "dpo"])
    assert str(error) == "unknown stage 'pppo': did you mean 'ppo'? Known: dpo, grpo, ppo"


def test_settings_cannot_be_changed_in_place() -> None:
    for record in (Profile(name="x"), Profile(name="x").ppo):
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.name = "x"  # type: ignore[misc]


def test_content_hash_sees_values_and_not_their_order() -> None:
    assert content_hash({"a": 1, "b": [2, 3]}) == content_hash({"b": [2, 3], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2}) != content_hash({"b": 2})
    assert content_hash([2, 3]) != content_hash([3, 2])
    assert len(content_hash("é")) == 64


def test_as_dict_reaches_into_sections() -> None:
    assert as_dict(Profile(name="x"))["ppo"]["clip_range"] == 0.2


def test_an_unknown_name_among_many_lists_the_near_ones() -> None:
    error = str(
        unknown("setting", "ppo.kl_coeff", [f"grpo.{c}" for c in "abcdefghijkl"] + ["ppo.kl_coef"])
    )
    assert "did you mean 'ppo.kl_coef'?" in error
    assert len(error) < 150


def test_an_unknown_name_like_no_other_still_names_one() -> None:
    assert "did you mean" in str(unknown("profile", "", ["smoke", "laptop"]))
    assert "did you mean" in str(unknown("profile", "xyz", ["abc"]))
