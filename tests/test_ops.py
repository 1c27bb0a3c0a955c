"""Custom ops: the hierarchical code's error bounds, and every op against a plain formula in float64."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repeats import only, repeat
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from quantspec import kernels
from quantspec.kernels import cached_attention, cached_attention_reference
from quantspec.kernels.attention import QUERY_BLOCK, attention_dtype, masked_attention
from quantspec.kernels.cache_layout import part_names
from quantspec.kernels.cache_op import CacheOp
from quantspec.kernels.hierarchical import (
    decode_keys,
    decode_values,
    encode_keys,
    encode_values,
    num_flushed_groups,
    num_value_groups,
    pack_tokens,
    unpack_tokens,
)
from quantspec.kernels.int4_linear import dequantize_int4, pack_int4, unpack_int4

GROUP = 16
# Key and value head dims; the last two differ.
HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (24, 16))
quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_bytes(*shape: int, seed: int) -> Tensor:
    """Uniform uint8."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# --- the hierarchical code -------------------------------------------------------------------------------------------


@given(seed=seeds, lead=st.lists(st.integers(1, 3), max_size=2), half=st.integers(1, 9), dim=st.integers(1, 9))
@quick
def test_packing_round_trip_is_exact(seed, lead, half, dim):
    plane = random_bytes(*lead, half, dim, seed=seed)
    codes = unpack_tokens(plane)
    assert codes.shape == (*lead, 2 * half, dim)
    assert int(codes.max()) <= 15
    assert torch.equal(pack_tokens(codes), plane)
    # Row r holds token r in its low nibble and token r + G/2 in its high one.
    assert torch.equal(plane, codes[..., :half, :] + 16 * codes[..., half:, :])


def test_packed_bytes_of_a_known_group():
    codes = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)[:, None]
    assert pack_tokens(codes).flatten().tolist() == [1 + 16 * 3, 2 + 16 * 4]


@pytest.mark.parametrize(
    ("head_dim", "groups"), [(16, 1), (64, 1), (96, 1), (128, 1), (129, 3), (192, 2), (256, 2), (576, 6)]
)
def test_value_groups_are_the_fewest_equal_parts_of_at_most_128_channels(head_dim, groups):
    assert num_value_groups(head_dim) == groups


