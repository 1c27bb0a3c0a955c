"""Cycles of a machine that is none: its times are given, its texts drawn, and what is accepted follows from both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from quantspec.engine.draft_count import DraftCount
from quantspec.engine.lookup import LONGEST_MATCH
from quantspec.engine.plan import Plan, Source


class Machine(NamedTuple):
    """Milliseconds of plain decoding, of each further token that is verified, of a draft step, of capturing a pass."""

    plain: float
    verified: float
    step: float
    capture: float = 0.0

    def seconds(self, plan: Plan) -> float:
        """Of a cycle."""
        steps = plan.num_drafts if plan.source is Source.SELF else 0
        return self.plain + plan.num_drafts * self.verified + steps * self.step

    def capturing(self, plan: Plan) -> float:
        """To capture it."""
        return self.capture * (1 + (plan.num_drafts if plan.source is Source.SELF else 0))


class Row(NamedTuple):
    """A text whose first ``prompt`` tokens are given; ``agrees`` tells where the draft's choice is the target's."""

    text: list[int]
    prompt: int
    agrees: list[bool]


class Run(NamedTuple):
    """What came of it: ``(tokens of the first row, plan, milliseconds, tokens)`` of each cycle."""

    cycles: list[tuple[int, Plan, float, int]]

    def speed(self, first: int = 0, last: int = 10**9) -> float:
        """Tokens per millisecond between two places of the first row."""
        part = [cycle for cycle in self.cycles if first <= cycle[0] < last]
        return sum(cycle[3] for cycle in part) / sum(cycle[2] for cycle in part)


class Decoding:
    """One batch on one machine, to be decoded by several counts of drafts."""

    def __init__(self, machine: Machine, rows: Sequence[Row]) -> None:
        self._machine = machine
        self._rows = rows
        self._found: list[dict[int, tuple[int, int]]] = [{} for _ in rows]
        self._places: list[dict[int, list[int]]] = [{} for _ in rows]
        for row, places in zip(rows, self._places, strict=True):
            for place, token in enumerate(row.text):
                places.setdefault(token, []).append(place)

    def run(self, count: DraftCount, captured: set[Plan] | None = None) -> Run:
        """Decode until one row is at its end; what the machine tells of its times is off by some percent.

        ``captured``: plans that an earlier call captured; on a machine that captures, those of this one join them.
        """
        noise, cycles = random.Random(0), []
        captured = set() if captured is None else captured
        ends = [row.prompt + 1 for row in self._rows]
        lasts = [len(row.text) - 16 for row in self._rows]
        count.begin()
        while all(end < last for end, last in zip(ends, lasts, strict=True)):
            found = [self._find(index, end) for index, end in enumerate(ends)]
            matched = [match for match, _ in found]
            remaining = max(last - end for end, last in zip(ends, lasts, strict=True))
            plan = count.choose(matched, remaining, captured if self._machine.capture else None)
            accepted = [self._accepted(index, end, plan, found[index]) for index, end in enumerate(ends)]
            capturing = 0.0 if plan in captured else self._machine.capturing(plan)
            captured.add(plan)
            taken = self._machine.seconds(plan)
            told = None if capturing else taken * (1 + abs(noise.gauss(0, 0.02))) / 1000
            count.record(plan, matched, accepted, told, capturing / 1000)
            cycles.append((ends[0] - self._rows[0].prompt, plan, taken + capturing, len(ends) + sum(accepted)))
            ends = [end + more + 1 for end, more in zip(ends, accepted, strict=True)]
        return Run(cycles)

    def _accepted(self, index: int, end: int, plan: Plan, found: tuple[int, int]) -> int:
        text, agrees = self._rows[index].text, self._rows[index].agrees
        matched, place = found
        for step in range(plan.num_drafts):
            if plan.source is Source.SELF:
                right = agrees[end + step]
            else:
                right = matched > 0 and text[place + step % (end - place)] == text[end + step]
            if not right:
                return step
        return plan.num_drafts

    def _find(self, index: int, end: int) -> tuple[int, int]:
        """Length and place of the match of the first ``end`` tokens' end."""
        if end not in self._found[index]:
            text, best = self._rows[index].text, (0, 0)
            for place in self._places[index][text[end - 1]]:
                if place >= end - 1:
                    break
                matched = 1
                while matched <= min(place, LONGEST_MATCH - 1) and text[place - matched] == text[end - 1 - matched]:
                    matched += 1
                best = max(best, (matched, place + 1))
            self._found[index][end] = best
        return self._found[index][end]


def new_text(tokens: int, chance: random.Random) -> list[int]:
    """Words by Zipf's law, with phrases that come again."""
    words = range(2000)
    phrases = [chance.choices(words, k=chance.randint(2, 6)) for _ in range(60)]
    text: list[int] = []
    weights = [1 / (word + 1) for word in words]
    for word in chance.choices(words, weights, k=tokens):
        text += chance.choice(phrases) if chance.random() < 0.06 else [word]
    return text[:tokens]


def edited(text: Sequence[int], chance: random.Random) -> list[int]:
    """A copy with one change in fifty tokens: replaced, left out or put in."""
    copy: list[int] = []
    for token in text:
        if chance.random() >= 0.02:
            copy.append(token)
        else:
            copy += chance.choice(([], [chance.randrange(2000)], [chance.randrange(2000), token]))
    return copy


def row(kind: str, tokens: int, acceptance: float, seed: int) -> Row:
    """A row that writes ``new`` text, a ``copy`` of its prompt, or both in ``turns``; the draft agrees so often."""
    chance = random.Random(seed)
    prompt = new_text(tokens, chance)
    if kind == "new":
        written = new_text(tokens, chance)
    elif kind == "copy":
        written = edited(prompt, chance)
    else:
        quarters = [edited(prompt[: tokens // 4], chance), new_text(tokens // 4, chance)]
        written = [*quarters[0], *quarters[1], *edited(prompt[tokens // 4 : tokens // 2], chance), *quarters[1][::-1]]
    text = prompt + written
    return Row(text, len(prompt), [chance.random() < acceptance for _ in text])
