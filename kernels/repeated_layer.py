"""``quantspec::repeated_layer``: the marker that an export leaves where a layer is like one that it has traced.

A capture puts a copy of the traced nodes in its place, so the op itself computes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("quantspec::repeated_layer", mutates_args=())
def repeated_layer(inputs: list[Tensor], like: int, number: int) -> Tensor:
    """Zeros in place of what a layer makes of ``inputs``.

    Args:
        inputs: tensors that it is given and the traced one was not, of any shapes and dtypes.
        like: which of them has the shape and dtype of the output.
        number: of the call, in forward order.

    Returns:
        Zeros of that shape and dtype.
    """
    return torch.zeros_like(inputs[like])


@repeated_layer.register_fake
def _(inputs, like, number):
    return torch.empty_like(inputs[like])
