"""How many tokens of each sequence lie in the planes and are cached, and how a prefill moves both numbers.

A cache has its lengths on the device. Who fills it may have them on the host, too, and move both by the same rule, so
that a prefill never waits for the device to tell them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quantspec.kernels.hierarchical import num_flushed_groups


class Lengths(NamedTuple):
    """Tokens of B sequences, on one device.

    Attributes:
        quantized_len: ``(B,)`` int64, in the planes; a multiple of G.
        length: ``(B,)`` int64, cached.
    """

    quantized_len: Tensor
    length: Tensor

    def fill(self, num_new: Tensor, group_size: int) -> None:
        """Count ``num_new`` (B,) int64 tokens stored by ``quantspec::prefill_attention``, in place."""
        self.length.add_(num_new)
        groups = num_flushed_groups(self.length - self.quantized_len, group_size)
        self.quantized_len.add_(groups * group_size)

    def settle(self, group_size: int) -> None:
        """Count the group that is moved where the recent buffer holds one and no more, in place."""
        self.quantized_len.add_((self.length - self.quantized_len == group_size) * group_size)


def copied_to(device: torch.device, numbers: Tensor) -> Tensor:
    """``numbers`` of the host on ``device``; the host does not wait for a GPU to take them."""
    pinned = numbers.pin_memory() if device.type == "cuda" else numbers
    return pinned.to(device, non_blocking=True)
