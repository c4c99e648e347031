"""The study's report: a front page with the verdict, the seven notebooks, and an appendix."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import pandas as pd

from rlhf_lib import __version__, catalogue
from rlhf_lib.files import write_json
from rlhf_lib.kernel import without_folders
from rlhf_lib.profiles import of_settings
from rlhf_lib.proofs import claims, parity
from rlhf_lib.report import exporters, references
from rlhf_lib.report.cleaning import ReportError
from rlhf_lib.results.summary import FORMAT, load_results
from rlhf_lib.review import claims as published
from rlhf_lib.review import trials
from rlhf_lib.runtime import shipped
from rlhf_lib.settings import Profile, as_dict, deciding
from rlhf_lib.show import figures
from rlhf_lib.show.display import write_figure
from rlhf_lib.study.poster import again, figure, front_page, notebook, prose, table
from rlhf_lib.study.stages import StudyError, notebook_path

TUNED = shipped("figures/tuning")  # its trials
TITLE = "Learning from preferences: PPO, GRPO and DPO, measured"


def evaluation_folder(profile: Profile, run_dir: Path) -> Path:
    """The finished evaluation of these very settings; of several (the code has changed in between)
    the newest. Raises StudyError naming how to make one.
    """
    asked, found, others = deciding(as_dict(profile)), [], Counter[str]()
    for done in (run_dir / profile.name).glob("evaluation-*/DONE"):
        try:
            results = load_results(done.parent)
        except (OSError, ValueError):
            others["that cannot be read"] += 1
            continue
        if results.get("format") != FORMAT:
            others["of an earlier version"] += 1
        elif deciding(results["settings"]) != asked:
            others["of other settings"] += 1
        else:
            found.append(done)
    if not found:
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        raise StudyError(
            f"no finished evaluation of these settings in {run_dir / profile.name}"
            f"{f' ({told})' if told else ''}: "
            f"python -m rlhf_lib run --profile {profile.name}, with the same --set as here"
        )
    return max(found, key=lambda done: done.stat().st_mtime).parent


def report_folder(profile: Profile, run_dir: Path) -> Path:
    """Where `index.html` and `report.pdf` stand."""
    return run_dir / profile.name / of_settings("report", profile)


def notebook_folder(profile: Profile, run_dir: Path) -> Path:
    """Where the executed notebooks stand."""
    return notebook_path(profile, run_dir, "any").parent


def write_report(
    profile: Profile, run_dir: Path, whole: Profile | None = None
) -> tuple[Path, Path]:
    """Render `index.html` and `report.pdf` into runs/<profile>/report; returns their paths.

    A report of settings that are not the profile's own has a folder of its own. `whole`: the study
    of which this is a part, and in whose place it stands until that has ended.

    Raises StudyError when a notebook has not been executed yet, or cannot be typeset.
    """
    evaluation = evaluation_folder(profile, run_dir)
    results = load_results(evaluation)
    part = f"{profile.seeds} of {whole.seeds} seeds so far" if whole and whole != profile else ""
    profile = whole or profile
    chapters = [notebook_path(profile, run_dir, name) for name in catalogue.notebooks()]
    for path in chapters:
        if not path.exists():
            raise StudyError(
                f"{path.name} has not been executed for profile {profile.name}: "
                f"python -m rlhf_lib run --profile {profile.name} --only {path.stem}"
            )
    banners = [f"{part}: this report is written again as the study goes on"] if part else []
    if profile.name == "smoke":
        banners.append("Smoke run: it shows that everything works, its numbers mean nothing")
    with tempfile.TemporaryDirectory() as folder:
        front, appendix = Path(folder) / "front.ipynb", Path(folder) / "appendix.ipynb"
        nbformat.write(front_page(results, evaluation), front)
        nbformat.write(appendix_page(results), appendix)
        print("rendering the report (a minute or two) ...", flush=True)
        try:
            return exporters.render(
                [front, *chapters, appendix],
                report_folder(profile, run_dir),
                title=TITLE,
                subtitle=_subtitle(results),
                banner=". ".join(banners) or None,
            )
        except ReportError as error:
            raise StudyError(str(error)) from error


def _subtitle(results: Mapping) -> str:
    seeds = len(results["seeds"])
    return (
        f"Profile {results['profile']}: model {results['model']}, data {results['source']}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}"
    )


PROOFS = (
    "Computed with the library that ran this study. *Enumeration*: a policy so small that all its "
    "responses can be listed, so that expectations and gradients are exact; the error is the "
    "largest difference of any entry, and measured and expected show one of them. *Parity*: TRL's "
    "own code on the same tensors or the same training step. A row without a tolerance is a figure "
    "and not a claim: a known bias, or a difference on purpose. How often intervals and "
    "families of comparisons err is simulated by `make proofs`. "
)


def appendix_page(results: Mapping) -> nbformat.NotebookNode:
    """The proofs, and what it takes to run this again: settings, environment, seeds, hashes."""
    proven, missing = parity.with_parity()
    settings = [
        {"setting": f"{section}.{key}", "value": str(value)}
        for section, values in results["settings"].items()
        if isinstance(values, dict)
        for key, value in values.items()
    ]
    environment = [
        {"what": key, "value": str(value)}
        for key, value in {**results["environment"], **results["environment"]["packages"]}.items()
        if key != "packages"
    ]
    hashes = {
        f"seed {seed}": {stage: digest[:12] for stage, digest in stages.items()}
        for seed, stages in results["stages"].items()
    }
    by_stage = pd.DataFrame(hashes).fillna("–").rename_axis("stage").reset_index()
    return notebook([
        nbformat.v4.new_markdown_cell("# Appendix: proofs, claims, settings", id="title"),
        prose("## Proofs\n\n" + PROOFS + missing),
        table(claims.table(proven).drop(columns="source"), "Claims and figures: make proofs."),
        *_earlier_reports(),
        *_tuning(results["profile"]),
        prose("## References\n\n" + references.markdown()),
        prose("## To repeat, to cite\n\n" + again(results) + CITING.format(
            title=TITLE, version=__version__, profile=results["profile"],
            seeds=len(results["seeds"]),
        )),
        prose("## Settings, environment, hashes"),
        table(in_columns(settings), "Every setting of this run."),
        table(pd.DataFrame(environment), "The machine and the versions that it ran with."),
        table(by_stage, "Stage folders by content hash: settings, inputs and source."),
    ])  # fmt: skip


TUNING = (
    "For the profile `{name}` values were tried for each method by the same rule, from those that "
    "it had to the neighbours of the best: {count} in all, by {rater} reward of replies to "
    "validation prompts, with a seed that is none of the study's. "
    "`python -m rlhf_lib tune --profile {name}` does it again."
)
DOTS = (
    "A dot a trial, with 95 % intervals over prompts: the first setting that was tuned, a line for "
    "each value of the second; ringed: the best."
)


def _tuning(profile: str) -> list[nbformat.NotebookNode]:
    """The trials of this profile, else of `laptop`, whose values others take over; if there are."""
    files = [TUNED / f"{name}.json" for name in (profile, "laptop")]
    file = next((file for file in files if file.is_file()), None)
    tried = trials.load(file) if file else []
    if file is None or all(trial["mean"] is None for trial in tried):
        return []
    said = TUNING.format(count=len(tried), name=file.stem, rater=tried[0]["rater"])
    return [
        prose("## Trials of tuning\n\n" + said),
        figure(figures.tuning(tried), DOTS),
        table(trials.table(tried), "The best two of each method's trials."),
    ]


def in_columns(rows: Sequence[Mapping[str, str]], columns: int = 2) -> pd.DataFrame:
    """A long table dealt out over columns beside each other, read downwards."""
    height = -(-len(rows) // columns)
    parts = [pd.DataFrame(rows[i : i + height]) for i in range(0, len(rows), height)]
    named = [part.add_suffix(" " * place) for place, part in enumerate(parts)]  # no name twice
    return pd.concat(named, axis=1).fillna("")


CITING = (
    " `python -m rlhf_lib compare` sets two runs beside each other. To cite it: *{title}*, "
    "rlhf_lib {version}, profile {profile}, seeds: {seeds}, with that hash. `CITATION.cff` says "
    "how to cite the library."
)
EARLIER = (
    "Three earlier reports of this kind published the figures below. What they were measured on "
    "is known as far as the column *n* says; where a sample's size was not said it is taken as "
    "{assumed}. Most of what was read out of such figures is not in them. {note} Anybody's own: "
    '`python -m rlhf_lib check-claims "wins 36 of 100"`.'
)


def _earlier_reports() -> list[nbformat.NotebookNode]:
    """What the figures of earlier reports show, by themselves and against each other."""
    text = EARLIER.format(assumed=published.ASSUMED, note=published.NOTE)
    cells = [prose("## What such figures show\n\n" + text)]
    for name, figures_of in published.EARLIER.items():
        read = published.read(figures_of)
        cells.append(table(published.table(read), f"Report {name}: what it published."))
        pairs = published.pair_table(read)
        if len(pairs):
            cells.append(table(pairs, f"Report {name}: its figures against each other."))
    return cells


def export_figures(profile: Profile, run_dir: Path, target: Path) -> list[Path]:
    """Numbers of a finished study as JSON and CSV, and the plots drawn from them; no text."""
    folder = evaluation_folder(profile, run_dir)
    results, points = load_results(folder), pd.read_csv(folder / "frontier.csv")
    settings = results["settings"]
    settings["data"]["source"] = results["data"]["source"] = results["source"]
    settings["model"]["name"] = results["model"]
    demonstrations = settings["data"]["demonstrations_from"]
    settings["data"]["demonstrations_from"] = without_folders(demonstrations)
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "results.json", results)
    points.to_csv(target / "frontier.csv", index=False)
    drawn = {
        "gains": figures.gains(results),
        "frontier": figures.frontier(points, results, results["deciding"]),
        "reward_model": figures.accuracy_bars(
            results["reward_model"]["accuracy"], results["reward_model"].get("ceiling")
        ),
        "calibration": figures.reliability({"as trained": results["reward_model"]["calibration"]}),
        "best_of_n": figures.best_of_n(results["best_of_n"], results["deciding"]),
    }
    paths = [target / "results.json", target / "frontier.csv"]
    for name, one in drawn.items():
        paths += write_figure(one, target / name)
    return paths
