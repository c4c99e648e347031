"""This library against TRL, whose trainers most of the field uses: one row for each comparison.

    parity_table()      # needs TRL: pip install -e ".[parity]"

Losses get identical tensors, and loss and gradient must agree; whole steps get identical batches.
Where we differ on purpose, a row without a tolerance says by how much; the tests of this module say
why. TRL has no PPO any more: that is compared with `plain` in `tests/methods`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rlhf_lib.data.encoding import Demonstration, Pair
from rlhf_lib.methods import dpo, grpo, reward_model, sft
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.models.logprobs import response_logprobs, token_logprobs
from rlhf_lib.models.packing import length_mask
from rlhf_lib.objectives import advantages, losses, preference
from rlhf_lib.proofs import errors, kl, parity_trl, plain, policy
from rlhf_lib.proofs.claims import Proof
from rlhf_lib.proofs.parity_trl import VERSION, caught_gradients
from rlhf_lib.settings import DPOConfig

SAME_TENSORS, SAME_BATCH = 1e-5, 1e-4
BETA, CENTER_COEF = 0.3, 0.02
LENGTHS = [4, 7, 1, 3, 6, 5, 2, 7]  # of responses; as pairs, the first four are the chosen ones


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
    policy.ratios,
    policy.entropy_bonus,
    policy.identities,
    policy.dpo,
    policy.online_dpo,
    kl.best_of_n,
)


def all_proofs() -> list[Proof]:
    """All proofs by enumeration, always the same; some seconds on one thread."""
    return [proof for prove in PROOFS for proof in prove()]


def with_parity(simulated: bool = False) -> tuple[list[Proof], str]:
    """All proofs and the comparisons with TRL; where it is missing, a sentence that says so.

    `simulated`: with the error rates of comparisons as well, which takes a minute or two.
    """
    rows = all_proofs() + (errors.error_rates() if simulated else [])
    if importlib.util.find_spec("trl") is None:
        return rows, NO_TRL
    return rows + parity_table(), ""


def parity_table() -> list[Proof]:
    """All comparisons. `measured` is ours, `expected` TRL's, `error` the largest difference.

    Raises UserError where TRL is not installed.
    """
    with parity_trl.undisturbed():
        of_losses = [*preference_rows(), *length_rows(), *reward_rows(), *grpo_rows()]
        return [*of_losses, *advantage_rows(), *step_rows(), *position_rows()]


def _row(
    claim: str,
    ours: Tensor,
    trl: Tensor,
    source: str,
    tolerance: float = SAME_TENSORS,
    shown: int | None = None,
) -> Proof:
    """Two tensors of one shape; shown is the entry that differs most, where none is asked for.

    `source` is what of TRL's was called.
    """
    ours, trl = ours.detach().flatten(), trl.detach().flatten()
    difference = (ours - trl).abs()
    place = int(difference.argmax()) if shown is None else shown
    both = ours[place].item(), trl[place].item(), difference.max().item()
    return Proof(claim, *both, tolerance, f"TRL {VERSION}, {source}", group="parity")


def _loss_rows(on: Tensor, *rows: tuple[str, tuple, Tensor, str]) -> list[Proof]:
    """Two losses each, and their gradients on the tensor that both come from; shown is the loss."""
    found = []
    for claim, (ours, *_), trl, source in rows:
        tolerance = math.inf if " differs: " in claim else SAME_TENSORS
        with_gradient = []
        for loss in (ours, trl):
            gradient = torch.autograd.grad(loss, on, retain_graph=True)[0]
            with_gradient.append(torch.cat((loss.detach().view(1), gradient.flatten())))
        one, other = with_gradient
        found.append(_row(claim, one, other, source, tolerance, shown=0))
    return found


# -------------------------------------------------------------------------------------- pairs


class _Replies:
    """Random log-probs of eight replies: four chosen ones, then the four rejected ones."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.mask = length_mask(LENGTHS)
        shape = self.mask.shape
        self.policy = (-3 * torch.rand(shape, generator=draw)).requires_grad_()
        self.reference = -3 * torch.rand(shape, generator=draw)
        # of replies to other prompts, the policy above the reference: KTO's KL is positive
        self.other = -2 * torch.rand(shape, generator=draw)
        self.ref_other = self.other - 0.4 * torch.rand(shape, generator=draw)
        policy, reference = ((x * self.mask).sum(1).chunk(2) for x in (self.policy, self.reference))
        self.sums = policy[0], policy[1], reference[0], reference[1]  # as the losses take them
        lengths = self.mask.sum(1).chunk(2)
        self.lengths = lengths[0], lengths[1]
        # (2B, L, V) and (2B, L): one token of prompt before each reply
        self.ids = torch.randint(3, 11, (len(LENGTHS), shape[1] + 1), generator=draw)
        self.logits = torch.randn(*self.ids.shape, 11, generator=draw).requires_grad_()

    def from_logits(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums of log-probs under `logits`, and lengths, of both sides."""
        per_token = token_logprobs(self.logits[:, :-1], self.ids[:, 1:])
        sums, lengths = (per_token * mask).sum(1).chunk(2), mask.sum(1).chunk(2)
        return sums[0], sums[1], lengths[0], lengths[1]


def preference_rows() -> list[Proof]:
    """The losses on pairs that take sums and compare sums, as TRL's do."""
    x = _Replies()
    chosen, rejected = x.sums[0] - x.sums[2], x.sums[1] - x.sums[3]
    dpo_trl = parity_trl.dpo_loss("sigmoid", x.policy, x.reference, x.mask, BETA)
    smoothing = {"label_smoothing": 0.2}

    def on_ratios(loss_type: str, **settings: float) -> Tensor:
        trainer = parity_trl.cpo_trainer(beta=BETA, loss_type=loss_type, **settings)
        return trainer.cpo_loss(chosen, rejected)[0].mean()

    weights: dict[str, Any] = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    reference = parity_trl.Table(x.reference, x.ref_other)
    kto_trainer = parity_trl.bare_trainer(
        "KTOTrainer", loss_type="kto", calculate_KL=True, beta=BETA, ref_model=reference, **weights
    )
    others = parity_trl.places(x.mask, start=x.mask.numel())
    batch = {f"KL_{key}": rows for key, rows in others.items()} | parity_trl.places(x.mask)
    batch["label"] = torch.arange(8) < 4
    kto = kto_trainer.compute_loss(parity_trl.Table(x.policy, x.other), batch)
    kl = ((x.other - x.ref_other) * x.mask).sum(1).mean()
    our_kto = preference.kto_loss(*x.sums, kl, BETA, **weights)
    # DPOTrainer has no conservative loss: its label_smoothing serves other ones
    doubtful = preference.dpo_loss(*x.sums, BETA, **smoothing), on_ratios("sigmoid", **smoothing)
    source = "CPOTrainer.cpo_loss on log-ratios, loss_type"
    return _loss_rows(
        x.policy,
        ("DPO", preference.dpo_loss(*x.sums, BETA), dpo_trl, "DPOTrainer, loss_type='sigmoid'"),
        ("conservative DPO", *doubtful, f"{source}='sigmoid'"),
        ("IPO", preference.ipo_loss(*x.sums, BETA), on_ratios("ipo"), f"{source}='ipo'"),
        ("KTO", our_kto, kto, "KTOTrainer, loss_type='kto'"),
    )


def length_rows() -> list[Proof]:
    """The losses on pairs in which lengths count, and two where TRL counts them otherwise."""
    x = _Replies()
    tables = x.policy, x.reference, x.mask, BETA
    norm_trl, ipo_trl = (parity_trl.dpo_loss(kind, *tables) for kind in ("sigmoid_norm", "ipo"))
    norm = preference.length_normalised_dpo_loss(*x.sums, *x.lengths, BETA)
    means = tuple(s / n for s, n in zip(x.sums, x.lengths * 2, strict=True))
    ipo_of_means = preference.ipo_loss(*means, BETA)  # type: ignore[call-arg]
    ipo = preference.ipo_loss(*x.sums, BETA)

    def cpo(trainer: Any, mask: Tensor) -> Tensor:
        return parity_trl.loss_of_logits(trainer, x.logits, parity_trl.pair_batch(x.ids, mask))

    # TRL's SFT term is a mean over tokens, ours over replies: one length makes them the same
    masks, trainer = (x.mask, torch.ones_like(x.mask)), parity_trl.orpo_trainer(beta=BETA)
    orpo_trl, even_trl = (cpo(trainer, mask) for mask in masks)
    orpo, even = (preference.orpo_loss(*x.from_logits(mask), BETA) for mask in masks)
    simpo_trainer = parity_trl.cpo_trainer(loss_type="simpo", beta=2.0, simpo_gamma=0.8)
    simpo = preference.simpo_loss(*x.from_logits(x.mask), beta=2.0, margin=0.8)
    simpo_trl = cpo(simpo_trainer, x.mask)
    ipo_source, simpo_source = (f"{name}, loss_type=" for name in ("DPOTrainer", "CPOTrainer"))
    sums = "IPO differs: the paper's sums (ours) or averages (TRL)"
    tokens = "ORPO's SFT term differs: a mean over replies (ours) or over tokens (TRL)"
    return _loss_rows(
        x.policy,
        ("length-normalised DPO", norm, norm_trl, f"{ipo_source}'sigmoid_norm'"),
        ("IPO, given averages over tokens", ipo_of_means, ipo_trl, f"{ipo_source}'ipo'"),
        (sums, ipo, ipo_trl, f"{ipo_source}'ipo'"),
    ) + _loss_rows(
        x.logits,
        ("SimPO", simpo, simpo_trl, f"{simpo_source}'simpo', cpo_alpha=0"),
        ("ORPO, replies of one length", even, even_trl, "ORPOTrainer"),
        (tokens, orpo, orpo_trl, "ORPOTrainer"),
    )


def reward_rows() -> list[Proof]:
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 6, generator=draw).requires_grad_()
    drawn, rows = torch.rand(6, generator=draw), []
    for claim, margin, center in (
        ("reward loss", 0 * drawn, 0.0),
        ("reward loss with a margin", drawn, 0.0),
        ("reward loss with a margin, centred", drawn, 0.05),
    ):
        trainer = parity_trl.bare_trainer("RewardTrainer")
        trainer.args.center_rewards_coefficient = center
        inputs = {"margin": margin, "attention_mask": torch.ones(12, 1)}
        output = parity_trl.Off(logits=scores.view(12, 1))
        trl = trainer.compute_loss(lambda output=output, **_: output, inputs)
        ours = losses.reward_loss(scores[0], scores[1], margin, center)
        rows.append((claim, ours, trl, "RewardTrainer.compute_loss"))
    return _loss_rows(scores, *rows)


