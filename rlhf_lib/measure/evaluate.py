"""Measuring one seed's policies on held-out prompts: reward, KL, entropy, length, best-of-n."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.data.encoding import Prompt
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.measure.heldout import chosen_replies, heldout_texts, negative_logprobs
from rlhf_lib.methods.rollout import Rollout, Sampler, gold_rewards, score
from rlhf_lib.models.learner import freeze
from rlhf_lib.models.load import load_reference, load_reward_model, load_tokenizer
from rlhf_lib.models.logprobs import Tokens
from rlhf_lib.objectives.kl import k3
from rlhf_lib.objectives.masked import masked_mean
from rlhf_lib.runs import Run, Stage, Work, write_jsonl
from rlhf_lib.runtime import make_accelerator, progress, seed_everything
from rlhf_lib.settings import content_hash


def records(
    rollout: Rollout, prompts: Sequence[Prompt], texts: Sequence[str], judged: Tensor | None = None
) -> list[dict]:
    """One row per reply: rewards, distance from SFT, entropy, length, and whether it ended.

    `kl` is the full-vocabulary KL to SFT summed over the reply, in nats; `kl_k1` and `kl_k3` are
    its sampled estimates; `entropy` is the mean over the reply's tokens. `judged`: (B,) rewards by
    a held-out judge.
    """
    assert rollout.exact_kl is not None, "evaluation samples with exact_kl=True"
    mask = rollout.response_mask
    columns = {
        "proxy": rollout.scores.tolist(),
        "kl": rollout.exact_kl.sum(1).tolist(),
        "kl_k1": rollout.kl.tolist(),
        "kl_k3": (k3(rollout.logprobs, rollout.ref_logprobs) * mask).sum(1).tolist(),
        "entropy": masked_mean(rollout.entropies, mask, dim=1).tolist(),
        "length": rollout.lengths.int().tolist(),
        "finished": rollout.finished.tolist(),
    }
    if rollout.gold is not None:
        columns["gold"] = rollout.gold
    if judged is not None:
        columns["judge"] = judged.tolist()
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [
        {"prompt": prompt.text, "response": text, **row}
        for prompt, text, row in zip(prompts, texts, rows, strict=True)
    ]


def best_of_n(proxy: np.ndarray, others: Mapping[str, np.ndarray]) -> list[dict]:
    """Take the best of n samples by proxy reward, for n = 1, 2, 4, ...

    `proxy` and each of `others` (gold or judged rewards of the same samples): (prompts, samples).
    Each prompt's samples are cut into blocks of n, and the winners of all blocks are averaged. KL
    is the analytic log n - (n - 1) / n, an upper bound (Beirami et al. 2024, arXiv:2401.01879).
    """
    rows, prompts = [], len(proxy)
    for power in range(int(math.log2(proxy.shape[1])) + 1):
        n = 2**power
        winner = proxy.reshape(prompts, -1, n).argmax(-1)[..., None]
        row = {"n": n, "kl": math.log(n) - (n - 1) / n}
        for key, rewards in {"proxy": proxy, **others}.items():
            taken = np.take_along_axis(rewards.reshape(prompts, -1, n), winner, -1)
            row[key] = float(taken.mean())
        rows.append(row)
    return rows


def evaluate(
    run: Run,
    data: PreferenceData,
    policies: Mapping[str, str],
    reward_model: Stage,
    upstream: Mapping[str, str],
    control: Stage | None = None,
    judge: Stage | None = None,
) -> Stage:
    """Sample every policy on the evaluation prompts and measure it.

    `policies`: name -> model folder or name; "sft" among them is the reference. `control`: a
    reward model trained on unbiased labels of the same pairs, for a second best-of-n curve.
    `judge`: a reward model trained on pairs that the proxy never saw; every reply gets its score.

    Writes `samples/<policy>.jsonl`: `samples_per_prompt` rows a prompt, the whole list of prompts
    once, then again; `samples/sft_again.jsonl`, a second draw from SFT: the null against which
    every difference to SFT should be seen; `chosen.jsonl`, the dataset's chosen replies to the
    prompts that a test pair shares; `heldout.jsonl`, each held-out text's -log p by each policy.
    """
    config = run.profile.evaluation
    texts, what = heldout_texts(
        run.profile.data, data, load_tokenizer(policies["sft"]), config.heldout_texts
    )
    upstream = {**upstream, "heldout": content_hash([vars(text) for text in texts])}
    if judge is not None:
        upstream["judge"] = judge.hash
    stage = run.stage("evaluate", config, upstream, __name__)

    def build(work: Work) -> dict:
        accelerator = make_accelerator(run.profile.model.precision)
        sampler = Sampler(
            run, accelerator, policies["sft"], str(reward_model.model_path),
            temperature=config.temperature, batch_size=config.batch_size,
        )  # fmt: skip
        rater = _Rater(sampler, _frozen_reward_model(sampler, judge, run.seed))
        prompts = list(data.prompts["evaluation"]) * config.samples_per_prompt
        (work.path / "samples").mkdir(exist_ok=True)
        means, nlls = {}, {}
        draws = {**policies, "sft_again": policies["sft"]}
        for number, (name, path) in enumerate(progress(list(draws.items()), "evaluate")):
            seed_everything(1000 * run.seed + number)  # each policy has its own draw
            policy = freeze(accelerator, load_reference(path))
            rollout = sampler.sample(policy, prompts, exact_kl=True)
            replies = sampler.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
            judged = rater.judged(rollout.prompts, rollout.responses)
            rows = records(rollout, prompts, replies, judged)
            write_jsonl(work.path / "samples" / f"{name}.jsonl", rows)
            kl = sum(row["kl"] for row in rows) / len(rows)
            means[name] = rollout.metrics() | {"kl": kl}
            if judged is not None:
                means[name]["judge"] = float(judged.mean())
            work.num_tokens += rollout.num_tokens
            if name in policies:
                with accelerator.autocast():
                    nlls[name] = negative_logprobs(policy, texts, config.batch_size)
            del policy
        write_jsonl(work.path / "heldout.jsonl", [
            {"tokens": len(text.response), "nll": {name: nlls[name][i] for name in nlls}}
            for i, text in enumerate(texts)
        ])  # fmt: skip
        write_jsonl(work.path / "chosen.jsonl", rater.chosen(data))
        pure = _frozen_reward_model(sampler, control, run.seed)
        curves = _best_of_n(run, data, rater, pure)
        return {"policies": means, "best_of_n": curves, "heldout": what}

    return stage.ensure(build)


def _frozen_reward_model(
    sampler: Sampler, stage: Stage | None, seed: int
) -> PreTrainedModel | None:
    if stage is None:
        return None
    model, _ = load_reward_model(str(stage.model_path), sampler.tokenizer, seed)
    return freeze(sampler.accelerator, model)


class _Rater(NamedTuple):
    """Gives replies their rewards: by the proxy, by rules where the world has them, by a judge."""

    sampler: Sampler
    judge: PreTrainedModel | None

    def judged(self, prompts: Tokens, responses: Tokens) -> Tensor | None:
        if self.judge is None:
            return None
        with self.sampler.accelerator.autocast():
            return score(self.judge, prompts, responses, self.sampler.batch_size)

    def beside_proxy(
        self, texts: Sequence[str], prompts: Tokens, responses: Tokens
    ) -> dict[str, list[float]]:
        """Gold and judged rewards, where there are any."""
        columns = {}
        if self.sampler.gold_known:
            columns["gold"] = gold_rewards(self.sampler.tokenizer, texts, responses)
        judged = self.judged(prompts, responses)
        if judged is not None:
            columns["judge"] = judged.tolist()
        return columns

    def chosen(self, data: PreferenceData) -> list[dict]:
        """The dataset's chosen reply to each evaluation prompt that has one, and its rewards."""
        found = chosen_replies(data.prompts["evaluation"], data.pairs["test"])
        if not found:
            return []
        pairs = list(found.values())
        ids = [p.prompt for p in pairs], [p.chosen for p in pairs]
        with self.sampler.accelerator.autocast():
            proxy = score(self.sampler.reward_model, *ids, self.sampler.batch_size)
        columns = {"proxy": proxy.tolist(), "length": [len(reply) for reply in ids[1]]}
        columns |= self.beside_proxy([p.prompt_text for p in pairs], *ids)
        rows = zip(*columns.values(), strict=True)
        return [
            {"prompt": text, "response": pair.chosen_text, **dict(zip(columns, row, strict=True))}
            for (text, pair), row in zip(found.items(), rows, strict=True)
        ]


def _best_of_n(
    run: Run, data: PreferenceData, rater: _Rater, control: PreTrainedModel | None
) -> dict:
    """Curves of best-of-n from SFT, picked by the reward model and the control, if any."""
    config, sampler = run.profile.evaluation, rater.sampler
    prompts = data.prompts["evaluation"][: config.best_of_n_prompts]
    n, shape = config.best_of_n, (len(prompts), config.best_of_n)
    repeated = [p for p in prompts for _ in range(n)]
    seed_everything(1000 * run.seed + 999)
    responses, proxy = sampler.draw(sampler.reference, repeated)
    ids = [p.ids for p in repeated]
    columns = rater.beside_proxy([p.text for p in repeated], ids, responses)
    others = {key: np.array(values).reshape(shape) for key, values in columns.items()}
    curves = {"default": best_of_n(proxy.numpy().reshape(shape), others)}
    if control is not None:
        with sampler.accelerator.autocast():
            pure = score(control, ids, responses, config.batch_size)
        curves["control"] = best_of_n(pure.numpy().reshape(shape), others)
    return curves
