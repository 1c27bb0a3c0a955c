"""Every architecture of ``tiny_models``, without per-model code: logits, generation, shared weights and memory."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, HYBRIDS, tiny_model
from torch import Tensor, nn

import quantspec
from quantspec import QuantSpecModel
from quantspec.kernels.hierarchical import num_value_groups
from quantspec.passes.graph import find_calls, get_tensor
from quantspec.self_check import incremental_logits

GROUP = 32
WEIGHT_GROUP = 32
PROMPT = 40
# Nothing is quantized below 2G tokens, and sliding windows (12) are shorter than the prompt.
NEW_TOKENS = 12
assert PROMPT + NEW_TOKENS < 2 * GROUP


@functools.cache
def converted(architecture: str) -> QuantSpecModel:
    """The pair of an architecture, converted once; float32, every linear INT4, with the self-check on."""
    options = {"kv_group_size": GROUP, "weight_group_size": WEIGHT_GROUP, "quantize_lm_head": True}
    return quantspec.convert(tiny_model(architecture), **options)


def in_groups(names: Iterable[str]) -> list:
    """As parameters: one process runs all tests of an architecture, so that it is converted once in all."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


@pytest.fixture(params=in_groups(ARCHITECTURES))
def qs(request) -> QuantSpecModel:
    return converted(request.param)


def random_ids(batch: int, tokens: int, seed: int) -> Tensor:
    """Ids without the special ones."""
    return torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))


# Prefixes of parameters that a text does not reach.
_OF_OTHER_SENSES = ("model.vision_tower", "model.multi_modal_projector", "model.embed_vision")


def own_tensors(*modules: nn.Module) -> dict[int, Tensor]:
    """Parameters and buffers by address."""
    return {t.data_ptr(): t for module in modules for t in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("steps", [(1,) * NEW_TOKENS, (5, 1, 4, 2)], ids=["token by token", "blocks"])
def test_target_logits_are_the_models_own(qs, steps):
    ids = random_ids(1, PROMPT + NEW_TOKENS, seed=1)
    with torch.no_grad():
        expected = qs.model(input_ids=ids, use_cache=False).logits[:, PROMPT - 1 :]
        ours = incremental_logits(qs, ids, PROMPT, steps)
    # Row 0 comes from prefill, the others from decoding.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_greedy_generation_is_hugging_faces(qs):
    ids = random_ids(1, PROMPT, seed=2)
    expected = qs.model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(qs.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False), expected)
    # The draft did propose, so this was speculation.
    assert qs.last_stats is not None
    assert qs.last_stats.drafted > 0


def test_greedy_generation_of_a_padded_batch_is_hugging_faces(qs):
    ids = random_ids(2, PROMPT, seed=3)
    mask = torch.ones_like(ids)
    mask[1, : PROMPT - 17] = 0
    ids = ids * mask
    options = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(qs.generate(ids, **options), qs.model.generate(ids, **options))


def test_target_holds_the_models_own_tensors(qs):
    own = own_tensors(qs.model)
    for graph in (qs.target, qs.prefill):
        assert {t.data_ptr() for t in graph.parameters()} <= own.keys()
    # Nothing of the model was left out either: every matrix takes part.
    used = own_tensors(qs.target)
    text = (p for name, p in qs.model.named_parameters() if not name.startswith(_OF_OTHER_SENSES))
    assert all(p.data_ptr() in used for p in text if p.dim() > 1)


def test_draft_adds_int4_buffers_only(qs):
    own = own_tensors(qs.model, qs.target)
    added = {a: t for a, t in own_tensors(qs.draft).items() if a not in own}
    assert added
    assert {t.dtype for t in added.values()} <= {torch.uint8, torch.bfloat16}
    assert not any(isinstance(t, nn.Parameter) for t in added.values())
    # A weight that became INT4 is not held a second time in full precision.
    held = own_tensors(qs.draft)
    dense = {report.name for report in qs.linears if report.group_size is None}
    for report in qs.linears:
        weight = dict(qs.model.named_parameters()).get(f"{report.name}.weight")
        shares = weight is not None and weight.data_ptr() == qs.model.get_input_embeddings().weight.data_ptr()
        if weight is not None and report.name not in dense and not shares:
            assert weight.data_ptr() not in held, report.name


