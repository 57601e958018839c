"""Wall clock from the real disk: LRU, the default policy, and loading ahead, at several budgets.

Every system runs the same prompts and, being exact, the same tokens; A B A B, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import provenance, save
from prefetch_live import PROMPTS

SYSTEMS = (("lru", "none"), ("next_use", "none"), ("next_use", "auto"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--shares", default="0.3,0.5,0.75", help="budgets over checkpoint size")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    lines = PROMPTS.read_text().splitlines()[-args.prompts :]
    prompts = [json.loads(line)["prompt"] for line in lines]
    if args.worker:
        ram, policy, prefetch = args.worker
        print(json.dumps(measure(args, int(ram), policy, prefetch, prompts)))
        return
    size = sum(file.stat().st_size for file in args.checkpoint.glob("*.safetensors"))
    points = []
    for share in map(float, args.shares.split(",")):
        trials: dict[str, list[dict]] = {}
        for _ in range(args.trials):
            for policy, prefetch in SYSTEMS:
                row = measure_apart(int(share * size), policy, prefetch)
                trials.setdefault(f"{policy}+{prefetch}", []).append(row)
                print(share, policy, prefetch, row, flush=True)
        points.append({"share": share, "summary": summarise(trials), "trials": trials})
    save("prefetch_disk", {**provenance(), "checkpoint": args.checkpoint.name, "points": points})


def measure_apart(ram: int, policy: str, prefetch: str) -> dict:
    """In a process of its own: what an earlier run left in memory is not in the budget."""
    worker = ["--worker", str(ram), policy, prefetch]
    command = [sys.executable, __file__, *sys.argv[1:], *worker]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    args: argparse.Namespace, ram: int, policy: str, prefetch: str, prompts: list[str]
) -> dict:
    from moe_infinity import MoE

    total: dict[str, float] = {}
    options = {"ram": ram, "policy": policy, "prefetch": prefetch, "max_context": 256}
    with MoE(args.checkpoint, **options) as moe:
        for prompt in prompts:
            ids = moe.tokenizer(prompt)["input_ids"]
            moe.generate([ids], max_new_tokens=args.new_tokens, eos_token_id=None)
            c = moe._wiring.request.counters.decode
            row = {"wall_s": c.wall_s, "stall_s": c.stall_s, "passes": c.num_passes}
            row |= {"hits": c.hits, "late": c.late, "misses": c.misses}
            row |= {"demand_bytes": c.demand_bytes, "prefetch_bytes": c.prefetch_bytes}
            row |= {"wasted_bytes": c.wasted_prefetch_bytes, "read_bytes": c.read_bytes}
            row |= {"read_busy_s": c.read_busy_s, "compute_s": c.compute_s}
            for name, value in row.items():
                total[name] = total.get(name, 0) + value
        total["slots"] = moe.plan.num_slots
    total["tokens_per_s"] = total["passes"] / total["wall_s"]
    total["read_gbps"] = total["read_bytes"] / max(total["read_busy_s"], 1e-9) / 1e9
    return total


def summarise(trials: dict[str, list[dict]]) -> dict:
    medians = {
        system: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for system, rows in trials.items()
    }
    for row in medians.values():
        row["speed_vs_lru"] = row["tokens_per_s"] / medians["lru+none"]["tokens_per_s"]
    return medians


if __name__ == "__main__":
    main()
