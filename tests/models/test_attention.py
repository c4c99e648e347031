"""Attention by matrix products: the same numbers and gradients as torch's fused attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lib.models import attention
from rlhf_lib.models.load import load_policy
from rlhf_lib.models.logprobs import response_logprobs
from rlhf_lib.models.packing import lay_out

PROMPTS = [[5, 6, 7, 8], [5, 6, 7, 8], [9, 10]]
REPLIES = [[11, 12], [13], [14, 15, 16]]


def drawn(heads: int, groups: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads * length)
    return tuple(  # type: ignore[return-value]
        torch.randn(2, n, length, 4, generator=generator, dtype=torch.double, requires_grad=True)
        for n in (heads, groups, groups)
    )


def fused(query: Tensor, key: Tensor, value: Tensor, **settings: object) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_numbers_and_gradients_are_those_of_the_fused_kernel(heads, groups, scaling):
    visible = lay_out([[1, 2], [1, 2]], [[3, 4], [5]]).visible
    inputs = drawn(heads, groups, 5)
    for mask in (visible, None):
        mine = attention.by_products(*inputs, mask, scaling)
        theirs = fused(*inputs, attn_mask=mask, is_causal=mask is None, scale=scaling)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        weights = torch.randn_like(mine)
        for one, other in zip(
            torch.autograd.grad((mine * weights).sum(), inputs),
            torch.autograd.grad((theirs * weights).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def calls_of(monkeypatch) -> list[int]:
    calls: list[int] = []
    real = attention.by_products

    def counted(*inputs):
        calls.append(1)
        return real(*inputs)

    monkeypatch.setattr(attention, "by_products", counted)
    return calls


def test_products_serve_log_probs_in_bf16_on_a_cpu_and_nothing_else(monkeypatch):
    model, calls = load_policy("tiny"), calls_of(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        trained, _ = response_logprobs(model, PROMPTS, REPLIES)
        layers = model.config.num_hidden_layers
        assert len(calls) == layers
        with torch.no_grad():
            read, _ = response_logprobs(model, PROMPTS, REPLIES)
            assert len(calls) == 2 * layers, "what is read is rounded as what is learnt"
            ids = torch.tensor([[5, 6, 7]])
            cache = model(ids, use_cache=True).past_key_values
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            assert len(calls) == 3 * layers, "not the steps of generation"
    exact, _ = response_logprobs(model, PROMPTS, REPLIES)  # fp32
    assert len(calls) == 3 * layers
    for rounded in (trained, read):  # bf16 has eight bits: 0.4 % of numbers near 7
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)
