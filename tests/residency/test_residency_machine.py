"""Residency under random events, completions, failures and aborts, against a model of its slots."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_infinity.policies import policy_names
from moe_infinity.residency.directory import State
from moe_infinity.residency.running import Load
from moe_infinity.types import ExpertKey
from support.routing import event, grid, new_residency

MANY = 24  # experts of a layer: enough for rings, streaming ahead and waves
capacities = st.one_of(st.integers(1, 6), st.integers(16, 40))


def running(machine: Any) -> bool:
    return machine.members is not None


class ResidencyMachine(RuleBasedStateMachine):
    """Everything the live tier may do, in any order it may do it in."""

    @initialize(
        layers=st.integers(1, 3),
        experts=st.sampled_from([3, 8, MANY]),
        capacity=st.tuples(capacities, capacities),
        policy=st.sampled_from(policy_names()),
    )
    def open(self, layers: int, experts: int, capacity: tuple[int, int], policy: str) -> None:
        self.shape = grid(
            layers, experts, per_layer=[experts, max(1, experts - 2), experts][:layers]
        )
        classes = (0, 1, 0)[:layers]
        self.residency = new_residency(self.shape, capacity, policy, classes)
        self.directory = self.residency.directory
        self.slots: dict[int, ExpertKey] = {}  # who holds which slot, by what loads said
        self.in_flight: list[ExpertKey] = []
        self.members: set[ExpertKey] | None = None
        self.pending: list[ExpertKey] = []
        self.computed: list[ExpertKey] = []
        self.ahead: set[ExpertKey] = set()
        self.totals = dict.fromkeys(("members", "demand", "proactive", "used", "bytes"), 0)

    @precondition(lambda self: not running(self))
    @rule(data=st.data(), phase=st.sampled_from(["prefill", "decode"]), at_once=st.booleans())
    def begin(self, data: st.DataObject, phase: str, at_once: bool) -> None:
        layer = data.draw(st.integers(0, self.shape.num_layers - 1))
        total = self.shape.experts_per_layer[layer]
        chosen = data.draw(
            st.one_of(
                st.sets(st.integers(0, total - 1), max_size=4),
                st.sets(st.integers(0, total - 1), min_size=total * 3 // 4),
            )
        )
        routed = event(layer, sorted(chosen), self.shape.num_experts, phase)  # type: ignore[arg-type]
        self.residency.begin_pass(phase)  # type: ignore[arg-type]
        given_up = self.ahead - set(self.residency.room.ahead)  # their layer did not run when due
        self.ahead -= given_up
        found = self.residency.begin_event(routed)
        self.members, self.computed = set(routed.keys), []
        self.phase = phase
        resident = {k for k in self.slots.values() if k not in self.in_flight}
        assert found.hits == sorted(self.members & resident)
        assert found.late == sorted(self.members & set(self.in_flight))
        assert found.misses == sorted(self.members - set(self.slots.values()))
        of_layer = {k for k in self.ahead if k.layer == layer}
        wrong = of_layer - self.members
        assert found.disproved == sorted(wrong & set(self.in_flight))
        self.totals["used"] += len(of_layer) - len(wrong)
        self.ahead -= of_layer
        self.totals["members"] += len(self.members)
        self.pending = sorted(found.hits + found.late)
        if at_once:
            self.run_to_the_end()

    @precondition(running)
    @rule()
    def admit(self) -> None:
        loads = self.residency.admit()
        assert [load.key for load in loads] == sorted(load.key for load in loads)
        self.take(loads, proactive=False)
        self.pending += [load.key for load in loads]

    @precondition(running)
    @rule()
    def stream_ahead(self) -> None:
        self.take(self.residency.stream_ahead(), proactive=True)

    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        layer = data.draw(st.integers(0, self.shape.num_layers - 1))
        expert = st.integers(0, self.shape.experts_per_layer[layer] - 1)
        wanted = [ExpertKey(layer, e) for e in data.draw(st.lists(expert, unique=True, max_size=6))]
        self.take(self.residency.prefetch(wanted, layer), proactive=True)

    def take(self, loads: list[Load], proactive: bool) -> None:
        """Loads have begun: none of them twice, and nobody evicted who is still needed."""
        uncomputed = (self.members or set()) - set(self.computed)
        for load in loads:
            assert load.proactive == proactive
            assert load.key not in self.slots.values(), f"{load.key} is loaded twice"
            if load.victim is not None:
                assert load.victim not in self.in_flight, "evicted in flight"
                assert load.victim not in uncomputed, "a member was evicted uncomputed"
                assert not (proactive and load.victim in self.ahead), "prefetches thrash"
                assert load.victim in self.slots.values(), "evicted twice"
                self.slots = {slot: k for slot, k in self.slots.items() if k != load.victim}
                self.ahead.discard(load.victim)
            assert load.slot not in self.slots, f"slot {load.slot} is held"
            self.slots[load.slot] = load.key
            self.in_flight.append(load.key)
            self.totals["proactive" if proactive else "demand"] += 1
            self.totals["bytes"] += 100 + load.key.layer
        if proactive:
            self.ahead |= {load.key for load in loads}

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.in_flight))
        self.in_flight.remove(key)
        self.residency.complete(key)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.in_flight))
        self.in_flight.remove(key)
        self.slots = {slot: k for slot, k in self.slots.items() if k != key}
        self.ahead.discard(key)
        if key in self.pending:
            self.pending.remove(key)
        self.residency.fail(key)

    def ready(self) -> list[ExpertKey]:
        candidates = self.pending[:1] if self.phase == "prefill" else self.pending
        return [k for k in candidates if k not in self.in_flight]

    @precondition(lambda self: running(self) and self.ready())
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.ready()))
        assert self.directory.state(key) is State.RESIDENT
        self.pending.remove(key)
        self.computed.append(key)
        self.residency.finish(key)

    @precondition(running)
    @rule()
    def run_to_the_end(self) -> None:
        """From any state the event can be ended, whatever the order of the steps before."""
        while not self.residency.is_done:
            self.admit()
            self.stream_ahead()
            if ready := self.ready():
                self.pending.remove(ready[0])
                self.computed.append(ready[0])
                self.residency.finish(ready[0])
            else:
                assert self.in_flight, "no progress: the event can never end"
                self.residency.complete(self.in_flight.pop(0))
        self.end()

    @precondition(lambda self: running(self) and self.residency.is_done)
    @rule()
    def end(self) -> None:
        assert self.members is not None
        assert sorted(self.computed) == sorted(self.members), "computed twice or never"
        self.residency.end_event()
        self.members = None
        assert not self.directory.pins.any(), "an ended event has left pins"

    @rule()
    def abort(self) -> None:
        self.residency.abort_event()
        gone = set(self.in_flight)
        self.slots = {slot: k for slot, k in self.slots.items() if k not in gone}
        self.in_flight, self.pending, self.members = [], [], None
        self.ahead.clear()
        assert not self.directory.pins.any()

    @invariant()
    def consistent(self) -> None:
        self.directory.check_integrity()
        held = {self.directory.slot(key): key for key in self.slots.values()}
        assert held == self.slots
        assert set(self.directory.keys_in(State.IN_FLIGHT)) == set(self.in_flight)
        assert set(self.residency.room.ahead) == self.ahead
        for key in self.pending:
            assert self.directory.is_pinned(key), f"{key} waits to be computed, unpinned"

    @invariant()
    def counters_add_up(self) -> None:
        both = [self.residency.counters.prefill, self.residency.counters.decode]
        assert sum(c.hits + c.late + c.misses for c in both) == self.totals["members"]
        assert sum(c.demand_loads for c in both) == self.totals["demand"]
        assert sum(c.demand_bytes + c.prefetch_bytes for c in both) == self.totals["bytes"]
        proactive = sum(c.proactive_loads for c in both)
        wasted = sum(c.wasted_loads for c in both)
        assert proactive == self.totals["proactive"]
        assert proactive == wasted + self.totals["used"] + len(self.ahead)

    def teardown(self) -> None:
        if getattr(self, "members", None) is not None:
            self.run_to_the_end()


ResidencyMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60)


@pytest.mark.filterwarnings("error")
class TestResidency(ResidencyMachine.TestCase):  # type: ignore[misc, name-defined]
    pass
