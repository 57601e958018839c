"""What the host does for a layer of a token while it directs a device.

A simulated device with a link of no cost, and experts that compute nothing: what is left is what a
GPU would wait for between its kernels, were it infinitely quick. The bundled model; its own small
products are in the rest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import provenance, save

LINK = "simulated:9999"  # GB/s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--trials", type=int, default=5)
    args = parser.parse_args()
    rows = [point(slots, args.new_tokens, args.trials) for slots in (256, 64)]
    for row in rows:
        print(row)
    save("gpu_host", {**provenance(), "trials": args.trials, "points": rows})


def point(slots: int, new_tokens: int, trials: int) -> dict[str, Any]:
    """Microseconds per layer of a token, medians over trials."""
    import torch

    from moe_infinity import MoE, bundled_model_path
    from moe_infinity.model.experts import ExpertsLayer

    torch.set_num_threads(1)  # others would spin beside a host that waits for nothing
    options = {"device": LINK, "vram_slots": slots, "kernel": "torch", "prefetch": "none"}
    spent = {"forward": 0.0, "cache": 0.0}
    with MoE(bundled_model_path(), ram="8GiB", **options) as moe:
        moe.kernel.run_placed = compute_nothing
        moe._hierarchy.run_event = timed(moe._hierarchy.run_event, spent, "cache")
        real = ExpertsLayer.forward
        for module in moe.model.modules():
            if type(module).__name__.endswith("Experts"):
                module.forward = timed(module.forward, spent, "forward")
        assert ExpertsLayer.forward is real
        ids = torch.randint(1, 4000, (1, 32), generator=torch.Generator().manual_seed(0))
        moe.generate(ids, max_new_tokens=8, eos_token_id=None)
        found = []
        for _ in range(trials):
            moe.generate(ids, max_new_tokens=2, eos_token_id=None)
            before = dict(spent)
            start = time.perf_counter()
            moe.generate(ids[:, :1], max_new_tokens=new_tokens, eos_token_id=None)
            wall_s = time.perf_counter() - start
            parts = {name: spent[name] - before[name] for name in spent}
            found.append((wall_s, parts["forward"], parts["cache"]))
        num_passes = moe.stats().prefill.num_tokens + moe.stats().decode.num_tokens
        layers = len(moe.residency()) * num_passes
        hit_rate = moe.stats().decode.hit_rate
    medians = (statistics.median(each) for each in zip(*found, strict=True))
    wall, forward, cache = (seconds / layers * 1e6 for seconds in medians)
    return {
        "slots": slots,
        "hit_rate": hit_rate,
        "layer_us": wall,
        "decisions_us": cache,
        "routing_us": forward - cache,
        "library_us": wall - forward,
    }


def compute_nothing(math: Any, experts: Any, x: Any, out: Any, *places: Any) -> None:
    out.zero_()


def timed(function: Any, spent: dict[str, float], name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - start

    return call


if __name__ == "__main__":
    main()
