"""The kernel by which ranks sum: natively on streams of a GPU, elsewhere by interpreters that share a CPU's memory."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from quantspec.kernels.rank_sums_triton import (
    MOST_ROW_BYTES,
    MOST_ROWS,
    Inbox,
    fits_inbox,
    has_kernel_for,
    inbox_bytes,
    sum_rows,
)
from quantspec.kernels.ranks import _normalized

EPS = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows, width, dtype, whether a residual is added and whether it is normalized, one sum after another.
SUMS = [
    (1, 64, torch.bfloat16, True, True),
    (3, 64, torch.bfloat16, True, True),
    (2, 24, torch.float32, False, True),
    (1, 64, torch.float16, True, False),
    (2, 8, torch.bfloat16, False, False),
    (3, 100, torch.float32, True, True),
    (1, 8, torch.float16, False, True),
]


def of_rank(rank: int, index: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """A rank's terms of a sum, and what all ranks have: the residual and the norm's weight."""
    rows, width, dtype, adds, normalizes = SUMS[index % len(SUMS)]
    terms = torch.randn(rows, width, generator=torch.Generator().manual_seed(100 * index + rank)).to(dtype)
    generator = torch.Generator().manual_seed(10_000 + index)
    residual = torch.randn(rows, width, generator=generator).to(dtype) if adds else None
    weight = torch.randn(width, generator=generator).to(dtype) if normalizes else None
    return terms, residual, weight


def on_device(rank: int, index: int) -> list[torch.Tensor | None]:
    return [None if one is None else one.to(DEVICE) for one in of_rank(rank, index)]


def places(world: int, number: int) -> list[torch.Tensor]:
    """The words of each rank's inbox, as if the sum of this ``number`` had come."""
    return [torch.full((inbox_bytes(world) // 8,), number << 32, device=DEVICE) for _ in range(world)]


def inbox_of(rank: int, words: list[torch.Tensor], start: int) -> Inbox:
    """Of a rank whose counts begin at ``start``."""
    addresses = torch.tensor([one.data_ptr() for one in words], device=DEVICE)
    counts = torch.full((MOST_ROWS,), start, dtype=torch.int32, device=DEVICE)
    return Inbox(words[rank], addresses, counts, torch.zeros(1, dtype=torch.int32, device=DEVICE), rank)


def as_lists(results: list[tuple]) -> list[list]:
    return [[None if one is None else one.float().tolist() for one in pair] for pair in results]


def child(rank, words, count, start, sent):
    """All sums of a rank, in a process of its own."""
    inbox = inbox_of(rank, words, start)
    results = [sum_rows(*on_device(rank, index), EPS, inbox) for index in range(count)]
    # What a process shares ends with it; lists are copies.
    sent.put((rank, as_lists(results)))


def by_processes(world: int, count: int, start: int) -> dict[int, list]:
    """What each rank has, of interpreters that share memory."""
    words = [one.share_memory_() for one in places(world, 0)]
    # Children have this process's interpreter.
    forks = mp.get_context("fork")
    sent = forks.Queue()
    arguments = [(rank, words, count, start, sent) for rank in range(world)]
    children = [forks.Process(target=child, args=given, daemon=True) for given in arguments]
    for one in children:
        one.start()
    try:
        return dict(sent.get(timeout=120) for _ in children)
    finally:
        # Those that await what never comes would be awaited in turn.
        for one in children:
            one.kill()


def by_streams(world: int, count: int, start: int) -> dict[int, list]:
    """What each rank has, of streams of one GPU, on which their kernels await each other."""
    streams = [torch.cuda.Stream() for _ in range(world)]
    given = [[on_device(rank, index) for index in range(count)] for rank in range(world)]
    come, words = places(world, 1), places(world, 0)
    inboxes = [inbox_of(rank, words, start) for rank in range(world)]
    # Loading a kernel may wait for one that runs and awaits it, so each is loaded where all terms have come.
    for index in range(len(SUMS)):
        for rank, stream in enumerate(streams):
            inbox = inbox_of(rank, come, 0)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                sum_rows(*given[rank][index], EPS, inbox)
            torch.cuda.synchronize()
    results: list[list] = [[] for _ in streams]
    for index in range(count):
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[rank].append(sum_rows(*given[rank][index], EPS, inboxes[rank]))
    torch.cuda.synchronize()
    return {rank: as_lists(sums) for rank, sums in enumerate(results)}


@pytest.mark.parametrize(("world", "start"), [(2, 0), (3, 0), (2, 2**31 - 4), (2, -2)])
def test_ranks_have_the_sum_of_all(world, start):
    """Sums of every size in turn, over the places of those before; numbers pass the last one, and the first places'."""
    count = 2 * len(SUMS)
    answers = (by_streams if DEVICE == "cuda" else by_processes)(world, count, start)
    for index in range(count):
        terms = [of_rank(rank, index) for rank in range(world)]
        _, residual, weight = terms[0]
        total = sum(one[0].double() for one in terms)
        expected = total if residual is None else total + residual.double()
        dtype = terms[0][0].dtype
        for rank in range(world):
            y, normed = answers[rank][index]
            assert answers[rank][index] == answers[0][index]
            torch.testing.assert_close(torch.tensor(y).to(dtype), expected.to(dtype))
            if weight is None:
                assert normed is None
            else:
                reference = _normalized(torch.tensor(y).to(dtype), None, weight, EPS)[1]
                torch.testing.assert_close(torch.tensor(normed).to(dtype), reference)


def test_who_is_told_to_stop_awaits_nobody():
    """The other rank has sent nothing; the sum means nothing, and ends."""
    words = places(2, 0)
    inbox = inbox_of(0, words, 0)
    inbox.stop.fill_(1)
    y, normed = sum_rows(*on_device(0, 0), EPS, inbox)
    assert y.shape == normed.shape == of_rank(0, 0)[0].shape


def test_a_rank_alone_adds_and_normalizes():
    x, residual = (torch.randn(2, 70, 24, device=DEVICE).bfloat16() for _ in range(2))
    weight = torch.randn(24, device=DEVICE)
    y, normed = sum_rows(x, residual, weight, EPS, None)
    expected, of_norm = _normalized(x, residual, weight, EPS)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(normed, of_norm)


def test_what_the_kernel_takes():
    """Whole units of 16 bytes; over ranks as many rows as the inbox has places for."""
    assert fits_inbox(torch.empty(MOST_ROWS, 8, dtype=torch.bfloat16))
    assert not fits_inbox(torch.empty(MOST_ROWS + 1, 8, dtype=torch.bfloat16))
    assert has_kernel_for(torch.empty(MOST_ROWS + 1, 8, dtype=torch.bfloat16))
    assert not has_kernel_for(torch.empty(2, 4, dtype=torch.bfloat16))
    assert has_kernel_for(torch.empty(2, 4))
    assert not has_kernel_for(torch.empty(2, 4, dtype=torch.float64))
    assert not has_kernel_for(torch.empty(0, 8))
    assert has_kernel_for(torch.empty(1, MOST_ROW_BYTES // 4))
    assert not has_kernel_for(torch.empty(1, MOST_ROW_BYTES // 4 + 4))
