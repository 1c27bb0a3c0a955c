"""Modules that no export follows, such as loops over the experts that tokens choose, run as they are."""

from __future__ import annotations

import pytest
import torch
from step_by_step import random_prompt
from tiny_models import tiny_model
from torch import nn

import quantspec
from quantspec import UnsupportedModelError
from quantspec.capture import capture
from quantspec.capture.stored import CannotStore, to_json
from quantspec.pair.split import split_capture
from quantspec.passes import Place
from quantspec.passes.called_modules import CalledModule, called_modules

GREEDY = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}


class LoopOverExperts(nn.Module):
    """One of two matrices for each token, by the sign of its first channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, width, width) * 0.1)

    def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Multiply ``(B, T, C)``."""
        flat = hidden.flatten(0, 1)
        out = torch.zeros_like(flat)
        choice = (flat[:, 0] > 0).long()
        for expert in choice.unique().tolist():
            rows = (choice == expert).nonzero()[:, 0]
            out[rows] = scale * flat[rows] @ self.experts[expert]
        return out.view_as(hidden)


class MixesTokens(LoopOverExperts):
    """The experts see the sum of the tokens so far."""

    def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Multiply ``(B, T, C)``."""
        return super().forward(hidden.cumsum(1), scale)


class Narrower(LoopOverExperts):
    """Returns the sum over channels."""

    def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Multiply ``(B, T, C)``."""
        return super().forward(hidden, scale).sum(-1, keepdim=True)


class TakesText(LoopOverExperts):
    """Is given something that is no tensor and no number."""

    def forward(self, hidden: torch.Tensor, scale: object = None) -> torch.Tensor:
        """Multiply ``(B, T, C)``."""
        return super().forward(hidden, 1.0)


def with_experts(kind: type[LoopOverExperts], scale: object = 0.5) -> nn.Module:
    """A llama whose MLPs are followed by such a loop."""
    torch.manual_seed(0)
    model = tiny_model("llama")
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.loop = kind(64)
        forward = mlp.forward
        mlp.forward = lambda hidden, forward=forward, loop=mlp.loop: forward(hidden) + loop(hidden, scale=scale)
    return model


@pytest.fixture(scope="module")
def qs() -> quantspec.QuantSpecModel:
    """A pair of the llama with such loops."""
    return quantspec.convert(with_experts(LoopOverExperts), kv_group_size=16, weight_group_size=32)


def test_text_is_the_models_own_and_the_experts_stay_its_tensors(qs):
    model = qs.model
    ids = torch.tensor([random_prompt(7, 0)])
    for count in (0, 4):
        text = qs.generate(ids, num_speculative_tokens=count, **GREEDY)
        assert text.tolist() == model.generate(ids, **GREEDY).tolist()
    assert qs.last_stats.draft_acceptance_rate > 0
    for graph in qs.pair.graphs.values():
        called = called_modules(graph)
        assert [module.path for module in called] == ["model.layers.0.mlp.loop", "model.layers.1.mlp.loop"]
        for number, module in enumerate(called):
            assert module.module.experts.data_ptr() == model.model.layers[number].mlp.loop.experts.data_ptr()


def test_they_are_reported_in_full_precision(qs):
    notes = {report.name: report for report in qs.linears}
    for layer in range(2):
        report = notes[f"model.layers.{layer}.mlp.loop.experts"]
        assert (report.in_features, report.out_features, report.group_size) == (64, 64, None)
        assert "LoopOverExperts runs as it is" in report.note
    assert "LoopOverExperts runs as it is" in str(qs)


def test_the_model_is_left_as_it_was_and_torch_prints_no_graph(capsys):
    model = with_experts(LoopOverExperts)
    capture(model.train())
    assert all("forward" not in vars(layer.mlp.loop) for layer in model.model.layers)
    assert all(layer.mlp.loop.training for layer in model.model.layers)
    assert capsys.readouterr().err == ""


def test_the_shapes_of_a_model_without_weights_are_captured_too():
    captured = capture(with_experts(LoopOverExperts).to("meta"), structure_only=True)
    assert len(called_modules(captured.graph_module)) == 2


def test_a_module_that_mixes_tokens_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"module 'model\.layers\.0\.mlp\.loop' mixes tokens"):
        quantspec.convert(with_experts(MixesTokens))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Narrower, "not of the shape and dtype of what it is given"),
        (TakesText, "(test_called_modules.py:"),
    ],
)
def test_a_module_of_another_kind_is_refused_by_name(kind, reason):
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.0\.mlp\.loop'") as error:
        quantspec.convert(with_experts(kind, scale=torch.float32 if kind is TakesText else 0.5))
    assert reason in str(error.value)


def test_it_is_not_compiled_nor_stored(qs):
    with pytest.raises(ValueError, match=r"compile=True: model\.layers\.0\.mlp\.loop, .* run as they are"):
        quantspec.convert(with_experts(LoopOverExperts), compile=True)
    with pytest.raises(CannotStore):
        to_json(qs.pair.captured, qs.model)


def test_a_call_keeps_its_keywords_and_its_place(qs):
    first, second = (m for m in qs.pair.captured.graph_module.modules() if isinstance(m, CalledModule))
    x = torch.randn(1, 5, 64)
    assert torch.equal(second(x), qs.model.model.layers[1].mlp.loop(x, 0.5))
    assert not torch.equal(first(x), second(x))


def test_the_draft_around_them_learns_and_they_do_not():
    model = with_experts(LoopOverExperts)
    qs = quantspec.convert(model, kv_group_size=16, weight_group_size=32, self_check=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"window": 48, "train_windows": 16, "held_out_windows": 4, "prompt_tokens": 16, "learning_rate": 3e-3}
    report = qs.tune(steps=8, **options)
    assert report.after.kl < report.before.kl
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_is_not_split_over_ranks(qs):
    with pytest.raises(UnsupportedModelError, match=r"its 'model\.layers\.0\.mlp\.loop' runs as it is"):
        split_capture(qs.pair.captured, qs.model, Place(0, 2, ""))
