"""This library against TRL, whose trainers most of the field uses: one row for each comparison.

    parity_table()      # needs TRL: pip install -e ".[parity]"

Losses get identical tensors, and loss and gradient must agree; whole steps get identical batches.
Where we differ on purpose, a row without a tolerance says by how much; `tests/test_parity.py` says
why. TRL has no PPO any more: that is checked in `tests/test_ppo_independent.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_lib.methods import grpo
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.models import logprobs
from rlhf_lib.objectives import advantages, losses
from rlhf_lib.proofs import parity_steps, parity_trl
from rlhf_lib.proofs.parity_steps import Step
from rlhf_lib.proofs.parity_trl import VERSION, undisturbed
from rlhf_lib.proofs.tools import Proof
from rlhf_lib.settings import GRPOConfig

TRL = f"TRL {VERSION}"
SAME_TENSORS, SAME_BATCH = 1e-5, 1e-4
BETA = 0.3
LENGTHS = [4, 7, 1, 3, 6, 5, 2, 7]  # of responses; as pairs, the first four are the chosen ones


def parity_table() -> list[Proof]:
    """All comparisons. `measured` is ours, `expected` TRL's, `error` the largest difference.

    Raises UserError where TRL is not installed.
    """
    groups = (
        preference_rows, length_rows, reward_rows, grpo_rows, advantage_rows, step_rows,
        position_rows,
    )  # fmt: skip
    return [row for group in groups for row in group()]


def _row(
    claim: str, ours: Tensor, trl: Tensor, source: str, tolerance: float = SAME_TENSORS
) -> Proof:
    """Two tensors of one shape; shown is the entry that differs most."""
    ours, trl = ours.detach().flatten(), trl.detach().flatten()
    difference = (ours - trl).abs()
    place = difference.argmax()
    shown = ours[place].item(), trl[place].item(), difference[place].item()
    return Proof("parity", claim, *shown, tolerance, "absolute", source)


def _loss_row(
    claim: str, ours: Tensor, trl: Tensor, tensor: Tensor, source: str,
    tolerance: float = SAME_TENSORS,
) -> Proof:  # fmt: skip
    """Two losses, and their gradients on the tensor that both come from."""

    def step(loss: Tensor) -> Step:
        return Step(loss.item(), torch.autograd.grad(loss, tensor, retain_graph=True)[0])

    return _step_row(claim, step(ours), step(trl), source, tolerance)


def _step_row(claim: str, ours: Step, trl: Step, source: str, tolerance: float) -> Proof:
    """Shown are the losses; the error is the largest of loss and gradient."""
    difference = torch.tensor([ours.loss - trl.loss])
    error = torch.cat((difference, (ours.gradient - trl.gradient).flatten())).abs().max().item()
    source = f"{TRL}, {source}"
    return Proof("parity", claim, ours.loss, trl.loss, error, tolerance, "absolute", source)


# -------------------------------------------------------------------------------------- pairs


class _Replies:
    """Random log-probs of eight replies: four chosen ones, then the four rejected ones."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.mask = logprobs.length_mask(LENGTHS)
        shape = self.mask.shape
        self.policy = (-3 * torch.rand(shape, generator=draw)).requires_grad_()
        self.reference = -3 * torch.rand(shape, generator=draw)
        # of replies to other prompts, the policy above the reference: KTO's KL is positive
        self.other = -2 * torch.rand(shape, generator=draw)
        self.ref_other = self.other - 0.4 * torch.rand(shape, generator=draw)
        policy, reference = ((x * self.mask).sum(1).chunk(2) for x in (self.policy, self.reference))
        lengths = self.mask.sum(1).chunk(2)
        self.sums = policy[0], policy[1], reference[0], reference[1]  # as the losses take them
        self.lengths = lengths[0], lengths[1]
        # (2B, L, V) and (2B, L): one token of prompt before each reply
        self.ids = torch.randint(3, 11, (len(LENGTHS), shape[1] + 1), generator=draw)
        self.logits = torch.randn(*self.ids.shape, 11, generator=draw).requires_grad_()

    def from_logits(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums of log-probs under `logits`, and lengths, of both sides."""
        per_token = logprobs.token_logprobs(self.logits[:, :-1], self.ids[:, 1:])
        sums, lengths = (per_token * mask).sum(1).chunk(2), mask.sum(1).chunk(2)
        return sums[0], sums[1], lengths[0], lengths[1]


@undisturbed()
def preference_rows() -> list[Proof]:
    """The losses on pairs that take sums and compare sums, as TRL's do."""
    x = _Replies()
    ratios = x.sums[0] - x.sums[2], x.sums[1] - x.sums[3]
    kl = ((x.other - x.ref_other) * x.mask).sum(1).mean()
    weights = 1.5, 0.7
    return [
        _loss_row(
            "DPO", losses.dpo_loss(*x.sums, BETA)[0],
            parity_trl.dpo_loss("sigmoid", x.policy, x.reference, x.mask, BETA), x.policy,
            "DPOTrainer, loss_type='sigmoid'",
        ),
        # DPOTrainer has no such loss: its label_smoothing serves other ones
        _loss_row(
            "conservative DPO", losses.dpo_loss(*x.sums, BETA, label_smoothing=0.2)[0],
            parity_trl.cpo_loss("sigmoid", *ratios, BETA, 0.2), x.policy,
            "CPOTrainer.cpo_loss on log-ratios, loss_type='sigmoid'",
        ),
        _loss_row(
            "IPO", losses.ipo_loss(*x.sums, BETA)[0],
            parity_trl.cpo_loss("ipo", *ratios, BETA, 0.0), x.policy,
            "CPOTrainer.cpo_loss on log-ratios, loss_type='ipo'",
        ),
        _loss_row(
            "KTO", losses.kto_loss(*x.sums, kl, BETA, *weights)[0],
            parity_trl.kto_loss(
                x.policy, x.reference, x.mask, x.other, x.ref_other, BETA, weights
            ), x.policy, "KTOTrainer, loss_type='kto'",
        ),
    ]  # fmt: skip


@undisturbed()
def length_rows() -> list[Proof]:
    """The losses on pairs in which lengths count, and two where TRL counts them otherwise."""
    x = _Replies()
    chosen, rejected, ref_chosen, ref_rejected = x.sums
    m, n = x.lengths
    averages = chosen / m, rejected / n, ref_chosen / m, ref_rejected / n
    trl_ipo = parity_trl.dpo_loss("ipo", x.policy, x.reference, x.mask, BETA)
    sides, batch = x.from_logits(x.mask), parity_trl.pair_batch(x.ids, x.mask)
    # TRL's SFT term is a mean over tokens, ours over replies: one length makes them the same
    even = torch.ones_like(x.mask)
    even_trl = parity_trl.orpo_loss(x.logits, parity_trl.pair_batch(x.ids, even), BETA)
    return [
        _loss_row(
            "length-normalised DPO",
            losses.length_normalised_dpo_loss(*x.sums, *x.lengths, BETA)[0],
            parity_trl.dpo_loss("sigmoid_norm", x.policy, x.reference, x.mask, BETA), x.policy,
            "DPOTrainer, loss_type='sigmoid_norm'",
        ),
        _loss_row(
            "IPO, given averages over tokens", losses.ipo_loss(*averages, BETA)[0], trl_ipo,
            x.policy, "DPOTrainer, loss_type='ipo'",
        ),
        _loss_row(
            "IPO differs: the paper's sums (ours) or averages (TRL)",
            losses.ipo_loss(*x.sums, BETA)[0], trl_ipo, x.policy,
            "DPOTrainer, loss_type='ipo'", math.inf,
        ),
        _loss_row(
            "SimPO", losses.simpo_loss(*sides, beta=2.0, margin=0.8)[0],
            parity_trl.simpo_loss(x.logits, batch, 2.0, 0.8), x.logits,
            "CPOTrainer, loss_type='simpo', cpo_alpha=0",
        ),
        _loss_row(
            "ORPO, replies of one length",
            losses.orpo_loss(*x.from_logits(even), BETA)[0], even_trl, x.logits, "ORPOTrainer",
        ),
        _loss_row(
            "ORPO's SFT term differs: a mean over replies (ours) or over tokens (TRL)",
            losses.orpo_loss(*sides, BETA)[0], parity_trl.orpo_loss(x.logits, batch, BETA),
            x.logits, "ORPOTrainer", math.inf,
        ),
    ]  # fmt: skip


@undisturbed()
def reward_rows() -> list[Proof]:
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 6, generator=draw).requires_grad_()
    margin = torch.rand(6, generator=draw)
    rows = []
    for claim, margins, center in (
        ("reward loss", torch.zeros(6), 0.0), ("reward loss with a margin", margin, 0.0),
        ("reward loss with a margin, centred", margin, 0.05),
    ):  # fmt: skip
        ours, _ = losses.reward_loss(scores[0], scores[1], margins, center)
        trl = parity_trl.reward_loss(scores[0], scores[1], margins, center)
        rows.append(_loss_row(claim, ours, trl, scores, "RewardTrainer.compute_loss"))
    return rows


