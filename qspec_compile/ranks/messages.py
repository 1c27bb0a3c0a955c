"""What rank 0 and the others send each other: pickles over a pipe of their own."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple


class Task(NamedTuple):
    """``function(seat, *arguments)``, to be run; None in place of a task is the end."""

    number: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Report(NamedTuple):
    """What became of the task of that number: ``error`` is None where it returned."""

    number: int
    error: str | None


def send(connection: Connection, message: Any) -> None:
    """Send by value: no memory is shared, and no helper process is started."""
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> Any:
    """The next message; ``EOFError`` where the other process is gone."""
    return pickle.loads(connection.recv_bytes())
