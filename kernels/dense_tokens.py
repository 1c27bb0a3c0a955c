"""Cached tokens of one sequence as dense keys and values with new ones behind them: what a prompt's later chunks read.

Tokens of the planes decode at 8 bits, ``x = (s/16) * (16u + l - 8) + z`` (QuantSpec, arXiv 2502.10424, section 4.2;
``l`` as it is stored); those of the recent buffer and the new ones are as they are. On the device one kernel writes
keys and values, each token to its place, so that nothing is concatenated. The product with a code is exact in float32,
so the kernel rounds as ``quantspec.kernels.hierarchical`` does.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .block_table import launched, num_places, strides
from .cached_attention import dense_from
from .current_device import on_tensors_device
from .encode import load_slots
from .hierarchical import stored_values
from .optional_triton import FUSED, tl, triton

# What differs from chunk to chunk and makes no kernel faster, see ``encode``.
_VARYING = ("sequence", "first", "quantized", "start", "last", "plane_blocks", "places", "stride_table")

# Bytes of a plane that one program decodes, and its warps.
_BLOCK_ELEMENTS = 4096
_WARPS = 4


def dense_tokens(
    key: Tensor,
    value: Tensor,
    first: int,
    start: int,
    sequence: int,
    quantized: int,
    dtype: torch.dtype,
    planes: tuple[Tensor, ...],
    recent: tuple[Tensor, Tensor],
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tokens of a sequence from ``first`` on, dense, in plain torch.

    Args:
        key, value: ``(K, T, D)`` and ``(K, T, Dv)``, the tokens from ``start`` on.
        first: position of the oldest token that is wanted, at most ``start``.
        start: tokens that are cached, the ``quantized`` oldest of them in the planes.
        sequence: which of the batch.
        quantized: a multiple of G.
        dtype: of the result.
        planes, recent, block_table: those of ``quantspec::cached_attention``, both planes among them.

    Returns:
        ``(K, start - first + T, D)`` and ``(K, start - first + T, Dv)``.
    """
    keys, values = dense_from(first, start, sequence, quantized, dtype, planes, recent, block_table)  # type: ignore[arg-type]
    values = stored_values(values, keys, value.shape[-1])
    return torch.cat((keys, key.to(dtype)), 1), torch.cat((values, value.to(dtype)), 1)


@triton.jit
def _store_decoded(
    out,
    token,
    channel,
    mask,
    upper,
    lower,
    scale_low,
    zero_low,
    scale_high,
    zero_high,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
):
    """Decode bytes of both planes and store their tokens: ``token`` of the low nibbles, ``token + HALF`` of the high.

    ``token``, a column, counts from the oldest one that is wanted; those before it are left out.
    """
    upper, lower = upper.to(tl.int32), lower.to(tl.int32)
    low = ((upper & 15) << 4) + (lower & 15) - 8
    high = (upper & 240) + (lower >> 4) - 8
    x_low = low.to(scale_low.dtype) * (scale_low * 0.0625) + zero_low
    x_high = high.to(scale_high.dtype) * (scale_high * 0.0625) + zero_high
    at = out + token * WIDTH + channel
    tl.store(at, x_low.to(out.dtype.element_ty), mask & (token >= 0))
    tl.store(at + HALF * WIDTH, x_high.to(out.dtype.element_ty), mask & (token + HALF >= 0))


