"""A capture is kept for later processes, and taken from there only where it would come out the same."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import GROUP
from repeats import repeat
from step_by_step import random_prompt
from tiny_models import tiny_model
from torch import nn
from transformers.generation import stopping_criteria
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama
from transformers.utils import ModelOutput

import quantspec
from quantspec.capture import IMPLEMENTATION, Capture, capture, kept
from quantspec.capture.interfaces import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_EXPERTS_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
)
from quantspec.capture.running_code import CannotTell, running_code

_PROCESS = """
import sys
from unittest import mock
sys.path.insert(0, {tests!r})
import torch
from tiny_models import tiny_model
import quantspec
from quantspec.capture import export
from quantspec.pair import pair
with mock.patch.object(pair, "capture", wraps=export.capture) as captures:
    qs = quantspec.convert(tiny_model("llama"), kv_group_size=16, self_check=False)
text = qs.generate(torch.tensor([{prompt}]), max_new_tokens=12, do_sample=False)
print([captures.call_count, text[0].tolist()])
"""
PROMPT = random_prompt(2 * GROUP + 8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QUANTSPEC_CACHE", str(tmp_path))
    return tmp_path / "captures"


@pytest.fixture(scope="module")
def captured_once(tmp_path_factory) -> Path:
    """A folder that keeps the capture of a tiny llama."""
    path = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTSPEC_CACHE", str(path))
        kept.kept_or_captured(tiny_model("llama"), None, capture)
    return path / "captures"


@pytest.fixture
def llama_is_kept(folder, captured_once) -> None:
    shutil.copytree(captured_once, folder)


@functools.cache
def llamas_capture() -> Capture:
    return capture(tiny_model("llama"))


def captures_of(model) -> int:
    """How often ``model`` was to be captured; a llama's capture stands in for its own, which takes seconds."""
    captures = mock.Mock(return_value=llamas_capture())
    kept.kept_or_captured(model, None, captures)
    return captures.call_count


def process(folder: Path, seed: int = 0) -> subprocess.Popen:
    """A process that converts the model and prints how often it captured, and a text."""
    code = _PROCESS.format(tests=str(Path(__file__).parent), prompt=PROMPT)
    env = os.environ | {"QUANTSPEC_CACHE": str(folder), "PYTHONHASHSEED": str(seed)}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


def printed(running: subprocess.Popen) -> list:
    out, _ = running.communicate()
    assert running.returncode == 0
    return json.loads(out.splitlines()[-1])


def test_later_processes_take_what_one_of_two_at_once_kept(tmp_path, folder):
    (_, text), (_, same) = [printed(one) for one in [process(tmp_path, seed) for seed in (1, 2)]]
    assert same == text
    assert len(list(folder.iterdir())) == 1
    assert printed(process(tmp_path, 3)) == [0, text]


def converted(model, **options) -> tuple[int, quantspec.QuantSpecModel]:
    """How often a conversion captured ``model``, and the pair."""
    with mock.patch("quantspec.pair.pair.capture", wraps=capture) as captures:
        qs = quantspec.convert(model, kv_group_size=GROUP, **{"self_check": False, **options})
    return captures.call_count, qs


@pytest.mark.parametrize("architecture", ["gpt2", repeat("gemma2"), "gpt_oss", "lfm2"])
def test_a_second_conversion_gives_the_same_logits(architecture):
    _, first = converted(tiny_model(architecture))
    captures, second = converted(tiny_model(architecture))
    assert captures == 0
    assert second.layers == first.layers
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for ours, theirs in zip(first.generate(ids, **options).logits, second.generate(ids, **options).logits, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("architecture", ["lfm2", repeat("qwen3_next")])
def test_a_process_that_makes_no_capture_runs_hybrids(architecture, monkeypatch):
    """Their prefill is the model's own forward, which finds the functions that a capture registers."""
    ids, options = torch.tensor([PROMPT]), {"max_new_tokens": 8, "do_sample": False}
    _, first = converted(tiny_model(architecture))
    expected = first.generate(ids, **options)
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS):
        monkeypatch.delitem(registry._global_mapping, IMPLEMENTATION)
    captures, second = converted(tiny_model(architecture), self_check=True)
    assert captures == 0
    assert torch.equal(second.generate(ids, **options), expected)


