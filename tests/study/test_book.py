"""The report's own pages, and the exported figures: the newest results, and nothing private."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

from rlhf_lib import __version__, catalogue
from rlhf_lib.profiles import load_profile
from rlhf_lib.report.exporters import merge
from rlhf_lib.results import summary
from rlhf_lib.results.summary import load_results
from rlhf_lib.runs import Run
from rlhf_lib.settings import Profile, SettingsError, as_dict
from rlhf_lib.study import book
from rlhf_lib.study.stages import StudyError, notebook_path
from tests.made_up_study import preference_data, stages_of

MADE_UP = Path(__file__).parents[1] / "made_up"


def made_up(kind: str) -> dict:
    return json.loads((MADE_UP / f"{kind}.json").read_text())


def publish(
    run_dir: Path,
    kind: str = "gold",
    profile: str = "laptop",
    name: str = "abc",
    age: float = 0.0,
    settings: Profile | None = None,
) -> dict:
    """A finished evaluation with made-up results."""
    results = made_up(kind) | {"settings": as_dict(settings or load_profile(profile))}
    folder = run_dir / profile / f"evaluation-{name}"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results | {"evaluation": name}))
    points = [
        {"seed": 0, "policy": p, "kind": k, "step": 1, "kl": 1.0, "proxy": 0.5, "gold": 0.4}
        for p, k in (("sft", "final"), ("ppo", "training"), ("best_of_n_default", "best_of_n"))
    ]
    pd.DataFrame(points).to_csv(folder / "frontier.csv", index=False)
    (folder / "DONE").write_text("done\n")
    os.utime(folder / "DONE", (1e9 - age, 1e9 - age))
    return results


def executed(run_dir: Path, profile: str, settings: Profile | None = None, mark: str = "") -> None:
    for name in catalogue.notebooks():
        folder = notebook_path(settings or load_profile(profile), run_dir, name).parent
        folder.mkdir(parents=True, exist_ok=True)
        cells = [nbformat.v4.new_markdown_cell(f"# Chapter {name}\n\n{mark}")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")


def content(page: nbformat.NotebookNode) -> str:
    """All that a page shows, as text."""
    outputs = [output for cell in page.cells for output in cell.get("outputs", [])]
    return "\n".join(output["data"]["text/plain"] for output in outputs)


def test_the_newest_finished_evaluation_counts(tmp_path: Path) -> None:
    publish(tmp_path, name="old", age=100)
    publish(tmp_path, name="new", age=10)
    publish(tmp_path, name="unfinished")
    (tmp_path / "laptop" / "evaluation-unfinished" / "DONE").unlink()
    folder = book.evaluation_folder(load_profile("laptop"), tmp_path)
    assert load_results(folder)["evaluation"] == "new"


def test_what_was_just_summarised_is_what_is_found(tmp_path: Path) -> None:
    """The last part of a study and the whole have the same stages where the profile has no extras.

    Likewise with every setting that no stage's hash carries: results say which they are of.
    """
    source, seeds = "path:pairs.jsonl", 2
    own = ["extras=false", "extras=true", "tuning.trials=7", "sweep.weaker=0.9"]
    data, folders = preference_data(source), []
    for setting in [*own, "evaluation.bootstrap_samples=99"]:
        profile = load_profile("smoke", [f"data.source={source}", f"seeds={seeds}", setting])
        runs = [Run(profile, seed, tmp_path) for seed in range(seeds)]
        made = [stages_of(run, source) for run in runs]
        folders.append(summary.summarise(runs, made, data))
        assert book.evaluation_folder(profile, tmp_path) == folders[-1]
    assert folders[1] == folders[2], "how a study was tuned changes no result"
    assert len(set(folders)) == 4


def test_a_report_is_of_its_own_settings_whatever_was_run_since(tmp_path: Path) -> None:
    """A, then B, then the report of A: its numbers are A's, and where there are none it says so."""
    other = load_profile("laptop", ["ppo.kl_coef=9"])
    publish(tmp_path, name="A", age=100)
    publish(tmp_path, name="B", age=10, settings=other)
    for profile, name in ((load_profile("laptop"), "A"), (other, "B")):
        assert load_results(book.evaluation_folder(profile, tmp_path))["evaluation"] == name
    third = load_profile("laptop", ["dpo.beta=9"])
    with pytest.raises(StudyError, match=r"of these settings in .* \(2 of other settings\)"):
        book.write_report(third, tmp_path)


