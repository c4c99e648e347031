"""Profiles: full sets of settings by name, and how one setting of them is overridden.

The same way everywhere: `--set ppo.kl_coef=0.02` on the command line, the `OVERRIDES` of a
notebook, or `papermill -p OVERRIDES "ppo.kl_coef=0.02"`; there a list or a mapping does as well.
"""

from __future__ import annotations

import dataclasses
import shlex
import typing
from collections.abc import Mapping, Sequence
from numbers import Integral

from rlhf_lib import trackers
from rlhf_lib.settings import Profile, SettingsError, as_dict, content_hash, deciding, unknown

# A profile is what it changes of the defaults, in the words of any other override. In each of them
# PPO, GRPO and best-of-n SFT sample the same number of replies.
REAL_PAIRS = """
    data.max_prompt_tokens=192 data.max_response_tokens=64
    reward_model.epochs=1 reward_model.learning_rate=2e-5 reward_model.weight_decay=0.01
    sft.epochs=1 sft.batch_size=32 sft.learning_rate=2e-5
    rejection.epochs=1 rejection.learning_rate=1e-5
    ppo.learning_rate=1e-5 ppo.value_learning_rate=1e-5 ppo.kl_coef=0.05 ppo.low_kl_coef=0
    grpo.learning_rate=1e-5 grpo.kl_reward_coef=0.05
    sweep.rloo_learning_rate=1e-5 sweep.rloo_kl_reward_coef=0.05
    tuning.trials=4 tuning.budget=0.5 dpo.epochs=1 dpo.batch_size=32 dpo.learning_rate=5e-6
"""
# the best that `python -m rlhf_lib tune` found for the bundled world: figures/tuning/laptop.json
TUNED = """
    rejection.learning_rate=0.0016 rejection.epochs=8 ppo.kl_coef=0.8 ppo.learning_rate=0.00016
    grpo.kl_reward_coef=0.2 grpo.learning_rate=0.0002
    dpo.beta=0.025 dpo.learning_rate=0.0001
    sweep.rloo_kl_reward_coef=0.2 sweep.rloo_learning_rate=0.0001
"""
PROFILES = {
    # a slice of everything, to see that it works
    "smoke": f"""{TUNED}
        threads=1 model.precision=fp32
        data.train_pairs=128 data.validation_pairs=64 data.test_pairs=128
        data.demonstrations=256 data.rl_prompts=128 data.evaluation_prompts=32
        reward_model.epochs=1 reward_model.curve_points=2 sft.epochs=1
        rejection.prompts=24 rejection.samples=4 rejection.epochs=1 tuning.trials=2
        ppo.updates=3 ppo.batch_size=32 ppo.minibatch_size=16
        grpo.updates=3 grpo.prompts_per_update=8 grpo.group_size=4
        dpo.epochs=1 dpo.probes=2 dpo.probe_prompts=16
        evaluation.best_of_n=8 evaluation.best_of_n_prompts=32 evaluation.heldout_texts=64
        evaluation.bootstrap_samples=200 evaluation.probe_prompts=8 evaluation.probe_samples=1
    """,
    # the tiny model's matrices are too small for two threads, or for bf16, to pay
    "laptop": f"{TUNED} seeds=5 jobs=3 threads=1 model.precision=fp32",
    "offline": f"""{REAL_PAIRS}
        data.source=path:pairs.jsonl.gz data.template=hh
        model.name=smollm2-135m sweep.stronger=0
        data.max_prompt_tokens=128 data.train_pairs=1000 data.validation_pairs=100
        data.test_pairs=500 data.demonstrations=1000 data.rl_prompts=1000
        data.evaluation_prompts=48 data.judge_pairs=600
        reward_model.batch_size=16 reward_model.curve_points=1 sft.micro_batch_size=8
        rejection.prompts=32
        ppo.updates=8 ppo.batch_size=32 ppo.minibatch_size=16 ppo.micro_batch_size=8
        grpo.updates=8 grpo.prompts_per_update=4 grpo.group_size=8 grpo.micro_batch_size=8
        dpo.probes=4 dpo.probe_prompts=16
        evaluation.batch_size=16 evaluation.best_of_n=8 evaluation.best_of_n_prompts=24
        evaluation.heldout_texts=96 evaluation.probe_prompts=12 evaluation.probe_samples=1
    """,
    "t4": f"""{REAL_PAIRS}
        data.source=hub:Anthropic/hh-rlhf model.name=gpt2 sweep.stronger=0
        data.train_pairs=10000 data.test_pairs=2000 data.demonstrations=10000
        data.evaluation_prompts=128 data.judge_pairs=10000
        reward_model.micro_batch_size=16 dpo.micro_batch_size=16
        ppo.updates=60 ppo.minibatch_size=32 grpo.updates=60 rejection.prompts=960
        evaluation.best_of_n=16 evaluation.best_of_n_prompts=64 evaluation.batch_size=64
    """,
    "full": f"""{REAL_PAIRS}
        data.source=hub:Anthropic/hh-rlhf model.name=gpt2 rejection.prompts=2400
        data.train_pairs=120000 data.validation_pairs=1000 data.test_pairs=8000
        data.demonstrations=120000 data.rl_prompts=50000 data.judge_pairs=40000
        ppo.updates=150 ppo.micro_batch_size=64 grpo.updates=150 grpo.micro_batch_size=64
    """,
}


