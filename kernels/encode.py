"""Encoding of cached tokens into the planes on the device, shared by ``quantspec::prefill_attention`` and ``flush``.

Of one sequence the tokens not in the planes are slots 0, 1, ...: first those in the recent buffer, then the new ones.
The oldest whole groups move into the planes so that G..2G-1 slots remain (fewer than 2G all stay), and the rest slides
to the front of the recent buffer. One kernel encodes, reading each token once; the next moves. Both decide from the
lengths on the device, so their grids depend on the allocated sizes only. The codes are those of
``quantspec.kernels.hierarchical`` but where a float32 rounding decides (of the scale, or between two codes).
"""

from __future__ import annotations

import functools

from torch import Tensor

from .block_table import launched, num_places, strides
from .current_device import on_tensors_device
from .optional_triton import FUSED, tl, triton

# Adding 1.5 * 2^23 to a small float32 rounds it to the nearest even integer and leaves that in the low bits.
_ROUND = tl.constexpr(12582912.0)


# What differs from prompt to prompt and from sequence to sequence, and makes no kernel faster: Triton would compile one
# more, for seconds, where a number is a multiple of 16 or the lengths of a sequence lie beside such an address.
_VARYING = ("max_groups", "places", "stride_table")
_OF_SEQUENCES = ("table", "quantized_len", "length", "num_new")

# Bytes of a plane that one program encodes at a time, and its warps.
BLOCK_ELEMENTS = 8192
WARPS = 4


@triton.jit
def load_slots(
    recent, new, first, i, channel, num_recent, mask, stride_new, WIDTH: tl.constexpr, HAS_NEW: tl.constexpr
):
    """Tokens at slots ``first + i`` (a column): of the recent buffer or, past its ``num_recent`` tokens, new ones."""
    slot = first + i
    if not HAS_NEW:
        x = tl.load(recent + slot * WIDTH + channel, mask & (slot < num_recent), other=0)
    else:
        at = new + (slot - num_recent).to(tl.int64) * stride_new + channel
        # Most groups of a prompt are all new: one load each.
        if first >= num_recent:
            x = tl.load(at, mask, other=0)
        else:
            x = tl.load(recent + slot * WIDTH + channel, mask & (slot < num_recent), other=0)
            x += tl.load(at, mask & (slot >= num_recent), other=0)
    return x


