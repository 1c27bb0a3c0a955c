"""A weight format is one file: a format made here goes through the passes, and comes back out, like INT4."""

from __future__ import annotations

import pytest
import torch
from test_passes import _CheckValues, _Linears, apply, count, decoder, exported, ids_and_positions, randn
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from quantspec.pair.recipes import run_passes
from quantspec.passes import (
    FuseSharedInputLinears,
    Part,
    QuantizeWeights,
    WeightFormat,
    WeightLayout,
    WeightQuantizer,
    plain_weights,
    register,
)
from quantspec.passes.graph import add_buffer, add_call, find_calls, finish, get_tensor
from quantspec.passes.weight_formats import PACKED_LINEARS, PackedLinears

aten = torch.ops.aten


# --- a format: signed bytes, and one scale per row -------------------------------------------------------------------


@torch.library.custom_op("formats_test::int8_linear", mutates_args=())
def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``codes (N, K)`` int8, ``scale (N,)``."""
    return torch.nn.functional.linear(x, codes.to(x.dtype) * scale[:, None].to(x.dtype), bias)


@int8_linear.register_fake
def _(x, codes, scale, bias):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("formats_test::int8_linear_transposed", mutates_args=())
def int8_linear_transposed(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``codes (K, N)`` int8, ``scale (N,)``."""
    return int8_linear(x, codes.t(), scale, bias)


@int8_linear_transposed.register_fake
def _(x, codes, scale, bias):
    return x.new_empty(*x.shape[:-1], codes.shape[1])


class Transpose(WeightLayout):
    """Matches ``int8_linear``, writes ``int8_linear_transposed``."""

    op = torch.ops.formats_test.int8_linear_transposed.default

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = list(find_calls(graph_module.graph, INT8.linear))
        for node in found:
            x, codes, scale, bias = node.args
            with graph_module.graph.inserting_before(node):
                turned = add_buffer(
                    graph_module, f"{node.name}_turned", get_tensor(graph_module, codes).t().contiguous()
                )
                new = add_call(graph_module.graph, self.op, (x, turned, scale, bias), node)
            new.meta[PACKED_LINEARS] = node.meta[PACKED_LINEARS]
            node.replace_all_uses_with(new)
            graph_module.graph.erase_node(node)
        if found:
            finish(graph_module)
        return PassResult(graph_module, bool(found))

    @staticmethod
    def plain(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, ...]:
        return get_tensor(gm, node.args[1]).t(), get_tensor(gm, node.args[2])


