"""TRL's own code, called on numbers of ours: the other side of every comparison in `parity`.

A loss in TRL is a method of a trainer: it runs the model, reduces, logs. So that both libraries see
the same numbers, the method is called unchanged on a trainer whose __init__ was left out (it would
load models and data), and in place of the model stands a table. Whole training steps are taken by
real trainers, in `parity_steps`. TRL is an optional dependency: importing this file needs none.

Shapes: B pairs or responses, T response positions, L places in a row, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import random
import warnings
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from transformers.utils import logging

from rlhf_lib.settings import UserError

VERSION = "1.16.0"


def trl_class(name: str, module: str = "trl") -> Any:
    """A class or function of TRL's, imported now."""
    with warnings.catch_warnings():
        # trl.experimental warns that it may change: the version is pinned
        warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
        return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep TRL's trainers quiet, and set back what they set for the whole process.

    These are the seeds, `accelerate`'s state (here on the CPU), logging and environment variables.
    Raises UserError, with the command to run, without TRL in the one version that is compared.
    """
    found = [installed.version for installed in importlib.metadata.distributions(name="trl")]
    if found != [VERSION]:
        raise UserError(
            f"parity is with TRL {VERSION}, and here is {found[0] if found else 'no TRL'}: "
            "pip install -e '.[parity]' (Python 3.11 or newer)"
        )
    shared = [s._shared_state for s in (PartialState, AcceleratorState, GradientState)]
    saved, environment = [dict(state) for state in shared], dict(os.environ)
    python, numpy, verbosity = random.getstate(), np.random.get_state(), logging.get_verbosity()
    bars = datasets.is_progress_bar_enabled()
    for state in shared:
        state.clear()
    os.environ["CI"] = "1"  # TRL then tells nobody which trainer is being used
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with (
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            warnings.catch_warnings(),
        ):
            # TRL still says it by the old name, as older versions of transformers do
            warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated")
            yield
    finally:
        for state, before in zip(shared, saved, strict=True):
            state.clear()
            state.update(before)
        os.environ.clear()
        os.environ.update(environment)
        random.setstate(python)
        np.random.set_state(numpy)
        logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


# ------------------------------------------------------------------------- a trainer and its model


def bare_trainer(name: str, module: str = "trl", **settings: Any) -> Any:
    """A trainer that has no more than its method reads: what all of them do, and `settings`."""
    trainer = object.__new__(trl_class(name, module))
    shared = {
        "accelerator": Accelerator(cpu=True),
        "model": _Idle(),
        "state": SimpleNamespace(global_step=0),
        "args": SimpleNamespace(
            report_to=[], gradient_checkpointing_kwargs=None, per_device_train_batch_size=64,
            gradient_accumulation_steps=1, steps_per_generation=1,
        ),
        "current_gradient_accumulation_steps": 1, "aux_loss_enabled": False, "use_vllm": False,
        "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip
    vars(trainer).update(shared | settings)
    return trainer


class _Idle(torch.nn.Module):
    """A model in training that is asked nothing but its state."""

    is_gradient_checkpointing = False


class _Table:
    """Stands in for a language model: the log-probability of token i is the table's i-th number."""

    def __init__(self, logprobs: Tensor) -> None:
        self.numbers = logprobs.flatten()

    def __call__(self, input_ids: Tensor, labels: Tensor, **rest: Any) -> SimpleNamespace:
        scored = labels[:, 1:] != -100
        zeros = torch.zeros(scored.shape)
        return SimpleNamespace(
            log_probs=torch.where(scored, self.numbers[input_ids[:, 1:]], 0.0),
            entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(),
        )  # fmt: skip


def _places(mask: Tensor) -> dict[str, Tensor]:
    """A batch for `_Table`: rows of one prompt token, and of tokens that are places in `mask`."""
    responses = torch.arange(mask.numel()).view(mask.shape)
    prompt = torch.zeros(len(mask), 1, dtype=torch.long)
    return {
        "input_ids": torch.cat((prompt, responses), 1),
        "attention_mask": torch.cat((torch.ones_like(prompt), mask.long()), 1),
        "completion_mask": torch.cat((prompt, mask.long()), 1),
    }


# ------------------------------------------------------------------------------ losses on pairs


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, center_coef: float) -> Tensor:
    """`RewardTrainer.compute_loss` on the scores of both replies, (B,) each."""
    trainer = bare_trainer("RewardTrainer")
    trainer.args.center_rewards_coefficient = center_coef
    scores = torch.cat((chosen, rejected))
    inputs = {"margin": margin, "attention_mask": torch.ones(len(scores), 1)}
    return trainer.compute_loss(lambda **_: SimpleNamespace(logits=scores[:, None]), inputs)


