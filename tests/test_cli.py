"""The command line: help for everything, and errors in one line that name the way out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from typer.testing import CliRunner

from rlhf_lib import __version__
from rlhf_lib.__main__ import app, main
from rlhf_lib.session import fits, matrix
from rlhf_lib.study import schedule

MADE_UP = Path(__file__).parent / "made_up"
STAGES = (
    "dataset",
    "reward-model",
    "sft",
    "rejection-sft",
    "ppo",
    "grpo",
    "dpo",
    "probes",
    "evaluate",
)
STUDY = "run report status tune export stage chat judge push"
OF_A_STUDY = (*STUDY.split(), *STAGES)
COMMANDS = ("proofs", "check-claims", "doctor", "compare", "matrix", *OF_A_STUDY)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable:
    """`cli("dataset", ...)`: exit code and output of the command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_THREADS", "1")

    def call(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["rlhf_lib", *map(str, arguments)])
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


def told(result: SimpleNamespace, folder: Path) -> str:
    """The one line of an expected error, after which nothing was written into `folder`."""
    assert result.code == 2, result.err
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    assert not (folder / "runs").exists(), sorted((folder / "runs").rglob("*"))
    return line


# ------------------------------------------------------------------------------------------- help


def test_every_command_is_known_here() -> None:
    names = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert names == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    text = re.sub(r"[\s│╭╮╰╯─]+", " ", result.output)
    summary = text.partition(name)[2]
    assert re.search(r"[A-Z][a-z]+ .*\.", summary), "a sentence on what it does"
    assert ("--profile" in text) == (name in OF_A_STUDY)


def test_the_overview_lists_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert [name for name in COMMANDS if name not in result.output] == []


def test_the_version(cli: Callable) -> None:
    result = cli("--version")
    assert (result.code, result.out) == (0, f"rlhf_lib {__version__}\n")


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("ru", {"run"}),
        ("run --profile la", {"laptop"}),
        ("run --only 04", {"04_ppo"}),
        ("sft --set ppo.kl_c", {"ppo.kl_coef="}),
        ("stage reward_model_c", {"reward_model_control", "reward_model_curve"}),
        ("run --dry", {"--dry-run"}),
    ],
)
def test_a_shell_is_told_what_can_follow(
    words: str, completed: set[str], cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_RLHF_LIB_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"rlhf-lib {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    assert set(cli().out.split()) == completed


def test_an_installed_command_is_this_one() -> None:
    (script,) = entry_points(group="console_scripts", name="rlhf-lib")
    assert script.load() is main


# -------------------------------------------------------------------------------- mistyped names


@pytest.mark.parametrize("command", ["run", "report", "status", "export figures", "ppo", "dataset"])
def test_an_unknown_profile(cli: Callable, tmp_path: Path, command: str) -> None:
    line = told(cli(*command.split(), "--profile", "smok"), tmp_path)
    assert line.startswith("error: unknown profile 'smok': did you mean 'smoke'? Known: full,")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["run", "report", "export figures", "ppo"])
def test_an_unknown_setting(cli: Callable, tmp_path: Path, command: str) -> None:
    line = told(cli(*command.split(), "--profile", "smoke", "--set", "ppo.klcoef=1"), tmp_path)
    assert "unknown setting 'ppo.klcoef': did you mean 'ppo.kl_coef'?" in line


def test_a_value_of_the_wrong_type(cli: Callable, tmp_path: Path) -> None:
    line = told(cli("sft", "--profile", "smoke", "--set", "sft.epochs=many"), tmp_path)
    assert line == "error: sft.epochs='many': expected a value of type int"


def test_an_unknown_source(cli: Callable, tmp_path: Path) -> None:
    line = told(cli("dataset", "--profile", "smoke", "--data", "bundeld"), tmp_path)
    assert "unknown data source 'bundeld': did you mean 'bundled'?" in line


@pytest.mark.parametrize("command", ["dataset", "sft"])
def test_an_unknown_model(cli: Callable, tmp_path: Path, command: str) -> None:
    line = told(cli(command, "--profile", "smoke", "--model", "smollm2-135"), tmp_path)
    assert "unknown model 'smollm2-135': did you mean 'smollm2-135m'?" in line
    assert "model.name=tiny" in line


def test_an_unknown_method_to_tune(cli: Callable, tmp_path: Path) -> None:
    line = told(cli("tune", "--profile", "smoke", "--only", "gpro"), tmp_path)
    assert "unknown method that is tuned 'gpro': did you mean 'grpo'?" in line


