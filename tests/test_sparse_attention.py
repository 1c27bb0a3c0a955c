"""Sparse draft attention: scores of pages, their choice, and what a draft step sees, op by op and kernel by kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_triton import DEVICE, TOLERANCE, Case, cache_arguments, relative_error
from torch import Tensor

from quantspec.kernels import cached_attention, cached_attention_reference, scored_attention, sparse_attention
from quantspec.kernels.cached_attention_triton import cached_attention_triton
from quantspec.kernels.choose_pages import SHARE_UNIT, choose_pages, choose_pages_triton, num_kept
from quantspec.kernels.hierarchical import dense_key_value
from quantspec.kernels.pages import PAGE_TOKENS, num_pages, page_of_token
from quantspec.kernels.scored_attention import scored_attention_triton
from quantspec.kernels.sparse_attention import sparse_attention_triton

# Groups shorter than a page, as long, and longer; ragged rows; what kernels treat apart.
CASES = {
    "ragged, grouped queries": Case(
        heads=4, kv_heads=2, value_dim=32, group=64, lengths=((320, 10), (0, 3), (128, 64))
    ),
    "small groups": Case(group=16, lengths=((208, 20), (80, 16))),
    "window": Case(group=64, window=180, lengths=((256, 70), (64, 64))),
    "window over small groups": Case(group=16, window=120, lengths=((208, 20),), tokens=3),
    "soft cap and sinks": Case(heads=4, kv_heads=2, group=64, softcap=4.0, sinks=True, lengths=((256, 5),)),
    "four value parts": Case(head_dim=512, value_dim=512, group=64, lengths=((192, 6),)),
    "two value parts": Case(head_dim=256, value_dim=256, group=64, lengths=((192, 6),)),
    "float16": Case(dtype=torch.float16, group=128, lengths=((256, 40),)),
    "bfloat16": Case(dtype=torch.bfloat16, group=64, lengths=((256, 40),), heads=4),
    "more rows than a small block": Case(heads=12, tokens=3, value_dim=32, group=128, lengths=((256, 30),)),
    "wide tiles": Case(heads=10, group=128, dtype=torch.float16, lengths=((384, 30), (128, 5)), sinks=True),
    "wide tiles, window": Case(
        heads=12, kv_heads=1, tokens=3, group=256, window=200, dtype=torch.float16, lengths=((512, 70),)
    ),
    "more rows than a block": Case(heads=22, tokens=3, value_dim=32, group=32, lengths=((160, 3),)),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
LOWER = ("k_lower", "v_lower")


def pages_of(case: Case) -> int:
    return num_pages(max(quantized for quantized, _ in case.lengths) // case.group + 1, case.group)


def inputs(case: Case, lower: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments in the order of the ops, without lower planes for a draft, and the options."""
    arguments = cache_arguments(replace(case, lower=lower))
    if not lower:
        arguments = {name: x for name, x in arguments.items() if name not in LOWER}
    return arguments, {"scale": case.head_dim**-0.5, "window": case.window, "softcap": case.softcap}


