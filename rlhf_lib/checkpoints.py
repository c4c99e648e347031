"""The state of a stage under way, in two slots that are overwritten in turn.

A slot counts once its `progress.json` stands, which holds a hash of every other file in it and one
of itself; the newest one that is whole is gone on from. Its files are emptied before they are
overwritten: a drive that keeps what is deleted or replaced would be full of old states in minutes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from rlhf_lib import files
from rlhf_lib.settings import UserError, content_hash

SLOTS = ("checkpoint-a", "checkpoint-b")
PROGRESS = "progress.json"
SHARE = 0.05  # of a stage's time that saving its state may take
TORCH_WRITES = "PytorchStreamWriter"  # what torch says where a file cannot be written
CHUNK = 1 << 22  # bytes read at once
log = logging.getLogger(__name__)


class Checkpoints:
    """The two slots in the folder of a stage under way; `minutes`: between two states, at least."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.slots = [folder / name for name in SLOTS]
        self.minutes = minutes
        self.taken = 0.0  # seconds that the last state took
        self._saved = time.perf_counter()
        self._whole: Path | None = None  # the slot that is gone on from if this process dies now

    @property
    def exist(self) -> bool:
        return any((slot / PROGRESS).exists() for slot in self.slots)

    @property
    def due(self) -> bool:
        """Whether it is time: after 0 minutes it always is, else saving keeps to its share."""
        rest = max(60 * self.minutes, self.taken * (1 / SHARE - 1))
        return self.minutes == 0 or time.perf_counter() - self._saved >= rest

    def check_space(self, accelerator: Accelerator) -> None:
        """Raises UserError where the disk cannot hold two states and the finished model."""
        model, state = _sizes(accelerator)
        lies = sum(file.stat().st_size for slot in self.slots for file in slot.glob("*"))
        needed, free = model + 2 * state - lies, files.free_space(self.slots[0].parent)
        if free < needed:
            raise UserError(
                f"{free / 1e9:.1f} GB are free where {self.slots[0].parent} is written, and this "
                f"stage needs {needed / 1e9:.1f}, two saved states among it: make room, or choose "
                "another place (--run-dir, in a notebook RUN_DIR)"
            )

    def save(self, accelerator: Accelerator, progress: dict[str, Any]) -> None:
        """Save the state over the slot that is not gone on from; `progress` has its `step`."""
        began = time.perf_counter()
        slot = next(slot for slot in self.slots if slot != self._whole)
        (slot / PROGRESS).unlink(missing_ok=True)  # from here on it does not count
        files.empty(slot)
        try:
            accelerator.save_state(str(slot))
        except SafetensorError as error:
            raise files.unwritten(slot.parent, error) from error
        except RuntimeError as error:
            if TORCH_WRITES not in str(error):
                raise
            raise files.unwritten(slot.parent, error) from error
        state = files.plain({**progress, "files": _hashes(slot)})
        files.write_json(slot / PROGRESS, state | {"hash": content_hash(state)})
        self._whole = slot
        self._saved = time.perf_counter()
        self.taken = self._saved - began

    def restore(self, accelerator: Accelerator) -> dict[str, Any] | None:
        """Load the newest whole state, and return what it was saved with; None if there is none."""
        found = [(state, slot) for slot in self.slots if (state := _progress(slot))]
        for state, slot in sorted(found, key=lambda each: -each[0]["step"]):
            if damaged := _damaged(slot, state["files"]):
                log.warning("%s is damaged (%s): it is passed over", slot, ", ".join(damaged))
                continue
            accelerator.load_state(str(slot))
            self._whole = slot
            return state
        return None

    def discard(self) -> None:
        for slot in self.slots:
            files.discard(slot)


def _sizes(accelerator: Accelerator) -> tuple[int, int]:
    """Bytes of all models, and of a state: these, and two moments for each weight that learns."""
    weights = [w for model in accelerator._models for w in model.parameters()]
    model = sum(w.numel() * w.element_size() for w in weights)
    return model, model + sum(2 * w.numel() * w.element_size() for w in weights if w.requires_grad)


def _progress(slot: Path) -> dict[str, Any] | None:
    """What a slot was saved with; None for one that never was, or that says nothing readable."""
    try:
        state = json.loads((slot / PROGRESS).read_text(encoding="utf-8"))
        if state.pop("hash") == content_hash(state):
            return state
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        pass  # as damaged as one whose hash is another
    log.warning("%s is not what was saved: this state is passed over", slot / PROGRESS)
    return None


def _hashes(slot: Path) -> dict[str, str]:
    """SHA-256 of every file of a state, by its name."""
    saved = (path for path in sorted(slot.iterdir()) if not path.name.startswith(PROGRESS))
    return {path.name: _hash(path) for path in saved}


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as content:
        while part := content.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def _damaged(slot: Path, hashes: dict[str, str]) -> list[str]:
    """Names of the files that are not what was saved."""
    present = {name: slot / name for name in hashes if (slot / name).is_file()}
    return [n for n, saved in hashes.items() if n not in present or _hash(present[n]) != saved]
