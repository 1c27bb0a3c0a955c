"""A pair is its model's: what changes after conversion, and what a folder cannot give back, is noticed and named."""

from __future__ import annotations

import copy
import json
import re
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import GROUP
from safetensors.torch import load_file, save_file
from step_by_step import random_prompt
from tiny_models import tiny_model
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import quantspec
from quantspec import QuantSpecModel, SavedModelError, UnsupportedModelError
from quantspec.capture import capture, check_model
from quantspec.checkpoint import saving
from quantspec.checkpoint.folder import DESCRIPTION_FILE, Description, fingerprints
from quantspec.cli import convert as convert_command

PROMPT = torch.tensor([random_prompt(12)])


def convert(model: nn.Module) -> QuantSpecModel:
    return quantspec.convert(model, kv_group_size=GROUP, self_check=False)


def bf16_accelerator() -> Accelerator:
    """One for autocast to bfloat16, whatever precision an earlier test gave the process: accelerate keeps the first."""
    AcceleratorState._reset_state()
    return Accelerator(cpu=True, mixed_precision="bf16")


def one_layer() -> LlamaForCausalLM:
    return tiny_model("llama", num_hidden_layers=1)


# --- what a conversion froze -----------------------------------------------------------------------------------------


class Counting(LlamaForCausalLM):
    """Changes an attribute of its own whenever it runs."""

    calls = 0

    def forward(self, *args, **options):
        """Count and run."""
        self.calls += 1
        self.model.calls = self.calls
        return super().forward(*args, **options)


@pytest.fixture(scope="module")
def pair() -> QuantSpecModel:
    """A pair of a model that counts its calls and has a hook."""
    config = one_layer().config
    model = Counting(config).eval()
    model.model.calls = 0
    model.model.norm.register_forward_hook(lambda module, args, output: output * 2)
    return quantspec.convert(model, kv_group_size=GROUP)


def _layer(model: nn.Module) -> nn.Module:
    return model.model.layers[0]


def _replace_buffer(model: nn.Module) -> None:
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.clone()


