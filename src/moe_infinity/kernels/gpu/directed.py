"""The expert directory of a GPU tier, kept and changed on the device: decode without a host in it.

Owns the device arrays and launches their kernels. The Python Directory and policy are the
reference, and take turns with it. One size class, one token at a time; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moe_infinity.errors import ConfigError, TraceError
from moe_infinity.kernels.gpu.directory import decide_kernel, gather_kernel
from moe_infinity.policies import find_policy
from moe_infinity.policies._guarded import GuardedPolicy
from moe_infinity.policies.base import CachePolicy
from moe_infinity.policies.next_use import base_floor
from moe_infinity.residency.directory import NO_SLOT, Directory, State
from moe_infinity.residency.running import Load
from moe_infinity.tracing.event import Event
from moe_infinity.types import ExpertKey, ExpertShape

FORMS = ("lru", "lfru", "next_use")  # policies that have a kernel
WORD_BYTES, ALIGNMENT_BYTES = 8, 16
_CHUNK_SLOTS = 2048  # ranked at a time: with 16 warps, four by each thread
_SLOTS_PER_WARP = 128
_TRACE_STEPS = 64  # passes between two calls of read_trace, unless asked for more
_GATHER_PROGRAMS = 32  # per expert; one has 16 KiB in flight, enough for any link together
_GATHER_WORDS = 2048


class Decision(NamedTuple):
    """What one layer's event came to, int32 on the device; overwritten by the layer's next one."""

    slots: torch.Tensor  # [K] of each routed id, in the router's order; -1: no expert
    load_keys: torch.Tensor  # [K] flat keys to load, ascending, then -1
    load_slots: torch.Tensor  # [K] where to


class TracedEvent(NamedTuple):
    """What the device did with one event. The event's weights are not traced: they are zero."""

    event: Event
    hits: list[ExpertKey]  # ascending, as in residency.running.Lookup
    loads: list[Load]  # in the order of admission


def kernel_form(policy: CachePolicy) -> str | None:
    """The name of the kernel that decides as this policy does; None: there is none."""
    policy = _inner(policy)
    return next((name for name in FORMS if type(policy) is find_policy(name)), None)


