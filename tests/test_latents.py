"""Layers whose keys and values come from one latent per token cache that latent."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from repeats import only
from test_kernels_triton import DEVICE, TOLERANCE, relative_error
from tiny_models import tiny_model
from torch import Tensor, nn

import quantspec
from quantspec import QuantSpecConfig
from quantspec.cache.geometry import HeldState
from quantspec.capture import CapturedLayer, capture, converting, with_latents
from quantspec.kernels import attention
from quantspec.kernels.cached_attention import cached_attention, cached_attention_reference
from quantspec.kernels.cached_attention_triton import cached_attention_triton
from quantspec.kernels.encode import encode_oldest_groups
from quantspec.kernels.hierarchical import encode_keys, encode_values
from quantspec.memory import expected_memory, full_precision_bytes
from quantspec.pair.preview import structure_of
from quantspec.passes.absorb_latents import AbsorbLatents, values_in_keys
from quantspec.passes.graph import find_calls
from quantspec.passes.remove_no_ops import RemoveNoOps

WIDTH, LATENT, NOPE, ROPE, VALUE, HEADS = 24, 12, 8, 4, 6, 4


class Attends(nn.Module):
    """Attention over heads that are made of latents; what varies are the ways to write that."""

    kv_heads = HEADS
    window = 0

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.q = nn.Linear(WIDTH, HEADS * (NOPE + ROPE))
        self.down = nn.Linear(WIDTH, LATENT + ROPE)
        self.up = nn.Linear(LATENT, self.kv_heads * (NOPE + VALUE), bias=False)
        self.k_up = nn.Linear(LATENT, self.kv_heads * NOPE, bias=False)
        self.v_up = nn.Linear(LATENT, self.kv_heads * VALUE, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        query = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        latent, rope = self.down(x).split((LATENT, ROPE), -1)
        rope = rope * position_ids[..., None].cos()
        key, value = self.expanded(F.layer_norm(latent, (LATENT,)), rope[:, None])
        return attention(query, key, value, 0, 0.3, self.window, 0.0, None)

    def expanded(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, K, T, NOPE + ROPE)`` and ``(B, K, T, VALUE)`` of ``(B, T, LATENT)`` and ``(B, 1, T, ROPE)``."""
        nope, value = self.up(latent).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2).split((NOPE, VALUE), -1)
        return torch.cat((nope, rope.expand(-1, self.kv_heads, -1, -1)), -1), value


