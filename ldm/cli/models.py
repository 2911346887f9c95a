"""`histoldm describe`, `export` and `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.app import app
from ldm.cli.options import AllowTargetOption, Form, inputs, output


@app.command(rich_help_panel="Models")
def describe(
    path: Annotated[Path, typer.Argument(help="Model folder, run folder, tile store, or cohort of tile stores.")],
    allow_target: AllowTargetOption = None,
) -> None:
    """Say what a model is and which conditions it takes, by name; or what tile stores hold, and at which scale.

    Examples:

        histoldm describe data/models/demo-ssl
        histoldm describe cohort
    """
    from ldm.commands.describe import describe as say

    say(path)


@app.command(rich_help_panel="Models")
def export(
    run: Annotated[Path, typer.Argument(help="Training run folder (logs/<time>_<name>), checkpoint, or adapter.")],
    out: Annotated[Path, output("--out", help="Model folder to write.")],
    half: Annotated[bool, output("--half", help="Store weights in float16: half the size.")] = False,
    licence: Annotated[str | None, output("--licence", help="Licence of the model, recorded in it.")] = None,
    merge: Annotated[
        float | None, inputs("--merge", help="Put an adapter (LoRA) into its model's weights, times this scale.")
    ] = None,
    base: Annotated[
        Path | None, inputs("--base", help="Model that an adapter changes; by default that of its training.")
    ] = None,
) -> None:
    """Make a model folder of a training run: what every command takes and what you share.

    Its card, README.md, is begun with what the training knows; fill in the rest. A card that is there stays.

    Of a training of an adapter (LoRA) it makes a folder for --lora, or with --merge a model. Of a published model
    `histoldm convert` makes a model folder.

    Examples:

        histoldm export logs/2026-01-31T12-00-00_ssl --out models/ssl
        histoldm export adapters/her2 --merge 1 --base M --out models/her2
    """
    import torch

    from ldm.commands.adapters import export_adapter, is_adapter, merge_adapter
    from ldm.errors import UserError
    from ldm.model_folder import export as export_run

    metadata, dtype = {"licence": licence} if licence else {}, torch.float16 if half else None
    if merge is not None:
        folder = merge_adapter(run, out, base, merge, dtype, metadata)
    elif base is not None:
        raise UserError("--base is the model that --merge puts an adapter into; give both.")
    elif is_adapter(run):
        folder = export_adapter(run, out, metadata)
    else:
        folder = export_run(run, out, dtype, metadata)
    print(f"wrote {folder}")


@app.command(rich_help_panel="Models")
def convert(
    source: Annotated[Path, typer.Argument(help="Published checkpoint or folder; a model folder with --to.")],
    out: Annotated[Path, output("--out", help="Model folder to write.")],
    config: Annotated[
        Path | None, inputs("--config", help="YAML that the weights came with: project YAML, or training flags.")
    ] = None,
    raw_weights: Annotated[
        bool, inputs("--raw-weights", help="Take the weights of the last step, where there are averaged ones too.")
    ] = False,
    classes: Annotated[
        str | None, inputs("--classes", help="Names of classes or magnifications: a,b,c or a file of them.")
    ] = None,
    mutation_genes: Annotated[
        Path | None,
        inputs("--mutation-genes", help="File of the mutations' gene names in the order of their embeddings."),
    ] = None,
    expression_genes: Annotated[
        Path | None, inputs("--expression-genes", help="File of the expression's gene names, likewise.")
    ] = None,
    encoder: Annotated[
        str | None, inputs("--encoder", help="Encoder that made the features which the model was trained on.")
    ] = None,
    mpp: Annotated[float | None, inputs("--mpp", help="Micrometres per pixel of the model's tiles.")] = None,
    licence: Annotated[str | None, output("--licence", help="Licence of the weights, recorded in it.")] = None,
    base: Annotated[
        Path | None, inputs("--base", help="Model or autoencoder with the parts that the weights lack.")
    ] = None,
    allow_target: AllowTargetOption = None,
    to: Annotated[Form | None, output("--to", help="Write a model folder in the form of others.")] = None,
    half: Annotated[bool, output("--half", help="Store weights in float16: half the size.")] = False,
) -> None:
    r"""Make a model folder of a published model: latent-diffusion and its forks, guided-diffusion, diffusers, ...

    Examples:

        histoldm convert brca.ckpt --config zoomldm_brca.yaml --encoder uni \
            --mpp 0.5 --out models/brca
        histoldm convert weights/vq-f4/model.ckpt --out models/vq-f4 \
            --config configs/autoencoder/vq-f4.yaml
        histoldm convert models/brca --to compvis --out brca-compvis
    """
    from ldm.commands.models import convert_model

    asked = {
        "config": config,
        "raw_weights": raw_weights,
        "classes": classes,
        "mutation_genes": mutation_genes,
        "expression_genes": expression_genes,
        "base": base,
        "allow_target": allow_target,
        "encoder": encoder,
        "mpp": mpp,
        "licence": licence,
    }
    convert_model(source, out, asked, to.value if to else None, half)
