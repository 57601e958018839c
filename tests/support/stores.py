"""Expert stores in memory whose reads can be held back, watched and made to fail."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from moe_infinity.cache.device_layout import device_layouts
from moe_infinity.cache.device_memory import DeviceMemory
from moe_infinity.cache.device_pool import DevicePool
from moe_infinity.cache.device_slots import DeviceSlots
from moe_infinity.cache.host_tier import HostTier
from moe_infinity.cache.pinned import PinnedArena
from moe_infinity.cache.ram import RamHierarchy
from moe_infinity.cache.slots import SlotArena
from moe_infinity.cache.transfer import Transfer, TransferEngine, TransferState
from moe_infinity.cache.vram import VramHierarchy
from moe_infinity.checkpoint.base import ExpertStore
from moe_infinity.checkpoint.direct_io import ALIGNMENT_BYTES as PAGE
from moe_infinity.checkpoint.memory import MemoryStore
from moe_infinity.devices.base import Device
from moe_infinity.devices.simulated import Clock, SimulatedDevice
from moe_infinity.kernels.base import Views
from moe_infinity.predictors import find_predictor
from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.residency.planner import PrefetchPlanner
from moe_infinity.residency.runner import ChooseMisses, EventRunner
from moe_infinity.residency.shelf import Shelf
from moe_infinity.tracing.event import Event
from moe_infinity.types import Block, ExpertKey, ExpertShape, ExpertSpec, Part, ReadRange
from support.routing import new_residency

PATIENCE_S = 30.0  # a test that waits this long for another thread has found a deadlock


def memory_store(shape: ExpertShape, pages: int = 3) -> MemoryStore:
    """Every expert: ``up_proj`` (float32 [pages, 512] strewn over the first read) and ``down_proj``
    (bfloat16 [64], in a second file, at an offset inside its page). Random bytes throughout."""
    rng = np.random.default_rng(7)
    keys = [
        ExpertKey(layer, expert)
        for layer, count in enumerate(shape.experts_per_layer)
        for expert in range(count)
    ]
    first = rng.integers(0, 256, len(keys) * pages * PAGE, dtype=np.uint8)
    second = rng.integers(0, 256, len(keys) * PAGE - 100, dtype=np.uint8)  # ends inside a page
    specs = {key: _spec(key, number, pages) for number, key in enumerate(keys)}
    return MemoryStore(specs, [first.tobytes(), second.tobytes()])


def _spec(key: ExpertKey, number: int, pages: int) -> ExpertSpec:
    up = Part("up_proj", "F32", (pages, 512), 0, (Block(0, (pages, 512), (1024, 1), 0),))
    down = Part("down_proj", "BF16", (64,), 0, (Block(pages * PAGE + 20, (64,), (1,), 0),))
    ranges = (
        ReadRange(0, number * pages * PAGE, pages * PAGE, pages * PAGE, 0),
        ReadRange(1, number * PAGE, PAGE, 200, pages * PAGE),
    )
    return ExpertSpec(key, (up, down), ranges, pages * 512 * 4 + 64 * 2)


def expected_parts(store: MemoryStore, key: ExpertKey) -> dict[str, bytes]:
    """What the parts of an expert have to hold, cut out of the files by hand."""
    first, second = store.specs[key].ranges
    raw = store._files[0][first.file_offset : first.file_offset + first.num_bytes]
    up = b"".join(raw[i * PAGE : i * PAGE + 2048] for i in range(len(raw) // PAGE))
    return {"up_proj": up, "down_proj": store._files[1][second.file_offset + 20 :][:128]}


def found_parts(views: Mapping[str, list[torch.Tensor]]) -> dict[str, bytes]:
    """The bytes that compute was handed."""
    return {
        name: b"".join(b.contiguous().view(torch.uint8).numpy().tobytes() for b in blocks)
        for name, blocks in views.items()
    }


class ScriptedStore(ExpertStore):
    """Reads another store when the test says so.

    held: keys whose reads wait for ``release``. errors: what reads of a key raise, once each.
    reads: (key, slot offset) of every read begun, in order.
    """

    def __init__(self, store: MemoryStore) -> None:
        self.specs = store.specs
        self.errors: dict[ExpertKey, list[BaseException]] = {}
        self.reads: list[tuple[ExpertKey, int]] = []
        self._store = store
        self._held: set[ExpertKey] = set()
        self._permits: dict[ExpertKey, int] = {}
        self._changed = threading.Condition()

    def hold(self, *keys: ExpertKey) -> None:
        with self._changed:
            self._held |= set(keys)

    def release(self, key: ExpertKey, num_reads: int | None = None) -> None:
        """Let so many reads of the key go on; all of them, now and later, if not given."""
        with self._changed:
            if num_reads is None:
                self._held.discard(key)
            else:
                self._permits[key] = self._permits.get(key, 0) + num_reads
            self._changed.notify_all()

    def wait_for_reads(self, count: int) -> None:
        """Until ``count`` reads have begun in all."""
        with self._changed:
            arrived = self._changed.wait_for(lambda: len(self.reads) >= count, PATIENCE_S)
            assert arrived, f"got {len(self.reads)} reads, expected {count}"

    def read_into(self, key: ExpertKey, buffer: memoryview, chunk: ReadRange) -> None:
        with self._changed:
            self.reads.append((key, chunk.slot_offset))
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._may_go(key), PATIENCE_S), f"{key} is stuck"
            if key in self._held:
                self._permits[key] -= 1
            errors = self.errors.get(key)
            if errors:
                raise errors.pop(0)
        self._store.read_into(key, buffer, chunk)

    def _may_go(self, key: ExpertKey) -> bool:
        return key not in self._held or self._permits.get(key, 0) > 0


def settle(engine: TransferEngine, *transfers: Transfer) -> list[TransferState]:
    """Wait for these alone; how each ended."""
    missing = set(transfers)
    while missing:
        engine.wait_any()
        missing -= set(engine.take_settled())
    return [transfer.state for transfer in transfers]


def wait_until(condition: Callable[[], bool]) -> None:
    """For what another thread does next and tells nobody."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S * 1000)):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("waited in vain")


