"""One speculative cycle as device work: draft, verify, accept, count; and the flush that follows some of them.

Nothing here waits for the host, so on a GPU a cycle is captured once as a CUDA graph and replayed; the host reads one
small tensor per cycle, which also says whether the flush, a graph of its own, is due. Lengths, tokens, temperatures and
seeds live in tensors that the graphs read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessorList

from quantspec.passes import Role

from .cache import HierarchicalCache
from .sampling import accept_greedy, accept_sampled, sample
from .scores import GraphedProcessors

if TYPE_CHECKING:
    from .model import QuantSpecModel

# Cycles before capture: compilation, autotuning and workspace allocation happen in the first.
_WARM_UPS = 2


class CycleResult(NamedTuple):
    """What a cycle did to each of B sequences, on the host.

    ``drafts (B, T)`` proposed tokens, of which the first ``accepted (B,)`` stand, followed by ``next_tokens (B,)``;
    ``flush_due`` tells whether any sequence has a group to move into the planes before the next cycle, ``has_nan``
    whether any logit was NaN or, in sampling, the distribution that a next token was to be drawn from.
    """

    drafts: list[list[int]]
    accepted: list[int]
    next_tokens: list[int]
    flush_due: bool
    has_nan: bool

    @classmethod
    def read(cls, packed: Tensor) -> CycleResult:
        """Unpack :meth:`Cycle.__call__`'s tensor; the one copy to the host in a cycle."""
        rows = packed.tolist()
        return cls(
            [row[:-4] for row in rows],
            [row[-4] for row in rows],
            [row[-3] for row in rows],
            any(row[-2] for row in rows),
            any(row[-1] for row in rows),
        )


