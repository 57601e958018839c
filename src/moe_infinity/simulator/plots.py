"""Pictures of a trace and of a sweep, as PNG. Draws what it is handed and computes nothing."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_infinity.durable import write_atomically
from moe_infinity.errors import ConfigError
from moe_infinity.simulator.locality import Domains
from moe_infinity.simulator.verdict import COLD_CEILING, Locality

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
_POLICY_LABELS = {"next_use": "next_use (default)", "lru": "LRU", "belady": "Belady (optimum)"}
# Okabe-Ito (2008), then of Tol's (2012): colour-blind readers tell them apart too. Black is the
# optimum's.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#7F7F7F", "#8C510A", "#332288", "#117733", "#882255", "#B8B042"),
)
_MARKERS = "osD^vP*Xh<>"
_GREY = "#8a8a8a"
_MAX_PRINTED_DOMAINS = 12  # more do not leave room for numbers in the cells


def require_matplotlib() -> None:
    """Raises ConfigError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{error}; plots need matplotlib, get it with: pip install matplotlib"
        ) from error


def plot_trace(found: Locality, path: Path) -> None:
    """Use of every expert, hits against capacity and, of two domains or more, their distances.

    Writes ``path`` as PNG. Raises ConfigError without matplotlib or if it cannot be written.
    """
    figure = _figure(15 if found.domains else 12, 6.2)
    widths = [1.45, 1.0, 0.95] if found.domains else [1.45, 1.0]
    panels = figure.subplots(1, len(widths), width_ratios=widths)
    _draw_use(panels[0], found)
    _draw_curve(panels[1], found)
    if found.domains:
        _draw_domains(panels[2], found.domains)
    shape = found.shape
    figure.suptitle(
        f"{found.name}\n", fontsize=14, fontweight="bold", x=0.01, horizontalalignment="left"
    )
    figure.text(
        0.01,
        0.925,
        f"{found.num_tokens:,} tokens of {found.num_requests:,} "
        f"{'request' if found.num_requests == 1 else 'requests'}  |  {shape.num_layers} layers, "
        f"top {shape.top_k} of {shape.num_experts} experts, {shape.num_total:,} in all",
        color="#444444",
    )
    _write(figure, path)


