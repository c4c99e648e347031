"""DPO: a classification loss on pairs that moves the policy as if it had maximised a reward.

Source: Rafailov et al. 2023, arXiv:2305.18290. No sampling, no reward model; the reference's
log-probabilities are computed once. `dpo.loss` puts another loss of the family in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.data.batches import by_length, shuffled_batches
from rlhf_lib.data.encoding import Pair, paired_lengths, sides
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.models.learner import Averages, Learner
from rlhf_lib.models.load import load_policy, save_model, trainable
from rlhf_lib.models.logprobs import Tokens, paired_logprobs, response_logprobs
from rlhf_lib.models.lora import adapters_off
from rlhf_lib.models.packing import by_prompt
from rlhf_lib.objectives.preference import (
    PreferenceStats,
    dpo_loss,
    ipo_loss,
    kto_loss,
    length_normalised_dpo_loss,
    orpo_loss,
    simpo_loss,
)
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.runtime import make_accelerator, phase, progress
from rlhf_lib.settings import DPOConfig, SettingsError, unknown


class PairLogprobs(NamedTuple):
    """What a preference loss may read of some pairs, each (B,) but `kl`."""

    chosen: Tensor  # log-prob of the whole reply under the policy
    rejected: Tensor
    ref_chosen: Tensor  # the same under the reference; not a number where the loss has none
    ref_rejected: Tensor
    chosen_lengths: Tensor  # tokens, with the end-of-sequence token
    rejected_lengths: Tensor
    kl: Tensor  # scalar, for KTO; not a number for the others


PreferenceLoss = Callable[[PairLogprobs, DPOConfig], tuple[Tensor, PreferenceStats]]

PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "dpo": lambda p, config: dpo_loss(
        p.chosen, p.rejected, p.ref_chosen, p.ref_rejected, config.beta, config.label_smoothing
    ),
    "dpo_normalised": lambda p, config: length_normalised_dpo_loss(
        p.chosen, p.rejected, p.ref_chosen, p.ref_rejected, p.chosen_lengths, p.rejected_lengths,
        config.beta, config.label_smoothing,
    ),
    "ipo": lambda p, config: ipo_loss(
        p.chosen, p.rejected, p.ref_chosen, p.ref_rejected, config.beta
    ),
    "simpo": lambda p, config: simpo_loss(
        p.chosen, p.rejected, p.chosen_lengths, p.rejected_lengths, config.beta, config.simpo_margin
    ),
    "orpo": lambda p, config: orpo_loss(
        p.chosen, p.rejected, p.chosen_lengths, p.rejected_lengths, config.beta
    ),
    "kto": lambda p, config: kto_loss(
        p.chosen, p.rejected, p.ref_chosen, p.ref_rejected, p.kl, config.beta,
        config.desirable_weight, config.undesirable_weight,
    ),
}  # fmt: skip
NO_REFERENCE = frozenset({"simpo", "orpo"})
SMOOTHED = frozenset({"dpo", "dpo_normalised"})  # read label_smoothing


@phase("log-probs")
@torch.no_grad()
def reference_logprobs(
    reference: PreTrainedModel, pairs: Sequence[Pair], batch_size: int
) -> Tensor:
    """Sequence log-probs of both sides under the frozen reference: (N, 2), chosen then rejected."""
    table = torch.zeros(len(pairs), 2)
    batches = list(by_length(paired_lengths(pairs), batch_size))
    for rows in progress(batches, "reference log-probs"):
        both = paired_logprobs(reference, *sides([pairs[i] for i in rows]))
        table[rows] = torch.stack(both, dim=1).cpu()
    return table


@phase("log-probs")
@torch.no_grad()
def sequence_logprobs(
    model: PreTrainedModel, prompts: Tokens, replies: Tokens, batch_size: int
) -> Tensor:
    """Log-prob of each whole reply to its prompt: (N,), on the CPU and without gradient."""
    sums = torch.zeros(len(prompts))
    for rows in by_prompt(prompts, replies, batch_size):
        batch = [prompts[i] for i in rows], [replies[i] for i in rows]
        sums[rows] = response_logprobs(model, *batch)[0].sum(1).cpu()
    return sums


def unrelated_replies(pairs: Sequence[Pair]) -> list[list[int]]:
    """For each pair the chosen reply of the next one, in a circle: what KTO measures its KL on."""
    return [pair.chosen for pair in [*pairs[1:], *pairs[:1]]]


def reference_table(
    reference: PreTrainedModel, pairs: Sequence[Pair], unrelated: Tokens, config: DPOConfig
) -> Tensor:
    """What `config.loss` reads of the reference: (N, 2), for KTO (N, 3) with `unrelated` last.

    Not a number where the loss has no reference, so that nothing can read it unnoticed.
    """
    if config.loss in NO_REFERENCE:
        return torch.full((len(pairs), 2), math.nan)
    table = reference_logprobs(reference, pairs, config.micro_batch_size)
    if config.loss == "kto":
        prompts = [pair.prompt for pair in pairs]
        third = sequence_logprobs(reference, prompts, unrelated, config.micro_batch_size)
        table = torch.column_stack([table, third])
    return table


def update(
    learner: Learner, batch: Sequence[Pair], ref_logprobs: Tensor, config: DPOConfig,
    unrelated: Tokens = (),
) -> dict[str, float]:  # fmt: skip
    """One optimizer step on the mean loss over the batch; `ref_logprobs` (B, 2).

    KTO alone reads `unrelated`, a reply to another prompt for each pair, and their log-probs in a
    third column of `ref_logprobs`.
    """
    averages, kto = Averages(), {}
    kl = torch.tensor(math.nan)
    if config.loss == "kto":
        kl = _kl_of_unrelated(learner, batch, unrelated, ref_logprobs[:, 2], config)
        kto = {"kto/kl": float(kl)}  # below 0 the loss takes it for 0

    def losses() -> Iterator[Tensor]:
        for rows in by_length(paired_lengths(batch), config.micro_batch_size):
            pairs = [batch[i] for i in rows]
            with learner.accelerator.autocast():
                chosen, rejected = paired_logprobs(learner.model, *sides(pairs))
            reference = ref_logprobs[rows].to(chosen.device)
            sizes = torch.tensor([[len(p.chosen), len(p.rejected)] for p in pairs]).to(reference)
            logprobs = PairLogprobs(
                chosen, rejected, reference[:, 0], reference[:, 1], sizes[:, 0], sizes[:, 1], kl
            )
            loss, stats = PREFERENCE_LOSSES[config.loss](logprobs, config)
            margins = stats.chosen_rewards - stats.rejected_rewards
            averages.add({
                "rewards/chosen": stats.chosen_rewards.mean(),
                "rewards/rejected": stats.rejected_rewards.mean(),
                "rewards/accuracies": ((margins.sign() + 1) / 2).mean(),  # a tie counts half
                "rewards/margins": margins.mean(),
                "logps/chosen": chosen.detach().mean(),
                "logps/rejected": rejected.detach().mean(),
            }, len(pairs))  # fmt: skip
            yield loss * len(pairs) / len(batch)

    loss, grad_norm = learner.step(losses())
    step = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learner.learning_rate}
    return step | averages.means() | kto


def _kl_of_unrelated(
    learner: Learner, batch: Sequence[Pair], unrelated: Tokens, ref_logprobs: Tensor,
    config: DPOConfig,
) -> Tensor:  # fmt: skip
    """KTO's estimate of KL(policy || reference): mean log-ratio of replies to other prompts.

    Over the whole batch, so that micro-batches share one value. The replies are not the policy's
    own samples, and the mean is often below 0 (arXiv:2402.01306, sec. 4.1).
    """
    prompts = [pair.prompt for pair in batch]
    with learner.accelerator.autocast():
        logprobs = sequence_logprobs(learner.model, prompts, unrelated, config.micro_batch_size)
    return (logprobs - ref_logprobs).mean()


def train(
    run: Run, data: PreferenceData, sft: Stage, reward_model: Stage,
    stage_name: str = "dpo", changes: Mapping[str, object] | None = None,
) -> Stage:  # fmt: skip
    """The DPO stage: from the SFT policy to `model/`.

    Every few steps (`probes` in all) the policy answers validation prompts, so that reward, KL,
    entropy and length can be drawn beside those of PPO and GRPO. The reward model serves this
    measurement alone: no gradient comes from it. `stage_name` and `changes` of the settings make a
    second run beside the default.
    """
    config = replace(run.profile.dpo, **(changes or {}))
    if config.loss not in PREFERENCE_LOSSES:
        raise unknown("dpo.loss =", config.loss, PREFERENCE_LOSSES)
    if config.label_smoothing and config.loss not in SMOOTHED:
        raise SettingsError(
            f"dpo.label_smoothing={config.label_smoothing} means nothing to "
            f"dpo.loss={config.loss}: set it to 0, or choose {' or '.join(sorted(SMOOTHED))}"
        )
    upstream = {"data": data.hash, "sft": sft.hash, "reward_model": reward_model.hash}
    stage = run.stage(stage_name, config, upstream, __name__)

    def build(work: Work) -> dict:
        accelerator = make_accelerator(run.profile.model.precision)
        path, pairs = str(sft.model_path), data.pairs["train"]
        model = trainable(load_policy(path), run.profile.model)
        sampler = Sampler(run, accelerator, path, str(reward_model.model_path), policy=model)
        # a list of all replies, which only one loss reads
        unrelated = unrelated_replies(pairs) if config.loss == "kto" else []
        with accelerator.autocast(), adapters_off(sampler.reference):
            table = work.kept(
                "reference",
                lambda: reference_table(sampler.reference, pairs, unrelated, config),
            )
        batches = shuffled_batches(len(pairs), config.batch_size, config.epochs, run.seed)
        learner = Learner(
            accelerator, model, learning_rate=config.learning_rate, steps=len(batches),
            warmup_ratio=config.warmup_ratio, weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        )  # fmt: skip
        probed = data.prompts["validation"][: config.probe_prompts]
        every = max(1, len(batches) // config.probes)
        for step in work.steps(len(batches), accelerator):
            probe = sampler.sample(learner.model, probed).metrics() if step % every == 0 else {}
            rows = batches[step]
            batch = [pairs[i] for i in rows]
            others = [unrelated[i] for i in rows] if unrelated else []
            metrics = update(learner, batch, table[rows], config, others)
            work.log(step, sum(paired_lengths(batch)), metrics | probe)
        save_model(learner.model, sampler.tokenizer, work.model_path)
        return {"train_pairs": len(pairs)}

    return stage.ensure(build)
