"""Models with something odd in their settings: read as they are, or refused before any use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_lib.models import agreement
from rlhf_lib.models.load import load_policy, load_reward_model, load_tokenizer
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.models.packing import reading_of
from rlhf_lib.settings import SettingsError
from tools.families import GROUPED, NARROW, VOCABULARY, byte_tokenizer

EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
PROMPTS = [[60, 61, 62, 63, 64], [60, 61, 62, 63, 64], [70, 71, 72]]
RESPONSES = [[80, 81, 82], [90, 91, 92, 93, 1], [100, 101]]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """A random model of a class of transformers, as somebody else would have saved it."""

    def save(name: str, scale: float = 8.0, **settings: Any) -> Path:
        special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2} | settings
        config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **special)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        grow(model, scale)
        model.save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        return tmp_path

    return save


def grow(model: PreTrainedModel, scale: float) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(scale)


def apart(model: PreTrainedModel, prompt: list[int], response: list[int]) -> float:
    """How far log-probs as they are read here are from the model's own forward pass."""
    with torch.no_grad():
        found, mask = response_logprobs(model, [prompt, prompt], [response, response[:-1]])
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    own = logits.log_softmax(-1)[torch.arange(len(response)), response]
    return float((found[0][mask[0].bool()] - own).abs().max())


def test_several_end_tokens(saved: Callable[..., Path]) -> None:
    folder = saved("Llama", **GROUPED, eos_token_id=[1, 5, 7])
    assert apart(load_policy(folder), PROMPTS[0], RESPONSES[1]) < 1e-4
    load_reward_model(folder, load_tokenizer(folder), seed=0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
        ("RecurrentGemma", {**GROUPED, "num_hidden_layers": 3, "lru_width": 32}),
    ],
)
def test_a_cache_that_rows_cannot_leave_is_refused(
    name: str, settings: dict, saved: Callable[..., Path]
) -> None:
    with pytest.raises(SettingsError, match=rf"{name}ForCausalLM"):
        load_policy(saved(name, **settings))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("Mixtral", {**EXPERTS, "router_jitter_noise": 0.1}), ("Phimoe", EXPERTS)],
)
def test_what_is_random_in_training_is_off(
    name: str, settings: dict, saved: Callable[..., Path]
) -> None:
    model = load_policy(saved(name, **settings))
    read, _ = response_logprobs(model, PROMPTS, RESPONSES)
    trained, _ = response_logprobs(model.train(), PROMPTS, RESPONSES)
    torch.testing.assert_close(trained, read)


def test_what_cannot_be_switched_off_is_refused(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_lib.models.load.NOISE", ())
    with pytest.raises(SettingsError, match="gives other numbers while it trains"):
        load_policy(saved("Mixtral", **EXPERTS, router_jitter_noise=0.1))


def test_dropout_of_settings_inside_settings_is_dropped(saved: Callable[..., Path]) -> None:
    attention = {"attn_pdrop": 1}
    model = load_policy(saved("Mpt", d_model=32, n_layers=2, n_heads=4, attn_config=attention))
    assert model.config.attn_config.attn_pdrop == 0


@pytest.mark.parametrize("name", ["Gemma2", "Gemma3Text"])
def test_a_cap_that_small_weights_do_not_reach_is_kept_to(
    name: str, saved: Callable[..., Path]
) -> None:
    """Fresh weights give logits far below it; those that have learnt do not."""
    folder = saved(name, scale=1, **NARROW, sliding_window=16, final_logit_softcapping=5.0)
    model = load_policy(folder)
    assert reading_of(model).own_end
    grow(model, 30)
    assert apart(model, PROMPTS[0], RESPONSES[1]) < 1e-3


def test_rotations_that_change_with_the_length_set_a_limit(saved: Callable[..., Path]) -> None:
    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    folder = saved(
        "Phi3", **GROUPED, max_position_embeddings=256, original_max_position_embeddings=32,
        rope_scaling=rope,
    )  # fmt: skip
    model = load_policy(folder)
    assert agreement.widest_row(model) == 32
    assert load_tokenizer(folder).model_max_length == 32
    assert apart(model, list(range(60, 80)), list(range(90, 100))) < 1e-4


# ------------------------------------------------------------------------- damaged folders


def with_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "fooformer"}, "cannot be loaded: ValueError: .*fooformer"),
        ({"model_type": "fooformer", "auto_map": {"AutoConfig": "a.B"}}, "cannot be loaded"),
        ({"hidden_act": "foo"}, "cannot be loaded: KeyError: 'foo'"),
        ({"vocab_size": 300}, "cannot be loaded: RuntimeError|has no weights|size"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot be loaded"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_one_sentence(
    changes: dict, said: str, saved: Callable[..., Path]
) -> None:
    with pytest.raises(SettingsError, match=said) as error:
        load_policy(with_config(saved("Llama", **GROUPED), **changes))
    assert "\n" not in str(error.value)


def test_a_pointer_in_the_place_of_weights_is_one_sentence(saved: Callable[..., Path]) -> None:
    folder = saved("Llama", **GROUPED)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(SettingsError, match=r"cannot be loaded: SafetensorError|unknown model"):
        load_policy(folder)


def test_weights_with_scales_beside_them_are_no_weights(saved: Callable[..., Path]) -> None:
    folder = saved("Llama", **GROUPED)
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("q_proj.weight"))
    weights[f"{name}_scale_inv"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingsError, match="is quantised in a way that"):
        load_policy(folder)


def test_a_tokenizer_with_holes_counts_up_to_its_last_token(saved: Callable[..., Path]) -> None:
    folder = saved("Llama", **GROUPED)
    path = folder / "tokenizer.json"
    written = json.loads(path.read_text())
    written["model"]["vocab"]["zzz"] = 1000
    path.write_text(json.dumps(written))
    with pytest.raises(SettingsError, match="1001 tokens and its embedding 272"):
        load_tokenizer(folder)
