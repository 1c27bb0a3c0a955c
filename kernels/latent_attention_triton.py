"""Attention on CUDA over one key head whose first channels are its values, as latents are cached.

A program decodes a tile of keys once, for the scores and then as the values. It attends to one stretch of one
sequence's cache, for some rows (tokens of query heads); ``stretches_triton`` merges the stretches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .block_table import launched, num_places, strides
from .cached_attention import MAX_LATENT_BYTES
from .inline_asm import exact_dot, fast_exp2, use_inline_asm
from .optional_triton import FUSED, tl, triton
from .stretches_triton import (
    HIDDEN,
    WEIGHT_SHIFT,
    DeviceLimits,
    centred_codes,
    device_limits,
    first_seen_tile,
    last_contiguous,
    merged,
    newest_hidden,
    soft_cap,
    stored_group,
)

_WARPS = 8
# Where codes of a byte are joined, Triton 3.6 gives each of four threads eight channels of a product's operand.
_LEAST_CHANNELS = 32


class LatentConfig(NamedTuple):
    """How the planes are attended: rows per program, bytes per tile, warps, pipeline stages, splits."""

    rows: int
    block: int
    warps: int
    stages: int
    splits: int


def latent_config(
    limits: DeviceLimits, pairs: int, rows: int, value_dim: int, num_bytes: int, element_size: int
) -> LatentConfig:
    """Configuration by allocated size, timed on an H100 with Triton 3.6: 128 heads, 512 and 64 channels, groups of 128.

    A layer's draft and its verification of five tokens take 41 and 87 us at 4,096 tokens, 99 and 372 at 32,768; in
    tiles of 16 bytes 44 and 106, 135 and 535; of 16 rows 50 and 252, 300 and 1,807. Tiles of 64 bytes are faster, 27
    and 72, 75 and 280, and wrong by 5%.

    Args:
        limits: of the device.
        pairs: batch * KV heads.
        rows: query heads of a KV head * tokens.
        value_dim: channels that are values.
        num_bytes: byte rows of one head's planes (half its tokens).
        element_size: bytes of a query's number.
    """
    # Every block of rows decodes the codes anew. Hopper's products take 64 rows; elsewhere every warp holds all
    # channels of its rows, and more than 16 spill.
    large = element_size == 2 and rows > 16 and limits.shared_bytes >= 200 * 1024
    block_rows, block, stages = (64, 32, 1) if large else (16, 16, 1)
    columns = pairs * triton.cdiv(rows, block_rows)
    tiles = triton.cdiv(num_bytes, block)
    # A multiprocessor has registers for one program; two waves even out what one would leave idle.
    splits = limits.multiprocessors // columns
    if splits * columns < 0.8 * limits.multiprocessors:
        splits = 2 * limits.multiprocessors // columns
    return LatentConfig(block_rows, block, _WARPS, stages, max(1, min(splits, tiles, 64)))


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
    """Keys ``(2 * bytes, channels)`` at byte offsets ``at (bytes, channels)``: each low nibble's before its high
    nibble's. Scales, and the mask of both, may be one row for all bytes."""
    low, high = centred_codes(upper, lower, at, mask, dtype, HAS_LOWER, USE_ASM)
    s = tl.load(scale + scale_at, mask, other=0).to(dtype)
    z = tl.load(zero + scale_at, mask, other=0).to(dtype) + 8 * s
    if HAS_LOWER:
        s = s * 0.0625
    return tl.join(low * s + z, high * s + z).permute(0, 2, 1).reshape(2 * at.shape[0], at.shape[1])