CHANGES: dict[str, tuple[str, Callable]] = {
    "hook": ("a forward hook of module 'lm_head'", lambda m: m.lm_head.register_forward_hook(print)),
    "pre-hook": (
        "a forward pre-hook of module 'model.layers.0'",
        lambda m: _layer(m).register_forward_pre_hook(print),
    ),
    "hook removed": (
        "a forward hook of module 'model.norm'",
        lambda m: m.model.norm._forward_hooks.clear(),
    ),
    "forward": ("the forward of module 'model.layers.0.mlp'", lambda m: setattr(_layer(m).mlp, "forward", print)),
    "model's forward": ("the forward of Counting", lambda m: setattr(m, "forward", print)),
    "class": ("module 'model.norm'", lambda m: setattr(m.model.norm, "__class__", nn.Identity)),
    "buffer": ("buffer 'model.rotary_emb.inv_freq'", _replace_buffer),
    "parameter": ("weight 'lm_head.weight'", lambda m: setattr(m.lm_head, "weight", nn.Parameter(torch.ones(96, 64)))),
    "bias": ("weight 'lm_head.bias'", lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.ones(96)))),
    "module": ("module 'model.layers.0.mlp.act_fn'", lambda m: setattr(_layer(m).mlp, "act_fn", nn.ReLU())),
    "layer": ("weight 'model.layers.1.", lambda m: m.model.layers.append(copy.deepcopy(_layer(m)))),
    "number": (
        "attribute 'model.layers.0.self_attn.scaling'",
        lambda m: setattr(_layer(m).self_attn, "scaling", 1.0),
    ),
    "option": ("option 'rms_norm_eps' in the config", lambda m: setattr(m.config, "rms_norm_eps", 0.5)),
    "option in place": (
        "option 'rope_parameters' in the config",
        lambda m: m.config.rope_parameters.update(rope_theta=5.0),
    ),
    "option removed": ("option 'attention_bias' in the config", lambda m: delattr(m.config, "attention_bias")),
    "prepared": ("the forward of Counting", lambda m: bf16_accelerator().prepare(m)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_conversion_is_refused(pair, name):
    """By every use of the pair, by the name of what changed."""
    expected, change = CHANGES[name]
    changed = copy.deepcopy(pair)
    changed.pair.check_unmoved()
    change(changed.model)
    message = f"^{re.escape(expected)}.* of the model was replaced after conversion; convert it again$"
    with pytest.raises(ValueError, match=message):
        changed.generate(PROMPT, max_new_tokens=2)
    pair.pair.check_unmoved()


def test_a_class_patched_after_conversion_is_refused(pair):
    with (
        mock.patch.object(LlamaMLP, "forward", lambda self, x: x),
        pytest.raises(ValueError, match=r"the forward of module 'model\.layers\.0\.mlp' of the model was replaced"),
    ):
        pair.pair.check_unmoved()
    pair.pair.check_unmoved()


def test_what_a_graph_does_not_hold_may_change(pair):
    """Modes, configs of generation, a generate of one's own, a compiled forward, weights in place, counted calls.

    Checkpointing, too, with its hook on the embeddings.
    """
    changed = copy.deepcopy(pair)
    model = changed.model
    model.train()
    model.generation_config = copy.deepcopy(model.generation_config)
    model.config.pad_token_id = 5
    model.config.use_cache = False
    model.config.architectures = ["Another"]
    model.gradient_checkpointing_enable()
    model.generate = print
    model.anything = print
    model.forward = torch.compile(model.forward)
    model.to("cpu").float().requires_grad_(False)
    model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()})
    changed.pair.check_unmoved()
    del model.forward, model.generate
    # transformers records by hooks, which stay.
    model.eval()(PROMPT, output_hidden_states=True, output_attentions=True)
    changed.pair.check_unmoved()
    calls = model.calls
    model(PROMPT)
    assert model.calls == calls + 1
    assert changed.generate(PROMPT, max_new_tokens=2).shape == (1, 14)


# --- adapters, wrappers and mixed precision --------------------------------------------------------------------------


def test_adapters_are_to_be_merged():
    """Whatever state they are in, since it can change at any time."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(one_layer(), config)
    with pytest.raises(TypeError, match=r"not PeftModelForCausalLM; merge the adapter .* merge_and_unload\(\)"):
        quantspec.convert(wrapped)
    for merge in (False, True):
        if merge:
            wrapped.merge_adapter()
        with pytest.raises(
            UnsupportedModelError, match=r"'model\.layers\.0\.self_attn\.q_proj' .* merge_and_unload\(\)"
        ):
            quantspec.convert(wrapped.get_base_model())
    check_model(wrapped.merge_and_unload())


@pytest.mark.parametrize(("wrap", "attribute"), [(nn.DataParallel, "module"), (torch.compile, "_orig_mod")])
def test_wrappers_name_the_model_inside(wrap, attribute):
    with pytest.raises(TypeError, match=f"pass the model that it wraps, its attribute '{attribute}'"):
        quantspec.convert(wrap(one_layer()))


def test_a_forward_under_autocast_is_refused_by_that_reason():
    """The whole model's, as accelerate makes it, and a module's; unwrapped it converts."""
    accelerator = bf16_accelerator()
    model = accelerator.prepare(one_layer())
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaForCausalLM: .* under autocast to torch\.bfloat16.*unwrap_model"
    ):
        capture(model)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    forward = _layer(model).mlp.forward
    _layer(model).mlp.forward = torch.autocast("cpu", torch.bfloat16)(forward)
    with pytest.raises(
        UnsupportedModelError, match=r"module 'model\.layers\.0\.mlp' .* under autocast to torch\.bfloat16"
    ):
        capture(model)
    del _layer(model).mlp.forward
    assert len(capture(model).layers) == 1


# --- what a folder can give back -------------------------------------------------------------------------------------


class Negated(LlamaForCausalLM):
    """A user's class."""

    def forward(self, *args, **options):
        """Answer the opposite."""
        out = super().forward(*args, **options)
        out.logits = -out.logits
        return out


