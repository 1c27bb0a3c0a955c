"""The Triton kernels against the float64 reference: natively on a GPU, in the interpreter elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from repeats import repeat
from torch import Tensor

from quantspec.kernels.cached_attention import cached_attention_reference
from quantspec.kernels.cached_attention_triton import cached_attention_triton
from quantspec.kernels.dense_tokens import dense_tokens, dense_tokens_triton
from quantspec.kernels.encode import encode_oldest_groups
from quantspec.kernels.epilogue import gated
from quantspec.kernels.expert_linear import (
    expert_linear,
    expert_linear_triton,
    int4_expert_linear,
    int4_expert_linear_triton,
)
from quantspec.kernels.flush import flush
from quantspec.kernels.hierarchical import decode_keys, decode_values, encode_keys, encode_values
from quantspec.kernels.inline_asm import biased_quarters, centred_bytes, centred_nibbles, nibble_bias
from quantspec.kernels.int4_linear import (
    dequantize_int4,
    int4_fused_linear,
    int4_fused_linear_triton,
    int4_linear_to_norm,
    int4_linear_to_norm_triton,
    int4_linear_triton,
    pack_int4,
    unpack_int4,
)
from quantspec.kernels.int4_rows import LinearConfig, linear_config
from quantspec.kernels.linears import linears, linears_triton
from quantspec.kernels.prefill_attention import prefill_attention, prefill_attention_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative error of the whole output: a few roundings of the working precision (weights, decoded keys, output).
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@dataclass(frozen=True)
class Case:
    """One shape of ``quantspec::cached_attention``; ``lengths`` are (quantized, recent) tokens of each sequence."""

    heads: int = 2
    kv_heads: int = 1
    tokens: int = 1
    head_dim: int = 64
    value_dim: int = 64
    group: int = 32
    lengths: tuple[tuple[int, int], ...] = ((64, 33),)
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    lower: bool = False
    dtype: torch.dtype = torch.float32
    transposed_values: bool = True


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal on the device under test."""
    return torch.randn(*shape, device=DEVICE).to(dtype)


