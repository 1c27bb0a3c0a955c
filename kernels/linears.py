"""``quantspec::linears``: linear layers of one input over the model's own weights, as few rows as decoding has.

    y = concat_i (x W_i^T + b_i)

On CUDA, 1 to 16 rows of 16-bit floats are multiplied by a kernel that reads every weight once, at the memory's speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .current_device import on_tensors_device
from .inline_asm import activated, exact_dot, fetch_rows, launches_overlap, use_inline_asm
from .int4_linear import _K_WIDTH
from .optional_triton import gdc_launch_dependents, gdc_wait, tl, triton


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
    if K_WIDTH == 4:  # k is (a, i, c, b, e)
        w = tl.permute(w, (3, 1, 4, 5, 2, 0, 6, 7))
    else:  # k is (a, i, b, c, e)
        w = tl.permute(w, (3, 1, 4, 5, 2, 6, 0, 7))
    return tl.reshape(w, (CHUNKS, 8 * TILES, 32 * WORDS))


@triton.jit
def _columns(w, K_WIDTH: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, WORDS: tl.constexpr):
    """As :func:`_operands`, transposed."""
    w = tl.reshape(w, (4, TILES, WORDS, CHUNKS, 8, 2, 2, 2))
    if K_WIDTH == 4:
        w = tl.permute(w, (3, 5, 2, 0, 6, 7, 1, 4))
    else:
        w = tl.permute(w, (3, 5, 2, 6, 0, 7, 1, 4))
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
    residual,
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
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    K_WIDTH: tl.constexpr,
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """``8 * TILES`` outputs of ``8 * ROW_TILES`` rows; each step takes one chunk of K per warp.

    ``x`` is (num_rows, K), weight i (N_i, K). What a thread loads is its own share of the product's operands, so nothing
    passes through shared memory; the product sums over k in the order in which a thread holds ``K_WIDTH`` neighbours.
    With ``ACTIVATION`` ``w0`` are the gates and ``w1`` their factors.
    """
    WORDS: tl.constexpr = CHUNK // 32
    BLOCK_N: tl.constexpr = 8 * TILES
    BLOCK_M: tl.constexpr = 8 * ROW_TILES
    ALL_CHUNKS: tl.constexpr = K // CHUNK
    EVEN_K: tl.constexpr = STEPS * CHUNKS == ALL_CHUNKS
    STEP: tl.constexpr = CHUNKS * CHUNK
    GATED: tl.constexpr = ACTIVATION != ""
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
    tile = first_n.to(tl.int64) * K
    w_at = n * K + w_chunk * CHUNK + r // (8 * CHUNKS) % WORDS * 32 + c * 8 + word
    r = tl.arange(0, ROW_TILES * WORDS * CHUNKS * 8)[None, :, None]
    m = r // (8 * CHUNKS * WORDS) * 8 + r % 8
    x_chunk = r // 8 % CHUNKS
    x_at = x + m * K + x_chunk * CHUNK + r // (8 * CHUNKS) % WORDS * 32 + c * 8 + word
    first_acc = tl.zeros((CHUNKS, BLOCK_N, BLOCK_M), tl.float32)
    second_acc = tl.zeros((CHUNKS, BLOCK_N, BLOCK_M), tl.float32)
    if PDL:
        # Weights are nobody's output: the next kernel may begin to fetch its own, as this one does.
        gdc_launch_dependents()
    if AHEAD > 0:
        lines = tl.minimum(BLOCK_N, N - first_n)
        ahead = min(AHEAD * STEP, K) * 2
        fetch_rows(w + tile, lines, K * 2, ahead)
        if GATED:
            fetch_rows(w1 + tile, lines, K * 2, ahead)
    if PDL:
        # Kernels before this one may still be writing x or reading what out reuses: touch neither earlier.
        gdc_wait()
    for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        first = step * CHUNKS
        if AHEAD > 0 and AHEAD < STEPS:
            k = (step + AHEAD) * STEP
            left = tl.minimum(STEP, K - k) * 2
            fetch_rows(w + tile + k, lines, K * 2, left)
            if GATED:
                fetch_rows(w1 + tile + k, lines, K * 2, left)
        # Vectors follow the last axis; hints on the first only break a tie, so that neighbouring threads differ in c.
        w_step = tl.max_contiguous(w_at + first * CHUNK, [2, 1, 8])
        w_mask = (n < N - first_n) & (first + w_chunk < ALL_CHUNKS)
        a = _load(w + tile + w_step, w_mask, EVEN_N and EVEN_K)
        if GATED:
            a2 = _load(w1 + tile + w_step, w_mask, EVEN_N and EVEN_K)
        x_step = tl.max_contiguous(x_at + first * CHUNK, [2, 1, 8])
        if EVEN_K:
            xx = tl.load(x_step, m < num_rows)  # other rows may hold anything: their results are not stored
        else:
            xx = tl.load(x_step, (m < num_rows) & (first + x_chunk < ALL_CHUNKS), other=0)
        xx = _columns(xx, K_WIDTH, ROW_TILES, CHUNKS, WORDS)
        first_acc += exact_dot(_operands(a, K_WIDTH, TILES, CHUNKS, WORDS), xx, USE_ASM)
        if GATED:
            second_acc += exact_dot(_operands(a2, K_WIDTH, TILES, CHUNKS, WORDS), xx, USE_ASM)
    y = tl.sum(first_acc, 0)
    row = tl.arange(0, BLOCK_M)[None, :]
    n = tl.arange(0, BLOCK_N)[:, None]
    inside = (row < num_rows) & (n < N - first_n)
    if HAS_BIAS:
        y += tl.load(b + first_n + n, n < N - first_n, other=0).to(tl.float32)
    if GATED:
        y2 = tl.sum(second_acc, 0)
        if HAS_BIAS:
            y2 += tl.load(b1 + first_n + n, n < N - first_n, other=0).to(tl.float32)
        y = activated(y, ACTIVATION) * y2
    at = row * width + column + n
    if HAS_RESIDUAL:
        y += tl.load(residual + at, inside, other=0).to(tl.float32)
    tl.store(out + at, y, inside)


def launch(x, weights, biases, residual, activation, config):
    tiles, warps, unroll, ahead, chunk = config
    in_features = x.shape[-1]
    sizes = [weight.shape[0] for weight in weights]
    width = sizes[0] if activation else sum(sizes)
    rows = x.numel() // in_features
    pdl = launches_overlap(x.device)
    options = {"launch_pdl": True} if pdl else {}
    out = x.new_empty(*x.shape[:-1], width)
    padded = [*weights, *[weights[0]] * (3 - len(weights))]
    blocks = [triton.cdiv(size, 8 * tiles) for size in sizes]
    _linears_kernel[(blocks[0] if activation else sum(blocks),)](
        x,
        *padded,
        *([*biases, *[biases[0]] * (3 - len(weights))] if biases else [out] * 3),
        residual if residual is not None else out,
        out,
        rows,
        *[*sizes, 0, 0][:3],
        K=in_features,
        WEIGHTS=len(weights),
        CHUNK=chunk,
        STEPS=triton.cdiv(in_features // chunk, warps),
        CHUNKS=warps,
        TILES=tiles,
        ROW_TILES=triton.cdiv(rows, 8),
        UNROLL=unroll,
        AHEAD=ahead if pdl else 0,
        EVEN_N=all(size % (8 * tiles) == 0 for size in sizes),
        HAS_BIAS=bool(biases),
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        K_WIDTH=_K_WIDTH,
        USE_ASM=use_inline_asm(x.device),
        PDL=pdl,
        num_warps=warps,
        num_stages=1,
        **options,
    )
    return out
