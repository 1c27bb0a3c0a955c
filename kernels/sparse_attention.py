"""``quantspec::sparse_attention``: a draft step attends to chosen pages of the hierarchical cache.

As ``quantspec::cached_attention`` without the lower planes, but of the tokens in the planes each KV head sees those of
the pages that ``quantspec::choose_pages`` chose for it, and those of all pages that came later. The recent buffer is
seen whole. Where nothing is chosen that is everything, and the result is that of ``quantspec::cached_attention``, bit
for bit.

On CUDA no other page is read. The plain implementation reads all and hides what is not chosen.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cache_layout import part_names
from .cache_op import cache_op
from .cached_attention import append_recent, attend_plainly, rotate
from .cached_attention_triton import cached_attention_triton


@cache_op("quantspec::sparse_attention", mutates_args=part_names("recent"))
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    k_upper: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_upper: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    chosen_pages: Tensor,
    num_chosen: Tensor,
    quantized_len: Tensor,
    length: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotary_dim: int = 0,
    interleaved: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Append T new tokens to the recent buffer and attend from them to it and to the chosen pages.

    Args:
        query, key, value, quantized_len, length, scale, window, softcap, sinks: as in ``quantspec::cached_attention``.
        k_recent, v_recent: as there, mutated.
        k_upper, k_scale, k_zero, v_upper, v_scale, v_zero: as there.
        chosen_pages: ``(B, K, W)`` int32 of different pages. Without elements, everything is read.
        num_chosen: ``(B, K, 2)`` int32: how many of them are read, and the page from which on all are read too; both 0
            for everything.
        cos, sin, rotary_dim, interleaved, block_table: as there.

    Returns:
        ``(B, T, H, Dv)`` in the query's dtype.

    Raises:
        ValueError: on CUDA, heads of more than 512 dims (in float32 of 256 or 128, by shared memory).
    """
    planes = (k_upper, None, k_scale, k_zero, v_upper, None, v_scale, v_zero)
    if cos is not None and sin is not None:
        query, key = (rotate(x, cos, sin, rotary_dim, interleaved) for x in (query, key))
    append_recent(key, value, k_recent, v_recent, quantized_len, length)
    options = (scale, window, softcap, sinks)
    choice = (chosen_pages, num_chosen) if chosen_pages.shape[2] else None
    recent = (k_recent, v_recent)
    return attend_plainly(query, recent, planes, quantized_len, length, options, block_table, value.shape[3], choice)


@sparse_attention.register_fake
def _(query, key, value, *cache_and_options):
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])


@sparse_attention.register_kernel("cuda")
def sparse_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    k_upper: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_upper: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    chosen_pages: Tensor,
    num_chosen: Tensor,
    *state: Any,
    **options: Any,
) -> Tensor:
    """Launch the kernels; as ``quantspec::sparse_attention``."""
    cache = (k_recent, v_recent, k_upper, None, k_scale, k_zero, v_upper, None, v_scale, v_zero)
    choice = {"chosen_pages": chosen_pages, "num_chosen": num_chosen}
    return cached_attention_triton(query, key, value, *cache, *state, **options, **choice)