def cache_arguments(case: Case) -> dict[str, Tensor | None]:
    """Random arguments of the op; slots and groups beyond each sequence's lengths hold NaN or arbitrary codes."""
    batch, group = len(case.lengths), case.group
    groups = max(quantized for quantized, _ in case.lengths) // group + 1
    slots = 2 * group + case.tokens + 1
    keys = random(batch, case.kv_heads, groups, group, case.head_dim) + random(
        batch, case.kv_heads, 1, 1, case.head_dim
    )
    values = random(batch, case.kv_heads, groups, group, case.value_dim) * torch.rand(groups, group, 1, device=DEVICE)
    k_upper, k_lower, k_scale, k_zero = encode_keys(keys)
    v_upper, v_lower, v_scale, v_zero = encode_values(values)
    k_recent = random(batch, case.kv_heads, slots, case.head_dim, dtype=case.dtype)
    v_recent = random(batch, case.kv_heads, slots, case.value_dim, dtype=case.dtype)
    for b, (quantized, recent) in enumerate(case.lengths):
        for unused in (k_scale, k_zero, v_scale, v_zero):
            unused[b, :, quantized // group :] = float("nan")
        k_recent[b, :, recent:] = float("nan")
        v_recent[b, :, recent:] = float("nan")
    if case.transposed_values:
        v_upper, v_lower = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (v_upper, v_lower))
    lengths = torch.tensor(case.lengths, device=DEVICE)
    return {
        "query": random(batch, case.tokens, case.heads, case.head_dim, dtype=case.dtype).transpose(1, 2),
        "key": random(batch, case.kv_heads, case.tokens, case.head_dim, dtype=case.dtype),
        "value": random(batch, case.tokens, case.kv_heads, case.value_dim, dtype=case.dtype).transpose(1, 2),
        "k_recent": k_recent,
        "v_recent": v_recent,
        "k_upper": k_upper,
        "k_lower": k_lower if case.lower else None,
        "k_scale": k_scale,
        "k_zero": k_zero,
        "v_upper": v_upper,
        "v_lower": v_lower if case.lower else None,
        "v_scale": v_scale,
        "v_zero": v_zero,
        "quantized_len": lengths[:, 0].contiguous(),
        "length": lengths.sum(1),
        "sinks": random(case.heads, dtype=case.dtype) if case.sinks else None,
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


WIDE: dict[str, Any] = {"head_dim": 64, "value_dim": 64, "group": 128, "lower": True, "dtype": torch.float16}
WIDE_CASES = {
    "ragged": Case(heads=8, kv_heads=2, tokens=5, **WIDE, lengths=((256, 40), (0, 3), (128, 200))),
    "window, soft cap": Case(heads=6, tokens=4, **WIDE, window=170, softcap=4.0, lengths=((384, 30), (128, 3))),
    "chunks": Case(heads=6, tokens=4, **WIDE, window=-150, lengths=((384, 30),)),
    "head dim 128, group 256, sinks": Case(
        heads=10,
        tokens=2,
        **(WIDE | {"group": 256, "head_dim": 128, "value_dim": 128}),
        lengths=((512, 100),),
        sinks=True,
    ),
    "one block of 32": Case(heads=9, tokens=2, **WIDE, lengths=((256, 7),)),
    "bfloat16, two blocks": Case(heads=7, tokens=5, **(WIDE | {"dtype": torch.bfloat16}), lengths=((256, 130),)),
}
ATTENTION_CASES = {
    "draft": Case(),
    "verify": Case(tokens=7, lower=True),
    "no groups": Case(lengths=((0, 5),)),
    "empty cache": Case(tokens=3, lengths=((0, 0),)),
    "ragged": Case(tokens=3, lengths=((0, 31), (96, 64), (32, 40)), lower=True),
    "grouped query": Case(heads=8, kv_heads=2, tokens=4, lower=True),
    "more rows than a block": Case(heads=6, tokens=16, lower=True),
    "odd heads": Case(heads=7, lower=True, lengths=((160, 20),)),
    "head dim 80": Case(head_dim=80, value_dim=80, lower=True),
    "head dim 96": Case(head_dim=96, value_dim=96),
    "head dim 128, group 128": Case(head_dim=128, value_dim=128, group=128, lengths=((384, 130),)),
    "four value parts": Case(head_dim=512, value_dim=512, lengths=((64, 33),), tokens=2, lower=True),
    "three value parts": Case(head_dim=64, value_dim=129, lengths=((64, 5), (0, 9)), dtype=torch.bfloat16),
    "two value parts": Case(head_dim=256, value_dim=256, group=16, lengths=((48, 17),)),
    "two uneven parts": Case(head_dim=192, value_dim=144, tokens=2, lower=True),
    "different value dim": Case(head_dim=96, value_dim=64, lower=True),
    "small groups": Case(group=16, lengths=((80, 20), (16, 16))),
    "window inside recent": Case(window=9, lengths=((64, 33),), tokens=3),
    "window over groups": Case(window=70, lengths=((160, 40), (32, 33)), tokens=5, lower=True),
    "chunks inside recent": Case(window=-9, lengths=((64, 33),), tokens=3),
    "chunks over groups": Case(window=-70, lengths=((160, 40), (32, 33)), tokens=5, lower=True),
    "window over small groups": Case(window=50, group=16, lengths=((112, 20),)),
    "soft cap": Case(softcap=4.0, tokens=2),
    "sinks": Case(heads=4, kv_heads=2, sinks=True, tokens=2, lengths=((64, 40), (0, 1))),
    "token-major values": Case(transposed_values=False, lower=True),
    "float16": Case(dtype=torch.float16, group=64, lengths=((192, 70),)),
    "float16 verify": Case(dtype=torch.float16, tokens=7, heads=4, lower=True),
    "bfloat16": Case(dtype=torch.bfloat16, lengths=((96, 40),)),
    "bfloat16 verify": Case(dtype=torch.bfloat16, tokens=5, lower=True, sinks=True),
    # Halves of a group as long as a block of the kernel, or longer, with a few columns and with many.
    "group 128, window": Case(group=128, window=150, lengths=((256, 140),), lower=True, tokens=3),
    "group 128, two parts": Case(group=128, head_dim=256, value_dim=256, lengths=((256, 20),), lower=True),
    "group 128, many rows": Case(heads=8, tokens=8, group=128, lengths=((256, 9),), lower=True, dtype=torch.float16),
    "group 256": Case(group=256, lengths=((512, 3), (256, 300)), tokens=2),
    # What a GPU that multiplies 64 rows at once attends to by four warps.
    **{f"wide, {name}": case for name, case in WIDE_CASES.items()},
}


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    """Any shape the op promises; each sequence has whole groups in the planes and any filling of its recent buffer."""
    kv_heads, repeat = draw(st.integers(1, 2)), draw(st.integers(1, 5))
    head_dim = draw(st.sampled_from([64, 80, 96, 128, 256]))
    group = draw(st.sampled_from([16, 32, 64, 128]))
    length = st.tuples(st.integers(0, 2).map(lambda n: n * group), st.integers(0, 2 * group))
    return Case(
        heads=kv_heads * repeat,
        kv_heads=kv_heads,
        tokens=draw(st.integers(1, 8)),
        head_dim=head_dim,
        value_dim=draw(st.sampled_from([head_dim, 64, 128])),
        group=group,
        lengths=tuple(draw(st.lists(length, min_size=1, max_size=2))),
        window=draw(st.one_of(st.just(0), st.integers(-5 * group, 5 * group))),
        softcap=draw(st.sampled_from([0.0, 0.0, 4.0])),
        sinks=draw(st.booleans()),
        lower=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        transposed_values=draw(st.booleans()),
    )


@given(drawn_cases())
def test_cached_attention_matches_float64_for_drawn_shapes(case: Case) -> None:
    torch.manual_seed(0)
    check_cached_attention(case)


@pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES)
def test_cached_attention_matches_float64(case: Case) -> None:
    check_cached_attention(case)


