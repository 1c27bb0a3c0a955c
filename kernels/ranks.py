"""``quantspec::reduce_ranks`` and ``quantspec::gather_ranks``: what the ranks of tensor parallelism tell each other.

Both are torch's functional collectives. On GPUs that reach each other's memory a sum of few rows is one launch
(:mod:`.rank_sums_triton`), a longer one torch's kernel, in which every rank reads the others' terms (symmetric memory,
without multicast); a captured CUDA graph holds any of these. ``quantspec::reduce_ranks_to_norm`` also does what follows
most sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from .current_device import on_tensors_device
from .rank_sums_triton import MOST_ROWS, Inbox, fits_inbox, has_kernel_for, inbox_bytes, sum_rows

# A longer sum is bound by bytes, of which NCCL moves fewer.
MOST_BYTES_AT_ONCE = 512 * 2**10
# torch's kernel adds no others; a longer sum of float16 goes through NCCL.
_SUMMED_AT_ONCE = (torch.float32, torch.bfloat16)


class _Shared(NamedTuple):
    """Memory that a group's ranks share.

    Attributes:
        room: bytes for torch's kernel.
        inbox: of ours.
        one: what stops the kernels that await terms, in memory of the host that a device copies by itself.
    """

    room: Tensor
    inbox: Inbox
    one: Tensor


# By the name of the group; what is missing sums through NCCL.
_SHARED: dict[str, _Shared] = {}


def share_memory(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Let short sums of ``group`` go through memory that its ranks share; returns whether they can.

    Every rank calls it. They take the way that all of them can take.
    """
    import torch.distributed._symmetric_memory as symmetric

    forget_memory(group.group_name)
    shared = None
    try:
        buffer = symmetric.empty(MOST_BYTES_AT_ONCE + inbox_bytes(group.size()), dtype=torch.uint8, device=device)
        addresses = symmetric.rendezvous(buffer, group).buffer_ptrs
        room, words = buffer[:MOST_BYTES_AT_ONCE], buffer[MOST_BYTES_AT_ONCE:].zero_().view(torch.int64)
        of_words = torch.tensor([address + MOST_BYTES_AT_ONCE for address in addresses], device=device)
        counts = torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)
        stop, one = torch.zeros(1, dtype=torch.int32, device=device), torch.ones(1, dtype=torch.int32).pin_memory()
        shared = _Shared(room, Inbox(words, of_words, counts, stop, group.rank()), one)
    except (RuntimeError, AttributeError, NotImplementedError):
        pass
    # Behind it all ranks have cleared their memory.
    agreed = torch.tensor([int(shared is not None)], device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group)
    if not agreed.item() or shared is None:
        return False
    _SHARED[group.group_name] = shared
    return True


def forget_memory(group: str) -> None:
    """Give back what :func:`share_memory` took."""
    _SHARED.pop(group, None)


def release_waiting(group: str) -> None:
    """Let the kernels of this rank that await others' terms end, and all that follow; their results mean nothing."""
    shared = _SHARED.get(group)
    if shared is None:
        return
    stop = shared.inbox.stop
    with torch.cuda.stream(torch.cuda.Stream(stop.device)):
        # By a copy, for which no multiprocessor need be free.
        stop.copy_(shared.one, non_blocking=True)


def sums_at_once(x: Tensor) -> bool:
    """Whether torch's kernel over shared memory takes ``x``: float32 or bfloat16, in whole 16 bytes.

    By shape and dtype alone, as all ways are chosen, so that ranks which hold parts of other places go the same.
    """
    return x.dtype in _SUMMED_AT_ONCE and x.nbytes <= MOST_BYTES_AT_ONCE and not x.nbytes % 16


def _aligned(x: Tensor) -> Tensor:
    """``x`` in a row that begins at a multiple of 16 bytes, as kernels read it."""
    x = x.contiguous()
    return x.clone() if x.storage_offset() * x.itemsize % 16 else x


@torch.library.custom_op("quantspec::reduce_ranks", mutates_args=())
def reduce_ranks(x: Tensor, group: str) -> Tensor:
    """The sum of every rank's ``x``, of any shape and float dtype, the same bits on all ranks of ``group``."""
    return _sum(_aligned(x), group)


def _sum(x: Tensor, group: str) -> Tensor:
    """The sum by torch's collectives."""
    shared = _SHARED.get(group)
    if shared is not None and sums_at_once(x):
        room = shared.room[: x.nbytes].view(x.dtype).view(x.shape)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(room, x, "sum", group)
    world = dist.distributed_c10d._resolve_process_group(cast(Any, group)).size()
    if world > 2 and x.itemsize == 2 and x.nbytes <= MOST_BYTES_AT_ONCE:
        return _sum_in_order(x, world, group)
    return collectives.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group))


def _sum_in_order(x: Tensor, world: int, group: str) -> Tensor:
    """The sum in the order of the ranks, rounded once.

    Libraries add numbers of one tensor in different orders, by their place, so that a token's 16-bit sums would depend
    on how many stand beside it.
    """
    terms = torch.ops._c10d_functional.all_gather_into_tensor(x.view(1, -1), world, group)
    total = torch.zeros(x.numel(), dtype=torch.float32, device=x.device)
    for term in collectives.wait_tensor(terms):
        total += term
    return total.to(x.dtype).view(x.shape)


@reduce_ranks.register_kernel("cuda")
@on_tensors_device
def reduce_ranks_triton(x: Tensor, group: str) -> Tensor:
    """Sum few rows in one launch, else by torch's collectives; arguments as the op's."""
    x, shared = _aligned(x), _SHARED.get(group)
    if shared is None or not fits_inbox(x):
        return _sum(x, group)
    return sum_rows(x, None, None, 0.0, shared.inbox)[0]


@reduce_ranks.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("quantspec::reduce_ranks_to_norm", mutates_args=())
def reduce_ranks_to_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    """:func:`reduce_ranks` with the addition to the residual stream and the root mean square norm behind it.

    Args:
        x: ``(..., N)`` of a float dtype.
        residual: of the shape and dtype of ``x``, or None.
        weight: ``(N,)`` float, of the norm.
        eps: of the norm.
        group: the name of the ranks' process group.

    Returns:
        ``y``, the sum of every rank's ``x`` and the residual, and ``y (mean(y^2) + eps)^(-1/2) weight``, both in the
        dtype of ``x`` and the same bits on all ranks.
    """
    return _normalized(_sum(_aligned(x), group), residual, weight, eps)


def _normalized(y: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What :func:`reduce_ranks_to_norm` makes of a sum."""
    y = y if residual is None else y + residual
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return y, (F.rms_norm(wide, wide.shape[-1:], None, eps) * weight).to(y.dtype)


@reduce_ranks_to_norm.register_fake
def _(x, residual, weight, eps, group):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))


@reduce_ranks_to_norm.register_kernel("cuda")
@on_tensors_device
def reduce_ranks_to_norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    """As :func:`reduce_ranks_triton`, with the rest in the same launch; a longer sum's has one of its own."""
    x, shared = _aligned(x), _SHARED.get(group)
    residual, weight = None if residual is None else residual.contiguous(), weight.contiguous()
    inbox = None if shared is None or not fits_inbox(x) else shared.inbox
    if inbox is None:
        x = _sum(x, group)
        if not has_kernel_for(x):
            return _normalized(x, residual, weight, eps)
    total, normed = sum_rows(x, residual, weight, eps, inbox)
    assert normed is not None
    return total, normed


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
