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
from .cached_attention import cached_attention, rotate
from .current_device import on_tensors_device
from .inline_asm import exact_dot, fast_exp2, fast_log2, launches_overlap, use_inline_asm
from .latent_attention_triton import attend_latents
from .optional_triton import FUSED, gdc_launch_dependents, gdc_wait, tl, triton
from .pages import PAGE_BYTES
from .stretches_triton import (
    HIDDEN,
    WEIGHT_SHIFT,
    centred_codes,
    device_limits,
    first_seen_tile,
    last_contiguous,
    launch_options,
    load_value_scales,
    merged,
    newest_hidden,
    normalizer,
    place_of_tile,
    recent_weights,
    soft_cap,
    stored_tile,
    value_factors,
    widest_head,
)
from .value_parts import two_value_parts_at_once
from .wide_attention_triton import WIDE_ROWS, attend_wide


@triton.jit
def _load_rotated(at, channel, cos, sin, mask, ROTARY: tl.constexpr, ANGLES: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Channels of the heads that begin at ``at``, the first ``ROTARY`` of them rotated by the angles whose cosines and
    sines begin at ``cos`` and ``sin``, in float32, and rounded once."""
    x = tl.load(at + channel, mask, other=0)
    if ROTARY > 0:
        step: tl.constexpr = 1 if INTERLEAVED else ROTARY // 2
        if INTERLEAVED:
            angle = channel // (ROTARY // ANGLES)
            first = channel % 2 == 0
        else:
            angle = channel % ANGLES
            first = channel < step
        rotated = mask & (channel < ROTARY)
        partner = tl.load(at + tl.where(first, channel + step, channel - step), rotated, other=0).to(tl.float32)
        c = tl.load(cos + angle, rotated, other=0).to(tl.float32)
        s = tl.load(sin + angle, rotated, other=0).to(tl.float32)
        turned = (x.to(tl.float32) * c + tl.where(first, -partner, partner) * s).to(x.dtype)
        x = tl.where(channel < ROTARY, turned, x)
    return x


@triton.jit
def _attend_planes(
    q_t,
    k_upper,
    k_lower,
    k_scale,
    k_zero,
    v_upper,
    v_lower,
    v_scale,
    v_zero,
    table,
    places,
    stride_v_group,
    stride_v_row,
    stride_v_channel,
    first_tile,
    last_tile,
    num_bytes,
    oldest,
    scale_log2,
    softcap_log2,
    chosen,
    first_unjudged,
    tile_tops,
    tops_stride,
    real,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PART: tl.constexpr,
    PARTS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_LOWER: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SPARSE: tl.constexpr,
    SCORES: tl.constexpr,
    PAGED: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Attend from the columns of ``q_t (BLOCK_D, BLOCK_ROWS)`` to tiles of ``BLOCK`` bytes (twice as many tokens).

    A byte index runs over the rows of all groups in order. Keys of position <= ``oldest`` of a column are hidden from
    it. Returns the normalized outputs of both value parts ``(BLOCK_PART, BLOCK_ROWS)`` and the log2-sum-exp2.

    With ``SPARSE`` tiles have the numbers of :func:`place_of_tile`. With ``SCORES`` the highest score of every tile is
    stored, the logarithm of the token's value scale included, at ``tile_tops``, ``tops_stride`` apart from tile to
    tile, for each column that is ``real``.
    """
    dtype: tl.constexpr = q_t.dtype
    step: tl.constexpr = 0.0625 if HAS_LOWER else 1.0
    # Looked up a tile ahead, a table costs a draft step 0.3 to 1.8% at 32k and 128k tokens instead of 6 to 7, a
    # verification 1.4 to 5.6 (one H200). Looked up for scales two tiles ahead, it costs a quarter and more: registers.
    AHEAD: tl.constexpr = PAGED and HALF >= BLOCK
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_PART)
    top = tl.full((BLOCK_ROWS,), HIDDEN, tl.float32)
    norm = tl.zeros((BLOCK, BLOCK_ROWS), tl.float32)
    acc = tl.zeros((BLOCK_PART, BLOCK_ROWS), tl.float32)
    offset = norm
    acc_1 = acc
    offset_1 = norm
    first_place = place_of_tile(first_tile, chosen, first_unjudged, SPARSE)
    next_stored = stored_tile(table, first_place, num_bytes, places, HALF, BLOCK, HAS_WINDOW, PAGED)
    column = tl.arange(0, BLOCK)[:, None]
    next_scales = load_value_scales(
        v_scale,
        v_zero,
        next_stored if HALF >= BLOCK else next_stored[:, None],
        first_place * BLOCK + column,
        num_bytes,
        SCALES,
        HALF,
    )
    for number in range(first_tile, last_tile):
        tile = place_of_tile(number, chosen, first_unjudged, SPARSE)
        vs_low, vs_high, vz_low, vz_high = next_scales
        # Loads this small are not pipelined by the compiler; without this each tile waits for them.
        next_place = place_of_tile(number + 1, chosen, first_unjudged, SPARSE)
        stored = next_stored if AHEAD else stored_tile(table, tile, num_bytes, places, HALF, BLOCK, HAS_WINDOW, PAGED)
        next_stored = stored_tile(table, next_place, num_bytes, places, HALF, BLOCK, HAS_WINDOW, PAGED)
        next_scales = load_value_scales(
            v_scale,
            v_zero,
            next_stored if HALF >= BLOCK else next_stored[:, None],
            next_place * BLOCK + column,
            num_bytes,
            SCALES,
            HALF,
        )
        if HALF >= BLOCK:
            group = tile // (HALF // BLOCK)
            row = (tile % (HALF // BLOCK)) * BLOCK + i
            scale_at = stored * D + d[None, :]
            v_at = stored * stride_v_group + row[None, :] * stride_v_row + c[:, None] * stride_v_channel
            token = group * (2 * HALF) + row
            # A mask known to be true leaves no instruction behind.
            inside = tl.full((1,), 1, tl.int1)
        else:
            byte = tile * BLOCK + i
            group = byte // HALF
            row = byte % HALF
            token = group * (2 * HALF) + row
            inside = byte < num_bytes
            scale_at = stored[:, None] * D + d[None, :]
            v_at = (stored * stride_v_group + row * stride_v_row)[None, :] + c[:, None] * stride_v_channel
        k_mask = inside[:, None]
        v_mask = inside[None, :]
        if D < BLOCK_D:
            k_mask = k_mask & (d[None, :] < D)
        if PART < BLOCK_PART:
            v_mask = v_mask & (c[:, None] < PART)

        k_at = (stored * HALF + row)[:, None] * D + d[None, :]
        k_low, k_high = centred_codes(k_upper, k_lower, k_at, k_mask, dtype, HAS_LOWER, USE_ASM)
        ks = tl.load(k_scale + scale_at, k_mask, other=0).to(dtype)
        kz = tl.load(k_zero + scale_at, k_mask, other=0).to(dtype) + 8 * ks
        ks = ks * step
        s_low = tl.dot(k_low * ks + kz, q_t, input_precision="ieee") * scale_log2
        s_high = tl.dot(k_high * ks + kz, q_t, input_precision="ieee") * scale_log2
        if HAS_SOFTCAP:
            s_low = soft_cap(s_low, softcap_log2, USE_ASM)
            s_high = soft_cap(s_high, softcap_log2, USE_ASM)
        if HAS_WINDOW:
            s_low = tl.where(token[:, None] > oldest[None, :], s_low, HIDDEN)
            s_high = tl.where((token + HALF)[:, None] > oldest[None, :], s_high, HIDDEN)
        if HALF < BLOCK:
            s_low = tl.where(inside[:, None], s_low, HIDDEN)
            s_high = tl.where(inside[:, None], s_high, HIDDEN)

        log_low, r_low, z_low = value_factors(vs_low, vz_low, step, USE_ASM)
        log_high, r_high, z_high = value_factors(vs_high, vz_high, step, USE_ASM)
        y_low = s_low + log_low
        y_high = s_high + log_high
        best = tl.maximum(y_low, y_high)
        if PARTS == 2:
            low_at = (stored * (2 * HALF) + row)[:, None] * SCALES
            high_at = low_at + HALF * SCALES
            log_low_1 = fast_log2(
                tl.load(v_scale + low_at + 1, inside[:, None], other=1).to(tl.float32) * step, USE_ASM
            )
            log_high_1 = fast_log2(
                tl.load(v_scale + high_at + 1, inside[:, None], other=1).to(tl.float32) * step, USE_ASM
            )
            y_low_1 = s_low + log_low_1
            y_high_1 = s_high + log_high_1
            best = tl.maximum(best, tl.maximum(y_low_1, y_high_1))
        tile_top = tl.max(best, 0)
        if SCORES:
            # A sum of the weights would take a second reduction, and a sixth of the kernel's time.
            at = tile.to(tl.int64) * tops_stride + tl.arange(0, BLOCK_ROWS)
            tl.store(tile_tops + at, tile_top, real)
        new_top = tl.maximum(top, tile_top)
        decay = fast_exp2(top - new_top, USE_ASM)
        top = new_top
        w_low = fast_exp2(y_low - (top - WEIGHT_SHIFT)[None, :], USE_ASM)
        w_high = fast_exp2(y_high - (top - WEIGHT_SHIFT)[None, :], USE_ASM)
        if HAS_WINDOW or HALF < BLOCK:
            w_low = tl.where(s_low > HIDDEN, w_low, 0)
            w_high = tl.where(s_high > HIDDEN, w_high, 0)
        norm = norm * decay[None, :] + w_low * r_low + w_high * r_high
        offset = offset * decay[None, :] + w_low * z_low + w_high * z_high
        v_low, v_high = centred_codes(v_upper, v_lower, v_at, v_mask, dtype, HAS_LOWER, USE_ASM)
        acc = tl.dot(v_low, w_low.to(dtype), acc * decay[None, :], input_precision="ieee")
        acc = tl.dot(v_high, w_high.to(dtype), acc, input_precision="ieee")
        if PARTS == 2:
            w_low = fast_exp2(y_low_1 - (top - WEIGHT_SHIFT)[None, :], USE_ASM)
            w_high = fast_exp2(y_high_1 - (top - WEIGHT_SHIFT)[None, :], USE_ASM)
            if HAS_WINDOW or HALF < BLOCK:
                w_low = tl.where(s_low > HIDDEN, w_low, 0)
                w_high = tl.where(s_high > HIDDEN, w_high, 0)
            z_low = tl.load(v_zero + low_at + 1, inside[:, None], other=0).to(tl.float32) * fast_exp2(
                -log_low_1, USE_ASM
            )
            z_high = tl.load(v_zero + high_at + 1, inside[:, None], other=0).to(tl.float32) * fast_exp2(
                -log_high_1, USE_ASM
            )
            offset_1 = offset_1 * decay[None, :] + w_low * (z_low + 8 / step) + w_high * (z_high + 8 / step)
            v_low, v_high = centred_codes(
                v_upper + PART * stride_v_channel,
                v_lower + PART * stride_v_channel,
                v_at,
                v_mask,
                dtype,
                HAS_LOWER,
                USE_ASM,
            )
            acc_1 = tl.dot(v_low, w_low.to(dtype), acc_1 * decay[None, :], input_precision="ieee")
            acc_1 = tl.dot(v_high, w_high.to(dtype), acc_1, input_precision="ieee")
    inverse, lse = normalizer(norm, top)
    out = (acc + tl.sum(offset, 0)[None, :]) * inverse
    if PARTS == 2:
        return out, (acc_1 + tl.sum(offset_1, 0)[None, :]) * inverse, lse
    else:
        return out, out, lse


@triton.jit
def _attend_recent(
    q_t,
    key,
    value,
    k_recent,
    v_recent,
    cos,
    sin,
    stride_key,
    stride_value,
    stride_angle,
    first_slot,
    num_old,
    position,
    oldest,
    newest,
    scale_log2,
    softcap_log2,
    TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PART: tl.constexpr,
    PARTS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTARY: tl.constexpr,
    ANGLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Store the new tokens whose slots lie in this block of ``BLOCK`` recent slots, then attend to the block.

    ``position`` is the position of slot 0; a column sees keys of positions in ``(oldest, newest]``. Returns as
    :func:`_attend_planes`.
    """
    dtype: tl.constexpr = q_t.dtype
    d = tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_PART)
    new = tl.arange(0, BLOCK_TOKENS)
    slot = num_old + new
    mine = ((new < TOKENS) & (slot >= first_slot) & (slot < first_slot + BLOCK))[:, None]
    k_mask = mine & (d[None, :] < D)
    angle_at = new[:, None] * stride_angle
    new_key = _load_rotated(
        key + new[:, None] * stride_key, d[None, :], cos + angle_at, sin + angle_at, k_mask, ROTARY, ANGLES, INTERLEAVED
    )
    tl.store(k_recent + slot[:, None] * D + d[None, :], new_key, k_mask)
    for part in tl.static_range(PARTS):
        v_mask = mine & (c[None, :] < PART)
        channel = part * PART + c[None, :]
        new_value = tl.load(value + new[:, None] * stride_value + channel, v_mask)
        tl.store(v_recent + slot[:, None] * VALUES + channel, new_value, v_mask)
    # The block is read back below by other threads of this program.
    tl.debug_barrier()

    slot = first_slot + tl.arange(0, BLOCK)
    inside = slot < num_old + TOKENS
    keys = tl.load(k_recent + slot[:, None] * D + d[None, :], inside[:, None] & (d[None, :] < D), other=0)
    scores = exact_dot(keys, q_t, USE_ASM) * scale_log2
    weights, inverse, lse = recent_weights(
        scores, slot, inside, position, oldest, newest, softcap_log2, HAS_SOFTCAP, USE_ASM
    )
    v_at = v_recent + slot[None, :] * VALUES + c[:, None]
    v_mask = inside[None, :] & (c[:, None] < PART)
    values = tl.load(v_at, v_mask, other=0)
    out = exact_dot(values, weights.to(dtype), USE_ASM) * inverse
    if PARTS == 2:
        values = tl.load(v_at + PART, v_mask, other=0)
        return out, exact_dot(values, weights.to(dtype), USE_ASM) * inverse, lse
    else:
        return out, out, lse


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
    q_t = _load_rotated(q_at, d[:, None], cos + angle_at, sin + angle_at, q_mask, ROTARY, ANGLES, INTERLEAVED)

    DV: tl.constexpr = PARTS * PART
    c = tl.arange(0, BLOCK_PART)
    at = (tl.program_id(1).to(tl.int64) * num_splits + split) * (REPEAT * TOKENS) + rows
    lse_at = partial_lse + at
    out_at = partial + at[None, :] * DV + c[:, None]
    mask = real[None, :] & (c[:, None] < PART)
    if split < RECENT_SPLITS:
        if split * BLOCK < start - quantized + TOKENS:
            out, out_1, lse = _attend_recent(
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
                out, out_1, lse = _attend_planes(
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
