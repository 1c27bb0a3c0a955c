"""Attention on CUDA over one key head whose first channels are its values, as latents are cached.

A program reads a tile of keys once, for the scores and then as the values. It attends to one stretch of one sequence's
cache, for some rows (tokens of query heads); ``stretches_triton`` merges the stretches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .block_table import launched, num_places, strides
from .cached_attention import MAX_LATENT_BYTES
from .inline_asm import exact_dot, fast_exp2, use_inline_asm
from .optional_triton import tl, triton
from .stretches_triton import (
    HIDDEN,
    WEIGHT_SHIFT,
    centred_codes,
    device_limits,
    first_seen_tile,
    last_contiguous,
    merged,
    newest_hidden,
    recent_weights,
    soft_cap,
    stored_group,
)


class LatentConfig(NamedTuple):
    """How the planes are attended: rows per program, bytes per tile, warps, pipeline stages, splits."""

    rows: int
    block: int
    warps: int
    stages: int
    splits: int


def latent_config(multiprocessors: int, pairs: int, rows: int, num_bytes: int, element_size: int) -> LatentConfig:
    """Configuration by allocated size; not tuned. Shared memory of 99 KB has room for so many rows of 576 channels.

    Args:
        multiprocessors: of the device.
        pairs: batch * KV heads.
        rows: query heads of a KV head * tokens.
        num_bytes: byte rows of one head's planes (half its tokens).
        element_size: bytes of a query's number.
    """
    block_rows = min(64 // element_size, max(8, triton.next_power_of_2(rows)))
    block = 16
    columns = pairs * triton.cdiv(rows, block_rows)
    tiles = triton.cdiv(num_bytes, block)
    splits = max(1, min(2 * multiprocessors // columns, tiles, 64))
    return LatentConfig(block_rows, block, 8, 2, splits)


@triton.jit
def _decoded(
    upper,
    lower,
    scale,
    zero,
    at,
    scale_at,
    mask,
    dtype: tl.constexpr,
    HAS_LOWER: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Keys of the low and of the high nibbles at byte offsets ``at``."""
    low, high = centred_codes(upper, lower, at, mask, dtype, HAS_LOWER, USE_ASM)
    s = tl.load(scale + scale_at, mask, other=0).to(dtype)
    z = tl.load(zero + scale_at, mask, other=0).to(dtype) + 8 * s
    if HAS_LOWER:
        s = s * 0.0625
    return low * s + z, high * s + z


