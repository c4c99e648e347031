"""Sampling responses: equal prompts are computed once, and rows that have ended leave."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lib.data.batches import by_length
from rlhf_lib.flops import spend
from rlhf_lib.models import decoding
from rlhf_lib.models.decoding import CACHE, RoomyLayer, roomy_cache
from rlhf_lib.models.load import eos_id
from rlhf_lib.models.packing import Tokens
from rlhf_lib.runtime import count, phase

FINISHED_SHARE = 0.25  # of a batch, when its finished rows leave it: leaving copies the cache


@phase("generation")
@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Tokens,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 256,
    uniforms: Tensor | None = None,
) -> list[list[int]]:
    """One response to each prompt, sampled from the unfiltered softmax at `temperature`.

    `uniforms` (prompts, max_new_tokens), float64 in [0, 1): the luck of each token. Two policies
    that are given the same differ by no more than they differ (common random numbers); by default
    it is drawn anew, on the CPU whatever the device.

    A response ends with the end-of-sequence token unless `max_new_tokens` cut it off. No top-k,
    top-p or minimum length: a filtered sample is not one of the policy (KL goes negative). Equal
    prompts of a batch are computed once; a row that has ended leaves its batch.
    """
    if uniforms is None:
        uniforms = torch.rand(len(prompts), max_new_tokens, dtype=torch.float64)
    responses: list[list[int]] = [[] for _ in prompts]
    eos = eos_id(tokenizer)

    def draw(logits: Tensor, luck: Tensor) -> Tensor:
        return draw_tokens(logits / temperature, luck)

    for rows in by_length([len(p) for p in prompts], batch_size):
        cache = roomy_cache(model, max_new_tokens)
        mask, logits = _prefill(model, [prompts[i] for i in rows], eos, cache)
        plain = all(type(layer) is RoomyLayer for layer in cache.layers)
        decode = decoding.decode_recorded if plain and model.device.type == "cuda" else _decode
        luck = uniforms[rows].to(model.device)
        drawn = decode(model, cache, mask, logits, draw, luck, eos)
        for row, response in zip(rows, drawn, strict=True):
            responses[row] = response
        generated = sum(map(len, drawn))
        asked = {tuple(prompts[i]) for i in rows}
        spend(model, sum(map(len, asked)) + generated, generated)
        count(generated=generated)
    return responses


def _decode(
    model: PreTrainedModel,
    cache: Cache,
    mask: Tensor,
    logits: Tensor,
    draw: Callable[[Tensor, Tensor], Tensor],
    luck: Tensor,
    eos: int,
) -> list[list[int]]:
    """What `decoding.decode_recorded` does, where there is no GPU: a row that has ended leaves."""
    responses: list[list[int]] = [[] for _ in luck]
    rows = list(range(len(luck)))
    alive = torch.ones(len(rows), dtype=torch.bool, device=model.device)
    longest = luck.shape[1]
    for step in range(longest):
        tokens = draw(logits, luck[:, step : step + 1])
        sampled = tokens[:, 0].tolist()
        for row, token, open_ended in zip(rows, sampled, alive.tolist(), strict=True):
            if open_ended:
                responses[row].append(token)
        alive &= tokens[:, 0] != eos
        left = int(alive.sum())
        if left == 0 or step + 1 == longest:
            break
        if left <= (1 - FINISHED_SHARE) * len(rows):
            places = alive.nonzero()[:, 0]
            rows = [rows[i] for i in places.tolist()]
            cache.batch_select_indices(places)
            mask, tokens, alive, luck = (x[places] for x in (mask, tokens, alive, luck))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        logits = _step(model, tokens, mask, mask.sum(1, keepdim=True) - 1, cache)
    return responses


def draw_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token a row from softmax(logits), (B, V) -> (B, 1): the distribution function inverted.

    `uniforms` (B, 1) in [0, 1): where.

    In float64, so that the rarest token keeps its probability. `torch.multinomial` draws the same
    distribution, but V random numbers for each token.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:])
    return tokens.clamp(max=logits.shape[-1] - 1)


def _prefill(
    model: PreTrainedModel, prompts: Tokens, filler: int, cache: Cache
) -> tuple[Tensor, Tensor]:
    """Compute each distinct prompt once into `cache`; attention mask (B, L), next logits (B, V).

    Padded with `filler` on the left, so that all rows go on at the same place.
    """
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    longest = max(map(len, distinct))
    padding = [longest - len(p) for p in distinct]
    ids = torch.tensor([[filler] * n + list(p) for n, p in zip(padding, distinct, strict=True)])
    mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long().to(model.device)
    # padding counts from 0 too: what stands there is never attended to
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = _step(model, ids.to(model.device), mask, positions, cache)
    if len(distinct) == len(prompts):
        return mask, logits
    number = {prompt: i for i, prompt in enumerate(distinct)}
    owner = torch.tensor([number[tuple(p)] for p in prompts], device=model.device)
    cache.batch_select_indices(owner)
    return mask[owner], logits[owner]


def _step(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache
) -> Tensor:
    """Logits (B, V) that follow the last of `ids` (B, S), which `cache` takes up."""
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
        logits_to_keep=1, **{CACHE: cache},
    )  # fmt: skip
    return output.logits[:, -1]
