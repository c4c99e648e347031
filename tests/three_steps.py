"""Three steps of each method, alone or started together with other processes: a program.

    python -m tests.three_steps OUT          torchrun --nproc_per_node 2 -m tests.three_steps OUT

Each process writes OUT/RANK.safetensors: the gradients of every step (summed over all processes,
before clipping), the weights at the end, and what it was told of each step, in float64 and in
float32; and what becomes of some values that processes share.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib import processes
from rlhf_lib.data.pairs import PreferenceData, load_data
from rlhf_lib.methods import dpo, grpo, ppo, reward_model, sft
from rlhf_lib.methods.learner import Learner
from rlhf_lib.methods.rewards import of_model
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.models.load import (
    add_value_head,
    load_policy,
    load_reference,
    load_reward_model,
    load_tokenizer,
    load_value_model,
    save_model,
)
from rlhf_lib.profiles import load_profile
from rlhf_lib.runtime import make_accelerator, seed_everything
from rlhf_lib.settings import DPOConfig, GRPOConfig, PPOConfig, RewardModelConfig, SFTConfig

STEPS = 3
PPO = PPOConfig(batch_size=10, minibatch_size=6, micro_batch_size=4, epochs=2)
GRPO = GRPOConfig(prompts_per_update=3, group_size=4, micro_batch_size=5)


PREFERRING: dict[str, dict[str, Any]] = {
    "dpo": {}, "kto": {"loss": "kto"}, "online_dpo": {"online": True},
}  # fmt: skip


class Watched:
    """A handle whose learners are watched."""

    def __init__(self, dtype: torch.dtype) -> None:
        seed_everything(1)
        self.dtype, self.accelerator = dtype, make_accelerator("fp32")
        self.gradients: list[Tensor] = []
        self.told: list[float] = []
        self._clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self._watch  # type: ignore[method-assign]

    def _watch(self, parameters: object, limit: float) -> Tensor:
        learning = [p for p in parameters if p.grad is not None]  # type: ignore[attr-defined]
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in learning]))
        return self._clip(learning, limit)  # type: ignore[return-value]

    def learner(self, model: PreTrainedModel) -> Learner:
        return Learner(self.accelerator, model.to(self.dtype), learning_rate=1e-3, steps=100)

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        # before the first step margins are 0 but for rounding, which would decide who is right
        kept = {k: v for k, v in metrics.items() if k != "rewards/accuracies"}
        self.told += [float(step), float(tokens), *kept.values()]


def steps(total: int) -> range:
    return range(min(STEPS, total))


def run(name: str, watched: Watched, data: PreferenceData, folder: Path) -> list[Learner]:
    """Train one method a little; the learners it trained."""
    tokenizer = load_tokenizer("tiny")
    how = {"seed": 1, "steps": steps, "log": watched.log}
    if name == "reward_model":
        rater = watched.learner(load_reward_model("tiny", tokenizer, 1)[0])
        config = RewardModelConfig(batch_size=9, micro_batch_size=4, margin=0.1)
        reward_model.train(rater, data.pairs["train"], config, **how)  # type: ignore[arg-type]
        return [rater]
    model = load_policy("tiny")
    if name == "ppo_shared":
        add_value_head(model)
    policy = watched.learner(model)
    if name == "sft":
        learning = SFTConfig(batch_size=11, micro_batch_size=4)
        sft.train(policy, data.demonstrations, learning, **how)  # type: ignore[arg-type]
        return [policy]
    judge, with_pad = load_reward_model("tiny", tokenizer, 1)
    judge.config.reward_mean, judge.config.reward_std = 0.0, 0.01
    processes.told(lambda: save_model(judge, with_pad, folder))
    judge.to(watched.dtype).eval()  # type: ignore[arg-type]
    sampler = Sampler(
        watched.accelerator, tokenizer, load_reference("tiny").to(watched.dtype),
        of_model(judge, watched.accelerator), max_new_tokens=12,
    )  # fmt: skip
    prompts = data.prompts["train"]
    if name in PREFERRING:
        preferring = DPOConfig(batch_size=7, micro_batch_size=4, probes=2, **PREFERRING[name])
        dpo.train(policy, sampler, data.pairs["train"], prompts[:5], preferring, **how)  # type: ignore[arg-type]
        return [policy]
    if name == "grpo":
        grpo.train(policy, sampler, prompts, GRPO, **how)  # type: ignore[arg-type]
        return [policy]
    if name == "ppo_shared":
        shared_trunk = replace(PPO, value_model="shared", entropy_coef=0.1)
        ppo.train(policy, policy, sampler, prompts, shared_trunk, **how)  # type: ignore[arg-type]
        return [policy]
    value = watched.learner(load_value_model(folder))
    ppo.train(policy, value, sampler, prompts, PPO, **how)  # type: ignore[arg-type]
    return [policy, value]


def cut(items: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    yield from (tuple(items[i : i + size]) for i in range(0, len(items), size))


def shared() -> dict[str, Tensor]:
    """Values that processes share: what each finds, in the end."""
    rank, asked = processes.rank(), []
    told = processes.told(lambda: asked.append(rank) or 10 + rank)  # type: ignore[func-returns-value]
    ours, theirs, nobodys = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    ours.grad = torch.full((2,), 1.0 + rank)
    if processes.first():
        theirs.grad = torch.full((2,), 5.0)
    processes.sum_gradients([ours, theirs, nobodys])
    assert nobodys.grad is None
    return {
        "told": torch.tensor([float(told), float(len(asked))]),
        "told alone": torch.tensor(processes.told(lambda: processes.gathered(rank))),
        "gathered": torch.tensor(processes.gathered(rank)),
        "summed": processes.summed(torch.tensor([1.0, rank])),
        "gradients": torch.stack((ours.grad, theirs.grad)),  # type: ignore[arg-type]
        "dealt": torch.tensor(sum(processes.dealt(cut, range(7), size=3), start=())),
    }


METHODS = ("sft", "reward_model", "ppo", "grpo", "dpo", "ppo_shared", "kto", "online_dpo")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def main(out: Path) -> None:
    processes.begin()
    torch.set_num_threads(1)
    data = load_data(load_profile("smoke").data, load_tokenizer("tiny"))
    found = {f"shared/{name}": value for name, value in shared().items()}
    for dtype, name in product(DTYPES, METHODS):
        torch.set_default_dtype(DTYPES[dtype])  # of the tables that are filled in
        watched = Watched(DTYPES[dtype])
        learners = run(name, watched, data, out / "judge")
        for number, gradient in enumerate(watched.gradients):
            found[f"{dtype}/{name}/gradient/{number}"] = gradient
        weights = [p.detach().flatten() for learner in learners for p in learner.model.parameters()]
        found[f"{dtype}/{name}/weights"] = torch.cat(weights)
        found[f"{dtype}/{name}/told"] = torch.tensor(watched.told, dtype=torch.float64)
    save_file(found, out / f"{processes.rank()}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
