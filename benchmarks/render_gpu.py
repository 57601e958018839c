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
        *_host_share(load("gpu_host"), provenance),
        _measured(load, provenance),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def _host_share(result: Result, provenance: Callable[[Result], str]) -> list[str]:
    lines = _head(["slots of 256", "a layer", "decisions", "routing, places", "the library"])
    for point in result["points"]:
        names = ("layer_us", "decisions_us", "routing_us", "library_us")
        lines.append(_row([str(point["slots"]), *(f"{point[name]:.0f} us" for name in names)]))
    return [
        "## The host's share of a layer",
        "While the host directs decode, one core's time for a layer of a token with experts that "
        "compute nothing and a link of no cost: what a GPU would wait for between its kernels. "
        "Most is the library's Python, its small products on this CPU included; a pass recorded as "
        "a graph, which the device directs, has none of it.",
        "\n".join(lines),
        provenance(result),
    ]


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


def _measured(load: Callable[[str], Result], provenance: Callable[[Result], str]) -> str:
    """What benchmarks/gpu.py found on a GPU; "" where it was not run."""
    try:
        result = load("gpu")
    except FileNotFoundError:
        return ""
    if result["version"] != 1 or result["is_dry"]:
        raise ValueError("results/gpu.json: expected version 1 of a run that was not --dry")
    facts = result["facts"]
    made = [
        f"- {name}: {each['form']}, {each['layers']} of {each['of_layers']} layers, "
        f"{each['bytes'] / 1e9:.1f} GB; {each['routing']}."
        for name, each in result["checkpoints"].items()
    ]
    parts = [
        f"## Measured: {facts.get('gpu', '?')}",
        f"Link {facts.get('link_gbps') or 0:.1f} GB/s, memory {facts.get('memory_gbps') or 0:.0f} "
        f"GB/s, torch {facts.get('torch')}, transformers {facts.get('transformers')}, triton "
        f"{facts.get('triton')}. tokens/s and TPOT: median of passes once a graph is recorded; "
        "*of the limit*: bytes missed over the link's speed or bytes computed over the memory's, "
        "whichever takes longer, over the time taken. Host and device take turns, medians.",
        "\n".join(made),
        "\n".join(measured_lines(result)),
        provenance(result),
    ]
    return "\n\n".join(parts)


def measured_lines(result: Result) -> list[str]:
    """The table of benchmarks/gpu.py, for a terminal and for a page."""
    head = ["point", "context", "directed by", "in VRAM", "tokens/s", "TPOT", "TTFT", "hit rate"]
    lines = _head([*head, "MB/token", "GB/s", "of the limit"])
    for point in result["points"]:
        lines += [_measured_row(point, row) for row in point["runs"]]
        if "chosen" in point:
            row = point["chosen"]
            lines.append(
                _measured_row(point, {**row, "context": "", "way": f"chosen: {row['way']}"})
            )
    for peer in result["peers"]:
        if "failed" in peer:
            lines.append(_row([peer["name"], peer["failed"], *[""] * 9]))
        elif "tpot_s" in peer:
            cells = [f"{peer['steady_tokens_per_s']:.1f}", f"{peer['tpot_s'] * 1e3:.1f} ms"]
            lines.append(
                _row([peer["name"], "", "", "", *cells, f"{peer['ttft_s']:.2f} s", *[""] * 4])
            )
    left_out = [f"not run: {each['step']} ({each['reason']})" for each in result["skipped"]]
    left_out += [f"failed: {each['step']}: {each['error']}" for each in result["failures"]]
    said = [*_correct_lines(result["correctness"]), *left_out]
    return lines + [""] * bool(said) + [f"- {line}" for line in said]


def _correct_lines(correctness: Result) -> list[str]:
    """What had to be equal, and how far the logits are from stock's."""
    lines = []
    for name, found in correctness.items():
        if not found or "summary" in found:
            lines.append(f"{name}: {found['summary'] if found else 'not run'}")
            continue
        said = [f"{part} failed" for part, each in found.items() if "failed" in each]
        if "failed" not in found["logits"]:
            logits = found["logits"]
            spread = max(logits["stock_spread"].values(), default=0.0)
            ours = ", ".join(f"{k} {v:.2g}" for k, v in logits["ours"].items())
            said.insert(0, f"from stock's logits {ours} (its own spread {spread:.2g})")
        if "failed" not in found["directions"]:
            same = all(all(each["same"].values()) for each in found["directions"].values())
            said.append(f"host and device {'agree' if same else 'DIFFER'}")
        if "failed" not in found["capacities"]:
            same = found["capacities"]["same_bits"] and found["capacities"]["same_tokens"]
            said.append(f"small and large budgets {'agree' if same else 'DIFFER'}")
        lines.append(f"{name}: " + "; ".join(said))
    return lines


def _measured_row(point: Point, row: Result) -> str:
    hit_rate = row["hit_rate"]
    cells = [point["name"], str(row["context"]), row["way"], f"{point['share_in_vram']:.0%}"]
    cells += [f"{row['steady_tokens_per_s']:.1f}", f"{row['tpot_s'] * 1e3:.1f} ms"]
    cells += [f"{row['ttft_s']:.2f} s", "-" if hit_rate is None else f"{hit_rate:.1%}"]
    cells += [_mb(row["link_bytes_per_token"]), f"{row['link_gbps']:.1f}"]
    return _row([*cells, f"{row['of_limit']:.0%}"])
