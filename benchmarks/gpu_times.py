"""How long a GPU takes: whole calls as CUDA graphs, and each of their kernels."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Replays timed at once.
_ROW = 5


def milliseconds(call: Callable[[], Any], replays: int = 10) -> float:
    """Median GPU time of ``call``, replayed as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        # Several in a row, so that the launch of one hides behind the one before.
        for _ in range(_ROW):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / _ROW)
    return sorted(times)[len(times) // 2]


def kernel_times(call: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Launches and microseconds of each kernel of one ``call``, longest first.

    The call is not a CUDA graph: the profiler need not see into one.
    """
    with torch.no_grad():
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
            call()
            torch.cuda.synchronize()
    return by_kernel(profiler.events())


def by_kernel(events: Iterable[Any]) -> dict[str, dict[str, float]]:
    """Launches and microseconds by name of those of the profiler's events that ran on the GPU, longest first."""
    kernels: dict[str, dict[str, float]] = {}
    for event in events:
        if event.device_type == DeviceType.CUDA:
            kernel = kernels.setdefault(event.name, {"launches": 0, "us": 0.0})
            kernel["launches"] += 1
            kernel["us"] += event.device_time_total
    return dict(sorted(kernels.items(), key=lambda item: -item[1]["us"]))


def kernel_table(kernels: dict[str, dict[str, dict[str, float]]], shown: int = 12) -> str:
    """Of each step the kernels that take longest, by lines of name, launches and microseconds."""
    lines = []
    for step, found in kernels.items():
        rows = [(name, kernel["launches"], kernel["us"]) for name, kernel in found.items()]
        rest = rows[shown:]
        rows = [
            (f"{step}: all of {len(rows)} kernels", sum(row[1] for row in rows), sum(row[2] for row in rows)),
            *rows[:shown],
            *([("others", sum(row[1] for row in rest), sum(row[2] for row in rest))] if rest else []),
        ]
        lines += [f"{name[:70]:70} {launches:6.0f} {us:10.1f}" for name, launches, us in rows]
    return "\n".join(lines)


def free() -> None:
    """Give unused memory back, so that peaks are those of what follows."""
    gc.collect()
    torch.cuda.empty_cache()
