"""Is ``plan`` right? Planned before, measured after, on models and budgets it was not tuned on."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import prompt_ids, provenance, save

CONTEXT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("points", nargs="+", help="CHECKPOINT=RAM, such as /models/olmoe=3GiB")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--name", default="plan_accuracy")
    args = parser.parse_args()
    points = []
    for point in args.points:
        checkpoint, _, ram = point.partition("=")
        points.append(examine(Path(checkpoint), ram, args.new_tokens))
        print(points[-1], flush=True)
    save(args.name, {**provenance(), "points": points})


def examine(checkpoint: Path, ram: str, new_tokens: int) -> dict:
    common = [str(checkpoint), "--ram", ram, "--max-context", str(CONTEXT), "--json"]
    plan = command("plan", *common)
    found = json.loads(run_worker(checkpoint, ram, new_tokens))
    again = command("plan", *common, "--hit-rate", str(found["hit_rate"]))
    planned, at_hit = plan["forecast"], again["forecast"]
    # The machine is shared: the mean of what was measured before and after stands for the middle.
    at_hit_before = rate_at(plan, found["hit_rate"])
    planned_at_hit = (at_hit_before + at_hit["tokens_per_s"]) / 2
    return {
        "model": checkpoint.name,
        "ram": ram,
        "slots": plan["slots"],
        "share_resident": plan["share_resident"],
        "hit_assumed": planned["hit_rate"],
        "hit_low": planned["hit_rate_low"],
        "hit_found": found["hit_rate"],
        "planned": planned["tokens_per_s"],
        "planned_at_hit": planned_at_hit,
        "measured": found["tokens_per_s"],
        "error": planned_at_hit / found["tokens_per_s"] - 1,
        "band": [planned["tokens_per_s_low"], planned["tokens_per_s_high"]],
        "peak_rss_bytes": found["peak_rss_bytes"],
        "budget_bytes": plan["budget_bytes"],
        "stall_s": found["stall_s"],
        "compute_s": found["compute_s"],
        "wall_s": found["wall_s"],
        "bandwidths": planned["bandwidths"],
    }


def rate_at(plan: dict, hit_rate: float) -> float:
    """The plan's own formula at another hit rate, between its hit rates 1 and ``low``."""
    speed = plan["forecast"]
    low_s, high_s = 1 / speed["tokens_per_s_low"], 1 / speed["tokens_per_s_high"]
    if speed["hit_rate_low"] >= 1:
        return 1 / high_s
    miss = (1 - hit_rate) / (1 - min(speed["hit_rate_low"], speed["hit_rate"]))
    return 1 / (high_s + (low_s - high_s) * miss)


def command(name: str, *args: str) -> dict:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "moe-infinity"), name, *args],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def run_worker(checkpoint: Path, ram: str, new_tokens: int) -> str:
    code = WORKER.format(
        path=str(checkpoint),
        ram=ram,
        context=CONTEXT,
        new=new_tokens,
        prompt=prompt_ids(checkpoint),
    )
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.splitlines()[-1]


WORKER = """
import json
from moe_infinity import MoE
with MoE({path!r}, ram={ram!r}, max_context={context}) as moe:
    for _ in range(2):
        moe.generate([{prompt}], max_new_tokens={new}, min_new_tokens={new},
                     do_sample=True, top_k=0, temperature=1.0)
    s = moe.stats()
    print(json.dumps(dict(hit_rate=s.decode.hit_rate, tokens_per_s=s.tokens_per_s,
                          peak_rss_bytes=s.peak_rss_bytes, stall_s=s.decode.stall_s,
                          compute_s=s.decode.compute_s, wall_s=s.decode.wall_s)))
"""

if __name__ == "__main__":
    main()
