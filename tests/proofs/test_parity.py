"""Parity with TRL: every row of the table, and why the rows differ that do.

That the rows can fail is shown in `test_parity_mistakes`.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from transformers.utils import logging

pytest.importorskip("trl", reason="TRL is an optional dependency: pip install -e '.[parity]'")

from rlhf_lib.objectives import preference
from rlhf_lib.proofs import parity, parity_trl
from rlhf_lib.proofs.claims import Proof
from rlhf_lib.runtime import make_accelerator
from rlhf_lib.settings import UserError

GRPO = [
    f"GRPO loss, {aggregation}{with_kl}"
    for aggregation in (
        "sequence (grpo)",
        "token (bnpo)",
        "token (dapo)",
        "constant (dr_grpo)",
        "sequence (GSPO)",
        "token (cispo)",
    )
    for with_kl in ("", ", KL")
]
SAME = [
    "DPO",
    "conservative DPO",
    "length-normalised DPO",
    "IPO",
    "IPO, given averages over tokens",
    "SimPO",
    "ORPO, replies of one length",
    "KTO",
    "reward loss",
    "reward loss with a margin",
    "reward loss with a margin, centred",
    *GRPO,
    *(f"group advantages, scale={scale}" for scale in ("group", "batch", "none")),
    "leave-one-out advantages",
    "leave-one-out advantages, KL in the reward",
    "soft overlong penalty",
    *(f"one {step} step, {k}" for step in ("DPO", "reward", "SFT") for k in ("gpt2", "llama")),
    "log-probs of padded rows, gpt2: ours are those of each row alone",
    "log-probs of padded rows, llama: ours are those of each row alone",
    "log-probs of padded rows, llama: TRL's are those of each row alone",
]
DIFFERENT = [
    "IPO differs: the paper's sums (ours) or averages (TRL)",
    "ORPO's SFT term differs: a mean over replies (ours) or over tokens (TRL)",
    "log-probs of padded rows, gpt2: TRL's are those of each row alone",
]


@pytest.fixture(scope="module")
def table() -> dict[str, Proof]:
    return {row.claim: row for row in parity.parity_table()}


@pytest.mark.parametrize("claim", SAME)
def test_we_agree_with_trl(claim: str, table: dict[str, Proof]) -> None:
    row = table[claim]
    assert row.tolerance == (1e-4 if " step, " in claim else 1e-5)
    assert row.holds, row
    # two zeros would agree as well
    assert min(abs(row.measured), abs(row.expected)) > 0.05


@pytest.mark.parametrize("claim", DIFFERENT)
def test_where_we_differ_the_table_says_by_how_much(claim: str, table: dict[str, Proof]) -> None:
    row = table[claim]
    assert row.verdict == "measured"
    assert row.error > 0.1


def test_the_table_has_no_other_rows(table: dict[str, Proof]) -> None:
    assert set(table) == {*SAME, *DIFFERENT}
    assert {row.group for row in table.values()} == {"parity"}


# ----------------------------------------------------------------------- where we differ, and why


def test_trl_reads_padded_gpt2_rows_at_wrong_positions() -> None:
    """TRL #6800. The row that is padded least is right, and so is every row given positions."""
    with parity_trl.undisturbed():
        ours, theirs, truth = parity.padded_logprobs("gpt2")
    off, ours_off = (theirs - truth).abs().amax(1), (ours - truth).abs().amax(1)
    assert ours_off.max() < 1e-5
    lengths = [len(prompt) for prompt in parity.PROMPTS]
    longest = lengths.index(max(lengths))
    assert off[longest] < 1e-5
    others = [i for i in range(len(lengths)) if i != longest]
    assert off[others].min() > 0.1  # nats
    assert off.max() > 2

    model = parity.tiny_model("gpt2")
    for row, (prompt, response) in enumerate(zip(parity.PROMPTS, parity.RESPONSES, strict=True)):
        padding = max(lengths) - len(prompt)
        ids = torch.tensor([[0] * padding + prompt + response])
        mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
        places = range(max(lengths) - 1, max(lengths) + len(response) - 1)
        for positions, expected in (
            ((mask.cumsum(1) - 1).clamp(min=0), truth),
            (torch.arange(ids.shape[1])[None], theirs),  # what a model takes when it is told none
        ):
            logits = model(ids, attention_mask=mask, position_ids=positions).logits[0]
            logprobs = logits.log_softmax(-1)[places, response]
            assert torch.allclose(logprobs, expected[row, : len(response)], atol=1e-5)


def test_rotary_positions_are_relative_so_both_are_right() -> None:
    with parity_trl.undisturbed():
        ours, theirs, truth = parity.padded_logprobs("llama")
    assert torch.allclose(ours, truth, atol=1e-5)
    assert torch.allclose(theirs, truth, atol=1e-5)


