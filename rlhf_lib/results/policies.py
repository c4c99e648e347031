"""What is said of each policy over all seeds: its measures, wins, gains, and what each need asks.

Differences are paired: each policy's k-th reply to a prompt with the other's k-th reply to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from rlhf_lib.measure import rankings, texts
from rlhf_lib.measure.statistics import compare, estimate

METHODS = ("ppo", "grpo", "dpo")
BASELINE = "rejection_sft"  # same samples and reward model, no policy gradient
CANDIDATES = (*METHODS, BASELINE)
COMPARED = (*combinations(METHODS, 2), *((method, BASELINE) for method in METHODS))
NULL = "sft_again"  # a second draw from SFT: no claim is made of it
MEASURES = ("proxy", "gold", "judge", "kl", "kl_k1", "kl_k3", "entropy", "length", "finished")
ANY, SHARE = (-np.inf, np.inf), (0.0, 1.0)  # bounds of an interval
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
    def judge(self) -> str:
        """The deciding measure: the best of those that were measured."""
        first = self.rows["sft"][0][0]
        return next(key for key in ("gold", "judge", "proxy") if key in first)

    def column(self, policy: str, key: str) -> list[np.ndarray]:
        rows = self.rows[policy]
        return [np.array([row[key] for row in seed], dtype=float) for seed in rows]

    def difference(self, one: str, other: str, key: str) -> list[np.ndarray]:
        pairs = zip(self.column(one, key), self.column(other, key), strict=True)
        return [a - b for a, b in pairs]

    def estimate(self, per_seed: Sequence[np.ndarray], bounds: tuple[float, float] = ANY) -> dict:
        """One value a reply, in the rows' order; replies to equal prompts are one unit."""
        units = [[row["prompt"] for row in seed] for seed in self.rows["sft"]]
        return estimate(per_seed, self.bootstrap, units, bounds)

    def compare(self, one: str, other: str, key: str) -> dict:
        return self.estimate(self.difference(one, other, key))


def rewards(judge: str) -> list[str]:
    """The proxy and the reward that decides, once where they are one."""
    return list(dict.fromkeys(("proxy", judge)))


def policies(samples: Samples) -> dict[str, dict]:
    """All measures of every policy; gains over SFT with one family's correction a measure."""
    table = {name: _measures(samples, name) for name in samples.rows}
    for name in table:
        for other in ("sft", "base"):
            if name != other:
                table[name] |= _wins(samples, name, other)
        if name != NULL:
            table[name] |= _wins_against_chosen(samples, name)
    for key in rewards(samples.judge):
        for name, record in _gains(samples, key).items():
            table[name][f"{key}_gain"] = record
    _add_heldout(samples, table)
    return table


def _measures(samples: Samples, name: str) -> dict:
    rows = samples.rows[name]
    record = {
        key: samples.estimate(samples.column(name, key), SHARE if key == "finished" else ANY)
        for key in MEASURES
        if key in rows[0][0]
    }
    repeated = [np.array([texts.repetition(r["response"]) for r in seed]) for seed in rows]
    record["repetition"] = samples.estimate(repeated, SHARE)
    for n in (1, 2):
        blocks = [texts.distinct([row["response"] for row in seed], n) for seed in rows]
        record[f"distinct_{n}"] = estimate(blocks, samples.bootstrap, bounds=SHARE)
    return record


def _gains(samples: Samples, key: str) -> dict[str, dict]:
    """Differences to SFT. One family: the policies trained on top of it."""
    gains = {name: samples.compare(name, "sft", key) for name in samples.rows}
    trained = {name: r for name, r in gains.items() if name not in ("base", "sft", NULL)}
    alone = {name: compare({name: r})[name] for name, r in gains.items() if name not in trained}
    return alone | compare(trained)


def _wins(samples: Samples, name: str, other: str) -> dict:
    won = [rankings.wins(gap) for gap in samples.difference(name, other, samples.judge)]
    longer = samples.difference(name, other, "length")
    controlled = [length_controlled(w, gap) for w, gap in zip(won, longer, strict=True)]
    return {
        f"win_rate_vs_{other}": samples.estimate(won, SHARE),
        f"length_controlled_vs_{other}": samples.estimate(controlled, SHARE),
    }


