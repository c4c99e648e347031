"""DPO: a classification loss on pairs that moves the policy as if it had maximised a reward.

Source: Rafailov et al. 2023, arXiv:2305.18290. No sampling, no reward model; the reference's
log-probabilities are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.batches import by_length, shuffled_batches
from rlhf_lib.config import DPOConfig
from rlhf_lib.data import Pair, PreferenceData, paired_lengths, sides
from rlhf_lib.learner import Averages, Learner
from rlhf_lib.logprobs import paired_logprobs
from rlhf_lib.losses import dpo_loss
from rlhf_lib.models import load_policy, save_model
from rlhf_lib.rollout import Sampler
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.runtime import make_accelerator, progress


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


def update(
    learner: Learner, batch: Sequence[Pair], ref_logprobs: Tensor, config: DPOConfig
) -> dict[str, float]:
    """One optimizer step on the mean loss over the batch; `ref_logprobs` (B, 2)."""
    averages = Averages()

    def losses() -> Iterator[Tensor]:
        for rows in by_length(paired_lengths(batch), config.micro_batch_size):
            pairs = [batch[i] for i in rows]
            with learner.accelerator.autocast():
                chosen, rejected = paired_logprobs(learner.model, *sides(pairs))
            reference = ref_logprobs[rows].to(chosen.device)
            loss, stats = dpo_loss(
                chosen, rejected, reference[:, 0], reference[:, 1],
                config.beta, config.label_smoothing,
            )  # fmt: skip
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
    return step | averages.means()


def train(run: Run, data: PreferenceData, sft: Stage, reward_model: Stage) -> Stage:
    """The DPO stage: from the SFT policy to `model/`.

    Every few steps (`probes` in all) the policy answers validation prompts, so that reward, KL,
    entropy and length can be drawn beside those of PPO and GRPO. The reward model serves this
    measurement alone: no gradient comes from it.
    """
    config = run.profile.dpo
    upstream = {"data": data.hash, "sft": sft.hash, "reward_model": reward_model.hash}
    stage = run.stage("dpo", config, upstream, "dpo")

    def build(work: Work) -> dict:
        accelerator = make_accelerator(run.profile.model.precision)
        path, pairs = str(sft.model_path), data.pairs["train"]
        sampler = Sampler(run, accelerator, path, str(reward_model.model_path))
        with accelerator.autocast():
            table = reference_logprobs(sampler.reference, pairs, config.micro_batch_size)
        checkpointing = run.profile.model.gradient_checkpointing
        batches = shuffled_batches(len(pairs), config.batch_size, config.epochs, run.seed)
        learner = Learner(
            accelerator, load_policy(path, gradient_checkpointing=checkpointing),
            learning_rate=config.learning_rate, steps=len(batches),
            warmup_ratio=config.warmup_ratio, weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        )  # fmt: skip
        probed = data.prompts["validation"][: config.probe_prompts]
        every = max(1, len(batches) // config.probes)
        for step in work.steps(len(batches), accelerator):
            probe = sampler.sample(learner.model, probed).metrics() if step % every == 0 else {}
            batch = [pairs[i] for i in batches[step]]
            metrics = update(learner, batch, table[batches[step]], config)
            work.log(step, sum(paired_lengths(batch)), metrics | probe)
        save_model(learner.model, sampler.tokenizer, work.model_path)
        return {"train_pairs": len(pairs)}

    return stage.ensure(build)
