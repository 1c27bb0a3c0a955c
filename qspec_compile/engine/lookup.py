"""Drafts from a row's own text: what followed its newest tokens the last time they stood there.

Any proposal is exact, since a draft stands only where it is the target's own choice. Nothing here waits for the host,
and no shape follows from data, so a captured cycle holds the search.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import fused
from .request import Request
from .text import Positions, Text

# Newest tokens that are compared at the most: of several places the one that agrees in more of them is taken.
LONGEST_MATCH = 16


def continuations(ids: Tensor, length: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What followed the newest tokens of each text earlier in it, at the latest of the places that match longest.

    A continuation that reaches the text's end goes on with itself: a loop is continued as a loop.

    Args:
        ids: ``(B, W)`` int64.
        length: ``(B,)`` int64, of which so many are the text.
        count: tokens to propose (C).

    Returns:
        ``(B, C)`` int64 proposed tokens, and ``(B,)`` int64 how many of the newest tokens, at most
        :data:`LONGEST_MATCH`, precede that place too; 0 where not even the newest one does, and then the tokens mean
        nothing.
    """
    width = ids.shape[1]
    places = torch.arange(width, device=ids.device)
    # The tokens before each place; what fills up the first ones equals no token and nothing that fills up the newest.
    windows = F.pad(ids, (LONGEST_MATCH, 0), value=-2).unfold(1, LONGEST_MATCH, 1)[:, :width]
    newest = Positions(ids, length[:, None]).newest(LONGEST_MATCH)
    behind = torch.arange(LONGEST_MATCH - 1, -1, -1, dtype=torch.int8, device=ids.device)
    matched = torch.where(windows == newest, LONGEST_MATCH, behind).amin(-1).long()
    # A place is the index of the first token to propose; of equal matches the latest wins.
    best = torch.where(places < length[:, None], matched * width + places, -1).amax(1)
    place = best % width
    steps = torch.arange(count, device=ids.device) % (length - place)[:, None]
    return ids.gather(1, place[:, None] + steps), best.clamp(min=0) // width


class Lookup:
    """The texts of a batch, without padding, and what a search of them proposes next.

    Attributes:
        text: prompt and accepted tokens of each row.
        drafts: ``(B, C)`` int64, proposed for the next cycle.
        matched: ``(B,)`` int64, as :func:`continuations` gives them.
    """

    # Later calls, in inference mode or not, write them.
    @torch.inference_mode(False)
    def __init__(self, batch: int, width: int, most: int, device: torch.device, compiles: bool) -> None:
        """``width``: tokens of a text and of ``most`` drafts behind it; ``compiles``: fuse the search."""
        self.text = Text(batch, width, device)
        self.drafts = torch.zeros(batch, most, dtype=torch.int64, device=device)
        self.matched = torch.zeros(batch, dtype=torch.int64, device=device)
        self._search = fused(continuations, compiles)

    def begin(self, requests: Sequence[Request]) -> None:
        """Take over the rows' texts so far, and search them."""
        rows = [torch.cat((r.prompt, r.prompt.new_tensor(r.tokens))) for r in requests]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        self.text.begin(ids, [len(row) for row in rows])
        self.search()

    def keep(self, accepted: Tensor, next_tokens: Tensor, running: Tensor) -> None:
        """Move the texts on as :meth:`Text.keep` does, and search them."""
        self.text.keep(accepted, next_tokens, running)
        self.search()

    def search(self) -> None:
        """Find the next proposal."""
        drafts, matched = self._search(self.text.ids, self.text.length, self.drafts.shape[1])
        self.drafts.copy_(drafts)
        self.matched.copy_(matched)
