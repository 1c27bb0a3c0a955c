"""A request in a row of the running batch: its tokens, its processors, and what its caller has not been told yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantspec.engine.cycles import NAN_LOGITS, NO_DISTRIBUTION
from quantspec.engine.logits_processors import FollowingProcessor, apply_processors, compilable
from quantspec.engine.request import Request
from quantspec.engine.sampling import perturb

from .requests import FinishReason, Output, TokenLogprobs


class Row:
    """A request from :meth:`Engine.add` to its end.

    Attributes:
        id: of the request.
        request: as the loop knows it, with the tokens so far.
        logprobs: likeliest tokens to report at each position; None for no log-probabilities.
        place: of the batch; None while it waits.
        keys: of the chunks of its prompt that may be shared.
        filled: tokens of its prompt that are cached; None before it was looked for those that are.
        shared: of them, those that were there.
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
        self.filled: int | None = None
        self.shared = 0
        self.on_host = len(compilable(request.processors)) < len(request.processors)
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.drafted = self.accepted = 0
        self._told = 0
        self._logprobs: list[TokenLogprobs] = []

    @property
    def decodes(self) -> bool:
        """Whether its prompt is cached, and it needs more tokens."""
        return self.finish_reason is None and bool(self.request.tokens)

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
            self.shared,
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
