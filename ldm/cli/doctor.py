"""`histoldm doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from ldm.cli.app import app


@app.command(rich_help_panel="Look and check")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Check this installation: versions, devices, weights on disk, folders, and a self-test of seconds.

    Exit code 1 where something does not work. Weights that are missing are no problem until a command needs them; the
    report says where to get them, on what terms, and where to put them.

    Examples:

        histoldm doctor
        histoldm doctor --json > report.json
    """
    from ldm.commands.doctor import doctor as examine

    if not examine(as_json):
        raise SystemExit(1)
