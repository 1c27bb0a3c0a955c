"""Passes that let linears do what follows them: exact counts, the same outputs, and the graphs they leave alone."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from test_passes import _CheckValues, apply, count, exported, ids_and_positions, randn
from tiny_models import tiny_model
from torch import Tensor, fx, nn

import quantspec
from quantspec.capture import Capture, capture
from quantspec.config import WeightQuantizer
from quantspec.kernels.linears import reads_faster
from quantspec.pair.compile_by_layer import _signature, region_graph, split_regions
from quantspec.passes import (
    FuseGates,
    FuseInt4Epilogues,
    FuseInt4Norms,
    FuseSharedInputLinears,
    GroupLinears,
    QuantizeWeights,
    RemoveNoOps,
    group_linears,
    plain_weights,
    prepack_int4,
)
from quantspec.passes.graph import clone, find_calls
from quantspec.passes.int4_weights import INT4

aten = torch.ops.aten
ops = torch.ops.quantspec


@functools.cache
def _captured(architecture: str) -> Capture:
    return capture(tiny_model(architecture))


def decoder(architecture: str) -> fx.GraphModule:
    """A fresh clone of a captured tiny decoder, as the target's passes find it."""
    return RemoveNoOps()(clone(_captured(architecture).graph_module)).graph_module


def quantized(gm: fx.GraphModule) -> fx.GraphModule:
    """With INT4 weights, those of one input stacked."""
    for rewrite in (QuantizeWeights(INT4, 32, WeightQuantizer.TINYGEMM, True), FuseSharedInputLinears()):
        gm = rewrite(gm).graph_module
    return gm


@pytest.fixture
def grouping(monkeypatch) -> None:
    """Let the pass take weights of a CPU, whose op is the plain implementation."""
    monkeypatch.setattr(group_linears, "worth_grouping", lambda weights: len(weights) > 1)
    monkeypatch.setattr(group_linears, "worth_fusing", lambda weights: True)


# Products of a gate and additions to a residual, of two layers.
INT4_COUNTS = {
    "llama": (2, 4),
    "gemma": (2, 4),
    "phi3": (2, 4),
    # Norms stand between linear and addition.
    "gemma2": (2, 0),
    # Attention and MLP read one norm: five linears are one, and both results are added.
    "cohere": (0, 4),
    # No gate; the MLP's result is added to the attention's.
    "phi": (0, 2),
    # A view stands between.
    "gpt2": (0, 0),
    # The residual is scaled.
    "granite": (2, 0),
}


@pytest.mark.parametrize("architecture", INT4_COUNTS)
def test_int4_linears_take_gates_and_residuals(architecture: str) -> None:
    gm = quantized(decoder(architecture))
    linears = count(gm, ops.int4_linear.default)
    expected = gm(*ids_and_positions())
    weights = plain_weights(gm)
    gates, sums = INT4_COUNTS[architecture]
    additions, products = count(gm, aten.add.Tensor), count(gm, aten.mul.Tensor)
    gm = apply(gm, FuseInt4Epilogues(), modifies=gates + sums > 0)
    fused = list(find_calls(gm.graph, ops.int4_fused_linear.default))
    assert sum(bool(node.args[5]) for node in fused) == products - count(gm, aten.mul.Tensor) == gates
    assert sum(node.args[4] is not None for node in fused) == additions - count(gm, aten.add.Tensor) == sums
    assert len(fused) + count(gm, ops.int4_linear.default) == linears
    torch.testing.assert_close(_CheckValues(gm).run(*ids_and_positions()), expected, rtol=1e-4, atol=1e-5)
    after = plain_weights(gm)
    assert after.keys() == weights.keys()
    for name, parts in weights.items():
        for part, tensor in parts.items():
            assert torch.equal(after[name][part], tensor), (name, part)


