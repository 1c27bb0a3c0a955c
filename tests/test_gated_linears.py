"""Dense linears with the sum and the norm in front of them and the gate behind."""

from __future__ import annotations

import pytest
import torch
from test_kernels_triton import TOLERANCE, random, relative_error
from torch import Tensor

from quantspec.kernels.linears import fused_linears, fused_linears_triton


def widened(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


@pytest.mark.parametrize(
    ("rows", "sizes", "activation", "bias", "residual", "norm"),
    [
        (1, (48, 16, 24), "", False, True, True),
        (6, (40, 40), "silu", False, True, True),
        (8, (40, 40), "gelu", True, False, True),
        (3, (24, 24), "gelu_tanh", True, True, False),
        (2, (72,), "", True, False, True),
        # More rows than the kernel multiplies.
        (9, (40, 40), "silu", True, True, True),
    ],
)
@pytest.mark.parametrize("in_features", [384, 1024])
def test_fused_linears_match_float64(rows, sizes, activation, bias, residual, norm, in_features) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16
    x = random(1, rows, in_features, dtype=dtype)
    weights = [random(size, in_features, dtype=dtype) / in_features**0.5 for size in sizes]
    biases = [random(size, dtype=dtype) for size in sizes] if bias else []
    of_sum = random(1, rows, in_features, dtype=dtype) if residual else None
    norm_weight = 1 + random(in_features, dtype=dtype) / 4 if norm else None
    y, total = fused_linears_triton(x, weights, biases, of_sum, norm_weight, 1e-5, activation)
    exact = x if of_sum is None else total
    # The interpreter does not round to the nearest.
    assert relative_error(total, x + of_sum) < torch.finfo(dtype).eps if residual else total.numel() == 0
    wide = [[w.double() for w in group] for group in (weights, biases)]
    expected, _ = fused_linears(exact.double(), *wide, None, widened(norm_weight), 1e-5, activation)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert relative_error(y, expected) < TOLERANCE[dtype]
