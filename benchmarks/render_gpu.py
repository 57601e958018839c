"""docs/gpu.md from the checked-in result of benchmarks/gpu_link.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Result = dict[str, Any]
Point = dict[str, Any]
_SHOWN = ("lru", "lfru", "next_use", "default", "forecast + oracle")
_NOT_RECORDED = "no foresight recorded"


def page(load: Callable[[str], Result], provenance: Callable[[Result], str]) -> str:
    """The whole page."""
    result = load("gpu_link")
    points = [p for p in result["points"] if "default" in p["rows"]]
    sampled = [p for p in result["points"] if "default" not in p["rows"]]
    parts = [
        "# Experts in a GPU's memory, simulated",
        _what_it_is(result),
        "## What is assumed",
        _assumptions(result["assumptions"]),
        _times_table(points),
        "## Waiting for the link",
        "Microseconds per token that decode waits for copies, change against lru on demand in "
        "brackets. *limit*: what the offline optimum's misses take on the link beyond the time "
        "of computing, which nobody can go below. *gap closed*: the default's share of the way "
        "from lru to the limit. *oracle*: an oracle's next pass is loaded ahead and its next four "
        "decide who goes. Where every miss is an expert's first use, no policy can help.",
        stall_table(points),
        _sampled_note(sampled),
        "## What crosses the link",
        "MB per token; ahead counts whole what was cancelled on its way.",
        bytes_table(points),
        "## Three ways out of a miss",
        "A missed expert is copied, computed by the processor from RAM, or both share an event's "
        "misses (`miss=copy`, `cpu`, `auto`). Microseconds per token more than with every expert "
        "in the GPU's memory; next_use, nothing loaded ahead. *same misses*: worked out from the "
        "misses of one replay, as if each were cached whichever way it went, and without what is "
        "computed beside it. *replayed*: what the processor computes is copied behind the event, "
        "as in the live tier; free slots are filled first, `-` where they last for most of the "
        "trace.",
        ways_table(points),
        provenance(result),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def stall_table(points: list[Point]) -> str:
    head = ["routing, experts of", "capacity", *_SHOWN[:-1], "oracle", "limit", "first uses"]
    lines = _head([*head, "gap closed", "tokens/s, lru to default"])
    for point in points:
        rows = point["rows"]
        cells = [_name(point), f"{point['capacity']:.0%}"]
        cells += [_stall(rows[name]) for name in _SHOWN]
        first = point["first_uses"] / rows["lru"]["misses"]
        closed = rows["default"]["gap_closed"]
        cells += [
            f"{point['limit_us']:.0f}",
            f"{first:.0%} of lru's misses",
            "-" if closed is None else f"{closed:.0%}",
            f"{rows['lru']['tokens_per_s']:.0f} to {rows['default']['tokens_per_s']:.0f}",
        ]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def bytes_table(points: list[Point]) -> str:
    head = ["routing, experts of", "capacity", "lru", "next_use", "default, on demand"]
    lines = _head([*head, "default, ahead (wasted)", "default, sum", "optimum"])
    for point in points:
        rows = point["rows"]
        found = rows["default"]
        per_load = rows["lru"]["demand_bytes"] / rows["lru"]["misses"]
        ahead = f"{_mb(found['prefetched_bytes'])} ({_mb(found['wasted_bytes'])})"
        cells = [
            _name(point),
            f"{point['capacity']:.0%}",
            _mb(rows["lru"]["demand_bytes"]),
            _mb(rows["next_use"]["demand_bytes"]),
            _mb(found["demand_bytes"]),
            ahead if found["predictor"] != "none" else _NOT_RECORDED,
            _mb(found["demand_bytes"] + found["prefetched_bytes"]),
            _mb(point["optimal_misses"] * per_load),
        ]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def ways_table(points: list[Point]) -> str:
    ways = [(way["mode"], way["fixed_s"]) for way in points[0]["ways"]]
    names = [m if m == "copy" else f"{m}, {f * 1e6:.0f} us a step" for m, f in ways]
    lines = _head(["routing, experts of", "capacity", "reckoned", *names])
    for point in points:
        for kind, field in (("same misses", "same_misses_us"), ("replayed", "replayed_us")):
            found = [way.get(field) for way in point["ways"]]
            cells = ["-" if us is None else f"{us:.0f}" for us in found]
            lines.append(_row([_name(point), f"{point['capacity']:.0%}", kind, *cells]))
    return "\n".join(lines) + "\n"


def _what_it_is(result: Result) -> str:
    return (
        "A simulation, measured on no GPU: recorded routing is replayed through the very objects "
        "that decide in a live run, on a clock with one link and one GPU; RAM holds every expert. "
        "Decode only, from a cold cache. *domains*: the bundled model over "
        f"{result['test_requests']} requests, its experts taken to be as large as those of a real "
        f"model, after {result['history_requests']} others that the predictor watched; its "
        "routing has 8 layers, so a token takes a fraction of the real model's time. The public "
        "traces are one request each, of runs with fewer experts per token than the models' own, "
        "and hold no foresight: there the default loads nothing ahead and is next_use."
    )


def _assumptions(a: Result) -> str:
    m = a["machine"]
    lines = [
        f"- {m['gpu']}: {m['memory_gbps']:.0f} GB/s to its memory by its datasheet, all of it "
        f"reached; {m['launch_s'] * 1e6:.0f} us a layer for a host that starts kernels one by one.",
        f"- Link: {m['link_gbps']:.0f} GB/s (PCIe 4 x16), {m['latency_s'] * 1e6:.0f} us to the "
        "first byte; a copy on demand waits for 4 MiB of one ahead at most.",
        f"- Processor: reads {m['cpu_gbps']:.0f} GB/s of experts from RAM, also beside the link; "
        f"a step costs {' or '.join(f'{f * 1e6:.0f}' for f in a['cpu_fixed_s'])} us besides.",
        "- A layer reads its attention, router and chosen experts once, and its share of the "
        "output head; KV cache, norms and biases are left out, and victims are not copied back.",
    ]
    return "\n".join(lines)


def _times_table(points: list[Point]) -> str:
    head = ["routing, experts of", "experts a token and layer", "layers", "expert over the link"]
    lines = _head([*head, "layer computed", "load / layer time"])
    for point in {_name(p): p for p in points}.values():
        cells = [
            _name(point),
            str(point["top_k"]),
            str(point["layers"]),
            f"{point['load_us']:.0f} us",
            f"{point['layer_us']:.0f} us",
            f"{point['load_us'] / point['layer_us']:.2f}",
        ]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _sampled_note(points: list[Point]) -> str:
    """The same prompts answered with other seeds: does the order of policies stand?"""
    if not points:
        return ""
    found = []
    for capacity in sorted({p["capacity"] for p in points}):
        rows = [p["rows"] for p in points if p["capacity"] == capacity]
        ranges = [
            f"{name} {min(r[name]['stall_vs_lru'] for r in rows) - 1:+.0%} to "
            f"{max(r[name]['stall_vs_lru'] for r in rows) - 1:+.0%}"
            for name in ("lfru", "next_use")
        ]
        found.append(f"at {capacity:.0%} {', '.join(ranges)}")
    number = len({p["trace"] for p in points})
    return (
        f"Sampled answers to the same prompts ({number} traces, temperature 0.8, as "
        f"{points[0]['model']}), on demand, against lru: {'; '.join(found)}."
    )


def _name(point: Point) -> str:
    return f"{point['trace']}, {point['model']}"


def _stall(row: Result) -> str:
    change = row["stall_vs_lru"]
    return f"{row['stall_us']:.0f}" + ("" if change in (None, 1.0) else f" ({change - 1:+.0%})")


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f}"


def _head(cells: list[str]) -> list[str]:
    return [_row(cells), "|" + "---|" * len(cells)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
