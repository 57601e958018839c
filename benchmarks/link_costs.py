"""Times of decode on a GPU in front of RAM, worked out from shapes, formats and datasheets.

Nothing here is measured: docs/gpu.md says what is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Machine:
    """link: PCIe 4 x16, of its 32 GB/s what large copies from pinned memory reach. memory: the
    datasheet's 192 bits of 21 Gbit/s. launch_s: what one layer's kernels cost a host that starts
    them one by one. latency_s: from asking for a copy to its first byte.
    """

    gpu: str = "RTX 4070 12 GB"
    link_gbps: float = 24.0
    memory_gbps: float = 504.0
    cpu_gbps: float = 40.0  # a product on the processor reads experts from RAM this fast
    launch_s: float = 60e-6
    latency_s: float = 10e-6


@dataclass(frozen=True)
class Model:
    """What decode reads: experts, the rest of a layer, and the head once per token. Weights
    counted, sizes in bits per weight with scales. Biases, norms and the KV cache are left out.
    """

    name: str
    num_layers: int
    expert_weights: int
    expert_bits: float
    dense_weights: int  # of one layer: attention and router
    head_weights: int
    dense_bits: float

    @property
    def expert_bytes(self) -> int:
        return math.ceil(self.expert_weights * self.expert_bits / 8)

    @property
    def dense_bytes(self) -> float:
        """Of one layer, with its share of the head."""
        weights = self.dense_weights + self.head_weights / self.num_layers
        return weights * self.dense_bits / 8


def attention_weights(hidden: int, heads: int, kv_heads: int, head_size: int) -> int:
    return hidden * head_size * (2 * heads + 2 * kv_heads)


FIXED_S = (100e-6, 30e-6)  # of a step on the processor: as MissSplit begins; a fast one


def gpt_oss(name: str, num_layers: int, num_experts: int) -> Model:
    """MXFP4 experts, the rest in bf16, as published."""
    return Model(
        name,
        num_layers,
        expert_weights=3 * 2880 * 2880,
        expert_bits=4.25,
        dense_weights=attention_weights(2880, 64, 8, 64) + 2880 * num_experts,
        head_weights=201088 * 2880,
        dense_bits=16,
    )


QWEN3_30B = Model(
    "Qwen3-30B-A3B int4",
    48,
    expert_weights=3 * 2048 * 768,
    expert_bits=4.5,
    dense_weights=attention_weights(2048, 32, 4, 128) + 2048 * 128,
    head_weights=151936 * 2048,
    dense_bits=4.5,
)
GPT_OSS_120B = gpt_oss("gpt-oss-120b MXFP4", 36, 128)
GPT_OSS_20B = gpt_oss("gpt-oss-20b MXFP4", 24, 32)


@dataclass(frozen=True)
class Setting:
    """A routing of ``num_layers`` layers and ``top_k`` experts each, as if it were ``model``'s."""

    model: Model
    machine: Machine
    num_layers: int
    top_k: int

    @property
    def load_s(self) -> float:
        """One expert over the link."""
        return self.model.expert_bytes / (self.machine.link_gbps * 1e9)

    @property
    def cpu_s(self) -> float:
        """One expert computed from RAM, what a step costs at all aside."""
        return self.model.expert_bytes / (self.machine.cpu_gbps * 1e9)

    @property
    def dense_s(self) -> float:
        return self.machine.launch_s + self.model.dense_bytes / (self.machine.memory_gbps * 1e9)

    @property
    def layer_s(self) -> float:
        """One layer of one token with everything in the GPU's memory."""
        expert_s = self.model.expert_bytes / (self.machine.memory_gbps * 1e9)
        return self.dense_s + self.top_k * expert_s

    def cost(self) -> Any:
        """The same for the simulator, a prefetch cut into chunks as uploads are."""
        from moe_infinity.cache.uploads import CHUNK_BYTES
        from moe_infinity.simulator.cost_model import Cost

        return Cost(
            load_s=self.load_s,
            layer_s=self.layer_s,
            dense_share=self.dense_s / self.layer_s,
            latency_s=self.machine.latency_s,
            num_chunks=math.ceil(self.model.expert_bytes / CHUNK_BYTES),
        )

    def split(self, mode: str) -> Any:
        from moe_infinity.residency.miss_split import MissSplit

        speeds = self.machine.link_gbps, self.machine.cpu_gbps
        return MissSplit(mode, *speeds, self.num_layers)


def limits(optimal_misses: int, load_s: float, compute_s: float) -> dict[str, float]:
    """Seconds nobody can do without: the link runs all the time and still is not done; and the
    same misses with nothing beside them."""
    link_s = optimal_misses * load_s
    return {"limit_s": max(0.0, link_s - compute_s), "no_overlap_s": link_s}


def gap_closed(baseline: float, found: float, limit: float) -> float | None:
    """Share of the way from baseline to limit; None where there is no way to go."""
    gap = baseline - limit
    return (baseline - found) / gap if gap > 1e-9 else None


def split_s(setting: Setting, num_misses: int, num_cpu: int, fixed_s: float) -> float:
    """An event's misses, some copied while the processor computes the others: the slower side."""
    computed_s = fixed_s + num_cpu * setting.cpu_s if num_cpu else 0.0
    return max((num_misses - num_cpu) * setting.load_s, computed_s)


def way_out_s(setting: Setting, misses: Sequence[int], mode: str, fixed_s: float) -> float:
    """Seconds spent on misses. misses: of every event, from one replay, whichever way they go.
    fixed_s: of a step on the processor."""
    split, expert_bytes = setting.split(mode), setting.model.expert_bytes
    spent_s = 0.0
    for missing in misses:
        count = split.choose(missing, expert_bytes)
        event_s = split_s(setting, missing, count, fixed_s)
        if count:
            split.learn(count, expert_bytes, fixed_s + count * setting.cpu_s)
        split.pays.spend(setting.layer_s + event_s)
        spent_s += event_s
    return spent_s


def assumptions(machine: Machine, models: Sequence[Model]) -> dict[str, Any]:
    sizes = {
        model.name: asdict(model)
        | {"expert_bytes": model.expert_bytes, "dense_bytes": round(model.dense_bytes)}
        for model in models
    }
    return {"machine": asdict(machine), "models": sizes, "cpu_fixed_s": list(FIXED_S)}