@triton.jit
def _decode_keys(
    out,
    upper,
    lower,
    scale,
    zero,
    row,
    token,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Rows ``row`` of one group of one head."""
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = d < D
    s = tl.load(scale + d, mask, other=0).to(COMPUTE)
    z = tl.load(zero + d, mask, other=0).to(COMPUTE)
    at = row * D + d
    u = tl.load(upper + at, mask, other=0)
    v = tl.load(lower + at, mask, other=0)
    _store_decoded(out, token, d, mask, u, v, s, z, s, z, D, HALF)


@triton.jit
def _decode_values(
    out,
    upper,
    lower,
    scale,
    zero,
    row,
    token,
    stride_row,
    stride_channel,
    PART: tl.constexpr,
    BLOCK_PART: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Rows ``row`` of one group of one head, a part of the channels at a time: it has the scale of a token."""
    c = tl.arange(0, BLOCK_PART)[None, :]
    mask = c < PART
    for part in tl.static_range(PARTS):
        channel = part * PART + c
        of_low = row * PARTS + part
        of_high = of_low + HALF * PARTS
        s_low, z_low = tl.load(scale + of_low).to(COMPUTE), tl.load(zero + of_low).to(COMPUTE)
        s_high, z_high = tl.load(scale + of_high).to(COMPUTE), tl.load(zero + of_high).to(COMPUTE)
        at = row * stride_row + channel * stride_channel
        u = tl.load(upper + at, mask, other=0)
        v = tl.load(lower + at, mask, other=0)
        _store_decoded(out, token, channel, mask, u, v, s_low, z_low, s_high, z_high, PARTS * PART, HALF)


@triton.jit
def _copy_tokens(
    out,
    recent,
    new,
    first_slot,
    num_recent,
    num_slots,
    token,
    stride_new,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``ROWS`` slots from ``first_slot`` on, of the recent buffer or new, to ``token`` and on."""
    i = tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK_WIDTH)[None, :]
    mask = (channel < WIDTH) & (first_slot + i < num_slots)
    x = load_slots(recent, new, first_slot, i, channel, num_recent, mask, stride_new, WIDTH, True)
    tl.store(out + (token + i) * WIDTH + channel, x.to(out.dtype.element_ty), mask)


@functools.partial(triton.jit, do_not_specialize=_VARYING, do_not_specialize_on_alignment=("table",))
def _dense_kernel(
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
    k_out,
    v_out,
    sequence,
    first,
    quantized,
    start,
    last,
    plane_blocks,
    places,
    stride_kh,
    stride_kt,
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
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PART: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PAGED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Program (block, KV head, keys or values): ``ROWS`` byte rows of a group, or ``2 * ROWS`` slots after them all."""
    WIDTH: tl.constexpr = PARTS * PART
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.cast(sequence, tl.int64)
    k_out += head * (last - first) * D
    v_out += head * (last - first) * WIDTH
    if block < plane_blocks:
        group = tl.minimum(first, quantized) // (2 * HALF) + block // (HALF // ROWS)
        row = (block % (HALF // ROWS)) * ROWS + tl.arange(0, ROWS)[:, None]
        token = group * (2 * HALF) + row - first
        place = (tl.load(table + sequence * stride_table + group) if PAGED else group % places).to(tl.int64)
        if tl.program_id(2) == 0:
            plane = sequence * stride_kpb + head * stride_kph + place * (HALF * D)
            scales = sequence * stride_ksb + head * stride_ksh + place * D
            _decode_keys(
                k_out,
                k_upper + plane,
                k_lower + plane,
                k_scale + scales,
                k_zero + scales,
                row,
                token,
                D,
                BLOCK_D,
                HALF,
                COMPUTE,
            )
        else:
            v_plane = sequence * stride_vpb + head * stride_vph + place * stride_v_group
            v_scales = sequence * stride_vsb + head * stride_vsh + place * (2 * HALF * PARTS)
            _decode_values(
                v_out,
                v_upper + v_plane,
                v_lower + v_plane,
                v_scale + v_scales,
                v_zero + v_scales,
                row,
                token,
                stride_v_row,
                stride_v_channel,
                PART,
                BLOCK_PART,
                PARTS,
                HALF,
                COMPUTE,
            )
    else:
        slot = tl.maximum(first - quantized, 0) + (block - plane_blocks) * (2 * ROWS)
        at = quantized + slot - first
        if tl.program_id(2) == 0:
            _copy_tokens(
                k_out,
                k_recent + sequence * stride_krb + head * stride_krh,
                key + head * stride_kh,
                slot,
                start - quantized,
                last - quantized,
                at,
                stride_kt,
                D,
                BLOCK_D,
                2 * ROWS,
            )
        else:
            _copy_tokens(
                v_out,
                v_recent + sequence * stride_vrb + head * stride_vrh,
                value + head * stride_vh,
                slot,
                start - quantized,
                last - quantized,
                at,
                stride_vt,
                WIDTH,
                BLOCK_WIDTH,
                2 * ROWS,
            )


@on_tensors_device
def dense_tokens_triton(
    key: Tensor,
    value: Tensor,
    first: int,
    start: int,
    sequence: int,
    quantized: int,
    dtype: torch.dtype,
    planes: tuple[Tensor, ...],
    recent: tuple[Tensor, Tensor],
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; as :func:`dense_tokens`, for new tokens whose channels lie side by side."""
    k_upper, k_scale, v_upper, v_scale = planes[0], planes[2], planes[4], planes[6]
    k_recent, v_recent = recent
    kv_heads, num_new, head_dim = key.shape
    half, value_dim, parts = k_upper.shape[3], v_recent.shape[3], v_scale.shape[-1]
    part = value_dim // max(1, parts)
    last = start + num_new
    keys = key.new_empty(kv_heads, last - first, head_dim, dtype=dtype)
    values = key.new_empty(kv_heads, last - first, value_dim, dtype=dtype)
    block_d = triton.next_power_of_2(head_dim)
    rows = min(half, max(1, _BLOCK_ELEMENTS // max(block_d, triton.next_power_of_2(max(1, value_dim)))))
    group = 2 * half
    plane_blocks = (quantized // group - min(first, quantized) // group) * (half // rows)
    blocks = plane_blocks + triton.cdiv(last - max(first, quantized), 2 * rows)
    table, stride_table, paged = launched(block_table, k_upper)
    # Values that are in the keys have no channels.
    _dense_kernel[(blocks, kv_heads, 2 if parts else 1)](
        key,
        value,
        *recent,
        *planes,
        table,
        keys,
        values,
        sequence,
        first,
        quantized,
        start,
        last,
        plane_blocks,
        num_places(k_upper, block_table),
        *key.stride()[:2],
        *value.stride()[:2],
        *k_recent.stride()[:2],
        *v_recent.stride()[:2],
        *strides(k_upper, block_table)[:2],
        *strides(v_upper, block_table),
        *strides(k_scale, block_table)[:2],
        *strides(v_scale, block_table)[:2],
        stride_table,
        D=head_dim,
        BLOCK_D=block_d,
        PART=part,
        BLOCK_PART=triton.next_power_of_2(max(1, part)),
        PARTS=parts,
        HALF=half,
        BLOCK_WIDTH=triton.next_power_of_2(max(1, value_dim)),
        ROWS=rows,
        PAGED=paged,
        COMPUTE=tl.float64 if dtype == torch.float64 else tl.float32,
        num_warps=_WARPS,
        **FUSED,
    )
    return keys, stored_values(values, keys, value.shape[-1])
