"""The kernel that sums what ranks on GPUs of one machine have, adds the residual stream and normalizes, in one launch.

A rank writes its terms into the others' memory and reads theirs in its own, so that a sum takes one way between GPUs.
Each word of 32 bits travels with a number that counts the sums of its row, in one store of 64 bits: who finds the
number has the word, and there is no other signal (as in NCCL's protocol for low latency). Every row has two places for
each rank's terms, used in turn. One is written again only by a rank that has read this one's terms of the sum between,
which this one sent when it had read the sum before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inline_asm import launches_overlap, split_pair, use_inline_asm
from .optional_triton import FUSED, gdc_launch_dependents, gdc_wait, tl, triton

# What a thread sends and takes at once: four words, with their numbers 32 bytes.
_UNIT_BYTES = 16
# Of a row's terms; with their numbers they take twice as much.
MOST_ROW_BYTES = 32 * 2**10
# Rows of a sum, each by a program that awaits the others': all of them run at once on every GPU.
MOST_ROWS = 64
_MOST_WARPS = 16

_SEND_ASM = tl.constexpr(
    """
    {
    .reg .b64 a, b;
    mov.b64 a, {$2, $6};
    mov.b64 b, {$3, $6};
    st.relaxed.sys.global.v2.b64 [$1], {a, b};
    mov.b64 a, {$4, $6};
    mov.b64 b, {$5, $6};
    st.relaxed.sys.global.v2.b64 [$1 + 16], {a, b};
    mov.b32 $0, 0;
    }
    """
)
_TAKE_ASM = tl.constexpr(
    """
    {
    .reg .pred missing;
    .reg .b64 a, b, c, d;
    .reg .b32 p, q, r, s, i, j, k, l;
    again:
    ld.relaxed.sys.global.v2.b64 {a, b}, [$4];
    ld.relaxed.sys.global.v2.b64 {c, d}, [$4 + 16];
    mov.b64 {p, i}, a;
    mov.b64 {q, j}, b;
    mov.b64 {r, k}, c;
    mov.b64 {s, l}, d;
    setp.ne.s32 missing, i, $5;
    setp.ne.or.s32 missing, j, $5, missing;
    setp.ne.or.s32 missing, k, $5, missing;
    setp.ne.or.s32 missing, l, $5, missing;
    @!missing bra taken;
    ld.relaxed.sys.global.b32 i, [$6];
    setp.eq.s32 missing, i, 0;
    @missing bra again;
    taken:
    mov.b32 $0, p;
    mov.b32 $1, q;
    mov.b32 $2, r;
    mov.b32 $3, s;
    }
    """
)


class Inbox(NamedTuple):
    """What a rank shares with the others, on its device.

    Attributes:
        words: int64 places ``(MOST_ROWS, 2, world, MOST_ROW_BYTES / 4)`` that the others write, zeros at first.
        addresses: ``(world,)`` int64, where each rank's :attr:`words` are for this one.
        counts: ``(MOST_ROWS,)`` int32 sums of each row so far, zeros at first.
        stop: ``(1,)`` int32, 0; once it is not, kernels await nobody, and their results mean nothing.
        rank: this rank's number.
    """

    words: Tensor
    addresses: Tensor
    counts: Tensor
    stop: Tensor
    rank: int

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return self.addresses.numel()


def inbox_bytes(world: int) -> int:
    """Bytes of an :class:`Inbox`'s words."""
    return MOST_ROWS * 2 * world * MOST_ROW_BYTES * 2


def has_kernel_for(x: Tensor) -> bool:
    """Whether the kernel takes rows of ``x (..., N)``, which follows from its shape and dtype: rows of whole units."""
    row_bytes = x.shape[-1] * x.itemsize
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return x.dtype in floats and x.numel() > 0 and row_bytes <= MOST_ROW_BYTES and not row_bytes % _UNIT_BYTES


def fits_inbox(x: Tensor) -> bool:
    """Whether the kernel sums ``x (..., N)`` over ranks: 1 to 64 rows that it takes."""
    return has_kernel_for(x) and x.numel() <= MOST_ROWS * x.shape[-1]


