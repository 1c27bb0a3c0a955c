"""Which beginnings of prompts lie where: the bookkeeping against a plain model of what the places of a cache hold."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from quantspec.serving.prefixes import Prefixes, chunk_keys

CHUNK, GROUP, PLACES = 2, 1, 3

# Few texts, so that many begin alike.
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=10)
SALTS = st.sampled_from(["", "another"])


class Places(RuleBasedStateMachine):
    """Requests that begin, prefill a chunk at a time, and leave; ``found`` counts chunks that were not prefilled."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = Prefixes(PLACES)
        # What lies in each place: of every chunk all tokens up to its end, and the salt.
        self.planes: list[list[tuple]] = [[] for _ in range(PLACES)]
        self.running: dict[int, tuple[list[tuple], list[bytes], int]] = {}

    @precondition(lambda self: len(self.running) < PLACES)
    @rule(tokens=TEXTS, salt=SALTS, data=st.data())
    def begin(self, tokens, salt, data):
        free = [place for place in range(PLACES) if place not in self.running]
        place = data.draw(st.sampled_from(free))
        keys = chunk_keys(tokens, CHUNK, GROUP, salt)
        chunks = [(salt, *tokens[: end * CHUNK]) for end in range(1, len(keys) + 1)]
        best = max(self._alike(planes, chunks) for planes in self.planes)
        moves, count = self.prefixes.begin(place, keys, free)
        for source, target, length, exchanges in moves:
            assert target in free, "a running request's place was written"
            assert not exchanges or source in free, "a running request's place was written"
            old, new = list(self.planes[target]), list(self.planes[source])
            self.planes[target][:length] = new[:length]
            if exchanges:
                self.planes[source][:length] = old[:length]
        assert self.planes[place][:count] == chunks[:count], "a place begins with another text"
        # What it lies behind is overwritten from here on.
        assert count >= best, "something that was there was not found"
        del self.planes[place][count:]
        self.running[place] = (chunks, keys, count)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def prefill(self, data):
        place = data.draw(st.sampled_from(sorted(self.running)))
        chunks, keys, count = self.running[place]
        if count < len(chunks):
            self.planes[place].append(chunks[count])
            self.prefixes.publish(place, keys[count])
            self.running[place] = (chunks, keys, count + 1)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def leave(self, data):
        del self.running[data.draw(st.sampled_from(sorted(self.running)))]

    @invariant()
    def everything_lies_where_it_is_said_to(self):
        for place, (chunks, _, count) in self.running.items():
            assert self.planes[place][:count] == chunks[:count], "a running request's text was overwritten"
        for planes, held in zip(self.planes, self.prefixes.held, strict=True):
            assert len(held) <= len(planes)
            for chunk, key in zip(planes, held, strict=False):
                salt, *tokens = chunk
                assert chunk_keys([*tokens, 0], CHUNK, GROUP, salt)[-1] == key, "a key stands for another text"

    @staticmethod
    def _alike(planes, chunks):
        return next(
            (i for i, pair in enumerate(zip(planes, chunks, strict=False)) if pair[0] != pair[1]),
            min(len(planes), len(chunks)),
        )


def run_machine(examples: int = 40) -> None:
    run_state_machine_as_test(
        Places,
        settings=settings(max_examples=examples, stateful_step_count=30, database=None, report_multiple_bugs=False),
    )


def test_places_against_a_model():
    run_machine()


@pytest.mark.parametrize("fault", ["key of half a chunk", "key without salt", "running place taken", "stale claim"])
def test_the_model_finds_planted_faults(monkeypatch, fault):
    begin, real_keys = Prefixes.begin, chunk_keys
    if fault == "running place taken":
        monkeypatch.setattr(Prefixes, "begin", lambda self, place, keys, free: begin(self, place, keys, range(PLACES)))
    elif fault == "stale claim":

        def forgetful(self, place, keys, free):
            held = list(self.held[place])
            found = begin(self, place, keys, free)
            self.held[place] += held[len(self.held[place]) :]
            return found

        monkeypatch.setattr(Prefixes, "begin", forgetful)
    else:

        def keys_of(tokens, chunk, group, salt=""):
            if fault == "key without salt":
                return real_keys(tokens, chunk, group)
            return real_keys([token if index % chunk else 0 for index, token in enumerate(tokens)], chunk, group, salt)

        monkeypatch.setattr("test_serving_prefixes.chunk_keys", keys_of)
    with pytest.raises(AssertionError):
        run_machine(200)


def test_keys_leave_a_group_and_depend_on_everything_before():
    tokens = list(range(10))
    assert [len(chunk_keys(tokens[:count], 4, 2)) for count in (1, 5, 6, 9, 10)] == [0, 0, 1, 1, 2]
    first, second = chunk_keys(tokens, 4, 2)
    assert chunk_keys([*tokens[:4], *tokens[:6]], 4, 2) == [first, *chunk_keys([*tokens[:4], *tokens[:6]], 4, 2)[1:]]
    assert chunk_keys([9, *tokens[1:]], 4, 2)[1] != second
    assert not set(chunk_keys(tokens, 4, 2, "another")) & {first, second}


def test_what_gives_way_goes_where_nobody_was_for_longest():
    prefixes = Prefixes(3)
    free = range(3)
    for text in ("ab", "cd", "ef"):
        moves, count = prefixes.begin(0, [], free)
        for key in text:
            prefixes.publish(0, key.encode())
    held = {b"".join(own) for own in prefixes.held}
    assert held == {b"ab", b"cd", b"ef"}
    # It comes back in exchange for what is there, and nothing is lost.
    moves, count = prefixes.begin(0, [b"a", b"b", b"x"], free)
    assert count == 2
    assert [move.exchanges for move in moves] == [True]
    assert {b"".join(own) for own in prefixes.held} == held
    # A text that nobody has is worth more than the one that was used least recently.
    prefixes.publish(0, b"x")
    moves, count = prefixes.begin(0, [b"q"], free)
    assert (count, len(moves)) == (0, 1)
    assert {b"".join(own) for own in prefixes.held} == {b"", b"abx", b"ef"}
