"""Measuring one seed's policies on held-out prompts: reward, KL, entropy, length, best-of-n."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib.data.encoding import Demonstration, Encoder, Pair, Prompt
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.files import write_jsonl
from rlhf_lib.methods.rewards import Reply, Reward, read_replies
from rlhf_lib.methods.rollout import Rollout, Sampler
from rlhf_lib.models.load import freeze, load_reference
from rlhf_lib.models.logprobs import reply_logprobs
from rlhf_lib.objectives.kl import k3
from rlhf_lib.objectives.masked import masked_mean
from rlhf_lib.runs import Work
from rlhf_lib.runtime import progress
from rlhf_lib.settings import EvaluationConfig, content_hash

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

    All policies reply with the same luck: the k-th reply to a prompt is drawn with the same random
    numbers, so that policies are compared and not draws. `sft_again` is SFT with luck of its own:
    the null against which every difference to SFT should be seen.

    Writes `samples/<policy>.jsonl`, a row a reply: the first replies to all prompts, then the
    second ones ...; `best_of_n.jsonl`, a row a prompt and n; `chosen.jsonl`, the dataset's chosen
    replies to the prompts that a test pair shares; `heldout.jsonl`, each held-out text's -log p by
    each policy.
    """
    texts, what = heldout_texts(data, encoder, config.heldout_texts)
    prompts = list(data.prompts["evaluation"])
    (work.path / "samples").mkdir(exist_ok=True)
    draws = {**policies, "sft_again": policies["sft"]}
    samples = max(config.baseline_samples, config.samples_per_prompt)
    shape = samples, len(prompts), sampler.max_new_tokens
    common, own = (random_numbers(seed, use, shape) for use in ("policies", "sft_again"))

    def ask(name: str) -> dict:
        luck = own if name == "sft_again" else common
        count = samples if name == "sft" else config.samples_per_prompt
        policy = read_policy(draws[name], sampler.accelerator)
        rows, means, tokens = replies_of(sampler, policy, prompts, luck[:count], raters, config)
        write_jsonl(work.path / "samples" / f"{name}.jsonl", rows)
        with sampler.accelerator.autocast():
            nll = negative_logprobs(policy, texts, config.batch_size) if name in policies else []
        return {"means": means, "tokens": tokens, "nll": nll}

    # each policy's part is kept: a killed evaluation goes on with the next one
    found = {name: work.part(name, partial(ask, name)) for name in progress(draws, "evaluate")}
    means = {name: part["means"] for name, part in found.items()}
    nlls = {name: found[name]["nll"] for name in policies}
    work.num_tokens += sum(part["tokens"] for part in found.values())
    heldout = [
        {"tokens": len(text.response), "nll": {name: nll[i] for name, nll in nlls.items()}}
        for i, text in enumerate(texts)
    ]
    write_jsonl(work.path / "heldout.jsonl", heldout)
    write_jsonl(work.path / "chosen.jsonl", rate_chosen(sampler, raters, data))
    pickers = {"default": sampler.reward} | ({"control": control} if control else {})
    curves = best_of_n_rows(
        sampler, prompts[: config.best_of_n_prompts], pickers, raters, config, seed
    )
    write_jsonl(work.path / "best_of_n.jsonl", curves.to_dict("records"))
    points = {}
    for name in pickers:
        rows = curves.loc[curves["picked_by"] == name]
        point = pd.DataFrame(rows.groupby("n").mean(numeric_only=True)).reset_index()
        points[name] = point.to_dict("records")
    return {"policies": means, "best_of_n": points, "heldout": what}


def random_numbers(seed: int, use: str, shape: tuple[int, ...]) -> Tensor:
    """Uniform on [0, 1), float64: what `use` of a seed is drawn with, wherever and in any order."""
    state = int(content_hash([seed, use])[:15], 16)
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(state))


