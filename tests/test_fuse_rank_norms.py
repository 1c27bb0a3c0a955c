"""Which sums of ranks normalize in their own call; a single rank plays all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn

import quantspec
from quantspec.kernels import ranks
from quantspec.passes import FuseRankNorms
from quantspec.passes.graph import find_calls

REDUCE = torch.ops.quantspec.reduce_ranks.default


class Block(nn.Module):
    """Calls a function of itself, the terms of a sum and a residual."""

    def __init__(self, function: Callable, dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        self.weight, self.other = (nn.Parameter(torch.rand(16, generator=generator).to(dtype)) for _ in range(2))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return self.function(self, x, residual)


def total(x: Tensor) -> Tensor:
    return REDUCE(x, "group")


def norm(y: Tensor, weight: Tensor) -> Tensor:
    wide = y.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(y.dtype)


def with_residual(block: Block, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    y = total(x) + residual
    return y, norm(y, block.weight)


def shifted_weight(block: Block, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    y = residual + total(x)
    return y, norm(y, 1 + block.weight)


def two_layers(block: Block, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    y, normed = with_residual(block, x, residual)
    y = total(normed * 2) + y
    return y, norm(y, block.other)


def sandwich(block: Block, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    y = residual + norm(total(x), block.weight)
    return y, norm(y, block.other)


def read_by_several(block: Block, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    """The sum alone is read, too, so it stays."""
    alone = total(x)
    y = alone + residual
    return alone * 3, norm(y, block.weight)


def doubled(block: Block, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    alone = total(x)
    y = alone + alone
    return y, norm(y, block.weight)


def without_norm(block: Block, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    return total(x) + residual, residual


# Calls with a norm, and sums that stay.
CASES = {with_residual: (1, 0), shifted_weight: (1, 0), two_layers: (2, 0), sandwich: (1, 0)}
OTHERS = {read_by_several: (0, 1), doubled: (0, 1), without_norm: (0, 1)}


@pytest.fixture(autouse=True)
def of_one(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(ranks, "_sum", lambda x, group: x.clone())


def fused(function: Callable, x: Tensor, residual: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Calls with a norm and sums without, once the results are those of before."""
    gm = torch.export.export(Block(function, dtype), (x, residual), strict=False).module(check_guards=False)
    expected = gm(x, residual)
    # A norm rounds once where the model rounds twice.
    tolerance = {"rtol": 0.04, "atol": 0.04} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    gm = FuseRankNorms()(gm).graph_module
    for before, after in zip(expected, gm(x, residual), strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        torch.testing.assert_close(after, before, **tolerance)
    assert not FuseRankNorms()(gm).modified
    targets = (torch.ops.quantspec.reduce_ranks_to_norm.default, REDUCE)
    return tuple(len(list(find_calls(gm.graph, target))) for target in targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [*CASES, *OTHERS])
def test_sums_in_front_of_norms(function, dtype):
    x, residual = torch.randn(2, 2, 3, 16).to(dtype)
    assert fused(function, x, residual, dtype) == {**CASES, **OTHERS}[function]


def test_what_addition_promotes_or_broadcasts_stays():
    """The call has the dtype and the shape of the sum."""
    x, residual = torch.randn(2, 2, 3, 16)
    assert fused(with_residual, x.bfloat16(), residual, torch.float32) == (0, 1)
    assert fused(with_residual, x[0], residual, torch.float32) == (0, 1)


def deep(block: Block, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    for _ in range(1200):
        residual = residual + block.other
    return shifted_weight(block, x, residual)


def test_a_deep_residual_stream_is_followed():
    """A chain of additions may be longer than Python's stack."""
    assert fused(deep, *torch.randn(2, 2, 3, 16), torch.float32) == (1, 0)
    qs = quantspec.convert(tiny_model("gpt2", n_layer=48), weight_group_size=32, self_check=False)
    assert len(qs.layers) == 48