def check_bounds(x: Tensor, x4: Tensor, x8: Tensor, lower: Tensor, scale: Tensor, zero: Tensor) -> None:
    """The docstring's bounds for float64 groups along the last axis; ``scale`` and ``zero (..., 1)`` as stored.

    With exact s and z, (x - z) / s lies in [0, 15], the upper code leaves |x - x4| <= s/2, and the lower one s/32, or
    s/16 where the residue rounds to 8 and l clips at 7. Rounding z by dz and s by ds moves the ends of the code's range
    by dz below and dz + 15 ds above, and only what falls outside is further off than that.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    s, z = scale.double(), zero.double()
    dz, ds = (z - low).abs(), (s - (high - low) / 15).abs()
    below, above = dz, dz + 15 * ds
    # A range that vanishes in fp16 is stored with s = 1: the lowest code is still never further off than this.
    vanishing = ((high - low) / 15).half() == 0
    assert bool((s[vanishing] == 1).all())
    above = torch.where(vanishing, dz + (high - low), above)
    rounding = 1e-12 * (1 + x.abs() + 16 * s)
    error4, error8 = (x - x4).abs(), (x - x8).abs()
    outside = torch.maximum(below, above)
    assert bool((error4 <= torch.maximum(s / 2, outside) + rounding).all())
    assert bool((error8 <= error4 + rounding).all())
    inner = (lower > -8) & (lower < 7)
    assert bool((error8 <= s / 32 + rounding)[inner].all())
    # Past an end of the range, the lower code takes back what it can: 8 or 7 sixteenths of s.
    assert bool((error8 <= torch.maximum(s / 32, below - s / 2) + rounding)[lower == -8].all())
    assert bool((error8 <= torch.maximum(s / 16, above - s * 7 / 16) + rounding)[lower == 7].all())


groups = st.tuples(
    seeds,
    st.sampled_from([0.0, 1e-9, 1e-4, 1.0, 300.0]),
    st.sampled_from([0.0, 1.0, -17.3, 3000.0]),
    st.booleans(),
)


def draw_group(drawn: tuple, *shape: int) -> Tensor:
    """Numbers of a drawn spread and offset, uniform or with a heavy tail."""
    seed, spread, offset, heavy = drawn
    x = randn(*shape, seed=seed)
    return (x**3 if heavy else x) * spread + offset


def lower_codes(plane: Tensor) -> Tensor:
    return unpack_tokens(plane).to(torch.int64) - 8


@given(drawn=groups)
@settings(max_examples=120, deadline=None)
def test_key_code_keeps_its_bounds(drawn):
    keys = draw_group(drawn, 2, GROUP, 5)
    upper, lower, scale, zero = encode_keys(keys)
    views = (decode_keys(upper, plane, scale, zero, torch.float64) for plane in (None, lower))
    by_channel = [t.transpose(-1, -2) for t in (keys, *views, lower_codes(lower))]
    check_bounds(*by_channel, scale[..., None], zero[..., None])


@given(drawn=groups, dim=st.sampled_from([16, 80, 256]))
@settings(max_examples=120, deadline=None)
def test_value_code_keeps_its_bounds(drawn, dim):
    values = draw_group(drawn, 2, GROUP, dim)
    upper, lower, scale, zero = encode_values(values)
    parts = num_value_groups(dim)
    assert scale.shape == zero.shape == (2, GROUP, parts)
    views = (decode_values(upper, plane, scale, zero, torch.float64) for plane in (None, lower))
    by_part = [t.unflatten(-1, (parts, -1)) for t in (values, *views, lower_codes(lower))]
    check_bounds(*by_part, scale[..., None], zero[..., None])


def test_group_extremes_are_exact_at_four_bits():
    # 0, 15 and steps of 1 are exact in fp16, so both ends and every code come back bit for bit.
    keys = torch.arange(16.0)[:, None].repeat(1, 3) + torch.tensor([0.0, -100.0, 2000.0])
    upper, lower, scale, zero = encode_keys(keys)
    assert torch.equal(decode_keys(upper, None, scale, zero, torch.float32), keys)
    assert torch.equal(decode_keys(upper, lower, scale, zero, torch.float32), keys)


@pytest.mark.parametrize("value", [0.0, -3.5, 6e4, 2.0**-24])
def test_constant_groups_are_exact(value):
    constant = torch.full((2, GROUP, 4), value)
    for encode, decode in ((encode_keys, decode_keys), (encode_values, decode_values)):
        upper, lower, scale, zero = encode(constant)
        assert bool((scale == 1).all())
        for plane in (None, lower):
            assert torch.equal(decode(upper, plane, scale, zero, torch.float32), constant)


def test_a_lower_plane_that_clips_is_within_a_sixteenth():
    # With s = 1 the residue 0.49 asks for lower code 8, which does not exist: 7/16 is read.
    x = torch.tensor([0.0, 15.0, 3.49, 7.0], dtype=torch.float64).repeat(4)[:, None]
    upper, lower, scale, zero = encode_keys(x)
    assert int(lower_codes(lower)[2]) == 7
    assert decode_keys(upper, lower, scale, zero, torch.float64)[2].item() == 3 + 7 / 16


@given(seed=seeds, bias=st.sampled_from([0.0, 50.0, 400.0, -9000.0, 30000.0]))
@quick
def test_keys_with_a_huge_bias_per_channel_keep_their_precision(seed, bias):
    # Some layers of Qwen2 have key biases hundreds of times the spread of the keys. A bfloat16 key is exact in fp16,
    # so the zero point takes the bias out entirely and the error is relative to the channel's own range.
    keys = (randn(GROUP, 8, seed=seed) + bias * torch.arange(8)).bfloat16()
    keys = keys.clamp(-6e4, 6e4)
    upper, lower, scale, zero = encode_keys(keys)
    x = keys.double()
    spread = x.amax(0) - x.amin(0)
    error8 = (decode_keys(upper, lower, scale, zero, torch.float64) - x).abs().amax(0)
    error4 = (decode_keys(upper, None, scale, zero, torch.float64) - x).abs().amax(0)
    # fp16 rounds s by at most 2^-11 of itself.
    assert bool((error8 <= spread / 15 / 16 * (1 + 2**-6)).all())
    assert bool((error4 <= spread / 15 / 2 * (1 + 2**-6)).all())


def test_values_with_one_scale_for_all_tokens_would_not_survive_that_bias():
    # The test above can fail: one group over channels of different biases loses the small channels.
    keys = (randn(GROUP, 8, seed=0) + 400.0 * torch.arange(8)).bfloat16()
    coded = encode_values(keys)
    error = (decode_values(*coded, torch.float64) - keys.double()).abs().amax(0)
    assert bool((error > (keys.double().amax(0) - keys.double().amin(0)) / 15 / 16 * (1 + 2**-6)).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_input_is_coded_as_its_float32_value(dtype):
    x = randn(2, GROUP, 32, seed=3, dtype=dtype)
    for encode in (encode_keys, encode_values):
        for ours, expected in zip(encode(x), encode(x.float()), strict=True):
            assert torch.equal(ours, expected)


# --- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Scalars and sinks that every attention op takes last."""

    scale: float
    window: int
    softcap: float
    sinks: Tensor | None

    def args(self) -> tuple:
        """In the order of the ops."""
        return self.scale, self.window, self.softcap, self.sinks


@st.composite
def options(draw, heads: int) -> Options:
    """Any mix of window or chunks, soft cap and sinks."""
    sinks = randn(heads, seed=draw(seeds)) if draw(st.booleans()) else None
    window = draw(st.sampled_from([0, 0, 1, 5, GROUP, GROUP + 3, 3 * GROUP, -1, -5, -GROUP - 3, -3 * GROUP]))
    return Options(draw(st.sampled_from([0.1, 0.3])), window, draw(st.sampled_from([0.0, 0.0, 2.0])), sinks)


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, offset: int, options: Options) -> Tensor:
    """One sequence, one query and one head at a time: ``(H, T, D)``, ``(K, S, D)`` to ``(T, H, Dv)`` in float64."""
    heads, tokens, _ = query.shape
    out = torch.zeros(tokens, heads, values.shape[-1], dtype=torch.float64)
    for h in range(heads):
        kv = h // (heads // keys.shape[0])
        for t in range(tokens):
            last = offset + t + 1
            first = max(0, last - options.window) if options.window > 0 else 0
            if options.window < 0:
                first = (last - 1) // -options.window * -options.window
            scores = options.scale * keys[kv, first:last].double() @ query[h, t].double()
            if options.softcap:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            weights = scores.exp()
            total = weights.sum() + (0 if options.sinks is None else options.sinks[h].double().exp())
            out[t, h] = weights / total @ values[kv, first:last].double()
    return out


