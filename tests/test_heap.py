"""What was freed does not count against the budget when more is needed."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_infinity import MoE
from moe_infinity.heap import Heap, can_trim, collect_if_due
from moe_infinity.machine import resident_bytes
from moe_infinity.product_speed import BEYOND_CACHES_BYTES

pytestmark = pytest.mark.skipif(not can_trim(), reason="glibc's allocator")

BLOCK_BYTES = 100 * 1024  # below what malloc maps by itself
NUM_BLOCKS = 2000


def free_below_a_block_in_use() -> ctypes.c_void_p:
    """200 MB freed that malloc keeps, for the block after them is in use."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    blocks = [ctypes.c_void_p(libc.malloc(BLOCK_BYTES)) for _ in range(NUM_BLOCKS)]
    last = ctypes.c_void_p(libc.malloc(BLOCK_BYTES))
    for block in blocks:
        ctypes.memset(block, 1, BLOCK_BYTES)
        libc.free(block)
    return last


def test_gives_back_what_is_free_when_the_budget_is_short() -> None:
    last = free_below_a_block_in_use()
    full = resident_bytes()
    plenty = Heap(full + 2**30, 2**20)
    plenty.make_room()
    assert plenty.num_trims == 0
    assert resident_bytes() > full - 2**24

    short = Heap(full, 2**24)
    short.make_room()
    assert short.num_trims == 1
    assert resident_bytes() < full - NUM_BLOCKS * BLOCK_BYTES // 2
    ctypes.CDLL(None).free(last)


def test_again_only_when_more_has_come() -> None:
    heap = Heap(0, 0)
    heap.make_room()
    heap.make_room()
    assert heap.num_trims == 1
    heap.make_room(at_rest=True)
    assert heap.num_trims == 2
    last = free_below_a_block_in_use()
    heap.make_room()
    assert heap.num_trims == 3
    ctypes.CDLL(None).free(last)


def test_slots_that_fill_are_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    untouched = 1000 * 2**20
    monkeypatch.setattr("moe_infinity.heap.resident_bytes", lambda: 2000 * 2**20 - untouched)
    heap = Heap(0, 0, lambda: untouched)
    for _ in range(10):
        heap.make_room()
        untouched -= 100 * 2**20
    assert heap.num_trims == 1


def test_slots_that_cost_nothing_yet_are_counted() -> None:
    now = resident_bytes()
    roomy = Heap(now + 2**30, 2**20, lambda: 2**28)
    roomy.make_room()
    assert roomy.num_trims == 0
    full = Heap(now + 2**30, 2**20, lambda: 2**30)
    full.make_room()
    assert full.num_trims == 1


def test_asked_before_every_layer_of_a_prompt_and_not_between_tokens(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Heap] = []
    monkeypatch.setattr(Heap, "make_room", lambda heap, at_rest=False: looks.append(heap))
    with MoE(tiny, ram="2GiB", ram_slots=8) as moe:
        moe.generate([list(range(3, 43))], max_new_tokens=5)
        assert len(looks) == len(moe.residency()) + 1, "and behind the request"
        plan, heap = moe.plan, looks[0]
        needed = max(plan.workspace_bytes + plan.kept_bytes, BEYOND_CACHES_BYTES)
        assert heap._most_bytes == plan.budget_bytes - needed
        untouched = moe._hierarchy.untouched_bytes
        assert heap._untouched_bytes == untouched and 0 <= untouched() <= plan.cache_bytes


@pytest.fixture
def full_collections() -> Iterator[list[int]]:
    """Of Python's, as they come; one is due after two of younger objects."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            found.append(info["collected"])

    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(100_000, 10, 2)
    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)
    gc.set_threshold(*before)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="collects in steps")
def test_a_full_collection_is_made_when_it_is_due(full_collections: list[int]) -> None:
    gc.collect(1)
    collect_if_due()
    assert not full_collections
    for _ in range(3):
        gc.collect(1)
    gc.disable()
    collect_if_due()
    gc.enable()
    assert not full_collections, "somebody wants none"
    collect_if_due()
    assert len(full_collections) == 1


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="collects in steps")
def test_none_is_due_once_a_model_is_open(tiny: Path, full_collections: list[int]) -> None:
    for _ in range(3):
        gc.collect(1)
    with MoE(tiny, ram="2GiB") as moe:
        assert gc.get_count()[2] <= 2 and full_collections
        full_collections.clear()
        moe.generate([5, 6, 7], max_new_tokens=4)
        assert not full_collections
