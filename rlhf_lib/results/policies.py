"""What is said of each policy over all seeds: its measures, wins, gains, and what each need asks.

Differences are paired: each policy's k-th reply to a prompt with the other's k-th reply to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import pandas as pd
from scipy import stats

from rlhf_lib import catalogue
from rlhf_lib.measure import rankings
from rlhf_lib.measure.probes import ngrams, repetition
from rlhf_lib.measure.statistics import ANY, SHARE, Values, differences, estimate, minus

MEASURES = ("proxy", "gold", "judge", "kl", "kl_k1", "kl_k3", "entropy", "length", "finished")
BLOCK = 16  # replies in which distinct n-grams are counted together
Rows = Sequence[Sequence[dict]]  # of each seed


@dataclass(frozen=True)
class Samples:
    """Rows of every policy, seed by seed; all policies and seeds answered the same prompts.

    `chosen` and `heldout` are rows of `chosen.jsonl` and `heldout.jsonl`, a list a seed.
    """

    rows: Mapping[str, Rows]
    chosen: Rows
    heldout: Rows
    bootstrap: int  # resamples

    @property
    def deciding(self) -> str:
        """The measure that decides: the best of those that there are."""
        first = self.rows["sft"][0][0]
        return next(key for key in ("gold", "judge", "proxy") if key in first)

    def measured(self, names: Iterable[str]) -> list[str]:
        """Those of these policies that there are."""
        return [name for name in names if name in self.rows]

    def column(self, policy: str, key: str) -> list[np.ndarray]:
        rows = self.rows[policy]
        return [np.array([row[key] for row in seed], dtype=float) for seed in rows]

    def difference(self, one: str, other: str, key: str) -> list[np.ndarray]:
        return minus(self.column(one, key), self.column(other, key))

    def estimate(self, per_seed: Values, bounds: tuple[float, float] = ANY) -> dict:
        """One value a reply, in the rows' order; replies to equal prompts are one unit."""
        units = [[row["prompt"] for row in seed] for seed in self.rows["sft"]]
        return estimate(per_seed, self.bootstrap, units, bounds)

    def over_texts(self, per_seed: Sequence, bounds: tuple[float, float] = ANY) -> dict:
        """One value a text, or block of texts, each a unit."""
        return estimate(per_seed, self.bootstrap, bounds=bounds)

    def compare(self, pairs: Mapping[str, tuple[str, str]], key: str) -> dict[str, dict]:
        """One measure of two policies, for each of these pairs; one family."""
        values = {name: self.column(name, key) for pair in pairs.values() for name in pair}
        return differences(values, pairs, self.estimate)


def rewards(deciding: str) -> list[str]:
    """The proxy and the reward that decides, once where they are one."""
    return list(dict.fromkeys(("proxy", deciding)))


def policies(samples: Samples) -> dict[str, dict]:
    """All measures of every policy; gains over SFT with one family's correction a measure."""
    table = {}
    chosen = _beside_chosen(samples)
    for name in samples.rows:
        table[name] = _measures(samples, name)
        for other in ("sft", "base"):
            if name != other:
                table[name] |= _wins(samples, name, other)
        if chosen and name not in catalogue.policies("null"):
            table[name] |= _wins(chosen, name, "chosen")
    # differences to SFT; one family: the policies trained on top of it; the others alone
    untrained = samples.measured(catalogue.policies("base", "reference", "null"))
    families = [[name for name in samples.rows if name not in untrained]]
    families += [[name] for name in untrained]
    for key, family in product(rewards(samples.deciding), families):
        for name, gain in samples.compare({n: (n, "sft") for n in family}, key).items():
            table[name][f"{key}_gain"] = gain
    # perplexity of held-out texts, and `forgetting`: nats a token more than SFT needs
    values = _nats(samples)
    for name, per_seed in values.items():
        nats = samples.over_texts(per_seed)
        shown = {key: float(np.exp(nats[key])) for key in ("mean", "low", "high")}
        shown["per_seed"] = np.exp(nats["per_seed"]).tolist()
        table[name]["perplexity"] = nats | shown | {"nats": nats}
    trained = {name: (name, "sft") for name in values if name not in ("sft", "base")}
    for name, record in differences(values, trained, samples.over_texts).items():
        table[name]["forgetting"] = record
    return table


def _measures(samples: Samples, name: str) -> dict:
    rows = samples.rows[name]
    record = {
        key: samples.estimate(samples.column(name, key), SHARE if key == "finished" else ANY)
        for key in MEASURES
        if key in rows[0][0]
    }
    replies = [[row["response"] for row in seed] for seed in rows]
    repeated = [np.array([repetition(reply) for reply in seed]) for seed in replies]
    record["repetition"] = samples.estimate(repeated, SHARE)
    for n in (1, 2):
        record[f"distinct_{n}"] = samples.over_texts([distinct(r, n) for r in replies], SHARE)
    return record


