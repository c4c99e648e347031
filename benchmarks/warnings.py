"""What somebody who knows no gold reward could have watched, and how early it warns of a fall.

    python -m benchmarks.warnings [--seeds 4] [--coefficients 0,0.02,0.1,0.4,1.6] [--updates 50]

PPO is trained with every coefficient in every seed, and at each update the replies that it learns
from are looked at by what a practitioner has: KL, length, entropy, a second reward model, the
spread of three, and how far the replies are from those of the pairs. Nothing learns from any of it.
`alarms` says what it was worth.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from benchmarks import alarms
from rlhf_lib.data.encoding import Pair, Prompt
from rlhf_lib.files import write_json
from rlhf_lib.methods import ppo as method
from rlhf_lib.methods.learner import Learner, Log, Steps
from rlhf_lib.methods.rewards import Reply, Reward, read_replies
from rlhf_lib.methods.rollout import Rollout, Sampler
from rlhf_lib.pools import worker_pool
from rlhf_lib.profiles import load_profile
from rlhf_lib.records import MEMBERS, TRAINED, Record
from rlhf_lib.runtime import MEASURING, environment, phase
from rlhf_lib.settings import PPOConfig
from rlhf_lib.show.display import write_figure
from rlhf_lib.study.stages import Study

# 2,000 kinds of word and of two words: enough for the bundled world's, and quick
WORDS = {"ngram_range": (1, 2), "max_features": 2000, "lowercase": True}


def main(
    seeds: int = 4,
    coefficients: str = "0,0.02,0.1,0.4,1.6",
    updates: int = 50,
    profile: str = "laptop",
    overrides: str = "",
    run_dir: Path = Path("runs/warnings"),
    out: Path = Path("benchmarks/results/warnings.json"),
) -> None:
    """Train all runs, two at a time, and write their numbers, what each signal was worth, and the
    figure.
    """
    given = [f"ppo.updates={updates}", "methods=benchmarks.warnings:WATCHED", *overrides.split()]
    runs = []
    with worker_pool(load_profile(profile, ["jobs=2"])) as (pool, _):
        needed = (*TRAINED, *MEMBERS)
        for future in [
            pool.submit(train, profile, seed, str(run_dir), given, name)
            for seed in range(seeds)
            for name in needed
        ]:
            future.result()
        cells = [(s, float(c)) for s in range(seeds) for c in coefficients.split(",")]
        waiting = [
            pool.submit(train, profile, seed, str(run_dir), [*given, f"ppo.kl_coef={c}"])
            for seed, c in cells
        ]
        for number, ((seed, coefficient), future) in enumerate(
            zip(cells, waiting, strict=True), start=1
        ):
            runs.append({"seed": seed, "coefficient": coefficient, "steps": future.result()})
            print(f"{number}/{len(cells)}  seed {seed}, kl_coef {coefficient:g}", flush=True)
    settings = {"profile": profile, "updates": updates, "overrides": overrides}
    found: dict[str, Any] = {"settings": settings, "environment": environment(), "runs": runs}
    found["warnings"] = alarms.score(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found)
    print(alarms.summary(json.loads(out.read_text(encoding="utf-8"))))
    for path in write_figure(alarms.figure(found["warnings"]), out.with_suffix("")):
        print(path)


def train(
    profile: str, seed: int, run_dir: str, overrides: Sequence[str], name: str = "ppo_watched"
) -> list[dict[str, float]]:
    """A stage, run if missing; of the watched one each update's signals and gold reward."""
    stage = Study.open(profile, seed, run_dir, overrides).stage(name)
    if name != "ppo_watched":
        return []
    kept = ("gold", "reward", *alarms.SIGNALS)
    return [{key: row[key] for key in kept} for row in stage.metrics()]


def watched_ppo(
    policy: Learner,
    value: Learner,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    pairs: Sequence[Pair],
    rater: Callable[[str], Reward],
    config: PPOConfig,
    seed: int,
    steps: Steps,
    log: Log,
) -> dict[str, int]:
    """PPO as it is, with a look at the replies of each update."""
    look = watcher(sampler, pairs, [rater(name) for name in MEMBERS])
    seen: dict[str, float] = {}
    sample = sampler.sample

    def watching(model: Any, asked: Sequence[Prompt], **settings: Any) -> Rollout:
        rollout = sample(model, asked, **settings)
        with phase(MEASURING):
            seen.update(look(asked, rollout))
        return rollout

    def log_both(step: int, tokens: int, metrics: Any) -> None:
        log(step, tokens, {**metrics, **seen, "length": metrics["completions/mean_length"]})

    watching.__signature__ = inspect.signature(sample)  # type: ignore[attr-defined]  # `numbers` reads it
    sampler.sample = watching  # type: ignore[method-assign]
    return method.train(
        policy, value, sampler, prompts, config, seed=seed, steps=steps, log=log_both
    )


def watcher(
    sampler: Sampler, pairs: Sequence[Pair], members: Sequence[Reward]
) -> Callable[[Sequence[Prompt], Rollout], dict[str, float]]:
    """`second_gap`: how much better the reward model finds the replies than a second one does.
    `spread`: the deviation of three of them about a reply. `distance`: 1 less the likeness (cosine
    of TF-IDF) of a reply to the nearest in the pairs. All are means over replies.
    """
    texts = [text for pair in pairs for text in (pair.chosen_text, pair.rejected_text)]
    counter = TfidfVectorizer(**WORDS)
    known = counter.fit_transform(texts)

    def look(asked: Sequence[Prompt], rollout: Rollout) -> dict[str, float]:
        replies: list[Reply] = read_replies(sampler.tokenizer, rollout.responses)
        others = [torch.as_tensor(member(asked, replies)) for member in members]
        each: Tensor = torch.stack([rollout.scores, *others])
        likeness = (counter.transform([reply.text for reply in replies]) @ known.T).max(axis=1)
        return {
            "second_gap": float((each[0] - each[1]).mean()),
            "spread": float(each.std(0).mean()),
            "distance": 1.0 - float(likeness.toarray().mean()),
        }

    return look


WATCHED = Record(
    "ppo_watched", "PPO watched", runs="benchmarks.warnings:watched_ppo",
    needs=(*TRAINED, *MEMBERS), sections=("ppo",), unread=("low_kl_coef",),
    exists=lambda profile, seed: True,
)  # fmt: skip

if __name__ == "__main__":
    typer.run(main)
