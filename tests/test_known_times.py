"""The file of measured times: what it keeps, for which calls, and that one that is damaged is none."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_model

import quantspec
from quantspec.config import Draft
from quantspec.engine.draft_count import AutoDraftCount
from quantspec.engine.known_times import KnownTimes, times_file
from quantspec.engine.plan import PLAIN, Plan, Source

SECONDS = {PLAIN: 0.001, Plan(4): 0.004, Plan(15, Source.LOOKUP): 0.0015}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_what_was_measured_is_known_to_the_next_process(qs):
    KnownTimes(qs.pair, 1, 1024, False).keep(SECONDS)
    assert KnownTimes(qs.pair, 1, 1024, False).seconds == pytest.approx(SECONDS)
    # Other plans join them, and newer times take their place.
    KnownTimes(qs.pair, 1, 1024, False).keep({Plan(4): 0.005, Plan(6): 0.006})
    assert KnownTimes(qs.pair, 1, 1024, False).seconds == pytest.approx({**SECONDS, Plan(4): 0.005, Plan(6): 0.006})
    assert [path.name for path in times_file().parent.iterdir()] == ["cycle_times.json"]


def test_calls_of_another_kind_have_times_of_their_own(qs):
    KnownTimes(qs.pair, 1, 1024, False).keep(SECONDS)
    half = quantspec.convert(tiny_model("llama", torch.bfloat16), kv_group_size=16, self_check=False)
    others = [
        (qs.pair, 2, 1024, False),
        (qs.pair, 1, 2048, False),
        (qs.pair, 1, 1024, True),
        (half.pair, 1, 1024, False),
    ]
    assert not any(KnownTimes(*other).seconds for other in others)


def test_nothing_is_written_that_says_nothing_new(qs):
    times = KnownTimes(qs.pair, 1, 1024, False)
    times.keep(SECONDS)
    times_file().unlink()
    times.keep({plan: 1.05 * seconds for plan, seconds in SECONDS.items()})
    assert not times_file().exists()


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "3", '{"KEY": 3}', '{"KEY": {"self": 1}}', '{"KEY": {"self 4": "x"}}']
)
def test_a_file_that_cannot_be_read_is_none(qs, damage):
    times = KnownTimes(qs.pair, 1, 1024, False)
    times.keep(SECONDS)
    (key,) = json.loads(times_file().read_text())
    times_file().write_text(damage.replace("KEY", key))
    again = KnownTimes(qs.pair, 1, 1024, False)
    assert not again.seconds
    again.keep(SECONDS)
    assert KnownTimes(qs.pair, 1, 1024, False).seconds == pytest.approx(SECONDS)


def test_a_folder_that_cannot_be_written_is_left(qs, cache_folder):
    (cache_folder / "quantspec").write_text("a file")
    KnownTimes(qs.pair, 1, 1024, False).keep(SECONDS)
    assert not KnownTimes(qs.pair, 1, 1024, False).seconds


def test_a_count_begins_by_them_and_adds_to_them(qs):
    KnownTimes(qs.pair, 1, 1024, False).keep(SECONDS)
    count = AutoDraftCount(draft=Draft.SELF, known_times=KnownTimes(qs.pair, 1, 1024, False))
    assert count.durations.seconds[PLAIN] == pytest.approx(0.001)
    for seconds in (None, 0.002, 0.002, 0.002):
        count.record(Plan(2), [0], [2], seconds)
    count.end()
    known = KnownTimes(qs.pair, 1, 1024, False).seconds
    assert known == pytest.approx({**SECONDS, Plan(2): 0.002})
