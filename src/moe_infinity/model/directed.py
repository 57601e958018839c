"""Device-directed decode: routing, victims and copies of a pass decided on the device itself.

The host hands over directory and policy, the device serves whole passes of one token, and the host
reads afterwards what happened. For policies that have a kernel, while RAM holds every expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_infinity.cache.device_memory import DeviceMemory
from moe_infinity.cache.vram import VramHierarchy
from moe_infinity.kernels.base import ExpertMath
from moe_infinity.kernels.formats import part_views
from moe_infinity.residency.directory import State
from moe_infinity.tracing.recorder import Recorder
from moe_infinity.types import ExpertKey

_READ_EVERY = 32  # passes; the ring of events holds twice as many


class DirectedExperts:
    """The experts of every layer over a DeviceDirectory. is_on: the device directs now."""

    def __init__(
        self, hierarchy: VramHierarchy, kernel: Any, maths: Sequence[ExpertMath], recorder: Recorder
    ) -> None:
        """kernel: kernels/gpu/kernel.Kernel. Use ``can_direct`` first."""
        from moe_infinity.kernels.gpu.directed import DeviceDirectory, gather, kernel_form

        self.is_on = False
        self._hierarchy = hierarchy
        self._kernel, self._maths, self._recorder = kernel, maths, recorder
        residency = hierarchy.residency
        form = kernel_form(residency.policy)
        assert form is not None, "the policy has no kernel"
        device = hierarchy.device.torch_device
        self._directory = DeviceDirectory(
            residency.directory.shape, residency.directory.num_slots, form, device
        )
        self._gather = gather
        # By piece of an expert: where it comes from, where it goes to, and how long it is.
        self._pieces: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self._tables: dict[int, tuple[Any, torch.Tensor]] = {}  # by layer: layout, addresses
        self._passes = 0  # since the trace was read
        top_k = residency.directory.shape.top_k
        each = torch.arange(top_k + 1, dtype=torch.int32, device=device)
        self._starts, self._place_of = each, each[:top_k]
        self._token_of = torch.zeros(top_k, dtype=torch.int32, device=device)

    def begin(self) -> None:
        """Take over from the host, between two passes."""
        residency = self._hierarchy.residency
        if not self._tables:  # what RAM holds whole never moves, here or there
            self._addresses()
        passing = residency.room.passing(0)
        self._directory.load_from(residency.directory, residency.policy, passing)
        self._passes, self.is_on = 0, True

    def end(self) -> None:
        """Give back to the host: directory, policy, and the account of what happened. If that fails
        the device's slots hold nothing: RAM has it all."""
        if not self.is_on:
            return
        self.is_on = False
        residency = self._hierarchy.residency
        try:
            passing = self._directory.store_to(residency.directory, residency.policy)
            residency.room.take_passing(0, passing)
        except BaseException:
            self._hierarchy.forget_slots()
            raise
        self._hierarchy.taken_over()
        self._read()

    def end_pass(self) -> None:
        self._passes += 1
        if self._passes == _READ_EVERY:
            self._read()

    def run(
        self, layer: int, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """x [1, H], its experts and their weights [1, K] -> [1, H]. Never asks the host."""
        from moe_infinity.kernels.gpu.launches import Jobs

        decision = self._directory.decide(layer, top_k_index.reshape(-1).contiguous())
        for sources, targets, num_bytes in self._pieces:
            self._gather(decision, sources, targets, num_bytes)
        layout, table = self._tables[layer]
        out = x.new_zeros(len(self._place_of), x.shape[1])  # [K, H]
        jobs = Jobs(table, decision.slots, self._starts, self._token_of, self._place_of)
        way = self._kernel.tuned.way(1, layout.up.is_tall)
        self._kernel.compute(self._maths[layer], layout, way, jobs, x.contiguous(), out)
        return (out[None] * top_k_weights[..., None]).sum(dim=1).to(x.dtype)

    def _addresses(self) -> None:
        """Of every slot's memory and of every expert in RAM."""
        directory, host = self._hierarchy.residency.directory, self._hierarchy.host
        memory = self._hierarchy.memory
        assert isinstance(memory, DeviceMemory), "several devices cannot direct"
        layouts = memory.layouts
        slots = [memory.slots.memory(slot) for slot in range(directory.num_slots)]
        at = {key: host.source(key)[0].data_ptr() for key in layouts}
        for number, piece in enumerate(next(iter(layouts.values())).segments):
            sources = [0] * len(directory.states)
            for key, layout in layouts.items():
                sources[directory.flat(key)] = at[key] + layout.segments[number].start
            targets = [slot.data_ptr() + piece.target for slot in slots]
            self._pieces.append((self._tensor(sources), self._tensor(targets), piece.num_bytes))
        made: dict[Any, tuple[Any, torch.Tensor]] = {}
        for layer, math in enumerate(self._maths):
            spec = layouts[ExpertKey(layer, 0)].spec
            alike = (spec.parts, id(math.gate), math.is_interleaved)
            if alike not in made:
                found = [self._kernel.lay_out(math, part_views(spec, slot)) for slot in slots]
                made[alike] = (found[0][0], self._tensor([row for _, row in found]))
            self._tables[layer] = made[alike]

    def _tensor(self, numbers: list[Any]) -> torch.Tensor:
        device = self._hierarchy.device.torch_device
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    def _read(self) -> None:
        """Account for what the device did since the last time."""
        hierarchy, self._passes = self._hierarchy, 0
        counters = hierarchy.counters
        for traced in self._directory.read_trace():
            event, num_loads = traced.event, len(traced.loads)
            self._recorder.record(event)
            hierarchy.host.shelf.observe(event)
            counters.look_up(len(traced.hits), 0, num_loads)
            for load in traced.loads:
                counters.load(load.key.layer, proactive=False)
            counters.now.ram_hits += num_loads
            sizes = (hierarchy.store.specs[key].weight_bytes for key in event.keys)
            counters.now.computed_bytes += sum(sizes)


def can_direct(hierarchy: VramHierarchy, kernel: Any, maths: Sequence[ExpertMath]) -> bool:
    """Whether the device could ever serve this model's passes by itself: one that has no others
    beside it."""
    memory = hierarchy.memory
    if kernel.name != "triton" or not isinstance(memory, DeviceMemory):
        return False
    from moe_infinity.kernels.gpu.directed import kernel_form

    residency, layouts = hierarchy.residency, memory.layouts
    firsts = {key.layer: layout for key, layout in layouts.items() if key.expert == 0}
    pieces = {tuple(piece[1:] for piece in layout.segments) for layout in layouts.values()}
    return (
        kernel_form(residency.policy) is not None
        and len(residency.directory.slots_per_class) == 1
        and hierarchy.host.shelf.directory.num_slots >= len(layouts)
        and len(pieces) == 1
        and all(each.spec.parts == firsts[key.layer].spec.parts for key, each in layouts.items())
        and all(math.post is None for math in maths)
        and all(
            kernel.lay_out(math, part_views(firsts[layer].spec, memory.slots.memory(0)))
            for layer, math in enumerate(maths)
        )
    )


def is_ready(hierarchy: VramHierarchy) -> bool:
    """Whether it can now: every expert is in RAM that the device reads, and nothing is moving."""
    shelf, arena = hierarchy.host.shelf, hierarchy.host.arena
    num_here = int((shelf.directory.states == State.RESIDENT).sum())
    reads_all = hierarchy.device.reads_host and arena.fault is None
    return reads_all and hierarchy.is_idle() and num_here == len(hierarchy.store.specs)
