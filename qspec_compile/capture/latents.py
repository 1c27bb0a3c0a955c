"""Captures whose layers cache latents instead of the heads that are made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from quantspec.config import DraftAttention, QuantSpecConfig
from quantspec.kernels.cached_attention import MAX_LATENT_BYTES
from quantspec.passes.absorb_latents import AbsorbLatents, values_in_keys
from quantspec.passes.graph import clone, find_calls, own_name

from .export import Capture


def linears_of_latents(captured: Capture) -> set[str]:
    """Names of the linears that stay in full precision or not as latents are absorbed or not."""
    absorb = AbsorbLatents()
    absorb(clone(captured.graph_module))
    factors = (factor for latent in absorb.absorbed.values() for factor in (latent.key_up, latent.value_up))
    return {own_name(factor.name).removesuffix(".weight") for factor in factors}


def with_latents(captured: Capture, config: QuantSpecConfig, device: torch.device | str) -> Capture:
    """``captured`` with latents absorbed where they are smaller than keys and values; it is left as it is.

    None are where the draft's attention is sparse, which judges pages by the scales of values, or beyond what the
    kernels of ``device`` read.
    """
    if config.draft_attention is not DraftAttention.FULL:
        return captured
    max_bytes = MAX_LATENT_BYTES if torch.device(device).type == "cuda" else None
    absorb = AbsorbLatents(max_bytes)
    graph_module = absorb(clone(captured.graph_module)).graph_module
    markers = find_calls(graph_module.graph, torch.ops.quantspec.attention.default)
    layers = []
    for layer, marker in zip(captured.layers, markers, strict=True):
        inputs: Any = marker.args[1:3]
        (_, kv_heads, _, key_dim), (*_, value_dim) = (node.meta["val"].shape for node in inputs)
        shape = {"kv_heads": kv_heads, "key_dim": key_dim, "value_dim": value_dim}
        layers.append(replace(layer, **shape, values_in_keys=values_in_keys(marker)))
    return replace(captured, graph_module=graph_module, layers=tuple(layers), latents=absorb.absorbed)
