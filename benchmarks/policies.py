"""Which policy and predictor are best on recorded routing? The table behind the defaults.

Every trace is replayed by the simulator with the very objects of a live run. A trace of many
requests (``make traces``) is split by request: predictors watch the history first, what is trained
beforehand is fitted to it, and the rest is replayed from a cold cache. Stalls are in layer times,
on links that load an expert in 1/4, 1 and 4 of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fitted import fit_networks
from limits import provenance, save

RESULTS = Path(__file__).resolve().parent / "results"

CAPACITIES = (0.12, 0.25, 0.5)
LINKS = (0.25, 1.0, 4.0)  # load time over layer time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--split", type=Path, help="one of the traces: history and test")
    parser.add_argument("--history", type=int, default=150, help="its requests for predictors")
    parser.add_argument("--test", type=int, default=30, help="its requests that are replayed")
    parser.add_argument(
        "--only", help="policies, or predictors, comma-separated: replace these rows"
    )
    parser.add_argument("--processes", type=int)
    args = parser.parse_args()
    from moe_infinity.simulator.sweep import run

    with tempfile.TemporaryDirectory() as folder:
        sources = [(path, None) for path in args.traces if path != args.split]
        if args.split:
            sources.append(split(args.split, args.history, args.test, Path(folder)))
        tasks = [task for source in sources for task in tasks_for(*source)]
        if args.only:
            only = set(args.only.split(","))
            tasks = [task for task in tasks if {task.policy, task.prefetch} & only]
        print(f"{len(tasks)} replays", flush=True)
        done = [0]

        def count() -> None:
            done[0] += 1
            if done[0] % 20 == 0:
                print(done[0], flush=True)

        rows = run(tasks, args.processes, on_row=count)
    for row, task in zip(rows, tasks, strict=True):
        row.pop("notes")
        if faults := row.pop("faults"):
            sys.exit(f"{task}: {faults}")
        row |= {"link": task.cost.load_s, "commit": provenance()["commit"]}
    how = provenance()
    if args.only:
        before = json.loads((RESULTS / "policies.json").read_text())
        rows = renewed(rows, before)
        how = {**{name: before[name] for name in how}, "renewed": how}
    save("policies", {**how, "history_requests": args.history, "rows": rows})


def renewed(rows: list[dict], before: dict) -> list[dict]:
    """The rows of the last result, those measured now in their new form or behind them."""
    names = ("trace", "policy", "prefetch", "capacity", "link")
    new = {tuple(row[name] for name in names): row for row in rows}
    old = [{"commit": before["commit"], **row} for row in before["rows"]]
    renewed = {tuple(row[name] for name in names): row for row in old} | new
    return list(renewed.values())


def split(path: Path, history: int, test: int, folder: Path) -> tuple[Path, Path]:
    """The trace in two files: (test, history). Networks are fitted to the history."""
    import numpy as np

    from moe_infinity.tracing.trace_file import load_trace, save_trace

    trace = load_trace(path)
    early, late = trace.split(history)
    requests = np.unique(late.request)[:test]
    late = late.select(np.isin(late.request, requests))
    early.meta["name"], late.meta["name"] = f"{trace.name}-history", trace.name
    files = folder / f"{trace.name}.safetensors", folder / "history.safetensors"
    save_trace(late, files[0])
    save_trace(early, files[1])
    fit_networks(early, folder / "state")
    return files


def tasks_for(trace: Path, history: Path | None) -> list:
    from moe_infinity.policies import policy_names
    from moe_infinity.predictors import AUTO_PREFETCH, predictor_names
    from moe_infinity.simulator.cost_model import Cost
    from moe_infinity.simulator.sweep import ORACLES, Task

    def task(policy: str, prefetch: str, capacity: float, link: float) -> Task:
        cost = Cost(load_s=link, layer_s=1.0)
        return Task(trace, policy, prefetch, capacity, cost=cost, history=history)

    alone = (*policy_names(), *ORACLES)
    tasks = [task(p, "none", c, 1.0) for p in alone for c in CAPACITIES]
    for policy in policy_names():
        for prefetch in predictor_names():
            if prefetch != "none":
                tasks += [task(policy, prefetch, c, 1.0) for c in CAPACITIES]
    for policy, prefetch in (("lru", "none"), ("next_use", "none"), ("next_use", AUTO_PREFETCH)):
        tasks += [
            task(policy, prefetch, c, link) for c in CAPACITIES for link in LINKS if link != 1
        ]
    return tasks


if __name__ == "__main__":
    main()
