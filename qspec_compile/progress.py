"""Which tokens have been emitted, and when a sequence is done.

Speculation yields several tokens at once and sequences advance at different speeds, but stopping criteria and
streamers were written for one token of every sequence at a time. So tokens are judged in lock-step, in order: step s is
judged when every unfinished sequence has s new tokens, and what a sequence produced beyond its end is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class Progress:
    """The growing output of one ``generate`` call.

    Attributes:
        sequences: ``(B, prompt_len + max_new_tokens + slack)`` ids; padding where nothing is emitted yet.
        counts: new tokens of each sequence so far, judged or not.
        judged: steps that criteria and streamer have seen.
    """

    def __init__(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        pad_token_id: int,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        collect_scores: bool,
        slack: int,
    ) -> None:
        batch, self.prompt_len = input_ids.shape
        self.max_new_tokens = max_new_tokens
        self.pad_token_id = pad_token_id
        self.criteria = stopping_criteria
        self.streamer = streamer
        self.sequences = input_ids.new_full((batch, self.prompt_len + max_new_tokens + slack), pad_token_id)
        self.sequences[:, : self.prompt_len] = input_ids
        self.counts = [0] * batch
        self.judged = 0
        self._ended = [False] * batch
        self._end: list[int | None] = [None] * batch
        self._scores: list[list[Tensor]] | None = [[] for _ in range(batch)] if collect_scores else None
        # EOS is known at once; other criteria wait for their step.
        self._eos = {
            int(token)
            for criterion in stopping_criteria
            for token in torch.as_tensor(getattr(criterion, "eos_token_id", [])).flatten().tolist()
        }

    @property
    def context_lens(self) -> list[int]:
        """Tokens of each sequence so far, prompt and its padding included."""
        return [self.prompt_len + count for count in self.counts]

    @property
    def running(self) -> list[bool]:
        """Sequences that still need tokens."""
        return [not ended for ended in self._ended]

    @property
    def remaining(self) -> int:
        """Most tokens that any running sequence may still emit."""
        counts = [count for count, ended in zip(self.counts, self._ended, strict=True) if not ended]
        return self.max_new_tokens - min(counts) if counts else 0

    def append(self, row: int, tokens: list[int], scores: Tensor) -> int:
        """Emit ``tokens`` of one sequence, scored by ``scores (T, V)``, up to its end; returns how many."""
        emitted = 0
        for token, score in zip(tokens, scores, strict=True):
            if self._ended[row]:
                break
            self.sequences[row, self.prompt_len + self.counts[row]] = token
            self.counts[row] += 1
            emitted += 1
            if self._scores is not None:
                self._scores[row].append(score)
            self._ended[row] = token in self._eos or self.counts[row] == self.max_new_tokens
        return emitted

    def write_draft(self, offset: int, tokens: Tensor) -> None:
        """Put the ``offset``-th drafted token of every running sequence where a logits processor will read it."""
        for row, count in enumerate(self.counts):
            if not self._ended[row]:
                self.sequences[row, self.prompt_len + count + offset] = tokens[row]

    def judge(self) -> None:
        """Show every complete step to the streamer and the stopping criteria."""
        while any(end is None for end in self._end):
            step = self.judged + 1
            if any(end is None and count < step for end, count in zip(self._end, self.counts, strict=True)):
                return
            seen = self.sequences[:, : self.prompt_len + step]
            done = self.criteria(seen, self.scores(step))
            self.judged = step
            for row in range(len(self._end)):
                if self._end[row] is None and bool(done[row]):
                    self._end[row], self._ended[row] = step, True
                    self.counts[row] = step
                    self.sequences[row, self.prompt_len + step :] = self.pad_token_id
            if self.streamer is not None:
                self.streamer.put(seen[:, -1].cpu())

    def scores(self, steps: int) -> tuple[Tensor, ...] | None:
        """One ``(B, V)`` tensor per step, zero for sequences that had ended; None if scores are not collected."""
        if self._scores is None:
            return None
        blank = torch.zeros_like(self._scores[0][0])
        return tuple(
            torch.stack([row[step] if step < len(row) else blank for row in self._scores]) for step in range(steps)
        )

    def output(self) -> Tensor:
        """``(B, prompt_len + judged)`` ids."""
        return self.sequences[:, : self.prompt_len + self.judged].clone()

    def num_generated(self) -> int:
        """New tokens over all sequences, padding not counted."""
        return sum(min(count, self.judged) for count in self.counts)
