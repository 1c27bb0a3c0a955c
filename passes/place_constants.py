"""Put constants that a model's code made on the CPU where the graph runs."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import add_buffer, finish, get_tensor


class PlaceConstants(PassBase):
    """Matches ``get_attr`` of a tensor that is on another device than the graph's first input, writes a copy there.

    A number that export has lifted out of a model's code, such as an image's token id, is a tensor of the CPU: eager
    ops take it beside a GPU's tensors, but a CUDA graph has no copies from pageable memory.

    Requires value metadata of the first input. Ensures that all constants are on its device.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        elsewhere = self._elsewhere(graph_module)
        for node in elsewhere:
            with graph_module.graph.inserting_before(node):
                device = self._device(graph_module)
                placed = add_buffer(graph_module, f"{node.name}_placed", get_tensor(graph_module, node).to(device))
            node.replace_all_uses_with(placed)
            graph_module.graph.erase_node(node)
        if elsewhere:
            finish(graph_module)
        return PassResult(graph_module, bool(elsewhere))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        assert not self._elsewhere(graph_module)

    @staticmethod
    def _device(graph_module: fx.GraphModule) -> torch.device:
        return graph_module.graph.find_nodes(op="placeholder")[0].meta["val"].device

    def _elsewhere(self, graph_module: fx.GraphModule) -> list[fx.Node]:
        device = self._device(graph_module)
        nodes = graph_module.graph.find_nodes(op="get_attr")
        return [node for node in nodes if get_tensor(graph_module, node).device != device]
