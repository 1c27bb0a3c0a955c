"""One speculative cycle as device work: draft, verify, choose what the next drafts read, accept, count.

Nothing here waits for the host, so on a GPU a cycle is captured once and replayed (``cycle_graph``); the host reads one
small tensor per cycle, which also says whether a flush is due.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from quantspec.cache import HierarchicalCache
from quantspec.pair import Pair
from quantspec.passes import Role

from .acceptance import Acceptance
from .lookup import Lookup
from .plan import Source
from .text import Text


class CycleResult(NamedTuple):
    """What a cycle did to each of B sequences, on the host.

    ``drafts (B, T)`` proposed tokens, of which the first ``accepted (B,)`` stand, followed by ``next_tokens (B,)``;
    ``flush_due`` tells whether any sequence has a group to move into the planes before the next cycle, ``fails (B,)``
    whether one of these tokens could not be chosen, for NaN or, in sampling, for want of a distribution, ``matched
    (B,)`` how many tokens of its end a lookup finds earlier in the text, now that it has moved on.
    """

    drafts: list[list[int]]
    accepted: list[int]
    next_tokens: list[int]
    flush_due: bool
    fails: list[bool]
    matched: list[int]

    @classmethod
    def read(cls, packed: Tensor) -> CycleResult:
        """Unpack :meth:`Cycle.__call__`'s tensor; the one copy to the host in a cycle."""
        rows = packed.tolist()
        return cls(
            [row[:-5] for row in rows],
            [row[-5] for row in rows],
            [row[-4] for row in rows],
            any(row[-3] for row in rows),
            [bool(row[-2]) for row in rows],
            [row[-1] for row in rows],
        )


class Proposal(NamedTuple):
    """What a cycle shows the host before anything is accepted.

    ``drafts (B, T)`` and the verifier's ``logits (B, T + 1, V)``; ``noise (B, T + 1, V)`` float32 is added to processed
    scores before the choice, None if no row is sampled; ``packed (B, T + 1)`` int64 are the drafts, and bits of which
    the t-th tells that row t of the logits has NaN.
    """

    drafts: Tensor
    logits: Tensor
    noise: Tensor | None
    packed: Tensor


