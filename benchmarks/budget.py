"""Does a run stay inside its memory budget, and how fast is it there?

Runs a checkpoint inside a kernel limit of a share of its size with ``--ram`` equal to the limit,
next to accelerate's disk offload inside the same limit, A B A B. Reports tokens/s, peak memory,
page cache, bytes written, and reads against dd with direct I/O.
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
from limits import MemoryLimit, decode_figures, direct_read_gbps, prompt_ids, provenance, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--share", type=float, default=0.3, help="limit over checkpoint size")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--max-context", type=int, default=256)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--accelerate", type=Path, help="folder for accelerate's second copy")
    parser.add_argument("--accelerate-tokens", type=int, default=6)
    parser.add_argument("--greedy", action="store_true", help="no sampling: random models loop")
    parser.add_argument("--name", help="result file, default: the checkpoint's folder name")
    parser.add_argument("--worker", choices=("ours", "accelerate"), help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker](args)))
        return
    result = measure(args)
    path = save(args.name or f"budget_{args.checkpoint.name}", result)
    print(f"saved {path}")


def measure(args: argparse.Namespace) -> dict:
    files = sorted(args.checkpoint.glob("*.safetensors"))
    size = sum(f.stat().st_size for f in files)
    limit_bytes = int(size * args.share)
    systems = ["ours"] + (["accelerate"] if args.accelerate else [])
    trials: dict[str, list[dict]] = {system: [] for system in systems}
    for trial in range(args.trials):
        for system in systems:
            if system == "accelerate" and trial > 1:
                continue  # minutes each; two say enough
            trials[system].append(run_limited(args, system, limit_bytes, files[0]))
            print(system, json.dumps(trials[system][-1]), flush=True)
    summary = {s: summarise(rows) for s, rows in trials.items()}
    return {
        **provenance(),
        "checkpoint": args.checkpoint.name,
        "checkpoint_bytes": size,
        "limit_bytes": limit_bytes,
        "summary": summary,
        "trials": trials,
    }


def run_limited(args: argparse.Namespace, system: str, limit_bytes: int, file: Path) -> dict:
    dd_gbps = direct_read_gbps(file)
    limit = MemoryLimit(f"moe-infinity-bench-{system}", limit_bytes)
    command = [sys.executable, __file__, str(args.checkpoint), "--worker", system]
    command += ["--limit", str(limit_bytes), "--new-tokens", str(args.new_tokens)]
    command += ["--max-context", str(args.max_context)]
    command += ["--accelerate-tokens", str(args.accelerate_tokens)]
    if args.accelerate:
        command += ["--accelerate", str(args.accelerate)]
    if args.greedy:
        command += ["--greedy"]
    # Compiled bytecode would count as bytes written.
    code, out, usage = limit.run(command, os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    limit.close()
    lines = out.strip().splitlines()
    row = json.loads(lines[-1]) if code == 0 and lines else {"failed": f"exit code {code}"}
    dd_gbps = statistics.median([dd_gbps, direct_read_gbps(file)])
    return row | {
        "group_peak_bytes": usage.peak_bytes,
        "page_cache_bytes": usage.page_cache_bytes,
        "limit_hits": usage.limit_hits,
        "dd_gbps": dd_gbps,
    }


def summarise(rows: list[dict]) -> dict:
    """Median of every number over the trials that worked."""
    done = [row for row in rows if "failed" not in row]
    names = [n for n, v in done[0].items() if isinstance(v, (int, float))] if done else []
    medians = {name: statistics.median(row[name] for row in done) for name in names}
    return medians | {"trials": len(rows), "failed": len(rows) - len(done)}


def ours(args: argparse.Namespace) -> dict:
    from moe_infinity import MoE

    prompt = prompt_ids(args.checkpoint)
    # Some import asks Python for a folder for temporary files; it tries it with a few bytes, once.
    tempfile.gettempdir()
    written_before = written_bytes()
    with MoE(args.checkpoint, ram=args.limit, max_context=args.max_context) as moe:
        # The first request warms the cache; the second is what a user sees from then on.
        for _ in range(2):
            moe.generate(
                [prompt],
                max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens,
                **({} if args.greedy else {"top_k": 0, "temperature": 1.0}),
                do_sample=not args.greedy,
            )
        written = written_bytes() - written_before  # a report may measure the machine and note it
        stats = moe.stats()
        plan = moe.plan
        decode = stats.decode
        return {
            **decode_figures(stats),
            "prefetch_bytes_per_token": decode.prefetch_bytes / decode.num_tokens,
            "read_gbps": decode.read_gbps,
            "slots": stats.slots,
            "experts_total": stats.experts_total,
            "planned_bytes": plan.used_bytes,
            "written_bytes": written,
        }


def accelerate(args: argparse.Namespace) -> dict:
    import time

    import torch
    from transformers import AutoModelForCausalLM

    room = max(args.limit - 2 * 1024**3, args.limit // 3)
    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint,
        device_map="auto",
        max_memory={"cpu": room},
        offload_folder=args.accelerate,
        dtype=torch.bfloat16,
    )
    ids = torch.tensor([prompt_ids(args.checkpoint)])
    times = []

    class Clock:
        def put(self, value: object) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    model.generate(
        ids,
        max_new_tokens=args.accelerate_tokens,
        do_sample=True,
        streamer=Clock(),
        min_new_tokens=args.accelerate_tokens,
    )
    rate = (len(times) - 2) / (times[-1] - times[1])
    return {"tokens_per_s": rate, "ttft_s": times[1] - times[0], "written_bytes": written_bytes()}


def written_bytes() -> int:
    """Bytes this process has caused to be written to storage."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return counts["write_bytes"] - counts["cancelled_write_bytes"]


WORKERS = {"ours": ours, "accelerate": accelerate}

if __name__ == "__main__":
    main()
