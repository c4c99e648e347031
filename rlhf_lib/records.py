"""What exists: a record for each stage and each policy, and for whatever else has a name.

Adding a method is adding a record: here, or in a module of your own that the setting `methods`
names. It lies below the methods, so a record names what runs it, `package.module:function`, found
when asked for. `catalogue` answers questions about all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhf_lib.settings import Profile

GREY = "#6b7785"  # of what has no colour of its own
# Policies in the order of tables: what the others started from first, the methods in the middle.
ROLES = ("base", "reference", "null", "baseline", "method", "variant")


@dataclass(frozen=True)
class Record:
    """One thing with a name; `runs` makes it a stage, `role` a policy that is evaluated."""

    name: str
    label: str
    color: str = GREY
    # ---- as a stage
    runs: str = ""  # package.module:function; it is given what its parameters name
    needs: tuple[str, ...] = ()  # stages of the same seed, where the profile has them
    sections: tuple[str, ...] = ()  # of the profile that reach it; the first is its `config`
    changes: Callable[[Profile], dict[str, Any]] = lambda profile: {}  # of that first one
    unread: tuple[str, ...] = ()  # settings of these sections that do not reach it after all
    files: tuple[str, ...] = ()  # in data/ that it reads beside the pairs
    draw: int = 0  # above 0: trained with luck of its own, beside that of the seed
    pairs: str = "train"  # which it learns from: train, judge, or those with other labels (LABELS)
    # in a profile and seed: in a study's first seeds, a method or the baseline in all or none
    exists: Callable[[Profile, int], bool] = lambda profile, seed: True
    notebook: str = ""  # trains it where the whole study is run
    help: str = ""  # of its command
    # ---- as a policy
    role: str = ""  # one of ROLES
    rewarded: bool = True  # learns from rewards, so that the reward model is part of its price
    samples: bool = True  # learns from its own samples while it trains: reinforcement learning
    coefficient: str = ""  # the setting that holds it near its reference
    tuned: tuple[str, ...] = ()  # section.key: what `tune` looks for, the coefficient first
    # from the settings of a study: models in memory that learn, and that are only read
    held: Callable[[Mapping], tuple[int, int]] | None = None
    variant_of: str = ""  # the method that this is one more run of

    def config(self, profile: Profile) -> Any:
        """The settings that `runs` gets; None for a stage without any."""
        if not self.sections:
            return None
        return replace(getattr(profile, self.sections[0]), **self.changes(profile))

    @property
    def module(self) -> str:
        """Where the source is that the stage's hash follows."""
        return self.runs.rpartition(":")[0]


CATALOGUE: dict[str, Record] = {}


def add(*records: Record) -> None:
    """Enter records; one under a name that exists takes its place."""
    CATALOGUE.update({record.name: record for record in records})


# -------------------------------------------------------------------------------------- records

TRAINED = ("sft", "reward_model")  # what a policy is trained from
REPLIES = ("samples_per_prompt", "baseline_samples", "measured_prompts", "measured_samples")
# by annotators of the tastes in `world.rewards.DOSES`
LABELS = {"control": "unbiased labels", "half": "half the taste", "double": "twice the taste"}
MEMBERS = "reward_model_2", "reward_model_3"  # of the ensemble, beside the reward model
ENSEMBLES = "mean", "minimum"  # rewards that it has
JUDGE_EPOCHS = 2  # for each of the reward model's: a judge sees fewer pairs


def _first(profile: Profile, seed: int) -> bool:
    return seed == 0  # a demonstration: prompts are the luck that it knows


def _of_world(profile: Profile, seed: int) -> bool:
    # a control has to have its unbiased labels
    return seed == 0 and profile.data.source == "bundled"


def _attributed(profile: Profile, seed: int) -> bool:
    return profile.extras and _of_world(profile, seed)


def asks_ensemble(config: Any) -> bool:
    """Whether some settings name a reward of several reward models."""
    return bool({*ENSEMBLES} & {*re.split(r"[\s,*]+", getattr(config, "reward", ""))})


def _in_ensemble(profile: Profile, seed: int) -> bool:
    asked = any(map(asks_ensemble, (profile.ppo, profile.grpo, profile.dpo)))
    return asked or _attributed(profile, seed)


def _relabelled(of: str, labels: str) -> Record:
    """A method of seed 0, or its reward model, on the labels of an annotator of another taste."""
    record = CATALOGUE[of]
    return replace(
        record, name=f"{of}_{labels}", label=f"{record.label}, {LABELS[labels]}", pairs=labels,
        needs=record.needs and ("sft", f"reward_model_{labels}"), exists=_attributed,
        role="", notebook="", help="", coefficient="", tuned=(), held=None)  # fmt: skip


def _swept(profile: Profile, seed: int) -> bool:
    return seed == 0 and profile.extras and profile.sweep.stronger > 0


def _copies(settings: Mapping) -> int:
    """Frozen models beside a policy: the reward model, and the reference unless adapters go off."""
    return 1 if settings["model"]["lora_rank"] else 2


