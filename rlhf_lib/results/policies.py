"""What is said of each policy over all seeds: its measures, wins, gains, and what each need asks.

Differences are paired: each policy's k-th reply to a prompt with the other's k-th reply to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from rlhf_lib import catalogue
from rlhf_lib.files import read_jsonl
from rlhf_lib.measure import rankings
from rlhf_lib.measure.probes import ngrams, repetition
from rlhf_lib.measure.statistics import (
    ANY,
    SHARE,
    Values,
    differences,
    estimate,
    seed_by_seed,
)

MEASURES = ("proxy", "gold", "judge", "kl", "kl_k1", "kl_k3", "entropy", "length", "finished")
BLOCK = 16  # replies in which distinct n-grams are counted together
Rows = Sequence[Sequence[dict]]  # of each seed


@dataclass(frozen=True)
class Samples:
    """Rows of every policy, seed by seed; all policies and seeds answered the same prompts.

    A list's places are the seeds: one that a policy does not have is empty there, or beyond the
    end. `of` alone reads that; whatever it leads to has the seed's number with it.

    `chosen` and `heldout` are rows of `chosen.jsonl` and `heldout.jsonl`, a list a seed. `unit`: of
    a prompt, what other prompts would have another of; prompts that share it count as one.
    """

    rows: Mapping[str, Rows]
    chosen: Rows
    heldout: Rows
    unit: Callable[[str], str] = str  # the prompt itself

    def of(self, policy: str) -> dict[int, Sequence[dict]]:
        """A policy's rows in each seed that has it."""
        return {seed: rows for seed, rows in enumerate(self.rows[policy]) if rows}

    @property
    def deciding(self) -> str:
        """The measure that decides: the best of those that there are."""
        first = self.rows["sft"][0][0]
        return next(key for key in ("gold", "judge", "proxy") if key in first)

    def measured(self, names: Iterable[str]) -> list[str]:
        """Those of these policies that there are."""
        return [name for name in names if name in self.rows]

    def prompts(self, key: str) -> list[str]:
        """Those whose replies have this measure: a prompt that was asked twice stands twice."""
        return [r["prompt"] for r in self.rows["sft"][0] if r.get("reply", 0) == 0 and key in r]

    def units(self, key: str) -> np.ndarray:
        """Of each of these prompts."""
        return np.array([self.unit(prompt) for prompt in self.prompts(key)])

    def replies(self, policy: str, key: str) -> dict[int, np.ndarray]:
        """One measure of a policy's replies, of each seed that has it (replies, prompts)."""
        shape = -1, len(self.prompts(key))
        return {
            seed: np.array([r[key] for r in rows if key in r], float).reshape(shape)
            for seed, rows in self.of(policy).items()
        }

    def means(self, policy: str, key: str) -> dict[int, np.ndarray]:
        """The same, averaged over the replies to a prompt."""
        return {seed: values.mean(0) for seed, values in self.replies(policy, key).items()}

    def column(self, policy: str, key: str) -> list[np.ndarray]:
        """The same, as a list."""
        return list(self.means(policy, key).values())

    def gaps(self, one: str, other: str, key: str) -> dict[int, np.ndarray]:
        """One less the other, prompt by prompt, in each seed that has both; of SFT all that it was
        asked to say, so that no one draw decides.
        """
        return seed_by_seed(self.means(one, key), self.means(other, key))

    def difference(self, one: str, other: str, key: str) -> list[np.ndarray]:
        """The same, as a list."""
        return list(self.gaps(one, other, key).values())

    def estimate(
        self, per_seed: Sequence[np.ndarray], bounds: tuple[float, float] = ANY, key: str = ""
    ) -> dict:
        """Of one value a prompt that has this measure (default: the deciding one)."""
        units = self.units(key or self.deciding)
        return estimate(per_seed, [units] * len(per_seed), bounds)

    def over_texts(self, per_seed: Sequence, bounds: tuple[float, float] = ANY) -> dict:
        """One value a text, or block of texts, each a unit."""
        return estimate(per_seed, bounds=bounds)

    def compare(self, pairs: Mapping[str, tuple[str, str]], key: str) -> dict[str, dict]:
        """One measure of two policies, for each of these pairs; one family."""
        values = {name: self.means(name, key) for pair in pairs.values() for name in pair}
        return differences(values, pairs, partial(self.estimate, key=key))