def pack_int8(weight: Tensor, group_size: int, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    scale = weight.detach().abs().amax(1) / 127
    return (weight.detach() / scale[:, None]).round().to(torch.int8), scale


INT8 = register(
    WeightFormat(
        name="int8",
        parts=(
            Part("codes", lambda rows, width, _: (rows, width), lambda _: torch.int8, row_axis=-2),
            Part("scale", lambda rows, width, _: (rows,), lambda dtype: dtype, row_axis=-1),
        ),
        pack=pack_int8,
        linear=torch.ops.formats_test.int8_linear.default,
        group_size=lambda width, asked: width,
        layouts=(Transpose,),
    )
)


def quantizer(source=None) -> QuantizeWeights:
    return QuantizeWeights(INT8, 64, WeightQuantizer.TINYGEMM, True, source)


# --- through the passes ----------------------------------------------------------------------------------------------


def test_a_format_goes_through_every_pass_and_is_read_back():
    x, module = randn(2, 3, 96), _Linears()
    gm = exported(module, x)
    expected = {name: pack_int8(getattr(module, name).weight, 0, None) for name in ("q", "k", "v", "odd", "head")}
    with torch.no_grad():
        gm = apply(gm, rewrite := quantizer())
        assert count(gm, INT8.linear) == 5
        assert [report.group_size for report in rewrite.report] == [96, 96, 96, 76, 128]
        for name, (codes, scale) in expected.items():
            getattr(module, name).weight.copy_(codes * scale[:, None])
        dense = module(x)
        torch.testing.assert_close(gm(x), dense)
        gm = apply(gm, FuseSharedInputLinears())
        # Q and K read one input and have biases; V has none.
        assert (count(gm, INT8.linear), count(gm, aten.split_with_sizes.default)) == (4, 1)
        torch.testing.assert_close(gm(x), dense)
        for layout in INT8.layouts:
            gm = apply(gm, layout())
        assert (count(gm, INT8.linear), count(gm, Transpose.op)) == (0, 4)
        torch.testing.assert_close(gm(x), dense)
        _CheckValues(gm).run(x)
    read = plain_weights(gm)
    assert read.keys() == expected.keys()
    for name, (codes, scale) in expected.items():
        assert list(read[name]) == ["codes", "scale"]
        assert torch.equal(read[name]["codes"], codes), name
        assert torch.equal(read[name]["scale"], scale), name


def test_a_format_takes_ready_weights():
    x = randn(2, 96)
    gm = exported(_Linears(), x)
    asked = []

    def source(weight_format: WeightFormat, name: str, shape: tuple[int, ...], group_size: int) -> tuple[Tensor, ...]:
        asked.append((name, shape, group_size))
        sizes = weight_format.shapes(shape, group_size)
        return tuple(
            torch.ones(size, dtype=part.dtype(torch.float32))
            for part, size in zip(weight_format.parts, sizes, strict=True)
        )

    gm = apply(gm, quantizer(source))
    assert asked == [
        ("q", (32, 96), 96),
        ("k", (20, 96), 96),
        ("v", (24, 96), 96),
        ("odd", (128, 76), 76),
        ("head", (50, 128), 128),
    ]
    assert all(bool((tensor == 1).all()) for parts in plain_weights(gm).values() for tensor in parts.values())


def test_bytes_of_a_format_are_those_of_its_tensors():
    weight = randn(20, 96)
    for dtype in (torch.float32, torch.bfloat16):
        parts = INT8.packed(weight.to(dtype), 96, WeightQuantizer.TINYGEMM)
        assert [part.shape for part in parts] == INT8.shapes((20, 96), 96)
        assert sum(part.nbytes for part in parts) == INT8.nbytes((20, 96), 96, dtype)


def test_experts_stay_where_a_format_has_no_op_for_them():
    gm, inputs = decoder("mixtral"), ids_and_positions()
    experts = count(gm, torch.ops.quantspec.expert_linear.default)
    gm = apply(gm, rewrite := quantizer())
    assert count(gm, torch.ops.quantspec.expert_linear.default) == experts == 4
    notes = {report.name: report.note for report in rewrite.report if "experts." in report.name}
    assert list(notes.values()) == ["int8 has no op for experts"] * 4
    with torch.no_grad():
        _CheckValues(gm).run(*inputs)


def test_formats_share_a_graph_but_no_fused_linear():
    """Each is read back by its own format."""
    x = randn(2, 96)
    gm = apply(exported(_Linears(), x), quantizer())
    (first, *_) = find_calls(gm.graph, INT8.linear)
    twin = register(WeightFormat("int8 again", INT8.parts, pack_int8, INT8.linear, group_size=INT8.group_size))
    first.meta[PACKED_LINEARS] = PackedLinears(twin.name, first.meta[PACKED_LINEARS].rows)
    gm = apply(gm, FuseSharedInputLinears(), modifies=False)
    assert count(gm, INT8.linear) == 5


def test_passes_run_in_their_written_order():
    gm = exported(_Linears(), randn(2, 96))
    with pytest.raises(RuntimeError, match=r"Expected .*FuseSharedInputLinears.* before .*QuantizeWeights"):
        run_passes(gm, [FuseSharedInputLinears(), quantizer()])
    with pytest.raises(RuntimeError, match=r"Expected .*Transpose.* before .*FuseSharedInputLinears"):
        run_passes(gm, [quantizer(), Transpose(), FuseSharedInputLinears()])
    gm = run_passes(gm, [quantizer(), FuseSharedInputLinears(), Transpose()])
    assert count(gm, Transpose.op) == 4


def test_names_of_formats_are_unique():
    with pytest.raises(ValueError, match="'int8' is registered already"):
        register(WeightFormat("int8", INT8.parts, pack_int8, INT8.linear))


def test_a_packed_linear_must_say_what_it_holds():
    """What is saved of a draft is found by this metadata: a pass that loses it is stopped."""
    gm = apply(exported(_Linears(), randn(2, 96)), quantizer())
    (first, *_) = find_calls(gm.graph, INT8.linear)
    linears = first.meta.pop(PACKED_LINEARS)
    with pytest.raises(AssertionError, match="does not say which linears"):
        FuseSharedInputLinears()(gm)
    first.meta[PACKED_LINEARS] = PackedLinears(linears.format, (("q", 31),))
    with pytest.raises(AssertionError, match="other rows"):
        FuseSharedInputLinears()(gm)
