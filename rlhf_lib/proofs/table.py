"""All proofs in one table, for the command line, the report and JSON."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Sequence

import pandas as pd

from rlhf_lib.proofs import kl, parity, policy
from rlhf_lib.proofs.claims import Proof

NO_TRL = (
    "TRL is not installed, so parity was not checked: pip install -e '.[parity]' (Python 3.11 on)"
)
PROOFS = (
    kl.kl_values,
    kl.kl_gradients,
    kl.single_token,
    kl.kl_in_reward,
    policy.gae_by_definition,
    policy.ppo,
    policy.groups,
    policy.sampled,
    policy.identities,
    policy.dpo,
    kl.best_of_n,
)


def all_proofs() -> list[Proof]:
    """All proofs by enumeration, always the same; some seconds on one thread."""
    return [proof for prove in PROOFS for proof in prove()]


def with_parity() -> tuple[list[Proof], str]:
    """All proofs and the comparisons with TRL; where it is missing, a sentence that says so."""
    if importlib.util.find_spec("trl") is None:
        return all_proofs(), NO_TRL
    return all_proofs() + parity.parity_table(), ""


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