@triton.jit
def _send(at, w0, w1, w2, w3, number, USE_ASM: tl.constexpr):
    """Write four words with their ``number`` to each address ``at``, int64."""
    if USE_ASM:
        tl.inline_asm_elementwise(
            _SEND_ASM, "=r,l,r,r,r,r,r", [at, w0, w1, w2, w3, number], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        to = at.to(tl.pointer_type(tl.int64))
        high = number.to(tl.int64) << 32
        tl.store(to, high | (w0.to(tl.int64) & 0xFFFFFFFF))
        tl.store(to + 1, high | (w1.to(tl.int64) & 0xFFFFFFFF))
        tl.store(to + 2, high | (w2.to(tl.int64) & 0xFFFFFFFF))
        tl.store(to + 3, high | (w3.to(tl.int64) & 0xFFFFFFFF))


@triton.jit
def _take(at, number, stop, USE_ASM: tl.constexpr):
    """The four words at each address ``at``, once all have their ``number``; any words once ``stop`` is not 0."""
    if USE_ASM:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _TAKE_ASM,
            "=r,=r,=r,=r,l,r,l",
            [at, number, stop.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        place = at[:, None].to(tl.pointer_type(tl.int64)) + tl.arange(0, 4)[None, :]
        pairs = tl.load(place, volatile=True)
        come = tl.min(tl.min(((pairs >> 32).to(tl.int32) == number).to(tl.int32), 1), 0)
        while come + tl.load(stop, volatile=True) == 0:
            pairs = tl.load(place, volatile=True)
            come = tl.min(tl.min(((pairs >> 32).to(tl.int32) == number).to(tl.int32), 1), 0)
        even, odd = tl.split(tl.reshape(pairs.to(tl.int32), (at.shape[0], 2, 2)))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def _numbers(w0, w1, w2, w3, dtype: tl.constexpr):
    """Words as float32 ``(UNITS, 4)``, or of 16-bit floats ``(UNITS, 8)``, in their order in memory."""
    UNITS: tl.constexpr = w0.shape[0]
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (UNITS, 4))
    if dtype == tl.float32:
        return words.to(tl.float32, bitcast=True)
    else:
        low, high = split_pair(words, dtype)
        return tl.reshape(tl.join(low, high), (UNITS, 8)).to(tl.float32)


@triton.jit
def _sum_kernel(
    x,
    residual,
    weight,
    out,
    normed,
    own,
    addresses,
    counts,
    stop,
    width,
    eps,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    UNITS: tl.constexpr,
    PLACE_BYTES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row of ``width`` sums by ``WORLD`` ranks, added in the ranks' order; a single rank only adds and normalizes.

    Lanes beyond the row repeat its last unit.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    SIDE: tl.constexpr = 4 if dtype == tl.float32 else 8
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, UNITS)
    unit = tl.minimum(lane, width // SIDE - 1)
    n = unit[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    if NORM:
        of_norm = tl.load(weight + n).to(tl.float32)
    if PDL:
        # Kernels before this one may still be writing what it reads, but for weights, or reading what it writes.
        gdc_wait()
        # What follows fetches its weights while terms travel; before, it would take the linear's bandwidth in front.
        gdc_launch_dependents()
    if WORLD == 1:
        y = tl.load(x + row * width + n).to(tl.float32)
        if HAS_RESIDUAL:
            y += tl.load(residual + row * width + n).to(tl.float32)
    else:
        word = unit[:, None] * 4 + tl.arange(0, 4)[None, :]
        words = tl.load((x + row * width).to(tl.pointer_type(tl.int32)) + word)
        even, odd = tl.split(tl.reshape(words, (UNITS, 2, 2)))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        count = tl.load(counts + row)
        # Nobody has sent where 0 stands; past it the two places still take turns.
        number = tl.where(count == -1, 2, count + 1)
        place = (row * 2 + (number & 1)) * (WORLD * PLACE_BYTES) + unit.to(tl.int64) * 32
        for peer in tl.static_range(0, WORLD):
            if peer != RANK:
                _send(tl.load(addresses + peer) + place + RANK * PLACE_BYTES, w0, w1, w2, w3, number, USE_ASM)
        if HAS_RESIDUAL:
            added = tl.load(residual + row * width + n).to(tl.float32)
        y = tl.zeros((UNITS, SIDE), tl.float32)
        for peer in tl.static_range(0, WORLD):
            if peer == RANK:
                y += _numbers(w0, w1, w2, w3, dtype)
            else:
                t0, t1, t2, t3 = _take(own.to(tl.int64) + place + peer * PLACE_BYTES, number, stop, USE_ASM)
                y += _numbers(t0, t1, t2, t3, dtype)
        if HAS_RESIDUAL:
            y += added
    y = y.to(dtype)
    tl.store(out + row * width + n, y)
    if NORM:
        y = y.to(tl.float32)  # of the sum as others read it
        squares = tl.sum(tl.sum(tl.where((lane * SIDE < width)[:, None], y * y, 0), 1), 0)
        factor = 1 / tl.sqrt(squares / width + eps)
        tl.store(normed + row * width + n, y * factor * of_norm)
    if WORLD > 1:
        tl.debug_barrier()  # every thread has read the count
        tl.store(counts + row, number)


def sum_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, inbox: Inbox | None
) -> tuple[Tensor, Tensor | None]:
    """Sums of rows over ranks, and with a ``weight`` what they are after a root mean square norm.

    Args:
        x: ``(..., N)`` contiguous, from a whole unit of its storage on, as :func:`has_kernel_for` says, and
            :func:`fits_inbox` where there is an ``inbox``.
        residual: of the shape and dtype of ``x``, contiguous; or None.
        weight: ``(N,)`` of the norm, or None for none.
        eps: of the norm.
        inbox: what this rank shares with others; without it ``x`` is summed already.

    Returns:
        The sum with the residual, and its norm or None, in the dtype of ``x``.
    """
    width = x.shape[-1]
    out = torch.empty_like(x)
    normed = None if weight is None else torch.empty_like(x)
    unused = out.view(-1)
    side = _UNIT_BYTES // x.itemsize
    units = triton.next_power_of_2(max(width // side, 1))
    pdl = launches_overlap(x.device)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    words, addresses, counts, stop = (unused,) * 4 if inbox is None else inbox[:4]
    _sum_kernel[(x.numel() // width,)](
        x,
        unused if residual is None else residual,
        unused if weight is None else weight,
        out,
        unused if normed is None else normed,
        words,
        addresses,
        counts,
        stop,
        width,
        eps,
        RANK=0 if inbox is None else inbox.rank,
        WORLD=1 if inbox is None else inbox.world,
        UNITS=units,
        PLACE_BYTES=2 * MOST_ROW_BYTES,
        HAS_RESIDUAL=residual is not None,
        NORM=weight is not None,
        USE_ASM=use_inline_asm(x.device),
        PDL=pdl,
        num_warps=min(max(units // 32, 1), _MOST_WARPS),
        **FUSED,
        **options,
    )
    return out, normed
