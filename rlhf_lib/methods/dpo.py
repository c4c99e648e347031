"""DPO: a classification loss on pairs that moves the policy as if it had maximised a reward.

Source: Rafailov et al. 2023, arXiv:2305.18290. It learns from no sample and no reward model; the
reference's log-probabilities are computed once. `dpo.loss` puts another loss of the family in its
place; `dpo.online` puts two replies of the policy's own in place of a pair's, the better of which
the reward chooses (Guo et al. 2024, arXiv:2402.04792).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib import processes
from rlhf_lib.data.batches import by_length, shuffled_batches
from rlhf_lib.data.encoding import Pair, Prompt, paired_lengths, sides
from rlhf_lib.methods.learner import Averages, Learner, Log, Steps, unlogged
from rlhf_lib.methods.rewards import read_replies
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.models.load import adapters_off
from rlhf_lib.models.logprobs import paired_logprobs, reply_logprobs
from rlhf_lib.models.packing import Tokens
from rlhf_lib.objectives.preference import (
    PreferenceStats,
    dpo_loss,
    ipo_loss,
    kto_loss,
    length_normalised_dpo_loss,
    orpo_loss,
    simpo_loss,
)
from rlhf_lib.runtime import MEASURING, phase, progress
from rlhf_lib.settings import DPOConfig, SettingsError, numbers, unknown

Kept = Callable[[str, Callable[[], Tensor]], Tensor]


def train(
    policy: Learner,
    sampler: Sampler,
    pairs: Sequence[Pair],
    probes: Sequence[Prompt],
    config: DPOConfig,
    *,
    seed: int = 0,
    steps: Steps = range,
    log: Log = unlogged,
    kept: Kept = lambda name, make: make(),
) -> dict[str, int]:
    """`config.epochs` passes over the pairs; `policy` ends up trained.

    Every few steps (at least `config.probes` times, if there are as many) the policy answers the
    prompts `probes`, so that reward, KL, entropy and length can be drawn beside those of PPO and
    GRPO: no gradient comes from it. `kept(name, make)` is `make()`, or what a killed run had made.
    """
    loss_of = preference_loss(config)
    # 1. the reference's log-probs, once for all epochs
    unrelated = unrelated_replies(pairs) if config.loss == "kto" else []

    def of_reference() -> Tensor:
        return reference_table(
            sampler.reference, pairs, unrelated, config.loss, config.micro_batch_size
        )

    with sampler.accelerator.autocast(), adapters_off(sampler.reference):
        table = torch.zeros(len(pairs), 2) if config.online else kept("reference", of_reference)
    batches = shuffled_batches(len(pairs), config.batch_size, config.epochs, seed)
    every = max(1, len(batches) // config.probes)
    step = -1
    for step in steps(len(batches)):
        # 2. now and then, what the policy says by now
        with phase(MEASURING):
            probe = sampler.sample(policy.model, probes).metrics() if step % every == 0 else {}
        # 3. a step on the next pairs
        rows = batches[step]
        batch, of_batch = [pairs[i] for i in rows], table[rows]
        if config.online:
            batch, of_batch = own_pairs(sampler, policy.model, batch, config)
        metrics = update(
            policy,
            batch,
            of_batch,
            loss_of,
            [unrelated[i] for i in rows] if unrelated else [],
            micro_batch_size=config.micro_batch_size,
        )
        learnt = {"reply_tokens": sum(len(p.chosen) + len(p.rejected) for p in batch)}
        log(step, sum(paired_lengths(batch)), metrics | probe | learnt)
    return {"train_pairs": min(len(pairs), (step + 1) * config.batch_size)}


def own_pairs(
    sampler: Sampler, policy: PreTrainedModel, pairs: Sequence[Pair], config: DPOConfig
) -> tuple[list[Pair], Tensor]:
    """Two replies of the policy's own to each pair's prompt, the one with more reward chosen (a tie
    is decided by which was drawn first), and the reference's log-probs of both, (B, 2).
    """
    prompts = [Prompt(pair.prompt_text, pair.prompt) for pair in pairs for _ in range(2)]
    rollout = sampler.sample(policy, prompts, **numbers(sampler.sample, config))
    better = rollout.rewards.view(-1, 2).argmax(1)
    places = 2 * torch.arange(len(pairs)) + torch.stack((better, 1 - better))  # chosen, rejected
    replies = read_replies(sampler.tokenizer, rollout.responses)
    drawn = [
        replace(
            pair, chosen=replies[good].ids, rejected=replies[bad].ids,
            chosen_text=replies[good].text, rejected_text=replies[bad].text, margin=None,
        )
        for pair, (good, bad) in zip(pairs, places.T.tolist(), strict=True)
    ]  # fmt: skip
    return drawn, rollout.ref_logprobs.sum(1)[places.T]


class PairLogprobs(NamedTuple):
    """What a preference loss may read of some pairs, each (B,) but `kl`."""

    chosen: Tensor  # log-prob of the whole reply under the policy
    rejected: Tensor
    ref_chosen: Tensor  # the same under the reference; not a number where the loss has none
    ref_rejected: Tensor
    chosen_lengths: Tensor  # tokens, with the end-of-sequence token
    rejected_lengths: Tensor
    kl: Tensor  # scalar, for KTO; not a number for the others

    def logprobs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Policy and reference: what the losses with a reference compare."""
        return self.chosen, self.rejected, self.ref_chosen, self.ref_rejected

    def lengths(self) -> tuple[Tensor, Tensor]:
        return self.chosen_lengths, self.rejected_lengths


PreferenceLoss = Callable[[PairLogprobs], tuple[Tensor, PreferenceStats]]
NO_REFERENCE = frozenset({"simpo", "orpo"})
SMOOTHED = frozenset({"dpo", "dpo_normalised"})  # read label_smoothing


