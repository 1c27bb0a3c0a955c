"""A real model, SmolLM2-135M, served and evaluated; ``python -m benchmarks.parity`` evaluates more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")

from gguf_reading import read_at_once
from serving_process import serving
from test_server import MODEL, SCHEMA, chat, complete, streamed

import quantspec
from quantspec.evals import load_smollm2
from quantspec.evals.adapter import QuantSpecLM
from quantspec.evals.parity import ParityOptions, parity

# One conversion for both.
pytestmark = pytest.mark.xdist_group("smollm2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of the saved pair: float32, weights in groups of 64, and so the cache, so that short texts are quantized."""
    with read_at_once():
        model, tokenizer = load_smollm2()
    path = tmp_path_factory.mktemp("smollm2") / "pair"
    quantspec.convert(model, kv_group_size=64, weight_group_size=64, self_check=False).save_pretrained(
        path, tokenizer=tokenizer
    )
    return path


def test_the_server_answers_as_it_should(folder):
    with serving(folder, "--name", MODEL, "--max-length", "256", "--gamma", "2", "--no-self-check") as server:
        client = server.client()
        assert [model.id for model in client.models.list()] == [MODEL]
        assert "Paris" in complete(client, prompt="The capital of France is", max_tokens=2).choices[0].text
        asked = {"messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 12}
        plain = chat(client, **asked, logprobs=True).choices[0]
        assert "".join(token.token for token in plain.logprobs.content) == plain.message.content
        # It begins and ends in the midst of words.
        stop = plain.message.content[9:14]
        texts, reasons, _ = streamed(chat(client, **asked, stop=stop, stream=True))
        assert (texts, reasons) == ([plain.message.content.partition(stop)[0]], ["stop"])
        sampled = asked | {"max_tokens": 4, "temperature": 1.0, "seed": 3, "n": 2, "presence_penalty": 0.5}
        first, again = ([choice.message.content for choice in chat(client, **sampled).choices] for _ in range(2))
        assert first == again
        assert first[0] != first[1]
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        person = json.loads(chat(client, **asked | {"max_tokens": 40}, response_format=form).choices[0].message.content)
        assert person.keys() == {"name", "age"}
        assert server.metric("spec_decode_num_accepted_tokens_total") > 10


def test_parity_with_the_quantized_pair(folder, lm_eval):
    lm = QuantSpecLM(str(folder), dtype="float32", device="cpu")
    options = ParityOptions(limit=1, batch_size=1, context_tokens=160, scored_tokens=24, prompts=0)
    # Longer than the 2G = 128 tokens that are not quantized.
    tasks = ["reference_choice", "niah_single_1@256"]
    report = parity(lm.qs, tokenizer=lm.tokenizer, tasks=tasks, options=options)
    assert report.passed, report
    needle = {row.role: row.value for row in report.tasks if row.task == "niah_single_1@256"}
    assert needle["target"] == 1.0
    assert report.acceptance["niah_single_1@256"]["draft_acceptance_rate"] > 0.5
