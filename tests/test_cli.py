"""Each command with real input and with wrong input: its output, its stderr and its exit status."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from cli_errors import assert_error
from tiny_models import tiny_model
from transformers import T5Config, TextStreamer

import quantspec
from quantspec import QuantSpecConfig
from quantspec.checkpoint.folder import DESCRIPTION_FILE, Description
from quantspec.cli import main
from quantspec.cli.loading import Kind, find_source
from quantspec.config import AUTO, DEFAULT_SPECULATIVE_TOKENS, WeightQuantizer
from quantspec.engine.loop import SpeculativeLoop
from quantspec.memory import expected_memory
from quantspec.versions import install_command

pytestmark = pytest.mark.xdist_group("cli")

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A saved tiny llama, whose tokenizer has one character a token and a chat template."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    tokenizer.chat_template = None
    return path


@pytest.fixture(scope="module")
def pair(folder):
    """The same model converted by the command line."""
    out = folder.parent / "pair"
    assert main(["convert", str(folder), str(out), "--weight-group-size", "64", "--kv-group-size", "16"]) == 0
    return out


@pytest.fixture(scope="module", autouse=True)
def load_each_pair_once():
    """Every call is a program of its own, but loading the same pair for each takes most of the time."""
    load_once = functools.cache(quantspec.from_pretrained)

    def load(*arguments, **options):
        qs = load_once(*arguments, **options)
        qs.reset()
        return qs

    with mock.patch("quantspec.from_pretrained", load):
        yield


def expected_text(folder, tokenizer, prompt: str, count: int) -> str:
    """What Hugging Face generates greedily; nothing is quantized in so short a text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


# --- The program -----------------------------------------------------------------------------------------------------


def test_help_lists_commands_without_importing_torch():
    code = "import sys; from quantspec.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    for name in ("generate", "chat", "inspect", "convert", "eval"):
        assert f" {name} " in done.stdout


def test_version(run):
    assert run("--version") == (0, f"quantspec {quantspec.__version__}\n", "")


def test_defaults_in_the_help_are_those_of_the_config(run):
    text = " ".join(run("convert", "--help")[1].replace("│", " ").split())
    defaults = QuantSpecConfig()
    for name in ("kv_group_size", "weight_group_size", "weight_quantizer"):
        assert f"[default: {getattr(defaults, name)}]" in text
    assert f"[default: {DEFAULT_SPECULATIVE_TOKENS} on a GPU, {AUTO} on a CPU and in a server]" in text
    for quantizer in WeightQuantizer:
        assert quantizer in text


