"""The largest study that fits a session: a probe first, then ever smaller ones until one does."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rlhf_lib.files import write_json
from rlhf_lib.measure.statistics import listed
from rlhf_lib.profiles import load_profile
from rlhf_lib.runtime import computed_by, environment
from rlhf_lib.session.counted import uncounted
from rlhf_lib.session.forecast import Forecast
from rlhf_lib.session.probe import probe
from rlhf_lib.settings import Profile, SettingsError, as_dict, content_hash, deciding

# what a smaller study has less of, all in one proportion: equal budgets stay equal
SIZES = (
    "data.train_pairs", "data.validation_pairs", "data.test_pairs", "data.demonstrations",
    "data.rl_prompts", "data.evaluation_prompts", "data.judge_pairs", "ppo.updates",
    "grpo.updates", "rejection.prompts", "evaluation.best_of_n_prompts",
    "evaluation.measured_prompts", "evaluation.heldout_texts", "evaluation.probe_prompts",
)  # fmt: skip


def smaller(profile: Profile) -> Iterator[list[str]]:
    """Overrides of ever smaller studies: what seed 0 has besides goes, then seeds, then sizes."""
    yield []
    rest = ["extras=false"] if profile.extras else []
    if rest:
        yield rest
    for seeds in range(profile.seeds - 1, 0, -1):
        yield [*rest, f"seeds={seeds}"]
    rest += [f"seeds={1}"] if profile.seeds > 1 else []
    whole = profile.ppo.updates
    shares = [updates / whole for updates in range(whole - 1, 0, -1)] or [0.5, 0.25, 0.125]
    for share in shares:
        kept = []
        for path in SIZES:
            section, _, key = path.partition(".")
            size = getattr(getattr(profile, section), key)
            kept += [f"{path}={max(1, round(size * share))}"] if size else []
        yield [*rest, *kept]


def fit(
    profile: Profile, overrides: Sequence[str], minutes: float, found: Forecast
) -> tuple[list[str], float]:
    """What to override further so that the study takes no longer, and the minutes foreseen.

    Raises SettingsError where even the smallest takes longer.
    """
    foreseen = 0.0
    for further in smaller(profile):
        foreseen = found.minutes(load_profile(profile.name, [*overrides, *further]))
        if foreseen <= minutes:
            return further, foreseen
    raise SettingsError(
        f"the smallest study of profile {profile.name} takes {foreseen:.1f} minutes here, and "
        f"{minutes:.1f} are left after the probe: take a smaller profile or model, or more time"
    )


def fitted(profile: Profile, overrides: Sequence[str], minutes: float, run_dir: Path) -> dict:
    """What `fit` has chosen; the choice is kept, so that the same command goes on with it."""
    machine = environment()["cpu"], computed_by(), profile.jobs, profile.threads
    asked = content_hash([deciding(as_dict(profile)), minutes, machine])[:8]
    kept = run_dir / profile.name / f"fits-{asked}.json"
    with suppress(FileNotFoundError, ValueError):  # of one that is damaged the choice is made anew
        return json.loads(kept.read_text(encoding="utf-8"))
    began = time.monotonic()
    found = probe(profile)
    left = minutes - (time.monotonic() - began) / 60  # of the session
    further, foreseen = fit(profile, overrides, left, found)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, choice := {"overrides": further, "minutes": foreseen})
    return choice


def minutes_of(text: str) -> float:
    """`55m`, `1h30m`, `90s` or a number of minutes. Raises SettingsError for anything else."""
    bare = re.fullmatch(r"\d+(\.\d+)?", text.strip())
    units = re.fullmatch(
        r"(?:(\d+)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+)s)?", text.strip() + "m" * bool(bare)
    )
    hours, minutes, seconds = (float(part or 0) for part in units.groups()) if units else (0, 0, 0)
    if (total := 60 * hours + minutes + seconds / 60) <= 0:
        raise SettingsError(f"{text!r} is no time: write 55m, 1h30m or 90s")
    return total


def as_text(choice: Mapping, profile: Profile) -> str:
    """What was chosen, in a line."""
    settings = " ".join(choice["overrides"]) or "as it is"
    own = uncounted(profile)
    without = f" (and what {listed(own)} take, which nobody can foresee)" if own else ""
    return f"{choice['minutes']:.1f} minutes are foreseen{without} for this study: {settings}"
