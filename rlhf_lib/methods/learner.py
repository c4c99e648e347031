"""A model with its optimizer and schedule: what all five methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from rlhf_lib import processes
from rlhf_lib.runtime import phase
from rlhf_lib.settings import UserError

# How a method's loop goes through its steps, all of them or those that are left, and what it tells
# of each: its number, the tokens it processed, and metrics.
Steps = Callable[[int], Iterable[int]]
Log = Callable[[int, int, Mapping[str, float]], None]


def unlogged(step: int, num_tokens: int, metrics: Mapping[str, float]) -> None:
    """Tell nobody."""


SKIPS = 20  # in a row: a scale that began at 2^16 is below 1 by then


class DivergedError(UserError, FloatingPointError):
    """Training has left the numbers that there are."""


class Learner:
    """One model, AdamW, linear warm-up and decay to 0, gradient clipping.

    In fp16 a step whose gradient overflows is skipped: it leaves weights and schedule where they
    were, and the next loss is scaled by less. `SKIPS` of them in a row are no overflow any more.

    fp32 master weights whatever the precision: who computes a loss opens `accelerator.autocast()`,
    and `accelerate` scales it in fp16.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: PreTrainedModel,
        *,
        learning_rate: float,
        steps: int,
        warmup_ratio: float = 0.0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        eps: float = 1e-8,
    ) -> None:
        self.model = model.to(accelerator.device)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=learning_rate,
            betas=(0.9, 0.95), eps=eps, weight_decay=weight_decay, fused=True,
        )  # fmt: skip
        self.schedule = get_scheduler("linear", optimizer, int(warmup_ratio * steps), steps)
        self.accelerator, self.max_grad_norm = accelerator, max_grad_norm
        self.learning_rate = 0.0  # nothing has been learnt yet
        self.skipped = self._in_a_row = 0
        self.optimizer = cast(AcceleratedOptimizer, accelerator.prepare_optimizer(optimizer))
        accelerator.register_for_checkpointing(self)

    @phase("update")
    def step(self, losses: Iterable[Tensor]) -> tuple[float, float]:
        """One optimizer step on the sum of `losses` (a generator: one micro-batch at a time) and of
        those of the other processes, where there are any.

        Returns (loss, gradient norm before clipping, 0 for a step that was skipped). Raises
        DivergedError when loss or norm is not finite: nothing has been changed then.
        """
        total, scaler = 0.0, self.accelerator.scaler  # type: ignore[assignment]
        if scaler is not None:  # of several processes one may have no loss: its scale begins here
            scaler.scale(torch.zeros(1, device=self.accelerator.device))
        # gradient checkpointing works in train mode only, the generation cache best in eval mode
        self.model.train()
        for loss in losses:
            self.accelerator.backward(loss)
            total += float(loss.detach())
        self.model.eval()
        total = float(processes.summed(torch.tensor(total, dtype=torch.float64)))
        self._check("loss", total)
        processes.sum_gradients(self.model.parameters())
        clipped = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        norm = float(clipped)  # type: ignore[arg-type]
        overflow = scaler is not None and not math.isfinite(norm)
        if not overflow:
            self._check("gradient's norm", norm)
        self.optimizer.step()  # with a scaler it leaves the weights alone after an overflow
        self.optimizer.zero_grad()
        self._in_a_row = self._in_a_row + 1 if overflow else 0
        if self._in_a_row == SKIPS:  # by now no loss was scaled by too much
            self._check("gradient's norm", norm)
        if overflow:
            self.skipped += 1
            return total, 0.0
        self.learning_rate = self.schedule.get_last_lr()[0]  # of this step, for the log
        self.schedule.step()
        return total, norm

    def _check(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            self.optimizer.zero_grad()
            raise DivergedError(
                f"the {what} is {value}: lower the learning rate or use model.precision=fp32; "
                "the weights are those of the last step"
            )

    def state_dict(self) -> dict[str, Any]:
        """All that training changes, for a checkpoint."""
        learnt = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return {
            "weights": learnt,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state["weights"][name])
        moments = {int(number): each for number, each in state["optimizer"]["state"].items()}
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})
        self.schedule.load_state_dict(state["schedule"])

    def check_learnt(self) -> None:
        """Raises DivergedError where every step was skipped: the weights are those of the start."""
        # the schedule goes on with each step that is made, and comes back when a stage is resumed
        if self._in_a_row and not self.schedule.state_dict()["last_epoch"]:
            raise DivergedError(
                "every step was skipped, for in fp16 each of their gradients overflowed: nothing "
                "was learnt; use model.precision=fp32"
            )

    def logged(self) -> dict[str, float]:
        """For the log: the last step's learning rate, and steps skipped since it was asked last."""
        skipped, self.skipped = self.skipped, 0
        return {"learning_rate": float(self.learning_rate), "skipped": float(skipped)}


class Averages:
    """Weighted means of statistics that arrive micro-batch by micro-batch."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor | float], weight: float = 1.0) -> None:
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + float(value) * weight
            self._weights[key] = self._weights.get(key, 0.0) + weight

    def put_together(self) -> None:
        """Take in what the other processes have added: from here on all have the same means."""
        parts = processes.gathered((self._sums, self._weights))
        self._sums, self._weights = {}, {}
        for sums, weights in parts:
            for key, value in sums.items():
                self._sums[key] = self._sums.get(key, 0.0) + value
                self._weights[key] = self._weights.get(key, 0.0) + weights[key]

    def __getitem__(self, key: str) -> float:
        return self._sums[key] / self._weights[key]

    def means(self) -> dict[str, float]:
        return {key: self[key] for key in self._sums}
