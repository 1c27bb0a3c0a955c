"""Axes that an op's output has from its inputs, where tensors are written in parts."""

from __future__ import annotations

import torch
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from quantspec.passes.graph import aten
from quantspec.passes.held_axes import FACTORIES, links


def halves_swapped(x):
    """As rotations are that write into new memory, behind a cache that is empty."""
    out = x.new_empty(x.shape)
    out[..., :2] = x[..., 2:]
    out[..., 2:] = x[..., :2]
    return torch.cat((x.new_empty(0), out), -2)


def test_heads_are_followed_through_what_is_written_in_parts():
    graph = make_fx(functionalize(halves_swapped), tracing_mode="fake")(torch.zeros(3, 5, 7, 4)).graph
    followed = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in FACTORIES:
            found = links(node)
            assert found is not None, node.target
            followed.setdefault(node.target, []).extend((link.node.target, link.inner, link.outer) for link in found)
    written = [(inner, outer) for _, inner, outer in followed[aten.slice_scatter.default]]
    # Not the last axis, of which a part is written, and all others from both.
    assert sorted(set(written)) == [(0, 0), (1, 1), (2, 2)]
    assert {(inner, outer) for _, inner, outer in followed[aten.copy.default]} >= {(1, 1), (3, 3)}
    # What is empty has none of them.
    assert {target for target, *_ in followed[aten.cat.default]} == {aten.slice_scatter.default}
    assert {(inner, outer) for _, inner, outer in followed[aten.cat.default]} == {(0, 0), (1, 1), (3, 3)}
