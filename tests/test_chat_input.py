"""What may be typed in a chat: edited and remembered lines, messages of several lines, commands."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import sys
from types import SimpleNamespace

import pytest

from quantspec.cli._conversation import Conversation
from quantspec.cli.chat import talk
from quantspec.cli.messages import MessageReader, history_file


def read_all(text: str) -> list[str]:
    """Every message of a script."""
    lines = iter(text.splitlines())
    reader = MessageReader(lambda prompt: next(lines, None))
    return list(iter(reader.read, None))


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("one\ntwo", ["one", "two"]),
        ("one\\\ntwo\\\nthree\nfour", ["one\ntwo\nthree", "four"]),
        ('"""one\n\n  two"""\nthree', ["one\n\n  two", "three"]),
        ('"""\none\n"""', ["one"]),
        ('"""one"""', ["one"]),
        ('"""one\ntwo', ["one\ntwo"]),
        ("one\\", ["one"]),
        ('say """ now', ['say """ now']),
        ("\n  one  ", ["", "one"]),
    ],
)
def test_messages_of_several_lines(text, messages):
    assert read_all(text) == messages


READ_TWO = """
from quantspec.cli.messages import MessageReader
with MessageReader.for_stdin() as reader:
    print("got", [reader.read(), reader.read()])
"""


def typed(keys: str, home: str) -> str:
    """What a terminal shows where a program reads two messages while ``keys`` are typed."""
    child, terminal = pty.fork()
    if child == 0:
        environment = {**os.environ, "XDG_STATE_HOME": home, "TERM": "xterm"}
        os.execve(sys.executable, [sys.executable, "-c", READ_TWO], environment)
    os.write(terminal, keys.encode())
    shown = b""
    # To its end, where the program has written its history too; Linux tells of that by an error.
    with open(terminal, "rb", buffering=0) as screen, contextlib.suppress(OSError):
        while read := screen.read(1024):
            shown += read
    os.waitpid(child, 0)
    return shown.decode()


def test_lines_are_edited_and_remembered(tmp_path):
    pytest.importorskip("readline", reason="this Python was built without readline")
    left, up = "\x02", "\x1b[A"
    # Typed without an l, which is put in two places to the left.
    assert "got ['hello', 'hello']" in typed(f"heo{left}ll\n{up}\n", str(tmp_path))
    file = tmp_path / "quantspec" / "chat_history"
    assert file.read_text() == "hello\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert "got ['hello', 'bye']" in typed(f"{up}\nbye\n", str(tmp_path))


def test_place_of_the_history(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "quantspec" / "chat_history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file() == tmp_path / ".local" / "state" / "quantspec" / "chat_history"


class Echo(Conversation):
    """A conversation whose answers are what was said."""

    def __init__(self, tokens: int = 10) -> None:
        super().__init__(SimpleNamespace(pair=SimpleNamespace(max_len=512), last_stats=None), None, None, {})
        self.arguments = {"max_new_tokens": 100}
        self.tokens = tokens

    def answer(self, text: str) -> None:
        self._check_room(self.tokens)
        said = ({"role": role, "content": text} for role in ("user", "assistant"))
        self.messages = [*self.messages, *said]


@pytest.fixture
def talked(capsys, monkeypatch):
    """``talked(conversation, script)`` gives stderr."""

    def call(conversation: Conversation, script: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(script))
        talk(conversation)
        return capsys.readouterr().err

    return call


def test_help_lists_every_command(talked):
    err = talked(Echo(), "/help\n")
    for command in ("/help", "/reset", "/save FILE", "/stats", "/exit", "Ctrl-C", "backslash", '"""'):
        assert command in err


def test_save(talked, tmp_path):
    err = talked(Echo(), f"Hi\n/save {tmp_path / 'talk.md'}\n/save {tmp_path / 'talk.json'}\n")
    assert (tmp_path / "talk.md").read_text() == "**user**\n\nHi\n\n**assistant**\n\nHi\n"
    assert json.loads((tmp_path / "talk.json").read_text())[1] == {"role": "assistant", "content": "Hi"}
    assert err.count("saved to") == 2
    assert "error: /save names no file" in talked(Echo(), "/save\n")
    assert "error: cannot write to" in talked(Echo(), "/save /proc/nowhere/talk.md\n")


def test_unknown_commands_are_no_messages_and_paths_are(talked):
    conversation = Echo()
    assert "error: there is no command '/rest' (/help lists them)" in talked(conversation, "/rest\n")
    assert not conversation.messages
    talked(conversation, "/etc/hosts holds what?\n")
    assert conversation.has_turns


@pytest.mark.parametrize(
    ("has_turns", "parts"),
    [
        (True, ["the context is full: the conversation's 450 tokens and an answer of up to 100", "/reset", "/save"]),
        (False, ["the message is too long: its 450 tokens and an answer of up to 100", "a shorter one"]),
    ],
)
def test_a_full_context_says_so(talked, has_turns, parts):
    """Forgetting helps only where there is something to forget."""
    conversation = Echo()
    if has_turns:
        conversation.answer("Hi")
    conversation.tokens = 450
    err = talked(conversation, "More\n")
    for part in (*parts, "max_cache_len=512"):
        assert part in err
    assert conversation.has_turns == has_turns


def test_the_room_of_a_real_conversation_is_its_prompt_and_its_answer(qs, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    conversation = Conversation(qs, tokenizer, None, {"max_new_tokens": 4, "do_sample": False})
    with pytest.raises(Exception, match="its 509 tokens and an answer of up to 4 are more than max_cache_len=512"):
        conversation.answer("a" * 509)
    assert not conversation.messages
