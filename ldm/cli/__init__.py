"""The console command `histoldm`: thin commands over the Python face. Nothing heavy is imported before one runs."""

from __future__ import annotations

import sys

import typer

from ldm.cli import generate, translate, sequence, evaluate, filter, models, view, doctor  # isort: skip (as help lists them)
from ldm.cli.app import app
from ldm.errors import run_command

USAGE_ERROR = typer.BadParameter.__base__  # typer may bring a click of its own

__all__ = ["app", "doctor", "evaluate", "filter", "generate", "main", "models", "sequence", "translate", "view"]


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, never a traceback."""

    def run() -> None:
        try:
            app(standalone_mode=False)
        except typer.Exit as stop:
            sys.exit(stop.exit_code)
        except typer.Abort:
            raise KeyboardInterrupt from None
        except USAGE_ERROR as error:
            error.show()
            sys.exit(error.exit_code)

    sys.exit(run_command(run))