@st.composite
def dense_case(draw) -> tuple:
    """Query, key, value of a whole sequence and options."""
    dim, value_dim = draw(st.sampled_from(HEAD_DIMS))
    kv_heads, repeat, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    tokens, seed = draw(st.sampled_from([1, 2, 7, 33])), draw(seeds)
    heads = kv_heads * repeat
    query = randn(batch, heads, tokens, dim, seed=seed)
    key = randn(batch, kv_heads, tokens, dim, seed=seed + 1)
    value = randn(batch, kv_heads, tokens, value_dim, seed=seed + 2)
    return query, key, value, draw(options(heads))


@given(case=dense_case())
@quick
def test_attention_marker_is_causal_attention(case):
    query, key, value, opts = case
    out = kernels.attention(query, key, value, 0, *opts.args())
    expected = torch.stack([plain_attention(*row, 0, opts) for row in zip(query, key, value, strict=True)])
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
DIMS = ((16, 16), (24, 16), (8, 16))
# Every dtype, every pair of dims, and all pairs in the dtype that tells most.
DTYPES_AND_DIMS = {(torch.float32, (16, 16)), (torch.bfloat16, (24, 16)), (torch.float16, (8, 16))}
DTYPES_AND_DIMS |= {(torch.float64, dims) for dims in DIMS}


@pytest.mark.parametrize(
    ("dtype", "dims"),
    [case if case in DTYPES_AND_DIMS else repeat(*case) for case in itertools.product(BOUNDS, DIMS)],
    ids=str,
)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize(
    ("window", "offset"), [(0, 0), (0, 40), (20, 0), (QUERY_BLOCK + 3, 70), (1000, 5), (-20, 7), (-1000, 5)]
)
def test_attention_over_more_rows_than_one_block(dtype, dims, softcap, with_sinks, window, offset):
    """Several blocks of rows, more query heads than key heads; relative to the whole output."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = QUERY_BLOCK + 50
    query = randn(1, 2, tokens, dims[0], seed=0, dtype=dtype)
    key, value = (randn(1, 1, offset + tokens, dim, seed=1 + i, dtype=dtype) for i, dim in enumerate(dims))
    opts = Options(0.3, window, softcap, 3 * randn(2, seed=3, dtype=dtype) if with_sinks else None)
    expected = plain_attention(query[0], key[0], value[0], offset, opts)
    sinks = None if opts.sinks is None else opts.sinks.to(device)
    out = masked_attention(*(x.to(device) for x in (query, key, value)), offset, 0.3, window, softcap, sinks)
    assert out.dtype == dtype
    error = (out[0].cpu().double() - expected).norm() / expected.norm()
    assert float(error) < BOUNDS[dtype]


@pytest.mark.parametrize("lacks", [False, True])
@pytest.mark.parametrize("window", [0, 20])
def test_a_cpu_attends_to_prompts_in_a_dtype_that_it_multiplies(lacks, window, monkeypatch):
    """bfloat16 where the CPU has it; nothing else narrow."""
    monkeypatch.setattr(sys.modules[masked_attention.__module__], "cpu_lacks_half_matmul", lambda: lacks)
    wide = {torch.float64: torch.float64, torch.float32: torch.float32, torch.float16: torch.float32}
    expected = wide | {torch.bfloat16: torch.float32 if lacks else torch.bfloat16}
    assert {dtype: attention_dtype(torch.empty(0, dtype=dtype)) for dtype in BOUNDS} == expected
    query, key, value = (randn(1, 2, 60, 16, seed=i, dtype=torch.bfloat16) for i in range(3))
    exact = plain_attention(query[0], key[0], value[0], 0, Options(0.3, window, 0.0, None))
    out = masked_attention(query, key, value, 0, 0.3, window, 0.0, None)
    assert out.dtype == torch.bfloat16
    assert float((out[0].double() - exact).norm() / exact.norm()) < BOUNDS[torch.bfloat16]


@dataclass
class Cached:
    """A random cache: ragged lengths, and garbage wherever nothing is stored."""

    parts: dict[str, Tensor]
    quantized_len: Tensor
    length: Tensor

    def view(self, draft: bool) -> list[Tensor | None]:
        """Fresh copies of the parts in the ops' order; a draft has no lower planes."""
        return [None if draft and name in part_names("lower") else part.clone() for name, part in self.parts.items()]

    def state(self) -> tuple[Tensor, Tensor]:
        """Lengths, as the ops take them."""
        return self.quantized_len, self.length


