"""Let INT4 linears normalize what passes between them."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from .graph import add_call, find_calls, finish
from .int4_epilogues import FuseInt4Epilogues
from .norms import Norm, match, weight_of
from .weight_formats import PACKED_LINEARS, WeightLayout, check_packed

_LINEARS = (torch.ops.quantspec.int4_linear.default, FuseInt4Epilogues.op)


class FuseInt4Norms(WeightLayout):
    """Matches a root mean square norm of a linear's sum with the residual that linears alone read.

    ``linear(norm(fused_linear(..., residual)))`` becomes ``fused_linear(scaled, ..., squares)``, where ``sum, scaled,
    squares = linear_to_norm(..., residual, norm_weight)``: a row's factor may follow the product.

    Requires plain-layout weights that name their linears. Ensures the same outputs up to rounding, and that no such
    norm is left, but of float16, where a sum that is not normalized yet might overflow.
    """

    op = torch.ops.quantspec.int4_linear_to_norm.default

    def requires(self, graph_module: fx.GraphModule) -> None:
        check_packed(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        norms = _norms(graph_module)
        for norm in norms:
            _fuse(graph_module, norm)
        if norms:
            finish(graph_module)
        return PassResult(graph_module, bool(norms))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        check_packed(graph_module)
        assert not _norms(graph_module)

    @staticmethod
    def plain(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, ...]:
        """``qdata`` and ``scale_and_zero``, which stay as they are."""
        return FuseInt4Epilogues.plain(gm, node)


def _fuse(gm: fx.GraphModule, norm: Norm) -> None:
    graph, producer = gm.graph, norm.x
    with graph.inserting_before(producer):
        weight = weight_of(gm, norm)
        new = add_call(graph, FuseInt4Norms.op, (*producer.args[:5], weight), producer)
        new.meta[PACKED_LINEARS] = producer.meta[PACKED_LINEARS]
        values = new.meta.get("val") or (producer.meta["val"],) * 3
        y, scaled, squares = (
            add_call(graph, operator.getitem, (new, index), producer, value=value) for index, value in enumerate(values)
        )
    for node in list(norm.node.users):
        arguments = (*node.args[1:4], *(node.args[4:7] or (None, "", True)))
        with graph.inserting_before(node):
            args = (scaled, *arguments, squares, norm.eps)
            reader = add_call(graph, FuseInt4Epilogues.op, args, node, value=node.meta["val"])
        reader.meta[PACKED_LINEARS] = node.meta[PACKED_LINEARS]
        node.replace_all_uses_with(reader)
        graph.erase_node(node)
    producer.replace_all_uses_with(y)


def _norms(gm: fx.GraphModule) -> list[Norm]:
    """What the pass matches, in graph order."""
    nodes = {node.args[0]: None for node in find_calls(gm.graph, *_LINEARS) if isinstance(node.args[0], fx.Node)}
    norms = (match(node) for node in nodes)
    return [norm for norm in norms if norm is not None and _may_fuse(norm)]


def _may_fuse(norm: Norm) -> bool:
    producer, dtype = norm.x, norm.node.meta["val"].dtype
    if producer.target is not FuseInt4Epilogues.op or not _reads_plain(producer) or producer.args[4] is None:
        return False
    alike = producer.meta["val"].dtype is dtype is not torch.float16
    reads = all(
        user.target in _LINEARS and user.args[0] is norm.node and _reads_plain(user) for user in norm.node.users
    )
    # What follows a product must be the sum alone.
    return alike and reads and not producer.args[5]


def _reads_plain(linear: fx.Node) -> bool:
    """Whether a linear does not normalize what it reads yet."""
    return len(linear.args) < 8 or linear.args[7] is None
