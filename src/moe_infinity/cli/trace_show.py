"""``moe-infinity trace-show``: what a recorded routing looks like, and whether to cache it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from moe_infinity.cli import common
from moe_infinity.simulator.verdict import MAX_EVENTS, Locality, examine, verdict
from moe_infinity.tracing.trace_file import load_trace

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_VERSION = 1  # of the JSON object
_MAX_LINES = 48  # a line per layer up to here
# Use as a multiple of what uniform routing gives; each step is a darker block.
_STEPS = (0.5, 1.0, 2.0, 4.0)
_BLOCKS, _ASCII_BLOCKS = " ░▒▓█", " .:*#"
_COLOURS = ("grey37", "blue", "cyan", "yellow", "bright_red")


def trace_show(
    file: Annotated[Path, typer.Argument(help="A trace, .safetensors or .npz.")],
    png: Annotated[Path | None, typer.Option(help="Draw it into this file too.")] = None,
    events: Annotated[
        int, typer.Option(min=1, help="Replay at most so many for the hit rates.")
    ] = MAX_EVENTS,
    json: common.Json = False,
) -> None:
    """Show which experts a recorded routing used while decoding, and whether caching them pays."""
    from rich.console import Console

    from moe_infinity.simulator.plots import plot_trace, require_matplotlib

    if png is not None:
        common.require_suffix("--png", png, ".png")
        require_matplotlib()
    trace = load_trace(file).of_phase("decode")
    with Console(stderr=True).status("replaying..."):
        found = examine(trace, events)
    if png is not None:
        plot_trace(found, png)
    if json:
        common.print_json(_as_dict(found))
    else:
        _print(Console(highlight=False), found)


def _as_dict(found: Locality) -> dict[str, Any]:
    shape, curve, domains = found.shape, found.curve, found.domains
    return {
        "version": _VERSION,
        "name": found.name,
        "num_tokens": found.num_tokens,
        "num_requests": found.num_requests,
        "num_layers": shape.num_layers,
        "num_experts": shape.num_experts,
        "experts_per_layer": list(shape.experts_per_layer),
        "experts_total": shape.num_total,
        "top_k": shape.top_k,
        "working_set": shape.working_set,
        "use": _plain(found.use),
        "reuse": found.mean_reuse,
        "reuse_by_popularity": found.mean_popularity,
        "reuse_by_chance": found.mean_chance,
        "reuse_ratio": found.reuse_ratio,
        "reuse_per_layer": _plain(found.reuse),
        "coverage": [vars(each) for each in found.coverage],
        "busiest": [{"experts": share, "uses": take} for share, take in found.busiest.items()],
        "entropy_per_layer": _plain(found.entropy),
        "domains": domains
        and {
            "names": list(domains.names),
            "distance": _plain(domains.distance),
            "between": domains.between,
            "within": domains.within,
        },
        "hit_rates": [vars(point) for point in curve.points],
        "hit_rate_ceiling": curve.ceiling,
        "tokens_replayed": curve.num_tokens,
        "knee": curve.knee,
        "hit_rate_at_knee": None if curve.knee is None else curve.hit_rate(curve.knee),
        "verdict": verdict(found),
    }


def _plain(array: np.ndarray) -> Any:
    """Nested lists, rounded; nan, which JSON lacks, becomes null."""
    if array.ndim > 1:
        return [_plain(row) for row in array]
    return [round(value, 6) if math.isfinite(value) else None for value in array.tolist()]


def _print(console: Console, found: Locality) -> None:
    shape = found.shape
    console.print(
        f"[bold]{found.name}[/bold]: {found.num_tokens:,} tokens decoded, {shape.num_layers} "
        f"layers, top {shape.top_k} of {shape.num_experts} experts",
        soft_wrap=True,
    )
    for layers in _heat_map(console, found):
        console.print(layers, no_wrap=True, overflow="crop")
    console.print()
    console.print(_curve_table(found))
    console.print()
    for line in _measures(found):
        console.print(line, soft_wrap=True)
    console.print()
    for sentence in verdict(found):
        console.print(sentence, style="bold", soft_wrap=True)


def _heat_map(console: Console, found: Locality) -> list[Text]:
    """A line per layer, or per few of them; experts in their own order, several a column."""
    from rich.text import Text

    blocks = _BLOCKS if console.encoding.startswith("utf") else _ASCII_BLOCKS
    lift = found.use / found.chance[:, None]  # [L, E] 1: as much as uniform routing gives
    group = math.ceil(len(lift) / _MAX_LINES)
    columns = max(1, min(lift.shape[1], console.width - 9))
    bins = np.arange(lift.shape[1]) * columns // lift.shape[1]
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    busiest = np.maximum.reduceat(lift, starts, axis=1)  # [L, columns] a mean would hide the hot
    lines = []
    for first in range(0, len(lift), group):
        levels = np.digitize(busiest[first : first + group].mean(axis=0), _STEPS)
        line = Text(f"{first:>5}  ", style="dim")
        for level in levels.tolist():
            line.append(blocks[level], style=_COLOURS[level])
        lines.append(line)
    legend = Text("layer  use, as a multiple of uniform routing's:", style="dim")
    for level, step in enumerate(_STEPS, start=1):
        legend.append(f" {blocks[level]}", style=_COLOURS[level])
        legend.append(f" {step:g}")
    return [legend, *lines]


def _curve_table(found: Locality) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("capacity", "experts", "next_use", "lru", "Belady (optimum)"):
        table.add_column(title, justify="right")
    for point in found.curve.points:
        rates = (point.next_use, point.lru, point.belady)
        table.add_row(
            f"{point.capacity:.0%}", f"{point.num_slots:,}", *(f"{rate:.1%}" for rate in rates)
        )
    return table


def _measures(found: Locality) -> list[str]:
    lines = []
    if found.mean_reuse is not None:
        lines.append(
            f"shared with the token before: {found.mean_reuse:.1%} (popular experts alone "
            f"{found.mean_popularity:.1%}, chance {found.mean_chance:.1%})"
        )
    for each in found.coverage:
        lines.append(
            f"best {each.set_size} experts of a layer for {each.segment_tokens} tokens cover: "
            f"{each.covered:.1%} (tokens shuffled {each.shuffled:.1%})"
        )
    takes = ", ".join(f"{share:.0%}: {take:.1%}" for share, take in found.busiest.items())
    lines.append(f"uses that a layer's busiest experts take: {takes}")
    lines.append(f"entropy of use, 1 is uniform: {np.nanmean(found.entropy):.2f}")
    if found.domains:
        lines.append(
            f"distance of {len(found.domains.names)} domains: {found.domains.between:.2f} "
            f"between them, {found.domains.within:.2f} within one"
        )
    return lines