Overrides = str | Sequence[str] | Mapping[str, typing.Any]


def load_profile(name: str, overrides: Overrides = ()) -> Profile:
    """The profile `name` with overrides applied.

    Raises SettingsError for an unknown profile, section, setting, a value of the wrong type, or a
    tracker that is not installed.
    """
    if not isinstance(name, str) or name not in PROFILES:
        raise unknown("profile", str(name), PROFILES)
    profile = Profile(name)
    for item in (*PROFILES[name].split(), *as_overrides(overrides)):
        profile = _override(profile, item)
    trackers.check(profile.tracker)
    return profile


def as_overrides(given: Overrides) -> list[str]:
    """Overrides in one form, strings like `ppo.kl_coef=0.02`.

    `given`: such strings, one string of them separated by spaces, or a mapping, `{"ppo.kl_coef":
    0.02}` or `{"ppo": {"kl_coef": 0.02}}`. Raises SettingsError for anything else.
    """
    if isinstance(given, str):
        try:
            return shlex.split(given)
        except ValueError as error:
            raise SettingsError(f"OVERRIDES={given!r}: {error}") from error
    try:
        if isinstance(given, Mapping):
            return [f"{path}={_text(path, value)}" for path, value in _flat(given)]
        if isinstance(given, Sequence):
            return [item for part in given for item in (_parts(part))]
    except RecursionError:
        raise SettingsError("OVERRIDES holds itself: write ppo.kl_coef=0.02") from None
    raise SettingsError(
        f"OVERRIDES={given!r} names no setting: write ppo.kl_coef=0.02, a list of such strings, or "
        "a mapping of settings to values"
    )


def _parts(part: typing.Any) -> list[str]:
    """Of a list of overrides: a string is one, as a shell hands it over; a mapping may be many."""
    return [part] if isinstance(part, str) else as_overrides(part)


def _flat(given: Mapping, above: str = "") -> typing.Iterator[tuple[str, typing.Any]]:
    for key, value in given.items():
        path = f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def _text(path: str, value: typing.Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise SettingsError(f"{path}={value!r}: a setting is one number, word, or true or false")


def check_seed(seed: typing.Any) -> int:
    """Raises SettingsError for what is no whole number from 0 on, of 32 bits."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**32:
        raise SettingsError(f"SEED={seed!r}: a seed is a whole number, 0 or above, below 2**32")
    return int(seed)


def _override(profile: Profile, item: str) -> Profile:
    path, equals, text = item.partition("=")
    if not equals:
        raise SettingsError(f"override {item!r} has no '=': write it like ppo.kl_coef=0.02")
    known = paths()
    if path.strip() not in known:
        raise unknown("setting", path, known)
    value = _parse(known[path.strip()], path, text)
    section, _, key = path.strip().rpartition(".")
    if not section:
        return dataclasses.replace(profile, **{key: value})
    changed = dataclasses.replace(getattr(profile, section), **{key: value})
    return dataclasses.replace(profile, **{section: changed})


def paths() -> dict[str, typing.Any]:
    """Every setting, as `section.key`, and its type."""
    found: dict[str, typing.Any] = {}
    for name, kind in typing.get_type_hints(Profile).items():
        if dataclasses.is_dataclass(kind):
            kinds = typing.get_type_hints(kind)
            found |= {f"{name}.{f.name}": kinds[f.name] for f in dataclasses.fields(kind)}
        elif name != "name":
            found[name] = kind
    return found


def _parse(kind: typing.Any, path: str, text: str) -> object:
    if typing.get_origin(kind) is typing.Literal:
        if text.strip() not in typing.get_args(kind):
            raise unknown(f"{path} =", text.strip(), typing.get_args(kind))
        return text.strip()
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        return kind(text.strip())
    except (KeyError, ValueError):
        raise SettingsError(f"{path}={text!r}: expected a value of type {kind.__name__}") from None


def of_settings(name: str, profile: Profile) -> str:
    """`name`, with a hash behind it where settings are not the profile's own."""
    mine, own = (deciding(as_dict(p)) for p in (profile, load_profile(profile.name)))
    return name if mine == own else f"{name}-{content_hash(mine)[:8]}"
