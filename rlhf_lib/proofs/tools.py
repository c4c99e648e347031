"""What the proofs share: the record of one, ways to compare, their example, and their table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from rlhf_lib.proofs.enumeration import TinyPolicy

EXACT = 1e-12  # float64, some thousand additions


class Proof(NamedTuple):
    """One claim about the library, what was measured, and how far off it may be."""

    group: str  # "enumeration" or "parity"
    claim: str
    measured: float
    expected: float
    error: float  # how far apart they are, in `unit`: for tensors the largest over all entries
    tolerance: float  # infinite for a figure, which is shown and not judged
    unit: str  # of error and tolerance: "absolute", "standard errors", ...
    source: str  # paper and equation

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance; not a number never is."""
        return self.error <= self.tolerance

    @property
    def verdict(self) -> str:
        """ "holds", "DOES NOT HOLD", or "measured" for a figure, which can be neither."""
        if self.tolerance == math.inf:
            return "measured"
        return "holds" if self.holds else "DOES NOT HOLD"


def equal(
    claim: str, measured: Tensor, expected: Tensor, source: str, tolerance: float = EXACT
) -> Proof:
    """Two tensors that must agree in every entry; the one shown is the largest in size."""
    measured, expected = measured.detach().flatten(), expected.detach().flatten()
    error = (measured - expected).abs().max().item()
    shown = int((measured.abs() + expected.abs()).argmax())
    pair = measured[shown].item(), expected[shown].item()
    return Proof("enumeration", claim, *pair, error, tolerance, "absolute", source)


def figure(claim: str, measured: float, expected: float, unit: str, source: str) -> Proof:
    """How far off something is that is known to be biased."""
    error = abs(measured - expected)
    return Proof("enumeration", claim, measured, expected, error, math.inf, unit, source)


def angle(claim: str, measured: Tensor, expected: Tensor, source: str) -> Proof:
    """How far a biased gradient points away from the exact one, whatever their lengths."""
    cosine = torch.cosine_similarity(measured.flatten(), expected.flatten(), dim=0).clamp(-1, 1)
    return figure(claim, math.degrees(math.acos(cosine.item())), 0.0, "degrees", source)


class Example(NamedTuple):
    """A policy with 31 responses of up to 4 tokens, another as its reference, and rewards."""

    policy: TinyPolicy
    reference: TinyPolicy
    rewards: Tensor  # (N,), no two equal
    weights: Tensor  # (N,) the policy's probabilities as constants
    ref_logprobs: Tensor  # (N, T)


def example(max_length: int = 4) -> Example:
    policy, reference = TinyPolicy(0, max_length=max_length), TinyPolicy(1, max_length=max_length)
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randn(len(policy.responses), dtype=torch.float64, generator=generator)
    weights = policy.probabilities().detach()
    return Example(policy, reference, rewards, weights, reference.token_logprobs().detach())


def table(proofs: Sequence[Proof]) -> pd.DataFrame:
    """One row a claim, every column as text; the error carries its unit."""
    return pd.DataFrame(
        {
            "group": proof.group,
            "claim": proof.claim,
            "measured": f"{proof.measured:.6g}",
            "expected": f"{proof.expected:.6g}",
            "error": f"{proof.error:.3g} {proof.unit}".removesuffix(" absolute"),
            "tolerance": "–" if proof.tolerance == math.inf else f"{proof.tolerance:g}",
            "verdict": proof.verdict,
            "source": proof.source,
        }
        for proof in proofs
    )


def as_text(proofs: Sequence[Proof]) -> str:
    """The table for a terminal, without sources, and a line that counts the verdicts."""
    frame = table(proofs).drop(columns="source")
    width = frame["claim"].str.len().max()
    lines = frame.to_string(index=False, formatters={"claim": f"{{:<{width}}}".format})
    counts = Counter(proof.verdict for proof in proofs)
    return (
        f"{lines}\n\n{counts['holds']} claims hold, {counts['DOES NOT HOLD']} do not; "
        f"{counts['measured']} figures are measured and not judged"
    )


def as_records(proofs: Sequence[Proof]) -> list[dict]:
    """The proofs for JSON, which has no infinity: a figure's tolerance is None."""
    return [
        proof._asdict()
        | {"tolerance": None if proof.tolerance == math.inf else proof.tolerance}
        | {"verdict": proof.verdict}
        for proof in proofs
    ]
