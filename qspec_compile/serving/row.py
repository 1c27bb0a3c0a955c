"""A request in a row of the running batch: its tokens, its processors, and what its caller has not been told yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantspec.cache import Lengths
from quantspec.engine.cycles import NAN_LOGITS, NO_DISTRIBUTION
from quantspec.engine.logits_processors import FollowingProcessor, apply_processors, compilable
from quantspec.engine.request import Request
from quantspec.engine.sampling import perturb

from .chunks import Chunks
from .requests import FinishReason, Output, TokenLogprobs


class Row:
    """A request from :meth:`Engine.add` to its end.

    Attributes:
        id: of the request.
        request: as the loop knows it, with the tokens so far.
        logprobs: likeliest tokens to report at each position; None for no log-probabilities.
        place: of the batch; None while it waits.
        keys: of the pages of its prompt that may be shared.
        pages: it holds, of its text in order.
        filled: tokens of its text that are cached.
        lengths: of its place, on the host, while its text is being cached; None while it waits.
        flushes: lengths of its text at which a group of it went into a page, since its prompt was cached.
        shared: tokens of its prompt that were cached when it got its first place; None before.
        on_host: whether its processors need the host, token by token.
        finish_reason: None while it runs or waits.
        drafted, accepted: tokens so far.
    """

    def __init__(self, id: int, request: Request, logprobs: int | None, keys: Sequence[bytes]) -> None:
        self.id = id
        self.keys = keys
        self.request = request
        self.logprobs = logprobs
        self.place: int | None = None
        self.pages: list[int] = []
        self.filled = 0
        self.lengths: Lengths | None = None
        self.flushes: list[int] = []
        self.shared: int | None = None
        self.on_host = len(compilable(request.processors)) < len(request.processors)
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.drafted = self.accepted = 0
        self._told = 0
        self._logprobs: list[TokenLogprobs] = []

    @property
    def length(self) -> int:
        """Tokens that are cached while it decodes: all but the newest one that it has emitted."""
        return len(self.request.prompt) + max(0, len(self.request.tokens) - 1)

    @property
    def decodes(self) -> bool:
        """Whether its text is cached, and it needs more tokens."""
        return self.finish_reason is None and bool(self.request.tokens) and self.filled == self.length

    @property
    def fills(self) -> bool:
        """Whether some of its text is not cached, and it needs more tokens."""
        return self.finish_reason is None and not self.decodes

    def num_pages(self, group: int) -> int:
        """Pages that its text is in, once that is cached."""
        return max(0, len(self.request.prompt) // group - 1) + len(self.flushes)

    def part(self, chunks: Chunks, group: int) -> Tensor:
        """The tokens to cache next, ``(n,)``; where they end depends on the text alone.

        Of the prompt they are a chunk, and what it has emitted ends where it went into pages: so it is read as it was
        when it was emitted.
        """
        prompt, tokens = self.request.prompt, self.request.tokens
        if self.filled < len(prompt):
            end = chunks.end(self.filled)
            return prompt[self.filled : end if len(prompt) - end >= group else None]
        end = next((flush for flush in self.flushes if flush > self.filled), self.length)
        return prompt.new_tensor(tokens[self.filled - len(prompt) : end - len(prompt)])

    def advance(self, group: int) -> None:
        """Count what a cycle has cached, and the group that went into a page."""
        self.filled = self.length
        if self.filled - self.num_pages(group) * group >= 2 * group:
            self.flushes.append(self.filled)

    def emit(self, tokens: Sequence[int], logits: Tensor | None) -> int:
        """Take ``tokens`` up to its end; returns how many. ``logits (T, V)`` are the target's in their places."""
        taken = self.request.append(tokens)
        if self.logprobs is not None and logits is not None:
            self._logprobs += _logprobs(logits[:taken], tokens[:taken], self.logprobs)
        if self.request.ended:
            stopped = self.request.tokens[-1] in self.request.eos_token_ids
            self.finish_reason = FinishReason.STOP if stopped else FinishReason.LENGTH
        return taken

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End it before it has what it asked for."""
        self.request.ended = True
        self.finish_reason, self.error = reason, error

    def first(self, logits: Tensor) -> None:
        """Emit what ``logits (V,)`` behind the prompt choose.

        Raises:
            FloatingPointError: the logits are NaN, or no token can be sampled.
            Exception: whatever a processor raises.
        """
        self.follow()
        self.emit([self._choose(logits)], logits[None])

    def walk(self, drafts: Sequence[int], logits: Tensor) -> int:
        """Emit the tokens of a block one by one, as plain decoding does, until a draft is rejected or the row ends.

        Args:
            drafts: T tokens.
            logits: ``(T + 1, V)`` of the target.

        Returns:
            How many drafts stand.

        Raises:
            As :meth:`first`.
        """
        for step, row in enumerate(logits):
            if step:
                self.follow()
            token = self._choose(row)
            self.emit([token], row[None])
            if self.request.ended or step == len(drafts) or token != drafts[step]:
                break
        return step

    def follow(self) -> None:
        """Let processors that read the text on the host do so: on a GPU while a cycle is under way."""
        for processor in self.request.processors:
            if isinstance(processor, FollowingProcessor):
                processor.follow([self.request.tokens], [True])

    def _choose(self, logits: Tensor) -> int:
        """The token that ``logits (V,)`` choose behind the text so far."""
        if bool(logits.isnan().any()):
            raise FloatingPointError(NAN_LOGITS)
        request = self.request
        text = torch.cat((request.prompt, request.prompt.new_tensor(request.tokens)))
        scores = apply_processors(request.processors, text[None], logits[None].to(torch.float32, copy=True))
        if not request.do_sample:
            return int(scores.argmax(-1))
        seeds, position = text.new_tensor([request.seed]), text.new_tensor([[len(text)]])
        best, token = perturb(scores[:, None], seeds, torch.ones_like(seeds, dtype=torch.bool), position)[0, 0].max(-1)
        if not bool(best.isfinite()):
            raise FloatingPointError(NO_DISTRIBUTION)
        return int(token)

    def output(self) -> Output | None:
        """What its caller has not been told yet; None if that is nothing."""
        new = tuple(self.request.tokens[self._told :])
        if not new and self.finish_reason is None:
            return None
        self._told += len(new)
        logprobs, self._logprobs = tuple(self._logprobs), []
        return Output(
            self.id,
            new,
            None if self.logprobs is None else logprobs,
            self.finish_reason,
            self.error,
            len(self.request.prompt),
            self.shared or 0,
            self.drafted,
            self.accepted,
        )


def _logprobs(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Log-probabilities of ``tokens`` by ``logits (T, V)``, and of the ``count`` likeliest in their places."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, logprobs.new_tensor(tokens, dtype=torch.int64)[:, None])[:, 0].tolist()
    top = logprobs.topk(min(count, logprobs.shape[1]))
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [TokenLogprobs(p, tuple(zip(*best, strict=True))) for p, best in zip(own, likeliest, strict=True)]
