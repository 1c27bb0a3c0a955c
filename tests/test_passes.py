"""Each pass: the same output, the exact number of rewrites, a truthful ``modified``, and metadata on every node."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase

from quantspec.cache import HierarchicalCache
from quantspec.capture import Capture, capture
from quantspec.kernels.cache_layout import part_names
from quantspec.kernels.int4_linear import dequantize_int4
from quantspec.passes import (
    ACCESSES,
    CheckTokenMixing,
    FuseSharedInputLinears,
    LowerAttention,
    MaterializePositionTables,
    PlaceConstants,
    PrepackInt4ForCpu,
    QuantizeWeights,
    RemoveNoOps,
    Role,
    SelectLogitRows,
    TokenMixingError,
    WeightQuantizer,
    WidenLinears,
    adapted_group_size,
    cache_parts,
    plain_weights,
    store_plain_weights,
)
from quantspec.passes.graph import clone, find_calls, get_tensor
from quantspec.passes.int4_weights import INT4, quantize_int4
from quantspec.passes.token_mixing import _WithoutAttention

aten = torch.ops.aten
ops = torch.ops.quantspec


# --- helpers ---------------------------------------------------------------------------------------------------------


def exported(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The ATen graph of a module, with metadata, as capture hands it to the passes."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    program = torch.export.export(module.eval(), inputs, strict=False)
    return clone(program.module(check_guards=False))


def count(gm: fx.GraphModule, *targets: Any) -> int:
    """Calls of any of these targets."""
    return len(list(find_calls(gm.graph, *targets)))


class _CheckValues(fx.Interpreter):
    """Runs a graph and compares every tensor with its node's metadata; symbolic sizes match anything."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and compare."""
        result = super().run_node(n)
        if n.op != "output" and isinstance(result, Tensor):
            value = n.meta.get("val")
            assert isinstance(value, Tensor), f"{n.format_node()} has no value metadata"
            assert value.dtype == result.dtype, n.format_node()
            assert value.dim() == result.dim(), n.format_node()
            for meta, real in zip(value.shape, result.shape, strict=True):
                assert not isinstance(meta, int) or meta == real, n.format_node()
        return result


def apply(gm: fx.GraphModule, rewrite: PassBase, modifies: bool = True) -> fx.GraphModule:
    """Run a pass twice: what it reports is true, and the second run finds nothing left."""
    before = gm.code
    result = rewrite(gm)
    after = result.graph_module
    assert result.modified is modifies
    assert (after.code != before) is modifies
    after.graph.lint()
    settled = after.code
    again = rewrite(after)
    assert again.modified is False
    assert again.graph_module.code == settled
    return after


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def _captured(architecture: str) -> Capture:
    return capture(tiny_model(architecture))


def decoder(architecture: str = "llama") -> fx.GraphModule:
    """A fresh clone of a captured tiny decoder."""
    return clone(_captured(architecture).graph_module)


