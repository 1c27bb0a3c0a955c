"""Attention of a verification to the planes on tensor cores that multiply 64 rows at once (compute capability 9.0).

Four warps share a tile of 64 byte rows, 128 tokens, which is twice what two warps take otherwise. A thread decodes the
codes that it loads in vectors and multiplies them as they are: keys and values stand in its products in the order in
which threads hold them, and queries and weights, which pass through shared memory anyway, follow that order.
"""

from __future__ import annotations

from .inline_asm import centred_bytes, fast_exp2
from .optional_triton import tl, triton
from .pages import PAGE_BYTES
from .stretches_triton import (
    HIDDEN,
    WEIGHT_SHIFT,
    load_value_scales,
    normalizer,
    soft_cap,
    stored_tile,
    value_factors,
)

# Byte rows of a tile.
WIDE_ROWS = 64
_PAGE = tl.constexpr(PAGE_BYTES)
# Channels of keys that are multiplied at a time: 64 bytes of a row keep four threads apart in shared memory.
_PIECE = tl.constexpr(64)


@triton.jit
def _by_thread(x):
    """Columns (c, i, p, h) of ``x (R, C)`` as (i, p, c, h): thread c of four holds pairs h of neighbours."""
    x = tl.permute(tl.reshape(x, (x.shape[0], 4, x.shape[1] // 16, 2, 2)), (0, 2, 3, 1, 4))
    return tl.reshape(x, (x.shape[0], 16 * x.shape[1]))


@triton.jit
def _by_row(row, ROWS: tl.constexpr):
    """Which of ``ROWS`` stands in a row of what :func:`_by_thread` orders."""
    return row // 2 % 4 * (ROWS // 4) + row // 16 * 4 + row // 8 % 2 * 2 + row % 2


@triton.jit
def _queries(q_t, FIRST: tl.constexpr):
    """Channels ``FIRST`` to ``FIRST + 64`` of ``q_t (D, rows)`` in the order of keys."""
    D: tl.constexpr = q_t.shape[0]
    R: tl.constexpr = q_t.shape[1]
    if D > _PIECE:
        first, second = tl.split(tl.permute(tl.reshape(q_t, (2, _PIECE, R)), (1, 2, 0)))
        q_t = first if FIRST == 0 else second
    q_t = tl.reshape(q_t, (4, _PIECE // 16, 2, 2, R))
    return tl.reshape(tl.permute(q_t, (1, 2, 0, 3, 4)), (_PIECE, R))


@triton.jit
def attend_wide(
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
    stride_v_channel,
    first_tile,
    last_tile,
    num_bytes,
    oldest,
    scale_log2,
    softcap_log2,
    tile_tops,
    tops_stride,
    real,
    D: tl.constexpr,
    SCALES: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCORES: tl.constexpr,
    PAGED: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Attend from the columns of ``q_t (D, rows)`` float16 to both planes of tiles of ``TILE`` bytes of one group each.

    Keys of position <= ``oldest`` of a column are hidden from it. Neighbouring rows of value planes are adjacent.
    Returns the normalized outputs ``(D, rows)`` and the log2-sum-exp2. With ``SCORES`` the highest score of every page,
    the logarithm of the token's value scale included, is stored at ``tile_tops``, ``tops_stride`` apart from page to
    page, for each column that is ``real``.
    """
    ROWS: tl.constexpr = q_t.shape[1]
    PAGES: tl.constexpr = TILE // _PAGE
    step: tl.constexpr = 0.0625
    c = tl.arange(0, D)
    d = tl.arange(0, _PIECE)
    # Tokens stand in the scores as weights are multiplied with values.
    row_of = _by_row(tl.arange(0, TILE), TILE)
    top = tl.full((ROWS,), HIDDEN, tl.float32)
    norm = tl.zeros((TILE, ROWS), tl.float32)
    offset = norm
    acc = tl.zeros((D, ROWS), tl.float32)
    queries = ()
    for piece in tl.static_range(D // _PIECE):
        queries += (_queries(q_t, piece * _PIECE),)  # type: ignore[assignment]
    next_stored = stored_tile(table, first_tile, num_bytes, places, HALF, TILE, HAS_WINDOW, PAGED)
    next_scales = load_value_scales(
        v_scale, v_zero, next_stored, (first_tile * TILE + row_of)[:, None], num_bytes, SCALES, HALF
    )
    for tile in range(first_tile, last_tile):
        vs_low, vs_high, vz_low, vz_high = next_scales
        stored = next_stored
        # Scales are too small for the compiler to pipeline them; without this each tile waits for its own.
        next_stored = stored_tile(table, tile + 1, num_bytes, places, HALF, TILE, HAS_WINDOW, PAGED)
        if not SCORES:
            next_scales = load_value_scales(
                v_scale, v_zero, next_stored, ((tile + 1) * TILE + row_of)[:, None], num_bytes, SCALES, HALF
            )
        first_row = tile % (HALF // TILE) * TILE
        s_low = tl.zeros((TILE, ROWS), tl.float32)
        s_high = s_low
        for piece in tl.static_range(D // _PIECE):
            scale_at = stored * D + piece * _PIECE + d[None, :]
            k_at = (stored * HALF + first_row + row_of)[:, None] * D + piece * _PIECE + d[None, :]
            k_low, k_high = centred_bytes(tl.load(k_upper + k_at), tl.load(k_lower + k_at), tl.float16, USE_ASM)
            ks = tl.load(k_scale + scale_at)
            kz = tl.load(k_zero + scale_at) + 8 * ks
            ks = ks * step
            s_low = tl.dot(_by_thread(k_low * ks + kz), queries[piece], s_low)
            s_high = tl.dot(_by_thread(k_high * ks + kz), queries[piece], s_high)
        s_low *= scale_log2
        s_high *= scale_log2
        if HAS_SOFTCAP:
            s_low = soft_cap(s_low, softcap_log2, USE_ASM)
            s_high = soft_cap(s_high, softcap_log2, USE_ASM)
        if HAS_WINDOW:
            token = (tile // (HALF // TILE) * (2 * HALF) + first_row + row_of)[:, None]
            s_low = tl.where(token > oldest[None, :], s_low, HIDDEN)
            s_high = tl.where(token + HALF > oldest[None, :], s_high, HIDDEN)
        log_low, r_low, z_low = value_factors(vs_low, vz_low, step, USE_ASM)
        log_high, r_high, z_high = value_factors(vs_high, vz_high, step, USE_ASM)
        y_low = s_low + log_low
        y_high = s_high + log_high
        best = tl.maximum(y_low, y_high)
        if SCORES:
            # Byte rows of a page have the higher bits of c in common; one reduction takes the fewest exchanges.
            best = tl.permute(tl.reshape(best, (TILE // 8, PAGES, 8 // PAGES, ROWS)), (1, 0, 2, 3))
            best = tl.max(tl.reshape(best, (PAGES, TILE // PAGES, ROWS)), 1)
            page = tile * PAGES + tl.arange(0, PAGES)
            at = page.to(tl.int64)[:, None] * tops_stride + tl.arange(0, ROWS)[None, :]
            tl.store(tile_tops + at, best, real[None, :])
        new_top = tl.maximum(top, tl.max(best, 0))
        decay = fast_exp2(top - new_top, USE_ASM)[None, :]
        top = new_top
        shifted = (top - WEIGHT_SHIFT)[None, :]
        w_low = fast_exp2(y_low - shifted, USE_ASM)
        w_high = fast_exp2(y_high - shifted, USE_ASM)
        if HAS_WINDOW:
            w_low = tl.where(s_low > HIDDEN, w_low, 0)
            w_high = tl.where(s_high > HIDDEN, w_high, 0)
        if SCORES:
            # Beside scores, keys' loads from shared memory would wait for these if they were on their way before.
            next_scales = load_value_scales(
                v_scale, v_zero, next_stored, ((tile + 1) * TILE + row_of)[:, None], num_bytes, SCALES, HALF
            )
        norm = norm * decay + w_low * r_low + w_high * r_high
        offset = offset * decay + w_low * z_low + w_high * z_high
        v_at = stored * stride_v_group + (first_row + tl.arange(0, TILE))[None, :] + c[:, None] * stride_v_channel
        v_low, v_high = centred_bytes(tl.load(v_upper + v_at), tl.load(v_lower + v_at), tl.float16, USE_ASM)
        acc = tl.dot(_by_thread(v_low), w_low.to(tl.float16), acc * decay)
        acc = tl.dot(_by_thread(v_high), w_high.to(tl.float16), acc)
    # The compiler adds in another order where there are scores; in float64 the sum is the same.
    inverse, lse = normalizer(norm.to(tl.float64), top)
    return (acc + tl.sum(offset.to(tl.float64), 0).to(tl.float32)[None, :]) * inverse, lse
