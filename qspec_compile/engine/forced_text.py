"""Reading a given text through the cache, block by block, as verification reads drafts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantspec.cache import HierarchicalCache
from quantspec.pair import Pair
from quantspec.passes import Role

# Tokens per block: as many as the largest verification (15 drafts + 1).
MAX_BLOCK = 16


class Block(NamedTuple):
    """Logits of consecutive tokens of each of B sequences.

    ``logits (B, T, V)``: row t follows the token ``first + t`` of those that were fed; a row past a sequence's end
    means nothing. ``quantized_len (B,)``: tokens that lay in the planes when the block was read.
    """

    first: int
    quantized_len: Tensor
    logits: Tensor


@torch.no_grad()
def forced_blocks(
    pair: Pair, cache: HierarchicalCache, tokens: Sequence[Tensor], role: Role, sizes: Iterable[int] = ()
) -> Iterator[Block]:
    """Feed 1-D ``tokens`` of each sequence after what ``cache`` holds, and yield their logits block by block.

    The last block is left unaccepted, so tokens that fit in one block do not change the cache.

    Args:
        pair: whose graph reads.
        cache: of the pair, with room for a verification of the largest block, rounded up to a power of two.
        tokens: of each sequence, int64.
        role: target or draft.
        sizes: tokens of the first blocks; later ones have :data:`MAX_BLOCK`.
    """
    ids = torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
    lengths = torch.tensor([len(row) for row in tokens], device=ids.device)
    first = previous = 0
    for size in itertools.chain(sizes, itertools.repeat(MAX_BLOCK)):
        if first >= ids.shape[1]:
            return
        if previous:
            cache.accept((lengths - first + previous).clamp(0, previous))
        block = ids[:, first : first + size]
        # Powers of two: few sizes for the kernels to be specialized to.
        padding = (1 << (block.shape[1] - 1).bit_length()) - block.shape[1]
        quantized_len = cache.quantized_len.clone()
        logits = pair.read(role, F.pad(block, (0, padding)), cache)
        yield Block(first, quantized_len, logits[:, : block.shape[1]])
        first, previous = first + size, size


@torch.no_grad()
def read_incrementally(
    pair: Pair, ids: Tensor, prompt_len: int, steps: Sequence[int], role: Role = Role.TARGET
) -> Tensor:
    """A role's logits of the last prompt token and of every later one, decoded in blocks of ``steps`` tokens.

    Args:
        pair: the pair; a cache of its own is made for this.
        ids: ``(1, prompt_len + sum(steps))`` int64; the prompt is always prefilled by the target.
        prompt_len: tokens of the prompt, at least 1.
        steps: tokens of each block, one block at least.
        role: target or draft, whose graph decodes the blocks.

    Returns:
        ``(1, 1 + sum(steps), V)`` in the model's dtype.

    Raises:
        CacheFullError: ``ids`` are more than ``max_cache_len``.
    """
    cache = pair.new_cache(1, 2 * max(steps))
    cache.reserve(ids.shape[1])
    logits = [pair.fill(ids[:, :prompt_len], [prompt_len], cache)]
    blocks = forced_blocks(pair, cache, [ids[0, prompt_len:]], role, steps)
    return torch.cat([*logits, *(block.logits for block in blocks)], 1)
