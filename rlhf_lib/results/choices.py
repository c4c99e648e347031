"""Which method for which need: rules over the measured `needs`, that may end in "not said"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rlhf_lib.catalogue import CATALOGUE
from rlhf_lib.measure.statistics import interval, listed
from rlhf_lib.results.policies import BASELINE, CANDIDATES, METHODS

NAMES = {record.name: record.label for record in CATALOGUE.values()}

WITHOUT_RL = ("dpo", BASELINE)  # nothing is sampled from the policy while it trains
WITH_RL = tuple(name for name in METHODS if name not in WITHOUT_RL)
ASKED = {  # need -> how it reads, its unit, and digits
    "reward": ("Highest {judge} reward", "gain over SFT", 2),
    "per_minute": ("Most {judge} reward per minute of training", "gain a minute", 2),
    "kl": ("Least KL to SFT", "nats a reply", 1),
    "forgetting": ("Least forgetting", "nats a token on held-out text", 3),
}


class Leaders(NamedTuple):
    """The best by its mean, those not distinguishable from it, and those clearly behind."""

    best: str
    tied: list[str]
    behind: list[str]


def risers(results: Mapping) -> list[str]:
    """The candidates that raised the judged reward over SFT, after correction."""
    gain = f"{results['judge']}_gain"
    measured = (name for name in CANDIDATES if name in results["policies"])
    return [name for name in measured if results["policies"][name][gain]["verdict"] == "higher"]


def leaders(need: Mapping, among: Iterable[str]) -> Leaders | None:
    """Who leads in one need among the given candidates, or None where there is nobody."""
    among = list(among)
    if not among:
        return None
    sign = 1 if need["better"] == "higher" else -1
    best = max(among, key=lambda name: sign * need["policies"][name]["mean"])
    others = [name for name in among if name != best]
    behind = [name for name in others if _beats(need, best, name)]
    return Leaders(best, [name for name in others if name not in behind], behind)


def _beats(need: Mapping, one: str, other: str) -> bool:
    """Does the corrected comparison call `one` better than `other`?"""
    pairs, wanted = need["comparisons"], need["better"]
    if f"{one}_minus_{other}" in pairs:
        return pairs[f"{one}_minus_{other}"]["verdict"] == wanted
    opposite = {"higher": "lower", "lower": "higher"}[wanted]
    return pairs[f"{other}_minus_{one}"]["verdict"] == opposite


def sentences(results: Mapping) -> list[str]:
    """One sentence a need; a study from before there were needs has none."""
    needs, judge = results.get("needs"), results["judge"]
    if not needs:
        return []
    able = risers(results)
    if not able:
        names = listed([NAMES[name] for name in CANDIDATES])
        return [
            f"**Which method for which need? None of them by these data:** {names} were not "
            f"shown to raise {judge} reward over SFT, so SFT itself, which costs nothing more, is "
            "the choice."
        ]
    said = [_sentence(needs[key], key, able, judge) for key in ASKED if key in needs]
    said.append(_without_rl(needs["reward"], able, judge))
    if judge == "proxy":
        said.append(
            "No judge but the training reward was measured: these choices say who optimises it "
            "best, not whose replies are best."
        )
    if len(results["seeds"]) == 1:
        said.append("One seed: the choices are between these trained models, not between methods.")
    return said


def _sentence(need: Mapping, key: str, able: list[str], judge: str) -> str:
    title, unit, digits = ASKED[key]
    found = leaders(need, able)
    assert found is not None
    return f"**{title.format(judge=judge)}:** {_who(need, found, unit, digits)}"


def _who(need: Mapping, found: Leaders, unit: str, digits: int) -> str:
    def numbers(names: Iterable[str]) -> str:
        records = need["policies"]
        return listed([f"{NAMES[name]} ({interval(records[name], digits)})" for name in names])

    best = f"{NAMES[found.best]} ({interval(need['policies'][found.best], digits)} {unit})"
    if found.tied:
        text = f"the data do not say: {best} is not distinguishable from {numbers(found.tied)}"
        return text + (f"; clearly behind: {numbers(found.behind)}." if found.behind else ".")
    if found.behind:
        return f"{best}, clearly ahead of {numbers(found.behind)}."
    return f"{best}; nothing else asked here raised the reward."


def _without_rl(need: Mapping, able: list[str], judge: str) -> str:
    """The best that needs no reinforcement learning, and whether RL adds to it."""
    title, unit = "**No reinforcement learning:**", ASKED["reward"][1]
    plain = leaders(need, [name for name in able if name in WITHOUT_RL])
    if plain is None:
        names = listed([NAMES[name] for name in WITHOUT_RL], "nor")
        return f"{title} neither {names} raised {judge} reward over SFT."
    text = f"{title} {_who(need, plain, unit, 2)}"
    with_rl = leaders(need, [name for name in able if name in WITH_RL])
    if with_rl is None:
        return f"{text} No method with it raised the reward at all."
    if _beats(need, with_rl.best, plain.best):
        return f"{text} {NAMES[with_rl.best]} is clearly above {NAMES[plain.best]}."
    if _beats(need, plain.best, with_rl.best):
        return f"{text} {NAMES[plain.best]} is clearly above {NAMES[with_rl.best]}."
    return f"{text} {NAMES[with_rl.best]} is not distinguishable from {NAMES[plain.best]}."