def test_an_unknown_notebook(cli: Callable, tmp_path: Path) -> None:
    line = told(cli("run", "--profile", "smoke", "--only", "4_ppo"), tmp_path)
    assert "unknown notebook '4_ppo': did you mean '04_ppo'?" in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("pppo",), "pppo"),
        (("run", "--profil", "smoke"), "--profil"),
        (("run", "--seeds", "0"), "--seeds"),
        (("ppo", "--seed", "x"), "--seed"),
    ],
)
def test_unknown_commands_and_options(
    cli: Callable, tmp_path: Path, arguments: tuple, named: str
) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert named in result.err
    assert "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


def test_nothing_was_run_yet(cli: Callable, tmp_path: Path) -> None:
    for command in ("report", "export figures"):
        line = told(cli(*command.split(), "--profile", "smoke"), tmp_path)
        assert "no finished evaluation of these settings in runs/smoke: python -m rlhf" in line
    assert not (tmp_path / "figures").exists()
    result = cli("status", "--profile", "smoke")
    assert (result.code, result.out) == (0, "nothing has been run in runs/smoke\n")


# ----------------------------------------------------------------------------- data that is no good

ASKED = "\n\nHuman: Question {}?\n\nAssistant:"


def pair(number: int, chosen: str = " Yes.", rejected: str = " No, you should not.") -> dict:
    prompt = ASKED.format(number)
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


GOOD = [json.dumps(pair(number)) for number in range(40)]


def write(folder: Path, *extra: str, good: int = 40) -> Path:
    """Forty good rows, or fewer, and then the extra lines."""
    path = folder / "pairs.jsonl"
    path.write_text("".join(f"{line}\n" for line in [*GOOD[:good], *extra]))
    return path


def dataset(cli: Callable, source: object) -> SimpleNamespace:
    return cli("dataset", "--profile", "smoke", "--data", source)


def test_a_missing_file_names_the_nearest(cli: Callable, tmp_path: Path) -> None:
    path = write(tmp_path)
    line = told(dataset(cli, f"path:{tmp_path / 'pears.jsonl'}"), tmp_path)
    assert f"{tmp_path / 'pears.jsonl'} does not exist" in line
    assert f"the nearest in {tmp_path} is {path.name}" in line


def test_an_empty_file(cli: Callable, tmp_path: Path) -> None:
    path = write(tmp_path, good=0)
    line = told(dataset(cli, f"path:{path}"), tmp_path)
    assert f"{path} is empty: it needs one preference pair a line" in line


def test_a_line_that_is_not_json(cli: Callable, tmp_path: Path) -> None:
    path = write(tmp_path, '{"chosen": "', GOOD[0])
    line = told(dataset(cli, f"path:{path}"), tmp_path)
    assert f"{path}, line 41: not JSON" in line
    assert "each line holds one JSON object" in line


def test_a_missing_key(cli: Callable, tmp_path: Path) -> None:
    row = json.dumps({"chosen": pair(1)["chosen"], "reject": "x"})
    line = told(dataset(cli, f"path:{write(tmp_path, row, good=0)}"), tmp_path)
    assert "left out: no `rejected` 1" in line
    assert "row 1, no `rejected`; it has chosen, reject)" in line


def test_a_file_without_a_usable_row(cli: Callable, tmp_path: Path) -> None:
    path = write(tmp_path, *[json.dumps(pair(1, " Yes.", " Yes. "))] * 3, good=0)
    line = told(dataset(cli, f"path:{path}"), tmp_path)
    assert "no pair for" in line
    assert "3 rows were read; left out: identical replies 3" in line
    assert "give more pairs" in line


def test_the_hub_out_of_reach(cli: Callable, tmp_path: Path) -> None:
    line = told(dataset(cli, "hub:Anthropic/hh-rlhf"), tmp_path)
    assert "Anthropic/hh-rlhf is not in the cache" in line
    assert "data.source=path:FILE" in line
    assert "data.source=bundled" in line


UNUSABLE = {
    "identical replies": pair(99, " Yes.", " Yes.\n"),
    "no assistant marker": {"chosen": "Human: hello", "rejected": pair(99)["rejected"]},
    "empty reply": pair(99, " Yes.", "  \n"),
    "row too long": pair(99, " Yes" * 25_000),
}


