"""The hierarchical KV cache: what is allocated, and how its lengths move.

The ops in ``quantspec.kernels`` read and write the tensors; this file owns them and keeps the invariants of a cycle:
planes hold verified tokens only, and between cycles every sequence has fewer than 2G tokens in its recent buffer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from quantspec.errors import CacheFullError
from quantspec.kernels import flush
from quantspec.kernels.attention import first_visible
from quantspec.kernels.block_table import groups_of, is_paged, num_places
from quantspec.kernels.cache_layout import CACHE_PARTS, TABLE_PART, parts_on
from quantspec.kernels.decoded_attention import put_tokens
from quantspec.kernels.hierarchical import dense_key_value

from .geometry import AttentionShape, StateShape, layer_groups, part_shape, planned_groups, recent_slots, state_slots
from .lengths import Lengths
from .page_choice import PageBudget, PageChoice


def check_cache_len(num_tokens: int, max_len: int) -> None:
    """Raise :class:`CacheFullError` if ``num_tokens`` are more than ``max_len``."""
    if num_tokens > max_len:
        raise CacheFullError(
            f"{num_tokens} tokens are more than max_cache_len={max_len}; shorten the prompt or max_new_tokens, or "
            "convert with a larger max_cache_len"
        )


class LayerCache(SimpleNamespace):
    """One layer's tensors, each an attribute that is named as in ``quantspec.kernels.cache_layout.parts_on``."""

    @classmethod
    def allocate(
        cls,
        layer: AttentionShape,
        batch: int,
        groups: int,
        group_size: int,
        recent: int,
        dtype: torch.dtype,
        device,
        blocks: int | None = None,
    ) -> LayerCache:
        """Zeroed storage for ``groups`` groups and ``recent`` slots of each sequence.

        With ``blocks`` planes and scales have room for so many groups of all sequences together.
        """
        tensors: dict[str, Tensor] = {}
        for part in parts_on(device):
            sizes = (batch, groups) if blocks is None or not part.is_pooled else (1, blocks)
            shape = part_shape(part, layer, *sizes, group_size, recent)
            transposed = part.tokens_adjacent_on_cuda and torch.device(device).type == "cuda"
            stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
            tensor = torch.zeros(stored, dtype=part.dtype or dtype, device=device)
            tensors[part.name] = tensor.transpose(-1, -2) if transposed else tensor
        return cls(**tensors)

    @property
    def groups(self) -> int:
        """Groups there are places for."""
        return self.k_upper.shape[2]

    @property
    def group_size(self) -> int:
        """Tokens of a group (G)."""
        return 2 * self.k_upper.shape[3]

    def parts(self) -> tuple[Tensor, ...]:
        """All tensors, in the order the ops take them."""
        return tuple(getattr(self, part.name) for part in CACHE_PARTS)

    def grown(self, groups: int) -> LayerCache:
        """A copy with places for ``groups`` groups, laid out alike; the recent buffers are kept as they are.

        Of a text that had more groups than places before, nothing would be found.
        """
        grown = {}
        for part in parts_on(self.k_upper.device):
            tensor = getattr(self, part.name)
            if part.group_axis is not None:
                stored = tensor if tensor.stride(-1) == 1 else tensor.transpose(-1, -2)
                shape = list(stored.shape)
                shape[part.group_axis] += (groups - self.groups) * (self.group_size if "S" in part.axes else 1)
                larger = stored.new_zeros(shape)
                larger.narrow(part.group_axis, 0, stored.shape[part.group_axis]).copy_(stored)
                tensor = larger if stored is tensor else larger.transpose(-1, -2)
            grown[part.name] = tensor
        return LayerCache(**grown)


