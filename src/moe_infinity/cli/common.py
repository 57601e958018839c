"""Options and output that commands share; the options' defaults are EngineConfig's."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from moe_infinity.checkpoint.hub import bundled_model_path
from moe_infinity.checkpoint.hub_names import local_model
from moe_infinity.config import EngineConfig, format_bytes
from moe_infinity.errors import ConfigError
from moe_infinity.policies import policy_names
from moe_infinity.predictors import predictor_names
from moe_infinity.stats import PhaseStats, Stats

DEFAULTS = EngineConfig()
_T = TypeVar("_T")

Ram = Annotated[
    str, typer.Option(help="Memory for the whole process: a size such as 8GiB, or auto.")
]
RamSlots = Annotated[
    int | None, typer.Option(help="Capacity in experts, all layers together. Default: what fits.")
]
MaxContext = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer. Default: what fits, at most 32768.")
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: as the checkpoint says.")
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: cpu, cuda, cuda:1, or auto: a GPU if there is one. cuda:0,cuda:1: "
        "the model on the first, experts on both. simulated:24 keeps experts behind a link of "
        "24 GB/s, without a GPU."
    ),
]
Vram = Annotated[
    str,
    typer.Option(
        help="Memory of the device: a size such as 8GiB, or auto: what is free. Of several: one "
        "size for each (8GiB,12GiB), or one for all."
    ),
]
Miss = Annotated[
    str,
    typer.Option(
        help="With a device, what a miss in its memory becomes: copy (bit-exact); cpu: computed "
        "in RAM; auto: both at once, as far as it pays."
    ),
]
Kernel = Annotated[
    str,
    typer.Option(help="native (compiled), triton (GPUs), torch, or auto: the best there is."),
]
Policy = Annotated[
    str, typer.Option(help=f"Which experts stay: {', '.join(policy_names())}, or module:Class.")
]
_LIVE = [name for name in predictor_names() if name != "oracle"]  # that is for recorded traces
Prefetch = Annotated[
    str,
    typer.Option(help=f"What is loaded ahead: auto, {', '.join(_LIVE)}, or module:Class."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]


def split_positionals(first: str | None, second: str | None) -> tuple[str, str | None]:
    """MODEL and PROMPT. A lone positional is the prompt unless it is an existing folder."""
    if second is not None:
        return first or str(bundled_model_path()), second
    if first and local_model(first) is not None:
        return first, None
    if first and first.startswith(("/", "./", "../", "~")) and not any(map(str.isspace, first)):
        print(f"note: no folder {first} here; taken as the prompt", file=sys.stderr)
    return str(bundled_model_path()), first


def progress(items: Sequence[_T], title: str, quiet: bool = False) -> Iterator[_T]:
    """Iterate with a bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    yield from track(items, description=title, console=console, disable=hidden, transient=True)


def require_suffix(option: str, path: Path, suffix: str) -> None:
    """Raise ConfigError unless a file to be written is named like what will be in it."""
    if path.suffix != suffix:
        raise ConfigError(f"{option}: got {path}, expected a name ending in {suffix}")


def parse_share(option: str, text: str) -> float:
    """0.12 of ``12%`` or ``0.12``. Raises ConfigError unless it is above 0 and up to 1."""
    try:
        value = float(text.strip().removesuffix("%")) / (100 if "%" in text else 1)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise ConfigError(
            f"{option}: got {text!r}, expected shares above 0 and up to 100%, such as 25% or 0.25"
        )
    return value


def print_json(value: dict[str, Any] | list[dict[str, Any]]) -> None:
    json.dump(value, sys.stdout)
    sys.stdout.write("\n")


def stats_dict(stats: Stats) -> dict[str, Any]:
    return dataclasses.asdict(stats)


def _where(stats: Stats) -> str:
    if not stats.device:
        return "in memory"
    return f"on {stats.device}, {stats.ram_slots} in RAM beneath"


def _beneath(stats: Stats) -> str:
    phases = (stats.prefill, stats.decode)
    read, back = sum(p.disk_bytes for p in phases), sum(p.demoted_bytes for p in phases)
    return (
        f"of what was copied to the device {sum(p.ram_hits for p in phases)} experts were in RAM; "
        f"{format_bytes(read)} were read from the disk, {format_bytes(back)} copied back"
    )


def print_stats(stats: Stats) -> None:
    """The small table after an answer, on standard error so that text can be piped."""
    if stats.prefill.num_tokens + stats.decode.num_tokens == 0:
        print("no answer yet", file=sys.stderr)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in (
        "",
        "tokens/s",
        "hit rate",
        "hits",
        "misses",
        "copied to device" if stats.device else "read from disk",
        "waited",
        "limit",
    ):
        table.add_column(title, justify="left" if not title else "right")
    for name, phase in (("prefill", stats.prefill), ("decode", stats.decode)):
        if phase.num_tokens:
            table.add_row(name, *_phase_cells(phase))
    console = Console(stderr=True)
    console.print()
    console.print(table)
    if stats.device:
        console.print(_beneath(stats), highlight=False)
    console.print(
        f"{stats.slots} of {stats.experts_total} experts fit {_where(stats)} | first token after "
        f"{_number(stats.ttft_s, 2)} s | peak memory {format_bytes(stats.peak_rss_bytes)} | "
        f"written {stats.bytes_written} B | "
        f"policy {stats.policy}, prefetch {stats.prefetch} | "
        + ("bit-exact" if stats.bit_exact else f"lossy: {', '.join(stats.lossy)}"),
        highlight=False,
        soft_wrap=True,
    )
    for fault in stats.faults:
        console.print(f"note: {fault}", highlight=False, soft_wrap=True, markup=False)


def _phase_cells(phase: PhaseStats) -> list[str]:
    return [
        _number(phase.tokens_per_s, 1),
        "-" if phase.hit_rate is None else f"{phase.hit_rate:.1%}",
        str(phase.hits),
        str(phase.misses + phase.late),
        format_bytes(phase.demand_bytes + phase.prefetch_bytes),
        f"{phase.stall_s:.2f} s",
        "-" if phase.limit_fraction is None else f"{phase.limit_fraction:.0%}",
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
