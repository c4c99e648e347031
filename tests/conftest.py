"""What every test stands on: one thread, no network, no screen, and the same seeds.

Warnings are errors; the few exceptions and their reasons are in `pyproject.toml`.
"""

from __future__ import annotations

import os

# Set before anything imports torch, transformers or matplotlib: they read these once, at import.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # whoever asks the hub for anything is refused at once
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MPLBACKEND": "Agg",
    }
)

import random
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# The workers of pytest-xdist share the cores. With one thread, sums also keep their order.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The whole study in miniature takes longest: begun first, it has company to its end."""
    items.sort(key=lambda item: "test_stages_miniature" not in item.nodeid)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seed every generator, so that a test's result does not hang on which tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() is torch.float32, "the test left another default dtype behind"
    assert torch.is_grad_enabled(), "the test left gradients switched off"


# ------------------------------------------------- tiny models, data and runs, made up on the spot

EOS = 1  # id of the end-of-sequence token of the tiny tokenizer
VOCABULARY = ["<pad>", "<eos>", "<unk>", "Human:", "Assistant:", *map(chr, range(97, 97 + 27))]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """32 words, split at white space."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """`make_model(kind, head="lm" | "score")`: random weights, wide enough to have opinions.

    "gpt2" has learnt absolute positions and tied embeddings; "llama" has rotary positions, grouped
    keys and an output layer of its own.
    """

    def make(kind: str, head: str = "lm", **settings: Any) -> PreTrainedModel:
        torch.manual_seed(11)
        common = {
            "vocab_size": 32,
            "initializer_range": 0.4,
            "num_labels": 1,
            "bos_token_id": EOS,
            "eos_token_id": EOS,
            "pad_token_id": 0,
        }
        if kind == "gpt2":
            shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 48}
            dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
            config = GPT2Config(**common | shape | dropout | settings)
            model_class = GPT2LMHeadModel if head == "lm" else GPT2ForSequenceClassification
        else:
            shape = {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 48,
            }
            config = LlamaConfig(**common | shape | settings)
            model_class = LlamaForCausalLM if head == "lm" else LlamaForSequenceClassification
        return model_class(config).eval()

    return make


@pytest.fixture(params=["gpt2", "llama"])
def causal_model(request: pytest.FixtureRequest, make_model: Callable) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture(params=["gpt2", "llama"])
def score_model(request: pytest.FixtureRequest, make_model: Callable) -> PreTrainedModel:
    return make_model(request.param, head="score")


def _random_ids(rng: random.Random, shortest: int, longest: int) -> list[int]:
    return [rng.randrange(3, 32) for _ in range(rng.randint(shortest, longest))]


@pytest.fixture(scope="session")
def tiny_data(tiny_tokenizer: PreTrainedTokenizerFast) -> Any:
    """Made-up `PreferenceData`: 24 training pairs of mixed lengths; one reply in six has no end."""
    from rlhf_lib.data.encoding import Demonstration, Pair, Prompt
    from rlhf_lib.data.pairs import PreferenceData

    rng = random.Random(5)
    text = tiny_tokenizer.decode

    def reply() -> list[int]:
        return _random_ids(rng, 1, 6) + [EOS] * (rng.random() < 5 / 6)

    def pair(number: int) -> Pair:
        prompt, chosen, rejected = _random_ids(rng, 2, 9), reply(), reply()
        return Pair(
            f"talk {number}", text(prompt), text(chosen), text(rejected), prompt, chosen, rejected
        )

    def prompt() -> Prompt:
        ids = _random_ids(rng, 2, 9)
        return Prompt(text(ids), ids)

    def demonstration() -> Demonstration:
        ids, response = _random_ids(rng, 2, 9), reply()
        return Demonstration(text(ids), text(response), ids, response)

    sizes = {"train": 24, "validation": 8, "test": 10}
    return PreferenceData(
        pairs={name: [pair(i) for i in range(size)] for name, size in sizes.items()},
        demonstrations=[demonstration() for _ in range(24)],
        prompts={name: [prompt() for _ in range(16)] for name in ("train", "validation")},
        audit={},
        hash="made up",
    )


@pytest.fixture(scope="session")
def tiny_base(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable, tiny_tokenizer: Any
) -> Path:
    """A folder that holds a tiny GPT-2-shaped model, which ends its replies now and then."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model = make_model("gpt2")
    end = model.transformer.wte.weight[EOS].detach()
    model.transformer.ln_f.bias.data.add_(1.2 * end / end.norm())
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_run(tiny_base: Path) -> Callable[..., Any]:
    """`make_run(root, *overrides)`: a run of the tiny model, whose words have no gold reward."""
    from rlhf_lib.runs import Run

    small = """
        data.source=path:made-up data.max_prompt_tokens=40 data.max_response_tokens=8
        checkpoint_minutes=60
        reward_model.batch_size=6 reward_model.micro_batch_size=4 reward_model.epochs=1
        sft.batch_size=6 sft.micro_batch_size=4
        ppo.updates=4 ppo.batch_size=8 ppo.minibatch_size=4 ppo.micro_batch_size=3
        grpo.updates=4 grpo.prompts_per_update=2 grpo.group_size=4 grpo.micro_batch_size=5
        dpo.batch_size=6 dpo.micro_batch_size=4 dpo.probes=2 dpo.probe_prompts=4
        ppo.kl_coef=0.2 ppo.learning_rate=4e-5 grpo.learning_rate=5e-5 grpo.kl_reward_coef=0.2
        dpo.beta=0.1 dpo.learning_rate=5e-5 rejection.learning_rate=1e-4 rejection.epochs=1
    """

    def make(root: Path, *overrides: str, seed: int = 3) -> Run:
        return Run.open(
            "smoke", seed, root, [f"model.name={tiny_base}", *shlex.split(small), *overrides]
        )

    return make


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, make_run: Callable, tiny_data: Any
) -> SimpleNamespace:
    """The stages that PPO, GRPO and DPO start from: `finished.sft` and `finished.reward_model`."""
    run = make_run(tmp_path_factory.mktemp("upstream"))
    return SimpleNamespace(
        **{name: train_stage(run, name, tiny_data) for name in ("sft", "reward_model")}
    )


