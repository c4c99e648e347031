"""The peer of PPO: TRL 1.16 has no PPO trainer any more, so it is `rlhf_lib/proofs/plain.py`.

That file is PPO as it is commonly written (the recipe of Huang et al. 2024, arXiv:2403.17031):
padded batches, whole-sequence logits, separate forwards for policy, reference, reward and value
model. It imports torch alone. Here its models are loaded and put under autocast, and its sampling,
which has no cache, is replaced by `model.generate`.
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
from benchmarks.work import Work
from rlhf_lib.proofs import plain


def load(job: Job) -> Round:
    device, low = "cuda" if torch.cuda.is_available() else "cpu", DTYPES[job.precision]
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    fp32 = {"dtype": torch.float32}  # master weights
    policy: Any = AutoModelForCausalLM.from_pretrained(job.model, **fp32)
    reward: Any = AutoModelForSequenceClassification.from_pretrained(job.reward_model, **fp32)
    policy, reward = policy.to(device).eval(), reward.to(device).eval()
    reference, value = copy.deepcopy(policy).requires_grad_(False), copy.deepcopy(reward)
    reward.requires_grad_(False)
    optimizers = [plain.adamw(model, job.learning_rate) for model in (policy, value)]
    settings = plain.Settings(
        kl_coef=job.kl_coef, epochs=job.ppo_epochs, minibatch_size=job.ppo_minibatch
    )
    autocast = partial(torch.autocast, device, low, enabled=low != torch.float32)
    for trunk in (policy, reference, value.base_model, reward.base_model):
        trunk.forward = autocast()(partial(trunk.forward, use_cache=False))
    for head in (value.score, reward.score):
        head.forward = autocast()(head.forward)

    def step(prompts: list[list[int]]) -> list[int]:
        """One PPO step on one batch of prompts; returns the lengths of the replies."""
        with autocast():
            replies = sample(policy, tokenizer, prompts, job.max_new_tokens)
        batch = plain.pad(prompts, replies, device)
        score = partial(plain.scores, reward)
        plain.ppo_update(policy, value, reference, score, batch, optimizers, settings)
        return [len(reply) for reply in replies]

    def run(number: int) -> Work:
        prompts = [job.rows[i].prompt for i in job.prompts_of_round(number, job.samples)]
        lengths: list[int] = []
        for start in range(0, len(prompts), job.samples_per_step):
            lengths += step(prompts[start : start + job.samples_per_step])
        return job.sample_work("ppo", sum(map(len, prompts)), lengths)

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
