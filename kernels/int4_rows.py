"""The kernel of ``int4_linear`` for 2 to 64 rows, which reads the codes once for 16 of them.

Per group of k it forms

    y[m, n] += scale[n] * sum_k (code[n, k] - 8) x[m, k] + zero[n] * sum_k x[m, k]

on tensor cores with codes and ones as operands, so that codes are all it converts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inline_asm import (
    K_WIDTH,
    activated,
    biased_quarters,
    exact_dot,
    load_inside,
    nibble_bias,
    ones_like,
    split_pair,
)
from .int4_outputs import norm_factor, store_outputs
from .optional_triton import gdc_launch_dependents, gdc_wait, tl, triton

# Most tiles of eight rows that one program multiplies; more take more registers than it has.
_ROW_TILES = 2


@triton.jit
def _row_of(place, first, N, ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr):
    """Row of the weight at a place of a program's tiles, whose outputs begin at ``first``.

    With an activation eight gates and the eight factors of the same outputs alternate, so that one thread has both.
    """
    if ACTIVATION == "":
        return first + place
    else:
        in_second = (place // 8 % 2 == 1) == GATE_FIRST
        return first + place // 16 * 8 + place % 8 + tl.where(in_second, N // 2, 0)


@triton.jit
def _numbers(
    sz_at,
    sz_n,
    inside,
    wanted,
    N,
    OFFSET: tl.constexpr,
    EVEN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scales with zeros of the tile that begins ``OFFSET`` outputs on."""
    if EVEN:
        return load_inside(sz_at + OFFSET, wanted, not MASKED)
    else:
        return tl.load(sz_at + OFFSET, (sz_n + OFFSET < N) & inside & wanted, other=0)


