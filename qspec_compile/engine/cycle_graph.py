"""Cycles captured as CUDA graphs and replayed: one per number of drafts, with sampling or not, and kinds of processors.

Lengths, tokens, the processors' parameters and the rows' seeds live in tensors that the replays read.
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
from .request import Request
from .sampling import Randomness, accept
from .text import Text

# Cycles before capture: compilation, autotuning and workspace allocation happen in the first.
_WARM_UPS = 2
# Each holds memory of its own.
_MOST_REPLAYS = 16


class CycleReplay:
    """A :class:`Cycle` of a fixed number of drafts, captured once; ``cycle`` holds its input tensors.

    Valid while the storage of the cache and of the text stays where it is.

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
        num_drafts: int,
        processors: LogitsProcessorList,
        do_sample: bool,
        rule: Rule = accept,
        text: Text | None = None,
    ) -> None:
        """Compile what is not compiled yet and capture. What cache and text hold is left as it is."""
        self.program = ScoreProgram(processors, text)
        randomness = Randomness(cache.length) if do_sample else None
        acceptance = Acceptance(self.program, pair.compiles_on_gpu, randomness, rule)
        self.cycle = Cycle(pair, cache, acceptance, text=self.program.text)
        # Cycles of sequences that are all done move no length, and write past the verified tokens only.
        self.cycle.running.zero_()
        self._capture(num_drafts)

    def _capture(self, num_drafts: int) -> None:
        device, cache = self.cycle.pair.device, self.cycle.cache
        self._graph, self._flush_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        description = f"compiling ({num_drafts} drafts)"
        with (
            torch.cuda.stream(stream),
            tqdm(total=_WARM_UPS + 1, desc=description, unit="run", leave=False, disable=None) as bar,
        ):
            for _ in range(_WARM_UPS):
                self._work(num_drafts)
                cache.flush()
                bar.update()
            torch.cuda.synchronize(device)
            with torch.cuda.graph(self._graph, stream=stream):
                self._work(num_drafts)
            with torch.cuda.graph(self._flush_graph, stream=stream), torch.no_grad():
                cache.flush()
            bar.update()
        torch.cuda.current_stream(device).wait_stream(stream)

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

    def _work(self, num_drafts: int) -> None:
        """What is captured."""
        self._packed, self.scores, self.logits = self.cycle(num_drafts)


class ProposalReplay(CycleReplay):
    """Drafting and verification of a :class:`Cycle`, captured once; who replays them judges, and moves it on."""

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Replay; returns what :meth:`Cycle.propose` does, overwritten by the next replay."""
        self._graph.replay()
        return self._proposal

    def _work(self, num_drafts: int) -> None:
        self._proposal = self.cycle.propose(num_drafts)


class CycleReplays:
    """The replays of one pair's cache, the latest used kept."""

    def __init__(self, pair: Pair, rule: Rule) -> None:
        self._pair = pair
        self._rule = rule
        self._kept: dict[Hashable, CycleReplay] = {}
        self._storage: tuple[int, int] | None = None
        self._text: Text | None = None

    def kept(self) -> tuple[CycleReplay, ...]:
        """Those that are kept, the one used last at the end."""
        return tuple(self._kept.values())

    def suit(self) -> bool:
        """Whether cycles can be replayed: compiled, and on a GPU."""
        return self._pair.compiles_on_gpu

    def of(
        self,
        cache: HierarchicalCache,
        num_drafts: int,
        processors: LogitsProcessorList,
        do_sample: bool,
        text: Text | None = None,
        kind: type[CycleReplay] = CycleReplay,
    ) -> tuple[CycleReplay, bool]:
        """The replay of such a cycle on the storage that :meth:`text` was asked for, and whether it is new."""
        key = (kind, num_drafts, do_sample, program_key(processors))
        is_new = key not in self._kept
        replay = self._kept.pop(key, None) or kind(
            self._pair, cache, num_drafts, processors, do_sample, self._rule, text
        )
        # The latest used is the last.
        self._kept[key] = replay
        if len(self._kept) > _MOST_REPLAYS:
            del self._kept[next(iter(self._kept))]
        return replay, is_new

    def text(self, cache: HierarchicalCache, width: int) -> Text:
        """Where the replays on this cache read at least ``width`` tokens; those on other storage are given back."""
        storage = (id(cache), cache.capacity)
        if self._storage != storage or self._text is None or self._text.ids.shape[1] < width:
            self.clear()
            self._storage = storage
            # Seldom too short for a later call on the same cache, whose padding may be longer.
            width = max(width, cache.capacity + 2 * (cache.num_speculative_tokens + 1))
            self._text = Text(cache.batch_size, width, cache.length.device)
        return self._text

    def clear(self) -> None:
        """Give their memory back."""
        self._kept.clear()
        self._text = None
