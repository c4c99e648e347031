"""A device that is not the CPU, for machines that have no other: import it in a process of its own.

Tensors on "pretend" report that device and are computed on the CPU. An operation that mixes devices
raises as CUDA's would: a lone number may come from the CPU, and so may the indices of a tensor that
is elsewhere; nothing else. torch offers such a device to whoever writes a backend in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
INDEXED = ("aten::index.Tensor", "aten::index_put", "aten::_index_put_impl_", "aten::index_put_")
MOVES = ("aten::_to_copy", "aten::copy_")


class Pretended(Tensor):
    """A tensor elsewhere; `inner` is where it really is."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({self.inner})"

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return compute(operation, args, kwargs or {})


def inside(value: Any) -> Any:
    """What is really computed with."""
    if isinstance(value, Pretended):
        return value.inner
    if isinstance(value, torch.device) and value.type == DEVICE.type:
        return torch.device("cpu")
    return value


def tensors(*values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def check(name: str, args: tuple, kwargs: dict) -> None:
    """Raises RuntimeError for tensors of two devices."""
    if name in MOVES:
        return
    if name in INDEXED:  # self, indices, values
        together = [args[0], *args[2:]]
        others = [] if isinstance(args[0], Pretended) else list(tensors(args[1]))
        if any(isinstance(index, Pretended) for index in others):
            raise RuntimeError(f"{name}: indices on {DEVICE} of a tensor on cpu")
    else:
        together = [args, kwargs]
    given = list(tensors(*together))
    there = [value for value in given if isinstance(value, Pretended)]
    here = [value for value in given if not isinstance(value, Pretended) and value.dim() > 0]
    if there and here:
        raise RuntimeError(f"{name}: tensors on {DEVICE} and on {here[0].device}")


def compute(operation: Any, args: tuple, kwargs: dict) -> Any:
    name = operation._schema.name
    overload = operation._schema.overload_name
    check(f"{name}.{overload}" if name == "aten::index" else name, args, kwargs)
    if name == "aten::copy_":
        inside(args[0]).copy_(inside(args[1]))
        return args[0]
    device = kwargs.get("device")
    given = list(tensors(args, kwargs))
    elsewhere = (
        torch.device(device).type == DEVICE.type
        if device is not None
        else any(isinstance(value, Pretended) for value in given)
    )
    found = operation(*tree_map(inside, args), **tree_map(inside, kwargs))
    changed = {id(inside(value)): value for value in given}  # in place: the same tensor comes back

    def outside(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (
            changed.get(id(value))
            if id(value) in changed
            else (Pretended(value) if elsewhere else value)
        )

    return tree_map(outside, found)


_library = torch.library.Library("_", "IMPL")
_library.fallback(
    lambda operation, *args, **kwargs: compute(operation, args, kwargs), "PrivateUse1"
)
torch.__future__.set_swap_module_params_on_conversion(True)  # so that `module.to` takes a subclass

# What torch does outside of its dispatcher, from Python lists and to them.
_make, _tolist = torch.tensor, Tensor.tolist
_get, _set = Tensor.__getitem__, Tensor.__setitem__


def _tensor(data: Any, *, device: Any = None, **how: Any) -> Tensor:
    made = _make(data, **how)
    return made if device is None else made.to(device)


def _moved(index: Any) -> Any:
    """Lists among the indices, as the tensors that they become."""
    parts = index if isinstance(index, tuple) else (index,)
    moved = tuple(_make(part) if isinstance(part, list) else part for part in parts)
    return moved if isinstance(index, tuple) else moved[0]


def _patch(name: str, function: Callable) -> None:
    setattr(Tensor, name, function)


torch.tensor = _tensor  # type: ignore[assignment]
_patch("tolist", lambda self: _tolist(inside(self)))
_patch("__getitem__", lambda self, index: _get(self, _moved(index)))
_patch("__setitem__", lambda self, index, value: _set(self, _moved(index), value))
torch.get_device_module(DEVICE).get_amp_supported_dtype = lambda: [torch.bfloat16]
