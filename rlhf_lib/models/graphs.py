"""On a GPU a model's passes are recorded once for each shape, and replayed from then on.

A pass of a small model is a thousand short kernels. Started one by one from Python they take
several times as long as they compute; a CUDA graph starts all of them at once. It reads and writes
the same places of memory each time: inputs are copied there, and gradients from there.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

SIGHTS = 3  # of a shape until it is recorded: in the first, libraries set themselves up
LARGEST = 500_000_000  # weights; a larger model keeps a GPU busy whoever starts its kernels

NAMES = ("input_ids", "attention_mask", "position_ids")
Inputs = tuple[Tensor, Tensor, Tensor]  # ids (R, L), what they see (R, 1, L, L), positions (R, L)


def record(compute: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any]:
    """What runs the kernels of `compute` again, and its result, where they write.

    Recording alone computes nothing. `pool`: memory that is shared with other recordings.
    """
    graph, stream = torch.cuda.CUDAGraph(), _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            found = compute()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, found


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One for all recordings: memory that was let go of on one stream is not used on another."""
    return torch.cuda.Stream()


class Memory:
    """What all recordings share: one pool, so only one of them may be in use at a time."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.recordings: weakref.WeakSet[_Recording] = weakref.WeakSet()
        self._user: Callable[[], object | None] = lambda: None

    def in_use(self) -> bool:
        """Whether a backward pass is still to come that reads what its forward pass has left."""
        return self._user() is not None

    def hand_to(self, user: object) -> None:
        """It is in use as long as `user` lives."""
        self._user = weakref.ref(user)

    def pool_for(self, recording: _Recording) -> Any:
        if not self.recordings:  # a pool ends with the last of its graphs
            self.pool = torch.cuda.graph_pool_handle()
        self.recordings.add(recording)
        return self.pool


MEMORY = Memory()
RECORDERS: weakref.WeakKeyDictionary[nn.Module, _Recorder] = weakref.WeakKeyDictionary()


def last_hidden(
    model: nn.Module, ids: Tensor, visible: Tensor | None, positions: Tensor | None
) -> Tensor:
    """The model's last hidden states, (R, L, width), of rows as `packing.Layout` has them."""
    if visible is None or positions is None or not _worth_it(model):
        return _passed(model, ids, visible, positions)
    if model not in RECORDERS:
        RECORDERS[model] = _Recorder()
    return RECORDERS[model](model, (ids, visible, positions))


def _passed(
    model: nn.Module, ids: Tensor, visible: Tensor | None, positions: Tensor | None
) -> Tensor:
    named = dict(zip(NAMES, (ids, visible, positions), strict=True))
    told = {name: tensor for name, tensor in named.items() if tensor is not None}
    return model.base_model(**told).last_hidden_state  # type: ignore[operator]


def _worth_it(model: nn.Module) -> bool:
    """Whether a pass is many short kernels, and the same ones each time."""
    if not _on_gpu(model) or (
        model.training and getattr(model, "is_gradient_checkpointing", False)
    ):
        return False
    weights = dict(model.named_parameters())
    # adapters are at times left out
    adapted = any("lora_" in name for name in weights)
    return not adapted and sum(weight.numel() for weight in weights.values()) <= LARGEST


def _on_gpu(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cuda"


class _Recorder:
    """The recordings of one model, and the places that their backward passes write to."""

    def __init__(self) -> None:
        self.seen: Counter = Counter()
        self.recordings: dict[Any, _Recording | None] = {}  # None: it cannot be recorded
        self.gradients: dict[tuple[str, ...], Tensor] = {}  # of all that learns, by its names

    def __call__(self, model: nn.Module, inputs: Inputs) -> Tensor:
        if MEMORY.in_use() or torch.is_inference_mode_enabled():
            return _passed(model, *inputs)
        weights = dict(model.base_model.named_parameters())  # type: ignore[union-attr]
        learns = torch.is_grad_enabled()
        learnt: dict[str, Tensor] = {
            name: w for name, w in weights.items() if w.requires_grad and learns
        }
        key = (
            inputs[0].shape, inputs[1].dtype, tuple(learnt), model.training,
            torch.is_autocast_enabled("cuda"), tuple(w.data_ptr() for w in weights.values()),
        )  # fmt: skip
        if key not in self.recordings:
            self.seen[key] += 1
            if self.seen[key] == SIGHTS:
                self.recordings[key] = self._record(model, inputs, learnt)
        recording = self.recordings.get(key)
        if recording is None:
            return _passed(model, *inputs)
        for place, given in zip(recording.inputs, inputs, strict=True):
            place.copy_(given)
        return _Replayed.apply(recording, *learnt.values())  # type: ignore[return-value]

    def _record(
        self, model: nn.Module, inputs: Inputs, learnt: dict[str, Tensor]
    ) -> _Recording | None:
        names = tuple(learnt)
        if learnt and names not in self.gradients:
            size = sum(w.numel() for w in learnt.values())
            self.gradients[names] = torch.zeros(size, device=inputs[0].device)
        try:
            return _Recording(model, inputs, learnt, self.gradients.get(names))
        except RuntimeError as error:  # it asks the GPU for a number on its way, say
            warnings.warn(f"this model's passes are not recorded: {error}", stacklevel=2)
            return None


class _Recording:
    """A forward pass of one shape and, where weights are learnt, its backward pass."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, learnt: dict[str, Tensor], gradients: Tensor | None
    ) -> None:
        pool, trunk = MEMORY.pool_for(self), model.base_model
        assert isinstance(trunk, nn.Module)
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        # leaves of their own: the weights may hang in a graph that another stream has built
        leaves = {name: w.detach().requires_grad_() for name, w in learnt.items()}
        named: dict[str, Any] = dict(zip(NAMES, self.inputs, strict=True))
        # autocast's cache holds weights as they are now: a recording has to round them each time
        with torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), False
        ):
            self.forward, output = record(
                lambda: functional_call(trunk, leaves, (), named).last_hidden_state, pool
            )
        if gradients is not None:
            self.incoming, self.gradients = torch.empty_like(output), gradients
            self.sizes = [w.numel() for w in learnt.values()]
            places = gradients.split(self.sizes)

            def back() -> None:
                found = torch.autograd.grad(
                    output, list(leaves.values()), self.incoming, materialize_grads=True
                )
                for place, gradient in zip(places, found, strict=True):
                    place.copy_(gradient.reshape(-1))

            self.backward, _ = record(back, pool)
        self.output = output.detach()  # what led to it is kept by nobody: its memory is the pool's


class _Replayed(torch.autograd.Function):
    """A recording as one operation, whose gradients autograd adds up as it does any others."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, *learnt: Tensor) -> Tensor:
        recording.forward()
        if learnt:
            ctx.recording, ctx.shapes, ctx.user = recording, [w.shape for w in learnt], _User()
            MEMORY.hand_to(ctx.user)
        return recording.output.detach()  # the next replay's as well: who asked picks from it now

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.user is None:
            raise RuntimeError("a recorded pass goes backward once: what it kept is gone")
        recording, ctx.user = ctx.recording, None
        recording.incoming.copy_(incoming)
        recording.backward()
        parts = recording.gradients.clone().split(recording.sizes)
        return None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


class _User:
    """Lives from a forward pass until its backward pass."""