# ------------------------------------------------------------------------- sampled responses


def grpo_rows() -> list[Proof]:
    """Every aggregation, with and without KL, off-policy enough that both clips bind."""
    draw = torch.Generator().manual_seed(2)
    mask = length_mask(LENGTHS)
    old = -3 * torch.rand(mask.shape, generator=draw)
    policy = (old + 0.4 * torch.randn(mask.shape, generator=draw)).requires_grad_()
    reference = old + 0.4 * torch.randn(mask.shape, generator=draw)
    advantage = torch.randn(len(mask), generator=draw)
    rows, inputs = [], parity_trl.places(mask)
    batch = {
        "prompt_ids": inputs["input_ids"][:, :1],
        "prompt_mask": inputs["attention_mask"][:, :1],
        "completion_ids": inputs["input_ids"][:, 1:],
        "completion_mask": mask.long(),
        "advantages": advantage,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    low, high = 0.2, 0.28
    rest: dict[str, Any] = {"epsilon_low": low, "max_completion_length": mask.shape[1]}
    # TRL's loss_type and level, its upper limit of a ratio, and how we say it
    variants: list[tuple[str, str, float, dict[str, str]]] = [
        ("grpo", "token", high, {"aggregation": "sequence"}),
        ("bnpo", "token", high, {"aggregation": "token"}),
        ("dapo", "token", high, {"aggregation": "token"}),
        ("dr_grpo", "token", high, {"aggregation": "constant"}),
        ("grpo", "sequence", high, {"aggregation": "sequence", "ratio": "sequence"}),
        ("cispo", "token", 1 + high, {"aggregation": "token", "surrogate": "cispo"}),
    ]
    for name, level, limit, how in variants:
        for beta in (0.0, 0.1):
            trainer = parity_trl.bare_trainer(
                "GRPOTrainer", loss_type=name, importance_sampling_level=level, beta=beta,
                epsilon_high=limit, **rest,
            )  # fmt: skip
            trl = trainer.compute_loss(parity_trl.Table(policy), batch)
            given = policy, old, advantage, mask, reference, beta, low, high
            ours = losses.grpo_loss(*given, **how)
            word = {"sequence": "GSPO", "token": name}[level]
            claim = f"GRPO loss, {how['aggregation']} ({word})" + (", KL" if beta else "")
            rows.append((claim, ours, trl, f"GRPOTrainer._compute_loss, loss_type='{name}'"))
    return _loss_rows(policy, *rows)


def advantage_rows() -> list[Proof]:
    draw = torch.Generator().manual_seed(3)
    rewards, size, rows = torch.randn(8, generator=draw), 4, []
    for scale in ("group", "batch", "none"):
        ours = advantages.group_advantages(rewards, size, scale)
        trl = parity_trl.advantages("GRPOTrainer", rewards, size, scale_rewards=scale)
        rows.append(_row(f"group advantages, scale={scale}", ours, trl, "GRPOTrainer"))
    ours = advantages.leave_one_out_advantages(rewards, size)
    trl = parity_trl.advantages("RLOOTrainer", rewards, size)
    rows.append(_row("leave-one-out advantages", ours, trl, "RLOOTrainer"))

    mask, every = length_mask(LENGTHS), torch.ones(8).bool()
    policy, reference = -3 * torch.rand(2, *mask.shape, generator=draw) * mask
    rollout = Rollout(
        [], [], mask, policy, reference, every, rewards, rewards, mask, gold=None, exact_kl=None
    )
    _, ours = grpo.make_advantages(
        rollout, group_size=size, kl_reward_coef=0.1, advantage="leave_one_out"
    )
    trl = parity_trl.advantages("RLOOTrainer", rewards, size, (policy, reference, mask), beta=0.1)
    rows.append(_row("leave-one-out advantages, KL in the reward", ours, trl, "RLOOTrainer"))
    lengths = torch.arange(1.0, 13.0)
    ours = advantages.soft_overlong_penalty(lengths, 12, 5)
    trl = parity_trl.overlong([int(n) for n in lengths], 12, 5)
    rows.append(_row("soft overlong penalty", ours, trl, "get_soft_overlong_punishment", shown=-1))
    return rows


# ------------------------------------------------------------------------------ whole batches

MICRO_BATCH = 4  # ours goes in parts: 4 rows and 2
# tokens of prompt, chosen and rejected reply; 1 ends a reply, and the third is cut off before it
TRIPLES: list[Any] = [
    ([5, 9, 4], [7, 8, 1], [6, 6, 12, 1]),
    ([11, 3], [21, 1], [22, 23, 24, 25, 1]),
    ([30, 31, 6, 7, 8], [9, 10, 11], [17, 18, 1]),
    ([4, 4], [19, 20, 1], [5, 1]),
    ([13, 14, 15, 16], [3, 27, 28, 1], [29, 1]),
    ([26, 25, 24], [18, 1], [15, 14, 1]),
]
MARGINS = [0.0, 0.5, 0.2, 1.0, 0.1, 0.3]
# prompts of mixed lengths, so that padding on the left shifts most of them
PROMPTS = [[5, 9, 4, 13, 21, 7], [11], [30, 31, 6], [4, 8, 17, 19, 25, 3, 12, 10]]
RESPONSES = [[7, 8, 1], [21, 22, 23, 24, 1], [9, 1], [17, 18, 19, 1]]


def tiny_model(kind: str, make: Any = AutoModelForCausalLM, seed: int = 0) -> PreTrainedModel:
    """Random weights: "gpt2" has learnt absolute positions, "llama" rotary ones."""
    torch.manual_seed(seed)
    words = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 48}
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    own = {
        "gpt2": {"num_attention_heads": 2, **dropout},
        "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32},
    }
    shared = words | shape | {"initializer_range": 0.3, "num_labels": 1}
    return make.from_config(AutoConfig.for_model(kind, **shared, **own[kind])).eval()


