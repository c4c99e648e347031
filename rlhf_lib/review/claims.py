"""What a published figure shows: an interval, whether chance would do, the sample it would take.

    python -m rlhf_lib check-claims "wins 36 of 100; accuracy 95 of 200; reward 5.5 (1.6) of 100"

Three forms, divided by semicolons: `NAME k of n` and `NAME p% of n` are shares, `NAME mean (sd) of
n` is a mean. `of ?` says that n was not published: then it is taken as 100, and said so. Only what
was published is known, so comparisons are of independent samples; where both answered the same
prompts, pairing them could have seen more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from math import ceil, sqrt
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from rlhf_lib.measure.statistics import LEVEL, POWER, holm
from rlhf_lib.settings import UserError

ASSUMED = 100  # where n was not said
Z, Z_POWER = stats.norm.ppf((1 + LEVEL) / 2), stats.norm.ppf(POWER)
FORMS = '"NAME 36 of 100", "NAME 36% of 100" or "NAME 5.5 (1.6) of 100"; "of ?" where n is unknown'
_NUMBER = r"[-−+]?\d+(?:\.\d+)?"
_CLAIM = re.compile(
    rf"(?P<name>.*?)\s*(?P<value>{_NUMBER})\s*(?P<percent>%)?"
    rf"\s*(?:\((?P<sd>{_NUMBER})\))?\s+of\s+(?P<n>\d+|\?)"
)

# What earlier reports of this kind published, as `read` takes it. In the first all but its accuracy
# are called estimates by itself.
EARLIER = {
    "A": "reward-model accuracy 95 of 200; PPO wins against base 65% of ?; "
    "GRPO wins against base 60% of ?; DPO wins against base 55% of ?",
    "B": "reward-model accuracy 43% of ?; reward of base 5.023 (1.568) of 100; "
    "reward of SFT 5.407 (1.341) of 100; reward of PPO 5.498 (1.576) of 100; "
    "reward of GRPO 5.578 (1.207) of 100; reward of DPO 5.073 (2.299) of 100",
    "D": "PPO wins against reference 36% of ?; GRPO wins against reference 50% of ?; "
    "DPO wins against reference 43% of ?; reward of reference 0.6040 (2.5001) of ?; "
    "reward of PPO 1.1899 (2.0428) of ?; reward of GRPO 1.4430 (2.4051) of ?; "
    "reward of DPO 0.7949 (2.1667) of ?",
}


class Claim(NamedTuple):
    """A share (`sd` None, `value` between 0 and 1) or a mean, of n independent replies or pairs."""

    name: str
    value: float
    sd: float | None
    n: int
    assumed: bool  # n was not said

    @property
    def wins(self) -> int:
        return round(self.value * self.n)

    def interval(self) -> tuple[float, float]:
        """95 %: Wilson's of a share, Student's of a mean."""
        if self.sd is None:
            found = stats.binomtest(self.wins, self.n).proportion_ci(LEVEL, method="wilson")
            return float(found.low), float(found.high)
        half = float(stats.t.ppf((1 + LEVEL) / 2, self.n - 1)) * self.sd / sqrt(self.n)
        return self.value - half, self.value + half

    def shown(self) -> str:
        """As it is read in a table."""
        low, high = self.interval()
        if self.sd is None:
            return f"{self.value:.0%} [{100 * low:.0f}, {100 * high:.0f}]"
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}]"


class Verdict(NamedTuple):
    """A share against chance, or two claims against each other."""

    what: str
    difference: float
    low: float
    high: float
    p: float  # against chance alone; of a pair corrected for the number of pairs, by Holm
    needed: int | None  # of each sample, to see this difference in four of five repetitions

    @property
    def said(self) -> str:
        if self.p >= 1 - LEVEL:
            return "not distinguishable"
        return "higher" if self.difference > 0 else "lower"


def read(text: str) -> list[Claim]:
    """Raises UserError for a claim that cannot be read, or cannot be true."""
    claims = []
    for piece in filter(None, (piece.strip() for piece in text.split(";"))):
        found = _CLAIM.fullmatch(piece)
        if found is None:
            raise UserError(f"cannot read the claim {piece!r}: write {FORMS}")
        value, n = _number(found["value"]), ASSUMED if found["n"] == "?" else int(found["n"])
        name, sd = found["name"] or "value", _number(found["sd"]) if found["sd"] else None
        if sd is None:
            value = value / 100 if found["percent"] else value / max(n, 1)
        if n < 2 or (sd is None and not 0 <= value <= 1) or (sd is not None and sd <= 0):
            raise UserError(
                f"the claim {piece!r} cannot be: n has to be 2 or more, a share between 0 and 1, "
                "a standard deviation above 0"
            )
        claims.append(Claim(name, value, sd, n, found["n"] == "?"))
    if not claims:
        raise UserError(f"no claim was given: write {FORMS}")
    return claims


def _number(text: str) -> float:
    return float(text.replace("−", "-"))


def against_chance(claim: Claim) -> Verdict:
    """A share against one half, by the exact binomial test."""
    low, high = claim.interval()
    p = stats.binomtest(claim.wins, claim.n).pvalue
    gap = claim.value - 0.5
    needed = None
    if gap:
        normal = ((Z * 0.5 + Z_POWER * sqrt(claim.value * (1 - claim.value))) / gap) ** 2
        needed = ceil(normal + 1 / abs(gap))  # an exact test sees a little less than a normal one
    return Verdict(f"{claim.name} against chance", gap, low - 0.5, high - 0.5, float(p), needed)


def against_each_other(claims: Sequence[Claim]) -> list[Verdict]:
    """Every pair of claims about the same thing; p corrected for the number of pairs, by Holm.

    Both are win rates ("PPO wins", "DPO wins against base"), or the first word says what is
    measured ("reward of PPO", "reward of DPO").
    """
    pairs = [(a, b) for a, b in combinations(claims, 2) if _kind(a) == _kind(b)]
    found = [_difference(a, b) for a, b in pairs]
    corrected = holm([one.p for one in found])
    return [one._replace(p=p) for one, p in zip(found, corrected, strict=True)]


def _kind(claim: Claim) -> tuple:
    words = claim.name.lower().split()
    return claim.sd is None, "wins" if "wins" in words else words[0] if words else ""


def _difference(a: Claim, b: Claim) -> Verdict:
    what, gap, correction = f"{a.name} − {b.name}", a.value - b.value, 1.0
    if a.sd is None or b.sd is None:
        table = [[a.wins, a.n - a.wins], [b.wins, b.n - b.wins]]
        exact: Any = stats.fisher_exact(table)
        p = float(exact.pvalue)
        (a_low, a_high), (b_low, b_high) = a.interval(), b.interval()
        # Newcombe 1998, method 10: from the two Wilson intervals
        low = gap - sqrt((a.value - a_low) ** 2 + (b_high - b.value) ** 2)
        high = gap + sqrt((a_high - a.value) ** 2 + (b.value - b_low) ** 2)
        variance = a.value * (1 - a.value) + b.value * (1 - b.value)
    else:
        parts = a.sd**2 / a.n, b.sd**2 / b.n
        error = sqrt(sum(parts))
        freedom = sum(parts) ** 2 / (parts[0] ** 2 / (a.n - 1) + parts[1] ** 2 / (b.n - 1))
        p = 2 * float(stats.t.sf(abs(gap) / error, freedom))  # Welch's
        half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
        low, high, variance = gap - half, gap + half, a.sd**2 + b.sd**2
    needed = None
    if gap:
        normal = (Z + Z_POWER) ** 2 * variance / gap**2
        if a.sd is None:  # Fisher's exact test asks for more: Fleiss, Tytun and Ury 1980
            correction = (1 + sqrt(1 + 4 / (normal * abs(gap)))) ** 2 / 4
        needed = ceil(normal * correction)
    return Verdict(what, gap, low, high, p, needed)


def table(claims: Sequence[Claim]) -> pd.DataFrame:
    """Each claim with its interval, and shares against chance."""
    rows = []
    for claim in claims:
        row = {"claim": claim.name, "95 % interval": claim.shown()}
        row["n"] = f"{claim.n}, not said" if claim.assumed else str(claim.n)
        row |= {"against chance": "–", "p": "–", "n needed": "–"}
        if claim.sd is None:
            verdict = against_chance(claim)
            row["against chance"] = verdict.said
            row |= _numbers(verdict)
        rows.append(row)
    return pd.DataFrame(rows)


def pair_table(claims: Sequence[Claim]) -> pd.DataFrame:
    """Claims about the same thing against each other; no rows where no two are."""
    shares = {claim.name for claim in claims if claim.sd is None}
    rows = []
    for verdict in against_each_other(claims):
        scale = 100 if verdict.what.split(" − ")[0] in shares else 1  # shares in percentage points
        low, mean, high = (scale * x for x in (verdict.low, verdict.difference, verdict.high))
        digits = 0 if scale == 100 else 2
        low, mean, high = (round(x, digits) + 0.0 for x in (low, mean, high))  # no -0
        shown = f"{mean:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
        row = {"difference": verdict.what, "95 % interval": shown, "verdict": verdict.said}
        rows.append(row | _numbers(verdict))
    return pd.DataFrame(rows)


def _numbers(verdict: Verdict) -> dict[str, str]:
    return {
        "p": "< 0.001" if verdict.p < 0.001 else f"{verdict.p:.3f}",
        "n needed": "–" if verdict.needed is None else f"{verdict.needed:,}",
    }


NOTE = (
    "n needed: of each sample, to see a difference as large as this one in four of five "
    "repetitions. Differences are in percentage points where they are of shares, of independent "
    "samples, and p is corrected for the number of pairs (Holm)."
)


def as_text(claims: Sequence[Claim]) -> str:
    """Both tables, for a terminal."""
    frames = [frame for frame in (table(claims), pair_table(claims)) if len(frame)]
    return "\n\n".join([*(frame.to_string(index=False) for frame in frames), NOTE])
