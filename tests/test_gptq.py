"""GPTQ's codes, against its definition, and what a graph's linears read."""

from __future__ import annotations

import pytest
import torch
from conftest import GROUP
from step_by_step import random_prompt
from tiny_models import tiny_model
from torch import Tensor

import quantspec
from quantspec.capture import converting
from quantspec.config import WeightQuantizer
from quantspec.kernels.int4_linear import dequantize_int4, pack_int4
from quantspec.passes import plain_weights
from quantspec.passes.int4_weights import quantize_int4
from quantspec.tuning.gptq import gptq_codes
from quantspec.tuning.graphs import dense_weights, tuning_graphs


def by_definition(weight: Tensor, products: Tensor, scale_and_zero: Tensor) -> Tensor:
    """Column by column: what is left of the weight is the best that there is, given the codes so far."""
    size = weight.shape[1]
    hessian = products + 0.01 * products.diagonal().mean() * torch.eye(size, dtype=products.dtype)
    left, codes = weight.clone(), torch.empty_like(weight)
    for column in range(size):
        scale, zero = scale_and_zero[column // (size // len(scale_and_zero))].to(weight.dtype).unbind(-1)
        codes[:, column] = ((left[:, column] - zero) / scale).round().add(8).clamp(0, 15)
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = left[:, column] - ((codes[:, column] - 8) * scale + zero)
        left[:, column:] -= error[:, None] / inverse[0, 0] * inverse[0]
    return codes.to(torch.uint8)


def problem(size: int = 160, rows: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, weight, codes by rounding, scales; float64, inputs that depend on each other."""
    generator = torch.Generator().manual_seed(0)
    mix, weight = (torch.randn(n, size, generator=generator, dtype=torch.float64) for n in (size, rows))
    x = torch.randn(400, size, generator=generator, dtype=torch.float64) @ mix
    return x, weight, *quantize_int4(weight.float(), 32, WeightQuantizer.TINYGEMM)


def test_codes_are_those_of_the_definition():
    x, weight, _, scales = problem()
    assert torch.equal(gptq_codes(weight, x.t() @ x, scales), by_definition(weight, x.t() @ x, scales))


def test_they_come_closer_to_what_the_weight_makes_of_the_inputs():
    x, weight, rounded, scales = problem()

    def error(packed: Tensor) -> float:
        return (x @ (dequantize_int4(packed, scales.double(), torch.float64) - weight).t()).square().mean().item()

    assert error(pack_int4(gptq_codes(weight, x.t() @ x, scales))) < 0.6 * error(rounded)


def test_inputs_that_say_too_little_are_damped():
    x, weight, _, scales = problem()
    few = x[:3].float()
    codes = gptq_codes(weight.float(), few.t() @ few, scales)
    assert codes is not None
    assert codes.max() <= 15


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_inputs_that_say_nothing_give_no_codes(value):
    _, weight, _, scales = problem()
    assert gptq_codes(weight, torch.full((160, 160), value, dtype=torch.float64), scales) is None


def test_each_layer_reads_what_the_layers_before_it_make_with_their_new_codes():
    qs = quantspec.convert(tiny_model("llama"), kv_group_size=GROUP, weight_group_size=32, self_check=False)
    ids = torch.tensor([random_prompt(3 * GROUP, seed) for seed in range(4)])
    weights = dense_weights(qs.pair)
    assert weights.keys() == plain_weights(qs.draft).keys()
    with converting():
        teacher, together = tuning_graphs(qs.pair, own_codes=True)
        _, one_by_one = tuning_graphs(qs.pair, own_codes=True)
    together.choose_codes(teacher, ids, weights)
    for layer in range(2):
        layers = {name: weight for name, weight in weights.items() if f"layers.{layer}." in name}
        assert len(layers) == 7
        one_by_one.choose_codes(teacher, ids, layers)
    for name in weights:
        assert torch.equal(together.parts[name]["qdata"], one_by_one.parts[name]["qdata"])
