"""Models by name: policy, frozen reference, reward model and value model.

Weights are fp32 whatever the compute precision (mixed precision casts per operation), and dropout
is off everywhere: with it, the policy that is trained is not the policy that sampled.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from rlhf_lib import runtime
from rlhf_lib.kernel import users
from rlhf_lib.models import kernels, smollm2
from rlhf_lib.models.agreement import EAGER, find_reading, positions_of
from rlhf_lib.runtime import bundled_folder, phase
from rlhf_lib.settings import ModelConfig, SettingsError, unknown

NAMES = ("tiny", "smollm2-135m", "gpt2")
HUB_IDS = {"gpt2": "openai-community/gpt2"}
PAD = "<|pad|>"
HEAD = "score.weight"  # the linear head of every decoder-only sequence classifier in transformers
KINDS = {
    AutoModelForCausalLM: "causal language model",
    AutoModelForSequenceClassification: "sequence classifier (a reward model)",
}
OPTIONS = {"trust_remote_code": False}  # else it may ask, and a batch run would wait
# what transformers raises for a folder that holds no model that it can load
BROKEN = (
    ArithmeticError, AttributeError, EOFError, ImportError, LookupError, RuntimeError, TypeError,
    ValueError, SafetensorError,
)  # fmt: skip
NOISE = ("drop", "jitter")  # in the name of a setting
HEAD_STD = 0.01  # small: an untrained reward model has no opinion


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; its `model_max_length` is no more than the model's positions.

    Raises SettingsError if it has no end-of-sequence token, or more tokens than the model.
    """
    where, options = _locate(name)
    with _explained(name, options):
        config = AutoConfig.from_pretrained(where, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    tokens = max([len(tokenizer), *(place + 1 for place in tokenizer.get_vocab().values())])
    if tokens > config.get_text_config().vocab_size:
        raise SettingsError(
            f"model {str(name)!r}: its tokenizer has {tokens} tokens and its embedding "
            f"{config.get_text_config().vocab_size}; save it again after "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    if tokenizer.eos_token_id is None:
        raise SettingsError(
            f"model {str(name)!r}: its tokenizer has no end-of-sequence token, so no reply could "
            "end; choose another model, or set eos_token in its tokenizer_config.json"
        )
    tokenizer.clean_up_tokenization_spaces = False  # decoding must give back the text it was
    tokenizer.model_max_length = min([tokenizer.model_max_length, *positions_of(config)])
    return tokenizer


def load_policy(name: str | Path) -> PreTrainedModel:
    """A causal language model, by name (`tiny`, `gpt2` ...), hub id or folder.

    Raises SettingsError for a model that cannot be found.
    """
    model = _load(AutoModelForCausalLM, name)
    model.generation_config = _unfiltered(model.generation_config)
    return model


def load_reference(name: str | Path) -> PreTrainedModel:
    """A policy to look at: eval mode, no gradients. Stages `freeze` it in the compute precision."""
    return load_policy(name).eval().requires_grad_(False)


def freeze(accelerator: Accelerator, model: PreTrainedModel) -> PreTrainedModel:
    """Place a model that is only read: no gradients, and what it multiplies by in half precision.

    Its numbers stay those of a model that trains: under autocast, matrix products round their
    weights, and everything else (embeddings, norms, the sums between layers) is fp32. So the
    products' weights are rounded once, here, and nothing else is; a weight that is an embedding as
    well is rounded in a copy. A scalar head stays fp32, for it is read outside autocast.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    model = model.requires_grad_(False).eval().to(accelerator.device)  # type: ignore[arg-type]
    if dtype is None:
        return model
    embedding = model.get_input_embeddings().weight
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or name == "score":
            continue
        if module.weight is embedding:
            rounded = embedding.detach().to(dtype)  # type: ignore[operator]
            module.weight = nn.Parameter(rounded, requires_grad=False)
        else:
            module.to(dtype)
    return model


def load_reward_model(
    name: str | Path, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one label, and the tokenizer to save beside it.

    From a language model the head starts at N(0, 0.01²), drawn from `seed`; a saved reward model
    keeps its own. transformers scores the last token that is not padding: where the tokenizer has
    no pad token, or pads with its end-of-sequence token, the one returned has a new `<|pad|>`, and
    the embedding one more row. `tokenizer` itself and the ids of all its tokens stay as they are.
    """
    model = _load(AutoModelForSequenceClassification, name, may_miss=HEAD, num_labels=1)
    if HEAD in model.missing_keys:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(model.score.weight.shape, generator=generator)
        model.score.weight.data.copy_(HEAD_STD * drawn)
    tokenizer = _with_own_pad(tokenizer)
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # nothing ever attends to padding; zeros make two loads equal
        model.get_input_embeddings().weight.data[-1].zero_()
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_value_model(reward_model: str | Path) -> PreTrainedModel:
    """A value model that starts as the reward model: its `score` head reads every position.

    The head is scaled to the *normalised* reward that a policy is trained on, so that the value at
    the last token starts as the reward itself. Raises SettingsError for a folder that holds no
    reward model.
    """
    model = _load(AutoModelForSequenceClassification, reward_model, num_labels=1)
    mean = getattr(model.config, "reward_mean", 0.0)
    std = getattr(model.config, "reward_std", 1.0)
    head = nn.Linear(model.score.in_features, 1)
    head.weight.data.copy_(model.score.weight.data / std)
    head.bias.data.fill_(-mean / std)
    model.score = head
    return model


def add_value_head(model: PreTrainedModel) -> None:
    """A head `score` that reads values off the policy's own trunk; it starts at 0 everywhere."""
    # what the last hidden states have, which is not always `hidden_size`
    head = nn.Linear(model.get_output_embeddings().weight.shape[1], 1)  # type: ignore[union-attr]
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.score = head


def trainable(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """The same model, with adapters and gradient checkpointing where the settings ask for them.

    Gradient checkpointing works in train mode only, so generation in eval mode keeps its cache.
    """
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha)
    if config.gradient_checkpointing:
        # the name in newer releases of transformers, which warn of the old one
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


@phase("saving")
def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> None:
    """Write safetensors, tokenizer and generation config: what `from_pretrained` loads.

    Adapters are merged into the weights first, and a language model leaves its value head behind.
    The generation config samples from the whole softmax: transformers' own default is top_k=50.
    """
    merge_lora(model)
    if model.can_generate():
        if hasattr(model, "score"):
            del model.score
        model.generation_config = _unfiltered(model.generation_config, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fingerprint(name: str | Path) -> str:
    """SHA-256 (hex) that changes when the model or its tokenizer does."""
    where, options = _locate(name)
    digest = hashlib.sha256()
    if Path(where).is_dir():
        for path in sorted(Path(where).iterdir()):
            if path.is_file() and not path.name.startswith("."):
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
    else:
        with _explained(name, options):
            config = AutoConfig.from_pretrained(where, **options)
        digest.update(f"{where}@{config._commit_hash}".encode())
    return digest.hexdigest()


def _locate(name: str | Path) -> tuple[str, dict[str, Any]]:
    """The folder or hub id behind a name, and the options to load it with."""
    name = str(name)
    if name == "tiny":
        return str(bundled_folder() / "base"), OPTIONS | {"local_files_only": True}
    if name == "smollm2-135m":
        with _quiet():
            return str(smollm2.smollm2_folder()), OPTIONS | {"local_files_only": True}
    folder = users(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SettingsError(
                f"model {name!r}: the folder has no config.json; give the one that save_pretrained "
                "wrote (of a run: the `model/` folder of a stage)"
            )
        return str(folder), OPTIONS | {"local_files_only": True}
    # without network there may still be a copy in the hub's cache
    return HUB_IDS.get(name, name), OPTIONS | {
        "local_files_only": runtime.unreachable() is not None
    }


@phase("loading models")
def _load(model_class: Any, name: str | Path, may_miss: str = "", **settings: Any) -> Any:
    """An fp32 model without dropout; `model.missing_keys` holds what its files did not have."""
    where, options = _locate(name)
    with _quiet(), _explained(name, options):
        config = AutoConfig.from_pretrained(where, **options, **settings)
    if type(config) not in model_class._model_mapping:
        raise SettingsError(
            f"model {str(name)!r}: transformers has no {KINDS[model_class]} for "
            f"{type(config).__name__}. Take another model, such as gpt2"
        )
    _drop_dropout(config)
    with _quiet(), _explained(name, options):
        model, report = model_class.from_pretrained(
            where, config=config, dtype=torch.float32, attn_implementation=EAGER,
            output_loading_info=True, **options,
        )  # fmt: skip
    missing = set(report["missing_keys"])
    if missing - {may_miss}:
        raise SettingsError(
            f"model {str(name)!r} is no complete {type(model).__name__}: it has no weights for "
            f"{', '.join(sorted(missing - {may_miss})[:3])}"
        )
    if scales := sorted(key for key in report["unexpected_keys"] if "scale" in key):
        raise SettingsError(
            f"model {str(name)!r} is quantised in a way that transformers does not undo here "
            f"({scales[0]}): take its weights in fp16, bf16 or fp32"
        )
    model.missing_keys = missing
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # memory of its own: what was read is a view of the file
    kernels.replace_gelu(model)
    with _quiet():  # of attention that cannot be chosen
        find_reading(model)
    return model


def _drop_dropout(config: PretrainedConfig | dict) -> None:
    """No dropout, and no noise in what routes tokens, in the config and those inside it."""
    settings = config if isinstance(config, dict) else vars(config)
    for key, value in settings.items():
        if isinstance(value, (PretrainedConfig, dict)):
            _drop_dropout(value)
        elif any(name in str(key) for name in NOISE) and type(value) in (int, float):
            settings[key] = type(value)(0)  # some settings are checked for their type


def _with_own_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy with a pad token that is not its end-of-sequence token."""
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def _unfiltered(
    old: GenerationConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> GenerationConfig:
    """Sampling from the whole softmax, said outright: what is left out, transformers fills in."""
    eos = tokenizer.eos_token_id if tokenizer else old.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer else old.pad_token_id
    return GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, bos_token_id=old.bos_token_id,
        eos_token_id=eos, pad_token_id=eos if pad is None else pad,
    )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no report of new heads: `_load` checks what is missing and raises."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _explained(name: str | Path, options: dict[str, Any]) -> Iterator[None]:
    """Turn "not found" into an error that names the nearest known model and the ways offline, and
    whatever else transformers says of a model into one sentence.
    """
    try:
        yield
    except (OSError, HFValidationError) as error:
        text = str(name)
        parent = users(text).parent
        beside = [str(parent / p.name) for p in parent.iterdir()] if parent.is_dir() else []
        known = [*NAMES, *(beside if "/" in text else ())]
        found = runtime.unreachable() if options["local_files_only"] else None
        looked = f"in the hub's cache, and {found}" if found else "a folder or a model on the hub"
        raise SettingsError(
            f"{unknown('model', text, known)}. It is not {looked}. Without network use "
            "model.name=tiny, smollm2-135m (make offline-model), a folder written by "
            "save_pretrained, or a hub model that this machine has downloaded before"
        ) from error
    except BROKEN as error:
        said = str(error).strip().partition("\n")[0]
        raise SettingsError(
            f"model {str(name)!r} cannot be loaded: {type(error).__name__}: {said}"
        ) from error


# ------------------------------------------------------------------------------- adapters
# Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) train a few added weights. One starts at zero
# effect, so a policy with its adapters off is the model that it started from: the reference,
# without a second copy in memory.


def add_lora(model: PreTrainedModel, rank: int, alpha: float) -> None:
    """Put an adapter of `rank` beside every linear layer of the trunk, and freeze the trunk.

    Adds alpha / rank * B A x to each layer's output. A scalar head stays trainable as a whole.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import, and seldom asked for

    body = {id(module) for module in model.base_model.modules()}
    layers = {
        name: module
        for name, module in model.named_modules()
        if id(module) in body and isinstance(module, (nn.Linear, Conv1D))
    }
    transposed = {isinstance(layer, Conv1D) for layer in layers.values()}
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(layers),  # type: ignore[arg-type]
        fan_in_fan_out=transposed == {True},  # GPT-2 stores its weights that way
    )  # fmt: skip
    inject_adapter_in_model(config, model)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)  # type: ignore[operator]


def save_adapter(model: PreTrainedModel, base: str, folder: Path) -> None:
    """The adapters of a language model alone, as `PeftModel.from_pretrained(base, folder)` reads
    them: a few megabytes beside the model `base` that they were trained on.
    """
    from peft import get_peft_model_state_dict

    config = model.peft_config["default"]  # type: ignore[index]
    vars(config).update(base_model_name_or_path=base, task_type="CAUSAL_LM")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"base_model.model.{name}": weight.contiguous()
        for name, weight in get_peft_model_state_dict(
            model,
            save_embedding_layers=False,  # no embedding is trained, and "auto" asks the hub
        ).items()
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it the model is what it was before its adapters."""
    for _, layer in _adapted(model):
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in _adapted(model):
            layer.enable_adapters(True)


def merge_lora(model: nn.Module) -> None:
    """Add the adapters into the weights they belong to: an ordinary model again."""
    for name, layer in _adapted(model):
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    if "peft" not in sys.modules:  # then nothing can have an adapter
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(n, layer) for n, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
