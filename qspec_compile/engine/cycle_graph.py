"""Cycles captured as CUDA graphs and replayed: one per number of drafts and kind of sampling.

Lengths, tokens, temperatures and the state of randomness live in tensors that the replays read.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessorList

from quantspec.cache import HierarchicalCache
from quantspec.pair import Pair

from .acceptance import RULES, Acceptance, GreedyAcceptance, Rules, SampledAcceptance
from .cycle import Cycle
from .logits_processors import ReplayedProcessors, replay_key

# Cycles before capture: compilation, autotuning and workspace allocation happen in the first.
_WARM_UPS = 2
# Each holds memory of its own.
_MOST_REPLAYS = 16


class CycleReplay:
    """A :class:`Cycle` of a fixed number of drafts, captured once; ``cycle`` holds its input tensors.

    Valid while the cache's storage stays where it is.
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
    ) -> None:
        """Compile what is not compiled yet and capture. What the cache holds is left as it is."""
        self.processors = ReplayedProcessors(processors, pair.device)
        self.generator = torch.Generator(device=pair.device)
        acceptance: Acceptance = (
            SampledAcceptance(self.processors, self.generator, rules)
            if do_sample
            else GreedyAcceptance(self.processors, pair.compiles_on_gpu, rules)
        )
        self.cycle = Cycle(pair, cache, acceptance)
        # Cycles of sequences that are all done move no length, and write past the verified tokens only.
        self.cycle.running.zero_()
        self._graph, self._flush_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._graph.register_generator_state(self.generator)
        stream = torch.cuda.Stream(pair.device)
        stream.wait_stream(torch.cuda.current_stream(pair.device))
        description = f"compiling ({num_drafts} drafts)"
        with (
            torch.cuda.stream(stream),
            tqdm(total=_WARM_UPS + 1, desc=description, unit="run", leave=False, disable=None) as bar,
        ):
            for _ in range(_WARM_UPS):
                self.cycle(num_drafts)
                cache.flush()
                bar.update()
            torch.cuda.synchronize(pair.device)
            with torch.cuda.graph(self._graph, stream=stream):
                self._packed, _ = self.cycle(num_drafts)
            with torch.cuda.graph(self._flush_graph, stream=stream), torch.no_grad():
                cache.flush()
            bar.update()
        torch.cuda.current_stream(pair.device).wait_stream(stream)

    def begin(self, processors: LogitsProcessorList, generator: torch.Generator | None) -> None:
        """Take over the parameters of ``processors`` and the state of ``generator`` (the global one if None)."""
        self.processors.load(processors)
        self.generator.set_state(self._source(generator).get_state())

    def end(self, generator: torch.Generator | None) -> None:
        """Hand the state of randomness back."""
        self._source(generator).set_state(self.generator.get_state())

    def __call__(self) -> Tensor:
        """Replay; returns :meth:`Cycle.__call__`'s packed result, overwritten by the next replay."""
        self._graph.replay()
        return self._packed

    def flush(self) -> None:
        """Flush where it is due."""
        self._flush_graph.replay()

    def _source(self, generator: torch.Generator | None) -> torch.Generator:
        if generator is not None:
            return generator
        index = self.generator.device.index
        return torch.cuda.default_generators[torch.cuda.current_device() if index is None else index]


class CycleReplays:
    """The replays of one pair's cache, the latest used kept."""

    def __init__(self, pair: Pair, rules: Rules) -> None:
        self._pair = pair
        self._rules = rules
        self._kept: dict[Hashable, CycleReplay] = {}
        self._storage: tuple[int, int] | None = None

    def kept(self) -> tuple[CycleReplay, ...]:
        """Those that are kept, the one used last at the end."""
        return tuple(self._kept.values())

    def suit(self, processors: LogitsProcessorList) -> bool:
        """Whether such cycles can be replayed: compiled, on a GPU, and no processor reads the text or keeps state."""
        return self._pair.compiles_on_gpu and replay_key(processors) is not None

    def of(
        self, cache: HierarchicalCache, num_drafts: int, processors: LogitsProcessorList, do_sample: bool
    ) -> tuple[CycleReplay, bool]:
        """The replay of such a cycle, and whether it is new and was captured for this."""
        storage = (id(cache), cache.capacity)
        if self._storage != storage:
            self.clear()
            self._storage = storage
        key = (num_drafts, do_sample, replay_key(processors))
        is_new = key not in self._kept
        replay = self._kept.pop(key, None) or CycleReplay(
            self._pair, cache, num_drafts, processors, do_sample, self._rules
        )
        # The latest used is the last.
        self._kept[key] = replay
        if len(self._kept) > _MOST_REPLAYS:
            del self._kept[next(iter(self._kept))]
        return replay, is_new

    def clear(self) -> None:
        """Give their memory back."""
        self._kept.clear()
