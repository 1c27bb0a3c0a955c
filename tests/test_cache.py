"""The hierarchical cache against a plain dense one: a state machine, and every rollback over every boundary."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quantspec import CacheFullError
from quantspec.cache import HierarchicalCache, LayerCache
from quantspec.capture import CapturedLayer
from quantspec.kernels import cached_attention, decoded_attention, prefill_attention
from quantspec.kernels.cache_layout import CACHE_PARTS, DECODED_PARTS, part_names
from quantspec.kernels.hierarchical import dense_key_value

G = 16
MAX_LEN = 7 * G
# Layers of different widths, grouped queries, keys wider than values, values of more than one scale group.
LAYERS = (
    CapturedLayer("first", 2, 1, 6, 4, window=0, softcap=0.0, has_sinks=False),
    CapturedLayer("second", 4, 2, 4, 130, window=0, softcap=0.0, has_sinks=False),
)
PLANES = ("k_upper", "k_lower", "k_scale", "k_zero", "v_upper", "v_lower", "v_scale", "v_zero")
DECODED = tuple(part.name for part in DECODED_PARTS)


def new_cache(batch: int, gamma: int, dtype: torch.dtype = torch.float32) -> HierarchicalCache:
    return HierarchicalCache(LAYERS, batch, G, gamma, MAX_LEN, dtype, torch.device("cpu"))


class Source:
    """Keys, values and queries that never repeat, so that a misplaced cell shows."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def tokens(self, layer: CapturedLayer, batch: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value ``(B, heads, T, D)``."""
        shapes = (
            (layer.query_heads, layer.key_dim),
            (layer.kv_heads, layer.key_dim),
            (layer.kv_heads, layer.value_dim),
        )
        return tuple(torch.randn(batch, heads, count, dim, generator=self.generator) for heads, dim in shapes)  # type: ignore[return-value]


class DenseCache:
    """What a cache of floats would hold: one ``(K, tokens, D)`` tensor per layer and sequence, keys and values."""

    def __init__(self, batch: int) -> None:
        self.keys = [[torch.empty(layer.kv_heads, 0, layer.key_dim) for _ in range(batch)] for layer in LAYERS]
        self.values = [[torch.empty(layer.kv_heads, 0, layer.value_dim) for _ in range(batch)] for layer in LAYERS]

    def append(self, layer: int, row: int, key: Tensor, value: Tensor) -> None:
        self.keys[layer][row] = torch.cat((self.keys[layer][row], key), 1)
        self.values[layer][row] = torch.cat((self.values[layer][row], value), 1)

    def length(self, row: int) -> int:
        return self.keys[0][row].shape[1]