class HierarchicalCache:
    """All layers' caches and the per-sequence lengths.

    Attributes:
        group_size, num_speculative_tokens, max_len, batch_size: as given.
        layers: one :class:`LayerCache` per attention call that has keys and values of its own, in forward order.
        quantized_len: ``(B,)`` int64 on the device, tokens in the planes; a multiple of G.
        length: ``(B,)`` int64 on the device, tokens cached and verified.
        block_table: ``(B, N)`` int32 on the device, the blocks of a pool that have each sequence's groups; without
            elements where each has planes of its own.
        states: ``(B, S, ...)`` of each state: after the verified tokens, and after each that was read behind them.
    """

    # Tensors made in inference mode could not be written outside it, by a later call.
    @torch.inference_mode(False)
    def __init__(
        self,
        layers: Sequence[AttentionShape],
        batch_size: int,
        group_size: int,
        num_speculative_tokens: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        page_budget: PageBudget | None = None,
        states: Sequence[StateShape] = (),
    ) -> None:
        """An empty cache without planes; :meth:`reserve` gives it room.

        Args:
            layers: heads and head dims of each attention call, in forward order.
            batch_size: sequences (B).
            group_size: tokens quantized together (G), a power of two.
            num_speculative_tokens: most tokens drafted per cycle; recent buffers have room for a verification of one
                more.
            max_len: most tokens that a sequence may hold.
            dtype: of the recent buffers, the model's.
            device: of all tensors.
            page_budget: how much of the planes draft steps read; None for everything.
            states: what layers keep besides keys and values.
        """
        self.group_size = group_size
        self.num_speculative_tokens = num_speculative_tokens
        self.max_len = max_len
        self.batch_size = batch_size
        recent = recent_slots(group_size, num_speculative_tokens)
        self._shapes = [layer for layer in layers if layer.reads is None]
        places = {number: place for place, number in enumerate(n for n, one in enumerate(layers) if one.reads is None)}
        # For each attention call the place in ``layers`` of what it reads.
        self._read = [places[n if layer.reads is None else layer.reads] for n, layer in enumerate(layers)]
        self.layers: list[LayerCache] = [
            LayerCache.allocate(layer, batch_size, 0, group_size, recent, dtype, device) for layer in self._shapes
        ]
        self.block_table: Tensor = torch.zeros(batch_size, 0, dtype=TABLE_PART.dtype, device=device)
        self._pages = None if page_budget is None else PageChoice(self._shapes, batch_size, page_budget, device)
        # Of a sequence, that there is room for; a layer with a window has places for the last ones.
        self._groups = 0
        self._reserve_pages()
        self.quantized_len: Tensor = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.length: Tensor = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.states: list[Tensor] = [
            torch.zeros(batch_size, state_slots(num_speculative_tokens), *state.shape, dtype=state.dtype, device=device)
            for state in states
        ]
        # Most tokens that were in the planes since a text began; a ring has lost what lies too far before them.
        self._written: Tensor = torch.zeros(batch_size, dtype=torch.int64, device=device)
        # Tokens that were kept last; the states after each of them are where they were written still.
        self._kept: Tensor = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def capacity(self) -> int:
        """Tokens a sequence can hold before the planes must grow."""
        return (self._groups + 1) * self.group_size

    @torch.inference_mode(False)
    def reserve(self, num_tokens: int) -> None:
        """Make room for ``num_tokens`` tokens per sequence, growing in whole groups.

        Raises:
            CacheFullError: more than ``max_len``; nothing is changed.
        """
        check_cache_len(num_tokens, self.max_len)
        groups = planned_groups(num_tokens, self.group_size, self.max_len)
        # Layer by layer, so that at most one exists twice; what an out-of-memory error leaves undone is done next time.
        for index, (layer, shape) in enumerate(zip(self.layers, self._shapes, strict=True)):
            places = layer_groups(shape, groups, self.group_size)
            if places > layer.groups:
                self.layers[index] = layer.grown(places)
        self._groups = max(self._groups, groups)
        self._reserve_pages()

    @torch.inference_mode(False)
    def reserve_pool(self, num_tokens: int, num_blocks: int) -> None:
        """Give an empty cache planes that its sequences share: :meth:`set_blocks` tells which are whose.

        Args:
            num_tokens: most that a sequence may hold.
            num_blocks: groups of tokens that there is room for, of all sequences together.

        Raises:
            CacheFullError: more tokens than ``max_len``.
        """
        check_cache_len(num_tokens, self.max_len)
        groups = planned_groups(num_tokens, self.group_size, self.max_len)
        # Without groups nothing is ever stored.
        if groups:
            self.block_table = self.block_table.new_zeros(self.batch_size, groups)
            recent = self.layers[0].k_recent
            sizes = (self.batch_size, groups, self.group_size, recent.shape[2], recent.dtype, recent.device, num_blocks)
            self.layers = [LayerCache.allocate(shape, *sizes) for shape in self._shapes]
            self._groups = groups
            self._reserve_pages()

    def set_blocks(self, sequence: int, first: int, blocks: Sequence[int]) -> None:
        """Have groups ``first`` and on of a sequence in these blocks of the pool."""
        row = self.block_table[sequence, first : first + len(blocks)]
        row.copy_(torch.tensor(blocks, dtype=row.dtype, device="cpu"))

    def _reserve_pages(self) -> None:
        if self._pages is not None:
            self._pages.reserve(self._groups, self.group_size)
            self._pages.attach(self.layers)

    @torch.inference_mode(False)
    def view(self, first: int, count: int) -> HierarchicalCache:
        """A cache of ``count`` sequences from ``first`` on, with their storage and lengths; valid until this one grows.

        It chooses no pages: what its draft steps read stays as it is, or is forgotten.
        """
        rows = slice(first, first + count)
        view = copy.copy(self)
        view.batch_size = count
        pooled = {part.name for part in CACHE_PARTS if part.is_pooled} if is_paged(self.block_table) else frozenset()
        view.layers = [
            LayerCache(**{name: part if name in pooled else part[rows] for name, part in vars(layer).items()})
            for layer in self.layers
        ]
        view.block_table = self.block_table[rows]
        view.quantized_len, view.length = self.quantized_len[rows], self.length[rows]
        view._written, view._kept = self._written[rows], self._kept[rows]
        view.states = [state[rows] for state in self.states]
        if self._pages is not None:
            view._pages = self._pages.view(view.layers)
        return view

    def inputs(self, parts: Sequence[str]) -> list[Tensor]:
        """The cache tensors that a graph takes after its other inputs: these parts, call by call."""
        return [
            self.block_table if part == TABLE_PART.name else getattr(self.layers[place], part)
            for place in self._read
            for part in parts
        ]

    def advance_prefill(self, num_new: Tensor) -> None:
        """Count ``num_new`` (B,) int64 tokens that every layer has stored through ``quantspec::prefill_attention``."""
        before = self.quantized_len.clone()
        self._kept.zero_()
        Lengths(self.quantized_len, self.length).fill(num_new, self.group_size)
        self.decode(before)

    @torch.inference_mode(False)
    def host_lengths(self) -> Lengths:
        """The lengths on the host, which waits for the device; they stay as they are when the cache moves on."""
        lengths = torch.stack((self.quantized_len, self.length)).to("cpu", copy=True)
        return Lengths(*lengths)

    def accept(self, num_tokens: Tensor) -> bool:
        """Keep ``num_tokens`` (B,) int64 of the tokens just verified; the rest is abandoned. Flushes where it is due.

        Returns:
            Whether anything was flushed.
        """
        due = bool(self.keep(num_tokens))
        if due:
            self.flush()
        return due

    def keep(self, num_tokens: Tensor) -> Tensor:
        """:meth:`accept` without the flush; returns a bool tensor ``()`` on the device: whether one is due now."""
        self.length += num_tokens
        self._take_states(num_tokens)
        self._kept.copy_(num_tokens)
        return self._due().any()

    def flush(self) -> None:
        """Move a group into the planes in every sequence whose recent buffer holds at least 2G tokens."""
        due = self._due()
        # The op looks at the lengths itself.
        for layer in self.layers:
            flush(*layer.parts(), self.quantized_len, self.length, self.block_table)
        before = self.quantized_len.clone()
        self.quantized_len += due * self.group_size
        self.decode(before)

    def settle(self) -> None:
        """Move all into the planes in sequences whose recent buffer holds one group, as a prefill may leave it."""
        full = self.length - self.quantized_len == self.group_size
        # The op moves a group where the lengths say that another one follows it.
        length = self.quantized_len + full * 2 * self.group_size
        for layer in self.layers:
            flush(*layer.parts(), self.quantized_len, length, self.block_table)
        before = self.quantized_len.clone()
        Lengths(self.quantized_len, self.length).settle(self.group_size)
        self.decode(before)

    @torch.inference_mode(False)
    def resume(self, num_tokens: int) -> Lengths:
        """Hold the first ``num_tokens``, a multiple of G, that are in the planes, also since before a :meth:`reset`.

        Returns:
            The lengths on the host.
        """
        self.reset()
        self.length.fill_(num_tokens)
        self.quantized_len.fill_(num_tokens)
        self.decode(torch.zeros_like(self.length))
        return Lengths(*torch.full((2, self.batch_size), num_tokens, dtype=torch.int64, device="cpu"))

    def choose_pages(self) -> None:
        """Choose what the next draft steps read, by the verification that ran last, if their attention is sparse."""
        if self._pages is not None:
            self._pages.choose(self.quantized_len)

    def pages_read(self) -> tuple[int, int] | None:
        """Pages of all layers, sequences and KV heads that a sparse draft step reads now, and how many there are."""
        return None if self._pages is None else self._pages.read(self.quantized_len)

    def forget_pages(self) -> None:
        """Have draft steps read everything until pages are chosen again."""
        if self._pages is not None:
            self._pages.forget()

    def decode(self, first: Tensor) -> None:
        """Bring a CPU's decoded copy up to date from positions ``first`` (B,) on, which are group boundaries."""
        if self.length.device.type != "cpu":
            return
        state = list(enumerate(zip(first.tolist(), self.quantized_len.tolist(), self.length.tolist(), strict=True)))
        for row, (first_token, quantized, length) in state:
            for layer in self.layers:
                places = num_places(layer.k_upper, self.block_table)
                # A ring has the last groups alone. What follows is as if the sequence began with the first of them.
                start = max(first_token, quantized - places * self.group_size)
                bounds = (start // self.group_size, quantized // self.group_size)
                groups = groups_of(layer.k_upper, self.block_table, row, *bounds)
                own = {
                    part.name: groups.of(tensor) if part.is_pooled else tensor[row]
                    for part, tensor in zip(CACHE_PARTS, layer.parts(), strict=True)
                }
                dense = dense_key_value(max(0, quantized - start), length - start, layer.k_decoded.dtype, **own)
                for copied, tokens in zip((layer.k_decoded, layer.v_decoded), dense, strict=True):
                    put_tokens(copied[row], start, tokens)

    def _take_states(self, place: Tensor) -> None:
        """Make the states at ``place (B,)`` those of the verified tokens."""
        sequences = torch.arange(self.batch_size, device=place.device)
        for state in self.states:
            state[:, 0] = state[sequences, place]

    def _due(self) -> Tensor:
        return self.length - self.quantized_len >= 2 * self.group_size

    def rewind(self, num_tokens: Tensor) -> None:
        """Keep the first ``num_tokens`` (B,) int64 tokens; back to a group boundary where that cuts into the planes.

        A sequence begins anew where that would need tokens that a window has lost: by a group it can always go back.
        States go back by less than the tokens that were kept last: with any, a sequence that would have to go farther
        begins anew.
        """
        inside = num_tokens < self.quantized_len
        num_tokens = torch.where(inside, num_tokens // self.group_size * self.group_size, num_tokens)
        self._written.copy_(torch.maximum(self._written, self.quantized_len))
        num_tokens = torch.where(inside & self._lost(num_tokens), 0, num_tokens)
        if self.states:
            back = self.length - num_tokens
            known = (back == 0) | (back < self._kept)
            num_tokens = torch.where(known, num_tokens, 0)
            self._take_states(torch.where(known & (back > 0), self._kept - back, 0))
            for state in self.states:
                state[~known, 0] = 0
            self._kept.zero_()
        self.length.copy_(num_tokens)
        self.quantized_len.copy_(torch.minimum(num_tokens, self.quantized_len))
        self._written.masked_fill_(num_tokens == 0, 0)
        self.forget_pages()

    def _lost(self, boundary: Tensor) -> Tensor:
        """Whether a ring no longer has what a query at ``boundary (B,)``, the first after the planes, sees."""
        rings = {
            (shape.window or -shape.chunk, layer.groups)
            for shape, layer in zip(self._shapes, self.layers, strict=True)
            if shape.window or shape.chunk
        }
        lost = torch.zeros_like(boundary, dtype=torch.bool)
        for window, places in rings:
            lost |= first_visible(boundary, window) < self._written - places * self.group_size
        return lost

    def reset(self) -> None:
        """Forget all tokens and keep the storage."""
        self._written.zero_()
        self.length.zero_()
        self.quantized_len.zero_()
        self.forget_pages()
        self._kept.zero_()
        for state in self.states:
            state[:, 0] = 0

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of storage: ``upper``, ``lower``, ``scales`` (with zeros), ``recent``, on a CPU ``decoded``,
        for a sparse draft ``pages``, and, where layers keep any, ``state``."""
        parts = parts_on(self.length.device)
        totals = {str(part.kind): 0 for part in parts}
        for layer in self.layers:
            for part in parts:
                totals[part.kind] += getattr(layer, part.name).nbytes
        if self._pages is not None:
            totals["pages"] = self._pages.nbytes
        if self.states:
            totals["state"] = sum(state.nbytes for state in self.states)
        return totals
