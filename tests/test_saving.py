"""Saved pairs come back bit for bit without quantizing, and damaged folders are refused by the name of the file."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from conftest import GROUP
from step_by_step import random_prompt
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantspec
from quantspec import QuantSpecConfig, QuantSpecModel, SavedModelError, SelfCheckError
from quantspec.checkpoint import loading, saving
from quantspec.checkpoint.folder import DESCRIPTION_FILE, EDITABLE_FILE, GRAPH_FILE, Description
from quantspec.checkpoint.model_card import CARD_FILE
from quantspec.passes import WeightFormat, int4_weights, plain_weights
from quantspec.passes.prepack_int4 import unpack_cpu_layout

PROMPT = torch.tensor([random_prompt(2 * GROUP + 8)])
# Of a save without shards, beside its description and the card.
FILES = ["config.json", "generation_config.json", "model.safetensors", "quantspec.safetensors", GRAPH_FILE]


def convert(architecture: str, dtype: torch.dtype = torch.float32, **options) -> QuantSpecModel:
    """A tiny pair whose language-model head is INT4 too."""
    model = tiny_model(architecture, dtype)
    return quantspec.convert(model, kv_group_size=GROUP, quantize_lm_head=True, self_check=False, **options)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def continuation(qs: QuantSpecModel) -> tuple[list[int], int]:
    """Greedy tokens and how many of them the draft had right."""
    ids = qs.generate(PROMPT, max_new_tokens=GROUP + 8, eos_token_id=None)
    return ids[0].tolist(), qs.last_stats.accepted


@pytest.fixture(scope="module")
def saved(qs, tmp_path_factory) -> Path:
    """The shared llama, saved in several shards."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    qs.save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture(scope="module")
def loaded(saved) -> QuantSpecModel:
    """That llama, loaded while nothing may be quantized or unpickled."""

    def refuse(*args, **kwargs):
        raise AssertionError("refused while loading")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightFormat, "packed", refuse)
        for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            patch.setattr(module, name, refuse)
        return quantspec.from_pretrained(saved)


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A copy of the saved llama to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def edit_description(folder: Path, **changes) -> None:
    path = folder / DESCRIPTION_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- round trip ------------------------------------------------------------------------------------------------------


def assert_same_pair(original: QuantSpecModel, loaded: QuantSpecModel) -> None:
    """Every tensor of model and draft, and what they generate."""
    assert type(loaded.model) is type(original.model)
    assert_equal(tensors(original.model), tensors(loaded.model))
    assert_equal(tensors(original.draft), tensors(loaded.draft))
    assert (loaded.config, loaded.linears, loaded.layers) == (original.config, original.linears, original.layers)
    assert loaded.weight_bytes() == original.weight_bytes()
    assert continuation(loaded) == continuation(original)


def test_round_trip_of_shards(qs, loaded):
    """A llama with fused linears, its head in full precision; loaded without quantizing and without pickle."""
    assert_same_pair(qs, loaded)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("gpt2", torch.float16), ("mixtral", torch.bfloat16), ("gpt_oss", torch.float32)],
    ids=str,
)
def test_round_trip(architecture, dtype, tmp_path):
    """Tied and transposed weights, and experts: one by one in transformers' files, or as stacks."""
    original = convert(architecture, dtype, weight_group_size=32, num_speculative_tokens=3)
    original.save_pretrained(tmp_path)
    loaded = quantspec.from_pretrained(tmp_path)
    assert_same_pair(original, loaded)
    # Whoever may read one file may read them all.
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    heads = [
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
        for model in (original.model, loaded.model)
    ]
    assert heads == [architecture == "gpt2"] * 2
    size = sum(parameter.nbytes for parameter in original.model.parameters())
    assert size < sum(path.stat().st_size for path in tmp_path.glob("model*.safetensors")) < size + 20_000


def test_loaded_weights_are_shared(loaded):
    """Target, prefill and model hold one copy."""
    own = {tensor.data_ptr() for tensor in tensors(loaded.model).values()}
    for graph in (loaded.target, loaded.prefill):
        assert {parameter.data_ptr() for parameter in graph.parameters()} <= own


