"""What Prometheus is told: requests and tokens, and the cache's own counters when it asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_infinity.server.jobs import Job
from moe_infinity.stats import PhaseCounters

if TYPE_CHECKING:
    from moe_infinity.server.worker import Worker

_TTFT_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_PREFIX = "moe_infinity_"


class Metrics:
    """Counts requests as they end, and reads the rest off the worker when it is asked."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.num_requests = self.num_prompt = self.num_new = 0
        reg = self.registry
        self._requests = Counter(
            _PREFIX + "requests", "That ended, by how.", ("endpoint", "outcome"), registry=reg
        )
        self._answers = Counter(
            _PREFIX + "http_answers", "Of any path, by status.", ("status",), registry=reg
        )
        self._tokens = Counter(
            _PREFIX + "tokens", "Of prompts and answers.", ("kind",), registry=reg
        )
        self._ttft = Histogram(
            _PREFIX + "ttft_seconds",
            "From a request's turn to its first token.",
            buckets=_TTFT_S,
            registry=reg,
        )
        self._tpot = Histogram(
            _PREFIX + "tpot_seconds",
            "Per token after the first, of a request.",
            buckets=_TPOT_S,
            registry=reg,
        )
        self._waited = Histogram(
            _PREFIX + "queue_seconds",
            "From a request's arrival to its turn.",
            buckets=_TTFT_S,
            registry=reg,
        )

    def watch(self, worker: Worker) -> None:
        """Report this worker's cache too."""
        self.registry.register(_CacheCollector(worker))

    def finished(self, endpoint: str, outcome: str, job: Job) -> None:
        """A request is over, however it ended."""
        self.num_requests += 1
        self.num_prompt += job.num_prompt if job.times.started_s else 0
        self.num_new += job.num_new
        self._requests.labels(endpoint, outcome).inc()
        times = job.times
        if times.started_s is None:
            return
        self._tokens.labels("prompt").inc(job.num_prompt)
        self._tokens.labels("prompt_kept").inc(job.num_reused)
        self._tokens.labels("new").inc(job.num_new)
        self._waited.observe(times.started_s - times.asked_s)
        if times.ttft_s is not None:
            self._ttft.observe(times.ttft_s)
        if job.tokens_per_s:
            self._tpot.observe(1 / job.tokens_per_s)

    def answered(self, status: int) -> None:
        """Something was answered to somebody, even if it was only that it is not let in."""
        self._answers.labels(str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus' text form."""
        return generate_latest(self.registry)


class Counted:
    """An ASGI layer around everything: counts answers by their status, refusals too."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counting)
        except Exception:
            self._metrics.answered(500)  # further out, by who runs the application
            raise


class _CacheCollector(Collector):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        worker = self._worker
        plan, live = worker.moe.plan, worker.moe.live
        phases = dict(zip(("prefill", "decode"), live.totals(), strict=True))
        yield from _lookups(phases, "vram" if plan.device else "ram")
        yield from _bytes(phases, plan.device is not None)
        yield from _seconds(phases)
        heights = live.tier_map()
        names = ("disk", "ram", "vram") if plan.device else ("disk", "ram")
        resident = GaugeMetricFamily(_PREFIX + "experts", "Experts by tier.", labels=["tier"])
        for height, name in enumerate(names):
            resident.add_metric([name], float((heights == height).sum()))
        yield resident
        yield _gauge("expert_slots", "Capacity of the uppermost tier.", live.num_slots)
        yield _gauge("memory_budget_bytes", "Planned for the process.", plan.budget_bytes)
        yield _gauge("memory_resident_bytes", "In use.", psutil.Process().memory_info().rss)
        yield _gauge("requests_waiting", "In the queue.", worker.num_waiting)
        yield _gauge("requests_running", "With the model.", int(worker.running is not None))
        yield _gauge("kv_tokens_kept", "Of conversations that may go on.", worker.caches.num_tokens)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, text, value=float(value))


def _lookups(phases: dict[str, PhaseCounters], top: str) -> Iterator[Metric]:
    found = CounterMetricFamily(
        _PREFIX + "expert_lookups",
        "Experts asked for; late: in flight when they were.",
        labels=["tier", "phase", "result"],
    )
    for phase, counters in phases.items():
        for result, value in (
            ("hit", counters.hits), ("late", counters.late), ("miss", counters.misses)
        ):  # fmt: skip
            found.add_metric([top, phase, result], value)
        if top == "vram":
            found.add_metric(["ram", phase, "hit"], counters.ram_hits)
            found.add_metric(["ram", phase, "miss"], counters.disk_loads)
    yield found


def _bytes(phases: dict[str, PhaseCounters], has_device: bool) -> Iterator[Metric]:
    link = "ram_to_vram" if has_device else "disk_to_ram"
    moved = CounterMetricFamily(
        _PREFIX + "link_bytes",
        "Moved; wasted: part of prefetch that nobody used.",
        labels=["link", "phase", "kind"],
    )
    for phase, counters in phases.items():
        moved.add_metric([link, phase, "demand"], counters.demand_bytes)
        moved.add_metric([link, phase, "prefetch"], counters.prefetch_bytes)
        moved.add_metric([link, phase, "wasted"], counters.wasted_prefetch_bytes)
        if has_device:
            moved.add_metric(["disk_to_ram", phase, "demand"], counters.disk_bytes)
            moved.add_metric(["vram_to_ram", phase, "demoted"], counters.demoted_bytes)
    yield moved


def _seconds(phases: dict[str, PhaseCounters]) -> Iterator[Metric]:
    spent = CounterMetricFamily(
        _PREFIX + "seconds",
        "Spent; stall: the computation waited for loads.",
        labels=["phase", "kind"],
    )
    for phase, counters in phases.items():
        spent.add_metric([phase, "wall"], counters.wall_s)
        spent.add_metric([phase, "stall"], counters.stall_s)
        spent.add_metric([phase, "experts"], counters.compute_s)
    yield spent
