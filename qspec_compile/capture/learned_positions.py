"""How many positions a captured decoder has learned, where it looks them up in a table."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from quantspec.passes.graph import find_calls, from_positions, get_tensor


def learned_positions(graph_module: fx.GraphModule) -> tuple[str, int] | None:
    """The smallest table that is indexed by ``position_ids``, and how many positions from 0 on it has rows for.

    Matches ``embedding(table, index)`` and ``table[index]`` with an index computed from positions and constants alone,
    such as ``position_ids + 2``.

    Args:
        graph_module: of :func:`quantspec.capture.capture`.

    Returns:
        The table's name and the number, or None without such a table.
    """
    positional = from_positions(graph_module.graph)
    found = []
    for node in find_calls(graph_module.graph, torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor):
        table, index = node.args[:2]
        if isinstance(index, list | tuple):
            index = index[0]
        if node in positional and index in positional and isinstance(table, fx.Node) and table.op == "get_attr":
            count = _rows_in_order(graph_module, index, get_tensor(graph_module, table).shape[0])
            found.append((str(table.target), count))
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
                values[node] = get_tensor(graph_module, node)
            else:
                values[node] = node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))  # type: ignore[operator]
        return values[node]

    indices = value(index).flatten()
    outside = ((indices < 0) | (indices >= rows)).nonzero()
    return int(outside[0]) if len(outside) else None
