"""What draft steps read of the planes where their attention is sparse: scores and choice of pages, for all layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from quantspec.config import DraftAttention, QuantSpecConfig
from quantspec.kernels import choose_pages
from quantspec.kernels.cache_layout import PAGE_PARTS
from quantspec.kernels.choose_pages import SHARE_UNIT, num_kept
from quantspec.kernels.pages import PAGE_TOKENS, num_pages

from .geometry import AttentionShape, part_shape

# Tokens of the planes that are read in any case: with "auto" as many as take little longer than a few.
_LEAST_TOKENS = {DraftAttention.SPARSE: 512, DraftAttention.AUTO: 4096}


class PageBudget(NamedTuple):
    """How many pages draft steps read.

    Attributes:
        share: of the planes, in parts of :data:`quantspec.kernels.choose_pages.SHARE_UNIT`.
        least: pages in any case.
    """

    share: int
    least: int

    @classmethod
    def of(cls, config: QuantSpecConfig) -> PageBudget | None:
        """That of a conversion; None where draft steps read everything."""
        if config.draft_attention is DraftAttention.FULL:
            return None
        least = _LEAST_TOKENS[config.draft_attention] // PAGE_TOKENS
        return cls(round(config.draft_attention_share * SHARE_UNIT), least)

    def sizes(self, groups: int, group_size: int) -> tuple[int, int]:
        """Pages that have scores and pages that may be chosen; none where all would be."""
        pages = num_pages(groups, group_size)
        kept = num_kept(pages, *self)
        return (pages, kept) if kept < pages else (0, 0)


class PageChoice:
    """The parts of ``PAGE_PARTS`` of all layers, each a stretch of one tensor of R rows.

    After a call of :meth:`forget`, and in a sequence too short to choose from, draft steps read everything.
    """

    def __init__(
        self, layers: Sequence[AttentionShape], batch_size: int, budget: PageBudget, device: torch.device
    ) -> None:
        """Room for no pages; :meth:`reserve` makes it."""
        self._shapes = layers
        self._batch_size = batch_size
        self._budget = budget
        self._rows = [batch_size * layer.kv_heads for layer in layers]
        sequences = torch.arange(batch_size, device=device)
        self._sequence = torch.cat([sequences.repeat_interleave(layer.kv_heads) for layer in layers])
        self._sizes: tuple[int, int] | None = None
        self._tensors: dict[str, Tensor] = {}
        self._counts: list[Tensor] = []

    def reserve(self, groups: int, group_size: int) -> None:
        """Make room for the pages of so many groups; what was chosen is forgotten if that takes new storage."""
        sizes = self._budget.sizes(groups, group_size)
        if sizes == self._sizes:
            return
        self._sizes = sizes
        for part in PAGE_PARTS:
            width = part_shape(part, self._shapes[0], 1, groups, group_size, 0, sizes)[-1]
            self._tensors[part.name] = self._sequence.new_zeros(len(self._sequence), width, dtype=part.dtype)
        self._counts = [self._tensors["num_chosen"]]

    def attach(self, layers: Sequence[SimpleNamespace]) -> None:
        """Give each layer its own as attributes ``(B, K, ...)``."""
        for name, tensor in self._tensors.items():
            for layer, rows in zip(layers, tensor.split(self._rows), strict=True):
                setattr(layer, name, rows.unflatten(0, (self._batch_size, -1)))

    def view(self, layers: Sequence[SimpleNamespace]) -> PageChoice:
        """Of some sequences, whose ``layers`` have parts of these tensors: it can forget, and chooses nothing."""
        view = copy.copy(self)
        view._sizes = (0, 0)
        view._counts = [layer.num_chosen for layer in layers]
        return view

    def choose(self, quantized_len: Tensor) -> None:
        """Choose by the scores of the verification that ran last; ``quantized_len (B,)`` as it was then."""
        if self._sizes != (0, 0):
            tensors = (self._tensors[part.name] for part in PAGE_PARTS)
            choose_pages(*tensors, self._sequence, quantized_len, *self._budget)

    def read(self, quantized_len: Tensor) -> tuple[int, int]:
        """Pages that a draft step reads now, over all rows, and pages that they have; waits for the device."""
        pages = (-(-quantized_len // PAGE_TOKENS))[self._sequence]
        chosen, judged = self._tensors["num_chosen"].unbind(1)
        read, total = torch.stack(((pages - judged + chosen).sum(), pages.sum())).tolist()
        return read, total

    def forget(self) -> None:
        """Have draft steps read everything until the next choice."""
        for count in self._counts:
            count.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(tensor.nbytes for tensor in self._tensors.values())
