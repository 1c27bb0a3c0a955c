"""A capture comes back from JSON as it was, and a saved pair is loaded without an export where it still holds."""

from __future__ import annotations

import builtins
import copy
import functools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import GROUP
from repeats import only
from step_by_step import random_prompt
from tiny_models import STATEFUL, tiny_model

import quantspec
from quantspec import SavedModelError
from quantspec.capture import capture, converting, export
from quantspec.capture.stored import from_json, key_of, to_json
from quantspec.checkpoint.folder import DESCRIPTION_FILE, GRAPH_FILE, Description, fingerprints
from quantspec.pair import pair as pair_module
from quantspec.pair.frozen import options_of
from quantspec.passes.graph import get_tensor

PROMPT = torch.tensor([random_prompt(2 * GROUP + 8)])


STORED = ["llama", "gpt2", "gemma2", "qwen3_moe", "gpt_oss", *STATEFUL, "kimi_linear"]


@pytest.mark.parametrize("architecture", only(["gpt2", "gemma2", "gpt_oss", "lfm2", "kimi_linear"], STORED))
def test_a_capture_comes_back_from_json(architecture):
    model = tiny_model(architecture)
    with converting():
        captured = capture(model)
    stored, constants = to_json(captured, model)
    again = from_json(json.loads(json.dumps(stored)), constants, model)
    assert again.layers == captured.layers
    assert again.states == captured.states
    assert len(again.graph_module.graph.find_nodes(op="call_module")) == len(captured.states)
    _assert_same(again.graph_module, captured.graph_module)


def _assert_same(again: torch.fx.GraphModule, captured: torch.fx.GraphModule) -> None:
    for node, expected in zip(again.graph.nodes, captured.graph.nodes, strict=True):
        assert (node.op, node.target, node.name) == (expected.op, expected.target, expected.name)
        assert str((node.args, node.kwargs)) == str((expected.args, expected.kwargs))
        assert _shapes(node) == _shapes(expected), node
        if node.op == "get_attr":
            assert get_tensor(again, node).data_ptr() == get_tensor(captured, expected).data_ptr(), node
        if node.op == "call_module":
            moved, other = (module.get_submodule(node.target) for module in (again, captured))
            assert moved.is_token == other.is_token
            _assert_same(moved.step, other.step)


def _shapes(node: torch.fx.Node) -> list[tuple | None]:
    value = node.meta.get("val")
    return [_shape(one) for one in (value if isinstance(value, list | tuple) else [value])]


def _shape(value: Any) -> tuple | None:
    """Dtype and sizes, the symbolic ones by their example."""
    if not isinstance(value, torch.Tensor):
        return None
    sizes = (*value.shape, *value.stride())
    return (value.dtype, *(size if isinstance(size, int) else _symbolic(size) for size in sizes))


def _symbolic(size: torch.SymInt) -> tuple[int, int]:
    """What a size is in the example, and how many symbols it depends on."""
    return size.node.hint, len(size.node.expr.free_symbols)


