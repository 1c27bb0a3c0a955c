"""Gates and factors of dense weights in one launch."""

from __future__ import annotations

import pytest
import torch
from test_kernels_triton import TOLERANCE, random, relative_error

from quantspec.kernels.linears import gated_linears, gated_linears_triton


# Nine rows are more than the kernel multiplies.
@pytest.mark.parametrize("rows", [1, 6, 8, 9])
@pytest.mark.parametrize(
    ("activation", "width", "bias"), [("silu", 40, False), ("gelu", 44, True), ("gelu_tanh", 24, False)]
)
@pytest.mark.parametrize("in_features", [384, 1024])
def test_gated_linears_match_float64(rows, activation, width, bias, in_features) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16
    x = random(2, rows, in_features, dtype=dtype)[1:]
    weights = [random(width, in_features, dtype=dtype) / in_features**0.5 for _ in range(2)]
    biases = [random(width, dtype=dtype) for _ in range(2)] if bias else []
    wide = ([tensor.double() for tensor in tensors] for tensors in (weights, biases))
    expected = gated_linears(x.double(), *wide, activation)
    actual = gated_linears_triton(x, weights, biases, activation)
    assert (actual.dtype, actual.shape) == (dtype, expected.shape)
    assert relative_error(actual, expected) < TOLERANCE[dtype]


def test_no_rows_have_no_gates() -> None:
    weights = [random(24, 128, dtype=torch.bfloat16) for _ in range(2)]
    assert gated_linears_triton(random(1, 0, 128, dtype=torch.bfloat16), weights, [], "silu").shape == (1, 0, 24)
