"""What benchmarks/gpu.py does, in order of importance. It knows nothing of how it is done."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from gpu_checkpoints import Wanted
from gpu_peers import Peer
from gpu_points import Point, Setting

DEEPSEEK, QWEN, WIDENED = "deepseek-v2-lite", "qwen3-30b-a3b-int4", "widened16"
_GIB = 1024**3
_CONTEXTS = (100, 8192)
_TINY = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "vocab_size": 1024,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_TINY_DEEPSEEK = {
    **{name: _TINY[name] for name in ("hidden_size", "vocab_size", "num_attention_heads")},
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Side by side at one budget: the policies, what is loaded ahead, the ways out of a miss.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {"policy": "lru"},
    {"policy": "lfru"},
    {"prefetch": "gate_lookahead"},
    {"miss": "cpu"},
    {"miss": "auto"},
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """items: names of checkpoints to make, points to measure and peers, in this order. Seconds:
    what a step is taken to need before one like it was done."""

    wanted: dict[str, Wanted]
    items: tuple[str | Point | Peer, ...]
    device: str
    kernel: str
    compared: tuple[str, ...]
    prompt_tokens: int
    answer_tokens: int
    has_kernel_tests: bool
    making_s: float
    point_s: float
    peer_s: float
    most_new_tokens: int | None = None

    def setting(self, args: argparse.Namespace) -> Setting:
        most = self.most_new_tokens or args.new_tokens
        return Setting(
            device=self.device,
            kernel=self.kernel,
            ram=args.ram,
            new_tokens=min(args.new_tokens, most),
            trials=args.trials,
        )


def full_plan() -> Plan:
    """On a CUDA device."""
    wanted = [
        Wanted(name="tiny", shape="qwen3-30b-a3b", changes=_TINY),
        Wanted(name=DEEPSEEK, shape="deepseek-v2-lite"),
        Wanted(name=QWEN, shape="qwen3-30b-a3b", form="int4"),
        Wanted(name=WIDENED, widen=16),
    ]
    return Plan(
        wanted={each.name: each for each in wanted},
        items=_full_items(),
        device="cuda",
        kernel="triton",
        compared=("tiny", "bundled"),
        prompt_tokens=24,
        answer_tokens=12,
        has_kernel_tests=True,
        making_s=30.0,
        point_s=60.0,
        peer_s=60.0,
    )


def _full_items() -> tuple[str | Point | Peer, ...]:
    """Points of a model stand together: another one pins its memory anew."""
    slots = {"vram_slots": 64}  # of the widened model's 256: a quarter
    return (
        DEEPSEEK,
        _point(DEEPSEEK, "24GiB", is_main=True),
        QWEN,
        _point(QWEN, "12GiB", is_main=True),
        WIDENED,
        Point(model=WIDENED, options=slots, may_choose=True),
        Peer(system="accelerate", model=DEEPSEEK, vram_bytes=24 * _GIB),
        *(_variant(WIDENED, slots, change) for change in _VARIANTS),
        _point(DEEPSEEK, "12GiB"),
        _point(DEEPSEEK, "auto"),
        *(_variant(DEEPSEEK, {"vram": "24GiB"}, change) for change in _VARIANTS[3:]),
        Peer(system="accelerate", model=DEEPSEEK, vram_bytes=None),
        *(_point(QWEN, vram) for vram in ("8GiB", "auto", "16GiB", "24GiB")),
        *(_point(DEEPSEEK, vram) for vram in ("16GiB", "8GiB")),
        *(_variant(DEEPSEEK, {"vram": "24GiB"}, change) for change in _VARIANTS[:3]),
        *(_variant(QWEN, {"vram": "12GiB"}, change) for change in _VARIANTS),
        Peer(system="accelerate", model=WIDENED, vram_bytes=4 * _GIB),
        Peer(system="llama.cpp", model=DEEPSEEK, vram_bytes=24 * _GIB),
    )


def dry_plan() -> Plan:
    """The same steps on a simulated device, with tiny models."""
    wanted = [
        Wanted(name="tiny", shape="qwen3-30b-a3b", changes=_TINY),
        Wanted(name=DEEPSEEK, shape="deepseek-v2-lite", changes=_TINY_DEEPSEEK),
        Wanted(name=QWEN, shape="qwen3-30b-a3b", form="int4", changes=_TINY),
        Wanted(name=WIDENED, widen=2),
    ]
    return Plan(
        wanted={each.name: each for each in wanted},
        items=_dry_items(),
        device="simulated",
        kernel="torch",
        compared=("tiny",),
        prompt_tokens=4,
        answer_tokens=3,
        has_kernel_tests=False,
        making_s=1.0,
        point_s=1.0,
        peer_s=1.0,
        most_new_tokens=8,
    )


def _dry_items() -> tuple[str | Point | Peer, ...]:
    slots = {"vram_slots": 9}
    short = (20, 40)
    return (
        DEEPSEEK,
        Point(model=DEEPSEEK, options=slots, contexts=short, has_profile=True, may_choose=True),
        QWEN,
        Point(model=QWEN, options=slots, contexts=short, has_profile=True),
        WIDENED,
        Point(model=WIDENED, options={"vram_slots": 64}, contexts=short[:1]),
        Peer(system="accelerate", model=DEEPSEEK, vram_bytes=24 * _GIB),
        *(_variant(QWEN, slots, change, short[:1]) for change in _VARIANTS),
        Point(model=DEEPSEEK, options={"vram": "auto"}, contexts=short[:1]),
        Peer(system="accelerate", model=DEEPSEEK, vram_bytes=None),
        Peer(system="llama.cpp", model=DEEPSEEK, vram_bytes=24 * _GIB),
    )


def _point(model: str, vram: str, is_main: bool = False) -> Point:
    return Point(
        model=model,
        options={"vram": vram},
        contexts=_CONTEXTS,
        has_profile=is_main,
        may_choose=is_main,
    )


def _variant(
    model: str, budget: dict[str, Any], change: dict[str, Any], contexts: tuple[int, ...] = (100,)
) -> Point:
    """To look ahead and to compute beside the device is the host's work."""
    ways = ("device", "host") if "policy" in change else ("host",)
    return Point(model=model, options={**budget, **change}, contexts=contexts, ways=ways)