@triton.jit
def _weights(
    w_at,
    scale_and_zero,
    sz_chunk,
    sz_n,
    n,
    w_chunk,
    first,
    N,
    wanted,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    ALL_CHUNKS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Codes, and scales with zeros, of the step whose chunks begin at ``first``; nothing unless ``wanted``."""
    WORDS: tl.constexpr = CHUNK // 32
    EVEN: tl.constexpr = EVEN_N and EVEN_K
    # Vectors follow the last axis; hints on the first only break a tie, so that neighbouring threads differ in c.
    w_step = tl.max_contiguous(w_at + first * (CHUNK // 4), [WORDS, 1, 2 * WORDS])
    sz_at = scale_and_zero + (first + sz_chunk) * CHUNK // GROUP * N + sz_n
    if EVEN:
        w = load_inside(w_step, wanted, not MASKED)
    else:
        w = tl.load(w_step, (n < N) & (first + w_chunk < ALL_CHUNKS) & wanted, other=0)
    inside = first + sz_chunk < ALL_CHUNKS
    sz = _numbers(sz_at, sz_n, inside, wanted, N, 0, EVEN, MASKED)
    # Tile by tile: more than 16 at once would not come in the product's layout.
    if TILES == 2:
        sz1 = _numbers(sz_at, sz_n, inside, wanted, N, TILE_OUTPUTS, EVEN, MASKED)
        sz = tl.reshape(tl.permute(tl.join(sz, sz1), (0, 3, 1, 2)), (sz_chunk.shape[0], 32, 1))
    elif TILES == 4:
        sz1 = _numbers(sz_at, sz_n, inside, wanted, N, TILE_OUTPUTS, EVEN, MASKED)
        sz2 = _numbers(sz_at, sz_n, inside, wanted, N, 2 * TILE_OUTPUTS, EVEN, MASKED)
        sz3 = _numbers(sz_at, sz_n, inside, wanted, N, 3 * TILE_OUTPUTS, EVEN, MASKED)
        sz = tl.join(tl.join(sz, sz2), tl.join(sz1, sz3))
        sz = tl.reshape(tl.permute(sz, (0, 3, 4, 1, 2)), (sz_chunk.shape[0], 64, 1))
    return w, sz


@triton.jit
def _inputs(
    x_at,
    m,
    x_chunk,
    first,
    num_rows,
    wanted,
    CHUNK: tl.constexpr,
    ALL_CHUNKS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Inputs of the step whose chunks begin at ``first``; nothing unless ``wanted``."""
    x_step = tl.max_contiguous(x_at + first * CHUNK, [2, 1, 8])
    inside = (m < num_rows) & wanted
    if EVEN_K:
        return tl.load(x_step, inside)  # other rows may hold anything: their results are not stored
    else:
        return tl.load(x_step, inside & (first + x_chunk < ALL_CHUNKS), other=0)


@triton.jit
def _add_step(
    acc,
    w,
    sz,
    xx,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    ROW_TILES: tl.constexpr,
    K_WIDTH: tl.constexpr,
    dtype: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """``acc`` and the products of one step."""
    CHUNKS: tl.constexpr = acc.shape[0]
    WORDS: tl.constexpr = CHUNK // 32
    q0, q1, q2, q3 = biased_quarters(w, dtype, USE_ASM)
    q = tl.join(tl.join(q0, q2), tl.join(q1, q3))  # p = 2 p1 + p0, axes (p1, p0)
    q = tl.reshape(q, (4, 2 * TILES, CHUNKS, 8, WORDS, 2, 2, 2))  # c, n / 8, chunk, n % 8, i, h, p1, p0
    xx = tl.reshape(xx, (4, ROW_TILES, WORDS, CHUNKS, 8, 2, 2, 2))  # c, m / 8, i, chunk, m % 8, h, p1, p0
    if K_WIDTH == 4:  # k is (p1, i, c, p0, h)
        q = tl.permute(q, (2, 1, 3, 6, 4, 0, 7, 5))
        xx = tl.permute(xx, (3, 6, 2, 0, 7, 5, 1, 4))
    else:  # k is (p1, i, p0, c, h)
        q = tl.permute(q, (2, 1, 3, 6, 4, 7, 0, 5))
        xx = tl.permute(xx, (3, 6, 2, 7, 0, 5, 1, 4))
    q = tl.reshape(q, (CHUNKS, 16 * TILES, CHUNK))
    xx = tl.reshape(xx, (CHUNKS, CHUNK, 8 * ROW_TILES))
    product = exact_dot(q, xx, USE_ASM)
    total = exact_dot(ones_like(q, USE_ASM), xx, USE_ASM)
    scale, zero = split_pair(sz, dtype)
    # Taking the bias out here is cheaper than from every code.
    scale = scale.to(tl.float32)
    return acc + scale * product + (zero.to(tl.float32) - (nibble_bias(dtype) + 8) * scale) * total


@triton.jit
def _linear_kernel(
    x,
    qdata,
    scale_and_zero,
    bias,
    residual,
    norm_weight,
    squares,
    out,
    scaled,
    new_squares,
    num_rows,
    eps,
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
    ROW_TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    UNROLL: tl.constexpr,
    EARLY: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    TO_NORM: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    K_WIDTH: tl.constexpr,
    dtype: tl.constexpr,
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """``16 * TILES`` outputs of ``8 * ROW_TILES`` rows over one split of K; each step takes one chunk per warp.

    ``x`` is (num_rows, K), ``qdata`` (N, K/4) uint16, ``scale_and_zero`` (K/GROUP, N) int32 pairs. A chunk is ``CHUNK``
    codes of one group. What a thread loads is its own share of the product's operands, so nothing passes through shared
    memory: thread c of four loads k = (c, i, h, p), which is nibble p of halfword h of its word i, and the product sums
    over k in the order in which a thread holds ``K_WIDTH`` neighbours.

    ``EARLY`` steps of weights, all or one, are loaded before the kernels in front end. Of several splits ``out`` is
    float32 ``(SPLITS, num_rows, N)``, and what follows the sum is another kernel's.
    """
    WORDS: tl.constexpr = CHUNK // 32
    N_TILES: tl.constexpr = 2 * TILES
    BLOCK_N: tl.constexpr = 8 * N_TILES
    BLOCK_M: tl.constexpr = 8 * ROW_TILES
    ALL_CHUNKS: tl.constexpr = K // CHUNK
    EVEN_K: tl.constexpr = SPLITS * STEPS * CHUNKS == ALL_CHUNKS
    GATED: tl.constexpr = ACTIVATION != ""
    TILE_OUTPUTS: tl.constexpr = 8 if GATED else 16
    # Neighbouring programs take blocks of rows of the same outputs: all but the first find the codes in the cache.
    first_n = tl.program_id(0) // ROW_BLOCKS * (TILES * TILE_OUTPUTS)
    first_m = tl.program_id(0) % ROW_BLOCKS * BLOCK_M
    c = tl.arange(0, 4)[:, None, None]
    # Rows of the loads are (n / 8, chunk, n % 8) and (m / 8, i, chunk, m % 8): warps share out the chunks.
    r = tl.arange(0, N_TILES * CHUNKS * 8)[None, :, None]
    n = _row_of(r // (8 * CHUNKS) * 8 + r % 8, first_n, N, ACTIVATION, GATE_FIRST)
    w_chunk = r // 8 % CHUNKS
    w_at = (
        qdata
        + n.to(tl.int64) * (K // 4)
        + w_chunk * (CHUNK // 4)
        + c * (2 * WORDS)
        + tl.arange(0, 2 * WORDS)[None, None, :]
    )
    r = tl.arange(0, ROW_TILES * WORDS * CHUNKS * 8)[None, :, None]
    m = first_m + r // (8 * CHUNKS * WORDS) * 8 + r % 8
    x_chunk = r // 8 % CHUNKS
    x_at = (
        x + m * K + x_chunk * CHUNK + c * (8 * WORDS) + r // (8 * CHUNKS) % WORDS * 8 + tl.arange(0, 8)[None, None, :]
    )
    sz_chunk = tl.arange(0, CHUNKS)[:, None, None]
    sz_n = _row_of(tl.arange(0, 16)[None, :, None], first_n, N, ACTIVATION, GATE_FIRST)
    start = tl.program_id(1) * STEPS * CHUNKS
    acc = tl.zeros((CHUNKS, BLOCK_N, BLOCK_M), tl.float32)
    if PDL:
        # No kernel writes weights: the next one may load its own while this one ends.
        gdc_launch_dependents()
    loaded = ()
    for step in tl.static_range(EARLY):
        loaded = loaded + _weights(
            w_at,
            scale_and_zero,
            sz_chunk,
            sz_n,
            n,
            w_chunk,
            start + step * CHUNKS,
            N,
            True,
            CHUNK,
            GROUP,
            TILES,
            TILE_OUTPUTS,
            ALL_CHUNKS,
            EVEN_N,
            EVEN_K,
            False,
        )
    if PDL:
        # Kernels before this one may still be writing x or reading what out reuses: touch neither earlier.
        gdc_wait()
    row = first_m + tl.arange(0, BLOCK_M)[None, :]
    norm = norm_factor(squares, row, num_rows, K, eps, PARTS if SPLITS == 1 else 0, PADDED_PARTS)
    # Inputs, too, are on their way a step ahead: each step would wait for them.
    next_x = _inputs(x_at, m, x_chunk, start, num_rows, True, CHUNK, ALL_CHUNKS, EVEN_K)
    if EARLY == STEPS:
        for step in tl.static_range(STEPS):
            xx = next_x
            if step + 1 < STEPS:
                next_x = _inputs(
                    x_at, m, x_chunk, start + (step + 1) * CHUNKS, num_rows, True, CHUNK, ALL_CHUNKS, EVEN_K
                )
            acc = _add_step(
                acc,
                loaded[2 * step],
                loaded[2 * step + 1],
                xx,
                CHUNK,
                TILES,
                ROW_TILES,
                K_WIDTH,
                dtype,
                USE_ASM,
            )
    elif EARLY == 1:
        w, sz = loaded  # type: ignore[misc]
        for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
            first = start + step * CHUNKS
            xx = next_x
            next_x = _inputs(x_at, m, x_chunk, first + CHUNKS, num_rows, step + 1 < STEPS, CHUNK, ALL_CHUNKS, EVEN_K)
            next_w, next_sz = _weights(
                w_at,
                scale_and_zero,
                sz_chunk,
                sz_n,
                n,
                w_chunk,
                first + CHUNKS,
                N,
                step + 1 < STEPS,
                CHUNK,
                GROUP,
                TILES,
                TILE_OUTPUTS,
                ALL_CHUNKS,
                EVEN_N,
                EVEN_K,
                True,
            )
            acc = _add_step(
                acc,
                w,
                sz,
                xx,
                CHUNK,
                TILES,
                ROW_TILES,
                K_WIDTH,
                dtype,
                USE_ASM,
            )
            w, sz = next_w, next_sz
    else:
        for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
            first = start + step * CHUNKS
            xx = next_x
            next_x = _inputs(x_at, m, x_chunk, first + CHUNKS, num_rows, step + 1 < STEPS, CHUNK, ALL_CHUNKS, EVEN_K)
            w, sz = _weights(
                w_at,
                scale_and_zero,
                sz_chunk,
                sz_n,
                n,
                w_chunk,
                first,
                N,
                True,
                CHUNK,
                GROUP,
                TILES,
                TILE_OUTPUTS,
                ALL_CHUNKS,
                EVEN_N,
                EVEN_K,
                False,
            )
            acc = _add_step(
                acc,
                w,
                sz,
                xx,
                CHUNK,
                TILES,
                ROW_TILES,
                K_WIDTH,
                dtype,
                USE_ASM,
            )
    y = tl.sum(acc, 0)
    n = _row_of(tl.arange(0, BLOCK_N)[:, None], first_n, N, ACTIVATION, GATE_FIRST)
    if SPLITS > 1:
        tl.store(out + (tl.program_id(1) * num_rows + row) * N + n, y, (row < num_rows) & (n < N))
    else:
        y *= norm
        if HAS_BIAS:
            y += tl.load(bias + n, n < N, other=0).to(tl.float32)
        if GATED:
            y = tl.permute(tl.reshape(y, (TILES, 2, 8, BLOCK_M)), (0, 2, 3, 1))
            gate, factor = tl.split(tl.reshape(y, (8 * TILES, BLOCK_M, 2)))
            y = activated(gate, ACTIVATION) * factor
            N = N // 2
            n = first_n + tl.arange(0, 8 * TILES)[:, None]
        store_outputs(
            y,
            n,
            row,
            first_n,
            num_rows,
            N,
            residual,
            norm_weight,
            out,
            scaled,
            new_squares,
            HAS_RESIDUAL,
            TO_NORM,
            dtype,
        )


@triton.jit
def _sum_splits_kernel(
    partial,
    bias,
    residual,
    norm_weight,
    squares,
    out,
    scaled,
    new_squares,
    num_rows,
    eps,
    N,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    TO_NORM: tl.constexpr,
    dtype: tl.constexpr,
    PDL: tl.constexpr,
):
    """``BLOCK`` outputs of one row from the sums of its splits, ``partial (SPLITS, num_rows, N)``."""
    n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    row = tl.full((1, 1), 0, tl.int32) + tl.program_id(1)
    y = tl.zeros((BLOCK, 1), tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for split in tl.static_range(SPLITS):
        y += tl.load(partial + (split * num_rows + row) * N + n, n < N, other=0)
    y *= norm_factor(squares, row, num_rows, K, eps, PARTS, PADDED_PARTS)
    if HAS_BIAS:
        y += tl.load(bias + n, n < N, other=0).to(tl.float32)
    first = tl.program_id(0) * BLOCK
    store_outputs(
        y, n, row, first, num_rows, N, residual, norm_weight, out, scaled, new_squares, HAS_RESIDUAL, TO_NORM, dtype
    )


class LinearConfig(NamedTuple):
    """Launch of one shape: tiles of 16 rows of the weight, warps (one chunk each), splits of K, unrolled steps, and
    steps loaded before the kernels in front end: none, one, or all."""

    tiles: int
    warps: int
    splits: int
    unroll: int
    early: int


_ALL_STEPS = 1 << 30


@lru_cache
def linear_config(rows: int, out_features: int, in_features: int, group: int, gated: bool) -> LinearConfig:
    """Configuration by shape, chosen on an H100, for groups of 128 and more again on an H200 at 8 and 16 rows.

    ``share`` is what the outputs alone leave of the chunks that a GPU can have in flight: K is split so often, or
    walked by more warps. Few outputs of few inputs fit into registers, all loaded early. Smaller chunks are loaded
    further ahead. Rows beyond 8 take several tiles per program, which read x less often. Gates and factors are not
    split: what follows them takes whole sums.
    """
    outputs, chunks = triton.cdiv(out_features, 16), in_features // min(group, 128)
    share = 4 if outputs <= 256 else 2 if outputs <= 512 else 1
    splits = 1 if gated else min(share, max(1, in_features // 1024))
    if group >= 128 and chunks >= 8:
        if rows > 8:
            if share == 4:
                wide = in_features > 4096 and splits == 4
                if wide and outputs > 128:
                    return LinearConfig(4, 4, 4, 1, 0)
                return LinearConfig(1 if wide and rows <= 16 else 2, 4, min(2, splits), 1, 1)
            if share == 2:
                return LinearConfig(4, 4, min(2, splits), 1, 1)
            return LinearConfig(4, 1 if outputs > 4096 else 2, 1, 2, 0)
        if share == 4:
            return LinearConfig(1, 4, 1, 1, _ALL_STEPS) if in_features <= 4096 else LinearConfig(2, 4, splits, 1, 1)
        if share == 2:
            return LinearConfig(2, 4, 1, 1, _ALL_STEPS) if in_features <= 4096 else LinearConfig(1, 8, 1, 1, 0)
        # A language-model head has programs enough.
        return LinearConfig(2, 2, 1, 2, 0) if outputs > 4096 else LinearConfig(2, 2, 1, 1, 1)
    if rows > 8:
        return LinearConfig(2, 2, splits, 2, 0)
    if share == 1:
        return LinearConfig(2, 4 if outputs > 1024 else 8, 1, 2, 0) if group == 32 else LinearConfig(1, 4, 1, 2, 0)
    if group == 32:
        return LinearConfig(1, 4, 1 if gated else min(4, 2 * splits), 2, 0)
    if in_features > 8192 and chunks % (4 * splits):
        # Splits would end in half-empty steps.
        return LinearConfig(1, 8, 1, 2, 0)
    return LinearConfig(1, 4, splits, 1 if share == 4 else 2, 0)


def launch_rows(
    x: Tensor,
    qdata: Tensor,
    scale_and_zero: Tensor,
    around: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    eps: float,
    options: dict[str, Any],
    of_weights: dict[str, Any],
) -> None:
    """Launch the kernel, and where it splits K the sum of the parts, with the same ``options``.

    The tensors are as :func:`_linear_kernel` takes them, ``around`` from ``bias`` on.
    """
    out_features, in_features = qdata.shape[0], x.shape[-1]
    rows = x.numel() // in_features
    gated = bool(of_weights["ACTIVATION"])
    config = linear_config(rows, out_features, in_features, of_weights["GROUP"], gated)
    width = out_features // 2 if gated else out_features
    chunk = min(of_weights["GROUP"], 128)
    steps = triton.cdiv(in_features // chunk, config.warps * config.splits)
    tile = (8 if gated else 16) * config.tiles
    row_tiles = min(triton.cdiv(rows, 8), _ROW_TILES)
    row_blocks = triton.cdiv(rows, 8 * row_tiles)
    several = config.splits > 1
    partial = x.new_empty(config.splits, rows, out_features, dtype=torch.float32) if several else results[0]
    sizes = rows, eps, out_features
    options = options | {"SPLITS": config.splits}
    _linear_kernel[(triton.cdiv(width, tile) * row_blocks, config.splits)](
        x,
        qdata,
        scale_and_zero,
        *around,
        partial,
        *results[1:],
        *sizes,
        CHUNK=chunk,
        STEPS=steps,
        CHUNKS=config.warps,
        TILES=config.tiles,
        ROW_TILES=row_tiles,
        ROW_BLOCKS=row_blocks,
        UNROLL=config.unroll,
        EARLY=min(config.early, steps),
        EVEN_N=width % tile == 0,
        K_WIDTH=K_WIDTH,
        num_warps=config.warps,
        num_stages=1,
        **of_weights,
        **options,
    )
    if several:
        grid = (triton.cdiv(out_features, 256), rows)
        _sum_splits_kernel[grid](partial, *around, *results, *sizes, BLOCK=256, **options)
