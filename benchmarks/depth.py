"""Time per token at depth: the bundled model with 100 and with 16,000 tokens of context."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import provenance, save

DEPTHS = (100, 1_000, 4_000, 16_000)
CONTEXT = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=24)
    args = parser.parse_args()
    from moe_infinity import MoE, bundled_model_path
    from moe_infinity.machine import resident_bytes

    with MoE(bundled_model_path(), ram="4GiB", max_context=CONTEXT) as moe:
        before = resident_bytes()
        points = []
        for depth in DEPTHS:
            times = [time_per_token(moe, depth, args.new_tokens) for _ in range(args.trials)]
            points.append(
                {
                    "depth": depth,
                    "ms_per_token": 1e3 * statistics.median(times),
                    "spread_ms": 1e3 * (max(times) - min(times)),
                }
            )
            print(points[-1], flush=True)
        cache = moe.new_cache()
        kv_before = resident_bytes()
        moe.generate([token_ids(CONTEXT - 2)], max_new_tokens=2, past_key_values=cache)
        kv_grown = resident_bytes() - kv_before
        save(
            "depth",
            {
                **provenance(),
                "max_context": CONTEXT,
                "points": points,
                "planned_kv_bytes": moe.plan.kv_bytes,
                "planned_bytes": moe.plan.used_bytes,
                "kv_tensor_bytes": kv_bytes(cache),
                "resident_growth_bytes": kv_grown,
                "resident_before_bytes": before,
                "peak_rss_bytes": moe.stats().peak_rss_bytes,
            },
        )


def token_ids(count: int) -> list[int]:
    return [1 + (7 * i) % 4000 for i in range(count)]


def time_per_token(moe: object, depth: int, new_tokens: int) -> float:
    """Seconds per decoded token behind a prompt of ``depth`` tokens."""
    stamps: list[float] = []

    class Clock:
        def put(self, value: object) -> None:
            stamps.append(time.perf_counter())

        def end(self) -> None:
            pass

    moe.generate(
        [token_ids(depth)],
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=Clock(),
    )
    return statistics.median(b - a for a, b in itertools.pairwise(stamps[2:]))


def kv_bytes(cache: object) -> int:
    return sum(layer._room[0].nbytes + layer._room[1].nbytes for layer in cache.layers)


if __name__ == "__main__":
    main()
