"""The server's parts: stop strings, penalties, tool calls, and what a failing engine is answered with."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from cli_errors import assert_error
from doc_blocks import stand_in_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from serving_model import byte_tokenizer, printable_tokenizer
from serving_process import free_port
from tiny_models import tiny_model
from transformers import PreTrainedTokenizerFast

from quantspec.serving.requests import EngineStatistics, FinishReason, Output, Request
from quantspec.serving.server.choice import Choice
from quantspec.serving.server.errors import ApiError
from quantspec.serving.server.metrics import Metrics
from quantspec.serving.server.penalties import CountPenalty
from quantspec.serving.server.run import Server, bind
from quantspec.serving.server.service import Service
from quantspec.serving.server.stop_strings import StopStrings
from quantspec.versions import install_command

LETTERS = st.text("ab", max_size=6)


@given(st.lists(LETTERS.filter(bool), max_size=3), st.lists(LETTERS, max_size=6))
def test_stop_strings(strings, pieces):
    """What is let through stands before any stop string, and what is held may be the beginning of one."""
    text, fed, through = "".join(pieces), "", ""
    matcher = StopStrings(strings)
    for piece in pieces:
        fed += piece
        through += matcher.feed(piece)
        if matcher.found:
            break
        assert fed.startswith(through)
        held = fed[len(through) :]
        assert not held or any(string.startswith(held) and string != held for string in strings)
    assert matcher.found == any(string in text for string in strings)
    if matcher.found:
        assert any(text[len(through) :].startswith(string) for string in strings)
        assert not any(string in through for string in strings)
    else:
        assert through + matcher.flush() == text


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("ab", "é日🙂x"), ("a\N{REPLACEMENT CHARACTER}", " yes"), ("\N{REPLACEMENT CHARACTER}" * 4, "é")],
)
def test_letters_of_several_tokens(prompt, answer):
    tokenizer = byte_tokenizer()
    assert said(tokenizer, tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]) == answer


def test_a_letter_that_the_prompt_begins_is_the_answers():
    """And what follows it is told without the prompt."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("ab🙂c")["input_ids"]
    assert said(tokenizer, ids[:4], ids[4:]) == "🙂c"
    assert said(tokenizer, ids[:4], ids[6:]) == "c"


def said(tokenizer: PreTrainedTokenizerFast, prompt: list[int], new: list[int]) -> str:
    """The text of a choice whose tokens come one by one."""
    choice = Choice(tokenizer, prompt, ())
    return "".join(choice.take(Output(0, (token,))).said.content for token in new)


def test_an_error_may_repeat_what_is_no_text():
    error = ApiError(404, "the model '\ud800' does not exist")
    assert json.loads(error.response().body)["error"]["message"] == "the model '?' does not exist"
    assert error.body.model_dump_json()


def test_penalties_count_the_new_text():
    ids = torch.tensor([[5, 5, 1, 2, 2, 3]])
    scores = CountPenalty(2, presence=0.5, frequency=0.25)(ids, torch.zeros(1, 6))
    assert scores.tolist() == [[0, -0.75, -1.0, -0.75, 0, 0]]


class ScriptedEngine:
    """Says one text, some tokens a step; then it ends, fails or goes on without a word."""

    max_length = 256
    heartbeat = float("inf")
    loss = None

    def __init__(self, tokens: list[int], error: Exception | None = None, ends: bool = True) -> None:
        self.pair = SimpleNamespace(model=tiny_model("qwen2"), vocab_size=300)
        self.tokens = tokens
        self.error = error
        self.ends = ends
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self.closed = threading.Event()

    def subscribe(self, requests: Sequence[Request], listener: Callable[[Output], None]) -> list[int]:
        ids = [*range(len(self.requests), len(self.requests) + len(requests))]
        self.requests += requests
        for id in ids:
            threading.Thread(target=self._say, args=(id, listener), daemon=True).start()
        return ids

    def cancel(self, id: int) -> None:
        self.cancelled.append(id)

    def close(self) -> None:
        self.closed.set()

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, {})

    def _say(self, id: int, listener: Callable[[Output], None]) -> None:
        for start in range(0, len(self.tokens), 3):
            listener(Output(id, tuple(self.tokens[start : start + 3]), prompt_tokens=4))
        if not self.ends:
            self.closed.wait()
            listener(Output(id, finish_reason=FinishReason.CANCELLED))
            return
        reason = FinishReason.STOP if self.error is None else FinishReason.ERROR
        listener(Output(id, (2,) if self.error is None else (), finish_reason=reason, error=self.error))


