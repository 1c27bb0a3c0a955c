"""Converted models shared by all tests, since converting takes seconds, and Hypothesis profiles."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

# Over models of two layers torch's cache of what it has traced costs a quarter of a conversion and saves nothing.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

import pytest
import torch

# Without a GPU the Triton kernels run in the interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests that convert the same model share its capture; worker processes inherit the folder of the first.
if "QUANTSPEC_CACHE" not in os.environ:
    _captures = tempfile.TemporaryDirectory()
    os.environ["QUANTSPEC_CACHE"] = _captures.name

import interpreter
from hypothesis import HealthCheck, settings
from step_by_step import random_prompt
from tiny_models import tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

import quantspec
from quantspec.cli import main
from quantspec.config import DEFAULT_SPECULATIVE_TOKENS

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.patch_once()

# What is imported stays: collections of garbage that walk over it take 8% of a conversion.
gc.freeze()

# Converting and generating make examples slow and uneven; shared models are stateless between calls, as tests show.
_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
}
settings.register_profile("ci", derandomize=True, max_examples=12, stateful_step_count=25, **_COMMON)
settings.register_profile("nightly", max_examples=400, stateful_step_count=60, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# G of the shared models: small, so that short texts are quantized and flushed.
GROUP = 16


def _convert(architecture: str, dtype: torch.dtype = torch.float32, **overrides) -> quantspec.QuantSpecModel:
    return quantspec.convert(tiny_model(architecture, dtype, **overrides), kv_group_size=GROUP, self_check=False)


# Groups that take a minute or more, and have few tests: pytest-xdist would start them last, by their numbers of tests.
_LONGEST = ("ranks", "smollm2", "test_docs", "compile")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests run in one process, which makes what they share once, unless they say otherwise; longest first."""

    def place(item: pytest.Item) -> int:
        group = next(item.iter_markers("xdist_group")).args[0]
        return _LONGEST.index(group) if group in _LONGEST else len(_LONGEST)

    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=place)


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory):
    """Durations that tests measure are not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def drafts_as_on_a_gpu():
    """Where no number is given: on a CPU measured times might leave nothing drafted, and so nothing tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantspec.pair.pair.AUTO", DEFAULT_SPECULATIVE_TOKENS)
        patch.setattr("quantspec.serving.sizes.AUTO", DEFAULT_SPECULATIVE_TOKENS)
        yield


def _hidden_methods(qs: quantspec.QuantSpecModel) -> list[str]:
    """Methods that an attribute of the pair, its model or its graphs hides."""
    parts = (qs, qs.model, qs.pair, qs.session)
    return [name for part in parts for name in vars(part) if callable(getattr(type(part), name, None))]


@pytest.fixture(autouse=True)
def shared_models_keep_their_methods(request):
    """``monkeypatch.setattr`` leaves an inherited method as the object's own; ``setitem(vars(...), ...)`` does not."""
    yield
    pairs = {name: it for name, it in request.node.funcargs.items() if isinstance(it, quantspec.QuantSpecModel)}
    left = {name: _hidden_methods(qs) for name, qs in pairs.items()}
    assert not any(left.values()), f"a test left these on models that others use: {left}"


@pytest.fixture(scope="session")
def qs() -> quantspec.QuantSpecModel:
    """A converted two-layer llama, float32, vocabulary of 96, 512 positions."""
    return _convert("llama")


@pytest.fixture(scope="session", params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def half_qs(request) -> quantspec.QuantSpecModel:
    """The same llama in half precision."""
    return _convert("llama", request.param)


@pytest.fixture(scope="session")
def table_positions_qs() -> quantspec.QuantSpecModel:
    """A converted gpt2 with a table of 48 positions: one position too many is an index error."""
    return _convert("gpt2", n_positions=48)


def characters(ids: Sequence[int]) -> str:
    """The text of ids 3..95 in the test tokenizer."""
    return "".join(chr(30 + token) for token in ids)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One printable character per token for ids 3..95, after ``<pad>``, ``<s>`` and ``</s>``."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(30 + i): i for i in range(3, 96)}}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )


@pytest.fixture(scope="session")
def saved_model(tokenizer, tmp_path_factory) -> Path:
    """Folder of a tiny llama and the test tokenizer, with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="session")
def lm_eval(tmp_path_factory) -> Iterator[None]:
    """For tests with tasks: one process of all reads lm-eval's own thousands of files, once."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
    from lm_eval.tasks import _index

    build = _index.TaskIndex.build
    own = Path(_index.__file__).parent
    folder = tmp_path_factory.getbasetemp()
    # The folder of a worker is in that of the run.
    kept = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "tasks.pickle"

    def own_index(options: dict[str, bool]) -> dict[str, object]:
        if not kept.exists():
            written = folder / kept.name
            written.write_bytes(pickle.dumps(build([own], **options)))
            written.replace(kept)
        return pickle.loads(kept.read_bytes())

    def build_once(paths: Sequence[Path], **options: bool) -> dict[str, object]:
        index: dict[str, object] = {}
        for path in paths:
            index |= own_index(options) if path == own else build([path], **options)
        return index

    with mock.patch.object(_index.TaskIndex, "build", staticmethod(build_once)):
        yield


@pytest.fixture(scope="session")
def tiny_tasks(tmp_path_factory) -> Path:
    """Folder of lm-eval tasks for the test tokenizer: ``tiny_choice``, ``tiny_rolling`` and ``tiny_write``."""
    folder = tmp_path_factory.mktemp("tasks")
    contexts = [characters(random_prompt(5 * GROUP + 3, seed)) for seed in range(4)]
    documents = [{"context": text, "choices": ["abc", "xyz"], "answer": len(text) % 2} for text in contexts]
    (folder / "documents.json").write_text(json.dumps(documents))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.json")}},
        "test_split": "test",
    }
    tasks = {
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
        },
        "tiny_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{context}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
        "tiny_write": {
            "output_type": "generate_until",
            "doc_to_text": "{{context}}",
            "doc_to_target": "",
            "generation_kwargs": {"do_sample": False, "max_gen_toks": 12, "until": []},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """``run(*arguments, stdin=...)`` gives exit status, stdout and stderr of the command line."""

    # A process of its own finds this in its environment when it imports transformers, which these tests have done.
    disable_progress_bar()

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield call
    enable_progress_bar()
