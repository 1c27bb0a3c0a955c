"""Compute what depends on positions alone once, not in every layer."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import add_call, finish, from_positions


def _is_view(node: fx.Node) -> bool:
    """Whether a node is another view of what it reads; ``aten.to`` claims so even when it converts."""
    if node.target is operator.getitem:
        return True
    if not (isinstance(node.target, torch._ops.OpOverload) and node.target.is_view and node.all_input_nodes):
        return False
    before, after = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    return not (isinstance(before, Tensor) and isinstance(after, Tensor)) or before.dtype == after.dtype


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Users of a value, through its views."""
    for user in node.users:
        if _is_view(user):
            yield from _readers(user)
        else:
            yield user


def _shared_tables(graph: fx.Graph) -> list[fx.Node]:
    """What the pass matches, in the graph's order, so that compilers recognize the graph in the next process."""
    tables = from_positions(graph)
    return [
        node
        for node in graph.nodes
        if node in tables
        and node.op == "call_function"
        and not _is_view(node)
        and node.target is not torch.ops.quantspec.materialize.default
        and len({user for user in _readers(node) if user not in tables}) > 1
    ]


class MaterializePositionTables(PassBase):
    """Matches a value computed from ``position_ids`` and constants that two or more other nodes read, such as rotary
    cosines; writes ``materialize(value)``, which a compiler computes once.

    Requires nothing. Ensures the same outputs, bit for bit, and that no such value is left.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        shared = _shared_tables(graph)
        for node in shared:
            users = list(node.users)
            with graph.inserting_after(node):
                copy = add_call(graph, torch.ops.quantspec.materialize.default, (node,), node)
            for user in users:
                user.replace_input_with(node, copy)
        if shared:
            finish(graph_module)
        return PassResult(graph_module, bool(shared))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        assert not _shared_tables(graph_module.graph)
