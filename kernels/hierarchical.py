"""The hierarchical 4+4-bit code of the KV cache, in plain torch (QuantSpec, arXiv 2502.10424, section 4.2).

Per quantization group, with s and z stored in fp16::

    s = (max - min) / 15        z = min                         (s = 1 where max == min)
    u = clamp(round((x - z) / s), 0, 15)                        upper plane
    l = clamp(round((x - (s*u + z)) * 16 / s), -8, 7)           lower plane, stored as l + 8
    draft  reads  x4 = s*u + z           |x - x4| <= s/2
    target reads  x8 = s*(u + l/16) + z  |x - x8| <= s/32, <= s/16 where l clips at 7   (+ fp16 rounding of s, z)

Two codes share a byte. In a group of G tokens, row r of a plane (0 <= r < G/2) holds token r in the low
nibble and token r + G/2 in the high one, so unpacking yields two contiguous half-tiles. ``upper * 16 + lower``
is the target's one 8-bit code: ``x8 = (s/16) * (16u + l) + z``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .attention import compute_dtype
from .block_table import Groups

_Number = TypeVar("_Number", int, Tensor)

# Channels of one token that share a value scale; wider heads are split evenly.
MAX_VALUE_CHANNELS = 128
LOWER_OFFSET = 8
# Tokens that are decoded to dense ones at a time.
_DECODED_TOKENS = 8192


def num_value_groups(head_dim: int) -> int:
    """Quantization groups per token of a value head: the fewest equal parts of at most 128 channels, 0 without any."""
    parts = -(-head_dim // MAX_VALUE_CHANNELS)
    while parts and head_dim % parts:
        parts += 1
    return parts


def pack_tokens(codes: Tensor) -> Tensor:
    """Pack 4-bit codes ``(..., G, D)`` uint8 into bytes ``(..., G/2, D)``; see the module docstring for the layout."""
    low, high = codes.chunk(2, dim=-2)
    return low | (high << 4)


def unpack_tokens(plane: Tensor) -> Tensor:
    """Inverse of :func:`pack_tokens`: bytes ``(..., G/2, D)`` to codes ``(..., G, D)``, both uint8."""
    return torch.cat((plane & 15, plane >> 4), dim=-2)


def _scale_and_zero(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    # One after the other: on a CPU torch.aminmax takes three times as long as both.
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / 15).to(torch.float16)
    # A range that vanishes in fp16 has a single code, so any positive scale decodes it exactly.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, low.to(torch.float16)


def _codes(x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    s, z = scale.to(x.dtype), zero.to(x.dtype)
    # In place, since memory that is new for each step takes a CPU longer than the step.
    upper = (x - z).div_(s).round_().clamp_(0, 15)
    lower = (s * upper).add_(z).neg_().add_(x).mul_(16).div_(s).round_().clamp_(-8, 7)
    return upper.to(torch.uint8), lower.add_(LOWER_OFFSET).to(torch.uint8)


def encode_keys(keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encode whole groups of keys, one scale per channel and group (QuantSpec, arXiv 2502.10424, section 4.2).

    ``s = (max - min) / 15`` and ``z = min`` of a channel, ``u = clamp(round((x - z) / s), 0, 15)`` in the upper plane,
    ``l = clamp(round((x - (s*u + z)) * 16 / s), -8, 7)`` in the lower one, as ``l + 8``.

    Args:
        keys: ``(..., G, D)`` any float dtype; coded in float32, or float64 for float64 input.

    Returns:
        ``upper, lower``: ``(..., G/2, D)`` uint8, row r with token r in the low nibble and token r + G/2 in the high
        one; ``scale, zero``: ``(..., D)`` float16.
    """
    x = keys if keys.dtype == torch.float64 else keys.float()
    scale, zero = _scale_and_zero(x, dim=-2)
    upper, lower = _codes(x, scale, zero)
    return pack_tokens(upper), pack_tokens(lower), scale.squeeze(-2), zero.squeeze(-2)