def replies_of(
    sampler: Sampler,
    policy: PreTrainedModel,
    prompts: Sequence[Prompt],
    luck: Tensor,
    raters: Mapping[str, Reward],
    config: EvaluationConfig,
) -> tuple[list[dict], dict[str, float], int]:
    """One policy's replies with this luck (replies, prompts, tokens): rows, means, and tokens.

    The first replies to the first prompts are measured in full, all by the deciding reward.
    """
    places = list(product(range(luck.shape[0]), range(luck.shape[1])))
    # replies to a prompt beside each other: whoever reads them computes it once
    by_prompt = [(k, i) for i, k in product(range(luck.shape[1]), range(luck.shape[0]))]
    first = [
        (k, i) for k, i in by_prompt if k < config.measured_samples and i < config.measured_prompts
    ]
    measured = set(first)
    rest = [place for place in by_prompt if place not in measured]
    rows: dict[tuple[int, int], dict] = {}
    asked = [prompts[i] for _, i in first]
    rollout = sampler.sample(
        policy,
        asked,
        temperature=config.temperature,
        micro_batch_size=config.batch_size,
        exact_kl=True,
        uniforms=torch.stack([luck[place] for place in first]),
    )
    replies = read_replies(sampler.tokenizer, rollout.responses)
    rated = {key: torch.as_tensor(rate(asked, replies)) for key, rate in raters.items()}
    rows |= zip(first, records(rollout, asked, replies, rated), strict=True)
    tokens = rollout.num_tokens
    if rest:
        asked = [prompts[i] for _, i in rest]
        numbers = torch.stack([luck[place] for place in rest])
        replies = sampler.draw(policy, asked, config.temperature, numbers)
        columns = {
            "prompt": [prompt.text for prompt in asked],
            "response": [reply.text for reply in replies],
            "length": [len(reply.ids) for reply in replies],
            "finished": [reply.finished for reply in replies],
            **{key: torch.as_tensor(rate(asked, replies)).tolist() for key, rate in raters.items()},
        }
        if not raters:
            columns["proxy"] = sampler.score(asked, replies)[0].tolist()
        rows |= zip(rest, pd.DataFrame(columns).to_dict("records"), strict=True)
        tokens += sum(len(p.ids) + len(r.ids) for p, r in zip(asked, replies, strict=True))
    ordered = [{"reply": k, **rows[k, i]} for k, i in places]
    exact = float(rollout.exact_kl.sum(1).mean())  # type: ignore[union-attr]
    rated_means = {key: float(np.mean([row[key] for row in ordered])) for key in raters}
    return ordered, rollout.metrics() | {"kl": exact} | rated_means, tokens


def read_policy(path: str, accelerator: Accelerator) -> PreTrainedModel:
    """A policy that is only read."""
    return freeze(accelerator, load_reference(path))


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


def best_of_n_rows(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    pickers: Mapping[str, Reward],
    raters: Mapping[str, Reward],
    config: EvaluationConfig,
    seed: int,
) -> pd.DataFrame:
    """SFT's best of n samples to each prompt, by each picker: picked_by, prompt, n, kl, rewards."""
    asked = [prompt for prompt in prompts for _ in range(config.best_of_n)]
    numbers = random_numbers(seed, "best of n", (len(asked), sampler.max_new_tokens))
    drawn = sampler.draw(sampler.reference, asked, config.temperature, numbers)

    def grid(reward: Reward) -> np.ndarray:
        found = torch.as_tensor(reward(asked, drawn)).numpy()
        return found.astype(float).reshape(-1, config.best_of_n)

    others = {key: grid(rate) for key, rate in raters.items()}
    names = [prompt.text for prompt in prompts]
    parts = [
        best_of_n(grid(reward), others).assign(picked_by=name) for name, reward in pickers.items()
    ]
    found = pd.concat(parts, ignore_index=True)
    return found.assign(prompt=[names[i] for i in found["prompt"]])


def best_of_n(proxy: np.ndarray, others: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Take the best of n samples by proxy reward, for n = 1, 2, 4, ...: prompt, n, kl, rewards.

    `proxy` and each of `others` (gold or judged rewards of the same samples): (prompts, samples).
    Each prompt's samples are cut into blocks of n, and the winners of its blocks are averaged. KL
    is the analytic log n - (n - 1) / n, an upper bound (Beirami et al. 2024, arXiv:2401.01879).
    """
    parts, prompts = [], len(proxy)
    for power in range(int(math.log2(proxy.shape[1])) + 1):
        n = 2**power
        winner = proxy.reshape(prompts, -1, n).argmax(-1)[..., None]
        part = {"prompt": range(prompts), "n": n, "kl": math.log(n) - (n - 1) / n}
        for key, rewards in {"proxy": proxy, **others}.items():
            taken = np.take_along_axis(rewards.reshape(prompts, -1, n), winner, -1)
            part[key] = taken.mean((1, 2))
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)
