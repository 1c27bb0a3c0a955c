"""Replicas of a tiny model on Ray Serve: answers as of one engine, routed by how texts begin, as many as needed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

import httpx2
import ray
from conftest import GROUP, characters
from openai import AuthenticationError, BadRequestError, OpenAI
from pydantic import ValidationError
from ray import serve
from ray.serve.exceptions import BackPressureError
from serving_process import PATIENCE, free_port
from step_by_step import random_prompt
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantspec.config import QuantSpecConfig
from quantspec.model import convert
from quantspec.serving.ray import Ingress, PrefixRouter, ReplicaOptions, build, prefix_of, ranking

KEY = "secret"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": {"bogus": 2}}, "an engine has no option bogus; it has gpu_memory_utilization, max_length, "),
        ({"engine": {"max_sequences": "8"}}, "max_sequences must be an int, not '8'"),
        ({"engine": {"max_waiting": 0}}, "max_waiting must be at least 1, not 0"),
        ({"engine": {"num_speculative_tokens": -1}}, "num_speculative_tokens"),
        ({"conversion": {"bogus": 2}}, "bogus"),
        ({"conversion": {"kv_group_size": 17}}, "kv_group_size"),
        ({"conversion": {"draft": "lookup"}}, "convert with draft='self', not 'lookup'"),
        ({"autoscaling": {"upscale_delay": 2}}, "AutoscalingConfig beside this has no option upscale_delay; it has "),
        ({"autoscaling": {"min_replicas": 2}}, "has no option min_replicas"),
        ({"min_replicas": 2, "max_replicas": 1}, "max_replicas=1 is less than min_replicas=2"),
    ],
    ids=str,
)
def test_options_are_refused_before_a_replica_starts(options, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        build({"model": "tiny", **options})


def test_options_that_are_a_replicas_to_judge_pass():
    options = ReplicaOptions(
        model="tiny",
        conversion={"tune": True, "trust_remote_code": True, "kv_group_size": 64},
        engine={"max_length": None, "num_speculative_tokens": "auto"},
        autoscaling={"upscale_delay_s": 2},
        min_replicas=3,
    )
    assert options.max_replicas is None
    ReplicaOptions(model="tiny", conversion={"config": QuantSpecConfig(kv_group_size=64)})


@pytest.fixture(scope="module")
def root() -> Iterator[str]:
    """Where Ray Serve answers."""
    with pytest.MonkeyPatch.context() as patch:
        # On a busy machine Ray gives up what is slow to start.
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "300")
        patch.setenv("RAY_agent_register_timeout_ms", "300000")
        patch.setenv("RAY_raylet_start_wait_time_s", "300")
        yield from _serving()


def _serving() -> Iterator[str]:
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    # Seconds after which autoscaling knows of a request.
    env |= {f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5" for who in ("HANDLE", "REPLICA")}
    port = free_port()
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": env},
        configure_logging=False,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def _options(model: Path, max_length: int, **options: Any) -> ReplicaOptions:
    return ReplicaOptions(
        model=str(model),
        name="tiny",
        gpus=0,
        cpus=0,
        max_replicas=2,
        api_keys=[KEY],
        conversion={"kv_group_size": GROUP},
        engine={"max_sequences": 2, "max_length": max_length, "max_num_batched_tokens": 2 * GROUP},
        **options,
    )


@pytest.fixture(scope="module")
def address(root, saved_model) -> str:
    """Of two replicas."""
    serve.run(build(_options(saved_model, 256, min_replicas=2)), name="tiny")
    return root


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


# --- As many replicas as the load needs -------------------------------------------------------------------------------

LONG = 240


@pytest.fixture(scope="module")
def scaled(root, saved_model) -> OpenAI:
    """A client of one replica, or of two where more than two requests run, beside the others' address."""
    delays = {"upscale_delay_s": 0.5, "downscale_delay_s": 1, "look_back_period_s": 2, "metrics_interval_s": 0.5}
    options = _options(saved_model, 512, requests_per_replica=2, autoscaling=delays)
    serve.run(build(options), name="scaled", route_prefix="/scaled")
    return OpenAI(base_url=f"{root}/scaled/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)


def states() -> dict[str, int]:
    """Numbers of replicas by what they do."""
    found = serve.status().applications["scaled"].deployments["Replica"].replica_states
    return {str(state): count for state, count in found.items()}


def wait_for(**wanted: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while (now := states()) != wanted:
        assert time.monotonic() < deadline, f"{now}, not {wanted}"
        time.sleep(0.05)


def replica_names() -> list[str]:
    """Of Ray's actors."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if "scaled#Replica#" in actor["name"]]


def long_text(client: OpenAI, seed: int, enough: threading.Event | None = None) -> str:
    """All tokens of it, streamed; fewer if there are ``enough``."""
    prompt = characters(random_prompt(GROUP, seed))
    # Without an end of its own.
    body = {"model": "tiny", "prompt": prompt, "max_tokens": LONG, "temperature": 0, "logit_bias": {"2": -100}}
    choices, completion_tokens = [], 0
    with client.completions.create(**body, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            choices += chunk.choices
            if chunk.usage:
                completion_tokens = chunk.usage.completion_tokens
            if enough is not None and enough.is_set():
                return ""
    assert completion_tokens == LONG
    assert choices[-1].finish_reason == "length"
    return "".join(choice.text for choice in choices)


def keep_busy(client: OpenAI, seed: int, enough: threading.Event) -> None:
    while not enough.is_set():
        long_text(client, seed, enough)


def whole_texts(client: OpenAI, seed: int, enough: threading.Event) -> set[str]:
    """One after the other, the last one whole, too."""
    texts = set()
    while not enough.is_set():
        texts.add(long_text(client, seed))
    return texts


def seeds_for(names: list[str]) -> list[int]:
    """Of a long text for each of these replicas, the first choice of its prompt."""
    ids = [name.rpartition("#")[2] for name in names]
    first: dict[int, int] = {}
    for seed in range(100):
        body = json.dumps({"prompt": characters(random_prompt(GROUP, seed))}).encode()
        key = [(b"authorization", f"Bearer {KEY}".encode())]
        first.setdefault(ranking(prefix_of(body, key), ids, [0] * len(ids))[0], seed)
    return [first[index] for index in range(len(ids))]


def test_replicas_follow_the_load_and_cut_no_text(scaled):
    """Five texts need two replicas. Then each has one, so that the one that is told to stop is about to answer."""
    wait_for(RUNNING=1)
    served, stopping = threading.Event(), threading.Event()
    with ThreadPoolExecutor(8) as clients:
        try:
            load = [clients.submit(keep_busy, scaled, seed, served) for seed in range(5)]
            wait_for(RUNNING=2)
            served.set()
            for busy in load:
                busy.result()
            seeds = seeds_for(replica_names())
            texts = [clients.submit(whole_texts, scaled, seed, stopping) for seed in seeds]
            wait_for(RUNNING=1, STOPPING=1)
        finally:
            served.set()
            stopping.set()
        # Either's first choice: who asks for it meanwhile is not refused.
        while "STOPPING" in states():
            for seed in seeds:
                text_of(scaled, characters(random_prompt(GROUP, seed)))
        assert [text.result() for text in texts] == [{long_text(scaled, seed)} for seed in seeds]


def _break_the_engine(replica: Any) -> None:
    """Have its loop end, as it does where a device fails whatever it is asked."""

    def fail(*_: object) -> None:
        raise SystemError("the device is gone")

    scheduler = replica._replica_impl._user_callable_wrapper._callable._service._engine._scheduler
    scheduler.step = scheduler.end_all = fail


def test_a_replica_whose_engine_has_died_is_replaced(scaled):
    """What it had not begun to answer, the next one does: no client sees an error."""
    wait_for(RUNNING=1)
    (name,) = replica_names()
    prompt = characters(random_prompt(GROUP, 3))
    expected = text_of(scaled, prompt)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.get(ray.get_actor(name, namespace="serve").__ray_call__.remote(_break_the_engine))
    assert text_of(scaled, prompt) == expected
    assert name not in replica_names()


# --- What becomes of a request ----------------------------------------------------------------------------------------

START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"text"}
DIED = ray.exceptions.ActorDiedError()
FULL = BackPressureError(num_queued_requests=4, max_queued_requests=4)


class Scripted:
    """Replicas, each of which says some messages or fails."""

    def __init__(self, *scripts: list) -> None:
        self.scripts = list(scripts)
        self.answer = SimpleNamespace(remote=self.remote)

    def options(self, *, stream: bool) -> Scripted:
        return self

    async def remote(self, scope: dict[str, Any], body: bytes, prefix: str) -> AsyncIterator[dict[str, Any]]:
        for message in self.scripts.pop(0):
            if isinstance(message, Exception):
                raise message
            yield message


def answered(replicas: Scripted) -> list[dict[str, Any]]:
    """The messages that a client gets."""
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "root_path": ""}
    sent: list[dict[str, Any]] = []
    asked = [{"type": "http.request", "body": b"{}"}]

    async def receive() -> dict[str, Any]:
        if asked:
            return asked.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def call() -> None:
        response = await Ingress.func_or_class([], replicas)(None)
        await response(scope, receive, send)

    asyncio.run(call())
    return sent


@pytest.mark.parametrize(
    ("scripts", "status", "left"),
    [
        ([[START, END]], 200, 0),
        ([[DIED], [START, END]], 200, 0),
        # The third is not asked: it may be the request that ends them.
        ([[DIED], [DIED], [START, END]], 503, 1),
        ([[FULL], [START, END]], 429, 1),
        ([[ray.exceptions.GetTimeoutError()], [START, END]], 503, 1),
    ],
)
def test_what_a_dead_replica_had_not_begun_another_answers(scripts, status, left):
    replicas = Scripted(*scripts)
    assert answered(replicas)[0]["status"] == status
    assert len(replicas.scripts) == left


def test_what_had_begun_breaks():
    """The client has a part of the text, which a second answer would repeat."""
    with pytest.raises(ray.exceptions.ActorDiedError):
        answered(Scripted([START, DIED], [START, END]))


# --- Where a text goes ------------------------------------------------------------------------------------------------


class Name(NamedTuple):
    """Of a replica, as Ray has it."""

    unique_id: str


class Asked:
    """A replica as a router sees it, with a number of requests that it tells whoever asks."""

    def __init__(self, name: str, count: int | Exception) -> None:
        self.replica_id = Name(name)
        self.count = count

    async def get_queue_len(self, *, deadline_s: float) -> int:
        if isinstance(self.count, Exception):
            raise self.count
        return self.count


def test_loads_that_are_not_known_are_asked_for():
    """Ray forgets them after seconds; who does not answer is thought idle, and asked by Ray again."""
    known: dict[Any, int] = {}
    router = SimpleNamespace(replica_queue_len_cache=known, on_new_queue_len_info=known.__setitem__)
    router._load = lambda replica: PrefixRouter._load(router, replica)
    gone = Asked("c", ray.exceptions.ActorUnavailableError("gone", bytes(16)))
    replicas = [Asked("a", 9), Asked("b", 1), gone]
    context = SimpleNamespace(should_backoff=False)
    request = SimpleNamespace(kwargs={"prefix": ""}, routing_context=context)
    ranks = asyncio.run(PrefixRouter.choose_replicas(router, replicas, request))
    assert [replica.replica_id.unique_id for (replica,) in ranks] == ["c", "b", "a"]
    assert known == {replicas[0].replica_id: 9, replicas[1].replica_id: 1}
    # While all are full it does not ask as fast as it can.
    assert context.should_backoff


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
    for body in (b"no json", b"[]", b"{}", b'{"messages": 3}', b'{"messages": ["text"]}', b"\xff", b"[" * 10**5):
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
