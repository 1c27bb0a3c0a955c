"""What a server takes on, from whom, and how it ends: keys, queue, size, load, anything that fits its description."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from serving_model import save_model
from serving_process import PATIENCE, Server, serving

# One process for both servers.
pytestmark = pytest.mark.xdist_group("server-limits")

KEYS = ("first-key", "second-key")
OPTIONS = ("--name", "tiny", "--no-self-check", "--kv-group-size", "16", "--gamma", "2")
ENDLESS = {"2": -100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    """Of short texts, so that whatever is asked for soon ends."""
    limits = ("--max-length", "96", "--max-sequences", "4", "--max-waiting", "8")
    keys = [part for key in KEYS for part in ("--api-key", key)]
    with serving(folder, *OPTIONS, *limits, *keys) as running:
        yield running


def complete(client: openai.OpenAI, **options: Any) -> Any:
    return client.completions.create(
        **{"model": "tiny", "prompt": "Once", "max_tokens": 8, "temperature": 0, **options}
    )


@pytest.mark.parametrize("key", KEYS)
def test_every_key_lets_in(server, key):
    assert complete(server.client(key)).choices[0].text


@pytest.mark.parametrize("key", ["wrong", "first-ke", "first-key2", "ключ".encode()])
def test_no_other_key_lets_in(server, key):
    header = b"Bearer " + (key if isinstance(key, bytes) else key.encode())
    # A body that nobody reads: who has no key is not told what is wrong with it.
    answer = httpx2.post(
        f"{server.url}/v1/completions", headers={b"Authorization": header}, content=b"{", timeout=PATIENCE
    )
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_without_a_key_only_health_and_metrics_are_told(server):
    assert server.get("/v1/models").status_code == 401
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/metrics").status_code == 200


def post(server: Server, body: bytes, path: str = "completions") -> httpx2.Response:
    headers = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "application/json"}
    return httpx2.post(f"{server.url}/v1/{path}", headers=headers, content=body, timeout=PATIENCE)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": [99999999]}',
        b'{"model": "tiny", "prompt": [99999999999999999999]}',
        b'{"model": "tiny", "prompt": "a", "top_k": 9223372036854775808}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1, "repetition_penalty": 1e-40}',
        b'{"model": "tiny", "prompt": "a", "repetition_penalty": 1e300}',
        b'{"model": "tiny", "prompt": []}',
        b'{"model": "tiny", "prompt": ""}',
    ],
    ids=lambda body: body[:40].decode("latin-1"),
)
def test_malformed_bodies(server, body):
    answer = post(server, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_arguments_of_a_tool_call_that_are_too_deep(server):
    function = {"name": "f", "arguments": "[" * 100_000}
    calls = [{"id": "a", "type": "function", "function": function}]
    body = {"model": "tiny", "messages": [{"role": "assistant", "content": "", "tool_calls": calls}]}
    answer = post(server, json.dumps(body).encode(), path="chat/completions")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_bodies_that_are_too_large(server):
    assert post(server, b" " * (16 * 2**20 + 1)).status_code == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(17):
            yield b" " * 2**20

    # Without a length that says so. It may close the connection while more is sent.
    with contextlib.suppress(httpx2.WriteError):
        assert post(server, chunks()).status_code == 413


def test_impossible_structures_end_alone(server):
    client = server.client(KEYS[0])
    bad = [{"$ref": "#/nowhere"}, {"type": "string", "pattern": "(?<=a)b"}, {"enum": []}]
    for schema in bad:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(openai.BadRequestError, match="json_schema"):
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=8, response_format=form
            )
    assert complete(client).choices[0].text


def test_load(server):
    """200 requests over 8 connections, a tenth left early and a tenth malformed: every other one is answered.

    Nothing is kept of them: the last half of them takes no memory.
    """
    client = server.client(KEYS[0])
    expected = {size: complete(client, prompt="x" * size, max_tokens=8).choices[0].text for size in (1, 17, 40)}

    def one(number: int) -> str:
        size = (1, 17, 40)[number % 3]
        options = {"prompt": "x" * size, "max_tokens": 8}
        if number % 10 == 0:
            stream = complete(client, **options | {"logit_bias": ENDLESS, "max_tokens": 50}, stream=True)
            next(iter(stream))
            stream.close()
            return "left"
        if number % 10 == 5:
            with pytest.raises(openai.BadRequestError):
                complete(client, temperature=-1)
            return "malformed"
        if number % 2:
            text = complete(client, **options).choices[0].text
        else:
            text = "".join(chunk.choices[0].text for chunk in complete(client, **options, stream=True))
        assert text == expected[size]
        return "answered"

    numbers = list(range(200))
    random.Random(0).shuffle(numbers)
    with ThreadPoolExecutor(8) as pool:
        done = Counter(pool.map(one, numbers[:100]))
        held = resident_bytes(server.process.pid)
        done += Counter(pool.map(one, numbers[100:]))
    assert done == {"left": 20, "malformed": 20, "answered": 160}
    server.wait_until_idle()
    assert server.metric("kv_cache_usage_perc") < 1
    assert resident_bytes(server.process.pid) - held < 8 * 2**20


def resident_bytes(process: int) -> int:
    """Memory that a process holds, as Linux tells it; 0 elsewhere."""
    status = Path(f"/proc/{process}/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


@pytest.mark.parametrize("mode", GenerationMode)
def test_anything_gets_an_answer_as_described(server, mode):
    """What fits the description of an endpoint, and what does not."""
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    for result in described.get_all_operations():
        operation = result.ok()

        @settings(max_examples=10)
        @given(case=operation.as_strategy(generation_mode=mode))
        def call(case: schemathesis.Case) -> None:
            headers = {"Authorization": f"Bearer {KEYS[0]}"}
            case.call_and_validate(headers=headers, checks=[*checks, negative_data_rejection], timeout=PATIENCE)

        # Nothing about a path without parameters and body can be wrong.
        with contextlib.suppress(Unsatisfiable):
            call()
    server.wait_until_idle()


def test_queue_and_drain(folder):
    """One runs, one waits, a third is told to come back; then the two are answered, and nobody else."""
    with serving(
        folder, *OPTIONS, "--max-sequences", "1", "--max-waiting", "1", "--drain-seconds", str(PATIENCE)
    ) as server:
        client = server.client()

        def long() -> Any:
            return complete(client, max_tokens=80, logit_bias=ENDLESS).usage.completion_tokens

        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(long)
            wait_for(lambda: server.metric("num_requests_running") == 1)
            second = pool.submit(long)
            wait_for(lambda: server.metric("num_requests_waiting") == 1)
            with pytest.raises(openai.RateLimitError) as refused:
                complete(client)
            assert refused.value.response.headers["Retry-After"]
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: server.get("/health").status_code == 503)
            with pytest.raises(openai.APIStatusError) as late:
                complete(client)
            assert late.value.status_code == 503
            assert [first.result(), second.result()] == [80, 80]
        assert server.process.wait(PATIENCE) == 0


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