def test_options_and_errors_import_neither_torch_nor_the_rest_of_quantspec():
    """So the command line takes its limits, choices and defaults from where they are."""
    code = (
        "import sys, quantspec.config, quantspec.errors, quantspec.cli.options\n"
        "loaded = [name for name in sys.modules if name.startswith(('torch', 'transformers', 'quantspec.'))]\n"
        "print(*sorted(name for name in loaded if not name.startswith('quantspec.cli')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["quantspec.config", "quantspec.errors", "quantspec.logging", "quantspec.versions"]


def test_unknown_command_and_option(run, folder):
    assert_error(run("generat"), "No such command 'generat'. Did you mean 'generate'? (see `quantspec --help`)")
    assert_error(run("generate", folder, "Hi", "--gama", "2"), "--gama")
    assert_error(run("generate"), "Missing argument 'MODEL' (see `quantspec generate --help`)")


def test_debug_shows_the_traceback(run):
    status, out, err = run("generate", "./nowhere", "Hi", "--debug")
    assert (status, out) == (2, "")
    assert "Traceback" in err
    assert err.rstrip().splitlines()[-1].startswith("error: there is no folder or file './nowhere'")


def test_colour_unless_no_color(run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in run("generate", "./nowhere", "Hi")[2]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in run("generate", "./nowhere", "Hi")[2]


# --- generate --------------------------------------------------------------------------------------------------------


def test_prompt_from_argument_file_and_stdin(run, pair, folder, tokenizer, tmp_path):
    (tmp_path / "prompt.txt").write_text("Hello")
    options = ("--max-new-tokens", 6, "--greedy")
    expected = (0, expected_text(folder, tokenizer, "Hello", 6) + "\n", "")
    assert run("generate", folder, "Hello", *options, "--no-self-check") == expected
    assert run("generate", pair, "--file", tmp_path / "prompt.txt", *options) == expected
    assert run("generate", pair, "-", *options, stdin="Hello") == expected


def test_json(run, folder, tokenizer):
    status, out, err = run("generate", folder, "Hello", "--json", "--gamma", 2, "--max-new-tokens", 6, "--greedy")
    answer = json.loads(out)
    assert (status, err) == (0, "")
    assert answer["text"] == expected_text(folder, tokenizer, "Hello", 6)
    assert (answer["prompt_tokens"], answer["generated_tokens"]) == (5, 6)
    assert answer["statistics"]["num_speculative_tokens"] == 2


def test_drafts_from_the_text(run, pair, folder):
    call = ("--json", "--gamma", 3, "--max-new-tokens", 30, "--greedy")
    for model in (pair, folder):
        texts = {}
        for draft in ("self", "lookup"):
            status, out, _ = run("generate", model, "Hello hello hello", *call, "--draft", draft)
            answer = json.loads(out)
            texts[draft] = answer["text"]
            assert status == 0
            assert [name for name, count in answer["statistics"]["drafted_by_source"].items() if count] == [draft]
        assert texts["self"] == texts["lookup"]


def test_sampling_seed_stop_and_stats(run, pair):
    sampled = ("generate", pair, "Hello", "--temperature", "0.9", "--top-k", 30, "--max-new-tokens", 12)
    first, again, other = (run(*sampled, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other
    status, out, err = run(*sampled, "--seed", 1, "--stop", first[2], "--stats")
    assert (status, out.rstrip("\n")) == (0, first[: first.index(first[2]) + 1].rstrip("\n"))
    assert "draft_acceptance_rate" in err


def test_chat_template_of_a_prompt(run, pair, tokenizer, folder):
    status, out, _ = run("generate", pair, "Hi", "--chat", "--greedy", "--max-new-tokens", 5)
    assert (status, out) == (0, expected_text(folder, tokenizer, "u:Hi|a:", 5) + "\n")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["Hi", "--gamma", "many"], ["--gamma", "neither a number nor 'auto'"]),
        (["Hi", "--gamma", "16"], ["num_speculative_tokens must be between 0 and 15, not 16"]),
        (["Hi", "--kv-group-size", "48"], ["kv_group_size must be a power of two"]),
        (["Hi", "--weight-quantizer", "awq"], ["--weight-quantizer", "tinygemm"]),
        (["Hi", "--dtype", "int8"], ["error: Invalid value for '--dtype': 'int8' is not one of 'auto'"]),
        (["Hi", "--seed", "-1"], ["--seed"]),
        (["Hi", "--device", "toaster"], ["'toaster' is not a device"]),
        (["Hi", "--device", "cuda:99"], ["there is no device 'cuda:99'"]),
        (["Hi", "--greedy", "--top-k", "3"], ["greedy search does not sample"]),
        (["Hi", "--file", "prompt.txt"], ["cannot read the prompt from 'prompt.txt'"]),
        (["--file", "no-such.txt"], ["cannot read the prompt from 'no-such.txt': No such file"]),
        ([""], ["the prompt is empty"]),
        ([], ["the prompt is empty"]),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_loading(run, folder, monkeypatch, arguments, parts):
    monkeypatch.setattr("quantspec.cli.loading.load_model", lambda *_: pytest.fail("weights were loaded"))
    assert_error(run("generate", folder, *arguments), *parts)


def test_a_prompt_of_white_space_is_one_and_an_empty_line_on_stdin_is_none(run, folder):
    status, out, _ = run("generate", folder, " ", "--max-new-tokens", 2, "--no-self-check", "--json")
    assert status == 0
    assert json.loads(out)["generated_tokens"] == 2
    assert_error(run("generate", folder, stdin="\n"), "the prompt is empty")


def test_closed_stdin(run, folder, monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(io, "StringIO", lambda _="": closed)
    assert_error(run("generate", folder), "no prompt", "on stdin")
    assert_error(run("chat", folder), "no stdin")


def test_models_that_are_not_there(run, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_error(run("generate", tmp_path / "none", "Hi"), "there is no folder or file")
    assert_error(run("generate", "none.gguf", "Hi"), "there is no GGUF file 'none.gguf'")
    assert_error(run("generate", tmp_path, "Hi"), "has no config.json")
    assert_error(run("generate", "no-such-owner/no-such-model", "Hi"), "cannot load 'no-such-owner/no-such-model'")
    (tmp_path / "notes.txt").touch()
    assert_error(run("generate", tmp_path / "notes.txt", "Hi"), "is not a GGUF file")
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    assert_error(run("generate", tmp_path / "broken.gguf", "Hi"), "broken.gguf", "is it complete?")


def test_weights_that_are_cut_short(run, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_error(run("generate", copy, "Hi"), f"cannot read '{copy}'", "is it complete?")


def test_a_saved_pair_that_is_cut_short(run, pair, tmp_path):
    copy = shutil.copytree(pair, tmp_path / "copy")
    weights = copy / "quantspec.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_error(run("generate", copy, "Hi"), f"'{weights}' has", "(`quantspec convert` writes a new one)")


def test_without_arguments_it_says_what_there_is(run):
    status, out, err = run()
    assert (status, err) == (0, "")
    assert "generate" in out


def test_unsupported_models(run, tmp_path, tokenizer):
    tiny_model("doge").save_pretrained(tmp_path / "doge")
    tokenizer.save_pretrained(tmp_path / "doge")
    # By its module; transformers 5.15 loads one that is not causal at all, which is said then.
    assert_error(run("generate", tmp_path / "doge", "Hi"), "cannot convert", "supported")
    assert_error(run("inspect", tmp_path / "doge"), "cannot convert module 'model.layers.0.self_attn'")
    T5Config().save_pretrained(tmp_path / "t5")
    assert_error(run("inspect", tmp_path / "t5"), "T5Config")
    tiny_model("llama").save_pretrained(tmp_path / "mute")
    assert_error(run("generate", tmp_path / "mute", "Hi"), "no tokenizer found")


def test_prompt_longer_than_the_context(run, pair):
    assert_error(run("generate", pair, "a" * 600), "more than max_cache_len=512")


@pytest.fixture
def loops(monkeypatch) -> list[tuple]:
    """What each decoding loop ran on and, last, how many tokens it made; of pairs that only seem to be compiled."""
    seen = []
    run_loop = SpeculativeLoop.run

    def run(loop):
        run_loop(loop)
        call, prompts = loop.call, [request.prompt.tolist() for request in loop.progress.requests]
        chosen = (
            loop.cache.capacity,
            any(request.do_sample for request in loop.progress.requests),
            [type(one) for one in call.processors],
            loop.draft_count.most,
        )
        seen.append((*chosen, prompts, loop.progress.num_generated()))

    monkeypatch.setattr(SpeculativeLoop, "run", run)
    monkeypatch.setattr("quantspec.pair.pair.compile_graph", lambda graph: graph.forward)
    return seen


def test_warm_up_is_the_call_itself_cut_short(run, pair, loops):
    """What is compiled depends on all of these; a stop string or EOS does not end it sooner."""
    call = ("generate", pair, "Hello" * 8, "--compile", "--temperature", 0.9, "--seed", 1, "--gamma", 2)
    text = run(*call, "--max-new-tokens", 100)[1]
    status, _, err = run(*call, "--max-new-tokens", 100, "--stop", text[2], "--stats")
    warm_up, timed = loops[-2:]
    assert (status, warm_up[:-1]) == (0, timed[:-1])
    assert warm_up[:-1] == loops[0][:-1]
    assert timed[-1] <= 3
    assert 20 <= warm_up[-1] <= 22
    assert f"{timed[-1]} generated" in err


def test_warm_up_fits_where_the_call_does(run, pair, folder, tokenizer, loops):
    options = ("--max-cache-len", 10, "--max-new-tokens", 5, "--greedy", "--compile")
    assert run("generate", pair, "Hello", *options) == (0, expected_text(folder, tokenizer, "Hello", 5) + "\n", "")
    assert [loop[-1] for loop in loops] == [5, 5]


def test_warm_up_of_a_chat_samples_as_the_chat_does(run, pair, loops):
    status, _, err = run("chat", pair, "--compile", "--top-k", 5, "--max-new-tokens", 30, stdin="/stats\nHello\n")
    assert status == 0
    assert "nothing said yet" in err
    assert len(loops) == 2
    assert loops[0][:-2] == loops[1][:-2]
    assert loops[0][1]


def test_stop_strings_of_the_models_generation_config(run, pair, folder, tokenizer, tmp_path):
    text = expected_text(folder, tokenizer, "Hello", 6)
    stopping = shutil.copytree(folder, tmp_path / "stopping")
    path = stopping / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stop_strings": [text[2]]}))
    status, out, err = run("generate", stopping, "Hello", "--greedy", "--max-new-tokens", 6, "--no-self-check")
    assert (status, out, err) == (0, text[: text.index(text[2]) + 1] + "\n", "")


# --- chat ------------------------------------------------------------------------------------------------------------


def test_conversation_on_a_kept_cache(run, pair, folder, tokenizer):
    script = "Hi\n\n/stats\nAnd\n/stats\n/what\n/reset\nHi\n/exit\nnot read\n"
    status, out, err = run("chat", pair, "--greedy", "--max-new-tokens", 5, stdin=script)
    first = expected_text(folder, tokenizer, "u:Hi|a:", 5)
    second = expected_text(folder, tokenizer, f"u:Hi|a:{first}|u:And|a:", 5)
    assert (status, out) == (0, f"{first}\n{second}\n{first}\n")
    cached = [line for line in err.splitlines() if line.startswith("tokens ")]
    assert "cached" not in cached[0]
    assert "of them cached" in cached[1]
    assert "there is no command '/what'" in err


def test_end_of_stdin_ends_a_chat_and_system_message_counts(run, pair, folder, tokenizer):
    status, out, _ = run("chat", pair, "--greedy", "--max-new-tokens", 5, "--system", "Be", stdin="Hi")
    assert (status, out) == (0, expected_text(folder, tokenizer, "s:Be|u:Hi|a:", 5) + "\n")


def press_ctrl_c() -> None:
    """As Python answers the signal, but here and now: it may do so within whatever runs next, which may drop errors."""
    handler = signal.getsignal(signal.SIGINT)
    assert callable(handler)
    handler(signal.SIGINT, None)


def test_ctrl_c_ends_the_answer_alone(run, pair, monkeypatch):
    puts = []
    put = TextStreamer.put
    handler = signal.getsignal(signal.SIGINT)

    def press_at_the_third(self, value):
        puts.append(value)
        put(self, value)
        if len(puts) == 4:
            press_ctrl_c()

    monkeypatch.setattr(TextStreamer, "put", press_at_the_third)
    script = "Hi\n/stats\nMore\n/stats\n"
    status, _, err = run("chat", pair, "--greedy", "--max-new-tokens", 20, stdin=script)
    lines = [line for line in err.splitlines() if line.startswith("tokens ")]
    assert status == 0
    assert "3 generated" in lines[0]
    assert "of them cached" in lines[1]
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_while_reading_the_message(run, pair, monkeypatch):
    """Before the first token the message is forgotten, and the program goes on."""
    pressed = []
    put = TextStreamer.put

    def press_once(self, value):
        if not pressed:
            pressed.append(True)
            press_ctrl_c()
        put(self, value)

    monkeypatch.setattr(TextStreamer, "put", press_once)
    status, out, err = run("chat", pair, "--greedy", "--max-new-tokens", 5, stdin="Bye\nHi\n")
    assert status == 0
    assert "interrupted" in err
    monkeypatch.undo()
    assert out.count("\n") == 1


def test_a_message_too_long_is_an_error_of_its_own(run, pair):
    status, out, err = run("chat", pair, "--greedy", "--max-new-tokens", 5, stdin=f"{'a' * 600}\nHi\n")
    assert (status, out.count("\n")) == (0, 1)
    assert "error: " in err
    assert "max_cache_len=512" in err


def test_chat_needs_a_template(run, tmp_path, tokenizer):
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert_error(run("chat", tmp_path, "--no-self-check"), "no chat template", "instruction-tuned")


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_tells_what_convert_makes(run, folder):
    """From the config alone: the same layers, linears and bytes as the converted model has."""
    config_only = folder.parent / "config-only"
    config_only.mkdir()
    (config_only / "config.json").write_text((folder / "config.json").read_text())
    arguments = ("--kv-group-size", 16, "--context", 200, "--batch-size", 2, "--json")
    status, out, err = run("inspect", config_only, *arguments)
    facts = json.loads(out)
    assert (status, err) == (0, "")
    qs = quantspec.convert(tiny_model("llama"), kv_group_size=16, self_check=False)
    assert [layer["module"] for layer in facts["attention"]] == [layer.module for layer in qs.layers]
    assert [(row["name"], row["group_size"]) for row in facts["linears"]] == [
        (r.name, r.group_size) for r in qs.linears
    ]
    assert facts["memory"]["weights"] == qs.weight_bytes()
    expected = expected_memory(qs.layers, 200, 2, kv_group_size=16, dtype=torch.float32, max_cache_len=512)
    assert facts["memory"]["cache"] == expected
    on_cpu = expected_memory(qs.layers, 200, 2, kv_group_size=16, dtype=torch.float32, max_cache_len=512, device="cpu")
    assert on_cpu == {**expected, "decoded": facts["memory"]["decoded_copy_on_cpu"]}


def test_inspect_shows_a_saved_pair_as_it_was_saved(run, pair):
    """Its KV groups of 16 and INT4 groups of 64 are options of the pair, not defaults."""
    status, out, _ = run("inspect", pair, "--json")
    facts = json.loads(out)
    qs = quantspec.from_pretrained(pair, self_check=False)
    assert (status, facts["kv_group_size"], facts["dtype"]) == (0, 16, "float32")
    assert [(row["name"], row["group_size"], row["note"]) for row in facts["linears"]] == [
        (report.name, report.group_size, report.note) for report in qs.linears
    ]
    assert json.loads(run("inspect", pair, "--kv-group-size", 32, "--json")[1])["kv_group_size"] == 32
    assert_error(run("inspect", pair, "--weight-group-size", 32), "weight_group_size cannot change on loading")


def test_inspect_prints_tables(run, tmp_path):
    tiny_model("gemma2").config.save_pretrained(tmp_path)
    status, out, _ = run("inspect", tmp_path, "--layers")
    assert status == 0
    for text in (
        "Gemma2ForCausalLM",
        "window of 12",
        "50",
        "model.layers.* (2)",
        "  mlp.up_proj",
        "full precision",
        "total",
        "decoded copy",
    ):
        assert text in out


def test_inspect_refuses_a_context_that_does_not_fit(run, folder):
    too_long = "a text of 513 tokens is longer than the 512 that a pair would take (shorten --context"
    assert_error(run("inspect", folder, "--context", 513), too_long)
    assert_error(run("inspect", folder, "--context", 0), "--context")


# --- convert ---------------------------------------------------------------------------------------------------------


def test_a_pair_is_known_by_its_description(tmp_path):
    """The command line has a name of its own for the file, so that it need not import torch."""
    (tmp_path / "config.json").touch()
    assert find_source(str(tmp_path)).kind is Kind.FOLDER
    (tmp_path / DESCRIPTION_FILE).touch()
    assert find_source(str(tmp_path)).kind is Kind.PAIR


def test_converted_folder_loads_and_says_the_same(run, pair, folder, tokenizer):
    assert (pair / DESCRIPTION_FILE).is_file()
    status, out, err = run("generate", pair, "Hello", "--greedy", "--max-new-tokens", 6, "--gamma", 2)
    assert (status, out, err) == (0, expected_text(folder, tokenizer, "Hello", 6) + "\n", "")


def test_convert_overwrites_nothing(run, pair, folder, tmp_path):
    (tmp_path / "mine.txt").touch()
    assert_error(run("convert", folder, tmp_path), "exists and is not an empty folder")
    assert_error(run("convert", pair, tmp_path / "new"), "is a saved pair")
    assert_error(run("convert", folder), "Missing argument 'OUT'")
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_options_a_saved_pair_cannot_change(run, pair):
    assert_error(run("generate", pair, "Hi", "--weight-group-size", 32), "weight_group_size cannot change")
    result = run("generate", pair, "Hi", "--weight-quantizer", "hqq")
    assert_error(result, "pair was made with 'tinygemm'; convert", "`quantspec convert`")


@pytest.fixture
def weak_cpu(monkeypatch):
    """No GPU, and a CPU that does not multiply in half precision."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("quantspec.passes.cpu_lacks_half_matmul", lambda: True)


@pytest.mark.parametrize(("dtype", "runs_in"), [("bfloat16", "float32"), ("float16", "float16")])
def test_convert_keeps_the_checkpoints_dtype(run, weak_cpu, tokenizer, tmp_path, monkeypatch, dtype, runs_in):
    """Wherever it runs; what such a CPU runs is float32, unless the pair allows no other."""
    tiny_model("llama", getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    status, out, err = run("convert", tmp_path / "model", tmp_path / "pair", "--no-self-check")
    assert (status, out, err) == (0, "", f"saved to {tmp_path / 'pair'} in {dtype}\n")
    assert Description.read(tmp_path / "pair").dtype == dtype
    ran_in = []
    monkeypatch.setattr("quantspec.cli.generate._generate", lambda qs, *_, **__: ran_in.append(qs.model.dtype))
    for source in ("model", "pair"):
        assert run("generate", tmp_path / source, "Hi", "--no-self-check")[0] == 0
    assert ran_in == [torch.float32, getattr(torch, runs_in)]
    assert run("convert", tmp_path / "model", tmp_path / "asked", "--no-self-check", "--dtype", "float32")[0] == 0
    assert Description.read(tmp_path / "asked").dtype == "float32"


def test_inspect_tells_the_checkpoints_dtype(run, weak_cpu, tmp_path):
    """Also on a machine that would run another."""
    config = tiny_model("llama").config
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    assert json.loads(run("inspect", tmp_path, "--json")[1])["dtype"] == "bfloat16"
    assert json.loads(run("inspect", tmp_path, "--dtype", "float32", "--json")[1])["dtype"] == "float32"


def test_convert_refuses_what_cannot_be_saved_before_loading(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("quantspec.cli.loading.load_model", lambda *_: pytest.fail("weights were loaded"))
    odd = shutil.copytree(folder, tmp_path / "odd")
    (odd / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.5}')
    assert_error(run("convert", odd, tmp_path / "pair"), "generation config cannot be saved (`temperature`: ")


# --- eval ------------------------------------------------------------------------------------------------------------


def test_eval_hands_everything_to_lm_eval(run, monkeypatch):
    module = ModuleType("quantspec.evals.lm_eval_command")
    seen = []
    module.run_lm_eval = lambda arguments: seen.append(arguments) or 3
    monkeypatch.setitem(sys.modules, "quantspec.evals.lm_eval_command", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert run("eval", "--tasks", "a,b", "--help", "-x", "y")[0] == 3
    assert seen == [["--tasks", "a,b", "--help", "-x", "y"]]


def test_help_of_eval_begins_with_what_is_quantspecs_own(run, monkeypatch):
    """Roles and offline tasks come before lm-eval's options, and alone where that is missing."""
    module = ModuleType("quantspec.evals.lm_eval_command")
    module.run_lm_eval = lambda arguments: print("HERE", arguments) or 0
    monkeypatch.setitem(sys.modules, "quantspec.evals.lm_eval_command", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for width in (60, 80, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        status, out, err = run("eval", "--help")
        assert (status, err) == (0, "")
        own, theirs = out.split("HERE")
        assert "['run', '--help']" in theirs
        for role in ("speculative", "target", "draft", "reference"):
            assert role in own
        for task in (Path(__file__).parents[1] / "evals" / "tasks").glob("*.yaml"):
            assert task.stem in own
        assert "--include_path" in own
        assert "--model_args pretrained=MODEL" in own
        assert "…" not in own
        assert all(len(line) <= width for line in own.splitlines())
        assert run("eval", "-h")[1] == out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("eval", "--help") == (0, own, "")


def test_eval_without_a_model_says_so(run):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
    for arguments in (["--tasks", "reference_choice"], [], ["run"], ["--model_args", "role=target"]):
        assert_error(run("eval", *arguments), "eval has no model", "give --model_args pretrained=MODEL")


def test_eval_without_lm_eval(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_error(run("eval", "--tasks", "a"), "lm-eval is not installed", install_command("eval"))