@triton.jit
def _add_tile(
    q,
    q_rest,
    keys,
    rest,
    seen,
    top,
    total,
    acc,
    scale_log2,
    softcap_log2,
    REST: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """``top``, ``total`` and ``acc (rows, channels)`` with ``keys (tokens, channels)`` and their ``rest`` added, of
    which, if ``MASKED``, rows see those of ``seen (rows, tokens)``."""
    scores = exact_dot(q, tl.trans(keys), USE_ASM)
    if REST > 0:
        scores += exact_dot(q_rest, tl.trans(rest), USE_ASM)
    scores *= scale_log2
    if HAS_SOFTCAP:
        scores = soft_cap(scores, softcap_log2, USE_ASM)
    if MASKED:
        scores = tl.where(seen, scores, HIDDEN)
    new_top = tl.maximum(top, tl.max(scores, 1))
    decay = fast_exp2(top - new_top, USE_ASM)
    weights = fast_exp2(scores - (new_top - WEIGHT_SHIFT)[:, None], USE_ASM)
    if MASKED:
        weights = tl.where(seen, weights, 0)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None] + exact_dot(weights.to(keys.dtype), keys, USE_ASM)
    return new_top, total, acc


@triton.jit
def _normalized(top, total, acc):
    """Outputs, and the log2-sum-exp2."""
    divisor = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, top - WEIGHT_SHIFT + tl.log2(divisor), float("-inf"))
    return acc * (1.0 / divisor)[:, None], lse


