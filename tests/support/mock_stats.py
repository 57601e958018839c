"""A made-up engine for what watches a server: plausible, moving statistics without a model."""

from __future__ import annotations

import random
from typing import Any

GIB = 1024**3
EXPERT_BYTES = 12 * 1024**2
TOP_K = 4
_COUNTED = ("hits", "misses", "late", "demand_bytes", "prefetch_bytes", "wasted_prefetch_bytes")


class FakeEngine:
    """Moves with every ``step`` alone; no clock and no chance beyond the seed."""

    def __init__(
        self, num_layers: int = 8, num_experts: int = 32, *, device: bool = False, seed: int = 0
    ) -> None:
        self._random = random.Random(seed)
        self._shape = (num_layers, num_experts)
        self._has_device = device
        self._ids = range(num_experts)
        # Some experts are wanted far more often than others, others in each layer.
        self._weights = [
            [self._random.paretovariate(0.9) for _ in self._ids] for _ in range(num_layers)
        ]
        self._uses = [[0.0] * num_experts for _ in range(num_layers)]
        self.num_slots = num_layers * num_experts * 2 // 5
        self._resident: dict[tuple[int, int], None] = {}  # the longest unused first
        self.uptime_s = 0.0
        self.state = "idle"
        self.running: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self.num_requests = 0
        self.faults: list[str] = []
        self.lossy: list[str] = []
        self._phases = {name: self._zeros() for name in ("prefill", "decode")}
        for layer in range(num_layers):
            for expert in self._ids[: self.num_slots // num_layers]:
                self._resident[layer, expert] = None

    @staticmethod
    def _zeros() -> dict[str, float]:
        counts: dict[str, float] = dict.fromkeys(_COUNTED, 0)
        return counts | {"stall_s": 0.0, "compute_s": 0.0, "wall_s": 0.0, "num_tokens": 0}

    def begin(self, prompt_tokens: int, reused_tokens: int = 0) -> None:
        self.state = "prompt"
        self.num_requests += 1
        self.running = {
            "id": f"chatcmpl-{self.num_requests}",
            "prompt_tokens": prompt_tokens,
            "prompt_done": reused_tokens,
            "reused_tokens": reused_tokens,
            "new_tokens": 0,
            "seconds": 0.0,
            "ttft_s": None,
            "tokens_per_s": None,
        }

    def read_prompt(self, num_tokens: int, seconds: float) -> None:
        assert self.running is not None
        self.running["prompt_done"] += num_tokens
        self._pass("prefill", num_tokens, min(num_tokens, 4), seconds)

    def step(self, seconds: float = 0.03) -> None:
        """One token of the answer."""
        assert self.running is not None
        self.state = "answer"
        self._pass("decode", 1, 1, seconds)
        run = self.running
        run["new_tokens"] += 1
        run["ttft_s"] = run["ttft_s"] or round(run["seconds"], 3)
        run["tokens_per_s"] = run["new_tokens"] / max(
            1e-9, run["seconds"] - run["ttft_s"] + seconds
        )

    def end(self, finish: str = "stop") -> None:
        assert self.running is not None
        keys = ("prompt_tokens", "new_tokens", "ttft_s", "tokens_per_s")
        self.last = {key: self.running[key] for key in keys} | {"finish": finish}
        self.running, self.state = None, "idle"

    def _pass(self, name: str, num_tokens: int, num_lookups: int, seconds: float) -> None:
        phase = self._phases[name]
        num_layers, _ = self._shape
        missed = 0
        for layer in range(num_layers):
            self._uses[layer] = [use * 0.93 for use in self._uses[layer]]
            chosen = self._random.choices(self._ids, self._weights[layer], k=TOP_K * num_lookups)
            missed += sum(not self._touch(layer, expert) for expert in set(chosen))
            phase["hits"] += len(set(chosen))
        phase["hits"] -= missed
        phase["misses"] += missed
        phase["demand_bytes"] += missed * EXPERT_BYTES
        phase["num_tokens"] += num_tokens
        phase["stall_s"] += seconds * min(0.8, missed / (2 * num_layers))
        phase["compute_s"] += seconds * 0.2
        phase["wall_s"] += seconds
        self.uptime_s += seconds
        assert self.running is not None
        self.running["seconds"] += seconds

    def _touch(self, layer: int, expert: int) -> bool:
        """Whether it was resident; it is so afterwards."""
        self._uses[layer][expert] += 1
        was_resident = (layer, expert) in self._resident
        self._resident.pop((layer, expert), None)
        self._resident[layer, expert] = None
        if len(self._resident) > self.num_slots:
            del self._resident[next(iter(self._resident))]
        return was_resident

    def stats(self, with_map: bool = True) -> dict[str, Any]:
        """What ``GET /v1/stats`` answers."""
        num_layers, num_experts = self._shape
        experts: dict[str, Any] = {
            "per_layer": [num_experts] * num_layers,
            "slots": self.num_slots,
            "resident": len(self._resident),
            "policy": "next_use",
            "prefetch": "none",
        }
        if with_map:
            experts |= {"tiers": self._tiers(), "uses": self._digits()}
        on_device = round(6.1 * GIB)
        device = {"name": "Simulated GPU", "budget_bytes": 8 * GIB, "used_bytes": on_device}
        return {
            "version": 1,
            "model": f"mock-{num_layers}x{num_experts}",
            "uptime_s": round(self.uptime_s, 3),
            "state": self.state,
            "running": self.running,
            "queue": {"waiting": 0, "limit": 64},
            "last": self.last,
            "totals": self._totals(),
            "memory": self._memory(),
            "device": device | {"slots": self.num_slots // 3} if self._has_device else None,
            "experts": experts,
            "lossy": self.lossy,
            "faults": self.faults,
        }

    def _totals(self) -> dict[str, Any]:
        totals: dict[str, Any] = {"requests": self.num_requests}
        for name, phase in self._phases.items():
            looked_up = phase["hits"] + phase["misses"] + phase["late"]
            rate = phase["hits"] / looked_up if looked_up else None
            disk_bytes = phase["demand_bytes"] // 2 if self._has_device else phase["demand_bytes"]
            totals[name] = phase | {"hit_rate": rate, "disk_bytes": disk_bytes}
        totals["prompt_tokens"] = totals["prefill"]["num_tokens"]
        totals["new_tokens"] = totals["decode"]["num_tokens"]
        return totals

    def _memory(self) -> dict[str, Any]:
        planned = {
            "dense weights": round(1.31 * GIB),
            "KV cache": round(0.62 * GIB),
            "activations": round(0.21 * GIB),
            "staging": round(0.12 * GIB),
            "runtime": round(0.35 * GIB),
            "expert slots": round(4.9 * GIB),
        }
        return {
            "budget_bytes": 8 * GIB,
            "rss_bytes": round(6.74 * GIB),
            "peak_rss_bytes": round(7.02 * GIB),
            "planned": planned,
            "context_tokens": 32768,
            "kept_tokens": int(self._phases["decode"]["num_tokens"]),
        }

    def _tiers(self) -> list[str]:
        num_layers, _ = self._shape
        newest = set(list(self._resident)[-self.num_slots // 3 :]) if self._has_device else set()
        return [
            "".join(
                "2" if (layer, expert) in newest else str(int((layer, expert) in self._resident))
                for expert in self._ids
            )
            for layer in range(num_layers)
        ]

    def _digits(self) -> list[str]:
        return ["".join(str(min(9, round(use * 2.5))) for use in row) for row in self._uses]