@triton.jit
def _num_flushed(num_slots, max_groups, GROUP: tl.constexpr):
    """Groups to encode so that fewer than 2G slots remain and at least G stay."""
    return tl.minimum(tl.maximum(num_slots // GROUP - 1, 0), max_groups)


@triton.jit
def _scale_and_zero(low, high):
    """The stored float16 scale and zero of a range, as float32; see ``hierarchical``."""
    scale = ((high - low) * (1 / 15)).to(tl.float16).to(tl.float32)
    return tl.where(scale > 0, scale, 1.0), low.to(tl.float16).to(tl.float32)


@triton.jit
def _codes(x, scale, zero):
    """Upper code and lower code + 8 of float32 ``x`` in the low bits of int32, below bits of ``_ROUND``."""
    inverse = 1.0 / scale
    t = x * inverse - zero * inverse
    rounded = tl.minimum(tl.maximum(t, 0.0), 15.0) + _ROUND
    residual = tl.minimum(tl.maximum(t - (rounded - _ROUND), -0.5), 0.4375)
    return rounded.to(tl.int32, bitcast=True), (residual * 16.0 + (_ROUND + 8.0)).to(tl.int32, bitcast=True)


@triton.jit
def _store_codes(upper, lower, at, mask, x_low, x_high, scale_low, zero_low, scale_high, zero_high):
    """Encode the tokens of the low and of the high nibbles and store their bytes at ``at`` of both planes."""
    upper_low, lower_low = _codes(x_low, scale_low, zero_low)
    upper_high, lower_high = _codes(x_high, scale_high, zero_high)
    # The bits of _ROUND lie above the byte that the conversion keeps, and its low bits are zero.
    tl.store(upper + at, (upper_low + (upper_high << 4)).to(tl.uint8), mask)
    tl.store(lower + at, (lower_low + (lower_high << 4)).to(tl.uint8), mask)


@triton.jit
def _row_range(x, mask):
    """Least and greatest of each row over the masked channels, as columns."""
    least = tl.min(tl.where(mask, x, float("inf")), 1)[:, None]
    return least, tl.max(tl.where(mask, x, float("-inf")), 1)[:, None]


@triton.jit
def _encode_keys(
    recent,
    new,
    upper,
    lower,
    scale,
    zero,
    first_slot,
    num_recent,
    stride_new,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NEW: tl.constexpr,
):
    """One group of one head, ``BLOCK_D`` channels at a time; the scale is shared by the tokens of a channel."""
    i = tl.arange(0, HALF)[:, None]
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        mask = d < D
        low = load_slots(recent, new, first_slot, i, d, num_recent, mask, stride_new, D, HAS_NEW).to(tl.float32)
        high = load_slots(recent, new, first_slot + HALF, i, d, num_recent, mask, stride_new, D, HAS_NEW).to(tl.float32)
        least = tl.min(tl.minimum(low, high), 0)[None, :]
        s, z = _scale_and_zero(least, tl.max(tl.maximum(low, high), 0)[None, :])
        tl.store(scale + d, s, mask)
        tl.store(zero + d, z, mask)
        _store_codes(upper, lower, i * D + d, mask, low, high, s, z, s, z)


@triton.jit
def _encode_values(
    recent,
    new,
    upper,
    lower,
    scale,
    zero,
    first_slot,
    num_recent,
    stride_new,
    stride_row,
    stride_channel,
    PART: tl.constexpr,
    BLOCK_PART: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_NEW: tl.constexpr,
):
    """One group of one head, ``ROWS`` rows of bytes at a time; the channels of a token's part share the scale."""
    WIDTH: tl.constexpr = PARTS * PART
    c = tl.arange(0, BLOCK_PART)[None, :]
    mask = c < PART
    for first in range(0, HALF, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        for part in tl.static_range(PARTS):
            channel = part * PART + c
            low = load_slots(recent, new, first_slot, row, channel, num_recent, mask, stride_new, WIDTH, HAS_NEW).to(
                tl.float32
            )
            high = load_slots(
                recent, new, first_slot + HALF, row, channel, num_recent, mask, stride_new, WIDTH, HAS_NEW
            )
            high = high.to(tl.float32)
            s_low, z_low = _scale_and_zero(*_row_range(low, mask))
            s_high, z_high = _scale_and_zero(*_row_range(high, mask))
            at = row * PARTS + part
            tl.store(scale + at, s_low)
            tl.store(zero + at, z_low)
            tl.store(scale + at + HALF * PARTS, s_high)
            tl.store(zero + at + HALF * PARTS, z_high)
            at = row * stride_row + channel * stride_channel
            _store_codes(upper, lower, at, mask, low, high, s_low, z_low, s_high, z_high)


@functools.partial(triton.jit, do_not_specialize=_VARYING, do_not_specialize_on_alignment=_OF_SEQUENCES)
def _encode_kernel(
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
    num_new,
    max_groups,
    places,
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
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PART: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_NEW: tl.constexpr,
    PAGED: tl.constexpr,
):
    """Program (group, batch * KV head, keys or values) encodes one group, if it is due and has a place."""
    sequence = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    quantized = tl.load(quantized_len + sequence).to(tl.int32)
    num_recent = tl.load(length + sequence).to(tl.int32) - quantized
    num_slots = num_recent
    if HAS_NEW:
        num_slots += tl.load(num_new + sequence).to(tl.int32)
    flushed = _num_flushed(num_slots, max_groups, 2 * HALF)
    # Of more groups than places the last ones stay.
    if (tl.program_id(0) < flushed) & (tl.program_id(0) >= flushed - places):
        group = (quantized // (2 * HALF) + tl.program_id(0)).to(tl.int64)
        group = tl.load(table + sequence * stride_table + group).to(tl.int64) if PAGED else group % places
        first_slot = tl.program_id(0) * (2 * HALF)
        if tl.program_id(2) == 0:
            plane = sequence * stride_kpb + head * stride_kph + group * (HALF * D)
            scales = sequence * stride_ksb + head * stride_ksh + group * D
            _encode_keys(
                k_recent + sequence * stride_krb + head * stride_krh,
                key + sequence * stride_kb + head * stride_kh,
                k_upper + plane,
                k_lower + plane,
                k_scale + scales,
                k_zero + scales,
                first_slot,
                num_recent,
                stride_kt,
                D,
                BLOCK_D,
                HALF,
                HAS_NEW,
            )
        else:
            v_plane = sequence * stride_vpb + head * stride_vph + group * stride_v_group
            v_scales = sequence * stride_vsb + head * stride_vsh + group * (2 * HALF * PARTS)
            _encode_values(
                v_recent + sequence * stride_vrb + head * stride_vrh,
                value + sequence * stride_vb + head * stride_vh,
                v_upper + v_plane,
                v_lower + v_plane,
                v_scale + v_scales,
                v_zero + v_scales,
                first_slot,
                num_recent,
                stride_vt,
                stride_v_row,
                stride_v_channel,
                PART,
                BLOCK_PART,
                PARTS,
                HALF,
                ROWS,
                HAS_NEW,
            )


@functools.partial(triton.jit, do_not_specialize=("max_groups",), do_not_specialize_on_alignment=_OF_SEQUENCES[1:])
def _move_kernel(
    new,
    recent,
    quantized_len,
    length,
    num_new,
    max_groups,
    stride_nb,
    stride_nh,
    stride_nt,
    stride_rb,
    stride_rh,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NEW: tl.constexpr,
):
    """Program (batch * KV head) moves the slots that stay to the front of the recent buffer."""
    sequence = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    num_recent = tl.load(length + sequence).to(tl.int32) - tl.load(quantized_len + sequence).to(tl.int32)
    num_slots = num_recent
    if HAS_NEW:
        num_slots += tl.load(num_new + sequence).to(tl.int32)
    recent += sequence * stride_rb + head * stride_rh
    new += sequence * stride_nb + head * stride_nh
    flushed = _num_flushed(num_slots, max_groups, GROUP) * GROUP
    channel = tl.arange(0, BLOCK_WIDTH)[None, :]
    # Without a flush the slots already there stay where they are.
    first = 0 if flushed > 0 else num_recent
    # A block is read BLOCK or more slots ahead of where it is written, so no block overwrites what a later one reads.
    for start in range(first, num_slots - flushed, BLOCK):
        i = tl.arange(0, BLOCK)[:, None]
        slot = start + i
        mask = (channel < WIDTH) & (slot < num_slots - flushed)
        x = load_slots(recent, new, start + flushed, i, channel, num_recent, mask, stride_nt, WIDTH, HAS_NEW)
        tl.store(recent + slot * WIDTH + channel, x, mask)


@on_tensors_device
def encode_oldest_groups(
    new: tuple[Tensor, Tensor, Tensor] | None,
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
    quantized_len: Tensor,
    length: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """Encode the groups that are due and slide the recent buffer, in place.

    Args:
        new: ``key (B, K, T, D)``, ``value (B, K, T, Dv)`` and ``num_new (B,)`` int64 of tokens to take in after those
            of the recent buffer; None encodes at most one group of the recent buffer (a flush).
        k_recent, v_recent, quantized_len, length: as in ``quantspec::cached_attention``.
        k_upper, k_lower, k_scale, k_zero, v_upper, v_lower, v_scale, v_zero: as there, none of them None; value planes
            may have any strides over (N, G/2, Dv). Group n goes to place ``n % N``, where a later one may follow it.
        block_table: as there.
    """
    key, value, num_new = (k_recent, v_recent, length) if new is None else new
    batch, kv_heads, slots, head_dim = k_recent.shape
    half, value_dim, parts = k_upper.shape[3], v_recent.shape[3], v_scale.shape[-1]
    # Values that are in the keys have no channels.
    group, part = 2 * half, value_dim // max(1, parts)
    max_groups = 1 if new is None else max(1, (slots + key.shape[2]) // group)
    pairs = batch * kv_heads
    table, stride_table, paged = launched(block_table, quantized_len)
    _encode_kernel[(max_groups, pairs, 2 if parts else 1)](
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
        num_new,
        max_groups,
        num_places(k_upper, block_table),
        *key.stride()[:3],
        *value.stride()[:3],
        *k_recent.stride()[:2],
        *v_recent.stride()[:2],
        *strides(k_upper, block_table)[:2],
        *strides(v_upper, block_table),
        *strides(k_scale, block_table)[:2],
        *strides(v_scale, block_table)[:2],
        stride_table,
        KV_HEADS=kv_heads,
        D=head_dim,
        BLOCK_D=min(triton.next_power_of_2(head_dim), max(16, BLOCK_ELEMENTS // half)),
        PART=part,
        BLOCK_PART=triton.next_power_of_2(max(1, part)),
        PARTS=parts,
        HALF=half,
        ROWS=min(half, max(1, BLOCK_ELEMENTS // triton.next_power_of_2(max(1, part)))),
        HAS_NEW=new is not None,
        PAGED=paged,
        num_warps=WARPS,
        **FUSED,
    )
    for fresh, recent in ((key, k_recent), (value, v_recent)):
        width = recent.shape[3]
        if width == 0:
            continue
        _move_kernel[(pairs,)](
            fresh,
            recent,
            quantized_len,
            length,
            num_new,
            max_groups,
            *fresh.stride()[:3],
            *recent.stride()[:2],
            KV_HEADS=kv_heads,
            WIDTH=width,
            BLOCK_WIDTH=triton.next_power_of_2(width),
            GROUP=group,
            BLOCK=min(64, group, 16384 // triton.next_power_of_2(width)),
            HAS_NEW=new is not None,
            num_warps=8,
            **FUSED,
        )
