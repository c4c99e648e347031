"""What a stage may ask for, by the names of its parameters: the one place where models are loaded,
learners made and states restored.
"""

from __future__ import annotations

import gc
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lib import catalogue, processes
from rlhf_lib.catalogue import Record
from rlhf_lib.data.encoding import Demonstration, Encoder, Pair, Prompt, encoder_of
from rlhf_lib.data.pairs import PreferenceData
from rlhf_lib.measure.evaluate import random_numbers
from rlhf_lib.methods import rewards
from rlhf_lib.methods.learner import DivergedError, Learner
from rlhf_lib.methods.rollout import Sampler
from rlhf_lib.models.load import (
    add_value_head,
    freeze,
    load_policy,
    load_reference,
    load_reward_model,
    load_tokenizer,
    load_value_model,
    save_adapter,
    save_model,
    trainable,
)
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.runtime import make_accelerator
from rlhf_lib.settings import SettingsError, SFTConfig
from rlhf_lib.world.rewards import DOSES

DRAW = 1000  # between the seeds of trainings that differ in luck alone


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
        self.profile, self.truth = run.profile, data.truth
        self.seed = run.seed + DRAW * record.draw
        self.config = record.config(run.profile)
        if work is not None:
            self.work, self.log, self.kept = work, work.log, work.kept

    # what is set above: `check_stage` knows it without any data
    _GIVEN = ("run", "record", "data", "needed", "profile", "seed", "truth", "config")
    _OF_WORK = ("work", "log", "kept")
    _OF_STUDY = frozenset({"call", "names", "save", "release", "stopped"})  # not for stages

    def call(self, stage: Callable[..., dict | None]) -> dict | None:
        """Run a stage with what its parameters name; what has a default may be missing here."""
        offered, wanted = self.names(), inspect.signature(stage).parameters
        # in their order: a policy that was asked for before the sampler may be its reference
        return stage(**{name: getattr(self, name) for name in wanted if name in offered})

    @classmethod
    def names(cls) -> set[str]:
        """All that a stage may ask for."""
        made = {name for name in dir(cls) if not name.startswith("_")}
        return made.union(cls._GIVEN, cls._OF_WORK) - cls._OF_STUDY

    def save(self) -> None:
        """Write the model that was trained, if one was, to `model/`, and adapters to `adapter/`.

        Raises DivergedError where a learner has learnt nothing.
        """
        for learner in (made for made in self.__dict__.values() if isinstance(made, Learner)):
            learner.check_learnt()
        if not processes.first():
            return
        for name in ("policy", "reward_model"):
            if name in self.__dict__:  # it was asked for
                model = self.__dict__[name].model
                if self.profile.model.lora_rank and name == "policy":
                    save_adapter(model, self.start, self.work.path / "adapter")
                save_model(model, self.tokenizer, self.work.model_path)

    @property
    def stopped(self) -> dict[str, float]:
        """After which step the policy was best, and its reward there, where this was looked at."""
        best = self.__dict__.get("best")
        return {"best_step": best.step, "best_reward": best.reward} if best else {}

    def release(self) -> None:
        """Let go of all models: weights, gradients and moments leave memory now.

        `accelerate` keeps what it prepared, and a model that it patched holds itself in a circle.
        """
        if "accelerator" in self.__dict__:
            self.accelerator.free_memory()
        self.__dict__.clear()
        gc.collect()

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
    def _proxy(self) -> str:
        """The reward model of the labels that the stage learns from."""
        labels = self.record.pairs
        return f"reward_model_{labels}" if labels in DOSES else "reward_model"

    @property
    def _one_trunk(self) -> bool:
        return getattr(self.config, "value_model", "") == "shared"

    @cached_property
    def value(self) -> Learner:
        """A value model that learns, from the reward model; or the policy, with a second head."""
        if self._one_trunk:
            return self.policy
        model = load_value_model(str(self._stage(self._proxy).model_path))
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
        reward = rewards.named(setting, self._reward_models, self.truth)
        return Sampler(
            self.accelerator, self.tokenizer, reference, reward,
            max_new_tokens=self.profile.data.max_response_tokens, truth=self.truth,
        )  # fmt: skip

    def _reward_models(self) -> list[rewards.Reward]:
        """That of the labels, and the rest of its ensemble where the stage reads it."""
        members = [name for name in catalogue.MEMBERS if name in self.needed]
        return [self.rater(name) for name in (self._proxy, *members)]

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
        return encoder_of(self.tokenizer, self.profile.data)

    @property
    def policies(self) -> dict[str, str]:
        """Every policy that evaluation asks: name -> model folder or name."""
        asked = [name for name in catalogue.trained() if name in self.needed]
        folders = {name: str(self.needed[name].model_path) for name in asked}
        return {"base": self.profile.model.name, **folders}

    # ----------------------------------------------------------------------- steps

    def steps(self, total: int) -> Iterable[int]:
        """The steps still to do: all models asked for are restored before the first of them."""
        patience = getattr(self.config, "patience", 0)
        if patience <= 0:
            return self.work.steps(total, self.accelerator)
        return self._until_worse(total, patience)

    def _until_worse(self, total: int, patience: int) -> Iterator[int]:
        """Steps until `patience` looks at validation in a row were no better than the best; the
        policy then becomes what it was at that one.

        A look: the mean reward of replies to the same prompts with the same random numbers, by gold
        where it is known, else by the held-out judge.
        """
        rate = next(iter(self.raters.values()), None)
        if rate is None:
            raise SettingsError(
                f"{self.record.sections[0]}.patience: nobody knows the true reward of these data, "
                "so a judge has to be kept from them: set data.judge_pairs"
            )
        prompts = list(self.data.prompts["validation"])
        luck = random_numbers(self.seed, "stopping", (len(prompts), self.sampler.max_new_tokens))
        best = self.best = Best()
        self.accelerator.register_for_checkpointing(best)  # before `steps` restores it
        looks = {total * part // LOOKS for part in range(1, LOOKS + 1)}
        for step in self.work.steps(total, self.accelerator):
            yield step
            if (done := step + 1) not in looks:
                continue
            replies = self.sampler.draw(self.policy.model, prompts, uniforms=luck)
            self.work.num_tokens += sum(len(text.ids) for text in (*prompts, *replies))
            reward = float(torch.as_tensor(rate(prompts, replies)).mean())
            if not best.beaten(done, reward, self.policy.model) and best.waited == patience:
                break
        best.give_back(self.policy.model)


LOOKS = 10  # at validation prompts, evenly spaced over a run that may stop early


class Best:
    """The best look at validation up to now, what the model had learnt by then, and how many looks
    were no better since. A checkpoint holds all of it, so that they stay of one moment.
    """

    def __init__(self) -> None:
        self.step, self.reward, self.waited = 0, -math.inf, 0
        self.weights: dict[str, Tensor] = {}  # of what learns; on the CPU

    def beaten(self, step: int, reward: float, model: PreTrainedModel) -> bool:
        """Whether this look is the best; NaN never is."""
        if reward > self.reward:
            self.step, self.reward, self.waited = step, reward, 0
            learnt = ((name, w) for name, w in model.named_parameters() if w.requires_grad)
            self.weights = {name: w.detach().cpu().clone() for name, w in learnt}
            return True
        self.waited += 1
        return False

    @torch.no_grad()
    def give_back(self, model: PreTrainedModel) -> None:
        """Raises DivergedError where no look gave a number."""
        if not self.weights:
            raise DivergedError("no reply to a validation prompt had a reward that is a number")
        for name, weight in model.named_parameters():
            if name in self.weights:
                weight.copy_(self.weights[name])

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