def test_chapters_and_report_of_other_settings_stand_apart(tmp_path: Path) -> None:
    """A, then chapters of B, then the report of A: it has none of B's, and A's are not replaced."""
    usual, other = load_profile("laptop"), load_profile("laptop", ["ppo.kl_coef=9"])
    publish(tmp_path, name="A")
    executed(tmp_path, "laptop", mark="said of A")
    executed(tmp_path, "laptop", other, mark="said of B")
    page = book.write_report(usual, tmp_path)[0].read_text(encoding="utf-8")
    assert "said of A" in page
    assert "said of B" not in page
    publish(tmp_path, name="B", settings=other)
    second = book.write_report(other, tmp_path)[0]
    assert "said of B" in second.read_text(encoding="utf-8")
    assert "said of A" in (tmp_path / "laptop/report/index.html").read_text(encoding="utf-8")


def test_a_part_stands_in_the_place_of_the_whole_and_says_so(tmp_path: Path) -> None:
    whole = load_profile("laptop")
    part = load_profile("laptop", ["seeds=2", "extras=false"])
    publish(tmp_path, name="part", settings=part)
    executed(tmp_path, "laptop", mark="said of two seeds")
    page, _ = book.write_report(part, tmp_path, whole)
    assert page == tmp_path / "laptop/report/index.html"
    assert "2 of 5 seeds so far" in page.read_text(encoding="utf-8")
    publish(tmp_path, name="whole")
    again, _ = book.write_report(whole, tmp_path, whole)
    assert again == page
    assert "so far" not in page.read_text(encoding="utf-8")


def test_how_it_is_run_makes_no_other_study(tmp_path: Path) -> None:
    """Whoever gives more jobs or saves more often after a kill finds what was finished."""
    publish(tmp_path, name="A")
    again = load_profile("laptop", ["jobs=1", "threads=2", "checkpoint_minutes=1"])
    assert book.evaluation_folder(again, tmp_path).name == "evaluation-A"
    assert notebook_path(again, tmp_path, "04_ppo") == tmp_path / "laptop/notebooks/04_ppo.ipynb"


def test_folders_that_cannot_be_used_are_counted_and_block_nothing(tmp_path: Path) -> None:
    for name, text in (("cut", '{"format'), ("old", '{"format": 1, "settings": {}}')):
        publish(tmp_path, name=name)
        (tmp_path / "laptop" / f"evaluation-{name}" / "results.json").write_text(text)
    with pytest.raises(StudyError, match=r"\(1 of an earlier version, 1 that cannot be read\)"):
        book.evaluation_folder(load_profile("laptop"), tmp_path)
    publish(tmp_path, name="A")
    assert book.evaluation_folder(load_profile("laptop"), tmp_path).name == "evaluation-A"


