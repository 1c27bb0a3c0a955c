"""Cycles captured as CUDA graphs and replayed: one per plan, with sampling or not, and kinds of processors.

Lengths, texts, the processors' parameters and the rows' seeds live in tensors that the replays read.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessorList

from quantspec.cache import HierarchicalCache
from quantspec.pair import Pair

from .acceptance import Acceptance, Rule
from .cycle import Cycle
from .logits_processors import ScoreProgram, program_key
from .lookup import Lookup
from .plan import Plan
from .request import Request
from .sampling import Randomness, accept
from .text import Text

# Cycles before capture: compilation, autotuning and workspace allocation happen in the first.
_WARM_UPS = 2
# Each holds memory of its own.
_MOST_REPLAYS = 16


class CycleReplay:
    """A :class:`Cycle` of a fixed plan, captured once; ``cycle`` holds its input tensors.

    Valid while the storage of the cache and of the texts stays where it is.

    Attributes:
        scores, logits: ``(B, num_drafts + 1, V)`` of the verifier, overwritten by the next replay.
    """

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
        acceptance = Acceptance(self.program, pair.compiles_on_gpu, randomness, rule)
        self.cycle = Cycle(pair, cache, acceptance, text=self.program.text, lookup=lookup)
        # Cycles of sequences that are all done move no length, and write past the verified tokens only.
        self.cycle.running.zero_()
        self._capture(plan)

    def _capture(self, plan: Plan) -> None:
        device, cache = self.cycle.pair.device, self.cycle.cache
        self._graph, self._flush_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        description = f"compiling ({plan.num_drafts} drafts)"
        with (
            torch.cuda.stream(stream),
            tqdm(total=_WARM_UPS + 1, desc=description, unit="run", leave=False, disable=None) as bar,
        ):
            for _ in range(_WARM_UPS):
                self._work(plan)
                cache.flush()
                bar.update()
            torch.cuda.synchronize(device)
            with torch.cuda.graph(self._graph, stream=stream):
                self._work(plan)
            with torch.cuda.graph(self._flush_graph, stream=stream), torch.no_grad():
                cache.flush()
            bar.update()
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
        self._graph.replay()
        return self._packed

    def flush(self) -> None:
        """Flush where it is due."""
        self._flush_graph.replay()

    def _work(self, plan: Plan) -> None:
        """What is captured."""
        self._packed, self.scores, self.logits = self.cycle(*plan)


class ProposalReplay(CycleReplay):
    """Drafting and verification of a :class:`Cycle`, captured once; who replays them judges, and moves it on."""

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Replay; returns what :meth:`Cycle.propose` does, overwritten by the next replay."""
        self._graph.replay()
        return self._proposal

    def _work(self, plan: Plan) -> None:
        self._proposal = self.cycle.propose(*plan)


class CycleReplays:
    """The replays of one pair's cache, the latest used kept."""

    def __init__(self, pair: Pair, rule: Rule) -> None:
        self._pair = pair
        self._rule = rule
        self._kept: dict[Hashable, CycleReplay] = {}
        self._storage: tuple[int, int] | None = None
        self._text: Text | None = None
        self._lookup: Lookup | None = None

    def kept(self) -> tuple[CycleReplay, ...]:
        """Those that are kept, the one used last at the end."""
        return tuple(self._kept.values())

    def suit(self) -> bool:
        """Whether cycles can be replayed: compiled, and on a GPU."""
        return self._pair.compiles_on_gpu

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
        key = (kind, plan, do_sample, program_key(processors), lookup is not None)
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
            self._lookup = Lookup(cache.batch_size, width, most, cache.length.device, self._pair.compiles_on_gpu)
        assert self._lookup is not None
        return self._text, self._lookup

    def clear(self) -> None:
        """Give their memory back."""
        self._kept.clear()
        self._text = self._lookup = None
