"""The ops of tuning: gradients against autograd, and attention against the draft's own, cache and all."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quantspec.kernels import cached_attention_reference, tuning_attention
from quantspec.kernels.hierarchical import encode_keys, encode_values
from quantspec.kernels.int4_linear import dequantize_int4

ops = torch.ops.quantspec
GROUP = 16


def random_codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same_gradients(ours: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    weights = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True)
    for gradient, reference in pairs:
        assert reference.abs().max() > 0
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("leading", [(7,), (2, 3)])
def test_int4_linear_has_the_gradients_of_its_dense_weight(leading):
    torch.manual_seed(0)
    qdata = random_codes(24, 32)
    x, scales, bias = doubles(*leading, 64), doubles(2, 24, 2), doubles(24)
    expected = F.linear(x, dequantize_int4(qdata, scales, torch.float64), bias)
    assert_same_gradients(ops.int4_linear(x, qdata, scales, bias), expected, (x, scales, bias))


def by_row(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.stack([F.linear(row, weight[e], bias[e]) for row, e in zip(x, ids, strict=True)])


def test_int4_experts_have_the_gradients_of_their_dense_weights():
    torch.manual_seed(0)
    qdata, ids = random_codes(4, 24, 32), torch.tensor([2, 0, 2, 1, 0, 2])
    x, scales, bias = doubles(6, 64), doubles(4, 2, 24, 2), doubles(4, 24)
    expected = by_row(x, ids, dequantize_int4(qdata, scales, torch.float64), bias)
    assert_same_gradients(ops.int4_expert_linear(x, ids, qdata, scales, bias), expected, (x, scales, bias))


@pytest.mark.parametrize("transposed", [False, True])
def test_dense_experts_have_the_gradients_of_their_weights(transposed):
    torch.manual_seed(0)
    ids = torch.tensor([2, 0, 2, 1, 0, 2])
    x, weight, bias = doubles(6, 64), doubles(4, 64, 24) if transposed else doubles(4, 24, 64), doubles(4, 24)
    expected = by_row(x, ids, weight.transpose(1, 2) if transposed else weight, bias)
    assert_same_gradients(ops.expert_linear(x, ids, weight, bias, transposed), expected, (x, weight, bias))


def cache_of(keys: Tensor, values: Tensor) -> tuple[Tensor | None, ...]:
    """Parts of a whole text's keys and values ``(B, K, T, D)`` as ``tuning_attention`` takes them."""
    groups = keys.shape[2] // GROUP
    coded = []
    for tensor, encode in ((keys, encode_keys), (values, encode_values)):
        upper, _, scale, zero = encode(tensor[:, :, : groups * GROUP].unflatten(2, (groups, GROUP)))
        coded += [upper, None, scale, zero]
    return keys, values, *coded


def as_draft_steps(
    query: Tensor, key: Tensor, value: Tensor, cache: tuple[Tensor | None, ...], options: tuple
) -> Tensor:
    """The draft's attention at each position by itself, on a cache that holds the tokens before it."""
    k_recent, v_recent, *coded = cache
    outputs = []
    for t in range(query.shape[2]):
        quantized = max(0, t // GROUP - 1) * GROUP
        buffers = [torch.zeros_like(x[:, :, : 2 * GROUP + 1]) for x in (k_recent, v_recent)]
        for buffer, whole in zip(buffers, (k_recent, v_recent), strict=True):
            buffer[:, :, : t - quantized] = whole[:, :, quantized:t]
        lengths = (torch.full((len(query),), n) for n in (quantized, t))
        new = (x[:, :, t : t + 1] for x in (query, key, value))
        outputs.append(cached_attention_reference(*new, *buffers, *coded, *lengths, *options))
    return torch.cat(outputs, 1)


# Tokens, window, soft cap, sinks, value dim; with few queries at a time, so that blocks begin anywhere.
CASES = [
    (5, 0, 0, False, 16),
    (75, 0, 0, False, 16),
    (96, 12, 0, False, 16),
    (75, 40, 30, True, 24),
    (75, 0, 0, True, 8),
]


@pytest.mark.parametrize(("case", "rows"), list(itertools.product(CASES, (24, 512))))
def test_tuning_attention_is_what_the_draft_sees_step_by_step(case, rows, monkeypatch):
    tokens, window, softcap, has_sinks, value_dim = case
    # The package has the op under its file's name.
    monkeypatch.setattr(sys.modules["quantspec.kernels.tuning_attention"], "_ROWS", rows)
    torch.manual_seed(0)
    query, key, value = doubles(2, 4, tokens, 16), doubles(2, 2, tokens, 16), doubles(2, 2, tokens, value_dim)
    cache = cache_of(*(torch.randn(2, 2, tokens, dim, dtype=torch.float64) for dim in (16, value_dim)))
    sinks = torch.randn(4, dtype=torch.float64) if has_sinks else None
    options = (0.3, window, float(softcap), sinks)
    none = torch.zeros(2, dtype=torch.int64)
    ours = tuning_attention(query, key, value, *cache, none, none, *options)
    expected = as_draft_steps(query, key, value, cache, options)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert_same_gradients(ours, expected, (query, key, value))