def read_samples(folders: Sequence[Path]) -> dict[str, list[list[dict]]]:
    """Of each policy its rows seed by seed, whose folders these are, as `Samples` has them."""
    files = [{path.stem: path for path in (each / "samples").glob("*.jsonl")} for each in folders]
    found: dict[str, list[list[dict]]] = {}
    for name in sorted({name for seed in files for name in seed}):
        last = max(place for place, seed in enumerate(files) if name in seed)
        seeds = files[: last + 1]
        found[name] = [read_jsonl(seed[name]) if name in seed else [] for seed in seeds]
    return found


def rewards(deciding: str) -> list[str]:
    """The proxy and the reward that decides, once where they are one."""
    return list(dict.fromkeys(("proxy", deciding)))


def policies(samples: Samples) -> dict[str, dict]:
    """All measures of every policy, and its gains over SFT (families: `compared`)."""
    table = {}
    chosen = _chosen(samples)
    for name in samples.rows:
        table[name] = _measures(samples, name)
        for other in ("sft", "base"):
            if name != other:
                rival = [samples.replies(other, key) for key in (samples.deciding, "length")]
                table[name] |= _wins(samples, name, other, *rival)
        if chosen and name not in catalogue.policies("null"):
            table[name] |= _wins(samples, name, "chosen", *chosen)
    # the candidates are one family; every other policy is a demonstration, and alone
    candidates = samples.measured(catalogue.candidates())
    families = [candidates, *([name] for name in samples.rows if name not in candidates)]
    for key, family in product(rewards(samples.deciding), families):
        for name, gain in samples.compare({n: (n, "sft") for n in family}, key).items():
            table[name][f"{key}_gain"] = gain
    # perplexity of held-out texts, and `forgetting`: nats a token more than SFT needs
    values = _nats(samples)
    for name, per_seed in values.items():
        nats = samples.over_texts(list(per_seed.values()))
        shown = {key: float(np.exp(nats[key])) for key in ("mean", "low", "high")}
        shown["per_seed"] = np.exp(nats["per_seed"]).tolist()
        table[name]["perplexity"] = nats | shown | {"nats": nats}
    trained = {name: (name, "sft") for name in values if name not in ("sft", "base")}
    for name, record in differences(values, trained, samples.over_texts).items():
        table[name]["forgetting"] = record
    return table


def _measures(samples: Samples, name: str) -> dict:
    seeds = list(samples.of(name).values())
    first = seeds[0][0]
    record = {
        key: samples.estimate(samples.column(name, key), SHARE if key == "finished" else ANY, key)
        for key in MEASURES
        if key in first
    }
    whole = [[row["response"] for row in seed if "proxy" in row] for seed in seeds]
    repeated = [
        np.reshape([repetition(reply) for reply in seed], (-1, len(samples.prompts("proxy"))))
        for seed in whole
    ]
    record["repetition"] = samples.estimate([r.mean(0) for r in repeated], SHARE, "proxy")
    for n in (1, 2):
        record[f"distinct_{n}"] = samples.over_texts([distinct(r, n) for r in whole], SHARE)
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


def _chosen(samples: Samples) -> list[dict[int, np.ndarray]]:
    """The deciding reward and the length of the dataset's chosen reply to each prompt, of each
    seed (1, prompts): not a number where it has none; empty where no prompt has one.
    """
    if not samples.chosen or not all(samples.chosen):
        return []
    asked = samples.prompts(samples.deciding)
    found = [{row["prompt"]: row for row in seed} for seed in samples.chosen]
    return [
        {
            seed: np.array([[float(known.get(p, {}).get(key, np.nan)) for p in asked]])
            for seed, known in enumerate(found)
        }
        for key in (samples.deciding, "length")
    ]


