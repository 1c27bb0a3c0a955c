"""Let a tensor that is written part by part be the concatenation that it is."""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import add_call, aten, find_calls, finish
from .held_axes import shape_of, slice_of


class JoinWrittenParts(PassBase):
    """Matches ``new_empty`` whose slices along one axis are each written once by ``copy_``, writes ``cat``.

    Only where the slices are the whole axis, one after the other, what is copied has their shape and dtype, and all
    other readers come after the last copy. Requires value metadata. Ensures the same outputs, bit for bit.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        order = {node: number for number, node in enumerate(graph.nodes)}
        modified = False
        for empty in find_calls(graph, aten.new_empty.default):
            found = _written_parts(empty, order)
            if found is None:
                continue
            axis, copies = found
            with graph.inserting_after(max(copies, key=order.__getitem__)):
                sources = [copy.args[1] for copy in copies]
                whole = add_call(graph, aten.cat.default, (sources, axis), empty, value=empty.meta["val"])
            parts = {copy.args[0] for copy in copies}
            for user in set(empty.users) - parts:
                user.replace_input_with(empty, whole)
            for copy in copies:
                part = copy.args[0]
                graph.erase_node(copy)
                graph.erase_node(part)  # type: ignore[arg-type]
            modified = True
        if modified:
            finish(graph_module)
        return PassResult(graph_module, modified)


def _written_parts(empty: fx.Node, order: dict[fx.Node, int]) -> tuple[int, list[fx.Node]] | None:
    """The axis along which ``empty`` is written, and the copies that do so, in the order of their parts."""
    written = []
    for part in empty.users:
        if part.target is not aten.slice.Tensor or len(part.users) != 1:
            continue
        (copy,) = part.users
        if copy.target is aten.copy_.default and not copy.users and copy.args[0] is part:
            source = copy.args[1]
            alike = shape_of(source) == shape_of(part)  # type: ignore[arg-type]
            if alike and source.meta["val"].dtype == part.meta["val"].dtype:  # type: ignore[union-attr]
                written.append((*slice_of(part), copy))
    axes = {axis for axis, *_ in written}
    if len(axes) != 1:
        return None
    (axis,) = axes
    written.sort(key=lambda one: one[1])
    place = 0
    for _, start, stop, step, _ in written:
        if start != place or step != 1:
            return None
        place = stop
    copies = [copy for *_, copy in written]
    parts = [copy.args[0] for copy in copies]
    last = max(map(order.__getitem__, copies))
    if place != shape_of(empty)[axis] or any(order[user] < last for user in empty.users if user not in parts):
        return None
    return axis, copies
