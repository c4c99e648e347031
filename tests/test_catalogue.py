"""The catalogue: what it lists for each profile, that its records lead somewhere, and additions."""

from __future__ import annotations

from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from rlhf_lib import catalogue
from rlhf_lib.catalogue import CATALOGUE, ROLES, Record
from rlhf_lib.profiles import PROFILES, load_profile
from rlhf_lib.records import MEMBERS
from rlhf_lib.runtime import bundled_folder
from rlhf_lib.settings import SettingsError, as_dict
from rlhf_lib.user_code import resolve
from rlhf_lib.world.rewards import DOSES

RECORDS = list(CATALOGUE.values())
STAGES = [record for record in RECORDS if record.runs]


def named(records: list[Record]) -> list[str]:
    return [record.name for record in records]


# ----------------------------------------------------------------------------- each record alone


@pytest.mark.parametrize("record", STAGES, ids=named(STAGES))
def test_what_runs_a_stage_is_there(record: Record) -> None:
    assert callable(resolve(record.runs))
    assert record.module == record.runs.split(":")[0]


@pytest.mark.parametrize("record", STAGES, ids=named(STAGES))
def test_a_stage_names_settings_files_and_pairs_that_exist(record: Record) -> None:
    profile = load_profile("smoke")
    settings = {name for section in record.sections for name in as_dict(getattr(profile, section))}
    assert set(record.unread) <= settings
    assert isinstance(record.config(profile), type(getattr(profile, record.sections[0])))
    assert record.coefficient in ("", *as_dict(record.config(profile)))
    assert all((bundled_folder() / name).is_file() for name in record.files)
    assert record.pairs in ("train", "judge", *DOSES)


def test_needs_are_stages_and_no_stage_waits_for_itself() -> None:
    named_needs = {need for record in RECORDS for need in record.needs} - {"policies"}
    assert named_needs <= set(named(STAGES))
    profile = load_profile("laptop", "data.judge_pairs=10")
    graph = {name: catalogue.needs(profile, name) for name in named(catalogue.stages(profile))}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("sft") < order.index("rejection_sft") < order.index("evaluate")
    assert graph.keys() == set(named(STAGES))


def test_roles_labels_and_notebooks() -> None:
    assert {record.role for record in RECORDS} == {"", *ROLES}
    assert len({record.label for record in RECORDS}) == len(RECORDS)
    assert all(record.name == name for name, record in CATALOGUE.items())
    for record in RECORDS:
        assert record.variant_of in ("", *CATALOGUE)
        assert not (record.notebook and not record.runs), "a notebook trains stages"
    coloured = [record.color for record in RECORDS if record.role not in ("", "null")]
    assert len(set(coloured)) == len(coloured), "two policies cannot be told apart"


# ------------------------------------------------------------------------ what there is in a study

TRAINED = ["sft", "rejection_sft", "ppo", "ppo_low_kl", "grpo", "dpo"]
COMPARED = [name for name in TRAINED if name != "ppo_low_kl"]  # a demonstration of one seed
SWEEP = ["ppo_strong", "rloo"]
SWEEP += [f"{name}_{how}" for how in ("weak", "strong") for name in ("grpo", "rloo", "dpo")]
WORLD = ["dataset", "reward_model", "reward_model_control"]
REAL = ["dataset", "reward_model", "reward_model_curve", "judge"]
ASKED = ["probes", "evaluate"]
TASTES = ["reward_model_half", "reward_model_double"]
UNBIASED = ["ppo_control", "dpo_control", "ppo_half", "dpo_half", "ppo_double", "dpo_double"]
REWARDED = ["grpo_gold", "grpo_rule", "grpo_both", "grpo_mean", "grpo_minimum"]
LONE = [
    "reward_model_curve", *TRAINED, *SWEEP, *TASTES, *UNBIASED, *MEMBERS, *REWARDED, *ASKED,
    "attribution", "rewards_compared",
]  # fmt: skip


@pytest.mark.parametrize(
    ("profile", "seed", "names"),
    [
        ("laptop", 0, [*WORLD, *LONE, "second_opinion"]),
        ("laptop", 1, ["dataset", "reward_model", *COMPARED, *ASKED, "second_opinion"]),
        ("smoke", 0, [*WORLD, *LONE]),
        ("offline", 0, [*REAL, *TRAINED, *ASKED]),
    ],
)
def test_the_stages_of_a_seed(profile: str, seed: int, names: list[str]) -> None:
    assert named(catalogue.stages(load_profile(profile), seed)) == names


