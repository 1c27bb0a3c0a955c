"""Layers that are alike are traced once, and the graph is that of a trace of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar
from unittest import mock

import pytest
from tiny_models import tiny_model
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from quantspec.capture import Capture, capture, converting, repeated
from quantspec.passes.graph import get_tensor, module_path
from quantspec.passes.repeated_layers import LostLayerError, RepeatLayers, moved


def captured(model: nn.Module) -> Capture:
    with converting():
        return capture(model)


def captured_layer_by_layer(model: nn.Module) -> Capture:
    with mock.patch.object(repeated, "_layers", return_value=()):
        return captured(model)


def described(found: Capture) -> list[tuple]:
    """Every call of the graph, with the model's tensors that it reads told by what they are."""
    names: dict[fx.Node, object] = {}
    rows = []
    for node in found.graph_module.graph.nodes:
        if node.op == "get_attr":
            tensor = get_tensor(found.graph_module, node)
            names[node] = id(tensor) if isinstance(tensor, nn.Parameter) else tensor.tolist()
        elif node.op == "placeholder":
            names[node] = node.name
        elif node.op == "call_function":
            names[node] = f"call {len(rows)}"
            value = node.meta.get("val")
            look = (value.dtype, str(tuple(value.shape))) if isinstance(value, Tensor) else str(value)
            arguments = fx.node.map_aggregate(
                (node.args, node.kwargs), lambda one: names[one] if isinstance(one, fx.Node) else one
            )
            rows.append((str(node.target), str(arguments), look, module_path(node)))
    return rows


def traced_layers(kind: type[nn.Module], convert: Callable[[], object]) -> int:
    """How many forwards of ``kind`` an export follows in ``convert``."""
    count = 0
    forward = kind.forward

    def counted(self: nn.Module, *args: object, **kwargs: object) -> object:
        nonlocal count
        count += get_proxy_mode() is not None
        return forward(self, *args, **kwargs)

    with mock.patch.object(kind, "forward", counted):
        convert()
    return count


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"num_hidden_layers": 4}),
        ("gemma2", {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("qwen3_moe", {"num_hidden_layers": 3}),
        ("gpt2", {}),
    ],
)
def test_the_graph_is_that_of_every_layer_traced(architecture, options):
    model = tiny_model(architecture, **options)
    together, apart = captured(model), captured_layer_by_layer(model)
    assert described(together) == described(apart)
    assert together.layers == apart.layers


def test_one_of_four_layers_is_traced_and_the_model_is_left_as_it_was():
    model = tiny_model("llama", num_hidden_layers=4)
    assert traced_layers(LlamaDecoderLayer, lambda: captured(model)) == 1
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert not any("forward" in vars(layer) for layer in model.model.layers)


class ScalesByNumber(LlamaDecoderLayer):
    """Reads which layer it is."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Multiply by the number of the layer."""
        out = super().forward(hidden_states, *args, **kwargs)
        return out * (1 + 0.5 * self.self_attn.layer_idx)


class ScalesByAttribute(LlamaDecoderLayer):
    """Has a number of its own."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Multiply by it."""
        return super().forward(hidden_states, *args, **kwargs) * self.factor


class ScalesInPlace(LlamaDecoderLayer):
    """Writes into what it is given, which the residual of the next layer sees."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Double the input and its result."""
        hidden_states = hidden_states.clone()
        hidden_states.mul_(1.5)
        return super().forward(hidden_states, *args, **kwargs)


class HandsOn(LlamaDecoderLayer):
    """Adds what the layer before it wrote into an argument."""

    handed: ClassVar[dict[str, Tensor]] = {}

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """Give every layer the same dict."""
        return super().__call__(*args, handed=self.handed, **kwargs)

    def forward(self, hidden_states: Tensor, *args: object, handed: dict, **kwargs: object) -> Tensor:
        """Add the layer's input of before."""
        out = super().forward(hidden_states, *args, **kwargs)
        if not self.first:
            out = out + 0.3 * handed["before"]
        handed["before"] = hidden_states
        return out


@pytest.mark.parametrize("kind", [ScalesByNumber, ScalesByAttribute, ScalesInPlace, HandsOn])
def test_layers_that_differ_are_told_apart(kind):
    model = tiny_model("llama", num_hidden_layers=3)
    for number, layer in enumerate(model.model.layers):
        layer.__class__ = kind
        layer.first = number == 0
        layer.factor = 1.0 + number % 2
    assert described(captured(model)) == described(captured_layer_by_layer(model))


def test_a_module_that_stands_twice_reads_its_tensors_twice():
    model = tiny_model("llama", num_hidden_layers=3)
    model.model.layers[2] = model.model.layers[0]
    before = dict(model.named_parameters())
    together, apart = described(captured(model)), described(captured_layer_by_layer(model))
    # An export has names of its own for where such a module stands.
    assert [row[:-1] for row in together] == [row[:-1] for row in apart]
    assert all(before[name] is tensor for name, tensor in model.named_parameters())


def _in_two_lists(model: nn.Module) -> None:
    model.model.others = nn.ModuleList(model.model.layers[:2])


class Around(nn.Module):
    """Calls a layer that a list of its own holds, too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """What the layer makes."""
        return self.layer(*args, **kwargs)


def _in_layers_of_another_list(model: nn.Module) -> None:
    model.model.inner = model.model.layers
    model.model.layers = nn.ModuleList(map(Around, model.model.inner))


@pytest.mark.parametrize("change", [_in_two_lists, _in_layers_of_another_list])
def test_layers_that_stand_in_two_lists(change):
    model = tiny_model("llama", num_hidden_layers=3)
    change(model)
    assert traced_layers(LlamaDecoderLayer, lambda: captured(model)) == 1
    assert not any("forward" in vars(module) for module in model.modules())
    together, apart = described(captured(model)), described(captured_layer_by_layer(model))
    # An export has names of its own for where such a module stands.
    assert [row[:-1] for row in together] == [row[:-1] for row in apart]


def test_a_path_is_moved_by_whole_names():
    assert moved("model.layers.1.self_attn", "model.layers.1", "model.layers.3") == "model.layers.3.self_attn"
    assert moved("model.layers.10.self_attn", "model.layers.1", "model.layers.3") == "model.layers.10.self_attn"


def test_where_the_export_loses_nodes_every_layer_is_traced():
    model = tiny_model("llama", num_hidden_layers=3)
    with mock.patch.object(RepeatLayers, "call", side_effect=LostLayerError("model.layers.0")):
        found = captured(model)
    assert described(found) == described(captured_layer_by_layer(model))
