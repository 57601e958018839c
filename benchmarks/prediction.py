"""How right are the predictors, and do the paper's claims about its own hold here?

Recall by distance; accuracy against the size of the EAM collection; the time of one match; how
many requests it takes to recover from a switch of domain.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fitted import fit_networks
from limits import provenance, save

SIZES = (1, 3, 10, 30, 100, 300, 1000)
DISTANCE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, help="many requests, with logits, hidden, foresight")
    parser.add_argument("--history", type=int, default=150)
    parser.add_argument("--test", type=int, default=30)
    parser.add_argument(
        "--more",
        nargs="*",
        type=Path,
        default=[],
        help="answers to the same prompts with other seeds: history for large collections, the "
        "test's prompts left out",
    )
    args = parser.parse_args()
    from moe_infinity.predictors import find_predictor, predictor_names
    from moe_infinity.tracing.trace_file import load_trace

    trace = load_trace(args.trace)
    history, rest = trace.split(args.history)
    test, _ = rest.split(args.test)
    names = [n for n in predictor_names() if n != "none" and not find_predictor(n).needs_future]
    with tempfile.TemporaryDirectory() as state:
        fit_networks(history, Path(state))
        recall = {name: accuracy_of(name, history, test) for name in names}
    for name, found in recall.items():
        print(name, found, flush=True)
    sizes = collection_sizes([history, *others_of(args.more, test)], test)
    print(sizes, flush=True)
    match = {"qwen3_like": match_us(48, 128, 8, 1000), "bundled_like": match_us(8, 32, 4, 1000)}
    print(match, flush=True)
    switch = domain_switch(trace)
    print(switch, flush=True)
    save(
        "prediction",
        {
            **provenance(),
            "history_requests": args.history,
            "test_requests": args.test,
            "recall": recall,
            "collection_sizes": sizes,
            "match_us": match,
            "domain_switch": switch,
        },
    )


def accuracy_of(name: str, history, test) -> dict:
    from moe_infinity.predictors import find_predictor
    from moe_infinity.simulator.accuracy import measure
    from moe_infinity.simulator.replay import recall, teach

    predictor = find_predictor(name)(test.shape)
    recall(predictor, name, test.fingerprint)
    teach(predictor, history)
    found = measure(test, predictor, DISTANCE)
    return {"recall": found.recall, "recall_extra": found.recall_extra, "asked": found.asked}


def others_of(paths: list[Path], test) -> list:
    """More history: traces of the same prompts in the same order, without those of the test."""
    import numpy as np

    from moe_infinity.tracing.trace_file import load_trace

    traces = [load_trace(path) for path in paths]
    prompts = np.unique(test.request)
    return [trace.select(~np.isin(trace.request, prompts)) for trace in traces]


def collection_sizes(histories: list, test) -> list[dict]:
    """Mean recall of the paper's predictor over all distances, by entries it may keep."""
    import numpy as np

    from moe_infinity.predictors.eamc import Predictor
    from moe_infinity.simulator.accuracy import measure
    from moe_infinity.simulator.replay import teach

    rows = []
    for size in SIZES:
        predictor = Predictor(test.shape, capacity=size)
        for history in histories:
            teach(predictor, history)
        kept = predictor.collection.size
        recall = measure(test, predictor, DISTANCE).recall
        requests = sum(len(np.unique(history.request)) for history in histories)
        rows.append(
            {
                "capacity": size,
                "entries": kept,
                "history_requests": requests,
                "recall": statistics.mean(recall),
            }
        )
        if kept < size:
            break  # more room would hold no more
    return rows


def match_us(num_layers: int, num_experts: int, top_k: int, entries: int) -> float:
    """Median microseconds to take in one layer's routing and rank all entries."""
    import numpy as np

    from moe_infinity.tracing.collection import EAMCollection, Query
    from moe_infinity.types import ExpertShape

    rng = np.random.default_rng(0)
    shape = ExpertShape(num_layers, num_experts, top_k, (num_experts,) * num_layers)
    collection = EAMCollection(shape, entries)
    for _ in range(entries):
        counts = rng.poisson(0.5, size=(2, num_layers, num_experts)).astype(np.float32)
        collection.add(counts)
    query = Query(collection)
    ones = np.ones(top_k, dtype=np.float32)
    times = []
    for step in range(40):
        for layer in range(num_layers):
            experts = rng.choice(num_experts, top_k, replace=False)
            start = time.perf_counter()
            query.add(1, layer, experts, ones)
            query.similarities()
            if step:
                times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def domain_switch(trace) -> dict:
    """Teach one half of the domains, then bring the other: recall request by request.

    recovered_after: requests of the new domains until the running mean of five reaches 95% of
    where it ends up.
    """
    import numpy as np

    from moe_infinity.predictors.eamc import Predictor
    from moe_infinity.simulator.accuracy import measure
    from moe_infinity.simulator.replay import teach

    requests = np.unique(trace.request)
    domains = sorted({trace.domain(int(r)) for r in requests})
    old = [r for r in requests if trace.domain(int(r)) in domains[: len(domains) // 2]]
    new = [r for r in requests if trace.domain(int(r)) not in domains[: len(domains) // 2]]
    predictor = Predictor(trace.shape)
    teach(predictor, trace.select(np.isin(trace.request, old)))
    curve = []
    for request in new[:80]:
        own = trace.select(trace.request == request)
        curve.append(statistics.mean(measure(own, predictor, DISTANCE).recall))
    smooth = np.convolve(curve, np.ones(5) / 5, mode="valid")
    goal = 0.95 * float(np.mean(curve[-20:]))
    recovered = int(np.argmax(smooth >= goal))
    return {"old": domains[: len(domains) // 2], "recall": curve, "recovered_after": recovered}


if __name__ == "__main__":
    main()
