"""``quantspec::int4_linear``: a linear layer with torchao-quantized 4-bit weights in the plain layout.

    y = x W^T + bias,   W[n, k] = (code[n, k] - 8) * scale[k // g, n] + zero[k // g, n]

torchao chooses scale and zero and rounds (its tinygemm convention, where zero is the value of code 8). Plain layout:
byte ``qdata[n, j]`` holds code ``W[n, 2j]`` in its low nibble and ``W[n, 2j + 1]`` in its high one.

``quantspec::int4_fused_linear`` also does what follows: the gate of an MLP, the addition to the residual stream. Behind
it ``quantspec::int4_linear_to_norm`` leaves what the next linear needs to normalize what it reads.

On CUDA one row is multiplied by :mod:`.int4_row`, and 2 to 64 by a kernel that reads the codes once for 16 of them. Per
group of k it forms

    y[m, n] += scale[n] * sum_k (code[n, k] - 8) x[m, k] + zero[n] * sum_k x[m, k]

on tensor cores with codes and ones as operands, so that codes are all it converts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .current_device import on_tensors_device
from .epilogue import gated
from .inline_asm import (
    K_WIDTH,
    activated,
    biased_quarters,
    exact_dot,
    launches_overlap,
    load_inside,
    nibble_bias,
    ones_like,
    split_pair,
    use_inline_asm,
)
from .int4_outputs import SQUARES, norm_factor, store_outputs
from .int4_row import launch_row
from .optional_triton import FUSED, gdc_launch_dependents, gdc_wait, tl, triton

# Above this many rows the weight is dequantized once and multiplied by cuBLAS.
MAX_KERNEL_ROWS = 64
# Most tiles of eight rows that one program multiplies; more take more registers than it has.
_ROW_TILES = 2


def pack_int4(codes: Tensor) -> Tensor:
    """Codes ``(..., N, K)`` in 0..15 to bytes ``(..., N, K/2)`` uint8."""
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_int4(qdata: Tensor) -> Tensor:
    """Bytes ``(..., N, K/2)`` to codes ``(..., N, K)`` uint8."""
    return torch.stack((qdata & 15, qdata >> 4), dim=-1).flatten(-2)


def dequantize_int4(qdata: Tensor, scale_and_zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense weight ``(..., N, K)`` of plain-layout ``qdata (..., N, K/2)`` and ``scale_and_zero (..., K/g, N, 2)``."""
    scale, zero = scale_and_zero.to(dtype).transpose(-3, -2).unbind(-1)
    codes = unpack_int4(qdata).unflatten(-1, (scale.shape[-1], -1)).to(dtype) - 8
    return (codes * scale.unsqueeze(-1) + zero.unsqueeze(-1)).flatten(-2)


