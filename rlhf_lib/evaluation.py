"""Measuring one seed's policies on held-out prompts: reward, KL, length, and best-of-n."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedModel

from rlhf_lib.data import PreferenceData, Prompt
from rlhf_lib.learner import freeze
from rlhf_lib.models import load_reference, load_reward_model
from rlhf_lib.rollout import Rollout, Sampler, gold_rewards, score
from rlhf_lib.runs import Run, Stage, Work, write_jsonl
from rlhf_lib.runtime import make_accelerator, progress, seed_everything


def records(rollout: Rollout, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[dict]:
    """One row per prompt; `kl` is the full-vocabulary KL to SFT summed over the reply, in nats."""
    assert rollout.exact_kl is not None, "evaluation samples with exact_kl=True"
    columns = {
        "proxy": rollout.scores.tolist(),
        "kl": rollout.exact_kl.sum(1).tolist(),
        "kl_k1": rollout.kl.tolist(),
        "length": rollout.lengths.int().tolist(),
        "finished": rollout.finished.tolist(),
    }
    if rollout.gold is not None:
        columns["gold"] = rollout.gold
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [
        {"prompt": prompt.text, "response": text, **row}
        for prompt, text, row in zip(prompts, texts, rows, strict=True)
    ]


def best_of_n(proxy: np.ndarray, gold: np.ndarray | None) -> list[dict]:
    """Take the best of n samples by proxy reward, for n = 1, 2, 4, ...

    `proxy`, `gold`: (prompts, samples). Each prompt's samples are cut into blocks of n, and the
    winners of all blocks are averaged. KL is the analytic log n - (n - 1) / n, an upper bound
    (Beirami et al. 2024, arXiv:2401.01879).
    """
    rows, prompts = [], len(proxy)
    for power in range(int(math.log2(proxy.shape[1])) + 1):
        n = 2**power
        blocks = proxy.reshape(prompts, -1, n)
        winner = blocks.argmax(-1)[..., None]
        row = {"n": n, "kl": math.log(n) - (n - 1) / n}
        row["proxy"] = float(np.take_along_axis(blocks, winner, -1).mean())
        if gold is not None:
            taken = np.take_along_axis(gold.reshape(prompts, -1, n), winner, -1)
            row["gold"] = float(taken.mean())
        rows.append(row)
    return rows


def evaluate(
    run: Run,
    data: PreferenceData,
    policies: Mapping[str, str],
    reward_model: Stage,
    upstream: Mapping[str, str],
    control: Stage | None = None,
) -> Stage:
    """Sample every policy on the evaluation prompts and measure it.

    `policies`: name -> model folder or name; "sft" among them is the reference. `control`: a
    reward model trained on unbiased labels of the same pairs, for a second best-of-n curve.
    Writes `samples/<policy>.jsonl`, a row per prompt, and `sft_again.jsonl`: a second draw from
    SFT, the null against which every difference to SFT should be seen.
    """
    config = run.profile.evaluation
    stage = run.stage("evaluate", config, upstream, "evaluation")

    def build(work: Work) -> dict:
        accelerator = make_accelerator(run.profile.model.precision)
        sampler = Sampler(
            run, accelerator, policies["sft"], str(reward_model.model_path),
            temperature=config.temperature, batch_size=config.batch_size,
        )  # fmt: skip
        prompts = data.prompts["evaluation"]
        (work.path / "samples").mkdir(exist_ok=True)
        means = {}
        draws = {**policies, "sft_again": policies["sft"]}
        for number, (name, path) in enumerate(progress(list(draws.items()), "evaluate")):
            seed_everything(1000 * run.seed + number)  # each policy has its own draw
            policy = freeze(accelerator, load_reference(path))
            rollout = sampler.sample(policy, prompts, exact_kl=True)
            texts = sampler.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
            rows = records(rollout, prompts, texts)
            write_jsonl(work.path / "samples" / f"{name}.jsonl", rows)
            kl = sum(row["kl"] for row in rows) / len(rows)
            means[name] = rollout.metrics() | {"kl": kl}
            work.num_tokens += rollout.num_tokens
            del policy
        pure = None
        if control is not None:
            model, _ = load_reward_model(str(control.model_path), sampler.tokenizer, run.seed)
            pure = freeze(accelerator, model)
        return {"policies": means, "best_of_n": _best_of_n(run, data, sampler, pure)}

    return stage.ensure(build)


def _best_of_n(
    run: Run, data: PreferenceData, sampler: Sampler, control: PreTrainedModel | None
) -> dict:
    """Curves of best-of-n from SFT, picked by the reward model and the control, if any."""
    config = run.profile.evaluation
    prompts = data.prompts["evaluation"][: config.best_of_n_prompts]
    n, shape = config.best_of_n, (len(prompts), config.best_of_n)
    repeated = [p for p in prompts for _ in range(n)]
    seed_everything(1000 * run.seed + 999)
    responses, proxy = sampler.draw(sampler.reference, repeated)
    gold = None
    if sampler.gold_known:
        texts = [p.text for p in repeated]
        gold = np.array(gold_rewards(sampler.tokenizer, texts, responses)).reshape(shape)
    curves = {"default": best_of_n(proxy.numpy().reshape(shape), gold)}
    if control is not None:
        with sampler.accelerator.autocast():
            pure = score(control, [p.ids for p in repeated], responses, config.batch_size)
        curves["control"] = best_of_n(pure.numpy().reshape(shape), gold)
    return curves
