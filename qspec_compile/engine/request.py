"""A request: one sequence that is being generated, as the host knows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import LogitsProcessorList


@dataclass
class Request:
    """Token ids, limits and state of one sequence.

    Attributes:
        prompt: ``(S,)`` int64 ids without padding, on the model's device.
        max_new_tokens: it ends when it has this many.
        eos_token_ids: it ends behind any of these.
        processors: of its scores, in order.
        do_sample: sampling, else greedy search.
        seed: int64 of its randomness, if it is sampled.
        tokens: new ids so far.
        scores, logits: ``(V,)`` float32 of the newest tokens, as many as nobody has taken yet; empty if not collected.
        ended: whether it needs no more tokens.
    """

    prompt: Tensor
    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    do_sample: bool = False
    seed: int = 0
    tokens: list[int] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    ended: bool = False

    @property
    def remaining(self) -> int:
        """Most tokens that it may still get."""
        return 0 if self.ended else self.max_new_tokens - len(self.tokens)

    def append(self, tokens: Sequence[int], scores: Tensor | None = None, logits: Tensor | None = None) -> int:
        """Take ``tokens`` up to the end of the sequence, and their scores and logits ``(T, V)``; returns how many."""
        taken = 0
        for token in tokens:
            if self.ended:
                break
            self.tokens.append(token)
            if scores is not None:
                self.scores.append(scores[taken])
            if logits is not None:
                self.logits.append(logits[taken])
            taken += 1
            self.ended = token in self.eos_token_ids or len(self.tokens) == self.max_new_tokens
        return taken

    def needs_after(self, tokens: Sequence[int]) -> bool:
        """Whether it would need another token behind ``tokens``."""
        return len(tokens) < self.remaining and not self.eos_token_ids.intersection(tokens)

    def cut(self, length: int) -> None:
        """End it behind its first ``length`` tokens."""
        del self.tokens[length:]
        self.scores.clear()
        self.logits.clear()
        self.ended = True