def encode_values(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encode whole groups of values as :func:`encode_keys` does, but with one scale per token and at most 128 channels.

    Args:
        values: ``(..., G, D)`` any float dtype; coded in float32, or float64 for float64 input.

    Returns:
        ``upper, lower``: ``(..., G/2, D)`` uint8; ``scale, zero``: ``(..., G, num_value_groups(D))`` float16.
    """
    x = values if values.dtype == torch.float64 else values.float()
    groups = num_value_groups(x.shape[-1])
    x = x.unflatten(-1, (groups, x.shape[-1] // groups if groups else 1))
    scale, zero = _scale_and_zero(x, dim=-1)
    upper, lower = (codes.flatten(-2) for codes in _codes(x, scale, zero))
    return pack_tokens(upper), pack_tokens(lower), scale.squeeze(-1), zero.squeeze(-1)


def _code_values(upper: Tensor, lower: Tensor | None, dtype: torch.dtype) -> Tensor:
    codes = unpack_tokens(upper).to(dtype)
    if lower is not None:
        codes += unpack_tokens(lower).to(dtype).sub_(LOWER_OFFSET).div_(16)
    return codes


def decode_keys(upper: Tensor, lower: Tensor | None, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode what :func:`encode_keys` made: ``s*(u + l/16) + z``, or ``s*u + z`` without ``lower``.

    Args:
        upper: ``(..., G/2, D)`` uint8.
        lower: as ``upper``; None for the draft's 4-bit view.
        scale, zero: ``(..., D)`` float16.
        dtype: of the result, in which it is computed.

    Returns:
        Keys ``(..., G, D)`` in ``dtype``.
    """
    codes = _code_values(upper, lower, dtype)
    return codes.mul_(scale.to(dtype).unsqueeze(-2)).add_(zero.to(dtype).unsqueeze(-2))


def decode_values(upper: Tensor, lower: Tensor | None, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode what :func:`encode_values` made: ``s*(u + l/16) + z``, or ``s*u + z`` without ``lower``.

    Args:
        upper: ``(..., G/2, D)`` uint8.
        lower: as ``upper``; None for the draft's 4-bit view.
        scale, zero: ``(..., G, num_value_groups(D))`` float16.
        dtype: of the result, in which it is computed.

    Returns:
        Values ``(..., G, D)`` in ``dtype``.
    """
    codes = _code_values(upper, lower, dtype).unflatten(-1, (scale.shape[-1], -1))
    return codes.mul_(scale.to(dtype).unsqueeze(-1)).add_(zero.to(dtype).unsqueeze(-1)).flatten(-2)


def num_flushed_groups(unquantized: _Number, group_size: int) -> _Number:
    """Groups to quantize out of ``unquantized`` recent tokens so that fewer than 2G remain and at least G stay."""
    excess = unquantized // group_size - 1
    return excess.clamp(min=0) if isinstance(excess, Tensor) else max(0, excess)


def write_groups(
    tokens: Tensor, groups: Groups, encode, upper: Tensor, lower: Tensor, scale: Tensor, zero: Tensor
) -> None:
    """Encode ``(K, n*G, D)`` tokens of one sequence into n ``groups`` of the planes, in place."""
    if tokens.numel() == 0:
        return
    coded = encode(tokens.unflatten(1, (-1, 2 * upper.shape[-2])))
    for part, new in zip((upper, lower, scale, zero), coded, strict=True):
        part[groups.row][:, groups.places] = new


def dense_key_value(
    quantized_len: int,
    length: int,
    dtype: torch.dtype,
    k_upper: Tensor,
    k_lower: Tensor | None,
    k_scale: Tensor,
    k_zero: Tensor,
    v_upper: Tensor,
    v_lower: Tensor | None,
    v_scale: Tensor,
    v_zero: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
) -> tuple[Tensor, Tensor]:
    """The first ``length`` cached tokens of one sequence (no batch axis) as dense ``(K, length, D)`` tensors.

    Values that are in the keys have no channels, see :func:`stored_values`.
    Decoded in float32 at least, some groups at a time, so that little more memory is taken than the result's.
    """
    keys = _dense(decode_keys, (k_upper, k_lower, k_scale, k_zero), k_recent, quantized_len, length, dtype)
    values = _dense(decode_values, (v_upper, v_lower, v_scale, v_zero), v_recent, quantized_len, length, dtype)
    return keys, values


def stored_values(values: Tensor, keys: Tensor, value_dim: int) -> Tensor:
    """``values (..., D)``, or where none are stored by themselves the first ``value_dim`` channels of ``keys``."""
    return values if values.shape[-1] else keys[..., :value_dim]


def _dense(
    decode: Callable[..., Tensor],
    planes: tuple[Tensor, Tensor | None, Tensor, Tensor],
    recent: Tensor,
    quantized_len: int,
    length: int,
    dtype: torch.dtype,
) -> Tensor:
    out = recent.new_empty(recent.shape[0], length, recent.shape[2], dtype=dtype)
    if out.numel() == 0:
        return out
    group_size = 2 * planes[0].shape[-2]
    step = max(1, _DECODED_TOKENS // group_size) * group_size
    for start in range(0, quantized_len, step):
        end = min(start + step, quantized_len)
        groups = slice(start // group_size, end // group_size)
        part = [None if plane is None else plane[:, groups] for plane in planes]
        out[:, start:end] = decode(*part, compute_dtype(dtype)).flatten(1, 2)
    out[:, quantized_len:] = recent[:, : length - quantized_len]
    return out
