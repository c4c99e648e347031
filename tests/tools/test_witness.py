"""The witness of a rebuilding: what changed is found, and what may change is no error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tools import witness

PAGE = """<html><head><style>p {{}}</style></head><body><main><h1>PPO</h1>
<p>The run took {seconds} seconds, and {sentence}.</p>
<details class="code"><summary>Code</summary><pre class="sourceCode">{code}</pre></details>
<figure><figcaption>Table 1. <em>Means</em></figcaption><table>
<thead><tr><th></th><th>first quarter</th><th>change</th><th>minutes</th><th>hash</th></tr></thead>
<tbody><tr><td>reward</td><td>{cell}</td><td>{word}</td><td>{seconds}</td><td>{code}</td></tr></tbody>
</table></figure></main></body></html>"""


def study(
    folder: Path,
    *,
    digest: str = "0123456789ab",
    weight: float = 1.0,
    reward: float = 0.5,
    reply: str = "yes",
    gold: float = 0.25,
    deciding: str = "deciding",
    settings: dict | None = None,
    seconds: float = 2.0,
    sentence: str = "it held",
    cell: str = "0.1",
    word: str = "rose",
    modes: bool = False,
) -> Path:
    """A finished run of one stage, with its evaluation and report."""
    stage, evaluation = folder / "seed-0" / f"ppo-{digest}", folder / f"evaluation-{digest}"
    for part in (stage / "model", evaluation, folder / "report"):
        part.mkdir(parents=True)
    save_file({"w": np.full(3, weight)}, stage / "model" / "model.safetensors", {"by": digest})
    (stage / "metrics.jsonl").write_text(json.dumps({"reward": reward, "step_time": seconds}))
    (stage / "samples.jsonl").write_text(json.dumps({"reply": reply}))
    (stage / "result.json").write_text(json.dumps({"updates": 3, "phases": {"update": seconds}}))
    (stage / "config.json").write_text(json.dumps({"hash": digest}))
    results = {
        deciding: "gold",
        "settings": {"ppo": {"epochs": 2} | (settings or {}), "seeds": 1},
        "policies": {"ppo": {"gold": {"mean": gold}}},
        "cost": {"ppo": {"seconds": seconds, "num_tokens": 7}},
        "stages": {"0": {"ppo": digest}},
    }
    (evaluation / "results.json").write_text(json.dumps(results))
    if modes:
        (evaluation / "failure_modes.json").write_text(json.dumps({"sft": {"verbosity": 0.1}}))
    shown = PAGE.format(seconds=seconds, sentence=sentence, code=digest, cell=cell, word=word)
    (folder / "report" / "index.html").write_text(shown)
    for part in (stage, evaluation):
        (part / "DONE").touch()
    return folder


def test_two_runs_differ_in_times_hashes_and_code_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    one = study(tmp_path / "one")
    other = study(tmp_path / "other", digest="ba9876543210", seconds=3.5)
    assert witness.compare(one, other)
    said = capsys.readouterr().out
    assert "DIFFERS" not in said
    assert said.count("\nequal ") + said.startswith("equal ") == 6
    for file in (
        "seed-0/ppo/model/model.safetensors",
        "seed-0/ppo/metrics.jsonl",
        "seed-0/ppo/samples.jsonl",
        "seed-0/ppo/result.json",
        "evaluation/results.json",
        "report/index.html",
    ):
        assert file in said


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"weight": 1.0 + 1e-15}, "/w: F64 [3] "),
        ({"reward": 0.5000001}, "/0/reward: 0.5 -> /0/reward: 0.5000001"),
        ({"reply": "no"}, "/0/reply: 'yes' -> /0/reply: 'no'"),
        ({"gold": 0.3}, "/policies/ppo/gold/mean: 0.25 -> /policies/ppo/gold/mean: 0.3"),
        ({"settings": {"kl_coef": 0.1}}, "absent -> /settings/ppo/kl_coef: 0.1"),
        ({"sentence": "it broke"}, "(time), and it held. -> The run took (time), and it broke."),
        ({"cell": "0.2"}, "first quarter: 0.1 | change: rose | (time)"),
        ({"cell": "0.2", "word": "fell"}, "first quarter: 0.2 | change: fell | (time)"),
    ],
)
def test_what_changed_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture, change: dict, line: str
) -> None:
    one = study(tmp_path / "one")
    assert not witness.compare(one, study(tmp_path / "other", **change))
    said = capsys.readouterr().out
    assert said.count("DIFFERS") == 1
    (refused,) = [text for text in said.splitlines() if text.startswith("  NOT ALLOWED: ")]
    assert line in refused


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"settings": {"reward": "reward_model"}}),
        ({"deciding": "judge"}, {}),
        ({"word": "rose"}, {"word": "no clear change"}),
        ({"modes": True}, {}),
    ],
)
def test_what_is_allowed_is_no_error(tmp_path: Path, before: dict, after: dict) -> None:
    one, other = study(tmp_path / "one", **before), study(tmp_path / "other", **after)
    assert witness.compare(one, other)


def remove_a_stage(folder: Path) -> None:
    (folder / "seed-0" / "ppo-0123456789ab" / "DONE").unlink()


def remove_the_report(folder: Path) -> None:
    (folder / "report" / "index.html").unlink()


def keep_an_older_stage(folder: Path) -> None:
    study(folder / "old", digest="ba9876543210")
    (folder / "old" / "seed-0" / "ppo-ba9876543210").rename(folder / "seed-0" / "ppo-ba9876543210")


def test_a_stage_that_is_missing_is_found(tmp_path: Path) -> None:
    one, other = study(tmp_path / "one"), study(tmp_path / "other")
    remove_a_stage(other)
    assert not witness.compare(one, other)
    assert not witness.compare(other, one)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(remove_the_report, "has no report"), (keep_an_older_stage, "has seed-0/ppo twice")],
)
def test_what_is_not_one_finished_study_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    one, other = study(tmp_path / "one"), study(tmp_path / "other")
    spoil(other)
    with pytest.raises(SystemExit, match=message):
        witness.compare(one, other)


def test_only_what_is_missing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], *, cwd: Path, env: dict[str, str], check: bool) -> None:
        assert check
        assert env["PYTHONPATH"] == str(cwd)
        commands.append((command[0], cwd.name))
        (Path(command[-1])).rmdir()  # it was empty
        study(Path(command[-1]) / "smoke", weight=2.0 if cwd.name == "new" else 1.0)

    monkeypatch.setattr(witness.subprocess, "run", run)
    old, new, runs = tmp_path / "old", tmp_path / "new", tmp_path / "runs"
    study(runs / "before" / "smoke")
    with pytest.raises(SystemExit) as stopped:
        witness.main(old, new, runs=runs, reuse=True)
    assert stopped.value.code
    assert commands == [(sys.executable, "new")]
    with pytest.raises(FileExistsError):
        witness.main(old, new, runs=runs)
    with pytest.raises(SystemExit) as stopped:
        witness.main(old, old, runs=tmp_path / "fresh")
    assert not stopped.value.code
    assert commands[1:] == [(sys.executable, "old")] * 2
