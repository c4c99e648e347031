"""Bytes that autograd keeps for the backward pass, as they come and go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Kept:
    """A running count: `now`, `peak` and `largest` single tensor, in bytes."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.now = self.peak = self.largest = 0
        self._weights = {w.untyped_storage().data_ptr() for w in weights}
        self._users: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> _Holder:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        holder = _Holder(tensor)
        if place not in self._weights:  # weights are there anyway
            if self._users.get(place, 0) == 0:
                self.now += size
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
            self._users[place] = self._users.get(place, 0) + 1
            weakref.finalize(holder, self._drop, place, size)
        return holder

    def _drop(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if self._users[place] == 0:
            self.now -= size


class _Holder:
    """Keeps a saved tensor alive as long as its graph does; several may share one storage."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def watch(weights: Iterable[Tensor]) -> Iterator[Kept]:
    """Count what is saved for backward inside the block; the storages of `weights` left out."""
    kept = Kept(weights)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda holder: holder.tensor):
        yield kept
