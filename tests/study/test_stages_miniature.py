"""The whole study in miniature, run by its command: seven notebooks, one seed, and a report.

One more method takes part that lives outside the library: `reinforce.py` beside this file is
REINFORCE with a group mean. A setting names its record, a worker trains it, and tables, figures,
frontier, costs and verdict have it; nothing else was edited.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pandas as pd
import pytest

from rlhf_lib import catalogue, code_hash, runs
from rlhf_lib.__main__ import main
from rlhf_lib.profiles import of_settings
from rlhf_lib.results import verdict
from rlhf_lib.settings import as_dict
from rlhf_lib.show import costs, figures, tables
from rlhf_lib.study import stages

ROOT = Path(__file__).resolve().parents[2]
MADE_UP = Path(__file__).parents[1] / "made_up"
TOY = Path(__file__).parent / "reinforce.py"
METHOD = f"methods={TOY}:RECORD"


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "rlhf_lib", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        env=os.environ | {"RLHF_THREADS": "1"},
        capture_output=True,
        timeout=3000,
        check=False,
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The finished study, with two jobs side by side, and the output of its command."""
    root, known = tmp_path_factory.mktemp("runs"), dict(catalogue.CATALOGUE)
    settings = ["--set", METHOD, "--set", "jobs=2"]
    ran = command("run", "--profile", "smoke", *settings, "--run-dir", root)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (evaluation,) = (done.parent for done in (root / "smoke").glob("evaluation-*/DONE"))
    profile = catalogue.load("smoke", [METHOD, "jobs=2"])
    yield SimpleNamespace(
        profile=profile,
        root=root,
        folder=root / "smoke",
        notebooks=root / "smoke" / of_settings("notebooks", profile),
        report=root / "smoke" / of_settings("report", profile),
        told=ran.stdout.splitlines(),
        evaluation=evaluation,
        results=strict((evaluation / "results.json").read_text()),
        points=pd.read_csv(evaluation / "frontier.csv"),
    )
    catalogue.CATALOGUE.clear()
    catalogue.CATALOGUE.update(known)


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


def stage_names(study: Any) -> set[str]:
    return {record.name for record in catalogue.stages(study.profile)}


def without_it(names: Any) -> set[str]:
    return {name for name in names if "reinforce" not in name}


# ------------------------------------------------------------------------------ the whole of it


@pytest.mark.slow
def test_every_cell_of_every_notebook_is_executed(study: Any) -> None:
    names = list(catalogue.notebooks())
    assert sorted(path.stem for path in study.notebooks.iterdir()) == names
    for path in study.notebooks.iterdir():
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and cell.source.strip():
                assert cell.execution_count, f"{path.name}: a cell was not executed"
                assert not [o for o in cell.outputs if o.output_type == "error"], path.name


@pytest.mark.slow
def test_the_report_has_every_chapter_and_says_what_a_smoke_run_is(study: Any) -> None:
    page, pdf = study.report / "index.html", study.report / "report.pdf"
    assert study.told[-2:] == [f"report: {page}", f"report: {pdf}"]
    text = page.read_text(encoding="utf-8")
    assert "numbers mean nothing" in text
    assert all(f'id="nb-{name}"' in text for name in catalogue.notebooks())
    assert pdf.read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_results_have_the_shape_that_all_other_tests_stand_on(study: Any) -> None:
    results, made_up = study.results, json.loads((MADE_UP / "gold.json").read_text())
    assert results.keys() == made_up.keys()
    for section in ("policies", "comparisons", "overoptimisation", "best_of_n"):
        assert without_it(results[section]) == set(made_up[section]), section
    more_seeds = {"second_opinion"}  # the made-up study has three, this one has one
    assert set(results["cost"]) == stage_names(study) >= set(made_up["cost"]) - more_seeds
    for name in made_up["policies"]:
        assert results["policies"][name].keys() == made_up["policies"][name].keys(), name
    of_one_seed = made_up["reward_model"].keys() - {"disagreement"}
    assert results["reward_model"].keys() == of_one_seed
    assert results["settings"] == as_dict(study.profile)


