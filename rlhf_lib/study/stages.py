"""One seed of a study: which stage needs which, and each run when it is first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from rlhf_lib.data.pairs import PreferenceData, load_data
from rlhf_lib.measure import evaluate, opinions, probe_stage
from rlhf_lib.methods import dpo, grpo, learning_curve, ppo, reward_model, sft
from rlhf_lib.models.load import fingerprint, load_tokenizer
from rlhf_lib.results import summary
from rlhf_lib.runs import Run, Stage, Work
from rlhf_lib.runtime import set_up_process
from rlhf_lib.settings import DataConfig, Profile, unknown

# what each notebook trains; notebook 07 reads the stages of all seeds
NOTEBOOKS = {
    "01_dataset": ("dataset",),
    "02_reward_model": ("reward_model", "reward_model_control", "reward_model_curve"),
    "03_sft": ("sft", "rejection_sft"),
    "04_ppo": ("ppo", "ppo_low_kl"),
    "05_grpo": ("grpo",),
    "06_dpo": ("dpo",),
    "07_evaluation": ("evaluate", "probes"),
}
POLICIES = ("sft", "rejection_sft", "ppo", "ppo_low_kl", "grpo", "dpo")
NEEDS = {
    "dataset": (),
    "reward_model": (),
    "reward_model_control": (),
    "reward_model_curve": ("reward_model",),
    "judge": (),
    "sft": (),
    "rejection_sft": ("sft", "reward_model"),
    "ppo": ("sft", "reward_model"),
    "ppo_low_kl": ("sft", "reward_model"),
    "grpo": ("sft", "reward_model"),
    "dpo": ("sft", "reward_model"),
    "probes": (*POLICIES, "reward_model"),
    "evaluate": (*POLICIES, "reward_model", "reward_model_control", "judge"),
    "second_opinion": ("evaluate", "reward_model"),  # and the next seed's reward model
}
TRAINED = ("sft", "reward_model")  # what a policy is trained from
MEASURED = ("probes", "evaluate", "second_opinion")  # of all policies of a seed


def stage_names(profile: Profile, seed: int = 0) -> list[str]:
    """The stages of one seed in order.

    The control exists where its unbiased labels do, the judge where pairs are kept for it, a second
    opinion where there is a second seed; how the reward model grows with its data is drawn once.
    """
    absent = {
        "reward_model_control": not has_control(profile),
        "reward_model_curve": seed > 0 or not profile.reward_model.curve_points,
        "judge": not has_judge(profile),
        "second_opinion": profile.seeds == 1,
    }
    swept = [name for name in variants(profile) if seed == 0 and name not in NEEDS]
    trained = [name for name in NEEDS if name not in MEASURED]
    return [name for name in (*trained, *swept, *MEASURED) if not absent.get(name)]


def needs(profile: Profile, name: str) -> list[str]:
    """The stages of its own seed that `name` reads."""
    known = stage_names(profile)
    return [need for need in NEEDS.get(name, TRAINED) if need in known]


def next_seed(profile: Profile, seed: int) -> int:
    """The seed whose reward model gives the second opinion."""
    return (seed + 1) % profile.seeds


def variants(profile: Profile) -> dict[str, tuple[str, dict]]:
    """Further runs of a method: stage name -> the method, and what differs from its settings."""
    sweep = profile.sweep
    found: dict[str, tuple[str, dict]] = {
        "ppo_low_kl": ("ppo", {"kl_coef": profile.ppo.low_kl_coef})
    }
    if not sweep.stronger:
        return found
    found["ppo_strong"] = ("ppo", {"kl_coef": sweep.stronger * profile.ppo.kl_coef})
    rloo = {"advantage": "leave_one_out"}
    found["rloo"] = ("grpo", rloo)
    for suffix, factor in (("weak", sweep.weaker), ("strong", sweep.stronger)):
        coefficient = {"kl_reward_coef": factor * profile.grpo.kl_reward_coef}
        found[f"grpo_{suffix}"] = ("grpo", coefficient)
        found[f"rloo_{suffix}"] = ("grpo", rloo | coefficient)
        found[f"dpo_{suffix}"] = ("dpo", {"beta": factor * profile.dpo.beta})
    return found


def has_control(profile: Profile) -> bool:
    return profile.data.source == "bundled"


def has_judge(profile: Profile) -> bool:
    return profile.data.judge_pairs > 0


class Study:
    """One seed of a study; a stage is run when it is first asked for, what it needs before it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        set_up_process(run.profile.threads)

    @classmethod
    def open(
        cls, profile: str, seed: int = 0, run_dir: str | Path = "runs",
        overrides: str | Sequence[str] = (),
    ) -> Study:  # fmt: skip
        return cls(Run.open(profile, seed, run_dir, overrides))

    @cached_property
    def data(self) -> PreferenceData:
        return self._load(self.run.profile.data)

    @cached_property
    def control_data(self) -> PreferenceData:
        """The same pairs, labelled without bias (bundled world)."""
        return self._load(replace(self.run.profile.data, source="bundled:control"))

    def _load(self, config: DataConfig) -> PreferenceData:
        return load_data(config, load_tokenizer(self.run.profile.model.name))

    def stage(self, name: str) -> Stage:
        """The finished stage `name`; missing ones are run first, in the order of their needs."""
        known = stage_names(self.run.profile, self.run.seed)
        if name not in known:
            raise unknown("stage", name, known)
        needed = {other: self.stage(other) for other in needs(self.run.profile, name)}
        run, data = self.run, self.data
        if name == "second_opinion":
            rival = replace(run, seed=next_seed(run.profile, run.seed))
            return opinions.measure(run, **needed, rival=reward_model.train(rival, data))
        if name in MEASURED:
            return self._measure(name, needed)
        if name == "dataset":
            return self._dataset()
        if name == "reward_model":
            return reward_model.train(run, data)
        if name == "reward_model_control":
            return reward_model.train(run, self.control_data, name)
        if name == "reward_model_curve":
            return learning_curve.train(run, data, **needed)
        if name == "judge":
            return reward_model.train_judge(run, data)
        if name == "sft":
            return sft.train(run, data)
        if name == "rejection_sft":
            return sft.train_on_best(run, data, **needed)
        method, changes = variants(run.profile).get(name, (name, {}))
        train = {"ppo": ppo, "grpo": grpo, "dpo": dpo}[method].train
        return train(run, data, **needed, stage_name=name, changes=changes)

    def _dataset(self) -> Stage:
        upstream = {"data": self.data.hash}
        stage = self.run.stage("dataset", self.run.profile.data, upstream, "rlhf_lib.data.pairs")

        def build(work: Work) -> dict:
            return self.data.audit

        return stage.ensure(build)

    def _measure(self, name: str, needed: dict[str, Stage]) -> Stage:
        """`evaluate` or `probes`: what is asked of all policies."""
        run, reward = self.run, needed["reward_model"]
        upstream = {other: stage.hash for other, stage in needed.items()}
        upstream |= {"data": self.data.hash, "model": fingerprint(run.profile.model.name)}
        folders = {policy: str(needed[policy].model_path) for policy in POLICIES}
        policies = {"base": run.profile.model.name, **folders}
        if name == "probes":
            return probe_stage.measure(run, policies, reward, upstream)
        judges = needed.get("reward_model_control"), needed.get("judge")
        return evaluate.evaluate(run, self.data, policies, reward, upstream, *judges)

    def stages(self) -> dict[str, Stage]:
        """All stages of this seed, run if missing."""
        return {name: self.stage(name) for name in stage_names(self.run.profile, self.run.seed)}


def summarise(profile: Profile, run_dir: Path) -> Path:
    """The evaluation folder over all seeds of the profile; stages that are missing are run."""
    studies = [Study(Run(profile, seed, Path(run_dir))) for seed in range(profile.seeds)]
    stages = [study.stages() for study in studies]
    return summary.summarise([study.run for study in studies], stages, studies[0].data)