@pytest.mark.usefixtures("llama_is_kept")
def test_other_weights_share_a_capture_and_keep_their_values():
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    captures, _ = converted(model, self_check=True)
    assert captures == 0


@pytest.mark.usefixtures("llama_is_kept")
@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny_model("llama", torch.bfloat16),
        lambda: tiny_model("llama", rms_norm_eps=1e-2),
        lambda: tiny_model("llama", hidden_act="gelu"),
        lambda: tiny_model("llama", num_hidden_layers=3),
        lambda: tiny_model("llama", tie_word_embeddings=True),
        lambda: tiny_model("mistral"),
    ],
    ids=["dtype", "number", "activation", "layers", "tied", "class"],
)
def test_another_model_is_captured_anew(other):
    assert captures_of(other()) == 1


@pytest.mark.usefixtures("llama_is_kept")
def test_an_attribute_of_a_module_is_read():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.scaling = 0.5
    assert captures_of(model) == 1
    assert captures_of(model) == 0


def test_what_else_the_process_has_done_changes_nothing():
    """transformers registers classes of every model that is built and outputs of every one that is imported, and keeps
    what strings stop at; torch.compile wraps methods of every module."""
    before = running_code(tiny_model("llama"), capture)
    home = {"__module__": "transformers.models.other.modeling_other"}
    other = type("OtherForCausalLM", (modeling_llama.LlamaForCausalLM,), dict(home))
    other(tiny_model("llama").config)
    type("OtherOutput", (ModelOutput,), home | {"__annotations__": {}})
    assert running_code(tiny_model("llama"), capture) == before
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert running_code(tiny_model("llama"), capture) == before
    with mock.patch.dict(stopping_criteria.STOP_STRING_EMBEDDING_CACHE, {("a",): 1}):
        assert running_code(tiny_model("llama"), capture) == before


@pytest.mark.usefixtures("llama_is_kept")
@pytest.mark.parametrize("package", ["torch", "transformers", "quantspec"])
def test_another_version_captures_anew(package):
    known = kept.version
    with mock.patch.object(kept, "version", lambda name: "0.0.1" if name == package else known(name)):
        assert captures_of(tiny_model("llama")) == 1


def _twice(self, x):
    return 2 * x


