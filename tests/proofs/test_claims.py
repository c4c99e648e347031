"""What a claim is: how two tensors are compared, and when it holds."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_lib.proofs.claims import Proof, angle, equal


def test_the_entry_shown_is_the_largest_and_the_error_that_of_all() -> None:
    measured, expected = torch.tensor([[0.0, 5.0], [2.0, 0.0]]), torch.tensor([[0.5, 5.0], [2, 0]])
    proof = equal("claim", measured.double(), expected.double(), "source", tolerance=0.25)
    assert (proof.measured, proof.expected, proof.error, proof.holds) == (5.0, 5.0, 0.5, False)


@pytest.mark.parametrize(("other", "degrees"), [([3.0, 0.0], 0), ([1, 1], 45), ([-2, 0], 180)])
def test_an_angle_is_that_of_two_directions(other: list[float], degrees: float) -> None:
    proof = angle("claim", torch.tensor(other), torch.tensor([1.0, 0.0]), "source")
    assert proof.error == pytest.approx(degrees, abs=1e-4)
    assert proof.verdict == "measured"


@pytest.mark.parametrize(
    ("error", "tolerance", "holds"),
    [(1.0, 1.0, True), (1.1, 1.0, False), (math.nan, 1.0, False), (math.inf, 1.0, False)],
)
def test_a_proof_holds_within_its_tolerance(error: float, tolerance: float, holds: bool) -> None:
    proof = Proof("claim", 1.5, 1.0, error, tolerance, "somewhere")
    assert (proof.holds, proof.verdict) == (holds, "holds" if holds else "DOES NOT HOLD")