def drawn_choice(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """For each row and KV head some of the whole pages, in any order, and all from some page on."""
    generator = torch.Generator().manual_seed(seed)
    pages, batch = pages_of(case), len(case.lengths)
    chosen = torch.full((batch, case.kv_heads, pages), 10**6, dtype=torch.int32)
    number = torch.zeros(batch, case.kv_heads, 2, dtype=torch.int32)
    for row, (quantized, _) in enumerate(case.lengths):
        for head in range(case.kv_heads):
            judged = int(torch.randint(0, quantized // PAGE_TOKENS + 1, (), generator=generator))
            count = int(torch.randint(0, judged + 1, (), generator=generator))
            chosen[row, head, :count] = torch.randperm(judged, generator=generator)[:count].int()
            number[row, head] = torch.tensor([count, judged])
    return {"chosen_pages": chosen.to(DEVICE), "num_chosen": number.to(DEVICE)}


def seen_alone(arguments: dict[str, Any], options: dict[str, Any], choice: dict[str, Tensor]) -> Tensor:
    """The oracle: one sequence and one KV head at a time, over dense keys and values of what it sees, in float64."""
    widened = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in arguments.items()}
    query, sinks = widened["query"], widened["sinks"]
    kv_heads, tokens = widened["key"].shape[1:3]
    repeat, group = query.shape[1] // kv_heads, 2 * widened["k_upper"].shape[3]
    cached_attention_reference(**(widened | {"k_lower": None, "v_lower": None}), **options)
    out = query.new_zeros(query.shape[0], tokens, query.shape[1], widened["v_recent"].shape[3])
    names = ("k_upper", "k_scale", "k_zero", "v_upper", "v_scale", "v_zero")
    for b, (quantized, start) in enumerate(
        zip(widened["quantized_len"].tolist(), widened["length"].tolist(), strict=True)
    ):
        k_upper, k_scale, k_zero, v_upper, v_scale, v_zero = (widened[name][b] for name in names)
        recent = (widened["k_recent"][b], widened["v_recent"][b])
        planes = (k_upper, None, k_scale, k_zero, v_upper, None, v_scale, v_zero)
        keys, values = dense_key_value(quantized, start + tokens, torch.float64, *planes, *recent)
        page = page_of_token(quantized, group, DEVICE)
        for h in range(query.shape[1]):
            head = h // repeat
            number, judged = choice["num_chosen"][b, head].tolist()
            listed = choice["chosen_pages"][b, head, :number]
            read = torch.isin(page, listed) | (page >= judged)
            read = torch.cat((read, read.new_ones(start + tokens - quantized)))
            for t in range(tokens):
                at = torch.arange(start + tokens, device=DEVICE)
                visible = read & (at <= start + t)
                if options["window"]:
                    visible &= at > start + t - options["window"]
                scores = keys[head, visible] @ query[b, h, t] * options["scale"]
                if options["softcap"]:
                    scores = options["softcap"] * torch.tanh(scores / options["softcap"])
                if sinks is not None:
                    scores = torch.cat((scores, sinks[h : h + 1]))
                weights = scores.softmax(0)[: int(visible.sum())]
                out[b, t, h] = weights @ values[head, visible]
    return out


@each_case
def test_a_draft_sees_chosen_pages_later_pages_and_the_recent_buffer(case: Case) -> None:
    arguments, options = inputs(case, lower=False)
    choice = drawn_choice(case)
    ours = {name: x.clone() if name.endswith("recent") else x for name, x in arguments.items()}
    expected = seen_alone(arguments, options, choice)
    actual = sparse_attention_triton(**ours, **choice, **options)
    assert relative_error(actual, expected) < TOLERANCE[case.dtype]
    plain = sparse_attention(**arguments, **choice, **options)
    assert relative_error(plain, expected) < TOLERANCE[case.dtype]


@each_case
def test_all_pages_are_full_attention_bit_for_bit(case: Case) -> None:
    """Nothing chosen, some chosen in order and all that follow, no list at all. What a window hides is never chosen."""
    arguments, options = inputs(case, lower=False)
    full = arguments | {"k_lower": None, "v_lower": None}
    expected = [op(**full, **options) for op in (cached_attention, cached_attention_triton)]
    pages = pages_of(case)
    chosen = torch.arange(pages, dtype=torch.int32, device=DEVICE).expand(len(case.lengths), case.kv_heads, -1)
    whole = torch.tensor([quantized // PAGE_TOKENS for quantized, _ in case.lengths], device=DEVICE)
    for number in (whole // 2, 0 * whole) if not case.window else (0 * whole,):
        choice = {
            "chosen_pages": chosen.contiguous(),
            "num_chosen": number.int()[:, None, None].repeat(1, case.kv_heads, 2),
        }
        for op, exact in zip((sparse_attention, sparse_attention_triton), expected, strict=True):
            assert torch.equal(op(**arguments, **choice, **options), exact)
    none = {"chosen_pages": chosen[..., :0], "num_chosen": choice["num_chosen"]}
    assert torch.equal(sparse_attention_triton(**arguments, **none, **options), expected[1])


@each_case
def test_scores_are_the_most_that_a_token_moves_and_verification_is_unchanged(case: Case) -> None:
    arguments, options = inputs(case, lower=True)
    expected = [op(**arguments, **options) for op in (cached_attention, cached_attention_triton)]
    shape = (len(case.lengths), case.kv_heads, pages_of(case))
    scores = [torch.full(shape, 77.0, device=DEVICE) for _ in range(2)]
    for op, score, out in zip((scored_attention, scored_attention_triton), scores, expected, strict=True):
        assert torch.equal(op(**arguments, page_scores=score, **options), out)
    for b, (quantized, _) in enumerate(case.lengths):
        exact = most_moved(arguments, options, b)
        whole = quantized // PAGE_TOKENS
        for score in scores:
            found = score[b, :, :whole].double()
            assert torch.equal(found == float("-inf"), exact[:, :whole] == 0)
            # Relative to the weight that is found.
            error = (found.exp() - exact[:, :whole]).abs() / exact[:, :whole].clamp(min=1e-20)
            assert (error <= 64 * TOLERANCE[case.dtype]).all()


@pytest.mark.parametrize("joins", [False, True])
def test_the_kernel_takes_the_ops_arguments_in_their_order(joins: bool) -> None:
    """As torch passes them once the last is given."""
    case = CASES["ragged, grouped queries"]
    arguments, options = inputs(case, lower=True)
    shape = (len(case.lengths), case.kv_heads, pages_of(case))
    given = arguments | options | {"page_scores": torch.full(shape, 77.0, device=DEVICE), "joins": joins}
    schema = torch.ops.quantspec.scored_attention.default._schema.arguments
    scored_attention_triton(*(given.get(argument.name, argument.default_value) for argument in schema))
    whole = case.lengths[0][0] // PAGE_TOKENS
    assert (given["page_scores"][0, :, :whole] == 77).all() == joins


@settings(max_examples=3)
@given(
    # Those that take the interpreter seconds have more rows and channels, which no score of another layer meets.
    name=st.sampled_from(["small groups", "window", "soft cap and sinks", "float16", "bfloat16"]),
    seeds=st.lists(st.integers(0, 2**16), min_size=2, max_size=3, unique=True),
)
def test_scores_of_layers_that_share_a_cache_are_the_highest_of_them(name: str, seeds: list[int]) -> None:
    """Of several queries, whatever the order; the first begins anew, and no output changes."""
    case = CASES[name]
    arguments, options = inputs(case, lower=True)
    shape = (len(case.lengths), case.kv_heads, pages_of(case))
    for op in (scored_attention, scored_attention_triton):
        joined, alone = torch.full(shape, 77.0, device=DEVICE), []
        for number, seed in enumerate(seeds):
            query = torch.randn(arguments["query"].shape, generator=torch.Generator().manual_seed(seed))
            given_query = arguments | {"query": query.to(arguments["query"])}
            alone.append(torch.full(shape, -77.0, device=DEVICE))
            expected = op(**given_query, page_scores=alone[-1], **options)
            assert torch.equal(op(**given_query, page_scores=joined, **options, joins=number > 0), expected)
        highest = torch.stack(alone).amax(0)
        for b, (quantized, _) in enumerate(case.lengths):
            whole = quantized // PAGE_TOKENS
            assert torch.equal(joined[b, :, :whole], highest[b, :, :whole])


def most_moved(arguments: dict[str, Any], options: dict[str, Any], b: int) -> Tensor:
    """The oracle: probabilities of every query times the scale of every value, in float64, the highest of each page."""
    query, quantized, start = (
        arguments["query"][b].double(),
        *(int(arguments[n][b]) for n in ("quantized_len", "length")),
    )
    planes = [arguments[n][b] for n in ("k_upper", "k_lower", "k_scale", "k_zero")]
    planes += [arguments[n][b] for n in ("v_upper", "v_lower", "v_scale", "v_zero", "k_recent", "v_recent")]
    tokens, kv_heads = query.shape[1], planes[0].shape[0]
    keys, _ = dense_key_value(quantized, start + tokens, torch.float64, *planes)
    group, sinks = 2 * planes[0].shape[2], arguments["sinks"]
    sizes = arguments["v_scale"][b, :, : quantized // group].double().amax(-1).flatten(1)
    page = page_of_token(quantized, group, DEVICE).tolist()
    most = [[0.0] * (-(-quantized // PAGE_TOKENS)) for _ in range(kv_heads)]
    for h in range(query.shape[0]):
        head = h // (query.shape[0] // kv_heads)
        for t in range(tokens):
            scores = keys[head, : start + t + 1] @ query[h, t] * options["scale"]
            if options["softcap"]:
                scores = options["softcap"] * torch.tanh(scores / options["softcap"])
            if options["window"]:
                scores[: max(0, start + t + 1 - options["window"])] = float("-inf")
            if sinks is not None:
                scores = torch.cat((scores, sinks[h : h + 1].double()))
            moved = scores.softmax(0)[:quantized] * sizes[head]
            for number, weight in zip(page, moved.tolist(), strict=True):
                most[head][number] = max(most[head][number], weight)
    return torch.tensor(most, dtype=torch.float64, device=DEVICE).view(kv_heads, -1)


def reference_choice(scores: Tensor, pages: int, share: int, least: int) -> tuple[list[int], list[int]]:
    """Chosen pages of one row, in plain Python, and how many there are of how many; nothing for everything."""
    kept = max(least, -(-pages * share // SHARE_UNIT))
    if kept >= pages:
        return [], [0, 0]
    visible = [page for page in range(pages) if scores[page] > float("-inf")]
    best = sorted(visible, key=lambda page: (page != 0, -scores[page].item(), page))
    chosen = sorted(best[:kept])
    return chosen, [len(chosen), pages]


@given(
    tokens=st.lists(st.integers(0, 40 * PAGE_TOKENS), min_size=1, max_size=3),
    heads=st.integers(1, 2),
    share=st.integers(1, SHARE_UNIT),
    least=st.integers(1, 12),
    kinds=st.integers(1, 60),
    hidden=st.integers(0, 40),
    seed=st.integers(0, 2**16),
)
def test_chosen_pages_are_the_reference_s(tokens, heads, share, least, kinds, hidden, seed) -> None:
    """Ragged rows, ties, pages that a window hides, scores of either sign; what lies behind the pages is arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(tokens) * heads, 41
    values = torch.randn(kinds, generator=generator)
    scores = values[torch.randint(0, kinds, (rows, width), generator=generator)]
    scores[:, :hidden] = float("-inf")
    sequence = torch.arange(len(tokens)).repeat_interleave(heads)
    for row, count in enumerate(tokens):
        scores[row * heads : (row + 1) * heads, count // PAGE_TOKENS :] = float("nan")
    for op in (choose_pages, choose_pages_triton):
        chosen = torch.full((rows, num_kept(width, share, least)), -1, dtype=torch.int32, device=DEVICE)
        number = torch.full((rows, 2), -1, dtype=torch.int32, device=DEVICE)
        op(
            scores.to(DEVICE),
            chosen,
            number,
            sequence.to(DEVICE),
            torch.tensor(tokens, device=DEVICE),
            share,
            least,
        )
        for row in range(rows):
            pages, counts = reference_choice(scores[row], tokens[row // heads] // PAGE_TOKENS, share, least)
            assert number[row].tolist() == counts
            assert chosen[row, : counts[0]].tolist() == pages


def test_many_pages_are_chosen_in_stretches() -> None:
    """More than a program of the kernel reads at once."""
    torch.manual_seed(1)
    scores = torch.randn(1, 9000).round(decimals=2)
    pages, counts = reference_choice(scores[0], 9000, SHARE_UNIT // 10, 1)
    chosen, number = (torch.zeros(1, n, dtype=torch.int32, device=DEVICE) for n in (900, 2))
    lengths = torch.tensor([9000 * PAGE_TOKENS], device=DEVICE)
    choose_pages_triton(scores.to(DEVICE), chosen, number, torch.zeros_like(lengths), lengths, SHARE_UNIT // 10, 1)
    assert number[0].tolist() == counts == [900, 9000]
    assert chosen[0].tolist() == pages
