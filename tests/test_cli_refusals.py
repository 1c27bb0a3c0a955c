"""Wrong input is refused before weights are read, by what is wrong with it; failed commands leave nothing behind."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from cli_errors import assert_error
from tiny_models import tiny_model
from transformers import (
    BartConfig,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    T5Config,
    ViTConfig,
)

import quantspec
from quantspec.benchmarks import generate
from quantspec.cli import errors, main
from quantspec.cli import options as cli_options
from quantspec.evals.parity import ParityOptions

COMMANDS = ("generate", "chat", "convert", "parity", "inspect")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A tiny llama's config and tokenizer without weights: what reads those fails by another message."""
    path = tmp_path_factory.mktemp("weightless")
    tiny_model("llama").config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tokenizer) -> Path:
    """A saved pair whose tokenizer has no chat template."""
    path = tmp_path_factory.mktemp("pair")
    quantspec.convert(tiny_model("llama"), self_check=False).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def no_weights_are_read(monkeypatch):
    for loader in ("quantspec.cli.loading.load_model", "quantspec.from_pretrained"):
        monkeypatch.setattr(loader, lambda *_, **__: pytest.fail("weights were read"))


def call(run, command: str, model: object, out: Path, *options: object) -> tuple[int, str, str]:
    """``command`` with what it needs besides the model."""
    needed = {"generate": ["Hi"], "convert": [out], "parity": ["--text", __file__]}
    return run(command, model, *needed.get(command, []), *options)


# --- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        *("--max-new-tokens=-5", "--max-new-tokens=0", "--max-new-tokens=ten", "--max-new-tokens=1.5"),
        *("--temperature=-1", "--temperature=nan", "--temperature=inf", "--temperature=warm"),
        *("--top-k=-1", "--top-k=2.5", "--top-p=3", "--top-p=-0.1", "--top-p=nan", "--min-p=2", "--min-p=nan"),
        *("--repetition-penalty=0", "--repetition-penalty=-1", "--repetition-penalty=inf"),
        *("--seed=-1", f"--seed={2**63}", "--seed=1e3", "--max-cache-len=-1", "--max-cache-len=0", "--gamma=2.5"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_numbers_of_a_text(run, folder, tmp_path, command, option):
    name = option.split("=")[0]
    assert_error(call(run, command, folder, tmp_path, option), f"Invalid value for '{name}'")


@pytest.mark.parametrize(
    "option",
    [
        *("--max-standard-errors=nan", "--max-standard-errors=-1", "--max-paired-standard-errors=-1"),
        *("--max-perplexity-change=nan", "--min-argmax-agreement=2", "--min-argmax-agreement=nan"),
        *("--min-speculative-match=-1", "--limit=0", "--batch-size=-1", "--context-tokens=0", "--scored-tokens=-1"),
        *("--prompts=-1", "--prompt-tokens=0", "--new-tokens=0", "--limit=all", "--new-tokens=many"),
    ],
)
def test_numbers_of_parity(run, folder, tmp_path, option):
    name = option.removeprefix("--").split("=")[0]
    _, _, err = result = call(run, "parity", folder, tmp_path, option)
    assert_error(result)
    assert name in err or name.replace("-", "_") in err


@pytest.mark.parametrize("name", ["max_standard_errors", "max_perplexity_change", "min_speculative_match"])
def test_thresholds_are_numbers(name):
    with pytest.raises(ValueError, match=name):
        ParityOptions(**{name: float("nan")})


@pytest.mark.parametrize(
    ("written", "meant"), [("4096", 4096), ("128k", 131072), ("128K", 131072), ("1m", 2**20), (7, 7)]
)
def test_sizes_as_people_write_them(written, meant):
    assert cli_options.tokens()(written) == meant


@pytest.mark.parametrize("option", ["--context=64k", "--batch-size=0", "--context=0", "--context=-1", "--context=k"])
def test_numbers_of_inspect(run, folder, option):
    assert_error(run("inspect", folder, option))


@pytest.mark.parametrize("contexts", ["0", "-1", "a", "1,", "1M", "nan"])
def test_contexts_of_bench(run, contexts):
    assert_error(run("bench", f"--contexts={contexts}"), f"--contexts '{contexts}'")


def test_empty_stop_text(run, folder):
    assert_error(run("generate", folder, "Hi", "--stop", ""), "--stop is empty")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--gamma", "16"], "num_speculative_tokens must be between"),
        (["--weight-group-size", "32"], "weight_group_size cannot change on loading"),
        (["--dtype", "float16"], "a model saved in float32 loads in"),
        (["--max-new-tokens", "1k"], "tokens are more than max_cache_len=512"),
        (["--max-new-tokens", "8", "--max-cache-len", "9"], "10 tokens are more than max_cache_len=9"),
        (["--chat"], "no chat template"),
    ],
)
def test_options_of_a_saved_pair(run, pair, options, part):
    assert_error(run("generate", pair, "Hi", *options), part)


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def described(folder: Path, to: Path, config: PreTrainedConfig | None = None, **entries: object) -> Path:
    """A copy of ``folder`` whose config is ``config``, if given, with ``entries`` on top."""
    copy = shutil.copytree(folder, to)
    if config is not None:
        config.save_pretrained(copy)
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return copy


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"load_in_8bit": True},
        {"quant_method": "fp8"},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "not known to anyone"},
    ],
    ids=lambda values: values.get("quant_method", "unnamed"),
)
def test_quantized_checkpoints(run, folder, tmp_path, command, quantization):
    model = described(folder, tmp_path / "model", quantization_config=quantization)
    result = call(run, command, model, tmp_path / "out")
    assert_error(
        result, "is quantized already", quantization.get("quant_method", ""), "give the model that it was made"
    )
    assert "gptqmodel" not in result[2]


