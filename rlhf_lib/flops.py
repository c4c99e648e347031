"""What a pass through a model costs, counted where it is made: floating-point operations.

A matrix product takes 2 for each weight and token. A backward pass takes two products for each one
forward, to the inputs and to the weights, so training takes the usual 6 x parameters x tokens
(Kaplan et al. 2020, arXiv:2001.08361, sec. 2.1); weights that do not learn, as under adapters, are
spared the second. Left out: attention's own products, element-wise work, the optimizer, padding,
and what a backward pass computes again.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

from rlhf_lib.runtime import count


def sizes_of(model: nn.Module, learnt: bool = False) -> tuple[int, int]:
    """Matrix weights that each token meets, or those of them that learn: (layers, output layer).

    Biases, norms and embeddings are no matrices that something is multiplied with; a scalar head
    counts as none.
    """
    trunk: nn.Module = model.base_model  # type: ignore[assignment]
    tables = {id(m.weight) for m in trunk.modules() if isinstance(m, nn.Embedding)}
    output = model.get_output_embeddings()  # type: ignore[operator]
    layers = [p for p in trunk.parameters() if p.dim() > 1 and id(p) not in tables]
    heads = [] if output is None else [output.weight]
    trunk_size, head_size = (
        sum(p.numel() for p in part if p.requires_grad or not learnt) for part in (layers, heads)
    )
    return trunk_size, head_size


def spend(model: nn.Module, tokens: int, predicted: int = 0) -> None:
    """Count a pass: `tokens` go through all layers, `predicted` of them reach the output layer.

    Where gradients are on, the backward pass that will follow is counted as well.
    """
    if model not in _known:
        _known[model] = sizes_of(model), sizes_of(model, learnt=True)
    products, with_gradient = (tokens * t + predicted * h for t, h in _known[model])
    if torch.is_grad_enabled():
        products += products + with_gradient
    count(flops=2.0 * products)


_known: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], ...]] = WeakKeyDictionary()
