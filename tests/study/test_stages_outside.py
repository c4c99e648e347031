"""A method that lives outside the library stands in everything a study says, and nothing is edited.

`reinforce.py` beside this file is REINFORCE with a group mean. A setting names its record, two
workers train it among the others, and tables, figures, frontier, costs and verdict have it.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from rlhf_lib import catalogue
from rlhf_lib.results import verdict
from rlhf_lib.runs import Run
from rlhf_lib.show import figures, tables
from rlhf_lib.study import schedule
from rlhf_lib.study.schedule import Job
from rlhf_lib.study.stages import Study, summarise

TOY = Path(__file__).parent / "reinforce.py"
OVERRIDES = f"""
    methods={TOY}:RECORD sweep.stronger=0 reward_model.curve_points=0
    data.train_pairs=48 data.validation_pairs=16 data.test_pairs=32 data.demonstrations=64
    data.rl_prompts=32 data.evaluation_prompts=16 data.max_response_tokens=24
    rejection.prompts=16 rejection.samples=2 ppo.updates=1 grpo.updates=1 dpo.probes=1
    evaluation.best_of_n=2 evaluation.best_of_n_prompts=8 evaluation.heldout_texts=16
    evaluation.bootstrap_samples=50 evaluation.probe_prompts=2
""".split()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The stages of one seed, two of them by two workers, and what is said of all."""
    root, known = tmp_path_factory.mktemp("runs"), dict(catalogue.CATALOGUE)
    profile = catalogue.load("smoke", OVERRIDES)
    here = Study(Run(profile, 0, root))
    for record in catalogue.stages(profile):
        asked = record.role or record.name.startswith("reward_model")
        if asked and record.name not in ("grpo", "reinforce"):
            here.stage(record.name)
    jobs = [Job(name, 0, False, ()) for name in ("grpo", "reinforce")]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        schedule._run_jobs(pool, 2, jobs, "smoke", root, OVERRIDES)
    folder = summarise(profile, root)
    yield SimpleNamespace(
        profile=profile,
        root=root,
        results=json.loads((folder / "results.json").read_text()),
        points=pd.read_csv(folder / "frontier.csv"),
    )
    catalogue.CATALOGUE.clear()
    catalogue.CATALOGUE.update(known)


@pytest.mark.slow
def test_it_was_trained_by_a_worker_and_answers_like_the_others(study: Any) -> None:
    stage = Study(Run(study.profile, 0, study.root)).stage("reinforce")
    assert stage.result()["samples"] == 16
    assert len(stage.metrics()) == 1
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
        tables.need_table,
        tables.cost_table,
        tables.price_table,
    ],
)
def test_every_table_has_it(table: Any, study: Any) -> None:
    assert "REINFORCE" in table(study.results).to_string()


@pytest.mark.slow
def test_costs_know_what_it_holds(study: Any) -> None:
    assert tables.passes(study.results["settings"])["reinforce"].learnt == 1


@pytest.mark.slow
def test_it_is_drawn_in_its_own_colour(study: Any) -> None:
    assert catalogue.color("reinforce") == "#e377c2"
    (rows,) = [axis.get_yticklabels() for axis in figures.gains(study.results).axes[:1]]
    assert "REINFORCE" in [row.get_text() for row in rows]
    drawn = figures.frontier(study.points, "gold").axes[0]
    assert "REINFORCE" in [text.get_text() for text in drawn.texts]


@pytest.mark.slow
def test_it_stands_on_the_frontier_with_the_way_there(study: Any) -> None:
    rows = study.points.query("policy == 'reinforce'")
    assert set(rows["kind"]) == {"final", "training"}


@pytest.mark.slow
def test_its_hash_follows_its_source(study: Any, tmp_path: Path) -> None:
    def stage_hash(text: str) -> str:
        (tmp_path / "reinforce.py").write_text(text)
        record = catalogue.record("reinforce")
        from rlhf_lib import runs

        runs._read_source.cache_clear()
        return runs.source_hash(str(tmp_path / "reinforce.py"), record.module)

    text = TOY.read_text()
    before = stage_hash(text)
    assert stage_hash(text.replace('"""REINFORCE with', '"""Plain REINFORCE with')) == before
    assert stage_hash(text.replace("groups.mean(1", "groups.median(1")) != before