@functools.cache
def _llama() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The stored capture of a llama, which takes seconds, for tests of what is read of it."""
    model = tiny_model("llama")
    with converting():
        return to_json(capture(model), model)


@functools.cache
def _lfm2() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """That of a hybrid, with the step of a state."""
    model = tiny_model("lfm2")
    with converting():
        return to_json(capture(model), model)


def test_an_operator_of_another_library_is_not_looked_up():
    model = tiny_model("llama")
    stored, constants = _llama()
    call = next(node for node in stored["nodes"] if node["op"] == "call_function")
    files = ("aten.from_file.default", "aten.save.default")
    others = ("os.system.default", "eval", "inductor.resize_storage_bytes_.default", "aten.add.overloads")
    for target in (*files, *others):
        with pytest.raises(LookupError, match=target):
            from_json(stored | {"nodes": [*stored["nodes"], call | {"target": target}]}, constants, model)


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("call_function", lambda entry, code: entry["kwargs"].update({f"a={code}, b": 0})),
        ("call_function", lambda entry, code: entry.update(name=f"a={code}")),
        ("call_function", lambda entry, _: entry.update(op="call_method", target="numpy")),
        ("call_function", lambda entry, _: entry.update(op="call_module", target="lm_head")),
        ("placeholder", lambda entry, code: entry.update(target=f"position_ids, a={code}")),
        ("get_attr", lambda entry, code: entry.update(target=f'a"), {code}, getattr(self, "b')),
    ],
)
def test_a_graph_brings_no_code(op, change):
    """torch.fx writes names into the code of a forward: what is no name does not get there."""
    model = tiny_model("llama")
    stored = copy.deepcopy(_llama()[0])
    ran: list[bool] = []
    with mock.patch.object(builtins, "ran", ran, create=True):
        entry = next(node for node in stored["nodes"] if node["op"] == op)
        change(entry, "ran.append(True)")
        constants = {entry["target"]: model.lm_head.weight} if op == "get_attr" else {}
        with pytest.raises(ValueError, match=r"ran\.append|call_"):
            from_json(stored, constants, model)
    assert not ran


@pytest.mark.parametrize(
    "change",
    [
        lambda steps, entry, code: _rename(steps, entry, f'a", x); {code}; ("'),
        lambda steps, entry, code: steps.update({f'a", x); {code}; ("': {"is_token": [], "nodes": []}}),
        lambda steps, entry, code: _node(steps, "placeholder").update(target=f"state, a={code}"),
        lambda steps, entry, code: _node(steps, "call_function").update(name=f"a={code}"),
        lambda steps, entry, code: _node(steps, "call_function")["kwargs"].update({f"a={code}, b": 0}),
        lambda steps, entry, _: _node(steps, "call_function").update(op="call_module", target=entry["target"]),
        lambda steps, entry, _: _node(steps, "call_function").update(op="call_method", target="numpy"),
        lambda steps, entry, _: _node(steps, "call_function").update(op="get_attr", target="lm_head.weight"),
    ],
    ids=["called name", "other name", "input", "node", "keyword", "module", "method", "tensor"],
)
def test_the_step_of_a_state_brings_no_code(change):
    model = tiny_model("lfm2")
    stored = copy.deepcopy(_lfm2()[0])
    ran: list[bool] = []
    with mock.patch.object(builtins, "ran", ran, create=True):
        entry = next(node for node in stored["nodes"] if node["op"] == "call_module")
        change(stored["steps"], entry, "ran.append(True)")
        with pytest.raises((ValueError, RuntimeError), match=r"ran\.append|call_|get_attr|lm_head"):
            from_json(stored, _lfm2()[1], model)
    assert not ran


def _rename(steps: dict[str, Any], entry: dict[str, Any], name: str) -> None:
    steps[name] = steps.pop(entry["target"])
    entry["target"] = name


def _node(steps: dict[str, Any], op: str) -> dict[str, Any]:
    (moved,) = steps.values()
    return next(node for node in moved["nodes"] if node["op"] == op)


@pytest.fixture(autouse=True)
def without_kept_captures(monkeypatch):
    monkeypatch.setenv("QUANTSPEC_CACHE", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    quantspec.convert(tiny_model("llama"), kv_group_size=GROUP, self_check=False).save_pretrained(path)
    return path


def _load(folder: Path, **options) -> tuple[quantspec.QuantSpecModel, int]:
    """The loaded pair, and how often a model was exported for it; what was exported once stands in for a llama."""

    # Before a conversion, which another one would wait for.
    llama = _llama()

    def exported(model, **given):
        is_the_same = model.dtype == torch.float32 and model.config.rope_parameters["rope_type"] == "default"
        return from_json(*llama, model) if is_the_same else export.capture(model, **given)

    with mock.patch.object(pair_module, "capture", side_effect=exported) as captures:
        return quantspec.from_pretrained(folder, **options), captures.call_count


def test_a_saved_pair_is_not_exported_again(folder):
    loaded, exports = _load(folder)
    assert exports == 0
    expected = quantspec.convert(tiny_model("llama"), kv_group_size=GROUP, self_check=False)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(loaded.generate(PROMPT, **options), expected.generate(PROMPT, **options))
    assert loaded.layers == expected.layers


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "qwen3_moe", "gpt_oss"])
def test_a_model_has_the_same_key_once_it_is_loaded(architecture, tmp_path):
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert key_of(loaded, dict(options_of(loaded.config))) == key_of(model, dict(options_of(model.config)))


def test_another_dtype_is_captured_anew(folder):
    assert _load(folder, dtype=torch.bfloat16, self_check=False)[1] == 1


@pytest.mark.parametrize("package", ["torch", "transformers", "quantspec"])
def test_another_version_is_captured_anew(folder, package, tmp_path):
    _edit(folder, tmp_path, lambda saved: saved["key"].update({package: "0.0.1"}))
    assert _load(tmp_path)[1] == 1


def test_a_graph_that_cannot_be_read_is_captured_anew(folder, tmp_path):
    _edit(folder, tmp_path, lambda saved: saved["graph"].pop("nodes"))
    assert _load(tmp_path)[1] == 1


def test_a_folder_without_a_graph_is_captured(folder, tmp_path):
    _edit(folder, tmp_path, lambda saved: saved.clear())
    (tmp_path / GRAPH_FILE).unlink()
    description = json.loads((tmp_path / DESCRIPTION_FILE).read_text())
    del description["files"][GRAPH_FILE]
    (tmp_path / DESCRIPTION_FILE).write_text(json.dumps(description))
    assert _load(tmp_path)[1] == 1


def test_a_changed_graph_is_refused(folder, tmp_path):
    _edit(folder, tmp_path, lambda saved: saved["key"].update(torch="0.0.1"), listed=False)
    with pytest.raises(SavedModelError, match=GRAPH_FILE):
        quantspec.from_pretrained(tmp_path)


def test_a_class_that_computes_something_else_is_refused(folder):
    """The target follows the saved graph, so the model's own code is held against the saved logits too."""
    kind = type(tiny_model("llama").model.norm)
    forward = kind.forward
    with (
        mock.patch.object(kind, "forward", lambda self, x: 2 * forward(self, x)),
        pytest.raises(SavedModelError, match="computes other logits"),
    ):
        quantspec.from_pretrained(folder, self_check=False)


def test_a_class_of_ones_own_has_no_key():
    kind = type(tiny_model("llama"))
    own = type("Own", (kind,), {"__module__": "own_code"})(tiny_model("llama").config)
    assert key_of(own, {}) is None
    assert key_of(tiny_model("llama"), {}) is not None


def _edit(folder: Path, target: Path, change, listed: bool = True) -> None:
    """A copy whose graph file is changed, in the description too."""
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    path = target / GRAPH_FILE
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))
    if listed:
        description = json.loads((target / DESCRIPTION_FILE).read_text())
        found = fingerprints(target, [GRAPH_FILE])[GRAPH_FILE]
        description["files"][GRAPH_FILE] = {"bytes": found.bytes, "sha256": found.sha256}
        (target / DESCRIPTION_FILE).write_text(json.dumps(description))
    assert Description.read(target)
