"""``quantspec::linears``: linear layers of one input over the model's own weights, as few rows as decoding has.

    y = concat_i (x W_i^T + b_i)

``quantspec::gated_linears`` also multiplies the gates of an MLP with their factors.

On CUDA, 1 to 8 rows of 16-bit floats are multiplied by a kernel that reads every weight once, in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .current_device import on_tensors_device
from .epilogue import gated
from .inline_asm import K_WIDTH, activated, exact_dot, fetch_rows, launches_overlap, load_inside, use_inline_asm
from .optional_triton import FUSED, gdc_launch_dependents, gdc_wait, tl, triton
from .stretches_triton import device_limits

# Weights of one launch.
MAX_WEIGHTS = 3
# Measured on an H100 with 6 and 13 rows: at 13 cuBLAS read a head faster.
_MAX_ROWS = 8
# Numbers of a warp's share of a step.
_CHUNK = 128


@torch.library.custom_op("quantspec::linears", mutates_args=())
def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Linear layers of one input.

    Args:
        x: ``(..., K)`` of a float dtype.
        weights: ``(N_i, K)`` each, in the dtype of ``x``.
        biases: ``(N_i,)`` each in the dtype of ``x``, or none at all.

    Returns:
        ``(..., sum of N_i)`` in the dtype of ``x``.
    """
    return _plain(x, weights, biases)


def _plain(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    if len(weights) == 1:
        return F.linear(x, weights[0], *biases)
    rows = x.flatten(0, -2)
    out = x.new_empty(rows.shape[0], sum(weight.shape[0] for weight in weights))
    # Each writes its columns, so that nothing is copied.
    parts = out.split([weight.shape[0] for weight in weights], 1)
    for index, (weight, part) in enumerate(zip(weights, parts, strict=True)):
        if biases:
            torch.addmm(biases[index], rows, weight.t(), out=part)
        else:
            torch.mm(rows, weight.t(), out=part)
    return out.view(*x.shape[:-1], out.shape[1])


@linears.register_fake
def _(x, weights, biases):
    return x.new_empty(*x.shape[:-1], sum(weight.shape[0] for weight in weights))


@torch.library.custom_op("quantspec::gated_linears", mutates_args=())
def gated_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str) -> Tensor:
    """``activation(x W_0^T + b_0) * (x W_1^T + b_1)``.

    Args:
        x, weights, biases: as of :func:`linears`; two weights of one shape, the gate's first.
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.

    Returns:
        ``(..., N_0)`` in the dtype of ``x``.
    """
    return gated(_plain(x, weights, biases), activation, True)


@gated_linears.register_fake
def _(x, weights, biases, activation):
    return x.new_empty(*x.shape[:-1], weights[0].shape[0])


class LinearsConfig(NamedTuple):
    """Of a launch: tiles of eight outputs, warps, and whether weights of the next step are fetched into the cache."""

    tiles: int
    warps: int
    fetch: bool


def linears_config(sizes: Sequence[int], in_features: int, rows: int, gated: bool, processors: int) -> LinearsConfig:
    """Configuration of weights of so many outputs, for a GPU of so many multiprocessors.

    Chosen on an H200 with one and six rows, weights out of its cache, among 18 for thirteen linears of an 8B and a 70B
    shape, whole and in halves.
    """
    if gated:
        return LinearsConfig(2, 2 if sizes[0] >= 12288 and in_features <= 4096 else 4, rows > 1)
    return LinearsConfig(4, 8, False) if _fills_once(sizes, processors) else LinearsConfig(2, 8, True)


