"""The server, in a process of its own, driven by OpenAI's own client: every endpoint and option."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving_model import save_model
from serving_process import Server, serving

# One server for all tests of the file.
pytestmark = pytest.mark.xdist_group("server")

MODEL = "tiny"
MESSAGES = [{"role": "user", "content": "Name,three,colours."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = save_model(tmp_path_factory.mktemp("model"))
    options = ["--name", MODEL, "--no-self-check", "--kv-group-size", "16", "--gamma", "2"]
    with serving(folder, *options, "--max-num-batched-tokens", "16") as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def plain(client) -> str:
    """The greedy answer."""
    return chat(client).choices[0].message.content


def chat(client: openai.OpenAI, **options: Any) -> Any:
    defaults = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    return client.chat.completions.create(**{**defaults, **options})


def complete(client: openai.OpenAI, **options: Any) -> Any:
    defaults = {"model": MODEL, "prompt": "The,capital", "max_tokens": 8, "temperature": 0}
    return client.completions.create(**{**defaults, **options})


def streamed(chunks: Any) -> tuple[list[str], list[str | None], list[Any]]:
    """Text and last finish reason of each choice, and the usages."""
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    usages = []
    for chunk in chunks:
        if chunk.usage is not None:
            usages.append(chunk.usage)
        for choice in chunk.choices:
            piece = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
            reasons[choice.index] = choice.finish_reason
    order = sorted(texts)
    return [texts[index] for index in order], [reasons[index] for index in order], usages


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("another")


def test_chat_whole_and_streamed(client, plain):
    answer = chat(client)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.prompt_tokens > 10
    assert 0 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.accepted_prediction_tokens <= usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0
    texts, reasons, usages = streamed(chat(client, stream=True, stream_options={"include_usage": True}))
    assert texts == [plain]
    assert reasons == [answer.choices[0].finish_reason]
    assert [told.completion_tokens for told in usages] == [usage.completion_tokens]
    assert streamed(chat(client, stream=True))[2] == []


def test_cached_tokens_are_told(client):
    messages = [{"role": "user", "content": "Again," * 10}]
    first, second = (chat(client, messages=messages) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert 0 < second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens
    others = chat(client, messages=messages, extra_body={"cache_salt": "others"})
    assert others.usage.prompt_tokens_details.cached_tokens == 0


def test_parts_and_roles(client, plain):
    parts = [{"type": "text", "text": "Name,three"}, {"type": "text", "text": ",colours."}]
    assert chat(client, messages=[{"role": "user", "content": parts}]).choices[0].message.content == plain
    told = [{"role": "system", "content": "French!"}, *MESSAGES]
    assert chat(client, messages=told).choices[0].message.content != plain


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_left_out(client, plain, stream):
    stop = plain[len(plain) // 2 : len(plain) // 2 + 3]
    expected = plain[: plain.index(stop)]
    answer = chat(client, stop=[stop, "never said"], stream=stream)
    if stream:
        assert streamed(answer)[:2] == ([expected], ["stop"])
    else:
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < chat(client).usage.completion_tokens


def test_seeds_and_choices(client):
    options = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 12}
    several = chat(client, seed=5, n=2, **options)
    texts = [choice.message.content for choice in several.choices]
    assert texts == [chat(client, seed=seed, **options).choices[0].message.content for seed in (5, 6)]
    assert texts[0] != texts[1]
    assert streamed(chat(client, seed=5, n=2, stream=True, **options))[0] == texts
    assert several.usage.completion_tokens > 12


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-6])
def test_the_least_temperatures_are_greedy(client, plain, temperature):
    """float32 has no such number, or scores divided by it may be infinite."""
    assert chat(client, temperature=temperature).choices[0].message.content == plain


def test_lengths(client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, **{name: 3})
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_logprobs_of_chats(client, plain):
    (choice,) = chat(client, logprobs=True, top_logprobs=3).choices
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == plain
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == plain
    for token in tokens:
        assert token.logprob <= 0
        assert [best.logprob for best in token.top_logprobs] == sorted(b.logprob for b in token.top_logprobs)[::-1]
        assert token.top_logprobs[0].token == token.token
        assert sum(math.exp(best.logprob) for best in token.top_logprobs) <= 1 + 1e-4
    chunks = chat(client, logprobs=True, top_logprobs=3, stream=True)
    told = [token for chunk in chunks for c in chunk.choices if c.logprobs for token in c.logprobs.content]
    assert [token.token for token in told] == [token.token for token in tokens]
    assert chat(client).choices[0].logprobs is None


def test_penalties_and_biases(client, plain):
    forced = {"logit_bias": {"40": 4}}
    biased = chat(client, **forced).choices[0].message.content
    assert biased.count("F") > plain.count("F")
    assert chat(client, logit_bias={"40": 100}, max_tokens=4).choices[0].message.content == "FFFF"
    for option in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"extra_body": {"repetition_penalty": 9.0}}):
        assert chat(client, **forced, **option).choices[0].message.content.count("F") < biased.count("F")
    assert chat(client, frequency_penalty=0, presence_penalty=0).choices[0].message.content == plain


@pytest.mark.parametrize("temperature", [0, 1])
def test_structured_output(client, temperature):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    answer = chat(client, response_format=form, max_tokens=60, temperature=temperature, seed=1)
    assert answer.choices[0].finish_reason == "stop"
    person = json.loads(answer.choices[0].message.content)
    assert person.keys() == {"name", "age"}
    assert len(person["name"]) <= 8
    assert isinstance(person["age"], int)


def test_json_objects(client):
    text = chat(client, response_format={"type": "json_object"}, max_tokens=12).choices[0].message.content
    assert text.startswith("{")
    assert chat(client, response_format={"type": "text"}).choices[0].message.content


def test_completions(client):
    answer = complete(client)
    text = answer.choices[0].text
    assert len(text) == 8
    assert complete(client, max_tokens=None, logit_bias={"2": -100}).usage.completion_tokens == 16
    assert streamed(complete(client, stream=True))[0] == [text]
    several = complete(client, prompt=["The,capital", "One,two,"], n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == text
    assert several.choices[2].text != text
    # Copies share their prompt.
    assert several.usage.prompt_tokens == len("The,capital") + len("One,two,")
    ids = [ord(letter) - 30 for letter in "The,capital"]
    assert complete(client, prompt=ids).choices[0].text == complete(client, prompt=[ids]).choices[0].text == text


def test_logprobs_of_completions(client):
    choice = complete(client, logprobs=2).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert told.text_offset == [len("".join(told.tokens[:index])) for index in range(len(told.tokens))]
    assert all(
        len(best) == 2 and max(best.values()) == own
        for best, own in zip(told.top_logprobs, told.token_logprobs, strict=True)
    )


def test_what_vllm_knows_besides(client, plain):
    """top_k, min_p and cache_salt."""
    assert chat(client, temperature=1, extra_body={"top_k": 1}).choices[0].message.content == plain
    assert chat(client, temperature=1, extra_body={"min_p": 1}).choices[0].message.content == plain
    assert chat(client, extra_body={"cache_salt": "mine"}).choices[0].message.content == plain


@pytest.mark.parametrize(
    ("options", "error", "code", "part"),
    [
        ({"model": "another"}, openai.NotFoundError, "model_not_found", "does not exist"),
        ({"max_tokens": 4096}, openai.BadRequestError, "context_length_exceeded", "512 tokens"),
        ({"messages": [{"role": "user", "content": "long," * 120}]}, openai.BadRequestError, None, "512 tokens"),
        ({"extra_body": {"best_of": 2}}, openai.BadRequestError, "unknown_parameter", "best_of"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "unknown_parameter", "temprature"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"extra_body": {"temperature": "1"}}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"n": 0}, openai.BadRequestError, "invalid_value", "n"),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        ({"messages": [{"role": "nobody", "content": ""}]}, openai.BadRequestError, "invalid_value", "role"),
        ({"stop": ""}, openai.BadRequestError, "invalid_value", "stop"),
        ({"top_logprobs": 2}, openai.BadRequestError, None, "logprobs=true"),
        # Of the forms that a part may have, the error tells of the one that was meant.
        ({"stop": ["a", ""]}, openai.BadRequestError, "invalid_value", "at least 1 character"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
            openai.BadRequestError,
            "invalid_value",
            "valid dictionary",
        ),
        ({"max_completion_tokens": 2}, openai.BadRequestError, None, "one of them"),
        ({"logit_bias": {"999999": 1}}, openai.BadRequestError, None, "999999"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "impossible"}},
                }
            },
            openai.BadRequestError,
            None,
            "json_schema",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
            openai.BadRequestError,
            None,
            "response_template",
        ),
    ],
    ids=str,
)
def test_errors(client, options, error, code, part):
    with pytest.raises(error) as raised:
        chat(client, **options)
    assert part in str(raised.value)
    if code is not None:
        assert raised.value.code == code


def test_who_goes_away_frees_his_row(server, client):
    long = {"messages": MESSAGES, "max_tokens": 400, "logit_bias": {"2": -100}}
    before = server.metric("generation_tokens_total")
    stream = chat(client, stream=True, **long)
    next(iter(stream))
    assert server.metric("num_requests_running") == 1
    stream.close()
    server.wait_until_idle()
    with pytest.raises(openai.APITimeoutError):
        chat(client.with_options(timeout=0.2), **long)
    server.wait_until_idle()
    # Neither was answered to its end.
    assert server.metric("generation_tokens_total") - before < 400
    assert server.metric("request_success_total") > 0


def test_metrics(server, client):
    names = (
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "e2e_request_latency_seconds_count",
    )
    names += ("time_to_first_token_seconds_count", "inter_token_latency_seconds_count")
    names += tuple(f"spec_decode_num_{kind}_total" for kind in ("drafts", "draft_tokens", "accepted_tokens"))
    before = {name: server.metric(name) for name in names}
    chat(client)
    assert all(server.metric(name) > before[name] for name in names)
    assert 0 <= server.metric("kv_cache_usage_perc") <= 1
    assert server.metric("num_preemptions_total") >= 0