@pytest.mark.parametrize("case", WIDE_CASES.values(), ids=WIDE_CASES)
def test_gpus_that_multiply_fewer_rows_at_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """They attend by two warps to smaller tiles, those that multiply 64 rows by four."""
    assert tiles_of(case, monkeypatch, multiplies_64_rows=True) == {(64, 4)}
    assert tiles_of(case, monkeypatch, multiplies_64_rows=False) == {(32, 2)}


@pytest.mark.parametrize(
    "case",
    [
        Case(heads=8, tokens=1, **WIDE, lengths=((256, 7),)),
        Case(heads=10, **(WIDE | {"dtype": torch.float32}), lengths=((256, 7),)),
        Case(heads=10, **(WIDE | {"value_dim": 128}), lengths=((256, 7),)),
        Case(heads=10, **(WIDE | {"group": 64}), lengths=((256, 7),)),
        Case(heads=10, **(WIDE | {"lower": False}), lengths=((256, 7),)),
        Case(heads=10, **WIDE, lengths=((256, 7),), transposed_values=False),
    ],
    ids=["few rows", "float32", "wider values", "small groups", "draft", "token-major values"],
)
def test_what_four_warps_do_not_attend_to(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiles_of(case, monkeypatch, multiplies_64_rows=True) == {(32, 2)}


def tiles_of(case: Case, monkeypatch: pytest.MonkeyPatch, **limits: bool) -> set[tuple[int, int]]:
    """Byte rows of a tile and warps, as the launcher chooses them for a right result on a device of these limits."""
    module = import_module("quantspec.kernels.cached_attention_triton")
    device, configure, chosen = module.device_limits(DEVICE)._replace(**limits), module.launch_config, set()

    def configured(*args: Any) -> Any:
        config = configure(*args)
        chosen.add((config.block, config.warps))
        return config

    with monkeypatch.context() as patches:
        patches.setattr(module, "device_limits", lambda _: device)
        patches.setattr(module, "launch_config", configured)
        check_cached_attention(case)
    return chosen


def check_cached_attention(case: Case) -> None:
    arguments = cache_arguments(case)
    options = {"scale": case.head_dim**-0.5, "window": case.window, "softcap": case.softcap}
    widened = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in arguments.items()}
    expected = cached_attention_reference(**widened, **options)
    actual = cached_attention_triton(**arguments, **options)
    assert actual.dtype == case.dtype
    assert relative_error(actual, expected) < TOLERANCE[case.dtype]
    for name in ("k_recent", "v_recent"):
        torch.testing.assert_close(arguments[name].double(), widened[name], rtol=0, atol=0, equal_nan=True)


def int4_arguments(rows: int, out_features: int, in_features: int, group: int, bias: bool, dtype: torch.dtype):
    """Random arguments of ``quantspec::int4_linear``, and the result in float64."""
    x = random(rows, in_features, dtype=dtype)
    qdata = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8, device=DEVICE)
    scale_and_zero = random(in_features // group, out_features, 2, dtype=dtype)
    offset = random(out_features, dtype=dtype) if bias else None
    expected = x.double() @ dequantize_int4(qdata, scale_and_zero, torch.float64).t()
    return (x, qdata, scale_and_zero, offset), expected if offset is None else expected + offset.double()


@given(
    rows=st.integers(1, 16),
    out_features=st.integers(1, 80),
    chunks=st.integers(1, 24),
    group=st.sampled_from([32, 64, 128, 256]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_int4_linear_matches_float64_for_drawn_shapes(rows, out_features, chunks, group, bias, dtype) -> None:
    torch.manual_seed(0)
    arguments, expected = int4_arguments(rows, out_features, chunks * group, group, bias, dtype)
    assert relative_error(int4_linear_triton(*arguments), expected) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "group", "bias"),
    [
        (1, 48, 512, 128, False),
        (1, 40, 320, 64, True),
        (8, 32, 256, 32, True),
        (16, 19, 384, 128, False),
        (3, 64, 96, 32, False),
        (12, 24, 256, 32, True),
        (9, 24, 256, 64, False),
        (5, 40, 768, 256, True),
        (16, 56, 512, 256, False),
        # Long enough for several splits of K, which share it evenly and not.
        (2, 32, 4096, 128, True),
        (10, 24, 2240, 64, True),
        (4, 16, 8448, 128, False),
    ],
)
def test_int4_linear_matches_float64(rows, out_features, in_features, group, bias, dtype) -> None:
    arguments, expected = int4_arguments(rows, out_features, in_features, group, bias, dtype)
    actual = int4_linear_triton(*arguments)
    assert actual.dtype == dtype
    # Codes and products are exact, so only float32 sums and the rounding of the result differ.
    assert relative_error(actual, expected) < torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("activation", "gate_first"), [("", True), ("silu", True), ("silu", False), ("gelu", True), ("gelu_tanh", False)]
)
@pytest.mark.parametrize(
    ("rows", "tiles", "splits", "early"),
    [(2, 1, 1, 9), (3, 1, 4, 1), (5, 4, 1, 1), (8, 2, 2, 9), (12, 4, 2, 0), (29, 2, 3, 0)],
)
def test_int4_linears_do_what_follows_them(rows, tiles, splits, early, activation, gate_first, monkeypatch) -> None:
    module = import_module("quantspec.kernels.int4_rows")
    monkeypatch.setattr(
        module, "linear_config", lambda *_: LinearConfig(tiles, 2, 1 if activation else splits, 1, early)
    )
    arguments, expected = int4_arguments(rows, 80, 768, 64, True, torch.bfloat16)
    if activation:
        expected = gated(expected, activation, gate_first)
    residual = random(*expected.shape, dtype=torch.bfloat16)
    actual = int4_fused_linear_triton(*arguments, residual, activation, gate_first, None, 0.0)
    assert relative_error(actual, expected + residual.double()) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(("rows", "tiles", "splits"), [(1, 1, 1), (2, 1, 1), (6, 2, 3), (7, 4, 1), (19, 2, 1)])
