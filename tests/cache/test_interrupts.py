"""KeyboardInterrupt at any line of the cache: the next event finds everything in order."""

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import moe_infinity
from moe_infinity.cache.ram import RamHierarchy
from moe_infinity.kernels.base import Views
from moe_infinity.residency.directory import State
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey
from support.routing import event, grid
from support.stores import expected_parts, found_parts, memory_store, ram_hierarchy

SHAPE = grid(2, 20, top_k=3)
STORE = memory_store(SHAPE, pages=1)
ROOT = str(Path(moe_infinity.__file__).parent)
WATCHED = tuple(f"{ROOT}/{part}/" for part in ("cache", "residency"))
STRIDE = 7  # lines between two points tried; coprime to the loops' lengths, so all lines come up


@contextmanager
def interrupt_after(lines: int) -> Iterator[None]:
    """Raise KeyboardInterrupt in this thread before that line of cache/ or residency/."""
    left = lines

    def trace(frame: FrameType, what: str, arg: Any) -> Callable[..., Any] | None:
        nonlocal left
        if not frame.f_code.co_filename.startswith(WATCHED):
            return None
        if what == "line":
            left -= 1
            # Leaving a with block is traced as its first line; there no signal is ever taken.
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            if left <= 0 and not line.lstrip().startswith("with "):
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def run(hierarchy: RamHierarchy, each: Event) -> None:
    seen: list[ExpertKey] = []

    def compute(keys: list[ExpertKey], views: list[Views]) -> None:
        for key, each in zip(keys, views, strict=True):
            assert found_parts(each) == expected_parts(STORE, key), f"wrong bytes for {key}"
            seen.append(key)

    hierarchy.run_event(each, compute)
    assert sorted(seen) == each.keys


def assert_usable(hierarchy: RamHierarchy) -> None:
    for each in (event(0, range(18), 20, "prefill"), event(1, range(20), 20), event(0, [7], 20)):
        run(hierarchy, each)
        hierarchy.check_integrity()
        assert not hierarchy.residency.directory.pins.any()


@pytest.mark.parametrize(
    "interrupted",
    [
        pytest.param(event(0, range(3, 20), 20, "prefill"), id="prefill"),
        pytest.param(event(1, [0, 2, 11, 12, 13], 20), id="decode"),
    ],
)
def test_an_interrupt_at_any_line(interrupted: Event) -> None:
    lines = 0
    while True:
        lines += STRIDE
        with ram_hierarchy(SHAPE, STORE, 17) as hierarchy:
            for warm in (event(0, range(12), 20, "prefill"), event(1, [2, 3, 4], 20)):
                run(hierarchy, warm)
            try:
                with interrupt_after(lines):
                    run(hierarchy, interrupted)
            except KeyboardInterrupt:
                hierarchy.check_integrity()
                directory = hierarchy.residency.directory
                assert not directory.pins.any()
                assert directory.keys_in(State.IN_FLIGHT) == []
                assert_usable(hierarchy)
            else:
                assert lines > 300, "the event was over before it was interrupted"
                return


class FailThenInterrupt:
    """A compute function that fails, and the giving up of whose event is interrupted."""

    def __init__(self, lines: int) -> None:
        self.interrupting = interrupt_after(lines)

    def __call__(self, key: ExpertKey, views: object) -> None:
        self.interrupting.__enter__()
        raise ZeroDivisionError


def test_a_second_interrupt_while_the_first_is_seen_to() -> None:
    for lines in range(1, 400, 3):
        with ram_hierarchy(SHAPE, STORE, 17) as hierarchy:
            run(hierarchy, event(0, [1, 2], 20))
            compute = FailThenInterrupt(lines)
            with pytest.raises((ZeroDivisionError, KeyboardInterrupt)) as caught:
                hierarchy.run_event(event(0, range(1, 9), 20), compute)
            compute.interrupting.__exit__(None, None, None)
            assert_usable(hierarchy)
            if caught.type is ZeroDivisionError:
                assert lines > 20, "giving up was over before it was interrupted"
                return
    raise AssertionError("giving up an event takes longer than this test looks")
