"""How long a prompt takes under a memory limit, against the larger of what it cannot do without.

That is one read of the model, and the same prompt with everything resident. Both are measured here,
A B A B; the limit is a share of the checkpoint, kept by the kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import MemoryLimit, long_prompt_ids, provenance, save

PLENTY = 1 << 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(prompt(args)))
        return
    size = sum(file.stat().st_size for file in args.checkpoint.iterdir())
    limit = int(size * args.share)
    trials: dict[str, list[dict]] = {"resident": [], "limited": []}
    for _ in range(args.trials):
        for name, ram in (("resident", 0), ("limited", limit)):
            trials[name].append(run(args, ram))
            print(name, json.dumps(trials[name][-1]), flush=True)
    found = {name: medians(rows) for name, rows in trials.items()}
    pairs = [over_what_is_needed(*pair, size) for pair in zip(*trials.values(), strict=True)]
    result = {
        "checkpoint": args.checkpoint.name,
        "checkpoint_bytes": size,
        "limit_bytes": limit,
        "prompt_tokens": args.prompt_tokens,
        "summary": found,
        "times_the_model_was_read": found["limited"]["read_bytes"] / size,
        "over_what_is_needed": statistics.median(pairs),
        "over_what_is_needed_by_pair": pairs,
        "trials": trials,
    }
    save(f"prefill_{args.checkpoint.name}", {**provenance(), **result})


def over_what_is_needed(resident: dict, limited: dict, size: int) -> float:
    """Both ran one behind the other: the machine's own speed changes from minute to minute."""
    read_s = size / 1e9 / limited["disk_gbps"]
    return limited["ttft_s"] / max(resident["ttft_s"], read_s)


def medians(rows: list[dict]) -> dict:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def run(args: argparse.Namespace, ram: int) -> dict:
    limit = MemoryLimit("moe-infinity-prefill", ram or PLENTY)
    command = [sys.executable, __file__, str(args.checkpoint), "--worker", str(ram)]
    with tempfile.TemporaryDirectory() as state:
        env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "MOE_INFINITY_STATE_DIR": state}
        tokens = ["--prompt-tokens", str(args.prompt_tokens)]
        code, out, usage = limit.run([*command, *tokens], env)
    limit.close()
    if code:
        sys.exit(f"exit code {code}")
    used = {"group_peak_bytes": usage.peak_bytes, "page_cache_bytes": usage.page_cache_bytes}
    return json.loads(out.strip().splitlines()[-1]) | used


def prompt(args: argparse.Namespace) -> dict:
    """The second prompt of an opened model, the first one's text backwards."""
    from moe_infinity import MoE

    ids = long_prompt_ids(args.checkpoint, args.prompt_tokens)
    context = args.prompt_tokens + 32
    with MoE(args.checkpoint, ram=args.worker or "auto", max_context=context) as moe:
        for turn in (-1, 1):
            moe.generate([ids[::turn]], max_new_tokens=2, min_new_tokens=2)
        stats = moe.stats()
        prefill, speeds = stats.prefill, moe.bandwidths()
        assert speeds is not None, "a request runs: speeds cannot be measured"
        return {
            "ttft_s": stats.ttft_s,
            "read_bytes": prefill.demand_bytes + prefill.prefetch_bytes,
            "disk_gbps": speeds.disk_gbps,
            "stall_s": prefill.stall_s,
            "compute_s": prefill.compute_s,
            "slots": stats.slots,
            "experts_total": stats.experts_total,
            "peak_rss_bytes": stats.peak_rss_bytes,
        }


if __name__ == "__main__":
    main()