def test_a_norm_between_int4_linears_needs_no_launch(rows, tiles, splits, monkeypatch) -> None:
    module = import_module("quantspec.kernels.int4_rows")
    monkeypatch.setattr(
        module, "linear_config", lambda *shape: LinearConfig(tiles, 2, 1 if shape[-1] else splits, 1, 0)
    )
    arguments, expected = int4_arguments(rows, 192, 384, 64, True, torch.bfloat16)
    residual, norm_weight = random(*expected.shape, dtype=torch.bfloat16), random(192, dtype=torch.bfloat16)
    (_, *weights), _ = int4_arguments(rows, 40, 192, 64, True, torch.bfloat16)
    y, scaled, squares = int4_linear_to_norm_triton(*arguments, residual, norm_weight)
    assert relative_error(y, expected + residual.double()) < torch.finfo(torch.bfloat16).eps
    assert relative_error(scaled, y.double() * norm_weight.double()) < torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(squares.sum(0), y.float().square().sum(-1))
    wide = (scaled.double(), *(t if t.dtype == torch.uint8 else t.double() for t in weights))
    for activation in ("", "silu"):
        actual = int4_fused_linear_triton(scaled, *weights, None, activation, True, squares, 1e-5)
        normed = int4_fused_linear(*wide, None, activation, True, squares.double(), 1e-5)
        assert relative_error(actual, normed) < torch.finfo(torch.bfloat16).eps


