"""The command line: one file per command. Errors are one message and exit code 2, no traceback."""

from __future__ import annotations

import logging
import sys
import warnings

from moe_infinity.errors import MoEInfinityError


def main() -> None:
    """Entry point of ``moe-infinity``."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    try:
        import click
        import typer
    except ImportError as error:
        print(f"error: {error}; install the command line with: pip install typer rich",
              file=sys.stderr)
        return 2
    _quieten()
    from moe_infinity.cli.app import build_app

    command = typer.main.get_command(build_app())
    try:
        result = command.main(arguments, prog_name="moe-infinity", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, click.exceptions.Abort):
        return 130
    except click.exceptions.ClickException as error:
        error.show()
        return 2
    except MoEInfinityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()  # the reader left; say nothing more
        return 141


def _quieten() -> None:
    """The libraries' notices are about code; a person at a terminal wants their text."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
