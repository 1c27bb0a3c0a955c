"""``quantspec::cached_attention``: a few new tokens attend to the hierarchical cache (draft steps and verification).

    out[b, t, h] = sum_j p_j v_j,   p = softmax_j(softcap(scale * q[b, h, t] . k_j)),   j <= length[b] + t

where tokens ``j < quantized_len[b]`` come from the planes and the rest, the new tokens included, from the recent
buffer. With the lower planes it is the target's INT8 read (verification), without them the draft's INT4 read.

Scales are folded so that only codes are converted:

    q . (s*c + z)             = (q*s) . c + q . z          one scaled q per key group
    sum_t p_t (s_t c_t + z_t) = (p*s) . c + sum_t p_t z_t  one scaled p per value group

With tables of cosines and sines (RoPE, arXiv 2104.09864) it rotates the new tokens' queries and keys first, and caches
the rotated keys:

    x'[i] = cos[i] x[i] - sin[i] x[j]    x'[j] = cos[j] x[j] + sin[j] x[i]

for every pair of channels i < j among the first R: neighbours, or R/2 apart.

The kernels for CUDA are in ``cached_attention_triton``. A CPU reads through ``decoded_attention`` where it can.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import compute_dtype, first_visible, masked_attention, softmax_with_sinks
from .block_table import groups_of
from .cache_layout import part_names
from .cache_op import cache_op
from .hierarchical import dense_key_value, stored_values
from .pages import read_tokens

# Of a latent and its RoPE part together, on CUDA: 576 channels in half precision.
MAX_LATENT_BYTES = 1152


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """``x (B, H, T, D)`` with its first ``rotary_dim`` channels rotated, in float32 at least, and rounded once.

    ``cos``, ``sin``, ``rotary_dim`` and ``interleaved`` are those of ``quantspec::cached_attention``.
    """
    dtype = compute_dtype(x.dtype)
    rotated, rest = x[..., :rotary_dim].to(dtype), x[..., rotary_dim:]
    c, s = (table.to(dtype).unsqueeze(1) for table in (cos, sin))
    if interleaved:
        partners = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), -1).flatten(-2)
        c, s = (table.repeat_interleave(rotary_dim // table.shape[-1], -1) for table in (c, s))
    else:
        partners = torch.cat((-rotated[..., rotary_dim // 2 :], rotated[..., : rotary_dim // 2]), -1)
        c, s = (table.repeat(1, 1, 1, rotary_dim // table.shape[-1]) for table in (c, s))
    return torch.cat(((rotated * c + partners * s).to(x.dtype), rest), -1)


def append_recent(
    key: Tensor, value: Tensor, k_recent: Tensor, v_recent: Tensor, quantized_len: Tensor, length: Tensor
) -> None:
    """Write ``(B, K, T, D)`` new tokens at recent slots ``length - quantized_len`` onward, in place; values as far as
    they are stored."""
    slots = (length - quantized_len)[:, None] + torch.arange(key.shape[2], device=key.device)
    for new, recent in ((key, k_recent), (value[..., : v_recent.shape[3]], v_recent)):
        index = slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        recent.scatter_(2, index, new.to(recent.dtype))


def cached_attention_reference(
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
) -> Tensor:
    """Decode the planes to dense keys and values and attend, in float32 or, for a float64 query, float64.

    The oracle of every implementation of this op.

    Args:
        query, key, value: as in ``quantspec::cached_attention``.
        k_recent, v_recent: as there, mutated.
        k_upper, k_scale, k_zero, v_upper, v_scale, v_zero, quantized_len, length: as there.
        k_lower, v_lower: as there; both None for the draft's 4-bit read.
        scale, window, softcap, sinks: as in ``quantspec::attention``.
        cos, sin, rotary_dim, interleaved, block_table: as in ``quantspec::cached_attention``.

    Returns:
        ``(B, T, H, Dv)``, float32, or float64 for a float64 query.
    """
    if cos is not None and sin is not None:
        query, key = (rotate(x, cos, sin, rotary_dim, interleaved) for x in (query, key))
    append_recent(key, value, k_recent, v_recent, quantized_len, length)
    dtype = compute_dtype(query.dtype)
    outputs = []
    planes = (k_upper, k_lower, k_scale, k_zero, v_upper, v_lower, v_scale, v_zero)
    for b, (quantized, start) in enumerate(zip(quantized_len.tolist(), length.tolist(), strict=True)):
        oldest, last = first_visible(start, window), start + query.shape[2]
        keys, values = dense_from(oldest, last, b, quantized, dtype, planes, (k_recent, v_recent), block_table)
        values = stored_values(values, keys, value.shape[3])
        rows, offset = query[b : b + 1].to(dtype), start - oldest
        outputs.append(masked_attention(rows, keys[None], values[None], offset, scale, window, softcap, sinks))
    return torch.cat(outputs).to(query.dtype)


def dense_from(
    first: int,
    last: int,
    sequence: int,
    quantized: int,
    dtype: torch.dtype,
    planes: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor],
    recent: tuple[Tensor, Tensor],
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tokens ``first`` to ``last`` of one sequence, ``quantized`` of which are in planes, dense: ``(K, tokens, D)``.

    ``planes`` and ``recent`` are those of ``quantspec::cached_attention``.
    """
    upper, group_size = planes[0], 2 * planes[0].shape[3]
    group = min(first, quantized) // group_size
    groups, start = groups_of(upper, block_table, sequence, group, quantized // group_size), group * group_size
    row = [None if part is None else groups.of(part) for part in planes]
    dense = dense_key_value(
        quantized - start,
        last - start,
        dtype,
        *row,  # type: ignore[arg-type]
        *(part[sequence] for part in recent),
    )
    keys, values = (x[:, first - start :] for x in dense)
    return keys, values


def _group_codes(upper: Tensor, lower: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes ``(K, N, G, D)`` of ``(K, N, G/2, D)`` planes: u of the draft or 16u + (l + 8) of the target.

    Not centred as on CUDA: in float32 that is not needed, and it would be one more pass over the largest tensor.
    """
    half = upper.shape[-2]
    out = upper.new_empty(*upper.shape[:-2], 2 * half, upper.shape[-1], dtype=dtype)
    if lower is None:
        out[..., :half, :] = upper & 15
        out[..., half:, :] = upper >> 4
        return out
    out[..., :half, :] = ((upper & 15) << 4) | (lower & 15)
    out[..., half:, :] = (upper & 240) | (lower >> 4)
    return out


def _folded_scale(scale: Tensor, zero: Tensor, has_lower: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero that go with the codes of :func:`_group_codes`."""
    s, z = scale.to(dtype), zero.to(dtype)
    return (s / 16, z - s / 2) if has_lower else (s, z)


def _attend_sequence(
    query: Tensor,
    planes: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor],
    k_recent: Tensor,
    v_recent: Tensor,
    start: int,
    first_key: int,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    value_dim: int,
    read: Tensor | None = None,
) -> Tensor:
    """One sequence, scaled queries ``(K, R, T, D)`` (R query heads per KV head); returns ``(K, R, T, value_dim)``.

    ``planes`` hold the groups from position ``first_key`` on, whole; the recent buffer follows them directly. Tokens of
    the planes are hidden from a KV head where ``read (K, tokens)`` is False.
    """
    k_upper, k_lower, k_scale, k_zero, v_upper, v_lower, v_scale, v_zero = planes
    kv_heads, repeat, tokens, head_dim = query.shape
    groups, group_size = k_upper.shape[1], 2 * k_upper.shape[2]
    quantized, rows = groups * group_size, repeat * tokens
    q = query.reshape(kv_heads, 1, rows, head_dim)

    scores = q.new_empty(kv_heads, rows, quantized + k_recent.shape[1])
    if groups:
        key_s, key_z = _folded_scale(k_scale, k_zero, k_lower is not None, q.dtype)
        key_codes = _group_codes(k_upper, k_lower, q.dtype)
        grouped = (q * key_s.unsqueeze(-2)) @ key_codes.transpose(-1, -2) + q @ key_z.unsqueeze(-1)
        scores[..., :quantized] = grouped.transpose(1, 2).flatten(2)
    scores[..., quantized:] = q.squeeze(1) @ k_recent.to(q.dtype).transpose(-1, -2)

    scores = scores.view(kv_heads * repeat, tokens, -1)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if tokens > 1 or window:
        positions = first_key + torch.arange(scores.shape[-1], device=q.device)
        row_positions = start + torch.arange(tokens, device=q.device)[:, None]
        hidden = positions > row_positions
        if window:
            hidden |= positions < first_visible(row_positions, window)
        scores = scores.masked_fill(hidden, float("-inf"))
    if read is not None:
        unread = F.pad(~read, (0, k_recent.shape[1])).repeat_interleave(repeat, 0)
        scores = scores.masked_fill(unread[:, None], float("-inf"))
    probs = softmax_with_sinks(scores, sinks).view(kv_heads, rows, -1)

    out = probs[..., quantized:] @ stored_values(v_recent, k_recent, value_dim).to(q.dtype)
    if groups and v_recent.shape[-1] == 0:
        old = probs[..., :quantized].unflatten(-1, (groups, group_size)).transpose(1, 2)
        s, z, codes = (x[..., :value_dim] for x in (key_s.unsqueeze(-2), key_z.unsqueeze(-2), key_codes))
        out += ((old @ codes) * s + old.sum(-1, keepdim=True) * z).sum(1)
    elif groups:
        s, z = (x.flatten(1, 2) for x in _folded_scale(v_scale, v_zero, v_lower is not None, q.dtype))
        codes = _group_codes(v_upper, v_lower, q.dtype).flatten(1, 2).unflatten(-1, (s.shape[-1], -1))
        for part in range(s.shape[-1]):
            weighted = probs[..., :quantized] * s[:, None, :, part]
            offset = probs[..., :quantized] @ z[:, :, part, None]
            channels = slice(part * codes.shape[-1], (part + 1) * codes.shape[-1])
            out[..., channels] += weighted @ codes[:, :, part] + offset
    return out.view(kv_heads, repeat, tokens, -1)


def attend_plainly(
    query: Tensor,
    recent: tuple[Tensor, Tensor],
    planes: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor],
    quantized_len: Tensor,
    length: Tensor,
    options: tuple[float, int, float, Tensor | None],
    block_table: Tensor | None,
    value_dim: int,
    choice: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``quantspec::cached_attention`` of rotated queries whose keys and values are in the recent buffers already.

    ``choice`` are the chosen pages of ``quantspec::sparse_attention``, which alone are read then.
    """
    scale, window, softcap, sinks = options
    k_recent, v_recent = recent
    batch, heads, tokens, head_dim = query.shape
    kv_heads, group_size = k_recent.shape[1], 2 * planes[0].shape[3]
    scaled = (query.to(compute_dtype(query.dtype)) * scale).view(batch, kv_heads, -1, tokens, head_dim)
    out = query.new_empty(batch, tokens, heads, value_dim)
    for b, (quantized, start) in enumerate(zip(quantized_len.tolist(), length.tolist(), strict=True)):
        # Groups that lie wholly before every query's window are not read.
        oldest = first_visible(start, window)
        first = min(oldest, quantized) // group_size
        groups = groups_of(planes[0], block_table, b, first, quantized // group_size)
        row = tuple(None if part is None else groups.of(part) for part in planes)
        stored = slice(start + tokens - quantized)
        read = None
        if choice is not None:
            chosen, num_chosen = choice
            read = read_tokens(chosen[b], num_chosen[b], quantized, group_size)[:, first * group_size :]
        attended = _attend_sequence(
            scaled[b],
            row,  # type: ignore[arg-type]
            k_recent[b, :, stored],
            v_recent[b, :, stored],
            start,
            first * group_size,
            window,
            softcap,
            sinks,
            value_dim,
            read,
        )
        out[b] = attended.flatten(0, 1).transpose(0, 1)
    return out


@cache_op("quantspec::cached_attention", mutates_args=part_names("recent"))
def cached_attention(
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
) -> Tensor:
    """Append T new tokens to the recent buffer and attend from them to everything cached, by the hierarchical code of
    QuantSpec (arXiv 2502.10424, section 4.2).

    Args:
        query: ``(B, H, T, D)`` of a float dtype, after RoPE if there is any; token t of sequence b sits at position
            ``length[b] + t``.
        key, value: ``(B, K, T, D)`` and ``(B, K, T, Dv)`` of the new tokens, written into the recent buffer; K divides
            H.
        k_recent, v_recent: ``(B, K, R, D)`` and ``(B, K, R, Dv)`` in the model's dtype, mutated; slot r holds position
            ``quantized_len + r``.
        k_upper, k_lower: ``(B, K, N, G/2, D)`` uint8 planes; ``k_lower`` None selects the draft's 4-bit read. Group n
            is in place ``n % N``, so with a window there may be fewer places than groups.
        k_scale, k_zero: ``(B, K, N, D)`` float16.
        v_upper, v_lower: ``(B, K, N, G/2, Dv)`` uint8 planes; ``v_lower`` is None where ``k_lower`` is.
        v_scale, v_zero: ``(B, K, N, G, num_value_groups(Dv))`` float16. Where these and ``v_recent`` have no channels,
            values are the first Dv channels of the keys, as latents are.
        quantized_len, length: ``(B,)`` int64, tokens in the planes and tokens cached before this call.
        scale, window, softcap, sinks: as in ``quantspec::attention``.
        cos, sin: ``(B or 1, T, rotary_dim)``, or with half as many channels, one for each pair: factors of the rotation
            of query and key, which then come before RoPE; both None for none. It is computed in float32 (float64 for
            float64) and rounded once to the query's dtype, as torch.compile does with the model's own.
        rotary_dim: the first channels of a head, which are rotated; even.
        interleaved: whether a pair are neighbours, instead of ``rotary_dim / 2`` apart.
        block_table: ``(B, N)`` int32; then planes and scales are a pool of P blocks, ``(1, K, P, ...)``, of which
            ``block_table[b, n]`` has group n of sequence b. None, or one without elements, for planes of each
            sequence's own.

    Returns:
        ``(B, T, H, Dv)`` in the query's dtype.

    Raises:
        ValueError: on CUDA, heads of more than 512 dims (in float32 of 256 or 128, by shared memory), or latents of
            more than 576 with their RoPE part (288 in float32).
    """
    planes = (k_upper, k_lower, k_scale, k_zero, v_upper, v_lower, v_scale, v_zero)
    if cos is not None and sin is not None:
        query, key = (rotate(x, cos, sin, rotary_dim, interleaved) for x in (query, key))
    append_recent(key, value, k_recent, v_recent, quantized_len, length)
    options = (scale, window, softcap, sinks)
    recent = (k_recent, v_recent)
    return attend_plainly(query, recent, planes, quantized_len, length, options, block_table, value.shape[3])


@cached_attention.register_fake
def _(query, key, value, *cache_and_options):
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])