def preference_loss(config: DPOConfig) -> PreferenceLoss:
    """The loss that the settings ask for. Raises SettingsError for settings it cannot have."""
    beta, smoothing, margin = config.beta, config.label_smoothing, config.simpo_margin
    weights = config.desirable_weight, config.undesirable_weight
    family: dict[str, PreferenceLoss] = {
        "dpo": lambda p: dpo_loss(*p.logprobs(), beta, smoothing),
        "dpo_normalised": lambda p: length_normalised_dpo_loss(
            *p.logprobs(), *p.lengths(), beta, smoothing
        ),
        "ipo": lambda p: ipo_loss(*p.logprobs(), beta),
        "simpo": lambda p: simpo_loss(p.chosen, p.rejected, *p.lengths(), beta, margin),
        "orpo": lambda p: orpo_loss(p.chosen, p.rejected, *p.lengths(), beta),
        "kto": lambda p: kto_loss(*p.logprobs(), p.kl, beta, *weights),
    }
    if config.loss not in family:
        raise unknown("dpo.loss =", config.loss, family)
    if config.online and config.loss == "kto":
        raise SettingsError(
            "dpo.online makes pairs, and dpo.loss=kto reads a reply to another prompt as well: "
            "leave one of them out"
        )
    if smoothing and config.loss not in SMOOTHED:
        raise SettingsError(
            f"dpo.label_smoothing={smoothing} means nothing to "
            f"dpo.loss={config.loss}: set it to 0, or choose {' or '.join(sorted(SMOOTHED))}"
        )
    return family[config.loss]


@phase("log-probs")
@torch.no_grad()
def reference_logprobs(
    reference: PreTrainedModel, pairs: Sequence[Pair], batch_size: int
) -> Tensor:
    """Sequence log-probs of both sides under the frozen reference: (N, 2), chosen then rejected."""
    table = torch.zeros(len(pairs), 2)
    batches = list(processes.dealt(by_length, paired_lengths(pairs), size=batch_size))
    for rows in progress(batches, "reference log-probs"):
        both = paired_logprobs(reference, *sides([pairs[i] for i in rows]))
        table[rows] = torch.stack(both, dim=1).cpu()
    return processes.summed(table)


def unrelated_replies(pairs: Sequence[Pair]) -> list[list[int]]:
    """For each pair the chosen reply of the next one, in a circle: what KTO measures its KL on."""
    return [pair.chosen for pair in [*pairs[1:], *pairs[:1]]]


def reference_table(
    reference: PreTrainedModel, pairs: Sequence[Pair], unrelated: Tokens, loss: str, batch_size: int
) -> Tensor:
    """What the loss reads of the reference: (N, 2), for KTO (N, 3) with `unrelated` last.

    Not a number where the loss has no reference, so that nothing can read it unnoticed.
    """
    if loss in NO_REFERENCE:
        return torch.full((len(pairs), 2), math.nan)
    table = reference_logprobs(reference, pairs, batch_size)
    if loss == "kto":
        prompts = [pair.prompt for pair in pairs]
        table = torch.column_stack(
            [table, reply_logprobs(reference, prompts, unrelated, batch_size)]
        )
    return table


def update(
    policy: Learner,
    batch: Sequence[Pair],
    ref_logprobs: Tensor,
    loss_of: PreferenceLoss,
    unrelated: Tokens = (),
    *,
    micro_batch_size: int,
) -> dict[str, float]:
    """One optimizer step on the mean loss over the batch; `ref_logprobs` (B, 2).

    KTO alone has `unrelated`, a reply to another prompt for each pair, and their log-probs in a
    third column of `ref_logprobs`: its estimate of KL(policy || reference) is the mean log-ratio of
    these, over the whole batch, so that micro-batches share one value. They are not the policy's
    own samples, and the mean is often below 0 (arXiv:2402.01306, sec. 4.1).
    """
    averages, kl = Averages(), torch.tensor(math.nan)
    if unrelated:
        prompts = [pair.prompt for pair in batch]
        with policy.accelerator.autocast():
            logprobs = reply_logprobs(policy.model, prompts, unrelated, micro_batch_size)
        kl = (logprobs - ref_logprobs[:, 2]).mean()

    def losses() -> Iterator[Tensor]:
        for rows in processes.dealt(by_length, paired_lengths(batch), size=micro_batch_size):
            pairs = [batch[i] for i in rows]
            with policy.accelerator.autocast():
                chosen, rejected = paired_logprobs(policy.model, *sides(pairs))
            reference = ref_logprobs[rows].to(chosen.device)
            sizes = torch.tensor([[len(p.chosen), len(p.rejected)] for p in pairs]).to(reference)
            pair = PairLogprobs(
                chosen, rejected, reference[:, 0], reference[:, 1], sizes[:, 0], sizes[:, 1], kl
            )
            loss, stats = loss_of(pair)
            margins = stats.chosen_rewards - stats.rejected_rewards
            measured = {
                "rewards/chosen": stats.chosen_rewards.mean(),
                "rewards/rejected": stats.rejected_rewards.mean(),
                "rewards/accuracies": ((margins.sign() + 1) / 2).mean(),  # a tie counts half
                "rewards/margins": margins.mean(),
                "logps/chosen": chosen.detach().mean(),
                "logps/rejected": rejected.detach().mean(),
            }
            averages.add(measured, len(pairs))
            yield loss * len(pairs) / len(batch)

    loss, grad_norm = policy.step(losses())
    averages.put_together()
    step = {"loss": loss, "grad_norm": grad_norm, **policy.logged()}
    # below 0 the loss takes the KL for 0
    return step | averages.means() | ({"kto/kl": float(kl)} if unrelated else {})
