"""One stage: what it asks for is loaded, it is run or resumed, and what it trained is saved.

A stage is a function, named in the catalogue, that asks for live objects by the names of its
parameters (`offer`). The functions below are stages that take more than one method's `train`.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lib import catalogue
from rlhf_lib.catalogue import Record
from rlhf_lib.data.encoding import Demonstration, Pair, Prompt
from rlhf_lib.data.pairs import PreferenceData, draw_pairs
from rlhf_lib.data.truth import Truth
from rlhf_lib.methods import reward_model as bradley_terry
from rlhf_lib.methods import rewards, sft
from rlhf_lib.methods.learner import Learner, Log, Steps
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.models.load import fingerprint, load_policy, load_reward_model, load_tokenizer
from rlhf_lib.objectives.losses import reward_loss
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.runtime import MEASURING, bundled_folder, phase, seed_everything
from rlhf_lib.settings import (
    Profile,
    RejectionConfig,
    RewardModelConfig,
    SettingsError,
    UserError,
)
from rlhf_lib.study.offer import Offer
from rlhf_lib.user_code import resolve

log = logging.getLogger(__name__)


def stage_of(run: Run, record: Record, data: PreferenceData, needed: Mapping[str, Stage]) -> Stage:
    """The stage of a record under its hash, done or not; `needed` may be so as well."""
    return run.stage(
        record.name, _settings(run, record), _upstream(run, record, data, needed), __name__,
        *_modules(run, record),
    )  # fmt: skip


def run_stage(run: Run, record: Record, data: PreferenceData, needed: Mapping[str, Stage]) -> Stage:
    """The stage of a record, done: found under its hash, or run with what it asks for."""
    function = check_stage(record, run.profile, data.truth)
    stage = stage_of(run, record, data, needed)

    def build(work: Work) -> dict:
        offer = Offer(run, record, data, needed, work)
        try:
            result = offer.call(function)
            if not (result is None or isinstance(result, Mapping)):
                raise SettingsError(
                    f"stage {record.name}: {record.runs} returned {type(result).__name__}; it has "
                    "to return a dict of JSON values, or None"
                )
            offer.save()
            return {**(result or {}), **offer.stopped}
        except torch.OutOfMemoryError as error:
            raise UserError(out_of_memory(record, run.profile)) from error
        finally:
            offer.release()

    return stage.ensure(build)


def out_of_memory(record: Record, profile: Profile) -> str:
    """That a stage did not fit, and what makes it smaller."""
    section, config = (*record.sections, "")[0], record.config(profile)
    ways = []
    for name in ("micro_batch_size", "batch_size"):
        if (size := getattr(config, name, 0)) > 1:
            ways.append(f"{section}.{name}={size // 2} (it is {size})")
            break
    if not profile.model.gradient_checkpointing:
        ways.append("model.gradient_checkpointing=true")
    if not profile.model.lora_rank:
        ways.append("model.lora_rank=16, with learning rates ten times up")
    return f"stage {record.name} ran out of memory; smaller is: {'; '.join(ways)}"


def check_stage(record: Record, profile: Profile, truth: Truth | None) -> Callable[..., Any]:
    """The function of a stage.

    Raises SettingsError where it, or a reward that it learns from, cannot be had: better now than
    when all that comes before it has been trained.
    """
    function = resolve(record.runs)
    offered, asked = Offer.names(), inspect.signature(function).parameters
    if {"policy", "reward_model"} <= set(asked):
        raise SettingsError(
            f"stage {record.name}: {record.runs} asks for a policy and a reward_model to train, "
            "and a stage saves one model; a finished reward model is `rater` or `frozen`"
        )
    if record.role and not {"policy", "policy_for"} & set(asked):
        raise SettingsError(
            f"stage {record.name}: with role={record.role!r} it is evaluated as a policy, so "
            f"{record.runs} has to ask for `policy`, which is trained and saved"
        )
    for name, parameter in asked.items():
        if parameter.default is parameter.empty and name not in offered:
            raise SettingsError(
                f"stage {record.name}: {record.runs} asks for {name!r}; offered are "
                + ", ".join(sorted(offered))
            )
    if reward := getattr(record.config(profile), "reward", ""):
        rewards.named(reward, lambda: [rewards.ended], truth)
    return function


def _settings(run: Run, record: Record) -> dict:
    """Every setting that reaches the stage, as resolved, and what it is."""
    config, *others = record.sections or ("",)
    found = _constants(record.config(run.profile)) if config else {}
    for name in others:
        found |= {f"{name}.{k}": v for k, v in _constants(getattr(run.profile, name)).items()}
    found = {name: value for name, value in found.items() if name not in record.unread}
    drawn = {"draw": record.draw} if record.draw else {}
    return found | {"runs": record.runs, "pairs": record.pairs} | drawn


def _constants(config: Any) -> dict:
    """Fields of some settings, and what else their class says: constants, steps of 1,000 rows."""
    known = {name: getattr(config, name) for name in dir(config) if not name.startswith("_")}
    steps = known.pop("optimizer_steps", None)
    return known | ({"optimizer_steps": steps(1000)} if steps else {})


def _upstream(
    run: Run, record: Record, data: PreferenceData, needed: Mapping[str, Stage]
) -> dict[str, str]:
    """What the stage reads: other stages, the data, the model, and files of the bundled world."""
    folder = bundled_folder()
    # a stage that reads others knows the pretrained model by their hashes: it is large to read
    model = {} if needed else {"model": fingerprint(run.profile.model.name)}
    return {
        "data": data.hash,
        **model,
        **{name: stage.hash for name, stage in needed.items()},
        **{name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in record.files},
    }


def _modules(run: Run, record: Record) -> list[str]:
    """Where the source of the stage is, and of the reward functions that its settings name."""
    reward = getattr(record.config(run.profile), "reward", "")
    return [record.module, *(rewards.modules(reward) if reward else [])]


# ------------------------------------------------------------- stages of more than one `train`


def dataset(data: PreferenceData, profile: Profile) -> dict:
    """What was found in the data. A model that cannot be used is refused here, not when what comes
    before it has been trained.
    """
    name = profile.model.name
    load_policy(name)
    load_reward_model(name, load_tokenizer(name), seed=0)
    return data.audit


def reward_model(
    reward_model: Learner,
    pairs: Sequence[Pair],
    data: PreferenceData,
    config: RewardModelConfig,
    work: Work,
    seed: int,
    steps: Steps,
    log: Log,
) -> dict:
    """Train a reward model, fix what its scores 0 and 1 mean, and score the test pairs.

    `samples.jsonl` holds one row per test pair: its index and the two raw scores.
    """
    result: dict[str, Any] = {
        **bradley_terry.train(reward_model, pairs, config, seed=seed, steps=steps, log=log)
    }
    model = reward_model.model
    with reward_model.accelerator.autocast():
        mean, std = bradley_terry.measure_scale(model, data.demonstrations)
        with phase(MEASURING):
            test, validation = (
                bradley_terry.score_pairs(model, data.pairs[s]) for s in ("test", "validation")
            )
    model.config.reward_mean, model.config.reward_std = mean, std
    work.write_samples(_score_rows(*test))
    (_, stats), (_, at_validation) = reward_loss(*test), reward_loss(*validation)
    _warn_of_chance(float(at_validation.accuracy), len(validation[0]))
    return result | {
        "test_pairs": len(test[0]),
        "accuracy": float(stats.accuracy),
        "validation_accuracy": float(at_validation.accuracy),
        "margin": float(stats.margin),
        "reward_mean": mean,
        "reward_std": std,
    }


def _warn_of_chance(right: float, pairs: int) -> None:
    """A reward model that has learnt nothing of the labels is no reward to learn from."""
    if right <= 0.5:
        log.warning(
            "the reward model ranks %.0f%% of %d validation pairs as they are labelled, no more "
            "than chance: what learns from it learns nothing of the labels",
            100 * right, pairs,
        )  # fmt: skip


def _score_rows(chosen: Tensor, rejected: Tensor, **first: object) -> list[dict]:
    scores = zip(chosen.tolist(), rejected.tolist(), strict=True)
    return [
        {**first, "pair": i, "chosen_score": c, "rejected_score": r}
        for i, (c, r) in enumerate(scores)
    ]


# All points together cost less than half of the full training: 1/3 + 1/9 + 1/27 + ... < 1/2
CURVE_FACTOR = 3


def curve_sizes(total: int, points: int) -> list[int]:
    """Numbers of training pairs, rising, each a third of the next; `total` itself is not listed."""
    return [size for k in range(points, 0, -1) if (size := total // CURVE_FACTOR**k)]


def reward_model_curve(
    run: Run,
    data: PreferenceData,
    config: RewardModelConfig,
    frozen: Callable[[str], PreTrainedModel],
    accelerator: Accelerator,
    work: Work,
) -> dict:
    """Smaller reward models, and what the full one makes of the validation pairs.

    `samples.jsonl` holds scores: of the test pairs by each smaller model, and of the validation
    pairs by the full one, whose own stage has its scores of the test pairs. A row has
    `train_pairs`, `split`, and the pair's index and two raw scores. The weights are not kept.
    """
    rows, seconds, total = [], {}, len(data.pairs["train"])
    # each in a store of its own within this stage's folder, so that a killed run resumes it
    inner, full = replace(run, root=work.keep), catalogue.record("reward_model")
    for size in curve_sizes(total, config.curve_points):
        record, less = replace(full, name=f"reward_model_{size}"), _smaller(data, size, run.seed)
        part = work.within(str(size), partial(run_stage, inner, record, less, {}))
        rows += [{"train_pairs": size, "split": "test", **row} for row in part["rows"]]
        seconds[str(size)] = part["seconds"]
        work.num_tokens += part["num_tokens"]
    with accelerator.autocast():
        scores = bradley_terry.score_pairs(frozen("reward_model"), data.pairs["validation"])
    work.write_samples(rows + _score_rows(*scores, train_pairs=total, split="validation"))
    return {"sizes": [int(size) for size in seconds], "training_seconds": seconds}


def _smaller(data: PreferenceData, size: int, seed: int) -> PreferenceData:
    """`size` training pairs, all test pairs, and just enough of what only a full model is asked."""
    pairs = {
        "train": draw_pairs(data.pairs["train"], size, seed),
        "validation": data.pairs["validation"][:1],
        "test": data.pairs["test"],
    }
    return replace(
        data, pairs=pairs, demonstrations=data.demonstrations[:2], hash=f"{data.hash}/{size}"
    )


def rejection_sft(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    config: RejectionConfig,
    profile: Profile,
    policy_for: Callable[[Any, int], Learner],
    work: Work,
    seed: int,
    steps: Steps,
    log: Log,
) -> dict:
    """Rejection-sampling SFT: the SFT policy, trained on the best of its own replies.

    The baseline that RL has to beat: it uses the same reward model and the same samples, and no
    policy gradient (Llama 2, arXiv:2307.09288, sec. 3.2.3; RAFT, arXiv:2304.06767).
    """
    asked = prompts[: config.prompts]

    def draw() -> dict:
        best, tokens = sft.best_of_n(sampler, asked, config.samples, config.temperature)
        return {"best": [vars(each) for each in best], "tokens": tokens}

    drawn = work.part("best", draw)  # a resumed stage learns from the same replies
    best, work.num_tokens = [Demonstration(**row) for row in drawn["best"]], drawn["tokens"]
    training = replace(profile.sft, epochs=config.epochs, learning_rate=config.learning_rate)
    seed_everything(seed)  # adapters begin alike, whether this process has sampled or not
    policy = policy_for(training, len(best))
    result = sft.train(policy, best, training, seed=seed, steps=steps, log=log)
    return result | {"samples": len(best) * config.samples}
