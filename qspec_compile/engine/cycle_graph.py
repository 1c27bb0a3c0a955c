"""Cycles captured as CUDA graphs and replayed: a row of them per plan, with sampling or not, and kinds of processors.

Lengths, texts, the processors' parameters and the rows' seeds live in tensors that the replays read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from quantspec.cache import HierarchicalCache
from quantspec.logging import counting
from quantspec.pair import Pair

from .acceptance import Acceptance, Rule, acceptance_of
from .cycle import Cycle, LockstepCycle, Proposal, ShownCycle
from .graph_row import GraphRow
from .logits_processors import ScoreProgram, program_key
from .lookup import Lookup
from .plan import Plan
from .request import Request
from .sampling import Randomness, accept
from .text import Text

_LOGGER = logging.getLogger(__name__)

# Cycles before capture: compilation, autotuning and workspace allocation happen in the first.
_WARM_UPS = 2
# Each holds memory of its own.
_MOST_REPLAYS = 16


class CycleReplay:
    """A :class:`Cycle` of a fixed plan, captured once; ``cycle`` holds its input tensors.

    Valid while the storage of the cache and of the texts stays where it is.

    Attributes:
        scores, logits: ``(B, num_drafts + 1, V)`` of the verifier, overwritten by the next replay.
        judges: whether the device judges rows.
    """

    judges = True

    # Kept for later calls, which may be outside of this one's inference mode, and written by them.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        pair: Pair,
        cache: HierarchicalCache,
        plan: Plan,
        processors: LogitsProcessorList,
        do_sample: bool,
        rule: Rule = accept,
        text: Text | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        """Compile what is not compiled yet and capture. What cache and texts hold is left as it is."""
        self.program = ScoreProgram(processors, text)
        randomness = Randomness(cache.length) if do_sample else None
        acceptance = acceptance_of(self.program, pair, randomness, rule, self.judges)
        self._compose(pair, cache, acceptance, lookup)
        # Cycles of sequences that are all done move no length, and write past the verified tokens only.
        self.cycle.running.zero_()
        self._capture(plan)

    def _compose(self, pair: Pair, cache: HierarchicalCache, acceptance: Acceptance, lookup: Lookup | None) -> None:
        self.cycle = Cycle(pair, cache, acceptance, text=self.program.text, lookup=lookup)

    def _works(self, plan: Plan) -> tuple[Callable[[], object], ...]:
        """What is captured, a row of graphs for each."""
        return lambda: self._work(plan), self.cycle.cache.flush

    def _capture(self, plan: Plan) -> None:
        device, cache, works = self.cycle.pair.device, self.cycle.cache, self._works(plan)
        stream = torch.cuda.Stream(device)
        self._graphs = tuple(GraphRow(stream) for _ in works)
        stream.wait_stream(torch.cuda.current_stream(device))
        with (
            torch.cuda.stream(stream),
            counting(_LOGGER, f"compiling ({plan.num_drafts} drafts)", _WARM_UPS + 1) as advance,
        ):
            for _ in range(_WARM_UPS):
                for work in works:
                    work()
                advance(1)
            torch.cuda.synchronize(device)
            for graphs, work in zip(self._graphs, works, strict=True):
                self.cycle.cut = graphs.cut
                graphs.capture(work)
            del self.cycle.cut
            advance(1)
        torch.cuda.current_stream(device).wait_stream(stream)
        # Warm-ups choose by what no text says.
        cache.forget_pages()

    def begin(self, processors: LogitsProcessorList, requests: Sequence[Request]) -> None:
        """Take over the parameters of ``processors`` and the rows' seeds."""
        self.program.load(processors)
        if self.cycle.acceptance.randomness is not None:
            self.cycle.acceptance.randomness.load(requests)

    def __call__(self) -> Any:
        """Replay; returns :meth:`Cycle.__call__`'s packed result, overwritten by the next replay."""
        self._graphs[0].replay()
        return self._packed

    def flush(self) -> None:
        """Flush where it is due."""
        self._graphs[1].replay()

    def _work(self, plan: Plan) -> None:
        """The cycle."""
        self._packed, self.scores, self.logits = self.cycle(*plan)


