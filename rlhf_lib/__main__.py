"""The command line: run a study or a stage, report it, review it and what others published."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Optional

import typer

from rlhf_lib import catalogue
from rlhf_lib.profiles import PROFILES, load_profile
from rlhf_lib.settings import UserError, unknown

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Teach, run and compare PPO, GRPO and DPO on small language models.",
)  # fmt: skip

ProfileOption = Annotated[str, typer.Option("--profile", help=f"one of: {', '.join(PROFILES)}")]
RunDir = Annotated[Path, typer.Option("--run-dir", help="where everything is written")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="which seed of the study")]
# typer reads these annotations, and on Python 3.10 wants Optional
Seeds = Annotated[Optional[int], typer.Option("--seeds", min=1, help="how many")]  # noqa: UP045
Data = Annotated[str, typer.Option("--data", help="bundled | hub:NAME[:SUBSET] | path:FILE")]
Model = Annotated[str, typer.Option("--model", help="tiny | smollm2-135m | gpt2 | hub id | folder")]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", help="override one setting, e.g. ppo.kl_coef=0.02 (repeatable)"),
]


def _overrides(data: str, model: str, settings: list[str] | None, seeds: int | None) -> list[str]:
    """All overrides in the one form that notebooks and worker processes read too."""
    given = [f"data.source={data}"] if data else []
    given += [f"model.name={model}"] if model else []
    given += [f"seeds={seeds}"] if seeds else []
    return given + list(settings or [])


@app.command()
def run(
    profile: ProfileOption = "laptop",
    seeds: Seeds = None,
    only: Annotated[str, typer.Option(help="one notebook, e.g. 04_ppo")] = "",
    data: Data = "",
    model: Model = "",
    settings: Set = None,
    run_dir: RunDir = Path("runs"),
) -> None:
    """Run the study: the seven notebooks, every seed, and the report."""
    from rlhf_lib.study import book, schedule

    overrides = _overrides(data, model, settings, seeds)
    chosen = catalogue.load(profile, overrides)
    notebooks = schedule.run_study(chosen, run_dir, overrides, only or None)
    for notebook in notebooks if only else []:
        print(f"executed: {notebook}")
    for file in [] if only else ("index.html", "report.pdf"):
        if (path := book.report_folder(chosen, run_dir) / file).exists():
            print(f"report: {path.resolve()}")


@app.command()
def report(
    profile: ProfileOption = "laptop",
    seeds: Seeds = None,
    data: Data = "",
    model: Model = "",
    settings: Set = None,
    run_dir: RunDir = Path("runs"),
) -> None:
    """Render the executed notebooks into index.html and report.pdf."""
    from rlhf_lib.study import book

    chosen = catalogue.load(profile, _overrides(data, model, settings, seeds))
    for path in book.write_report(chosen, run_dir):
        print(f"report: {path.resolve()}")


@app.command()
def status(
    profile: ProfileOption = "laptop",
    run_dir: RunDir = Path("runs"),
) -> None:
    """What has been run: each stage folder of the profile, finished or under way."""
    from rlhf_lib.study.stages import stage_folders

    load_profile(profile)  # an unknown name is an error, not an empty list
    rows = stage_folders(run_dir / profile)
    if not rows:
        print(f"nothing has been run in {run_dir / profile}")
    for row in rows:
        minutes = "" if row["seconds"] is None else f"{row['seconds'] / 60:7.1f} min"
        print(f"{row['seed']:<8} {row['stage']:<36} {row['state']:<18} {minutes}")


@app.command()
def export(
    target: Annotated[Path, typer.Argument(help="folder for the numbers and their plots")],
    profile: ProfileOption = "laptop",
    seeds: Seeds = None,
    data: Data = "",
    model: Model = "",
    settings: Set = None,
    run_dir: RunDir = Path("runs"),
) -> None:
    """Write a finished study's numbers as JSON, and the plots drawn from them (no dataset text)."""
    from rlhf_lib.study import book

    chosen = catalogue.load(profile, _overrides(data, model, settings, seeds))
    for path in book.export_figures(chosen, run_dir, target):
        print(path)