@pytest.mark.parametrize(
    ("profile", "measured"),
    [
        ("laptop", ["reward_model", "reward_model_control"]),
        ("smoke", ["reward_model", "reward_model_control"]),
        ("offline", ["reward_model", "judge"]),
    ],
)
def test_what_each_stage_needs(profile: str, measured: list[str]) -> None:
    chosen = load_profile(profile)
    trained_from = ["sft", "reward_model"]
    expected = {
        "reward_model_curve": ["reward_model"],
        **dict.fromkeys([*TRAINED, *SWEEP], trained_from),
        "sft": [],
        "probes": [*TRAINED, "reward_model"],
        "evaluate": [*TRAINED, *measured],
        "second_opinion": ["evaluate", "reward_model"],
        **{name: ["sft", f"reward_model_{name[4:]}"] for name in UNBIASED},
        "attribution": ["sft", "reward_model", "ppo", "dpo", *UNBIASED],
        **dict.fromkeys(REWARDED[:3], trained_from),
        **{name: [*trained_from, *MEMBERS] for name in REWARDED[3:]},
        "rewards_compared": ["sft", "reward_model", "grpo", *REWARDED],
    }
    for seed in (0, 1):
        present = named(catalogue.stages(chosen, seed))
        for name in present:
            needs = [need for need in expected.get(name, []) if need in present]
            assert catalogue.needs(chosen, name, seed) == needs, name
    for name in named(catalogue.stages(chosen)):
        if name not in present:  # asked for all the same, it reads what it would in the first seed
            assert catalogue.needs(chosen, name, 1) == expected.get(name, []), name


@pytest.mark.parametrize("profile", PROFILES)
def test_every_stage_comes_after_what_it_needs(profile: str) -> None:
    chosen, seen = load_profile(profile), set()
    for name in named(catalogue.stages(chosen)):
        assert set(catalogue.needs(chosen, name)) <= seen
        seen.add(name)


def test_what_each_notebook_trains() -> None:
    assert list(catalogue.notebooks().items()) == [
        ("01_dataset", ["dataset"]),
        ("02_reward_model", ["reward_model", "reward_model_control", "reward_model_curve"]),
        ("03_sft", ["sft", "rejection_sft"]),
        ("04_ppo", ["ppo", "ppo_low_kl"]),
        ("05_grpo", ["grpo", "rewards_compared"]),
        ("06_dpo", ["dpo"]),
        ("07_evaluation", ["probes", "evaluate", "attribution"]),
    ]


def test_policies_and_what_they_are_compared_as() -> None:
    table = ["base", "sft", "rejection_sft", "ppo", "grpo", "dpo", "ppo_low_kl"]
    assert catalogue.policies() == table
    assert catalogue.policies("null") == ["sft_again"]
    assert catalogue.policies("variant", "base") == ["base", "ppo_low_kl"]
    assert catalogue.trained() == TRAINED
    assert catalogue.methods() == ["ppo", "grpo", "dpo"]
    assert catalogue.candidates() == ["ppo", "grpo", "dpo", "rejection_sft"]
    assert catalogue.baseline() == "rejection_sft"


def test_the_coefficient_of_a_method_and_of_its_further_runs() -> None:
    settings = {"ppo": "kl_coef", "grpo": "kl_reward_coef", "rloo": "kl_reward_coef", "dpo": "beta"}
    found = catalogue.coefficients()
    assert found.keys() == {"ppo", "ppo_low_kl", "grpo", "dpo", *SWEEP}
    for name, setting in found.items():
        assert setting == settings[name.partition("_")[0]]


def test_a_name_that_no_record_has() -> None:
    assert (catalogue.label("mystery"), catalogue.color("mystery")) == ("mystery", catalogue.GREY)
    assert (catalogue.label("dpo"), catalogue.color("dpo")) == ("DPO", "#aa4499")
    with pytest.raises(SettingsError, match="unknown name 'pppo': did you mean 'ppo'"):
        catalogue.record("pppo")


# ------------------------------------------------------------------------------- records of others

TOY = """
from dataclasses import replace
from rlhf_lib.catalogue import record
TOY = replace(record("grpo"), name="toy", label="Toy", notebook="")
NOTHING = "toy"
"""


