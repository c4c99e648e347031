"""What this machine can do at best: matrix products of the model's own shapes and a square one."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from benchmarks.protocol import timed

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = 2048  # tokens of a batch of 8 rows, cut to 256


def shapes(config: PretrainedConfig) -> list[tuple[int, int, int]]:
    """(rows, width in, width out) of a layer's products, the output layer's, and a square one."""
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    found = [(ROWS, width, width), (ROWS, width, inner), (ROWS, inner, width)]
    return [*found, (ROWS // 2, width, config.vocab_size), (2048, 2048, 2048)]


def matmul_rate(
    sizes: tuple[int, int, int], precision: str, seconds: float = 1.0, repeats: int = 3
) -> float:
    """FLOPs a second of an (n, k) by (k, m) product: the best of `repeats` spells of `seconds`."""
    n, k, m = sizes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(n, k, device=device, dtype=DTYPES[precision])
    # weights are stored (out, in), as nn.Linear has them
    b = torch.randn(m, k, device=device, dtype=DTYPES[precision])

    def spell(count: int) -> None:
        for _ in range(count):
            torch.nn.functional.linear(a, b)

    with torch.no_grad():
        spell(1)
        count = max(1, round(seconds / max(timed(spell, 2)[0] / 2, 1e-6)))
        return max(2.0 * n * k * m * count / timed(spell, count)[0] for _ in range(repeats))


def measure(config: PretrainedConfig, precision: str, seconds: float = 1.0) -> dict:
    """`{"precision", "flops_per_second", "shapes": {"n x k x m": flops a second}}`."""
    rates = {
        " x ".join(map(str, shape)): matmul_rate(shape, precision, seconds)
        for shape in shapes(config)
    }
    return {"precision": precision, "flops_per_second": max(rates.values()), "shapes": rates}
