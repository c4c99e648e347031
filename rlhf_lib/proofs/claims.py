"""A claim about the library, what was measured, whether it holds, and all of them in a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

EXACT = 1e-12  # float64, some thousand additions


class Proof(NamedTuple):
    """One claim about the library, what was measured, and how far off it may be."""

    claim: str
    measured: float
    expected: float
    error: float  # how far apart they are, in `unit`: for tensors the largest over all entries
    tolerance: float  # infinite for a figure, which is shown and not judged
    source: str  # paper and equation
    unit: str = "absolute"  # of error and tolerance: "standard errors", "degrees", ...
    group: str = "enumeration"  # or "parity", "simulation"

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
    return Proof(claim, measured[shown].item(), expected[shown].item(), error, tolerance, source)


def figure(claim: str, measured: float, expected: float, source: str, unit: str) -> Proof:
    """How far off something is that is known to be biased."""
    error = abs(measured - expected)
    return Proof(claim, measured, expected, error, math.inf, source, unit)


def angle(claim: str, measured: Tensor, expected: Tensor, source: str) -> Proof:
    """How far a biased gradient points away from the exact one, whatever their lengths."""
    cosine = torch.cosine_similarity(measured.flatten(), expected.flatten(), dim=0).clamp(-1, 1)
    return figure(claim, math.degrees(math.acos(cosine.item())), 0.0, source, "degrees")


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
