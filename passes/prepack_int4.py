"""Lay INT4 weights out for the CPU's own 4-bit matmul."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from quantspec.freed_memory import FreedMemory
from quantspec.kernels.int4_linear import pack_int4, unpack_int4

from .graph import add_buffer, add_call, aten, find_calls, finish, get_tensor, release
from .weight_formats import PACKED_LINEARS, WeightLayout, check_packed

# Rows of the output that aten's CPU packing handles together.
_ROW_BLOCK = 16
# A multiple of the rows that any CPU's layout mixes (16, 32 or 64).
_ROWS_TOGETHER = 256


class PrepackInt4ForCpu(WeightLayout):
    """Matches ``quantspec::int4_linear`` on CPU weights, writes ``aten._weight_int4pack_mm_for_cpu`` on packed ones.

    The kernel multiplies in the dtype of the scales, so other activations (float32) are rounded to it: the draft may,
    its proposals are verified. Weights with a row count that is no multiple of 16 are padded and the output sliced.

    Requires plain-layout weights that name their linears. Ensures outputs equal up to the activation's rounding, and
    that no ``quantspec::int4_linear`` on CPU weights is left.
    """

    op = aten._weight_int4pack_mm_for_cpu.default

    def requires(self, graph_module: fx.GraphModule) -> None:
        check_packed(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found, freed = _on_cpu(graph_module), FreedMemory()
        for node in found:
            freed.after(self._rewrite(graph_module, node))
        if found:
            finish(graph_module)
        return PassResult(graph_module, bool(found))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        assert not _on_cpu(graph_module)

    @staticmethod
    def plain(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, ...]:
        """Plain-layout ``qdata`` and ``scale_and_zero`` with the rows of the node's linears, the padding left out."""
        rows = sum(rows for _, rows in node.meta[PACKED_LINEARS].rows)
        packed, params = (get_tensor(gm, node.args[index]) for index in (1, 3))  # type: ignore[arg-type]
        return unpack_cpu_layout(packed)[:rows], params[:, :rows]

    @classmethod
    def store(cls, gm: fx.GraphModule, node: fx.Node, parts: Sequence[Tensor]) -> None:
        """Codes are packed anew, padded as before."""
        qdata, scale_and_zero = parts
        packed, params = (get_tensor(gm, node.args[index]) for index in (1, 3))  # type: ignore[arg-type]
        packed.copy_(_packed_rows(qdata))
        params[:, : len(qdata)].copy_(scale_and_zero)

    @staticmethod
    def _rewrite(gm: fx.GraphModule, node: fx.Node) -> Tensor:
        """Returns the packed codes."""
        graph = gm.graph
        x, qdata_node, params_node, bias = node.args
        qdata, params = (get_tensor(gm, part) for part in (qdata_node, params_node))  # type: ignore[arg-type]
        rows, in_features = qdata.shape[0], 2 * qdata.shape[1]
        padding = -rows % _ROW_BLOCK
        packed = _packed_rows(qdata)
        params = F.pad(params, (0, 0, 0, padding)).contiguous()
        value = x.meta["val"]  # type: ignore[union-attr]
        with graph.inserting_before(node):
            flat: fx.Node = x  # type: ignore[assignment]
            if value.dim() != 2:
                flat = add_call(graph, aten.reshape.default, (flat, [-1, in_features]), node)
            if value.dtype != params.dtype:
                flat = add_call(graph, aten.to.dtype, (flat, params.dtype), node)
            if not value.is_contiguous():
                flat = add_call(graph, aten.contiguous.default, (flat,), node)
            weights = (
                add_buffer(gm, f"{node.name}_packed", packed),
                in_features // params.shape[0],
                add_buffer(gm, f"{node.name}_packed_scale_and_zero", params),
            )
            out = add_call(graph, PrepackInt4ForCpu.op, (flat, *weights), node)
            out.meta[PACKED_LINEARS] = node.meta[PACKED_LINEARS]
            if padding:
                out = add_call(graph, aten.slice.Tensor, (out, 1, 0, rows), node)
            if value.dtype != params.dtype:
                out = add_call(graph, aten.to.dtype, (out, value.dtype), node)
            if bias is not None:
                out = add_call(graph, aten.add.Tensor, (out, bias), node)
            if value.dim() != 2:
                leading = [add_call(graph, aten.sym_size.int, (x, axis), node) for axis in range(value.dim() - 2)]
                out = add_call(graph, aten.reshape.default, (out, [*leading, -1, rows]), node, value=node.meta["val"])
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        release(gm, (qdata_node, params_node))  # type: ignore[arg-type]
        return packed


def _on_cpu(gm: fx.GraphModule) -> list[fx.Node]:
    calls = find_calls(gm.graph, torch.ops.quantspec.int4_linear.default)
    return [node for node in calls if get_tensor(gm, node.args[1]).device.type == "cpu"]  # type: ignore[arg-type]


def unpack_cpu_layout(packed: Tensor) -> Tensor:
    """What ``aten._convert_weight_to_int4pack_for_cpu`` made of ``(N, K)`` codes, as plain-layout ``(N, K/2)`` uint8.

    aten has no inverse, and the layout differs between CPUs, but it only moves nibbles within a block of rows: packing
    the hexadecimal digits of every place's number shows where each nibble came from.

    Raises:
        RuntimeError: the layout is of another kind.
    """
    places: dict[int, Tensor] = {}
    blocks = []
    for block in packed.split(_ROWS_TOGETHER):
        rows, in_features = block.shape[0], 2 * block.shape[1]
        if rows not in places:
            places[rows] = _places(rows, in_features)
        codes = torch.empty(rows * in_features, dtype=torch.uint8)
        codes[places[rows]] = unpack_int4(block).flatten()
        blocks.append(codes.view(rows, in_features))
    if not torch.equal(_pack(blocks, len(packed), 2 * packed.shape[1]), packed):
        raise RuntimeError("this CPU packs INT4 weights in a layout that cannot be read back; please report it")
    return torch.cat([pack_int4(codes) for codes in blocks])


def _places(rows: int, in_features: int) -> Tensor:
    """For each nibble of a packed ``(rows, in_features)`` matrix, in order of memory, its place in the unpacked one."""
    numbers = torch.arange(rows * in_features)
    places = torch.zeros_like(numbers)
    for shift in range(0, int(numbers[-1]).bit_length(), 4):
        digits = (numbers >> shift & 15).view(rows, in_features)
        places += unpack_int4(_pack([digits], rows, in_features)).flatten().long() << shift
    return places


def _packed_rows(qdata: Tensor) -> Tensor:
    """Plain-layout ``(N, K/2)`` in the CPU's layout, with rows of zeros up to a multiple of :data:`_ROW_BLOCK`."""
    rows, width = qdata.shape
    blocks = (unpack_int4(block) for block in qdata.split(_ROWS_TOGETHER))
    padded = (F.pad(block, (0, 0, 0, -len(block) % _ROW_BLOCK)) for block in blocks)
    return _pack(padded, rows + -rows % _ROW_BLOCK, 2 * width)


def _pack(blocks: Iterable[Tensor], rows: int, in_features: int) -> Tensor:
    """Codes ``(N, K)``, given by blocks of :data:`_ROWS_TOGETHER` rows, in the CPU's layout, ``(N, K/2)`` uint8.

    A block is packed alone, since aten takes int32, eight times what it makes.
    """
    packed = torch.empty(rows, in_features // 2, dtype=torch.uint8, device="cpu")
    for codes, place in zip(blocks, packed.split(_ROWS_TOGETHER), strict=True):
        place.copy_(aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))
    return packed
