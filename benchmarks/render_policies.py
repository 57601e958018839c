"""docs/policies.md and the README's tables about policies, from the checked-in results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Result = dict[str, Any]
Rows = list[dict[str, Any]]
BASELINE, ORACLE = "lru", "belady"


def summary_table(result: Result) -> str:
    """Per policy without prefetch: hit rates, the gap to the optimum won, and the worst case."""
    rows = alone(result["rows"])
    places = sorted({(r["trace"], r["capacity"]) for r in rows})
    head = ["policy", *(f"{trace} {capacity:.0%}" for trace, capacity in places)]
    lines = _head([*head, "gap won, mean", "worst against lru"])
    for policy in _by_gap(rows, places):
        rates = [_rate(rows, policy, place) for place in places]
        cells = [f"{100 * rate:.1f}" for rate in rates]
        if policy.startswith(ORACLE):
            lines.append(_row([policy, *cells, "", ""]))
            continue
        worst = min(
            100 * (rate - _rate(rows, BASELINE, place))
            for rate, place in zip(rates, places, strict=True)
        )
        gap = _mean_gap(rows, policy, places)
        lines.append(_row([policy, *cells, f"{gap:.0%}", f"{worst:+.1f}"]))
    return "\n".join(lines) + "\n"


def prefetch_table(result: Result, capacity: float = 0.25) -> str:
    """Stall of each policy with each predictor, in layer times per token-layer, link 1."""
    rows = [
        r
        for r in result["rows"]
        if r["capacity"] == capacity and r["link"] == 1 and r["trace"] == _many(result)
    ]
    policies = sorted({r["policy"] for r in rows if r["prefetch"] != "none"})
    predictors = sorted({r["prefetch"] for r in rows})
    baseline = next(r for r in rows if r["policy"] == BASELINE and r["prefetch"] == "none")
    lines = _head(["prefetch", *(f"{p}: stall, loads (wasted)" for p in policies)])
    for prefetch in predictors:
        cells = []
        for policy in policies:
            found = [r for r in rows if (r["policy"], r["prefetch"]) == (policy, prefetch)]
            cells.append(_stall_cell(found[0], baseline) if found else "not run")
        lines.append(_row([prefetch, *cells]))
    return "\n".join(lines) + "\n"


def link_table(result: Result) -> str:
    """Simulated stall of LRU, the default, and the default loading ahead, by the link's speed."""
    rows = [r for r in result["rows"] if r["trace"] == _many(result)]
    systems = ((BASELINE, "none"), ("next_use", "none"), ("next_use", "gate_lookahead"))
    lines = _head(["capacity", "load / layer time", *(f"{p} + {f}" for p, f in systems)])
    for capacity in sorted({r["capacity"] for r in rows}):
        for link in sorted({r["link"] for r in rows}):
            found = [
                _only(rows, policy=p, prefetch=f, capacity=capacity, link=link) for p, f in systems
            ]
            if all(found):
                cells = [_stall_cell(row, found[0]) for row in found]
                lines.append(_row([f"{capacity:.0%}", f"{link:g}", *cells]))
    return "\n".join(lines) + "\n"


def live_table(result: Result) -> str:
    """The same over a throttled link, live."""
    systems = list(result["points"][0]["summary"])
    lines = _head(["load / layer time", *(s.replace("+", " + ") for s in systems)])
    for point in sorted(result["points"], key=lambda p: p["ratio"]):
        cells = [
            f"{row['stall_s'] / row['passes'] * 1e3:.1f} ms ({row['stall_vs_lru'] - 1:+.0%})"
            for row in point["summary"].values()
        ]
        lines.append(_row([f"{point['ratio']:g}", *cells]))
    return "\n".join(lines) + "\n"


def disk_table(result: Result) -> str:
    """Wall clock from the disk."""
    head = ["budget", "system", "tokens/s", "against lru", "hit rate", "stall per token"]
    lines = _head([*head, "read per token", "of it wasted", "disk"])
    for point in result["points"]:
        for system, r in point["summary"].items():
            looked_up = r["hits"] + r["late"] + r["misses"]
            loaded = r["demand_bytes"] + r["prefetch_bytes"]
            cells = [
                f"{point['share']:.0%}",
                system.replace("+", " + "),
                f"{r['tokens_per_s']:.2f}",
                f"{r['speed_vs_lru']:.2f}x",
                f"{r['hits'] / looked_up:.1%}",
                f"{1e3 * r['stall_s'] / r['passes']:.0f} ms",
                f"{loaded / r['passes'] / 1e6:.0f} MB",
                f"{r['wasted_bytes'] / loaded:.0%}" if loaded else "-",
                f"{r['read_gbps']:.2f} GB/s",
            ]
            lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def recall_table(result: Result) -> str:
    """Recall@k of every predictor by distance."""
    distances = len(next(iter(result["recall"].values()))["recall"])
    lines = _head(["predictor", *(f"{d + 1} ahead" for d in range(distances))])
    for name, found in sorted(result["recall"].items()):
        cells = ["-" if r is None else f"{100 * r:.0f}" for r in found["recall"]]
        lines.append(_row([name, *cells]))
    return "\n".join(lines) + "\n"


