"""Traps 10, 14 and 16: what is saved, in which precision, and what a killed run starts from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_lib import checkpoints, runs, runtime
from rlhf_lib.methods.learner import Learner
from rlhf_lib.models import generation, load
from rlhf_lib.models.logprobs import sequence_scores
from rlhf_lib.settings import ModelConfig
from tests.conftest import assert_same_stage, train_stage
from tests.traps.test_traps import (
    EOS,
    PROMPTS,
    Mistake,
    holds_unless,
    kinds,
    learner_of,
    likeliest,
    put_back,
    write_models,
)

# --------------------------------------------------------------------------------- 10: reward head


def the_head_is_not_saved(patch: pytest.MonkeyPatch) -> None:
    """As an adapter that was not told of it: who loads the model gets a new head."""

    def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        load.merge_lora(model)
        weights = {k: w for k, w in model.state_dict().items() if not k.startswith("score")}
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)

    patch.setattr(load, "save_model", save)


def padded_with_the_end_token(patch: pytest.MonkeyPatch) -> None:
    """transformers scores the last token that is no padding: the one before the end."""
    patch.setattr(load, "_with_own_pad", lambda tokenizer: tokenizer)


ENDED = [[*prompt, EOS] for prompt in ([5, 6, 7], [12], [13, 14, 15, 16, 17], [9, 8])]
STARTS, ENDS = [row[:1] for row in ENDED], [row[1:] for row in ENDED]


@kinds
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "adapter"])
@put_back(the_head_is_not_saved, padded_with_the_end_token)
def test_trap_10_a_saved_reward_model_gives_the_same_rewards(
    rank: int,
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_model(kind).save_pretrained(tmp_path / "base")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token  # as GPT-2 users do
    apart = torch.tensor([1.0, -1.0, 1.0, -1.0])
    with holds_unless(mistake, monkeypatch):
        model, own = load.load_reward_model(tmp_path / "base", tokenizer, seed=0)
        learner = learner_of(load.trainable(model, ModelConfig(lora_rank=rank)), rate=0.05)
        for _ in range(4):
            learner.step([sequence_scores(model, STARTS, ENDS) @ apart])
        with torch.no_grad():
            hidden = [model.base_model(torch.tensor([row])).last_hidden_state for row in ENDED]
            before = torch.cat([model.score(states[0, -1]) for states in hidden])
        assert before.std() > 0.05
        load.save_model(model, own, tmp_path / "reward")

        rows = AutoTokenizer.from_pretrained(tmp_path / "reward").pad(
            {"input_ids": ENDED}, return_tensors="pt", padding_side="right"
        )
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
        again, _ = load.load_reward_model(tmp_path / "reward", tokenizer, seed=9)
        with torch.no_grad():
            ours = sequence_scores(again, STARTS, ENDS)
            assert torch.allclose(ours, before, atol=1e-6)
            assert torch.allclose(theirs(**rows).logits[:, 0], before, atol=1e-6)


# ---------------------------------------------------------------------------------- 14: precision


def bf16_wherever_there_is_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Also on a T4, which emulates it."""
    patch.setattr(
        runtime, "choose_precision", lambda _: "bf16" if torch.cuda.is_available() else "fp32"
    )


