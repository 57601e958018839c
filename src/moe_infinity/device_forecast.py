"""How fast decode will be with experts on a device, one that need not be there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe_infinity.config import parse_size
from moe_infinity.device_plan import DeviceFacts
from moe_infinity.devices.cuda import HOST_BYTES, RUNTIME_BYTES
from moe_infinity.errors import ConfigError
from moe_infinity.forecast import expected_hit_rate
from moe_infinity.plan import Plan

# What is left of the links' own rates in copies of megabytes.
_LINKS_GBPS = {"pcie3": 12.0, "pcie4": 24.0, "pcie5": 48.0}
_MEMORY_GBPS = 450.0  # of its own memory, where nothing is said: a card of the middle class
# A layer beside its bytes. Directed by the device in one graph: assumed, on no GPU measured. By
# the host: half of what benchmarks/gpu_host.py shows, which has the library's products in it.
_LAYER_S, _TOKEN_S = {True: 60e-6, False: 500e-6}, 1e-3
_OVERLAP = 0.5  # as in forecast.py: a layer's residents are multiplied while its misses come


@dataclass(frozen=True)
class Gpu:
    """A device as it is described: its memory, and bytes a second over the link and in memory."""

    memory_bytes: int
    link_gbps: float
    memory_gbps: float

    def facts(self) -> DeviceFacts:
        """Of a card on which nothing else runs."""
        size, name = self.memory_bytes, f"a GPU with a link of {self.link_gbps:g} GB/s"
        return DeviceFacts(name, size, size, RUNTIME_BYTES, HOST_BYTES)


@dataclass(frozen=True)
class DeviceForecast:
    """Decode speed in tokens/s, and where experts are found: shares of a token's."""

    tokens_per_s: float
    tokens_per_s_low: float  # routing is random
    tokens_per_s_high: float  # everything is on the device
    in_vram: float
    in_ram: float
    on_disk: float


def parse_gpu(text: str) -> Gpu:
    """``24GiB,pcie4`` or ``16GiB,12,288``: memory, link (a name or GB/s), GB/s of its memory.

    Raises ConfigError.
    """
    size, *speeds = (part.strip() for part in text.split(","))
    expected = (
        f"expected SIZE,LINK or SIZE,LINK,MEMORY: 24GiB,pcie4,1008; LINK is one of "
        f"{', '.join(_LINKS_GBPS)} or a number of GB/s"
    )
    if not 1 <= len(speeds) <= 2:
        raise ConfigError(f"gpu: got {text!r}, {expected}")
    found = [_LINKS_GBPS.get(speeds[0].lower(), 0.0), _MEMORY_GBPS]
    for place, each in enumerate(speeds):
        number = re.fullmatch(r"(\d{1,6}(\.\d{1,3})?)\s*(GB/s)?", each)
        if number is not None:
            found[place] = float(number[1])
        elif place or not found[0]:
            raise ConfigError(f"gpu: got {each!r} in {text!r}, {expected}")
    if min(found) <= 0:
        raise ConfigError(f"gpu: got {text!r}, expected speeds above 0")
    return Gpu(parse_size(size, "gpu"), *found)


def device_forecast(
    plan: Plan, num_layers: int, link_gbps: float, memory_gbps: float, disk_gbps: float
) -> DeviceForecast:
    """Bytes over bandwidths at typical hit rates, and at those of random routing. plan: with a
    device. Where RAM does not hold every expert, both tiers' slots add up."""
    assert plan.device is not None, "the plan has no device"
    num_slots = sum(plan.top_slots)
    low_vram = num_slots / plan.experts_total
    held = plan.num_slots + (0 if plan.num_slots >= plan.experts_total else num_slots)
    low_both = min(1.0, held / plan.experts_total)
    # A lone device directs if RAM has it all.
    layer_s = _LAYER_S[plan.num_slots >= plan.experts_total and not plan.others]
    computed_s = (plan.bytes_per_token + plan.dense_read_bytes) / (memory_gbps * 1e9)

    def rate(in_vram: float, in_both: float) -> float:
        copied_s = (1 - in_vram) * plan.bytes_per_token / (link_gbps * 1e9)
        read_s = (1 - in_both) * plan.read_bytes_per_token / (disk_gbps * 1e9)
        moved_s = copied_s + read_s
        hidden_s = _OVERLAP * min(moved_s, computed_s)
        return 1 / (moved_s + computed_s - hidden_s + num_layers * layer_s + _TOKEN_S)

    in_vram = max(low_vram, expected_hit_rate(low_vram))
    in_both = max(in_vram, expected_hit_rate(low_both))
    return DeviceForecast(
        tokens_per_s=rate(in_vram, in_both),
        tokens_per_s_low=rate(low_vram, low_both),
        tokens_per_s_high=rate(1.0, 1.0),
        in_vram=in_vram,
        in_ram=in_both - in_vram,
        on_disk=1 - in_both,
    )
