"""Disk to RAM, computed on the CPU: moves the bytes that residency/ decides about."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_infinity.cache.base import COMING, NOWHERE
from moe_infinity.cache.driven import DrivenHierarchy
from moe_infinity.cache.early_reads import EarlyReads
from moe_infinity.cache.slot_views import SlotViews
from moe_infinity.cache.slots import SlotArena
from moe_infinity.cache.touching import DECODE_LEAD_BYTES, LEAD_BYTES
from moe_infinity.cache.transfer import Transfer, TransferEngine, TransferState
from moe_infinity.checkpoint.base import ExpertStore
from moe_infinity.kernels.base import Views
from moe_infinity.kernels.formats import is_viewable
from moe_infinity.predictors.base import Embeddings, TokenIds
from moe_infinity.residency.directory import State
from moe_infinity.residency.meters import PaysMeter
from moe_infinity.residency.runner import EventRunner, Settled
from moe_infinity.residency.running import Load
from moe_infinity.types import ExpertKey, Phase, Priority, TierName


class RamHierarchy(DrivenHierarchy):
    """One tier of slots in RAM over an expert store.

    Kernel and reader threads only fill buffers. What has arrived is made resident by the computing
    thread, when it next looks.
    """

    tier_names = ("ram", "disk")

    def __init__(
        self,
        store: ExpertStore,
        runner: EventRunner,
        arena: SlotArena,
        engine: TransferEngine,
        pays: PaysMeter | None = None,
        num_early: int = 0,
    ) -> None:
        """arena: of one slot for each of the directory's, and before them num_early, NUM_EARLY or
        none, into which experts are read early."""
        super().__init__(store, runner, pays)
        self._arena = arena
        self._engine = engine
        # Of the arena, what is spare, and which place each slot of the directory's has.
        self._num_places = num_early + self.residency.directory.num_slots
        self._spare = list(range(num_early))
        self._places = list(range(num_early, self._num_places))
        self.early = engine.early if num_early else None
        self._in_flight: dict[ExpertKey, Transfer] = {}
        if all(map(is_viewable, store.specs.values())):
            shape = runner.residency.directory.shape
            self.known = np.zeros((shape.num_layers, shape.num_experts), dtype=np.uint8)
        self._views = SlotViews(store.specs)

    def begin_request(self) -> None:
        self._engine.skip_time()
        super().begin_request()

    def begin_pass(
        self, phase: Phase, embeddings: Embeddings = None, token_ids: TokenIds = None
    ) -> None:
        self._arena.keep_lead(DECODE_LEAD_BYTES if phase == "decode" else LEAD_BYTES)
        self._engine.expect_guesses(phase == "decode")
        if self.early is not None:
            self._get_ready_early(self.early)
        super().begin_pass(phase, embeddings, token_ids)

    def end_request(self) -> None:
        super().end_request()
        self._arena.keep_lead(LEAD_BYTES)

    def _get_ready_early(self, early: EarlyReads) -> None:
        """Spare memory is offered once all slots are in use: before that, memory is found for what
        is loaded, which a reader thread has to wait for."""
        if early.is_any_begun():  # by a pass that was thrown away
            self._abort()
        if not early.is_offered() and not self.residency.directory.num_free(0):
            for place in self._spare:
                self._arena.tensor(place).zero_()
            self._offer_spare(early)

    def _offer_spare(self, early: EarlyReads) -> None:
        for spare, place in enumerate(self._spare):
            early.offer(spare, self._arena.buffer(place))

    def get_ready(self) -> None:
        self._arena.touch_ahead()

    def untouched_bytes(self) -> int:
        return self._arena.untouched_bytes()

    def tier_of(self, key: ExpertKey) -> TierName:
        return "ram" if self.residency.directory.state(key) is State.RESIDENT else "disk"

    def check_integrity(self) -> None:
        self.residency.directory.check_integrity()
        in_flight = set(self.residency.directory.keys_in(State.IN_FLIGHT))
        assert in_flight == self._in_flight.keys(), (
            f"in flight without a transfer, or the reverse: {in_flight ^ self._in_flight.keys()}"
        )
        assert sorted(self._places + self._spare) == list(range(self._num_places)), (
            "memory of a slot is lost or used twice"
        )
        if self.early is not None and self.early.is_offered():
            spares = [(at, self._arena.buffer(place)) for at, place in enumerate(self._spare)]
            assert all(self.early.is_at(*spare) for spare in spares), "what is offered is in use"
        if self.known is not None:
            is_same = (self.known == NOWHERE).ravel() == self._are_absent()
            assert is_same.all(), f"said to be elsewhere: {np.flatnonzero(~is_same).tolist()}"

    def close(self) -> None:
        self._engine.close()
        self._abort()  # what was in flight holds on to its slot
        self._arena.close()

    def start(self, loads: list[Load], priority: Priority) -> None:
        for load in loads:
            if self.known is not None:
                if load.victim is not None:
                    self.known[load.victim] = NOWHERE
                self.known[load.key] = COMING
            if self.early is not None and load.victim is not None:
                self._engine.plan_early(load.victim)
            begun = self._engine.take_begun(load.key)
            if begun is None:
                buffer = self._arena.buffer(self._places[load.slot])
                self._in_flight[load.key] = self._engine.submit(load.key, buffer, priority)
            else:
                self._in_flight[load.key], spare = begun
                self._change_places(load.slot, spare)

    def _change_places(self, slot: int, spare: int) -> None:
        """What is read into spare memory belongs into the slot: whose own is spare now."""
        assert self.early is not None, "nothing is begun early"
        self._places[slot], self._spare[spare] = self._spare[spare], self._places[slot]
        self.early.offer(spare, self._arena.buffer(self._spare[spare]))

    def cancel(self, key: ExpertKey) -> None:
        self._engine.cancel(self._in_flight[key])

    def promote(self, key: ExpertKey) -> None:
        self._engine.promote(self._in_flight[key])

    def collect(self) -> list[Settled]:
        settled = []
        for transfer in self._engine.take_settled():
            del self._in_flight[transfer.key]
            arrived = transfer.state is TransferState.DONE
            if self.known is not None and not arrived:
                self.known[transfer.key] = NOWHERE
            error = transfer.error if transfer.priority is Priority.DEMAND else None
            settled.append(Settled(transfer.key, arrived, None if arrived else error))
        return settled

    def wait(self) -> None:
        self.count_wait(self._engine.wait_any())

    def views_of(self, key: ExpertKey) -> Views:
        place = self._places[self.residency.directory.slot(key)]
        return self._views.of(key, place, self._arena.tensor(place))

    def views_here(self, keys: list[ExpertKey]) -> tuple[list[ExpertKey], list[Views]]:
        with self._undone_if_interrupted():
            self.runner.take_in(self)  # what has arrived meanwhile
        state = self.residency.directory.state
        here = [key for key in keys if state(key) is State.RESIDENT]
        return here, [self.views_of(key) for key in here]

    def count_activity(self) -> None:
        self.count_reads(*self._engine.take_activity())

    def drain(self) -> None:
        self._engine.drain()

    def forget_transfers(self) -> None:
        self._in_flight.clear()
        if self.early is not None and self.early.is_offered():
            # An exception may have struck between two that were to change places.
            self._spare = sorted(set(range(self._num_places)).difference(self._places))
            self._offer_spare(self.early)
        if self.known is not None:
            self.known.ravel()[:] = np.where(self._are_absent(), NOWHERE, COMING)

    def _are_absent(self) -> NDArray[np.bool_]:
        """By flat key."""
        absent: NDArray[np.bool_] = self.residency.directory.states == State.ABSENT
        return absent