@pytest.fixture
def toy_folder(user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of records; what enters the catalogue is gone after the test."""
    monkeypatch.setattr(catalogue, "CATALOGUE", dict(CATALOGUE))
    (user_folder / "toy_records.py").write_text(TOY)
    return user_folder


def test_a_record_that_the_settings_name_is_a_stage_and_a_method(toy_folder: Path) -> None:
    profile = catalogue.load("smoke", [f"methods={toy_folder}/toy_records.py:TOY, "])
    names = named(catalogue.stages(profile))
    assert catalogue.methods() == ["ppo", "grpo", "dpo", "toy"]
    assert catalogue.label("toy") == "Toy"
    assert "toy" in catalogue.needs(profile, "evaluate")
    assert names.index("sft") < names.index("toy") < names.index("probes")
    assert [name for name in names if name != "toy"] == named(
        [record for record in STAGES if record.exists(profile, 0)]
    ), "the others stay in their order"


def test_records_of_an_earlier_profile_leave(toy_folder: Path) -> None:
    catalogue.load("smoke", [f"methods={toy_folder}/toy_records.py:TOY"])
    assert "toy" in catalogue.CATALOGUE
    catalogue.load("smoke")
    assert list(catalogue.CATALOGUE) == list(CATALOGUE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("name='ppo'", "there is a record 'ppo' already"),
        ("name='a/b'", "record 'a/b': a name has letters, digits and _ alone"),
        ("name='../../evil'", "a name has letters"),
        ("name=''", "a name has letters"),
        ("role='metod'", "unknown role 'metod': did you mean 'method'"),
        ("pairs='jugde'", "unknown pairs 'jugde': did you mean 'judge'"),
        ("needs=('stf', 'reward_model')", "unknown needs 'stf': did you mean 'sft'"),
        ("needs='sft'", "needs is 'sft', not a tuple of names"),
        ("sections=('grpoo',)", "unknown sections 'grpoo': did you mean 'grpo'"),
        ("variant_of='gpro'", "unknown variant_of 'gpro': did you mean 'grpo'"),
        ("runs='somewhere'", "runs='somewhere' is no module:function"),
        ("name='a_minus_b'", "names may not have _minus_"),
        ("label='A, B'", "nor labels \\('A, B'\\) a comma"),
        ("color='pinkish'", "color='pinkish' is no color"),
        ("notebook='08_mine'", "unknown notebook '08_mine': did you mean"),
        ("exists='yes'", "exists is no function"),
        ("role='variant', exists=lambda p, s: s == 1", r"in seeds \[1\] of 3; .* be the first"),
        ("role='', exists=lambda p, s: s != 1", r"in seeds \[0, 2\] of 3; .* be the first"),
        ("exists=lambda p, s: s == 0", r"in seeds \[0\] of 3; what is compared has to be in all"),
        ("sections=('grpo',), changes=lambda p: {'updats': 3}", "TypeError: .*'updats'"),
        ("sections=('grpo',), coefficient='kl_ceof'", "unknown setting 'kl_ceof': did you mean"),
        ("sections=('grpo',), unread=('betta',)", "unknown setting 'betta': did you mean"),
        ("tuned=('grpo.learning_rat',)", "unknown tuned 'grpo.learning_rat': did you mean"),
        ("needs=('toy',)", "can never be run: .*toy needs toy"),
        ("needs=('policies',)", "can never be run: .*toy needs toy"),
    ],
)
def test_a_record_that_could_mean_nothing_is_refused(
    toy_folder: Path, changes: str, message: str
) -> None:
    (toy_folder / "odd_records.py").write_text(f"{TOY}\nODD = replace(TOY, {changes})\n")
    with pytest.raises(SettingsError, match=message):
        catalogue.load("smoke", ["seeds=3", f"methods={toy_folder}/odd_records.py:ODD"])


@pytest.mark.parametrize("changes", ["role='variant', exists=lambda p, s: s < 2", "exists=never"])
def test_a_record_may_be_of_the_first_seeds_or_of_none(toy_folder: Path, changes: str) -> None:
    text = f"{TOY}\ndef never(p, s):\n    return False\n\nODD = replace(TOY, {changes})\n"
    (toy_folder / "odd_records.py").write_text(text)
    catalogue.load("smoke", ["seeds=3", f"methods={toy_folder}/odd_records.py:ODD"])
    assert "toy" in catalogue.CATALOGUE


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            "toy_records.py:NOTHING",
            "toy_records.py:NOTHING: it is no rlhf_lib.catalogue.Record",
        ),
        ("toy_records.py:TOI", "has no attribute 'TOI'"),
        ("toy_record.py:TOY", "there is no file"),
        ("toy_records.py", "name it as package.module:name or FILE.py:name"),
    ],
)
def test_a_method_that_is_no_record(toy_folder: Path, methods: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        catalogue.load("smoke", [f"methods={toy_folder}/{methods}"])
    assert catalogue.CATALOGUE == CATALOGUE


def brightness(colour: str) -> float:
    """Relative luminance (WCAG 2.1)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_names_in_colour_can_be_read_on_white_and_one_colour_has_one_meaning() -> None:
    drawn = {r.name: r.color for r in catalogue.CATALOGUE.values() if r.color != catalogue.GREY}
    for name, colour in [*drawn.items(), ("grey", catalogue.GREY)]:
        assert 1.05 / (brightness(colour) + 0.05) >= 4.5, name
    policies = [drawn[name] for name in ("base", "sft", *catalogue.trained()) if name in drawn]
    assert len(set(policies)) == len(set(catalogue.trained()) & set(drawn) | {"base", "sft"})
    assert drawn["proxy"] == drawn["reward_model"], "the proxy is what the reward model says"
    assert drawn["proxy"] != drawn["gold"]
    red, green, blue = (int(drawn["gold"][i : i + 2], 16) for i in (1, 3, 5))
    assert red > green > blue, "gold is drawn gold"