@triton.jit
def _attend_planes(
    q,
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
    REST: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_LOWER: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PAGED: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Attend from ``q (rows, channels)`` and ``q_rest (rows, channels)`` to tiles of ``BLOCK`` bytes (twice as many
    tokens).

    Returns the normalized outputs as ``q``, in float32, and the log2-sum-exp2.
    """
    dtype: tl.constexpr = q.dtype
    D: tl.constexpr = DV + REST
    ROWS: tl.constexpr = q.shape[0]
    # Tiles then lie in one group each, and none is partly empty.
    EVEN: tl.constexpr = HALF % BLOCK == 0
    i = tl.arange(0, BLOCK)
    t = tl.arange(0, 2 * BLOCK)
    c = tl.arange(0, q.shape[1])[None, :]
    r = tl.arange(0, q_rest.shape[1])[None, :]
    top = tl.full((ROWS,), HIDDEN, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, q.shape[1]), tl.float32)
    for tile in range(first_tile, last_tile):
        if EVEN:
            group = tile // (HALF // BLOCK)
            stored = stored_group(table, group, group * HALF < num_bytes, places, HAS_WINDOW, PAGED)
            row = (stored * HALF + tile % (HALF // BLOCK) * BLOCK + i)[:, None] * D
            scale_row = stored * D
            # A mask known to be true leaves no instruction behind.
            inside = tl.full((1, 1), 1, tl.int1)
        else:
            byte = tile * BLOCK + i
            stored = stored_group(table, byte // HALF, byte < num_bytes, places, HAS_WINDOW, PAGED)
            row = (stored * HALF + byte % HALF)[:, None] * D
            scale_row = stored[:, None] * D
            inside = (byte < num_bytes)[:, None]
        mask = inside
        if q.shape[1] > DV:
            mask = mask & (c < DV)
        keys = _decoded(upper, lower, scale, zero, row + c, scale_row + c, mask, dtype, HAS_LOWER, USE_ASM)
        rest = q_rest
        if REST > 0:
            mask = inside
            if q_rest.shape[1] > REST:
                mask = mask & (r < REST)
            rest = _decoded(
                upper, lower, scale, zero, row + DV + r, scale_row + DV + r, mask, dtype, HAS_LOWER, USE_ASM
            )
        byte = tile * BLOCK + t // 2
        seen = (byte < num_bytes)[None, :]
        if HAS_WINDOW:
            token = byte // HALF * (2 * HALF) + byte % HALF + t % 2 * HALF
            seen = seen & (token[None, :] > oldest[:, None])
        top, total, acc = _add_tile(
            q,
            q_rest,
            keys,
            rest,
            seen,
            top,
            total,
            acc,
            scale_log2,
            softcap_log2,
            REST,
            HAS_WINDOW or not EVEN,
            HAS_SOFTCAP,
            USE_ASM,
        )
    return _normalized(top, total, acc)


@triton.jit
def _attend_recent(
    q,
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
    REST: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Store the new tokens whose slots lie in this block of ``SLOTS`` recent slots, then attend to the block.

    ``position`` is the position of slot 0; a row sees keys of positions in ``(oldest, newest]``. Returns as
    :func:`_attend_planes`.
    """
    D: tl.constexpr = DV + REST
    ROWS: tl.constexpr = q.shape[0]
    d = tl.arange(0, triton.next_power_of_2(D))[None, :]
    new = tl.arange(0, BLOCK_TOKENS)
    slot = num_old + new
    mine = ((new < TOKENS) & (slot >= first_slot) & (slot < first_slot + SLOTS))[:, None] & (d < D)
    tl.store(recent + slot[:, None] * D + d, tl.load(key + new[:, None] * stride_key + d, mine), mine)
    # The block is read back below by other threads of this program.
    tl.debug_barrier()

    slot = first_slot + tl.arange(0, SLOTS)
    inside = slot < num_old + TOKENS
    c = tl.arange(0, q.shape[1])[None, :]
    keys = tl.load(recent + slot[:, None] * D + c, inside[:, None] & (c < DV), other=0)
    rest = q_rest
    if REST > 0:
        r = tl.arange(0, q_rest.shape[1])[None, :]
        rest = tl.load(recent + slot[:, None] * D + DV + r, inside[:, None] & (r < REST), other=0)
    at = (position + slot)[None, :]
    top, total, acc = _add_tile(
        q,
        q_rest,
        keys,
        rest,
        inside[None, :] & (at > oldest[:, None]) & (at <= newest[:, None]),
        tl.full((ROWS,), HIDDEN, tl.float32),
        tl.zeros((ROWS,), tl.float32),
        tl.zeros((ROWS, q.shape[1]), tl.float32),
        scale_log2,
        softcap_log2,
        REST,
        True,
        HAS_SOFTCAP,
        USE_ASM,
    )
    return _normalized(top, total, acc)


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
    BLOCK_DV: tl.constexpr,
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
    c = tl.arange(0, BLOCK_DV)[None, :]
    r = tl.arange(0, BLOCK_REST)[None, :]
    q_at = query + sequence * stride_qb + (head * REPEAT + rows // TOKENS)[:, None] * stride_qh
    q_at += (rows % TOKENS)[:, None] * stride_qt
    mask = real[:, None] & (c < DV)
    q = tl.load(q_at + c, mask, other=0)
    q_rest = tl.load(q_at + DV + r, real[:, None] & (r < REST), other=0)

    at = (tl.program_id(1).to(tl.int64) * num_splits + split) * (REPEAT * TOKENS) + rows
    out_at = partial + at[:, None] * DV + c
    if split < RECENT_SPLITS:
        if split * (2 * BLOCK) < start - quantized + TOKENS:
            out, lse = _attend_recent(
                q,
                q_rest,
                key + sequence * stride_kb + head * stride_kh,
                k_recent + sequence * stride_krb + head * stride_krh,
                stride_kt,
                split * (2 * BLOCK),
                start - quantized,
                quantized,
                oldest,
                newest,
                scale_log2,
                softcap_log2,
                TOKENS,
                BLOCK_TOKENS,
                DV,
                REST,
                2 * BLOCK,
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
            plane_q = q.to(tl.float16) if q.dtype != tl.float32 else q
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
                REST,
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
    config = latent_config(device_limits(query.device), pairs, rows, value_dim, groups * half, query.element_size())
    recent_splits = triton.cdiv(k_recent.shape[2], 2 * config.block)
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
        BLOCK_DV=max(_LEAST_CHANNELS, triton.next_power_of_2(value_dim)),
        REST=rest,
        BLOCK_REST=max(_LEAST_CHANNELS, triton.next_power_of_2(rest)),
        HALF=half,
        BLOCK=config.block,
        RECENT_SPLITS=recent_splits,
        HAS_LOWER=k_lower is not None,
        HAS_WINDOW=window != 0,
        HAS_SOFTCAP=softcap > 0,
        PAGED=paged,
        USE_ASM=use_inline_asm(query.device),
        num_warps=config.warps,
        **FUSED,
        num_stages=config.stages,
    )
    return merged(partial, partial_lse, out, sinks, window, quantized_len, length, half, kv_heads)
