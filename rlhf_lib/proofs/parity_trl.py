"""TRL's own code, called on numbers of ours: the other side of every comparison in `parity`.

A loss in TRL is a method of a trainer: it runs the model, reduces, logs. So that both libraries see
the same numbers, the method is called unchanged on a trainer whose __init__ was left out (it would
load models and data), and in place of the model stands a table. Whole steps are taken by real
trainers. Importing this file needs no TRL.

Shapes: B pairs or responses, T response positions, L places in a row, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import random
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, PrinterCallback
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
    with contextlib.ExitStack() as after:
        for state in (PartialState, AcceleratorState, GradientState):
            after.enter_context(patch.dict(state._shared_state, clear=True))
        # TRL then tells nobody which trainer is being used
        after.enter_context(patch.dict(os.environ, {"CI": "1"}))
        after.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        after.callback(logging.set_verbosity, logging.get_verbosity())
        if datasets.is_progress_bar_enabled():
            after.callback(datasets.enable_progress_bars)
        logging.set_verbosity_error()
        datasets.disable_progress_bars()
        after.enter_context(warnings.catch_warnings())
        # TRL still says it by the old name, as older versions of transformers do
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated")
        yield


# ------------------------------------------------------------------ its losses, on numbers of ours


class Off(SimpleNamespace):
    """Whatever was not said is None: switched off."""

    def __getattr__(self, name: str) -> None:
        return None


class Table(nn.Module):
    """Stands in for a language model: the log-probability of token i is the i-th of the numbers."""

    is_gradient_checkpointing = False

    def __init__(self, *logprobs: Tensor) -> None:
        super().__init__()
        self.numbers = torch.cat([x.flatten() for x in logprobs]) if logprobs else torch.empty(0)

    def forward(self, input_ids: Tensor, labels: Tensor, **rest: Any) -> SimpleNamespace:
        scored = labels[:, 1:] != -100
        logprobs = torch.where(scored, self.numbers[input_ids[:, 1:]], 0.0)
        logged = {"entropy": logprobs, "mean_logits": logprobs, "is_top1": scored}
        return SimpleNamespace(log_probs=logprobs, **logged)


def bare_trainer(name: str, module: str = "trl", **settings: Any) -> Any:
    """A trainer without __init__: `settings`, what all trainers need, and None for all the rest."""
    made = type(name, (trl_class(name, module),), {"__getattr__": Off.__getattr__})
    trainer: Any = object.__new__(made)
    zeros = ("label_smoothing", "alpha", "cpo_alpha", "pad_token_id", "padding_value", "beta")
    ones = ("current_gradient_accumulation_steps", "num_iterations", "top_entropy_quantile")
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    vars(trainer).update(dict.fromkeys(zeros, 0) | dict.fromkeys((*ones, "_tp_size"), 1))
    trainer.accelerator, trainer.model = Accelerator(cpu=True), Table()
    trainer.args, trainer.state = Off(report_to=[], **dict.fromkeys(sizes, 1)), Off(global_step=0)
    trainer._metrics, trainer._total_train_tokens = {"train": defaultdict(list)}, 0
    vars(trainer).update(settings)
    return trainer


def places(mask: Tensor, start: int = 0) -> dict[str, Tensor]:
    """A batch for `Table`: rows of one prompt token, and of tokens that are places in `mask`."""
    responses = start + torch.arange(mask.numel()).view(mask.shape)
    prompt = torch.zeros(len(mask), 1, dtype=torch.long)
    return {
        "input_ids": torch.cat((prompt, responses), 1),
        "attention_mask": torch.cat((torch.ones_like(prompt), mask.long()), 1),
        "completion_mask": torch.cat((prompt, mask.long()), 1),
    }


def dpo_loss(kind: str, logprobs: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """`DPOTrainer` on token log-probs (2B, T), chosen replies first: "sigmoid", "ipo", ..."""
    kinds = {"loss_types": [kind], "loss_weights": [1.0], "f_divergence_type": "reverse_kl"}
    trainer = bare_trainer("DPOTrainer", beta=beta, ref_model=Table(reference), **kinds)
    return trainer.compute_loss(Table(logprobs), places(mask))


cpo_trainer = partial(bare_trainer, "CPOTrainer", "trl.experimental.cpo")
orpo_trainer = partial(bare_trainer, "ORPOTrainer", "trl.experimental.orpo")


def loss_of_logits(trainer: Any, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """What CPO or ORPO makes of logits (2B, L, V); `batch` as in `pair_batch`."""

    def model(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=logits)

    return trainer.get_batch_loss_metrics(model, batch)[0]


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


def advantages(
    name: str, rewards: Tensor, group_size: int, kl: tuple | None = None, **settings: Any
) -> Tensor:
    """What "GRPOTrainer" or "RLOOTrainer" makes of rewards (N*G,), a group's G rows adjacent.

    RLOO takes `beta` times the KL of each response off its reward, and reads it from `kl`: the
    log-probs of policy and reference and their mask, (N*G, T) each.
    """
    count, reference = len(rewards), Table()
    policy, other, mask = kl or torch.ones(3, count, 1)
    made: tuple = ([[1]] * count, [[1] * int(n) for n in mask.sum(1)], ["a response"] * count)

    def logprobs(model: nn.Module, *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        return (other if model is reference else policy), None, None

    if name == "GRPOTrainer":
        made = (*made[:2], None, made[2], None, {}, None, None)
    trainer = bare_trainer(name, num_generations=group_size, ref_model=reference, **settings)
    trainer.reward_weights, trainer.reward_func_names = torch.ones(1), ["reward"]
    trainer.multi_objective_aggregation = "sum_then_normalize"
    trainer._logs = defaultdict(list, rewards={"reward": []})
    trainer._tokenizer = Off(pad_token_id=0)
    trainer._pending_extra_logs, trainer._pending_metrics = {}, {}
    trainer._generate = lambda prompts: made
    trainer._calculate_rewards = lambda *_: rewards[:, None]
    trainer._get_per_token_logps_and_entropies = logprobs
    return trainer._generate_and_score_completions([{"prompt": "a prompt"}] * count)["advantages"]


def overlong(lengths: list[int], longest: int, buffer: int) -> Tensor:
    """What TRL takes off replies of these lengths."""
    punished = trl_class("get_soft_overlong_punishment", "trl.rewards")(longest, buffer)
    return torch.tensor(punished([[0] * length for length in lengths]))


def padded_logprobs(model: nn.Module, prompts: list, responses: list) -> Tensor:
    """Token log-probs (B, T) as `GRPOTrainer` computes them: prompts are padded on the left.

    `model` is changed: TRL gives it an output layer of its own.
    """
    trl_class("add_fused_lm_head", "trl.trainer.utils")(model)
    left, right = ([torch.tensor(row) for row in rows] for rows in (prompts, responses))
    sides = pad_sequence(left, True, -1, "left"), pad_sequence(right, True, -1, "right")
    ids = torch.cat(sides, 1)
    compute = bare_trainer("GRPOTrainer")._get_per_token_logps_and_entropies
    return compute(model, ids.clamp(min=0), (ids >= 0).long(), sides[1].shape[1])[0]


# ----------------------------------------------------------------------------------- whole steps


def caught_gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """A list that will hold the gradient of each step of the optimizer."""
    caught: list[Tensor] = []

    def catch(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        caught.append(torch.cat([p.grad.detach().flatten() for p in parameters]))

    optimizer.register_step_pre_hook(catch)
    return caught


def step(name: str, model: nn.Module, rows: list[dict], settings: dict, **models: Any) -> Tensor:
    """One step of the trainer of that name on all rows, which are token ids, as one batch.

    The loss, and after it the gradient of all parameters, unclipped.
    """
    optimizer = torch.optim.SGD(model.parameters())
    gradients = caught_gradients(optimizer)
    names = {"pad_token": "<pad>", "eos_token": "<eos>"}
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    # DPO alone of TRL's trainers does not recognise rows that are token ids already
    ready = {"_prepare_dataset": lambda self, dataset, *_: dataset} if name == "DPO" else {}
    with tempfile.TemporaryDirectory() as folder:
        settings = settings | {"output_dir": folder, "max_steps": 1, "max_length": None}
        settings |= {"per_device_train_batch_size": len(rows), "lr_scheduler_type": "constant"}
        settings |= {"report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
        settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
        config = trl_class(f"{name}Config")(disable_tqdm=True, max_grad_norm=0.0, **settings)
        trainer = type(name, (trl_class(f"{name}Trainer"),), ready)(
            model,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **names),
            optimizers=(optimizer, None),
            **models,
        )
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
    return torch.cat((torch.tensor([loss]), gradients[0]))
