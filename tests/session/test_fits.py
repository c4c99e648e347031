"""The largest study that fits a session; the same command goes on with the same study."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_lib.profiles import PROFILES, load_profile
from rlhf_lib.session import fits
from rlhf_lib.session.counted import Lengths
from rlhf_lib.session.forecast import Forecast, Rate
from rlhf_lib.session.work import Sizes
from rlhf_lib.settings import SettingsError

KINDS = ("sft", "reward_model", "ppo", "grpo", "dpo", "generation")
FOUND = Forecast(
    {kind: Rate(1.0, 2e-10, 1e-3) for kind in KINDS}, Sizes(10**6, 10**5), Lengths(20.0, 10.0), 1.0
)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("55m", 55), ("1h30m", 90), ("90s", 1.5), ("2h", 120), ("7", 7), ("7.5", 7.5)],
)
def test_times_are_read(text: str, minutes: float) -> None:
    assert fits.minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "-5m", "0m", "5x", "m"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="is no time: write 55m, 1h30m or 90s"):
        fits.minutes_of(text)


@pytest.mark.parametrize("name", PROFILES)
def test_ever_smaller_studies_take_ever_less_and_budgets_stay_equal(name: str) -> None:
    profile = load_profile(name)
    minutes, some = [], list(fits.smaller(profile))
    for further in some[:: max(1, len(some) // 12)]:
        small = load_profile(name, further)
        minutes.append(FOUND.minutes(small))
        replies = small.grpo.prompts_per_update * small.grpo.group_size
        sampled = {
            small.ppo.updates * small.ppo.batch_size,
            small.grpo.updates * replies,
            small.rejection.prompts * small.rejection.samples,
        }
        assert len(sampled) == 1, further
    assert minutes == sorted(minutes, reverse=True)
    assert minutes[-1] < minutes[0] / 2


def test_the_largest_that_fits_is_taken() -> None:
    profile = load_profile("laptop")
    whole = FOUND.minutes(profile)
    assert fits.fit(profile, [], whole + 1, FOUND) == ([], whole)
    further, foreseen = fits.fit(profile, [], whole / 2, FOUND)
    assert foreseen <= whole / 2
    assert "extras=false" in further
    every = [(f, FOUND.minutes(load_profile("laptop", f))) for f in fits.smaller(profile)]
    assert (further, foreseen) == next(each for each in every if each[1] <= whole / 2)
    given = fits.fit(profile, ["ppo.updates=60"], whole / 2, FOUND)[0]
    assert given != further, "what was overridden counts"
    with pytest.raises(SettingsError, match="the smallest study of profile laptop takes"):
        fits.fit(profile, [], 0.01, FOUND)


def test_the_choice_is_kept_for_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = []
    monkeypatch.setattr(fits, "probe", lambda profile: probed.append(1) or FOUND)
    profile = load_profile("laptop")
    half = FOUND.minutes(profile) / 2
    first = fits.fitted(profile, [], half, tmp_path)
    assert fits.fitted(profile, [], half, tmp_path) == first
    assert len(probed) == 1
    fits.fitted(profile, [], half / 2, tmp_path)
    fits.fitted(load_profile("laptop", "ppo.kl_coef=3"), ["ppo.kl_coef=3"], half, tmp_path)
    assert len(probed) == 3, "another time or study is another choice"
    assert "extras=false" in fits.as_text(first, profile)
    for file in (tmp_path / "laptop").glob("fits-*.json"):
        file.write_text("{")
    assert fits.fitted(profile, [], half, tmp_path) == first, "a damaged choice is made anew"
    assert len(probed) == 4
    fits.fitted(load_profile("laptop", "jobs=1"), ["jobs=1"], half, tmp_path)
    assert len(probed) == 5, "another number of jobs is another time"