def _our_step(model: PreTrainedModel, update: Callable[..., dict], *rest: Any) -> Tensor:
    """`update(learner, *rest)`: its loss, and after it the gradient of all parameters."""
    accelerator = Accelerator(cpu=True)
    learner = Learner(accelerator, model, learning_rate=1e-3, steps=1, max_grad_norm=math.inf)
    gradients = caught_gradients(learner.optimizer.optimizer)
    return torch.cat((torch.tensor([update(learner, *rest)["loss"]]), gradients[0]))


def dpo_step(kind: str) -> tuple[Tensor, Tensor]:
    """Ours and TRL's. All replies end here, also the one that is cut off elsewhere."""
    ended = [(p, *(r if r[-1] == 1 else [*r, 1] for r in (c, r))) for p, c, r in TRIPLES]
    reference, names = tiny_model(kind, seed=1), ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, triple, strict=True)) for triple in ended]
    pairs = [Pair("", "", "", "", p, c, r) for p, c, r in ended]
    table = dpo.reference_logprobs(reference, pairs, MICRO_BATCH)
    update = partial(dpo.update, micro_batch_size=MICRO_BATCH)
    loss = dpo.preference_loss(DPOConfig(beta=BETA))
    ours = _our_step(tiny_model(kind), update, pairs, table, loss)
    return ours, parity_trl.step("DPO", tiny_model(kind), rows, {"beta": BETA}, ref_model=reference)


