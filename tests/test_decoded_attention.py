"""On a CPU target and draft read a decoded copy of the planes: the same tokens, the same attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from step_by_step import random_prompt
from test_ops import GROUP, Cached, Options, cached_case, randn, random_cache

import quantspec
from quantspec import QuantSpecConfig
from quantspec.checkpoint.folder import Description
from quantspec.kernels import cached_attention_reference, decoded_attention
from quantspec.kernels.cache_layout import CACHE_PARTS, parts_on
from quantspec.kernels.hierarchical import dense_key_value
from quantspec.pair.recipes import recipes_for
from quantspec.passes import ACCESSES, DECODED_ACCESS, Role
from quantspec.passes.graph import find_calls

ops = torch.ops.quantspec


def decoded_copy(cache: Cached, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """The copy of every cached token, and garbage behind them."""
    batch, kv_heads, slots, _ = cache.parts["k_recent"].shape
    size = GROUP * cache.parts["k_upper"].shape[2] + slots
    dims = (cache.parts[name].shape[-1] for name in ("k_recent", "v_recent"))
    copies = [torch.full((batch, kv_heads, size, dim), 1e4, dtype=dtype) for dim in dims]
    for b, (quantized, length) in enumerate(zip(cache.quantized_len.tolist(), cache.length.tolist(), strict=True)):
        parts = {name: part[b] for name, part in cache.parts.items()}
        for copy, dense in zip(copies, dense_key_value(quantized, length, dtype, **parts), strict=True):
            copy[b, :, :length] = dense
    return copies


@given(case=cached_case())
@settings(max_examples=80, deadline=None)
def test_it_is_attention_over_the_planes(case):
    """Whatever the lengths, windows, soft caps and sinks; new tokens go into the recent buffer and the copy."""
    new, cache, opts = case
    recent, copies, theirs = cache.view(False)[:2], decoded_copy(cache), cache.view(False)
    out = decoded_attention(*new, *recent, *copies, *cache.state(), *opts.args())
    expected = cached_attention_reference(*new, *theirs, *cache.state(), *opts.args())
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert all(map(torch.equal, recent, theirs[:2]))
    for b, length in enumerate(cache.length.tolist()):
        for copy, fresh in zip(copies, new[1:], strict=True):
            assert torch.equal(copy[b, :, length : length + fresh.shape[2]], fresh[b])
            assert (copy[b, :, length + fresh.shape[2] :] == 1e4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("lengths", [[(3 * GROUP, GROUP + 5)] * 2, [(3 * GROUP, GROUP + 5), (0, 7)]])
def test_in_model_precision(dtype, tokens, lengths):
    """The copy is rounded to the model's dtype, and so is the output."""
    cache = random_cache(lengths, 2, (64, 64), 1, seed=5)
    new = [randn(2, h, tokens, 64, seed=s, dtype=dtype) for s, h in enumerate((6, 2, 2))]
    recent = [part.to(dtype) for part in cache.view(False)[:2]]
    options = Options(0.05, 0, 0.0, None).args()
    out = decoded_attention(*new, *recent, *decoded_copy(cache, dtype), *cache.state(), *options)
    exact = cached_attention_reference(*(x.double() for x in new), *cache.view(False), *cache.state(), *options)
    assert out.dtype == dtype
    error = (out.double() - exact).norm() / exact.norm()
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("tokens", [1, 3])
def test_queries_of_more_precision_than_the_cache(tokens):
    """As the op that reads the planes takes them, and the output is in the query's dtype."""
    cache = random_cache([(GROUP, GROUP + 5)], 2, (64, 64), 1, seed=5)
    new = [randn(1, h, tokens, 64, seed=s, dtype=torch.float32) for s, h in enumerate((6, 2, 2))]
    recent = [part.to(torch.bfloat16) for part in cache.view(False)[:2]]
    options = Options(0.05, 0, 0.0, None).args()
    out = decoded_attention(*new, *recent, *decoded_copy(cache, torch.bfloat16), *cache.state(), *options)
    exact = cached_attention_reference(*(x.double() for x in new), *cache.view(False), *cache.state(), *options)
    assert out.dtype == torch.float32
    assert (out - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("sinks", [False, True])
def test_the_op_is_registered_as_it_should_be(sinks):
    cache = random_cache([(GROUP, 2 * GROUP), (0, 5)], 2, (24, 16), 2, seed=7)
    new = [randn(2, h, 3, d, seed=d, dtype=torch.float32) for h, d in ((4, 24), (2, 24), (2, 16))]
    recent = [part.float() for part in cache.view(False)[:2]]
    options = (0.3, 5, 0.0, randn(4, seed=9, dtype=torch.float32) if sinks else None)
    arguments = (*new, *recent, *decoded_copy(cache, torch.float32), *cache.state(), *options)
    torch.library.opcheck(decoded_attention.overload, arguments)


def test_only_a_cpu_has_the_copy():
    extra = {part.name for part in parts_on("cpu")} - {part.name for part in CACHE_PARTS}
    assert extra == set(DECODED_ACCESS.parts) - {"k_recent", "v_recent"}
    assert parts_on("cuda") == CACHE_PARTS


@pytest.mark.parametrize("role", [Role.TARGET, Role.DRAFT])
def test_a_cpu_reads_the_copy_in_every_layer(qs, role):
    graph = qs.pair.graphs[role].graph
    assert len(list(find_calls(graph, ops.decoded_attention.default))) == len(qs.layers)
    assert not list(find_calls(graph, ops.cached_attention.default))


def draft_logits(qs, quantized: bool = True, spoil: str | None = None) -> torch.Tensor:
    """Of the token after a text, whose cached parts of kind ``spoil`` are garbage; ``quantized``: it has old tokens."""
    ids = torch.tensor([random_prompt(4 * GROUP if quantized else GROUP, 3)])
    cache = qs.pair.new_cache(1, 1)
    cache.reserve(5 * GROUP)
    qs.pair.fill(ids[:, :-1], [ids.shape[1] - 1], cache)
    for layer in cache.layers:
        for part in parts_on("cpu"):
            if part.kind == spoil:
                getattr(layer, part.name).fill_(3)
    return qs.pair.read(Role.DRAFT, ids[:, -1:], cache)


def test_one_recipe_s_drafts_read_4_bits_on_a_cpu_too(qs, tmp_path):
    """A pair saved with the usual draft takes the other one; they differ by what they read of old tokens alone."""
    qs.save_pretrained(tmp_path)
    at_4_bits = quantspec.from_pretrained(tmp_path, draft_recipe="int4-cache", self_check=False)
    for quantized in (True, False):
        ours, theirs = (draft_logits(pair, quantized) for pair in (qs, at_4_bits))
        assert torch.allclose(ours, theirs) == (not quantized)
    for pair, ignored, read in ((qs, "upper", "decoded"), (at_4_bits, "decoded", "upper")):
        logits = draft_logits(pair)
        assert torch.equal(draft_logits(pair, spoil=ignored), logits)
        assert torch.equal(draft_logits(pair, spoil="lower"), logits)
        assert not torch.equal(draft_logits(pair, spoil=read), logits)


def test_the_command_line_takes_a_recipe_and_knows_what_there_is(run, saved_model, tmp_path, monkeypatch):
    assert run("convert", saved_model, tmp_path / "pair", "--draft-recipe", "int4-cache", "--no-self-check")[0] == 0
    assert Description.read(tmp_path / "pair").options.draft_recipe == "int4-cache"
    # Refused before the weights are read.
    monkeypatch.setattr("quantspec.cli.loading.load_model", None)
    for model in (saved_model, tmp_path / "pair"):
        status, _, err = run("parity", model, "--draft-recipe", "other", "--device", "cpu")
        assert status == 2
        assert "draft_recipe must be one of 'int4', 'int4-cache'" in err


@pytest.mark.parametrize("name", ["int4", "int4-cache"])
def test_a_gpu_s_drafts_read_4_bits(name):
    assert recipes_for(QuantSpecConfig(draft_recipe=name), "cuda")[Role.DRAFT].access == ACCESSES[Role.DRAFT]


def test_the_copy_follows_the_cache_through_a_call(qs):
    """After cycles, flushes and a rewound text the copy holds what the planes and the recent buffer do."""
    qs.reset()
    torch.manual_seed(0)
    prompt = torch.randint(3, 96, (2, 3 * GROUP + 3))
    options = {"do_sample": False, "eos_token_id": None, "num_speculative_tokens": 3}
    text = qs.generate(prompt, max_new_tokens=3 * GROUP, **options)
    qs.generate(text[:, : 2 * GROUP + 1], max_new_tokens=GROUP, continue_cache=True, **options)
    cache = qs.session.cache
    for layer in cache.layers:
        for b, (quantized, length) in enumerate(zip(cache.quantized_len.tolist(), cache.length.tolist(), strict=True)):
            assert quantized
            parts = [getattr(layer, part.name)[b] for part in CACHE_PARTS]
            dense = dense_key_value(quantized, length, torch.float32, *parts[2:], *parts[:2])
            for copy, expected in zip((layer.k_decoded, layer.v_decoded), dense, strict=True):
                assert torch.equal(copy[b, :, :length], expected)