@app.command()
def tune(
    profile: ProfileOption = "laptop",
    only: Annotated[str, typer.Option(help="one method, e.g. dpo")] = "",
    target: Annotated[Path, typer.Option("--out", help="folder of trials and figure")] = Path(
        "figures/tuning"
    ),
    data: Data = "",
    model: Model = "",
    settings: Set = None,
    run_dir: RunDir = Path("runs"),
) -> None:
    """Look for each method's own best coefficient and learning rate on validation prompts."""
    from rlhf_lib.study import tuning

    overrides = _overrides(data, model, settings, None)
    chosen = catalogue.load(profile, overrides)
    methods = catalogue.tuned()
    if only and only not in methods:
        raise unknown("method that is tuned", only, methods)
    methods = [only] if only else methods
    path = tuning.tune(chosen, run_dir, overrides, target, methods)
    for written in (path, *tuning.draw(path)):
        print(written)
    for line in tuning.found(path, chosen):
        print(line)


@app.command()
def proofs(
    target: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", help="a file to write the table to as well"),
    ] = None,
) -> None:
    """Prove the methods by enumeration, and compare with TRL; fails where a claim does not hold."""
    from rlhf_lib.files import write_json
    from rlhf_lib.proofs import claims, parity

    rows, missing = parity.with_parity(simulated=True)
    print("\n".join(filter(None, (claims.as_text(rows), missing))))
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, claims.as_records(rows))
    if not all(row.holds for row in rows):
        raise typer.Exit(1)


@app.command("check-claims")
def check_claims(
    claims: Annotated[str, typer.Argument(help='such as "wins 36 of 100; accuracy 47.5% of 200"')],
) -> None:
    """What published figures show: intervals, chance, each other, and the sample it would take."""
    from rlhf_lib.review import claims as review

    print(review.as_text(review.read(claims)))


@app.command()
def doctor(
    logs: Annotated[list[Path], typer.Argument(help="metrics.jsonl, TRL's trainer_state.json")],
) -> None:
    """Look for known ways to go wrong in training logs; status 1 where there is a suspicion."""
    from rlhf_lib.review import doctor as review

    found = {log: review.examine(log) for log in logs}
    for log, findings in found.items():
        print(*([f"{log}:"] if len(logs) > 1 else []), review.as_text(findings), sep="\n")
    if any(found.values()):
        raise typer.Exit(1)


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="a run's folder, or its results.json")],
    other: Annotated[Path, typer.Argument(help="another")],
) -> None:
    """Two studies beside each other: settings that differ, results with intervals."""
    from rlhf_lib.review import compare as review

    print(review.as_text(review.load(one), review.load(other)))


@app.command()
def chat(
    policies: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="such as: sft ppo dpo [default: sft ppo grpo dpo]"),
    ] = None,
    profile: ProfileOption = "laptop",
    seed: Seed = 0,
    data: Data = "",
    model: Model = "",
    settings: Set = None,
    run_dir: RunDir = Path("runs"),
) -> None:
    """Replies of several policies to your own requests, with reward and KL; one request a line."""
    from rlhf_lib.study import chat as room
    from rlhf_lib.study.stages import Study

    study = Study.open(profile, seed, run_dir, _overrides(data, model, settings, None))
    panel = room.Panel(study, policies or room.DEFAULT)
    print("One request a line; Ctrl-D ends.", file=sys.stderr)
    for answer in room.talk(panel, sys.stdin):
        print(answer, flush=True)


@app.command("stage")
def run_stage(
    name: Annotated[str, typer.Argument(help="any stage, one of your own included")],
    profile: ProfileOption = "laptop",
    seed: Seed = 0,
    data: Data = "",
    model: Model = "",
    settings: Set = None,
    run_dir: RunDir = Path("runs"),
) -> None:
    """Run one stage of one seed, and what it needs before it."""
    from rlhf_lib.study.stages import Study

    overrides = _overrides(data, model, settings, None)
    stage = Study.open(profile, seed, run_dir, overrides).stage(name.replace("-", "_"))
    print(f"{name}: {stage.path}")


def _add_stage(name: str, summary: str) -> None:
    """A command for a stage of the library's own."""

    def command(
        profile: ProfileOption = "laptop",
        seed: Seed = 0,
        data: Data = "",
        model: Model = "",
        settings: Set = None,
        run_dir: RunDir = Path("runs"),
    ) -> None:
        run_stage(name, profile, seed, data, model, settings, run_dir)

    command.__doc__ = summary
    app.command(name.replace("_", "-"))(command)


for _record in catalogue.CATALOGUE.values():
    if _record.help:
        _add_stage(_record.name, _record.help)


def main() -> None:
    """Run the command line; expected errors end with one message and status 2, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
