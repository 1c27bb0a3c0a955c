"""``quantspec::int4_linear``: a linear layer with torchao-quantized 4-bit weights in the plain layout.

    y = x W^T + bias,   W[n, k] = (code[n, k] - 8) * scale[k // g, n] + zero[k // g, n]

torchao chooses scale and zero and rounds (its tinygemm convention, where zero is the value of code 8). Plain layout:
byte ``qdata[n, j]`` holds code ``W[n, 2j]`` in its low nibble and ``W[n, 2j + 1]`` in its high one.

On CUDA, 1 to 16 rows are multiplied by a kernel that reads the codes once. Per group of k it forms

    y[m, n] += scale[n] * (sum_j (low[n, j] - 8) x[m, 2j] + (high[n, j] - 8) x[m, 2j + 1]) + zero[n] * sum_k x[m, k]

so that codes are all it converts; the even and odd x come from one 32-bit word.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .inline_asm import biased_nibbles, exact_dot, nibble_bias, ones_like_bytes, split_pair, use_inline_asm

# Above this many rows the weight is dequantized once and multiplied by cuBLAS.
MAX_KERNEL_ROWS = 16


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

    Args:
        x: ``(..., K)`` float.
        qdata: ``(N, K/2)`` uint8, plain layout.
        scale_and_zero: ``(K/g, N, 2)`` float; the group size g follows from its first axis.
        bias: ``(N,)`` or None.

    Returns:
        ``(..., N)`` in the dtype of ``x``.
    """
    return F.linear(x, dequantize_int4(qdata, scale_and_zero, x.dtype), bias)


@int4_linear.register_fake
def _(x, qdata, scale_and_zero, bias):
    return x.new_empty(*x.shape[:-1], qdata.shape[0])