def _as_negated(model: nn.Module) -> nn.Module:
    model.__class__ = Negated
    return model


def _with_hook(model: nn.Module) -> nn.Module:
    model.model.norm.register_forward_hook(lambda module, args, output: output + 1)
    return model


def _with_forward(model: nn.Module) -> nn.Module:
    model.forward = types.MethodType(_negated_forward, model)
    return model


def _negated_forward(self, *args, **options):
    out = LlamaForCausalLM.forward(self, *args, **options)
    out.logits = -out.logits
    return out


def _with_relu(model: nn.Module) -> nn.Module:
    _layer(model).mlp.act_fn = nn.ReLU()
    return model


def _with_bias(model: nn.Module) -> nn.Module:
    model.lm_head.bias = nn.Parameter(torch.ones(96))
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_as_negated, "class Negated is not one that transformers loads by that name.*register"),
        (_with_hook, "computes other logits.*hooks, a patched forward and replaced modules are not saved"),
        (_with_forward, "computes other logits"),
        (_with_relu, "computes other logits"),
        (_with_bias, r"does not have the weights .* by its config, .*\(lm_head\.bias\)"),
    ],
)
def test_what_would_be_loaded_as_another_model_is_not_saved(change, message, tmp_path):
    qs = convert(change(one_layer()))
    with pytest.raises(SavedModelError, match=message):
        qs.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def plain() -> QuantSpecModel:
    return convert(one_layer())


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    plain.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_model_changed_after_conversion_does_not_replace_its_save(plain, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    changed = copy.deepcopy(plain)
    changed.model.resize_token_embeddings(120)
    with pytest.raises(SavedModelError, match=r"the pair is no longer the model's: weight .* was replaced"):
        changed.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_class_that_computes_something_else_is_not_loaded(folder):
    """Patched in the process that loads, or changed by another version; the loaded graphs are compared."""
    with (
        mock.patch.object(
            LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) - self.up_proj(x))
        ),
        pytest.raises(SavedModelError, match="computes other logits than the saved LlamaForCausalLM did"),
    ):
        quantspec.from_pretrained(folder, self_check=False)
    assert quantspec.from_pretrained(folder, dtype="bfloat16", max_cache_len=5).model.dtype == torch.bfloat16


def test_changed_weights_are_not_loaded_whatever_is_verified(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"] = -weights["model.embed_tokens.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(SavedModelError, match="was changed since it was saved"):
        quantspec.from_pretrained(folder)
    with pytest.raises(SavedModelError, match="computes other logits"):
        quantspec.from_pretrained(folder, verify=False, self_check=False)


def _edit_description(folder: Path, **changes) -> None:
    path = folder / DESCRIPTION_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_class_is_not_loaded_in_place_of_the_saved(folder):
    _edit_description(folder, model_class="Negated")
    with pytest.raises(SavedModelError, match="was saved as Negated and is loaded as LlamaForCausalLM: register"):
        quantspec.from_pretrained(folder)


@pytest.mark.parametrize("name", [None, 3])
def test_a_class_that_has_no_name_is_damage(folder, name):
    _edit_description(folder, model_class=name)
    with pytest.raises(SavedModelError, match="is no name of a class"):
        quantspec.from_pretrained(folder)


def test_a_folder_without_logits_loads(folder, plain):
    """As it was saved before they were compared."""
    path = folder / "quantspec.safetensors"
    tensors = load_file(path)
    assert {name for name in tensors if name.startswith("check.")} == {"check.input_ids", "check.logits"}
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("check.")}, path)
    files = fingerprints(folder, Description.read(folder).files)
    _edit_description(folder, files={name: vars(found) for name, found in files.items()})
    loaded = quantspec.from_pretrained(folder)
    assert torch.equal(loaded.generate(PROMPT, max_new_tokens=4), plain.generate(PROMPT, max_new_tokens=4))


