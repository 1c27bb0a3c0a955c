"""Two replicas of a tiny model on Ray Serve: the same answers as one engine, routed by how texts begin."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

import httpx2
import ray
from conftest import GROUP, characters
from openai import AuthenticationError, BadRequestError, OpenAI
from ray import serve
from serving_process import free_port
from step_by_step import random_prompt
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantspec.model import convert
from quantspec.serving.ray import ReplicaOptions, build, prefix_of, ranking

KEY = "secret"


@pytest.fixture(scope="module")
def address(saved_model) -> Iterator[str]:
    """Of two replicas."""
    with pytest.MonkeyPatch.context() as patch:
        # On a busy machine Ray gives up what is slow to start.
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "300")
        patch.setenv("RAY_agent_register_timeout_ms", "300000")
        patch.setenv("RAY_raylet_start_wait_time_s", "300")
        yield from _serving(saved_model)


def _serving(saved_model: Path) -> Iterator[str]:
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    port = free_port()
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": env},
        configure_logging=False,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = ReplicaOptions(
            model=str(saved_model),
            name="tiny",
            gpus=0,
            min_replicas=2,
            max_replicas=2,
            api_keys=[KEY],
            conversion={"kv_group_size": GROUP},
            engine={"max_sequences": 2, "max_length": 256, "max_num_batched_tokens": 2 * GROUP},
        )
        serve.run(build(options), name="tiny")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def client(address) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=120)


def text_of(client: OpenAI, prompt: str) -> str:
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0).choices[0].text


def test_replicas_answer_as_a_pair_does(client, saved_model):
    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    model = AutoModelForCausalLM.from_pretrained(saved_model)
    qs = convert(model, kv_group_size=GROUP, self_check=False)
    for seed in range(4):
        prompt = characters(random_prompt(2 * GROUP, seed))
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = qs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert text_of(client, prompt) == tokenizer.decode(new, skip_special_tokens=True)


def test_a_stream_comes_in_pieces(client):
    prompt = characters(random_prompt(2 * GROUP, 1))
    stream = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0, stream=True)
    pieces = [chunk.choices[0].text for chunk in stream]
    assert len(pieces) > 1
    assert "".join(pieces) == text_of(client, prompt)


def test_a_beginning_is_prefilled_once_for_both(client):
    """A text that begins like an earlier one finds that cached, so it went to the replica that has it."""
    for seed in range(8):
        body = {"model": "tiny", "prompt": characters(random_prompt(8 * GROUP, seed + 20)), "max_tokens": 4}
        first, second = (client.completions.create(**body).usage for _ in range(2))
        assert first.prompt_tokens_details.cached_tokens == 0
        assert second.prompt_tokens_details.cached_tokens > 0


def test_errors_are_those_of_a_single_server(address, client):
    with pytest.raises(BadRequestError, match="unknown parameter"):
        client.completions.create(model="tiny", prompt="abc", extra_body={"no_such": 1})
    with pytest.raises(AuthenticationError):
        text_of(OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0), "abc")
    assert httpx2.get(f"{address}/health", timeout=60).json() == {"status": "ok"}
    assert httpx2.get(f"{address}/metrics", timeout=60).status_code == 404
    large = httpx2.post(
        f"{address}/v1/completions", headers={"Authorization": f"Bearer {KEY}"}, content=b"x" * (17 * 2**20), timeout=60
    )
    assert large.status_code == 413


def test_a_client_that_leaves_frees_its_row(client):
    """More streams than rows are left after a token each, and the next request is answered."""
    for seed in range(6):
        prompt = characters(random_prompt(GROUP, seed))
        stream = client.completions.create(model="tiny", prompt=prompt, max_tokens=200, temperature=0, stream=True)
        next(iter(stream))
        stream.close()
    started = time.monotonic()
    text_of(client, characters(random_prompt(GROUP, 7)))
    assert time.monotonic() - started < 60


def test_a_beginning_stays_with_its_replica():
    names = [f"replica{number}" for number in range(4)]
    prefixes = [f"beginning{number}" for number in range(200)]
    first = {prefix: ranking(prefix, names, [0] * 4)[0] for prefix in prefixes}
    counts = [list(first.values()).count(index) for index in range(4)]
    assert min(counts) > 20
    # Whose replica has gone go elsewhere; the others stay.
    for prefix in prefixes:
        again = ranking(prefix, names[:3], [0] * 3)[0]
        assert again == first[prefix] or first[prefix] == 3


def test_a_busy_replica_gives_texts_away():
    names = ["a", "b"]
    (own,) = {ranking("text", names, loads)[0] for loads in ([0, 0], [3, 3], [4, 4])}
    loads = [0, 0]
    loads[own] = 4
    assert ranking("text", names, loads)[0] == own
    loads[own] = 5
    assert ranking("text", names, loads)[0] != own


def test_without_a_text_the_idle_replica_answers():
    assert ranking("", ["a", "b", "c"], [2, 1, 0]) == [2, 1, 0]
    for body in (b"no json", b"[]", b"{}", b'{"messages": 3}', b'{"messages": ["text"]}', b"\xff"):
        assert prefix_of(body, []) == ""


def test_the_turns_of_a_conversation_begin_alike():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    later = [*turns, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "More"}]
    first, second = (prefix_of(json.dumps({"messages": messages}).encode(), []) for messages in (turns, later))
    assert first == second
    other = [turns[0], {"role": "user", "content": "Good morning"}]
    assert prefix_of(json.dumps({"messages": other}).encode(), []) != first


def test_keys_do_not_share_a_beginning():
    body = b'{"messages": [{"role": "user", "content": "hello"}]}'
    assert prefix_of(body, [(b"authorization", b"Bearer a")]) != prefix_of(body, [(b"authorization", b"Bearer b")])
