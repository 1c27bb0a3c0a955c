"""Pages of the hierarchical cache: what sparse attention chooses among, and their scores in plain torch.

A page is 32 consecutive byte rows of the planes, counted over all groups: 64 tokens, of one group or of several small
ones. Only whole pages are scored and chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import compute_dtype, first_visible

# A tile of the kernel that attends, so that a list of pages is a list of tiles.
PAGE_BYTES = 32
PAGE_TOKENS = 2 * PAGE_BYTES


def num_pages(groups: int, group_size: int) -> int:
    """Pages that hold ``groups`` groups, the last of them perhaps in part."""
    return -(-groups * group_size // PAGE_TOKENS)


def page_of_token(num_tokens: int, group_size: int, device: torch.device) -> Tensor:
    """The page ``(num_tokens,)`` of each of the first tokens of the planes, whole groups."""
    token, half = torch.arange(num_tokens, device=device), group_size // 2
    return (token // group_size * half + token % half) // PAGE_BYTES


def score_pages(
    query: Tensor,
    keys: Tensor,
    v_scale: Tensor,
    quantized: int,
    start: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Score of each page of one sequence: the logarithm of the most that one of its tokens can move an output.

        score[k, p] = max_{h of k, t, j in p, part} log(softmax_j(softcap(scale * q[h, t] . k_j)) * v_scale[j, part])

    Args:
        query: ``(H, T, D)``, rotated; token t sits at position ``start + t``.
        keys: ``(K, start + T, D)`` of all tokens, as they are read.
        v_scale: ``(K, N, G, num_value_groups(Dv))`` of the values in the planes.
        quantized: tokens in the planes.
        start, scale, window, softcap, sinks: as in ``quantspec::cached_attention``.

    Returns:
        ``(K, pages)`` in float32 at least; -inf for a page that no query sees.
    """
    dtype, group_size = compute_dtype(query.dtype), v_scale.shape[2]
    kv_heads, tokens = keys.shape[0], query.shape[1]
    scores = query.to(dtype) @ keys.to(dtype).repeat_interleave(len(query) // kv_heads, 0).transpose(1, 2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(start + tokens, device=query.device)
    own = position[start:, None]
    hidden = position > own
    if window:
        hidden |= position < first_visible(own, window)
    scores = scores.masked_fill(hidden, float("-inf"))
    total = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(dtype)[:, None, None])
    most = (scores - total)[..., :quantized].unflatten(0, (kv_heads, -1)).amax((1, 2))
    most += v_scale[:, : quantized // group_size].flatten(1, 2).to(dtype).amax(-1).log()
    page = page_of_token(quantized, group_size, query.device).expand(kv_heads, -1)
    by_page = most.new_full((kv_heads, -(-quantized // PAGE_TOKENS)), float("-inf"))
    return by_page.scatter_reduce(1, page, most, "amax")


def read_tokens(chosen: Tensor, num_chosen: Tensor, quantized: int, group_size: int) -> Tensor:
    """Which of the ``quantized`` tokens in one sequence's planes each KV head reads: bool ``(K, quantized)``.

    Args:
        chosen: ``(K, W)`` int32 pages; the first ``num_chosen[k, 0]`` of them are read.
        num_chosen: ``(K, 2)`` int32; pages from ``num_chosen[k, 1]`` on are read too.
        quantized, group_size: as in :func:`score_pages`.
    """
    count = -(-quantized // PAGE_TOKENS)
    read = torch.arange(count, device=chosen.device) >= num_chosen[:, 1:]
    for head, (number, _) in enumerate(num_chosen.tolist()):
        read[head, chosen[head, :number].long()] = True
    return read[:, page_of_token(quantized, group_size, chosen.device)]