def _sweep(name: str, of: str, label: str, changes: Callable[[Profile], dict]) -> Record:
    """One more run of a method in seed 0, at another coefficient."""
    method = CATALOGUE[of]
    return replace(
        method, name=name, label=label, role="", variant_of=of, notebook="", help="", tuned=(),
        changes=lambda profile: method.changes(profile) | changes(profile), exists=_swept,
    )  # fmt: skip


def _times(of: str, factor: str) -> Callable[[Profile], dict]:
    """A method's own coefficient, times a factor of the sweep."""
    method, name = CATALOGUE[of], CATALOGUE[of].coefficient
    return lambda p: {name: getattr(p.sweep, factor) * getattr(method.config(p), name)}


add(
    Record(
        "dataset", "data",
        runs="rlhf_lib.study.training:dataset", sections=("data",), notebook="01_dataset",
        help="Load, clean, split and audit the preference pairs.",
    ),
    Record(
        "reward_model", "reward model", "#1f4e79",
        runs="rlhf_lib.study.training:reward_model", sections=("reward_model",),
        unread=("curve_points",), notebook="02_reward_model", help="Train the reward model.",
        held=lambda settings: (1, 0),
    ),
    Record(
        "reward_model_control", "reward model, unbiased labels",
        runs="rlhf_lib.study.training:reward_model", sections=("reward_model",),
        unread=("curve_points",), pairs="control", exists=_of_world, notebook="02_reward_model",
    ),
    Record(
        "reward_model_curve", "reward model, less data",
        runs="rlhf_lib.study.training:reward_model_curve", needs=("reward_model",),
        sections=("reward_model",), notebook="02_reward_model",
        exists=lambda profile, seed: seed == 0 and profile.reward_model.curve_points > 0,
    ),
    Record(
        "judge", "held-out judge",
        runs="rlhf_lib.study.training:reward_model", sections=("reward_model",),
        changes=lambda p: {"epochs": JUDGE_EPOCHS * p.reward_model.epochs},
        unread=("curve_points",), pairs="judge",
        exists=lambda profile, seed: profile.data.judge_pairs > 0,
    ),
    Record("base", "Base", "#707070", role="base"),
    Record(
        "sft", "SFT", "#4d4d4d",
        runs="rlhf_lib.methods.sft:train", sections=("sft",), notebook="03_sft",
        help="Supervised fine-tuning.", role="reference", held=lambda settings: (1, 0),
    ),
    Record("sft_again", "SFT again", role="null"),
    Record(
        "rejection_sft", "Best-of-n SFT", "#00808a",
        runs="rlhf_lib.study.training:rejection_sft", needs=TRAINED,
        sections=("rejection", "sft"), notebook="03_sft",
        help="SFT on the best of n samples, picked by the reward model.",
        role="baseline", samples=False, tuned=("rejection.learning_rate", "rejection.epochs"),
    ),
    Record(
        "ppo", "PPO", "#0072b2",
        runs="rlhf_lib.methods.ppo:train", needs=TRAINED, sections=("ppo",),
        unread=("low_kl_coef",), notebook="04_ppo",
        help="Train with PPO (SFT and reward model first, if missing).",
        role="method", coefficient="kl_coef", tuned=("ppo.kl_coef", "ppo.learning_rate"),
        held=lambda s: (1 + (s["ppo"]["value_model"] == "separate"), _copies(s)),
    ),
)  # fmt: skip
add(
    replace(
        CATALOGUE["ppo"], name="ppo_low_kl", label="PPO, weak penalty", color="#c24a00", help="",
        changes=lambda p: {"kl_coef": p.ppo.low_kl_coef}, role="variant", variant_of="ppo",
        exists=_first, held=None, tuned=(),
    ),
    Record(
        "grpo", "GRPO", "#1a7f37",
        runs="rlhf_lib.methods.grpo:train", needs=TRAINED, sections=("grpo",), notebook="05_grpo",
        help="Train with GRPO (SFT and reward model first, if missing).",
        role="method", coefficient="kl_reward_coef",
        tuned=("grpo.kl_reward_coef", "grpo.learning_rate"),
        held=lambda settings: (1, _copies(settings)),
    ),
    Record(
        "dpo", "DPO", "#aa4499",
        runs="rlhf_lib.methods.dpo:train", needs=TRAINED, sections=("dpo",), notebook="06_dpo",
        help="Train with DPO (SFT first, and the reward model that its probes are scored with).",
        role="method", rewarded=False, samples=False, coefficient="beta",
        tuned=("dpo.beta", "dpo.learning_rate"),
        held=lambda settings: (1, _copies(settings)),
    ),
)  # fmt: skip
add(
    _sweep("ppo_strong", "ppo", "PPO, strong penalty", _times("ppo", "stronger")),
    replace(
        # as in Ahmadian et al. 2024, arXiv:2402.14740: a step a batch, so that nothing is clipped,
        # and tokens summed, not averaged over each reply
        _sweep("rloo", "grpo", "RLOO", lambda p: {
            "advantage": "leave_one_out", "iterations": 1, "aggregation": "constant",
            "kl_reward_coef": p.sweep.rloo_kl_reward_coef,
            "learning_rate": p.sweep.rloo_learning_rate,
        }),
        tuned=("sweep.rloo_kl_reward_coef", "sweep.rloo_learning_rate"),
        color="#6f5499", variant_of="", held=None,
    ),
)  # fmt: skip
for _suffix, _factor, _word in (("weak", "weaker", "low"), ("strong", "stronger", "high")):
    add(
        _sweep(f"grpo_{_suffix}", "grpo", f"GRPO, {_suffix} penalty", _times("grpo", _factor)),
        _sweep(f"rloo_{_suffix}", "rloo", f"RLOO, {_suffix} penalty", _times("rloo", _factor)),
        _sweep(f"dpo_{_suffix}", "dpo", f"DPO, {_word} beta", _times("dpo", _factor)),
    )
