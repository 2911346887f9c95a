"""The application to which every module here adds its commands."""

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Latent diffusion for histopathology: tiles and slide-sized images from a trained model.",
)