def distinct(texts: Sequence[str], n: int, block: int = BLOCK) -> list[float]:
    """Distinct n-grams over all n-grams (Li et al. 2016, arXiv:1510.03055), one value a block.

    The ratio falls with the amount of text, so it is taken over `block` replies at a time; what is
    left over is not counted unless it is all there is. A block without any n-gram has 0.
    """
    whole = max(1, len(texts) // block)
    values = []
    for start in range(0, whole * block, block):
        grams = [gram for text in texts[start : start + block] for gram in ngrams(text, n)]
        values.append(len(set(grams)) / max(1, len(grams)))
    return values


def _beside_chosen(samples: Samples) -> Samples | None:
    """The prompts that have a chosen reply, which is one more "policy" there: "chosen"."""
    found = [{row["prompt"]: row for row in seed} for seed in samples.chosen]
    rows = {
        name: [
            [row for row in seed if row["prompt"] in known]
            for seed, known in zip(seeds, found, strict=True)
        ]
        for name, seeds in samples.rows.items()
    }
    if not all(rows["sft"]):
        return None
    asked = zip(rows["sft"], found, strict=True)
    rows["chosen"] = [[known[row["prompt"]] for row in seed] for seed, known in asked]
    return Samples(rows, samples.chosen, samples.heldout, samples.bootstrap)


def _wins(samples: Samples, name: str, other: str) -> dict:
    won = [rankings.wins(gap) for gap in samples.difference(name, other, samples.deciding)]
    longer = samples.difference(name, other, "length")
    controlled = [length_controlled(w, gap) for w, gap in zip(won, longer, strict=True)]
    return {
        f"win_rate_vs_{other}": samples.estimate(won, SHARE),
        f"length_controlled_vs_{other}": samples.estimate(controlled, SHARE),
    }


def length_controlled(won: np.ndarray, longer: np.ndarray) -> np.ndarray:
    """One value a reply; their mean is the win rate that a regression gives at equal lengths.

    `won`: 1, 0.5 or 0; `longer`: the length difference in tokens. After the length-controlled
    AlpacaEval (arXiv:2404.04475): wins regressed on tanh(difference / its spread), read at 0; here
    a straight line, which stands a policy that always wins. A value is the line's height at 0 plus
    that reply's pull on it, so that averages over prompts have the right error. Where all
    differences are alike nothing can be told apart, and `won` comes back.
    """
    if np.ptp(longer) == 0:
        return won
    x = np.tanh(longer / longer.std())
    slope, intercept, *_ = stats.linregress(x, won)
    centred = x - x.mean()
    pull = 1 - x.mean() * centred / (centred**2).mean()
    return intercept + pull * (won - intercept - slope * x)


def _nats(samples: Samples) -> dict[str, list[np.ndarray]]:
    """Of each policy one value a text and seed, so scaled that their mean is -log p over all
    tokens, per token; empty where there are no held-out texts.
    """
    values: dict[str, list[np.ndarray]] = {}
    for rows in samples.heldout:
        nll = pd.DataFrame([row["nll"] for row in rows])
        for name in nll:
            per_token = nll[name].to_numpy() / np.mean([row["tokens"] for row in rows])
            values.setdefault(str(name), []).append(per_token)
    return values


def compared(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Each two of the methods among these candidates, and each method and the baseline."""
    methods = [name for name in names if name != catalogue.baseline()]
    pairs = list(combinations(methods, 2))
    if catalogue.baseline() in names:
        pairs += [(method, catalogue.baseline()) for method in methods]
    return {f"{one}_minus_{other}": (one, other) for one, other in pairs}


def needs(samples: Samples, minutes: Mapping[str, Sequence[float]]) -> dict[str, dict]:
    """What a user may ask for, measured of each candidate and compared between them.

    `minutes`: of each candidate's training in each seed, the reward model included where the method
    learns from it. `better`: which direction is.
    """
    names = samples.measured(catalogue.candidates())
    gains = {name: samples.difference(name, "sft", samples.deciding) for name in names}
    per_minute = {
        name: [gain / spent for gain, spent in zip(gains[name], minutes[name], strict=True)]
        for name in names
    }
    kl = {name: samples.column(name, "kl") for name in names}
    nats = _nats(samples)
    asked = {
        "reward": (gains, samples.estimate, "higher"),
        "per_minute": (per_minute, samples.estimate, "higher"),
        "kl": (kl, samples.estimate, "lower"),
    }
    if nats:
        known = {name: nats[name] for name in names}
        asked["forgetting"] = (known, samples.over_texts, "lower")
    return {
        need: {
            "policies": {name: average(per_seed) for name, per_seed in values.items()},
            "comparisons": differences(values, compared(values), average),
            "better": better,
        }
        for need, (values, average, better) in asked.items()
    }


def overoptimisation(samples: Samples) -> dict | None:
    """The under-regularised PPO run minus the default one, in proxy and in what decides.

    To say over-optimisation both have to show, which needs no correction for there being two.
    """
    if "ppo_low_kl" not in samples.rows:
        return None
    keys = rewards(samples.deciding)
    return {key: samples.compare({key: ("ppo_low_kl", "ppo")}, key)[key] for key in keys}