def test_trls_ipo_averages_over_the_tokens() -> None:
    """Every reply twice as long, at the same log-prob a token: TRL's loss stays, ours does not."""
    policy, reference = -3 * torch.rand(2, 4, 6)
    mask = torch.ones(4, 6)

    def both(times: int) -> tuple[Tensor, Tensor]:
        long, ref_long, ones = (x.repeat(1, times) for x in (policy, reference, mask))
        with parity_trl.undisturbed():
            theirs = parity_trl.dpo_loss("ipo", long, ref_long, ones, 0.5)
        sums = (*long.sum(1).chunk(2), *ref_long.sum(1).chunk(2))
        return preference.ipo_loss(*sums, 0.5)[0], theirs

    (ours, theirs), (ours_long, theirs_long) = both(1), both(2)
    assert theirs == pytest.approx(theirs_long.item(), rel=1e-5)
    assert abs(ours - ours_long) > 0.1
    margins = ((policy - reference).sum(1).view(2, 2) * torch.tensor([[1.0], [-1.0]])).sum(0)
    assert ours.item() == pytest.approx(((margins - 1) ** 2).mean().item(), rel=1e-5)
    assert ours_long.item() == pytest.approx(((2 * margins - 1) ** 2).mean().item(), rel=1e-5)
    assert theirs.item() == pytest.approx(((margins / 6 - 1) ** 2).mean().item(), rel=1e-5)


def test_trls_orpo_averages_its_sft_term_over_the_tokens_of_the_batch() -> None:
    replies, trainer = parity._Replies(), parity_trl.orpo_trainer
    batch = parity_trl.pair_batch(replies.ids, replies.mask)
    with parity_trl.undisturbed():
        theirs = parity_trl.loss_of_logits(trainer(), replies.logits, batch)
    sums, _, lengths, _ = replies.from_logits(replies.mask)
    assert theirs.item() == pytest.approx(-(sums.sum() / lengths.sum()).item(), rel=1e-5)
    ours, _ = preference.orpo_loss(*replies.from_logits(replies.mask), 0.0)
    assert ours.item() == pytest.approx(-(sums / lengths).mean().item(), rel=1e-5)
    # and TRL's runs over the prompt too: relabelled as prompt, a reply's tokens still count
    batch["chosen_labels"][:2, 1] = -100
    with parity_trl.undisturbed():
        relabelled = parity_trl.loss_of_logits(trainer(), replies.logits, batch)
    assert relabelled.item() == theirs.item()


def test_trls_dpo_trainer_has_no_label_smoothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hence conservative DPO is compared with its CPO trainer, which has the same formula."""
    made, replies = parity_trl.bare_trainer, parity._Replies()

    def loss() -> float:
        with parity_trl.undisturbed():
            return parity_trl.dpo_loss(
                "sigmoid", replies.policy, replies.reference, replies.mask, 0.3
            ).item()

    plain = loss()
    monkeypatch.setattr(
        parity_trl, "bare_trainer", lambda *a, **k: made(*a, **k | {"label_smoothing": 0.2})
    )
    assert loss() == plain
    assert preference.dpo_loss(*replies.sums, 0.3, label_smoothing=0.2)[0].item() != plain


# ----------------------------------------------------------------------------- the process around


def test_nothing_is_left_behind() -> None:
    accelerator = make_accelerator("fp32")
    shared = (PartialState, AcceleratorState, GradientState)
    before = [dict(state._shared_state) for state in shared]
    environment, verbosity = dict(os.environ), logging.get_verbosity()
    draws = []
    for kinds in ([], ["gpt2"]):
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        with parity_trl.undisturbed():
            assert all(row.holds for row in parity.step_rows(kinds))
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    assert dict(os.environ) == environment
    assert logging.get_verbosity() == verbosity
    assert [state._shared_state for state in shared] == before
    assert accelerator.device == make_accelerator("fp32").device


@pytest.mark.parametrize(("installed", "said"), [([], "no TRL"), (["1.15.0"], "1.15.0")])
def test_without_this_trl_the_error_says_what_to_run(
    installed: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [type("Found", (), {"version": version}) for version in installed]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: found)
    with pytest.raises(UserError, match=rf"here is {said}: pip install -e '\.\[parity\]'"):
        parity.parity_table()


def test_importing_the_modules_needs_no_trl() -> None:
    for module in (parity, parity_trl):
        source = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for node in ast.walk(source):
            assert not (isinstance(node, ast.Import) and any(n.name == "trl" for n in node.names))
            assert not (isinstance(node, ast.ImportFrom) and str(node.module).startswith("trl"))


def test_the_version_is_the_pinned_one() -> None:
    root = Path(__file__).resolve().parents[2]
    assert f'"trl=={parity_trl.VERSION} ;' in (root / "pyproject.toml").read_text("utf-8")
    assert f"\ntrl=={parity_trl.VERSION} " in (root / "requirements.lock").read_text("utf-8")
