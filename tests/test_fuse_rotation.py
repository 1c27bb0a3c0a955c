"""Rotations of queries and keys move into the op that reads the cache: every spelling of them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_architectures import converted
from tiny_models import ARCHITECTURES, STATEFUL, tiny_model
from torch import Tensor, fx, nn

from quantspec import kernels
from quantspec.cache import HierarchicalCache
from quantspec.capture import CapturedLayer, capture
from quantspec.kernels.cache_layout import CACHE_PARTS
from quantspec.kernels.cached_attention import rotate
from quantspec.pair.recipes import run_passes
from quantspec.passes import (
    ACCESSES,
    FuseRotation,
    LowerAttention,
    MaterializePositionTables,
    RemoveNoOps,
    Role,
    cache_parts,
)
from quantspec.passes.graph import clone, find_calls

GROUP, BATCH, TOKENS = 32, 2, 3

# Calls of two layers that rotate; where not both do, why.
ROTATED = dict.fromkeys((x for x in ARCHITECTURES if x not in STATEFUL), 2) | {
    # Two calls a layer.
    "diffllama": 4,
    # Learned positions.
    "gpt2": 0,
    "opt": 0,
    "gpt_bigcode": 0,
    # The last channels of a head, and one key for all heads.
    "deepseek_v3": 0,
    # Complex numbers.
    "llama4_text": 0,
    # Layers without positions.
    "smollm3": 1,
    "cohere2": 1,
    "exaone4": 1,
}


def lowered(gm: fx.GraphModule, role: Role = Role.DRAFT) -> fx.GraphModule:
    """A graph with ops in place of markers, as the pass gets it."""
    passes = [RemoveNoOps(), MaterializePositionTables(), LowerAttention(ACCESSES[role], GROUP)]
    return run_passes(clone(gm), passes)


def rotating_calls(gm: fx.GraphModule) -> list[fx.Node]:
    """Calls that got tables."""
    calls = find_calls(gm.graph, torch.ops.quantspec.cached_attention.default)
    return [call for call in calls if len(call.args) > 19]


def filled_cache(layers: tuple[CapturedLayer, ...]) -> HierarchicalCache:
    """Random codes and recent tokens of two sequences, one of them with a group in the planes."""
    torch.manual_seed(0)
    cache = HierarchicalCache(layers, BATCH, GROUP, 4, 512, torch.float32, torch.device("cpu"))
    cache.reserve(3 * GROUP)
    cache.quantized_len.copy_(torch.tensor([GROUP, 0]))
    cache.length.copy_(torch.tensor([GROUP + 7, 5]))
    for layer in cache.layers:
        for part, tensor in zip(CACHE_PARTS, layer.parts(), strict=True):
            if part.dtype == torch.uint8:
                tensor.random_(0, 256)
            else:
                tensor.normal_()
    return cache


@torch.no_grad()
def assert_same(fused: fx.GraphModule, plain: fx.GraphModule, first: Tensor, layers: tuple[CapturedLayer, ...]) -> None:
    """Equal outputs and equal recent buffers, up to float32."""
    results = []
    for gm in (fused, plain):
        cache = filled_cache(layers)
        positions = cache.length[:, None] + torch.arange(TOKENS)
        state = (cache.quantized_len, cache.length, *cache.inputs(cache_parts(Role.DRAFT)))
        results.append((gm(first, positions, *state), *(x for layer in cache.layers for x in layer.parts()[:2])))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-4)


# In the process that has converted the architecture.
@pytest.mark.parametrize("architecture", [pytest.param(x, marks=pytest.mark.xdist_group(x)) for x in ROTATED])
def test_every_rotation_of_an_architecture_moves_into_attention(architecture: str) -> None:
    captured = converted(architecture).pair.captured
    plain = lowered(captured.graph_module)
    fused = clone(plain)
    assert FuseRotation()(fused).modified == (ROTATED[architecture] > 0)
    assert len(rotating_calls(fused)) == ROTATED[architecture]
    assert not FuseRotation()(fused).modified
    assert all("val" in node.meta for node in fused.graph.nodes if node.op == "call_function")
    ids = torch.randint(3, 96, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    assert_same(fused, plain, ids, captured.layers)


def halves(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def neighbours(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def by_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.split(x.shape[-1] // 2, -1)
    c, s = cos[..., : cos.shape[-1] // 2], sin[..., : cos.shape[-1] // 2]
    return torch.cat((first * c - second * s, second * c + s * first), -1)


def first_channels(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1] // 2
    c, s = (table[..., : size // 2].repeat_interleave(2, -1) for table in (cos, sin))
    return torch.cat((x[..., :size] * c + neighbours(x[..., :size]) * s, x[..., size:]), -1)


Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]
SPELLINGS: dict[str, tuple[Spelling, tuple[int, bool]]] = {
    "halves": (lambda x, cos, sin: x * cos + halves(x) * sin, (16, False)),
    "neighbours": (lambda x, cos, sin: cos * x + sin * neighbours(x), (16, True)),
    "neighbours, in float32": (
        lambda x, cos, sin: (x.double() * cos + neighbours(x.double()) * sin).to(x.dtype),
        (16, True),
    ),
    "halves, apart": (by_split, (16, False)),
    "first channels": (first_channels, (8, True)),
}
OTHERS: dict[str, Spelling] = {
    "the other way": lambda x, cos, sin: x * cos - halves(x) * sin,
    "without a sign": lambda x, cos, sin: x * cos + halves(x).abs() * sin,
    "scaled": lambda x, cos, sin: 2 * x * cos + halves(x) * sin,
    "of the last channels": lambda x, cos, sin: torch.cat(
        (x[..., :8], x[..., 8:] * cos[..., :8] + halves(x[..., 8:]) * sin[..., :8]), -1
    ),
    "by tables of the input": lambda x, cos, sin: x * (cos + x) + halves(x) * sin,
    "only a factor": lambda x, cos, sin: x * cos,
}


class Attending(nn.Module):
    """One attention call whose query and key are spelled rotations of an input."""

    def __init__(self, query: Spelling, key: Spelling, heads_first: bool = True, sines: float = 1.0) -> None:
        super().__init__()
        self.spellings, self.heads_first, self.sines = (query, key), heads_first, sines

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        angles = position_ids[..., None] * torch.linspace(0.1, 1.5, 16)
        cos, sin = angles.cos(), angles.sin()
        new = x.view(*x.shape[:2], 3, 2, 16).unbind(2)
        rotated = []
        for heads, spelling, factor in zip(new, self.spellings, (1.0, self.sines), strict=False):
            axis = 1 if self.heads_first else 2
            heads = heads.transpose(1, 2) if self.heads_first else heads
            sines = sin if factor == 1 else sin * factor
            heads = spelling(heads, cos.unsqueeze(axis), sines.unsqueeze(axis))
            rotated.append(heads if self.heads_first else heads.transpose(1, 2))
        return kernels.attention(*rotated, new[2].transpose(1, 2), 0, 0.25, 0, 0.0, None)


LAYERS = (CapturedLayer("", 2, 2, 16, 16, 0, 0.0, False),)


def attending(module: nn.Module) -> tuple[fx.GraphModule, Tensor]:
    x = torch.randn(BATCH, TOKENS, 96, generator=torch.Generator().manual_seed(2))
    program = torch.export.export(module, (x, torch.zeros(BATCH, TOKENS, dtype=torch.long)), strict=False)
    return lowered(program.module(check_guards=False)), x


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("name", SPELLINGS)
def test_however_it_is_spelled(name: str, heads_first: bool) -> None:
    spelling, expected = SPELLINGS[name]
    plain, x = attending(Attending(spelling, spelling, heads_first))
    fused = clone(plain)
    assert FuseRotation()(fused).modified
    assert [call.args[-2:] for call in rotating_calls(fused)] == [expected]
    # Nothing of the rotation is left.
    assert not list(find_calls(fused.graph, torch.ops.aten.neg.default, torch.ops.aten.cat.default))
    assert_same(fused, plain, x, LAYERS)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_rotation_stays(name: str) -> None:
    gm, _ = attending(Attending(OTHERS[name], OTHERS[name]))
    code = gm.code
    assert not FuseRotation()(gm).modified
    assert gm.code == code


@pytest.mark.parametrize("sines", [1.0, 2.0], ids=["one rotates", "other tables"])
def test_query_and_key_that_are_not_rotated_alike_stay(sines: float) -> None:
    halved, _ = SPELLINGS["halves"]
    other = SPELLINGS["neighbours"][0] if sines == 1 else halved
    gm, _ = attending(Attending(halved, other, sines=sines))
    assert not FuseRotation()(gm).modified


class TokensFirst(nn.Module):
    """One attention call whose tables ``(T, 1, N)`` are one row's, the axis of batches in the place of heads."""

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        angles = position_ids.transpose(0, 1)[:, :1, None] * torch.linspace(0.1, 1.5, 16)
        query, key, value = x.view(*x.shape[:2], 3, 2, 16).unbind(2)
        cos, sin = angles.cos(), angles.sin()
        query, key = (SPELLINGS["halves"][0](heads, cos, sin) for heads in (query, key))
        heads = (states.transpose(1, 2) for states in (query, key, value))
        return kernels.attention(*heads, 0, 0.25, 0, 0.0, None)


