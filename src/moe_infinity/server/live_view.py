"""The numbers behind /v1/stats: who runs, what is cached where, how often it was used lately."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from moe_infinity.machine import peak_resident_bytes
from moe_infinity.server.jobs import Job
from moe_infinity.server.metrics import Metrics
from moe_infinity.server.worker import Worker
from moe_infinity.stats import PhaseCounters, hit_rate

VERSION = 1
_HALF_LIFE_S = 4.0  # of a use in the heat map, while something runs
_LEVELS = 9
_COUNTERS = (
    "hits", "misses", "late", "demand_bytes", "prefetch_bytes", "wasted_prefetch_bytes",
    "disk_bytes", "stall_s", "compute_s", "wall_s", "num_tokens",
)  # fmt: skip


class LiveView:
    """Made anew at each look; what it costs is paid by those who look."""

    def __init__(self, name: str, worker: Worker, metrics: Metrics) -> None:
        self._name = name
        self._worker = worker
        self._metrics = metrics
        self._started_s = time.monotonic()
        self._uses: NDArray[np.float64] = np.zeros(worker.moe.live.tier_map().shape)
        self._num_seen = 0
        self._looked_s = self._started_s

    def stats(self, with_map: bool = True) -> dict[str, Any]:
        """See docs/server.md for what each number means."""
        worker, moe = self._worker, self._worker.moe
        job, last = worker.running, worker.last
        prefill, decode = moe.live.totals()
        metrics = self._metrics
        return {
            "version": VERSION,
            "model": self._name,
            "uptime_s": time.monotonic() - self._started_s,
            "state": "idle" if job is None else "prompt" if job.is_reading else "answer",
            "running": None if job is None else self._running(job),
            "queue": {"waiting": worker.num_waiting, "limit": worker.max_waiting},
            "last": None if last is None else _last(last),
            "totals": {
                "requests": metrics.num_requests,
                "prompt_tokens": metrics.num_prompt,
                "new_tokens": metrics.num_new,
                "prefill": _phase(prefill),
                "decode": _phase(decode),
            },
            "memory": self._memory(),
            "device": self._device(),
            "experts": self._experts(with_map),
            "lossy": list(moe.live.lossy),
            "faults": list(moe.live.faults),
        }

    def _running(self, job: Job) -> dict[str, Any]:
        return {
            "id": job.id,
            "prompt_tokens": job.num_prompt,
            "prompt_done": self._worker.prompt_done(job),
            "reused_tokens": job.num_reused,
            "new_tokens": job.num_new,
            "seconds": time.monotonic() - (job.times.started_s or job.times.asked_s),
            "ttft_s": job.times.ttft_s,
            "tokens_per_s": job.tokens_per_s,
        }

    def _memory(self) -> dict[str, Any]:
        plan, info = self._worker.moe.plan, psutil.Process().memory_info()
        planned = {
            "dense weights": plan.dense_bytes,
            "KV cache": plan.kv_bytes,
            "activations": plan.workspace_bytes + plan.kept_bytes,
        }
        if plan.device is not None:
            planned = dict.fromkeys(planned, 0)
        planned |= {
            "staging": plan.staging_bytes,
            "runtime": plan.runtime_bytes,
            "expert slots": plan.cache_bytes,
        }
        return {
            "budget_bytes": plan.budget_bytes,
            "rss_bytes": info.rss,
            "peak_rss_bytes": peak_resident_bytes(),
            "planned": planned,
            "context_tokens": plan.max_context,
            "kept_tokens": self._worker.caches.num_tokens,
        }

    def _device(self) -> dict[str, Any] | None:
        devices = self._worker.moe.plan.devices
        if not devices:
            return None
        return {
            "name": " + ".join(device.name for device in devices),
            "budget_bytes": sum(device.budget_bytes for device in devices),
            "used_bytes": sum(device.used_bytes for device in devices),
            "slots": self._worker.moe.live.num_slots,
        }

    def _experts(self, with_map: bool) -> dict[str, Any]:
        moe = self._worker.moe
        heights = moe.live.tier_map()
        counts = moe.live.experts_per_layer
        top = 2 if moe.plan.device else 1
        found = {
            "per_layer": list(counts),
            "slots": moe.live.num_slots,
            "resident": int((heights == top).sum()),
            "policy": moe.config.policy,
            "prefetch": moe.prefetch,
        }
        if with_map:
            found["tiers"] = _as_digits(heights, counts)
            found["uses"] = _as_digits(self._levels(), counts)
        return found

    def _levels(self) -> NDArray[np.uint8]:
        """0 to 9 for each expert; time fades it, but only while there are new uses."""
        now_s = time.monotonic()
        accesses, self._num_seen = self._worker.moe.live.routed_since(self._num_seen)
        if accesses:
            self._uses *= 0.5 ** ((now_s - self._looked_s) / _HALF_LIFE_S)
        self._looked_s = now_s
        for access in accesses:
            self._uses[access.layer, access.experts] += 1
        most = max(1.0, float(self._uses.max()))
        levels: NDArray[np.uint8] = np.ceil(np.sqrt(self._uses / most) * _LEVELS - 0.5)
        return levels.astype(np.uint8)


def _as_digits(levels: NDArray[np.uint8], counts: tuple[int, ...]) -> list[str]:
    rows = (levels + ord("0")).astype(np.uint8)
    return [row[:count].tobytes().decode() for row, count in zip(rows, counts, strict=True)]


def _phase(counters: PhaseCounters) -> dict[str, Any]:
    found = {name: getattr(counters, name) for name in _COUNTERS}
    return found | {"hit_rate": hit_rate(counters)}


def _last(job: Job) -> dict[str, Any]:
    return {
        "prompt_tokens": job.num_prompt,
        "new_tokens": job.num_new,
        "ttft_s": job.times.ttft_s,
        "tokens_per_s": job.tokens_per_s,
        "finish": job.finish,
    }