def _wins(
    samples: Samples, name: str, other: str, rewards: Values, lengths: Values
) -> dict[str, dict]:
    """Wins against `other`, whose replies have these rewards and lengths: (replies, prompts)."""
    won, controlled = [], []
    reward, length = (samples.replies(name, key) for key in (samples.deciding, "length"))
    for seed in (seed for seed in reward if seed in rewards):
        own, rival = reward[seed], rewards[seed]
        count = min(len(own), len(rival)) if len(rival) > 1 else len(own)
        gap = own[:count] - rival[:count]
        longer = length[seed][:count] - lengths[seed][:count]
        known = ~np.isnan(gap[0])
        raw = rankings.wins(gap[:, known])
        flat = length_controlled(raw.ravel(), longer[:, known].ravel()).reshape(raw.shape)
        for means, values in ((won, raw), (controlled, flat)):
            means.append(values.mean(0))
    units = samples.units(samples.deciding)[known]
    return {
        f"win_rate_vs_{other}": estimate(won, [units] * len(won), SHARE),
        f"length_controlled_vs_{other}": estimate(controlled, [units] * len(won), SHARE),
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


def _nats(samples: Samples) -> dict[str, dict[int, np.ndarray]]:
    """Of each policy one value a text and seed, so scaled that their mean is -log p over all
    tokens, per token; empty where there are no held-out texts.
    """
    values: dict[str, dict[int, np.ndarray]] = {}
    for seed, rows in enumerate(samples.heldout):
        nll = pd.DataFrame([row["nll"] for row in rows])
        for name in nll:
            per_token = nll[name].to_numpy() / np.mean([row["tokens"] for row in rows])
            values.setdefault(str(name), {})[seed] = per_token
    return values


def compared(names: Sequence[str]) -> dict[str, dict[str, tuple[str, str]]]:
    """The families of comparisons between candidates, fixed before anything is measured.

    `among`: each two of the methods. `baseline`: each method and best-of-n SFT. (Those against SFT
    are in `policies`.) A family's differences are corrected for their number; the demonstrations,
    SFT's second draw and the runs of a sweep, are in none.
    """
    methods = [name for name in names if name != catalogue.baseline()]
    families = {"among": list(combinations(methods, 2))}
    if catalogue.baseline() in names:
        families["baseline"] = [(method, catalogue.baseline()) for method in methods]
    return {
        family: {f"{one}_minus_{other}": (one, other) for one, other in pairs}
        for family, pairs in families.items()
    }


def comparisons(
    values: Mapping[str, Values], average: Callable[[list[np.ndarray]], dict]
) -> dict[str, dict]:
    """All differences between candidates, each corrected within its family."""
    return {
        key: record | {"family": family}
        for family, pairs in compared(list(values)).items()
        for key, record in differences(values, pairs, average).items()
    }


def needs(
    samples: Samples, flops: Mapping[str, float], minutes: Mapping[str, float]
) -> dict[str, dict]:
    """What a user may ask for, measured of each candidate and compared between them.

    `flops` (in any unit), `minutes`: what each candidate's training takes, the reward model
    included where the method learns from it: means over the seeds, for the load of a machine is no
    luck of a seed. `better`: which direction is.
    """
    names = samples.measured(catalogue.candidates())
    gains = {name: samples.gaps(name, "sft", samples.deciding) for name in names}

    def per(price: Mapping[str, float]) -> dict[str, dict[int, np.ndarray]]:
        return {n: {seed: gain / price[n] for seed, gain in gains[n].items()} for n in names}

    kl, over_kl = (
        {name: samples.means(name, "kl") for name in names},
        partial(samples.estimate, key="kl"),
    )
    nats = _nats(samples)
    asked: dict[str, tuple[Mapping, Callable, str]] = {
        "reward": (gains, samples.estimate, "higher")
    }
    if all(flops.values()):  # a method of the user's may compute by other ways than the library's
        asked["per_flop"] = (per(flops), samples.estimate, "higher")
    asked["per_minute"] = (per(minutes), samples.estimate, "higher")
    asked["kl"] = (kl, over_kl, "lower")
    if nats:
        known = {name: seed_by_seed(nats[name], nats["sft"]) for name in names}
        asked["forgetting"] = (known, samples.over_texts, "lower")
    return {
        need: {
            "policies": {name: average(list(seeds.values())) for name, seeds in values.items()},
            "comparisons": comparisons(values, average),
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