def ids_and_positions(tokens: int = 9, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Random prompts and their positions."""
    ids = torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(tokens).expand(batch, tokens).clone()


# --- RemoveNoOps -----------------------------------------------------------------------------------------------------


class _NoOps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """One slice, cast and dropout that return their input, and one slice and cast that do not."""
        y = aten.slice.Tensor(x, 1, 0, sys.maxsize).to(torch.float32)
        y = nn.functional.dropout(y, 0.5, training=False) * 2
        return y[:, 1:].to(torch.float64)


def test_remove_no_ops_removes_what_returns_its_input_and_nothing_else():
    x = randn(3, 5)
    gm = exported(_NoOps(), x)
    expected = gm(x)
    kinds = (aten.to.dtype, aten.slice.Tensor, aten.dropout.default, aten._assert_tensor_metadata.default)
    assert [count(gm, kind) for kind in kinds[:3]] == [2, 2, 1]
    gm = apply(gm, RemoveNoOps())
    assert [count(gm, kind) for kind in kinds] == [1, 1, 0, 0]
    assert torch.equal(gm(x), expected)
    _CheckValues(gm).run(x)


def test_remove_no_ops_keeps_casts_without_metadata():
    x = randn(3, 5)
    gm = exported(_NoOps(), x)
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is aten.to.dtype:
            node.meta.pop("val", None)
    gm = apply(gm, RemoveNoOps())
    assert count(gm, aten.to.dtype) == 2


@pytest.mark.parametrize(
    ("args", "kwargs", "no_op"),
    [((), {}, True), ((1,), {"end": 2}, False), ((1, 0, sys.maxsize, 1), {}, True), ((1, None, None, 2), {}, False)],
)
def test_remove_no_ops_reads_a_slice_however_it_is_written(args, kwargs, no_op):
    graph = fx.Graph()
    graph.output(graph.call_function(aten.slice.Tensor, (graph.placeholder("x"), *args), kwargs))
    x = randn(3, 5)
    gm = apply(fx.GraphModule(nn.Module(), graph), RemoveNoOps(), modifies=no_op)
    assert torch.equal(gm(x), aten.slice.Tensor(x, *args, **kwargs))


def test_remove_no_ops_leaves_a_clean_graph_alone():
    gm = exported(nn.Linear(4, 4), randn(2, 4))
    apply(gm, RemoveNoOps(), modifies=False)


# --- PlaceConstants --------------------------------------------------------------------------------------------------


def test_constants_move_to_where_the_graph_runs():
    """Export lifts a number of the model's code onto the CPU."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3, device="meta")
    there, lifted = graph.get_attr("there"), graph.get_attr("lifted")
    graph.output(graph.call_function(aten.add.Tensor, (graph.call_function(aten.mul.Tensor, (x, there)), lifted)))
    root = nn.Module()
    root.register_buffer("there", torch.empty(3, device="meta"))
    root.register_buffer("lifted", torch.tensor(2.0))
    gm = apply(fx.GraphModule(root, graph), PlaceConstants())
    constants = {node.target: get_tensor(gm, node) for node in gm.graph.find_nodes(op="get_attr")}
    assert constants.keys() == {"there", "lifted_placed"}
    assert constants["there"] is root.there
    assert {tensor.device.type for tensor in constants.values()} == {"meta"}
    apply(gm, PlaceConstants(), modifies=False)


# --- SelectLogitRows -------------------------------------------------------------------------------------------------


def test_select_logit_rows_gathers_in_front_of_the_head():
    gm, inputs = decoder(), ids_and_positions()
    with torch.no_grad():
        full = gm(*inputs)
        calls = len([n for n in gm.graph.nodes if n.op == "call_function"])
        gm = apply(gm, SelectLogitRows())
        rows = torch.tensor([[0, 8, 3], [7, 7, 1]])
        assert count(gm, aten.gather.default) == 1
        assert len([n for n in gm.graph.nodes if n.op == "call_function"]) == calls + 3
        assert [n.target for n in gm.graph.nodes if n.op == "placeholder"][-1] == "logit_rows"
        expected = full.gather(1, rows[..., None].expand(-1, -1, 96))
        torch.testing.assert_close(gm(*inputs, rows), expected)
        _CheckValues(gm).run(*inputs, rows)


def test_select_logit_rows_finds_the_head_behind_elementwise_ops():
    # Gemma 2 caps its logits and Granite divides them: both come after the head.
    for architecture in ("gemma2", "granite"):
        gm, inputs = decoder(architecture), ids_and_positions()
        with torch.no_grad():
            full = gm(*inputs)
            gm = apply(gm, SelectLogitRows())
            torch.testing.assert_close(gm(*inputs, torch.tensor([[4], [2]])), full[[0, 1], [4, 2]][:, None])


def test_select_logit_rows_refuses_a_graph_without_a_head():
    class NoHead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1)

    with pytest.raises(ValueError, match=r"no language-model head .*'softmax' \(aten\.softmax\.int\) of module ''"):
        SelectLogitRows()(exported(NoHead(), randn(2, 4)))


# --- LowerAttention --------------------------------------------------------------------------------------------------

