"""``moe-infinity pack``: a folder with one aligned read per expert, smaller if asked for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_infinity.checkpoint.pack_format import DENSE_FORMATS, FORMATS, LOSSY
from moe_infinity.cli import common

if TYPE_CHECKING:
    from moe_infinity.checkpoint.pack_job import Job


def pack(
    paths: Annotated[
        list[Path], typer.Argument(help="[MODEL] OUT: checkpoint (or hub id), folder to make.")
    ],
    experts: Annotated[
        str, typer.Option(help=f"Form of the experts: {', '.join(FORMATS)}.")
    ] = "exact12",
    dense: Annotated[
        str, typer.Option(help=f"Form of linear layers beside them: {', '.join(DENSE_FORMATS)}.")
    ] = "bf16",
    json: common.Json = False,
) -> None:
    """Pack MODEL into OUT: experts contiguous, aligned and checksummed.

    exact12 keeps every bit of bf16 weights in three quarters of the room; int8 and int4 change
    them. --dense bf16 leaves the rest as it is. A model on the hub is read from there and not kept.
    Interrupted, the same command goes on where it was.
    """
    from moe_infinity.checkpoint.hub import bundled_model_path
    from moe_infinity.checkpoint.pack_job import refuse
    from moe_infinity.checkpoint.packing import pack as write
    from moe_infinity.errors import ConfigError
    from moe_infinity.preparation import opened_source, packing_job, require_forms

    if len(paths) > 2:
        raise ConfigError(f"got {len(paths)} paths, expected [MODEL] OUT")
    model = str(paths[0]) if len(paths) == 2 else bundled_model_path()
    require_forms(experts, dense)  # a wrong name must not wait for the hub
    with opened_source(model) as source:
        job = packing_job(source, paths[-1], experts, dense)
        total = sum(spec.weight_bytes for spec in job.specs.values())
        # What is packed twice, plain and coded, is in the source once.
        total += sum({each.source.name: each.source.num_bytes for each in job.dense}.values())
        refuse(job)
        _warn_of_growth(str(model), job, total)
        try:
            with progress("packing", total, quiet=json) as on_bytes:
                write(job, on_bytes)
        except KeyboardInterrupt:
            print(
                f"interrupted: the same command goes on where it was; to give up, delete "
                f"{job.partial}",
                file=sys.stderr,
            )
            raise
        is_exact = not job.is_rounded and not {experts, dense} & set(LOSSY)
    _say(paths[-1], total, (experts, dense), is_exact, json)


def _warn_of_growth(model: str, job: Job, source_bytes: int) -> None:
    """Before it takes minutes."""
    from moe_infinity.checkpoint.pack_job import estimate_bytes
    from moe_infinity.config import format_bytes

    if job.is_rounded and job.experts_format not in LOSSY:
        note = (
            f"{model} is quantised already; its experts become 16 bit and several times as large. "
            f"It runs as it is; --experts int4 or int8 keeps it small"
        )
    elif (num_bytes := estimate_bytes(job)) > source_bytes:
        note = (
            f"{job.target} takes up to {format_bytes(num_bytes)}, more than the "
            f"{format_bytes(source_bytes)} it is made of; {model} runs as it is"
        )
    else:
        return
    print(f"note: {note}", file=sys.stderr)


def _say(
    target: Path, source_bytes: int, formats: tuple[str, str], is_exact: bool, json: bool
) -> None:
    from moe_infinity.config import format_bytes

    num_bytes = sum(file.stat().st_size for file in target.iterdir())
    if json:
        names = {"path": str(target), "experts": formats[0], "dense": formats[1]}
        common.print_json({**names, "bytes": num_bytes, "source_bytes": source_bytes})
        return
    print(
        f"{target}: {format_bytes(num_bytes)} of {format_bytes(source_bytes)} "
        f"({num_bytes / source_bytes:.0%}), "
        + ("not one bit of a weight changed" if is_exact else "weights changed")
    )


@contextlib.contextmanager
def progress(title: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar with speed and time left on standard error; told of bytes as they are done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        item = bar.add_task(title, total=total)
        yield lambda num_bytes: bar.advance(item, num_bytes)
