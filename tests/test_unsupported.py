"""Models that would decode wrongly are refused by name, and no conversion leaves a trace on the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import LlamaForCausalLM
from unsupported_models import UNSUPPORTED

from quantspec import UnsupportedModelError, convert
from quantspec.capture import IMPLEMENTATION, capture, check_head_dims
from quantspec.kernels.stretches_triton import DeviceLimits


def state(model: nn.Module) -> dict[str, tuple]:
    """What a capture touches: every module's config object and its choices, mode, hooks and tensors."""
    snapshot = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        choices = [getattr(config, key, None) for key in ("_attn_implementation", "_experts_implementation")]
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        tensors = [t.data_ptr() for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
        snapshot[name] = (id(config), str(config), choices, module.training, hooks, tensors)
    return snapshot


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_refused_with_the_module_and_the_reason(name):
    refused = UNSUPPORTED[name]
    model = refused.build()
    model.train()
    before = state(model)
    with pytest.raises(UnsupportedModelError) as error:
        convert(model)
    message = str(error.value)
    assert refused.reason in message
    assert refused.names in message
    assert state(model) == before


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "llama", None])
def test_what_is_no_transformers_model_is_a_type_error(thing):
    with pytest.raises(TypeError, match=f"PreTrainedModel.*not {type(thing).__name__}"):
        convert(thing)


def test_a_pointwise_convolution_is_no_state():
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    pointwise = mlp.pointwise = nn.Conv1d(64, 64, 1)
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(pointwise(hidden.transpose(1, 2)).transpose(1, 2))
    assert len(convert(model, kv_group_size=16).layers) == 2


def test_a_convolution_that_the_text_does_not_reach_is_no_state():
    model = tiny_model("llama")
    model.vision_tower = nn.Conv2d(3, 8, 4)
    assert len(capture(model).layers) == 2


@pytest.mark.parametrize("training", [False, True])
def test_a_successful_conversion_leaves_the_model_as_it_was(training):
    model = tiny_model("gemma2").train(training)
    model.model.layers[0].train(not training)
    before = state(model)
    convert(model, kv_group_size=16)
    assert state(model) == before


def test_two_models_may_share_one_config_object():
    first = tiny_model("mixtral")
    second = type(first)(first.config).eval()
    assert second.config is first.config
    before = state(first), state(second)
    convert(first, kv_group_size=16, self_check=False)
    assert (state(first), state(second)) == before
    # The other model still attends by itself.
    logits = second(torch.tensor([[3, 4, 5]])).logits
    assert not logits.isnan().any()


def test_a_failed_capture_leaves_a_shared_config_as_it_was():
    first = UNSUPPORTED["causal conv"].build()
    second = LlamaForCausalLM(first.config)
    before = state(first), state(second)
    with pytest.raises(UnsupportedModelError):
        convert(first)
    assert (state(first), state(second)) == before


def test_the_captures_attention_does_not_run_outside_a_capture():
    model = tiny_model("llama")
    capture(model)
    model.set_attn_implementation(IMPLEMENTATION)
    with pytest.raises(RuntimeError, match="for quantspec's capture only"):
        model(torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize(
    ("shared", "dtype", "most"),
    [(228, torch.float32, 512), (164, torch.float32, 256), (100, torch.float32, 128), (100, torch.bfloat16, 512)],
)
def test_heads_that_a_gpu_does_not_decode_are_refused_by_module(monkeypatch, shared, dtype, most):
    """By the shared memory of its multiprocessors, in KB."""
    limits = DeviceLimits(100, shared * 1024, multiplies_64_rows=False)
    monkeypatch.setattr("quantspec.capture.checks.device_limits", lambda device: limits)
    (layer, *_) = capture(tiny_model("llama")).layers
    allowed, too_wide = (replace(layer, key_dim=dim, value_dim=dim) for dim in (most, most + 16))
    check_head_dims([allowed], torch.device("cuda"), dtype)
    check_head_dims([too_wide], torch.device("cpu"), dtype)
    with pytest.raises(UnsupportedModelError, match=rf"self_attn': it has heads of {most + 16} dims"):
        check_head_dims([too_wide], torch.device("cuda"), dtype)
