"""What a program of ``cached_attention_triton`` attends to: tiles of both planes, or a block of the recent buffer.

``wide_attention_triton`` attends to planes in its own way.
"""

from __future__ import annotations

from .inline_asm import exact_dot, fast_exp2, fast_log2
from .optional_triton import tl, triton
from .stretches_triton import (
    HIDDEN,
    WEIGHT_SHIFT,
    centred_codes,
    load_value_scales,
    normalizer,
    place_of_tile,
    recent_weights,
    soft_cap,
    stored_tile,
    value_factors,
)


@triton.jit
def load_rotated(at, channel, cos, sin, mask, ROTARY: tl.constexpr, ANGLES: tl.constexpr, INTERLEAVED: tl.constexpr):
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
def attend_planes(
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
def attend_recent(
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
    :func:`attend_planes`.
    """
    dtype: tl.constexpr = q_t.dtype
    d = tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_PART)
    new = tl.arange(0, BLOCK_TOKENS)
    slot = num_old + new
    mine = ((new < TOKENS) & (slot >= first_slot) & (slot < first_slot + BLOCK))[:, None]
    k_mask = mine & (d[None, :] < D)
    angle_at = new[:, None] * stride_angle
    new_key = load_rotated(
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
