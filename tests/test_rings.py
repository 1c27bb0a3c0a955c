"""Layers with a window or chunks keep the groups that those see, and decode as if they kept all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from repeats import only
from test_block_tables import copied
from test_kernels_triton import (
    DEVICE,
    TOLERANCE,
    Case,
    assert_same_cache,
    cache_arguments,
    random,
    random_cache,
    relative_error,
)
from test_ops import GROUP, randn
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoConfig

import quantspec
from quantspec.cache import HierarchicalCache, hierarchical_cache
from quantspec.capture import CapturedLayer
from quantspec.config import QuantSpecConfig
from quantspec.kernels import cached_attention, decoded_attention, flush, prefill_attention, scored_attention
from quantspec.kernels.attention import first_visible
from quantspec.kernels.cache_layout import CACHE_PARTS
from quantspec.kernels.cached_attention import cached_attention_reference
from quantspec.kernels.cached_attention_triton import cached_attention_triton
from quantspec.kernels.encode import encode_oldest_groups
from quantspec.kernels.pages import PAGE_TOKENS, num_pages
from quantspec.memory import expected_memory, full_precision_bytes
from quantspec.pair.preview import structure_of

# Of models whose texts no near tie decides, which reading at 8 bits may turn.
SEEDS = {"mistral": 3, "gpt_oss": 2, "llama4_text": 1}
WINDOWS = {
    "mistral": {"sliding_window": 40},
    "gpt_oss": {"sliding_window": 32},
    "llama4_text": {"attention_chunk_size": 48},
}


def every_group(layer: CapturedLayer, groups: int, kv_group_size: int) -> int:
    """What a layer without a window has places for."""
    return groups


class Twins:
    """Two caches, one with rings and one with places for every group, moved through the same steps."""

    def __init__(self, window: int, batch: int, gamma: int, monkeypatch: pytest.MonkeyPatch) -> None:
        chunk, window = (-window, 0) if window < 0 else (0, window)
        self.layer = CapturedLayer("", 4, 2, 8, 8, window, 0.0, False, chunk=chunk)
        self.gamma, self.batch, self.seed = gamma, batch, 0
        self.monkeypatch = monkeypatch
        options = (GROUP, gamma, 40 * GROUP, torch.float32, torch.device("cpu"))
        self.ring, self.whole = (HierarchicalCache((self.layer,), batch, *options) for _ in range(2))

    @property
    def caches(self) -> tuple[HierarchicalCache, HierarchicalCache]:
        return self.ring, self.whole

    def reserve(self, num_tokens: int) -> None:
        self.ring.reserve(num_tokens)
        with self.monkeypatch.context() as patched:
            patched.setattr(hierarchical_cache, "layer_groups", every_group)
            self.whole.reserve(num_tokens)

    def new(self, tokens: int) -> list[Tensor]:
        self.seed += 3
        return [
            randn(self.batch, h, tokens, 8, seed=self.seed + n, dtype=torch.float32) for n, h in enumerate((4, 2, 2))
        ]

    def prefill(self, counts: list[int]) -> None:
        self.reserve(int(self.whole.length.max()) + max(counts))
        new, num_new = self.new(max(counts)), torch.tensor(counts)
        self._same(
            [
                prefill_attention(*new, *c.layers[0].parts(), *self._state(c), num_new, *self.options)
                for c in self.caches
            ]
        )
        for cache in self.caches:
            cache.advance_prefill(num_new)

    def cycle(self, accepted: list[int]) -> None:
        """Read drafts at 4 bits and at 8, from the planes and from the copy; keep some, and flush."""
        self.reserve(int(self.whole.length.max()) + self.gamma + 1)
        new = self.new(self.gamma + 1)
        read: dict[str, list[Tensor]] = {"target": [], "draft": [], "copy": []}
        for cache in self.caches:
            layer = cache.layers[0]
            parts, state = layer.parts(), (*self._state(cache), *self.options)
            read["target"].append(cached_attention(*new, *parts, *state))
            draft = [None if part is layer.k_lower or part is layer.v_lower else part for part in parts]
            read["draft"].append(cached_attention(*new, *draft, *state))
            read["copy"].append(decoded_attention(*new, *parts[:2], layer.k_decoded, layer.v_decoded, *state))
            cache.accept(torch.tensor(accepted))
        for outputs in read.values():
            self._same(outputs)

    def rewind(self, num_tokens: list[int]) -> None:
        for cache in self.caches:
            cache.rewind(torch.tensor(num_tokens))

    @property
    def options(self) -> tuple:
        return (0.3, self.layer.window or -self.layer.chunk, 0.0, None)

    def _state(self, cache: HierarchicalCache) -> tuple[Tensor, Tensor]:
        return cache.quantized_len, cache.length

    def _same(self, outputs: list[Tensor]) -> None:
        assert torch.equal(*outputs)
        assert outputs[0].isfinite().all()


WINDOW_SIZES = [1, GROUP, GROUP + 1, GROUP + 2, 3 * GROUP, 3 * GROUP + 1]


@pytest.mark.parametrize("window", [*WINDOW_SIZES, -GROUP, -3 * GROUP - 7])
def test_a_ring_reads_as_planes_of_all_groups(window, monkeypatch):
    """Bit for bit: prompts in chunks, shorter and longer than the ring; cycles; sequences of different lengths."""
    check_reading(window, monkeypatch)


def check_reading(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(window, 2, GROUP - 1, monkeypatch)
    for counts in ([5, 3 * GROUP], [9 * GROUP + 3, GROUP]):
        twins.prefill(counts)
    for accepted in ([1, 16], [16, 9], [0, 16], [15, 16]):
        twins.cycle(accepted)
    twins.prefill([1, 5 * GROUP])
    twins.cycle([4, 0])
    assert twins.whole.layers[0].groups >= int(twins.whole.quantized_len.max()) // GROUP > 10
    assert twins.ring.layers[0].groups <= 2 + abs(window) // GROUP + 1


@pytest.mark.parametrize("window", [1, GROUP + 1, 3 * GROUP, 3 * GROUP + 1, -3 * GROUP - 1])
def test_a_text_goes_back_in_its_ring(window, monkeypatch):
    """By what the recent buffer holds and a group more, or it begins anew; it never reads what is no longer there."""
    check_going_back(window, monkeypatch)


def check_going_back(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(window, 1, 3, monkeypatch)
    twins.prefill([14 * GROUP + 5])
    kept_some = written = 0
    for back in (0, 1, GROUP, GROUP + 5, GROUP + 6, 2 * GROUP + 5, 1, 3 * GROUP, 4 * GROUP, GROUP + 6, GROUP + 6):
        written, length = max(written, int(twins.whole.quantized_len)), int(twins.whole.length)
        for cache in twins.caches:
            cache.rewind(torch.tensor([length - back]))
        if int(twins.ring.length):
            assert int(twins.ring.length) == int(twins.whole.length)
            kept_some += int(twins.ring.quantized_len) < written
        else:
            assert length - back < written - GROUP
            written = 0
            twins.whole.reset()
            twins.prefill([14 * GROUP + 5])
        # What a prefill reads first, and what a cycle does.
        twins.prefill([1])
        twins.cycle([3])
        twins.prefill([GROUP])
    assert kept_some >= 2


@pytest.mark.parametrize(("check", "fewer"), [(check_going_back, 1), (check_reading, 3)])
def test_rings_of_too_few_places_are_found(check, fewer, monkeypatch):
    """One less than there are cannot go back by a group; one less than what a step reads gives other outputs."""
    layer_groups = hierarchical_cache.layer_groups
    monkeypatch.setattr(hierarchical_cache, "layer_groups", lambda *sizes: max(0, layer_groups(*sizes) - fewer))
    with pytest.raises(AssertionError):
        check(3 * GROUP + 1, monkeypatch)


def in_ring(arguments: dict[str, Any], places: int) -> dict[str, Any]:
    """The last groups of each sequence in so many places, as the ops take them; what is nowhere else is NaN."""
    ring = dict(arguments)
    for part in CACHE_PARTS:
        whole = arguments.get(part.name)
        if not part.is_pooled or whole is None:
            continue
        # Strides as the part's, of values adjacent channels or adjacent tokens.
        stored = whole if whole.stride(-1) == 1 else whole.transpose(-1, -2)
        kept = stored.new_full((*stored.shape[:2], places, *stored.shape[3:]), 77)
        if kept.dtype.is_floating_point:
            kept.fill_(float("nan"))
        for row, quantized in enumerate(arguments["quantized_len"].tolist()):
            last = quantized // (2 * arguments["k_upper"].shape[3])
            for group in range(max(0, last - places), last):
                kept[row, :, group % places] = stored[row, :, group]
        ring[part.name] = kept if stored is whole else kept.transpose(-1, -2)
    return ring


def fewest_places(case: Case) -> int:
    """That hold what the first query of each sequence sees of the planes."""
    starts = [first_visible(quantized + recent, case.window) // case.group for quantized, recent in case.lengths]
    return max(
        1, *(quantized // case.group - start for (quantized, _), start in zip(case.lengths, starts, strict=True))
    )


RINGS = {
    "draft": Case(window=90, lengths=((320, 40),)),
    "verification": Case(window=200, lengths=((320, 40), (96, 3)), lower=True, tokens=2, heads=4),
    "chunks": Case(window=-96, lengths=((320, 40), (256, 20)), lower=True, tokens=3),
    "small groups": Case(group=16, window=100, lengths=((208, 20), (272, 31)), lower=True),
    "large groups": Case(group=128, window=200, lengths=((512, 130),), head_dim=128, value_dim=128, sinks=True),
    "two value parts": Case(window=70, head_dim=192, value_dim=144, lengths=((256, 33),), softcap=9.0),
}
each_ring = pytest.mark.parametrize("case", RINGS.values(), ids=RINGS)


@each_ring
def test_kernels_read_a_ring(case):
    """The kernel, the plain op and the reference; with one place less all of them read a group that is gone."""
    torch.manual_seed(0)
    options = {"scale": case.head_dim**-0.5, "window": case.window, "softcap": case.softcap}
    whole, places = cache_arguments(case) | options, fewest_places(case)
    assert places < whole["k_upper"].shape[2]
    exact = cached_attention_reference(**copied(whole))
    ring = in_ring(whole, places)
    assert torch.equal(cached_attention_reference(**copied(ring)), exact)
    if DEVICE.type == "cpu":
        assert torch.equal(cached_attention(**copied(ring)), cached_attention(**copied(whole)))
    assert relative_error(cached_attention_triton(**copied(ring)), exact) < TOLERANCE[case.dtype]
    short = in_ring(whole, places - 1) if places > 1 else None
    if short is not None and all(quantized >= places * case.group for quantized, _ in case.lengths):
        for op in (cached_attention_reference, cached_attention, cached_attention_triton):
            assert relative_error(op(**copied(short)), exact) > 1e-2


@each_ring
def test_pages_of_a_ring_have_their_scores(case):
    """By the number of the page in the text, from the kernel and from the plain op."""
    torch.manual_seed(0)
    options = {"scale": case.head_dim**-0.5, "window": case.window, "softcap": case.softcap}
    whole = cache_arguments(replace(case, lower=True)) | options
    ring, group = in_ring(whole, fewest_places(case)), case.group
    shape = (len(case.lengths), case.kv_heads, num_pages(whole["k_upper"].shape[2], group))
    for op in (scored_attention, cached_attention_triton):
        expected, found = torch.zeros(2, *shape, device=DEVICE)
        op(**copied(whole), page_scores=expected)
        op(**copied(ring), page_scores=found)
        for row, (quantized, _) in enumerate(case.lengths):
            pages = quantized // PAGE_TOKENS
            torch.testing.assert_close(found[row, :, :pages], expected[row, :, :pages], rtol=1e-5, atol=1e-5)
            assert expected[row, :, :pages].isfinite().any()


@pytest.mark.parametrize("places", [2, 3])
def test_kernels_write_a_ring(places):
    """A prompt of more groups than places, and a flush: the last ones are there, as the plain op leaves them."""
    group, state = 16, [(64, 20, 120), (0, 0, 33), (32, 31, 70)]
    cache = random_cache(3, 2, places, 2 * group + 8, 24, 24, group, torch.float32)
    plain = [part.cpu().clone() for part in cache]
    query, key, value = (random(3, 2, 120, 24) for _ in range(3))
    quantized, length, num_new = (torch.tensor(column, device=DEVICE) for column in zip(*state, strict=True))
    length += quantized
    encode_oldest_groups((key, value, num_new), *cache, quantized, length)
    lengths = [x.cpu() for x in (quantized, length, num_new)]
    prefill_attention(query.cpu(), key.cpu(), value.cpu(), *plain, *lengths, 1.0, 8, 0.0, None)
    slots = [recent + new for _, recent, new in state]
    kept = [count - max(0, count // group - 1) * group for count in slots]
    assert_same_cache([part.cpu() for part in cache], plain, [places * group] * 3, kept)
    for part, own in zip(cache[:2], plain[:2], strict=True):
        own.copy_(part)
    quantized, length = torch.tensor([176, 16, 48], device=DEVICE), torch.tensor([208, 49, 79], device=DEVICE)
    encode_oldest_groups(None, *cache, quantized, length)
    flush(*plain, quantized.cpu(), length.cpu())
    assert_same_cache([part.cpu() for part in cache], plain, [places * group] * 3, [16, 17, 31])


def prompts(lengths: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """Left-padded ids and their mask."""
    ids = torch.randint(3, 96, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


@pytest.mark.parametrize("architecture", only(["mistral", "llama4_text"], WINDOWS))
def test_texts_are_hugging_faces_past_several_windows(architecture, monkeypatch):
    """A padded batch whose prompts are read in chunks, γ 0 and 4, and the text that follows an earlier one."""
    model = tiny_model(architecture, **WINDOWS[architecture], seed=SEEDS[architecture])
    qs = quantspec.convert(model, kv_group_size=GROUP, self_check=False)
    monkeypatch.setattr(type(qs.pair), "fill_chunk", lambda *sizes: 3 * GROUP + 1)
    ids, mask = prompts([130, 71], 5)
    options = {"do_sample": False, "max_new_tokens": 120}
    expected = model.generate(ids, attention_mask=mask, **options, eos_token_id=None, pad_token_id=0)
    for gamma in (0, 4):
        text = qs.generate(ids, attention_mask=mask, **options, num_speculative_tokens=gamma, eos_token_id=None)
        assert torch.equal(text, expected)
    rings = [
        layer.groups
        for layer, shape in zip(qs.session.cache.layers, qs.layers, strict=True)
        if shape.window or shape.chunk
    ]
    assert rings
    assert max(rings) <= 4 < 250 // GROUP


def test_a_conversation_goes_back_and_on(monkeypatch):
    """A next prompt that parts from the text within a group of the planes; one that parts earlier begins anew."""
    model = tiny_model("mistral", **WINDOWS["mistral"])
    qs = quantspec.convert(model, kv_group_size=GROUP, self_check=False)
    ids, _ = prompts([150], 7)
    options = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None}
    text = qs.generate(ids, **options)
    quantized = int(qs.session.cache.quantized_len)
    for kept, continued in ((quantized - 5, quantized - GROUP), (quantized - 6 * GROUP, 0)):
        prompt = torch.cat((text[:, :kept], ids[:, :30]), 1)
        found = qs.generate(prompt, **options, continue_cache=True)
        assert qs.last_stats.continued_tokens == continued
        assert torch.equal(found, qs.generate(prompt, **options))
        qs.generate(ids, **options)


SHARING = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 24,
    "head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 96,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [96] * 4,
    "tie_word_embeddings": False,
}


def test_keys_and_values_of_several_layers_are_cached_once(monkeypatch):
    """Gemma 3n's last layers attend to what earlier ones have cached: prompts in chunks, drafts, and the bytes."""
    model = tiny_model("gemma3n_text", **SHARING)
    qs = quantspec.convert(model, kv_group_size=GROUP, self_check=False)
    assert [layer.reads for layer in qs.layers] == [None, None, 0, 1]
    monkeypatch.setattr(type(qs.pair), "fill_chunk", lambda *sizes: 2 * GROUP + 3)
    ids, mask = prompts([75, 40], 5)
    options = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": None, "attention_mask": mask}
    expected = model.generate(ids, **options, pad_token_id=0)
    assert len(set(expected[:, 75:].flatten().tolist())) > 10
    for gamma in (0, 4):
        assert torch.equal(qs.generate(ids, **options, num_speculative_tokens=gamma), expected)
    assert len(qs.session.cache.layers) == 2
    sizes = {"kv_group_size": GROUP, "num_speculative_tokens": 4, "dtype": torch.float32, "device": "cpu"}
    assert qs.last_stats.cache_bytes == expected_memory(qs.layers, 135, 2, **sizes, max_cache_len=512)
    assert expected_memory(qs.layers, 135, **sizes) == expected_memory(qs.layers[:2], 135, **sizes)


