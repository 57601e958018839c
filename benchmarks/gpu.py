"""One command for a lent GPU: is it right there, and how fast are decode and prefill at budgets?

    python benchmarks/gpu.py               # nine minutes on one CUDA device, nothing to download
    python benchmarks/gpu.py --dry         # a minute without one: every path but CUDA's

Checkpoints are made on the spot. What matters most comes first; what no longer fits into --limit-s
is left out, and the result says so. The result is written after every step. Made for a short loan:
a folder in memory (--work /dev/shm/gpu), where there is room, saves the disk's time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before triton is imported.
os.environ["TRITON_INTERPRET"] = str(int("--dry" in sys.argv))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import psutil
import torch

import gpu_checkpoints
import gpu_correct
import gpu_facts
import gpu_peers
import gpu_points
from gpu_plan import Plan, dry_plan, full_plan
from limits import provenance
from render_gpu import measured_lines

VERSION = 1
_TESTS_S = 60.0  # of the kernels' own tests
_WRITING_S = 75.0  # of one checkpoint at most
_FEWEST_GBPS = 0.2


def main() -> int:
    args = build_parser().parse_args()
    os.environ.setdefault("MOE_INFINITY_STATE_DIR", str((args.work / "state").absolute()))
    args.work.mkdir(parents=True, exist_ok=True)
    if args.dry:
        torch.set_num_threads(1)  # whatever else runs beside it
    lease = Lease(args)
    try:
        run_all(lease, dry_plan() if args.dry else full_plan())
    finally:
        lease.save()
        print("\n".join(measured_lines(lease.result)), flush=True)
    return 0


def build_parser() -> argparse.ArgumentParser:
    out = os.environ.get("OUT")
    default = Path(out) if out else Path(__file__).resolve().parent / "results"
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=default / "gpu.json", help="result file")
    parser.add_argument("--work", type=Path, default=Path("scratch/gpu"), help="for checkpoints")
    parser.add_argument("--limit-s", type=float, default=520.0, help="seconds for everything")
    parser.add_argument("--layers", type=int, help="of random checkpoints, at most; None: all")
    parser.add_argument("--ram", default="auto", help="RAM budget of a run")
    parser.add_argument("--new-tokens", type=int, default=32, help="of a trial")
    parser.add_argument("--trials", type=int, default=2, help="of host and device each")
    parser.add_argument("--commit", help="where the tree has no history of its own")
    parser.add_argument("--only", default="", help="names of steps that have one of these words")
    parser.add_argument("--dry", action="store_true", help="tiny models on a simulated device")
    return parser


class Lease:
    """A bounded time, and the result so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        known = provenance()
        if args.commit:
            known["commit"] = args.commit
        self.result: dict[str, Any] = {"version": VERSION, **known, "is_dry": args.dry}
        self.result |= {"limit_s": args.limit_s, "facts": {}, "correctness": {}}
        self.result |= {"checkpoints": {}, "points": [], "peers": []}
        self.result |= {"skipped": [], "failures": [], "seconds": {}}
        self._only = [word for word in args.only.split(",") if word]

    def left_s(self) -> float:
        return float(self.args.limit_s) - (time.time() - psutil.Process().create_time())

    def step(self, name: str, needs_s: float, work: Callable[[], Any]) -> Any:
        """Do it if there is time, keep what it raises, save. None: there is no result."""
        if self._only and not any(word in name for word in self._only):
            return None
        if self.left_s() < needs_s:
            reason = f"{self.left_s():.0f} s were left, {needs_s:.0f} s wanted"
            self.result["skipped"].append({"step": name, "reason": reason})
            return None
        print(f"[{self.left_s():4.0f} s left] {name}", flush=True)
        began_s = time.perf_counter()
        try:
            return work()
        except Exception as error:  # the next step may still work
            text = "".join(traceback.format_exception(error))[-1500:]
            failure = f"{type(error).__name__}: {str(error)[:400]}"
            self.result["failures"].append({"step": name, "error": failure, "trace": text})
            print(f"  failed: {failure}", flush=True)
            return None
        finally:
            self.result["seconds"][name] = time.perf_counter() - began_s
            self.save()

    def save(self) -> None:
        """Whole or not at all: this may be killed at any time."""
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.args.out.with_suffix(".partial")
        partial.write_text(json.dumps(self.result, indent=1, default=str) + "\n")
        os.replace(partial, self.args.out)


