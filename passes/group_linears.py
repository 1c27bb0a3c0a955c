"""Read the target's weights in as few launches as its inputs allow."""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from quantspec.kernels.linears import MAX_WEIGHTS, linears_config

from .epilogues import GatedProduct, gated_products
from .graph import add_call, aten, find_calls, finish, get_tensor
from .logit_rows import logits_linear

_LINEARS = torch.ops.quantspec.linears.default


class GroupLinears(PassBase):
    """Matches linears that one launch serves better, writes ``quantspec::linears`` over the model's own weights.

    Three patterns, of 16-bit weights on a GPU and of shapes that cuBLAS reads slower: ``mul(silu(linear(x, W)),
    linear(x, V))`` and the same with both GELUs becomes ``linears(x, [W, V], [], "silu")``; other linears of one input
    become ``split(linears(x, [W_i], ...))``, three at a time; the language-model head becomes one of its own.

    Requires nothing. Ensures the same outputs up to rounding, that no weight is copied, and that none of these is left.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        gates = _gates(graph_module)
        for match in gates:
            self._fuse_gate(graph_module, match)
        graph_module.graph.eliminate_dead_code()
        groups = _groups(graph_module)
        for nodes in groups:
            self._fuse(graph_module, nodes)
        if gates or groups:
            finish(graph_module)
        return PassResult(graph_module, bool(gates or groups))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        assert not _gates(graph_module)
        assert not _groups(graph_module)

    @staticmethod
    def _fuse_gate(gm: fx.GraphModule, match: GatedProduct) -> None:
        nodes = [match.gate, match.factor]
        with gm.graph.inserting_before(match.product):
            args = (*_operands(nodes), match.activation)
            new = add_call(gm.graph, _LINEARS, args, match.gate, value=match.product.meta["val"])
        match.product.replace_all_uses_with(new)

    @staticmethod
    def _fuse(gm: fx.GraphModule, nodes: list[fx.Node]) -> None:
        graph, first = gm.graph, nodes[0]
        with graph.inserting_before(first):
            # Biases may stand behind the first of the linears.
            copies = [[None if arg is None else _copied(graph, arg) for arg in node.args[1:]] for node in nodes]
            weights, biases = zip(*((copy[0], copy[1] if len(copy) > 1 else None) for copy in copies), strict=True)
            args = (first.args[0], list(weights), [bias for bias in biases if bias is not None], "")
            out = add_call(graph, _LINEARS, args, first)
            if len(nodes) == 1:
                first.replace_all_uses_with(out)
            else:
                sizes = [int(node.meta["val"].shape[-1]) for node in nodes]
                parts = add_call(graph, aten.split_with_sizes.default, (out, sizes, -1), first)
                for index, node in enumerate(nodes):
                    node.replace_all_uses_with(
                        add_call(graph, operator.getitem, (parts, index), node, value=node.meta["val"])
                    )
        for node in nodes:
            graph.erase_node(node)


def _copied(graph: fx.Graph, argument: fx.node.Argument) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return graph.node_copy(argument)


def _operands(nodes: list[fx.Node]) -> tuple[fx.node.Argument, list, list]:
    """Input, weights and biases of linears that all have one or none of them has."""
    biases = [node.args[2] for node in nodes if len(node.args) > 2 and node.args[2] is not None]
    return nodes[0].args[0], [node.args[1] for node in nodes], biases


def _linears(gm: fx.GraphModule) -> list[fx.Node]:
    """Linears that the kernel may multiply: whose weight, and bias if any, are the module's."""
    found = []
    for node in find_calls(gm.graph, aten.linear.default):
        tensors = [arg for arg in node.args[1:] if arg is not None]
        if all(isinstance(arg, fx.Node) and arg.op == "get_attr" for arg in tensors):
            found.append(node)
    return found


def worth_grouping(weights: list[Tensor], activation: str) -> bool:
    """Whether ``quantspec::linears`` has a kernel for weights of this device, dtype and shapes that is faster."""
    sizes = tuple(weight.shape[0] for weight in weights)
    fits = all(weight.is_cuda and weight.element_size() == 2 for weight in weights)
    return fits and linears_config(1, sizes, weights[0].shape[1], activation) is not None


def _worth(gm: fx.GraphModule, nodes: list[fx.Node], activation: str = "") -> bool:
    return worth_grouping([get_tensor(gm, node.args[1]) for node in nodes], activation)  # type: ignore[arg-type]


def _gates(gm: fx.GraphModule) -> list[GatedProduct]:
    """Products of two linears of one input, both with a bias or none, and of as many outputs."""
    linears = set(_linears(gm))
    return [
        match
        for match in gated_products(gm.graph)
        if match.gate in linears and match.factor in linears and _kind(match.gate) == _kind(match.factor)
        if _worth(gm, [match.gate, match.factor], match.activation)
    ]


def _groups(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """Linears of one input, three at a time, where there are several; and the head."""
    head = logits_linear(gm.graph)
    sets: dict[tuple, list[fx.Node]] = defaultdict(list)
    for node in _linears(gm):
        sets[_kind(node)].append(node)
    groups = []
    for nodes in sets.values():
        parts = [nodes[start : start + MAX_WEIGHTS] for start in range(0, len(nodes), MAX_WEIGHTS)]
        groups += [part for part in parts if (len(part) > 1 or part[0] is head) and _worth(gm, part)]
    return groups


def _kind(node: fx.Node) -> tuple:
    """What linears of one launch have in common: their input, and whether they have a bias."""
    return node.args[0], len(node.args) > 2 and node.args[2] is not None