def reward_step(kind: str) -> tuple[Tensor, Tensor]:
    given = list(zip(TRIPLES, MARGINS, strict=True))
    rows = [{"chosen_ids": p + c, "rejected_ids": p + r, "margin": m} for (p, c, r), m in given]
    pairs = [Pair("", "", "", "", p, c, r, margin) for (p, c, r), margin in given]
    ours, theirs = (tiny_model(kind, AutoModelForSequenceClassification) for _ in range(2))
    update = partial(reward_model.update, center_coef=CENTER_COEF)
    trl = parity_trl.step("Reward", theirs, rows, {"center_rewards_coefficient": CENTER_COEF})
    return _our_step(ours, update, pairs, MICRO_BATCH), trl


def sft_step(kind: str) -> tuple[Tensor, Tensor]:
    rows, examples = [], [Demonstration("", "", p, c) for p, c, _ in TRIPLES]
    for prompt, reply, _ in TRIPLES:
        mask = [0] * len(prompt) + [1] * len(reply)
        rows.append({"input_ids": prompt + reply, "completion_mask": mask})
    ours = _our_step(tiny_model(kind), sft.update, examples, MICRO_BATCH)
    return ours, parity_trl.step("SFT", tiny_model(kind), rows, {"completion_only_loss": True})


def step_rows(kinds: Sequence[str] = ("gpt2", "llama")) -> list[Proof]:
    """One training step of each kind, from token ids to gradients."""
    rows, steps = [], {"DPO": dpo_step, "reward": reward_step, "SFT": sft_step}
    for kind in kinds:
        for name, step in steps.items():
            source = f"{name[0].upper()}{name[1:]}Trainer.train"
            rows.append(_row(f"one {name} step, {kind}", *step(kind), source, SAME_BATCH, shown=0))
    return rows


