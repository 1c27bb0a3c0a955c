"""``quantspec::cached_attention`` on CUDA.

Of the plain implementation's two foldings only that of values is kept: a query scaled anew would change its layout in
every group, while keys are scaled in the registers where their product wants them. There codes are centred (u - 8 for
the draft, 16u + l - 128 for the target, with s and z adjusted to match), so that both sums stay small.

One program attends to one stretch of one sequence's cache, for all query heads of a KV head and all T tokens at once
(they are the columns of its matrix products, so the cache is read once); ``stretches_triton`` merges the stretches.
Both kernels read the lengths on the device. The first one rotates queries where it loads them and new keys where it
stores them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .block_table import launched, num_places, strides
from .cache_parts_triton import attend_planes, attend_recent, load_rotated
from .cached_attention import cached_attention, rotate
from .current_device import on_tensors_device
from .inline_asm import launches_overlap, use_inline_asm
from .latent_attention_triton import attend_latents
from .optional_triton import FUSED, gdc_launch_dependents, gdc_wait, tl, triton
from .pages import PAGE_BYTES
from .stretches_triton import (
    device_limits,
    first_seen_tile,
    last_contiguous,
    launch_options,
    merged,
    newest_hidden,
    widest_head,
)
from .value_parts import two_value_parts_at_once
from .wide_attention_triton import WIDE_ROWS, attend_wide


@triton.jit
def _attend_kernel(
    query,
    key,
    value,
    k_recent,
    v_recent,
    k_upper,
    k_lower,
    k_scale,
    k_zero,
    v_upper,
    v_lower,
    v_scale,
    v_zero,
    table,
    quantized_len,
    length,
    cos,
    sin,
    partial,
    partial_lse,
    chosen,
    choices,
    tile_tops,
    scale_log2,
    softcap_log2,
    window,
    places,
    chosen_width,
    num_tiles,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_krb,
    stride_krh,
    stride_vrb,
    stride_vrh,
    stride_kpb,
    stride_kph,
    stride_vpb,
    stride_vph,
    stride_v_group,
    stride_v_row,
    stride_v_channel,
    stride_ksb,
    stride_ksh,
    stride_vsb,
    stride_vsh,
    stride_table,
    stride_ab,
    stride_at,
    KV_HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PART: tl.constexpr,
    PARTS: tl.constexpr,
    VALUES: tl.constexpr,
    SCALES: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    RECENT_SPLITS: tl.constexpr,
    ROTARY: tl.constexpr,
    ANGLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_LOWER: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SPARSE: tl.constexpr,
    SCORES: tl.constexpr,
    PAGED: tl.constexpr,
    USE_ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One stretch of the cache: program (split and block of rows, batch * KV head); the first splits read the recent
    buffer.

    A row is one token of one query head. Writes ``partial (B*K, splits, rows, Dv)`` and ``partial_lse`` in float32;
    where a row sees nothing of the stretch its lse is -inf and its partial is left unwritten or zero.
    """
    if OVERLAP:
        # Kernels before this one may still be writing the query; the merge may be set up while the planes are read.
        gdc_wait()
        gdc_launch_dependents()
    # Neighbouring programs take blocks of rows of one stretch: all but the first find the codes in the cache.
    ROW_BLOCKS: tl.constexpr = (REPEAT * TOKENS + BLOCK_ROWS - 1) // BLOCK_ROWS
    split = tl.program_id(0) // ROW_BLOCKS
    num_splits = tl.num_programs(0) // ROW_BLOCKS
    sequence = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    start = tl.load(length + sequence).to(tl.int32)
    quantized = tl.load(quantized_len + sequence).to(tl.int32)

    first_row = tl.program_id(0) % ROW_BLOCKS * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    real = rows < REPEAT * TOKENS
    newest = start + rows % TOKENS
    oldest = newest_hidden(newest, window, HAS_WINDOW)
    d = tl.arange(0, BLOCK_D)
    q_at = query + sequence * stride_qb + (head * REPEAT + rows // TOKENS)[None, :] * stride_qh
    q_at += (rows % TOKENS)[None, :] * stride_qt
    cos += sequence * stride_ab
    sin += sequence * stride_ab
    angle_at = (rows % TOKENS)[None, :] * stride_at
    q_mask = real[None, :] & (d[:, None] < D)
    q_t = load_rotated(q_at, d[:, None], cos + angle_at, sin + angle_at, q_mask, ROTARY, ANGLES, INTERLEAVED)

    DV: tl.constexpr = PARTS * PART
    c = tl.arange(0, BLOCK_PART)
    at = (tl.program_id(1).to(tl.int64) * num_splits + split) * (REPEAT * TOKENS) + rows
    lse_at = partial_lse + at
    out_at = partial + at[None, :] * DV + c[:, None]
    mask = real[None, :] & (c[:, None] < PART)
    if split < RECENT_SPLITS:
        if split * BLOCK < start - quantized + TOKENS:
            out, out_1, lse = attend_recent(
                q_t,
                key + sequence * stride_kb + head * stride_kh,
                value + sequence * stride_vb + head * stride_vh,
                k_recent + sequence * stride_krb + head * stride_krh,
                v_recent + sequence * stride_vrb + head * stride_vrh,
                cos,
                sin,
                stride_kt,
                stride_vt,
                stride_at,
                split * BLOCK,
                start - quantized,
                quantized,
                oldest,
                newest,
                scale_log2,
                softcap_log2,
                TOKENS,
                BLOCK_TOKENS,
                D,
                BLOCK_D,
                PART,
                BLOCK_PART,
                PARTS,
                VALUES,
                BLOCK,
                ROTARY,
                ANGLES,
                INTERLEAVED,
                HAS_SOFTCAP,
                USE_ASM,
            )
            tl.store(lse_at, lse, real)
            tl.store(out_at, out, mask)
            if PARTS == 2:
                tl.store(out_at + PART, out_1, mask)
        else:
            tl.store(lse_at, tl.full((BLOCK_ROWS,), float("-inf"), tl.float32), real)
    else:
        num_bytes = quantized // 2
        end = tl.cdiv(num_bytes, TILE)
        begin = 0
        if HAS_WINDOW:
            # Groups that lie wholly before every query's window are not read.
            begin = tl.minimum(first_seen_tile(start, window, HALF, TILE), end)
        first_unjudged = begin
        if SPARSE:
            # The chosen pages take the numbers before the first page that is read in any case.
            choice = choices + tl.program_id(1) * 2
            first_unjudged = tl.minimum(tl.maximum(begin, tl.load(choice + 1)), end)
            begin = first_unjudged - tl.load(choice)
            chosen += tl.program_id(1).to(tl.int64) * chosen_width - begin
        share = tl.cdiv(end - begin, num_splits - RECENT_SPLITS)
        first = begin + (split - RECENT_SPLITS) * share
        last = tl.minimum(first + share, end)
        if first < last:
            k_plane = sequence * stride_kpb + head * stride_kph
            v_plane = sequence * stride_vpb + head * stride_vph
            k_scales = sequence * stride_ksb + head * stride_ksh
            v_scales = sequence * stride_vsb + head * stride_vsh
            # Codes are exact in float16 but not all in bfloat16, and q is exact in both but for vanishing entries.
            plane_q = q_t.to(tl.float16) if q_t.dtype != tl.float32 else q_t
            tops = tile_tops + tl.program_id(1).to(tl.int64) * num_tiles * (REPEAT * TOKENS) + first_row
            if WIDE:
                out, lse = attend_wide(
                    plane_q,
                    k_upper + k_plane,
                    k_lower + k_plane,
                    k_scale + k_scales,
                    k_zero + k_scales,
                    v_upper + v_plane,
                    v_lower + v_plane,
                    v_scale + v_scales,
                    v_zero + v_scales,
                    table + sequence * stride_table,
                    places,
                    stride_v_group,
                    stride_v_channel,
                    first,
                    last,
                    num_bytes,
                    oldest,
                    scale_log2,
                    softcap_log2,
                    tops,
                    REPEAT * TOKENS,
                    real,
                    D,
                    SCALES,
                    HALF,
                    TILE,
                    HAS_WINDOW,
                    HAS_SOFTCAP,
                    SCORES,
                    PAGED,
                    USE_ASM,
                )
                out_1 = out
            else:
                out, out_1, lse = attend_planes(
                    plane_q,
                    k_upper + k_plane,
                    k_lower + k_plane,
                    k_scale + k_scales,
                    k_zero + k_scales,
                    v_upper + v_plane,
                    v_lower + v_plane,
                    v_scale + v_scales,
                    v_zero + v_scales,
                    table + sequence * stride_table,
                    places,
                    stride_v_group,
                    stride_v_row,
                    stride_v_channel,
                    first,
                    last,
                    num_bytes,
                    oldest,
                    scale_log2,
                    softcap_log2,
                    chosen,
                    first_unjudged,
                    tops,
                    REPEAT * TOKENS,
                    real,
                    D,
                    BLOCK_D,
                    PART,
                    BLOCK_PART,
                    PARTS,
                    SCALES,
                    BLOCK_ROWS,
                    HALF,
                    TILE,
                    HAS_LOWER,
                    HAS_WINDOW,
                    HAS_SOFTCAP,
                    SPARSE,
                    SCORES,
                    PAGED,
                    USE_ASM,
                )
            tl.store(lse_at, lse, real)
            tl.store(out_at, out, mask)
            if PARTS == 2:
                tl.store(out_at + PART, out_1, mask)
        else:
            tl.store(lse_at, tl.full((BLOCK_ROWS,), float("-inf"), tl.float32), real)


class LaunchConfig(NamedTuple):
    """How the planes of one allocated size are attended: rows of a KV head per program, bytes per tile, warps, pipeline
    stages, splits.

    ``max_registers`` per thread buys resident warps where the compiler would take more than it needs.
    """

    rows: int
    block: int
    warps: int
    stages: int
    splits: int
    max_registers: int | None = None


def launch_config(
    device: torch.device,
    pairs: int,
    rows: int,
    head_dim: int,
    num_bytes: int,
    recent_slots: int,
    has_lower: bool,
    element_size: int,
    wide: bool = False,
) -> LaunchConfig:
    """Configuration by allocated size, with as many programs at once as the device has room for.

    Tuned on an H100, where keys that are multiplied as they lie in memory gave wrong results by four warps in tiles of
    64 below 64 rows (Triton 3.6); for :func:`attend_wide` tuned on an H200.

    Args:
        device: where the kernel runs.
        pairs: batch * KV heads.
        rows: query heads of a KV head * tokens.
        head_dim: the larger of the key and value head dims.
        num_bytes: byte rows of one head's planes (half its tokens).
        recent_slots: slots of the recent buffer.
        has_lower: whether both planes are read.
        element_size: bytes of a query's number.
        wide: whether :func:`attend_wide` attends.
    """
    limits = device_limits(device)
    if wide:
        # Registers leave room for two programs.
        block_rows = min(32, triton.next_power_of_2(rows))
        columns, tiles = pairs * triton.cdiv(rows, block_rows), triton.cdiv(num_bytes, WIDE_ROWS)
        # One wave, beside which what reads the recent buffers is done early. Of several sequences one may be long and
        # the others not: up to four waves, of programs that read 32 tiles, share it.
        wave = 2 * limits.multiprocessors // columns
        splits = max(wave, min(4 * 2 * limits.multiprocessors // columns, triton.cdiv(tiles, 32)))
        return LaunchConfig(block_rows, WIDE_ROWS, 4, 3, max(1, min(splits, tiles)))
    # More columns than 32 spill registers. At 131,072 tokens of 8 heads 32 rows take 130 us; 36 to 64 rows take 245 to
    # 255 in blocks of 32, 278 to 293 in one of 64 (four warps; 427 with eight), and 64 take 342 in blocks of 16. A last
    # block of 8 or 16 rows gains nothing, for what takes long is decoding, once for each block.
    block_rows = min(32, max(8, triton.next_power_of_2(rows)))
    # A tile is a page, so that pages are scored and chosen alone.
    block = PAGE_BYTES
    max_registers = None
    if head_dim > 256:
        warps, stages, resident = 8, 2, 1
    elif head_dim > 128:
        warps, stages, resident = 4, 2, 2
    elif block_rows == 8 and element_size == 2:
        warps, stages, resident, max_registers = 2, 3, 6 if has_lower else 7, 128
    else:
        warps, stages, resident = 2, 3, 4
    # The tiles of both planes' keys and values that are ahead, and what a program's threads exchange.
    shared_bytes = (stages - 1) * block * 2 * head_dim * (2 if has_lower else 1) + 320 * block_rows + 1024
    resident = max(1, min(resident, limits.shared_bytes // shared_bytes))
    tiles = triton.cdiv(num_bytes, block)
    columns = pairs * triton.cdiv(rows, block_rows)
    programs = limits.multiprocessors * resident
    # One wave of equal programs is best, unless the recent buffers take much of it: then two waves even out.
    splits = programs // columns - triton.cdiv(recent_slots, block)
    if splits * columns < 0.8 * programs:
        splits = 2 * programs // columns
    # Below four tiles a program costs more than it saves, unless there would be too few of them.
    splits = min(splits, tiles, max(64, tiles // 4))
    return LaunchConfig(block_rows, block, warps, stages, max(1, splits), max_registers)


@cached_attention.register_kernel("cuda")
@on_tensors_device
@two_value_parts_at_once
def cached_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    k_upper: Tensor,
    k_lower: Tensor | None,
    k_scale: Tensor,
    k_zero: Tensor,
    v_upper: Tensor,
    v_lower: Tensor | None,
    v_scale: Tensor,
    v_zero: Tensor,
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
    page_scores: Tensor | None = None,
    chosen_pages: Tensor | None = None,
    num_chosen: Tensor | None = None,
) -> Tensor:
    """Launch the kernels; as ``quantspec::cached_attention``. Value planes may have any strides over (N, G/2, Dv).

    With ``page_scores`` and ``joins`` it does what ``quantspec::scored_attention`` does besides, with the other two it
    reads as ``quantspec::sparse_attention``; those without elements stand for None.
    """
    if v_recent.shape[3] == 0:
        if cos is not None and sin is not None:
            query, key = (rotate(x, cos, sin, rotary_dim, interleaved) for x in (query, key))
        cache = (k_recent, k_upper, k_lower, k_scale, k_zero, quantized_len, length, block_table)
        return attend_latents(query, key, value.shape[3], *cache, scale, window, softcap, sinks)
    batch, heads, tokens, head_dim = query.shape
    kv_heads, value_dim, parts = key.shape[1], value.shape[3], v_scale.shape[-1]
    widest = widest_head(device_limits(query.device), query.element_size())
    if max(head_dim, value_dim) > widest:
        raise ValueError(f"head dims of {head_dim} and {value_dim}: at most {widest} are supported on this GPU")
    groups, half = num_places(k_upper, block_table), k_upper.shape[3]
    table, stride_table, paged = launched(block_table, quantized_len)
    rows = heads // kv_heads * tokens
    pairs = batch * kv_heads
    slots = k_recent.shape[2]
    v_strides = strides(v_upper, block_table)
    num_pages = 0 if page_scores is None else page_scores.shape[2]
    most_chosen = 0 if chosen_pages is None else chosen_pages.shape[2]
    scores, sparse = num_pages > 0, most_chosen > 0
    wide = (
        device_limits(query.device).multiplies_64_rows
        and k_lower is not None
        and not sparse
        and rows > 8
        and query.element_size() == 2
        and head_dim in (64, 128)
        and (value_dim, parts) == (head_dim, 1)
        and half % WIDE_ROWS == 0
        and v_strides[3] == 1
    )
    config = launch_config(
        query.device,
        pairs,
        rows,
        max(head_dim, value_dim),
        groups * half,
        slots,
        k_lower is not None,
        query.element_size(),
        wide,
    )
    recent_splits = triton.cdiv(slots, PAGE_BYTES)
    splits = recent_splits + config.splits
    query, key, value = last_contiguous(query), last_contiguous(key), last_contiguous(value)
    k_recent_strides, v_recent_strides = k_recent.stride()[:2], v_recent.stride()[:2]
    partial = query.new_empty(pairs, splits, rows, value_dim, dtype=torch.float32)
    partial_lse = query.new_empty(pairs, splits, rows, dtype=torch.float32)
    # Pages are tiles, counted from the first token on, wherever they are stored.
    num_tiles = max(num_pages, triton.cdiv(groups * half, PAGE_BYTES))
    tile_tops = query.new_empty(pairs, num_tiles, rows, dtype=torch.float32) if scores else partial_lse
    out = query.new_empty(batch, tokens, heads, value_dim)
    angle_strides = (0, 0)
    if cos is not None and sin is not None:
        if cos.stride() != sin.stride() or cos.stride(2) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        angle_strides = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))
    log2e = 1 / math.log(2)
    overlap = launches_overlap(query.device)
    _attend_kernel[(splits * triton.cdiv(rows, config.rows), pairs)](
        query,
        key,
        value,
        k_recent,
        v_recent,
        k_upper,
        k_upper if k_lower is None else k_lower,
        k_scale,
        k_zero,
        v_upper,
        v_upper if v_lower is None else v_lower,
        v_scale,
        v_zero,
        table,
        quantized_len,
        length,
        query if cos is None else cos,
        query if sin is None else sin,
        partial,
        partial_lse,
        chosen_pages if sparse else quantized_len,
        num_chosen if sparse else quantized_len,
        tile_tops,
        scale * log2e,
        softcap * log2e,
        window,
        groups,
        most_chosen,
        num_tiles,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *k_recent_strides,
        *v_recent_strides,
        *strides(k_upper, block_table)[:2],
        *v_strides,
        *strides(k_scale, block_table)[:2],
        *strides(v_scale, block_table)[:2],
        stride_table,
        *angle_strides,
        KV_HEADS=kv_heads,
        REPEAT=heads // kv_heads,
        TOKENS=tokens,
        BLOCK_TOKENS=triton.next_power_of_2(tokens),
        BLOCK_ROWS=config.rows,
        D=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        PART=value_dim // parts,
        BLOCK_PART=max(16, triton.next_power_of_2(value_dim // parts)),
        PARTS=parts,
        VALUES=v_recent.stride(2),
        SCALES=v_scale.stride(3),
        HALF=half,
        BLOCK=PAGE_BYTES,
        TILE=config.block,
        WIDE=wide,
        RECENT_SPLITS=recent_splits,
        ROTARY=rotary_dim,
        ANGLES=1 if cos is None else cos.shape[2],
        INTERLEAVED=interleaved,
        HAS_LOWER=k_lower is not None,
        HAS_WINDOW=window != 0,
        HAS_SOFTCAP=softcap > 0,
        SPARSE=sparse,
        SCORES=scores,
        PAGED=paged,
        USE_ASM=use_inline_asm(query.device),
        OVERLAP=overlap,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.max_registers,
        **FUSED,
        **launch_options(overlap),
    )
    return merged(
        partial,
        partial_lse,
        out,
        sinks,
        window,
        quantized_len,
        length,
        half,
        kv_heads,
        tile_tops if scores else None,
        page_scores if scores else None,
        joins,
        overlap,
    )
