"""A second reward model's opinion: a warning of over-optimisation that needs no gold reward.

Two reward models that differ in their seed alone share what the data taught them, and not the
accidents of their training. A policy that learned to please one of them by such an accident gains
less in the other's eyes (Coste et al. 2023, arXiv:2310.02743).
"""

from __future__ import annotations

from rlhf_lib.data.encoding import Encoder
from rlhf_lib.methods.rollout import score
from rlhf_lib.models.learner import freeze
from rlhf_lib.models.load import load_reward_model, load_tokenizer
from rlhf_lib.runs import Run, Stage, Work, read_jsonl
from rlhf_lib.runtime import make_accelerator

WATCHED = ("sft", "sft_again", "rejection_sft", "ppo", "ppo_low_kl", "grpo", "dpo")


def measure(run: Run, evaluate: Stage, reward_model: Stage, rival: Stage) -> Stage:
    """Score the replies of the stage `evaluate`, one a prompt, by two reward models.

    `reward_model`: the one that the policies of this seed were trained on; `rival`: another seed's.
    Both read the reply's text, tokenised again. `samples.jsonl` has a row for each reply: policy,
    prompt and the normalised rewards, `own` and the `other`.
    """
    upstream = {"evaluate": evaluate.hash, "own": reward_model.hash, "other": rival.hash}
    stage = run.stage("second_opinion", {"policies": WATCHED}, upstream, __name__)

    def build(work: Work) -> dict:
        accelerator = make_accelerator(run.profile.model.precision)
        tokenizer, limits = load_tokenizer(str(reward_model.model_path)), run.profile.data
        encoder = Encoder(tokenizer, limits.max_prompt_tokens, limits.max_response_tokens)
        models = {
            name: freeze(accelerator, load_reward_model(judge.model_path, tokenizer, run.seed)[0])
            for name, judge in (("own", reward_model), ("other", rival))
        }
        rows = []
        for policy in WATCHED:
            sampled = read_jsonl(evaluate.path / "samples" / f"{policy}.jsonl")
            sampled = sampled[: len(sampled) // run.profile.evaluation.samples_per_prompt]
            texts = encoder.demonstrations([(row["prompt"], row["response"]) for row in sampled])
            sides = [text.prompt for text in texts], [text.response for text in texts]
            with accelerator.autocast():
                scores = {
                    name: score(model, *sides, run.profile.evaluation.batch_size).tolist()
                    for name, model in models.items()
                }
            work.num_tokens += 2 * sum(map(len, sides[0] + sides[1]))
            rows += [
                {"policy": policy, "prompt": row["prompt"], "own": one, "other": two}
                for row, one, two in zip(sampled, *scores.values(), strict=True)
            ]
        work.write_samples(rows)
        return {"replies": len(rows)}

    return stage.ensure(build)
