"""The application to which every module here adds its commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from ldm.cli.script import unwrapped


class App(typer.Typer):
    """An application whose commands are told by their docstrings, in which indented examples stay as they are."""

    def command(self, *given: Any, **about: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
        add = super().command
        return lambda function: add(*given, help=unwrapped(function.__doc__ or ""), **about)(function)


app = App(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Latent diffusion for histopathology: tiles and slide-sized images from a trained model.\n\n"
        "Examples:\n\n"
        "    histoldm sample --model M --features store.zarr --out tiles\n"
        "    histoldm view tiles\n"
        "    histoldm doctor\n\n"
        "histoldm COMMAND --help tells the rest of a command."
    ),
)
