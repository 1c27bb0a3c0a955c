"""The sizes of any model that converts, from what a capture of it without data has."""

from __future__ import annotations

import functools

from quantspec.config import DEFAULT_SPECULATIVE_TOKENS, QuantSpecConfig
from quantspec.engine.draft_count import AutoDraftCount
from quantspec.memory import expected_memory, full_precision_bytes
from quantspec.pair.preview import Structure

from ._sizes import Layer, Linear, Sizes


def captured_sizes(structure: Structure, options: QuantSpecConfig) -> Sizes:
    """What ``structure`` tells."""
    gamma = options.num_speculative_tokens
    most = DEFAULT_SPECULATIVE_TOKENS if gamma is None else AutoDraftCount().most if isinstance(gamma, str) else gamma
    shapes, dtype, states = structure.layers, structure.dtype, structure.states

    def cache_parts(context: int, batch_size: int, pooled: bool = False) -> dict[str, int]:
        return expected_memory(
            shapes,
            context,
            batch_size,
            kv_group_size=options.kv_group_size,
            num_speculative_tokens=most,
            dtype=dtype,
            max_cache_len=options.max_cache_len or structure.max_len,
            device="cpu",
            states=states,
            pooled=pooled,
        )

    layers = (
        Layer(
            layer.module,
            layer.query_heads,
            layer.kv_heads,
            layer.key_dim,
            layer.value_dim,
            layer.window,
            layer.chunk,
            layer.softcap,
            layer.has_sinks,
            layer.values_in_keys,
        )
        for layer in shapes
    )
    linears = (
        Linear(
            linear.report.name,
            linear.report.in_features,
            linear.report.out_features,
            linear.report.group_size,
            linear.report.note,
            linear.model_bytes,
            linear.draft_bytes,
        )
        for linear in structure.linears
    )
    return Sizes(
        structure.model_type,
        str(dtype).removeprefix("torch."),
        dtype.itemsize,
        options,
        tuple(layers),
        tuple(linears),
        structure.weight_bytes,
        structure.max_len,
        cache_parts,
        functools.partial(cache_parts, pooled=True),
        lambda context, batch_size: full_precision_bytes(shapes, context, batch_size, dtype, states),
        structure.whole,
    )