GROUP = 16


def lowered_inputs(role: Role, tokens: int) -> tuple[list[Tensor], HierarchicalCache]:
    """State and cache for ``tokens`` new tokens of two sequences, as the lowered graph takes them."""
    cache = HierarchicalCache(_captured("llama").layers, 2, GROUP, 4, 512, torch.float32, torch.device("cpu"))
    cache.reserve(3 * GROUP)
    state = [cache.quantized_len, cache.length]
    if role is Role.PREFILL:
        state.append(torch.full((2,), tokens))
        state.append(torch.stack(state))
    return [*state, *cache.inputs(cache_parts(role))], cache


@pytest.mark.parametrize("role", Role)
def test_lower_attention_writes_the_roles_op_for_every_marker(role):
    gm, inputs = decoder(), ids_and_positions()
    with torch.no_grad():
        expected = gm(*inputs)
        markers = count(gm, ops.attention.default)
        gm = apply(gm, LowerAttention(ACCESSES[role], GROUP))
        new = ops.prefill_attention.default if role is Role.PREFILL else ops.cached_attention.default
        assert markers == 2
        assert count(gm, ops.attention.default) == 0
        assert count(gm, ops.cached_attention.default, ops.prefill_attention.default) == count(gm, new) == 2
        extra, cache = lowered_inputs(role, inputs[0].shape[1])
        # With an empty cache every role attends to the new tokens alone.
        torch.testing.assert_close(gm(*inputs, *extra), expected, rtol=1e-4, atol=1e-4)
        assert all(layer.k_recent[:, :, :9].any() for layer in cache.layers)
        _CheckValues(gm).run(*inputs, *extra)


@pytest.mark.parametrize("role", Role)
def test_lower_attention_names_its_inputs_in_order(role):
    gm = apply(decoder(), LowerAttention(ACCESSES[role], GROUP))
    names = [node.target for node in gm.graph.nodes if node.op == "placeholder"]
    state = ["quantized_len", "length"] + (["num_new", "host_lengths"] if role is Role.PREFILL else [])
    assert names[2:] == state + [f"cache_{layer}_{part}" for layer in range(2) for part in cache_parts(role)]


def test_the_draft_has_no_lower_plane():
    assert set(part_names()) - set(cache_parts(Role.DRAFT)) == {"k_lower", "v_lower"}
    assert cache_parts(Role.TARGET) == cache_parts(Role.PREFILL) == (*part_names(), "block_table")
    gm = apply(decoder(), LowerAttention(ACCESSES[Role.DRAFT], GROUP))
    assert not [node for node in gm.graph.nodes if "lower" in node.name]
    schema = [argument.name for argument in ops.cached_attention.default._schema.arguments]
    for call in find_calls(gm.graph, ops.cached_attention.default):
        given = dict(zip(schema, call.args, strict=False))
        assert given["k_lower"] is None
        assert given["v_lower"] is None


def test_lower_attention_carries_window_softcap_and_scale():
    gm = decoder("gemma2")
    markers = [node.args[4:] for node in find_calls(gm.graph, ops.attention.default)]
    gm = apply(gm, LowerAttention(ACCESSES[Role.TARGET], GROUP))
    assert [node.args[-4:] for node in find_calls(gm.graph, ops.cached_attention.default)] == markers
    assert [options[1] for options in markers] == [12, 0]


def test_lower_attention_refuses_two_markers_of_one_layer():
    gm = decoder()
    for marker in find_calls(gm.graph, ops.attention.default):
        marker.update_arg(3, 0)
    with pytest.raises(ValueError, match="share layer index 0") as error:
        LowerAttention(ACCESSES[Role.TARGET], GROUP)(gm)
    for layer, name in enumerate(("attention", "attention_1")):
        marker = f"node '{name}' (quantspec.attention.default) of module 'model.layers.{layer}.self_attn'"
        assert marker in str(error.value)


# --- QuantizeWeights -------------------------------------------------------------------------------------------------


