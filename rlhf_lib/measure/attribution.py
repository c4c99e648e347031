"""Who taught what: the same methods on labels of other annotators, or with other rewards."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.data.truth import Truth
from rlhf_lib.measure.evaluate import random_numbers, read_policy
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.runs import Stage, Work
from rlhf_lib.settings import EvaluationConfig
from rlhf_lib.world.rewards import DOSES, observe

METHODS = ("ppo", "dpo")
# A method -> the run on labels of each dose of taste; 1 is the annotator's own.
DOSED = {
    method: {1.0: method} | {dose: f"{method}_{labels}" for labels, dose in DOSES.items()}
    for method in METHODS
}
CONTROLS = {method: runs[DOSES["control"]] for method, runs in DOSED.items()}  # unbiased labels


def measure(
    work: Work,
    needed: Mapping[str, Stage],
    sampler: Sampler,
    data: PreferenceData,
    truth: Truth,
    config: EvaluationConfig,
    seed: int,
) -> dict:
    """SFT, and each other policy that is needed, answer the same prompts with the same luck.

    `samples.jsonl` has a row a reply: gold reward, polite words, and words.
    """
    prompts = list(data.prompts["evaluation"])[: config.measured_prompts]
    shape = config.measured_samples, len(prompts), sampler.max_new_tokens
    luck, rows = random_numbers(seed, "attribution", shape), []
    for name in [name for name in needed if not name.startswith("reward_model")]:
        policy = read_policy(str(needed[name].model_path), sampler.accelerator)
        for k, numbers in enumerate(luck):
            replies = sampler.draw(policy, prompts, config.temperature, numbers)
            work.num_tokens += sum(len(p.ids) for p in prompts) + sum(len(r.ids) for r in replies)
            for prompt, reply in zip(prompts, replies, strict=True):
                seen = observe(reply.text)
                rows.append({
                    "policy": name, "reply": k, "prompt": prompt.text, "polite": seen.polite,
                    "words": seen.length,
                    "gold": truth.gold(prompt.text, reply.text, reply.finished).total,
                })  # fmt: skip
    work.write_samples(rows)
    return {"replies": len(rows)}