def _of_a_closure(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


PATCHES = {
    "forward of a class": lambda: mock.patch.object(modeling_llama.LlamaMLP, "forward", _twice),
    "wrapped forward": lambda: mock.patch.object(
        modeling_llama.LlamaMLP, "forward", _of_a_closure(modeling_llama.LlamaMLP.forward)
    ),
    "forward of another library class": lambda: mock.patch.object(
        modeling_llama.LlamaRMSNorm, "forward", modeling_cohere.CohereLayerNorm.forward
    ),
    "function of its file": lambda: mock.patch.object(modeling_llama, "rotate_half", lambda x: x),
    "function of another file": lambda: mock.patch.object(modeling_llama, "rotate_half", modeling_cohere.rotate_half),
    "entry of a table": lambda: mock.patch.dict(ROPE_INIT_FUNCTIONS, {"linear": _twice}),
    "forward of torch": lambda: mock.patch.object(nn.Linear, "forward", _twice),
    "function of torch": lambda: mock.patch.object(nn.functional, "silu", lambda x, inplace=False: x),
    "method of a tensor": lambda: mock.patch.object(torch.Tensor, "pow", lambda self, exponent: self),
    "number of a class": lambda: mock.patch.object(modeling_llama.LlamaMLP, "factor", 2, create=True),
}


class _Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_patched_code_does_not_meet_what_was_kept(patch):
    """Nor does the code as it was meet what the patched one left, if it left something."""
    before = running_code(tiny_model("llama"), capture)
    with patch(), contextlib.suppress(CannotTell):
        assert running_code(tiny_model("llama"), capture) != before
    assert running_code(tiny_model("llama"), capture) == before


def _forward_of_an_instance(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)


def _class_of_an_instance(model):
    norm = model.model.norm
    norm.__class__ = type("Own", (type(norm),), {"forward": lambda self, x: 2 * x})


INSTANCES = {
    "forward": _forward_of_an_instance,
    "class": _class_of_an_instance,
    "hook": lambda model: model.model.norm.register_forward_hook(lambda module, inputs, output: 2 * output),
    "pre-hook": lambda model: model.model.norm.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "module": lambda model: setattr(model.model.layers[0].mlp, "act_fn", _Doubling()),
    "tensor": lambda model: setattr(model.model.norm, "factor", torch.ones(1)),
}


@pytest.mark.usefixtures("llama_is_kept")
@pytest.mark.parametrize("change", INSTANCES.values(), ids=INSTANCES)
def test_changed_instances_are_captured_each_time(change, folder):
    model = tiny_model("llama")
    change(model)
    assert captures_of(model) == 1
    assert len(list(folder.iterdir())) == 1


def test_a_patched_conversion_gives_its_own_text():
    ids = torch.tensor([PROMPT])
    plain = quantspec.convert(tiny_model("llama"), kv_group_size=GROUP).prefill
    with mock.patch.object(modeling_llama.LlamaMLP, "forward", lambda self, x: 0 * x):
        model = tiny_model("llama")
        qs = quantspec.convert(model, kv_group_size=GROUP)
        ours = qs.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(ours, model.generate(ids, max_new_tokens=8, do_sample=False))
    assert len(qs.prefill.graph.nodes) != len(plain.graph.nodes)


@pytest.mark.usefixtures("llama_is_kept")
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-100],
        lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
        lambda content: b"not a capture" * 1000,
    ],
    ids=["empty", "cut", "flipped", "other"],
)
def test_a_damaged_file_is_captured_anew_and_mended(damage, folder):
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert captures_of(tiny_model("llama")) == 1
    assert captures_of(tiny_model("llama")) == 0


def test_a_folder_that_cannot_be_written_does_not_matter(folder):
    folder.write_text("a file in its place")
    assert captures_of(tiny_model("llama")) == 1
    assert folder.read_text() == "a file in its place"


def test_an_empty_variable_keeps_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTSPEC_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert captures_of(tiny_model("llama")) == 1
    assert not list(tmp_path.iterdir())


def test_without_the_variable_it_is_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("QUANTSPEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert [captures_of(tiny_model("llama")) for _ in range(2)] == [1, 0]
    assert len(list((tmp_path / "xdg" / "quantspec" / "captures").iterdir())) == 1


def test_the_files_used_last_stay(monkeypatch, folder):
    monkeypatch.setattr(kept, "_MOST_FILES", 2)
    old, older, new = (functools.partial(tiny_model, "llama", rms_norm_eps=eps) for eps in (1e-3, 1e-4, 1e-5))
    captures_of(old())
    (path,) = folder.iterdir()
    os.utime(path, (2, 2))
    captures_of(older())
    for other in set(folder.iterdir()) - {path}:
        os.utime(other, (3, 3))
    assert captures_of(old()) == 0
    assert captures_of(new()) == 1
    assert [captures_of(model()) for model in (old, new, older)] == [0, 0, 1]


def test_the_values_that_a_held_rope_is_made_of_are_read():
    model = tiny_model("llama")
    before = kept._path(model, 64)
    assert kept._path(model, 64) == before
    model.model.rotary_emb.inv_freq.mul_(2)
    assert kept._path(model, 64) != before


def test_what_is_refused_is_refused_again():
    with mock.patch.object(modeling_llama.LlamaMLP, "forward", lambda self, x: x.flip(1)):
        for _ in range(2):
            with pytest.raises(quantspec.UnsupportedModelError):
                converted(tiny_model("llama"))
