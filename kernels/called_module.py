"""``quantspec::called_module``: the marker that an export leaves where a module runs as it is.

A capture puts a call of the module in its place, so the op itself computes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("quantspec::called_module", mutates_args=())
def called_module(inputs: list[Tensor], like: int, number: int) -> Tensor:
    """Zeros in place of what a module makes of ``inputs``.

    Args:
        inputs: its tensors, of any shapes and dtypes.
        like: which of them has the shape and dtype of the output.
        number: of the call, in forward order.

    Returns:
        Zeros of that shape and dtype.
    """
    return torch.zeros_like(inputs[like])


@called_module.register_fake
def _(inputs, like, number):
    return torch.empty_like(inputs[like])
