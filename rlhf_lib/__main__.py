"""The command line: run a study or a stage, report it, review it and what others published."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Optional

import typer

from rlhf_lib import __version__, catalogue
from rlhf_lib.kernel import check_folder
from rlhf_lib.profiles import PROFILES, paths
from rlhf_lib.settings import UserError, plain_warnings, unknown

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False,
    help="Teach, run and compare PPO, GRPO and DPO on small language models.",
)  # fmt: skip


def _among(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What a shell completes a word to."""
    return lambda incomplete: sorted(n for n in names() if n.startswith(incomplete))


ProfileOption = Annotated[
    str,
    typer.Option(
        "--profile",
        help=f"one of: {', '.join(PROFILES)}",
        autocompletion=_among(lambda: PROFILES),
    ),
]


def _folder(value: Path) -> Path:
    return check_folder(value)


RunDir = Annotated[
    Path, typer.Option("--run-dir", help="where everything is written", callback=_folder)
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="which seed of the study")]
# typer reads these annotations, and on Python 3.10 wants Optional
Seeds = Annotated[Optional[int], typer.Option("--seeds", min=1, help="how many")]  # noqa: UP045
Data = Annotated[str, typer.Option("--data", help="bundled | hub:NAME[:SUBSET] | path:FILES")]
Model = Annotated[str, typer.Option("--model", help="tiny | smollm2-135m | gpt2 | hub id | folder")]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--set",
        help="override one setting, e.g. ppo.kl_coef=0.02 (repeatable)",
        autocompletion=_among(lambda: (f"{path}=" for path in paths())),
    ),
]
Deliver = Annotated[
    str, typer.Option("--deliver", help="copy the pages there as well, like s3://bucket/folder")
]
Engine = Annotated[str, typer.Option("--engine", help="who does the jobs: processes | ray")]
Only = typer.Option(help="one notebook, e.g. 04_ppo", autocompletion=_among(catalogue.notebooks))


def _overrides(data: str, model: str, settings: list[str] | None, seeds: int | None) -> list[str]:
    """All overrides in the one form that notebooks and worker processes read too."""
    given = [f"data.source={data}"] if data else []
    given += [f"model.name={model}"] if model else []
    given += [f"seeds={seeds}"] if seeds else []
    return given + list(settings or [])


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    shared = ("run", "stage", *(name.replace("_", "-") for name in catalogue.CATALOGUE))
    met = sys.modules.get("rlhf_lib.processes")  # where this was started together with others
    if met is not None and context.invoked_subcommand not in shared:
        met.refuse(str(context.invoked_subcommand))
    if version:
        print(f"rlhf_lib {__version__}")
        raise typer.Exit


@app.command()
def run(
    profile: ProfileOption = "laptop",
    seeds: Seeds = None,
    only: Annotated[str, Only] = "",
    fits: Annotated[str, typer.Option(help="make it fit so long a session: 55m, 1h30m")] = "",
    engine: Engine = "",
    dry_run: Annotated[bool, typer.Option(help="say what would be run, and run nothing")] = False,
    deliver: Deliver = "",
    data: Data = "",
    model: Model = "",
    settings: Set = None,
    run_dir: RunDir = Path("runs"),
) -> None:
    """Run the study: the seven notebooks, every seed, and the report."""
    from rlhf_lib import processes
    from rlhf_lib.release import pages
    from rlhf_lib.report import exporters
    from rlhf_lib.session import fits as sizes
    from rlhf_lib.session import status as standing
    from rlhf_lib.study import book, schedule

    overrides = _overrides(data, model, settings, seeds) + ([f"engine={engine}"] if engine else [])
    chosen = catalogue.load(profile, overrides)
    if fits:
        processes.refuse("--fits")
        choice = sizes.fitted(chosen, overrides, sizes.minutes_of(fits), run_dir)
        overrides += choice["overrides"]
        chosen = catalogue.load(profile, overrides)
        print(sizes.as_text(choice, chosen), flush=True)
    if only and only not in catalogue.notebooks():
        raise unknown("notebook", only, catalogue.notebooks())
    if deliver:
        pages.check(deliver, only)
    if dry_run:
        for line in standing.outlook(chosen, run_dir, only):
            print(line)
        return
    began = time.monotonic()
    notebooks = schedule.run_study(chosen, run_dir, overrides, only or None)
    if fits:
        print(f"it took {(time.monotonic() - began) / 60:.1f} minutes")
    for notebook in notebooks if only else []:
        print(f"executed: {notebook}")
    rendered = not (only or exporters.missing_tools())
    for file in ("index.html", "report.pdf") if rendered else []:
        print(f"report: {(book.report_folder(chosen, run_dir) / file).resolve()}")
    if deliver:
        processes.told(lambda: pages.deliver(chosen, run_dir, deliver))