def dpo_loss(
    loss_type: str, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """`DPOTrainer` on token log-probs (2B, T), chosen replies first: "sigmoid", "ipo", ..."""
    trainer = bare_trainer(
        "DPOTrainer", loss_types=[loss_type], loss_weights=[1.0], beta=beta, label_smoothing=0.0,
        ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False,
        precompute_ref_logps=False, ref_model=_Table(ref_logprobs),
    )  # fmt: skip
    return trainer.compute_loss(_Table(logprobs), _places(mask))


def kto_loss(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_logprobs: Tensor,
    ref_kl_logprobs: Tensor, beta: float, weights: tuple[float, float],
) -> Tensor:  # fmt: skip
    """`KTOTrainer` on token log-probs (2B, T), desirable replies first.

    `kl_logprobs` and `ref_kl_logprobs` (2B, T) are of the replies that its KL is estimated from.
    """
    replies = _places(mask)
    further = {f"KL_{key}": rows for key, rows in _places(mask).items()}
    further["KL_input_ids"][:, 1:] += mask.numel()  # the second half of the table
    trainer = bare_trainer(
        "KTOTrainer", loss_type="kto", beta=beta, desirable_weight=weights[0],
        undesirable_weight=weights[1], calculate_KL=True, precompute_ref_logps=False,
        ref_model=_Table(torch.cat((ref_logprobs, ref_kl_logprobs))),
    )  # fmt: skip
    labels = torch.arange(len(mask)) < len(mask) // 2
    table = _Table(torch.cat((logprobs, kl_logprobs)))
    return trainer.compute_loss(table, replies | further | {"label": labels})


def cpo_loss(
    loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, smoothing: float
) -> Tensor:
    """`CPOTrainer.cpo_loss` on one number a reply, (B,) each: its "sigmoid" is DPO's formula."""
    settings = {"loss_type": loss_type, "beta": beta, "label_smoothing": smoothing, "alpha": 0.0}
    trainer = bare_trainer("CPOTrainer", "trl.experimental.cpo", **settings)
    return trainer.cpo_loss(chosen, rejected)[0].mean()


def simpo_loss(logits: Tensor, batch: dict, beta: float, margin: float) -> Tensor:
    """`CPOTrainer` with loss_type="simpo" on logits (2B, L, V); `batch` as in `pair_batch`."""
    trainer = bare_trainer(
        "CPOTrainer", "trl.experimental.cpo", loss_type="simpo", beta=beta, simpo_gamma=margin,
        cpo_alpha=0, alpha=0.0, label_smoothing=0.0, is_encoder_decoder=False, pad_token_id=0,
    )  # fmt: skip
    return trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)[0]


def orpo_loss(logits: Tensor, batch: dict, beta: float) -> Tensor:
    """`ORPOTrainer` on logits (2B, L, V); `batch` as in `pair_batch`."""
    settings = {"beta": beta, "is_encoder_decoder": False, "padding_value": 0}
    trainer = bare_trainer("ORPOTrainer", "trl.experimental.orpo", **settings)
    return trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)[0]


def pair_batch(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What CPO and ORPO read: ids (2B, L) of a prompt token and a reply, chosen replies first.

    `mask` (2B, L - 1) is 1 at the tokens of the replies.
    """
    real = torch.cat((torch.ones(len(ids), 1), mask), 1).long()
    labels = ids.masked_fill(real == 0, -100)
    labels[:, 0] = -100
    rows = {"input_ids": ids, "attention_mask": real, "labels": labels}
    half = len(ids) // 2
    chosen = {f"chosen_{key}": value[:half] for key, value in rows.items()}
    return chosen | {f"rejected_{key}": value[half:] for key, value in rows.items()}


# -------------------------------------------------------------------- losses on sampled responses


def grpo_loss(
    loss_type: str, logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor,
    advantages: Tensor, mask: Tensor, kl_coef: float, clip_low: float, clip_high: float,
) -> Tensor:  # fmt: skip
    """`GRPOTrainer._compute_loss` on token log-probs (B, T) and advantages (B,)."""
    trainer = bare_trainer(
        "GRPOTrainer", loss_type=loss_type, beta=kl_coef, epsilon_low=clip_low,
        epsilon_high=clip_high, max_completion_length=mask.shape[1],
        importance_sampling_level="token", top_entropy_quantile=1.0, _entropy_bonus_enabled=False,
        off_policy_mask_threshold=None,
    )  # fmt: skip
    trainer.args.delta, trainer.args.use_bias_correction_kl = None, False
    rows = _places(mask)
    return trainer.compute_loss(_Table(logprobs), {
        "prompt_ids": rows["input_ids"][:, :1], "prompt_mask": rows["attention_mask"][:, :1],
        "completion_ids": rows["input_ids"][:, 1:], "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old_logprobs,
        "ref_per_token_logps": ref_logprobs, "num_items_in_batch": mask.sum(),
    })  # fmt: skip


def advantages(
    name: str, rewards: Tensor, group_size: int, scale: str = "group", kl_coef: float = 0.0,
    logprobs: Tensor | None = None, ref_logprobs: Tensor | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What "GRPOTrainer" or "RLOOTrainer" makes of rewards (N*G,), a group's G rows adjacent.

    RLOO takes kl_coef times the KL of each response off its reward, from log-probs (N*G, T).
    """
    mask = torch.ones(len(rewards), 1) if mask is None else mask
    logprobs = torch.zeros(mask.shape) if logprobs is None else logprobs
    texts = ["a response"] * len(rewards)
    responses = [[1] * int(row.sum()) for row in mask]
    generated: tuple = ([[1]] * len(rewards), responses, texts)
    if name == "GRPOTrainer":
        generated = (*generated[:2], None, texts, None, {}, None, None)
    reference = _Idle()
    trainer = bare_trainer(
        name, ref_model=reference, beta=kl_coef, scale_rewards=scale,
        num_generations=group_size, num_iterations=1, pad_to_multiple_of=None, tools=None,
        mask_truncated_completions=False, multi_objective_aggregation="sum_then_normalize",
        normalize_advantages=False, reward_clip_range=None, reward_weights=torch.ones(1),
        reward_func_names=["reward"], environment_factories=None, environments=None,
        vllm_importance_sampling_correction=False, _tokenizer=SimpleNamespace(pad_token_id=0),
        _logs=defaultdict(list, rewards=defaultdict(list)), _pending_extra_logs={},
        _pending_metrics={}, _generate=lambda prompts: generated,
        _calculate_rewards=lambda *_: rewards[:, None],
        _get_per_token_logps_and_entropies=lambda model, *_, **__: (
            ref_logprobs if model is reference else logprobs, None, None
        ),
    )  # fmt: skip
    scored = trainer._generate_and_score_completions([{"prompt": "a prompt"}] * len(rewards))
    return scored["advantages"]
