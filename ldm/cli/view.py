"""`histoldm view`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.app import app


@app.command(rich_help_panel="Look and check")
def view(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Slides, TIFF, OME-Zarr, PNG, JPEG, tile stores, folders of them."),
    ],
    host: Annotated[str, typer.Option("--host", help="Address to serve at; others than this machine's are open.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to serve at; 0 takes a free one.")] = 0,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the address only, and open no browser.")
    ] = False,
    mpp: Annotated[
        float | None, typer.Option("--mpp", help="Micrometres per pixel of pictures that do not say it.")
    ] = None,
) -> None:
    """Look at images with deep zoom in the browser: generated and real ones side by side, panned and zoomed together.

    Examples:

        histoldm view image.tif slide.svs
        histoldm view tiles/
        histoldm view image.tif --no-browser --port 8000

    On a cluster give the last one there and `ssh -L 8000:127.0.0.1:8000 CLUSTER` here, and open the address that it
    printed.
    """
    from ldm.errors import UserError
    from ldm.viewer.server import serve

    if mpp is not None and not 0 < mpp < float("inf"):
        raise UserError(f"--mpp is micrometres per pixel, above 0; got {mpp}.")
    serve(paths, host, port, not no_browser, mpp)
