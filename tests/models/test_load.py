"""Loading and saving: the same numbers after a round trip, under plain transformers too."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf_lib.models import kernels
from rlhf_lib.models.generation import CACHE
from rlhf_lib.models.load import (
    fingerprint,
    freeze,
    load_policy,
    load_reference,
    load_reward_model,
    load_tokenizer,
    load_value_model,
    save_model,
    trainable,
)
from rlhf_lib.runtime import make_accelerator
from rlhf_lib.settings import ModelConfig, SettingsError

VOCABULARY = 97
EOS, OWN_PAD = VOCABULARY - 1, VOCABULARY - 2
SHAPES = {
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        eos_token_id=EOS,
        bos_token_id=EOS,
    ),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        eos_token_id=EOS,
        attention_dropout=0.1,
    ),
}
PADS = ["none", "eos", "own"]  # what the base model's tokenizer pads with


def make_tokenizer(pad: str) -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY - 2)} | {"<own>": OWN_PAD, "<eos>": EOS}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    if pad != "none":
        wrapped.pad_token = {"eos": "<eos>", "own": "<own>"}[pad]
    return wrapped


@pytest.fixture(params=SHAPES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random language model in a folder, as somebody else would have saved it, in bf16."""
    return make_base(request.param, tmp_path / "base")


def make_base(shape: str, folder: Path, pad: str = "none") -> Path:
    model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer(pad).save_pretrained(folder)
    return folder


def rows() -> list[list[int]]:
    """Sequences of mixed lengths, each ending with EOS: the token whose score is wanted."""
    generator = torch.Generator().manual_seed(1)
    return [
        [*torch.randint(0, OWN_PAD, (length,), generator=generator).tolist(), EOS]
        for length in (3, 11, 1, 7)
    ]


@torch.no_grad()
def scores_alone(model: PreTrainedModel) -> Tensor:
    """The score at the last token of each row, computed row by row without any padding."""
    hidden = [model.base_model(input_ids=torch.tensor([row])).last_hidden_state for row in rows()]
    return torch.stack([model.score(states[0, -1])[0] for states in hidden])