@contextlib.contextmanager
def scripted(engine: Any, tokenizer: Any, **options: Any) -> Iterator[tuple[openai.OpenAI, Server]]:
    """A client of a server, in a thread, of such an engine."""
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = Server(Service(engine, tokenizer, "tiny"), **options)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300), server
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(300)
        assert not thread.is_alive()


def chat(client: openai.OpenAI, **options: Any) -> Any:
    messages = [{"role": "user", "content": "What is the weather?"}]
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=99, **options)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


def test_tool_calls_and_reasoning():
    """With the response template that transformers has for the model's type."""
    tokenizer = stand_in_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}" + tokenizer.chat_template
    )
    tokens = tokenizer(f"<think>Which city?</think>Let me look.{CALL}")["input_ids"]
    engine = ScriptedEngine(tokens)
    with scripted(engine, tokenizer) as (client, _):
        choice = chat(client, tools=TOOLS).choices[0]
        prompt = tokenizer.decode(engine.requests[0].prompt)
        without = chat(client, tools=TOOLS, tool_choice="none")
        chunks = [chunk.choices[0] for chunk in chat(client, tools=TOOLS, stream=True)]
    assert prompt.startswith("weather ")
    assert not tokenizer.decode(engine.requests[1].prompt).startswith("weather")
    assert without.usage.completion_tokens == len(tokens) + 1
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content, choice.message.reasoning_content) == ("Let me look.", "Which city?")
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", '{"city": "Bern"}')
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Let me look."
    (told,) = [told for chunk in chunks for told in chunk.delta.tool_calls or ()]
    assert (told.index, told.function.name, told.function.arguments) == (0, "weather", '{"city": "Bern"}')
    assert chunks[-1].finish_reason == "tool_calls"


def test_a_tool_call_that_is_no_json_is_text():
    tokenizer = stand_in_tokenizer()
    broken = "<tool_call>{nothing}</tool_call>"
    with scripted(ScriptedEngine(tokenizer(broken)["input_ids"]), tokenizer) as (client, _):
        choice = chat(client, tools=TOOLS).choices[0]
    # Without the token that ended it.
    assert choice.message.content == broken
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")


def test_thoughts_that_are_not_closed_end_without_the_end_token():
    tokenizer = stand_in_tokenizer()
    with scripted(ScriptedEngine(tokenizer("<think>Which ci")["input_ids"]), tokenizer) as (client, _):
        message = chat(client).choices[0].message
    assert message.reasoning_content == "Which ci"
    assert not message.content


def test_what_says_nothing_is_taken_and_what_cannot_be_kept_is_refused():
    tokenizer = stand_in_tokenizer()
    engine = ScriptedEngine(tokenizer("Hi")["input_ids"])
    with scripted(engine, tokenizer) as (client, _):
        answer = chat(client, top_p=0.0, extra_body={"user": None, "functions": None}).choices[0].message
        back = [{"role": "user", "content": "Hi"}, answer.model_dump(), {"role": "user", "content": "And?"}]
        assert client.chat.completions.create(model="tiny", messages=back).choices
        with pytest.raises(openai.BadRequestError, match="no room for a tool call"):
            chat(client, tools=TOOLS, response_format={"type": "json_object"})
        assert chat(client, tools=TOOLS, tool_choice="none", response_format={"type": "json_object"})
        count = len(engine.requests)
        for ask in (
            lambda text: client.completions.create(model="tiny", prompt=text),
            lambda text: client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}]),
        ):
            with pytest.raises(openai.BadRequestError, match="characters are not read"):
                ask("a" * 1_000_000)
        assert len(engine.requests) == count


def test_tool_messages_reach_the_template():
    tokenizer = stand_in_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }} {% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "Rain"}]
    engine = ScriptedEngine([5])
    with scripted(engine, tokenizer) as (client, _):
        for arguments in ('{"city": "Bern"}', "not json", ""):
            call["function"]["arguments"] = arguments
            client.chat.completions.create(model="tiny", messages=messages)
    prompts = [tokenizer.decode(request.prompt) for request in engine.requests]
    # As an object, which templates print; what a model wrote that is none, as it stands.
    for prompt, printed in zip(prompts, ('{"city": "Bern"}', '"not json"', "{}"), strict=True):
        assert f'"arguments": {printed}' in prompt
        assert prompt.rstrip().endswith("Rain")


