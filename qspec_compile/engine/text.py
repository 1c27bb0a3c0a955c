"""The text of a batch on the device, as logits processors read it there: drafts in place, rejected ones overwritten."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """T consecutive positions of each of B sequences.

    Attributes:
        ids: ``(B, W)`` int64; padding of the prompt, prompt, accepted tokens, drafts, and then anything.
        lens: ``(B, T)`` int64 tokens that precede each position.
    """

    ids: Tensor
    lens: Tensor

    def newest(self, count: int) -> Tensor:
        """The ``count`` tokens before each position, ``(B, T, count)``; -1 before the text's beginning."""
        index = self.lens[..., None] + torch.arange(-count, 0, device=self.ids.device)
        tokens = self.ids.gather(1, index.clamp(min=0).flatten(1)).view(index.shape)
        return tokens.masked_fill(index < 0, -1)


class Text:
    """Token ids of B sequences of different lengths in tensors that stay where they are.

    Attributes:
        ids: ``(B, W)`` int64.
        length: ``(B,)`` int64 accepted tokens of each sequence, the prompt and its padding included.
    """

    # Later calls, in inference mode or not, write them.
    @torch.inference_mode(False)
    def __init__(self, batch: int, width: int, device: torch.device) -> None:
        self.ids = torch.zeros(batch, width, dtype=torch.int64, device=device)
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)

    def begin(self, ids: Tensor, lens: list[int]) -> None:
        """Take over a text: ``ids (B, S)``, of which each row has so many tokens."""
        self.ids[:, : ids.shape[1]].copy_(ids)
        self.length.copy_(torch.tensor(lens, device="cpu"))

    def positions(self, num_ahead: int, count: int) -> Positions:
        """``count`` positions, the first behind ``num_ahead`` drafted tokens."""
        ahead = torch.arange(num_ahead, num_ahead + count, device=self.ids.device)
        return Positions(self.ids, self.length[:, None] + ahead)

    def write(self, offset: Tensor | int, tokens: Tensor) -> None:
        """Put ``tokens (B, T)`` behind the accepted ones and ``offset`` (``()`` or ``(B,)``) more."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        self.ids.scatter_(1, (self.length + offset)[:, None] + places, tokens)

    def keep(self, accepted: Tensor, next_tokens: Tensor, running: Tensor) -> None:
        """Accept so many drafts ``(B,)`` and ``next_tokens (B,)`` in the sequences that are ``running (B,)``."""
        self.write(accepted, next_tokens[:, None])
        self.length += torch.where(running, accepted + 1, 0)