class _Gate(nn.Module):
    """A gate whose factor may come first, of an odd width, and with biases or not."""

    def __init__(self, gate_first: bool, bias: bool, width: int = 45) -> None:
        super().__init__()
        self.gate_first = gate_first
        self.both = nn.Linear(64, 2 * width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """``silu(gate) * factor``."""
        first, second = self.both(x).chunk(2, -1)
        return F.silu(first) * second if self.gate_first else first * F.silu(second)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gates_stand_in_either_half(gate_first: bool, bias: bool) -> None:
    x = randn(3, 64)
    gm = quantized(exported(_Gate(gate_first, bias), x))
    expected, weights = gm(x), plain_weights(gm)
    gm = apply(gm, FuseInt4Epilogues())
    assert count(gm, aten.mul.Tensor, aten.silu.default, aten.chunk.default) == 0
    torch.testing.assert_close(gm(x), expected)
    for part, tensor in weights["both"].items():
        assert torch.equal(plain_weights(gm)["both"][part], tensor)


class _Alone(nn.Module):
    """What looks like a gate or a residual, but is read elsewhere, broadcast or scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(64, 40), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        """Nothing here can be fused."""
        gate, factor = self.a(x).chunk(2, -1)
        b, d = self.b(x * 2), self.d(x * 3)
        return F.silu(gate) * factor, gate, b + x, b, self.c(x * 4) + row, torch.add(d, x, alpha=2), d + d


def test_what_is_read_elsewhere_broadcast_or_scaled_is_left_alone() -> None:
    inputs = randn(3, 64), randn(1, 64)
    gm = quantized(exported(_Alone(), *inputs))
    apply(gm, FuseInt4Epilogues(), modifies=False)


# Norms between the linears of two layers, and before the head.
NORMS = {
    "llama": 4,
    "gemma": 4,
    "phi3": 4,
    # Norms stand between linear and addition.
    "gemma2": 0,
    # Layer norms.
    "cohere": 0,
}


@pytest.mark.parametrize("architecture", NORMS)
def test_norms_between_int4_linears_need_no_launch(architecture: str) -> None:
    gm = quantized(decoder(architecture))
    expected, weights = gm(*ids_and_positions()), plain_weights(gm)
    gm = FuseInt4Epilogues()(gm).graph_module
    roots = count(gm, aten.rsqrt.default)
    norms = NORMS[architecture]
    gm = apply(gm, FuseInt4Norms(), modifies=norms > 0)
    assert count(gm, ops.int4_linear_to_norm.default) == roots - count(gm, aten.rsqrt.default) == norms
    torch.testing.assert_close(_CheckValues(gm).run(*ids_and_positions()), expected, rtol=1e-4, atol=1e-5)
    for name, parts in plain_weights(gm).items():
        for part, tensor in parts.items():
            assert tensor.data_ptr() == weights[name][part].data_ptr(), (name, part)


def test_layers_are_cut_behind_what_is_normalized(monkeypatch) -> None:
    """The results of a layer's last linear belong to one region, and equal layers stay equal."""
    monkeypatch.setattr(prepack_int4, "_on_cpu", lambda gm: [])
    draft = quantspec.convert(tiny_model("llama", num_hidden_layers=5), weight_group_size=32, self_check=False).draft
    assert count(draft, ops.int4_linear_to_norm.default) == 9
    regions = split_regions(draft.graph)
    assert regions is not None
    assert len(regions) == 6
    # The last norm is read by rows.
    assert len({_signature(draft, region, region_graph(region)) for region in regions[1:-2]}) == 1


# Groups of two layers.
GROUPED = {
    "llama": 4,
    # Attention and MLP read one norm: three of five linears, and the other two.
    "cohere": 4,
    # Three of four linears.
    "phi": 2,
}


@pytest.mark.parametrize("architecture", GROUPED)
def test_the_targets_linears_share_launches(architecture: str, grouping) -> None:
    gm = decoder(architecture)
    expected = gm(*ids_and_positions())
    storages = {name: tensor.data_ptr() for name, tensor in gm.named_parameters()}
    gm = apply(gm, GroupLinears())
    assert count(gm, ops.linears.default) == GROUPED[architecture]
    assert {name: tensor.data_ptr() for name, tensor in gm.named_parameters()} == storages
    torch.testing.assert_close(_CheckValues(gm).run(*ids_and_positions()), expected, rtol=1e-4, atol=1e-5)


def test_a_linear_may_be_read_alone(monkeypatch) -> None:
    """phi3 has one linear for queries, keys and values, and one for gates and factors."""
    monkeypatch.setattr(group_linears, "worth_grouping", lambda weights: weights[0].shape[0] == 128)
    gm = decoder("phi3")
    expected = gm(*ids_and_positions())
    fits = [node for node in find_calls(gm.graph, aten.linear.default) if node.meta["val"].shape[-1] == 128]
    gm = apply(gm, GroupLinears())
    assert count(gm, ops.linears.default) == len(fits) > 0
    torch.testing.assert_close(_CheckValues(gm).run(*ids_and_positions()), expected, rtol=1e-4, atol=1e-5)


def test_a_kernel_reads_what_fills_the_gpu_once() -> None:
    """Outputs of one linear, its inputs, and multiprocessors; several are read together up to 8,192 outputs."""
    assert reads_faster([4096], 4096, 132)
    assert not reads_faster([4096], 14336, 132)
    assert not reads_faster([8192], 4096, 132)
    assert not reads_faster([2048], 4096, 132)
    assert reads_faster([2048], 4096, 64)
    assert not reads_faster([128256], 4096, 132)
    assert reads_faster([4096, 1024, 1024], 4096, 132)
    assert not reads_faster([8192, 1024, 1024], 8192, 132)


def test_linears_of_a_cpu_stay() -> None:
    apply(decoder("llama"), GroupLinears(), modifies=False)


# Of two layers; one weight has both halves in phi3, and phi has no gates.
TARGET_GATES = {"llama": 2, "phi3": 2, "cohere": 2, "gemma": 2, "phi": 0}


@pytest.mark.parametrize("architecture", TARGET_GATES)
def test_the_targets_gates_need_no_launch(architecture: str, grouping) -> None:
    gm = decoder(architecture)
    expected = gm(*ids_and_positions())
    storages = {name: tensor.data_ptr() for name, tensor in gm.named_parameters()}
    gates = TARGET_GATES[architecture]
    gm = apply(gm, FuseGates(), modifies=gates > 0)
    assert count(gm, ops.gated_linears.default) == gates
    assert count(gm, aten.silu.default) == 0
    assert {name: tensor.data_ptr() for name, tensor in gm.named_parameters()} == storages
    torch.testing.assert_close(_CheckValues(gm).run(*ids_and_positions()), expected, rtol=1e-4, atol=1e-5)


class _GateOfAnother(nn.Module):
    """A gate that something else reads too, and one whose factor has another input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.factor = nn.Linear(64, 32, bias=False), nn.Linear(64, 32)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        kept = self.gate(x)
        return F.silu(kept) * self.factor(x) + kept + F.silu(self.gate(x)) * self.factor(y)


def test_gates_that_are_not_of_one_input_and_alone_stay(grouping) -> None:
    apply(exported(_GateOfAnother(), randn(3, 64), randn(3, 64)), FuseGates(), modifies=False)


def test_gates_of_a_cpu_stay() -> None:
    apply(decoder("llama"), FuseGates(), modifies=False)
