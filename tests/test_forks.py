"""Forked children of a process whose threads hold locks: a child finds them free."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable

import pytest
import torch
from conftest import GROUP
from step_by_step import random_prompt
from tiny_models import tiny_model

import quantspec
from quantspec.capture import converting
from quantspec.checkpoint.staging import locked

OPTIONS = {"max_new_tokens": GROUP, "eos_token_id": None, "do_sample": False}
IDS = torch.tensor([random_prompt(3 * GROUP)])


def in_a_child(call: Callable[[], bool]) -> bool:
    """What ``call`` says in a forked child; False if it fails or does not return within a minute."""
    child = os.fork()
    if child == 0:
        good = False
        try:
            good = call()
        finally:
            os._exit(0 if good else 1)
    alarm = threading.Timer(300, os.kill, (child, 9))
    alarm.start()
    _, status = os.waitpid(child, 0)
    alarm.cancel()
    return status == 0


@pytest.fixture
def hold():
    """``hold(call)`` runs ``call(wait)`` in a thread and returns when that waits; it goes on after the test."""
    held, goes_on, threads = threading.Event(), threading.Event(), []

    def wait(*_: object) -> None:
        held.set()
        goes_on.wait(300)

    def start(call: Callable[[Callable], object]) -> None:
        threads.append(threading.Thread(target=call, args=(wait,)))
        threads[-1].start()
        assert held.wait(300)

    yield start
    goes_on.set()
    for thread in threads:
        thread.join()


class Waiting:
    """A streamer that stops the generation once a few tokens are there."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait, self.calls = wait, 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 5:
            self.wait()

    def end(self) -> None:
        pass


def test_a_child_generates_while_a_thread_of_its_parent_does(qs, hold):
    expected = qs.generate(IDS, **OPTIONS)
    texts: list[torch.Tensor] = []
    hold(lambda wait: texts.append(qs.generate(IDS, streamer=Waiting(wait), **OPTIONS)))

    def generates() -> bool:
        first = qs.generate(IDS, continue_cache=True, **OPTIONS)
        return all(torch.equal(text, expected) for text in (first, qs.generate(IDS, continue_cache=True, **OPTIONS)))

    assert in_a_child(generates)
    assert not texts


def test_a_child_has_no_half_written_cache(qs, hold):
    hold(lambda wait: qs.generate(IDS, streamer=Waiting(wait), **OPTIONS))
    before = qs.session.cache

    def has_another() -> bool:
        with qs.session.exclusive():
            return before is not None and qs.session.cache is None

    assert in_a_child(has_another)
    assert qs.session.cache is before


def test_a_child_of_an_idle_parent_keeps_the_cache(qs):
    text = qs.generate(IDS, **OPTIONS)

    def continues() -> bool:
        longer = qs.generate(text, continue_cache=True, **OPTIONS)
        return qs.last_stats.continued_tokens > 0 and longer.shape[1] == text.shape[1] + GROUP

    assert in_a_child(continues)


def test_a_nested_call_is_noticed_in_a_child_too(qs):
    class Nested(Waiting):
        def put(self, value):
            qs.generate(IDS, **OPTIONS)

    def refuses() -> bool:
        with pytest.raises(RuntimeError, match="the pair is generating"):
            qs.generate(IDS, streamer=Nested(print), **OPTIONS)
        return True

    assert in_a_child(refuses)


def test_a_child_converts_while_a_thread_of_its_parent_does(hold):
    def convert(wait: Callable) -> None:
        with converting():
            wait()

    hold(convert)
    assert in_a_child(lambda: quantspec.convert(tiny_model("llama"), kv_group_size=GROUP).config is not None)


def test_a_child_does_not_go_on_holding_the_lock_of_a_folder(tmp_path):
    """It has the lock file open, as its parent had."""
    goes_on, child_goes_on = os.pipe()
    with locked(tmp_path):
        waiting = (tmp_path / ".quantspec-saving.lock").open()
        child = os.fork()
        if child == 0:
            os.read(goes_on, 1)
            os._exit(0)
    try:
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.write(child_goes_on, b".")
        os.waitpid(child, 0)
        waiting.close()
