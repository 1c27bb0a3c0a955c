"""Every op on a CUDA device: registration, torch.compile, and CUDA graphs whose lengths change on the device."""

from __future__ import annotations

import pytest
import torch
from test_ops import OP_CASES
from torch import Tensor
from torch.utils._pytree import tree_map_only

from quantspec import kernels
from quantspec.kernels.cache_op import CacheOp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# One case of each op, and of both reads of the cache.
COMPILED_CASES = [name for name in OP_CASES if "/" not in name or "64/64 plain" in name or name.startswith("flush 64")]


def on_device(args: tuple) -> tuple:
    """Fresh copies on the device, 32-bit floats in half precision, as models have them there."""

    def moved(x: Tensor) -> Tensor:
        return x.to("cuda", torch.float16 if x.dtype == torch.float32 else x.dtype, copy=True)

    return tree_map_only(Tensor, moved, args)


def assert_equal_results(ours, expected, our_args: tuple, expected_args: tuple) -> None:
    """Equal outputs and equal arguments after the calls, bit for bit."""
    pairs = [(ours, expected), *zip(our_args, expected_args, strict=True)]
    for a, b in pairs:
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", OP_CASES)
def test_opcheck(name: str) -> None:
    op, args = OP_CASES[name]
    assert set(torch.library.opcheck(op.overload if isinstance(op, CacheOp) else op, on_device(args)).values()) == {
        "SUCCESS"
    }


@pytest.mark.parametrize("name", COMPILED_CASES)
def test_compiles_without_graph_break_or_copy_of_the_cache(name: str) -> None:
    op, args = OP_CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: op(*inputs), fullgraph=True, dynamic=False)
    ours, theirs = on_device(args), on_device(args)
    result, code = torch._inductor.utils.run_and_get_code(compiled, *ours)
    assert_equal_results(result, op(*theirs), ours, theirs)
    assert "auto_functionalized" not in code[0]
    written = [arg.alias_info is not None and arg.alias_info.is_write for arg in op._opoverload._schema.arguments]
    # Arguments that are left out stand last.
    for arg, is_written in zip(ours, written, strict=False):
        if is_written and isinstance(arg, Tensor):
            assert f"({', '.join(map(str, arg.shape))})" not in "".join(
                line for line in code[0].splitlines(keepends=True) if "empty_strided" in line
            )


@pytest.mark.parametrize("name", ["cached_attention target 64/64 plain", "cached_attention draft 64/64 plain"])
def test_one_graph_attends_and_flushes_at_every_length(name: str) -> None:
    """A captured step, the flush it may make due, and eager calls at the same lengths end in the same bits."""
    args = on_device(OP_CASES[name][1])
    target = on_device(OP_CASES[name.replace("draft", "target")][1])
    # A draft has no lower planes, a flush writes them.
    planes = [target[3 + i] if arg is None else arg for i, arg in enumerate(args[3:13])]
    quantized, length = args[13:15]

    def step() -> Tensor:
        out = kernels.cached_attention(*args)
        kernels.flush(*planes, quantized, length)
        return out

    state = [x.clone() for x in planes]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    group = 2 * planes[2].shape[3]
    for lengths in ([group, 0], [2 * group, 0], [0, group + 7], [3 * group, 2 * group + 1]):
        now = torch.tensor(lengths, device="cuda")
        quantized.copy_(torch.where(now >= 2 * group, group * (now // group - 2), 0))
        length.copy_(now)
        results = []
        for run in (graph.replay, step):
            for x, y in zip(planes, state, strict=True):
                x.copy_(y)
            out = run()
            results.append([x.clone() for x in (captured if out is None else out, *planes)])
        for replayed, eager in zip(*results, strict=True):
            torch.testing.assert_close(replayed, eager, rtol=0, atol=0, equal_nan=True)


def test_one_graph_multiplies_whatever_its_input_holds() -> None:
    qdata = torch.randint(0, 256, (256, 128), dtype=torch.uint8)
    x, qdata, params = on_device((torch.randn(4, 256), qdata, torch.randn(2, 256, 2) / 64))

    def step() -> Tensor:
        return kernels.int4_linear(kernels.int4_linear(x, qdata, params, None), qdata, params, None)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        x.normal_()
        graph.replay()
        torch.testing.assert_close(captured, step(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["expert_linear", "expert_linear transposed", "int4_expert_linear"])
def test_one_graph_serves_every_choice_of_experts(name: str) -> None:
    op, args = OP_CASES[name]
    args = on_device(args)
    ids, num_experts = args[1], args[2].shape[0]
    op(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*args)
    for _ in range(3):
        ids.random_(num_experts)
        graph.replay()
        torch.testing.assert_close(captured, op(*args), rtol=0, atol=0)