def test_memory_beyond_the_model_is_int4_weights_and_cache(qs):
    model_bytes = sum(t.nbytes for t in own_tensors(qs.model).values())
    added = sum(
        t.nbytes for a, t in own_tensors(qs.target, qs.prefill, qs.draft).items() if a not in own_tensors(qs.model)
    )
    # Half a byte a weight, and a bfloat16 scale and zero per group.
    expected = padding = 0
    experts = experts_of(qs)
    for report in qs.linears:
        if report.group_size is not None:
            row = report.in_features // 2 + report.in_features // report.group_size * 4
            expected += row * report.out_features * experts.get(report.name, 1)
            # The CPU's kernel wants rows in sixteens.
            padding += row * (-report.out_features % 16)
    assert expected <= qs.weight_bytes()["draft_int4"] <= expected + padding
    # A graph may hold scalars that the model's code made.
    scalars = sum(t.nbytes for t in own_tensors(qs.target, qs.prefill).values() if t.dim() == 0)
    assert abs(qs.weight_bytes()["target"] - model_bytes) <= scalars
    assert sum(qs.weight_bytes().values()) == model_bytes + added

    batch, draft_tokens, tokens = 3, 4, 5 * GROUP + 1
    cache = qs.pair.new_cache(batch, draft_tokens)
    cache.reserve(tokens)
    slots = 2 * GROUP + draft_tokens + 1
    totals = {"upper": 0, "lower": 0, "scales": 0, "recent": 0, "decoded": 0}
    for layer in qs.layers:
        value_dim = 0 if layer.values_in_keys else layer.value_dim
        heads, dims = batch * layer.kv_heads, layer.key_dim + value_dim
        # A window's planes are a ring of the groups that it reaches, and one more.
        reach = layer.window or layer.chunk
        groups = min(5, max(2, math.ceil((reach - 1) / GROUP) + 1)) if reach else 5
        totals["recent"] += heads * slots * dims * 4
        totals["decoded"] += heads * (groups * GROUP + slots) * dims * 4
        totals["upper"] += heads * groups * GROUP * dims // 2
        totals["lower"] += heads * groups * GROUP * dims // 2
        totals["scales"] += heads * groups * (layer.key_dim + GROUP * num_value_groups(value_dim)) * 2 * 2
    # Of layers that keep any: the verified tokens' and one behind each token of a verification.
    states = qs.pair.captured.states
    state = {"state": sum(batch * (draft_tokens + 2) * math.prod(s.shape) * s.dtype.itemsize for s in states)}
    assert cache.bytes_by_part() == totals | (state if states else {})
    parts = {part.data_ptr(): part.nbytes for layer in cache.layers for part in vars(layer).values()}
    assert sum(parts.values()) == sum(totals.values())


def experts_of(qs: QuantSpecModel) -> dict[str, int]:
    """Number of experts in each stacked weight of the model, by name."""
    return {name: p.shape[0] for name, p in qs.model.named_parameters() if p.dim() == 3}


