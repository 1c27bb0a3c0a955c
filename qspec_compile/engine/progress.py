"""Which tokens have been emitted, and when a sequence is done.

Speculation yields several tokens at once and sequences advance at different speeds, but stopping criteria and
streamers were written for one token of every sequence at a time. So tokens are judged in lock-step, in order: step s is
judged when every unfinished sequence has s new tokens, and what a sequence produced beyond its end is dropped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class Progress:
    """The growing output of one ``generate`` call.

    Attributes:
        sequences: ``(B, prompt_len + max_new_tokens + slack)`` ids; padding where nothing is emitted yet, except for
            drafted tokens that a logits processor reads.
        counts: new tokens of each sequence so far, judged or not.
        judged: steps that criteria and streamer have seen.
        scores: one ``(B, V)`` tensor per judged step, zero for sequences that had ended; None if not collected.
        user_seconds: time spent so far in code that is neither ours nor transformers': the streamer's ``put`` and
            stopping criteria of the caller's own.
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
        self.streamer = streamer
        self.user_seconds = 0.0
        # The length and EOS are known at once, without asking the device; other criteria wait for their step.
        waiting = [criterion for criterion in stopping_criteria if not self._is_known_at_once(criterion)]
        of_transformers = [type(criterion).__module__.startswith("transformers.") for criterion in waiting]
        pairs = list(zip(waiting, of_transformers, strict=True))
        self._criteria = StoppingCriteriaList(criterion for criterion, theirs in pairs if theirs)
        self._user_criteria = StoppingCriteriaList(criterion for criterion, theirs in pairs if not theirs)
        self.sequences = input_ids.new_full((batch, self.prompt_len + max_new_tokens + slack), pad_token_id)
        self.sequences[:, : self.prompt_len] = input_ids
        self.counts = [0] * batch
        self.judged = 0
        self.scores: tuple[Tensor, ...] | None = () if collect_scores else None
        self._unjudged_scores: list[list[Tensor]] = [[] for _ in range(batch)]
        self._ended = [False] * batch
        self._end: list[int | None] = [None] * batch
        # Drafted tokens of the current block up to an EOS among them; what follows cannot matter.
        self._slack = slack
        self._draft_end = [slack] * batch
        self._eos = {
            int(token)
            for criterion in stopping_criteria
            if type(criterion) is EosTokenCriteria
            for token in criterion.eos_token_id.flatten().tolist()
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

    def append(self, row: int, tokens: list[int], scores: Tensor | None) -> int:
        """Emit ``tokens`` of one sequence up to its end; returns how many. ``scores (T, V)`` are kept if collected."""
        emitted = 0
        for step, token in enumerate(tokens):
            if self._ended[row]:
                break
            self.sequences[row, self.prompt_len + self.counts[row]] = token
            self.counts[row] += 1
            emitted += 1
            if self.scores is not None and scores is not None:
                self._unjudged_scores[row].append(scores[step])
            if token in self._eos or self.counts[row] == self.max_new_tokens:
                self._close(row)
        return emitted

    def write_draft(self, offset: int, tokens: Tensor) -> None:
        """Put the ``offset``-th drafted token of every running sequence where a logits processor will read it."""
        for row, token in enumerate(tokens.tolist()):
            if offset == 0:
                self._draft_end[row] = self._slack
            if not self._ended[row]:
                over = offset >= self._draft_end[row]
                place = self.prompt_len + self.counts[row] + offset
                self.sequences[row, place] = self.pad_token_id if over else token
                if token in self._eos and not over:
                    self._draft_end[row] = offset + 1

    def awaits(self, num_drafted: int) -> list[bool]:
        """Sequences whose token after ``num_drafted`` drafted ones can matter: running, and no EOS drafted before."""
        return [not ended and num_drafted < end for ended, end in zip(self._ended, self._draft_end, strict=True)]

    def judge(self) -> None:
        """Show every complete step to the streamer and the stopping criteria."""
        while any(end is None for end in self._end):
            step = self.judged + 1
            if any(end is None and count < step for end, count in zip(self._end, self.counts, strict=True)):
                return
            seen = self.sequences[:, : self.prompt_len + step]
            self.judged = step
            self._judge_scores()
            if self.streamer is not None:
                newest = seen[:, -1].cpu()
                with self._user_code():
                    self.streamer.put(newest)
            for row, done in enumerate(self._done(seen, step)):
                if self._end[row] is None and done:
                    self._end[row] = self.counts[row] = step
                    self._unjudged_scores[row].clear()
                    self._close(row)

    def _is_known_at_once(self, criterion: StoppingCriteria) -> bool:
        """Whether :meth:`append` obeys it by itself; a subclass may have a rule of its own."""
        if type(criterion) is MaxLengthCriteria:
            return criterion.max_length == self.prompt_len + self.max_new_tokens
        return type(criterion) is EosTokenCriteria

    def _done(self, seen: Tensor, step: int) -> list[bool]:
        """Whether each sequence has ended with its token of ``step``, the newest of ``seen``, or before."""
        done = [ended and count <= step for ended, count in zip(self._ended, self.counts, strict=True)]
        arguments = (cast(torch.LongTensor, seen), cast(torch.FloatTensor, self.scores))
        if self._criteria:
            done = [a or b for a, b in zip(done, self._criteria(*arguments).tolist(), strict=True)]
        if self._user_criteria:
            with self._user_code():
                # Read inside, so that work they queue on a device is theirs too.
                by_user = self._user_criteria(*arguments).tolist()
            done = [a or b for a, b in zip(done, by_user, strict=True)]
        return done

    @contextlib.contextmanager
    def _user_code(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.user_seconds += time.perf_counter() - start

    def output(self) -> Tensor:
        """``(B, prompt_len + judged)`` ids."""
        return self.sequences[:, : self.prompt_len + self.judged].clone()

    def new_tokens(self) -> list[Tensor]:
        """Ids that each sequence got after its prompt, padding left out."""
        ends = [self.prompt_len + min(count, self.judged) for count in self.counts]
        return [row[self.prompt_len : end] for row, end in zip(self.sequences, ends, strict=True)]

    def num_generated(self) -> int:
        """New tokens over all sequences, padding not counted."""
        return sum(min(count, self.judged) for count in self.counts)

    def _close(self, row: int) -> None:
        """End a sequence after its ``counts`` tokens."""
        self._ended[row] = True
        self.sequences[row, self.prompt_len + self.counts[row] :] = self.pad_token_id

    def _judge_scores(self) -> None:
        if self.scores is None:
            return
        step = [scores.pop(0) if scores else None for scores in self._unjudged_scores]
        blank = torch.zeros_like(next(score for score in step if score is not None))
        self.scores += (torch.stack([blank if score is None else score for score in step]),)
