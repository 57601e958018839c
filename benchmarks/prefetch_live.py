"""Stalls of live runs over a throttled link: LRU, the default policy, and loading ahead.

The bundled model's experts are tiny, so its link is slowed down until one load takes a given
multiple of the time in which one layer is computed. Every system runs the same prompts and, being
exact, the same tokens; A B A B. The simulator replays the recorded routing at the same ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import provenance, save

PROMPTS = Path(__file__).parent / "prompts" / "domains.jsonl"
SYSTEMS = (("lru", "none"), ("next_use", "none"), ("next_use", "gate_lookahead"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capacity", type=float, default=0.25)
    parser.add_argument("--ratios", default="1,0.25,4", help="load time over layer time")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--trials", type=int, default=3)
    args = parser.parse_args()
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    prompts = prompts[-args.prompts :]
    layer_s = resident_layer_s(prompts, args.new_tokens)
    print(f"one layer takes {1e3 * layer_s:.2f} ms", flush=True)
    points = [measure(float(ratio), layer_s, prompts, args) for ratio in args.ratios.split(",")]
    save("prefetch_live", {**provenance(), "layer_s": layer_s, "points": points})


def resident_layer_s(prompts: list[str], new_tokens: int) -> float:
    """Time of one layer in decode with every expert in memory."""
    with opened("next_use", "none", slots=None) as moe:
        run(moe, prompts[:2], new_tokens)
        stats = run(moe, prompts, new_tokens)
    return stats["wall_s"] / stats["passes"] / moe._shape.num_layers


def measure(ratio: float, layer_s: float, prompts: list[str], args: argparse.Namespace) -> dict:
    trials: dict[str, list[dict]] = {}
    for _ in range(args.trials):
        for policy, prefetch in SYSTEMS:
            slots = int(args.capacity * 256)
            with opened(policy, prefetch, slots) as moe:
                throttle(moe, ratio * layer_s)
                row = run(moe, prompts, args.new_tokens)
            trials.setdefault(f"{policy}+{prefetch}", []).append(row)
            print(ratio, policy, prefetch, row, flush=True)
    summary = {
        system: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for system, rows in trials.items()
    }
    baseline = summary["lru+none"]["stall_s"]
    for row in summary.values():
        row["stall_vs_lru"] = row["stall_s"] / baseline
    return {"ratio": ratio, "load_s": ratio * layer_s, "summary": summary, "trials": trials}


def opened(policy: str, prefetch: str, slots: int | None) -> Any:
    from moe_infinity import MoE, bundled_model_path

    options = {"policy": policy, "prefetch": prefetch, "ram_slots": slots}
    return MoE(bundled_model_path(), ram="4GiB", max_context=512, **options)


def throttle(moe: Any, load_s: float) -> None:
    """Make every load of an expert take ``load_s`` on one link, whatever thread carries it."""
    engine = moe._hierarchy._engine
    store, lock = engine._store, threading.Lock()
    read, free_at = store.read_into, [0.0]

    def slow(key: Any, buffer: memoryview, chunk: Any) -> None:
        share = chunk.num_bytes / store.specs[key].read_bytes
        with lock:
            start = max(time.perf_counter(), free_at[0])
            free_at[0] = end = start + load_s * share
        read(key, buffer, chunk)
        time.sleep(max(0.0, end - time.perf_counter()))

    store.read_into = slow
    engine._chunk_bytes = max(4096, store.slot_bytes // 4 // 4096 * 4096)  # as large ones have


def run(moe: Any, prompts: list[str], new_tokens: int) -> dict:
    """Decode totals over all prompts."""
    total: dict[str, float] = {}
    for prompt in prompts:
        ids = moe.tokenizer(prompt)["input_ids"]
        moe.generate([ids], max_new_tokens=new_tokens, eos_token_id=None)
        c = moe._wiring.request.counters.decode
        row = {"stall_s": c.stall_s, "wall_s": c.wall_s, "passes": c.num_passes, "hits": c.hits}
        row |= {"late": c.late, "misses": c.misses, "demand_loads": c.demand_loads}
        row |= {"proactive_loads": c.proactive_loads, "wasted_loads": c.wasted_loads}
        for name, value in row.items():
            total[name] = total.get(name, 0) + value
    return total


if __name__ == "__main__":
    main()
