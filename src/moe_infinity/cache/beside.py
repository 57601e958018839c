"""What the processor computes from RAM beside a device: the misses that are not copied."""

from __future__ import annotations

import time

import numpy as np

from moe_infinity.cache.base import Compute
from moe_infinity.cache.host_tier import HostTier
from moe_infinity.checkpoint.base import ExpertStore
from moe_infinity.residency.miss_split import MissSplit
from moe_infinity.residency.residency import Residency
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey


class Beside:
    """A miss rule of one device tier; what it keeps from being copied is pinned in RAM until it was
    computed."""

    def __init__(
        self, split: MissSplit, residency: Residency, host: HostTier, store: ExpertStore
    ) -> None:
        self.split = split
        self._residency = residency
        self._host = host
        self._store = store
        self._keys: list[ExpertKey] = []  # of the running event

    def choose(self, event: Event, misses: list[ExpertKey]) -> list[ExpertKey]:
        """Of an event's misses, those to copy: what the policy would keep longest."""
        here = [key for key in misses if self._host.holds(key)]
        if event.phase == "prefill" or not here:
            return misses
        count = self.split.choose(len(here), self._store.specs[here[0]].weight_bytes)
        if not count:
            return misses
        directory = self._residency.directory
        flat = np.array([directory.flat(key) for key in here])
        worst = self._residency.policy.victims(flat, count, event.layer)
        self._keys = sorted(directory.key(int(each)) for each in worst)
        for key in self._keys:
            self._host.shelf.ask(key)
        return [key for key in misses if key not in self._keys]

    def compute(self, compute: Compute) -> int:
        """Of the event, while the device works on what was launched for it; how many they were."""
        keys, self._keys = self._keys, []
        if not keys:
            return 0
        views = [self._host.views_of(key, self._store.specs[key]) for key in keys]
        start = time.perf_counter()
        compute(keys, views)
        weight_bytes = self._store.specs[keys[0]].weight_bytes
        self.split.learn(len(keys), weight_bytes, time.perf_counter() - start)
        for key in keys:
            self._host.shelf.given_back(key)
        return len(keys)

    def forget(self) -> None:
        """The event was given up, and its pins with it."""
        self._keys = []
