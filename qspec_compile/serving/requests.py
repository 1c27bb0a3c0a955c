"""What is asked of an engine, and what it answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


class FinishReason(StrEnum):
    """Why a request needs no more tokens."""

    STOP = "stop"
    """It emitted one of its stop tokens, which is the last of its tokens."""
    LENGTH = "length"
    """It has all the tokens it asked for."""
    CANCELLED = "cancelled"
    """Its caller wants no more of it."""
    ERROR = "error"
    """It cannot go on; the others do."""


class TokenLogprobs(NamedTuple):
    """The model's own log-probabilities of one position, before the request's logits processors.

    ``logprob`` of the token that was emitted; ``top`` of the likeliest tokens ``(id, logprob)``, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Request:
    """One text that shall be continued.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: it ends when it has this many.
        stop_token_ids: it ends behind any of these; None for what the generation config of the model says.
        options: for this request, over the generation config of the model: those that ``row_options`` of ``generate``
            takes (``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``, ...);
            ``seed``, of sampling; ``logprobs``, how many of the likeliest tokens to report at each position besides the
            one emitted, None for no log-probabilities; one of ``json_schema``, ``regex`` and ``grammar``;
            ``logits_processor``, a list of them.
        salt: whose request it is: only requests with the same salt share cached prompts.
        arrival: when it came, in seconds of ``time.monotonic``.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    stop_token_ids: Sequence[int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    salt: str = ""
    arrival: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Output:
    """What one step did for one request.

    Attributes:
        id: that ``add`` gave.
        token_ids: new ones, a stop token included; empty in many steps.
        logprobs: of each of them, if they were asked for.
        finish_reason: None while there is more to come.
        error: of a request that cannot go on, else None.
        prompt_tokens: of its prompt.
        cached_tokens: of its prompt, that need not be prefilled.
        drafted, accepted: tokens so far, over all its steps.
    """

    id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class EngineStatistics:
    """Of an engine since it was made; the first four as they are now.

    Attributes:
        running: requests that hold a slot.
        waiting: requests that hold none.
        pages_used, pages_total: of ``kv_group_size`` tokens, those that requests hold, and all.
        preemptions: times that a running request had to give up its slot and its pages.
        prompt_tokens, cached_prompt_tokens: of requests that got a slot, and of these those that were not prefilled.
        generated_tokens: over all requests.
        cycles: counted once for each request that took part.
        drafts: of these, those that drafted.
        draft_tokens, accepted_tokens: drafted in them, and accepted.
        finished: requests by how they ended.
    """

    running: int
    waiting: int
    pages_used: int
    pages_total: int
    preemptions: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    cycles: int
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    finished: Mapping[FinishReason, int]