@triton.jit
def _attend_planes(
    q_t,
    q_rest,
    upper,
    lower,
    scale,
    zero,
    table,
    places,
    first_tile,
    last_tile,
    num_bytes,
    oldest,
    scale_log2,
    softcap_log2,
    DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_LOWER: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PAGED: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Attend from the columns of ``q_t (BLOCK_V, BLOCK_ROWS)`` and ``q_rest (BLOCK_REST, BLOCK_ROWS)`` to tiles of
    ``BLOCK`` bytes (twice as many tokens).

    Returns the normalized outputs ``(BLOCK_V, BLOCK_ROWS)`` and the log2-sum-exp2.
    """
    dtype: tl.constexpr = q_t.dtype
    D: tl.constexpr = DV + REST
    i = tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK_V)[None, :]
    r = tl.arange(0, BLOCK_REST)[None, :]
    top = tl.full((BLOCK_ROWS,), HIDDEN, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_V, BLOCK_ROWS), tl.float32)
    for tile in range(first_tile, last_tile):
        byte = tile * BLOCK + i
        inside = byte < num_bytes
        group = byte // HALF
        row = byte % HALF
        token = group * (2 * HALF) + row
        stored = stored_group(table, group, inside, places, HAS_WINDOW, PAGED)
        at = (stored * HALF + row)[:, None] * D
        scale_at = stored[:, None] * D
        mask = inside[:, None] & (c < DV)
        k_low, k_high = _decoded(upper, lower, scale, zero, at + c, scale_at + c, mask, dtype, HAS_LOWER, USE_ASM)
        s_low = tl.dot(k_low, q_t, input_precision="ieee")
        s_high = tl.dot(k_high, q_t, input_precision="ieee")
        if REST > 0:
            mask = inside[:, None] & (r < REST)
            r_low, r_high = _decoded(
                upper, lower, scale, zero, at + DV + r, scale_at + DV + r, mask, dtype, HAS_LOWER, USE_ASM
            )
            s_low = tl.dot(r_low, q_rest, s_low, input_precision="ieee")
            s_high = tl.dot(r_high, q_rest, s_high, input_precision="ieee")
        s_low = s_low * scale_log2
        s_high = s_high * scale_log2
        if HAS_SOFTCAP:
            s_low = soft_cap(s_low, softcap_log2, USE_ASM)
            s_high = soft_cap(s_high, softcap_log2, USE_ASM)
        seen_low = inside[:, None]
        seen_high = inside[:, None]
        if HAS_WINDOW:
            seen_low = seen_low & (token[:, None] > oldest[None, :])
            seen_high = seen_high & ((token + HALF)[:, None] > oldest[None, :])
        s_low = tl.where(seen_low, s_low, HIDDEN)
        s_high = tl.where(seen_high, s_high, HIDDEN)
        new_top = tl.maximum(top, tl.max(tl.maximum(s_low, s_high), 0))
        decay = fast_exp2(top - new_top, USE_ASM)
        top = new_top
        w_low = tl.where(seen_low, fast_exp2(s_low - (top - WEIGHT_SHIFT)[None, :], USE_ASM), 0)
        w_high = tl.where(seen_high, fast_exp2(s_high - (top - WEIGHT_SHIFT)[None, :], USE_ASM), 0)
        total = total * decay + tl.sum(w_low + w_high, 0)
        acc = tl.dot(tl.trans(k_low), w_low.to(dtype), acc * decay[None, :], input_precision="ieee")
        acc = tl.dot(tl.trans(k_high), w_high.to(dtype), acc, input_precision="ieee")
    divisor = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, top - WEIGHT_SHIFT + tl.log2(divisor), float("-inf"))
    return acc * (1.0 / divisor)[None, :], lse


@triton.jit
def _attend_recent(
    q_t,
    q_rest,
    key,
    recent,
    stride_key,
    first_slot,
    num_old,
    position,
    oldest,
    newest,
    scale_log2,
    softcap_log2,
    TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Store the new tokens whose slots lie in this block of ``BLOCK`` recent slots, then attend to the block.

    ``position`` is the position of slot 0; a column sees keys of positions in ``(oldest, newest]``. Returns as
    :func:`_attend_planes`.
    """
    dtype: tl.constexpr = q_t.dtype
    D: tl.constexpr = DV + REST
    c = tl.arange(0, BLOCK_V)[None, :]
    r = tl.arange(0, BLOCK_REST)[None, :]
    new = tl.arange(0, BLOCK_TOKENS)
    slot = num_old + new
    mine = ((new < TOKENS) & (slot >= first_slot) & (slot < first_slot + BLOCK))[:, None]
    x = tl.load(key + new[:, None] * stride_key + c, mine & (c < DV))
    tl.store(recent + slot[:, None] * D + c, x, mine & (c < DV))
    if REST > 0:
        x = tl.load(key + new[:, None] * stride_key + DV + r, mine & (r < REST))
        tl.store(recent + slot[:, None] * D + DV + r, x, mine & (r < REST))
    # The block is read back below by other threads of this program.
    tl.debug_barrier()

    slot = first_slot + tl.arange(0, BLOCK)
    inside = slot < num_old + TOKENS
    keys = tl.load(recent + slot[:, None] * D + c, inside[:, None] & (c < DV), other=0)
    scores = exact_dot(keys, q_t, USE_ASM)
    if REST > 0:
        rest = tl.load(recent + slot[:, None] * D + DV + r, inside[:, None] & (r < REST), other=0)
        scores += exact_dot(rest, q_rest, USE_ASM)
    weights, inverse, lse = recent_weights(
        scores * scale_log2, slot, inside, position, oldest, newest, softcap_log2, HAS_SOFTCAP, USE_ASM
    )
    out = exact_dot(tl.trans(keys), weights.to(dtype), USE_ASM)
    return out * inverse, lse


@triton.jit
def _attend_latents_kernel(
    query,
    key,
    k_recent,
    k_upper,
    k_lower,
    k_scale,
    k_zero,
    table,
    quantized_len,
    length,
    partial,
    partial_lse,
    scale_log2,
    softcap_log2,
    window,
    places,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_krb,
    stride_krh,
    stride_kpb,
    stride_kph,
    stride_ksb,
    stride_ksh,
    stride_table,
    KV_HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    RECENT_SPLITS: tl.constexpr,
    HAS_LOWER: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PAGED: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """One stretch of the cache: program (split and block of rows, batch * KV head); the first splits read the recent
    buffer.

    A row is one token of one query head. Writes ``partial (B*K, splits, rows, DV)`` and ``partial_lse`` in float32;
    where a row sees nothing of the stretch its lse is -inf and its partial is left unwritten or zero.
    """
    ROW_BLOCKS: tl.constexpr = (REPEAT * TOKENS + BLOCK_ROWS - 1) // BLOCK_ROWS
    split = tl.program_id(0) // ROW_BLOCKS
    num_splits = tl.num_programs(0) // ROW_BLOCKS
    sequence = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    start = tl.load(length + sequence).to(tl.int32)
    quantized = tl.load(quantized_len + sequence).to(tl.int32)

    rows = tl.program_id(0) % ROW_BLOCKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = rows < REPEAT * TOKENS
    newest = start + rows % TOKENS
    oldest = newest_hidden(newest, window, HAS_WINDOW)
    c = tl.arange(0, BLOCK_V)[:, None]
    r = tl.arange(0, BLOCK_REST)[:, None]
    q_at = query + sequence * stride_qb + (head * REPEAT + rows // TOKENS)[None, :] * stride_qh
    q_at += (rows % TOKENS)[None, :] * stride_qt
    q_t = tl.load(q_at + c, real[None, :] & (c < DV), other=0)
    q_rest = tl.load(q_at + DV + r, real[None, :] & (r < REST), other=0)

    at = (tl.program_id(1).to(tl.int64) * num_splits + split) * (REPEAT * TOKENS) + rows
    out_at = partial + at[None, :] * DV + c
    mask = real[None, :] & (c < DV)
    if split < RECENT_SPLITS:
        if split * BLOCK < start - quantized + TOKENS:
            out, lse = _attend_recent(
                q_t,
                q_rest,
                key + sequence * stride_kb + head * stride_kh,
                k_recent + sequence * stride_krb + head * stride_krh,
                stride_kt,
                split * BLOCK,
                start - quantized,
                quantized,
                oldest,
                newest,
                scale_log2,
                softcap_log2,
                TOKENS,
                BLOCK_TOKENS,
                DV,
                BLOCK_V,
                REST,
                BLOCK_REST,
                BLOCK,
                HAS_SOFTCAP,
                USE_ASM,
            )
            tl.store(partial_lse + at, lse, real)
            tl.store(out_at, out, mask)
        else:
            tl.store(partial_lse + at, tl.full((BLOCK_ROWS,), float("-inf"), tl.float32), real)
    else:
        num_bytes = quantized // 2
        end = tl.cdiv(num_bytes, BLOCK)
        begin = 0
        if HAS_WINDOW:
            # Groups that lie wholly before every query's window are not read.
            begin = tl.minimum(first_seen_tile(start, window, HALF, BLOCK), end)
        share = tl.cdiv(end - begin, num_splits - RECENT_SPLITS)
        first = begin + (split - RECENT_SPLITS) * share
        last = tl.minimum(first + share, end)
        if first < last:
            plane = sequence * stride_kpb + head * stride_kph
            scales = sequence * stride_ksb + head * stride_ksh
            # Codes are exact in float16 but not all in bfloat16, and q is exact in both but for vanishing entries.
            plane_q = q_t.to(tl.float16) if q_t.dtype != tl.float32 else q_t
            plane_rest = q_rest.to(tl.float16) if q_rest.dtype != tl.float32 else q_rest
            out, lse = _attend_planes(
                plane_q,
                plane_rest,
                k_upper + plane,
                k_lower + plane,
                k_scale + scales,
                k_zero + scales,
                table + sequence * stride_table,
                places,
                first,
                last,
                num_bytes,
                oldest,
                scale_log2,
                softcap_log2,
                DV,
                BLOCK_V,
                REST,
                BLOCK_REST,
                BLOCK_ROWS,
                HALF,
                BLOCK,
                HAS_LOWER,
                HAS_WINDOW,
                HAS_SOFTCAP,
                PAGED,
                USE_ASM,
            )
            tl.store(partial_lse + at, lse, real)
            tl.store(out_at, out, mask)
        else:
            tl.store(partial_lse + at, tl.full((BLOCK_ROWS,), float("-inf"), tl.float32), real)


def attend_latents(
    query: Tensor,
    key: Tensor,
    value_dim: int,
    k_recent: Tensor,
    k_upper: Tensor,
    k_lower: Tensor | None,
    k_scale: Tensor,
    k_zero: Tensor,
    quantized_len: Tensor,
    length: Tensor,
    block_table: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """``quantspec::cached_attention`` where values are the first ``value_dim`` channels of keys, already rotated."""
    batch, heads, tokens, head_dim = query.shape
    kv_heads, rest = key.shape[1], head_dim - value_dim
    most = MAX_LATENT_BYTES // query.element_size()
    if head_dim > most:
        raise ValueError(f"latents of {head_dim} dims: at most {most} are supported on CUDA in {query.dtype}")
    groups, half = num_places(k_upper, block_table), k_upper.shape[3]
    table, stride_table, paged = launched(block_table, quantized_len)
    pairs, rows = batch * kv_heads, heads // kv_heads * tokens
    config = latent_config(
        device_limits(query.device).multiprocessors, pairs, rows, groups * half, query.element_size()
    )
    recent_splits = triton.cdiv(k_recent.shape[2], config.block)
    splits = recent_splits + config.splits
    query, key = last_contiguous(query), last_contiguous(key)
    partial = query.new_empty(pairs, splits, rows, value_dim, dtype=torch.float32)
    partial_lse = query.new_empty(pairs, splits, rows, dtype=torch.float32)
    out = query.new_empty(batch, tokens, heads, value_dim)
    log2e = 1 / math.log(2)
    _attend_latents_kernel[(splits * triton.cdiv(rows, config.rows), pairs)](
        query,
        key,
        k_recent,
        k_upper,
        k_upper if k_lower is None else k_lower,
        k_scale,
        k_zero,
        table,
        quantized_len,
        length,
        partial,
        partial_lse,
        scale * log2e,
        softcap * log2e,
        window,
        groups,
        *query.stride()[:3],
        *key.stride()[:3],
        *k_recent.stride()[:2],
        *strides(k_upper, block_table)[:2],
        *strides(k_scale, block_table)[:2],
        stride_table,
        KV_HEADS=kv_heads,
        REPEAT=heads // kv_heads,
        TOKENS=tokens,
        BLOCK_TOKENS=triton.next_power_of_2(tokens),
        BLOCK_ROWS=config.rows,
        DV=value_dim,
        BLOCK_V=max(16, triton.next_power_of_2(value_dim)),
        REST=rest,
        BLOCK_REST=max(16, triton.next_power_of_2(rest)),
        HALF=half,
        BLOCK=config.block,
        RECENT_SPLITS=recent_splits,
        HAS_LOWER=k_lower is not None,
        HAS_WINDOW=window != 0,
        HAS_SOFTCAP=softcap > 0,
        PAGED=paged,
        USE_ASM=use_inline_asm(query.device),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return merged(partial, partial_lse, out, sinks, window, quantized_len, length, half, kv_heads)
