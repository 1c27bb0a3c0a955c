"""``quantspec::int4_linear``: a linear layer with torchao-quantized 4-bit weights in the plain layout.

    y = x W^T + bias,   W[n, k] = (code[n, k] - 8) * scale[k // g, n] + zero[k // g, n]

torchao chooses scale and zero and rounds (its tinygemm convention, where zero is the value of code 8). Plain layout:
byte ``qdata[n, j]`` holds code ``W[n, 2j]`` in its low nibble and ``W[n, 2j + 1]`` in its high one.

``quantspec::int4_fused_linear`` also does what follows: the gate of an MLP, the addition to the residual stream. Behind
it ``quantspec::int4_linear_to_norm`` leaves what the next linear needs to normalize what it reads.

On CUDA one row is multiplied by :mod:`.int4_row`, and 2 to 64 by :mod:`.int4_rows`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .current_device import on_tensors_device
from .epilogue import gated
from .inline_asm import launches_overlap, use_inline_asm
from .int4_outputs import SQUARES
from .int4_row import launch_row
from .int4_rows import launch_rows
from .optional_triton import FUSED, tl, triton

# Above this many rows the weight is dequantized once and multiplied by cuBLAS.
MAX_KERNEL_ROWS = 64


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
    results = out, scaled, new_squares
    if rows == 1:
        launch_row(x, qdata.view(torch.int32), scale_and_zero, around, results, eps, common | of_weights)
    else:
        launch_rows(x, qdata.view(torch.uint16), scale_and_zero, around, results, eps, common, of_weights)
    return results


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
