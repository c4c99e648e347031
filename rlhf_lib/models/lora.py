"""Low-rank adapters (peft): train a few added weights, and have the reference for nothing.

Source: Hu et al. 2021, arXiv:2106.09685. An adapter starts at zero effect, so a policy with its
adapters off is the model it started from: the reference, without a second copy in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


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


@contextmanager
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