@pytest.mark.parametrize("type_", ["gemma4_text", "gemma4_unified_text"])
def test_layers_that_share_keys_where_the_model_slices_its_masks(type_):
    """Gemma 4 takes of each mask what its sharing layers need: all of it."""
    shared = {name: value for name, value in SHARING.items() if name not in ("laurel_rank", "altup_num_inputs")}
    shared |= {"global_head_dim": 16, "num_global_key_value_heads": 2, "intermediate_size": 96}
    del shared["activation_sparsity_pattern"]
    model = tiny_model(type_, **shared)
    qs = quantspec.convert(model, kv_group_size=GROUP, self_check=False)
    assert [layer.reads for layer in qs.layers] == [None, None, 0, 1]
    ids = prompts([20], 5)[0]
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    assert torch.equal(qs.generate(ids, **options), model.generate(ids, **options, pad_token_id=0))


SHAPES = {
    "gpt_oss": {
        "num_hidden_layers": 24,
        "hidden_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
    },
    "gemma3_text": {
        "num_hidden_layers": 62,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "sliding_window": 1024,
    },
}


@pytest.mark.parametrize("architecture", only(["gemma3_text"], SHAPES))
def test_the_cache_takes_less_than_transformers(architecture):
    """At 32k, of gpt-oss-20b's and Gemma 3 27B's shapes, as their configurations tell it."""
    config = AutoConfig.for_model(architecture, **SHAPES[architecture], max_position_embeddings=131072)
    layers = structure_of(config, QuantSpecConfig(), torch.bfloat16).layers
    ours, theirs = sum(expected_memory(layers, 32768).values()), full_precision_bytes(layers, 32768)
    kinds = sorted({layer.window for layer in layers})
    assert kinds == [0, SHAPES[architecture]["sliding_window"]]
    assert ours < 0.6 * theirs, (ours, theirs)