@pytest.mark.slow
def test_every_stage_is_published_whole_and_none_is_run_again(study: Any) -> None:
    done = sorted(path for path in (study.folder / "seed-0").iterdir() if path.is_dir())
    assert {p.name.rsplit("-", 1)[0] for p in done} == {
        *stage_names(study),
        "ppo_shared",
        "ppo_entropy",
    }
    for path in done:
        files = {file.name for file in path.iterdir()}
        assert {"DONE", "config.json", "env.json", "result.json"} <= files
        strict((path / "result.json").read_text())
    assert not list(study.folder.rglob("*.partial"))

    def times() -> dict[Path, int]:
        asked = study.evaluation / "DONE"  # the newest: what was asked for last is reported
        found = (path for path in study.folder.glob("*-*/**/*") if path != asked)
        return {path: path.stat().st_mtime_ns for path in found}

    before = times()
    assert stages.summarise(study.profile, study.root) == study.evaluation
    assert times() == before


# ------------------------------------------------------------- a method from outside the library


@pytest.mark.slow
def test_it_was_trained_by_a_worker_and_answers_like_the_others(study: Any) -> None:
    assert any("reinforce" in line for line in study.told), "a job of its own"
    stage = stages.Study(runs.Run(study.profile, 0, study.root)).stage("reinforce")
    settings = study.profile.grpo
    replies = settings.updates * settings.prompts_per_update * settings.group_size
    assert stage.result()["samples"] == replies
    assert len(stage.metrics()) == settings.updates
    answered = study.results["policies"]["reinforce"]
    assert answered["gold"]["units"] == study.results["policies"]["grpo"]["gold"]["units"]
    assert answered["kl"]["mean"] > 0, "it is not SFT any more"


@pytest.mark.slow
def test_it_is_compared_with_every_other_method(study: Any) -> None:
    pairs = study.results["comparisons"]
    assert {"ppo_minus_reinforce", "grpo_minus_reinforce", "dpo_minus_reinforce"} <= set(pairs)
    assert "reinforce_minus_rejection_sft" in pairs
    said = " ".join(verdict.sentences(study.results))
    assert "REINFORCE" in said
    assert "three methods" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "table",
    [
        tables.comparison_table,
        tables.gain_table,
        tables.pair_table,
        tables.win_table,
        tables.distance_table,
        tables.reply_table,
        costs.need_table,
        costs.cost_table,
        costs.price_table,
    ],
)
def test_every_table_has_it(table: Any, study: Any) -> None:
    assert "REINFORCE" in table(study.results).to_string()


@pytest.mark.slow
def test_costs_know_what_it_holds(study: Any) -> None:
    assert costs.held(study.results["settings"])["reinforce"] == (1, 2)


@pytest.mark.slow
def test_it_is_drawn_in_its_own_colour(study: Any) -> None:
    assert catalogue.color("reinforce") == "#e377c2"
    (rows,) = [axis.get_yticklabels() for axis in figures.gains(study.results).axes[:1]]
    assert "REINFORCE" in [row.get_text() for row in rows]
    drawn = figures.frontier(study.points, study.results, "gold")
    assert "REINFORCE" in [text.get_text() for text in drawn.legends[0].get_texts()]


@pytest.mark.slow
def test_it_stands_on_the_frontier_with_the_way_there_and_in_the_report(study: Any) -> None:
    rows = study.points.query("policy == 'reinforce'")
    assert set(rows["kind"]) == {"final", "training"}
    page = (study.report / "index.html").read_text(encoding="utf-8")
    assert page.count("REINFORCE") > 9, "in tables, figures and sentences"


def test_its_hash_follows_its_source(tmp_path: Path) -> None:
    def stage_hash(text: str) -> str:
        (tmp_path / "reinforce.py").write_text(text)
        return code_hash.source_hash(str(tmp_path / "reinforce.py"), "rlhf_lib.methods.grpo")

    text = TOY.read_text()
    before = stage_hash(text)
    assert stage_hash(text.replace('"""REINFORCE with', '"""Plain REINFORCE with')) == before
    assert stage_hash(text.replace("groups.mean(1", "groups.median(1")) != before


# ------------------------------------------------------------------------------------- a failure


@pytest.mark.slow
def test_a_failing_notebook_ends_the_command_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("RLHF_BATCH", "RLHF_FOLDER"):  # a study sets them: put back after the test
        monkeypatch.setenv(name, "")
    missing = tmp_path / "no" / "pairs.jsonl"
    asked = ["run", "--profile", "smoke", "--only", "01_dataset", "--run-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["rlhf_lib", *asked, "--data", f"path:{missing}"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert f"error: whole study: 01_dataset failed: DataError: {missing} does not exist" in told
    assert "Traceback" not in told
    assert not list(tmp_path.glob("smoke/seed-*"))
