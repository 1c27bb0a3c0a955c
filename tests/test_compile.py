"""The pair under torch.compile."""

import contextlib

import pytest
import torch
from tiny_models import tiny_model
from torch._dynamo.utils import counters

import quantspec
from quantspec import Engine
from quantspec.passes import Role, cache_parts
from quantspec.serving import Request

# Of prompts.
LENGTHS = (1, 2, 32, 33, 70, 100)

pytestmark = pytest.mark.xdist_group("compile")


@pytest.fixture(scope="module")
def pair():
    """The same model, of enough layers to be cut into regions, converted twice: eager and compiled."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model("llama", num_hidden_layers=4)
    options = {"kv_group_size": 16, "weight_group_size": 32, "self_check": False}
    return quantspec.convert(model, compile=False, **options), quantspec.convert(model, compile=True, **options)


def _prompt(length: int) -> torch.Tensor:
    return torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(length))


def test_compiled_generation_equals_eager_and_never_recompiles(pair) -> None:
    """After warm-up no prompt length, output length or sampling option compiles anything again; no graph breaks."""
    eager, compiled = pair

    def outputs(qs, length: int) -> list[torch.Tensor]:
        greedy = qs.generate(_prompt(length), max_new_tokens=30, do_sample=False, eos_token_id=None)
        sampled = qs.generate(_prompt(length), max_new_tokens=30, do_sample=True, temperature=0.7, seed=1)
        return [greedy, sampled]

    outputs(compiled, 20)
    # A last cycle of a single token is compiled by itself: torch.compile takes a size of 1 for a constant.
    compiled.generate(_prompt(20), max_new_tokens=4, do_sample=False, num_speculative_tokens=0)
    compiles = counters["stats"]["unique_graphs"]
    assert compiles > 0
    for length in (1, 33, 70):
        for ours, expected in zip(outputs(compiled, length), outputs(eager, length), strict=True):
            assert torch.equal(ours, expected)
    assert counters["stats"]["unique_graphs"] == compiles
    assert not counters["graph_break"]


def test_another_conversion_finds_every_graph_in_the_compilers_cache(pair) -> None:
    """As the next process does: the graphs that conversion writes depend on the model alone."""
    _, compiled = pair
    expected = compiled.generate(_prompt(20), max_new_tokens=30, do_sample=False)
    torch._dynamo.reset()
    counters.clear()
    again = quantspec.convert(compiled.model, config=compiled.config)
    assert torch.equal(again.generate(_prompt(20), max_new_tokens=30, do_sample=False), expected)
    assert counters["aot_autograd"]["autograd_cache_hit"] > 0
    assert counters["aot_autograd"]["autograd_cache_miss"] == 0


@pytest.fixture(scope="module")
def one_layer() -> quantspec.QuantSpecModel:
    model = tiny_model("llama", num_hidden_layers=1)
    return quantspec.convert(model, kv_group_size=16, weight_group_size=32, self_check=False)


@torch.no_grad()
@pytest.mark.parametrize("role", [Role.TARGET, Role.DRAFT])
def test_compiled_code_copies_no_cache(one_layer, role: Role) -> None:
    """Inductor writes the recent buffers in place: the generated code allocates nothing of a cache tensor's size."""
    qs = one_layer
    cache = qs.pair.new_cache(1, 4)
    cache.reserve(512)
    cache.length += 300
    cache.quantized_len += 272
    inputs = (torch.ones(1, 1, dtype=torch.long), cache.length[:, None], torch.zeros(1, 1, dtype=torch.long))
    logits, code = torch._inductor.utils.run_and_get_code(
        torch.compile(getattr(qs, role.value).forward, dynamic=False),
        *inputs,
        cache.quantized_len,
        cache.length,
        *cache.inputs(cache_parts(role, qs.pair.device)),
    )
    assert logits.shape == (1, 1, 96)
    op = "decoded_attention" if qs.pair.device.type == "cpu" else "cached_attention"
    assert f"quantspec.{op}" in code[0]
    assert "auto_functionalized" not in code[0]
    slots = cache.layers[0].k_recent.shape[2]
    allocations = [line for line in code[0].splitlines() if "empty_strided" in line and "=" in line]
    assert allocations
    assert not [line for line in allocations if f" {slots}," in line or "uint8" in line]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: compiling prompts for a CPU takes minutes")
def test_an_engines_prompts_are_compiled_once():
    """A prompt of one chunk and one of several; then lengths and numbers of chunks that were not there before."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model("llama", torch.float32, num_hidden_layers=4, hidden_size=256, head_dim=64).cuda()
    options = {"kv_group_size": 16, "weight_group_size": 32, "self_check": False}
    texts = {}
    for compiles in (False, True):
        qs = quantspec.convert(model, compile=compiles, **options)
        with contextlib.closing(Engine(qs, max_sequences=2, max_length=128, max_num_batched_tokens=32)) as engine:
            engine.warm_up()
            before = counters["stats"]["unique_graphs"]
            requests = [Request(_prompt(n)[0].tolist(), 20, (), {"do_sample": False}) for n in LENGTHS]
            texts[compiles] = [[t for o in outputs for t in o.token_ids] for outputs in engine.generate(requests)]
        assert counters["stats"]["unique_graphs"] == before
    assert texts[True] == texts[False]
    assert before > 0
