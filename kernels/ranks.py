"""``quantspec::reduce_ranks`` and ``quantspec::gather_ranks``: what the ranks of tensor parallelism tell each other.

Both are torch's functional collectives. On GPUs that reach each other's memory a short sum is one kernel, in which
every rank reads the others' terms (torch's symmetric memory, without multicast); a captured CUDA graph holds either.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

# A longer sum is bound by bytes, of which NCCL moves fewer.
MOST_BYTES_AT_ONCE = 512 * 2**10
# torch's kernel adds no others; a sum of float16 goes through NCCL.
_SUMMED_AT_ONCE = (torch.float32, torch.bfloat16)
# Memory that a group's ranks share, by the group's name; what is missing sums through NCCL.
_SHARED: dict[str, Tensor] = {}


def share_memory(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Let short sums of ``group`` go through memory that its ranks share; returns whether they can.

    Every rank calls it. They take the way that all of them can take.
    """
    import torch.distributed._symmetric_memory as symmetric

    try:
        buffer = symmetric.empty(MOST_BYTES_AT_ONCE, dtype=torch.uint8, device=device)
        symmetric.rendezvous(buffer, group)
        works = True
    except (RuntimeError, AttributeError, NotImplementedError):
        works = False
    agreed = torch.tensor([int(works)], device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group)
    if agreed.item():
        _SHARED[group.group_name] = buffer
    return bool(agreed.item())


def forget_memory(group: str) -> None:
    """Give back what :func:`share_memory` took."""
    _SHARED.pop(group, None)


def sums_at_once(x: Tensor) -> bool:
    """Whether torch's kernel over shared memory takes a contiguous ``x``: float32 or bfloat16, in whole 16 bytes."""
    ends = (x.nbytes, x.storage_offset() * x.itemsize)
    return x.dtype in _SUMMED_AT_ONCE and x.nbytes <= MOST_BYTES_AT_ONCE and not any(end % 16 for end in ends)


@torch.library.custom_op("quantspec::reduce_ranks", mutates_args=())
def reduce_ranks(x: Tensor, group: str) -> Tensor:
    """The sum of every rank's ``x``, of any shape and float dtype, the same bits on all ranks of ``group``."""
    shared, x = _SHARED.get(group), x.contiguous()
    if shared is None or not sums_at_once(x):
        return collectives.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group))
    room = shared[: x.nbytes].view(x.dtype).view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(room, x, "sum", group)


@reduce_ranks.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("quantspec::gather_ranks", mutates_args=())
def gather_ranks(x: Tensor, world: int, size: int, group: str) -> Tensor:
    """``(..., N)`` of each of ``world`` ranks side by side, ``(..., size)``, the same bits on all.

    Where ``size`` is less than ``world * N``, the last rank's part begins with what the one before ends with.
    """
    flat = x.contiguous().view(-1, x.shape[-1])
    whole = torch.ops._c10d_functional.all_gather_into_tensor(flat, world, group)
    parts = collectives.wait_tensor(whole).view(world, *x.shape)
    joined = parts.movedim(0, -2).flatten(-2)
    twice = world * x.shape[-1] - size
    if not twice:
        return joined
    before = (world - 1) * x.shape[-1]
    return torch.cat((joined[..., :before], joined[..., before + twice :]), -1)


@gather_ranks.register_fake
def _(x: Tensor, world: int, size: int, group: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], size)
