"""A model with its optimizer and schedule: what all five methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from rlhf_lib.runtime import phase

# How a method's loop goes through its steps, all of them or those that are left, and what it tells
# of each: its number, the tokens it processed, and metrics.
Steps = Callable[[int], Iterable[int]]
Log = Callable[[int, int, Mapping[str, float]], None]


def unlogged(step: int, num_tokens: int, metrics: Mapping[str, float]) -> None:
    """Tell nobody."""


class Learner:
    """One model, AdamW, linear warm-up and decay to 0, gradient clipping.

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
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=learning_rate,
            betas=(0.9, 0.95), eps=eps, weight_decay=weight_decay, fused=True,
        )  # fmt: skip
        schedule = get_scheduler("linear", optimizer, int(warmup_ratio * steps), steps)
        self.accelerator, self.max_grad_norm = accelerator, max_grad_norm
        self.learning_rate = 0.0  # nothing has been learnt yet
        self.model, self.optimizer, self.schedule = accelerator.prepare(model, optimizer, schedule)

    @phase("update")
    def step(self, losses: Iterable[Tensor]) -> tuple[float, float]:
        """One optimizer step on the sum of `losses` (a generator: one micro-batch at a time).

        Returns (loss, gradient norm before clipping). Raises FloatingPointError when the loss is
        not finite.
        """
        total = 0.0
        # gradient checkpointing works in train mode only, the generation cache best in eval mode
        self.model.train()
        for loss in losses:
            self.accelerator.backward(loss)
            total += float(loss.detach())
        self.model.eval()
        if not torch.isfinite(torch.tensor(total)):
            raise FloatingPointError(
                f"the loss is {total}: lower the learning rate or use model.precision=fp32; "
                "the last checkpoint of this stage is intact"
            )
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.learning_rate = self.schedule.get_last_lr()[0]  # of this step, for the log
        self.schedule.step()
        self.optimizer.zero_grad()
        return total, float(norm)  # type: ignore[arg-type]


class Averages:
    """Weighted means of statistics that arrive micro-batch by micro-batch."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor | float], weight: float = 1.0) -> None:
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + float(value) * weight
            self._weights[key] = self._weights.get(key, 0.0) + weight

    def __getitem__(self, key: str) -> float:
        return self._sums[key] / self._weights[key]

    def means(self) -> dict[str, float]:
        return {key: self[key] for key in self._sums}
