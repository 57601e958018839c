"""The directory against a dictionary, and its refusals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moe_infinity.residency.directory import NO_SLOT, Directory, State
from moe_infinity.types import ExpertKey
from support.routing import grid

SHAPE = grid(3, 4)
KEYS = [ExpertKey(layer, expert) for layer in range(3) for expert in range(4)]
CLASSES = (0, 1, 0)
SLOTS = (3, 2)
keys = st.sampled_from(KEYS)


class DirectoryMachine(RuleBasedStateMachine):
    """Random legal calls, mirrored in two dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Directory(SHAPE, SLOTS, CLASSES)
        self.held: dict[ExpertKey, tuple[int, State]] = {}
        self.pins = dict.fromkeys(KEYS, 0)

    def free(self, size_class: int) -> set[int]:
        mine = range(3) if size_class == 0 else range(3, 5)
        return set(mine) - {slot for slot, _ in self.held.values()}

    @rule(key=keys)
    def load(self, key: ExpertKey) -> None:
        free = self.free(CLASSES[key.layer])
        if key in self.held or not free:
            return
        slot = self.directory.begin_load(key)
        assert slot == min(free)
        self.held[key] = (slot, State.IN_FLIGHT)

    @rule(key=keys)
    def complete(self, key: ExpertKey) -> None:
        if self.held.get(key, (0, None))[1] is State.IN_FLIGHT:
            self.directory.complete(key)
            self.held[key] = (self.held[key][0], State.RESIDENT)
        else:
            with pytest.raises(AssertionError):
                self.directory.complete(key)

    @rule(key=keys)
    def fail(self, key: ExpertKey) -> None:
        if self.held.get(key, (0, None))[1] is State.IN_FLIGHT:
            self.directory.fail(key)
            del self.held[key]
            self.pins[key] = 0
        else:
            with pytest.raises(AssertionError):
                self.directory.fail(key)

    @rule(key=keys)
    def evict(self, key: ExpertKey) -> None:
        if self.held.get(key, (0, None))[1] is State.RESIDENT and not self.pins[key]:
            self.directory.evict(key)
            del self.held[key]
        else:
            with pytest.raises(AssertionError):
                self.directory.evict(key)

    @rule(key=keys)
    def pin(self, key: ExpertKey) -> None:
        if key in self.held:
            self.directory.pin(key)
            self.pins[key] += 1

    @rule(key=keys)
    def unpin(self, key: ExpertKey) -> None:
        if self.pins[key]:
            self.directory.unpin(key)
            self.pins[key] -= 1
        else:
            with pytest.raises(AssertionError):
                self.directory.unpin(key)

    @precondition(lambda self: any(s is State.IN_FLIGHT for _, s in self.held.values()))
    @rule()
    def abandon(self) -> None:
        lost = {key for key, (_, state) in self.held.items() if state is State.IN_FLIGHT}
        assert set(self.directory.abandon()) == lost
        for key in lost:
            del self.held[key]
        self.pins = dict.fromkeys(KEYS, 0)

    @invariant()
    def agrees(self) -> None:
        self.directory.check_integrity()
        for key in KEYS:
            slot, state = self.held.get(key, (NO_SLOT, State.ABSENT))
            assert (self.directory.slot(key), self.directory.state(key)) == (slot, state)
            assert self.directory.is_pinned(key) == bool(self.pins[key])
        for size_class in range(2):
            assert self.directory.num_free(size_class) == len(self.free(size_class))
            loose = {
                key
                for key, (_, state) in self.held.items()
                if state is State.RESIDENT
                and not self.pins[key]
                and CLASSES[key.layer] == size_class
            }
            found = self.directory.evictable(size_class)
            assert [self.directory.key(flat) for flat in found] == sorted(loose)


TestDirectory = DirectoryMachine.TestCase


@given(st.integers(0, 11))
def test_flat_keys_round_trip(flat: int) -> None:
    directory = Directory(SHAPE, SLOTS, CLASSES)
    assert directory.flat(directory.key(flat)) == flat


def test_integrity_finds_a_lost_slot() -> None:
    directory = Directory(SHAPE, SLOTS, CLASSES)
    directory.begin_load(KEYS[0])
    directory.states[0] = State.ABSENT
    with pytest.raises(AssertionError, match=r"free\(2\) \+ in_flight\(0\)"):
        directory.check_integrity()


def test_integrity_finds_a_slot_held_twice() -> None:
    directory = Directory(SHAPE, SLOTS, CLASSES)
    directory.begin_load(KEYS[0])
    directory.begin_load(KEYS[1])
    directory.slots[0] = directory.slots[1]
    with pytest.raises(AssertionError, match="lost or held twice"):
        directory.check_integrity()


@pytest.mark.parametrize("lines_done", range(1, 4))
def test_abandon_mends_a_load_that_was_cut_short(lines_done: int) -> None:
    """begin_load takes three steps; an interrupt may strike after any of them."""
    directory = Directory(SHAPE, SLOTS, CLASSES)
    slot = directory._free[0].pop(0)
    if lines_done > 1:
        directory.states[0] = State.IN_FLIGHT
    if lines_done > 2:
        directory.slots[0] = slot
    directory.abandon()
    directory.check_integrity()
    assert directory.num_free(0) == 3


def test_another_directory_takes_the_slots_over() -> None:
    first, second = Directory(SHAPE, SLOTS, CLASSES), Directory(SHAPE, SLOTS, CLASSES)
    for key in (KEYS[0], KEYS[5], KEYS[9]):
        first.begin_load(key)
        first.complete(key)
        second.begin_load(KEYS[3] if key == KEYS[0] else key)
    with pytest.raises(AssertionError, match="in flight"):
        second.take_slots(first.slots)
    second.abandon()
    first.evict(KEYS[0])
    second.take_slots(first.slots)
    second.check_integrity()
    assert second.keys_in(State.RESIDENT) == [KEYS[5], KEYS[9]]
    assert second.begin_load(KEYS[1]) == first.begin_load(KEYS[1])
