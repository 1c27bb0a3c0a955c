"""What the CPU at hand multiplies by itself, which decides the dtype of what it computes."""

from __future__ import annotations

import torch


def cpu_lacks_half_matmul() -> bool:
    """Whether this CPU emulates bfloat16 matmuls (no AVX-512 BF16, no AMX)."""
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
