"""Single rows of bfloat16 as vectors, on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model

import quantspec
from quantspec.kernels import row_linear
from quantspec.pair import recipes
from quantspec.passes.graph import aten, find_calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 24), (24,), (2, 1, 24), (1, 3, 24), (0, 24)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_row_is_multiplied_as_in_a_matrix(dtype, shape, biased):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in (shape, (40, 24), (40,)))
    y = row_linear(x, weight, bias if biased else None)
    torch.testing.assert_close(y, F.linear(x, weight, bias if biased else None))


@pytest.mark.parametrize(
    ("dtype", "lacks", "count"), [("bfloat16", False, 8), ("bfloat16", True, 0), ("float32", False, 0)]
)
def test_where_a_cpu_multiplies_bfloat16_rows_are_vectors(monkeypatch, dtype, lacks, count):
    """Seven linears of a layer, and the head; the draft's are in INT4."""
    monkeypatch.setattr(recipes, "cpu_lacks_half_matmul", lambda: lacks)
    model = tiny_model("llama", num_hidden_layers=1).to(getattr(torch, dtype))
    qs = quantspec.convert(model, weight_group_size=32, quantize_lm_head=True, self_check=False)
    for graph, found in ((qs.target, count), (qs.draft, 0)):
        assert len(list(find_calls(graph.graph, torch.ops.quantspec.row_linear.default))) == found
    assert len(list(find_calls(qs.target.graph, aten.linear.default))) == 8 - count
    ids = torch.arange(3, 23)[None]
    assert qs.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None).shape == (1, 26)
