"""The state of a stage under way, in two slots that are overwritten in turn.

A slot counts once its `progress.json` stands, which holds a hash of every other file in it and one
of itself; the newest one that is whole is gone on from. Its files are emptied before they are
overwritten: a drive that keeps what is deleted or replaced would be full of old states in minutes.

A state is what has been registered with the `accelerate` handle (learners, and whatever else
changes), the random numbers' places, and in fp16 the loss's scale: tensors in one safetensors file,
all else as JSON. Nothing of it hangs on how many processes computed it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_lib import files, processes
from rlhf_lib.settings import UserError, content_hash

SLOTS = ("checkpoint-a", "checkpoint-b")
PROGRESS = "progress.json"
SHARE = 0.05  # of a stage's time that saving its state may take
TENSORS, REST = "state.safetensors", "state.json"
PLACE = "tensor at"  # stands for a tensor in the JSON
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
        slot.mkdir(exist_ok=True)
        try:
            _write(slot, _state(accelerator))
        except SafetensorError as error:
            raise files.unwritten(slot.parent, error) from error
        state = files.plain({**progress, "files": _hashes(slot)})
        files.write_json(slot / PROGRESS, state | {"hash": content_hash(state)})
        self._whole = slot
        self._saved = time.perf_counter()
        self.taken = self._saved - began

    def restore(self, accelerator: Accelerator) -> dict[str, Any] | None:
        """Load the newest whole state, and return what it was saved with; None if there is none."""
        progress, self._whole = processes.told(self._newest)
        if self._whole is not None:
            _set(accelerator, _read(self._whole))
        return progress

    def _newest(self) -> tuple[dict[str, Any], Path] | tuple[None, None]:
        """The newest slot that is whole, and what it was saved with."""
        found = [(state, slot) for slot in self.slots if (state := _progress(slot))]
        for state, slot in sorted(found, key=lambda each: -each[0]["step"]):
            if not (damaged := _damaged(slot, state["files"])):
                return state, slot
            log.warning("%s is damaged (%s): it is passed over", slot, ", ".join(damaged))
        return None, None

    def discard(self) -> None:
        for slot in self.slots:
            files.discard(slot)


def _sizes(accelerator: Accelerator) -> tuple[int, int]:
    """Bytes of all models, and of a state: the weights that learn, and two moments for each."""
    models = [m.model for m in accelerator._custom_objects if hasattr(m, "model")]
    weights = [w for model in models for w in model.parameters()]
    model = sum(w.numel() * w.element_size() for w in weights)
    return model, sum(3 * w.numel() * w.element_size() for w in weights if w.requires_grad)


def _state(accelerator: Accelerator) -> dict[str, Any]:
    """All that a stage has changed up to now."""
    kind, numbers, *place = np.random.get_state()
    return {
        "changed": [one.state_dict() for one in accelerator._custom_objects],
        "scale": accelerator.scaler.state_dict() if accelerator.scaler else {},  # type: ignore
        "random": {
            "python": random.getstate(),
            "numpy": [kind, numbers.tolist(), *place],  # type: ignore[union-attr]
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
    }


def _set(accelerator: Accelerator, state: dict[str, Any]) -> None:
    for one, found in zip(accelerator._custom_objects, state["changed"], strict=True):
        one.load_state_dict(found)
    if accelerator.scaler and state["scale"]:
        accelerator.scaler.load_state_dict(state["scale"])
    places = state["random"]
    version, numbers, *rest = places["python"]
    random.setstate((version, tuple(numbers), *rest))
    np.random.set_state(tuple(places["numpy"]))
    torch.set_rng_state(places["torch"])
    if len(places["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(places["cuda"])


def _write(slot: Path, state: object) -> None:
    tensors: dict[str, Tensor] = {}
    rest = _without_tensors(state, "", tensors)
    save_file(tensors, slot / TENSORS)
    (slot / REST).write_text(json.dumps(rest))  # a best reward may be infinite still


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value in which each tensor is put into `tensors`, and where it lies stands in its place."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {PLACE: name}
    if isinstance(value, Mapping):
        return {k: _without_tensors(v, f"{name}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _read(slot: Path) -> dict[str, Any]:
    # copies: what was read lies in the file itself, which will be emptied
    tensors = {name: tensor.clone() for name, tensor in load_file(slot / TENSORS).items()}

    def whole(found: dict) -> Any:
        return tensors[found[PLACE]] if PLACE in found else found

    return json.loads((slot / REST).read_text(), object_hook=whole)


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
