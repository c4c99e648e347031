"""One seed of a study: the stages of the catalogue, each run when it is first asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from rlhf_lib import catalogue, kernel
from rlhf_lib.catalogue import Record
from rlhf_lib.data.pairs import PreferenceData, load_data
from rlhf_lib.data.truth import truth_of
from rlhf_lib.models.load import load_tokenizer
from rlhf_lib.profiles import Overrides, check_seed, of_settings
from rlhf_lib.results import summary
from rlhf_lib.runs import Run, Stage
from rlhf_lib.runtime import set_up_process
from rlhf_lib.settings import DataConfig, Profile, UserError, unknown
from rlhf_lib.study.training import Offer, check_stage, run_stage, stage_of
from rlhf_lib.world.rewards import DOSES


class StudyError(UserError):
    """A notebook or stage of the study failed; the message says which and why."""


def notebook_path(profile: Profile, run_dir: str | Path, name: str) -> Path:
    """Where the executed notebook lies: those of other settings have a folder of their own."""
    return Path(run_dir) / profile.name / of_settings("notebooks", profile) / f"{name}.ipynb"


def rival(seed: int) -> int:
    """The seed whose reward model gives the second opinion: however many there are, the same."""
    return seed - 1 if seed else 1


def read_data(config: DataConfig, model: str) -> PreferenceData:
    """The pairs, in the tokens of this model."""
    return load_data(config, load_tokenizer(model))


class Study:
    """One seed of a study; a stage is run when it is first asked for, what it needs before it."""

    def __init__(self, run: Run) -> None:
        self.run, self.read = run, read_data
        self._labelled: dict[str, PreferenceData] = {}
        set_up_process(run.profile.threads)

    @classmethod
    def open(
        cls,
        profile: str,
        seed: int = 0,
        run_dir: str | Path = "runs",
        overrides: Overrides = (),
    ) -> Study:
        """A relative `run_dir` is the checkout's, wherever in it a notebook was opened.

        Raises SettingsError for an argument of the wrong type, and for a parameter of papermill's
        that no notebook has.
        """
        kernel.check_parameters()
        root = kernel.in_checkout(kernel.check_folder(run_dir))
        return cls(Run.open(profile, check_seed(seed), root, overrides))

    @cached_property
    def data(self) -> PreferenceData:
        return self.read(self.run.profile.data, self.run.profile.model.name)

    def labelled(self, taste: str) -> PreferenceData:
        """The same pairs of the bundled world, labelled by an annotator of another taste: `DOSES`,
        of which "control" has none.
        """
        if taste not in self._labelled:
            config = replace(self.run.profile.data, source=f"bundled:{taste}")
            self._labelled[taste] = self.read(config, self.run.profile.model.name)
        return self._labelled[taste]

    def stage(self, name: str) -> Stage:
        """The finished stage `name`; missing ones are run first, in the order of their needs."""
        record = self._record(name)
        profile = self.run.profile
        check_stage(record, profile, truth_of(profile.data.source))
        return run_stage(self.run, record, self._data(record), self.needed(name))

    def outlook(self, notebook: str) -> str:
        """What of all that a notebook reads is done, and what it will have to run first.

        In batch nobody reads it, and the control's pairs would be loaded for it: then it is empty.
        """
        if os.environ.get("RLHF_BATCH"):
            return ""
        found, missing = self.planned(notebook), self.missing(notebook)
        folder = self.run.root.resolve() / self.run.profile.name
        done = f"{len(found) - len(missing)} of {len(found)} stages are done"
        said = f"{folder}, seed {self.run.seed}: {done}"
        if missing:
            return f"{said}; to be run first, when they are asked for: {', '.join(missing)}."
        return f"{said}: nothing has to be trained."

    def planned(self, notebook: str = "") -> dict[str, Stage]:
        """The stages that a notebook reads, done or not; by default all of this seed."""
        every = notebook in ("", list(catalogue.notebooks())[-1])  # the last compares all there is
        records = catalogue.stages(self.run.profile, self.run.seed)
        found: dict[str, Stage] = {}
        for record in records:
            if every or record.notebook == notebook:
                self._planned(record.name, found)
        return found

    def missing(self, notebook: str = "") -> list[str]:
        """Those of them that have to be run first."""
        return [name for name, stage in self.planned(notebook).items() if not stage.done]

    def _planned(self, name: str, found: dict[str, Stage]) -> Stage:
        """A stage under its hash, with what it needs, and nothing run; `found` gets all of them."""
        if name not in found:
            needs = catalogue.needs(self.run.profile, name, self.run.seed)
            needed = {other: self._planned(other, found) for other in needs}
            if name == "second_opinion":
                needed["rival"] = self._rival(stage_of)
            record = self._record(name)
            found[name] = stage_of(self.run, record, self._data(record), needed)
        return found[name]

    def plans(self, name: str) -> bool:
        """Whether this seed of a study runs it."""
        return any(r.name == name for r in catalogue.stages(self.run.profile, self.run.seed))

    def variant(self, name: str, of: str, **changes: object) -> Stage:
        """The stage `of` once more, under another name and with other settings."""
        record = self._record(of)
        record = replace(record, name=name, changes=lambda p, c=record.changes: c(p) | changes)
        return run_stage(self.run, record, self._data(record), self.needed(of))

    def offer(self, name: str) -> Offer:
        """The live objects that the stage `name` works on, to be looked at: nothing is trained."""
        record = self._record(name)
        return Offer(self.run, record, self._data(record), self.needed(name))

    def _record(self, name: str) -> Record:
        # what a study runs in its first seed alone may be asked for in any
        planned = (catalogue.stages(self.run.profile, seed) for seed in (self.run.seed, 0))
        known = {record.name: record for records in planned for record in records}
        if name not in known:
            raise unknown("stage", name, known)
        return known[name]

    def _data(self, record: Record) -> PreferenceData:
        return self.labelled(record.pairs) if record.pairs in DOSES else self.data

    def needed(self, name: str) -> dict[str, Stage]:
        """The stages that `name` reads, run if missing."""
        profile, seed = self.run.profile, self.run.seed
        needed = {other: self.stage(other) for other in catalogue.needs(profile, name, seed)}
        if name == "second_opinion":
            needed["rival"] = self._rival(run_stage)
        return needed

    def _rival(self, make: Callable[..., Stage]) -> Stage:
        """Another seed's reward model, run or planned."""
        other = replace(self.run, seed=rival(self.run.seed))
        return make(other, self._record("reward_model"), self.data, {})

    def stages(self) -> dict[str, Stage]:
        """All stages of this seed, run if missing."""
        records = catalogue.stages(self.run.profile, self.run.seed)
        return {record.name: self.stage(record.name) for record in records}


def summarise(profile: Profile, run_dir: Path) -> Path:
    """The evaluation folder over all seeds of the profile; stages that are missing are run."""
    studies = [Study(Run(profile, seed, Path(run_dir))) for seed in range(profile.seeds)]
    stages = [study.stages() for study in studies]
    return summary.summarise([study.run for study in studies], stages, studies[0].data)
