"""Gathers the commands."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_infinity.cli import (
    bench,
    chat,
    doctor,
    fit,
    pack,
    plan,
    run,
    serve,
    simulate,
    top,
    trace,
    trace_show,
)

_HELP = """Run Mixture-of-Experts models that do not fit into memory: exact, under a hard memory
budget, experts streamed from disk. MODEL is a checkpoint's folder, a .gguf file or a Hugging Face
id; without one the small bundled model is used."""


def build_app() -> typer.Typer:
    app = typer.Typer(
        help=_HELP, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
    )
    app.callback()(_options)
    app.command()(run.run)
    app.command()(chat.chat)
    app.command(context_settings={"auto_envvar_prefix": "MOE_INFINITY"})(serve.serve)
    app.command()(top.top)
    app.command()(plan.plan)
    app.command()(doctor.doctor)
    app.command()(trace_show.trace_show)
    app.command()(trace.trace)
    app.command()(simulate.simulate)
    app.command()(fit.fit)
    app.command()(pack.pack)
    app.command()(bench.bench)
    return app


def _say_version(is_asked: bool) -> None:
    if is_asked:
        from moe_infinity.versions import version_of

        print(f"moe-infinity {version_of('moe-infinity')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Say which version this is.", is_eager=True, callback=_say_version
        ),
    ] = False,
) -> None:
    """Options of the program itself."""