def random_cache(lengths: list[tuple[int, int]], kv_heads: int, dims: tuple[int, int], spare: int, seed: int) -> Cached:
    """A cache of ``(quantized, recent)`` token counts per sequence, with ``spare`` groups more than needed."""
    batch, num_groups = len(lengths), max(q for q, _ in lengths) // GROUP + spare
    slots = 2 * GROUP + 8
    parts: dict[str, Tensor] = {}
    for index, (prefix, dim) in enumerate(zip("kv", dims, strict=True)):
        recent = randn(batch, kv_heads, slots, dim, seed=seed + 10 * index)
        tail = (num_groups, dim) if prefix == "k" else (num_groups, GROUP, num_value_groups(dim))
        scale = 0.2 * randn(batch, kv_heads, *tail, seed=seed + 10 * index + 1).abs() + 0.01
        zero = randn(batch, kv_heads, *tail, seed=seed + 10 * index + 2) - 1
        for b, (quantized, stored) in enumerate(lengths):
            recent[b, :, stored:] = 1e4
            scale[b, :, quantized // GROUP :] = 1e4
        plane = (batch, kv_heads, num_groups, GROUP // 2, dim)
        parts[f"{prefix}_recent"] = recent
        parts[f"{prefix}_upper"] = random_bytes(*plane, seed=seed + 10 * index + 3)
        parts[f"{prefix}_lower"] = random_bytes(*plane, seed=seed + 10 * index + 4)
        parts[f"{prefix}_scale"], parts[f"{prefix}_zero"] = scale.half(), zero.half()
    order = [f"{p}_{part}" for p in "kv" for part in ("upper", "lower", "scale", "zero")]
    parts = {name: parts[name] for name in ("k_recent", "v_recent", *order)}
    quantized_len = torch.tensor([q for q, _ in lengths])
    return Cached(parts, quantized_len, quantized_len + torch.tensor([r for _, r in lengths]))


# Empty, one token, around G and 2G, before anything is quantized and after.
LENGTHS = [(0, 0), (0, 1), (0, GROUP - 1), (0, GROUP), (0, 2 * GROUP - 1), (0, 2 * GROUP)]
LENGTHS += [(GROUP, GROUP - 1), (GROUP, GROUP), (GROUP, 2 * GROUP), (2 * GROUP, 0), (3 * GROUP, GROUP + 5)]


@st.composite
def cached_case(draw) -> tuple:
    """Query, key, value of 1 to 6 new tokens, a ragged cache and options."""
    dims = draw(st.sampled_from(HEAD_DIMS))
    kv_heads, repeat, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    lengths, seed = draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=3)), draw(seeds)
    cache = random_cache(lengths, kv_heads, dims, draw(st.integers(0, 2)), seed)
    query = randn(len(lengths), kv_heads * repeat, tokens, dims[0], seed=seed + 100)
    key = randn(len(lengths), kv_heads, tokens, dims[0], seed=seed + 101)
    value = randn(len(lengths), kv_heads, tokens, dims[1], seed=seed + 102)
    return (query, key, value), cache, draw(options(kv_heads * repeat))


@given(case=cached_case(), draft=st.booleans())
@settings(max_examples=120, deadline=None)
def test_cached_attention_equals_its_reference(case, draft):
    new, cache, opts = case
    ours, theirs = cache.view(draft), cache.view(draft)
    out = cached_attention(*new, *ours, *cache.state(), *opts.args())
    expected = cached_attention_reference(*new, *theirs, *cache.state(), *opts.args())
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for part, reference, before in zip(ours, theirs, cache.view(draft), strict=True):
        if part is not None:
            assert torch.equal(part, reference)
            # Only the recent buffers are written.
            if part.dtype != torch.float64:
                assert torch.equal(part, before)


