"""Connects an opened model to its cache: experts, steps, and those who watch the routing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from moe_infinity.cache.driven import DrivenHierarchy
from moe_infinity.cache.vram import VramHierarchy
from moe_infinity.config import EngineConfig
from moe_infinity.device_wiring import DeviceWiring
from moe_infinity.devices.base import Device
from moe_infinity.errors import ConfigError
from moe_infinity.heap import Heap, collect_if_due
from moe_infinity.kernels.base import ExpertMath
from moe_infinity.kernels.choice import choose
from moe_infinity.mapped_code import let_go
from moe_infinity.model.blocks import speed_up_blocks
from moe_infinity.model.elsewhere import Elsewhere, Other, maths_on
from moe_infinity.model.experts import ExpertsLayer, Runtime
from moe_infinity.model.latent_attention import speed_up_latents
from moe_infinity.model.linears import FewThreads, speed_up
from moe_infinity.model.loading import Anatomy, are_coded
from moe_infinity.model.observer import Observer
from moe_infinity.model.packed_linears import run_packed
from moe_infinity.model.routers import Wishes
from moe_infinity.model.rules import KeepRouting, RoutingRule, lossy_rules
from moe_infinity.model.spinning import IdleTeams
from moe_infinity.model.taps import Step, StepTap
from moe_infinity.model.whole_pass import WholePass, speed_up_passes
from moe_infinity.plan import Plan
from moe_infinity.policies.base import CachePolicy
from moe_infinity.predictors.base import ExpertPredictor
from moe_infinity.reporting import Routing
from moe_infinity.request import Request
from moe_infinity.stats import Counters
from moe_infinity.tracing.recorder import Recorder
from moe_infinity.tracing.trace_recorder import TraceRecorder


def wishes_of(policy: CachePolicy, predictor: ExpertPredictor) -> Wishes:
    """What these two declare to need beside the routing."""
    return Wishes(
        policy.needs_router_logits or predictor.needs_router_logits,
        predictor.needs_router_input,
        predictor.needs_embeddings,
        (predictor.foresight,) if predictor.foresight else (),
    )


class Wiring:
    """The taps of one opened model. ``request`` is the one that runs, or the last one."""

    def __init__(
        self,
        model: Any,
        modules: list[Any],
        anatomy: Anatomy,
        hierarchy: DrivenHierarchy,
        routing: RoutingRule,
        config: EngineConfig,
        plan: Plan,
    ) -> None:
        self.request = Request(time.perf_counter())
        self.recorder = Recorder()
        self.recorded_before_step = 0  # events, when the pass that runs began
        self._anatomy = anatomy
        self._model = model
        self._hierarchy = hierarchy
        step = Step(0, "decode", 1, 1)
        self.kernel = choose(config.kernel, next(model.parameters()).device)
        maths = [anatomy.adapter.math(module) for module in modules]
        compiled = are_coded(anatomy) or not any(math.is_transposed for math in maths)
        has_packed, is_fast = run_packed(model, self.kernel), speed_up(model, self.kernel)
        speed_up_latents(model, self.kernel)
        self._threads = FewThreads((has_packed or is_fast) and compiled)
        beside = choose("auto") if config.miss != "copy" else None
        heap = Heap(plan.budget_bytes, plan.passing_bytes, hierarchy.untouched_bytes)
        self._runtime = Runtime(hierarchy, self.kernel, routing, self.recorder, step, heap, beside)
        if isinstance(hierarchy, VramHierarchy) and len(hierarchy.memory.devices) > 1:
            self._runtime.elsewhere = self._elsewhere(hierarchy.memory.devices, maths, config)
        layers = self._attach(modules, maths)
        self._whole: WholePass | None = None
        if type(routing) is KeepRouting:
            blocks = speed_up_blocks(model, self.kernel, layers, modules)
            self._whole = speed_up_passes(model, self.kernel, blocks, hierarchy)
        residency, predictor = hierarchy.residency, hierarchy.runner.planner.predictor
        self._wishes = wishes_of(residency.policy, predictor)
        self._wish = predictor.foresight
        if self._wishes != Wishes():
            self._runtime.observer = self._observer()
        self._device: DeviceWiring | None = None
        if isinstance(hierarchy, VramHierarchy):
            self._device = DeviceWiring(model, hierarchy, self._runtime, maths, plan.max_context)
        self._tap = StepTap(model, self._begin_step, self._end_step)
        let_go()  # of what only opening ran
        collect_if_due()  # opening makes many objects
        self._idle = IdleTeams()

    def begin_request(self, request: Request) -> None:
        self.request = request
        self.recorder.clear()
        observer = self._runtime.observer
        if observer is not None and observer.trace is not None:
            observer.trace.begin_request()

    @contextmanager
    def recording(self, wishes: Wishes, meta: dict[str, Any]) -> Iterator[TraceRecorder]:
        """Record every request until the end of the block; meta goes into the trace."""
        observer = self._runtime.observer or self._observer()
        if observer.trace is not None:
            raise ConfigError("a trace is being recorded already; end that recording first")
        observer.ask(wishes)
        observer.trace = TraceRecorder(self._anatomy.shape, meta)
        observer.traced = wishes.foresight
        self._runtime.observer = observer
        try:
            yield observer.trace
        finally:
            observer.trace, observer.traced = None, ()
            observer.drop(self._wishes)
            if self._wishes == Wishes():
                self._runtime.observer = None

    def routing(self) -> Routing | None:
        """Of the request, as it was recorded; None if not all of it was."""
        if not self.recorder.is_complete:
            return None
        return Routing(list(self.recorder.accesses), self.request.initial)

    @property
    def step(self) -> Step:
        """The forward pass that runs, or the last one."""
        return self._runtime.step

    @property
    def lossy(self) -> tuple[str, ...]:
        """What of the routing's rules may change logits."""
        return lossy_rules((self._runtime.routing,))

    @property
    def faults(self) -> tuple[str, ...]:
        observer, device = self._runtime.observer, self._device
        own = (observer.fault,) if observer is not None and observer.fault else ()
        return own + (device.faults if device is not None else ())

    def finish(self, counters: Counters) -> None:
        """The request is over, well or not."""
        if self._device is not None:
            self._device.finish()
        self._threads.end()
        self.request.finish(counters, time.perf_counter())
        self._runtime.heap.make_room(at_rest=True)

    def close(self) -> None:
        self._threads.end()
        self._idle.close()
        others = self._runtime.elsewhere.others if self._runtime.elsewhere else ()
        kernels = (other.kernel for other in others)
        for kernel in (self.kernel, self._runtime.host_kernel, *kernels):
            if kernel is not None:
                kernel.close()
        self._tap.close()
        if self._device is not None:
            self._device.close()
        if self._runtime.observer is not None:
            self._runtime.observer.close()

    def _elsewhere(
        self, devices: Sequence[Device], maths: list[ExpertMath], config: EngineConfig
    ) -> Elsewhere:
        """A kernel for each device beside the model's own, which comes first. Simulated ones are
        computed on by the same processor."""
        others = []
        for device in devices[1:]:
            where = device.torch_device
            if where == devices[0].torch_device:
                others.append(Other(device, self.kernel, maths))
            else:
                others.append(Other(device, choose(config.kernel, where), maths_on(where, maths)))
        return Elsewhere(devices[0], others)

    def _attach(self, modules: list[Any], maths: list[ExpertMath]) -> list[ExpertsLayer]:
        adapter = self._anatomy.adapter
        counts = self._anatomy.shape.experts_per_layer
        layers = [
            ExpertsLayer(layer, counts[layer], math, self._runtime, adapter.routes_padding)
            for layer, math in enumerate(maths)
        ]
        for module, experts in zip(modules, layers, strict=True):
            adapter.attach(module, experts.forward)
        return layers

    def _observer(self) -> Observer:
        return Observer(
            self._model,
            [module.name for module in self._anatomy.experts],
            list(self._anatomy.shape.experts_per_layer),
            self._hierarchy,
            self.kernel,
            self._wishes,
            self._wish,
        )

    def _begin_step(self, step: Step) -> None:
        phase = self.request.phase_of(step)
        self._runtime.step = step = step if phase == step.phase else replace(step, phase=phase)
        self.recorded_before_step = self.recorder.num_recorded
        self._threads.begin(step)
        is_directed = self._device is not None and self._device.begin_step(step)
        observer = self._runtime.observer
        embeddings = observer.begin_step(step) if observer and not is_directed else None
        if not is_directed:
            self._hierarchy.begin_pass(step.phase, embeddings, step.real_ids())
        now = self._hierarchy.counters.now
        now.directed_passes += is_directed
        now.num_passes += 1
        now.num_tokens += step.num_rows * step.length

    def _end_step(self) -> None:
        if self._device is not None:
            self._device.end_step()
        if self._runtime.observer is not None:
            self._runtime.observer.end_step()
        self.request.end_step(self._runtime.step, time.perf_counter())