@given(
    tiles=st.integers(1, 3),
    warps=st.sampled_from([1, 2, 4]),
    unrolled=st.integers(0, 3),
    outputs=st.integers(1, 80),
    chunks=st.integers(1, 24),
    group=st.sampled_from([32, 64, 128, 256]),
    bias=st.booleans(),
    activation=st.sampled_from(["", "silu", "gelu", "gelu_tanh"]),
    gate_first=st.booleans(),
    to_norm=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_one_row_of_int4_linears_does_what_follows_it(
    tiles, warps, unrolled, outputs, chunks, group, bias, activation, gate_first, to_norm, dtype
) -> None:
    torch.manual_seed(0)
    module = import_module("quantspec.kernels.int4_row")
    width = 2 * outputs if activation else outputs
    (x, qdata, scale_and_zero, offset), _ = int4_arguments(1, width, chunks * group, group, bias, dtype)
    # Small enough for a product of two outputs in float16.
    arguments = x, qdata, scale_and_zero / 64, offset
    residual, squares = random(1, outputs, dtype=dtype), torch.rand(5, 1, device=DEVICE) * x.shape[-1]
    norm_weight = random(outputs, dtype=dtype)
    wide = [t if t is None or t.dtype == torch.uint8 else t.double() for t in (*arguments, residual, norm_weight)]
    with (
        patch.object(module, "row_config", lambda *_: module.RowConfig(tiles, warps)),
        patch.object(module, "UNROLLED_STEPS", unrolled),
    ):
        if activation or not to_norm:
            after = activation, gate_first, squares, 1e-5
            actual = [int4_fused_linear_triton(*arguments, residual, *after)]
            expected = [int4_fused_linear(*wide[:5], activation, gate_first, squares.double(), 1e-5)]
        else:
            actual = list(int4_linear_to_norm_triton(*arguments, residual, norm_weight))
            expected = list(int4_linear_to_norm(*wide))
            assert actual[2].shape == expected[2].shape
    # Gates multiply two rounded numbers, squares are those of a rounded sum, and a residual may cancel it.
    for result, exact in zip(actual, expected, strict=True):
        error = (result.double() - exact.double()).norm()
        assert error < 4 * torch.finfo(dtype).eps * (exact.double().norm() + residual.double().norm())


@pytest.mark.parametrize("ratio", [1, 2**4, 2**8])
def test_inputs_of_one_row_lose_the_bits_by_which_a_neighbour_exceeds_them(ratio: int) -> None:
    x, qdata, scale_and_zero = (
        random(1, 512, dtype=torch.bfloat16),
        *int4_arguments(1, 48, 512, 128, False, torch.float32)[0][1:3],
    )
    outlier = torch.zeros(512, dtype=torch.bool, device=DEVICE)
    outlier[7::32] = True
    x[0, outlier] = ratio * x[0, ~outlier].abs().max()
    # What exceeds its neighbours adds nothing, so that their rounding is all that is seen.
    codes = unpack_int4(qdata)
    codes[:, outlier] = 8
    scale_and_zero[..., 1] = 0
    weights = pack_int4(codes), scale_and_zero.to(torch.bfloat16)
    expected = x.double() @ dequantize_int4(*weights, torch.float64).t()
    error = relative_error(int4_linear_triton(x, *weights, None), expected)
    assert error < torch.finfo(torch.bfloat16).eps + ratio * 2**-14


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_an_input_that_is_no_number_is_seen_in_every_output(broken: float) -> None:
    (x, *weights), _ = int4_arguments(1, 48, 512, 128, False, torch.bfloat16)
    x[0, 100] = broken
    assert not int4_linear_triton(x, *weights).isfinite().any()


# Of 132 multiprocessors, as many launches of two tiles a program; of two, programs of four fill them once.
@pytest.mark.parametrize(("processors", "tiles"), [(132, 2), (2, 4)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "sizes"), [(1, (40, 24)), (6, (49,)), (8, (37, 20)), (13, (44, 20))])
def test_linears_of_one_input_match_float64(rows, sizes, bias, processors, tiles, monkeypatch) -> None:
    module = import_module("quantspec.kernels.linears")
    sizes = sizes[:1] if processors == 2 else (*sizes, 33)
    limits = module.device_limits(DEVICE)._replace(multiprocessors=processors)
    monkeypatch.setattr(module, "device_limits", lambda device: limits)
    assert module.linears_config(sizes, 1152, rows, False, processors).tiles == tiles
    x = random(2, rows, 1152, dtype=torch.bfloat16)[1:]
    weights = [random(size, 1152, dtype=torch.bfloat16) for size in sizes]
    biases = [random(size, dtype=torch.bfloat16) for size in sizes] if bias else []
    wide = ([tensor.double() for tensor in tensors] for tensors in (weights, biases))
    expected = linears(x.double(), *wide)
    actual = linears_triton(x, weights, biases)
    assert relative_error(actual, expected) < torch.finfo(torch.bfloat16).eps


def test_int4_linear_takes_weights_of_any_layout() -> None:
    (x, qdata, scale_and_zero, bias), expected = int4_arguments(3, 48, 256, 64, True, torch.float16)
    transposed = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (qdata, scale_and_zero)]
    assert relative_error(int4_linear_triton(x, *transposed, bias), expected) < torch.finfo(torch.float16).eps


@pytest.mark.parametrize("k_width", [2, 4])
@pytest.mark.parametrize("rows", range(1, 17))
def test_int4_linear_at_every_number_of_rows(rows: int, k_width: int, monkeypatch) -> None:
    monkeypatch.setattr(import_module("quantspec.kernels.int4_rows"), "K_WIDTH", k_width)
    arguments, expected = int4_arguments(rows, 32, 256, 64, False, torch.bfloat16)
    assert relative_error(int4_linear_triton(*arguments), expected) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("rows", "group", "dtype"),
    [(1, 64, torch.float32), (65, 64, torch.float16), (0, 64, torch.float16), (2, 16, torch.float16)],
)
def test_int4_linear_multiplies_what_the_kernel_does_not(rows: int, group: int, dtype: torch.dtype) -> None:
    arguments, _ = int4_arguments(rows, 24, 192, group, True, dtype)
    x, qdata, scale_and_zero, bias = arguments
    expected = torch.nn.functional.linear(x, dequantize_int4(qdata, scale_and_zero, dtype), bias)
    assert torch.equal(int4_linear_triton(*arguments), expected)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("out_features", [1024, 8192, 14336])