@torch.no_grad()
def scores_plain(folder: Path) -> Tensor:
    """What a stranger gets: plain transformers, its own pooling, right padding by the tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    batch = tokenizer.pad({"input_ids": rows()}, return_tensors="pt")
    return model(**batch).logits.squeeze(-1)


# ---------------------------------------------------------------------------------- reward model


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_saved_reward_model_scores_the_same(shape: str, pad: str, tmp_path: Path) -> None:
    """Trap 10: head not saved, or a pad id that makes transformers score the wrong token."""
    base = make_base(shape, tmp_path / "base", pad)
    model, tokenizer = load_reward_model(base, load_tokenizer(base), seed=0)
    model.score.weight.data.mul_(100)
    before = scores_alone(model)
    assert before.std() > 0.1
    save_model(model, tokenizer, tmp_path / "reward")
    assert torch.allclose(scores_plain(tmp_path / "reward"), before, atol=1e-6)
    # a seed no longer matters, and the policy's own tokenizer serves as well
    again, _ = load_reward_model(tmp_path / "reward", load_tokenizer(base), seed=9)
    assert torch.allclose(scores_alone(again), before, atol=1e-6)
    assert again.config.vocab_size == model.config.vocab_size
    assert torch.allclose(scores_alone(load_value_model(tmp_path / "reward")), before, atol=1e-6)


@pytest.mark.parametrize("pad", PADS)
def test_only_a_reward_model_without_a_pad_of_its_own_grows(tmp_path: Path, pad: str) -> None:
    base = make_base("gpt2", tmp_path / "base", pad)
    tokenizer = load_tokenizer(base)
    model, own = load_reward_model(base, tokenizer, seed=0)
    grown = 0 if pad == "own" else 1
    assert model.get_input_embeddings().num_embeddings == VOCABULARY + grown
    assert model.config.pad_token_id == own.pad_token_id == (VOCABULARY if grown else OWN_PAD)
    assert own.pad_token_id != own.eos_token_id
    # the policy's tokenizer is left alone, and their ids agree
    assert tokenizer.pad_token == {"none": None, "eos": "<eos>", "own": "<own>"}[pad]
    assert len(tokenizer) == VOCABULARY
    assert own("w1 w2 <eos>")["input_ids"] == tokenizer("w1 w2 <eos>")["input_ids"]
    assert load_policy(base).get_input_embeddings().num_embeddings == VOCABULARY


def test_head_starts_small_and_depends_on_the_seed_alone(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    one, same, other = (load_reward_model(base, tokenizer, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)
    assert 0.003 < one.score.weight.std() < 0.03
    assert torch.equal(scores_alone(one), scores_alone(same))


def test_extra_settings_are_saved(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_reward_model(base, load_tokenizer(base), seed=0)
    model.config.reward_mean = 0.25
    save_model(model, tokenizer, tmp_path / "reward")
    assert load_value_model(tmp_path / "reward").config.reward_mean == 0.25


def test_value_model_from_a_language_model_is_refused(base: Path) -> None:
    with pytest.raises(SettingsError, match=r"no weights for score\.weight"):
        load_value_model(base)


# ---------------------------------------------------------------------------------------- policy


def test_policy_is_fp32_without_dropout(base: Path) -> None:
    """Traps 4 and 14: two passes in train mode agree, and small steps are not rounded away."""
    model = load_policy(base).train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == kernels.NAME
    assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))
    ids = torch.tensor(rows()[1:2])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_saved_policy_samples_from_the_whole_softmax(base: Path, tmp_path: Path) -> None:
    """Trap 6: left to itself, transformers keeps the 50 likeliest tokens only."""
    save_model(load_policy(base), load_tokenizer(base), tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    model.get_output_embeddings().weight.data.zero_()  # every token equally likely
    ids = torch.ones(600, 1, dtype=torch.long)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
    assert len(set(output[:, 1].tolist())) > 60
    saved = json.loads((tmp_path / "policy/generation_config.json").read_text())
    assert (saved["do_sample"], saved["top_k"], saved["top_p"]) == (True, 0, 1.0)
    assert (saved["eos_token_id"], saved["pad_token_id"]) == (EOS, EOS)


def test_saved_policy_is_the_same_policy(base: Path, tmp_path: Path) -> None:
    model = load_policy(base).eval()
    ids = torch.tensor(rows()[1:2])
    save_model(model, load_tokenizer(base), tmp_path / "policy")
    logits = model(input_ids=ids).logits
    assert torch.equal(load_policy(tmp_path / "policy").eval()(input_ids=ids).logits, logits)
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    torch.testing.assert_close(elsewhere(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-6)
    assert list((tmp_path / "policy").glob("*.safetensors"))
    assert load_tokenizer(tmp_path / "policy")("w1 w2")["input_ids"] == [1, 2]


def test_reference_is_frozen(base: Path) -> None:
    reference = load_reference(base)
    assert not reference.training
    assert not any(p.requires_grad for p in reference.parameters())


def test_a_frozen_model_has_no_gradients(make_model: Callable) -> None:
    model = freeze(make_accelerator("fp32"), make_model("gpt2").train())
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.dtype is torch.float32


def test_a_frozen_model_multiplies_in_the_compute_precision_and_adds_in_fp32(
    make_model: Callable,
) -> None:
    class Half:
        mixed_precision, device = "bf16", torch.device("cpu")

    model = freeze(Half(), make_model("gpt2", head="score"))  # type: ignore[arg-type]
    rounded = {n for n, p in model.named_parameters() if p.dtype is torch.bfloat16}
    assert rounded
    assert all(".attn." in name or ".mlp." in name for name in rounded)
    assert model.transformer.wte.weight.dtype is model.score.weight.dtype is torch.float32
    tied = freeze(Half(), make_model("gpt2"))  # type: ignore[arg-type]
    assert tied.lm_head.weight.dtype is torch.bfloat16
    assert tied.transformer.wte.weight.dtype is torch.float32


def test_gradient_checkpointing_changes_memory_and_nothing_else(base: Path) -> None:
    ids = torch.tensor(rows()[1:2])
    gradients = []
    for checkpointing in (False, True):
        model = load_policy(base)
        model = trainable(model, ModelConfig(gradient_checkpointing=checkpointing)).train()
        assert model.is_gradient_checkpointing == checkpointing
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert torch.allclose(*gradients, atol=1e-7)
    assert model.eval()(input_ids=ids, use_cache=True)[CACHE] is not None


# ----------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("tyny", "'tiny'"), ("smollm-135m", "'smollm2-135m'"), ("gpt-2", "'gpt2'")],
)
@pytest.mark.parametrize("load", [load_policy, load_tokenizer, fingerprint])
def test_unknown_model_names_the_nearest_and_the_ways_offline(
    load, name: str, nearest: str
) -> None:
    start = time.monotonic()
    with pytest.raises(SettingsError, match=f"did you mean {nearest}") as error:
        load(name)
    assert time.monotonic() - start < 10  # with retries 23
    for way in ("HF_HUB_OFFLINE is set", "tiny", "make offline-model", "folder"):
        assert way in str(error.value)


@pytest.mark.parametrize("name", ["gpt2", "someone/some-model", "no such name!"])
def test_hub_model_out_of_reach_is_explained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(SettingsError, match="not in the hub's cache, and HF_HUB_OFFLINE is set"):
        load_policy(name)


def test_a_mistyped_folder_names_the_one_beside_it(base: Path) -> None:
    with pytest.raises(SettingsError, match=f"did you mean '{base}'"):
        load_policy(f"{base}e")


def test_a_folder_without_a_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no config\.json; give the one that save_pretrained"):
        load_policy(tmp_path)


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = make_base("llama", tmp_path / "base") / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(SettingsError, match=r"no weights for model\.layers\.1\.mlp\.up_proj"):
        load_policy(tmp_path / "base")


def test_tokenizer_without_an_end_is_refused(base: Path) -> None:
    tokenizer = make_tokenizer("none")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(base)
    with pytest.raises(SettingsError, match="no end-of-sequence token"):
        load_tokenizer(base)


def test_fingerprint_follows_weights_and_tokenizer(base: Path) -> None:
    model = load_policy(base)
    model.save_pretrained(base)
    first = fingerprint(base)
    assert fingerprint(base) == first
    next(model.parameters()).data[0] += 1e-3
    model.save_pretrained(base)  # the same files, of the same sizes
    second = fingerprint(base)
    (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text() + "\n")
    assert len({first, second, fingerprint(base)}) == 3


def test_tiny_is_the_bundled_base() -> None:
    model, tokenizer = load_policy("tiny"), load_tokenizer("tiny")
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert load_reward_model("tiny", tokenizer, 0)[1] is tokenizer