class DeviceDirectory:
    """Slots of one tier and one policy's state, on the device; `decide` runs without the host.

    The first launches compile: make them before ``load_from``, which sets everything anew.
    """

    def __init__(
        self,
        shape: ExpertShape,
        num_slots: int,
        form: str,
        device: torch.device | str = "cuda",
        trace_events: int = 0,
    ) -> None:
        """form: one of FORMS. trace_events: how many the ring holds. Raises ConfigError."""
        if form not in FORMS:
            raise ConfigError(f"policy {form} has no kernel; those that have: {', '.join(FORMS)}")
        if num_slots < shape.top_k:
            raise ConfigError(f"got {num_slots} slots, expected at least top-k, {shape.top_k}")
        self.shape, self.num_slots, self.form = shape, num_slots, form
        num_layers, top_k = shape.num_layers, shape.top_k
        num_keys = num_layers * shape.num_experts
        self._trace_events = trace_events or _TRACE_STEPS * num_layers
        self._num_read = 0
        initial = find_policy(form)(shape, num_slots).state_arrays()
        self._sizes = {name: array.shape for name, array in initial.items()}

        def new(dims: tuple[int, ...], dtype: torch.dtype, fill: int = 0) -> torch.Tensor:
            return torch.full(dims, fill, dtype=dtype, device=device)

        self.slot_of = new((num_keys,), torch.int32, NO_SLOT)
        self.key_of = new((num_slots,), torch.int32, -1)
        self._passing = new((num_slots,), torch.int32, -1)
        self.state = new((len(_flat(initial)),), torch.float64)
        self._scratch = new((2, num_slots), torch.int64)
        self._counters = new((3,), torch.int64)
        self._decisions = new((num_layers, 3, top_k), torch.int32, -1)
        self._trace = new((self._trace_events, 2 + 4 * top_k), torch.int32)
        self._reset(initial, step=0)

    def decide(self, layer: int, top_k_ids: torch.Tensor) -> Decision:
        """Serve one event: learn it, make room for what misses, move it in. Launches one kernel.

        top_k_ids: [K] or [1, K] on the device, contiguous. The bytes of ``load_keys`` have yet to
        be brought (``gather``) before anything reads their slots.
        """
        shape, top_k = self.shape, self.shape.top_k
        assert top_k_ids.numel() == top_k, f"{top_k_ids.shape} ids, expected {top_k}"
        assert top_k_ids.is_contiguous(), "ids with gaps between them"
        chunk = min(_CHUNK_SLOTS, _power_of_two(self.num_slots))
        decide_kernel[(1,)](
            top_k_ids,
            layer,
            self.slot_of,
            self.key_of,
            self._passing,
            self.state,
            self._scratch,
            self._counters,
            self._decisions,
            self._trace,
            POLICY=self.form,
            L=shape.num_layers,
            E=shape.num_experts,
            S=self.num_slots,
            K=top_k,
            K2=_power_of_two(top_k),
            E2=_power_of_two(shape.num_experts),
            CHUNK=chunk,
            RING=self._trace_events,
            FLOOR=base_floor(shape),
            num_warps=max(4, chunk // _SLOTS_PER_WARP),
            enable_fp_fusion=False,
        )
        return Decision(*self._decisions[layer])

    def load_from(
        self,
        directory: Directory,
        policy: CachePolicy,
        passing: Sequence[ExpertKey] = (),
        step: int = 0,
    ) -> None:
        """Go on where the host stands; what was traced and not read is dropped.

        passing: residents that go first, in this order (``RoomFinder.passing``); nothing else that
        the host remembers beside its directory and policy, such as loads ahead, is known here.
        step: of the pass that comes next. Raises ConfigError for another policy or other slots.
        """
        if kernel_form(policy) != self.form:
            name = type(_inner(policy)).__module__
            raise ConfigError(f"got the state of {name}, expected that of {self.form}")
        self._check(directory)
        self._reset(policy.state_arrays(), step)
        held = np.flatnonzero(directory.states == State.RESIDENT)
        key_of = np.full(self.num_slots, -1, dtype=np.int32)
        key_of[directory.slots[held]] = held
        self.slot_of.copy_(torch.from_numpy(directory.slots))
        self.key_of.copy_(torch.from_numpy(key_of))
        places = np.full(self.num_slots, -1, dtype=np.int32)
        places[[directory.slot(key) for key in passing]] = np.arange(len(passing))
        self._passing.copy_(torch.from_numpy(places))

    def store_to(self, directory: Directory, policy: CachePolicy) -> list[ExpertKey]:
        """Let the host go on where the device stands. Waits for the device.

        Returns what still goes first, for ``RoomFinder.take_passing``.
        """
        assert kernel_form(policy) == self.form, f"{type(policy)} is not {self.form}"
        self._check(directory)
        directory.take_slots(self.slot_of.cpu().numpy())
        state, arrays, start = self.state.cpu().numpy(), {}, 0
        for name, dims in self._sizes.items():
            end = start + int(np.prod(dims))
            arrays[name] = state[start:end].reshape(dims)
            start = end
        policy.take_state(arrays)
        places, key_of = self._passing.cpu().numpy(), self.key_of.cpu().numpy()
        slots = sorted(np.flatnonzero(places >= 0).tolist(), key=lambda slot: int(places[slot]))
        return [directory.key(key_of[slot]) for slot in slots]

    def read_trace(self) -> list[TracedEvent]:
        """What was decided since the last call, in order. Waits for the device.

        Raises TraceError if more events came than the ring holds: those are lost, later ones not.
        """
        num_events = int(self._counters[0])
        first, self._num_read = self._num_read, num_events
        if num_events - first > self._trace_events:
            raise TraceError(
                f"{num_events - first} events since the last reading, the ring holds "
                f"{self._trace_events}: read more often, or ask for more trace_events"
            )
        start = first % self._trace_events
        end = start + num_events - first
        rows = self._trace[start:end]
        if end > self._trace_events:
            rows = torch.cat([rows, self._trace[: end - self._trace_events]])
        return [self._traced(row) for row in rows.cpu().numpy()]

    def check_integrity(self) -> None:
        """Prove that slot_of and key_of are inverse to one another; raises AssertionError."""
        slot_of, key_of = self.slot_of.cpu().numpy(), self.key_of.cpu().numpy()
        keys, slots = np.flatnonzero(slot_of != NO_SLOT), np.flatnonzero(key_of != -1)
        assert len(keys) == len(slots), f"{len(keys)} experts in {len(slots)} slots"
        assert (key_of[slot_of[keys]] == keys).all(), "a slot does not know its expert"
        assert (slot_of[key_of[slots]] == slots).all(), "an expert does not know its slot"

    def _traced(self, row: NDArray[np.int32]) -> TracedEvent:
        step, layer = int(row[0]), int(row[1])
        ids, hit, slots, victims = row[2:].reshape(4, self.shape.top_k)
        index = ids[None].astype(np.int64)
        rows, weights = np.zeros(1, dtype=np.int64), np.zeros(index.shape, dtype=np.float32)
        event = Event(step, "decode", layer, rows, index, weights, self.shape.num_experts)
        found = set(ids[hit != 0].tolist())
        hits = [key for key in event.keys if key.expert in found]
        misses = [key for key in event.keys if key.expert not in found]
        loads = [
            Load(key, int(slot), self._key(int(victim)))
            for key, slot, victim in zip(misses, slots, victims, strict=False)
        ]
        return TracedEvent(event, hits, loads)

    def _key(self, flat: int) -> ExpertKey | None:
        return ExpertKey(*divmod(flat, self.shape.num_experts)) if flat >= 0 else None

    def _check(self, directory: Directory) -> None:
        slots = directory.slots_per_class
        if directory.shape != self.shape or slots != (self.num_slots,):
            raise ConfigError(
                f"got slots {slots} of {directory.shape}, expected {self.num_slots} in one size "
                f"class, of {self.shape}"
            )
        assert not (directory.states == State.IN_FLIGHT).any(), "a load is in flight"
        assert not directory.pins.any(), "an expert is pinned"

    def _reset(self, arrays: dict[str, NDArray[np.float64]], step: int) -> None:
        self._num_read = 0
        self.state.copy_(torch.from_numpy(_flat(arrays)))
        # Whichever layer comes first begins a pass: none is above the number of layers.
        self._counters.copy_(torch.tensor([0, step - 1, self.shape.num_layers]))


def gather(
    decision: Decision, sources: torch.Tensor, targets: torch.Tensor, num_bytes: int
) -> None:
    """Bring the bytes of a decision's loads into their slots. Launches one kernel.

    sources: int64 addresses by flat key, of pinned memory as the device sees it; targets: int64
    addresses by slot. All of them and num_bytes, an expert's, are multiples of 16; raises
    ConfigError if num_bytes is not.
    """
    if num_bytes % ALIGNMENT_BYTES:
        raise ConfigError(f"an expert has {num_bytes} bytes, expected a multiple of 16")
    gather_kernel[(len(decision.load_keys), _GATHER_PROGRAMS)](
        decision.load_keys,
        decision.load_slots,
        sources,
        targets,
        NUM_WORDS=num_bytes // WORD_BYTES,
        PROGRAMS=_GATHER_PROGRAMS,
        BLOCK=_GATHER_WORDS,
        num_warps=4,
    )


def _inner(policy: CachePolicy) -> CachePolicy:
    return policy.inner if isinstance(policy, GuardedPolicy) else policy


def _flat(arrays: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate([array.ravel() for array in arrays.values()])


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