@given(case=cached_case(), draft=st.booleans())
@quick
def test_cached_attention_reference_is_attention_over_decoded_tokens(case, draft):
    new, cache, opts = case
    query, key, value = new
    out = cached_attention_reference(*new, *cache.view(draft), *cache.state(), *opts.args())
    parts = dict(zip(cache.parts, cache.view(draft), strict=True))
    for b, (quantized, length) in enumerate(zip(cache.quantized_len.tolist(), cache.length.tolist(), strict=True)):
        dense = []
        for prefix, decode, fresh in (("k", decode_keys, key), ("v", decode_values, value)):
            upper, lower, scale, zero = (parts[f"{prefix}_{name}"] for name in ("upper", "lower", "scale", "zero"))
            planes = [None if t is None else t[b, :, : quantized // GROUP] for t in (upper, lower, scale, zero)]
            decoded = decode(*planes, torch.float64).flatten(1, 2)
            dense.append(torch.cat((decoded, parts[f"{prefix}_recent"][b, :, : length - quantized], fresh[b]), 1))
        expected = plain_attention(query[b], *dense, length, opts)
        torch.testing.assert_close(out[b], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draft", [False, True])
def test_cached_attention_in_model_precision(dtype, draft):
    # Folding the scales must not cancel: the bound is that of the dtype, not of the sums inside.
    cache = random_cache([(3 * GROUP, GROUP + 5), (0, 7)], 2, (64, 64), 1, seed=5)
    query, key, value = (randn(2, h, 3, 64, seed=s, dtype=dtype) for s, h in enumerate((6, 2, 2)))
    parts = [None if p is None else p.to(dtype) if p.dtype == torch.float64 else p for p in cache.view(draft)]
    wide = [None if p is None else p.double() if p.dtype == dtype else p for p in parts]
    opts = Options(0.3, 0, 0.0, None)
    out = cached_attention(query, key, value, *parts, *cache.state(), *opts.args())
    exact = (t.double() for t in (query, key, value))
    expected = cached_attention_reference(*exact, *wide, *cache.state(), *opts.args())
    assert out.dtype == dtype
    # Values are a few units large; scores are exact to 1e-6 relative, the output is rounded once.
    tolerance = 2e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


# --- prefill ---------------------------------------------------------------------------------------------------------


def empty_cache(batch: int, kv_heads: int, dims: tuple[int, int], num_groups: int) -> Cached:
    """Room for ``num_groups`` groups, nothing stored."""
    return random_cache([(0, 0)] * batch, kv_heads, dims, num_groups, seed=0)


def prefill(cache: Cached, new: tuple[Tensor, Tensor, Tensor], num_new: list[int], opts: Options) -> Tensor:
    """Run the op on the cache in place and advance its lengths."""
    counts = torch.tensor(num_new)
    out = kernels.prefill_attention(*new, *cache.parts.values(), *cache.state(), counts, *opts.args())
    cache.length = cache.length + counts
    excess = num_flushed_groups(cache.length - cache.quantized_len, GROUP)
    cache.quantized_len = cache.quantized_len + excess * GROUP
    return out


def check_stored(cache: Cached, key: Tensor, value: Tensor) -> None:
    """Every sequence's tokens (rows of ``key``, ``value``) sit in the planes and the recent buffer, bit for bit."""
    for b, (quantized, length) in enumerate(zip(cache.quantized_len.tolist(), cache.length.tolist(), strict=True)):
        assert quantized % GROUP == 0
        assert length - quantized < 2 * GROUP
        assert quantized == 0 or length - quantized >= GROUP
        for prefix, encode, dense in (("k", encode_keys, key), ("v", encode_values, value)):
            coded = encode(dense[b, :, :quantized].unflatten(1, (-1, GROUP)))
            for name, expected in zip(("upper", "lower", "scale", "zero"), coded, strict=True):
                assert torch.equal(cache.parts[f"{prefix}_{name}"][b, :, : quantized // GROUP], expected)
            recent = cache.parts[f"{prefix}_recent"][b, :, : length - quantized]
            assert torch.equal(recent, dense[b, :, quantized:length])


@st.composite
def prefill_case(draw) -> tuple:
    """Right-padded prompts of drawn lengths around the boundaries, and options."""
    dims = draw(st.sampled_from(HEAD_DIMS))
    kv_heads, repeat = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    boundary = st.sampled_from([1, GROUP - 1, GROUP, 2 * GROUP - 1, 2 * GROUP, 3 * GROUP - 1, 3 * GROUP + 4])
    num_new, seed = draw(st.lists(boundary, min_size=1, max_size=3)), draw(seeds)
    heads, tokens = (kv_heads * repeat, kv_heads, kv_heads), max(num_new)
    sizes = (dims[0], *dims)
    new = tuple(
        randn(len(num_new), h, tokens, d, seed=seed + i) for i, (h, d) in enumerate(zip(heads, sizes, strict=True))
    )
    return new, num_new, draw(options(heads[0]))


@given(case=prefill_case())
@quick
def test_prefill_attends_in_full_precision_and_stores_every_token(case):
    (query, key, value), num_new, opts = case
    cache = empty_cache(len(num_new), key.shape[1], (key.shape[3], value.shape[3]), 3)
    out = prefill(cache, (query, key, value), num_new, opts)
    for b, count in enumerate(num_new):
        expected = plain_attention(query[b, :, :count], key[b, :, :count], value[b, :, :count], 0, opts)
        torch.testing.assert_close(out[b, :count], expected, rtol=1e-9, atol=1e-9)
        assert not out[b, count:].any()
    check_stored(cache, key, value)


@pytest.mark.parametrize("chunks", [(5, 9), (GROUP, GROUP), (2 * GROUP, 1), (3 * GROUP + 2, 7, 2 * GROUP)])
@pytest.mark.parametrize("window", [0, GROUP + 3, -GROUP - 3])
def test_prefill_in_chunks_reads_the_planes_at_eight_bits(chunks, window):
    opts = Options(0.3, window, 0.0, None)
    tokens = sum(chunks)
    query, key, value = (randn(1, h, tokens, 24, seed=s) for s, h in enumerate((4, 2, 2)))
    cache = empty_cache(1, 2, (24, 24), 5)
    start = 0
    for count in chunks:
        dense_k, dense_v = key[0].clone(), value[0].clone()
        quantized = int(cache.quantized_len)
        for dense, encode, decode in ((dense_k, encode_keys, decode_keys), (dense_v, encode_values, decode_values)):
            coded = encode(dense[:, :quantized].unflatten(1, (-1, GROUP)))
            dense[:, :quantized] = decode(*coded, torch.float64).flatten(1, 2)
        chunk = tuple(t[:, :, start : start + count] for t in (query, key, value))
        out = prefill(cache, chunk, [count], opts)
        expected = plain_attention(chunk[0][0], dense_k, dense_v, start, opts)
        torch.testing.assert_close(out[0], expected, rtol=1e-9, atol=1e-9)
        start += count
        # The planes are those of the original tokens: nothing is ever quantized twice.
        check_stored(cache, key, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_prefill_reads_the_planes_as_precisely_as_they_are(dtype):
    """A half-precision model's later chunks see the INT8 read, not a rounding of it at every step of decoding."""
    tokens, opts = 4 * GROUP, Options(1.0, 0, 0.0, None)
    query, key, value = (randn(1, h, tokens, 24, seed=s, dtype=dtype) for s, h in enumerate((4, 2, 2)))
    # Zeros of the code far from 0 are what low precision loses codes against.
    key += 8
    cache = empty_cache(1, 2, (24, 24), 5)
    for name in ("k_recent", "v_recent"):
        cache.parts[name] = cache.parts[name].to(dtype)
    planes = 3 * GROUP
    prefill(cache, tuple(x[:, :, :planes] for x in (query, key, value)), [planes], opts)
    dense = [x[0].double() for x in (key, value)]
    quantized = int(cache.quantized_len)
    for x, encode, decode in zip(dense, (encode_keys, encode_values), (decode_keys, decode_values), strict=True):
        coded = encode(x[:, :quantized].unflatten(1, (-1, GROUP)))
        x[:, :quantized] = decode(*coded, torch.float64).flatten(1, 2)
    out = prefill(cache, tuple(x[:, :, planes:] for x in (query, key, value)), [GROUP], opts)
    expected = plain_attention(query[0, :, planes:], *dense, planes, opts)
    error = (out[0].double() - expected).norm() / expected.norm()
    assert float(error) < torch.finfo(dtype).eps


# --- flush -----------------------------------------------------------------------------------------------------------


def test_flush_moves_one_group_of_the_sequences_that_hold_two():
    lengths = [(GROUP, 2 * GROUP - 1), (GROUP, 2 * GROUP), (0, 2 * GROUP + 5), (0, 0), (2 * GROUP, GROUP)]
    due = [False, True, True, False, False]
    cache = random_cache(lengths, 2, (24, 16), 2, seed=1)
    before = {name: part.clone() for name, part in cache.parts.items()}
    kernels.flush(*cache.parts.values(), *cache.state())
    for b, ((quantized, stored), moves) in enumerate(zip(lengths, due, strict=True)):
        for prefix, encode in (("k", encode_keys), ("v", encode_values)):
            expected = {name: part[b].clone() for name, part in before.items() if name.startswith(prefix)}
            if moves:
                recent = before[f"{prefix}_recent"][b]
                for name, coded in zip(("upper", "lower", "scale", "zero"), encode(recent[:, :GROUP]), strict=True):
                    expected[f"{prefix}_{name}"][:, quantized // GROUP] = coded
                left = stored - GROUP
                kept = cache.parts[f"{prefix}_recent"][b, :, :left]
                assert torch.equal(kept, recent[:, GROUP : GROUP + left])
                del expected[f"{prefix}_recent"]
            for name, tensor in expected.items():
                assert torch.equal(cache.parts[name][b], tensor), name


# --- linears ---------------------------------------------------------------------------------------------------------


def int4_weight(out_features: int, in_features: int, group: int, seed: int, dtype=torch.float64) -> tuple[Tensor, ...]:
    """Random packed codes and parameters, and the dense float64 weight they stand for."""
    qdata = random_bytes(out_features, in_features // 2, seed=seed)
    params = randn(in_features // group, out_features, 2, seed=seed + 1, dtype=dtype)
    dense = torch.empty(out_features, in_features, dtype=torch.float64)
    for k in range(in_features):
        codes = (qdata[:, k // 2] >> (4 * (k % 2))) & 15
        dense[:, k] = (codes.double() - 8) * params[k // group, :, 0].double() + params[k // group, :, 1].double()
    return qdata, params, dense


@given(seed=seeds, rows=st.integers(1, 5), out_features=st.integers(1, 20), parts=st.integers(1, 3), bias=st.booleans())
@quick
def test_int4_linear_multiplies_the_dequantized_weight(seed, rows, out_features, parts, bias):
    qdata, params, dense = int4_weight(out_features, 32 * parts, 32, seed)
    assert torch.equal(pack_int4(unpack_int4(qdata)), qdata)
    torch.testing.assert_close(dequantize_int4(qdata, params, torch.float64), dense, rtol=0, atol=1e-12)
    x = randn(2, rows, 32 * parts, seed=seed + 2)
    b = randn(out_features, seed=seed + 3) if bias else None
    expected = x @ dense.T + (0 if b is None else b)
    torch.testing.assert_close(kernels.int4_linear(x, qdata, params, b), expected, rtol=1e-10, atol=1e-10)


@given(seed=seeds, rows=st.integers(0, 9), bias=st.booleans(), transposed=st.booleans())
@quick
def test_expert_linear_applies_each_rows_own_expert(seed, rows, bias, transposed):
    experts, out_features, in_features = 3, 5, 32
    x = randn(rows, in_features, seed=seed)
    ids = torch.randint(0, experts, (rows,), generator=torch.Generator().manual_seed(seed))
    weight = randn(experts, out_features, in_features, seed=seed + 1)
    b = randn(experts, out_features, seed=seed + 2) if bias else None

    def by_row(matrices: Tensor) -> Tensor:
        out = torch.zeros(rows, out_features, dtype=torch.float64)
        for row, expert in enumerate(ids.tolist()):
            out[row] = matrices[expert] @ x[row] + (0 if b is None else b[expert])
        return out

    stored = weight.transpose(1, 2).contiguous() if transposed else weight
    torch.testing.assert_close(kernels.expert_linear(x, ids, stored, b, transposed), by_row(weight))
    coded = [int4_weight(out_features, in_features, 16, seed + 10 * e) for e in range(experts)]
    qdata, params, dense = (torch.stack(parts) for parts in zip(*coded, strict=True))
    torch.testing.assert_close(kernels.int4_expert_linear(x, ids, qdata, params, b), by_row(dense))


# --- registration ----------------------------------------------------------------------------------------------------


def op_cases() -> dict[str, tuple]:
    """Op and arguments under a name, for what every op must satisfy."""
    cases: dict[str, tuple] = {}
    for dims in ((64, 64), (24, 16)):
        query, key, value = (
            randn(2, h, 3, d, seed=d, dtype=torch.float32) for h, d in zip((4, 2, 2), (dims[0], *dims), strict=True)
        )
        sinks = randn(4, seed=9, dtype=torch.float32)
        cache = random_cache([(GROUP, 2 * GROUP), (0, 5)], 2, dims, 2, seed=7)
        parts = {name: p.float() if p.dtype == torch.float64 else p for name, p in cache.parts.items()}
        target = list(parts.values())
        draft = [None if name in part_names("lower") else part for name, part in parts.items()]
        state, new = cache.state(), (query, key, value)
        num_new = torch.tensor([3, 2])
        # A whole text, too short for a group.
        planes = [None if name in part_names("lower") else part[:, :, :0] for name, part in list(parts.items())[2:]]
        text, none = (key.clone(), value.clone(), *planes), torch.zeros(2, dtype=torch.int64)
        for label, options in (("plain", (0.3, 0, 0.0, None)), ("windowed", (0.3, 5, 2.0, sinks))):
            name = f"{dims[0]}/{dims[1]} {label}"
            cases[f"attention {name}"] = kernels.attention, (*new, 0, *options)
            cases[f"cached_attention target {name}"] = cached_attention, (*new, *target, *state, *options)
            cases[f"cached_attention draft {name}"] = cached_attention, (*new, *draft, *state, *options)
            angles = 6 * torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(8))
            rotation = (angles.cos(), angles.sin(), 16, label == "windowed")
            cases[f"cached_attention rotating {name}"] = cached_attention, (*new, *draft, *state, *options, *rotation)
            scores, chosen = torch.zeros(2, 2, 3), torch.zeros(2, 2, 2, dtype=torch.int32)
            scored = (*new, *target, scores, *state, *options)
            cases[f"scored_attention {name}"] = kernels.scored_attention, scored
            cases[f"scored_attention rotating {name}"] = kernels.scored_attention, (*scored, *rotation)
            upper = [part for part in draft if part is not None]
            sparse = (*new, *upper, chosen, chosen.clone(), *state, *options)
            cases[f"sparse_attention {name}"] = kernels.sparse_attention, sparse
            cases[f"sparse_attention rotating {name}"] = kernels.sparse_attention, (*sparse, *rotation)
            cases[f"teaching_attention {name}"] = kernels.teaching_attention, (*new, *text, none, none, *options)
            cases[f"tuning_attention {name}"] = kernels.tuning_attention, (*new, *text, none, none, *options)
            cases[f"prefill_attention {name}"] = kernels.prefill_attention, (*new, *target, *state, num_new, *options)
        cases[f"flush {dims[0]}/{dims[1]}"] = kernels.flush, (*target, *state)
        groups = target[2].shape[2]
        table = torch.arange(2 * groups, dtype=torch.int32).flip(0).view(2, groups)
        recent, blocks = target[:2], [part.transpose(0, 1).flatten(1, 2).flip(1)[None] for part in target[2:]]
        pool, unrotated = (*recent, *blocks, *state), (0.3, 0, 0.0, None, None, None, 0, False)
        name = f"out of a pool {dims[0]}/{dims[1]}"
        cases[f"cached_attention {name}"] = cached_attention, (*new, *pool, *unrotated, table)
        cases[f"prefill_attention {name}"] = kernels.prefill_attention, (*new, *pool, num_new, *unrotated[:4], table)
        cases[f"flush {name}"] = kernels.flush, (*pool, table)
    qdata, params, _ = int4_weight(6, 64, 32, seed=1, dtype=torch.float32)
    x, ids = randn(5, 64, seed=2, dtype=torch.float32), torch.tensor([0, 1, 1, 0, 1])
    weight, bias = randn(2, 6, 64, seed=3, dtype=torch.float32), randn(2, 6, seed=4, dtype=torch.float32)
    cases["int4_linear"] = kernels.int4_linear, (x[None], qdata, params, None)
    cases["int4_linear bias"] = kernels.int4_linear, (x, qdata, params, bias[0])
    fused = x[None], qdata, params, bias[0], kernels.int4_linear(x[None], qdata, params, None)
    cases["int4_fused_linear"] = kernels.int4_fused_linear, (*fused, "", True, torch.ones(2, *x[None].shape[:-1]), 1e-6)
    cases["int4_fused_linear gated"] = (
        kernels.int4_fused_linear,
        (x, qdata, params, None, None, "silu", False, None, 0.0),
    )
    cases["int4_linear_to_norm"] = kernels.int4_linear_to_norm, (*fused, bias[1])
    matrix = torch.randn(24, x.shape[-1], dtype=x.dtype)
    cases["linears"] = kernels.linears, (x, [matrix, matrix[:8]], [matrix[:, 0], matrix[:8, 0]])
    cases["gated_linears"] = kernels.gated_linears, (x, [matrix, matrix], [matrix[:, 0], matrix[:, 1]], "silu")
    cases["row_linear"] = kernels.row_linear, (x, matrix, matrix[:, 0].clone())
    cases["row_linear of one row"] = kernels.row_linear, (x[:1], matrix, None)
    cases["linears of one weight"] = kernels.linears, (x[None], [matrix], [])
    cases["expert_linear"] = kernels.expert_linear, (x, ids, weight, bias, False)
    cases["expert_linear transposed"] = kernels.expert_linear, (x, ids, weight.transpose(1, 2).contiguous(), None, True)
    stacked = torch.stack((qdata, qdata)), torch.stack((params, params))
    for name, typical in (("top-p", False), ("typical", True)):
        cases[f"cut_off {name}"] = kernels.cut_off, (x[None], bias[:1, :1].sigmoid().expand(1, 5, 1), typical, 1, -1e4)
    numbers, lengths = torch.zeros(3, 2, dtype=torch.int32), torch.tensor([640, 64])
    choice = (torch.rand(3, 10), torch.zeros(3, 4, dtype=torch.int32), numbers, torch.tensor([0, 1, 0]), lengths)
    cases["choose_pages"] = kernels.choose_pages, (*choice, 1 << 14, 2)
    cases["materialize"] = kernels.materialize, (x.t(),)
    cases["called_module"] = kernels.called_module, ([ids, x], 1, 0)
    cases["repeated_layer"] = kernels.repeated_layer, ([ids, x], 1, 0)
    cases["int4_expert_linear"] = kernels.int4_expert_linear, (x, ids, *stacked, bias)
    return cases


OP_CASES = op_cases()


def copied(args: tuple) -> tuple:
    return tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)


def test_every_op_has_a_case():
    checked = {name.split()[0] for name in OP_CASES}
    # Two of a CPU alone, with tests of their own in test_decoded_attention.py and test_sparse_drafts.py.
    of_cpus = {"decoded_attention", "scored_decoded_attention"}
    # Those that need several processes, which test_tensor_parallel.py has.
    of_ranks = {"gather_ranks", "reduce_ranks", "reduce_ranks_to_norm"}
    assert checked == set(kernels.__all__) - {"cached_attention_reference"} - of_cpus - of_ranks


# Dims that are the same and that differ, with and without a window: nightly runs the other two pairs.
SHOWN = [name for name in OP_CASES if not name.endswith(("64/64 plain", "24/16 windowed"))]


@pytest.mark.parametrize("name", only(SHOWN, OP_CASES))
def test_opcheck(name):
    op, args = OP_CASES[name]
    results = torch.library.opcheck(op.overload if isinstance(op, CacheOp) else op, copied(args))
    assert set(results.values()) == {"SUCCESS"}


def test_what_writes_the_cache_has_no_gradient():
    """Else its body would be differentiated, which writes in place."""
    name = next(name for name in OP_CASES if name.startswith("prefill_attention"))
    op, args = OP_CASES[name]
    query, *rest = copied(args)
    scale = torch.ones((), requires_grad=True)
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        (scale * op(query.requires_grad_(), *rest)).sum().backward()
    assert scale.grad is not None
    assert query.grad is None


@pytest.mark.parametrize("name", OP_CASES)
def test_fake_equals_real_in_shape_dtype_and_strides(name):
    op, args = OP_CASES[name]
    real = op(*copied(args))
    mode = FakeTensorMode()
    with mode:
        fake = op(*tree_map_only(Tensor, mode.from_tensor, args))
    if real is None:
        assert fake is None
        return
    several = isinstance(real, tuple)
    for ours, expected in zip(fake, real, strict=True) if several else [(fake, real)]:
        assert (ours.shape, ours.dtype, ours.device) == (expected.shape, expected.dtype, expected.device)
        assert ours.stride() == expected.stride()


@pytest.mark.parametrize("tokens", [1, 2])
def test_fake_strides_where_an_axis_has_one_element(tokens):
    # A transposed result is contiguous too when the moved axis has length 1, but its strides may differ.
    query, key, value = (randn(1, h, tokens, 16, seed=h, dtype=torch.float32) for h in (4, 2, 2))
    out = kernels.attention(query, key, value, 0, 0.3, 0, 0.0, None)
    assert out.is_contiguous()
    # Strides of length-1 axes are free, the rest must be those of the fake's new tensor.
    fresh = torch.empty(out.shape).stride()
    sized = [axis for axis, size in enumerate(out.shape) if size > 1]
    assert [out.stride(axis) for axis in sized] == [fresh[axis] for axis in sized]


def test_ops_are_registered_once_when_python_runs_in_the_checkout():
    """transformers imports what it takes for Hugging Face's ``kernels``: this folder, which must not register again."""
    code = (
        "import sys, torch, quantspec.kernels as kernels, transformers.integrations.hub_kernels\n"
        "assert 'kernels' in sys.modules and 'kernels.flush' not in sys.modules\n"
        "for name in ('flush', 'cached_attention'):\n"
        "    assert getattr(kernels, name).overload is getattr(torch.ops.quantspec, name).default\n"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
