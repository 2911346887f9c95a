"""The console command `histoldm`: thin commands over the Python face. Nothing heavy is imported before one runs."""

from __future__ import annotations

import sys

import typer.main

from ldm.cli import generate, slide, field, translate, sequence, evaluate, filter, train, models, view, doctor  # isort: skip (in order of help)
from ldm.cli.app import app
from ldm.cli.script import call
from ldm.errors import run_command

__all__ = [
    "app",
    "doctor",
    "evaluate",
    "field",
    "filter",
    "generate",
    "main",
    "models",
    "sequence",
    "slide",
    "train",
    "translate",
    "view",
]


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, never a traceback."""
    sys.exit(run_command(lambda: call(typer.main.get_command(app), "histoldm")))
