"""Read the target's weights in as few launches as its inputs allow."""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from quantspec.kernels.linears import MAX_WEIGHTS, has_kernel_for, reads_faster
from quantspec.kernels.stretches_triton import device_limits

from .graph import add_call, aten, find_calls, finish, get_tensor

_LINEARS = torch.ops.quantspec.linears.default


class GroupLinears(PassBase):
    """Matches linears that one launch serves better, writes ``quantspec::linears`` over the model's own weights.

    Of 16-bit weights on a GPU and of shapes that cuBLAS reads slower, linears of one input become
    ``split(linears(x, [W_i], ...))``, three at a time; a linear that is read alone becomes one of its own.

    Requires nothing. Ensures the same outputs up to rounding, that no weight is copied, and that none of these is left.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        groups = _groups(graph_module)
        for nodes in groups:
            self._fuse(graph_module, nodes)
        if groups:
            finish(graph_module)
        return PassResult(graph_module, bool(groups))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        assert not _groups(graph_module)

    @staticmethod
    def _fuse(gm: fx.GraphModule, nodes: list[fx.Node]) -> None:
        graph, first = gm.graph, nodes[0]
        with graph.inserting_before(first):
            # Biases may stand behind the first of the linears.
            copies = [[None if arg is None else _copied(graph, arg) for arg in node.args[1:]] for node in nodes]
            weights, biases = zip(*((copy[0], copy[1] if len(copy) > 1 else None) for copy in copies), strict=True)
            args = (first.args[0], list(weights), [bias for bias in biases if bias is not None])
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


def module_linears(gm: fx.GraphModule) -> list[fx.Node]:
    """Linears that the kernel may multiply: whose weight, and bias if any, are the module's."""
    found = []
    for node in find_calls(gm.graph, aten.linear.default):
        tensors = [arg for arg in node.args[1:] if arg is not None]
        if all(isinstance(arg, fx.Node) and arg.op == "get_attr" for arg in tensors):
            found.append(node)
    return found


def worth_grouping(weights: list[Tensor]) -> bool:
    """Whether ``quantspec::linears`` has a kernel for weights of this device, dtype and shapes that is faster."""
    if not all(weight.is_cuda and weight.element_size() == 2 for weight in weights):
        return False
    processors = device_limits(weights[0].device).multiprocessors
    return reads_faster([weight.shape[0] for weight in weights], weights[0].shape[1], processors)


def worth_fusing(weights: list[Tensor]) -> bool:
    """Whether ``quantspec::gated_linears`` has a kernel for gates of this device, dtype and shape."""
    return all(weight.is_cuda and weight.element_size() == 2 and has_kernel_for(weight.shape[1]) for weight in weights)


def _groups(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """Linears of one input, three at a time, and what is read alone."""
    sets: dict[tuple, list[fx.Node]] = defaultdict(list)
    for node in module_linears(gm):
        sets[kind(node)].append(node)
    groups = []
    for nodes in sets.values():
        parts = [nodes[start : start + MAX_WEIGHTS] for start in range(0, len(nodes), MAX_WEIGHTS)]
        groups += [part for part in parts if worth_grouping(weights_of(gm, part))]
    return groups


def kind(node: fx.Node) -> tuple:
    """What linears of one launch have in common: their input, and whether they have a bias."""
    return node.args[0], len(node.args) > 2 and node.args[2] is not None


def weights_of(gm: fx.GraphModule, nodes: list[fx.Node]) -> list[Tensor]:
    """The weights that linears read."""
    return [get_tensor(gm, node.args[1]) for node in nodes]  # type: ignore[arg-type]
