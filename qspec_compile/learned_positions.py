"""How many positions a captured decoder has learned, where it looks them up in a table."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

_POSITIONS = "position_ids"


def learned_positions(graph_module: fx.GraphModule) -> tuple[str, int] | None:
    """The smallest table that is indexed by ``position_ids``, and how many positions from 0 on it has rows for.

    Matches ``embedding(table, index)`` with an index computed from positions and constants alone, such as
    ``position_ids + 2``.

    Args:
        graph_module: of :func:`quantspec.capture.capture`.

    Returns:
        The table's name and the number, or None without such a table.
    """
    known: set[fx.Node] = set()
    positional: set[fx.Node] = set()
    found = []
    for node in graph_module.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "placeholder" and node.target == _POSITIONS:
            positional.add(node)
        elif node.op == "get_attr" or node.target is torch.ops.aten.sym_size.int:
            known.add(node)
        elif node.op == "call_function" and all(i in known or i in positional for i in inputs):
            if node.target is torch.ops.aten.embedding.default and node.args[1] in positional:
                table = node.args[0]
                assert isinstance(table, fx.Node)
                count = _rows_in_order(graph_module, node.args[1], _attribute(graph_module, table).shape[0])
                found.append((str(table.target), count))
            (positional if any(i in positional for i in inputs) else known).add(node)
    return min(((name, count) for name, count in found if count is not None), key=lambda pair: pair[1], default=None)


def _rows_in_order(graph_module: fx.GraphModule, index: Any, rows: int) -> int | None:
    """Positions from 0 on whose ``index`` is one of ``rows``; None if all are, as where the index is clamped."""
    values: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node not in values:
            if node.op == "placeholder":
                device = next(graph_module.parameters()).device
                values[node] = torch.arange(rows + 1, device=device)[None]
            elif node.op == "get_attr":
                values[node] = _attribute(graph_module, node)
            else:
                values[node] = node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))  # type: ignore[operator]
        return values[node]

    indices = value(index).flatten()
    outside = ((indices < 0) | (indices >= rows)).nonzero()
    return int(outside[0]) if len(outside) else None


def _attribute(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    return operator.attrgetter(str(node.target))(graph_module)
