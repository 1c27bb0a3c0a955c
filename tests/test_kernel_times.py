"""Which kernels a step launches, as ``benchmarks.gpu_times`` reports them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from quantspec.benchmarks.gpu_times import by_kernel, kernel_table


def event(name: str, us: float, device: DeviceType = DeviceType.CUDA) -> SimpleNamespace:
    # The profiler's devices equal DeviceType's, they are not the same objects.
    return SimpleNamespace(name=name, device_time_total=us, device_type=DeviceType(device.value))


EVENTS = [event("norm", 2.0), event("linear", 5.0), event("norm", 1.5), event("aten::mm", 9.0, DeviceType.CPU)]


def test_launches_and_times_are_summed_by_kernel_and_the_longest_is_first() -> None:
    kernels = by_kernel(EVENTS)
    assert kernels == {"linear": {"launches": 1, "us": 5.0}, "norm": {"launches": 2, "us": 3.5}}
    assert list(kernels) == ["linear", "norm"]


def test_events_of_the_profiler_have_what_is_read() -> None:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        torch.ones(2) + 1
    events = profiler.events()
    assert len(events) > 0
    assert by_kernel(events) == {}
    # What is read of kernels, operators have too.
    assert all(event.device_time_total == 0 and event.name for event in events)


def test_the_table_has_the_longest_kernels_and_the_rest_together() -> None:
    lines = kernel_table({"draft step": by_kernel(EVENTS), "token": {}}, shown=1).splitlines()
    rows = [(line[:70].strip(), *map(float, line[70:].split())) for line in lines]
    assert rows == [
        ("draft step: all of 2 kernels", 3, 8.5),
        ("linear", 1, 5.0),
        ("others", 2, 3.5),
        ("token: all of 0 kernels", 0, 0.0),
    ]