def _wins_against_chosen(samples: Samples, name: str) -> dict:
    """Wins over the dataset's chosen replies, at the prompts that have one."""
    won, controlled, units = [], [], []
    for rows, chosen in zip(samples.rows[name], samples.chosen, strict=True):
        by_prompt = {row["prompt"]: row for row in chosen}
        pairs = [(row, by_prompt[row["prompt"]]) for row in rows if row["prompt"] in by_prompt]
        if not pairs:
            return {}
        key = samples.judge
        won.append(rankings.wins(np.array([row[key] - other[key] for row, other in pairs])))
        longer = np.array([row["length"] - other["length"] for row, other in pairs], dtype=float)
        controlled.append(length_controlled(won[-1], longer))
        units.append([row["prompt"] for row, _ in pairs])
    return {
        "win_rate_vs_chosen": estimate(won, samples.bootstrap, units, SHARE),
        "length_controlled_vs_chosen": estimate(controlled, samples.bootstrap, units, SHARE),
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


def _add_heldout(samples: Samples, table: dict[str, dict]) -> None:
    """Perplexity of held-out texts, and `forgetting`: nats a token more than SFT needs."""
    names = list(samples.heldout[0][0]["nll"]) if samples.heldout[0] else []
    values = {name: _nats(samples.heldout, name) for name in names}
    for name in names:
        nats = estimate(values[name], samples.bootstrap)
        shown = {key: float(np.exp(nats[key])) for key in ("mean", "low", "high")}
        per_seed = np.exp(nats["per_seed"]).tolist()
        table[name]["perplexity"] = nats | shown | {"per_seed": per_seed, "nats": nats}
    more = {
        name: estimate(
            [a - b for a, b in zip(values[name], values["sft"], strict=True)], samples.bootstrap
        )
        for name in names
        if name not in ("sft", "base")
    }
    for name, record in compare(more).items():
        table[name]["forgetting"] = record


def _nats(heldout: Rows, name: str) -> list[np.ndarray]:
    """One value a text and seed, so scaled that their mean is -log p over all tokens, per token."""
    return [
        np.array([row["nll"][name] for row in rows]) / np.mean([row["tokens"] for row in rows])
        for rows in heldout
    ]


def comparisons(samples: Samples, key: str) -> dict[str, dict]:
    """Each two of the candidates in one measure; all six are one family."""
    return compare({_pair(a, b): samples.compare(a, b, key) for a, b in COMPARED})


def _pair(one: str, other: str) -> str:
    return f"{one}_minus_{other}"


def needs(samples: Samples, minutes: Mapping[str, Sequence[float]]) -> dict[str, dict]:
    """What a user may ask for, measured of each candidate and compared between them.

    `minutes`: of each candidate's training in each seed, the reward model included where the method
    learns from it. `better`: which direction is.
    """
    values = {
        "reward": {name: samples.difference(name, "sft", samples.judge) for name in CANDIDATES},
        "kl": {name: samples.column(name, "kl") for name in CANDIDATES},
    }
    values["per_minute"] = {
        name: [g / m for g, m in zip(values["reward"][name], minutes[name], strict=True)]
        for name in CANDIDATES
    }
    table = {key: _need(values[key], samples.estimate) for key in ("reward", "per_minute", "kl")}
    if samples.heldout[0]:
        nats = {name: _nats(samples.heldout, name) for name in CANDIDATES}
        table["forgetting"] = _need(nats, lambda v: estimate(v, samples.bootstrap))
    for key, record in table.items():
        record["better"] = "lower" if key in ("kl", "forgetting") else "higher"
    return table


def _need(
    values: Mapping[str, list[np.ndarray]], average: Callable[[list[np.ndarray]], dict]
) -> dict:
    pairs = {
        _pair(one, other): average([a - b for a, b in zip(values[one], values[other], strict=True)])
        for one, other in COMPARED
    }
    return {
        "policies": {name: average(per_seed) for name, per_seed in values.items()},
        "comparisons": compare(pairs),
    }


def overoptimisation(samples: Samples) -> dict | None:
    """The under-regularised PPO run minus the default one, in proxy and in what decides.

    To say over-optimisation both have to show, which needs no correction for there being two.
    """
    if "ppo_low_kl" not in samples.rows:
        return None
    keys = rewards(samples.judge)
    return {key: compare({key: samples.compare("ppo_low_kl", "ppo", key)})[key] for key in keys}
