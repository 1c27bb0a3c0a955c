"""``quantspec::materialize``: a copy that the compiler does not look into.

Inductor computes a pointwise value again wherever it is read. What every layer reads, as the rotary tables, is computed
once if an op it cannot fuse stands behind it: sine and cosine of positions above 10^5 radians take a slow path.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("quantspec::materialize", mutates_args=())
def materialize(x: Tensor) -> Tensor:
    """A contiguous copy of ``x``, any shape and dtype."""
    return x.clone(memory_format=torch.contiguous_format)


@materialize.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