def test_without_an_evaluation_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    for make in (book.write_report, lambda *a: book.export_figures(*a, tmp_path / "out")):
        with pytest.raises(StudyError, match=r"no finished evaluation .* run --profile laptop"):
            make(load_profile("laptop"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_notebook_that_was_not_executed_is_named(tmp_path: Path) -> None:
    publish(tmp_path)
    executed(tmp_path, "laptop")
    (tmp_path / "laptop" / "notebooks" / "05_grpo.ipynb").unlink()
    with pytest.raises(StudyError, match=r"05_grpo\.ipynb has not been executed .*--only 05_grpo"):
        book.write_report(load_profile("laptop"), tmp_path)
    assert not (tmp_path / "laptop" / "report").exists()


def test_what_cannot_be_typeset_is_an_error_of_the_study(tmp_path: Path) -> None:
    publish(tmp_path)
    executed(tmp_path, "laptop")
    unrun = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    nbformat.write(unrun, tmp_path / "laptop" / "notebooks" / "04_ppo.ipynb")
    with pytest.raises(StudyError, match=r"04_ppo\.ipynb, cell 1 was never executed"):
        book.write_report(load_profile("laptop"), tmp_path)


def test_the_report_has_the_front_page_the_chapters_and_the_appendix(tmp_path: Path) -> None:
    results = publish(tmp_path)
    executed(tmp_path, "laptop")
    page, pdf = book.write_report(load_profile("laptop"), tmp_path)
    assert (page, pdf) == (
        tmp_path / "laptop" / "report" / "index.html",
        tmp_path / "laptop" / "report" / "report.pdf",
    )
    assert pdf.read_bytes().startswith(b"%PDF")
    text = page.read_text(encoding="utf-8")
    names = list(catalogue.notebooks())
    places = [text.find(part) for part in ("What was found", *names, "Appendix: proofs")]
    assert -1 not in places
    headings = [text.find(f"Chapter {name}</h1>") for name in names]
    assert headings == sorted(headings)
    assert "model tiny, data bundled, 3 seeds" in text
    assert "PPO and GRPO raised gold reward over SFT" in text
    assert "Smoke run" not in text
    assert results["stages"]["2"]["ppo"][:12] in text


def test_a_smoke_run_says_so_on_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    banners = []

    def render(chapters: list[Path], out: Path, **titles: str) -> tuple[Path, Path]:
        assert merge(chapters).cells  # the pages can be read
        banners.append(titles["banner"])
        return out / "index.html", out / "report.pdf"

    monkeypatch.setattr(book.exporters, "render", render)
    for name in ("laptop", "smoke"):
        publish(tmp_path, profile=name)
        executed(tmp_path, name)
        book.write_report(load_profile(name), tmp_path)
    assert banners[0] is None
    assert "numbers mean nothing" in banners[1]


def test_the_appendix_has_every_setting_version_and_hash() -> None:
    results = made_up("gold")
    page = book.appendix_page(results)
    nbformat.validate(page)
    text = content(page)
    for section, values in results["settings"].items():
        for key in values if isinstance(values, dict) else ():
            assert re.search(rf"\b{section}\.{key}\s+{re.escape(str(values[key]))}\s", text)
    assert "Linux x86_64" in text
    assert "2.8.0" in text
    assert "95 of 200" not in text
    assert f"rlhf_lib {__version__}, profile {results['profile']}, seeds: 3" in text
    assert "48% [41, 54]" in text, "what an earlier report published, with its interval"
    for stages in results["stages"].values():
        for digest in stages.values():
            assert digest[:12] in text
            assert digest not in text, "twelve digits are enough"


def test_the_appendix_shows_what_was_tried_before(monkeypatch: Any, tmp_path: Path) -> None:
    page = book.appendix_page(made_up("gold") | {"profile": "smoke"})
    text = content(page)
    assert "For the profile `laptop` values were tried" in text, "whose values it has"
    assert f"{9 * 5} in all" in text
    assert "ringed: the best" in json.dumps(page)
    assert len(re.findall(r"kl_coef=\S+ learning_rate=\S+ gold", text)) >= 2
    monkeypatch.setattr(book, "TUNED", tmp_path)
    assert "Trials of tuning" not in content(book.appendix_page(made_up("gold")))
    values = {"ppo.kl_coef": 0.1, "ppo.learning_rate": 1e-4}
    lost = [{"method": "ppo", "values": values, "mean": None, "diverged": "the loss is nan"}]
    file = tmp_path / "laptop.json"
    file.write_text(json.dumps({"settings": "", "trials": lost}))
    assert "Trials of tuning" not in content(book.appendix_page(made_up("gold")))
    file.write_text(json.dumps({"settings": "", "trials": None}))
    with pytest.raises(SettingsError, match=r"laptop\.json is no file of trials"):
        book.appendix_page(made_up("gold"))


def test_the_export_is_whole_and_holds_nothing_private(tmp_path: Path) -> None:
    """Numbers only: no folder names of whoever ran it, and no text of anybody's dataset."""
    own = load_profile("offline", ["data.demonstrations_from=path:/home/me/shown.jsonl"])
    profile = replace(own, model=replace(own.model, name="/home/me/mine"))
    publish(tmp_path, "proxy", "offline", settings=profile)
    samples = tmp_path / "offline" / "evaluation-abc" / "samples"
    samples.mkdir()
    (samples / "sft.jsonl").write_text('{"prompt": "how do I", "response": "like this"}\n')
    paths = book.export_figures(profile, tmp_path, tmp_path / "figures" / "offline")
    assert sorted(p.name for p in paths) == sorted(p.name for p in paths[0].parent.iterdir())
    names = {p.name for p in paths}
    assert {"results.json", "frontier.csv", "gains.svg", "gains.png", "best_of_n.svg"} <= names
    for path in paths:
        assert path.stat().st_size > 0
        assert b"/home/me" not in path.read_bytes(), path.name
        assert b"how do I" not in path.read_bytes(), path.name
    exported = json.loads(paths[0].read_text())
    assert exported["settings"]["data"]["source"] == "path:pairs.jsonl.gz"
    assert exported["settings"]["data"]["demonstrations_from"] == "path:shown.jsonl"
    assert exported["settings"]["model"]["name"] == exported["model"]
    assert exported["policies"] == made_up("proxy")["policies"]


def test_an_export_is_the_same_each_time(tmp_path: Path) -> None:
    publish(tmp_path)
    one, other = (
        book.export_figures(load_profile("laptop"), tmp_path, tmp_path / name) for name in "ab"
    )
    for first, second in zip(one, other, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name
