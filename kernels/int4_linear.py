"""``quantspec::int4_linear``: a linear layer with torchao-quantized 4-bit weights in the plain layout.

    y = x W^T + bias,   W[n, k] = (code[n, k] - 8) * scale[k // g, n] + zero[k // g, n]

torchao chooses scale and zero and rounds (its tinygemm convention, where zero is the value of code 8). Plain layout:
byte ``qdata[n, j]`` holds code ``W[n, 2j]`` in its low nibble and ``W[n, 2j + 1]`` in its high one.

On CUDA, 1 to 16 rows are multiplied by a kernel that reads the codes once. Per group of k it forms

    y[m, n] += scale[n] * sum_k (code[n, k] - 8) x[m, k] + zero[n] * sum_k x[m, k]

on tensor cores with codes and ones as operands, so that codes are all it converts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .current_device import on_tensors_device
from .inline_asm import (
    activated,
    biased_quarters,
    exact_dot,
    exact_product,
    fetch_rows,
    launches_overlap,
    nibble_bias,
    ones_like,
    split_pair,
    use_inline_asm,
)
from .optional_triton import gdc_launch_dependents, gdc_wait, tl, triton

# Above this many rows the weight is dequantized once and multiplied by cuBLAS.
MAX_KERNEL_ROWS = 16
# Neighbouring k of a product that one thread holds: the compiler doubles them behind a join, up to Triton 3.7.
_K_WIDTH = 4 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 2


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


@triton.jit
def _load(at, inside, EVEN: tl.constexpr):
    """Where everything is inside, no mask: a predicate per load costs time."""
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, inside, other=0)


@triton.jit
def _codes_operand(
    w, K_WIDTH: tl.constexpr, CHUNKS: tl.constexpr, WORDS: tl.constexpr, dtype: tl.constexpr, USE_ASM: tl.constexpr
):
    """Codes of halfwords ``(c, (n / 8, chunk, n % 8), (i, h))`` as ``(CHUNKS, 16, 32 * WORDS)``, plus ``nibble_bias``."""
    q0, q1, q2, q3 = biased_quarters(w, dtype, USE_ASM)
    q = tl.join(tl.join(q0, q2), tl.join(q1, q3))  # p = 2 p1 + p0, axes (p1, p0)
    q = tl.reshape(q, (4, 2, CHUNKS, 8, WORDS, 2, 2, 2))  # c, n / 8, chunk, n % 8, i, h, p1, p0
    if K_WIDTH == 4:  # k is (p1, i, c, p0, h)
        q = tl.permute(q, (2, 1, 3, 6, 4, 0, 7, 5))
    else:  # k is (p1, i, p0, c, h)
        q = tl.permute(q, (2, 1, 3, 6, 4, 7, 0, 5))
    return tl.reshape(q, (CHUNKS, 16, 32 * WORDS))


@triton.jit
def _rows_operand(xx, K_WIDTH: tl.constexpr, CHUNKS: tl.constexpr, WORDS: tl.constexpr, ROW_TILES: tl.constexpr):
    """The other factor: ``(c, (m / 8, i, chunk, m % 8), (h, p))`` as ``(CHUNKS, 32 * WORDS, 8 * ROW_TILES)``."""
    xx = tl.reshape(xx, (4, ROW_TILES, WORDS, CHUNKS, 8, 2, 2, 2))  # c, m / 8, i, chunk, m % 8, h, p1, p0
    if K_WIDTH == 4:
        xx = tl.permute(xx, (3, 6, 2, 0, 7, 5, 1, 4))
    else:
        xx = tl.permute(xx, (3, 6, 2, 7, 0, 5, 1, 4))
    return tl.reshape(xx, (CHUNKS, 32 * WORDS, 8 * ROW_TILES))


@triton.jit
def _linear_kernel(
    x,
    norm,
    qdata,
    scale_and_zero,
    bias,
    residual,
    out,
    num_rows,
    N,
    eps,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
    ROW_TILES: tl.constexpr,
    UNROLL: tl.constexpr,
    AHEAD: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    K_WIDTH: tl.constexpr,
    dtype: tl.constexpr,
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """``16 * TILES`` outputs of ``8 * ROW_TILES`` rows; each step takes one chunk of K per warp.

    ``x`` is (num_rows, K), ``qdata`` (N, K/4) uint16, ``scale_and_zero`` (K/GROUP, N) int32 pairs. A chunk is ``CHUNK``
    codes of one group. What a thread loads is its own share of the product's operands, so nothing passes through shared
    memory: thread c of four loads k = (c, i, h, p), which is nibble p of halfword h of its word i, and the product sums
    over k in the order in which a thread holds ``K_WIDTH`` neighbours.

    With ``ACTIVATION`` the weight has 2 N rows, gates and then their factors, and the two tiles are rows n of each.
    """
    WORDS: tl.constexpr = CHUNK // 32
    BLOCK_M: tl.constexpr = 8 * ROW_TILES
    ALL_CHUNKS: tl.constexpr = K // CHUNK
    EVEN_K: tl.constexpr = STEPS * CHUNKS == ALL_CHUNKS
    STEP_BYTES: tl.constexpr = CHUNKS * CHUNK // 2
    GATED: tl.constexpr = ACTIVATION != ""
    if GATED:
        first_n = tl.program_id(0) * 16
        second = N
        all_n = 2 * N
        in_second = 16
    else:
        first_n = tl.program_id(0) * (16 * TILES)
        second = 16
        all_n = N
        in_second = N - 16 - first_n
    c = tl.arange(0, 4)[:, None, None]
    # Rows of the loads are (n / 8, chunk, n % 8) and (m / 8, i, chunk, m % 8): warps share out the chunks.
    r = tl.arange(0, 2 * CHUNKS * 8)[None, :, None]
    n = first_n + r // (8 * CHUNKS) * 8 + r % 8
    w_chunk = r // 8 % CHUNKS
    w_at = (
        qdata
        + n.to(tl.int64) * (K // 4)
        + w_chunk * (CHUNK // 4)
        + c * (2 * WORDS)
        + tl.arange(0, 2 * WORDS)[None, None, :]
    )
    r = tl.arange(0, ROW_TILES * WORDS * CHUNKS * 8)[None, :, None]
    m = r // (8 * CHUNKS * WORDS) * 8 + r % 8
    x_chunk = r // 8 % CHUNKS
    x_k = x_chunk * CHUNK + c * (8 * WORDS) + r // (8 * CHUNKS) % WORDS * 8 + tl.arange(0, 8)[None, None, :]
    x_at = x + m * K + x_k
    sz_chunk = tl.arange(0, CHUNKS)[:, None, None]
    sz_n = first_n + tl.arange(0, 16)[None, :, None]
    first_acc = tl.zeros((CHUNKS, 16, BLOCK_M), tl.float32)
    second_acc = tl.zeros((CHUNKS, 16, BLOCK_M), tl.float32)
    squares = tl.zeros((CHUNKS, 16, BLOCK_M), tl.float32)
    if PDL:
        # Weights are nobody's output: the next kernel may begin to fetch its own, as this one does.
        gdc_launch_dependents()
    if AHEAD > 0:
        lines = tl.minimum(16, N - first_n)
        fetched = qdata + first_n.to(tl.int64) * (K // 4)
        ahead = min(AHEAD * STEP_BYTES, K // 2)
        fetch_rows(fetched, lines, K // 2, ahead)
        sz_bytes = lines * 4
        if TILES == 2 and not GATED:
            sz_bytes = tl.minimum(32, N - first_n) * 4
        fetch_rows(scale_and_zero + first_n, K // GROUP, all_n * 4, sz_bytes)
        if TILES == 2:
            fetch_rows(
                fetched + second.to(tl.int64) * (K // 4) if GATED else fetched + 4 * K,
                tl.maximum(tl.minimum(lines, in_second), 0),
                K // 2,
                ahead,
            )
        if GATED:
            fetch_rows(scale_and_zero + N + first_n, K // GROUP, all_n * 4, sz_bytes)
    if PDL:
        # Kernels before this one may still be writing x or reading what out reuses: touch neither earlier.
        gdc_wait()
    for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        first = step * CHUNKS
        if AHEAD > 0 and AHEAD < STEPS:
            k_byte = (step + AHEAD) * STEP_BYTES
            left = tl.minimum(STEP_BYTES, K // 2 - k_byte)
            fetch_rows(fetched + k_byte // 2, lines, K // 2, left)
            if TILES == 2:
                fetch_rows(
                    (fetched + second.to(tl.int64) * (K // 4) if GATED else fetched + 4 * K) + k_byte // 2,
                    tl.maximum(tl.minimum(lines, in_second), 0),
                    K // 2,
                    left,
                )
        # Vectors follow the last axis; hints on the first only break a tie, so that neighbouring threads differ in c.
        w_step = tl.max_contiguous(w_at + first * (CHUNK // 4), [WORDS, 1, 2 * WORDS])
        w_inside = first + w_chunk < ALL_CHUNKS
        w = _load(w_step, (n < N) & w_inside, EVEN_N and EVEN_K)
        x_step = tl.max_contiguous(x_at + first * CHUNK, [2, 1, 8])
        if EVEN_K:
            xx = tl.load(x_step, m < num_rows)  # other rows may hold anything: their results are not stored
        else:
            xx = tl.load(x_step, (m < num_rows) & (first + x_chunk < ALL_CHUNKS), other=0)
        sz_at = scale_and_zero + (first + sz_chunk) * CHUNK // GROUP * all_n + sz_n
        sz_mask = first + sz_chunk < ALL_CHUNKS
        sz = _load(sz_at, (sz_n < N) & sz_mask, EVEN_N and EVEN_K)
        if TILES == 2:
            w2 = _load(w_step + second * (K // 4), (n - first_n < in_second) & (n < N) & w_inside, EVEN_N and EVEN_K)
            sz2 = _load(sz_at + second, (sz_n - first_n < in_second) & (sz_n < N) & sz_mask, EVEN_N and EVEN_K)
        xx = _rows_operand(xx, K_WIDTH, CHUNKS, WORDS, ROW_TILES)
        q = _codes_operand(w, K_WIDTH, CHUNKS, WORDS, dtype, USE_ASM)
        if HAS_NORM:
            norm_step = tl.max_contiguous(norm + x_k + m * 0 + first * CHUNK, [2, 1, 8])
            factor = _load(norm_step, first + x_chunk < ALL_CHUNKS, EVEN_K)
            factor = _rows_operand(factor, K_WIDTH, CHUNKS, WORDS, ROW_TILES)
            squares += exact_dot(ones_like(q, USE_ASM), exact_product(xx, xx, USE_ASM), USE_ASM)
            xx = exact_product(xx, factor, USE_ASM)
        # Taking the codes' bias out here is cheaper than from every code.
        total = exact_dot(ones_like(q, USE_ASM), xx, USE_ASM)
        scale, zero = split_pair(sz, dtype)
        scale = scale.to(tl.float32)
        first_acc += (
            scale * exact_dot(q, xx, USE_ASM) + (zero.to(tl.float32) - (nibble_bias(dtype) + 8) * scale) * total
        )
        if TILES == 2:
            q = _codes_operand(w2, K_WIDTH, CHUNKS, WORDS, dtype, USE_ASM)
            scale, zero = split_pair(sz2, dtype)
            scale = scale.to(tl.float32)
            second_acc += (
                scale * exact_dot(q, xx, USE_ASM) + (zero.to(tl.float32) - (nibble_bias(dtype) + 8) * scale) * total
            )
    y = tl.sum(first_acc, 0)
    row = tl.arange(0, BLOCK_M)[None, :]
    n = first_n + tl.arange(0, 16)[:, None]
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        y *= factor
    if HAS_BIAS:
        y += tl.load(bias + n, n < N, other=0).to(tl.float32)
    inside = (row < num_rows) & (n < N)
    at = row * N + n
    if TILES == 2:
        y2 = tl.sum(second_acc, 0)
        if HAS_NORM:
            y2 *= factor
        if HAS_BIAS:
            y2 += tl.load(bias + second + n, second + n < all_n, other=0).to(tl.float32)
        if GATED:
            y = activated(y, ACTIVATION) * y2
        else:
            inside2 = (row < num_rows) & (n + 16 < N)
            if HAS_RESIDUAL:
                y2 += tl.load(residual + at + 16, inside2, other=0).to(tl.float32)
            tl.store(out + at + 16, y2, inside2)
    if HAS_RESIDUAL:
        y += tl.load(residual + at, inside, other=0).to(tl.float32)
    tl.store(out + at, y, inside)


class LinearConfig(NamedTuple):
    """Launch of one shape: tiles of 16 outputs, warps (one chunk each), chunks ahead of a warp, splits of K."""

    tiles: int
    warps: int
    unroll: int
    splits: int


@lru_cache
def linear_config(rows: int, out_features: int, in_features: int, group: int) -> LinearConfig:
    """Configuration by shape, tuned on an H100, which reads fastest with some 4096 chunks of 1 KB in flight.

    ``share`` is what the outputs alone leave of them: K is split so often, or walked by more warps. Smaller chunks are
    loaded further ahead. Where outputs are many, two tiles per program read x half as often; so do rows beyond 8, when
    x is what the caches are busy with.
    """
    outputs, chunks = triton.cdiv(out_features, 16), in_features // min(group, 128)
    share = 4 if outputs <= 256 else 2 if outputs <= 512 else 1
    splits = min(share, max(1, in_features // 1024))
    if rows > 8:
        return LinearConfig(2, 2, 2, splits)
    if share == 1:
        if group == 32:
            return LinearConfig(2, 4 if outputs > 1024 else 8, 2, 1)
        return (
            LinearConfig(2, 2, 2, 1)
            if group == 128 and outputs > 1024
            else LinearConfig(1, 4, 2 if group == 64 else 1, 1)
        )
    if group == 32:
        return LinearConfig(1, 4, 2, min(4, 2 * splits))
    if in_features > 8192 and chunks % (4 * splits):
        # Splits would end in half-empty steps.
        return LinearConfig(1, 8, 2, 1)
    if share == 2 and group == 128 and chunks >= 8:
        return LinearConfig(1, 8, 1, 1)
    return LinearConfig(1, 4, 1 if share == 4 else 2, splits)


def launch(x, norm, eps, qdata, scale_and_zero, bias, residual, activation, config):
    in_features = x.shape[-1]
    outputs = qdata.shape[0] // 2 if activation else qdata.shape[0]
    rows = x.numel() // in_features
    group = in_features // scale_and_zero.shape[0]
    tiles, warps, unroll, ahead, chunk = config
    use_asm = use_inline_asm(x.device)
    pdl = launches_overlap(x.device)
    options = {"launch_pdl": True} if pdl else {}
    out = x.new_empty(*x.shape[:-1], outputs)
    width = 16 if activation else 16 * tiles
    _linear_kernel[(triton.cdiv(outputs, width),)](
        x,
        norm if norm is not None else x,
        qdata.view(torch.uint16),
        scale_and_zero.view(torch.int32),
        bias if bias is not None else out,
        residual if residual is not None else out,
        out,
        rows,
        outputs,
        eps,
        K=in_features,
        GROUP=group,
        CHUNK=chunk,
        STEPS=triton.cdiv(in_features // chunk, warps),
        CHUNKS=warps,
        TILES=tiles,
        ROW_TILES=triton.cdiv(rows, 8),
        UNROLL=unroll,
        AHEAD=ahead if pdl else 0,
        EVEN_N=outputs % width == 0,
        HAS_NORM=norm is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        K_WIDTH=_K_WIDTH,
        dtype=tl.float16 if x.dtype == torch.float16 else tl.bfloat16,
        USE_ASM=use_asm,
        PDL=pdl,
        num_warps=warps,
        num_stages=1,
        **options,
    )
    return out


@on_tensors_device
def int4_linear_triton(x: Tensor, qdata: Tensor, scale_and_zero: Tensor, bias: Tensor | None) -> Tensor:
    """Launch the kernel for 1 to 16 rows of 16-bit floats, else dequantize and multiply; arguments as the op's."""
    in_features, out_features = x.shape[-1], qdata.shape[0]
    rows = x.numel() // in_features
    group = in_features // scale_and_zero.shape[0]
    has_kernel = group >= 32 and group & (group - 1) == 0
    if not has_kernel or not 1 <= rows <= MAX_KERNEL_ROWS or x.element_size() != 2:
        return F.linear(x, dequantize_int4(qdata, scale_and_zero, x.dtype), bias)
    tiles, warps, unroll, _ = linear_config(rows, out_features, in_features, group)
    chunk = min(group, 128)
    qdata, params = qdata.contiguous(), scale_and_zero.to(x.dtype).contiguous()
    return launch(x.contiguous(), None, 0.0, qdata, params, bias, None, "", (tiles, warps, unroll, 0, chunk))


int4_linear.register_kernel("cuda")(int4_linear_triton)
