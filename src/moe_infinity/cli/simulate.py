"""``moe-infinity simulate``: replay traces through policies and predictors, without a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_infinity.cli import common
from moe_infinity.errors import ConfigError
from moe_infinity.policies import find_policy, policy_names
from moe_infinity.predictors import AUTO_PREFETCH, find_predictor, predictor_names
from moe_infinity.simulator.cost_model import Cost
from moe_infinity.simulator.sweep import (
    FAULTS,
    NOT_AVAILABLE,
    NOTES,
    ORACLES,
    Row,
    Task,
    run,
    tasks_of,
)


def simulate(
    traces: Annotated[list[Path], typer.Argument(help="Traces: .safetensors or .npz.")],
    policy: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join((*policy_names(), *ORACLES))}; all.")
    ] = "lru,next_use,belady",
    prefetch: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(predictor_names())}; all.")
    ] = "none",
    capacity: Annotated[
        str, typer.Option(help="Comma-separated shares of all experts: 12%,25% or 0.12.")
    ] = "12%,25%,50%",
    scope: Annotated[str, typer.Option(help="One pool (global) or one per layer.")] = "global",
    phase: Annotated[str, typer.Option(help="decode, prefill or all.")] = "decode",
    load_ms: Annotated[float, typer.Option(min=0, help="Loading one expert takes this long.")] = 0,
    layer_ms: Annotated[float, typer.Option(min=0, help="Computing one layer for a token.")] = 0,
    history: Annotated[
        Path | None, typer.Option(help="A trace of earlier requests that predictors watch first.")
    ] = None,
    seed: common.Seed = 0,
    processes: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the rows into this PNG.")] = None,
    json: common.Json = False,
) -> None:
    """Which policy and predictor would hit, load and stall how much on recorded routing.

    The very objects of a live run decide. Every expert counts the same; ratios of --load-ms to
    --layer-ms are what matters for stalls.
    """
    _choice("--scope", scope, ("global", "layer"))
    _choice("--phase", phase, ("decode", "prefill", "all"))
    if plot is not None:
        common.require_suffix("--plot", plot, ".png")
    tasks = tasks_of(
        traces,
        _names("--policy", policy, [*policy_names(), *ORACLES]),
        _names("--prefetch", prefetch.replace("auto", AUTO_PREFETCH), predictor_names()),
        [common.parse_share("--capacity", text) for text in capacity.split(",")],
        scope=scope,
        phase=phase,
        cost=Cost(load_s=load_ms / 1e3, layer_s=layer_ms / 1e3),
        history=history,
        seed=seed,
    )
    if not tasks:
        raise ConfigError(
            f"--policy: got only {policy!r} with --prefetch {prefetch}, expected a policy: the "
            f"oracles are bounds without prefetch"
        )
    rows = _run_with_bar(tasks, processes, quiet=json)
    _say_notes(tasks, rows)
    if json:
        common.print_json(rows)
    else:
        _print_table(rows)
    if plot is not None:
        from moe_infinity.simulator.plots import plot_sweep

        plot_sweep(rows, plot)


def _run_with_bar(tasks: list[Any], processes: int | None, quiet: bool) -> list[Row]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    with Progress(console=console, disable=hidden, transient=True) as bar:
        item = bar.add_task("replaying", total=len(tasks))
        return run(tasks, processes, on_row=lambda: bar.advance(item))


def _say_notes(tasks: list[Task], rows: list[Row]) -> None:
    """On standard error, each once: why a row is empty, what was learned before."""
    notes: dict[str, None] = {}
    for task, row in zip(tasks, rows, strict=True):
        notes |= dict.fromkeys(row.pop(FAULTS) + row.pop(NOTES))
        if task.prefetch != "none" and task.cost.load_s == 0 and row["hits"] != NOT_AVAILABLE:
            notes["loads take no time without --load-ms and --layer-ms: nothing comes late"] = None
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _print_table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in rows[0]:
        is_name = title in ("trace", "policy", "prefetch")
        table.add_column(title, justify="left" if is_name else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(name, value) for name, value in row.items()))
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def _cell(name: str, value: Any) -> str:
    if name in ("capacity", "hit_rate") and isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _names(option: str, text: str, known: list[str]) -> list[str]:
    """The members named; raises UnknownNameError before anything is replayed."""
    if text == "all":
        return known
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"{option}: got {text!r}, expected names, separated by commas, or all")
    for name in names:
        if option == "--prefetch":
            find_predictor(name)
        elif name not in ORACLES:
            find_policy(name)
    return names


def _choice(option: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise ConfigError(f"{option}: got {got!r}, expected one of {', '.join(known)}")