def plain_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention ``(H, T, D)`` of the last T of S tokens, in float64; returns ``(T, H, Dv)``."""
    repeat = query.shape[0] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(repeat, 0) for x in (keys, values))
    scores = query.double() @ keys.transpose(1, 2) / math.sqrt(query.shape[-1])
    tokens, length = scores.shape[1:]
    future = torch.arange(length) > length - tokens + torch.arange(tokens)[:, None]
    return (scores.masked_fill(future, -math.inf).softmax(-1) @ values).transpose(0, 1)


def assert_holds(cache: HierarchicalCache, dense: DenseCache, four_bits: bool = False) -> None:
    """Every cached token decodes to what was stored: recent ones exactly, others within the code's bound."""
    for index, layer in enumerate(cache.layers):
        for row in range(cache.batch_size):
            quantized, length = int(cache.quantized_len[row]), int(cache.length[row])
            assert length == dense.length(row)
            parts = {name: getattr(layer, name)[row] for name in (*PLANES, "k_recent", "v_recent")}
            if not four_bits:
                exact = dense_key_value(quantized, length, torch.float32, **parts)
                copies = (getattr(layer, name)[row, :, :length] for name in DECODED)
                assert all(map(torch.equal, copies, exact))
            if four_bits:
                parts["k_lower"] = parts["v_lower"] = None
            decoded = dense_key_value(quantized, length, torch.float32, **parts)
            groups = quantized // G
            # Half a step of the code; a step is s (draft) or s/16, and twice that where the lower code clips.
            step = 1 / 2 if four_bits else 1 / 16
            key_scale = parts["k_scale"][:, :groups].float().repeat_interleave(G, 1)
            value_scale = parts["v_scale"][:, :groups].float().flatten(1, 2)
            value_scale = value_scale.repeat_interleave(decoded[1].shape[-1] // value_scale.shape[-1], -1)
            stored = (dense.keys[index][row], dense.values[index][row])
            for got, expected, scale in zip(decoded, stored, (key_scale, value_scale), strict=True):
                assert torch.equal(got[:, quantized:], expected[:, quantized:])
                # Rounding z and s of values up to 5 to float16 moves the ends of a range by a little more.
                bound = step * scale + 0.01
                assert ((got - expected)[:, :quantized].abs() <= bound).all()


class Driver:
    """A cache and its dense twin, moved through the same steps."""

    def __init__(self, batch: int, gamma: int, seed: int) -> None:
        self.gamma = gamma
        self.batch = batch
        self.source = Source(seed)
        self.cache = new_cache(batch, gamma)
        self.dense = DenseCache(batch)

    def options(self, layer: CapturedLayer) -> tuple:
        return (layer.key_dim**-0.5, 0, 0.0, None)

    def prefill(self, counts: list[int]) -> None:
        """Append right-padded tokens."""
        new = torch.tensor(counts)
        self.cache.reserve(max(int(n) + c for n, c in zip(self.cache.length, counts, strict=True)))
        for index, layer in enumerate(LAYERS):
            query, key, value = self.source.tokens(layer, self.batch, max(counts))
            state = (self.cache.quantized_len, self.cache.length, new)
            parts = self.cache.layers[index].parts()
            out = prefill_attention(query, key, value, *parts, *state, *self.options(layer))
            for row, count in enumerate(counts):
                self.dense.append(index, row, key[row, :, :count], value[row, :, :count])
                self.check_output(out[row, :count], query[row, :, :count], index, row)
        self.cache.advance_prefill(new)

    def draft(self, steps: int) -> None:
        """Write ``steps`` draft tokens, whose keys and values nobody must read after verification."""
        for step in range(steps):
            for index, layer in enumerate(LAYERS):
                query, key, value = self.source.tokens(layer, self.batch, 1)
                cached = self.cache.layers[index]
                parts = [None if name in part_names("lower") else getattr(cached, name) for name in PLANES]
                state = (self.cache.quantized_len, self.cache.length + step)
                out = cached_attention(
                    query, 50 * key, 50 * value, cached.k_recent, cached.v_recent, *parts, *state, *self.options(layer)
                )
                assert torch.isfinite(out).all()

    def verify_and_accept(self, accepted: list[int]) -> bool:
        """Verify ``gamma + 1`` tokens and keep the first ``accepted[b]`` of each row."""
        tokens = self.gamma + 1
        self.cache.reserve(min(MAX_LEN, int(self.cache.length.max()) + tokens))
        for index, layer in enumerate(LAYERS):
            query, key, value = self.source.tokens(layer, self.batch, tokens)
            state = (self.cache.quantized_len, self.cache.length)
            parts = self.cache.layers[index].parts()
            out = cached_attention(query, key, value, *parts, *state, *self.options(layer))
            layer_cache = self.cache.layers[index]
            copies = [getattr(layer_cache, name) for name in (*part_names("recent"), *DECODED)]
            by_copy = decoded_attention(query, key, value, *copies, *state, *self.options(layer))
            torch.testing.assert_close(by_copy, out, rtol=1e-4, atol=1e-4)
            for row, count in enumerate(accepted):
                before = (self.dense.keys[index][row], self.dense.values[index][row])
                self.dense.append(index, row, key[row], value[row])
                self.check_output(out[row], query[row], index, row)
                self.dense.keys[index][row], self.dense.values[index][row] = before
                self.dense.append(index, row, key[row, :, :count], value[row, :, :count])
        return self.cache.accept(torch.tensor(accepted))

    def check_output(self, out: Tensor, query: Tensor, index: int, row: int) -> None:
        """Attention over the cache is attention over the dense one, within what INT8 moves it."""
        expected = plain_attention(query, self.dense.keys[index][row], self.dense.values[index][row])
        torch.testing.assert_close(out.double(), expected, atol=0.06, rtol=0)

    def check(self) -> None:
        """The invariants of the cache's state."""
        recent = self.cache.length - self.cache.quantized_len
        assert (self.cache.quantized_len % G == 0).all()
        assert (recent >= 0).all()
        assert (recent < 2 * G).all()
        # At least G recent tokens stay in full precision once anything is quantized.
        assert ((recent >= G) | (self.cache.quantized_len == 0)).all()
        assert int(self.cache.length.max()) <= self.cache.capacity or int(self.cache.length.max()) < 2 * G
        assert self.cache.layers[0].k_recent.shape[2] == 2 * G + self.gamma + 1
        assert_holds(self.cache, self.dense)
        assert_holds(self.cache, self.dense, four_bits=True)


def snapshot(cache: HierarchicalCache) -> list[list[list[Tensor]]]:
    """The quantized groups, by layer, plane and row."""
    return [
        [
            [part[row, :, : int(cache.quantized_len[row]) // G].clone() for row in range(cache.batch_size)]
            for part in (getattr(layer, name) for name in PLANES)
        ]
        for layer in cache.layers
    ]


def assert_kept(cache: HierarchicalCache, before: list[list[list[Tensor]]]) -> None:
    """The groups of an earlier :func:`snapshot` are bit-identical still."""
    for layer, planes in zip(cache.layers, before, strict=True):
        for name, rows in zip(PLANES, planes, strict=True):
            for row, groups in enumerate(rows):
                assert torch.equal(getattr(layer, name)[row, :, : groups.shape[1]], groups)


class CacheMachine(RuleBasedStateMachine):
    """Prefills, drafts, verifications with any acceptance, resets and growth, in any order."""

    @initialize(batch=st.integers(1, 3), gamma=st.integers(0, 6), seed=st.integers(0, 2**16))
    def start(self, batch, gamma, seed):
        self.driver = Driver(batch, gamma, seed)
        self.quantized = snapshot(self.driver.cache)

    def room(self) -> int:
        return MAX_LEN - int(self.driver.cache.length.max())

    @precondition(lambda self: self.room() > 0)
    @rule(data=st.data())
    def prefill(self, data):
        counts = [data.draw(st.integers(1, min(self.room(), 3 * G))) for _ in range(self.driver.batch)]
        note(f"prefill {counts} at {self.driver.cache.length.tolist()}")
        self.driver.prefill(counts)

    @precondition(lambda self: int(self.driver.cache.length.min()) > 0 and self.room() > self.driver.gamma)
    @rule(data=st.data())
    def cycle(self, data):
        gamma = self.driver.gamma
        steps = data.draw(st.integers(0, gamma))
        accepted = [data.draw(st.integers(0, gamma + 1)) for _ in range(self.driver.batch)]
        note(f"draft {steps}, accept {accepted} at {self.driver.cache.length.tolist()}")
        due = [
            length + count - quantized >= 2 * G
            for length, count, quantized in zip(
                self.driver.cache.length.tolist(), accepted, self.driver.cache.quantized_len.tolist(), strict=True
            )
        ]
        self.driver.draft(steps)
        assert self.driver.verify_and_accept(accepted) == any(due)

    @precondition(lambda self: int(self.driver.cache.length.min()) > 0 and self.room() > self.driver.gamma)
    @rule()
    def abandoned_draft(self):
        """A draft that is never verified, as after an interruption."""
        self.driver.draft(self.driver.gamma)

    @rule()
    def reset(self):
        capacity = self.driver.cache.capacity
        self.driver.cache.reset()
        self.driver.dense = DenseCache(self.driver.batch)
        self.quantized = snapshot(self.driver.cache)
        assert self.driver.cache.capacity == capacity

    @rule(tokens=st.integers(1, MAX_LEN))
    def reserve(self, tokens):
        before = self.driver.cache.capacity
        self.driver.cache.reserve(tokens)
        assert self.driver.cache.capacity >= max(tokens, before)

    @rule(excess=st.integers(1, 1000))
    def reserve_too_much(self, excess):
        cache = self.driver.cache
        before = [part.data_ptr() for layer in cache.layers for part in layer.parts()]
        with pytest.raises(CacheFullError, match=f"max_cache_len={MAX_LEN}"):
            cache.reserve(MAX_LEN + excess)
        assert [part.data_ptr() for layer in cache.layers for part in layer.parts()] == before

    @invariant()
    def holds(self):
        if hasattr(self, "driver"):
            self.driver.check()
            # A group is quantized once: later steps leave it as it is.
            assert_kept(self.driver.cache, self.quantized)
            self.quantized = snapshot(self.driver.cache)


TestCacheMachine = CacheMachine.TestCase

BOUNDARIES = [*range(1, 4), *range(G - 5, G + 2), *range(2 * G - 6, 2 * G + 2), *range(3 * G - 6, 3 * G + 2)]


@pytest.mark.parametrize("length", BOUNDARIES)
def test_every_rollback_over_every_boundary(length):
    """From each length near a group's edge, keep 0..gamma + 1 of a block, twice: 25 pairs, one per row."""
    gamma = 3
    counts = range(gamma + 2)
    pairs = [(first, second) for first in counts for second in counts]
    driver = Driver(len(pairs), gamma, seed=length)
    driver.prefill([length] * len(pairs))
    for turn in range(2):
        driver.draft(gamma)
        before = snapshot(driver.cache)
        driver.verify_and_accept([pair[turn] for pair in pairs])
        driver.check()
        assert_kept(driver.cache, before)
    assert driver.cache.length.tolist() == [length + first + second for first, second in pairs]


def test_flush_waits_for_verified_tokens():
    """A buffer filled beyond 2G by drafts alone is not flushed."""
    driver = Driver(1, 6, seed=0)
    driver.prefill([2 * G - 1])
    driver.draft(6)
    assert not driver.verify_and_accept([0])
    assert driver.cache.quantized_len.tolist() == [0]
    assert driver.verify_and_accept([1])
    assert driver.cache.quantized_len.tolist() == [G]


@pytest.mark.parametrize("length", [1, G, 2 * G - 1, 2 * G, 3 * G - 1, 3 * G, 5 * G + 3])
def test_prefill_keeps_the_last_tokens_in_full_precision(length):
    """Nothing below 2G is quantized; above, G..2G-1 stay recent."""
    driver = Driver(1, 2, seed=1)
    driver.prefill([length])
    assert int(driver.cache.quantized_len) == (0 if length < 2 * G else (length // G - 1) * G)


def test_continued_prefill_holds_what_one_prefill_would():
    """The same tokens in one piece or in several end at the same state."""
    driver = Driver(2, 2, seed=2)
    for counts in ([5, 40], [30, 1], [17, 3]):
        driver.prefill(counts)
        driver.check()
    assert driver.cache.quantized_len.tolist() == [2 * G, G]


def test_bytes_by_part():
    """Bytes are those the documented shapes have."""
    batch, gamma, groups = 3, 4, 4
    cache = new_cache(batch, gamma, torch.bfloat16)
    cache.reserve((groups + 1) * G)
    widths = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in LAYERS]
    plane = sum(batch * heads * groups * G // 2 * (key + value) for heads, key, value in widths)
    # A scale and a zero per channel of a key group, and per token and at most 128 channels of values.
    scales = sum(2 * 2 * batch * heads * groups * (key + G * -(-value // 128)) for heads, key, value in widths)
    recent = sum(2 * batch * heads * (2 * G + gamma + 1) * (key + value) for heads, key, value in widths)
    slots = groups * G + 2 * G + gamma + 1
    decoded = sum(2 * batch * heads * slots * (key + value) for heads, key, value in widths)
    expected = {"upper": plane, "lower": plane, "scales": scales, "recent": recent, "decoded": decoded}
    assert cache.bytes_by_part() == expected


def test_growing_keeps_contents():
    driver = Driver(2, 3, seed=3)
    driver.prefill([3 * G, G])
    before = snapshot(driver.cache)
    driver.cache.reserve(MAX_LEN)
    assert driver.cache.capacity == MAX_LEN
    assert_kept(driver.cache, before)
    driver.check()


@pytest.mark.parametrize("groups", [0, 3])
def test_cuda_stores_the_tokens_of_a_value_channel_adjacently(groups: int) -> None:
    """Shapes and all other parts are as on a CPU; without groups, strides still tell how to grow."""
    for layer in LAYERS:
        sizes = (2, groups, G, 2 * G + 4, torch.float32)
        with FakeTensorMode():
            cuda, plain = (LayerCache.allocate(layer, *sizes, torch.device(kind)) for kind in ("cuda", "cpu"))
        for name in (part.name for part in CACHE_PARTS):
            part = getattr(cuda, name)
            assert part.shape == getattr(plain, name).shape
            assert part.stride(-2 if name in ("v_upper", "v_lower") else -1) == 1


def test_growing_keeps_transposed_values():
    driver = Driver(2, 3, seed=6)
    driver.cache.reserve(4 * G)
    for layer in driver.cache.layers:
        for name in ("v_upper", "v_lower"):
            setattr(layer, name, getattr(layer, name).transpose(-1, -2).contiguous().transpose(-1, -2))
    driver.prefill([3 * G, G])
    before = snapshot(driver.cache)
    driver.cache.reserve(MAX_LEN)
    assert_kept(driver.cache, before)
    driver.check()
    assert all(layer.v_upper.stride(-2) == layer.v_lower.stride(-2) == 1 for layer in driver.cache.layers)


def test_growth_interrupted_between_layers_is_made_up_for(monkeypatch):
    """Running out of memory half-way through growing must not leave the other layers small for good."""
    driver = Driver(1, 2, seed=4)
    driver.prefill([G])
    second = driver.cache.layers[1]
    monkeypatch.setattr(second, "grown", lambda groups: (_ for _ in ()).throw(MemoryError), raising=True)
    with pytest.raises(MemoryError):
        driver.cache.reserve(5 * G)
    monkeypatch.undo()
    assert driver.cache.capacity < 5 * G
    driver.prefill([4 * G])
    driver.check()


def test_reset_forgets_and_keeps_storage():
    driver = Driver(2, 2, seed=5)
    driver.prefill([3 * G, 5])
    addresses = [part.data_ptr() for layer in driver.cache.layers for part in layer.parts()]
    driver.cache.reset()
    driver.dense = DenseCache(2)
    assert driver.cache.length.tolist() == driver.cache.quantized_len.tolist() == [0, 0]
    # What is left in the storage must not show.
    driver.prefill([4, 2 * G + 1])
    driver.check()
    assert [part.data_ptr() for layer in driver.cache.layers for part in layer.parts()] == addresses