def result_of(run_dir: Path) -> dict:
    (stage,) = run_dir.glob("smoke/seed-0/dataset-*/")
    return json.loads((stage / "result.json").read_text())


@pytest.mark.parametrize("reason", UNUSABLE)
def test_an_unusable_row_is_left_out_and_counted_with_its_place(
    cli: Callable, tmp_path: Path, reason: str
) -> None:
    path = write(tmp_path, json.dumps(UNUSABLE[reason]))
    result = dataset(cli, f"path:{path}")
    assert result.code == 0, result.err
    audit = result_of(tmp_path / "runs")
    assert audit["dropped"] == {reason: {"count": 1, "first": ["pairs.jsonl, row 41"]}}
    assert (audit["rows_read"], audit["rows_usable"]) == (41, 40)
    assert not list((tmp_path / "runs").rglob("*.partial"))


# ------------------------------------------------------------------------------------- what it does


def test_a_stage_is_run_once_and_shown_by_status(cli: Callable, tmp_path: Path) -> None:
    path = write(tmp_path)
    first = dataset(cli, f"path:{path}")
    (stage,) = (tmp_path / "runs").glob("smoke/seed-0/dataset-*/")
    assert first.out == f"dataset: {stage.relative_to(tmp_path)}\n"
    before = {file: file.stat().st_mtime_ns for file in stage.iterdir()}
    assert dataset(cli, f"path:{path}").out == first.out
    assert {file: file.stat().st_mtime_ns for file in stage.iterdir()} == before
    by_name = cli("stage", "dataset", "--profile", "smoke", "--data", f"path:{path}")
    assert by_name.out == first.out
    unknown = cli("stage", "dataste", "--profile", "smoke")
    assert unknown.code == 2
    assert "did you mean 'dataset'" in unknown.err
    shown = cli("status", "--profile", "smoke", "--data", f"path:{path}").out.splitlines()
    assert re.fullmatch(r"seed-0 +dataset +done +\d+\.\d min", shown[0])
    assert all(re.fullmatch(r"seed-0 +\w+ +missing", line) for line in shown[1:-1])
    assert shown[-1] == f"1 done, {len(shown) - 2} missing"
    other = cli("status", "--profile", "smoke").out.splitlines()[-2]
    assert re.fullmatch(
        r"seed-0 +dataset +stale +\d+\.\d min  source was \S+, is bundled, "
        "read before it, and others now: data",
        other,
    )


