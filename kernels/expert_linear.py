"""``quantspec::expert_linear`` and ``quantspec::int4_expert_linear``: the linears of a mixture-of-experts layer.

    y[s] = x[s] W[e_s]^T + bias[e_s],   e_s = expert_ids[s]

Capture leaves two of them per layer with the model's own activation between; INT4 weights use the plain layout of
``quantspec::int4_linear`` with a leading expert axis.

On CUDA, as many rows as decoding has are multiplied by kernels that look each row's expert up on the device, so that a
CUDA graph serves every choice of experts. More, as a prompt has, are sorted by expert with the host's help.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .current_device import on_tensors_device
from .int4_linear import dequantize_int4, scale_and_zero_gradient
from .optional_triton import FUSED, tl, triton

# Most bytes of weights that rows read in all, each its own expert's: a hundredth of a second, and more rows than
# cycles of 16 sequences have with experts of any model known.
MOST_BYTES = 32 * 2**30
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _expert_by_expert(
    x: Tensor, expert_ids: Tensor, out_features: int, matrix: Callable[[int], Tensor], bias: Tensor | None
) -> Tensor:
    """The rows of one expert at a time; ``matrix(e)`` is its ``(N, K)`` weight."""
    out = x.new_empty(x.shape[0], out_features)
    for expert in expert_ids.unique().tolist():
        rows = (expert_ids == expert).nonzero().squeeze(-1)
        out[rows] = F.linear(x[rows], matrix(expert), None if bias is None else bias[expert])
    return out


@torch.library.custom_op("quantspec::expert_linear", mutates_args=())
def expert_linear(x: Tensor, expert_ids: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Apply each row's own expert.

    Args:
        x: ``(S, K)`` rows of a float dtype, that of ``weight`` and ``bias``.
        expert_ids: ``(S,)`` int64 in ``0..E-1``.
        weight: ``(E, N, K)``, or ``(E, K, N)`` if ``transposed``, of E experts.
        bias: ``(E, N)`` or None.
        transposed: whether the weight is stored as ``(E, K, N)``.

    Returns:
        ``(S, N)`` in the dtype of ``x``.
    """
    matrices = weight.transpose(1, 2) if transposed else weight
    return _expert_by_expert(x, expert_ids, matrices.shape[1], matrices.__getitem__, bias)


@expert_linear.register_fake
def _(x, expert_ids, weight, bias, transposed):
    return x.new_empty(x.shape[0], weight.shape[2] if transposed else weight.shape[1])


def _input_gradient(grad: Tensor, expert_ids: Tensor, matrix: Callable[[int], Tensor]) -> Tensor:
    """Gradient ``(S, K)`` of the input by that of the output, ``(S, N)``; ``matrix(e)`` is ``(N, K)``."""
    return _expert_by_expert(grad, expert_ids, matrix(0).shape[1], lambda expert: matrix(expert).t(), None)