def run_checked(hierarchy: Any, each: Event, store: MemoryStore) -> list[ExpertKey]:
    """One event; every member has to come exactly once, with its own bytes."""
    seen: list[ExpertKey] = []

    def compute(keys: list[ExpertKey], views: list[Views]) -> None:
        for key, found in zip(keys, views, strict=True):
            assert found_parts(found) == expected_parts(store, key), f"wrong bytes for {key}"
            seen.append(key)

    hierarchy.run_event(each, compute)
    hierarchy.check_integrity()
    assert sorted(seen) == each.keys
    return seen


class TurnedClock(Clock):
    """Time passes when somebody waits, or when the test says so."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def now_s(self) -> float:
        return self.at_s

    def wait_until(self, at_s: float) -> None:
        self.at_s = max(self.at_s, at_s)


@contextmanager
def vram_hierarchy(
    shape: ExpertShape,
    store: ExpertStore,
    num_slots: int | Sequence[int],
    num_ram_slots: int,
    policy: str = "lru",
    predictor: ExpertPredictor | None = None,
    device: Device | Sequence[Device] | None = None,
    num_threads: int = 2,
    num_spare: int = 2,
) -> Iterator[VramHierarchy]:
    """A device tier over a RAM tier, one size class each, closed in the end. Uploads go in chunks
    of a page. num_slots: of each, where there are several devices."""
    devices = [device] if isinstance(device, Device) else device
    devices = devices or [SimulatedDevice(24.0, TurnedClock())]
    counts = [num_slots] if isinstance(num_slots, int) else num_slots
    residency = new_residency(shape, [sum(counts)], policy)
    planner = PrefetchPlanner(predictor or find_predictor("none")(shape), residency.directory)
    below = new_residency(shape, [num_ram_slots], policy)
    memories = [
        _device_memory(store, count, each, num_spare)
        for count, each in zip(counts, devices, strict=True)
    ]
    memory = memories[0] if isinstance(num_slots, int) else DevicePool(memories)
    arena = PinnedArena((num_ram_slots,), (store.slot_bytes,), devices[0])
    engine = TransferEngine(store, num_threads, chunk_bytes=PAGE)
    host = HostTier(Shelf(below.directory, below.policy), arena, engine)
    hierarchy = VramHierarchy(store, EventRunner(residency, planner), host, memory)
    try:
        yield hierarchy
    finally:
        hierarchy.close()


def _device_memory(
    store: ExpertStore, num_slots: int, device: Device, num_spare: int
) -> DeviceMemory:
    slots = DeviceSlots(device, (num_slots,), (store.slot_bytes,), num_spare)
    memory = DeviceMemory(device_layouts(store.specs), slots, device)
    memory.uploads.chunk_bytes = PAGE
    return memory


@contextmanager
def ram_hierarchy(
    shape: ExpertShape,
    store: ExpertStore,
    num_slots: int,
    num_threads: int = 1,
    policy: str = "lru",
    predictor: ExpertPredictor | None = None,
    choose_misses: ChooseMisses | None = None,
) -> Iterator[RamHierarchy]:
    """A RAM tier with one size class, closed in the end. Chunks are one page."""
    residency = new_residency(shape, [num_slots], policy)
    predictor = predictor or find_predictor("none")(shape)
    arena = SlotArena((num_slots,), (store.slot_bytes,))
    planner = PrefetchPlanner(predictor, residency.directory)
    engine = TransferEngine(store, num_threads, chunk_bytes=PAGE)
    runner = EventRunner(residency, planner, choose_misses)
    hierarchy = RamHierarchy(store, runner, arena, engine)
    try:
        yield hierarchy
    finally:
        hierarchy.close()
