"""Decisions of the tier beneath another: what it takes in, keeps and lets go as that one asks.

Together the two hold as many experts as they have slots: what lies in both is the first to leave
here, and what the upper tier lets go comes back. Where every expert fits here none ever leaves, and
the upper tier is a cache over this one. Pure, like Residency; whoever drives it moves the bytes.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from moe_infinity.policies.base import CachePolicy
from moe_infinity.residency.directory import Directory, State
from moe_infinity.residency.running import Load
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, Phase


class Found(Enum):
    """How the shelf answers ``ask``."""

    HERE = "here"
    COMING = "coming"  # in flight already
    ABSENT = "absent"  # begin to load it into the slot
    NO_ROOM = "no room"  # everything is pinned: ask again when something was given back


class Shelf:
    """Drives one Directory and one CachePolicy by the wishes of the tier above.

    What was asked for is pinned until it has ``risen`` or is ``given_back``.
    """

    def __init__(self, directory: Directory, policy: CachePolicy) -> None:
        self.directory = directory
        self.policy = policy
        self._above: NDArray[np.bool_] = np.zeros(len(directory.states), dtype=np.bool_)
        self._layer = 0  # of the last event, from which victims are judged

    def begin_pass(self, phase: Phase) -> None:
        self.policy.begin_pass(phase)

    def observe(self, event: Event) -> None:
        """The tier above is about to serve it."""
        self._layer = event.layer
        self.policy.on_event(event)

    def ask(self, key: ExpertKey) -> tuple[Found, Load | None]:
        """The tier above wants ``key``. ABSENT comes with the load that has begun."""
        state = self.directory.state(key)
        if state is State.ABSENT:
            load = self._begin(key)
            if load is None:
                return Found.NO_ROOM, None
            self.directory.pin(key)
            return Found.ABSENT, load
        self.directory.pin(key)
        return (Found.HERE if state is State.RESIDENT else Found.COMING), None

    def fetch(self, key: ExpertKey) -> Load | None:
        """Begin to load what nobody asked for, if there is a slot to spare; it is not pinned."""
        is_absent = self.directory.state(key) is State.ABSENT
        if not is_absent or not self.directory.num_free(self.directory.class_of(key)):
            return None
        return self._begin(key)

    def complete(self, key: ExpertKey) -> None:
        """The bytes that were loaded have arrived."""
        self.directory.complete(key)

    def fail(self, key: ExpertKey) -> None:
        """They have not, and will not."""
        self.directory.fail(key)
        self.policy.on_evict(key)

    def risen(self, key: ExpertKey) -> None:
        """It lies above as well: here it is the first to go."""
        self.directory.unpin(key)
        self._above[self.directory.flat(key)] = True

    def given_back(self, key: ExpertKey) -> None:
        """The tier above wants it no more."""
        if self.directory.state(key) is not State.ABSENT:
            self.directory.unpin(key)

    def take_back(self, key: ExpertKey) -> Load | None:
        """The tier above lets ``key`` go. Returns where its bytes belong, a load that is to be
        ``complete``d; None if they are here still, or everything is pinned and it is lost."""
        self._above[self.directory.flat(key)] = False
        if self.directory.state(key) is not State.ABSENT:
            return None
        return self._begin(key)

    def lies_above(self, key: ExpertKey) -> bool:
        return bool(self._above[self.directory.flat(key)])

    def reset(self, above: NDArray[np.bool_]) -> None:
        """Forget every load and pin; every transfer has to be over. above: [L * E] what the upper
        tier holds."""
        for key in self.directory.abandon():
            self.policy.on_evict(key)
        self._above = above.copy()

    def check_integrity(self) -> None:
        """Raise AssertionError if any slot is lost or held twice."""
        self.directory.check_integrity()

    def _begin(self, key: ExpertKey) -> Load | None:
        size_class = self.directory.class_of(key)
        victim = None
        if not self.directory.num_free(size_class):
            victim = self._victim(size_class)
            if victim is None:
                return None
            self.directory.evict(victim)
            self.policy.on_evict(victim)
        slot = self.directory.begin_load(key)
        self.policy.on_insert(key)
        return Load(key, slot, victim)

    def _victim(self, size_class: int) -> ExpertKey | None:
        loose = self.directory.evictable(size_class)
        if not len(loose):
            return None
        twice = loose[self._above[loose]]
        candidates = twice if len(twice) else loose
        return self.directory.key(int(self.policy.victims(candidates, 1, self._layer)[0]))
