"""What rank 0 and the others send each other: pickles over a pipe of their own."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import FunctionType
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


class _Pickler(pickle.Pickler):
    """Refuses what is named after the script that runs: the other processes run another one."""

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, type | FunctionType) and thing.__module__ == "__main__":
            raise pickle.PicklingError(f"{thing.__qualname__} is of the script that runs, which they do not import")
        return NotImplemented


def pickled(message: Any) -> bytes:
    """What is sent of a message.

    Raises:
        Exception: of any kind, for what the other processes could not read.
    """
    content = io.BytesIO()
    _Pickler(content).dump(message)
    return content.getvalue()


def send(connection: Connection, message: Any) -> None:
    """Send by value: no memory is shared, and no helper process is started."""
    connection.send_bytes(pickled(message))


def receive(connection: Connection) -> Any:
    """The next message; ``EOFError`` where the other process is gone."""
    return pickle.loads(connection.recv_bytes())
