"""Compute logits only where they are read."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import add_call, add_placeholder, aten, describe, finish

INPUT_NAME = "logit_rows"
# What ranks gather are logits of other tokens, of the same row.
_THROUGH = (aten.to.dtype, torch.ops.quantspec.gather_ranks.default)
LINEAR_TARGETS = (aten.linear.default, torch.nn.functional.linear, torch._C._nn.linear)


def logits_linear(graph: fx.Graph) -> fx.Node | None:
    """The language-model head: the linear that the output reaches elementwise, with constants at most; or None."""
    node = _before_elementwise(graph)
    return node if node.target in LINEAR_TARGETS else None


def _before_elementwise(graph: fx.Graph) -> fx.Node:
    """The last node that is not elementwise in one tensor; the output itself where that is several tensors."""
    node = graph.output_node().args[0]
    while isinstance(node, tuple | list) and len(node) == 1:
        node = node[0]
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target not in LINEAR_TARGETS:
        inputs = [source for source in node.all_input_nodes if not _is_of_vocabulary(source)]
        pointwise = isinstance(node.target, torch._ops.OpOverload) and (
            torch.Tag.pointwise in node.target.tags or node.target in _THROUGH
        )
        if not pointwise or len(inputs) != 1:
            break
        node = inputs[0]
    return node if isinstance(node, fx.Node) else graph.output_node()


def _is_of_vocabulary(node: fx.Node) -> bool:
    """Whether a node is a constant of each token id, or one of all."""
    if node.op == "get_attr":
        return node.meta["val"].dim() <= 1
    return node.op == "call_function" and bool(node.args) and all(map(_is_of_vocabulary, node.all_input_nodes))


class SelectLogitRows(PassBase):
    """Matches ``linear(hidden, lm_head)`` before the output, writes ``linear(gather(hidden, logit_rows), lm_head)``.

    Adds the input ``logit_rows`` (B, R) int64: the token positions of each sequence whose logits are wanted. The output
    becomes (B, R, V), so a long prompt never holds the logits of all its tokens.

    Requires a language-model head that the output reaches through elementwise ops alone, else raises ``ValueError``.
    Ensures output row r equals the former row ``logit_rows[b, r]``.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        if logits_linear(graph_module.graph) is None:
            raise ValueError(
                "no language-model head in front of the output, so logit rows cannot be selected: "
                f"{describe(_before_elementwise(graph_module.graph))} is neither a linear nor elementwise"
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        if any(node.op == "placeholder" and node.target == INPUT_NAME for node in graph.nodes):
            return PassResult(graph_module, False)
        head = logits_linear(graph)
        assert head is not None
        hidden = head.args[0]
        assert isinstance(hidden, fx.Node)
        value = hidden.meta["val"]
        rows = add_placeholder(graph, INPUT_NAME, value.new_empty(value.shape[:2], dtype=torch.int64))
        with graph.inserting_before(head):
            index = add_call(graph, aten.unsqueeze.default, (rows, -1), head)
            index = add_call(graph, aten.expand.default, (index, [-1, -1, value.shape[-1]]), head)
            gathered = add_call(graph, aten.gather.default, (hidden, 1, index), head)
        head.update_arg(0, gathered)
        finish(graph_module)
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        head = logits_linear(graph_module.graph)
        assert head is not None
        hidden = head.args[0]
        assert isinstance(hidden, fx.Node)
        assert hidden.target is aten.gather.default
