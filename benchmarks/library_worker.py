"""One side of the comparison: this library, driven by its public functions.

python -m benchmarks.library_worker JOB.json STAGE
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from benchmarks.job import Job, Row, read_job
from benchmarks.protocol import Round, serve
from rlhf_lib.data.batches import chunks
from rlhf_lib.data.encoding import Demonstration, Pair, Prompt
from rlhf_lib.methods import dpo, grpo, ppo, reward_model, rewards, sft
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.models.generation import generate
from rlhf_lib.models.load import (
    freeze,
    load_policy,
    load_reference,
    load_reward_model,
    load_tokenizer,
    load_value_model,
)
from rlhf_lib.runtime import make_accelerator, set_up_process
from rlhf_lib.session.work import Work
from rlhf_lib.settings import DPOConfig

ENDLESS = 1_000_000  # steps of a schedule that is never seen to end


def load(stage: str, job: Job) -> Round:
    """Load models and rows of a stage; what comes back computes one round of it."""
    loaders = {
        "sft": _sft,
        "reward_model": _reward_model,
        "dpo": _dpo,
        "grpo": _grpo,
        "ppo": _ppo,
        "generation": _generation,
    }
    return loaders[stage.removesuffix("_plain")](job, make_accelerator(job.precision))


def _learner(job: Job, accelerator: Accelerator, model: PreTrainedModel) -> Learner:
    return Learner(accelerator, model, learning_rate=job.learning_rate, steps=ENDLESS)


def _pair(row: Row) -> Pair:
    return Pair("", "", "", "", row.prompt, row.chosen, row.rejected)


def _epochs(job: Job, stage: str, learner: Learner, as_row: Callable, update: Callable) -> Round:
    """The batches of a round, in a fresh order, by a method's own `update`."""
    batches = [[as_row(row) for row in batch] for batch in job.batches(stage)]
    work = job.pair_work(stage)

    def run(number: int) -> Work:
        for place in job.order(number, len(batches)):
            update(learner, batches[place], job.batch_size)
        return work

    return run


def _sft(job: Job, accelerator: Accelerator) -> Round:
    learner = _learner(job, accelerator, load_policy(job.model))

    def demonstration(row: Row) -> Demonstration:
        return Demonstration("", "", row.prompt, row.chosen)

    return _epochs(job, "sft", learner, demonstration, sft.update)


def _reward_model(job: Job, accelerator: Accelerator) -> Round:
    model, _ = load_reward_model(job.reward_model, load_tokenizer(job.model), seed=0)
    learner = _learner(job, accelerator, model)
    return _epochs(job, "reward_model", learner, _pair, reward_model.update)


def _dpo(job: Job, accelerator: Accelerator) -> Round:
    learner = _learner(job, accelerator, load_policy(job.model))
    batches = [[_pair(row) for row in batch] for batch in job.batches("dpo")]
    pairs = [pair for batch in batches for pair in batch]
    reference = freeze(accelerator, load_reference(job.model))
    loss, work = dpo.preference_loss(DPOConfig(beta=job.beta)), job.pair_work("dpo")

    def run(number: int) -> Work:
        with accelerator.autocast():
            table = dpo.reference_logprobs(reference, pairs, job.batch_size)
        for place in job.order(number, len(batches)):
            batch, first = batches[place], place * job.batch_size
            known = table[first : first + len(batch)]
            dpo.update(learner, batch, known, loss, micro_batch_size=job.batch_size)
        return work

    return run


def _sampler(job: Job, accelerator: Accelerator) -> Sampler:
    tokenizer = load_tokenizer(job.model)
    reference = freeze(accelerator, load_reference(job.model))
    model, _ = load_reward_model(job.reward_model, tokenizer, seed=0)
    reward = rewards.of_model(freeze(accelerator, model), accelerator, job.samples_per_step)
    return Sampler(accelerator, tokenizer, reference, reward, max_new_tokens=job.max_new_tokens)


def _prompts(job: Job, number: int, count: int) -> list[Prompt]:
    places = job.prompts_of_round(number, count)
    return [Prompt(job.prompt_texts[i], job.rows[i].prompt) for i in places]


def _lengths(replies: list[list[int]]) -> list[int]:
    return [len(reply) for reply in replies]


def _grpo(job: Job, accelerator: Accelerator) -> Round:
    sampler = _sampler(job, accelerator)
    policy = _learner(job, accelerator, load_policy(job.model))

    def run(number: int) -> Work:
        prompts, replies = _prompts(job, number, job.samples // job.group_size), []
        for asked in chunks(prompts, job.samples_per_step // job.group_size):
            batch = [prompt for prompt in asked for _ in range(job.group_size)]
            rollout = sampler.sample(policy.model, batch, micro_batch_size=job.samples_per_step)
            _, advantages = grpo.make_advantages(rollout, group_size=job.group_size)
            grpo.update(
                policy,
                rollout,
                advantages,
                micro_batch_size=job.samples_per_step,
                kl_coef=job.kl_coef,
                constant=job.max_new_tokens,
            )
            replies += rollout.responses
        return job.sample_work("grpo", sum(len(p.ids) for p in prompts), _lengths(replies))

    return run


def _ppo(job: Job, accelerator: Accelerator) -> Round:
    sampler = _sampler(job, accelerator)
    policy = _learner(job, accelerator, load_policy(job.model))
    value = _learner(job, accelerator, load_value_model(job.reward_model))

    def run(number: int) -> Work:
        prompts, replies = _prompts(job, number, job.samples), []
        for step, asked in enumerate(chunks(prompts, job.samples_per_step)):
            rollout = sampler.sample(policy.model, asked, micro_batch_size=job.samples_per_step)
            experience = ppo.make_experience(
                rollout, value, kl_coef=job.kl_coef, micro_batch_size=job.ppo_minibatch
            )
            ppo.update(
                policy,
                value,
                experience,
                epochs=job.ppo_epochs,
                minibatch_size=job.ppo_minibatch,
                micro_batch_size=job.ppo_minibatch,
                seed=1000 * number + step,
            )
            replies += rollout.responses
        return job.sample_work("ppo", sum(len(p.ids) for p in prompts), _lengths(replies))

    return run


def _generation(job: Job, accelerator: Accelerator) -> Round:
    model, tokenizer = freeze(accelerator, load_policy(job.model)), load_tokenizer(job.model)

    def run(number: int) -> Work:
        prompts = [p.ids for p in _prompts(job, number, job.generation_batch)]
        with accelerator.autocast():
            replies = generate(model, tokenizer, prompts, job.max_new_tokens, 1.0)
        return job.sample_work("generation", sum(map(len, prompts)), _lengths(replies))

    return run


if __name__ == "__main__":
    wanted = read_job(sys.argv[1])
    set_up_process(wanted.threads)
    torch.manual_seed(0)
    serve(lambda: load(sys.argv[2], wanted))