def _bias_gradient(grad: Tensor, expert_ids: Tensor, num_experts: int) -> Tensor:
    return grad.new_zeros(num_experts, grad.shape[1]).index_add_(0, expert_ids, grad)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, expert_ids, weight, _, ctx.transposed = inputs
    ctx.save_for_backward(x, expert_ids, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, expert_ids, weight = ctx.saved_tensors
    of_x, _, of_weight, of_bias, _ = ctx.needs_input_grad
    matrices = weight.transpose(1, 2) if ctx.transposed else weight
    gradient = None
    if of_weight:
        gradient = torch.zeros_like(weight)
        for expert in expert_ids.unique().tolist():
            rows = expert_ids == expert
            product = grad[rows].t() @ x[rows]
            gradient[expert] = product.t() if ctx.transposed else product
    return (
        _input_gradient(grad, expert_ids, matrices.__getitem__) if of_x else None,
        None,
        gradient,
        _bias_gradient(grad, expert_ids, len(weight)) if of_bias else None,
        None,
    )


expert_linear.register_autograd(_gradients, setup_context=_keep)


@triton.jit
def _expert_kernel(
    x,
    expert_ids,
    weight,
    bias,
    out,
    N,
    K,
    stride_e,
    stride_n,
    stride_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """``BLOCK_N`` outputs of one row: ``weight[e, n, k]`` lies at the three strides."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.load(expert_ids + row)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    tile = weight + expert * stride_e + n.to(tl.int64)[:, None] * stride_n
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        values = tl.load(x + row * K + k, k < K, other=0).to(tl.float32)
        matrix = tl.load(tile + k.to(tl.int64)[None, :] * stride_k, inside[:, None] & (k < K)[None, :], other=0)
        total += matrix.to(tl.float32) * values[None, :]
    result = tl.sum(total, 1)
    if HAS_BIAS:
        result += tl.load(bias + expert * N + n, inside, other=0).to(tl.float32)
    tl.store(out + row * N + n, result.to(out.dtype.element_ty), inside)


@expert_linear.register_kernel("cuda")
@on_tensors_device
def expert_linear_triton(
    x: Tensor, expert_ids: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    """As ``quantspec::expert_linear``."""
    num_rows, width = x.shape
    matrices = weight.transpose(1, 2) if transposed else weight
    out_features = matrices.shape[1]
    if num_rows * matrices[0].nbytes > MOST_BYTES or x.dtype not in _KERNEL_DTYPES:
        return _expert_by_expert(x, expert_ids, out_features, matrices.__getitem__, bias)
    out = x.new_empty(num_rows, out_features)
    # Neighbouring threads read neighbouring numbers.
    block_n, block_k = (128, 32) if matrices.stride(1) == 1 else (16, 256)
    if num_rows:
        _expert_kernel[(num_rows, triton.cdiv(out_features, block_n))](
            x.contiguous(),
            expert_ids.contiguous(),
            weight,
            bias,
            out,
            out_features,
            width,
            *matrices.stride(),
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            HAS_BIAS=bias is not None,
            **FUSED,
        )
    return out


@torch.library.custom_op("quantspec::int4_expert_linear", mutates_args=())
def int4_expert_linear(
    x: Tensor, expert_ids: Tensor, qdata: Tensor, scale_and_zero: Tensor, bias: Tensor | None
) -> Tensor:
    """Apply each row's own expert, with 4-bit weights.

    Args:
        x: ``(S, K)`` rows of a float dtype.
        expert_ids: ``(S,)`` int64 in ``0..E-1``.
        qdata: ``(E, N, K/2)`` uint8, the plain layout of ``quantspec::int4_linear`` for each of E experts.
        scale_and_zero: ``(E, K/g, N, 2)`` float; the group size g follows from its second axis.
        bias: ``(E, N)`` in the dtype of ``x``, or None.

    Returns:
        ``(S, N)`` in the dtype of ``x``.
    """
    return _int4_expert_by_expert(x, expert_ids, qdata, scale_and_zero, bias)


def _int4_expert_by_expert(
    x: Tensor, expert_ids: Tensor, qdata: Tensor, scale_and_zero: Tensor, bias: Tensor | None
) -> Tensor:
    def matrix(expert: int) -> Tensor:
        return dequantize_int4(qdata[expert], scale_and_zero[expert], x.dtype)

    return _expert_by_expert(x, expert_ids, qdata.shape[1], matrix, bias)


@int4_expert_linear.register_fake
def _(x, expert_ids, qdata, scale_and_zero, bias):
    return x.new_empty(x.shape[0], qdata.shape[1])


def _int4_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _int4_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, expert_ids, qdata, scale_and_zero = ctx.saved_tensors
    of_x, _, _, of_scales, of_bias = ctx.needs_input_grad

    def matrix(expert: int) -> Tensor:
        return dequantize_int4(qdata[expert], scale_and_zero[expert], x.dtype)

    gradient = None
    if of_scales:
        gradient = torch.zeros_like(scale_and_zero)
        for expert in expert_ids.unique().tolist():
            rows = expert_ids == expert
            gradient[expert] = scale_and_zero_gradient(grad[rows], x[rows], qdata[expert], scale_and_zero[expert])
    return (
        _input_gradient(grad, expert_ids, matrix) if of_x else None,
        None,
        None,
        gradient,
        _bias_gradient(grad, expert_ids, len(qdata)) if of_bias else None,
    )


int4_expert_linear.register_autograd(_int4_gradients, setup_context=_int4_keep)


@triton.jit
def _int4_expert_kernel(
    x,
    expert_ids,
    qdata,
    scale_and_zero,
    bias,
    out,
    N,
    K,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """``BLOCK_N`` outputs of one row, a group of k at a time; ``scale_and_zero`` (E, K/GROUP, N, 2)."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.load(expert_ids + row)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    byte = tl.arange(0, GROUP // 2)
    codes = qdata + (expert * N + n.to(tl.int64))[:, None] * (K // 2) + byte[None, :]
    numbers = scale_and_zero + (expert * (K // GROUP) * N + n) * 2
    result = tl.zeros((BLOCK_N,), tl.float32)
    for group in range(0, K // GROUP):
        pair = tl.load(codes + group * (GROUP // 2), inside[:, None], other=0).to(tl.int32)
        even = tl.load(x + row * K + group * GROUP + 2 * byte).to(tl.float32)
        odd = tl.load(x + row * K + group * GROUP + 2 * byte + 1).to(tl.float32)
        low = ((pair & 15) - 8).to(tl.float32)
        high = ((pair >> 4) - 8).to(tl.float32)
        scale = tl.load(numbers + group * 2 * N, inside, other=0).to(tl.float32)
        zero = tl.load(numbers + group * 2 * N + 1, inside, other=0).to(tl.float32)
        result += scale * tl.sum(low * even[None, :] + high * odd[None, :], 1) + zero * tl.sum(even + odd, 0)
    if HAS_BIAS:
        result += tl.load(bias + expert * N + n, inside, other=0).to(tl.float32)
    tl.store(out + row * N + n, result.to(out.dtype.element_ty), inside)


@int4_expert_linear.register_kernel("cuda")
@on_tensors_device
def int4_expert_linear_triton(
    x: Tensor, expert_ids: Tensor, qdata: Tensor, scale_and_zero: Tensor, bias: Tensor | None
) -> Tensor:
    """As ``quantspec::int4_expert_linear``."""
    num_rows, width = x.shape
    group = width // scale_and_zero.shape[1]
    if num_rows * qdata[0].nbytes > MOST_BYTES or x.dtype not in _KERNEL_DTYPES or group & (group - 1):
        return _int4_expert_by_expert(x, expert_ids, qdata, scale_and_zero, bias)
    out = x.new_empty(num_rows, qdata.shape[1])
    block_n = max(16, 4096 // group)
    if num_rows:
        _int4_expert_kernel[(num_rows, triton.cdiv(qdata.shape[1], block_n))](
            x.contiguous(),
            expert_ids.contiguous(),
            qdata.contiguous(),
            scale_and_zero.contiguous(),
            bias,
            out,
            qdata.shape[1],
            width,
            GROUP=group,
            BLOCK_N=block_n,
            HAS_BIAS=bias is not None,
            **FUSED,
        )
    return out