def test_generation_config_may_be_edited(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 3, "eos_token_id": None}))
    assert quantspec.from_pretrained(folder).generate(PROMPT).shape == (1, 15)
    path.write_text("{")
    with pytest.raises(SavedModelError, match=r"generation_config\.json' cannot be read: .*; correct it"):
        quantspec.from_pretrained(folder)


class OwnConfig(LlamaConfig):
    """Of a class that is registered."""

    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    """Registered with transformers' auto classes."""

    config_class = OwnConfig
    forward = _negated_forward


def test_a_registered_class_comes_back(tmp_path):
    AutoConfig.register("own_llama", OwnConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, OwnModel, exist_ok=True)
    config = OwnConfig(**{key: value for key, value in one_layer().config.to_dict().items() if key != "model_type"})
    qs = convert(OwnModel(config).eval())
    qs.save_pretrained(tmp_path)
    loaded = quantspec.from_pretrained(tmp_path)
    assert type(loaded.model) is OwnModel
    assert torch.equal(loaded.generate(PROMPT, max_new_tokens=4), qs.generate(PROMPT, max_new_tokens=4))


# --- left-overs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=repr)
def test_a_failed_save_leaves_no_folder(plain, tmp_path, monkeypatch, error):
    """Nor those above it that it made."""
    monkeypatch.setattr(saving, "save_torch_state_dict", mock.Mock(side_effect=error))
    with pytest.raises((SavedModelError, KeyboardInterrupt)):
        plain.save_pretrained(tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises((SavedModelError, KeyboardInterrupt)):
        plain.save_pretrained(tmp_path / "mine" / "new")
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


@pytest.mark.parametrize("error", [ValueError("cannot convert"), KeyboardInterrupt()], ids=repr)
def test_a_failed_convert_command_leaves_no_folder(run, saved_model, tmp_path, monkeypatch, error):
    monkeypatch.setattr(convert_command, "find_pair", mock.Mock(side_effect=error))
    status, _, _ = run("convert", saved_model, tmp_path / "a" / "b")
    assert status != 0
    assert list(tmp_path.iterdir()) == []


def _without_weights_of_their_own(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def _by_torchao(model):
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith("q_proj"))
    return model


@pytest.mark.parametrize("quantized", [_by_torchao, _without_weights_of_their_own])
def test_quantized_weights_are_refused_by_name(quantized):
    model = quantized(tiny_model("llama"))
    with pytest.raises(UnsupportedModelError, match=r"'model.layers.0.self_attn.q_proj.*not quantized: the draft's"):
        convert(model)


def test_weights_that_several_processes_hold_are_refused():
    model = tiny_model("llama")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UnsupportedModelError, match=r"'model.embed_tokens.weight' .* is split over processes"):
            convert(model)
    finally:
        dist.destroy_process_group()


def test_a_model_of_two_dtypes_that_cannot_run_is_refused_by_its_module():
    model = tiny_model("llama")
    model.model.layers[1].mlp.half()
    with pytest.raises(UnsupportedModelError, match=r"'model.layers.1.mlp.gate_proj'.*float16 and torch.float32: load"):
        convert(model)


def test_a_pair_is_not_converted_again():
    qs = convert(tiny_model("llama"))
    with pytest.raises(TypeError, match="this one is converted already; its attribute 'model'"):
        convert(qs)


def test_a_draft_without_int4_weights_is_warned_of(caplog):
    width = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **width))
    with caplog.at_level("WARNING"):
        convert(model.eval())
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("quantspec")]
    assert re.match(r"no linear of the draft has INT4 weights, .*\('model.layers.0.self_attn.q_proj' first\)", said)
    assert len(said) < 300