@put_back(bf16_wherever_there_is_a_gpu)
def test_trap_14_the_precision_is_chosen_by_device(
    mistake: Mistake | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpus = {"T4": (7, 5), "V100": (7, 0), "A100": (8, 0), "H100": (9, 0)}
    with holds_unless(mistake, monkeypatch):
        chosen = {}
        for name, capability in gpus.items():
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
            chosen[name] = runtime.choose_precision("auto")
        assert chosen == {"T4": "fp16", "V100": "fp16", "A100": "bf16", "H100": "bf16"}


def fp16_weights(patch: pytest.MonkeyPatch) -> None:
    """The whole model in half precision, as one option of `from_pretrained` has it."""
    loaded = load._load
    patch.setattr(load, "_load", lambda *a, **settings: loaded(*a, **settings).to(torch.float16))


def the_weights_as_they_were_saved(patch: pytest.MonkeyPatch) -> None:
    """A model published in bf16 is trained in bf16, which has no room for a small step."""
    loaded = load._load
    patch.setattr(load, "_load", lambda *a, **settings: loaded(*a, **settings).to(torch.bfloat16))


@kinds
@put_back(fp16_weights, the_weights_as_they_were_saved)
def test_trap_14_master_weights_are_fp32(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_model(kind).to(torch.bfloat16).save_pretrained(tmp_path)

    def survives_scaling_and_small_steps(model: PreTrainedModel) -> bool:
        """A scaler refuses fp16 gradients, and a step of 1e-5 is lost in 8 bits of a weight."""
        parameter = model.get_input_embeddings().weight
        before = parameter.detach().clone()
        learner = learner_of(model, rate=1e-5)
        learner.step([parameter.float().sum()])
        parameter.grad = torch.ones_like(parameter)
        try:
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(torch.ones(()))
            scaler.unscale_(learner.optimizer.optimizer)
        except ValueError:  # "Attempting to unscale FP16 gradients"
            return False
        return bool((parameter != before).all())

    with holds_unless(mistake, monkeypatch):
        judge, _ = load.load_reward_model(tmp_path, tiny_tokenizer, 0)
        for model in (load.load_policy(tmp_path), judge):
            assert survives_scaling_and_small_steps(model)
            assert {p.dtype for p in model.parameters()} == {torch.float32}


def left_in_train_mode(patch: pytest.MonkeyPatch) -> None:
    """With checkpointing, a model in train mode drops its cache, and still reads one token."""
    step = Learner.step

    def and_stay(learner: Learner, losses: Any) -> tuple[float, float]:
        taken = step(learner, losses)
        learner.model.train()
        return taken

    patch.setattr(Learner, "step", and_stay)


@kinds
@put_back(left_in_train_mode)
def test_trap_14_checkpointing_leaves_generation_its_cache(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = make_model(kind)
    plain.save_pretrained(tmp_path)
    expected = [likeliest(plain, prompt, 5) for prompt in PROMPTS]
    model, widths = load.load_policy(tmp_path), []
    learner = learner_of(load.trainable(model, ModelConfig(gradient_checkpointing=True)))
    model.register_forward_pre_hook(
        lambda _, args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    with holds_unless(mistake, monkeypatch):
        learner.step([model(input_ids=torch.tensor([[5, 6]]), use_cache=False).logits.sum()])
        widths.clear()
        responses = generation.generate(model, tiny_tokenizer, PROMPTS, 5, temperature=1e-3)
        assert widths == [max(map(len, PROMPTS)), 1, 1, 1, 1]
        assert responses == expected


# ------------------------------------------------------------------------------------- 16: resuming


def _after_loading(patch: pytest.MonkeyPatch, forget: Callable[[Accelerator], None]) -> None:
    load = checkpoints._set

    def load_some(accelerator: Accelerator, state: dict) -> None:
        load(accelerator, state)
        forget(accelerator)

    patch.setattr(checkpoints, "_set", load_some)


def only_the_weights_are_saved(patch: pytest.MonkeyPatch) -> None:
    """The optimizer starts anew: a few steps of another size."""

    def forget(accelerator: Accelerator) -> None:
        for optimizer in accelerator._optimizers:
            optimizer.optimizer.state.clear()

    _after_loading(patch, forget)


def the_generator_starts_anew(patch: pytest.MonkeyPatch) -> None:
    """Every resumed run samples the responses of its first steps again."""
    _after_loading(patch, lambda accelerator: runtime.seed_everything(3))


def the_step_is_kept_and_the_state_lost(patch: pytest.MonkeyPatch) -> None:
    """The log goes on, and the policy is the SFT model again."""
    patch.setattr(checkpoints, "_set", lambda accelerator, state: None)


class KilledError(Exception):
    """What ends a run in its second step."""


@kinds
@put_back(
    only_the_weights_are_saved, the_generator_starts_anew, the_step_is_kept_and_the_state_lost
)
def test_trap_16_ppo_killed_and_resumed_equals_never_killed(
    kind: str,
    mistake: Mistake | None,
    make_model: Callable,
    make_run: Callable,
    tiny_tokenizer: Any,
    tiny_data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = write_models(tmp_path / "models", kind, make_model, tiny_tokenizer)
    short = "ppo.updates=3", "ppo.epochs=1", "ppo.learning_rate=1e-3"

    def train(folder: str, *settings: str) -> runs.Stage:
        return train_stage(make_run(tmp_path / folder, *short, *settings), "ppo", tiny_data, made)

    def die(work: runs.Work, step: int, *rest: Any) -> None:
        log(work, step, *rest)
        if step == 1:
            raise KilledError

    log, whole = runs.Work.log, train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(runs.Work, "log", die)
        with pytest.raises(KilledError):
            train("killed", "checkpoint_minutes=0")
    torch.manual_seed(987)
    with holds_unless(mistake, monkeypatch):
        assert_same_stage(train("killed", "checkpoint_minutes=0"), whole)
