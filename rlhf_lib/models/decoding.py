"""What makes decoding cheap: room in the cache, and on a GPU one token's step recorded for all.

A step of a small model is a few hundred short kernels. Started one by one from Python they take
several times as long as they compute; a CUDA graph starts all of them at once. It runs the same
kernels on the same places of memory each time, so its cache has all its places from the start, and
whatever changes from step to step, the place to write at included, is a tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlhf_lib.models.graphs import record
from rlhf_lib.models.kernels import added

# what a model calls its cache, given and returned
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"
WARM_UP = 2  # steps before the one that is recorded: libraries set themselves up in the first
LOOK = 16  # steps between two looks at who has ended: a look waits for the GPU
MULTIPLE = 8  # places of the cache: attention kernels want rows that are aligned

Step = Callable[[], None]


def recorded(step: Step) -> Step:
    return record(step)[0]


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
