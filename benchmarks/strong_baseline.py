"""The strong baseline: one token at a time with the captured graph and a dense KV cache in the model's dtype.

It has the model's own weights, torch.compile, a CUDA graph and FlashAttention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantspec import QuantSpecModel
from quantspec.config import DraftAttention
from quantspec.kernels.cache_layout import part_names
from quantspec.kernels.cached_attention import rotate
from quantspec.pair.compile_by_layer import compile_graph
from quantspec.passes import Role
from quantspec.passes.attention_lowering import ACCESSES, SCORED_ACCESS
from quantspec.passes.graph import add_call, clone, find_calls

# Slots of the dense cache beyond the context, so that a token has somewhere to go.
_SLACK = 64


@torch.library.custom_op("quantspec_benchmark::dense_attention", mutates_args=("k_cache", "v_cache"))
def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, scale: float
) -> Tensor:
    """Store a token of each sequence in ``(B, K, S, D)`` caches and attend to all S tokens; returns ``(B, 1, H, D)``.

    The first of ``slot (B,)`` is where, in all sequences.
    """
    k_cache.index_copy_(2, slot[:1], key)
    v_cache.index_copy_(2, slot[:1], value)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(query, k_cache, v_cache, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


@dense_attention.register_fake
def _(query, key, value, k_cache, v_cache, slot, scale):
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, tokens, heads, dim)


def _rotated(graph: fx.Graph, call: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node, *options: Any) -> fx.Node:
    """The rotation that ``call`` does to ``x``, as ATen ops before it: inductor makes one kernel of them."""
    inputs = (x, cos, sin)
    traced = make_fx(lambda *tensors: rotate(*tensors, *options))(*(node.meta["val"] for node in inputs))
    copies: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            copies[node] = inputs[len(copies)]
        elif node.op == "call_function":
            args = fx.node.map_arg(node.args, copies.__getitem__)
            copies[node] = add_call(graph, node.target, args, call, value=node.meta["val"])
            copies[node].kwargs = node.kwargs
    return copies[traced.graph.output_node().args[0]]  # type: ignore[index]


class Baseline:
    """The strong baseline: the target's graph over a dense cache."""

    def __init__(self, qs: QuantSpecModel) -> None:
        self.qs = qs
        is_full = qs.pair.config.draft_attention is DraftAttention.FULL
        self.access = ACCESSES[Role.TARGET] if is_full else SCORED_ACCESS
        gm = clone(qs.target)
        for node in list(find_calls(gm.graph, self.access.op)):
            given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False))
            with gm.graph.inserting_before(node):
                for name in ("query", "key") if "cos" in given else ():
                    rotation = [given[one] for one in ("cos", "sin", "rotary_dim", "interleaved")]
                    given[name] = _rotated(gm.graph, node, given[name], *rotation)
                read = [given[name] for name in ("query", "key", "value", *part_names("recent"), "length", "scale")]
                dense = gm.graph.call_function(torch.ops.quantspec_benchmark.dense_attention.default, tuple(read))
            node.replace_all_uses_with(dense)
            gm.graph.erase_node(node)
        gm.recompile()
        self.forward = compile_graph(gm)

    def token(self, context: int, batch: int = 1) -> Callable[[], Any]:
        """One token of each sequence at ``context``."""
        caches, device = [], self.qs.device
        for layer in self.qs.layers:
            for dim in (layer.key_dim, layer.value_dim):
                shape = (batch, layer.kv_heads, context + _SLACK, dim)
                caches.append(torch.randn(shape, dtype=self.qs.model.dtype, device=device))
                torch._dynamo.maybe_mark_dynamic(caches[-1], 2)
        unused = torch.zeros(1, device=device)
        inputs = []
        for k_cache, v_cache in zip(caches[::2], caches[1::2], strict=True):
            dense = dict(zip(part_names("recent"), (k_cache, v_cache), strict=True))
            inputs += [dense.get(name, unused) for name in self.access.inputs]
        ids = torch.ones(batch, 1, dtype=torch.long, device=device)
        length = torch.full((batch,), context, device=device)
        return lambda: self.forward(ids, length[:, None], ids - 1, length, length, *inputs)