class ProposalReplay(CycleReplay):
    """A :class:`LockstepCycle` of a fixed plan, captured once, but for judging, which is left to who replays it."""

    cycle: LockstepCycle
    kind: type[LockstepCycle] = LockstepCycle
    judges = False

    def __call__(self) -> Proposal:
        """Replay; returns what :meth:`LockstepCycle.show` does, overwritten by the next replay."""
        self._graphs[0].replay()
        return self._proposal

    def move_on(self, accepted: int, next_tokens: Tensor) -> Tensor:
        """:meth:`LockstepCycle.move_on` by ``accepted`` drafts of every row; overwritten by the next replay."""
        self._accepted.fill_(accepted)
        self._next_tokens.copy_(next_tokens)
        self._graphs[2].replay()
        return self._moved

    def _compose(self, pair: Pair, cache: HierarchicalCache, acceptance: Acceptance, lookup: Lookup | None) -> None:
        self.cycle = self.kind(pair, cache, acceptance, text=self.program.text, lookup=lookup)
        self._accepted, self._next_tokens = torch.zeros_like(cache.length), torch.zeros_like(cache.length)

    def _works(self, plan: Plan) -> tuple[Callable[[], object], ...]:
        return *super()._works(plan), self._move_on

    def _work(self, plan: Plan) -> None:
        self._proposal = self.cycle.show(*plan)

    def _move_on(self) -> None:
        self._moved = self.cycle.move_on(self._accepted, self._next_tokens)


class ShownReplay(ProposalReplay):
    """A :class:`ShownCycle` of a fixed plan, captured once; its acceptance judges what a replay has left."""

    kind = ShownCycle
    judges = True


class _KindOfCycle(NamedTuple):
    """What replays differ in besides their plan."""

    kind: type[CycleReplay]
    do_sample: bool
    program: Hashable
    looks_up: bool


class CycleReplays:
    """The replays of one pair's cache, the latest used kept."""

    def __init__(self, pair: Pair, rule: Rule) -> None:
        self._pair = pair
        self._rule = rule
        self._kept: dict[tuple[Plan, _KindOfCycle], CycleReplay] = {}
        self._storage: tuple[int, int] | None = None
        self._text: Text | None = None
        self._lookup: Lookup | None = None

    def kept(self) -> tuple[CycleReplay, ...]:
        """Those that are kept, the one used last at the end."""
        return tuple(self._kept.values())

    def plans(
        self, processors: LogitsProcessorList, do_sample: bool, looks_up: bool, kind: type[CycleReplay]
    ) -> set[Plan]:
        """Of which :meth:`of` has a replay."""
        wanted = _KindOfCycle(kind, do_sample, program_key(processors), looks_up)
        return {plan for plan, kept in self._kept if kept == wanted}

    def suit(self) -> bool:
        """Whether cycles can be replayed."""
        return self._pair.captures_cycles

    def of(
        self,
        cache: HierarchicalCache,
        plan: Plan,
        processors: LogitsProcessorList,
        do_sample: bool,
        text: Text | None = None,
        lookup: Lookup | None = None,
        kind: type[CycleReplay] = CycleReplay,
    ) -> tuple[CycleReplay, bool]:
        """The replay of such a cycle on the storage that :meth:`texts` gave, and whether it is new."""
        key = (plan, _KindOfCycle(kind, do_sample, program_key(processors), lookup is not None))
        is_new = key not in self._kept
        replay = self._kept.pop(key, None) or kind(
            self._pair, cache, plan, processors, do_sample, self._rule, text, lookup
        )
        # The latest used is the last.
        self._kept[key] = replay
        if len(self._kept) > _MOST_REPLAYS:
            del self._kept[next(iter(self._kept))]
        return replay, is_new

    def texts(self, cache: HierarchicalCache, width: int) -> tuple[Text, Lookup]:
        """Where the replays on this cache read at least ``width`` tokens; those on other storage are given back."""
        storage = (id(cache), cache.capacity)
        if self._storage != storage or self._text is None or self._text.ids.shape[1] < width:
            self.clear()
            self._storage = storage
            # Seldom too short for a later call on the same cache, whose padding may be longer.
            most = cache.num_speculative_tokens
            width = max(width, cache.capacity + 2 * (most + 1))
            self._text = Text(cache.batch_size, width, cache.length.device)
            self._lookup = Lookup(cache.batch_size, width, most, cache.length.device, self._pair.captures_cycles)
        assert self._lookup is not None
        return self._text, self._lookup

    def clear(self) -> None:
        """Give their memory back."""
        self._kept.clear()
        self._text = self._lookup = None
