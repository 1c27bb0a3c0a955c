"""Scoring a given text through the quantized cache, which is read as generation reads it.

A context is prefilled into the cache but for its last token. That token and what follows go through the decoding graph
of a role in blocks, and each block's keys and values enter the cache as verified tokens do. So every scored logit comes
from the target's INT8 or the draft's INT4 read of what lies in the planes. Of texts below 2G tokens nothing does: they
are read in full precision.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantspec import QuantSpecModel
from quantspec.cache import HierarchicalCache
from quantspec.engine.forced_text import MAX_BLOCK, Block, forced_blocks
from quantspec.engine.loop import NAN_LOGITS
from quantspec.engine.prefill import prefill
from quantspec.passes import Role

_LOGGER = logging.getLogger(__name__)


class Score(NamedTuple):
    """A continuation's log-probability (natural), and whether each of its tokens is the argmax."""

    log_probability: float
    is_greedy: bool


class PrefilledContexts:
    """A batch of contexts in the cache of ``qs``, put back as it was before each use.

    Valid within the :meth:`Session.exclusive` use of ``qs`` that it was made in, until others are made.
    """

    def __init__(self, qs: QuantSpecModel, contexts: Sequence[Tensor], num_following: Sequence[int]) -> None:
        """Prefill 1-D ``contexts``, which may be empty, with room for ``num_following`` more tokens of each.

        Raises:
            CacheFullError: context and following tokens would exceed ``max_cache_len``.
        """
        self.qs = qs
        self.contexts = contexts
        self.cache = qs.session.acquire_cache(contexts, MAX_BLOCK - 1)
        self._lengths = torch.tensor([len(context) for context in contexts], device=qs.device)
        tokens = max(len(context) + more for context, more in zip(contexts, num_following, strict=True))
        # From 3G tokens on the planes hold two groups, and torch.compile does not take their number for a constant.
        self.cache.reserve(max(tokens, min(3 * self.cache.group_size, self.cache.max_len)))
        self._prefill()

    def restored(self) -> HierarchicalCache:
        """The cache with the contexts and nothing after them."""
        # A flush has quantized tokens that a prefill leaves in full precision.
        was_flushed = not torch.equal(self.cache.quantized_len, self._quantized_len)
        if not was_flushed:
            self.cache.rewind(self._lengths)
        # States go back by a few tokens alone, else a sequence begins anew.
        if was_flushed or not torch.equal(self.cache.length, self._lengths):
            self._prefill()
        return self.cache

    def _prefill(self) -> None:
        self.cache.reset()
        if bool(self._lengths.any()):
            prefill(self.qs.pair, self.cache, self.contexts)
        self._quantized_len = self.cache.quantized_len.clone()


def forced_text(qs: QuantSpecModel, ids: Tensor, context_len: int, role: Role) -> Iterator[Block]:
    """Blocks of the tokens of 1-D ``ids`` from ``context_len`` on, after the context before them is prefilled.

    Other threads' calls of ``qs`` wait until the last block has been taken.
    """
    with qs.session.exclusive():
        prefilled = PrefilledContexts(qs, [ids[:context_len]], [len(ids) - context_len])
        yield from forced_blocks(qs.pair, prefilled.restored(), [ids[context_len:]], role)


def score_continuations(
    qs: QuantSpecModel, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]], role: Role
) -> list[list[Score]]:
    """Scores of several continuations of each of B contexts; contexts are prefilled once, other threads wait.

    Args:
        qs: the pair.
        contexts: token ids, at least one each.
        continuations: for each context, any number of non-empty continuations.
        role: whose graph scores, target or draft.

    Raises:
        CacheFullError: a context and its continuation would exceed ``max_cache_len``.
        FloatingPointError: the logits of a continuation are NaN.
    """
    with qs.session.exclusive():
        return _score_continuations(qs, contexts, continuations, role)


def _score_continuations(
    qs: QuantSpecModel, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]], role: Role
) -> list[list[Score]]:
    device = qs.device
    longest = [max(map(len, row)) for row in continuations]
    prefilled = PrefilledContexts(
        qs, [torch.tensor(c[:-1], dtype=torch.long, device=device) for c in contexts], longest
    )
    scores: list[list[Score]] = [[] for _ in contexts]
    for turn in range(max(map(len, continuations))):
        # A context with fewer continuations feeds nothing in this turn.
        current = [list(row[turn]) if turn < len(row) else [] for row in continuations]
        fed = [[context[-1], *tokens[:-1]] if tokens else [] for context, tokens in zip(contexts, current, strict=True)]
        blocks = forced_blocks(qs.pair, prefilled.restored(), [_ids(row, device) for row in fed], role)
        for row, score in enumerate(_score_blocks(blocks, [_ids(tokens, device) for tokens in current])):
            if current[row]:
                scores[row].append(score)
    return scores


def warn_of_short_texts(qs: QuantSpecModel, longest: int, what: str) -> None:
    """Warn if texts of ``longest`` tokens at most leave the planes empty, so that nothing of them was quantized."""
    least = 2 * qs.config.kv_group_size
    if longest < least:
        _LOGGER.warning(
            "%s never reached the quantized cache: the longest text has %d tokens, and below 2G = %d all are read in "
            "full precision; give longer texts (NAME@LENGTH where a task can be made of a length), or convert with a "
            "smaller kv_group_size",
            *(what, longest, least),
        )


def sequences_that_fit(qs: QuantSpecModel, num_tokens: int, num_bytes: int) -> int:
    """How many sequences of ``num_tokens`` can be scored together if caches and logits may take ``num_bytes``."""
    cache = qs.pair.new_cache(1, MAX_BLOCK - 1)
    cache.reserve(num_tokens)
    # Logits, their log-softmax and one temporary, in float32.
    return num_bytes // (sum(cache.bytes_by_part().values()) + 3 * 4 * MAX_BLOCK * qs.vocab_size)


def _ids(tokens: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(tokens, dtype=torch.long, device=device)


def _score_blocks(blocks: Iterator[Block], labels: Sequence[Tensor]) -> list[Score]:
    """Scores of ``labels``, the tokens that the rows of ``blocks`` are to predict."""
    ids = torch.nn.utils.rnn.pad_sequence(list(labels), batch_first=True)
    lengths = torch.tensor([len(row) for row in labels], device=ids.device)[:, None]
    total = torch.zeros(len(labels), dtype=torch.float64, device=ids.device)
    greedy = torch.ones(len(labels), dtype=torch.bool, device=ids.device)
    for block in blocks:
        end = block.first + block.logits.shape[1]
        wanted = ids[:, block.first : end]
        beyond = torch.arange(block.first, end, device=ids.device) >= lengths
        log_probabilities = block.logits.float().log_softmax(-1)
        chosen = log_probabilities.gather(-1, wanted[..., None])[..., 0]
        total += chosen.masked_fill(beyond, 0).sum(-1, dtype=torch.float64)
        greedy &= ((log_probabilities.argmax(-1) == wanted) | beyond).all(-1)
    # One NaN among a token's logits makes all of its log-probabilities NaN.
    if bool(total.isnan().any()):
        raise FloatingPointError(NAN_LOGITS)
    return [Score(*pair) for pair in zip(total.tolist(), greedy.tolist(), strict=True)]
