"""Attention of the models: torch's own kernels, and two matrix products where those are slow.

On a CPU in bf16 the backward pass of torch's fused attention takes several times as long as that of
the products it stands for, because sequences here are short: a few hundred tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rlhf"  # what models are loaded with: `attn_implementation`


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **settings: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls: (B, H, L, D) and key and value (B, G, L, D) -> (B, L, H, D).

    What is read without gradients is rounded as where it is learnt, so that a ratio of two equal
    policies is 1; only the steps of generation, which have a cache, are left to torch.
    """
    whole = query.shape[2] == key.shape[2] and (mask is None or mask.shape[-2] == mask.shape[-1])
    rounds = query.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if rounds and whole and dropout == 0.0:
        return by_products(query, key, value, mask, scaling).transpose(1, 2), None
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **settings
    )


def by_products(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float | None = None
) -> Tensor:
    """softmax(scaling Q K^T) V over what is `visible`: (B, 1, L, L) bool; None: what is not later.

    query (B, H, L, D); key and value (B, G, L, D), each shared by H / G query heads: these share
    one product, so that nothing is repeated. Returns (B, H, L, D).
    """
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    if visible is None:
        hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    else:
        hidden = ~visible[:, :, None]
    scaled = query * (width**-0.5 if scaling is None else scaling)
    scores = scaled.reshape(rows, groups, -1, width) @ key.transpose(-1, -2)
    scores = scores.view(rows, groups, -1, length, length)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights.view(rows, groups, -1, length) @ value).view(rows, heads, length, width)


def added(visible: Tensor) -> Tensor:
    """A mask to add to attention's scores, in the dtype of the products: 0 where it is visible.

    torch's kernels want this one, and make it of one that says yes or no in every layer anew.
    """
    device = visible.device.type
    on = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if on else torch.float32
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
