"""What the requests of one batch have emitted, and when each is done.

Speculation yields several tokens at once and sequences advance at different speeds, but stopping criteria and
streamers were written for one token of every sequence at a time. So tokens are judged in lock-step, in order: step s is
judged when every unfinished sequence has s new tokens, and what a sequence produced beyond its end is dropped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .request import Outputs, Request


class Progress:
    """The growing output of one ``generate`` call.

    The host's lists of tokens are what counts; the device has a copy where somebody reads it.

    Attributes:
        requests: one per sequence.
        judged: steps that criteria and streamer have seen.
        scores, logits: one ``(B, V)`` float32 per judged step, zero for sequences that had ended; None if not
            collected.
        user_seconds: time spent so far in code that is neither ours nor transformers': the streamer's ``put`` and
            stopping criteria of the caller's own.
    """

    def __init__(
        self,
        input_ids: Tensor,
        requests: Sequence[Request],
        pad_token_id: int,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        collect_scores: bool = False,
        collect_logits: bool = False,
        agree: Callable[[Sequence[int]], list[int]] = list,
        abandon: Callable[[], None] | None = None,
    ) -> None:
        """``input_ids (B, S)`` are the prompts with their padding.

        ``agree`` makes numbers rank 0's; ``abandon`` tells ranks that await them that it gives up, None without any.
        """
        batch, self.prompt_len = input_ids.shape
        self.pad_token_id = pad_token_id
        self.streamer = streamer
        self._agree, self._abandon = agree, abandon
        self.failure: BaseException | None = None
        self.user_seconds = 0.0
        self.judged = 0
        self.scores: tuple[Tensor, ...] | None = () if collect_scores else None
        self.logits: tuple[Tensor, ...] | None = () if collect_logits else None
        self._end: list[int | None] = [None] * batch
        # The length and EOS are known at once, without asking the device; other criteria wait for their step.
        length = self.prompt_len + max(request.max_new_tokens for request in requests)
        waiting = [criterion for criterion in stopping_criteria if not _is_known_at_once(criterion, length)]
        theirs = [criterion for criterion in waiting if type(criterion).__module__.startswith("transformers.")]
        self._criteria = StoppingCriteriaList(theirs)
        self._user_criteria = StoppingCriteriaList(criterion for criterion in waiting if criterion not in theirs)
        self.requests: Sequence[Request] = list(requests)
        self._ids = input_ids.new_full((batch, length), pad_token_id)
        self._ids[:, : self.prompt_len] = input_ids
        # Columns of the device's copy that will not change, and whether the host has more than the copy.
        self._settled = self.prompt_len
        self._is_stale = False

    @property
    def width(self) -> int:
        """Most tokens of a row: ``prompt_len + max_new_tokens``."""
        return self._ids.shape[1]

    @property
    def sequences(self) -> Tensor:
        """``(B, prompt_len + max_new_tokens)`` ids on the device; padding where nothing is emitted yet."""
        if self._is_stale:
            self._copy()
        return self._ids

    @property
    def context_lens(self) -> list[int]:
        """Tokens of each sequence so far, prompt and its padding included."""
        return [self.prompt_len + len(request.tokens) for request in self.requests]

    @property
    def running(self) -> list[bool]:
        """Sequences that still need tokens."""
        return [not request.ended for request in self.requests]

    @property
    def remaining(self) -> int:
        """Most tokens that any running sequence may still emit."""
        return max(request.remaining for request in self.requests)

    def append(self, row: int, tokens: list[int], scores: Outputs | None, logits: Outputs | None) -> int:
        """Emit ``tokens`` of one sequence up to its end; returns how many. Outputs are kept if collected."""
        self._is_stale = True
        return self.requests[row].append(
            tokens, None if self.scores is None else scores, None if self.logits is None else logits
        )

    def judge(self) -> None:
        """Show every complete step to the streamer and the stopping criteria."""
        while any(end is None for end in self._end):
            step = self.judged + 1
            if any(
                end is None and len(request.tokens) < step
                for end, request in zip(self._end, self.requests, strict=True)
            ):
                return
            self.judged = step
            self._judge_outputs()
            if self.streamer is not None:
                self.stream(torch.tensor([self._token(request, step) for request in self.requests], device="cpu"))
            for row, done in enumerate(self._done(step)):
                if self._end[row] is None and done:
                    self._end[row] = step
                    self.requests[row].cut(step)
                    self._settled = min(self._settled, self.prompt_len + step)
                    self._is_stale = True

    def stream(self, ids: Tensor) -> None:
        """Give the streamer, if there is one, prompts or newest tokens on the host.

        Where other ranks work on, it does not fail before they can be told: in :meth:`agree`, or :meth:`end`.
        """
        if self.streamer is None or self.failure is not None:
            return
        try:
            with self._user_code():
                self.streamer.put(ids)
        except BaseException as error:
            self.failure = error
            if self._abandon is None:
                raise

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """Rank 0's ``numbers``; raises what the streamer has."""
        if self.failure is not None:
            assert self._abandon is not None
            self._abandon()
            raise self.failure
        return self._agree(numbers)

    def end(self) -> None:
        """Tell the streamer that nothing more comes; raises what it has."""
        if self.failure is not None:
            raise self.failure
        if self.streamer is not None:
            self.streamer.end()

    def _token(self, request: Request, step: int) -> int:
        """The request's token of a step; padding behind its end."""
        return request.tokens[step - 1] if len(request.tokens) >= step else self.pad_token_id

    def _done(self, step: int) -> list[bool]:
        """Whether each sequence has ended with its token of ``step`` or before."""
        done = [request.ended and len(request.tokens) <= step for request in self.requests]
        if not self._criteria and not self._user_criteria:
            return done
        seen = self.sequences[:, : self.prompt_len + step]
        arguments = (cast(torch.LongTensor, seen), cast(torch.FloatTensor, self.scores))
        if self._criteria:
            done = [a or b for a, b in zip(done, self._criteria(*arguments).tolist(), strict=True)]
        if self._user_criteria:
            with self._user_code():
                # Read inside, so that work they queue on a device is theirs too.
                by_user = self._user_criteria(*arguments).tolist()
            done = [a or b for a, b in zip(done, by_user, strict=True)]
        # They may follow the time, or whatever the caller's process has.
        return list(map(bool, self.agree(done)))

    @contextlib.contextmanager
    def _user_code(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.user_seconds += time.perf_counter() - start

    def _copy(self) -> None:
        """Bring the device's copy up to date, in one transfer."""
        lens, first = self.context_lens, self._settled
        width = max(lens) - first
        rows = [request.tokens[first - self.prompt_len :] for request in self.requests]
        padded = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        self._ids[:, first : first + width] = torch.tensor(padded, device="cpu", dtype=torch.int64).to(self._ids.device)
        self._settled = min((count for count, runs in zip(lens, self.running, strict=True) if runs), default=max(lens))
        self._is_stale = False

    def output(self) -> Tensor:
        """``(B, prompt_len + judged)`` ids."""
        return self.sequences[:, : self.prompt_len + self.judged].clone()

    def texts(self) -> list[Tensor]:
        """Ids ``(S + new,)`` of each prompt and what followed it, padding left out."""
        return [
            torch.cat((request.prompt, request.prompt.new_tensor(request.tokens[: self.judged])))
            for request in self.requests
        ]

    def num_generated(self) -> int:
        """New tokens over all sequences, padding not counted."""
        return sum(min(len(request.tokens), self.judged) for request in self.requests)

    def _judge_outputs(self) -> None:
        if self.scores is not None:
            self.scores += (_take_step([request.scores for request in self.requests]),)
        if self.logits is not None:
            self.logits += (_take_step([request.logits for request in self.requests]),)


def by_row(outputs: Tensor) -> list[Outputs]:
    """``(B, T, V)`` as each row's T outputs."""
    # All at once: as many views one by one would take longer than what they are copied from.
    each, count = outputs.flatten(0, 1).unbind(), outputs.shape[1]
    return [each[first : first + count] for first in range(0, len(each), count)]


def _take_step(waiting: list[list[Tensor]]) -> Tensor:
    """``(B, V)``: the first that waits of each row, zero where there is none."""
    step = [rows.pop(0) if rows else None for rows in waiting]
    some = next(row for row in step if row is not None)
    return torch.stack([torch.zeros_like(some) if row is None else row for row in step])


def _is_known_at_once(criterion: StoppingCriteria, length: int) -> bool:
    """Whether a request obeys it by itself; a subclass may have a rule of its own."""
    if type(criterion) is MaxLengthCriteria:
        return criterion.max_length == length
    return type(criterion) is EosTokenCriteria