REFUSED = {
    "t5": (T5Config(), {}, "T5Config is an encoder-decoder"),
    "bart": (BartConfig(), {"architectures": ["BartForConditionalGeneration"]}, "is an encoder-decoder"),
    "vision": (ViTConfig(), {}, "ViTConfig is no causal language model"),
    "encoder": (BertConfig(), {"architectures": ["BertModel"]}, "saved as BertModel, which has no head"),
    "masked": (BertConfig(), {"architectures": ["BertForMaskedLM"]}, "saved as BertForMaskedLM, which has no head"),
    "classifier": (LlamaConfig(), {"architectures": ["LlamaForSequenceClassification"]}, "which has no head"),
    "embedder": (LlamaConfig(), {"architectures": ["LlamaModel"]}, "saved as LlamaModel, which has no head"),
    "unknown": (None, {"model_type": "brandnew"}, "a newer transformers"),
    "own code": (None, {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "--trust-remote-code runs"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_are_no_decoders(run, folder, tmp_path, command, kind):
    config, entries, part = REFUSED[kind]
    model = described(folder, tmp_path / "model", config, **entries)
    assert_error(call(run, command, model, tmp_path / "out"), part)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("with_config", [True, False], ids=["config", "no config"])
def test_adapter_folders(run, folder, tmp_path, command, with_config):
    model = tmp_path / "adapter"
    if with_config:
        shutil.copytree(folder, model)
    model.mkdir(exist_ok=True)
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    (model / "adapter_model.safetensors").touch()
    result = call(run, command, model, tmp_path / "out")
    assert_error(result, "merge it into its base model", "merge_and_unload().save_pretrained(")


def test_a_merged_model_beside_its_adapter_is_a_model(folder, tmp_path):
    from quantspec.cli.loading import Kind, find_source

    model = shutil.copytree(folder, tmp_path / "merged")
    (model / "adapter_config.json").write_text("{}")
    (model / "model.safetensors").touch()
    assert find_source(str(model)).kind is Kind.FOLDER


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_models_without_a_template(run, folder, pair, tmp_path, command):
    for model in (folder, pair):
        options = ["--chat"] if command == "generate" else []
        assert_error(call(run, command, model, tmp_path, *options), "no chat template", "instruction-tuned")


def test_tasks_without_a_template(run, folder, tmp_path):
    options = ("--tasks", "reference_choice", "--apply-chat-template")
    assert_error(call(run, "parity", folder, tmp_path, *options), "no chat template")


def test_a_template_that_takes_no_system_message(run, folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    refusal = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    (model / "chat_template.jinja").write_text(f"{refusal}{{{{ m.content }}}}{{% endfor %}}")
    assert_error(run("chat", model, "--system", "Be"), "chat template refuses the messages: no system here")


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_own_code_runs_where_it_is_trusted(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    model = described(folder, tmp_path / "model", model_type="own", architectures=["OwnForCausalLM"], auto_map=own)
    (model / "own.py").write_text(OWN_CODE)
    assert_error(run("inspect", model), "--trust-remote-code runs")
    status, out, err = run("inspect", model, "--trust-remote-code", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["model"] == "OwnForCausalLM"


# --- Wrong paths and files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_paths(run, folder, tmp_path, command):
    def refused(model: object, *parts: str) -> None:
        assert_error(call(run, command, model, tmp_path / "out"), *parts)
        assert not (tmp_path / "out").exists()

    refused("", "MODEL is empty")
    refused(" ", "MODEL is empty")
    refused(folder / "config.json", "is not a GGUF file", f"give its folder, '{folder}'")
    refused(tmp_path, "has no config.json")
    damaged = described(folder, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    refused(damaged, f"cannot read '{damaged}'", "not a valid JSON file")


def test_a_damaged_tokenizer_is_not_called_missing(run, folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "tokenizer.json").write_text("{")
    assert_error(run("generate", model, "Hi"), f"cannot load the tokenizer of '{model}'")
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert_error(run("generate", model, "Hi"), f"no tokenizer found with '{model}'")


def test_missing_weights(run, folder, monkeypatch):
    monkeypatch.undo()
    assert_error(run("generate", folder, "Hi"), f"cannot read '{folder}'", "no file named model.safetensors")


def test_a_revision_of_a_folder(run, folder):
    assert_error(run("generate", folder, "Hi", "--revision", "main"), "--revision is of a model on the Hub")


def test_a_prompt_longer_than_the_context(run, folder, pair):
    for model in (folder, pair):
        assert_error(run("generate", model, "a" * 600), "856 tokens are more than max_cache_len=512")


def test_text_that_is_not_utf_8(run, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert_error(run("generate", folder, "--file", tmp_path / "latin.txt"), "it is not UTF-8 text", "iconv")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é".encode("latin-1")), encoding="utf-8"))
    status = main(["generate", str(folder)])
    captured = capsys.readouterr()
    assert_error((status, captured.out, captured.err), "cannot read the prompt from stdin: it is not UTF-8")


# --- Left-overs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_convert_leaves_no_folder(run, folder, tmp_path, monkeypatch, failure, exists):
    def fail(*_: object) -> None:
        assert (tmp_path / "new").exists() == exists
        raise failure

    monkeypatch.setattr("quantspec.cli.loading.load_model", fail)
    if exists:
        (tmp_path / "new" / "pair").mkdir(parents=True)
    assert run("convert", folder, tmp_path / "new" / "pair")[0] == (2 if isinstance(failure, RuntimeError) else 130)
    assert [path.name for path in tmp_path.rglob("*")] == (["new", "pair"] if exists else [])


def test_a_failed_parity_leaves_no_folder(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("quantspec.cli.loading.load_model", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    amounts = ("--context-tokens", 32, "--scored-tokens", 16, "--prompts", 0, "--output", tmp_path / "report")
    assert_error(call(run, "parity", folder, tmp_path, *amounts), "broken")
    assert not (tmp_path / "report").exists()


def test_a_failed_bench_leaves_no_folder(run, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("quantspec.cli.bench._check_decode", lambda *_: None)
    monkeypatch.setattr(generate, "measure", fail)
    status, out, err = run("bench", "--out", tmp_path / "figures")
    assert (status, out) == (2, "")
    assert "broken" in err
    assert not (tmp_path / "figures").exists()


def test_a_folder_that_cannot_be_written_to(run, folder, tmp_path):
    (tmp_path / "file").touch()
    assert_error(run("convert", folder, tmp_path / "file" / "pair"), "cannot write to")


def test_figures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    errors.write_whole(file, "old")

    def write_half(path: Path, text: str, **_: object) -> None:
        path.write_bytes(text[:2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(KeyboardInterrupt):
        errors.write_whole(file, "new figures")
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert file.read_bytes() == b"old"


# --- What else the checkpoint says -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"num_beams": 4}, "generation mode 'beam_search' is not supported"),
        ({"num_beams": 2, "do_sample": True}, "set num_beams=1"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "generation option penalty_alpha is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "generation option prompt_lookup_num_tokens is not supported"),
        ({"cache_implementation": "static"}, "generation option cache_implementation is not supported"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_generation_config_that_is_not_obeyed(run, folder, pair, tmp_path, tokenizer, command, options, part):
    """Of a checkpoint and of a saved pair, whose file may be edited by hand."""
    for source in (folder, pair):
        changed = shutil.copytree(source, tmp_path / source.name)
        (changed / "generation_config.json").write_text(json.dumps(options), encoding="utf-8")
        (changed / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
        assert_error(call(run, command, changed, tmp_path), part)


def test_a_tokenizer_that_cannot_be_saved(run, folder, tmp_path, monkeypatch):
    def full(self, directory, **_):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    assert_error(run("convert", folder, tmp_path / "out"), "No space left on device")
    assert not (tmp_path / "out").exists()