class _Linears(nn.Module):
    """Q, K, V of one input (V without bias), an odd width, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(96, 32), nn.Linear(96, 20), nn.Linear(96, 24, bias=False)
        self.odd = nn.Linear(76, 128)
        self.head = nn.Linear(128, 50, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Every linear once."""
        return self.head(torch.tanh(self.odd(torch.cat((self.q(x), self.k(x), self.v(x)), -1))))


def quantizer(
    group: int = 64, lm_head: bool = True, kind: WeightQuantizer = WeightQuantizer.TINYGEMM
) -> QuantizeWeights:
    return QuantizeWeights(INT4, group, kind, lm_head)


def dequantized(gm: fx.GraphModule, node: fx.Node, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight that an INT4 linear multiplies."""
    return dequantize_int4(get_tensor(gm, node.args[1]), get_tensor(gm, node.args[2]), dtype)


def test_quantize_weights_rewrites_every_linear_that_a_group_size_divides():
    x = randn(2, 3, 96)
    module = _Linears()
    gm = apply(exported(module, x), rewrite := quantizer())
    assert count(gm, ops.int4_linear.default) == 4
    assert count(gm, aten.linear.default) == 1
    # 96 inputs take groups of 32, 128 the 64 asked for, and nothing divides 76.
    report = [(r.name, r.in_features, r.out_features, r.group_size) for r in rewrite.report[:5]]
    assert report == [
        ("q", 96, 32, 32),
        ("k", 96, 20, 32),
        ("v", 96, 24, 32),
        ("odd", 76, 128, None),
        ("head", 128, 50, 64),
    ]
    notes = [r.note for r in rewrite.report[:5]]
    assert notes[0] == "group size adapted from 64"
    assert "divides 76 inputs" in notes[3]
    assert notes[4] == ""
    # The rewritten graph is the module with its weights replaced by what the codes stand for.
    names = ("q", "k", "v", "head")
    for name, node in zip(names, find_calls(gm.graph, ops.int4_linear.default), strict=True):
        weight = getattr(module, name).weight
        dense = dequantized(gm, node)
        # Half a step of min/max rounding per group, and bfloat16 rounding of its scale and zero.
        group = weight.shape[1] // get_tensor(gm, node.args[2]).shape[0]
        grouped = weight.unflatten(1, (-1, group))
        spread = grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)
        bound = spread / 15 / 2 + 2**-8 * grouped.abs().amax(-1, keepdim=True) * 2
        assert bool(((dense.unflatten(1, (-1, group)) - grouped).abs() <= bound).all())
        weight.data.copy_(dense)
    with torch.no_grad():
        torch.testing.assert_close(gm(x), module(x), rtol=1e-4, atol=1e-4)
        _CheckValues(gm).run(x)


def test_quantize_weights_leaves_the_head_if_told_to():
    gm = apply(exported(_Linears(), randn(2, 96)), rewrite := quantizer(lm_head=False))
    assert count(gm, ops.int4_linear.default) == 3
    head = rewrite.report[4]
    assert (head.name, head.group_size, head.note) == ("head", None, "language-model head, quantize_lm_head=False")


def test_quantize_weights_takes_operands_by_name():
    """As dynamo records them where the program passes them so; here weights are get_attr nodes from the start."""
    module = _Linears()
    graph = fx.Graph()
    x, weight, bias = graph.placeholder("x"), graph.get_attr("q.weight"), graph.get_attr("q.bias")
    for node in (weight, bias):
        node.meta["val"] = get_tensor(module, node)
    graph.output(graph.call_function(nn.functional.linear, (x,), {"weight": weight, "bias": bias}))
    gm = QuantizeWeights(INT4, 64, WeightQuantizer.TINYGEMM, True)(fx.GraphModule(module, graph)).graph_module
    (node,) = find_calls(gm.graph, ops.int4_linear.default)
    x = randn(2, 96)
    with torch.no_grad():
        torch.testing.assert_close(gm(x), nn.functional.linear(x, dequantized(gm, node), module.q.bias))


def test_quantize_weights_leaves_an_addmm_that_is_no_linear():
    """Scaled, or adding a matrix."""

    class Addmm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.empty(64, 48)), nn.Parameter(torch.empty(48))

        def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
            scaled = torch.addmm(self.bias, x, self.weight, beta=0, alpha=3)
            return scaled + torch.addmm(matrix, x, self.weight)

    gm = apply(exported(Addmm(), randn(3, 64), randn(3, 48)), rewrite := quantizer(), modifies=False)
    assert count(gm, aten.addmm.default) == 2
    assert "read by aten.addmm.default" in rewrite.report[0].note


def test_quantize_weights_takes_transposed_weights_of_addmm():
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.empty(64, 48)), nn.Parameter(torch.empty(48))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight).tanh()

    x, module = randn(3, 64), Conv1D()
    gm = apply(exported(module, x), rewrite := quantizer())
    assert (count(gm, ops.int4_linear.default), count(gm, aten.addmm.default)) == (1, 0)
    assert (rewrite.report[0].in_features, rewrite.report[0].out_features) == (64, 48)
    (node,) = find_calls(gm.graph, ops.int4_linear.default)
    with torch.no_grad():
        expected = (x @ dequantized(gm, node).T + module.bias).tanh()
        torch.testing.assert_close(gm(x), expected, rtol=1e-5, atol=1e-5)
        _CheckValues(gm).run(x)


def test_quantize_weights_of_experts_leaves_the_router():
    gm, inputs = decoder("mixtral"), ids_and_positions()
    experts = count(gm, ops.expert_linear.default)
    gm = apply(gm, rewrite := quantizer())
    assert experts == 4
    assert (count(gm, ops.int4_expert_linear.default), count(gm, ops.expert_linear.default)) == (4, 0)
    left = [report.name for report in rewrite.report if report.group_size is None]
    assert left[:2] == [f"model.layers.{i}.mlp.gate" for i in range(2)]
    assert count(gm, aten.linear.default) == 2
    with torch.no_grad():
        _CheckValues(gm).run(*inputs)


def test_quantize_weights_of_a_linear_that_reads_a_linear():
    x = randn(3, 64)
    gm = apply(exported(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), x), quantizer())
    first, second = find_calls(gm.graph, ops.int4_linear.default)
    assert second.args[0] is first
    _CheckValues(gm).run(x)


def test_quantize_weights_reports_matrices_that_are_no_linear_of_their_own():
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack, self.table = nn.Parameter(torch.empty(2, 48, 64)), nn.Embedding(8, 64)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.table(ids), self.stack[1])

    apply(exported(Stacked(), torch.tensor([[1, 2]])), rewrite := quantizer(), modifies=False)
    # Experts picked by index stay as they are, but never silently; a lookup table is no linear.
    (report, *_) = rewrite.report
    assert (report.name, report.in_features, report.out_features, report.group_size) == ("stack", 64, 48, None)
    assert "aten.select" in report.note
    assert "table" not in {report.name for report in rewrite.report}


def test_quantize_weights_leaves_products_of_activations_alone():
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.linear(x, y)

    apply(exported(Product(), randn(2, 64), randn(3, 64)), rewrite := quantizer(), modifies=False)
    assert rewrite.report == []


@pytest.mark.parametrize(
    ("inputs", "asked", "size"), [(576, 128, 64), (4096, 128, 128), (96, 128, 32), (100, 128, None), (256, 256, 256)]
)
def test_group_sizes_are_adapted_to_the_input_width(inputs, asked, size):
    assert adapted_group_size(inputs, asked) == size


@pytest.mark.parametrize("kind", WeightQuantizer)
@pytest.mark.parametrize(
    ("dtype", "params"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
)
def test_quantized_weights_are_near_the_originals(kind, dtype, params):
    weight = randn(24, 128).to(dtype)
    qdata, scale_and_zero = quantize_int4(weight, 32, kind)
    assert (qdata.shape, qdata.dtype) == ((24, 64), torch.uint8)
    assert (scale_and_zero.shape, scale_and_zero.dtype) == ((4, 24, 2), params)
    error = dequantize_int4(qdata, scale_and_zero, torch.float32) - weight.float()
    # Four bits over a normal group of 32: a step is about 0.28, its rounding error 0.08.
    assert error.pow(2).mean().sqrt() < 0.12


# --- FuseSharedInputLinears ------------------------------------------------------------------------------------------


def test_fuse_runs_linears_of_one_input_as_one():
    x = randn(2, 3, 96)
    gm = apply(exported(_Linears(), x), quantizer())
    expected = gm(x)
    gm = apply(gm, FuseSharedInputLinears())
    # Q and K share an input and have biases; V has none, so it stays alone, like the head.
    assert count(gm, ops.int4_linear.default) == 3
    assert count(gm, aten.split_with_sizes.default) == 1
    torch.testing.assert_close(gm(x), expected, rtol=1e-6, atol=1e-6)
    _CheckValues(gm).run(x)
    # The weights that were stacked are gone.
    assert len(dict(gm.named_buffers())) == 2 * 3


def test_fuse_leaves_different_group_sizes_apart():
    x = randn(2, 96)
    gm = apply(exported(_Linears(), x), quantizer())
    k = list(find_calls(gm.graph, ops.int4_linear.default))[1]
    # The same numbers in groups of 16 instead of 32.
    fine = get_tensor(gm, k.args[2]).repeat_interleave(2, 0)
    setattr(gm, str(k.args[2].target), fine)
    expected = gm(x)
    gm = apply(gm, FuseSharedInputLinears(), modifies=False)
    assert torch.equal(gm(x), expected)


def test_fuse_of_a_decoder_makes_one_linear_of_qkv_and_one_of_gate_and_up():
    gm = apply(decoder(), quantizer(32))
    assert count(gm, ops.int4_linear.default) == 2 * 7 + 1
    gm = apply(gm, FuseSharedInputLinears())
    assert count(gm, ops.int4_linear.default) == 2 * 4 + 1


# --- PrepackInt4ForCpu -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(5,), (2, 3)])
def test_prepack_multiplies_the_same_weights(lead):
    # 32, 20, 24 and 50 rows: three of them are no multiple of the kernel's 16.
    x = randn(*lead, 96)
    gm = apply(exported(_Linears(), x), quantizer())
    expected = gm(x)
    gm = apply(gm, PrepackInt4ForCpu())
    assert count(gm, aten._weight_int4pack_mm_for_cpu.default) == 4
    assert count(gm, ops.int4_linear.default) == 0
    assert count(gm, aten.slice.Tensor) == 3
    out = gm(x)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    # Activations are rounded to bfloat16.
    error = (out - expected).norm() / expected.norm()
    assert 0 < error < 2**-7
    _CheckValues(gm).run(x)


def test_prepacked_weights_take_any_number_of_tokens():
    gm = apply(apply(decoder(), quantizer(32)), PrepackInt4ForCpu())
    with torch.no_grad():
        for tokens, batch in ((1, 1), (5, 3)):
            inputs = ids_and_positions(tokens, batch)
            assert gm(*inputs).shape == (batch, tokens, 96)


@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_weights_are_stored_where_they_are_read(fused, prepacked):
    # Of the loose ones three have a row count that is no multiple of the CPU kernel's 16.
    gm = apply(decoder(), quantizer(32)) if fused else apply(exported(_Linears(), randn(5, 96)), quantizer())
    for rewrite in [FuseSharedInputLinears()] * fused + [PrepackInt4ForCpu()] * prepacked:
        gm = apply(gm, rewrite)
    inputs = ids_and_positions(5) if fused else (randn(5, 96),)
    places, before = {name: buffer.data_ptr() for name, buffer in gm.named_buffers()}, gm(*inputs)
    others = {
        name: {"qdata": 255 - parts["qdata"], "scale_and_zero": 2 * parts["scale_and_zero"]}
        for name, parts in plain_weights(gm).items()
    }
    store_plain_weights(gm, others)
    assert {name: buffer.data_ptr() for name, buffer in gm.named_buffers()} == places
    for name, parts in plain_weights(gm).items():
        assert all(torch.equal(tensor, others[name][part]) for part, tensor in parts.items())
    assert not torch.allclose(gm(*inputs), before)


# --- WidenLinears ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widen_multiplies_half_precision_in_float32(dtype):
    x = randn(2, 96).to(dtype)
    module = _Linears().to(dtype)
    gm = exported(module, x)
    expected = module(x)
    gm = apply(gm, WidenLinears())
    # Input, weight and the output, and the bias of three of the five.
    assert count(gm, aten.to.dtype) == 5 * 3 + 3
    assert all(node.meta["val"].dtype == torch.float32 for node in find_calls(gm.graph, aten.linear.default))
    out = gm(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=5e-2, atol=5e-2 * expected.abs().max().item())
    _CheckValues(gm).run(x)


def test_widen_leaves_float32_alone():
    apply(exported(_Linears(), randn(2, 96)), WidenLinears(), modifies=False)


# --- CheckTokenMixing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_token_mixing_check_passes_decoders_and_changes_nothing(architecture):
    apply(decoder(architecture), CheckTokenMixing(96, 512), modifies=False)


def test_token_mixing_check_names_the_node_and_the_module():
    gm = decoder()
    (add, *_) = find_calls(gm.graph, aten.add.Tensor)
    with gm.graph.inserting_after(add):
        shifted = gm.graph.call_function(aten.roll.default, (add, [1], [1]))
    shifted.meta.update(add.meta)
    add.replace_all_uses_with(shifted, delete_user_cb=lambda user: user is not shifted)
    gm.recompile()
    with pytest.raises(TokenMixingError, match=f"node '{shifted.name}' .*aten.roll.* mixes tokens"):
        CheckTokenMixing(96, 512)(gm)


def test_token_mixing_check_sees_a_model_that_counts_positions_itself():
    gm = decoder("gpt2")
    positions = [node for node in gm.graph.nodes if node.op == "placeholder"][1]
    with gm.graph.inserting_after(positions):
        counted = gm.graph.call_function(torch.zeros_like, (positions,))
    with gm.graph.inserting_after(counted):
        counted = gm.graph.call_function(torch.add, (counted, torch.arange(13)))
    positions.replace_all_uses_with(counted, delete_user_cb=lambda user: user.target is not torch.zeros_like)
    gm.recompile()
    with pytest.raises(TokenMixingError):
        CheckTokenMixing(96, 512)(gm)


def test_without_attention_every_token_keeps_its_own_value():
    gm, inputs = decoder(), ids_and_positions()
    with torch.no_grad():
        both = _WithoutAttention(gm, keep=False).run(*inputs)
        first = _WithoutAttention(gm, keep=False).run(*(t[:, :1] for t in inputs))
    torch.testing.assert_close(both[:, :1], first, rtol=1e-5, atol=1e-5)


# --- position tables -------------------------------------------------------------------------------------------------


def test_position_tables_are_materialized_once() -> None:
    """Cosines and sines, which every layer reads, and nothing else; a second run finds nothing to do."""
    captured = capture(tiny_model("llama"))
    gm = clone(captured.graph_module)
    ids, positions = torch.tensor([[5, 7, 11]]), torch.tensor([[0, 1, 2]])
    before = gm(ids, positions)
    result = MaterializePositionTables()(gm)
    assert result is not None
    assert result.modified
    copies = list(find_calls(gm.graph, ops.materialize.default))
    assert len(copies) == 2
    # Two layers read each.
    assert all(len(node.users) == 2 for node in copies)
    assert all(isinstance(node.meta["val"], Tensor) for node in copies)
    assert torch.equal(gm(ids, positions), before)
    again = MaterializePositionTables()(gm)
    assert again is not None
    assert not again.modified


def test_learned_positions_are_read_once_and_left_alone() -> None:
    gm = clone(capture(tiny_model("gpt2")).graph_module)
    result = MaterializePositionTables()(gm)
    assert result is not None
    assert not result.modified
