"""Attention by matrix products and GELU by a sigmoid: numbers and gradients of torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from rlhf_lib.models import kernels
from rlhf_lib.models.generation import CACHE
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
        mine = kernels.by_products(*inputs, mask, scaling)
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
    real = kernels.by_products

    def counted(*inputs):
        calls.append(1)
        return real(*inputs)

    monkeypatch.setattr(kernels, "by_products", counted)
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
            cache = model(ids, use_cache=True)[CACHE]
            model(ids[:, :1], use_cache=True, **{CACHE: cache})
            assert len(calls) == 3 * layers, "not the steps of generation"
    exact, _ = response_logprobs(model, PROMPTS, REPLIES)  # fp32
    assert len(calls) == 3 * layers
    for rounded in (trained, read):  # bf16 has eight bits: 0.4 % of numbers near 7
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 7), (2**16 + 1,), (3, 2**16)])
def test_gelu_and_its_gradient_are_those_of_torch(shape, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(shape, generator=generator, dtype=torch.double)).requires_grad_()
    weights = torch.randn(shape, generator=generator, dtype=torch.double)
    mine, theirs = kernels.Gelu()(x), F.gelu(x, approximate="tanh")
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (mine, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        assert torch.equal(kernels.Gelu()(x), mine), "read as it is learnt"


def test_gelu_in_fp32_is_as_near_the_truth_as_torch():
    x = torch.linspace(-15, 15, 200_001)
    truth, own, theirs = (
        gelu_and_gradient(kernel, numbers)
        for kernel, numbers in (
            (lambda x: F.gelu(x, approximate="tanh"), x.double()),
            (kernels.Gelu(), x),
            (lambda x: F.gelu(x, approximate="tanh"), x),
        )
    )
    for exact, mine, other in zip(truth, own, theirs, strict=True):
        assert mine.isfinite().all()
        assert (mine - exact).abs().max() < 2 * (other - exact).abs().max()


def gelu_and_gradient(kernel, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = kernel(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def test_gelu_takes_any_layout():
    x = torch.randn(6, 4, dtype=torch.double).t().requires_grad_()
    y = kernels.Gelu()(x)
    torch.testing.assert_close(y, F.gelu(x, approximate="tanh"))
    seen = torch.randn(6, 4, dtype=torch.double).t()
    mine, theirs = (torch.autograd.grad(f, x, seen)[0] for f in (y, F.gelu(x, approximate="tanh")))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_in_half_precision_is_left_to_torch(dtype):
    x = torch.randn(50).to(dtype)
    assert torch.equal(kernels.Gelu()(x), F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("spelling", ["gelu_new", "gelu_pytorch_tanh"])
def test_both_spellings_of_gelu_are_replaced_and_no_other(spelling):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(ACT2FN[spelling]), ACT2FN["gelu"])
    kernels.replace_gelu(model)
    assert isinstance(model[1][0], kernels.Gelu)
    assert not isinstance(model[2], kernels.Gelu)


def test_a_model_is_loaded_with_it():
    found = [m for m in load_policy("tiny").modules() if isinstance(m, kernels.Gelu)]
    assert len(found) == load_policy("tiny").config.num_hidden_layers
