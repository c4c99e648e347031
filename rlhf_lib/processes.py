"""Several processes that compute one run together, started by `torchrun` or `accelerate launch`.

Each goes through the whole run, with the same data and the same random numbers, and ends up knowing
all that comes out. What takes long is dealt out, row by row, and put together again: a process
fills in its rows of a table and the tables are summed, and gradients likewise. Only the first one
writes. In one process nothing here does anything.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from rlhf_lib.settings import UserError

T = TypeVar("T")
# of torchrun and accelerate, and of what else starts processes (MPI)
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
PLACES = "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
LONG = timedelta(days=7)  # one waits for the other while that one alone does something


def begin() -> None:
    """Meet the other processes, where this one was started with others; the first one speaks.

    What this process starts later, such as a notebook's kernel, computes alone. Raises UserError
    where weights are to be shared out among the processes: here each holds them whole.
    """
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UserError(
                f"accelerate launch was asked for {name}, and here every process holds all weights "
                f"(models of GPT-2's size): leave --use_{name.lower()} out"
            )
    if max(int(os.environ.get(name, 1)) for name in SIZES) > 1:
        PartialState(cpu=not torch.cuda.is_available(), timeout=LONG)
        atexit.register(_part)
        global neighbours
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        for name in (*SIZES, *PLACES):
            os.environ.pop(name, None)
        if not first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # to its end
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")


def _part() -> None:
    """Let go of the others in order: a process that only ends can abort in a thread of gloo's."""
    _on_cpus.cache_clear()
    dist.destroy_process_group()


neighbours = 1  # processes that were started together on this machine
_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """What is computed within is this process' own: the others know nothing of it."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def _with_others() -> bool:
    return dist.is_initialized() and not _alone


def count() -> int:
    return dist.get_world_size() if _with_others() else 1


def rank() -> int:
    """The number of this process, from 0 on."""
    return dist.get_rank() if _with_others() else 0


def first() -> bool:
    """Whether this is the one that writes."""
    return rank() == 0


@cache
def _on_cpus() -> Any:
    """What tables and objects travel through: the default of GPUs carries neither."""
    return dist.new_group(backend="gloo", timeout=LONG)


def refuse(what: str) -> None:
    """Raises UserError where several processes were started together: `what` is done by one."""
    if count() > 1:
        raise UserError(
            f"{what} is done by one process: leave torchrun or accelerate launch out, which are "
            "for run and for stages"
        )


def dealt(cut: Callable[..., Iterable[T]], *rows: Sequence[Any], size: int) -> Iterator[T]:
    """This process' share of the micro-batches into which `cut(*rows, size)` cuts all rows.

    They are smaller than `size` where somebody would go without: each has some where there are as
    many rows as processes.
    """
    fair = min(size, max(1, len(rows[0]) // count()))
    return islice(cut(*rows, fair), rank(), None, count())


def summed(table: Tensor) -> Tensor:
    """The sum over all processes of a tensor on the CPU, in place."""
    if count() > 1:
        dist.all_reduce(table, group=_on_cpus())
    return table


def gathered(value: T) -> list[T]:
    """What each process has here, in their order."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value, group=_on_cpus())
    return found


def told(find: Callable[[], T]) -> T:
    """What the first process finds, in all of them. Where it fails, all fail."""
    if count() == 1:
        return find()
    said: list[Any] = [None, False]
    try:
        if first():
            with alone():
                said = [find(), True]
    finally:
        dist.broadcast_object_list(said, group=_on_cpus())
    if not said[1]:
        raise RuntimeError("the first process has failed: its message says why")
    return said[0]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give each parameter the sum of its gradients over all processes.

    One that has a gradient nowhere keeps none, so that an optimizer leaves it alone.
    """
    if count() == 1:
        return
    learning = [p for p in parameters if p.requires_grad]
    has = torch.tensor([p.grad is not None for p in learning], dtype=torch.int)
    under_way = []
    for parameter, somewhere in zip(learning, summed(has).tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            under_way.append(dist.all_reduce(parameter.grad, async_op=True))
    for one in under_way:
        one.wait()  # type: ignore[union-attr]
