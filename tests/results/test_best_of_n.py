"""The peak of best-of-n: chosen on some requests and measured on others, so there must be two."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from rlhf_lib.results import best_of_n
from rlhf_lib.settings import SettingsError


class Replies:
    """What `peak` asks of the samples: here no method was measured."""

    deciding = "gold"

    def unit(self, prompt: str) -> str:
        return prompt.removeprefix("Hello! ")

    def measured(self, names: list[str]) -> list[str]:
        return []


def curve(prompts: list[str], gold: dict[int, list[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        {"picked_by": "default", "prompt": prompt, "n": n, "gold": value}
        for n, values in gold.items()
        for prompt, value in zip(prompts, values, strict=True)
    )


def test_the_peak_is_chosen_on_one_half_and_measured_on_the_other() -> None:
    samples: Any = Replies()
    rows = curve(
        list("abcd"), {1: [0.0, 1.0, 0.0, 1.0], 2: [5.0, 2.0, 5.0, 2.0], 4: [1.0, 9.0] * 2}
    )
    found = best_of_n.peak([rows], samples)
    assert (found["n"], found["last"]) == (2, 4)
    assert found["gold"]["mean"] == 2.0, "of b and d, which chose nothing"
    assert found["last_minus_peak"]["mean"] == 7.0


@pytest.mark.parametrize("prompts", [["a"], ["a", "Hello! a"]])
def test_one_request_cannot_choose_a_peak_and_measure_it(prompts: list[str]) -> None:
    samples: Any = Replies()
    rows = curve(prompts, {1: [0.0] * len(prompts), 2: [1.0] * len(prompts)})
    with pytest.raises(SettingsError, match=r"evaluation\.best_of_n_prompts"):
        best_of_n.peak([rows], samples)