def test_state_as_it_is(tmp_path):
    """Codes are the draft's own, not those of weights that have changed since; what transformers would compute anew or
    cast (positions scaled by the user, a head wider than its model) is as it was."""
    original = convert("llama", torch.bfloat16)
    packed = {name: tensor.clone() for name, tensor in tensors(original.draft).items() if name.endswith("packed")}
    original.model.get_submodule("model.norm").float()
    original.model.get_submodule("lm_head").float()
    with torch.no_grad():
        for tensor in tensors(original.model).values():
            tensor.mul_(-1.23456789)
    original.save_pretrained(tmp_path)
    loaded = quantspec.from_pretrained(tmp_path)
    assert_equal(tensors(original.model), tensors(loaded.model))
    assert loaded.model.lm_head.weight.dtype == torch.float32
    assert len(packed) > 4
    for name, tensor in packed.items():
        assert torch.equal(getattr(loaded.draft, name), tensor), name


def test_saved_codes_are_what_quantize_weights_makes(qs):
    """Fusing and the CPU's layout are undone: the same codes as of each linear by itself."""
    weights = plain_weights(qs.draft)
    quantized = {report.name: report.group_size for report in qs.linears if report.group_size}
    assert weights.keys() == quantized.keys()
    assert "model.layers.0.self_attn.k_proj" in weights
    for name, parts in weights.items():
        weight = qs.model.get_submodule(name).weight
        codes, params = int4_weights.quantize_int4(weight, quantized[name], qs.config.weight_quantizer)
        assert torch.equal(parts["qdata"], codes), name
        assert torch.equal(parts["scale_and_zero"], params), name


