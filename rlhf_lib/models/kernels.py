"""Operations of the models in another way where torch's own kernel is slow, which is on a CPU.

In bf16 the backward pass of its fused attention takes several times as long as that of the two
products it stands for, because sequences here are short: a few hundred tokens. In fp32 its GELU
takes twice as long as four passes over a piece that a cache holds, for it computes a tanh.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rlhf"  # what models are loaded with: `attn_implementation`


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
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


def adds_masks(model: nn.Module) -> bool:
    """Whether the model's attention adds its mask to the scores, whatever the mask's type."""
    return getattr(getattr(model, "config", None), "_attn_implementation", NAME) == "eager"


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class Gelu(nn.Module):
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415), any shape.

    0.5 (1 + tanh(u / 2)) is sigmoid(u), with u = sqrt(8 / pi) (x + 0.044715 x^3).

    Where it is not torch's own, it keeps two tensors for backward, x and sigmoid(u), and torch one:
    time bought with memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype.itemsize < 4:
            return F.gelu(x, approximate="tanh")  # one kernel, and no rounding between its parts
        if torch.is_grad_enabled() and x.requires_grad:
            return _BySigmoid.apply(x)
        return _by_sigmoid(x)[0]


PIECE = 2**16  # numbers: with what comes of them they fit a core's cache
LINEAR = math.sqrt(8 / math.pi)
CUBIC = 0.044715 * LINEAR


def _by_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """x sigmoid(u), and sigmoid(u)."""
    x = x.contiguous()
    share, out, linear = torch.empty_like(x), torch.empty_like(x), x.new_full((), LINEAR)
    for x_, share_, out_ in zip(*(t.view(-1).split(PIECE) for t in (x, share, out)), strict=True):
        torch.addcmul(linear, x_, x_, value=CUBIC, out=share_).mul_(x_).sigmoid_()
        torch.mul(x_, share_, out=out_)
    return out, share


class _BySigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out, share = _by_sigmoid(x)
        ctx.save_for_backward(x, share)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """grad * s (1 + x u' (1 - s)), where s = sigmoid(u)."""
        x, share = (t.contiguous() for t in ctx.saved_tensors)
        grad, out, linear = grad.contiguous(), torch.empty_like(x), x.new_full((), LINEAR)
        pieces = (t.view(-1).split(PIECE) for t in (x, share, grad, out))
        for x_, share_, grad_, out_ in zip(*pieces, strict=True):
            torch.addcmul(linear, x_, x_, value=3 * CUBIC, out=out_).mul_(x_)  # x u'
            out_.addcmul_(out_, share_, value=-1)
            torch.addcmul(share_, out_, share_, out=out_).mul_(grad_)
        return out


def replace_gelu(model: nn.Module) -> None:
    """Let each tanh GELU of a model, in either spelling of transformers, be a `Gelu`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (GELUTanh, NewGELUActivation)):
                setattr(module, name, Gelu())
