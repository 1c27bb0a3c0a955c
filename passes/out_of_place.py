"""Let a graph write into no tensor, as decompositions would, but without tracing all of it again."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import ORIGIN_KEYS, aten, describe, fake_mode_of, finish, value_of

# Views, and what writes them into a copy of what they are of.
_SCATTERS = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
}
# Compositions whose result is in no memory of their arguments.
_PRODUCTS = (aten.linear.default, aten.matmul.default)


class OutOfPlaceError(ValueError):
    """A write whose effects are not known: ``node`` does it, or reads the same memory afterwards."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(describe(node))
        self.node = node


class WriteOutOfPlace(PassBase):
    """Matches ATen ops that write into their first argument (``copy_``, ``div_``), writes those that return the result.

    Whoever reads the argument afterwards reads the result. Where the argument selects or slices another tensor, that
    one's later readers read a copy of it with the result written into it.

    Requires value metadata. Ensures the same outputs, bit for bit, and that no op writes, else raises
    :class:`OutOfPlaceError`: where a later node reads the same memory in another way, or the memory is an input's or a
    parameter's.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        nodes = list(graph.nodes)
        place = {node: number for number, node in enumerate(nodes)}
        # The nodes that made the memory which a node's result may lie in.
        makers: dict[fx.Node, set[fx.Node]] = {}
        modified = False
        for node in nodes:
            if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "call_module":
                raise OutOfPlaceError(node)
            if node.target is aten.detach_.default:
                # Nothing is differentiated.
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                modified = True
                continue
            if _writes(node):
                self._rewrite(graph, node, place, makers)
                modified = True
                continue
            shared = [makers[source] for source in _may_share(node)]
            makers[node] = set[fx.Node]().union(*shared) if shared else {node}
        if modified:
            finish(graph_module)
        return PassResult(graph_module, modified)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        assert not any(map(_writes, graph_module.graph.nodes))

    def _rewrite(
        self, graph: fx.Graph, node: fx.Node, place: dict[fx.Node, int], makers: dict[fx.Node, set[fx.Node]]
    ) -> None:
        written: Any = node.args[0]
        returning = _returning(graph, node)
        views = [written]
        while views[-1].target in _SCATTERS:
            views.append(views[-1].args[0])
        if any(maker.op in ("placeholder", "get_attr") for maker in makers[written]):
            raise OutOfPlaceError(node)
        for other, theirs in makers.items():
            if (
                other not in views
                and theirs & makers[written]
                and any(place[user] > place[node] for user in other.users)
            ):
                raise OutOfPlaceError(other)
        node.target = returning
        # Other memory now, but a later write has to reach whoever read the same before.
        makers[node] = makers[written]
        results = [node]
        for view in views[:-1]:
            source: Any = view.args[0]
            with graph.inserting_after(results[-1]):
                whole = graph.call_function(
                    _SCATTERS[view.target], (source, results[-1], *view.args[1:]), dict(view.kwargs)
                )
            whole.meta.update({key: node.meta[key] for key in ORIGIN_KEYS if key in node.meta})
            whole.meta["val"] = source.meta["val"]
            place[whole] = place[node]
            makers[whole] = makers[written]
            results.append(whole)
        for view, result in zip(views, results, strict=True):
            view.replace_all_uses_with(result, delete_user_cb=lambda user: place[user] > place[node])


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _returning(graph: fx.Graph, node: fx.Node) -> Any:
    """The op that returns what ``node`` writes into its first argument."""
    target: Any = node.target
    schema = target._schema
    written = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    namespace, _, name = schema.name.partition("::")
    packet = getattr(aten, name.removesuffix("_"), None) if namespace == "aten" and name.endswith("_") else None
    returning = getattr(packet, target._overloadname, None)
    if returning is None or written != [schema.arguments[0].name] or torch.Tag.inplace_view in target.tags:
        raise OutOfPlaceError(node)
    mode = fake_mode_of(graph)
    if mode is None or any("val" not in source.meta for source in node.all_input_nodes):
        raise OutOfPlaceError(node)
    values: Any = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    args, kwargs = values
    result = value_of(mode, returning, *args, **kwargs)
    # What is written is cast to the argument's dtype, and what is returned may have another. Its sizes are the
    # argument's, else the op could not write, though a trace may write them in another way.
    if not isinstance(result, Tensor) or (result.dtype, result.dim()) != (args[0].dtype, args[0].dim()):
        raise OutOfPlaceError(node)
    return returning


def _may_share(node: fx.Node) -> list[fx.Node]:
    """Nodes whose memory the result of ``node`` may lie in."""
    target = node.target
    if target in _PRODUCTS:
        return []
    if target is operator.getitem:
        source: Any = node.args[0]
        # Results of one op lie apart.
        return [source] if _may_share(source) else []
    if isinstance(target, torch._ops.OpOverload):
        # Compositions may return their argument without saying so, as dropout does.
        composed = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
        if not composed and not any(returned.alias_info for returned in target._schema.returns):
            return []
    return node.all_input_nodes
