"""A trained model, with its card, to a folder or to the hub: nothing leaves unless it is asked for.

python -m rlhf_lib push ppo OWNER/NAME
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, get_token

from rlhf_lib import catalogue
from rlhf_lib.files import write_json
from rlhf_lib.kernel import without_folders
from rlhf_lib.release import card
from rlhf_lib.results.summary import load_results
from rlhf_lib.runs import Stage
from rlhf_lib.settings import SettingsError, UserError
from rlhf_lib.study.book import evaluation_folder
from rlhf_lib.study.stages import Study, StudyError


def push(study: Study, name: str, target: str, public: bool = False) -> str:
    """Send the model of the stage `name` to `OWNER/NAME` on the hub, or write it to a new folder.

    A target is a folder where it begins with `./`, `/` or `~`. A repository that has to be made is
    private unless `public`. Returns where it is. Raises UserError for a stage that has no model or
    has not been run, a folder that is there already, a hub that refuses.
    """
    stage = _trained(study, name)
    if target.startswith((".", "/", "~")):
        folder = Path(target).expanduser()
        if folder.exists():
            raise UserError(f"{folder} is there already: name a folder that is not")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as place:  # nothing half-written stays behind
            _write(study, stage, Path(place) / "model")
            (Path(place) / "model").rename(folder)
        return str(folder)
    with TemporaryDirectory() as place:
        folder = Path(place) / "model"
        _write(study, stage, folder)
        return _upload(folder, target, public)


def _trained(study: Study, name: str) -> Stage:
    planned = study.planned()
    if name not in planned:
        raise SettingsError(f"this study has no stage {name!r}, only {', '.join(planned)}")
    stage = planned[name]
    stage.result()  # says so where it has not been run
    if not stage.model_path.is_dir():
        raise UserError(f"stage {name} trains no model")
    return stage


def _write(study: Study, stage: Stage, folder: Path) -> None:
    """Model, tokenizer, adapters where there are some, and the card as README.md."""
    shutil.copytree(stage.model_path, folder)
    adapter = stage.path / "adapter"
    if adapter.is_dir():
        shutil.copytree(adapter, folder / "adapter")
        named = folder / "adapter" / "adapter_config.json"
        read = json.loads(named.read_text(encoding="utf-8"))
        base = Path(read["base_model_name_or_path"]).parent  # of another stage's model
        mine = next((s.name for s in study.planned().values() if s.path == base), "")
        name = mine or without_folders(read["base_model_name_or_path"])
        write_json(named, {**read, "base_model_name_or_path": name})
    (folder / "README.md").write_text(
        card.text(
            catalogue.record(stage.name), stage, study.run.profile.model.name, study.data.audit,
            _results(study, stage), adapter.is_dir(),
        ),
        encoding="utf-8",
    )  # fmt: skip


def _results(study: Study, stage: Stage) -> dict | None:
    """Of the newest evaluation of the study, if this very model is in it."""
    try:
        folder = evaluation_folder(study.run.profile, study.run.root)
    except StudyError:
        return None
    results = load_results(folder)
    known = results["stages"].get(str(study.run.seed), {}).get(stage.name)
    return results if known == stage.hash else None


def _upload(folder: Path, repository: str, public: bool) -> str:
    if not get_token():
        raise UserError(
            "the hub wants to know who you are: hf auth login, or a token in the environment "
            "variable HF_TOKEN"
        )
    hub, made = HfApi(endpoint=os.environ.get("HF_ENDPOINT")), None
    try:
        made = hub.create_repo(repository, private=not public, exist_ok=True)
        hub.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Upload a model of rlhf_lib"
        )
    except Exception as error:  # of the client, or of whatever HTTP library is under it
        stands = f"; {made} is there, without all of the model" if made else ""
        raise UserError(f"the hub did not take {repository}: {error}{stands}") from error
    return str(made)
