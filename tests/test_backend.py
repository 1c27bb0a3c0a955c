"""The dynamo backend."""

import pytest
import torch
from tiny_models import tiny_model

from quantspec.kernels.int4_linear import dequantize_int4
from quantspec.passes.int4_weights import WeightQuantizer, quantize_int4


def test_backend_is_listed() -> None:
    """The entry point makes torch.compile know the name."""
    assert "quantspec" in torch._dynamo.list_backends()


@pytest.fixture(scope="module")
def model():
    """A small decoder and its dequantized twin: what INT4 weights should compute."""
    return tiny_model("llama", num_hidden_layers=1)


def _logits(model, ids: torch.Tensor, **compile_options) -> torch.Tensor:
    torch._dynamo.reset()
    compiled = torch.compile(model, **compile_options) if compile_options else model
    with torch.no_grad():
        return compiled(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("group_size", [32, 64])
def test_draft_role_computes_with_torchao_int4_weights(model, group_size: int) -> None:
    """The compiled draft equals the model with its linears replaced by their INT4 round trip."""
    ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(0))
    twin = tiny_model("llama", num_hidden_layers=1)
    for module in twin.modules():
        if isinstance(module, torch.nn.Linear):
            size = max(g for g in (32, 64) if g <= group_size and module.in_features % g == 0)
            coded = quantize_int4(module.weight, size, WeightQuantizer.TINYGEMM)
            module.weight.data = dequantize_int4(*coded, torch.float32)
    options = {"role": "draft", "weight_group_size": group_size, "quantize_lm_head": True}
    ours = _logits(model, ids, backend="quantspec", options=options)
    expected, original = _logits(twin, ids), _logits(model, ids)
    # The CPU kernel multiplies in bfloat16.
    assert (ours - expected).norm() < 0.02 * expected.norm()
    assert (ours - original).norm() > 2 * (ours - expected).norm()


def test_target_role_keeps_the_weights(model) -> None:
    """The target role is the model itself, compiled."""
    ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(0))
    ours = _logits(model, ids, backend="quantspec", options={"role": "target"})
    torch.testing.assert_close(ours, _logits(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"role": "teacher"}, "role must be 'draft' or 'target'"), ({"groups": 3}, "unknown option 'groups'")],
)
def test_bad_options_are_named(model, options: dict, message: str) -> None:
    """A typo in the options is an error that lists the choices."""
    with pytest.raises(Exception, match=message):
        _logits(model, torch.ones(1, 3, dtype=torch.long), backend="quantspec", options=options)
