"""Read packed weights back out of a rewritten graph, and write others there, linear by linear, whatever it does with
them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, fx

from .weight_formats import PACKED_LINEARS, format_of, plain_parts, store_parts


def plain_weights(gm: fx.GraphModule) -> dict[str, dict[str, Tensor]]:
    """Every linear's packed weight as ``QuantizeWeights`` made it.

    Fused weights are views of their rows; what was laid out for another op is in its format's own layout again. A
    weight that serves several linears appears once.

    Args:
        gm: a draft's graph, whatever of the draft's passes it went through.

    Returns:
        By name of the linear, its format's parts by their names: for INT4 ``qdata (..., N, K/2)`` uint8 and
        ``scale_and_zero (..., K/g, N, 2)`` float16 or bfloat16.

    Raises:
        RuntimeError: this CPU's packed layout cannot be read back.
    """
    return dict(each_plain_weight(gm))


def each_plain_weight(gm: fx.GraphModule) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What :func:`plain_weights` returns, but once for every linear that a weight serves."""
    for node in gm.graph.nodes:
        if PACKED_LINEARS not in node.meta:
            continue
        weight_format, tensors = format_of(node), plain_parts(gm, node)
        names = [part.name for part in weight_format.parts]
        start = 0
        for linear, rows in node.meta[PACKED_LINEARS].rows:
            yield linear, dict(zip(names, weight_format.rows(tensors, start, rows), strict=True))
            start += rows


def store_plain_weights(gm: fx.GraphModule, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put other weights where a draft reads those of :func:`plain_weights`; captured graphs read them from then on.

    Args:
        gm: a draft's graph, whatever of the draft's passes it went through.
        weights: parts by their names, for every linear.
    """
    for node in gm.graph.nodes:
        if PACKED_LINEARS not in node.meta:
            continue
        weight_format, tensors = format_of(node), plain_parts(gm, node)
        start = 0
        for linear, rows in node.meta[PACKED_LINEARS].rows:
            for part, place in zip(weight_format.parts, weight_format.rows(tensors, start, rows), strict=True):
                place.copy_(weights[linear][part.name])
            start += rows
        store_parts(gm, node, tensors)