# ------------------------------------------------------------------------- sampled responses


@undisturbed()
def grpo_rows() -> list[Proof]:
    """Every aggregation, with and without KL, off-policy enough that both clips bind."""
    draw = torch.Generator().manual_seed(2)
    mask = logprobs.length_mask(LENGTHS)
    old = -3 * torch.rand(mask.shape, generator=draw)
    policy = (old + 0.4 * torch.randn(mask.shape, generator=draw)).requires_grad_()
    reference = old + 0.4 * torch.randn(mask.shape, generator=draw)
    advantage = torch.randn(len(mask), generator=draw)
    rows = []
    for loss_type, aggregation in (
        ("grpo", "sequence"), ("bnpo", "token"), ("dapo", "token"), ("dr_grpo", "constant")
    ):  # fmt: skip
        for kl_coef in (0.0, 0.1):
            ours, _ = losses.grpo_loss(
                policy, old, advantage, mask, reference, kl_coef, 0.2, 0.28, aggregation
            )
            trl = parity_trl.grpo_loss(
                loss_type, policy, old, reference, advantage, mask, kl_coef, 0.2, 0.28
            )
            claim = f"GRPO loss, {aggregation} ({loss_type})" + (", KL" if kl_coef else "")
            source = f"GRPOTrainer._compute_loss, loss_type='{loss_type}'"
            rows.append(_loss_row(claim, ours, trl, policy, source))
    return rows


