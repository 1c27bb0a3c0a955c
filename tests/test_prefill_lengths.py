"""A prefill knows the cache's lengths on the host: no layer waits for the device, and launches are few."""

from __future__ import annotations

import contextlib
import copy
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.attention.bias
from conftest import GROUP
from step_by_step import random_prompt
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

import quantspec
from quantspec.cache import HierarchicalCache, Lengths
from quantspec.engine.prefill import prefill
from quantspec.kernels import dense_tokens, encode
from quantspec.kernels.prefill_attention import prefill_attention_triton
from quantspec.passes import Role
from quantspec.serving import Engine, Request

OP = torch.ops.quantspec.prefill_attention.default
LAYERS = 3
# What a GPU launches nothing for.
NO_LAUNCH = ("empty", "new_empty", "empty_like", "view", "_unsafe_view", "reshape", "expand", "alias", "detach")


class Checked(TorchDispatchMode):
    """Compares the lengths that the op is told with those on the device, and counts its calls."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is OP:
            named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False), **kwargs)
            state = [named[name] for name in ("quantized_len", "length", "num_new")]
            assert named["host_lengths"].device.type == "cpu"
            assert torch.equal(named["host_lengths"], torch.stack(state))
            # The device's move on while these stay.
            assert named["host_lengths"].data_ptr() not in [x.data_ptr() for x in state]
            self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "lfm2", "deepseek_v3"])
def test_host_lengths_are_those_of_the_cache(architecture, monkeypatch):
    """In chunks of padded prompts, and in the turns of a conversation."""
    qs = quantspec.convert(tiny_model(architecture), kv_group_size=GROUP, self_check=False)
    monkeypatch.setitem(vars(qs.pair), "fill_chunk", lambda batch, tokens: 3 * GROUP)
    prompts = [random_prompt(length, length) for length in (7 * GROUP + 3, GROUP)]
    ids = torch.tensor([[0] * (len(prompts[0]) - len(prompt)) + prompt for prompt in prompts])
    with Checked() as checked:
        out = qs.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=5)
        assert checked.calls >= 3
        out = qs.generate(ids[:1], max_new_tokens=5, continue_cache=True)
        before = checked.calls
        longer = torch.cat((out, torch.tensor([random_prompt(4 * GROUP, 1)])), 1)
        qs.generate(longer, max_new_tokens=5, continue_cache=True)
    assert checked.calls > before


def test_host_lengths_of_an_engine_are_those_of_its_cache(qs):
    """Also of rows that start from shared pages, give way, and are read again."""
    common = random_prompt(5 * GROUP, 1)
    asked = [Request([*common, *random_prompt(length, length)], 5 * GROUP, ()) for length in (3, GROUP, 4 * GROUP + 5)]
    options = {"max_sequences": 3, "max_num_batched_tokens": 2 * GROUP, "num_pages": 20}
    with contextlib.closing(Engine(qs, **options)) as engine, Checked() as checked:
        # In this thread, which the mode watches.
        ids = [engine.add(request) for request in (*asked, *asked)]
        left = set(ids)
        while left:
            outputs = engine.step()
            assert not any(output.error for output in outputs)
            left -= {output.id for output in outputs if output.finish_reason is not None}
        statistics = engine.statistics()
    assert statistics.preemptions
    assert statistics.cached_prompt_tokens
    assert checked.calls > 2 * len(ids)


class OnDevice(TorchDispatchMode):
    """Runs the op's launcher for CUDA on tensors without data, which nothing can read, and notes what it launches."""

    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self.launched = launched
        self.inside = False
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is OP:
            self.calls += 1
            self.inside = True
            with self:
                out = prefill_attention_triton(*args, **kwargs)
            self.inside = False
            return out
        name = func._schema.name.removeprefix("aten::")
        if self.inside and not func.is_view and name not in NO_LAUNCH:
            self.launched.append(name)
        return func(*args, **kwargs)


class Launched:
    """Stands for a kernel."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name = name
        self.launched = launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(isinstance(size, int) and size > 0 for size in grid)
        return lambda *args, **options: self.launched.append(self.name)


def without_modes(make: Any) -> Any:
    """``make``, whose result is of a class that cannot be made under a mode."""

    def made(*args: int) -> Any:
        with _disable_current_modes():
            return make(*args)

    return made


@pytest.fixture
def on_device(monkeypatch) -> tuple[Any, HierarchicalCache, OnDevice]:
    """A pair and a cache without data, and what notes the launches of their prefill."""
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=LAYERS)
    qs = quantspec.convert(model, kv_group_size=GROUP, self_check=False)
    pair = copy.copy(qs.pair)
    device = torch.device("meta")
    graph = copy.deepcopy(pair.graphs[Role.PREFILL]).to(device)
    # What names the device that the model was captured on.
    for node in graph.graph.nodes:
        node.args, node.kwargs = tree_map_only(torch.device, lambda _: device, (node.args, node.kwargs))
    graph.recompile()
    pair._forwards = {Role.PREFILL: graph}
    cache = HierarchicalCache(pair.layers, 1, GROUP, 4, pair.max_len, torch.bfloat16, device)
    cache.reserve(20 * GROUP)
    launched: list[str] = []
    for module, name in ((dense_tokens, "_dense_kernel"), (encode, "_encode_kernel"), (encode, "_move_kernel")):
        monkeypatch.setattr(module, name, Launched(name, launched))
    attention = import_module("quantspec.kernels.attention")
    monkeypatch.setattr(attention, "causal_lower_right", without_modes(attention.causal_lower_right))
    # As it is for these dims on a GPU.
    monkeypatch.setattr(torch.nn.attention.bias, "can_use_flash_attention", lambda *args: True)
    return pair, cache, OnDevice(launched)


def test_chunks_are_prefilled_without_reading_the_device(on_device):
    pair, cache, device = on_device
    lengths = Lengths(*torch.zeros(2, 1, dtype=torch.int64))
    with torch.no_grad(), device:
        for tokens in (4 * GROUP, 3 * GROUP, 5):
            device.launched.clear()
            pair.fill(torch.zeros(1, tokens, dtype=torch.int64, device="meta"), [tokens], cache, lengths)
    assert device.calls == 3 * LAYERS
    later = ["_dense_kernel", "_scaled_dot_product_flash_attention", "_encode_kernel", "_move_kernel", "_move_kernel"]
    assert device.launched == later * LAYERS
    assert [int(x) for x in lengths] == [6 * GROUP, 7 * GROUP + 5]


def test_a_prompt_reads_the_device_once(on_device, monkeypatch):
    pair, cache, device = on_device
    read = []
    monkeypatch.setattr(cache, "host_lengths", lambda: read.append(1) or Lengths(*torch.zeros(2, 1, dtype=torch.int64)))
    pair.fill_chunk = lambda batch, tokens: 2 * GROUP
    with device:
        prefill(pair, cache, [torch.zeros(9 * GROUP, dtype=torch.int64, device="meta")])
    assert device.calls == 5 * LAYERS
    assert read == [1]