@triton.jit
def _inside(chunk, word, K: tl.constexpr, CHUNK: tl.constexpr):
    """Whether a word of a chunk lies inside K; a mask that is constant along words keeps loads wide."""
    if K % CHUNK == 0:
        return chunk < K // CHUNK
    else:
        return chunk * (CHUNK // 2) + word < K // 2


@triton.jit
def _linear_kernel(
    x,
    qdata,
    scale_and_zero,
    bias,
    out,
    num_rows,
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_PER_SPLIT: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    dtype: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """``BLOCK_N`` outputs of ``BLOCK_M`` rows over one split of K, ``BLOCK_CHUNKS`` chunks of ``CHUNK`` at a time.

    ``x`` is (num_rows, K/2) and ``scale_and_zero`` (K/GROUP, N) as int32 pairs. Chunks are the batch axis of the
    products, so warps share out K. A chunk of several groups has one block of columns per group, zero outside it, so
    that each group keeps its own sum. With one split ``out`` is the result, else float32 ``(SPLITS, num_rows, N)``.
    """
    WORDS: tl.constexpr = CHUNK // 2
    GROUPS: tl.constexpr = CHUNK // GROUP
    chunk = tl.arange(0, BLOCK_CHUNKS)[:, None, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None]
    column = tl.arange(0, GROUPS * BLOCK_M)[None, None, :]
    m = tl.program_id(2) * BLOCK_M + column % BLOCK_M
    # A zero of one element spares a layout conversion of the scales.
    group = column // BLOCK_M if GROUPS > 1 else tl.zeros((1, 1, 1), tl.int32)
    j = tl.arange(0, WORDS)
    split = tl.program_id(1)
    w_at = qdata + n.to(tl.int64) * (K // 2) + chunk * WORDS + j[None, None, :]
    x_at = x + chunk * WORDS + j[None, :, None] + m * (K // 2)
    sz_at = scale_and_zero + (chunk * GROUPS + group) * N + n
    x_mask = (m < num_rows) & (j[None, :, None] // (GROUP // 2) == group)
    n_mask = n < N
    acc = tl.zeros((BLOCK_CHUNKS, BLOCK_N, GROUPS * BLOCK_M), tl.float32)
    first = split * CHUNKS_PER_SPLIT
    # Loads that do not feed a product directly are not pipelined by the compiler, so they run ahead by hand.
    next_words = tl.load(x_at + first * WORDS, x_mask & _inside(first + chunk, j[None, :, None], K, CHUNK), other=0)
    next_sz = tl.load(sz_at + first * GROUPS * N, n_mask & ((first + chunk) * GROUPS + group < K // GROUP), other=0)
    for step in range(0, CHUNKS_PER_SPLIT, BLOCK_CHUNKS):
        first = split * CHUNKS_PER_SPLIT + step
        w_mask = n_mask & _inside(first + chunk, j[None, None, :], K, CHUNK)
        codes = tl.load(w_at + first * WORDS, w_mask, other=0)
        even, odd = split_pair(next_words, dtype)
        scale, zero = split_pair(next_sz, dtype)
        second = first + BLOCK_CHUNKS
        words_mask = x_mask & _inside(second + chunk, j[None, :, None], K, CHUNK)
        next_words = tl.load(x_at + second * WORDS, words_mask, other=0)
        next_sz = tl.load(
            sz_at + second * GROUPS * N, n_mask & ((second + chunk) * GROUPS + group < K // GROUP), other=0
        )
        low, high = biased_nibbles(codes, dtype, USE_ASM)
        ones = ones_like_bytes(codes, dtype, USE_ASM)
        product = exact_dot(low, even, USE_ASM) + exact_dot(high, odd, USE_ASM)
        total = exact_dot(ones, even, USE_ASM) + exact_dot(ones, odd, USE_ASM)
        # Taking the bias out here is cheaper than from every code.
        scale = scale.to(tl.float32)
        acc += scale * product + (zero.to(tl.float32) - (nibble_bias(dtype) + 8) * scale) * total
    y = tl.sum(tl.reshape(tl.sum(acc, 0), (BLOCK_N, GROUPS, BLOCK_M)), 1)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    mask = (row < num_rows) & (n < N)
    if SPLITS == 1:
        if HAS_BIAS:
            y += tl.load(bias + n, n < N, other=0).to(tl.float32)
        tl.store(out + row * N + n, y, mask)
    else:
        tl.store(out + (split * num_rows + row) * N + n, y, mask)


@triton.jit
def _sum_splits_kernel(partial, bias, out, size, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """``out = sum_s partial[s] + bias`` over ``size`` = rows * N elements."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * size + at, mask, other=0)
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask, other=0).to(tl.float32)
    tl.store(out + at, total, mask)


class LinearConfig(NamedTuple):
    """Launch of one weight shape: outputs and chunks of K per program step, warps, pipeline stages, splits of K."""

    block_n: int
    block_chunks: int
    warps: int
    stages: int
    splits: int


@lru_cache
def linear_config(out_features: int, num_chunks: int, columns: int) -> LinearConfig:
    """Configuration by shape, tuned on an H100.

    K is split where the outputs alone give too few programs; ``columns`` (rows times groups of a chunk) bound the tile,
    since larger ones spill registers.
    """
    splits = max(1, min(8, 512 // triton.cdiv(out_features, 32), num_chunks // 8))
    block_n, block_chunks = {8: (32, 4), 16: (32, 2), 32: (16, 2)}[columns]
    return LinearConfig(block_n, block_chunks, 2, 3, splits)


def int4_linear_triton(x: Tensor, qdata: Tensor, scale_and_zero: Tensor, bias: Tensor | None) -> Tensor:
    """Launch the kernel for 1 to 16 rows of 16-bit floats, else dequantize and multiply; arguments as the op's."""
    in_features, out_features = x.shape[-1], qdata.shape[0]
    rows = x.numel() // in_features
    if not 1 <= rows <= MAX_KERNEL_ROWS or x.element_size() != 2:
        return F.linear(x, dequantize_int4(qdata, scale_and_zero, x.dtype), bias)
    num_groups = scale_and_zero.shape[0]
    group = in_features // num_groups
    chunk = max(128, group)
    num_chunks = triton.cdiv(in_features, chunk)
    block_m = 16 if rows > 8 and chunk <= 2 * group else 8
    config = linear_config(out_features, num_chunks, block_m * chunk // group)
    steps = triton.cdiv(num_chunks, config.block_chunks)
    has_bias = bias is not None
    out = x.new_empty(*x.shape[:-1], out_features)
    partial = out if config.splits == 1 else x.new_empty(config.splits, rows, out_features, dtype=torch.float32)
    grid = (triton.cdiv(out_features, config.block_n), config.splits, triton.cdiv(rows, block_m))
    _linear_kernel[grid](
        x.contiguous().view(torch.int32),
        qdata,
        scale_and_zero.to(x.dtype).view(torch.int32),
        bias if has_bias else out,
        partial,
        rows,
        out_features,
        K=in_features,
        GROUP=group,
        CHUNK=chunk,
        CHUNKS_PER_SPLIT=triton.cdiv(steps, config.splits) * config.block_chunks,
        BLOCK_CHUNKS=config.block_chunks,
        BLOCK_N=config.block_n,
        BLOCK_M=block_m,
        SPLITS=config.splits,
        HAS_BIAS=has_bias,
        dtype=tl.float16 if x.dtype == torch.float16 else tl.bfloat16,
        USE_ASM=use_inline_asm(x.device),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if config.splits > 1:
        size = rows * out_features
        _sum_splits_kernel[(triton.cdiv(size, 256),)](
            partial,
            bias if has_bias else out,
            out,
            size,
            out_features,
            SPLITS=config.splits,
            BLOCK=256,
            HAS_BIAS=has_bias,
        )
    return out


int4_linear.register_kernel("cuda")(int4_linear_triton)