class Cycle:
    """The device's part of a cycle.

    Attributes:
        pending: ``(B,)`` newest token of each sequence, whose key and value are not cached yet; moved on by a cycle.
        running: ``(B,)`` bool; sequences that are done go through the motions and keep their state.
        text: what logits processors on the device read, moved on by a cycle; None if they read nothing.
        lookup: the source of drafts out of the text, moved on by a cycle; None where no cycle of the call needs it.
        cut: called behind each drafted token, where a capture may begin a graph of its own.
    """

    cut: Callable[[], object] = staticmethod(lambda: None)

    def __init__(
        self,
        pair: Pair,
        cache: HierarchicalCache,
        acceptance: Acceptance,
        verifier: Role = Role.TARGET,
        text: Text | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        """``verifier`` is the role whose distribution is emitted."""
        self.pair = pair
        self.cache = cache
        self.acceptance = acceptance
        self.verifier = verifier
        self.text = text
        self.lookup = lookup
        self.pending = cache.length.new_zeros(cache.batch_size)
        self.running = torch.ones_like(self.pending, dtype=torch.bool)

    def begin(self, pending: Tensor) -> None:
        """Start a call's cycles behind the tokens ``pending (B,)``."""
        self.pending.copy_(pending)

    def resume(self, other: Self) -> None:
        """Go on where another cycle of the same call stopped."""
        self.pending.copy_(other.pending)

    @torch.no_grad()
    def __call__(self, num_drafts: int, source: Source = Source.SELF) -> tuple[Tensor, Tensor, Tensor]:
        """Run one cycle of ``num_drafts`` drafted tokens.

        Returns:
            ``(B, num_drafts + 5)`` int64 for :meth:`CycleResult.read`, and ``(B, num_drafts + 1, V)`` scores and logits
            of the verifier.
        """
        drafts, logits = self.propose(num_drafts, source)
        verdict = self.acceptance.judge(drafts, logits)
        self.acceptance.forget()
        due = self.keep(verdict.accepted, verdict.next_tokens)
        fails = verdict.fails & self.running
        matched = torch.zeros_like(self.pending) if self.lookup is None else self.lookup.matched
        columns = (verdict.accepted, verdict.next_tokens, due.expand_as(verdict.accepted), fails, matched)
        packed = torch.cat((drafts, torch.stack([column.long() for column in columns], 1)), 1)
        return packed, verdict.scores, logits

    @torch.no_grad()
    def propose(self, num_drafts: int, source: Source = Source.SELF) -> tuple[Tensor, Tensor]:
        """Draft and verify; returns what :meth:`draft` and :meth:`verify` do."""
        self.acceptance.forget()
        drafts = self.draft(num_drafts) if source is Source.SELF else self.look_up(num_drafts)
        if self.lookup is not None:
            self.lookup.text.write(0, drafts)
        return drafts, self.verify(drafts)

    def keep(self, accepted: Tensor, next_tokens: Tensor) -> Tensor:
        """Move the running sequences on by ``accepted (B,)`` drafts and ``next_tokens (B,)``.

        Returns:
            A bool tensor ``()`` on the device: whether a flush is due.
        """
        due = self.cache.keep(torch.where(self.running, accepted + 1, 0))
        if self.text is not None:
            self.text.keep(accepted, next_tokens, self.running)
        if self.lookup is not None:
            self.lookup.keep(accepted, next_tokens, self.running)
        self.pending.copy_(torch.where(self.running, next_tokens, self.pending))
        return due

    def draft(self, num_drafts: int) -> Tensor:
        """``num_drafts`` drafted tokens ``(B, T)``."""
        tokens = []
        current = self.pending
        for step in range(num_drafts):
            logits = self.pair.read(Role.DRAFT, current[:, None], self.cache, num_ahead=step)
            current = self._drafted(self.acceptance.draft(logits, step), step)
            if self.text is not None:
                self.text.write(step, current[:, None])
            tokens.append(current)
            self.cut()
        return torch.stack(tokens, 1) if tokens else self.pending.new_empty(self.cache.batch_size, 0)

    def look_up(self, num_drafts: int) -> Tensor:
        """``num_drafts`` tokens ``(B, T)`` that the texts themselves propose."""
        assert self.lookup is not None
        # The search behind the verification overwrites them.
        drafts = self._drafted(self.lookup.drafts[:, :num_drafts].clone(), 0)
        if self.text is not None:
            self.text.write(0, drafts)
        return drafts

    def _drafted(self, tokens: Tensor, step: int) -> Tensor:
        """What to draft behind ``step`` drafts instead of ``tokens``, ``(B,)`` or ``(B, T)``."""
        return tokens

    def verify(self, drafts: Tensor) -> Tensor:
        """The verifier's logits ``(B, T + 1, V)`` of every drafted token and of the one after them."""
        logits = self.pair.read(self.verifier, torch.cat((self.pending[:, None], drafts), 1), self.cache)
        # No other verifier scores pages.
        if self.verifier is Role.TARGET:
            self.cache.choose_pages()
        return logits


class LockstepCycle(Cycle):
    """A cycle that the host judges, of rows that all advance by as many tokens as the row that accepts least.

    What verification chose for the others beyond that is what they draft next, as far as their texts went that way.

    Attributes:
        known: ``(B, N)`` int64 tokens to draft, -1 from where none is known.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.known = self.pending.new_full((self.cache.batch_size, self.cache.num_speculative_tokens), -1)
        self._drafts = self._choice = self.known

    def begin(self, pending: Tensor) -> None:
        super().begin(pending)
        self.known.fill_(-1)

    def resume(self, other: Self) -> None:
        super().resume(other)
        self.known.copy_(other.known)

    @torch.no_grad()
    def show(self, num_drafts: int, source: Source = Source.SELF) -> Proposal:
        """Draft, verify, and prepare what the host judges by."""
        drafts, logits = self.propose(num_drafts, source)
        places = torch.arange(num_drafts + 1, device=drafts.device)
        nan_bits = (logits.isnan().any(-1).long() << places).sum(1)
        noise = self.acceptance.noise(logits)
        if self._knows:
            self._drafts, self._choice = drafts, self.acceptance.choices(logits, noise)
        return Proposal(drafts, logits, noise, torch.cat((drafts, nan_bits[:, None]), 1))

    def keep(self, accepted: Tensor, next_tokens: Tensor) -> Tensor:
        """As :meth:`Cycle.keep`, of the drafts shown last; all rows accept equally many."""
        if self._knows:
            self._learn(accepted[:, None], next_tokens[:, None])
        return super().keep(accepted, next_tokens)

    def move_on(self, accepted: Tensor, next_tokens: Tensor) -> Tensor:
        """:meth:`keep`; returns ``(1 + B,)`` int64: whether a flush is due, and what a lookup now finds of each row."""
        due = self.keep(accepted, next_tokens)
        matched = torch.zeros_like(self.pending) if self.lookup is None else self.lookup.matched
        return torch.cat((due[None].long(), matched))

    @property
    def _knows(self) -> bool:
        """A single row has accepted what it could."""
        return self.cache.batch_size > 1

    def _learn(self, accepted: Tensor, next_tokens: Tensor) -> None:
        drafts, choice = self._drafts, self._choice
        count = drafts.shape[1]
        places = torch.arange(count + 1, device=drafts.device)
        # A choice is the target's own while every draft before it stands, for the text so far whatever was chosen.
        stands = (drafts == choice[:, :count]) | (places[:count] <= accepted)
        stands = F.pad(stands, (1, 0), value=True).cumprod(1).bool()
        # The next token must be the draft that was verified with those behind it.
        goes_on = F.pad(drafts, (0, 1), value=-1).gather(1, accepted) == next_tokens
        later = accepted + 1 + torch.arange(self.known.shape[1], device=drafts.device)
        found = torch.where(stands & goes_on, choice, -1).gather(1, later.clamp(max=count))
        self.known.copy_(torch.where(later <= count, found, -1))

    def _drafted(self, tokens: Tensor, step: int) -> Tensor:
        if not self._knows:
            return tokens
        known = self.known[:, step : step + tokens[0].numel()].view_as(tokens)
        return torch.where(known >= 0, known, tokens)


class ShownCycle(LockstepCycle):
    """A cycle of rows that advance each by itself: the host judges some of them, the device the others."""

    @property
    def _knows(self) -> bool:
        """Behind its first draft that does not stand, nothing that was verified is of a row's text."""
        return False
