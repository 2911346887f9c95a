"""`histoldm train`."""

from __future__ import annotations

import typer

from ldm.cli.app import app


@app.command(
    rich_help_panel="Train",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(context: typer.Context) -> None:
    """Train a model that a config describes; `python main.py` by another door."""
    from ldm.training.command import HISTOLDM, main

    if code := main(context.args, HISTOLDM):
        raise typer.Exit(code)
