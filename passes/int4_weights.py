"""INT4 weights: two codes a byte, with a scale and a zero for every group of input channels; quantized by torchao."""

from __future__ import annotations

import torch
from torch import Tensor

from quantspec.config import WeightQuantizer
from quantspec.kernels.int4_linear import pack_int4

from .int4_epilogues import FuseInt4Epilogues
from .int4_norms import FuseInt4Norms
from .prepack_int4 import PrepackInt4ForCpu
from .weight_formats import Part, WeightFormat, register


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scales are float16 for float16 weights, bfloat16 otherwise (the precision the INT4 kernels multiply in)."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def quantize_int4(weight: Tensor, group_size: int, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """Quantize ``(N, K)`` with torchao; returns plain-layout ``qdata (N, K/2)`` and ``scale_and_zero (K/g, N, 2)``."""
    # torchao announces its optional extensions on import, so it is loaded only where a weight is quantized.
    from torchao.quantization import quant_primitives as primitives

    block = (1, group_size)
    w = weight.detach().float()
    dtype = _scale_dtype(weight.dtype)
    if quantizer is WeightQuantizer.HQQ:
        codes, scale, zero, _ = primitives._choose_qparams_and_quantize_affine_hqq(
            w, nbits=4, group_size=group_size, compute_dtype=dtype, device=w.device
        )
    else:
        scale, zero = primitives._choose_qparams_affine_tinygemm(
            w,
            primitives.MappingType.ASYMMETRIC,
            block,
            torch.int32,
            0,
            15,
            eps=1e-6,
            scale_dtype=dtype,
            zero_point_dtype=dtype,
        )
        codes = primitives._quantize_affine_tinygemm(w, block, scale.float(), zero.float(), torch.int32, 0, 15)
    rows = weight.shape[0]
    scale_and_zero = torch.stack((scale.reshape(rows, -1), zero.reshape(rows, -1)), -1)
    return pack_int4(codes), scale_and_zero.transpose(0, 1).contiguous()


INT4 = register(
    WeightFormat(
        name="int4",
        parts=(
            Part("qdata", lambda rows, width, _: (rows, width // 2), lambda _: torch.uint8, row_axis=-2),
            Part("scale_and_zero", lambda rows, width, group: (width // group, rows, 2), _scale_dtype, row_axis=-2),
        ),
        pack=quantize_int4,
        linear=torch.ops.quantspec.int4_linear.default,
        expert_linear=torch.ops.quantspec.int4_expert_linear.default,
        layouts=(PrepackInt4ForCpu, FuseInt4Epilogues, FuseInt4Norms),
        learned="scale_and_zero",
    )
)
"""The format of the draft's weights; :mod:`quantspec.kernels.int4_linear` has the layout."""