def page(load: Callable[[str], Result], provenance: Callable[[Result], str]) -> str:
    """docs/policies.md, whole."""
    policies, prediction = load("policies"), load("prediction")
    live, disk = load("prefetch_live"), load("prefetch_disk")
    switch, sizes = prediction["domain_switch"], prediction["collection_sizes"]
    parts = [
        "# Policies and predictors, measured",
        "Hit rates in percent: decode rows, event-atomic replay, one pool, cold start. Traces: "
        f"*{_many(policies)}*, the bundled model over prompts of seven domains (predictors watch "
        f"{policies['history_requests']} earlier requests first); two public traces of one request "
        "each. *gap won*: share of the way from lru to belady, mean over the columns.",
        summary_table(policies),
        provenance(policies),
        "## With loading ahead, simulated",
        "Stall in layer times per token at 25% capacity, where one load takes as long as one "
        "layer; loads per token, and how many of them were proactive and wasted. What is loaded "
        "ahead takes slots from the same capacity.",
        prefetch_table(policies),
        "By the speed of the link:",
        link_table(policies),
        provenance(policies),
        "## Live, over a throttled link",
        "Stall per token at 25% capacity, bundled model.",
        live_table(live),
        provenance(live),
        "## Live, from the disk",
        disk_table(disk),
        provenance(disk),
        "## How right the predictors are",
        "Recall@k in percent by how many layers ahead; `-`: says nothing there.",
        recall_table(prediction),
        "## The paper's claims",
        f"- Matching takes {prediction['match_us']['qwen3_like']:.1f} us a layer at 1000 entries "
        "of 48 x 128 (paper: 21 us).",
        "- Recall of `eamc` by entries kept: "
        + ", ".join(f"{s['entries']}: {100 * s['recall']:.1f}" for s in sizes)
        + " (paper: 120 are enough).",
        f"- After a switch from {', '.join(switch['old'])} to other domains it takes "
        f"{switch['recovered_after']} requests until recall is back (paper: 6 to 43).",
        provenance(prediction),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def alone(rows: Rows) -> Rows:
    """Rows without prefetch, on the middle link."""
    return [r for r in rows if r["prefetch"] == "none" and r["link"] == 1]


def _many(result: Result) -> str:
    """The trace of many requests: the one that predictors could be compared on."""
    found = [r["trace"] for r in result["rows"] if r["prefetch"] == "gate_lookahead"]
    usable = [
        r["trace"]
        for r in result["rows"]
        if r["prefetch"] == "gate_lookahead" and r["hit_rate"] != "n/a"
    ]
    return (usable or found)[0]


def _by_gap(rows: Rows, places: list[tuple[str, float]]) -> list[str]:
    names = {r["policy"] for r in rows}
    bounds = sorted((n for n in names if n.startswith(ORACLE)), reverse=True)
    return bounds + sorted(
        names.difference(bounds), key=lambda name: (-_mean_gap(rows, name, places), name)
    )


def _mean_gap(rows: Rows, policy: str, places: list[tuple[str, float]]) -> float:
    gaps = []
    for place in places:
        base, best = _rate(rows, BASELINE, place), _rate(rows, ORACLE, place)
        if best - base > 0.005:
            gaps.append((_rate(rows, policy, place) - base) / (best - base))
    return sum(gaps) / len(gaps)


def _rate(rows: Rows, policy: str, place: tuple[str, float]) -> float:
    row = _only(rows, policy=policy, trace=place[0], capacity=place[1])
    assert row is not None
    return float(row["hit_rate"])


def _only(rows: Rows, **wanted: Any) -> dict[str, Any] | None:
    return next((r for r in rows if all(r[n] == v for n, v in wanted.items())), None)


def _stall_cell(row: dict[str, Any], baseline: dict[str, Any]) -> str:
    if row["hit_rate"] == "n/a":
        return "n/a"
    change = row["stall_s"] / baseline["stall_s"] - 1 if baseline["stall_s"] else 0.0
    loads = row["demand_loads"] + row["proactive_loads"]
    return f"{row['stall_s']:.0f} ({change:+.0%}), {loads} ({row['wasted_loads']})"


def _head(cells: list[str]) -> list[str]:
    return [_row(cells), "|" + "---|" * len(cells)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