def _fills_once(sizes: Sequence[int], processors: int) -> bool:
    """Whether programs of 32 outputs keep most multiprocessors busy, each with one."""
    return processors < 2 * sum(-(-size // 32) for size in sizes) <= 2 * processors


def reads_faster(sizes: Sequence[int], in_features: int, processors: int) -> bool:
    """Whether the kernel was faster than cuBLAS: for several small ones, or one that fills the GPU once."""
    if len(sizes) > 1:
        return sum(sizes) <= 8192
    return in_features <= 8192 and _fills_once(sizes, processors)


def has_kernel_for(in_features: int) -> bool:
    """Whether the kernel multiplies inputs of this width."""
    return in_features % _CHUNK == 0


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
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FETCH: tl.constexpr,
    K_WIDTH: tl.constexpr,
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """``8 * TILES`` outputs of eight rows; each step takes one chunk of K per warp.

    ``x`` is (num_rows, K), weight i (N_i, K). What a thread loads is its own share of the product's operands, so
    nothing passes through shared memory; the product sums over k in the order in which a thread holds ``K_WIDTH``
    neighbours. With an activation a program's first tile are gates, the second the factors of the same outputs.

    Weights of the next step are fetched into the cache or, without ``FETCH``, loaded.
    """
    WORDS: tl.constexpr = CHUNK // 32
    GATED: tl.constexpr = ACTIVATION != ""
    BLOCK_N: tl.constexpr = 8 if GATED else 8 * TILES
    ALL_CHUNKS: tl.constexpr = K // CHUNK
    EVEN_K: tl.constexpr = STEPS * CHUNKS == ALL_CHUNKS
    STEP: tl.constexpr = CHUNKS * CHUNK
    pid = tl.program_id(0)
    w = w0
    b = b0
    N = N0
    first_n = pid * BLOCK_N
    column = first_n
    if WEIGHTS > 1 and not GATED:
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
    # Rows of the loads are (n / 8, i, chunk, n % 8) and (i, chunk, m): warps share out the chunks.
    r = tl.arange(0, TILES * WORDS * CHUNKS * 8)[None, :, None]
    tile = r // (8 * CHUNKS * WORDS)
    n = r % 8 if GATED else tile * 8 + r % 8
    w_chunk = r // 8 % CHUNKS
    first_w = w + first_n.to(tl.int64) * K
    w_at = first_w + n * K + w_chunk * CHUNK + r // (8 * CHUNKS) % WORDS * 32 + c * 8 + word
    if GATED:
        w_at += tile * tl.multiple_of((w1.to(tl.int64) - w0.to(tl.int64)) // 2, 8)
    r = tl.arange(0, WORDS * CHUNKS * 8)[None, :, None]
    m = r % 8
    x_chunk = r // 8 % CHUNKS
    x_at = x + m * K + x_chunk * CHUNK + r // (8 * CHUNKS) * 32 + c * 8 + word
    acc = tl.zeros((CHUNKS, 8 * TILES, 8), tl.float32)
    lines = tl.minimum(BLOCK_N, N - first_n)
    if PDL:
        # No kernel writes weights: the next one may ask for its own while this one ends, as this one does.
        gdc_launch_dependents()
    if FETCH:
        fetch_rows(first_w, lines, K * 2, min(STEP, K) * 2)
    else:
        next_w = _dense_weights(w_at, n, w_chunk, 0, lines, True, CHUNK, ALL_CHUNKS, EVEN_N and EVEN_K)
    if PDL:
        # Kernels before this one may still be writing x or reading what out reuses: touch neither earlier.
        gdc_wait()
    for step in tl.range(0, STEPS):
        first = step * CHUNKS
        if FETCH:
            k = (step + 1) * STEP
            fetch_rows(first_w + k, lines, K * 2, tl.minimum(STEP, K - k) * 2)
            ww = _dense_weights(w_at, n, w_chunk, first, lines, True, CHUNK, ALL_CHUNKS, EVEN_N and EVEN_K)
        else:
            ww = next_w
            more = step + 1 < STEPS
            next_w = _dense_weights(w_at, n, w_chunk, first + CHUNKS, lines, more, CHUNK, ALL_CHUNKS, False)
        x_step = tl.max_contiguous(x_at + first * CHUNK, [2, 1, 8])
        if EVEN_K:
            xx = tl.load(x_step, m < num_rows)  # other rows may hold anything: their results are not stored
        else:
            xx = tl.load(x_step, (m < num_rows) & (first + x_chunk < ALL_CHUNKS), other=0)
        ww = tl.reshape(ww, (4, TILES, WORDS, CHUNKS, 8, 2, 2, 2))  # c, n / 8, i, chunk, n % 8, a, b, e
        xx = tl.reshape(xx, (4, WORDS, CHUNKS, 8, 2, 2, 2))  # c, i, chunk, m, a, b, e
        if K_WIDTH == 4:  # k is (a, i, c, b, e)
            ww = tl.permute(ww, (3, 1, 4, 5, 2, 0, 6, 7))
            xx = tl.permute(xx, (2, 4, 1, 0, 5, 6, 3))
        else:  # k is (a, i, b, c, e)
            ww = tl.permute(ww, (3, 1, 4, 5, 2, 6, 0, 7))
            xx = tl.permute(xx, (2, 4, 1, 5, 0, 6, 3))
        ww = tl.reshape(ww, (CHUNKS, 8 * TILES, CHUNK))
        acc += exact_dot(ww, tl.reshape(xx, (CHUNKS, CHUNK, 8)), USE_ASM)
    y = tl.sum(acc, 0)
    n = tl.arange(0, BLOCK_N)[:, None]
    if GATED:
        gate, factor = tl.split(tl.permute(tl.reshape(y, (2, 8, 8)), (1, 2, 0)))
        if HAS_BIAS:
            gate += tl.load(b0 + first_n + n, n < lines, other=0).to(tl.float32)
            factor += tl.load(b1 + first_n + n, n < lines, other=0).to(tl.float32)
        y = activated(gate, ACTIVATION) * factor
    elif HAS_BIAS:
        y += tl.load(b + first_n + n, n < lines, other=0).to(tl.float32)
    width = N0
    if WEIGHTS > 1 and not GATED:
        width += N1
    if WEIGHTS > 2:
        width += N2
    row = tl.arange(0, 8)[None, :]
    tl.store(out + row * width + column + n, y, (row < num_rows) & (n < lines))


@triton.jit
def _dense_weights(
    w_at, n, w_chunk, first, lines, wanted, CHUNK: tl.constexpr, ALL_CHUNKS: tl.constexpr, EVEN: tl.constexpr
):
    """Weights of the step whose chunks begin at ``first``, nothing unless ``wanted``."""
    # Vectors follow the last axis; hints on the first only break a tie, so that neighbouring threads differ in c.
    w_step = tl.max_contiguous(w_at + first * CHUNK, [2, 1, 8])
    return load_inside(w_step, (n < lines) & (first + w_chunk < ALL_CHUNKS) & wanted, EVEN)


def _has_kernel(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the kernel multiplies these rows and weights."""
    in_features = x.shape[-1]
    few_rows = 1 <= x.numel() // in_features <= _MAX_ROWS
    return few_rows and x.element_size() == 2 and has_kernel_for(in_features) and len(weights) <= MAX_WEIGHTS


def _launch(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str = "") -> Tensor:
    in_features = x.shape[-1]
    pdl = launches_overlap(x.device)
    sizes = [weight.shape[0] for weight in weights]
    widths = sizes[:1] if activation else sizes
    rows = x.numel() // in_features
    config = linears_config(sizes, in_features, rows, bool(activation), device_limits(x.device).multiprocessors)
    block = 8 if activation else 8 * config.tiles
    out = x.new_empty(*x.shape[:-1], sum(widths))
    missing = MAX_WEIGHTS - len(weights)
    _linears_kernel[(sum(triton.cdiv(width, block) for width in widths),)](
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
        CHUNK=_CHUNK,
        STEPS=triton.cdiv(in_features // _CHUNK, config.warps),
        CHUNKS=config.warps,
        TILES=config.tiles,
        EVEN_N=all(size % block == 0 for size in sizes),
        HAS_BIAS=bool(biases),
        ACTIVATION=activation,
        FETCH=pdl and config.fetch,
        K_WIDTH=K_WIDTH,
        USE_ASM=use_inline_asm(x.device),
        PDL=pdl,
        num_warps=config.warps,
        num_stages=1,
        **FUSED,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out


@linears.register_kernel("cuda")
@on_tensors_device
def linears_triton(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Launch the kernel for 1 to 8 rows of 16-bit floats, else multiply by cuBLAS; arguments as the op's."""
    return _launch(x, weights, biases) if _has_kernel(x, weights) else _plain(x, weights, biases)


@triton.jit
def _gate_kernel(y, out, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """``BLOCK`` products of a row's gates, the first half of ``y (rows, 2 N)``, and factors."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(y + row * 2 * N + n, n < N, other=0).to(tl.float32)
    factor = tl.load(y + (row * 2 + 1) * N + n, n < N, other=0).to(tl.float32)
    tl.store(out + row * N + n, activated(gate, ACTIVATION) * factor, n < N)


@gated_linears.register_kernel("cuda")
@on_tensors_device
def gated_linears_triton(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str) -> Tensor:
    """As :func:`linears_triton`; what cuBLAS multiplied is gated by one more launch."""
    if _has_kernel(x, weights):
        return _launch(x, weights, biases, activation)
    y = _plain(x, weights, biases)
    width = weights[0].shape[0]
    out = x.new_empty(*x.shape[:-1], width)
    rows = out.numel() // width
    if rows:
        _gate_kernel[(triton.cdiv(width, 1024), rows)](y, out, width, ACTIVATION=activation, BLOCK=1024, **FUSED)
    return out