def test_what_the_engine_cannot_end_is_an_error():
    tokenizer = printable_tokenizer()
    engine = ScriptedEngine(tokenizer("abcd")["input_ids"], error=FloatingPointError("the model's logits are NaN"))
    with scripted(engine, tokenizer) as (client, _):
        with pytest.raises(openai.InternalServerError, match="logits are NaN"):
            chat(client)
        stream = chat(client, stream=True)
        with pytest.raises(openai.APIError, match="logits are NaN"):
            list(stream)


@pytest.mark.parametrize(
    ("drain_seconds", "signals"),
    [(0, [signal.SIGTERM]), (600, [signal.SIGINT] * 2), (600, [signal.SIGTERM, signal.SIGINT])],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_end_in_time_is_cut_off(stream, drain_seconds, signals):
    """Or where Ctrl-C says that nobody waits."""
    engine = ScriptedEngine([5, 6, 7], ends=False)
    with scripted(engine, printable_tokenizer(), drain_seconds=drain_seconds) as (client, server):
        for number, sent in enumerate(signals, 1):
            threading.Timer(0.5 * number, server.handle_exit, (sent, None)).start()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chat(client, stream=stream))
    assert engine.closed.is_set()


def test_an_engine_that_takes_no_step_is_not_healthy():
    engine = ScriptedEngine([5])
    with scripted(engine, printable_tokenizer()) as (client, _):
        url = str(client.base_url).replace("/v1/", "/health")
        assert client.get(url, cast_to=object) == {"status": "ok"}
        engine.heartbeat = float("-inf")
        with pytest.raises(openai.InternalServerError, match="takes no steps"):
            client.get(url, cast_to=object)
        assert chat(client).choices[0].finish_reason == "stop"
        engine.loss = "rank 1 was ended by SIGKILL"
        with pytest.raises(openai.InternalServerError, match="the engine has ended: rank 1 was ended by SIGKILL"):
            chat(client)


def test_prompts_are_shared_by_who_has_a_key_and_a_salt():
    """Not by others: the engine is told who asks."""
    engine = ScriptedEngine([5])
    with scripted(engine, printable_tokenizer(), api_keys=("one", "two")) as (client, _):
        for key, salt in (("one", None), ("two", None), ("one", "a"), ("one", "b"), ("one", "a")):
            chat(client.with_options(api_key=key), extra_body={"cache_salt": salt})
    salts = [request.salt for request in engine.requests]
    assert len(set(salts)) == 4
    assert salts[2] == salts[4]
    assert "one" not in salts[0]


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(run):
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        assert_error(run("serve", "no/such-model", "--port", taken.getsockname()[1]), "cannot listen", "--port")


@pytest.mark.parametrize("key", ["", " ", "a ", "a\nb", "ключ"])
def test_a_key_that_no_client_could_send(run, monkeypatch, key):
    assert_error(run("serve", "no/such-model", "--api-key", key), "an API key is empty, or has characters")
    monkeypatch.setenv("QUANTSPEC_API_KEY", "")
    assert_error(run("serve", "no/such-model"), "QUANTSPEC_API_KEY is empty", "unset it")


def test_without_the_extra_an_error_names_it(run, saved_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "quantspec.serving.server.run", raising=False)
    assert_error(run("serve", saved_model), "uvicorn", install_command("serve"))


def test_what_the_engine_of_a_server_drafts(run, saved_model, monkeypatch):
    """As many as pay where that is asked for; the pair keeps its own number, which is the most."""
    asked = []

    def engine(pair, **options):
        asked.append((pair.config.num_speculative_tokens, options["num_speculative_tokens"]))
        raise ValueError("enough")

    monkeypatch.setattr("quantspec.serving.engine.Engine", engine)
    for options in ((), ("--num-speculative-tokens", "auto"), ("--gamma", "3")):
        run("serve", saved_model, "--port", free_port(), "--no-self-check", *options)
    assert asked == [(None, None), (None, "auto"), (3, None)]


def test_metrics_tell_drafts_from_cycles():
    statistics = EngineStatistics(0, 0, 0, 1, 0, 0, 0, 9, 7, 3, 12, 5, {})
    lines = Metrics(lambda: statistics, "tiny").text().decode().splitlines()
    told = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:spec")}
    names = ("drafts", "draft_tokens", "accepted_tokens")
    assert [told[f"vllm:spec_decode_num_{name}_total"] for name in names] == [3, 12, 5]


def test_slow_tokenizers_are_refused():
    with pytest.raises(TypeError, match="fast tokenizer"):
        Service(ScriptedEngine([5]), object(), "tiny")  # type: ignore[arg-type]
