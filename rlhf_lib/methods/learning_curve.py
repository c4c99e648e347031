"""The reward model's learning curve: the same training on parts of the training pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlhf_lib.data.encoding import Pair
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.methods.reward_model import score_pairs
from rlhf_lib.methods.reward_model import train as train_reward_model
from rlhf_lib.models.load import load_reward_model, load_tokenizer
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.runtime import make_accelerator

# All points together cost less than half of the full training: 1/3 + 1/9 + 1/27 + ... < 1/2
FACTOR = 3


def sizes(total: int, points: int) -> list[int]:
    """Numbers of training pairs, rising, each a third of the next; `total` itself is not listed."""
    return [size for k in range(points, 0, -1) if (size := total // FACTOR**k)]


def subset(pairs: Sequence[Pair], size: int, seed: int) -> list[Pair]:
    """`size` pairs drawn without replacement; a smaller subset lies within a larger one."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i] for i in order[:size]]


def train(run: Run, data: PreferenceData, reward_model: Stage) -> Stage:
    """The stage `reward_model_curve`: `curve_points` smaller reward models, and `reward_model`.

    `samples.jsonl` holds scores: of the test pairs by each smaller model, and of the validation
    pairs by `reward_model`, whose own stage has its scores of the test pairs. A row has
    `train_pairs`, `split`, and the pair's index and two raw scores. The weights are not kept.
    """
    total = len(data.pairs["train"])
    upstream = {"reward_model": reward_model.hash}  # which covers the data and the settings
    stage = run.stage("reward_model_curve", run.profile.reward_model, upstream, __name__)

    def build(work: Work) -> dict:
        rows, seconds = [], {}
        # each in a store of its own within this stage's folder, so that a killed run resumes it
        for size in sizes(total, run.profile.reward_model.curve_points):
            part = train_reward_model(
                replace(run, root=work.keep), _smaller(data, size, run.seed), f"reward_model_{size}"
            )
            rows += [{"train_pairs": size, "split": "test", **row} for row in part.samples()]
            seconds[str(size)] = part.result()["seconds"]
            work.num_tokens += part.result()["num_tokens"]

        model, _ = load_reward_model(
            reward_model.model_path, load_tokenizer(reward_model.model_path), run.seed
        )
        accelerator = make_accelerator(run.profile.model.precision)
        model = model.to(accelerator.device)  # type: ignore[arg-type]
        with accelerator.autocast():
            scores = score_pairs(model, data.pairs["validation"])
        for pair, (chosen, rejected) in enumerate(zip(*(s.tolist() for s in scores), strict=True)):
            rows.append({
                "train_pairs": total, "split": "validation", "pair": pair,
                "chosen_score": chosen, "rejected_score": rejected,
            })  # fmt: skip
        work.write_samples(rows)
        return {"sizes": [int(size) for size in seconds], "training_seconds": seconds}

    return stage.ensure(build)


def _smaller(data: PreferenceData, size: int, seed: int) -> PreferenceData:
    """`size` training pairs, all test pairs, and just enough of what only a full model is asked."""
    pairs = {
        "train": subset(data.pairs["train"], size, seed),
        "validation": data.pairs["validation"][:1],
        "test": data.pairs["test"],
    }
    return replace(
        data, pairs=pairs, demonstrations=data.demonstrations[:2], hash=f"{data.hash}/{size}"
    )
