"""Cutting a graph at its layers: equal layers are found equal, and the pieces compute what the whole does."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_models import tiny_model
from torch import fx
from torch._dynamo.utils import counters

import quantspec
from quantspec.kernels import compiled_by
from quantspec.pair.compile_by_layer import _signature, compile_graph, region_graph, split_regions
from quantspec.passes import Role, cache_parts
from quantspec.passes.graph import get_tensor

LAYERS = {
    "llama": ({"num_hidden_layers": 5}, 1),
    "gpt2": ({"n_layer": 5}, 1),
    "mixtral": ({"num_hidden_layers": 5}, 1),
    # Windowed and full layers take turns.
    "gemma2": (
        {"num_hidden_layers": 5, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]},
        2,
    ),
}


@functools.cache
def converted(name: str) -> quantspec.QuantSpecModel:
    """For both roles."""
    options = {"kv_group_size": 16, "weight_group_size": 32, "self_check": False}
    return quantspec.convert(tiny_model(name, **LAYERS[name][0]), **options)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("role", [Role.TARGET, Role.DRAFT])
@torch.no_grad()
def test_regions_compute_the_graph_and_equal_layers_are_one(name: str, role: Role) -> None:
    qs, kinds = converted(name), LAYERS[name][1]
    gm: fx.GraphModule = getattr(qs, role.value)
    regions = split_regions(gm.graph)
    assert regions is not None
    # What precedes the first layer is with it; what follows the last is by itself.
    assert len(regions) == 6
    assert len({_signature(gm, region, region_graph(region)) for region in regions[1:-1]}) == kinds

    cache = qs.pair.new_cache(1, 4)
    cache.reserve(64)
    ids = torch.tensor([[5, 7, 11]])
    rows = torch.arange(3)[None]
    inputs = (ids, rows, rows, cache.quantized_len, cache.length, *cache.inputs(cache_parts(role, qs.pair.device)))
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = dict(zip(placeholders, inputs, strict=True))
    for region in regions:
        run = fx.GraphModule(torch.nn.Module(), region_graph(region))
        tensors = [get_tensor(gm, node) for node in region.tensors]
        values.update(zip(region.outputs, run(*(values[n] for n in region.inputs), *tensors), strict=True))
    assert torch.equal(values[regions[-1].outputs[0]], gm(*inputs))


def test_layers_of_other_sizes_are_not_one() -> None:
    """A linear of another width in one layer gives that layer a signature of its own."""
    model = tiny_model("llama", num_hidden_layers=5)
    mlp = model.model.layers[2].mlp
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, torch.nn.Linear(64, 128, bias=False))
    mlp.down_proj = torch.nn.Linear(128, 64, bias=False)
    qs = quantspec.convert(model, weight_group_size=32, self_check=False)
    regions = split_regions(qs.target.graph)
    assert regions is not None
    signatures = [_signature(qs.target, region, region_graph(region)) for region in regions]
    assert signatures[1] == signatures[3] == signatures[4]
    assert signatures[2] != signatures[1]


def test_few_layers_are_left_whole() -> None:
    qs = quantspec.convert(tiny_model("llama", num_hidden_layers=2), self_check=False)
    assert split_regions(qs.target.graph) is None


@torch.no_grad()
def test_more_shapes_are_compiled_than_torch_allows_by_itself() -> None:
    """Each batch size is a compilation of its own; torch.compile would give up at its limit and run eagerly."""
    torch._dynamo.reset()
    qs = quantspec.convert(tiny_model("llama", num_hidden_layers=1), self_check=False)
    forward = compile_graph(qs.draft)
    parts = cache_parts(Role.DRAFT, qs.pair.device)

    def compilations(batch: int) -> int:
        cache = qs.pair.new_cache(batch, 1)
        cache.reserve(300)
        zeros = torch.zeros(batch, 1, dtype=torch.long)
        forward(zeros, zeros, zeros, cache.quantized_len, cache.length, *cache.inputs(parts))
        return counters["stats"]["unique_graphs"]

    with torch._dynamo.config.patch(recompile_limit=1):
        first = compilations(2)
        assert compilations(3) > first


@pytest.mark.parametrize("by_backend", [False, True])
@torch.no_grad()
def test_what_other_kernels_had_compiled_is_not_found_on_disk(by_backend, tmp_path, monkeypatch) -> None:
    """Inductor's key has the ops of a graph, and not the shapes of what is between them."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = tiny_model("llama", num_hidden_layers=1)
    zeros = torch.zeros(1, 1, dtype=torch.long)
    qs = quantspec.convert(model, self_check=False)
    cache = qs.pair.new_cache(1, 1)
    inputs = zeros, zeros, zeros, cache.quantized_len, cache.length, *cache.inputs(cache_parts(Role.DRAFT, "cpu"))

    def found(digest: str) -> bool:
        torch._dynamo.reset()
        monkeypatch.setattr(compiled_by, "digest_of_kernels", lambda: digest)
        before = counters["inductor"]["fxgraph_cache_hit"]
        if by_backend:
            torch.compile(model.model.layers[0].mlp, backend="quantspec")(torch.ones(1, 1, model.config.hidden_size))
        else:
            compile_graph(qs.draft)(*inputs)
        return counters["inductor"]["fxgraph_cache_hit"] > before

    assert [found("these"), found("these"), found("others")] == [False, True, False]
