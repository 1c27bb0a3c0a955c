"""Planes in a pool with a block table: every op does what it does on planes of each sequence's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from test_kernels_triton import (
    ATTENTION_CASES,
    DEVICE,
    TOLERANCE,
    Case,
    cache_arguments,
    drawn_cases,
    random_cache,
    relative_error,
)
from torch import Tensor

from quantspec.kernels import cached_attention, flush, prefill_attention, scored_attention, sparse_attention
from quantspec.kernels.cache_layout import CACHE_PARTS
from quantspec.kernels.cached_attention import cached_attention_reference
from quantspec.kernels.cached_attention_triton import cached_attention_triton
from quantspec.kernels.encode import encode_oldest_groups
from quantspec.kernels.flush import flush as flush_plainly
from quantspec.kernels.pages import PAGE_TOKENS

POOLED = [part.name for part in CACHE_PARTS if part.is_pooled]


def in_pool(planes: dict[str, Tensor | None], seed: int = 0) -> dict[str, Any]:
    """The groups of all sequences in random blocks of a pool, and the table; the other blocks hold NaN."""
    shape = next(part for part in planes.values() if part is not None).shape
    batch, groups = shape[0], shape[2]
    blocks = batch * groups + 3
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))[: batch * groups].to(DEVICE)
    table = order.view(batch, groups).int()
    pooled: dict[str, Any] = {"block_table": table}
    for name, part in planes.items():
        if part is None:
            pooled[name] = None
            continue
        # Strides as the part's, of values adjacent channels or adjacent tokens.
        stored = part if part.stride(-1) == 1 else part.transpose(-1, -2)
        pool = stored.new_full((1, stored.shape[1], blocks, *stored.shape[3:]), 77)
        if pool.dtype.is_floating_point:
            pool.fill_(float("nan"))
        pool[0][:, order] = stored.transpose(0, 1).flatten(1, 2)
        pooled[name] = pool if stored is part else pool.transpose(-1, -2)
    return pooled


def from_pool(pooled: dict[str, Any], name: str) -> Tensor:
    """A part ``(B, K, N, ...)`` out of the pool."""
    table = pooled["block_table"].long()
    return pooled[name][0][:, table].transpose(0, 1)


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def paged(arguments: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    return copied(arguments) | in_pool({name: arguments[name] for name in POOLED if name in arguments}, seed)


def attention(case: Case) -> dict[str, Any]:
    options = {"scale": case.head_dim**-0.5, "window": case.window, "softcap": case.softcap}
    return cache_arguments(case) | options


def check_attention(case: Case) -> None:
    arguments = attention(case)
    expected, kept = cached_attention_triton(**copied(arguments)), paged(arguments)
    # The same numbers in the same order, wherever they lie.
    found = cached_attention_triton(**kept)
    assert torch.equal(found, expected)
    exact = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()}
    double = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in kept.items()}
    assert torch.equal(cached_attention_reference(**double), cached_attention_reference(**exact))
    assert relative_error(found, cached_attention_reference(**double)) < TOLERANCE[case.dtype]
    assert torch.equal(cached_attention(**paged(arguments)).cpu(), cached_attention(**copied(arguments)).cpu())


# Of those without a table: every way to find a group, its numbers and its tokens.
CASES = (
    *("ragged", "grouped query", "two value parts", "two uneven parts", "window over groups", "chunks over groups"),
    *("window over small groups", "token-major values", "float16 verify", "group 128, window", "group 256"),
    *("wide, ragged", "wide, window, soft cap"),
)


@pytest.mark.parametrize("case", [ATTENTION_CASES[name] for name in CASES], ids=CASES)
def test_attention_reads_the_blocks_that_the_table_names(case: Case) -> None:
    torch.manual_seed(0)
    check_attention(case)


@settings(max_examples=2)
@given(case=drawn_cases())
def test_attention_reads_them_for_drawn_shapes(case: Case) -> None:
    check_attention(case)


def test_sequences_share_blocks() -> None:
    """Two texts that begin alike are attended to from the same bytes."""
    arguments = attention(Case(lengths=((96, 40), (64, 33)), lower=True, tokens=3))
    for name in POOLED:
        arguments[name][1, :, :2] = arguments[name][0, :, :2]
    kept = paged(arguments)
    table = kept["block_table"]
    for name in POOLED:
        if kept[name].dtype.is_floating_point:
            kept[name][0][:, table[1, :2].long()] = float("nan")
    table[1, :2] = table[0, :2]
    assert torch.equal(cached_attention_triton(**kept), cached_attention_triton(**copied(arguments)))


SPARSE_CASES = [
    Case(lengths=((320, 40), (128, 33)), group=64),
    Case(lengths=((320, 20),), group=16, tokens=2, window=150),
    Case(lengths=((512, 130),), group=128, heads=4, kv_heads=2),
]


@pytest.mark.parametrize("case", SPARSE_CASES)
def test_scores_and_chosen_pages(case: Case) -> None:
    torch.manual_seed(0)
    arguments = attention(replace(case, lower=True))
    pages = -(-arguments["k_upper"].shape[2] * case.group // PAGE_TOKENS)
    scores = torch.zeros(len(case.lengths), case.kv_heads, pages, device=DEVICE)
    for op in (scored_attention, cached_attention_triton):
        expected, found = scores.clone(), scores.clone()
        out = op(**copied(arguments), page_scores=expected)
        assert torch.equal(op(**paged(arguments), page_scores=found), out)
        for b, (quantized, _) in enumerate(case.lengths):
            whole = quantized // PAGE_TOKENS
            assert torch.equal(found[b, :, :whole], expected[b, :, :whole])
    draft = {name: value for name, value in arguments.items() if "lower" not in name}
    chosen = torch.tensor([1, 3], device=DEVICE, dtype=torch.int32).expand(len(case.lengths), case.kv_heads, 2)
    counts = torch.tensor([1, 2], device=DEVICE, dtype=torch.int32).expand_as(chosen)
    choice = {"chosen_pages": chosen.contiguous(), "num_chosen": counts.contiguous()}
    assert torch.equal(sparse_attention(**paged(draft), **choice), sparse_attention(**copied(draft), **choice))
    launch = {"k_lower": None, "v_lower": None, **choice}
    assert torch.equal(
        cached_attention_triton(**paged(draft), **launch), cached_attention_triton(**copied(draft), **launch)
    )


@pytest.mark.parametrize("dims", [(64, 64), (80, 144)])
@pytest.mark.parametrize("op", [flush_plainly, flush, "kernel"])
def test_a_flush_writes_to_the_block_that_the_table_names(dims: tuple[int, int], op: Any) -> None:
    torch.manual_seed(0)
    group, state = 32, [(64, 64), (0, 70), (32, 63)]
    *parts, quantized_len, length = flush_arguments(state, dims, group)
    plain = dict(zip((part.name for part in CACHE_PARTS), parts, strict=True))
    kept = paged(plain)
    table = kept.pop("block_table")
    before = {name: part.clone() for name, part in kept.items()}
    if op == "kernel":
        encode_oldest_groups(None, *plain.values(), quantized_len, length)
        encode_oldest_groups(None, *kept.values(), quantized_len, length, table)
    else:
        op(*plain.values(), quantized_len, length)
        op(*kept.values(), quantized_len, length, table)
    kept["block_table"] = table
    written = [int(table[0, 2]), int(table[1, 0])]
    others = [block for block in range(before["k_upper"].shape[2]) if block not in written]
    for name, part in plain.items():
        if name in POOLED:
            assert torch.equal(from_pool(kept, name), part)
            assert torch.equal(kept[name][:, :, others].nan_to_num(), before[name][:, :, others].nan_to_num())
        else:
            assert torch.equal(kept[name], part)


def flush_arguments(state: list[tuple[int, int]], dims: tuple[int, int], group: int) -> list[Tensor]:
    parts = random_cache(len(state), 2, 4, 2 * group + 8, *dims, group, torch.float32)
    lengths = torch.tensor(state, device=DEVICE)
    return [*parts, lengths[:, 0].contiguous(), lengths.sum(1)]


@pytest.mark.parametrize("kernel", [False, True])
def test_a_prefill_reads_and_writes_them(kernel: bool) -> None:
    torch.manual_seed(0)
    group, state, tokens = 32, [(32, 40), (0, 0), (64, 32)], 90
    *parts, quantized_len, length = flush_arguments(state, (64, 80), group)
    parts = [part.nan_to_num() if part.is_floating_point() else part for part in parts]
    plain = dict(zip((part.name for part in CACHE_PARTS), parts, strict=True))
    kept = paged(plain)
    table = kept.pop("block_table")
    key, value = torch.randn(3, 2, tokens, 64, device=DEVICE), torch.randn(3, 2, tokens, 80, device=DEVICE)
    num_new = torch.tensor([90, 70, 32], device=DEVICE)
    if kernel:
        encode_oldest_groups((key, value, num_new), *plain.values(), quantized_len, length)
        encode_oldest_groups((key, value, num_new), *kept.values(), quantized_len, length, table)
    else:
        new = (torch.randn(3, 4, tokens, 64, device=DEVICE), key, value)
        options = (quantized_len, length, num_new, 0.1, 0, 0.0, None)
        expected = prefill_attention(*new, *plain.values(), *options)
        assert torch.equal(prefill_attention(*new, *kept.values(), *options, block_table=table), expected)
    kept["block_table"] = table
    for name, part in plain.items():
        assert torch.equal(from_pool(kept, name) if name in POOLED else kept[name], part), name
