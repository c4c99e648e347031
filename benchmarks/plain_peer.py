"""Bare torch as a peer: PPO, GRPO and DPO of `rlhf_lib/proofs/plain.py`.

That file is the methods as they are commonly written (for PPO the recipe of Huang et al. 2024,
arXiv:2403.17031; TRL 1.16 has no PPO trainer any more): padded batches, whole-sequence logits,
separate forwards for policy, reference, reward and value model. It imports torch alone. Here its
models are loaded and put under autocast, and its sampling, which has no cache, is replaced by
`model.generate`.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.job import Job
from benchmarks.protocol import Round
from benchmarks.roof import DTYPES
from rlhf_lib.proofs import plain
from rlhf_lib.session.work import Work


def load(stage: str, job: Job) -> Round:
    """One of `ppo`, `grpo_plain`, `dpo_plain`."""
    device, low = "cuda" if torch.cuda.is_available() else "cpu", DTYPES[job.precision]
    autocast = partial(torch.autocast, device, low, enabled=low != torch.float32)
    fp32 = {"dtype": torch.float32}  # master weights
    policy: Any = AutoModelForCausalLM.from_pretrained(job.model, **fp32)
    policy = policy.to(device).eval()
    reference: Any = copy.deepcopy(policy).requires_grad_(False)
    for model in (policy, reference):
        model.base_model.forward = autocast()(partial(model.base_model.forward, use_cache=False))
    optimizer = plain.adamw(policy, job.learning_rate)
    settings = plain.Settings(
        kl_coef=job.kl_coef, epochs=job.ppo_epochs, minibatch_size=job.ppo_minibatch
    )
    if stage == "dpo_plain":
        settings = settings._replace(beta=job.beta)
        return _dpo(job, policy, reference, optimizer, settings)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    reward: Any = AutoModelForSequenceClassification.from_pretrained(job.reward_model, **fp32)
    reward = reward.to(device).eval()
    value = copy.deepcopy(reward)
    reward.requires_grad_(False)
    for model in (reward, value):
        model.base_model.forward = autocast()(partial(model.base_model.forward, use_cache=False))
        model.score.forward = autocast()(model.score.forward)
    score = partial(plain.scores, reward)
    if stage == "ppo":
        optimizers = [optimizer, plain.adamw(value, job.learning_rate)]
        group, step = 1, partial(plain.ppo_update, policy, value, reference, score)
        step = partial(step, optimizers=optimizers, s=settings)
    else:
        group = job.group_size
        settings = settings._replace(
            kl_coef=0.0, k3_coef=job.kl_coef, epochs=1, group_size=job.group_size
        )
        step = partial(plain.grpo_update, policy, reference, score)
        step = partial(step, optimizer=optimizer, s=settings)

    def run(number: int) -> Work:
        prompts = [job.rows[i].prompt for i in job.prompts_of_round(number, job.samples // group)]
        lengths: list[int] = []
        for start in range(0, len(prompts), job.samples_per_step // group):
            some = prompts[start : start + job.samples_per_step // group]
            asked = [prompt for prompt in some for _ in range(group)]
            with autocast():
                replies = sample(policy, tokenizer, asked, job.max_new_tokens)
            step(batch=plain.pad(asked, replies, device))
            lengths += map(len, replies)
        work = "ppo" if stage == "ppo" else "grpo"
        return job.sample_work(work, sum(map(len, prompts)), lengths)

    return run


def _dpo(job: Job, policy: Any, reference: Any, optimizer: Any, settings: plain.Settings) -> Round:
    batches = [[(r.prompt, r.chosen, r.rejected) for r in batch] for batch in job.batches("dpo")]

    work = job.pair_work("dpo")

    def run(number: int) -> Work:
        for place in job.order(number, len(batches)):
            plain.dpo_update(policy, reference, batches[place], optimizer, settings)
        return work

    return run


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, **settings: Any
) -> list[list[int]]:
    """`model.generate` on a batch padded on the left, from the unfiltered softmax."""
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    output = model.generate(
        **padded.to(model.device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    replies, end = output[:, padded["input_ids"].shape[1] :].tolist(), tokenizer.eos_token_id
    return [row[: row.index(end) + 1] if end in row else row for row in replies]
