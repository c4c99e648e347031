"""A stage gets what it asks for and no more; what it trained is kept; what reaches it is hashed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch

from rlhf_lib import catalogue
from rlhf_lib.catalogue import Record
from rlhf_lib.methods.learner import DivergedError
from rlhf_lib.models.load import load_policy, load_reward_model, load_tokenizer
from rlhf_lib.runs import Run
from rlhf_lib.settings import PPOConfig, SettingsError, UserError
from rlhf_lib.study import offer, training
from rlhf_lib.study.training import run_stage
from tests.conftest import dying_at, train_stage
from tools import families

# ------------------------------------------------------------------------------ what a stage gets


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often a model of each kind is loaded."""
    counts: Counter = Counter()
    for kind in ("policy", "reference", "reward_model", "value_model"):
        load = getattr(offer, f"load_{kind}")

        def note(*given: Any, kind: str = kind, load: Callable = load) -> Any:
            counts[kind] += 1
            return load(*given)

        monkeypatch.setattr(offer, f"load_{kind}", note)
    return counts


@pytest.mark.parametrize(
    ("name", "overrides", "models"),
    [
        ("dataset", "", {}),
        ("sft", "", {"policy": 1}),
        ("reward_model", "", {"reward_model": 1}),
        ("rejection_sft", "", {"policy": 1, "reference": 1, "reward_model": 1}),
        ("ppo", "", {"policy": 1, "value_model": 1, "reference": 1, "reward_model": 1}),
        ("ppo", "ppo.reward=ended", {"policy": 1, "value_model": 1, "reference": 1}),
        ("ppo", "ppo.value_model=shared", {"policy": 1, "reference": 1, "reward_model": 1}),
        ("grpo", "", {"policy": 1, "reference": 1, "reward_model": 1}),
        ("grpo", "model.lora_rank=2", {"policy": 1, "reward_model": 1}),
        ("dpo", "", {"policy": 1, "reference": 1, "reward_model": 1}),
    ],
)
def test_nothing_is_loaded_that_is_not_asked_for(
    name: str,
    overrides: str,
    models: dict,
    loaded: Counter,
    make_run: Callable,
    finished: Any,
    tiny_data: Any,
    tmp_path: Path,
) -> None:
    small = ["ppo.updates=1", "grpo.updates=1", "rejection.prompts=8", "rejection.samples=2"]
    run = make_run(tmp_path, *small, *overrides.split())
    loaded.clear()
    train_stage(run, name, tiny_data, finished)
    assert dict(loaded) == models


@pytest.fixture
def toy(user_folder: Path, make_run: Callable, tiny_data: Any) -> Callable:
    """`toy(signature, *lines)`: a stage of these lines, run with what the signature asks for."""

    numbers = count()

    def run(signature: str, *lines: str, needed: Any = None, **changes: Any) -> Any:
        file = user_folder / f"toy_{next(numbers)}.py"  # Python runs a file once
        file.write_text("\n    ".join([f"def run({signature}):", *lines]) + "\n")
        record = replace(Record("toy", "Toy", runs=f"{file}:run", sections=("sft",)), **changes)
        return run_stage(make_run(user_folder), record, tiny_data, needed or {})

    return run


def test_a_stage_is_given_what_its_parameters_name(
    toy: Callable, loaded: Counter, tiny_data: Any
) -> None:
    stage = toy(
        "prompts, seed, config, log, steps",
        "for step in steps(3): log(step, 5, {'loss': 2.0 * step})",
        "return {'prompts': [p.text for p in prompts], 'seed': seed, 'epochs': config.epochs}",
        changes=lambda profile: {"epochs": 7},
    )
    result = stage.result()
    assert result["prompts"] == [p.text for p in tiny_data.prompts["train"]]
    assert (result["seed"], result["epochs"], result["num_tokens"]) == (3, 7, 15)
    assert [row["loss"] for row in stage.metrics()] == [0, 2, 4]
    assert not loaded
    assert not stage.model_path.exists()


