"""A session on Colab: a GPU, a folder that outlives it, and the profile that fits both.

Each notebook has a machine of its own there: the next chapter finds what lies on Drive, and nothing
else of what this one trained.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from rlhf_lib.profiles import Overrides
from rlhf_lib.session import probe
from rlhf_lib.study.stages import Study

DRIVE = Path("/content/drive")
FOLDER = Path("MyDrive/rlhf_lib/runs")
PROFILE, RUN_DIR = "laptop", "runs"  # as the notebooks come
NO_GPU = (
    "No GPU is on. To switch one on: Runtime, Change runtime type, T4 GPU; then run this notebook "
    "from the top. Without one PROFILE stays {profile!r}, on this machine's CPU."
)
GPU = "GPU: {name}. PROFILE is {profile!r}; another one is set in a cell below this one."
ASKED = "Keep runs on your Drive, so that the next chapter finds them and nothing is lost? [y/n] "
KEPT = "Runs are kept on your Drive, in {folder}."
LOST = (
    "Runs stay on this machine, which is gone when the session ends, and no other chapter finds "
    "them. To keep them run this cell again, or set RUN_DIR to a folder of a drive."
)


def begin(
    notebook: str, profile: str, seed: int, run_dir: str, overrides: Overrides
) -> tuple[str, str]:
    """PROFILE and RUN_DIR for this session: chosen where they are as the notebook came, else kept.

    Prints what was chosen, what is missing, and what has to be trained before this chapter is
    through, with the minutes that a probe foresees.
    """
    if torch.cuda.is_available():
        profile = "t4" if profile == PROFILE else profile
        print(GPU.format(name=torch.cuda.get_device_name(), profile=profile))
    else:
        print(NO_GPU.format(profile=profile))
    folder = _folder(run_dir)
    print(outlook(Study.open(profile, seed, folder, overrides), notebook))
    return profile, folder


def outlook(study: Study, notebook: str) -> str:
    """What a notebook has to train first, and how long that takes here; probed once a machine."""
    missing = study.missing(notebook)
    if not missing:
        return "Nothing has to be trained for this chapter."
    if missing == ["dataset"]:
        return "This chapter reads the pairs, and trains nothing."
    profile = study.run.profile
    stages = probe.of_machine(profile).stages(profile, study.run.seed)
    minutes = sum(stages.get(name, 0.0) for name in missing) / 60
    about = f"about {minutes:.0f} minutes" if minutes >= 1.5 else "a minute or less"
    return f"What this chapter has to train first takes {about} here."


def _folder(run_dir: str) -> str:
    """Where runs go: on Drive if the user wants it, or had it mounted before."""
    if run_dir not in (RUN_DIR, str(DRIVE / FOLDER)):
        return run_dir
    if not (DRIVE / FOLDER.parts[0]).is_dir() and not (_wanted() and _mounted()):
        print(LOST)
        return RUN_DIR
    print(KEPT.format(folder=DRIVE / FOLDER))
    return str(DRIVE / FOLDER)


def _mounted() -> bool:
    """Mount the drive; what the user or Colab refuses is said."""
    try:
        importlib.import_module("google.colab.drive").mount(str(DRIVE))
    except Exception as error:  # of Colab's own, whatever it is
        print(f"Drive could not be mounted: {error}")
        return False
    return True


def _wanted() -> bool:
    """What the user says; where nobody can be asked, as under papermill, no."""
    try:
        return input(ASKED).strip().lower().startswith("y")
    except (EOFError, NotImplementedError, RuntimeError):  # StdinNotImplementedError is a third
        return False
