"""Every claim about the methods, proven or compared: `python -m rlhf_lib proofs`.

By enumeration, on a policy whose responses can all be listed; and against TRL, on the same tensors.
"""

from __future__ import annotations

import importlib.util

from rlhf_lib.proofs import kl, optima, policy
from rlhf_lib.proofs.tools import Proof, as_records, as_text, table

__all__ = ["PROOFS", "Proof", "all_proofs", "as_records", "as_text", "table", "with_parity"]

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
    optima.dpo,
    optima.best_of_n,
)


def all_proofs() -> list[Proof]:
    """All proofs by enumeration, always the same; some seconds on one thread."""
    return [proof for prove in PROOFS for proof in prove()]


def with_parity() -> tuple[list[Proof], str]:
    """All proofs and the comparisons with TRL; where it is missing, a sentence that says so."""
    if importlib.util.find_spec("trl") is None:
        return all_proofs(), NO_TRL
    from rlhf_lib.proofs.parity import parity_table

    return all_proofs() + parity_table(), ""
