"""The dynamo backend."""

import dataclasses
import gc
import re
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model
from torch import Tensor, nn

from quantspec import backend
from quantspec.kernels.int4_linear import dequantize_int4
from quantspec.passes.int4_weights import INT4, WeightQuantizer, quantize_int4
from quantspec.passes.weight_formats import WeightFormat


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


OPTIONS = {"role": "draft", "weight_group_size": 32}
ROWS = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


class Mlp(torch.nn.Module):
    """Two linears, of which the last is taken for the language-model head, and a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = torch.nn.Linear(64, 96)
        self.head = torch.nn.Linear(96, 32)
        self.dropout = torch.nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, 64)`` to ``(N, 32)``."""
        return self.head(self.dropout(torch.relu(self.up(x) * self.scale)))


def _compiled(model: torch.nn.Module, **options) -> Callable:
    return torch.compile(model, backend="quantspec", options={**OPTIONS, **options})


@torch.no_grad()
def _assert_own_int4_weights(compiled: Callable, model: Mlp) -> None:
    """The compiled draft is this model with the first linear's weight rounded to INT4."""
    weight = dequantize_int4(*quantize_int4(model.up.weight, 32, WeightQuantizer.TINYGEMM), torch.float32)
    expected = model.head(torch.relu(torch.nn.functional.linear(ROWS, weight, model.up.bias) * model.scale))
    # The CPU kernel multiplies in bfloat16.
    assert (compiled(ROWS) - expected).norm() < 0.02 * expected.norm()


@pytest.fixture
def mlps() -> list[Mlp]:
    torch._dynamo.reset()
    return [Mlp(seed).eval() for seed in range(3)]


def test_models_of_one_class_have_weights_of_their_own(mlps) -> None:
    compiled = [_compiled(model) for model in mlps]
    for _ in range(2):
        for function, model in zip(compiled, mlps, strict=True):
            _assert_own_int4_weights(function, model)


def test_weights_that_change_are_quantized_again(mlps) -> None:
    """Replaced, loaded with assign=True, loaded and changed in place, and given other data; buffers too."""
    model, *others = mlps
    compiled = _compiled(model)
    _assert_own_int4_weights(compiled, model)
    model.up.weight = torch.nn.Parameter(others[0].up.weight.detach().clone())
    _assert_own_int4_weights(compiled, model)
    model.load_state_dict(others[1].state_dict(), assign=True)
    _assert_own_int4_weights(compiled, model)
    model.load_state_dict(others[0].state_dict())
    _assert_own_int4_weights(compiled, model)
    with torch.no_grad():
        model.up.weight.mul_(-2)
    _assert_own_int4_weights(compiled, model)
    model.up.weight.data = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    _assert_own_int4_weights(compiled, model)
    model.scale = torch.tensor(3.0)
    _assert_own_int4_weights(compiled, model)


def test_weights_are_quantized_once_per_model(mlps, monkeypatch) -> None:
    quantized = []
    counting = dataclasses.replace(INT4, pack=lambda *a: quantized.append(a) or INT4.pack(*a))
    monkeypatch.setattr(backend, "INT4", counting)
    compiled = [_compiled(model) for model in mlps]
    with torch.no_grad():
        for function in compiled * 3:
            function(ROWS)
    assert len(quantized) == len(mlps)


def test_models_are_freed(mlps, monkeypatch) -> None:
    """The INT4 weights of a model go with it."""
    packed, pack = [], WeightFormat.packed

    def note(*arguments):
        tensors = pack(*arguments)
        packed.append(weakref.ref(tensors[0]))
        return tensors

    monkeypatch.setattr(WeightFormat, "packed", note)
    monkeypatch.setattr(backend, "INT4", dataclasses.replace(INT4, layouts=()))
    with torch.no_grad():
        for model in mlps:
            _compiled(model)(ROWS)
    assert [tensor() is not None for tensor in packed] == [True] * 3
    parameter = weakref.ref(mlps.pop().up.weight)
    del model
    gc.collect()
    assert parameter() is None
    assert [tensor() is not None for tensor in packed] == [True, True, False]


def test_a_draft_without_int4_weights_warns(mlps) -> None:
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="no linear of this graph INT4 weights.*quantize_lm_head=True"),
    ):
        _compiled(mlps[0].up)(ROWS)
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _compiled(mlps[0].up, quantize_lm_head=True)(ROWS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_group_size": 32}, "no use for option 'kv_group_size' in role 'draft'; it takes role, weight_group_size"),
        ({"num_assistant_tokens": 3}, "no use for option 'num_assistant_tokens'"),
        ({"role": "target"}, "no use for option 'weight_group_size' in role 'target'; it takes role$"),
    ],
    ids=str,
)
def test_options_without_use_are_named(mlps, options: dict, message: str) -> None:
    with torch.no_grad(), pytest.raises(Exception, match=re.compile(message, re.MULTILINE)):
        _compiled(mlps[0], **options)(ROWS)


def test_training_is_refused(mlps) -> None:
    with pytest.raises(Exception, match="no gradients: call the compiled model under"):
        _compiled(mlps[0])(ROWS)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match=r"dropout .* runs as in training: call model\.eval\(\)"):
        _compiled(mlps[0].train())(ROWS)


class Attends(nn.Module):
    """Attention that drops weights in training, as Hugging Face's does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(64, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        q = self.qkv(x)
        return self.head(F.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if self.training else 0.0))


def test_dropout_of_attention_is_training_too() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 4, 64)
    with torch.no_grad(), pytest.raises(Exception, match=r"scaled_dot_product_attention .* runs as in training"):
        _compiled(Attends().train())(x)
    torch._dynamo.reset()
    with torch.no_grad():
        assert _compiled(Attends().eval())(x).shape == (2, 4, 16)


def test_a_mode_is_refused(mlps) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(mlps[0], backend="quantspec", mode="max-autotune")
    with (
        torch.no_grad(),
        pytest.raises(Exception, match="no use for mode='max-autotune': leave it out"),
    ):
        compiled(ROWS)


@pytest.mark.parametrize("rows", [3, 8, 40])
def test_widths_that_the_cpu_pads(rows: int) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, rows, bias=False), nn.ReLU(), nn.Linear(rows, 10)).eval()
    x = torch.randn(2, 64)
    with torch.no_grad():
        compiled = _compiled(model, quantize_lm_head=True)
        assert (compiled(x) - model(x)).norm() < 0.2 * model(x).norm()
        assert compiled(torch.cat([x, x, x])).shape == (6, 10)


class Transposes(nn.Module):
    """A linear over the columns of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.mixes, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mixes(x.transpose(-1, -2))))


@pytest.mark.parametrize("shape", [(64, 5), (2, 64, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_that_are_not_contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model, x = Transposes().eval().to(dtype), torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        assert (_compiled(model)(x) - model(x)).norm() < 0.2 * model(x).norm()