@torch.no_grad()
def padded_logprobs(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probs of `RESPONSES`, (B, T): ours, TRL's, and those of each row alone."""
    model = tiny_model(kind)
    ours, mask = response_logprobs(model, PROMPTS, RESPONSES)
    truth = torch.zeros_like(ours)
    for row, prompt, response in zip(truth, PROMPTS, RESPONSES, strict=True):
        row[: len(response)] = plain.logprobs(model, plain.pad([prompt], [response]), 1.0)[0]
    return ours, parity_trl.padded_logprobs(model, PROMPTS, RESPONSES) * mask, truth


def position_rows() -> list[Proof]:
    """Log-probs of responses to prompts of mixed lengths, against each row alone and unpadded.

    GRPOTrainer pads prompts on the left and passes no positions, so a padded row of a model with
    learnt absolute positions (GPT-2) is read at the wrong ones. Rotary models know distances only.
    """
    source, rows = "GRPOTrainer._get_per_token_logps_and_entropies", []
    for kind, tolerance in (("gpt2", math.inf), ("llama", SAME_TENSORS)):
        ours, trl, truth = padded_logprobs(kind)
        claim = f"log-probs of padded rows, {kind}"
        whose = "are those of each row alone"
        rows += [
            _row(f"{claim}: ours {whose}", ours, truth, "")._replace(source="each row, unpadded"),
            _row(f"{claim}: TRL's {whose}", trl, truth, source, tolerance),
        ]
    return rows