@pytest.mark.parametrize("architecture", in_groups(["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]))
def test_experts_are_int4_and_routers_are_reported(architecture):
    qs = converted(architecture)
    stacks = experts_of(qs)
    reports = {report.name: report for report in qs.linears}
    assert stacks
    assert stacks.keys() <= reports.keys()
    int4 = list(find_calls(qs.draft.graph, torch.ops.quantspec.int4_expert_linear.default))
    assert len(int4) == len([name for name in stacks if reports[name].group_size is not None]) == len(stacks)
    assert not list(find_calls(qs.draft.graph, torch.ops.quantspec.expert_linear.default))
    # What absorbs latents is no linear any longer.
    routers = [n for n, report in reports.items() if report.group_size is None and not n.endswith("kv_b_proj")]
    assert routers
    assert all(reports[name].note == "router of experts" for name in routers)
    assert all(name in repr(qs) for name in routers)


def test_key_and_value_head_dims_may_differ():
    # Their latents are not smaller, so they are not what is cached.
    qs = quantspec.convert(tiny_model("deepseek_v3", kv_lora_rank=192), kv_group_size=GROUP, self_check=False)
    assert {(layer.key_dim, layer.value_dim) for layer in qs.layers} == {(24, 16)}
    cache = qs.pair.new_cache(2, 4)
    cache.reserve(3 * GROUP)
    for layer in cache.layers:
        assert layer.k_recent.shape == (2, 4, 2 * GROUP + 5, 24)
        assert layer.v_recent.shape == (2, 4, 2 * GROUP + 5, 16)
        assert layer.k_upper.shape == layer.k_lower.shape == (2, 4, 2, GROUP // 2, 24)
        assert layer.v_upper.shape == layer.v_lower.shape == (2, 4, 2, GROUP // 2, 16)


@pytest.mark.xdist_group("gpt2")
def test_conv1d_linears_of_gpt2_are_int4():
    qs = converted("gpt2")
    names = {report.name for report in qs.linears if report.group_size == WEIGHT_GROUP}
    blocks = (f"transformer.h.{i}.{name}" for i in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc"))
    assert names >= set(blocks)
    aten = torch.ops.aten
    assert not list(find_calls(qs.draft.graph, aten.addmm.default, aten.linear.default))
    assert list(find_calls(qs.target.graph, aten.addmm.default))


@pytest.mark.parametrize("architecture", in_groups(["gemma", "gpt2", "cohere"]))
def test_tied_embeddings_stay_tied(architecture):
    qs = converted(architecture)
    embedding = qs.model.get_input_embeddings().weight
    assert qs.model.get_output_embeddings().weight is embedding
    aten = torch.ops.aten
    for graph in (qs.target, qs.prefill):
        lookups = [node.args[0] for node in find_calls(graph.graph, aten.embedding.default)]
        head = list(find_calls(graph.graph, aten.linear.default))[-1]
        assert embedding.data_ptr() in {get_tensor(graph, weight).data_ptr() for weight in lookups}
        assert get_tensor(graph, head.args[1]).data_ptr() == embedding.data_ptr()
    # The draft looks tokens up in the same table and has an INT4 head of its own.
    assert embedding.data_ptr() in own_tensors(qs.draft)
    assert not list(find_calls(qs.draft.graph, aten.linear.default))


@pytest.mark.parametrize(
    ("architecture", "attribute", "values"),
    [
        pytest.param(name, attribute, values, marks=pytest.mark.xdist_group(name))
        for name, attribute, values in (
            ("mistral", "window", [12, 12]),
            ("gemma2", "window", [12, 0]),
            ("gemma2", "softcap", [50.0, 50.0]),
            ("gpt_oss", "has_sinks", [True, True]),
            ("llama", "module", ["model.layers.0.self_attn", "model.layers.1.self_attn"]),
        )
    ],
)
def test_windows_softcaps_and_sinks_are_recorded(architecture, attribute, values):
    assert [getattr(layer, attribute) for layer in converted(architecture).layers] == values


def test_documentation_lists_the_tested_architectures():
    page = Path(__file__).parents[1] / "docs" / "supported-models.md"
    converted_part = page.read_text().split("## Refused")[0]
    listed = re.findall(r"^\| `([\w-]+)` \|", converted_part, re.MULTILINE)
    assert {*ARCHITECTURES, *HYBRIDS} <= {*listed}