@torch.library.custom_op("quantspec::int4_linear", mutates_args=())
def int4_linear(x: Tensor, qdata: Tensor, scale_and_zero: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer over 4-bit weights; this implementation dequantizes, then multiplies.

    ``y = x W^T + bias`` with ``W[n, k] = (code[n, k] - 8) * scale[k // g, n] + zero[k // g, n]``, the convention of
    torchao's tinygemm.

    Args:
        x: ``(..., K)`` of a float dtype.
        qdata: ``(N, K/2)`` uint8, plain layout: byte j of a row has code 2j in its low nibble, 2j + 1 in the high one.
        scale_and_zero: ``(K/g, N, 2)`` float; the group size g follows from its first axis.
        bias: ``(N,)`` in the dtype of ``x``, or None.

    Returns:
        ``(..., N)`` in the dtype of ``x``.
    """
    return F.linear(x, dequantize_int4(qdata, scale_and_zero, x.dtype), bias)


@int4_linear.register_fake
def _(x, qdata, scale_and_zero, bias):
    return x.new_empty(*x.shape[:-1], qdata.shape[0])


@torch.library.custom_op("quantspec::int4_fused_linear", mutates_args=())
def int4_fused_linear(
    x: Tensor,
    qdata: Tensor,
    scale_and_zero: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    gate_first: bool,
    squares: Tensor | None,
    eps: float,
) -> Tensor:
    """:func:`int4_linear` with what stands around it in a decoder's layer.

    ``y = r x W^T + bias``, then ``activation(gate) * factor`` of its halves, then ``+ residual``. The factor r that
    normalizes a row, ``(sum(squares) / K + eps)^(-1/2)``, is 1 without ``squares``.

    Args:
        x, qdata, scale_and_zero, bias: as of :func:`int4_linear`, with N outputs.
        residual: of the shape and dtype of the result, or None.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, or empty for none.
        gate_first: whether gates are the first half.
        squares: ``(S, ...)`` float32 sums of squares, the leading axes of ``x`` behind S, or None.
        eps: of the normalization.

    Returns:
        ``(..., N)``, or ``(..., N/2)`` with an activation, in the dtype of ``x``.
    """
    return _plain(x, qdata, scale_and_zero, bias, residual, activation, gate_first, squares, eps)


def _plain(
    x: Tensor,
    qdata: Tensor,
    scale_and_zero: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    gate_first: bool,
    squares: Tensor | None,
    eps: float,
) -> Tensor:
    if squares is not None:
        x = (x * torch.rsqrt(squares.sum(0) / x.shape[-1] + eps)[..., None]).to(x.dtype)
    y = F.linear(x, dequantize_int4(qdata, scale_and_zero, x.dtype), bias)
    y = gated(y, activation, gate_first) if activation else y
    return y if residual is None else y + residual


@int4_fused_linear.register_fake
def _(x, qdata, scale_and_zero, bias, residual, activation, gate_first, squares, eps):
    return x.new_empty(*x.shape[:-1], qdata.shape[0] // 2 if activation else qdata.shape[0])


@torch.library.custom_op("quantspec::int4_linear_to_norm", mutates_args=())
def int4_linear_to_norm(
    x: Tensor, qdata: Tensor, scale_and_zero: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`int4_fused_linear` in front of a root mean square norm, which what reads the result completes.

    Args:
        x, qdata, scale_and_zero, bias, residual: as there.
        norm_weight: ``(N,)`` float.

    Returns:
        ``y (..., N)``, ``y * norm_weight`` in the same dtype, and the sums of squares of :data:`SQUARES` neighbouring
        outputs each, ``(ceil(N / SQUARES), ...)`` float32.
    """
    return _plain_to_norm(x, qdata, scale_and_zero, bias, residual, norm_weight)


def _plain_to_norm(
    x: Tensor, qdata: Tensor, scale_and_zero: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    y = F.linear(x, dequantize_int4(qdata, scale_and_zero, x.dtype), bias) + residual
    squares = F.pad(y.float().square(), (0, -y.shape[-1] % SQUARES)).unflatten(-1, (-1, SQUARES)).sum(-1)
    return (
        y,
        (y.float() * norm_weight.float()).to(y.dtype),
        squares.movedim(-1, 0).clone(memory_format=torch.contiguous_format),
    )


@int4_linear_to_norm.register_fake
def _(x, qdata, scale_and_zero, bias, residual, norm_weight):
    squares = x.new_empty(-(-qdata.shape[0] // SQUARES), *x.shape[:-1], dtype=torch.float32)
    return torch.empty_like(residual), torch.empty_like(residual), squares


def scale_and_zero_gradient(grad: Tensor, x: Tensor, qdata: Tensor, scale_and_zero: Tensor) -> Tensor:
    """Gradient ``(K/g, N, 2)`` of ``scale_and_zero`` by that of the output, ``(S, N)``, for inputs ``(S, K)``.

    With D = grad^T x, the sums over each group of ``D[n, k] (code[n, k] - 8)`` for scales and ``D[n, k]`` for zeros.
    """
    of_weight = (grad.t() @ x).unflatten(-1, (scale_and_zero.shape[0], -1))
    codes = unpack_int4(qdata).view(of_weight.shape).to(x.dtype) - 8
    dtype = scale_and_zero.dtype
    sums = (of_weight * codes).sum(-1, dtype=dtype), of_weight.sum(-1, dtype=dtype)
    return torch.stack(sums, -1).transpose(0, 1)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Codes are constants; the dense weight exists only while this runs."""
    x, qdata, scale_and_zero = ctx.saved_tensors
    of_x, _, of_scales, of_bias = ctx.needs_input_grad
    rows = grad.flatten(0, -2)
    return (
        grad @ dequantize_int4(qdata, scale_and_zero, x.dtype) if of_x else None,
        None,
        scale_and_zero_gradient(rows, x.flatten(0, -2), qdata, scale_and_zero) if of_scales else None,
        rows.sum(0) if of_bias else None,
    )


int4_linear.register_autograd(_gradients, setup_context=_keep)


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


def _has_kernel(x: Tensor, scale_and_zero: Tensor) -> bool:
    """Whether the kernel multiplies these rows and groups: 1 to 64 rows of 16-bit floats."""
    group = x.shape[-1] // scale_and_zero.shape[0]
    rows = x.numel() // x.shape[-1]
    return group >= 32 and group & (group - 1) == 0 and 1 <= rows <= MAX_KERNEL_ROWS and x.element_size() == 2


def _launch(
    x: Tensor,
    qdata: Tensor,
    scale_and_zero: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str = "",
    gate_first: bool = True,
    squares: Tensor | None = None,
    eps: float = 0.0,
    norm_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three results of ``int4_linear_to_norm``, the last two only with a ``norm_weight``."""
    in_features, out_features = x.shape[-1], qdata.shape[0]
    rows = x.numel() // in_features
    group = in_features // scale_and_zero.shape[0]
    pdl = launches_overlap(x.device)
    width = out_features // 2 if activation else out_features
    parts = 0 if squares is None else squares.shape[0]
    out = scaled = new_squares = x.new_empty(*x.shape[:-1], width)
    if norm_weight is not None:
        scaled = torch.empty_like(out)
        new_squares = x.new_empty(triton.cdiv(width, SQUARES), *x.shape[:-1], dtype=torch.float32)
    # In the order of the kernels.
    around = (
        out if bias is None else bias.contiguous(),
        out if residual is None else residual.contiguous(),
        out if norm_weight is None else norm_weight.contiguous(),
        out if squares is None else squares.contiguous(),
    )
    x, qdata = x.contiguous(), qdata.contiguous()
    scale_and_zero = scale_and_zero.to(x.dtype).contiguous().view(torch.int32)
    common: dict[str, Any] = {
        "K": in_features,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "PARTS": parts,
        "PADDED_PARTS": triton.next_power_of_2(max(parts, 1)),
        "TO_NORM": norm_weight is not None,
        "dtype": tl.float16 if x.dtype == torch.float16 else tl.bfloat16,
        "PDL": pdl,
        **FUSED,
        **({"launch_pdl": True} if pdl else {}),
    }
    of_weights = {
        "GROUP": group,
        "ACTIVATION": activation,
        "GATE_FIRST": gate_first,
        "USE_ASM": use_inline_asm(x.device),
    }
    if rows == 1:
        launch_row(
            x, qdata.view(torch.int32), scale_and_zero, around, (out, scaled, new_squares), eps, common | of_weights
        )
        return out, scaled, new_squares
    config = linear_config(rows, out_features, in_features, group, bool(activation))
    chunk = min(group, 128)
    steps = triton.cdiv(in_features // chunk, config.warps * config.splits)
    tile = (8 if activation else 16) * config.tiles
    row_tiles = min(triton.cdiv(rows, 8), _ROW_TILES)
    row_blocks = triton.cdiv(rows, 8 * row_tiles)
    results = out, scaled, new_squares, rows, eps, out_features
    several = config.splits > 1
    partial = x.new_empty(config.splits, rows, out_features, dtype=torch.float32) if several else out
    common["SPLITS"] = config.splits
    _linear_kernel[(triton.cdiv(width, tile) * row_blocks, config.splits)](
        x,
        qdata.view(torch.uint16),
        scale_and_zero,
        *around,
        partial,
        *results[1:],
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
        **common,
    )
    if several:
        _sum_splits_kernel[(triton.cdiv(out_features, 256), rows)](partial, *around, *results, BLOCK=256, **common)
    return out, scaled, new_squares


@int4_linear.register_kernel("cuda")
@on_tensors_device
def int4_linear_triton(x: Tensor, qdata: Tensor, scale_and_zero: Tensor, bias: Tensor | None) -> Tensor:
    """Launch the kernel where there is one, else dequantize and multiply; arguments as the op's."""
    if not _has_kernel(x, scale_and_zero):
        return F.linear(x, dequantize_int4(qdata, scale_and_zero, x.dtype), bias)
    return _launch(x, qdata, scale_and_zero, bias, None)[0]


@int4_fused_linear.register_kernel("cuda")
@on_tensors_device
def int4_fused_linear_triton(
    x: Tensor,
    qdata: Tensor,
    scale_and_zero: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    gate_first: bool,
    squares: Tensor | None,
    eps: float,
) -> Tensor:
    """As :func:`int4_linear_triton`."""
    arguments = x, qdata, scale_and_zero, bias, residual, activation, gate_first, squares, eps
    return _launch(*arguments)[0] if _has_kernel(x, scale_and_zero) else _plain(*arguments)


@int4_linear_to_norm.register_kernel("cuda")
@on_tensors_device
def int4_linear_to_norm_triton(
    x: Tensor, qdata: Tensor, scale_and_zero: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`int4_linear_triton`."""
    if not _has_kernel(x, scale_and_zero):
        return _plain_to_norm(x, qdata, scale_and_zero, bias, residual, norm_weight)
    return _launch(x, qdata, scale_and_zero, bias, residual, norm_weight=norm_weight)
