"""REINFORCE with a group mean, as somebody would add it from outside the library."""

from dataclasses import replace

from rlhf_lib.catalogue import record
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.settings import numbers


def train(policy, sampler, prompts, config, *, steps, log):
    size, count = config.group_size, config.prompts_per_update
    sampling = numbers(sampler.sample, config)  # temperature, reward_clip and what else it takes
    for step in steps(config.updates):
        asked = [prompts[(step * count + i) % len(prompts)] for i in range(count)]
        rollout = sampler.sample(policy.model, [p for p in asked for _ in range(size)], **sampling)
        groups = rollout.rewards.view(-1, size)
        advantages = (groups - groups.mean(1, keepdim=True)).view(-1, 1)

        def losses(rollout=rollout, advantages=advantages):
            logprobs, _ = response_logprobs(policy.model, rollout.prompts, rollout.responses)
            yield -(advantages.to(logprobs) * logprobs).sum() / len(rollout.responses)

        loss, norm = policy.step(losses())
        log(step, rollout.num_tokens, rollout.metrics() | {"loss": loss, "grad_norm": norm})
    return {"updates": config.updates, "samples": config.updates * size * count}


RECORD = replace(
    record("grpo"),
    name="reinforce",
    label="REINFORCE",
    color="#e377c2",
    runs="reinforce:train",
    notebook="",
    help="",
    coefficient="",  # none holds it near its reference
    # it learns one model and reads two; replies are sampled, scored, read by policy and reference,
    # and learnt from once
    held=lambda settings: (1, 2),
)