class Cycle:
    """The device's part of a cycle.

    Attributes:
        pending: ``(B,)`` newest token of each sequence, whose key and value are not cached yet; moved on by a cycle.
        running: ``(B,)`` bool; sequences that are done go through the motions and keep their state.
    """

    def __init__(
        self,
        qs: QuantSpecModel,
        cache: HierarchicalCache,
        process: Callable[[Tensor, int], Tensor],
        do_sample: bool,
        generator: torch.Generator | None,
        on_draft: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """``process(logits (B, T, V), num_drafted)`` gives float32 scores; ``on_draft(step, tokens)`` sees drafts."""
        self.qs = qs
        self.cache = cache
        self.process = process
        self.do_sample = do_sample
        self.generator = generator
        self.on_draft = on_draft
        self.pending = cache.length.new_zeros(cache.batch_size)
        self.running = torch.ones_like(self.pending, dtype=torch.bool)
        # Fused, what reads the whole vocabulary is a few kernels instead of many.
        compiled: Callable[..., Any] = torch.compile if qs.compiles and qs.device.type == "cuda" else lambda f: f
        self._argmax, self._has_nan = compiled(_argmax), compiled(_has_nan)
        self._accept_greedy = compiled(accept_greedy)

    @torch.no_grad()
    def __call__(self, num_drafts: int) -> tuple[Tensor, Tensor]:
        """Run one cycle of ``num_drafts`` drafted tokens.

        Returns:
            ``(B, num_drafts + 4)`` int64 for :meth:`CycleResult.read` and the target's scores
            ``(B, num_drafts + 1, V)``.
        """
        drafts, draft_probs, logits = self.propose(num_drafts)
        scores = self.process(logits, 0)
        if self.do_sample:
            probs = scores.softmax(-1)
            proposed = torch.stack(draft_probs, 1) if draft_probs else probs[:, :0]
            accepted, next_tokens = accept_sampled(drafts, proposed, probs, self.generator)
            # Nothing is accepted where a softmax is NaN, which it is in all places or none.
            has_nan = probs[..., 0].gather(1, accepted[:, None])[:, 0].isnan()
        else:
            accepted, next_tokens = self._accept_greedy(drafts, scores)
            has_nan = self._has_nan(logits)
        due = self.keep(accepted, next_tokens)
        columns = (accepted, next_tokens, due.expand_as(accepted), has_nan & self.running)
        return torch.cat((drafts, torch.stack([column.long() for column in columns], 1)), 1), scores

    @torch.no_grad()
    def propose(self, num_drafts: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """Draft and verify.

        Returns:
            ``(B, num_drafts)`` drafted tokens, when sampling the distribution ``(B, V)`` that each was drawn from, and
            the target's logits ``(B, num_drafts + 1, V)``.
        """
        drafts, draft_probs = self._draft(num_drafts)
        return drafts, draft_probs, self._verify(drafts)

    def keep(self, accepted: Tensor, next_tokens: Tensor) -> Tensor:
        """Move the running sequences on by ``accepted (B,)`` drafts and ``next_tokens (B,)``.

        Returns:
            A bool tensor ``()`` on the device: whether a flush is due.
        """
        due = self.cache.keep(torch.where(self.running, accepted + 1, 0))
        self.pending.copy_(torch.where(self.running, next_tokens, self.pending))
        return due

    def _draft(self, num_drafts: int) -> tuple[Tensor, list[Tensor]]:
        """``num_drafts`` tokens ``(B, T)`` of the INT4 draft and, when sampling, a distribution ``(B, V)`` of each."""
        tokens, probs = [], []
        current = self.pending
        zero = self.pending.new_zeros(self.cache.batch_size, 1)
        for step in range(num_drafts):
            length = self.cache.length + step
            inputs = (current[:, None], self._positions(length[:, None]), zero, self.cache.quantized_len, length)
            scores = self.process(self.qs.forward(Role.DRAFT, *inputs, cache=self.cache), step)[:, 0]
            if self.do_sample:
                probs.append(scores.softmax(-1))
                current = sample(probs[-1], self.generator)
            else:
                current = self._argmax(scores)
            tokens.append(current)
            if self.on_draft is not None:
                self.on_draft(step, current)
        return torch.stack(tokens, 1) if tokens else zero[:, :0], probs

    def _verify(self, drafts: Tensor) -> Tensor:
        """The target's logits ``(B, T + 1, V)`` of every drafted token and of the one after them."""
        block = torch.cat((self.pending[:, None], drafts), 1)
        rows = torch.arange(block.shape[1], device=block.device).expand_as(block)
        positions = self._positions(self.cache.length[:, None] + rows)
        inputs = (block, positions, rows, self.cache.quantized_len, self.cache.length)
        return self.qs.forward(Role.TARGET, *inputs, cache=self.cache)

    def _positions(self, positions: Tensor) -> Tensor:
        """``positions`` within the model's table: drafts may run past the end, where nothing of them is kept."""
        return positions.clamp(max=self.cache.max_len - 1)


def _argmax(scores: Tensor) -> Tensor:
    return scores.argmax(-1)


def _has_nan(logits: Tensor) -> Tensor:
    """Whether any of ``(B, T, V)`` logits is NaN, ``(B,)``."""
    return logits.isnan().flatten(1).any(-1)


class GraphedCycle:
    """A :class:`Cycle` of a fixed number of drafts, replayed as one CUDA graph; ``cycle`` holds its input tensors.

    Valid while the cache's storage stays where it is.
    """

    # Kept for later calls, which may be outside of this one's inference mode, and written by them.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        qs: QuantSpecModel,
        cache: HierarchicalCache,
        num_drafts: int,
        processors: LogitsProcessorList,
        do_sample: bool,
    ) -> None:
        """Compile what is not compiled yet and capture. What the cache holds is left as it is."""
        self.processors = GraphedProcessors(processors, qs.device)
        self.generator = torch.Generator(device=qs.device)
        self.cycle = Cycle(qs, cache, self.processors, do_sample, self.generator)
        # Cycles of sequences that are all done move no length, and write past the verified tokens only.
        self.cycle.running.zero_()
        self.graph, self.flush_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.generator)
        stream = torch.cuda.Stream(qs.device)
        stream.wait_stream(torch.cuda.current_stream(qs.device))
        with (
            torch.cuda.stream(stream),
            tqdm(
                total=_WARM_UPS + 1, desc=f"compiling ({num_drafts} drafts)", unit="run", leave=False, disable=None
            ) as bar,
        ):
            for _ in range(_WARM_UPS):
                self.cycle(num_drafts)
                cache.flush()
                bar.update()
            torch.cuda.synchronize(qs.device)
            with torch.cuda.graph(self.graph, stream=stream):
                self.packed, _ = self.cycle(num_drafts)
            with torch.cuda.graph(self.flush_graph, stream=stream), torch.no_grad():
                cache.flush()
            bar.update()
        torch.cuda.current_stream(qs.device).wait_stream(stream)

    def begin(self, processors: LogitsProcessorList, generator: torch.Generator | None) -> None:
        """Take over the parameters of ``processors`` and the state of ``generator`` (the global one if None)."""
        self.processors.load(processors)
        self.generator.set_state(self._source(generator).get_state())

    def end(self, generator: torch.Generator | None) -> None:
        """Hand the state of randomness back."""
        self._source(generator).set_state(self.generator.get_state())

    def __call__(self) -> Tensor:
        """Replay; returns the packed result, overwritten by the next replay."""
        self.graph.replay()
        return self.packed

    def flush(self) -> None:
        """Flush where it is due."""
        self.flush_graph.replay()

    def _source(self, generator: torch.Generator | None) -> torch.Generator:
        if generator is not None:
            return generator
        index = self.generator.device.index
        return torch.cuda.default_generators[torch.cuda.current_device() if index is None else index]