def test_tables_that_are_not_of_rows_and_tokens_stay() -> None:
    gm, _ = attending(TokensFirst())
    assert not FuseRotation()(gm).modified


def test_prefill_rotates_by_itself() -> None:
    gm = lowered(capture(tiny_model("llama")).graph_module, Role.PREFILL)
    assert not FuseRotation()(gm).modified


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_is_rounded_once(dtype: torch.dtype, interleaved: bool) -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(2, 3, 5, 32).to(dtype), 6 * torch.rand(2, 5, 8)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    ours = rotate(x, cos, sin, 16, interleaved)
    exact = rotate(x.double(), cos.double(), sin.double(), 16, interleaved)
    assert ours.dtype == dtype
    assert torch.equal(ours[..., 16:], x[..., 16:])
    # Half a unit in the last place, and float32's own rounding.
    assert bool(((ours.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 * 1.001 + 1e-6).all())
    spelled = x.double()[..., :16]
    c, s = (
        (t.double().repeat_interleave(2, -1) if interleaved else t.double().repeat(1, 1, 2))[:, None]
        for t in (cos, sin)
    )
    expected = spelled * c + (neighbours if interleaved else halves)(spelled) * s
    torch.testing.assert_close(exact[..., :16], expected, rtol=1e-12, atol=1e-12)
