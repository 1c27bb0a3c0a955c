"""``quantspec::scored_attention`` and ``quantspec::scored_decoded_attention``: verification that leaves page scores.

They attend as ``quantspec::cached_attention`` and ``quantspec::decoded_attention`` do, bit for bit. Besides, every page
of the planes gets a score: the logarithm of the most attention that any verified token pays, through any query head of
a KV head, to a token of it, times the scale of that token's values. ``quantspec::choose_pages`` reads that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import first_visible
from .block_table import groups_of
from .cache_layout import part_names
from .cache_op import cache_op
from .cached_attention import append_recent, attend_plainly, dense_from, rotate
from .cached_attention_triton import cached_attention_triton
from .decoded_attention import attend_decoded, tokens_of
from .pages import score_pages


@cache_op("quantspec::scored_attention", mutates_args=(*part_names("recent"), "page_scores"))
def scored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    k_upper: Tensor,
    k_lower: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_upper: Tensor,
    v_lower: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    page_scores: Tensor,
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
    joins: bool = False,
) -> Tensor:
    """The target's 8-bit read of everything cached, and the score of every page.

    Args:
        query, key, value, quantized_len, length, scale, window, softcap, sinks: as in ``quantspec::cached_attention``.
        k_recent, v_recent: as there, mutated.
        k_upper, k_lower, k_scale, k_zero, v_upper, v_lower, v_scale, v_zero: as there; none of them None.
        page_scores: ``(B, K, P)`` float32, mutated: the scores of the whole pages in each sequence's planes, see
            ``pages``; -inf where a window hides all of a page. What lies behind them means nothing. Without
            elements, nothing is scored.
        joins: whether a score stays where it is the higher one, as another layer that reads the same cache left it.
        cos, sin, rotary_dim, interleaved, block_table: as there.

    Returns:
        ``(B, T, H, Dv)`` in the query's dtype.

    Raises:
        ValueError: on CUDA, heads of more than 512 dims (in float32 of 256 or 128, by shared memory).
    """
    planes = (k_upper, k_lower, k_scale, k_zero, v_upper, v_lower, v_scale, v_zero)
    options = (scale, window, softcap, sinks)
    if cos is not None and sin is not None:
        query, key = (rotate(x, cos, sin, rotary_dim, interleaved) for x in (query, key))
    append_recent(key, value, k_recent, v_recent, quantized_len, length)
    recent = (k_recent, v_recent)
    out = attend_plainly(query, recent, planes, quantized_len, length, options, block_table, value.shape[3])
    if page_scores.shape[2]:
        recent = (k_recent, v_recent)
        for b, (quantized, start) in enumerate(zip(quantized_len.tolist(), length.tolist(), strict=True)):
            span = (first_visible(start, window), start + query.shape[2])
            keys, _ = dense_from(*span, b, quantized, torch.float32, planes, recent, block_table)
            _store_scores(page_scores[b], query[b], keys, v_scale, block_table, b, quantized, start, options, joins)
    return out


def _store_scores(
    page_scores: Tensor,
    query: Tensor,
    keys: Tensor,
    v_scale: Tensor,
    block_table: Tensor | None,
    sequence: int,
    quantized: int,
    start: int,
    options: tuple[float, int, float, Tensor | None],
    joins: bool,
) -> None:
    """Score the pages of one sequence by the ``keys`` that its first query sees, and later ones.

    What a window hides has no place any more; zeros and ones stand for it.
    """
    hidden, group_size = start + query.shape[1] - keys.shape[1], v_scale.shape[3]
    first = min(hidden, quantized) // group_size
    scales = groups_of(v_scale, block_table, sequence, first, quantized // group_size).of(v_scale)
    keys, scales = F.pad(keys, (0, 0, hidden, 0)), F.pad(scales, (0, 0, 0, 0, first, 0), value=1)
    scores = score_pages(query, keys, scales, quantized, start, *options)
    stored = page_scores[:, : scores.shape[1]]
    stored.copy_(stored.maximum(scores) if joins else scores)


@scored_attention.register_fake
def _(query, key, value, *cache_and_options):
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])


@scored_attention.register_kernel("cuda")
def scored_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    k_upper: Tensor,
    k_lower: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_upper: Tensor,
    v_lower: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    page_scores: Tensor,
    *state: Any,
    **options: Any,
) -> Tensor:
    """Launch the kernels; as ``quantspec::scored_attention``."""
    cache = (k_recent, v_recent, k_upper, k_lower, k_scale, k_zero, v_upper, v_lower, v_scale, v_zero)
    return cached_attention_triton(query, key, value, *cache, *state, **options, page_scores=page_scores)


@cache_op(
    "quantspec::scored_decoded_attention",
    mutates_args=("k_recent", "v_recent", "k_decoded", "v_decoded", "page_scores"),
    device_types="cpu",
)
def scored_decoded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    k_decoded: Tensor,
    v_decoded: Tensor,
    v_scale: Tensor,
    page_scores: Tensor,
    quantized_len: Tensor,
    length: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    block_table: Tensor | None = None,
    joins: bool = False,
) -> Tensor:
    """As ``quantspec::decoded_attention``; the scores of pages take a second product of queries and keys.

    Args:
        query, key, value, quantized_len, length, scale, window, softcap, sinks: as in ``quantspec::decoded_attention``.
        k_recent, v_recent, k_decoded, v_decoded: as there, mutated.
        v_scale, block_table, joins: as in ``quantspec::scored_attention``.
        page_scores: as in ``quantspec::scored_attention``, mutated.

    Returns:
        ``(B, T, H, Dv)`` in the query's dtype.
    """
    options = (scale, window, softcap, sinks)
    out = attend_decoded(query, key, value, k_recent, v_recent, k_decoded, v_decoded, quantized_len, length, options)
    if page_scores.shape[2]:
        for b, (quantized, start) in enumerate(zip(quantized_len.tolist(), length.tolist(), strict=True)):
            keys = tokens_of(k_decoded[b], first_visible(start, window), start + query.shape[2])
            _store_scores(page_scores[b], query[b], keys, v_scale, block_table, b, quantized, start, options, joins)
    return out


@scored_decoded_attention.register_fake
def _(query, key, value, *cache_and_options):
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])