def run_all(lease: Lease, plan: Plan) -> None:
    """Facts, correctness, then what the plan says in its order."""
    args, result = lease.args, lease.result
    setting = plan.setting(args)
    facts = lease.step("facts", 5, lambda: gpu_facts.facts(setting.device, args.work))
    result["facts"] = facts or {}
    building = lease.step("build", 60, gpu_facts.NativeBuild)
    lease.step("tiny", 5, lambda: make(lease, plan, "tiny"))
    for name in ("tiny", "bundled"):
        folder = folder_of(lease, name)
        compared = lambda folder=folder: gpu_correct.Comparison(  # noqa: E731
            folder, setting, plan.prompt_tokens, plan.answer_tokens
        ).all()
        if name in plan.compared:
            found = lease.step(f"correctness {name}", 20, compared)
            result["correctness"][name] = found
    tests = None
    if plan.has_kernel_tests:
        log = args.out.with_name("gpu_kernel_tests.log")
        tests = lease.step("kernel tests", _TESTS_S, lambda: gpu_correct.KernelTests(log))
    for number, item in enumerate(plan.items):
        if number == 1 and tests is not None:  # they ran beside the first checkpoint's writing
            finish = lambda: tests.finish(_TESTS_S)  # noqa: E731
            result["correctness"]["kernel_tests"] = lease.step("kernel tests end", 1, finish)
        if building is not None and building.is_over():
            facts_now = lease.step("build end", 1, building.finish)
            result["facts"]["native_build"] = facts_now
            building = None
        do(lease, plan, item, setting)
    if building is not None:
        building.give_up()


def do(lease: Lease, plan: Plan, item: Any, setting: gpu_points.Setting) -> None:
    """A checkpoint to make, a point to measure, or a peer."""
    if isinstance(item, str):
        lease.step(f"make {item}", plan.making_s, lambda: make(lease, plan, item))
        return
    model = item.model
    if model != "bundled" and model not in lease.result["checkpoints"]:
        lease.result["skipped"].append({"step": item.name, "reason": f"{model} was not made"})
        return
    folder = folder_of(lease, model)
    if isinstance(item, gpu_points.Point):
        needs_s = _usual_s(lease, model, plan.point_s)
        found = lease.step(item.name, needs_s, lambda: gpu_points.measure(item, folder, setting))
        if found is not None:
            lease.result["points"].append(found)
            for row in found["runs"]:
                print("  " + json.dumps(row)[:300], flush=True)
    else:
        gpu_points.KeptArena.let_go()
        found = lease.step(item.name, plan.peer_s, lambda: gpu_peers.run(item, folder))
        if found is not None:
            lease.result["peers"].append({"name": item.name, "model": model, **found})
            print("  " + json.dumps(found), flush=True)
    lease.save()


def _usual_s(lease: Lease, model: str, otherwise_s: float) -> float:
    """What a point of this model took the last time."""
    taken = [s for name, s in lease.result["seconds"].items() if name.startswith(f"{model} ")]
    return taken[-1] * 1.1 if taken else otherwise_s


def make(lease: Lease, plan: Plan, name: str) -> None:
    wanted = plan.wanted[name]
    if lease.args.layers and wanted.shape and name != "tiny":
        most = min(lease.args.layers, wanted.config().num_hidden_layers)
        changes = {**wanted.changes, "num_hidden_layers": most}
        wanted = gpu_checkpoints.replaced(wanted, changes)
    written_gbps = lease.result["facts"].get("work_write_gbps") or _FEWEST_GBPS
    most_bytes = int(max(_FEWEST_GBPS, written_gbps) * 1e9 * _WRITING_S)
    made = gpu_checkpoints.make(wanted, lease.args.work, most_bytes)
    lease.result["checkpoints"][name] = made
    print("  " + json.dumps(made), flush=True)


def folder_of(lease: Lease, name: str) -> Path:
    return gpu_checkpoints.BUNDLED if name == "bundled" else lease.args.work / name


if __name__ == "__main__":
    torch.manual_seed(0)
    raise SystemExit(main())
