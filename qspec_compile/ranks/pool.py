"""The ranks of a model as their first sees them: it starts the others, gives all the same work, and watches them."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from quantspec.kernels.ranks import release_waiting

from .messages import Report, Task, receive, send
from .seat import RanksError, ended, leave_seat, take_seat

# What is importable here is importable there, in the same order; a search path in the environment would come first.
_WORKER = """import ast, sys
sys.path[:] = ast.literal_eval(sys.argv[2])
from quantspec.ranks.worker import main
main(int(sys.argv[1]))"""
# Importing torch and transformers on a busy machine.
_LONGEST_START = 300
# How much later than rank 0 the others may come to the same error, and how long an end may take.
_LONGEST_LAG = 20.0
# How much later they may come to the end of the same work; the end of a process is noticed at once.
_LONGEST_WORK = 600.0


class Ranks:
    """``world`` processes, of which this one is rank 0, that compute models together.

    Each runs on a GPU of its own, or on the CPU. One set at a time in a process; ``close`` ends it, as does leaving its
    ``with`` block and the end of this process, however that ends.

    Attributes:
        seat: this process's.
    """

    def __init__(self, world: int, device_type: str = "cpu") -> None:
        """Start them.

        Args:
            world: how many, 2 or more.
            device_type: "cuda" or "cpu".

        Raises:
            ValueError: as :func:`check_can_start`.
            RanksError: one did not start.
        """
        check_can_start(world, device_type)
        self.world = world
        self._cause: str | None = None
        self._number = 0
        self._reports: dict[int, list[str | None]] = {}
        self._changed = threading.Condition()
        self._turn = threading.RLock()
        self._runs = False
        self._folder = tempfile.mkdtemp(prefix="quantspec-ranks-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._end = weakref.finalize(self, _end_all, self._processes, self._connections, self._folder)
        meeting = str(Path(self._folder, "meeting"))
        try:
            for rank in range(1, world):
                self._start(rank, device_type, meeting)
            self._await_start()
            self.seat = take_seat(0, world, device_type, meeting)
            self.seat.at_work = False
        except BaseException:
            self._end()
            raise
        self._watch = threading.Thread(target=_watch, args=(weakref.ref(self), list(self._connections)), daemon=True)
        self._watch.start()

    def run(self, function: Callable[..., Any], *arguments: Any, others: tuple[Any, ...] | None = None) -> Any:
        """Run ``function(seat, *arguments)`` on every rank; ``others`` are the arguments of those above 0.

        What those are sent must be picklable, the function by its name. Calls of several threads wait for each other.

        Returns:
            What it returned here.

        Raises:
            RanksError: another rank failed alone or was ended. All are ended then.
            Exception: what the function raised here; the ranks go on if all of them came to an error.
        """
        with self._turn:
            if self._cause is not None:
                raise ended(self._cause)
            self._number += 1
            task = Task(self._number, function, arguments if others is None else others)
            for connection in self._connections:
                try:
                    send(connection, task)
                except OSError:
                    self._await_cause()
            return self._run_here(function, arguments)

    def close(self) -> None:
        """End the other ranks and leave their process group; further work is refused."""
        with self._turn:
            if self._cause is None:
                self._cause = "they were closed"
                for connection in self._connections:
                    with contextlib.suppress(OSError):
                        send(connection, None)
                leave_seat(self.seat)
                for process in self._processes:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_LONGEST_LAG)
            self._end()

    @property
    def cause(self) -> str | None:
        """Why they take no more work; None while they do."""
        return self._cause

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of the ranks above 0."""
        return tuple(process.pid for process in self._processes)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start(self, rank: int, device_type: str, meeting: str) -> None:
        ours, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _WORKER, str(theirs.fileno()), repr(sys.path)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        self._processes.append(process)
        self._connections.append(ours)
        send(ours, (rank, self.world, device_type, meeting))

    def _await_start(self) -> None:
        limit = time.monotonic() + _LONGEST_START
        for rank, connection in enumerate(self._connections, 1):
            try:
                if not connection.poll(max(0.0, limit - time.monotonic())):
                    raise RanksError(f"rank {rank} did not start within {_LONGEST_START} seconds")
                receive(connection)
            except (EOFError, OSError):
                raise RanksError(f"rank {rank} did not start: {self._ending(rank)}") from None

    def _run_here(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        try:
            self._runs = self.seat.at_work = True
            result = function(self.seat, *arguments)
        except BaseException as error:
            self._runs = self.seat.at_work = False
            self._await_reports(error)
            raise
        finally:
            self._runs = self.seat.at_work = False
        self._await_reports(None)
        return result

    def _await_reports(self, error: BaseException | None) -> None:
        """Wait for the others, which are about as far; raises where they did not fare as this rank did."""
        with self._changed:
            limit = _LONGEST_WORK if error is None else _LONGEST_LAG
            self._changed.wait_for(lambda: self._cause or self._is_reported(), limit)
            reports = self._reports.pop(self._number, [])
        if self._cause is None and len(reports) < len(self._connections):
            what = "its work" if error is None else f"it with {type(error).__name__}: {error}"
            self._fail(f"rank 0 ended {what}, and another rank did not")
        failed = [report for report in reports if report is not None]
        if self._cause is None and error is None and failed:
            self._fail(f"another rank failed: {failed[0]}")
        if self._cause is not None:
            self._leave()
            if not isinstance(error, KeyboardInterrupt):
                raise ended(self._cause) from error

    def _is_reported(self) -> bool:
        return len(self._reports.get(self._number, ())) == len(self._connections)

    def _await_cause(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._cause, _LONGEST_LAG)
        self._fail("a rank does not take work")
        raise ended(self._cause or "")

    def _report(self, report: Report) -> None:
        """From the watching thread: a rank has ended its part of the work."""
        with self._changed:
            self._reports.setdefault(report.number, []).append(report.error)
            self._changed.notify_all()
        if report.error is None:
            return
        if report.number < 0:
            self._fail(f"another rank could not read its work: {report.error}")
            return
        limit = time.monotonic() + _LONGEST_LAG
        # Where all raise the same, rank 0 does so at about the same time.
        while self._runs and report.number == self._number and time.monotonic() < limit:
            time.sleep(0.05)
        if self._runs and report.number == self._number:
            self._fail(f"another rank failed: {report.error}")

    def _lost(self, rank: int) -> None:
        """From the watching thread: a rank's process is gone."""
        self._fail(f"rank {rank} {self._ending(rank)}")

    def _ending(self, rank: int) -> str:
        try:
            code = self._processes[rank - 1].wait(_LONGEST_LAG)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"

    def _fail(self, cause: str) -> None:
        """End all, and let go whoever waits for them in this process."""
        with self._changed:
            if self._cause is not None:
                return
            self._cause = self.seat.cause = cause
            self._changed.notify_all()
        for process in self._processes:
            process.kill()
        # Gloo's waiting calls fail when their peers are gone; kernels and NCCL's must be told.
        if self.seat.device.type == "cuda":
            with contextlib.suppress(Exception):
                release_waiting(self.seat.place.group)
            with contextlib.suppress(Exception):
                dist.distributed_c10d._abort_process_group()
        if not self._runs:
            self._leave()
        self._end()

    def _leave(self) -> None:
        """Leave the process group after a failure, for others to be made."""
        # NCCL's was left when it was told; a device that waits for a rank that is gone would be waited for.
        with contextlib.suppress(Exception):
            if self.seat.device.type == "cpu" and dist.is_initialized():
                leave_seat(self.seat)


def check_can_start(world: int, device_type: str) -> None:
    """Refuse ranks that this process cannot start.

    Raises:
        ValueError: fewer than two, more than there are GPUs, or this process is a rank already.
    """
    if type(world) is not int or world < 2:
        raise ValueError(
            f"tensor_parallel must be a number of ranks, 2 or more, or the Ranks themselves, not {world!r}"
        )
    if device_type == "cuda" and torch.cuda.device_count() < world:
        raise ValueError(
            f"tensor_parallel={world} needs as many GPUs, and {torch.cuda.device_count()} are visible; use fewer ranks"
        )
    if dist.is_initialized():
        raise ValueError(
            "this process has a torch.distributed process group already: close the other model that is split over "
            "ranks, or call torch.distributed.destroy_process_group()"
        )


def _watch(ranks: weakref.ref[Ranks], connections: list[Connection]) -> None:
    """Hand on what the other ranks report, and that one is gone; ends with them."""
    while connections:
        try:
            ready = wait(connections, 1.0)
        except OSError:
            return
        pool = ranks()
        if pool is None or pool._cause is not None:
            return
        for connection in ready:
            try:
                pool._report(receive(connection))  # type: ignore[arg-type]
            except (EOFError, OSError):
                if pool._cause is None:
                    pool._lost(pool._connections.index(connection) + 1)  # type: ignore[arg-type]
                return
        del pool


def _end_all(processes: list[subprocess.Popen[bytes]], connections: list[Connection], folder: str) -> None:
    for process in processes:
        process.kill()
        process.wait()
    for connection in connections:
        connection.close()
    shutil.rmtree(folder, ignore_errors=True)