class CopiedInPlace(Attends):
    def expanded(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        nope, value = (
            self.up(latent[:, None]).view(*latent.shape[:2], HEADS, -1).transpose(1, 2).split((NOPE, VALUE), -1)
        )
        key = nope.new_empty(*nope.shape[:3], NOPE + ROPE)
        key[..., :NOPE] = nope
        key[..., NOPE:] = rope
        return key, value


class TwoLinears(Attends):
    """And the shared channels stand on both sides."""

    def expanded(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        nope, value = (up(latent).unflatten(-1, (HEADS, -1)).permute(0, 2, 1, 3) for up in (self.k_up, self.v_up))
        first, last = rope.expand(-1, HEADS, -1, -1).chunk(2, -1)
        return torch.cat((first, nope, last), -1), value


class AllKeysFirst(Attends):
    """Rows of all keys stand before those of values."""

    def expanded(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        nope, value = self.up(latent).split((HEADS * NOPE, HEADS * VALUE), -1)
        nope, value = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (nope, value))
        return torch.cat((nope, rope.repeat_interleave(HEADS, 1)), -1), value


class Grouped(Attends):
    kv_heads = 2


class Padded(Attends):
    def expanded(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.up(latent).unflatten(-1, (HEADS, -1)).transpose(1, 2).split((NOPE, VALUE), -1)
        return F.pad(key, (0, ROPE)), value


class WithBias(Attends):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(LATENT, HEADS * (NOPE + VALUE))


class RopeByHead(Attends):
    def expanded(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().expanded(latent, rope)
        return key + torch.arange(HEADS, device=key.device)[:, None, None], value


class ValuesOfAnother(Attends):
    def expanded(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        key, _ = super().expanded(latent, rope)
        return key, self.v_up(latent.flip(-1)).unflatten(-1, (HEADS, -1)).transpose(1, 2)


class RowsMixed(Attends):
    def expanded(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().expanded(latent, rope)
        return key, torch.cat((value[..., 1:], value[..., :1]), -1)


class Changed(Attends):
    """Something else is written into the keys after all."""

    def expanded(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        key, value = CopiedInPlace.expanded(self, latent, rope)
        key[..., 1:3].mul_(2)
        return key, value


class AsWideAsKeys(Attends):
    """As the hidden state is, of a layer whose keys have no RoPE."""

    def __init__(self) -> None:
        super().__init__()
        self.k_up, self.v_up = (nn.Linear(LATENT, LATENT, bias=False) for _ in range(2))

    def expanded(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        made, value = (up(latent).unflatten(-1, (HEADS, -1)).transpose(1, 2) for up in (self.k_up, self.v_up))
        shared = torch.cat((rope, latent[:, None, :, : NOPE - LATENT // HEADS]), -1)
        return torch.cat((made, shared.expand(-1, HEADS, -1, -1)), -1), value


class OneHead(Attends):
    """Whose key and value are smaller than the latent."""

    kv_heads = 1


class Windowed(Attends):
    window = 3


def exported(kind: type[Attends]):
    torch.manual_seed(0)
    module = kind().double()
    inputs = (torch.randint(0, 32, (2, 7)), torch.arange(7).expand(2, 7).clone())
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=(axes, axes), strict=False)
    gm = program.module(check_guards=False)
    RemoveNoOps()(gm)
    return gm


@torch.no_grad()
@pytest.mark.parametrize("kind", [Attends, CopiedInPlace, TwoLinears, AllKeysFirst, Grouped, Windowed])
def test_latents_are_absorbed_however_heads_are_made_of_them(kind):
    gm = exported(kind)
    ids, positions = torch.randint(0, 32, (3, 5)), torch.arange(5).expand(3, 5)
    expected = gm(ids, positions)
    weights = {name: p.data_ptr() for name, p in gm.named_parameters()}
    assert AbsorbLatents()(gm).modified
    torch.testing.assert_close(gm(ids, positions), expected, rtol=1e-12, atol=1e-12)
    (marker,) = find_calls(gm.graph, torch.ops.quantspec.attention.default)
    query, key, value = (node.meta["val"].shape[1::2] for node in marker.args[:3])
    assert (query, key, value) == ((HEADS, LATENT + ROPE), (1, LATENT + ROPE), (1, LATENT))
    assert values_in_keys(marker)
    # Nothing makes the expanded heads any longer, and weights are the model's.
    assert not [node for node in gm.graph.nodes if node.target is torch.ops.aten.copy_.default]
    assert {name: p.data_ptr() for name, p in gm.named_parameters()} == weights
    assert not dict(gm.named_buffers())
    assert not AbsorbLatents()(gm).modified


@pytest.mark.parametrize(
    "kind", [WithBias, RopeByHead, ValuesOfAnother, RowsMixed, Changed, AsWideAsKeys, OneHead, Padded]
)
def test_other_keys_and_values_are_left_as_they_are(kind):
    gm = exported(kind)
    code = gm.code
    assert not AbsorbLatents()(gm).modified
    assert gm.code == code
    assert not values_in_keys(*find_calls(gm.graph, torch.ops.quantspec.attention.default))


@pytest.mark.parametrize("kind", [Attends, Windowed])
def test_latents_wider_than_the_kernels_read_are_left_as_they_are(kind):
    gm = exported(kind)
    assert not AbsorbLatents(max_bytes=(LATENT + ROPE) * 8 - 1)(gm).modified
    assert AbsorbLatents(max_bytes=(LATENT + ROPE) * 8)(gm).modified


_DIMS = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_DENSE = {**_DIMS, "num_key_value_heads": 4}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
TYPES = {
    "deepseek_v2": {**_DENSE, **_EXPERTS, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {},
    "glm4_moe_lite": {**_DENSE, **_EXPERTS, "n_group": 1, "topk_group": 1},
    "minicpm3": _DENSE,
    "youtu": _DENSE,
}


@torch.no_grad()
@pytest.mark.parametrize("architecture", only(["deepseek_v3", "minicpm3"], TYPES))
def test_latents_of_models(architecture):
    model = tiny_model(architecture, **TYPES[architecture])
    with converting():
        captured = capture(model)
    cached = with_latents(captured, QuantSpecConfig(), "cuda")
    assert {(at.kv_heads, at.key_dim, at.value_dim) for at in captured.layers} == {(4, 24, 16)}
    assert {(at.kv_heads, at.key_dim, at.value_dim, at.values_in_keys) for at in cached.layers} == {(1, 40, 32, True)}
    assert {at.query_heads for at in cached.layers} == {4}
    ids, positions = torch.randint(3, 96, (2, 9)), torch.arange(9).expand(2, 9)
    expected = captured.graph_module(ids, positions)
    torch.testing.assert_close(cached.graph_module(ids, positions), expected, rtol=0, atol=2e-5)
    # A draft that chooses pages by the scales of values has those.
    assert with_latents(captured, QuantSpecConfig(draft_attention="sparse"), "cpu") is captured


@functools.cache
def converted() -> quantspec.QuantSpecModel:
    return quantspec.convert(tiny_model("deepseek_v3"), kv_group_size=16, weight_group_size=32)


def test_texts_and_conversations_beyond_what_stays_in_full_precision():
    qs = converted()
    ids = torch.randint(3, 96, (2, 45), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    options = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, "max_new_tokens": 24}
    speculated = qs.generate(ids, **options, num_assistant_tokens=4)
    # Every accepted draft is what the target would have said.
    assert torch.equal(qs.generate(ids, **options, num_assistant_tokens=0), speculated)
    assert qs.session.cache.quantized_len.tolist() != [0, 0]
    for layer in qs.session.cache.layers:
        assert layer.k_upper.shape[1::3] == (1, 40)
        assert layer.v_upper.numel() == layer.v_recent.numel() == layer.v_decoded.numel() == 0


def test_latents_beside_layers_that_keep_state():
    """Their prefill is the model's own forward, whose heads are expanded."""
    qs = quantspec.convert(tiny_model("kimi_linear"), kv_group_size=16, weight_group_size=32)
    assert {(at.kv_heads, at.key_dim, at.value_dim, at.values_in_keys) for at in qs.layers} == {(1, 40, 32, True)}
    ids = torch.randint(3, 96, (1, 22), generator=torch.Generator().manual_seed(3))
    expected = qs.model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(qs.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_a_saved_pair_has_the_same_latents(tmp_path):
    qs = converted()
    ids = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(2))
    expected = qs.generate(ids, max_new_tokens=8, do_sample=False)
    qs.save_pretrained(tmp_path)
    loaded = quantspec.from_pretrained(tmp_path)
    assert loaded.layers == qs.layers
    assert torch.equal(loaded.generate(ids, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize(("saved", "loaded"), [("full", "sparse"), ("sparse", "full")])
def test_a_saved_pair_is_loaded_with_or_without_latents(saved, loaded, tmp_path):
    """Its draft has the heads' linear in INT4 or not; what is asked for on loading is as if converted so."""
    model, options = tiny_model("deepseek_v3"), {"kv_group_size": 16, "weight_group_size": 32, "self_check": False}
    ids = torch.randint(3, 96, (1, 50), generator=torch.Generator().manual_seed(2))
    quantspec.convert(model, draft_attention=saved, **options).save_pretrained(tmp_path)
    expected = quantspec.convert(model, draft_attention=loaded, **options)
    found = quantspec.from_pretrained(tmp_path, draft_attention=loaded)
    assert found.layers == expected.layers
    notes = [{dataclasses.replace(report, note="") for report in qs.linears} for qs in (found, expected)]
    assert notes[0] == notes[1]
    texts = [qs.generate(ids, max_new_tokens=24, do_sample=False) for qs in (found, expected)]
    assert torch.equal(*texts)
    assert found.last_stats.accepted == expected.last_stats.accepted


def test_memory_of_the_shape_of_deepseek_v3():
    latent = CapturedLayer("", 128, 1, 576, 512, 0, 0.0, False, HeldState(576, 0), values_in_keys=True)
    layers = [latent] * 61
    ours = sum(expected_memory(layers, 32768).values())
    assert ours < 0.6 * full_precision_bytes(layers, 32768)
    expanded = [dataclasses.replace(latent, kv_heads=128, key_dim=192, value_dim=128, values_in_keys=False)] * 61
    assert sum(expected_memory(expanded, 32768).values()) > 60 * ours


def test_a_preview_tells_of_latents():
    structure = structure_of(tiny_model("deepseek_v3").config, QuantSpecConfig())
    assert structure.layers == converted().layers
    up = next(linear for linear in structure.linears if linear.report.name.endswith("kv_b_proj"))
    assert up.report.group_size is None


@dataclasses.dataclass(frozen=True)
class Case:
    """``values`` of ``dim`` channels are the value; ``lengths`` as in ``test_kernels_triton``."""

    heads: int = 4
    kv_heads: int = 1
    tokens: int = 1
    dim: int = 40
    values: int = 32
    lengths: tuple[tuple[int, int], ...] = ((64, 33),)
    lower: bool = False
    dtype: torch.dtype = torch.float32
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    pool: bool = False


GROUP = 32
CASES = {
    "draft": Case(),
    "draft in bfloat16": Case(dtype=torch.bfloat16),
    "verification of several sequences": Case(tokens=3, lengths=((64, 33), (0, 5), (96, 40)), lower=True),
    "everything is value": Case(heads=2, tokens=2, dim=32, lower=True, window=20, softcap=5.0, sinks=True),
    "two heads, chunks": Case(kv_heads=2, tokens=2, dim=96, values=80, dtype=torch.bfloat16, window=-24),
    "more rows than a block": Case(heads=24, tokens=3, lower=True, dtype=torch.float16),
    "out of a pool": Case(tokens=2, lengths=((64, 3), (32, 40)), lower=True, pool=True),
}


def arguments_of(case: Case) -> dict:
    """Random arguments of cached attention; slots and groups beyond each sequence's lengths hold NaN."""
    torch.manual_seed(0)
    batch, groups = len(case.lengths), max(quantized for quantized, _ in case.lengths) // GROUP + 1
    keys = torch.randn(batch, case.kv_heads, groups, GROUP, case.dim, device=DEVICE) + 1
    upper, lower, scale, zero = encode_keys(keys)
    recent = torch.randn(batch, case.kv_heads, 2 * GROUP + case.tokens + 1, case.dim, device=DEVICE).to(case.dtype)
    for row, (quantized, kept) in enumerate(case.lengths):
        scale[row, :, quantized // GROUP :] = zero[row, :, quantized // GROUP :] = float("nan")
        recent[row, :, kept:] = float("nan")
    table = None
    if case.pool:
        # The blocks of all sequences, in a row and backwards.
        upper, lower, scale, zero = (x.transpose(0, 1).flatten(1, 2).flip(1)[None] for x in (upper, lower, scale, zero))
        table = torch.arange(batch * groups, dtype=torch.int32, device=DEVICE).flip(0).view(batch, groups)
    new = torch.randn(batch, case.tokens, case.kv_heads, case.dim, device=DEVICE).to(case.dtype).transpose(1, 2)
    none = upper[..., :0], scale[..., None][..., :0]
    lengths = torch.tensor(case.lengths, device=DEVICE)
    return {
        "query": torch.randn(batch, case.heads, case.tokens, case.dim, device=DEVICE).to(case.dtype),
        "key": new,
        "value": new[..., : case.values],
        "k_recent": recent,
        "v_recent": recent[..., :0],
        "k_upper": upper,
        "k_lower": lower if case.lower else None,
        "k_scale": scale,
        "k_zero": zero,
        "v_upper": none[0],
        "v_lower": none[0] if case.lower else None,
        "v_scale": none[1],
        "v_zero": none[1],
        "quantized_len": lengths[:, 0].contiguous(),
        "length": lengths.sum(1),
        "scale": case.dim**-0.5,
        "window": case.window,
        "softcap": case.softcap,
        "sinks": torch.randn(case.heads, device=DEVICE) if case.sinks else None,
        "block_table": table,
    }


def widened(arguments: dict) -> dict:
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cached_attention_to_latents_matches_float64(case):
    arguments = arguments_of(case)
    wide = widened(arguments)
    expected = cached_attention_reference(**wide)
    # As if values were stored: those that were not are what they would be.
    assert expected.shape[-1] == case.values
    actual = cached_attention_triton(**arguments)
    assert actual.dtype == case.dtype
    assert relative_error(actual, expected) < TOLERANCE[case.dtype]
    torch.testing.assert_close(arguments["k_recent"].double(), wide["k_recent"], rtol=0, atol=0, equal_nan=True)
    if DEVICE.type == "cpu":
        plain = cached_attention(**widened(arguments_of(case)))
        assert relative_error(plain, expected) < 1e-12


def test_values_in_keys_are_those_channels():
    """With full-precision tokens alone, the same as with values that are stored."""
    arguments = widened(arguments_of(Case(lengths=((0, 40),), tokens=2)))
    stored = arguments["k_recent"][..., :32].clone()
    expected = cached_attention_reference(
        **{**arguments_of_copy(arguments), "v_recent": stored, **value_planes(arguments)}
    )
    torch.testing.assert_close(cached_attention_reference(**arguments), expected)


def arguments_of_copy(arguments: dict) -> dict:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def value_planes(arguments: dict) -> dict:
    upper, _, scale, zero = encode_values(torch.zeros(*arguments["k_upper"].shape[:3], GROUP, 32, device=DEVICE))
    return {"v_upper": upper, "v_scale": scale, "v_zero": zero}


def test_groups_of_latents_are_encoded():
    arguments = arguments_of(Case(lengths=((32, 65), (0, 31)), lower=True))
    names = (
        "k_recent",
        "v_recent",
        "k_upper",
        "k_lower",
        "k_scale",
        "k_zero",
        "v_upper",
        "v_lower",
        "v_scale",
        "v_zero",
    )
    cache = [arguments[name] for name in names]
    oldest = arguments["k_recent"][0, :, :GROUP].clone()
    rest = arguments["k_recent"][:, :, :31].clone()
    encode_oldest_groups(None, *cache, arguments["quantized_len"], arguments["length"])
    upper, lower, scale, zero = (x[0] for x in encode_keys(oldest[None]))
    for name, part in (("k_scale", scale), ("k_zero", zero)):
        torch.testing.assert_close(arguments[name][0, :, 1], part)
    assert ((arguments["k_upper"][0, :, 1] == upper) & (arguments["k_lower"][0, :, 1] == lower)).float().mean() > 0.99
    torch.testing.assert_close(arguments["k_recent"][1, :, :31], rest[1])
