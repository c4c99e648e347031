"""Profiles and overrides, and errors that name the way out."""

from __future__ import annotations

import pytest

from rlhf_lib import catalogue
from rlhf_lib.profiles import PROFILES, Overrides, as_overrides, load_profile
from rlhf_lib.settings import SettingsError, as_dict, content_hash


def test_profiles_are_complete_and_differ() -> None:
    assert set(PROFILES) == {"smoke", "laptop", "offline", "t4", "full"}
    profiles = [load_profile(name) for name in PROFILES]
    assert [profile.name for profile in profiles] == list(PROFILES)
    assert len({content_hash(as_dict(p)) for p in profiles}) == len(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_methods_have_equal_budgets(name: str) -> None:
    """Trap 27: as many replies are sampled and scored for each; DPO learns from about as many."""
    profile = load_profile(name)
    sampled = {
        "ppo": profile.ppo.updates * profile.ppo.batch_size,
        "grpo": profile.grpo.updates * profile.grpo.prompts_per_update * profile.grpo.group_size,
        "rejection": profile.rejection.prompts * profile.rejection.samples,
    }
    assert len(set(sampled.values())) == 1, sampled
    rloo = catalogue.record("rloo").config(profile)
    assert rloo.updates * rloo.prompts_per_update * rloo.group_size == sampled["ppo"]
    assert (rloo.advantage, rloo.aggregation, rloo.iterations) == ("leave_one_out", "constant", 1)
    if name == "laptop":
        learnt = 2 * profile.dpo.epochs * profile.data.train_pairs
        assert learnt == pytest.approx(profile.ppo.epochs * sampled["ppo"], rel=0.05)


def test_every_profile_can_be_run_as_it_is() -> None:
    for profile in map(load_profile, PROFILES):
        assert profile.data.rl_prompts >= profile.ppo.batch_size
        assert profile.data.rl_prompts >= profile.grpo.prompts_per_update
        assert profile.data.demonstrations >= profile.sft.batch_size
        assert profile.data.train_pairs >= profile.dpo.batch_size
        assert profile.data.evaluation_prompts >= profile.evaluation.best_of_n_prompts


def test_no_overrides_change_nothing() -> None:
    assert load_profile("laptop") == load_profile("laptop", "") == load_profile("laptop", [])


def test_overrides_as_one_string_or_as_several() -> None:
    untouched = load_profile("laptop").ppo.kl_coef
    assert untouched != 0.02
    text = load_profile("laptop", "ppo.kl_coef=0.02 sft.epochs=7 seeds=2")
    assert (text.ppo.kl_coef, text.sft.epochs, text.seeds) == (0.02, 7, 2)
    assert load_profile("laptop", ["ppo.kl_coef=0.02", "sft.epochs=7", "seeds=2"]) == text
    assert load_profile("laptop").ppo.kl_coef == untouched, "the profile itself was changed"


def test_the_last_override_wins() -> None:
    assert load_profile("laptop", "seeds=2 seeds=5").seeds == 5


def test_values_take_the_type_of_their_setting() -> None:
    text = "grpo.mask_overlong=true ppo.kl_coef=1 'data.source=path:a b'"
    profile = load_profile("laptop", text)
    assert profile.grpo.mask_overlong is True
    assert isinstance(profile.ppo.kl_coef, float)
    assert profile.data.source == "path:a b"
    for text, value in (("1", True), ("0", False), ("False", False), ("TRUE", True)):
        assert load_profile("t4", f"grpo.mask_overlong={text}").grpo.mask_overlong is value


@pytest.mark.parametrize("path", ["ppo.kl_coef", "model.name", "dpo.beta", "checkpoint_minutes"])
def test_any_setting_can_be_overridden(path: str) -> None:
    section, _, key = path.partition(".")
    changed = getattr(load_profile("smoke", f"{path}=9"), section)
    assert str(getattr(changed, key) if key else changed) in ("9", "9.0")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("ppo.kl_coeff=1", "ppo.kl_coef"),
        ("ppo.klcoef=1", "ppo.kl_coef"),
        ("pppo.kl_coef=1", "ppo.kl_coef"),
        ("grpo.groupsize=4", "grpo.group_size"),
        ("rewardmodel.epochs=1", "reward_model.epochs"),
        ("seed=1", "seeds"),
        ("seeds.count=1", "seeds"),
        ("dpo=1", "dpo.loss"),
        ("checkpoint_minute=1", "checkpoint_minutes"),
    ],
)
def test_an_unknown_setting_names_the_nearest(override: str, nearest: str) -> None:
    path = override.partition("=")[0]
    with pytest.raises(SettingsError) as error:
        load_profile("laptop", override)
    assert f"unknown setting {path!r}: did you mean {nearest!r}?" in str(error.value)


def test_a_setting_with_a_few_values_names_the_nearest() -> None:
    assert load_profile("smoke", "grpo.scale=none").grpo.scale == "none"
    message = r"unknown grpo.scale = 'groups': did you mean 'group'\? Known: batch, group, none"
    with pytest.raises(SettingsError, match=message):
        load_profile("smoke", "grpo.scale=groups")


def test_the_name_of_a_profile_is_no_setting() -> None:
    with pytest.raises(SettingsError, match="unknown setting 'name'"):
        load_profile("laptop", "name=mine")


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"unknown profile 'labtop': did you mean 'laptop'\?"):
        load_profile("labtop")


def test_an_override_without_equals_sign() -> None:
    with pytest.raises(SettingsError, match=r"'ppo.kl_coef' has no '=': write it like ppo.kl_coef"):
        load_profile("laptop", "ppo.kl_coef")


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("sft.epochs=1.5", "int"),
        ("sft.epochs=", "int"),
        ("ppo.kl_coef=much", "float"),
        ("grpo.mask_overlong=maybe", "bool"),
        ("checkpoint_minutes=soon", "float"),
    ],
)
def test_a_value_of_the_wrong_type(override: str, kind: str) -> None:
    path, _, value = override.partition("=")
    with pytest.raises(SettingsError, match=f"^{path}='{value}': expected a value of type {kind}$"):
        load_profile("laptop", override)


@pytest.mark.parametrize(
    "given",
    [
        "ppo.kl_coef=0.5 model.gradient_checkpointing=true data.source='path:a b'",
        ["ppo.kl_coef=0.5", "model.gradient_checkpointing=true", "data.source=path:a b"],
        {"ppo.kl_coef": 0.5, "model.gradient_checkpointing": True, "data.source": "path:a b"},
        {
            "ppo": {"kl_coef": 0.5},
            "model": {"gradient_checkpointing": True},
            "data": {"source": "path:a b"},
        },
        [{"ppo.kl_coef": 0.5}, "model.gradient_checkpointing=true", {"data.source": "path:a b"}],
    ],
)
def test_a_string_a_list_and_a_mapping_say_the_same(given: Overrides) -> None:
    """YAML has lists and mappings: `papermill -y` and `-f` hand them over as they are."""
    profile = load_profile("smoke", given)
    assert profile.ppo.kl_coef == 0.5
    assert profile.model.gradient_checkpointing is True
    assert profile.data.source == "path:a b"
    assert load_profile("smoke", as_overrides(given)) == profile
