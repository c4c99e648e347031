"""One stage: what it asks for is loaded, it is run or resumed, and what it trained is saved.

A stage is a function, named in the catalogue, that asks for live objects by the names of its
parameters. `Offer` is the list of them, and the one place where models are loaded, learners made
and states restored; the functions below are stages that take more than one method's `train`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lib import catalogue
from rlhf_lib.catalogue import Record
from rlhf_lib.data.encoding import Demonstration, Encoder, Pair, Prompt
from rlhf_lib.data.pairs import PreferenceData, draw_pairs
from rlhf_lib.data.truth import Truth
from rlhf_lib.methods import reward_model as bradley_terry
from rlhf_lib.methods import rewards, sft
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.models.learner import Learner, Log, Steps
from rlhf_lib.models.load import (
    add_value_head,
    fingerprint,
    freeze,
    load_policy,
    load_reference,
    load_reward_model,
    load_tokenizer,
    load_value_model,
    save_model,
    trainable,
)
from rlhf_lib.objectives.losses import reward_loss
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.runtime import bundled_folder, make_accelerator
from rlhf_lib.settings import (
    Profile,
    RejectionConfig,
    RewardModelConfig,
    SettingsError,
    SFTConfig,
)
from rlhf_lib.user_code import resolve


def run_stage(run: Run, record: Record, data: PreferenceData, needed: Mapping[str, Stage]) -> Stage:
    """The stage of a record, done: found under its hash, or run with what it asks for."""
    function = check_stage(record, run.profile, data.truth)
    stage = run.stage(
        record.name, _settings(run, record), _upstream(run, record, data, needed), __name__,
        *_modules(run, record),
    )  # fmt: skip

    def build(work: Work) -> dict:
        offer = Offer(run, record, data, needed, work)
        result = offer.call(function)
        offer.save()
        return result or {}

    return stage.ensure(build)


def check_stage(record: Record, profile: Profile, truth: Truth | None) -> Callable[..., Any]:
    """The function of a stage.

    Raises SettingsError where it, or a reward that it learns from, cannot be had: better now than
    when all that comes before it has been trained.
    """
    function = resolve(record.runs)
    offered = {n for n in dir(Offer) if not n.startswith("_")} | {*Offer._GIVEN, *Offer._OF_WORK}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty and name not in offered - {"call", "save"}:
            raise SettingsError(
                f"stage {record.name}: {record.runs} asks for {name!r}; offered are "
                + ", ".join(sorted(offered - {"call", "save"}))
            )
    if reward := getattr(record.config(profile), "reward", ""):
        rewards.named(reward, lambda: rewards.ended, truth)
    return function


def _settings(run: Run, record: Record) -> dict:
    """Every setting that reaches the stage, as resolved, and what it is."""
    config, *others = record.sections or ("",)
    found = _constants(record.config(run.profile)) if config else {}
    for name in others:
        found |= {f"{name}.{k}": v for k, v in _constants(getattr(run.profile, name)).items()}
    found = {name: value for name, value in found.items() if name not in record.unread}
    return found | {"runs": record.runs, "pairs": record.pairs}


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


class Offer:
    """What a stage may ask for. Each thing is made when it is asked for, and once.

    Without `work` nothing can be run: the objects are there to be looked at.
    """

    def __init__(
        self,
        run: Run,
        record: Record,
        data: PreferenceData,
        needed: Mapping[str, Stage],
        work: Work | None = None,
    ) -> None:
        self.run, self.record, self.data, self.needed = run, record, data, needed
        self.profile, self.seed, self.truth = run.profile, run.seed, data.truth
        self.config = record.config(run.profile)
        if work is not None:
            self.work, self.log, self.kept = work, work.log, work.kept

    # what is set above: `check_stage` knows it without any data
    _GIVEN = ("run", "record", "data", "needed", "profile", "seed", "truth", "config")
    _OF_WORK = ("work", "log", "kept")

    def call(self, stage: Callable[..., dict | None]) -> dict | None:
        """Run a stage with what its parameters name; what has a default may be missing here."""
        wanted = inspect.signature(stage).parameters
        return stage(**{name: getattr(self, name) for name in wanted if hasattr(self, name)})

    def save(self) -> None:
        """Write the model that was trained, if one was, to `model/`."""
        for name in ("policy", "reward_model"):
            if name in self.__dict__:  # it was asked for
                learner: Learner = self.__dict__[name]
                save_model(learner.model, self.tokenizer, self.work.model_path)

    # ------------------------------------------------------------------------ data

    @property
    def pairs(self) -> Sequence[Pair]:
        """Those that the stage learns from."""
        return self.data.pairs["judge" if self.record.pairs == "judge" else "train"]

    @property
    def demonstrations(self) -> Sequence[Demonstration]:
        return self.data.demonstrations

    @property
    def prompts(self) -> Sequence[Prompt]:
        """Those to train on."""
        return self.data.prompts["train"]

    @property
    def probes(self) -> Sequence[Prompt]:
        """Those to look at while training."""
        return self.data.prompts["validation"][: self.config.probe_prompts]

    # ---------------------------------------------------------------------- models

    @cached_property
    def accelerator(self) -> Accelerator:
        return make_accelerator(self.profile.model.precision)

    @cached_property
    def start(self) -> str:
        """What a policy is trained from: SFT, or the pretrained model where SFT is not needed."""
        return (
            str(self.needed["sft"].model_path) if "sft" in self.needed else self.profile.model.name
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.start)

    @cached_property
    def policy(self) -> Learner:
        """A language model that learns."""
        own = self.demonstrations if isinstance(self.config, SFTConfig) else self.pairs
        return self.policy_for(self.config, len(own))

    def policy_for(self, config: Any, rows: int) -> Learner:
        """The policy, learning under `config` from this number of rows."""
        model = trainable(load_policy(self.start), self.profile.model)
        if self._one_trunk:
            add_value_head(model)
        self.policy = self._learner(model, config, config.learning_rate, rows)
        return self.policy

    @property
    def _one_trunk(self) -> bool:
        return getattr(self.config, "value_model", "") == "shared"

    @cached_property
    def value(self) -> Learner:
        """A value model that learns, from the reward model; or the policy, with a second head."""
        if self._one_trunk:
            return self.policy
        model = load_value_model(str(self._stage("reward_model").model_path))
        rate = self.config.value_learning_rate
        return self._learner(trainable(model, self.profile.model), self.config, rate)

    @cached_property
    def reward_model(self) -> Learner:
        """A reward model that learns, from the pretrained model."""
        model, self.tokenizer = load_reward_model(self.start, self.tokenizer, self.seed)
        model = trainable(model, self.profile.model)
        return self._learner(model, self.config, self.config.learning_rate, len(self.pairs))

    def _learner(
        self, model: PreTrainedModel, config: Any, learning_rate: float, rows: int = 0
    ) -> Learner:
        return Learner(
            self.accelerator,
            model,
            learning_rate=learning_rate,
            steps=config.optimizer_steps(rows),
            warmup_ratio=config.warmup_ratio,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            eps=config.adam_eps,
        )

    def _stage(self, name: str) -> Stage:
        if name not in self.needed:
            raise SettingsError(
                f"stage {self.record.name} asks for what reads {name}, which its `needs` leave out"
            )
        return self.needed[name]

    def frozen(self, name: str) -> PreTrainedModel:
        """The reward model of a stage, to be read only."""
        model, _ = load_reward_model(self._stage(name).model_path, self.tokenizer, self.seed)
        return freeze(self.accelerator, model)

    def rater(self, name: str) -> rewards.Reward:
        """The reward model of a stage, as a reward."""
        size = self.config.scoring_batch_size
        return rewards.of_model(self.frozen(name), self.accelerator, size)

    @cached_property
    def sampler(self) -> Sampler:
        """The reference, and the reward that the settings name (the reward model by default).

        A policy with adapters that was asked for *before* is its own reference.
        """
        if "policy" in self.__dict__ and self.profile.model.lora_rank:
            reference = self.policy.model
        else:
            reference = freeze(self.accelerator, load_reference(self.start))
        setting = getattr(self.config, "reward", "model")
        reward = rewards.named(setting, lambda: self.rater("reward_model"), self.truth)
        return Sampler(
            self.accelerator, self.tokenizer, reference, reward,
            max_new_tokens=self.profile.data.max_response_tokens, truth=self.truth,
        )  # fmt: skip

    @property
    def raters(self) -> dict[str, rewards.Reward]:
        """Who judges a reply beside the proxy: gold where it is known, a held-out judge."""
        gold = {} if self.truth is None else {"gold": rewards.of_truth(self.truth)}
        return gold | ({"judge": self.rater("judge")} if "judge" in self.needed else {})

    @property
    def control(self) -> rewards.Reward | None:
        """A reward model that learnt from unbiased labels, where there are any."""
        name = "reward_model_control"
        return self.rater(name) if name in self.needed else None

    @cached_property
    def encoder(self) -> Encoder:
        limits = self.profile.data
        return Encoder(self.tokenizer, limits.max_prompt_tokens, limits.max_response_tokens)

    @property
    def policies(self) -> dict[str, str]:
        """Every policy that evaluation asks: name -> model folder or name."""
        asked = [name for name in catalogue.trained() if name in self.needed]
        folders = {name: str(self.needed[name].model_path) for name in asked}
        return {"base": self.profile.model.name, **folders}

    # ----------------------------------------------------------------------- steps

    def steps(self, total: int) -> Iterable[int]:
        """The steps still to do: all models asked for are restored before the first of them."""
        return self.work.steps(total, self.accelerator)


# ------------------------------------------------------------- stages of more than one `train`


def dataset(data: PreferenceData) -> dict:
    """What was found in the data."""
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
        test, validation = (
            bradley_terry.score_pairs(model, data.pairs[split]) for split in ("test", "validation")
        )
    model.config.reward_mean, model.config.reward_std = mean, std
    work.write_samples(_score_rows(*test))
    (_, stats), (_, at_validation) = reward_loss(*test), reward_loss(*validation)
    return result | {
        "test_pairs": len(test[0]),
        "accuracy": float(stats.accuracy),
        "validation_accuracy": float(at_validation.accuracy),
        "margin": float(stats.margin),
        "reward_mean": mean,
        "reward_std": std,
    }


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
        record = replace(full, name=f"reward_model_{size}")
        part = run_stage(inner, record, _smaller(data, size, run.seed), {})
        rows += [{"train_pairs": size, "split": "test", **row} for row in part.samples()]
        seconds[str(size)] = part.result()["seconds"]
        work.num_tokens += part.result()["num_tokens"]
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
    best, work.num_tokens = sft.best_of_n(sampler, asked, config.samples, config.temperature)
    training = replace(profile.sft, epochs=config.epochs, learning_rate=config.learning_rate)
    policy = policy_for(training, len(best))
    result = sft.train(policy, best, training, seed=seed, steps=steps, log=log)
    return result | {"samples": len(best) * config.samples}
