"""The process of a rank above 0, which :class:`quantspec.ranks.Ranks` starts.

It runs what it is sent, and ends with the process that started it, whatever it is doing then.
"""

from __future__ import annotations

import os
import queue
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from .messages import Report, receive, send
from .seat import Abandoned, leave_seat, take_seat


def main(descriptor: int) -> None:
    """Read tasks from the pipe of that file descriptor, until the end is sent."""
    connection = Connection(descriptor)
    rank, world, device_type, meeting = receive(connection)
    send(connection, Report(0, None))
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(connection, tasks), daemon=True)
    reader.start()
    seat = take_seat(rank, world, device_type, meeting)
    while (task := tasks.get()) is not None:
        error = None
        try:
            if isinstance(task, Exception):
                raise task
            task.function(seat, *task.arguments)
        except Abandoned:
            pass  # rank 0 raises the error
        except Exception:
            error = traceback.format_exc()
        number = -1 if isinstance(task, Exception) else task.number
        send(connection, Report(number, error))
    leave_seat(seat)


def _read(connection: Connection, tasks: queue.SimpleQueue[Any]) -> None:
    """Pass tasks on; who sent them may end at any time, and a thread in a collective would never notice."""
    while True:
        try:
            task = receive(connection)
        except (EOFError, OSError):
            os._exit(1)
        except Exception as error:
            # What cannot be unpickled here is told like what fails.
            tasks.put(error)
            continue
        tasks.put(task)
        if task is None:
            return
