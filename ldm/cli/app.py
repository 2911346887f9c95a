"""The application to which every module here adds its commands."""

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Latent diffusion for histopathology: tiles and slide-sized images from a trained model.\n\n"
        "Examples: histoldm sample --model M --features store.zarr --out tiles; histoldm view tiles; histoldm doctor. "
        "histoldm COMMAND --help tells the rest of a command."
    ),
)
