"""What `docs/` promises: every command runs, every setting exists, every file is written."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_lib import catalogue
from rlhf_lib.__main__ import app, main
from rlhf_lib.profiles import PROFILES, load_profile, paths
from rlhf_lib.study import stages

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "from-earlier-scripts.md").read_text(encoding="utf-8")
INTERFACE = {  # what the earlier script had
    "modes": "prepare_data train_reward train_ppo train_grpo train_dpo evaluate all",
    "options": (
        "seed output_dir use_gpu dataset_name max_length data_subset_size batch_size num_epochs "
        "learning_rate gradient_accumulation_steps kl_coef clip_ratio entropy_coef group_size "
        "dpo_beta eval_prompts"
    ),
}
TINY = (
    "data.train_pairs=16 data.validation_pairs=4 data.test_pairs=8 data.demonstrations=16 "
    "data.rl_prompts=8 data.evaluation_prompts=8 reward_model.curve_points=0 rejection.prompts=8 "
    "rejection.samples=2 ppo.updates=1 ppo.batch_size=8 ppo.minibatch_size=8 grpo.updates=1 "
    "grpo.prompts_per_update=2 dpo.probes=1 dpo.probe_prompts=2 evaluation.best_of_n=2 "
    "evaluation.best_of_n_prompts=2 evaluation.heldout_texts=4 evaluation.samples_per_prompt=1 "
    "evaluation.baseline_samples=2 evaluation.measured_prompts=8 evaluation.measured_samples=1 "
    "evaluation.probe_prompts=1 sweep.stronger=0 extras=false"
)


def table(title: str) -> list[list[str]]:
    """The rows of the table under a heading."""
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_nothing_of_the_earlier_interface_is_missing() -> None:
    modes = {quoted(row[0])[0].split()[1] for row in table("Commands") if quoted(row[0])}
    assert modes == set(INTERFACE["modes"].split())
    options = {quoted(row[0])[0].removeprefix("--") for row in table("Options")}
    assert options == set(INTERFACE["options"].split())


def test_every_option_has_its_place() -> None:
    known = paths()
    helped = "".join(CliRunner().invoke(app, [c, "--help"]).output for c in ("run", "ppo"))
    for _, here, _ in table("Options"):
        for name in quoted(here):
            assert name in (helped if name.startswith("--") else known), name


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of the table has been run, and what follows from them."""
    folder = tmp_path_factory.mktemp("earlier")
    asked = [part for setting in TINY.split() for part in ("--set", setting)]
    asked += ["--profile", "smoke", "--run-dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RLHF_THREADS", "1")
        for _, here, _ in table("Commands"):
            (command,) = quoted(here)
            words = command.removeprefix("python -m rlhf_lib ").split()
            run(*words, *asked)
        profile = catalogue.load("smoke", TINY)
        stages.summarise(profile, folder)
        run("export", str(folder / "smoke" / "figures"), *asked)
    return folder / "smoke"


def run(*arguments: str) -> None:
    """The command line, which has to end well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rlhf_lib", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code, arguments


@pytest.mark.slow
def test_every_command_writes_what_the_table_says(written: Path) -> None:
    for _, here, file in table("Commands"):
        for pattern in quoted(file):
            if not pattern.startswith("--"):
                assert list(written.glob(pattern)), (here, pattern)


@pytest.mark.slow
def test_every_output_is_found_where_the_table_says(written: Path) -> None:
    for before, here in table("Outputs"):
        for pattern in quoted(here):
            assert list(written.glob(pattern)), (before, pattern)


def test_the_advice_names_settings_that_exist() -> None:
    for row in table("How long, on what"):
        for command in quoted(" ".join(row[1:])):
            profile = re.search(r"--profile (\w+)", command)
            settings = re.findall(r"--set (\S+)", command)
            found = load_profile(profile[1] if profile else "t4", settings)
            assert found.name in PROFILES
            if "ppo.updates" in command:
                replies = found.grpo.prompts_per_update * found.grpo.group_size
                assert found.ppo.updates * found.ppo.batch_size == found.grpo.updates * replies
                drawn = found.rejection.prompts * found.rejection.samples
                assert drawn == found.grpo.updates * replies


def test_every_failure_names_a_test_that_is_there() -> None:
    for seen, why, _ in table("When something goes wrong"):
        files = [name for name in quoted(why) if name.startswith("tests/")]
        assert files, seen
        for name in files:
            assert (ROOT / name).is_file()
        for sentence in quoted(seen):
            part = re.split(r"…|\.\.\.", sentence)[0].strip()
            code = "".join(p.read_text() for p in (ROOT / "rlhf_lib").rglob("*.py"))
            code += (ROOT / "tools" / "colab.py").read_text()
            assert re.sub(r"\bppo\b", "", part).split()[0] in code, seen