def plot_sweep(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Hit rate against capacity per policy, and stalls, one line of panels per trace.

    rows: what a sweep found, with trace, policy, prefetch, capacity (share of the experts),
    hit_rate, stall_s. The curves are without prefetching where that was tried. Raises ConfigError.
    """
    rows = [row for row in rows if _is_number(row["hit_rate"])]  # else what the trace lacks
    traces = list(dict.fromkeys(str(row["trace"]) for row in rows))
    if not traces:
        raise ConfigError("got no rows to draw; expected a sweep's results")
    names = [str(row["policy"]) for row in rows if row["policy"] != "belady"]
    policies = list(dict.fromkeys(names))
    combinations = {(row["policy"], row["prefetch"]) for row in rows}
    figure = _figure(13, 1 + max(4.4, 0.24 * len(combinations)) * len(traces))
    panels = figure.subplots(len(traces), 2, squeeze=False)
    for (curves, bars), trace in zip(panels, traces, strict=True):
        own = [row for row in rows if row["trace"] == trace]
        _draw_policies(curves, own, policies)
        curves.set_title(trace, loc="left", fontweight="bold")
        _draw_stalls(bars, own, policies)
    _write(figure, path)


def _figure(width: float, height: float) -> Figure:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, path: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=_DPI, facecolor="white")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data.getvalue())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error}); choose another place") from error


def _draw_use(axes: Axes, found: Locality) -> None:
    """Experts in their own order: what is alike between layers shows. Rare use stays visible."""
    from matplotlib.colors import PowerNorm

    absent = np.arange(found.shape.num_experts) >= np.array(found.shape.experts_per_layer)[:, None]
    image = np.ma.MaskedArray(found.use, absent)
    top = max(0.01, float(np.quantile(found.use[~absent], 0.995)))  # few experts are used always
    drawn = axes.imshow(
        image,
        aspect="auto",
        cmap="magma",
        norm=PowerNorm(0.5, 0, top),
        interpolation="nearest",
        interpolation_stage="data",
    )
    axes.set_facecolor("#d9d9d9")
    axes.set_xlabel("expert of the layer")
    axes.set_ylabel("MoE layer")
    axes.set_title("Use of the experts", loc="left")
    axes.locator_params(integer=True)
    bar = axes.figure.colorbar(drawn, ax=axes, extend="max", pad=0.02)
    bar.set_label("share of tokens that use the expert")
    bar.ax.yaxis.set_major_formatter(_percent())


def _draw_curve(axes: Axes, found: Locality) -> None:
    points, knee = found.curve.points, found.curve.knee
    known = [point.capacity for point in points]
    axes.plot([0, 1], [0, 1], ":", color=_GREY, label="hits follow capacity")
    for name, colour, marker in (
        ("belady", "black", ""),
        ("lru", _COLOURS[1], "s"),
        ("next_use", _COLOURS[0], "o"),
    ):
        hits = [getattr(point, name) for point in points]
        axes.plot(
            [*known, 1.0],
            [*hits, found.curve.ceiling],
            color=colour,
            marker=marker,
            markersize=4.5,
            label=_POLICY_LABELS[name],
        )
    if found.curve.ceiling < COLD_CEILING:
        axes.text(0.5, found.curve.ceiling + 0.015, "only first uses miss", color="#555555")
    if knee is not None:
        hits_there = found.curve.hit_rate(knee)
        axes.plot([knee, knee], [0, hits_there], "--", color=_COLOURS[0], linewidth=1)
        axes.annotate(
            f"knee: {knee:.0%} of the experts\n{hits_there:.0%} hits",
            (knee, hits_there),
            xytext=(min(knee + 0.06, 0.5), 0.33),
            arrowprops={"arrowstyle": "->", "color": "#333333"},
            bbox={"facecolor": "white", "edgecolor": "#cccccc", "boxstyle": "round"},
        )
    axes.axvspan(
        *(0, found.working_set), color=_GREY, alpha=0.25, linewidth=0, label="below one token's use"
    )
    _as_hit_rate(axes)
    axes.set_title(f"Hits, cold start, {found.curve.num_tokens:,} tokens", loc="left")
    axes.legend(loc="lower right", framealpha=0.9, fontsize=9)


def _as_hit_rate(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_formatter(_percent())
    axes.yaxis.set_major_formatter(_percent())
    axes.set_xlabel("capacity, share of all experts")
    axes.set_ylabel("hit rate")
    _plain(axes)


def _draw_domains(axes: Axes, domains: Domains) -> None:
    size = len(domains.names)
    drawn = axes.imshow(domains.distance, cmap="viridis", vmin=0)
    axes.set_xticks(range(size), domains.names, rotation=45, ha="right")
    axes.set_yticks(range(size), domains.names)
    axes.set_title("Distance between domains\n(diagonal: noise, two halves of one)", loc="left")
    bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.6, pad=0.03)
    bar.set_label("total variation, 0 same to 1 disjoint")
    if size > _MAX_PRINTED_DOMAINS:
        return
    middle = float(domains.distance.max()) / 2
    for (i, j), value in np.ndenumerate(domains.distance):
        colour = "white" if value < middle else "black"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)


def _draw_policies(axes: Axes, rows: list[Mapping[str, Any]], policies: list[str]) -> None:
    tried = list(dict.fromkeys(row["prefetch"] for row in rows if row["policy"] != "belady"))
    shown = "none" if "none" in tried or not tried else tried[0]
    for name in [*policies, "belady"]:
        points = sorted(
            (float(row["capacity"]), float(row["hit_rate"]))
            for row in rows
            if row["policy"] == name
            and row["hit_rate"] is not None
            and (name == "belady" or row["prefetch"] == shown)
        )
        if points:
            optimum = name == "belady"
            index = 0 if optimum else policies.index(name)
            axes.plot(
                *zip(*points, strict=True),
                color="black" if optimum else _COLOURS[index % len(_COLOURS)],
                marker="" if optimum else _MARKERS[index % len(_MARKERS)],
                linewidth=2.2 if optimum else 1.4,
                markersize=4.5,
                zorder=3 if optimum else 2,
                label=_POLICY_LABELS["belady"] if optimum else name,
            )
    _as_hit_rate(axes)
    axes.set_xlim(0, 1.04 * max(float(row["capacity"]) for row in rows))
    axes.legend(loc="lower right", framealpha=0.9, fontsize=8, title=f"prefetch {shown}")


def _draw_stalls(axes: Axes, rows: list[Mapping[str, Any]], policies: list[str]) -> None:
    """At the middle capacity of the sweep: bars of all would hide the order among policies."""
    timed = [row for row in rows if _is_number(row["stall_s"])]
    capacities = sorted({float(row["capacity"]) for row in timed})
    axes.set_xlabel("stall, s")
    _plain(axes)
    if not any(row["stall_s"] for row in timed):
        axes.set_title("no stalls were counted", loc="left")
        return
    middle = capacities[len(capacities) // 2]
    bars = sorted(
        (row for row in timed if float(row["capacity"]) == middle),
        key=lambda row: -float(row["stall_s"]),
    )
    labels = [f"{row['policy']} / {row['prefetch']}" for row in bars]
    stalls = [float(row["stall_s"]) for row in bars]
    colours = [_COLOURS[policies.index(str(row["policy"])) % len(_COLOURS)] for row in bars]
    drawn = axes.barh(range(len(bars)), stalls, color=colours)
    axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.margins(x=0.12, y=0.02)
    axes.set_title(f"Stall at {middle:.0%} capacity, policy / prefetch", loc="left")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _plain(axes: Axes) -> None:
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=0)
