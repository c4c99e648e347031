"""Measuring one seed's policies on held-out prompts: reward, KL, entropy, length, best-of-n."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.data.encoding import Demonstration, Encoder, Pair, Prompt
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.methods.rewards import Reply, Reward, read_replies
from rlhf_lib.methods.rollout import Rollout, Sampler
from rlhf_lib.models.load import freeze, load_reference
from rlhf_lib.models.logprobs import reply_logprobs
from rlhf_lib.objectives.kl import k3
from rlhf_lib.objectives.masked import masked_mean
from rlhf_lib.runs import Work, write_jsonl
from rlhf_lib.runtime import progress, seed_everything
from rlhf_lib.settings import EvaluationConfig

REAL_TEXTS = "the chosen replies of the test pairs, given their prompts"


def measure(
    work: Work,
    sampler: Sampler,
    policies: Mapping[str, str],
    raters: Mapping[str, Reward],
    control: Reward | None,
    encoder: Encoder,
    data: PreferenceData,
    config: EvaluationConfig,
    seed: int,
) -> dict:
    """Sample every policy on the evaluation prompts and measure it.

    `policies`: name -> model folder or name; "sft" among them is the reference. `raters` judge
    every reply beside the sampler's own reward, the proxy. `control`: a reward model trained on
    unbiased labels of the same pairs, for a second best-of-n curve.

    Writes `samples/<policy>.jsonl`: `samples_per_prompt` rows a prompt, the whole list of prompts
    once, then again; `samples/sft_again.jsonl`, a second draw from SFT: the null against which
    every difference to SFT should be seen; `chosen.jsonl`, the dataset's chosen replies to the
    prompts that a test pair shares; `heldout.jsonl`, each held-out text's -log p by each policy.
    """
    texts, what = heldout_texts(data, encoder, config.heldout_texts)
    prompts = list(data.prompts["evaluation"]) * config.samples_per_prompt
    (work.path / "samples").mkdir(exist_ok=True)
    means: dict[str, dict[str, float]] = {}
    nlls: dict[str, list[float]] = {}
    draws = {**policies, "sft_again": policies["sft"]}
    for name, policy in each_policy(draws, sampler.accelerator, 1000 * seed, "evaluate"):
        rollout = sampler.sample(
            policy,
            prompts,
            temperature=config.temperature,
            batch_size=config.batch_size,
            exact_kl=True,
        )
        replies = read_replies(sampler.tokenizer, rollout.responses)
        rated = {key: torch.as_tensor(rate(prompts, replies)) for key, rate in raters.items()}
        rows = records(rollout, prompts, replies, rated)
        write_jsonl(work.path / "samples" / f"{name}.jsonl", rows)
        kl = sum(row["kl"] for row in rows) / len(rows)
        judged = {key: float(x.mean()) for key, x in rated.items() if key != "gold"}
        means[name] = rollout.metrics() | {"kl": kl} | judged
        work.num_tokens += rollout.num_tokens
        if name in policies:
            with sampler.accelerator.autocast():
                nlls[name] = negative_logprobs(policy, texts, config.batch_size)
        del policy  # before the next one is loaded
    heldout = [
        {"tokens": len(text.response), "nll": {name: nll[i] for name, nll in nlls.items()}}
        for i, text in enumerate(texts)
    ]
    write_jsonl(work.path / "heldout.jsonl", heldout)
    write_jsonl(work.path / "chosen.jsonl", rate_chosen(sampler, raters, data))
    seed_everything(1000 * seed + 999)
    asked = data.prompts["evaluation"][: config.best_of_n_prompts]
    repeated = [prompt for prompt in asked for _ in range(config.best_of_n)]
    drawn = sampler.draw(sampler.reference, repeated, config.temperature)

    def grid(reward: Reward) -> np.ndarray:
        return torch.as_tensor(reward(repeated, drawn)).numpy().reshape(-1, config.best_of_n)

    others = {key: grid(rate).astype(float) for key, rate in raters.items()}
    pickers = {"default": sampler.reward} | ({"control": control} if control else {})
    curves = {name: best_of_n(grid(reward), others) for name, reward in pickers.items()}
    return {"policies": means, "best_of_n": curves, "heldout": what}


def each_policy(
    policies: Mapping[str, str], accelerator: Accelerator, seed: int, title: str
) -> Iterator[tuple[str, PreTrainedModel]]:
    """Every policy in turn, frozen, with a seed of its own: whatever it says is its own draw."""
    for number, (name, path) in enumerate(progress(list(policies.items()), title)):
        seed_everything(seed + number)
        yield name, freeze(accelerator, load_reference(path))


def records(
    rollout: Rollout,
    prompts: Sequence[Prompt],
    replies: Sequence[Reply],
    rated: Mapping[str, Tensor],
) -> list[dict]:
    """One row per reply: rewards, distance from SFT, entropy, length, and whether it ended.

    `kl` is the full-vocabulary KL to SFT summed over the reply, in nats; `kl_k1` and `kl_k3` are
    its sampled estimates; `entropy` is the mean over the reply's tokens. `rated`: further rewards
    of the replies, (B,) each.
    """
    assert rollout.exact_kl is not None, "evaluation samples with exact_kl=True"
    mask = rollout.response_mask
    columns = {
        "prompt": [prompt.text for prompt in prompts],
        "response": [reply.text for reply in replies],
        "proxy": rollout.scores.tolist(),
        "kl": rollout.exact_kl.sum(1).tolist(),
        "kl_k1": rollout.kl.tolist(),
        "kl_k3": (k3(rollout.logprobs, rollout.ref_logprobs) * mask).sum(1).tolist(),
        "entropy": masked_mean(rollout.entropies, mask, dim=1).tolist(),
        "length": rollout.lengths.int().tolist(),
        "finished": rollout.finished.tolist(),
        **{key: values.tolist() for key, values in rated.items()},
    }
    return pd.DataFrame(columns).to_dict("records")


# ------------------------------------------------------------------- beside the policies' replies


def heldout_texts(
    data: PreferenceData, encoder: Encoder, limit: int
) -> tuple[list[Demonstration], str]:
    """Texts that nothing was trained on, without repeats, and what they are in words.

    The bundled world has some of its own; of real data they are the test pairs' chosen replies.
    """
    if data.truth is not None:
        texts, what = encoder.demonstrations(data.truth.heldout()), data.truth.heldout_what
    else:
        texts = [
            Demonstration(p.prompt_text, p.chosen_text, p.prompt, p.chosen)
            for p in data.pairs["test"]
        ]
        what = REAL_TEXTS
    distinct = {(tuple(t.prompt), tuple(t.response)): t for t in texts}
    return list(distinct.values())[:limit], what


def negative_logprobs(
    model: PreTrainedModel, texts: Sequence[Demonstration], batch_size: int
) -> list[float]:
    """-log p(reply | prompt) of each text in nats, summed over its tokens, at temperature 1."""
    sides = [t.prompt for t in texts], [t.response for t in texts]
    return (-reply_logprobs(model, *sides, batch_size)).tolist()


def chosen_replies(prompts: Sequence[Prompt], pairs: Sequence[Pair]) -> dict[str, Pair]:
    """The text of each prompt that some pair shares -> the first such pair.

    Prompts are compared by their tokens: equal once cut is equal to the model.
    """
    first = {tuple(p.prompt): p for p in reversed(pairs)}
    return {p.text: first[tuple(p.ids)] for p in prompts if tuple(p.ids) in first}


def rate_chosen(sampler: Sampler, raters: Mapping[str, Reward], data: PreferenceData) -> list[dict]:
    """The dataset's chosen reply to each evaluation prompt that has one, and its rewards."""
    found = chosen_replies(data.prompts["evaluation"], data.pairs["test"])
    if not found:
        return []
    pairs = list(found.values())
    prompts = [Prompt(p.prompt_text, p.prompt) for p in pairs]
    replies = read_replies(sampler.tokenizer, [p.chosen for p in pairs])
    rated = {key: torch.as_tensor(rate(prompts, replies)) for key, rate in raters.items()}
    columns = {
        "prompt": list(found),
        "response": [pair.chosen_text for pair in pairs],
        "proxy": sampler.score(prompts, replies)[0].tolist(),
        "length": [len(reply.ids) for reply in replies],
        **{key: values.tolist() for key, values in rated.items()},
    }
    return pd.DataFrame(columns).to_dict("records")


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