@app.command()
def report(
    profile: ProfileOption = "laptop",
    seeds: Seeds = None,
    deliver: Deliver = "",
    data: Data = "",
    model: Model = "",
    settings: Set = None,
    run_dir: RunDir = Path("runs"),
) -> None:
    """Render the executed notebooks into index.html and report.pdf."""
    from rlhf_lib.release import pages
    from rlhf_lib.study import book

    chosen = catalogue.load(profile, _overrides(data, model, settings, seeds))
    for path in book.write_report(chosen, run_dir):
        print(f"report: {path.resolve()}")
    if deliver:
        pages.deliver(chosen, run_dir, deliver)


@app.command()
def status(
    profile: ProfileOption = "laptop",
    seeds: Seeds = None,
    data: Data = "",
    model: Model = "",
    settings: Set = None,
    run_dir: RunDir = Path("runs"),
) -> None:
    """What of a study is done, running, stopped or missing; what is stale, and why."""
    from rlhf_lib.session import status as standing

    chosen = catalogue.load(profile, _overrides(data, model, settings, seeds))
    if not (run_dir / profile).is_dir():
        print(f"nothing has been run in {run_dir / profile}")
        return
    rows = standing.rows(chosen, run_dir)
    for row in rows:
        print(standing.as_text(row))
    print(standing.summary(rows))


@app.command()
def matrix(
    file: Annotated[Path, typer.Argument(help="YAML: methods, coefficients, seeds")],
    out: Annotated[str, typer.Option(help="deliver it there as well: s3://bucket/folder")] = "",
    engine: Engine = "",
    run_dir: RunDir = Path("runs"),
) -> None:
    """Train methods x coefficients x seeds from one file: results in one table and figure."""
    from rlhf_lib.session import matrix as many

    folder = many.run(file, run_dir, out, engine)
    print(many.as_text(folder))
    for path in sorted(folder.iterdir()):
        print(path)


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
    if sys.stdin.isatty():
        print("One request a line; Ctrl-D ends.", file=sys.stderr)
    for answer in room.talk(panel, sys.stdin):
        print(answer, flush=True)


@app.command()
def judge(
    profile: ProfileOption = "laptop",
    data: Data = "",
    model: Model = "",
    settings: Set = None,
    target: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", help="a file to write the numbers to as well"),
    ] = None,
    run_dir: RunDir = Path("runs"),
) -> None:
    """How far an outside judge can be trusted (endpoint.url, endpoint.model): asked about pairs
    whose better reply is known, each in both orders.
    """
    from rlhf_lib.files import write_json
    from rlhf_lib.measure import endpoint
    from rlhf_lib.show.display import markdown
    from rlhf_lib.show.tables import trust_table
    from rlhf_lib.study.stages import Study

    study = Study.open(profile, 0, run_dir, _overrides(data, model, settings, None))
    asked, pairs = study.run.profile.endpoint, study.data
    cache = study.run.root / "endpoint-cache"
    found = endpoint.trust(asked, pairs.pairs["test"], pairs.truth, cache)
    print(markdown(trust_table(found)))
    print(f"{found['pairs']} pairs, {found['unclear']} more without a clear answer")
    if target is not None:
        write_json(target, found)


@app.command()
def push(
    name: Annotated[str, typer.Argument(help="a stage that trained a model, such as ppo")],
    target: Annotated[str, typer.Argument(help="OWNER/NAME on the hub, or a folder: ./NAME")],
    profile: ProfileOption = "laptop",
    seed: Seed = 0,
    public: Annotated[bool, typer.Option(help="where it has to be made, for all to see")] = False,
    data: Data = "",
    model: Model = "",
    settings: Set = None,
    run_dir: RunDir = Path("runs"),
) -> None:
    """Send a trained model and its card to the hub, or write both to a folder."""
    from rlhf_lib.release import push as sending
    from rlhf_lib.study.stages import Study

    study = Study.open(profile, seed, run_dir, _overrides(data, model, settings, None))
    print(sending.push(study, name.replace("-", "_"), target, public))


@app.command("stage")
def run_stage(
    name: Annotated[
        str,
        typer.Argument(
            help="any stage, one of your own included",
            autocompletion=_among(lambda: (r.name for r in catalogue.CATALOGUE.values() if r.runs)),
        ),
    ],
    profile: ProfileOption = "laptop",
    seed: Seed = 0,
    data: Data = "",
    model: Model = "",
    settings: Set = None,
    run_dir: RunDir = Path("runs"),
) -> None:
    """Run one stage of one seed, and what it needs before it."""
    from rlhf_lib import processes
    from rlhf_lib.data.audit import said
    from rlhf_lib.study.stages import Study

    study = Study.open(profile, seed, run_dir, _overrides(data, model, settings, None))
    if processes.first():
        print(*said(study.data.audit), sep="\n", file=sys.stderr)
    print(f"{name}: {study.stage(name.replace('-', '_')).path}")


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
    plain_warnings()
    try:
        if any(name.endswith(("WORLD_SIZE", "PMI_SIZE")) for name in os.environ):  # with others
            from rlhf_lib import processes

            processes.begin()
        app(prog_name="rlhf-lib")
    except (UserError, OSError) as error:  # a file that is not there, a disk that is full
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