def test_a_thing_is_made_once(toy: Callable, loaded: Counter, finished: Any) -> None:
    toy(
        "policy, sampler, tokenizer, accelerator",
        "assert sampler.tokenizer is tokenizer",
        "assert sampler.accelerator is policy.accelerator is accelerator",
        "return {}",
        needed=vars(finished),
        needs=("sft", "reward_model"),
        sections=("grpo",),
    )
    assert loaded == {"policy": 1, "reference": 1, "reward_model": 1}


def test_a_name_that_is_not_offered_is_refused(toy: Callable) -> None:
    message = r"^stage toy: .*toy_0\.py:run asks for 'polcy'; offered are .*, policy, .*, seed,"
    with pytest.raises(SettingsError, match=message):
        toy("seed, polcy", "return {}")


def test_a_parameter_with_a_default_keeps_it(toy: Callable) -> None:
    assert toy("seed, extra=7", "return {'seen': [seed, extra]}").result()["seen"] == [3, 7]


def test_a_stage_may_return_nothing(toy: Callable) -> None:
    assert toy("steps, log", "for step in steps(1): log(step, 1, {})").result()["num_tokens"] == 1


def test_numbers_of_other_libraries_are_numbers(toy: Callable) -> None:
    stage = toy(
        "seed", "import torch, numpy", "return {'a': numpy.float32(1), 'b': torch.ones(())}"
    )
    assert (stage.result()["a"], stage.result()["b"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1, 2]", r"stage toy: .*:run returned list; it has to return a dict"),
        ("{'a': float('nan')}", r"result\.json cannot hold this: Out of range float values"),
        ("{'a': object()}", r"result\.json cannot hold this: .* 'object'"),
    ],
)
def test_what_no_result_can_hold_is_said(toy: Callable, returned: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy("seed", f"return {returned}")


def test_a_stage_trains_one_model(toy: Callable) -> None:
    """The folder of a stage holds one: the second would take the place of the first."""
    with pytest.raises(SettingsError, match="asks for a policy and a reward_model to train"):
        toy("policy, reward_model", "return {}")


def test_what_is_evaluated_as_a_policy_has_to_train_one(toy: Callable) -> None:
    with pytest.raises(SettingsError, match="role='method' it is evaluated as a policy"):
        toy("sampler", "return {}", role="method")


@pytest.mark.parametrize("name", ["call", "save", "_learner", "kwargs"])
def test_what_serves_the_offer_itself_is_not_offered(toy: Callable, name: str) -> None:
    with pytest.raises(SettingsError, match=f"asks for '{name}'; offered are"):
        toy(name.replace("kwargs", "**kwargs"), "return {}")


@pytest.mark.parametrize("asked", ["sampler", "value"])
def test_what_reads_a_stage_that_is_not_needed_is_refused(
    toy: Callable, asked: str, finished: Any
) -> None:
    message = "stage toy asks for what reads reward_model, which its `needs` leave out"
    with pytest.raises(SettingsError, match=message):
        toy(asked, "return {}", needed={"sft": finished.sft}, needs=("sft",), sections=("ppo",))


# ------------------------------------------------------------------------------- what it leaves


def test_the_policy_that_was_trained_is_saved(toy: Callable, tiny_base: Path) -> None:
    stage = toy(
        "policy",
        "loss = sum(p.square().sum() for p in policy.model.parameters())",
        "policy.step([loss])",
        "return {}",
        changes=lambda profile: {"warmup_ratio": 0.0},
    )
    start, trained = load_policy(tiny_base), load_policy(stage.model_path)
    pairs = list(zip(start.parameters(), trained.parameters(), strict=True))
    assert all(new.norm() <= old.norm() for old, new in pairs)
    assert sum(new.norm() < old.norm() for old, new in pairs) > len(pairs) / 2
    assert load_tokenizer(stage.model_path).eos_token_id == 1


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Stages train in fp16's way; gradients are multiplied by the last number of this list."""
    factors = [1.0]
    made, trainable = offer.make_accelerator, offer.trainable

    def scaled(precision: str) -> Any:
        accelerator = made(precision)
        accelerator.scaler = torch.amp.GradScaler("cpu", 2.0**16)
        return accelerator

    def hooked(*asked: Any) -> Any:
        model = trainable(*asked)
        next(model.parameters()).register_hook(lambda gradient: gradient * factors[-1])
        return model

    monkeypatch.setattr(offer, "make_accelerator", scaled)
    monkeypatch.setattr(offer, "trainable", hooked)
    return factors


@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_a_stage_whose_every_step_was_skipped_is_not_published(
    name: str, fp16: list[float], make_run: Callable, tiny_data: Any, tmp_path: Path
) -> None:
    fp16.append(math.inf)
    with pytest.raises(DivergedError, match=r"every step was skipped.*model\.precision=fp32"):
        train_stage(make_run(tmp_path), name, tiny_data)
    assert not list(tmp_path.glob("**/DONE"))


def test_what_was_learnt_before_a_kill_counts_as_learnt(
    fp16: list[float],
    make_run: Callable,
    tiny_data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(tmp_path, "checkpoint_minutes=0")
    with dying_at(1, monkeypatch), pytest.raises(KeyboardInterrupt):
        train_stage(run, "sft", tiny_data)
    fp16.append(math.inf)
    stage = train_stage(run, "sft", tiny_data)
    assert [row["skipped"] for row in stage.metrics()] == [0, 1, 1, 1]


def test_a_reward_model_is_saved_as_one_and_a_frozen_one_is_not(
    toy: Callable, finished: Any
) -> None:
    stage = toy("reward_model", "return {}", sections=("reward_model",))
    model, _ = load_reward_model(stage.model_path, load_tokenizer(stage.model_path), seed=9)
    assert model.score.out_features == 1
    needed = {"reward_model": finished.reward_model}
    stage = toy("frozen", "frozen('reward_model')", "return {'n': 1}", needed=needed)
    assert stage.result()["n"] == 1
    assert not stage.model_path.exists()


# ------------------------------------------------------------------------------ what is hashed


def another(owner: type, name: str, value: Any) -> Any:
    kind = get_type_hints(owner)[name]
    if name == "reward":
        return "ended"
    if options := get_args(kind):
        return next(option for option in options if option != value)
    return not value if kind is bool else f"{value}x" if kind is str else 2 * value + 1


def changed(run: Run, section: str, *names: str) -> Run:
    """The same run with other values of these settings."""
    old = getattr(run.profile, section)
    values = {name: another(type(old), name, getattr(old, name)) for name in names}
    return replace(run, profile=replace(run.profile, **{section: replace(old, **values)}))


SECTIONS = ("data", "reward_model", "sft", "rejection", "ppo", "grpo", "dpo", "evaluation")
STAGES = (
    "dataset",
    "reward_model",
    "sft",
    "rejection_sft",
    "ppo",
    "grpo",
    "dpo",
    "evaluate",
    "probes",
)


@pytest.mark.parametrize("name", STAGES)
def test_every_setting_that_reaches_a_stage_is_in_its_hash_and_no_other(
    name: str, unbuilt: None, make_run: Callable, tiny_data: Any, tmp_path: Path
) -> None:
    record, run = catalogue.record(name), make_run(tmp_path)

    def hash_of(run: Run) -> str:
        return run_stage(run, record, tiny_data, {}).hash

    before, others = hash_of(run), run
    for section in SECTIONS:
        names = {field.name for field in fields(getattr(run.profile, section))}
        if section in record.sections:
            moved = {n for n in names if hash_of(changed(run, section, n)) != before}
            assert moved == names - set(record.unread)
        else:  # the lengths that texts are cut at reach every stage
            names -= {"max_prompt_tokens", "max_response_tokens"}
            others = changed(others, section, *names)
    assert others.profile != run.profile
    assert hash_of(others) == before


def test_constants_of_the_settings_and_what_the_record_runs_are_in_the_hash(
    unbuilt: None, make_run: Callable, tiny_data: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    record, run = catalogue.record("ppo"), make_run(tmp_path)

    def hash_of(**changes: str) -> str:
        return run_stage(run, replace(record, **changes), tiny_data, {}).hash

    seen = [hash_of(), hash_of(runs="rlhf_lib.methods.grpo:train"), hash_of(pairs="judge")]
    for name, value in (
        ("adam_eps", 1e-2),
        ("scoring_batch_size", property(lambda config: 7)),
        ("optimizer_steps", lambda config, rows: 7 * rows),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(PPOConfig, name, value)
            seen.append(hash_of())
    assert len(set(seen)) == 6
    assert hash_of() == seen[0]


def test_what_is_unread_is_a_setting() -> None:
    profile = catalogue.load("smoke")
    for record in catalogue.CATALOGUE.values():
        sections = [getattr(profile, section) for section in record.sections]
        known = {field.name for section in sections for field in fields(section)}
        assert set(record.unread) <= known, record.name


def test_a_file_that_the_record_names_is_in_the_hash(
    unbuilt: None,
    make_run: Callable,
    tiny_data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = catalogue.record("evaluate")
    (file,) = record.files
    for name in (file, "other.jsonl.gz"):
        (tmp_path / name).write_bytes(b"one")
    monkeypatch.setattr(training, "bundled_folder", lambda: tmp_path)
    run, hashes = make_run(tmp_path), []
    for edited in (None, "other.jsonl.gz", file):
        if edited:
            (tmp_path / edited).write_bytes(b"two")
        hashes.append(run_stage(run, record, tiny_data, {}).hash)
    assert hashes[0] == hashes[1] != hashes[2]
    assert run_stage(run, replace(record, files=()), tiny_data, {}).hash not in hashes


def test_data_model_and_what_is_needed_are_in_the_hash(
    unbuilt: None, make_run: Callable, tiny_data: Any, finished: Any, tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    other = SimpleNamespace(sft=SimpleNamespace(hash="x"), reward_model=finished.reward_model)
    elsewhere = replace(run.profile, model=replace(run.profile.model, name="tiny"))
    hashes = [
        train_stage(run, "ppo", tiny_data, finished).hash,
        train_stage(run, "ppo", replace(tiny_data, hash="other"), finished).hash,
        train_stage(run, "ppo", tiny_data, other).hash,
        train_stage(replace(run, profile=elsewhere), "ppo", tiny_data, finished).hash,
        train_stage(replace(run, seed=4), "ppo", tiny_data, finished).hash,
    ]
    assert len(set(hashes)) == len(hashes)


def test_a_stage_out_of_memory_says_what_is_smaller(
    make_run: Callable, finished: Any, tiny_data: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def too_much(self: offer.Offer, function: Callable) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(offer.Offer, "call", too_much)
    run = make_run(tmp_path, "ppo.micro_batch_size=8")
    said = (
        r"stage ppo ran out of memory; smaller is: ppo\.micro_batch_size=4 \(it is 8\); "
        r"model\.gradient_checkpointing=true; model\.lora_rank=16"
    )
    with pytest.raises(UserError, match=said):
        train_stage(run, "ppo", tiny_data, finished)
    run = make_run(tmp_path, "model.gradient_checkpointing=true", "model.lora_rank=2")
    with pytest.raises(UserError, match=r"out of memory; smaller is: sft\.micro_batch_size=2 \("):
        train_stage(run, "sft", tiny_data)


@pytest.mark.parametrize(
    ("family", "message"),
    [("Granite", "has no sequence classifier"), ("Mamba", "cannot sample with a cache")],
)
def test_a_model_that_cannot_be_used_is_refused_with_the_data(
    family: str, message: str, make_run: Callable, tiny_data: Any, tmp_path: Path
) -> None:
    """That is before anything trains."""
    run = make_run(tmp_path, f"model.name={families.save(family, tmp_path / 'model')}")
    with pytest.raises(SettingsError, match=message):
        train_stage(run, "dataset", tiny_data)


# ----------------------------------------------------------------------------- what is warned of


def test_a_reward_model_no_better_than_chance_is_told(caplog: pytest.LogCaptureFixture) -> None:
    training._warn_of_chance(0.51, 100)
    assert not caplog.text
    training._warn_of_chance(0.5, 100)
    assert "ranks 50% of 100 validation pairs as they are labelled, no more than" in caplog.text
