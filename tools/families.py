"""Which families of models can be used, tried with a small random one of each.

    python -m tools.families

writes the table of `docs/data-and-models.md`: whether a family works, and how its rows are read.
What a family does that others do not (windows, caps, scaling) is switched on, in sizes so small
that it matters in short rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
import transformers
import typer
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from rlhf_lib.models.load import load_policy, load_reward_model, load_tokenizer
from rlhf_lib.models.packing import Reading, reading_of
from rlhf_lib.settings import SettingsError
from rlhf_lib.show.display import markdown
from tools.blocks import write_block

PAGE = Path("docs/data-and-models.md")
PAD, EOS, BOS = 0, 1, 2
VOCABULARY = 272  # a few more than bytes and special tokens: some tokenizers add their own
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OLDER = {"n_embd": 32, "n_layer": 2, "n_head": 4}
USUAL = {**SIZE, "intermediate_size": 64}
GROUPED = {**USUAL, "num_key_value_heads": 2}
NARROW = {**GROUPED, "head_dim": 8}
OPT = {**SIZE, "ffn_dim": 64}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
# family -> (name of its settings in transformers, what they are, what it does that is its own)
FAMILIES: dict[str, tuple[str, dict, str]] = {
    "GPT-2": ("GPT2", OLDER, ""),
    "GPT-Neo": (
        "GPTNeo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 16}
        | {"attention_types": [[["global", "local"], 1]]},
        "a window in every other layer",
    ),
    "GPT-J": ("GPTJ", {**OLDER, "rotary_dim": 4}, ""),
    "GPT-NeoX, Pythia": ("GPTNeoX", USUAL, ""),
    "OPT": ("OPT", {**OPT, "word_embed_proj_dim": 32}, ""),
    "OPT-350m": (
        "OPT",
        {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        "hidden states that end narrower than they are",
    ),
    "BLOOM": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "distance as a bias"),
    "Falcon": ("Falcon", SIZE, ""),
    "Falcon-RW": ("Falcon", {**SIZE, "alibi": True}, "distance as a bias"),
    "MPT": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, "distance as a bias"),
    "Llama": ("Llama", GROUPED, ""),
    "Qwen 2": ("Qwen2", GROUPED, ""),
    "Qwen 3": ("Qwen3", NARROW, ""),
    "SmolLM 3": ("SmolLM3", GROUPED, ""),
    "Mistral": ("Mistral", {**GROUPED, "sliding_window": 16}, "a window"),
    "Phi": ("Phi", USUAL, ""),
    "Phi 3": ("Phi3", USUAL, ""),
    "Gemma": ("Gemma", NARROW, ""),
    "Gemma 2": (
        "Gemma2",
        {**NARROW, "sliding_window": 16},
        "a window; attention and logits capped",
    ),
    "Gemma 3": (
        "Gemma3Text",
        {**NARROW, "sliding_window": 16, "final_logit_softcapping": 5.0},
        "a window; logits capped",
    ),
    "MiniCPM 3": (
        "MiniCPM3",
        {**USUAL, **MLA, "num_key_value_heads": 4, "dim_model_base": 8, "v_head_dim": 8},
        "hidden states scaled before the output layer",
    ),
    "OLMo 2": ("Olmo2", USUAL, ""),
    "Granite": ("Granite", {**GROUPED, "logits_scaling": 8.0}, "logits scaled"),
    "Cohere": ("Cohere", {**GROUPED, "logit_scale": 0.0625}, "logits scaled"),
    "Mixtral": (
        "Mixtral",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
        "experts; noise in what chooses them, off here",
    ),
    "GPT-OSS": (
        "GptOss",
        {**NARROW, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
        "experts; a window; attention with sinks",
    ),
    "CodeGen": ("CodeGen", {**OLDER, "rotary_dim": 4}, ""),
    "XGLM": ("XGLM", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}, ""),
    "Mamba": (
        "Mamba",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "no attention",
    ),
    "LFM 2": ("Lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}, "convolutions"),
    "BERT": ("Bert", USUAL, "an encoder"),
}


def byte_tokenizer(begins: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte. `begins`: a text begins with a token for its beginning, as Llama's does."""
    letters = sorted(ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate(["<pad>", "</s>", "<s>", *letters])}
    tokenizer = Tokenizer(BPE(ids, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>",
        add_bos_token=begins,
    )  # fmt: skip


def make(family: str) -> PreTrainedModel:
    """A random language model of a family, its weights large enough for it to have opinions."""
    name, settings, _ = FAMILIES[family]
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **special, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(8)
    return model


def save(family: str, folder: Path) -> Path:
    """Such a model and a tokenizer, as somebody else would have saved them."""
    make(family).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def table() -> pd.DataFrame:
    """A row a family: as language model and as reward model, works or why not."""
    rows = []
    for family, (_, _, own) in FAMILIES.items():
        with TemporaryDirectory() as folder:
            name = save(family, Path(folder))
            rows.append(
                {
                    "family": family,
                    "its own": own,
                    "language model": _tried(partial(load_policy, name)),
                    "reward model": _tried(partial(reward_model, name)),
                }
            )
    return pd.DataFrame(rows)


def reward_model(name: Path) -> PreTrainedModel:
    return load_reward_model(name, load_tokenizer(name), seed=0)[0]


def _tried(load: Callable[[], PreTrainedModel]) -> str:
    try:
        model = load()
    except SettingsError as error:
        said = re.sub(r"^model '.*?'(?:: | \((\w+)\) | )", r"\1 ", str(error))
        return f"refused: {said.strip().partition('. ')[0]}"
    return described(reading_of(model), model.config._attn_implementation == "eager")


def described(reading: Reading, eager: bool) -> str:
    """A reading in words."""
    rows = "packed rows" if reading.packed else "a row a reply"
    own = ["its own attention"] * eager + ["its own end"] * reading.own_end
    return f"works: {', '.join([rows, *own])}"


def main(page: Path = PAGE) -> None:
    """Try all families and write the table into the page."""
    logging.set_verbosity_error()
    write_block(page, "families", markdown(table()))


if __name__ == "__main__":
    typer.run(main)