def test_run_hands_its_overrides_on_and_a_set_wins(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(schedule, "run_study", lambda *a: seen.append(a) or [tmp_path / "n.ipynb"])
    given = (
        "--profile smoke --seeds 2 --data path:x --model gpt2 --set seeds=3 --set ppo.kl_coef=0.3"
    )
    result = cli("run", *given.split(), "--run-dir", "there")
    ((profile, run_dir, overrides, only),) = seen
    assert overrides == [
        "data.source=path:x",
        "model.name=gpt2",
        "seeds=2",
        "seeds=3",
        "ppo.kl_coef=0.3",
    ]
    assert (profile.seeds, profile.ppo.kl_coef, profile.model.name) == (3, 0.3, "gpt2")
    assert (run_dir, only) == (Path("there"), None)
    first, second = result.out.splitlines()
    assert re.fullmatch(r"report: /.*/there/smoke/report-\w{8}/index\.html", first)
    assert second.endswith("/report.pdf")
    assert cli("run", "--only", "04_ppo").out == f"executed: {tmp_path}/n.ipynb\n"


def test_a_dry_run_runs_nothing(cli: Callable, tmp_path: Path) -> None:
    result = cli("run", "--profile", "smoke", "--dry-run")
    first, *jobs = result.out.splitlines()
    assert (result.code, result.err) == (0, "")
    said = r"done: 0 of (\d+) stages; to be run: \1 stages, 8 notebooks and reports"
    assert re.fullmatch(said, first)
    assert jobs[0] == "  seed 0: dataset"
    assert not list(tmp_path.iterdir())


def test_a_study_is_made_to_fit_a_session(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    choice = {"overrides": ["seeds=2"], "minutes": 41.34}
    monkeypatch.setattr(fits, "fitted", lambda *a: seen.append(a) or choice)
    monkeypatch.setattr(schedule, "run_study", lambda *a: seen.append(a) or [])
    result = cli("run", "--fits", "45m", "--set", "ppo.kl_coef=0.3")
    (_, overrides, minutes, _), (profile, _, handed_on, _) = seen
    assert (minutes, overrides) == (45, handed_on)
    assert handed_on == ["ppo.kl_coef=0.3", "seeds=2"]
    assert profile.seeds == 2
    lines = result.out.splitlines()
    assert lines[0] == "41.3 minutes are foreseen for this study: seeds=2"
    assert re.fullmatch(r"it took \d+\.\d minutes", lines[1])
    wrong = told(cli("run", "--fits", "soon"), tmp_path)
    assert wrong == "error: 'soon' is no time: write 55m, 1h30m or 90s"


def test_pages_are_delivered_to_an_address(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_study(profile: Any, run_dir: Path, *rest: object) -> list[Path]:
        for page in ("report/index.html", "notebooks/01_dataset.ipynb"):
            path = run_dir / "smoke" / page
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page)
        return []

    monkeypatch.setattr(schedule, "run_study", run_study)
    result = cli("run", "--profile", "smoke", "--deliver", "memory://pages/")
    assert result.out.splitlines()[-1] == "delivered: memory://pages/"
    system = fsspec.filesystem("memory")
    assert system.cat("/pages/report/index.html") == b"report/index.html"
    assert system.cat("/pages/notebooks/01_dataset.ipynb") == b"notebooks/01_dataset.ipynb"
    cli("run", "--profile", "smoke", "--deliver", "memory://")
    assert system.exists("/notebooks/01_dataset.ipynb")
    monkeypatch.setattr(schedule, "run_study", lambda *a: 1 / 0)
    wrong = cli("run", "--profile", "smoke", "--deliver", "nowhere://x")
    assert wrong.code == 2
    assert wrong.err.startswith("error: nowhere://x cannot be written"), "before anything is run"
    part = cli("run", "--profile", "smoke", "--only", "04_ppo", "--deliver", "memory://x")
    assert part.err == "error: --deliver copies the pages of a whole study: leave --only out\n"
    bucket = told(cli("run", "--run-dir", "s3://bucket/runs"), tmp_path / "none")
    assert "is an address: trainings are kept in a folder" in bucket


def test_a_matrix_is_run_and_its_files_named(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "table.csv").write_text("")
    seen: list[Any] = []
    monkeypatch.setattr(matrix, "run", lambda *a: seen.append(a) or tmp_path / "made")
    result = cli("matrix", "grid.yaml", "--out", "memory://x")
    assert seen == [(Path("grid.yaml"), Path("runs"), "memory://x", "")]
    assert result.out.startswith("| method | setting | seeds | reward | interval over |\n")
    assert result.out.endswith(f"\n{tmp_path}/made/table.csv\n")


def test_a_file_error_is_one_sentence(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder is wanted")
    result = cli("dataset", "--profile", "smoke", "--data", f"path:{write(tmp_path)}")
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("error: [Errno 20] Not a directory")


# ---------------------------------------------------------- what others published, and what was run


def test_claims_are_judged_and_a_misread_one_is_one_sentence(cli: Callable) -> None:
    result = cli("check-claims", "wins 36 of 100; accuracy 95 of 200")
    assert result.code == 0
    assert "36% [27, 46]" in result.out
    wrong = cli("check-claims", "wins a lot")
    assert wrong.code == 2
    assert wrong.err.startswith("error: cannot read the claim 'wins a lot'")


def test_the_doctor_has_a_status_for_a_suspicion(cli: Callable, tmp_path: Path) -> None:
    clean, ill = tmp_path / "clean.jsonl", tmp_path / "ill.jsonl"
    clean.write_text('{"entropy": 1.0}\n' * 4, encoding="utf-8")
    ill.write_text("".join(f'{{"entropy": {x}}}\n' for x in (1, 0.5, 0.1, 0.0)), encoding="utf-8")
    assert cli("doctor", clean).code == 0
    result = cli("doctor", ill)
    assert result.code == 1
    assert result.out.startswith("collapsed entropy: entropy fell from 1.00 to 0.00.")
    both = cli("doctor", clean, ill)
    assert both.code == 1
    assert str(clean) in both.out, "of several logs it is said which"
    assert cli("doctor", tmp_path / "none.jsonl").code == 2


def test_two_studies_are_compared(cli: Callable) -> None:
    made_up = Path(__file__).parent / "made_up"
    result = cli("compare", made_up / "gold.json", made_up / "proxy.json")
    assert result.code == 0
    assert "setting" in result.out
    assert "B − A" in result.out
    assert cli("compare", made_up, made_up / "gold.json").code == 2