@undisturbed()
def advantage_rows() -> list[Proof]:
    draw = torch.Generator().manual_seed(3)
    rewards = torch.randn(8, generator=draw)
    rows = []
    for scale in ("group", "batch", "none"):
        ours = advantages.group_advantages(rewards, 4, scale)
        trl = parity_trl.advantages("GRPOTrainer", rewards, 4, scale)
        rows.append(_row(f"group advantages, scale={scale}", ours, trl, f"{TRL}, GRPOTrainer"))
    ours = advantages.leave_one_out_advantages(rewards, 4)
    trl = parity_trl.advantages("RLOOTrainer", rewards, 4)
    rows.append(_row("leave-one-out advantages", ours, trl, f"{TRL}, RLOOTrainer"))

    mask = logprobs.length_mask(LENGTHS)
    policy, reference = (-3 * torch.rand(2, *mask.shape, generator=draw) * mask).unbind()
    rollout = Rollout(
        [], [], mask, policy, reference, torch.ones(8).bool(), rewards, rewards, mask, None, None
    )
    config = GRPOConfig(group_size=4, kl_reward_coef=0.1, advantage="leave_one_out")
    _, ours = grpo.make_advantages(rollout, config)
    trl = parity_trl.advantages(
        "RLOOTrainer", rewards, 4, kl_coef=0.1, logprobs=policy, ref_logprobs=reference, mask=mask
    )
    claim = "leave-one-out advantages, KL in the reward"
    return [*rows, _row(claim, ours, trl, f"{TRL}, RLOOTrainer")]


# ------------------------------------------------------------------------------ whole batches


@undisturbed()
def step_rows(kinds: Sequence[str] = ("gpt2", "llama")) -> list[Proof]:
    """One training step of each kind, from token ids to gradients."""
    rows = []
    for kind in kinds:
        for name, ours, trl, source in (
            ("DPO", parity_steps.our_dpo, parity_steps.trl_dpo, "DPOTrainer.train"),
            ("reward", parity_steps.our_reward, parity_steps.trl_reward, "RewardTrainer.train"),
            ("SFT", parity_steps.our_sft, parity_steps.trl_sft, "SFTTrainer.train"),
        ):
            claim = f"one {name} step, {kind}"
            rows.append(_step_row(claim, ours(kind), trl(kind), source, SAME_BATCH))
    return rows


@undisturbed()
def position_rows() -> list[Proof]:
    """Log-probs of responses to prompts of mixed lengths, against each row alone and unpadded.

    GRPOTrainer pads prompts on the left and passes no positions, so a padded row of a model with
    learnt absolute positions (GPT-2) is read at the wrong ones. Rotary models know distances only.
    """
    source, rows = f"{TRL}, GRPOTrainer._get_per_token_logps_and_entropies", []
    for kind in ("gpt2", "llama"):
        ours, trl, truth = parity_steps.padded_logprobs(kind)
        claim = f"log-probs of padded rows, {kind}"
        off = math.inf if kind == "gpt2" else SAME_TENSORS
        rows += [
            _row(f"{claim}: ours are those of each row alone", ours, truth, "each row, unpadded"),
            _row(f"{claim}: TRL's are those of each row alone", trl, truth, source, off),
        ]
    return rows
