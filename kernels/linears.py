"""``quantspec::linears``: linear layers of one input over the model's own weights, as few rows as decoding has.

    y = concat_i (x W_i^T + b_i)

On CUDA, 1 to 16 rows of 16-bit floats are multiplied by a kernel that reads every weight once, at the memory's speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .current_device import on_tensors_device
from .epilogue import ACTIVATIONS
from .inline_asm import activated, exact_dot, fetch_rows, launches_overlap, use_inline_asm
from .int4_linear import _K_WIDTH, MAX_KERNEL_ROWS
from .optional_triton import gdc_launch_dependents, gdc_wait, tl, triton

# Weights of one launch.
MAX_WEIGHTS = 3


@torch.library.custom_op("quantspec::linears", mutates_args=())
def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str) -> Tensor:
    """Linear layers of one input.

    Args:
        x: ``(..., K)`` of a float dtype.
        weights: ``(N_i, K)`` each, in the dtype of ``x``.
        biases: ``(N_i,)`` each in the dtype of ``x``, or none at all.
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``: of two weights the first gives gates and the second their
            factors. Empty for none.

    Returns:
        ``(..., sum of N_i)``, or ``(..., N_1)`` with an activation, in the dtype of ``x``.
    """
    return _plain(x, weights, biases, activation)


def _plain(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str) -> Tensor:
    offsets: Sequence[Tensor | None] = biases or [None] * len(weights)
    each = [F.linear(x, weight, bias) for weight, bias in zip(weights, offsets, strict=True)]
    if activation:
        return ACTIVATIONS[activation](each[0]) * each[1]
    return torch.cat(each, -1) if len(each) > 1 else each[0]


@linears.register_fake
def _(x, weights, biases, activation):
    width = weights[0].shape[0] if activation else sum(weight.shape[0] for weight in weights)
    return x.new_empty(*x.shape[:-1], width)


@triton.jit
def _load(at, inside, EVEN: tl.constexpr):
    """Where everything is inside, no mask: a predicate per load costs time."""
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, inside, other=0)


@triton.jit
def _operands(w, K_WIDTH: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, WORDS: tl.constexpr):
    """``(c, (tile, i, chunk, row % 8), 8)`` as ``(CHUNKS, 8 * TILES rows, 32 * WORDS)``."""
    w = tl.reshape(w, (4, TILES, WORDS, CHUNKS, 8, 2, 2, 2))  # c, tile, i, chunk, row % 8, a, b, e
    # k is (a, i, c, b, e) or (a, i, b, c, e)
    w = tl.permute(w, (3, 1, 4, 5, 2, 0, 6, 7) if K_WIDTH == 4 else (3, 1, 4, 5, 2, 6, 0, 7))
    return tl.reshape(w, (CHUNKS, 8 * TILES, 32 * WORDS))


@triton.jit
def _columns(w, K_WIDTH: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, WORDS: tl.constexpr):
    """As :func:`_operands`, transposed."""
    w = tl.reshape(w, (4, TILES, WORDS, CHUNKS, 8, 2, 2, 2))
    w = tl.permute(w, (3, 5, 2, 0, 6, 7, 1, 4) if K_WIDTH == 4 else (3, 5, 2, 6, 0, 7, 1, 4))
    return tl.reshape(w, (CHUNKS, 32 * WORDS, 8 * TILES))


@triton.jit
def _linears_kernel(
    x,
    w0,
    w1,
    w2,
    b0,
    b1,
    b2,
    out,
    num_rows,
    N0,
    N1,
    N2,
    K: tl.constexpr,
    WEIGHTS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
    ROW_TILES: tl.constexpr,
    UNROLL: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    K_WIDTH: tl.constexpr,
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """``8 * TILES`` outputs of ``8 * ROW_TILES`` rows; each step takes one chunk of K per warp.

    ``x`` is (num_rows, K), weight i (N_i, K). What a thread loads is its own share of the product's operands, so
    nothing passes through shared memory; the product sums over k in the order in which a thread holds ``K_WIDTH``
    neighbours. With ``ACTIVATION`` ``w0`` are the gates and ``w1`` their factors.
    """
    WORDS: tl.constexpr = CHUNK // 32
    GATED: tl.constexpr = ACTIVATION != ""
    BLOCK_N: tl.constexpr = 8 if GATED else 8 * TILES
    BLOCK_M: tl.constexpr = 8 * ROW_TILES
    ALL_CHUNKS: tl.constexpr = K // CHUNK
    EVEN_K: tl.constexpr = STEPS * CHUNKS == ALL_CHUNKS
    STEP: tl.constexpr = CHUNKS * CHUNK
    pid = tl.program_id(0)
    w = w0
    b = b0
    N = N0
    width = N0
    first_n = pid * BLOCK_N
    column = first_n
    if not GATED and WEIGHTS > 1:
        width += N1
        if WEIGHTS > 2:
            width += N2
        tiles = tl.cdiv(N0, BLOCK_N)
        if pid >= tiles:
            pid -= tiles
            w = w1
            b = b1
            N = N1
            first_n = pid * BLOCK_N
            column = N0 + first_n
            if WEIGHTS > 2:
                tiles = tl.cdiv(N1, BLOCK_N)
                if pid >= tiles:
                    w = w2
                    b = b2
                    N = N2
                    first_n = (pid - tiles) * BLOCK_N
                    column = N0 + N1 + first_n
    w = tl.multiple_of(w, 16)
    c = tl.arange(0, 4)[:, None, None]
    word = tl.arange(0, 8)[None, None, :]
    # Rows of the loads are (n / 8, i, chunk, n % 8) and (m / 8, i, chunk, m % 8): warps share out the chunks.
    r = tl.arange(0, TILES * WORDS * CHUNKS * 8)[None, :, None]
    n = r // (8 * CHUNKS * WORDS) * 8 + r % 8
    w_chunk = r // 8 % CHUNKS
    # Of a gated tile the first eight rows are gates, the others factors.
    other = 0
    if GATED:
        other = tl.multiple_of((w1.to(tl.int64) - w0.to(tl.int64)) // 2 - 8 * K, 8)
    w_at = (
        w
        + first_n.to(tl.int64) * K
        + (n * K + w_chunk * CHUNK + r // (8 * CHUNKS) % WORDS * 32 + tl.where(n < 8, 0, other) + c * 8 + word)
    )
    n = n % 8 if GATED else n
    r = tl.arange(0, ROW_TILES * WORDS * CHUNKS * 8)[None, :, None]
    m = r // (8 * CHUNKS * WORDS) * 8 + r % 8
    x_chunk = r // 8 % CHUNKS
    x_at = x + m * K + x_chunk * CHUNK + r // (8 * CHUNKS) % WORDS * 32 + c * 8 + word
    acc = tl.zeros((CHUNKS, 8 * TILES, BLOCK_M), tl.float32)
    if PDL:
        # No kernel writes weights: the next one may load its own while this one ends.
        gdc_launch_dependents()
    lines = tl.minimum(BLOCK_N, N - first_n)
    if EARLY:
        a = _load(tl.max_contiguous(w_at, [2, 1, 8]), (n < lines) & (w_chunk < ALL_CHUNKS), EVEN_N and EVEN_K)
    if AHEAD > 0:
        fetch_rows(w + first_n.to(tl.int64) * K + EARLY * STEP, lines, K * 2, min(AHEAD * STEP, K) * 2)
        if GATED:
            fetch_rows(w1 + first_n.to(tl.int64) * K + EARLY * STEP, lines, K * 2, min(AHEAD * STEP, K) * 2)
    if PDL:
        # Kernels before this one may still be writing x or reading what out reuses: touch neither earlier.
        gdc_wait()
    for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        if AHEAD > 0:
            k = (step + EARLY + AHEAD) * STEP
            left = tl.minimum(STEP, K - k) * 2
            fetch_rows(w + first_n.to(tl.int64) * K + k, lines, K * 2, left)
            if GATED:
                fetch_rows(w1 + first_n.to(tl.int64) * K + k, lines, K * 2, left)
        # Vectors follow the last axis; hints on the first only break a tie, so that neighbouring threads differ in c.
        first = (step + EARLY) * CHUNKS
        w_step = tl.max_contiguous(w_at + first * CHUNK, [2, 1, 8])
        if EARLY:
            next_a = _load(w_step, (n < lines) & (first + w_chunk < ALL_CHUNKS) & (step + 1 < STEPS), False)
        else:
            a = _load(w_step, (n < lines) & (first + w_chunk < ALL_CHUNKS), EVEN_N and EVEN_K)
        first = step * CHUNKS
        x_step = tl.max_contiguous(x_at + first * CHUNK, [2, 1, 8])
        if EVEN_K:
            xx = tl.load(x_step, m < num_rows)  # other rows may hold anything: their results are not stored
        else:
            xx = tl.load(x_step, (m < num_rows) & (first + x_chunk < ALL_CHUNKS), other=0)
        xx = _columns(xx, K_WIDTH, ROW_TILES, CHUNKS, WORDS)
        acc += exact_dot(_operands(a, K_WIDTH, TILES, CHUNKS, WORDS), xx, USE_ASM)
        if EARLY:
            a = next_a
    y = tl.sum(acc, 0)
    row = tl.arange(0, BLOCK_M)[None, :]
    if GATED:
        y = tl.permute(tl.reshape(y, (2, 8, BLOCK_M)), (1, 2, 0))
        y, factor = tl.split(y)
    n = tl.arange(0, BLOCK_N)[:, None]
    if HAS_BIAS:
        y += tl.load(b + first_n + n, n < lines, other=0).to(tl.float32)
    if GATED:
        if HAS_BIAS:
            factor += tl.load(b1 + first_n + n, n < lines, other=0).to(tl.float32)
        y = activated(y, ACTIVATION) * factor
    inside = (row < num_rows) & (n < lines)
    at = row * width + column + n
    tl.store(out + at, y, inside)


class LinearsConfig(NamedTuple):
    """Launch of one shape: tiles of 8 outputs, warps (one chunk each), steps unrolled, steps fetched ahead into the L2
    cache, steps (0 or 1) loaded before the kernels in front end, and numbers of a chunk."""

    tiles: int
    warps: int
    unroll: int
    ahead: int
    early: int
    chunk: int


@lru_cache
def linears_config(rows: int, sizes: tuple[int, ...], in_features: int, activation: str) -> LinearsConfig | None:
    """Configuration by shape, measured on an H100; None where cuBLAS is faster."""
    if activation or 8192 < sum(sizes) < 32768:
        return None
    return LinearsConfig(2, 4, 2, 0, 0, 128) if rows > 8 else LinearsConfig(2, 8, 1, 1, 0, 128)


@linears.register_kernel("cuda")
@on_tensors_device
def linears_triton(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str) -> Tensor:
    """Launch the kernel for 1 to 16 rows of 16-bit floats where it is faster; arguments as the op's."""
    in_features = x.shape[-1]
    rows = x.numel() // in_features
    sizes = tuple(weight.shape[0] for weight in weights)
    config = None
    if 1 <= rows <= MAX_KERNEL_ROWS and x.element_size() == 2 and len(weights) <= MAX_WEIGHTS:
        config = linears_config(rows, sizes, in_features, activation)
    if config is None or in_features % config.chunk:
        return _plain(x, weights, biases, activation)
    pdl = launches_overlap(x.device)
    options = {"launch_pdl": True} if pdl else {}
    block = 8 if activation else 8 * config.tiles
    blocks = [triton.cdiv(size, block) for size in sizes]
    out = x.new_empty(*x.shape[:-1], sizes[0] if activation else sum(sizes))
    missing = MAX_WEIGHTS - len(weights)
    _linears_kernel[(blocks[0] if activation else sum(blocks),)](
        x.contiguous(),
        *(weight.contiguous() for weight in weights),
        *[weights[0]] * missing,
        *(bias.contiguous() for bias in biases),
        *[out] * (MAX_WEIGHTS - len(biases)),
        out,
        rows,
        *sizes,
        *[0] * missing,
        K=in_features,
        WEIGHTS=len(weights),
        CHUNK=config.chunk,
        STEPS=triton.cdiv(in_features // config.chunk, config.warps),
        CHUNKS=config.warps,
        TILES=config.tiles,
        ROW_TILES=triton.cdiv(rows, 8),
        UNROLL=config.unroll,
        AHEAD=config.ahead if pdl else 0,
        EARLY=config.early,
        EVEN_N=all(size % block == 0 for size in sizes),
        HAS_BIAS=bool(biases),
        ACTIVATION=activation,
        K_WIDTH=_K_WIDTH,
        USE_ASM=use_inline_asm(x.device),
        PDL=pdl,
        num_warps=config.warps,
        num_stages=1,
        **options,
    )
    return out
