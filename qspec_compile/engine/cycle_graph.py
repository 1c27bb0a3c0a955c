"""Cycles captured as CUDA graphs and replayed: one per number of drafts, kind of sampling and kinds of processors.

Lengths, tokens, the processors' parameters and the state of randomness live in tensors that the replays read.
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

from .acceptance import RULES, Acceptance, GreedyAcceptance, Rules, SampledAcceptance
from .cycle import Cycle
from .logits_processors import ScoreProgram, program_key
from .text import Text

# Cycles before capture: compilation, autotuning and workspace allocation happen in the first.
_WARM_UPS = 2
# Each holds memory of its own.
_MOST_REPLAYS = 16


def make_acceptance(
    pair: Pair, program: ScoreProgram, do_sample: bool, generator: torch.Generator | None, rules: Rules
) -> Acceptance:
    """How a cycle of this pair chooses tokens by processed scores."""
    if do_sample:
        return SampledAcceptance(program, generator, rules)
    return GreedyAcceptance(program, pair.compiles_on_gpu, rules)


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
        rules: Rules = RULES,
        text: Text | None = None,
    ) -> None:
        """Compile what is not compiled yet and capture. What cache and text hold is left as it is."""
        self.program = ScoreProgram(processors, text)
        self.generator = torch.Generator(device=pair.device)
        acceptance = make_acceptance(pair, self.program, do_sample, self.generator, rules)
        self.cycle = Cycle(pair, cache, acceptance, text=self.program.text)
        # Cycles of sequences that are all done move no length, and write past the verified tokens only.
        self.cycle.running.zero_()
        self._capture(num_drafts)

    def _capture(self, num_drafts: int) -> None:
        device, cache = self.cycle.pair.device, self.cycle.cache
        self._graph, self._flush_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._graph.register_generator_state(self.generator)
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

    def begin(self, processors: LogitsProcessorList, generator: torch.Generator | None) -> None:
        """Take over the parameters of ``processors`` and the state of ``generator`` (the global one if None)."""
        self.program.load(processors)
        self.generator.set_state(self._source(generator).get_state())

    def end(self, generator: torch.Generator | None) -> None:
        """Hand the state of randomness back."""
        self._source(generator).set_state(self.generator.get_state())

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

    def _source(self, generator: torch.Generator | None) -> torch.Generator:
        if generator is not None:
            return generator
        index = self.generator.device.index
        return torch.cuda.default_generators[torch.cuda.current_device() if index is None else index]


class ProposalReplay(CycleReplay):
    """Drafting and verification of a :class:`Cycle`, captured once; who replays them judges, and moves it on."""

    def __call__(self) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """Replay; returns what :meth:`Cycle.propose` does, overwritten by the next replay."""
        self._graph.replay()
        return self._proposal

    def _work(self, num_drafts: int) -> None:
        self._proposal = self.cycle.propose(num_drafts)


class CycleReplays:
    """The replays of one pair's cache, the latest used kept."""

    def __init__(self, pair: Pair, rules: Rules) -> None:
        self._pair = pair
        self._rules = rules
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
            self._pair, cache, num_drafts, processors, do_sample, self._rules, text
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