def train_stage(
    run: Any, name: str, data: Any, needed: Any = None, stage_name: str = "", **changes: Any
) -> Any:
    """The stage `name` of the catalogue, run from stages in `needed` (such as `finished`).

    `stage_name` and `changes` of its settings make another stage beside it.
    """
    from rlhf_lib import catalogue
    from rlhf_lib.study.training import run_stage

    record = catalogue.record(name)
    if changes or stage_name:
        record = replace(
            record,
            name=stage_name or name,
            changes=lambda profile, earlier=record.changes: earlier(profile) | changes,
        )
    stages = vars(needed) if needed is not None else {}
    return run_stage(run, record, data, {need: stages[need] for need in record.needs})


def learner_of(model: PreTrainedModel, rate: float = 0.0) -> Any:
    """A learner whose updates are proportional to the gradient: rounding is not blown up."""
    from rlhf_lib.methods.learner import Learner
    from rlhf_lib.runtime import make_accelerator

    # that is what a large eps does to Adam
    return Learner(make_accelerator("fp32"), model, learning_rate=rate, steps=100, eps=100.0)


@pytest.fixture(scope="session")
def make_sampler(finished: Any) -> Callable[..., Any]:
    """`make_sampler(reward=None)`: of the made-up SFT policy and, by default, its reward model."""
    from rlhf_lib.methods.rewards import of_model
    from rlhf_lib.methods.rollout import Sampler
    from rlhf_lib.models.load import freeze, load_reference, load_reward_model, load_tokenizer
    from rlhf_lib.runtime import make_accelerator

    def make(reward: Any = None, **settings: Any) -> Sampler:
        accelerator = make_accelerator("fp32")
        tokenizer = load_tokenizer(finished.sft.model_path)
        if reward is None:
            model, _ = load_reward_model(finished.reward_model.model_path, tokenizer, seed=3)
            reward = of_model(freeze(accelerator, model), accelerator)
        reference = freeze(accelerator, load_reference(finished.sft.model_path))
        return Sampler(
            accelerator, tokenizer, reference, reward, **{"max_new_tokens": 8} | settings
        )

    return make


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a test writes code of the user's; what Python imports from it is forgotten again."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages have their hash and are not run."""
    from rlhf_lib.runs import Stage

    monkeypatch.setattr(Stage, "ensure", lambda stage, build: stage)


@pytest.fixture
def check_resume(
    tmp_path: Path, make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """`check_resume(train)`: `train(run)` killed in its third step and resumed = never killed."""
    return partial(_check_resume, tmp_path, make_run, monkeypatch)


@contextmanager
def dying_at(last: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it a stage dies when it has logged step `last`."""
    from rlhf_lib.runs import Work

    log = Work.log

    def log_and_die(work: Work, step: int, *rest: Any) -> None:
        log(work, step, *rest)
        if step == last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "log", log_and_die)
        yield


def _check_resume(
    root: Path,
    make_run: Callable,
    monkeypatch: pytest.MonkeyPatch,
    train: Callable,
    kill: Callable[[Any], None] | None = None,
) -> None:
    from rlhf_lib.runs import Work

    whole = train(make_run(root / "whole"))
    run = make_run(root / "killed", "checkpoint_minutes=0")  # saves its state after every step
    if kill is not None:
        kill(run)
    else:
        with dying_at(2, monkeypatch), pytest.raises(KeyboardInterrupt):
            train(run)
    (partial_folder,) = (root / "killed").glob("*/*/*.partial")
    assert len(list(partial_folder.glob("checkpoint-?/progress.json"))) == 2
    assert not list((root / "killed").glob("*/*/*/DONE"))

    # the state of the killed process is gone: what the resumed one starts with must not matter
    torch.manual_seed(987)
    random.seed(987)
    np.random.seed(987)
    first_steps = []
    with monkeypatch.context() as patch:
        log = Work.log
        patch.setattr(
            Work,
            "log",
            lambda work, step, *rest: (first_steps.append(step), log(work, step, *rest)),
        )
        resumed = train(run)
    assert first_steps[0] == 2, "the resumed stage did not go on from its last checkpoint"
    assert_same_stage(resumed, whole)


TIMINGS = {"step_time", "tokens_per_second", "peak_memory_gb", "seconds", "phases"}


def assert_same_stage(one: Any, other: Any) -> None:
    """Two finished stages agree to the bit in weights, metrics, samples and result."""
    assert one.path.name == other.path.name

    def timeless(row: dict) -> dict:
        return {key: value for key, value in row.items() if key not in TIMINGS}

    rows, other_rows = ([timeless(row) for row in stage.metrics()] for stage in (one, other))
    assert [row["step"] for row in rows] == list(range(len(other_rows)))
    assert rows == other_rows
    assert timeless(one.result()) == timeless(other.result())
    weights, other_weights = (load_file(s.model_path / "model.safetensors") for s in (one, other))
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, other_weights[name]), name
