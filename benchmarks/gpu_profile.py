"""A few passes of decode under torch's profiler: kernels, copies, launches and idle time of a GPU.

It knows nothing of models: it is given what runs a request, and starts when that has settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from gpu_texts import Clock

_FIRST, _COUNT = 6, 5  # tokens: the first passes are launched singly and recorded
_LAUNCHES = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")  # in names of the driver's calls
_TOP = 10


class _Window:
    """Starts and stops the profiler at certain tokens of a request."""

    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)
        self.is_open = self.is_over = False

    def on_token(self, number: int) -> None:
        if number == _FIRST:
            self.profiler.start()
            self.is_open = True
        elif number == _FIRST + _COUNT:
            self.close()

    def close(self) -> None:
        if self.is_open:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.profiler.stop()
        self.is_over, self.is_open = self.is_over or self.is_open, False


def profile(ask: Callable[[Any], object]) -> dict[str, Any]:
    """ask: runs a request of at least 12 new tokens with a streamer. Returns times per token."""
    window = _Window()
    try:
        ask(Clock(window.on_token))
    finally:
        window.close()
    assert window.is_over, "the request was too short to be profiled"
    return summary(list(window.profiler.events() or []), _COUNT)


def summary(events: list[Any], num_tokens: int) -> dict[str, Any]:
    """Of what ran on the device, by interval; and of what the host started."""
    on_gpu = torch.autograd.DeviceType.CUDA
    there = [e for e in events if e.device_type == on_gpu]
    copies = [e for e in there if e.name.startswith(("Memcpy", "Memset"))]
    kernels = [e for e in there if not e.name.startswith(("Memcpy", "Memset"))]
    started = Counter(
        e.name
        for e in events
        if e.device_type != on_gpu and any(word in e.name for word in _LAUNCHES)
    )
    begun = min((e.time_range.start for e in there), default=0.0)
    ended = max((e.time_range.end for e in there), default=0.0)
    span_us, busy_us = ended - begun, _union(there)
    return {
        "tokens": num_tokens,
        "span_us": span_us / num_tokens,
        "kernel_us": sum(map(_length, kernels)) / num_tokens,
        "kernel_union_us": _union(kernels) / num_tokens,
        "copy_us": sum(map(_length, copies)) / num_tokens,
        "idle_share": 1 - busy_us / span_us if span_us else None,
        "kernels": len(kernels) / num_tokens,
        "copies": len(copies) / num_tokens,
        "host_calls": {name: n / num_tokens for name, n in started.most_common(_TOP)},
        "top_kernels": _top(kernels, num_tokens),
    }


def _length(event: Any) -> float:
    return float(event.time_range.end - event.time_range.start)


def _union(events: Iterable[Any]) -> float:
    """Microseconds in which at least one of them ran."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.time_range.start):
        start, end = event.time_range.start, event.time_range.end
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _top(kernels: list[Any], num_tokens: int) -> list[dict[str, Any]]:
    spent: Counter[str] = Counter()
    for event in kernels:
        spent[event.name] += _length(event)
    number = Counter(event.name for event in kernels)
    return [
        {"name": name[:80], "us": us / num_tokens, "launches": number[name] / num_tokens}
        for name, us in spent.most_common(_TOP)
    ]