@pytest.mark.parametrize("shape", [(16, 32), (48, 64), (256, 32), (272, 96), (560, 32)], ids=str)
def test_cpu_layout_is_undone(shape):
    codes = torch.randint(0, 16, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    assert torch.equal(unpack_cpu_layout(packed), int4_weights.pack_int4(codes))


def test_new_process(saved, qs):
    """Another process generates the same tokens."""
    script = (
        "import sys, torch, quantspec\n"
        "qs = quantspec.from_pretrained(sys.argv[1])\n"
        f"print(qs.generate(torch.tensor({PROMPT.tolist()}), max_new_tokens=8, eos_token_id=None).tolist()[0])"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(saved)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = qs.generate(PROMPT, max_new_tokens=8, eos_token_id=None)[0].tolist()
    assert json.loads(result.stdout.splitlines()[-1]) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="run on a machine with a CUDA GPU")
def test_between_devices(saved, qs, tmp_path):
    """A GPU's layout is saved as the CPU's is, and loads on either."""
    on_gpu = quantspec.from_pretrained(saved, device="cuda")
    assert on_gpu.device.type == "cuda"
    on_gpu.save_pretrained(tmp_path)
    for name in ("model.safetensors", "quantspec.safetensors"):
        assert (tmp_path / name).is_file()
    assert_same_pair(qs, quantspec.from_pretrained(tmp_path))


# --- the folder ------------------------------------------------------------------------------------------------------


def test_folder_loads_as_a_hugging_face_model(saved, qs):
    """Also for who does not have quantspec: the original weights under their own names."""
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert_equal(dict(qs.model.named_parameters()), dict(model.named_parameters()))
    assert model.generation_config.eos_token_id == qs.model.generation_config.eos_token_id


def test_folder_holds_json_and_safetensors_only(saved):
    """Several shards of both kinds, none far above its limit, and nothing that pickle could read."""
    names = sorted(path.name for path in saved.iterdir())
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors", ".md"}
    assert {"config.json", "generation_config.json", DESCRIPTION_FILE} <= set(names)
    for prefix in ("model-00002-of-", "quantspec-00002-of-"):
        assert any(name.startswith(prefix) for name in names)
    assert all(path.stat().st_size < 35_000 for path in saved.glob("*.safetensors"))


def test_int4_files_take_half_a_byte_a_weight(saved, qs):
    """The packed size, plus the scales and the files' headers."""
    files = list(saved.glob("quantspec*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    quantized = [report for report in qs.linears if report.group_size]
    codes = sum(report.in_features * report.out_features // 2 for report in quantized)
    scales = sum(4 * report.in_features // report.group_size * report.out_features for report in quantized)
    logits = 8 * 4 * qs.vocab_size
    assert codes + scales + logits < size < codes + scales + logits + 2_000 * len(files)


def test_model_that_transformers_dequantized(qs, tmp_path, monkeypatch):
    """A model read from GGUF is dense, and saved as such although transformers would refuse; it stays as it was."""
    gguf = pytest.importorskip("transformers.quantizers.quantizer_gguf", reason="older transformers saves it by itself")
    quantizer = gguf.GgufHfQuantizer(transformers.GgufConfig(dequantize=True))
    monkeypatch.setattr(qs.model, "hf_quantizer", quantizer, raising=False)
    monkeypatch.setattr(qs.model.config, "quantization_config", quantizer.quantization_config, raising=False)
    with pytest.raises(ValueError, match="not serializable"):
        qs.model.save_pretrained(tmp_path / "theirs")
    qs.save_pretrained(tmp_path / "ours")
    assert qs.model.hf_quantizer is quantizer
    assert qs.model.config.quantization_config is quantizer.quantization_config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_equal(dict(qs.model.named_parameters()), dict(model.named_parameters()))
    assert not hasattr(model.config, "quantization_config")


# --- options on loading ----------------------------------------------------------------------------------------------


def test_the_usual_draft_is_not_named(saved):
    """A version that knows no other draft refuses options that it does not know."""
    of_new_versions = {"draft_recipe", "draft", "draft_attention", "draft_attention_share", "rope_context"}
    assert not of_new_versions & json.loads((saved / DESCRIPTION_FILE).read_text())["options"].keys()
    assert Description.read(saved).options.draft_recipe == QuantSpecConfig.draft_recipe


def test_options_that_may_change(saved, qs):
    """In another dtype the draft's codes stay, and the target is as transformers loads it."""
    options = {"num_assistant_tokens": 2, "max_cache_len": 64, "kv_group_size": 32}
    loaded = quantspec.from_pretrained(saved, dtype="bfloat16", **options)
    config = loaded.config
    assert (config.num_speculative_tokens, config.max_cache_len, config.kv_group_size) == (2, 64, 32)
    assert config.weight_group_size == qs.config.weight_group_size
    assert_equal(tensors(AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)), tensors(loaded.model))
    ours, theirs = plain_weights(loaded.draft), plain_weights(qs.draft)
    assert all(torch.equal(ours[name]["qdata"], theirs[name]["qdata"]) for name in theirs)
    assert loaded.generate(PROMPT, max_new_tokens=4, eos_token_id=None).shape == (1, PROMPT.shape[1] + 4)
    assert loaded.last_stats.num_speculative_tokens == 2


@pytest.mark.parametrize("dtype", ["auto", "torch.float32", torch.float32])
def test_dtypes_may_be_named_as_in_transformers(saved, qs, dtype):
    loaded = quantspec.from_pretrained(saved, dtype=dtype, self_check=False)
    assert loaded.model.dtype == qs.model.dtype == torch.float32


def test_a_tokenizer_that_cannot_be_saved_is_refused_first(qs, tmp_path):
    with pytest.raises(TypeError, match=r"tokenizer must have save_pretrained\(\).*not str"):
        qs.save_pretrained(tmp_path / "pair", tokenizer="abc")
    assert not (tmp_path / "pair").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_group_size": 32}, "weight_group_size cannot change on loading.*convert"),
        ({"quantize_lm_head": True}, "quantize_lm_head cannot change"),
        ({"weight_quantizer": "hqq"}, "weight_quantizer cannot change"),
        ({"num_speculative_tokens": 99}, "between 0 and 15"),
        ({"dtype": torch.float16}, "loads in float32 or bfloat16, not in torch.float16"),
        ({"dtype": "float33"}, "not in float33"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
    ],
    ids=str,
)
def test_bad_options(saved, options, message):
    with pytest.raises(ValueError, match=message):
        quantspec.from_pretrained(saved, **options)


def test_unknown_option(saved):
    with pytest.raises(TypeError, match="unknown option 'gamma'"):
        quantspec.from_pretrained(saved, gamma=3)


def test_self_check_runs(saved, monkeypatch):
    """The check that conversion has, where the saved options or the caller ask for it; ``loaded`` did not."""

    def fail(qs):
        raise SelfCheckError("differs")

    monkeypatch.setattr(loading, "self_check", fail)
    with pytest.raises(SelfCheckError):
        quantspec.from_pretrained(saved, self_check=True)


# --- damaged folders -------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> list[str]:
    """Without the description, and without the card, which anybody may edit or remove."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (DESCRIPTION_FILE, CARD_FILE))


def test_any_missing_file(copy):
    names = files_of(copy)
    assert len(names) > 6
    for name in names:
        content = (copy / name).read_bytes()
        (copy / name).unlink()
        with pytest.raises(SavedModelError, match=f"{name}' is missing.*save the model again"):
            quantspec.from_pretrained(copy)
        (copy / name).write_bytes(content)


def test_any_truncated_file(copy):
    for name in sorted(set(files_of(copy)) - {EDITABLE_FILE}):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1])
        with pytest.raises(SavedModelError, match=f"{name}' has {len(content) - 1} bytes instead of {len(content)}"):
            quantspec.from_pretrained(copy, verify=False)
        (copy / name).write_bytes(content)


def test_any_changed_bit(copy):
    """Also in the middle of the target's weights, where no format would notice."""
    for name in sorted(set(files_of(copy)) - {EDITABLE_FILE}):
        content = (copy / name).read_bytes()
        middle = len(content) // 2
        (copy / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(SavedModelError, match=f"{name}' was changed since it was saved"):
            quantspec.from_pretrained(copy)
        (copy / name).write_bytes(content)


def test_stray_weights(copy):
    """transformers would load them in place of the sharded ones."""
    shutil.copy(next(copy.glob("model-*.safetensors")), copy / "model.safetensors")
    with pytest.raises(SavedModelError, match=r"model\.safetensors' does not belong to this model"):
        quantspec.from_pretrained(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": "1"}', '{"format_version": 1}', "\xff"])
def test_damaged_description(copy, content):
    (copy / DESCRIPTION_FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(SavedModelError, match=f"{DESCRIPTION_FILE}' is damaged.*save the model again"):
        quantspec.from_pretrained(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"options": {"kv_group_size": 7}},
        {"options": {"unknown": 7}},
        {"options": None},
        {"linears": [{"name": "x"}]},
        {"files": {"../config.json": {"bytes": 1, "sha256": ""}}},
        {"files": ["config.json"]},
        {"dtype": "int7"},
        {"versions": None},
        {"surprise": 1},
    ],
    ids=str,
)
def test_description_with_bad_entries(copy, changes):
    edit_description(copy, **changes)
    with pytest.raises(SavedModelError, match="is damaged"):
        quantspec.from_pretrained(copy)


def test_newer_format(copy):
    edit_description(copy, format_version=2, versions={"quantspec": "9.8"})
    with pytest.raises(SavedModelError, match=r"reads up to 1: install .* 2 \(it was saved with quantspec 9\.8\)$"):
        quantspec.from_pretrained(copy)
    edit_description(copy, versions=None)
    with pytest.raises(SavedModelError, match=r"reads up to 1: install a quantspec that reads format 2$"):
        quantspec.from_pretrained(copy)


def test_description_of_other_linears(copy):
    """Group sizes that the tensors do not have, and linears that the model does not have."""
    description = json.loads((copy / DESCRIPTION_FILE).read_text())
    edit_description(copy, options={**description["options"], "weight_group_size": 32})
    with pytest.raises(SavedModelError, match=r"scale_and_zero' of .* instead of"):
        quantspec.from_pretrained(copy)
    edit_description(copy, options=description["options"], linears=description["linears"][1:])
    with pytest.raises(SavedModelError, match=description["linears"][0]["name"]):
        quantspec.from_pretrained(copy)


def test_folders_that_are_none(tmp_path, saved):
    with pytest.raises(SavedModelError, match="is no folder"):
        quantspec.from_pretrained(tmp_path / "absent")
    with pytest.raises(SavedModelError, match="is no folder"):
        quantspec.from_pretrained(saved / "config.json")
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(SavedModelError, match=f"has no {DESCRIPTION_FILE}.*AutoModelForCausalLM"):
        quantspec.from_pretrained(tmp_path)


# --- saving where it cannot be done, or not to its end ---------------------------------------------------------------


def test_saving_to_a_foreign_folder(qs, tmp_path):
    """Nothing in it is touched."""
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(SavedModelError, match=r"holds 'config.json', and no model saved by quantspec"):
        qs.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"


def test_saving_over_a_damaged_save(copy, qs):
    """It is not known which files are its own, so none is touched."""
    before = files_of(copy)
    edit_description(copy, format_version=2)
    with pytest.raises(SavedModelError, match="earlier save consists of cannot be read; choose an empty folder"):
        qs.save_pretrained(copy)
    assert files_of(copy) == before


def leftover(folder: Path, host: str, process: int | str) -> Path:
    """What a save leaves that was killed while it wrote."""
    path = folder / f".quantspec-saving-{host}-{process}-abcd_efg"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("half of it")
    return path


def test_what_dead_processes_left_goes(qs, tmp_path):
    """It is no foreign file; what may belong to a live process stays for a day."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = leftover(tmp_path, platform.node(), ended.pid)
    live = [leftover(tmp_path, platform.node(), os.getppid()), leftover(tmp_path, "another-host", ended.pid)]
    with pytest.raises(SavedModelError, match=f"has no {DESCRIPTION_FILE}"):
        quantspec.from_pretrained(tmp_path)
    qs.save_pretrained(tmp_path)
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == set(live)
    assert not dead.exists()
    for path in live:
        os.utime(path, (0, time.time() - 25 * 3600))
    qs.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}


def test_saving_to_a_file(qs, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SavedModelError, match="choose a folder"):
            qs.save_pretrained(path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="run as a user other than root, who may write all")
def test_saving_to_a_read_only_folder(qs, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SavedModelError, match="Permission denied; choose a folder that can be written to"):
        qs.save_pretrained(tmp_path / "below")


def test_saving_without_room(qs, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(SavedModelError, match=r"GiB are needed and 0\.0 GiB are free"):
        qs.save_pretrained(tmp_path / "full")


def test_saving_over_the_folder_one_was_loaded_from(copy, qs, tokenizer):
    """Weights in use may be mapped from the files that are replaced; old shards go, a tokenizer stays."""
    loaded = quantspec.from_pretrained(copy)
    tokenizer.save_pretrained(copy)
    others = set(files_of(copy)) - set(Description.read(copy).files)
    assert "tokenizer.json" in others
    loaded.save_pretrained(copy)
    assert set(files_of(copy)) - others == set(FILES)
    assert AutoTokenizer.from_pretrained(copy)("Hi").input_ids == tokenizer("Hi").input_ids
    assert continuation(loaded) == continuation(quantspec.from_pretrained(copy)) == continuation(qs)


def test_interrupted_while_writing(copy, qs, monkeypatch):
    """The earlier save is as it was, and nothing is left behind."""
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "save_torch_state_dict", interrupt)
    with pytest.raises(KeyboardInterrupt):
        qs.save_pretrained(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@contextmanager
def failing_moves(first: int, count: int, error: BaseException) -> Iterator[list[Path]]:
    """Moves of files number ``first`` to ``first + count - 1`` raise ``error``; gives the targets of all."""
    targets: list[Path] = []
    move = Path.replace

    def replace(self, target):
        targets.append(target)
        if first < len(targets) <= first + count:
            raise error
        return move(self, target)

    with mock.patch.object(Path, "replace", replace):
        yield targets


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_an_error_at_any_move(copy, qs, tokenizer, error):
    """The earlier save is as it was, and nothing is left behind."""
    tokenizer.save_pretrained(copy)
    before = contents(copy)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SavedModelError
    # The card and the description are moved too, the earlier ones and the new ones.
    for step in range(len(Description.read(copy).files) + len(FILES) + 4):
        with failing_moves(step, 1, error), pytest.raises(expected):
            qs.save_pretrained(copy)
        assert contents(copy) == before, step
        assert not any(path.is_dir() for path in copy.iterdir())
    qs.save_pretrained(copy)
    assert_same_pair(qs, quantspec.from_pretrained(copy))


def first_save_moves(qs: QuantSpecModel, tokenizer, folder: Path) -> range:
    """A number for each file of a save with a tokenizer and a card."""
    qs.save_pretrained(folder, tokenizer=tokenizer)
    names = {path.name for path in folder.iterdir()}
    assert names > {*FILES, DESCRIPTION_FILE, CARD_FILE, "tokenizer.json"}
    return range(len(names))


def test_an_error_at_any_move_of_a_first_save(qs, tokenizer, tmp_path):
    """Nothing is left, the card and the tokenizer included, which the description does not name."""
    folder = tmp_path / "new"
    for step in first_save_moves(qs, tokenizer, tmp_path / "whole"):
        with (
            failing_moves(step, 1, OSError(errno.EIO, "Input/output error")),
            pytest.raises(SavedModelError, match="Inp"),
        ):
            qs.save_pretrained(folder, tokenizer=tokenizer)
        assert not folder.exists()
    qs.save_pretrained(folder, tokenizer=tokenizer)
    assert_same_pair(qs, quantspec.from_pretrained(folder))


def test_a_first_save_killed_at_any_move(qs, tokenizer, tmp_path):
    """The next save takes away all that had been moved before it begins."""
    folder = tmp_path / "new"
    folder.mkdir()
    for step in first_save_moves(qs, tokenizer, tmp_path / "whole"):
        with failing_moves(step, 1000, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            qs.save_pretrained(folder, tokenizer=tokenizer)
        with mock.patch.object(saving, "_write", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            qs.save_pretrained(folder)
        assert not list(folder.iterdir()), step
    qs.save_pretrained(folder)
    assert_same_pair(qs, quantspec.from_pretrained(folder))
    assert "tokenizer.json" not in contents(folder)


def test_killed_at_any_move(copy, qs, tokenizer):
    """A mixture of old and new files does not load; the next save puts the earlier one back before it begins."""
    tokenizer.save_pretrained(copy)
    before = contents(copy)
    for step in range(1, len(Description.read(copy).files) + len(FILES) + 4):
        with failing_moves(step, 1000, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            qs.save_pretrained(copy)
        with pytest.raises(SavedModelError, match=f"has no {DESCRIPTION_FILE}"):
            quantspec.from_pretrained(copy)
        # Killed once more, while it puts back.
        with failing_moves(step // 2, 1000, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            qs.save_pretrained(copy)
        with mock.patch.object(saving, "_write", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            qs.save_pretrained(copy)
        assert contents(copy) == before, step
        assert not any(path.is_dir() for path in copy.iterdir())
    with failing_moves(step, 1000, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        qs.save_pretrained(copy)
    qs.save_pretrained(copy)
    assert_same_pair(qs, quantspec.from_pretrained(copy))
    assert "tokenizer.json" in contents(copy)


def test_a_save_while_another_writes(qs, tmp_path, monkeypatch):
    """The last to end is the one that is there, whole."""
    fingerprints = saving.fingerprints

    def save_another_first(*arguments):
        monkeypatch.setattr(saving, "fingerprints", fingerprints)
        qs.save_pretrained(tmp_path, max_shard_size="30KB")
        assert (tmp_path / "model.safetensors.index.json").is_file()
        return fingerprints(*arguments)

    monkeypatch.setattr(saving, "fingerprints", save_another_first)
    qs.save_pretrained(tmp_path)
    assert files_of(tmp_path) == FILES
    assert (tmp_path / CARD_FILE).is_file()
    assert_same_pair(qs, quantspec.from_pretrained(tmp_path))


def test_a_save_while_another_moves(qs, tmp_path, monkeypatch):
    """It waits for the other's last move."""
    lock, move = fcntl.flock, Path.replace
    waits = threading.Event()
    other = threading.Thread(target=qs.save_pretrained, args=(tmp_path,), kwargs={"max_shard_size": "30KB"})

    def note_and_lock(*arguments):
        if threading.current_thread() is other:
            waits.set()
        lock(*arguments)

    def start_other_and_move(self, target):
        if not moved_by:
            other.start()
            assert waits.wait(300)
        moved_by.append(threading.current_thread().name)
        return move(self, target)

    moved_by: list[str] = []
    monkeypatch.setattr(fcntl, "flock", note_and_lock)
    monkeypatch.setattr(Path, "replace", start_other_and_move)
    qs.save_pretrained(tmp_path)
    other.join()
    ours = moved_by.count(threading.current_thread().name)
    assert set(moved_by[:ours]) == {threading.current_thread().name}
    # The card and the description are moved too.
    assert len(moved_by) > ours == len(FILES) + 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_same_pair(qs, quantspec.from_pretrained(tmp_path))
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_a_file_system_without_locks(qs, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    qs.save_pretrained(tmp_path)
    assert Description.read(tmp_path).options == dataclasses.replace(qs.config, adapted_group_sizes={})


def test_a_folder_that_vanishes(qs, tmp_path, monkeypatch):
    fingerprints = saving.fingerprints

    def remove(folder, names):
        found = fingerprints(folder, names)
        shutil.rmtree(tmp_path / "new")
        return found

    monkeypatch.setattr(saving, "fingerprints", remove)
    with pytest.raises(SavedModelError, match=r"cannot save to '.*new': No such file or directory"):
        qs.save_pretrained(tmp_path / "new")


def test_a_generation_config_that_cannot_be_saved(qs, tmp_path, monkeypatch):
    """transformers refuses it; here before anything is written."""
    monkeypatch.setattr(qs.model.generation_config, "temperature", -1.0)
    with pytest.raises(
        SavedModelError, match=r"generation config cannot be saved \(.*temperature.*generation_config.json"
    ):
        qs.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
