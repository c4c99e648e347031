"""A matrix of trainings from one file: read strictly, resumed, told in one table and figure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pytest

from rlhf_lib.session import matrix
from rlhf_lib.settings import SettingsError, UserError

FILE = """
profile: smoke
methods: [ppo, dpo]
coefficients: [0.5, 1]
seeds: [0, 2]
set: {ppo: {updates: 2}, ppo.kl_coef: 0.4, dpo.beta: 0.1}
"""


def write(folder: Path, text: str) -> Path:
    (folder / "grid.yaml").write_text(text, encoding="utf-8")
    return folder / "grid.yaml"


def test_a_file_is_methods_times_coefficients_times_seeds(tmp_path: Path) -> None:
    found = matrix.read(write(tmp_path, FILE))
    assert found.profile.ppo.updates == 2
    assert list(found.cells()) == [
        ("ppo", 0.2, 0),
        ("ppo", 0.4, 0),
        ("dpo", 0.05, 0),
        ("dpo", 0.1, 0),
        ("ppo", 0.2, 2),
        ("ppo", 0.4, 2),
        ("dpo", 0.05, 2),
        ("dpo", 0.1, 2),
    ]


def test_values_of_each_method_its_own_and_all_by_default(tmp_path: Path) -> None:
    own = matrix.read(write(tmp_path, "profile: smoke\ncoefficients: {dpo: [0.3]}\nseeds: 2\n"))
    assert own.seeds == [0, 1]
    assert own.values == {"dpo": [0.3], "grpo": [0.2], "ppo": [0.8]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methodes: [ppo]", r"unknown key in .*grid\.yaml 'methodes': did you mean 'methods'"),
        ("methods: [pppo]", r"unknown method in .*grid\.yaml 'pppo': did you mean 'ppo'"),
        ("methods: [sft]", r"unknown method in .*grid\.yaml 'sft'"),
        ("coefficients: {gpro: [1]}", r"unknown method in .*grid\.yaml 'gpro'"),
        ("coefficients: [a]", r"grid\.yaml: coefficients: 'a' is no number from 0 on"),
        ("coefficients: [.nan]", r"coefficients: nan is no number from 0 on"),
        ("coefficients: [-1]", r"coefficients: -1 is no number from 0 on"),
        ("coefficients: '12'", r"coefficients: '12' is no list"),
        ("methods: 3", r"methods: 3 is no list"),
        ("methods:", r"methods: None is no list"),
        ("methods: [[ppo]]", r"unknown method in .*grid\.yaml \"\['ppo'\]\""),
        ("coefficients: []", r"asks for nothing"),
        ("seeds: 0", r"asks for nothing"),
        ("seeds: [-1]", r"SEED=-1"),
        ("seeds: two", r"SEED='two'"),
        ("set: 3", r"OVERRIDES=3 names no setting"),
        ("profile: smok", r"unknown profile 'smok'"),
        ("[1, 2]", r"has no keys"),
        ("a: [", r"is no YAML"),
        ("methods: [ppo]\nmethods: [dpo]", r"is no YAML: methods stands twice"),
        ("set: {ppo.updates: 2, ppo.updates: 3}", r"ppo\.updates stands twice"),
        ("set: &a [*a]", r"OVERRIDES holds itself"),
        ("set: {ppo: &a {kl_coef: *a}}", r"OVERRIDES holds itself"),
        ("set: 0", r"OVERRIDES=0 names no setting"),
        ("seeds: 300000000", r"grid\.yaml: seeds: more than 1000 are asked for"),
        ("seeds: '3'", r"grid\.yaml: seeds: SEED='3'"),
        ("seeds: [4294967296]", r"grid\.yaml: seeds: SEED=4294967296: .* below 2\*\*32"),
        (f"coefficients: [1{400 * '0'}]", r"coefficients: 1000+ is no number from 0 on"),
        ("set: {ppo.kl_coef: 4}\ncoefficients: [1.7e+308]", r"coefficients: inf is no number"),
        ("methods: [dpo]\ncoefficients: {ppo: [1]}", r"coefficients: ppo is not among its methods"),
        ("", r"has no keys"),
    ],
)
def test_a_file_that_asks_for_what_there_is_not(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        matrix.read(write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml: No such file"):
        matrix.read(tmp_path / "none.yaml")


def test_a_number_in_words_of_science_is_one(tmp_path: Path) -> None:
    text = "profile: smoke\nmethods: [dpo]\ncoefficients: {dpo: [1e-3, 2]}\n"
    assert matrix.read(write(tmp_path, text)).values == {"dpo": [0.001, 2.0]}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What has been trained; a trial's mean is its coefficient plus its seed."""
    calls: list[tuple] = []

    def score(study: tuple, method: str, values: Mapping[str, Any]) -> dict:
        ((setting, value),) = values.items()
        calls.append((method, setting, value, study[1]))
        mean = None if value > 10 else value + study[1]
        edges = {} if mean is None else {"low": mean - 0.1, "high": mean + 0.1}
        seed = {"seed": study[1], "rater": "gold"}
        return {"method": method, "values": dict(values), "mean": mean} | edges | seed

    @contextmanager
    def pool(profile: Any) -> Iterator[tuple]:
        with ThreadPoolExecutor(1) as threads:
            yield threads, 1

    monkeypatch.setattr(matrix, "try_values", score)
    monkeypatch.setattr(matrix, "train", lambda study, name: None)
    monkeypatch.setattr(matrix, "worker_pool", pool)
    return calls