add(_relabelled("reward_model", "half"), _relabelled("reward_model", "double"))
add(*(_relabelled(of, labels) for labels in LABELS for of in ("ppo", "dpo")))
# GRPO once more, with another reward: its name here, and the setting
REWARDED = {
    "gold": ("the gold reward itself", "gold"), "rule": ("brevity alone", "brevity"),
    "both": ("model and brevity", "model, brevity"), "mean": ("mean of three models", "mean"),
    "minimum": ("lowest of three models", "minimum"),
}  # fmt: skip
for _draw, _name in enumerate(MEMBERS, start=1):
    add(replace(
        CATALOGUE["reward_model"], name=_name, label=f"reward model, draw {_draw + 1}", draw=_draw,
        color=GREY, exists=_in_ensemble, notebook="", help="", held=None,
    ))  # fmt: skip
for _name, (_label, _reward) in REWARDED.items():
    add(replace(
        CATALOGUE["grpo"], name=f"grpo_{_name}", label=f"GRPO, {_label}", exists=_attributed,
        changes=lambda profile, reward=_reward: {"reward": reward},
        role="", notebook="", help="", coefficient="", tuned=(), held=None,
    ))  # fmt: skip
add(
    Record(
        "probes", "probes",
        runs="rlhf_lib.measure.probes:measure", needs=("policies", "reward_model"),
        sections=("evaluation",), notebook="07_evaluation",
        unread=("best_of_n", "best_of_n_prompts", *REPLIES, "heldout_texts", "bootstrap_samples"),
        files=("probes/world.jsonl", "probes/english.jsonl"),
        help="Ask every policy of one seed the probes in data/probes.",
    ),
    Record(
        "evaluate", "evaluation",
        runs="rlhf_lib.measure.evaluate:measure",
        needs=("policies", "reward_model", "reward_model_control", "judge"),
        sections=("evaluation",), unread=("bootstrap_samples", "probe_prompts", "probe_samples"),
        files=("heldout.jsonl.gz",), notebook="07_evaluation",
        help="Measure every policy of one seed on held-out prompts.",
    ),
    Record(
        "attribution", "attribution", runs="rlhf_lib.measure.attribution:measure",
        needs=("sft", "reward_model", "ppo", "dpo",
               *(f"{of}_{labels}" for labels in LABELS for of in ("ppo", "dpo"))),
        sections=("evaluation",), exists=_attributed, notebook="07_evaluation",
        unread=("best_of_n", "best_of_n_prompts", "samples_per_prompt", "baseline_samples",
                "heldout_texts", "bootstrap_samples", "probe_prompts", "probe_samples"),
    ),
    Record(
        "rewards_compared", "rewards compared", runs="rlhf_lib.measure.attribution:measure",
        needs=("sft", "reward_model", "grpo", *(f"grpo_{name}" for name in REWARDED)),
        sections=("evaluation",), exists=_attributed, notebook="05_grpo",
        unread=("best_of_n", "best_of_n_prompts", "samples_per_prompt", "baseline_samples",
                "heldout_texts", "bootstrap_samples", "probe_prompts", "probe_samples"),
    ),
    Record(
        "second_opinion", "second opinion",
        runs="rlhf_lib.measure.opinions:measure",
        needs=("evaluate", "reward_model"),  # and another seed's reward model
        sections=("evaluation",), exists=lambda profile, seed: profile.seeds > 1,
        unread=("temperature", "best_of_n", "best_of_n_prompts", *REPLIES, "heldout_texts",
                "bootstrap_samples", "probe_prompts", "probe_samples"),
    ),
    # ---- what is no stage and no policy, and yet has a name and perhaps a colour
    Record("best_of_n_default", "best-of-n", "#333333"),
    Record("best_of_n_control", "best-of-n, unbiased labels", "#5577a0"),
    Record("bag_of_words", "bag of words"),
    Record("longer_wins", "longer wins"),
    Record("learned_length", "length, direction learned"),
    Record("proxy", "proxy", "#1f4e79"),
    Record("gold", "gold reward", "#8a6a00"),
)  # fmt: skip

DPO = CATALOGUE["dpo"]
ONLINE_DPO = replace(DPO, label="Online DPO", rewarded=True, samples=True)  # with dpo.online
LIBRARY = frozenset(CATALOGUE)  # names that are taken
