"""Sampling responses: equal prompts are computed once, and rows that have ended leave.

A step of a small model is a few hundred short kernels. Started one by one from Python they take
several times as long as they compute, so on a GPU one step is recorded, and replayed for all: a
CUDA graph runs the same kernels on the same places of memory each time. Its cache has all its
places from the start, and whatever changes from step to step, the place to write at included, is a
tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from rlhf_lib import processes
from rlhf_lib.data.batches import by_length
from rlhf_lib.data.encoding import eos_id
from rlhf_lib.flops import spend
from rlhf_lib.models.graphs import record
from rlhf_lib.models.kernels import added
from rlhf_lib.models.packing import Tokens
from rlhf_lib.runtime import count, phase

FINISHED_SHARE = 0.25  # of a batch, when its finished rows leave it: leaving copies the cache
# what a model calls its cache, given and returned
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"
WARM_UP = 2  # steps before the one that is recorded: libraries set themselves up in the first
LOOK = 16  # steps between two looks at who has ended: a look waits for the GPU
MULTIPLE = 8  # places of the cache: attention kernels want rows that are aligned


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
    drawn: dict[int, list[int]] = {}
    eos = eos_id(tokenizer)

    def draw(logits: Tensor, luck: Tensor) -> Tensor:
        return draw_tokens(logits / temperature, luck)

    for rows in processes.dealt(by_length, [len(p) for p in prompts], size=batch_size):
        cache = roomy_cache(model, max_new_tokens)
        mask, logits = prefill(model, [prompts[i] for i in rows], eos, cache)
        plain = all(type(layer) is RoomyLayer for layer in cache.layers)
        decode = decode_recorded if plain and model.device.type == "cuda" else _decode
        luck = uniforms[rows].to(model.device)
        responses = decode(model, cache, mask, logits, draw, luck, eos)
        drawn |= zip(rows, responses, strict=True)
        generated = sum(map(len, responses))
        asked = {tuple(prompts[i]) for i in rows}
        spend(model, sum(map(len, asked)) + generated, generated)
        count(generated=generated)
    everywhere = dict(chain.from_iterable(part.items() for part in processes.gathered(drawn)))
    return [everywhere[row] for row in range(len(prompts))]


def _decode(
    model: PreTrainedModel,
    cache: Cache,
    mask: Tensor,
    logits: Tensor,
    draw: Callable[[Tensor, Tensor], Tensor],
    luck: Tensor,
    eos: int,
) -> list[list[int]]:
    """What `decode_recorded` does, where there is no GPU: a row that has ended leaves."""
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
        logits = next_logits(model, tokens, mask, mask.sum(1, keepdim=True) - 1, cache)
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


def prefill(
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
    logits = next_logits(model, ids.to(model.device), mask, positions, cache)
    if len(distinct) == len(prompts):
        return mask, logits
    number = {prompt: i for i, prompt in enumerate(distinct)}
    owner = torch.tensor([number[tuple(p)] for p in prompts], device=model.device)
    cache.batch_select_indices(owner)
    return mask[owner], logits[owner]


def next_logits(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache
) -> Tensor:
    """Logits (B, V) that follow the last of `ids` (B, S), which `cache` takes up."""
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
        logits_to_keep=1, **{CACHE: cache},
    )  # fmt: skip
    return output.logits[:, -1]


# ------------------------------------------------------------------------------- room in a cache


class RoomyLayer(DynamicLayer):
    """Writes new keys and values into room that it has; its parent copies all, at every token."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.stores: list[Tensor] = []  # keys and values, each (B, heads, places, width)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        start, new = self.get_seq_length(), (key_states, value_states)
        end = start + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(*new)
        if not self.stores or self.stores[0].shape[-2] < end:
            self.stores = [s.new_empty(*s.shape[:-2], end + self.room, s.shape[-1]) for s in new]
            if start:
                for store, old in zip(self.stores, (self.keys, self.values), strict=True):
                    store[..., :start, :] = old  # type: ignore[index]
        for store, states in zip(self.stores, new, strict=True):
            store[..., start:end, :] = states
        self.keys, self.values = (store[..., :end, :] for store in self.stores)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.stores = []  # they are of other rows


def roomy_cache(model: PreTrainedModel, room: int) -> Cache:
    """The model's own kind of cache, its plain layers replaced."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


# ------------------------------------------------------------------------- one step for all

Step = Callable[[], None]


def recorded(step: Step) -> Step:
    return record(step)[0]


class _FixedLayer(DynamicLayer):
    """Keys and values of all places from the start; a step writes at `place`, a tensor."""

    def __init__(self, filled: DynamicLayer, places: int, place: Tensor) -> None:
        super().__init__()
        self.place = place
        self.stores = []
        for states in (filled.keys, filled.values):
            assert states is not None
            rows, heads, length, width = states.shape
            # zeros, for what is hidden is multiplied by 0 and must be finite
            store = states.new_zeros(rows, heads, places, width)
            store[:, :, :length] = states
            self.stores.append(store)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store.index_copy_(2, self.place, states)
        return self.stores[0], self.stores[1]


def decode_recorded(
    model: PreTrainedModel,
    cache: Cache,
    mask: Tensor,
    logits: Tensor,
    draw: Callable[[Tensor, Tensor], Tensor],
    luck: Tensor,
    eos: int,
    record: Callable[[Step], Step] = recorded,
) -> list[list[int]]:
    """One response a row, up to its first `eos` or luck's end.

    `cache`, `mask` (B, L) and `logits` (B, V): of the prompts, padded on the left; every layer of
    the cache is a plain one. `luck` (B, T) says where in its distribution each token is drawn:
    `draw(logits, luck of a step)` gives (B, 1).
    """
    length, longest = mask.shape[1], luck.shape[1]
    places = -(-(length + longest) // MULTIPLE) * MULTIPLE
    place = torch.tensor([length], device=mask.device)
    step = torch.zeros_like(place)
    fixed = DynamicCache(config=model.config)
    fixed.layers = [_FixedLayer(layer, places, place) for layer in cache.layers]  # type: ignore
    cache.layers.clear()  # its keys and values have been copied
    visible = mask.new_zeros(len(mask), 1, 1, places, dtype=torch.bool)
    visible[:, 0, 0, :length] = mask.bool()
    hidden = added(visible)
    positions = mask.sum(1, keepdim=True)
    tokens = draw(logits, luck[:, :1])
    drawn = torch.full_like(luck, eos, dtype=torch.long)
    drawn[:, :1] = tokens
    alive = tokens[:, 0] != eos

    def advance() -> None:
        hidden.index_fill_(3, place, 0.0)
        output = model(
            input_ids=tokens, attention_mask=hidden, position_ids=positions,
            use_cache=True, logits_to_keep=1, **{CACHE: fixed},
        )  # fmt: skip
        step.add_(1)
        tokens.copy_(draw(output.logits[:, -1], luck.index_select(1, step)))
        drawn.index_copy_(1, step, tokens)
        alive.logical_and_(tokens[:, 0] != eos)
        place.add_(1)
        positions.add_(1)

    run = advance
    for number in range(1, longest):
        if number == WARM_UP + 1:
            run = record(advance)
        if number % LOOK == 0 and not alive.any():
            break
        run()
    return [_up_to(eos, row) for row in drawn.tolist()]


def _up_to(eos: int, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
