"""Lay INT4 weights out for the CPU's own 4-bit matmul."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from quantspec.kernels.int4_linear import unpack_int4

from .graph import add_buffer, add_call, aten, find_calls, finish, get_tensor

# Rows of the output that aten's CPU packing handles together.
_ROW_BLOCK = 16


class PrepackInt4ForCpu(PassBase):
    """Matches ``quantspec::int4_linear`` on CPU weights, writes ``aten._weight_int4pack_mm_for_cpu`` on packed ones.

    The kernel multiplies in the dtype of the scales, so other activations (float32) are rounded to it: the draft may,
    its proposals are verified. Weights with a row count that is no multiple of 16 are padded and the output sliced.

    Requires plain-layout weights. Ensures outputs equal up to the activation's rounding.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in find_calls(graph_module.graph, torch.ops.quantspec.int4_linear.default):
            qdata = get_tensor(graph_module, node.args[1])  # type: ignore[arg-type]
            if qdata.device.type == "cpu":
                self._rewrite(graph_module, node)
                modified = True
        if modified:
            finish(graph_module)
        return PassResult(graph_module, modified)

    @staticmethod
    def _rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
        graph = gm.graph
        x, qdata_node, params_node, bias = node.args
        codes = unpack_int4(get_tensor(gm, qdata_node)).int()  # type: ignore[arg-type]
        params = get_tensor(gm, params_node)  # type: ignore[arg-type]
        rows, in_features = codes.shape
        padding = -rows % _ROW_BLOCK
        packed = aten._convert_weight_to_int4pack_for_cpu(F.pad(codes, (0, 0, 0, padding)), 1)
        params = F.pad(params, (0, 0, 0, padding)).contiguous()
        value = x.meta["val"]  # type: ignore[union-attr]
        with graph.inserting_before(node):
            flat: fx.Node = x  # type: ignore[assignment]
            if value.dim() != 2:
                flat = add_call(graph, aten.reshape.default, (flat, [-1, in_features]), node)
            if value.dtype != params.dtype:
                flat = add_call(graph, aten.to.dtype, (flat, params.dtype), node)
            weights = (
                add_buffer(gm, f"{node.name}_packed", packed),
                in_features // params.shape[0],
                add_buffer(gm, f"{node.name}_packed_scale_and_zero", params),
            )
            out = add_call(graph, aten._weight_int4pack_mm_for_cpu.default, (flat, *weights), node)
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
