"""Converted models shared by all tests, since converting takes seconds, and Hypothesis profiles."""

from __future__ import annotations

import os

import pytest
import torch

# Without a GPU the Triton kernels run in the interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings
from tiny_models import tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import quantspec

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
