"""Work captured as a row of graphs; CUDA's are replaced by what remembers the work between two of their ends."""

from __future__ import annotations

import contextlib

import pytest
import torch

from quantspec.engine.graph_row import GraphRow


class Graph:
    def __init__(self) -> None:
        self.work: list[str] = []

    def replay(self) -> None:
        done.extend(self.work)


done: list[str] = []
opened: list[tuple[Graph, object]] = []


@pytest.fixture(autouse=True)
def fake_graphs(monkeypatch):
    """``opened`` has the graph that is being captured, and its pool."""
    pools = iter("ab")

    @contextlib.contextmanager
    def capturing(graph, pool, stream):
        opened.append((graph, pool))
        try:
            yield
        finally:
            assert opened.pop() == (graph, pool)

    done.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))


def captured(row: GraphRow, *steps: str) -> list[tuple[Graph, object]]:
    """Where each of ``steps`` was captured, with a cut behind all but the last."""
    places = []

    def work() -> None:
        for step in steps:
            (place,) = opened
            place[0].work.append(step)
            places.append(place)
            if step != steps[-1]:
                row.cut()

    row.capture(work)
    assert not opened
    return places


def test_replays_keep_the_order_and_graphs_share_a_pool():
    row, other = GraphRow(None), GraphRow(None)
    places = captured(row, "first", "second", "third")
    assert len({id(graph) for graph, _ in places}) == 3
    assert {pool for _, pool in places} == {"a"}
    assert captured(other, "alone")[0][1] == "b"
    row.replay()
    row.replay()
    assert done == ["first", "second", "third"] * 2


def test_a_failure_ends_the_capture():
    row = GraphRow(None)

    def work() -> None:
        row.cut()
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        row.capture(work)
    assert not opened