@pytest.mark.parametrize("in_features", [256, 4096, 14336])
def test_int4_linear_configurations_keep_every_warp_busy(rows, group, out_features, in_features) -> None:
    config = linear_config(rows, out_features, in_features, group, False)
    assert config.splits * config.warps <= max(4, in_features // min(group, 128))
    # What follows a gate takes whole sums.
    assert linear_config(rows, out_features, in_features, group, True).splits == 1


@pytest.mark.parametrize(
    ("dtype", "bias"),
    [(torch.float32, True), (torch.float32, False)]
    + [case for dtype in (torch.float16, torch.bfloat16) for case in ((dtype, True), repeat(dtype, False))],
    ids=str,
)
@pytest.mark.parametrize(("rows", "out_features", "in_features"), [(1, 5, 64), (3, 150, 96), (7, 20, 288)])
def test_expert_linears_match_float64(rows, out_features, in_features, bias, dtype) -> None:
    num_experts = 3
    x, offset = random(rows, in_features, dtype=dtype), random(num_experts, out_features, dtype=dtype)
    ids = torch.randint(0, num_experts, (rows,), device=DEVICE)

    def expected(weight: Tensor) -> Tensor:
        each = torch.einsum("sk,snk->sn", x.double(), weight.double()[ids])
        return each + offset.double()[ids] if bias else each

    weight = random(num_experts, out_features, in_features, dtype=dtype)
    for stored, transposed in ((weight, False), (weight.transpose(1, 2).contiguous(), True)):
        actual = expert_linear_triton(x, ids, stored, offset if bias else None, transposed)
        assert actual.dtype == dtype
        assert relative_error(actual, expected(weight)) < max(torch.finfo(dtype).eps, 1e-6)
    for group in (16, 32):
        stack = (num_experts, out_features, in_features // 2)
        qdata = torch.randint(0, 256, stack, dtype=torch.uint8, device=DEVICE)
        params = random(num_experts, in_features // group, out_features, 2, dtype=dtype)
        actual = int4_expert_linear_triton(x, ids, qdata, params, offset if bias else None)
        assert actual.dtype == dtype
        dense = dequantize_int4(qdata, params, torch.float64)
        assert relative_error(actual, expected(dense)) < max(torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize(("rows", "dtype"), [(0, torch.float32), (9, torch.float32), (3, torch.float64)])
def test_rows_that_the_experts_kernels_do_not_take(rows: int, dtype: torch.dtype, monkeypatch) -> None:
    """None, those that read more than MOST_BYTES, and float64 are multiplied as by the reference."""
    monkeypatch.setattr(import_module("quantspec.kernels.expert_linear"), "MOST_BYTES", 1000)
    x, ids = random(rows, 32, dtype=dtype), torch.randint(0, 3, (rows,), device=DEVICE)
    weight = random(3, 24, 32, dtype=dtype)
    assert torch.equal(expert_linear_triton(x, ids, weight, None, False), expert_linear(x, ids, weight, None, False))
    qdata = torch.randint(0, 256, (3, 24, 16), dtype=torch.uint8, device=DEVICE)
    stored = (qdata, random(3, 2, 24, 2, dtype=dtype), None)
    assert torch.equal(int4_expert_linear_triton(x, ids, *stored), int4_expert_linear(x, ids, *stored))


def random_cache(batch: int, kv_heads: int, groups: int, slots: int, head_dim: int, value_dim: int, group: int, dtype):
    """An empty layer cache in the order of the ops' arguments: recent buffers, then planes, scales and zeros."""
    k_upper, k_lower, k_scale, k_zero = encode_keys(random(batch, kv_heads, groups, group, head_dim))
    v_upper, v_lower, v_scale, v_zero = encode_values(random(batch, kv_heads, groups, group, value_dim))
    v_upper, v_lower = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (v_upper, v_lower))
    k_recent = random(batch, kv_heads, slots, head_dim, dtype=dtype)
    v_recent = random(batch, kv_heads, slots, value_dim, dtype=dtype)
    return [k_recent, v_recent, k_upper, k_lower, k_scale, k_zero, v_upper, v_lower, v_scale, v_zero]


def assert_same_cache(actual: list[Tensor], expected: list[Tensor], quantized: list[int], recent: list[int]) -> None:
    """Equal recent tokens and zeros; scales and codes as near as float32 decides ties.

    A scale may be one float16 neighbour off, and a code its neighbour: the decoded value then moves by one step of the
    lower plane (s/16) and 15 roundings of the scale.
    """
    group = 2 * expected[2].shape[3]
    for b, (tokens, kept) in enumerate(zip(quantized, recent, strict=True)):
        for index in (0, 1):
            assert torch.equal(actual[index][b, :, :kept], expected[index][b, :, :kept])
        if not tokens:
            continue
        for first, decode in ((2, decode_keys), (6, decode_values)):
            ours = [x[b, :, : tokens // group] for x in actual[first : first + 4]]
            theirs = [x[b, :, : tokens // group] for x in expected[first : first + 4]]
            torch.testing.assert_close(ours[2], theirs[2], rtol=2**-10, atol=0)
            assert torch.equal(ours[3], theirs[3])
            scale = theirs[2].double()
            scale = (
                scale.unsqueeze(-2)
                if first == 2
                else scale.repeat_interleave(theirs[0].shape[-1] // scale.shape[-1], -1)
            )
            difference = (decode(*ours, torch.float64) - decode(*theirs, torch.float64)).abs() / scale
            assert float(difference.max()) <= 1 / 16 + 15 * 2**-10
            assert float((difference > 2**-9).double().mean()) < 0.01


@pytest.mark.parametrize(
    ("dims", "group", "dtype", "state"),
    [
        ((64, 64), 32, torch.float32, [(0, 0, 150), (0, 0, 31), (0, 0, 64)]),
        ((80, 144), 16, torch.float16, [(0, 0, 60), (32, 20, 33)]),
        ((128, 128), 128, torch.bfloat16, [(0, 0, 300)]),
        ((256, 256), 16, torch.bfloat16, [(16, 31, 5), (0, 3, 2)]),
    ],
)
def test_prefill_encodes_as_reference(dims, group, dtype, state) -> None:
    batch, tokens = len(state), max(new for _, _, new in state)
    cache = random_cache(batch, 2, max(sum(s) for s in state) // group + 1, 2 * group + 8, *dims, group, dtype)
    reference = [x.cpu().clone() for x in cache]
    key = random(batch, tokens, 2, dims[0], dtype=dtype).transpose(1, 2)
    value = random(batch, 2, tokens, dims[1], dtype=dtype)
    quantized = torch.tensor([s[0] for s in state], device=DEVICE)
    length = torch.tensor([s[0] + s[1] for s in state], device=DEVICE)
    num_new = torch.tensor([s[2] for s in state], device=DEVICE)
    query = random(batch, 2, tokens, dims[0], dtype=dtype)
    encode_oldest_groups((key, value, num_new), *cache, quantized, length)
    lengths = [x.cpu() for x in (quantized, length, num_new)]
    prefill_attention(query.cpu(), key.cpu(), value.cpu(), *reference, *lengths, 1.0, 0, 0.0, None)
    slots = [recent + new for _, recent, new in state]
    flushed = [max(0, n // group - 1) * group for n in slots]
    assert_same_cache(
        [x.cpu() for x in cache],
        reference,
        [s[0] + f for s, f in zip(state, flushed, strict=True)],
        [n - f for n, f in zip(slots, flushed, strict=True)],
    )


@pytest.mark.parametrize(
    ("dims", "group", "dtype", "span"),
    [
        # The oldest token that is wanted, tokens in the planes, in the recent buffer, and new ones.
        ((64, 64), 32, torch.float32, (0, 96, 41, 70)),
        ((80, 144), 16, torch.float16, (37, 48, 20, 3)),
        ((128, 128), 128, torch.bfloat16, (0, 256, 255, 1)),
        ((576, 0), 64, torch.bfloat16, (0, 128, 65, 9)),
        ((64, 64), 16, torch.float64, (50, 32, 30, 5)),
        ((96, 256), 16, torch.bfloat16, (0, 0, 7, 20)),
    ],
    ids=str,
)
@pytest.mark.parametrize("places", ["own", "ring", "pool"])
def test_dense_tokens_are_those_of_the_reference(dims, group, dtype, span, places) -> None:
    first, quantized, recent, new = span
    groups, sequence, start = quantized // group + 1, 1, quantized + recent
    cache = random_cache(2, 2, groups, 2 * group + 8, *dims, group, dtype)
    table = None
    if places == "ring":
        # One place less than there are groups: the last takes that of the first.
        first, groups = min(max(first, group), start), max(1, groups - 2)
        cache[2:] = [part[:, :, :groups] for part in cache[2:]]
    elif places == "pool":
        cache[2:] = [part.transpose(0, 1).flatten(1, 2)[None] for part in cache[2:]]
        table = torch.randperm(2 * groups, device=DEVICE).to(torch.int32).view(2, groups)
    k_recent, v_recent, *planes = cache
    key = random(2, new, 2, dims[0], dtype=dtype).transpose(1, 2)
    value = random(2, 2, new, dims[1], dtype=dtype) if dims[1] else key[..., :512]
    where = (first, start, sequence, quantized, dtype, tuple(planes), (k_recent, v_recent), table)
    expected = dense_tokens(key[sequence], value[sequence], *where)
    actual = dense_tokens_triton(key[sequence], value[sequence], *where)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        if dtype == torch.bfloat16 and DEVICE.type == "cpu":
            # The interpreter cuts bits off where a GPU rounds.
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)
        else:
            assert torch.equal(ours, theirs)


def test_flush_moves_one_due_group() -> None:
    group, state = 32, [(32, 63), (0, 64), (64, 70), (0, 1)]
    cache = random_cache(len(state), 2, 4, 2 * group + 8, 64, 80, group, torch.float16)
    reference = [x.cpu().clone() for x in cache]
    quantized = torch.tensor([s[0] for s in state], device=DEVICE)
    length = torch.tensor([sum(s) for s in state], device=DEVICE)
    encode_oldest_groups(None, *cache, quantized, length)
    flush(*reference, quantized.cpu(), length.cpu())
    moved = [group if recent >= 2 * group else 0 for _, recent in state]
    assert moved == [0, group, group, 0]
    assert_same_cache(
        [x.cpu() for x in cache],
        reference,
        [s[0] + m for s, m in zip(state, moved, strict=True)],
        [s[1] - m for s, m in zip(state, moved, strict=True)],
    )


def test_values_are_the_same_whichever_way_their_planes_are_stored() -> None:
    """Prefill, attention and flush over value planes with adjacent tokens equal those over plain ones bit for bit."""
    group, groups, tokens = 32, 4, 3
    shape = (2, 2, groups, group // 2, 80)
    prompts = [random(2, heads, 130, dim, dtype=torch.float16) for heads, dim in ((4, 64), (2, 64), (2, 80))]
    steps = [random(2, heads, tokens, dim, dtype=torch.float16) for heads, dim in ((4, 64), (2, 64), (2, 80))]
    num_new = torch.tensor([130, 61], device=DEVICE)
    options = (0.125, 0, 0.0, None)
    results = []
    for transposed in (False, True):
        cache = random_cache(2, 2, groups, 2 * group + 8, 64, 80, group, torch.float16)
        for part in cache:
            part.zero_()
        for index in (6, 7):
            stored = cache[index].new_zeros((*shape[:3], shape[4], shape[3]) if transposed else shape)
            cache[index] = stored.transpose(-1, -2) if transposed else stored
        quantized, length = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
        prefilled = prefill_attention_triton(*prompts, *cache, quantized, length, num_new, *options)
        quantized, length = torch.tensor([[96, 0], [130, 61]], device=DEVICE)
        attended = cached_attention_triton(*steps, *cache, quantized, length, *options)
        encode_oldest_groups(None, *cache, quantized, length + tokens)
        results.append([prefilled, attended, *cache])
    for plain, transposed in zip(*results, strict=True):
        assert torch.equal(plain, transposed)
    # The second sequence's group is there by the last call alone.
    assert results[0][8][1, :, 0].count_nonzero()


def test_one_launch_serves_every_length() -> None:
    """Lengths change in place between launches; on a GPU the launches are replays of one CUDA graph."""
    case = Case(heads=4, kv_heads=2, tokens=2, lower=True, lengths=((96, 40), (96, 63)))
    arguments = cache_arguments(case)
    options = {"scale": 0.125, "window": 0, "softcap": 0.0}
    if DEVICE.type == "cuda":
        cached_attention_triton(**arguments, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = cached_attention_triton(**arguments, **options)
    for quantized, recent in ((96, 40), (32, 1), (0, 0), (64, 33)):
        arguments["quantized_len"].fill_(quantized)
        arguments["length"].copy_(torch.tensor([quantized + recent, quantized]))
        arguments["key"].normal_()
        arguments["k_recent"].normal_()
        arguments["v_recent"].normal_()
        widened = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in arguments.items()}
        expected = cached_attention_reference(**widened, **options)
        if DEVICE.type == "cuda":
            actual.fill_(float("nan"))
            graph.replay()
        else:
            actual = cached_attention_triton(**arguments, **options)
        assert relative_error(actual, expected) < TOLERANCE[case.dtype]


@triton.jit
def _unpack_kernel(upper, lower, out, dtype: tl.constexpr, USE_ASM: tl.constexpr):
    i = tl.arange(0, 256)
    packed = tl.load(upper + i)
    low, high = centred_nibbles(packed, dtype, USE_ASM)
    tl.store(out + i, low.to(tl.float32))
    tl.store(out + 256 + i, high.to(tl.float32))
    low, high = centred_bytes(packed, tl.load(lower + i), dtype, USE_ASM)
    tl.store(out + 512 + i, low.to(tl.float32))
    tl.store(out + 768 + i, high.to(tl.float32))


@triton.jit
def _unpack_quarters_kernel(packed, out, dtype: tl.constexpr, USE_ASM: tl.constexpr):
    i = tl.program_id(0) * 256 + tl.arange(0, 256)
    q0, q1, q2, q3 = biased_quarters(tl.load(packed + i), dtype, USE_ASM)
    tl.store(out + i, q0.to(tl.float32) - nibble_bias(dtype))
    tl.store(out + 65536 + i, q1.to(tl.float32) - nibble_bias(dtype))
    tl.store(out + 131072 + i, q2.to(tl.float32) - nibble_bias(dtype))
    tl.store(out + 196608 + i, q3.to(tl.float32) - nibble_bias(dtype))


@pytest.mark.parametrize("use_asm", [False, True] if DEVICE.type == "cuda" else [False])
def test_every_byte_unpacks_exactly(use_asm: bool) -> None:
    upper = torch.arange(256, device=DEVICE, dtype=torch.uint8)
    lower = upper[torch.randperm(256, device=DEVICE)]
    out = torch.full((4, 256), float("nan"), device=DEVICE)
    _unpack_kernel[(1,)](upper, lower, out, dtype=tl.float16, USE_ASM=use_asm)
    u, low = upper.int(), lower.int()
    expected = [(u & 15) - 8, (u >> 4) - 8, 16 * (u & 15) + (low & 15) - 136, 16 * (u >> 4) + (low >> 4) - 136]
    assert torch.equal(out, torch.stack(expected).float())
    words = torch.arange(65536, device=DEVICE)
    packed = words.to(torch.uint16)
    for dtype in (tl.float16, tl.bfloat16):
        out = torch.full((4, 65536), float("nan"), device=DEVICE)
        _unpack_quarters_kernel[(256,)](packed, out, dtype=dtype, USE_ASM=use_asm)
        assert torch.equal(out, torch.stack([words >> shift & 15 for shift in (0, 4, 8, 12)]).float())