def test_what_has_ended_is_kept_and_gone_on_from(trained: list, tmp_path: Path) -> None:
    path = write(tmp_path, FILE)
    folder = matrix.run(path, tmp_path)
    assert len(trained) == 8
    assert folder == tmp_path / "smoke" / f"matrix-grid-{matrix.read(path).shared}"
    names = {file.name for file in folder.iterdir()}
    assert names == {"trials.json", "table.csv", "figure.svg", "figure.png"}
    frame = pd.read_csv(folder / "table.csv")
    row = frame[(frame["method"] == "ppo") & (frame["value"] == 0.4)].iloc[0]
    assert (row["seeds"], row["mean"]) == (2, pytest.approx(1.4))
    assert row["low"] < 1.4 < row["high"]
    assert row["interval"] == "seeds"
    saved = json.loads((folder / "trials.json").read_text())
    (folder / "trials.json").write_text(json.dumps(saved | {"trials": saved["trials"][:5]}))
    trained.clear()
    matrix.run(path, tmp_path)
    assert len(trained) == 3, "killed after five"
    trained.clear()
    matrix.run(path, tmp_path)
    assert trained == []
    more = FILE.replace("[ppo, dpo]", "[ppo, dpo, grpo]").replace("[0, 2]", "[0, 2, 3]")
    assert matrix.run(write(tmp_path, more), tmp_path) == folder
    assert len(trained) == 3 * 2 * 3 - 8, "what is asked besides is added"
    other = matrix.run(write(tmp_path, FILE.replace("updates: 2", "updates: 3")), tmp_path)
    assert other != folder, "other settings have a folder of their own"
    budget = FILE.replace("updates: 2}", "updates: 2}, tuning.budget: 0.5")
    assert matrix.run(write(tmp_path, budget), tmp_path) not in (folder, other)


def test_a_cell_is_a_whole_training_and_counted_once(trained: list, tmp_path: Path) -> None:
    text = "profile: t4\nmethods: [dpo]\ncoefficients: [1, 1, 1.0]\nseeds: [0, 0]\n"
    found = matrix.read(write(tmp_path, text))
    assert found.profile.tuning.budget == 1
    assert list(found.cells()) == [("dpo", 0.1, 0)]
    pairs = "profile: smoke\nset: {data.source: path:x}\n"
    with pytest.raises(SettingsError, match=r"need a judge .* set data\.judge_pairs"):
        matrix.read(write(tmp_path, pairs))


def test_one_that_diverged_is_a_row_and_no_number(trained: list, tmp_path: Path) -> None:
    text = "profile: smoke\nmethods: [dpo, ppo]\nseeds: [0]\n"
    text += "coefficients: {dpo: [0.1, 20], ppo: [99]}\n"
    folder = matrix.run(write(tmp_path, text), tmp_path)
    frame = pd.read_csv(folder / "table.csv")
    assert frame["diverged"].tolist() == [0, 1, 1]
    assert frame["mean"].isna().tolist() == [False, True, True]
    assert frame["low"].isna().tolist() == [False, True, True]
    assert frame["interval"].iloc[0] == "prompts", "one seed's says nothing of others"


def test_results_are_delivered_to_an_address_and_found_there(trained: list, tmp_path: Path) -> None:
    path = write(tmp_path, FILE)
    address = "memory://results"
    folder = matrix.run(path, tmp_path / "one", address)
    system = fsspec.filesystem("memory")
    place = f"/results/{folder.name}"
    names = {name.rpartition("/")[2] for name in system.ls(place, detail=False)}
    assert {"trials.json", "table.csv", "figure.svg"} <= names
    trained.clear()
    matrix.run(path, tmp_path / "elsewhere", address)
    assert trained == [], "another machine goes on from what was delivered"
    system.rm(place, recursive=True)
    matrix.run(path, tmp_path / "one", address)
    assert system.exists(f"{place}/table.csv"), "what is done already is delivered as well"
    with pytest.raises(UserError, match=r"nowhere://x cannot be written"):
        matrix.run(path, tmp_path / "third", "nowhere://x")


def test_what_two_machines_deliver_in_turn_is_kept_of_both(trained: list, tmp_path: Path) -> None:
    path, address = write(tmp_path, FILE), "memory://both"
    folder = matrix.run(path, tmp_path / "one", address)
    whole = json.loads((folder / "trials.json").read_text())
    early = whole | {"trials": whole["trials"][:2]}  # killed after two, and run again much later
    (folder / "trials.json").write_text(json.dumps(early))
    trained.clear()
    matrix.run(path, tmp_path / "one", address)
    assert trained == [], "the other machine has trained the rest"
    system = fsspec.filesystem("memory")
    with system.open(f"/both/{folder.name}/trials.json") as file:
        assert json.load(file) == whole
    system.pipe_file(f"/both/{folder.name}/trials.json", b"{")
    with pytest.raises(SettingsError, match=r"memory://both/.*trials\.json is no file of trials"):
        matrix.run(path, tmp_path / "one", address)
