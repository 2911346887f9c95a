"""Check that the files that a config names exist, before any work: one message lists all that are missing, where to get
each and what else can be done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError

COMPVIS = "CompVis' {0} (MIT): unpack https://ommer-lab.com/files/latent-diffusion/{0}.zip there"
STABLE_DIFFUSION = (
    "Stable Diffusion 1.4 (CreativeML Open RAIL-M, which restricts uses): sd-v1-4.ckpt of "
    "https://huggingface.co/CompVis/stable-diffusion-v-1-4-original"
)
DEMO = "made by `make demo` in the repository"
SHIPPED = "comes with the repository"
SOURCES = {  # path in the shipped configs -> where to get it
    **{f"weights/{name}/model.ckpt": COMPVIS.format(name) for name in ("kl-f4", "kl-f8", "vq-f4", "vq-f8")},
    "weights/cin256-v2/model.ckpt": (
        "CompVis' model of ImageNet (MIT): https://ommer-lab.com/files/latent-diffusion/nitro/cin/model.ckpt"
    ),
    "weights/sd-v1-4/sd-v1-4.ckpt": STABLE_DIFFUSION,
    "weights/vq-f4-folder": (
        "made by `histoldm convert weights/vq-f4/model.ckpt --config autoencoder/vq-f4 --out weights/vq-f4-folder` "
        f"of {COMPVIS.format('vq-f4').replace('there', 'into weights/vq-f4')}"
    ),
    "weights/sd-v1-4-vae": (
        "made by `histoldm convert sd-v1-4.ckpt --config autoencoder/kl-f8 --out weights/sd-v1-4-vae` of "
        f"{STABLE_DIFFUSION}"
    ),
    "models/first-stage": (
        "made by `histoldm export logs/*_first-stage --out models/first-stage` of a training of own/first_stage"
    ),
    "models/feature-codec": (
        "made by `python -m data_prep.fit_feature_codec --store data/my-cohort --where split=train --out "
        "models/feature-codec`"
    ),
    "demo_output/first-stage": DEMO,
    "demo_output/cohort": DEMO,
    "data/models/demo-ssl": SHIPPED,
    "data/models/demo-encoder": SHIPPED,
}
WAYS = {  # param that names files -> what these are, and an alternative, in which {} is the param's path
    "ckpt_path": ("weights to start from", "{}=null starts from scratch"),
    "folder": ("model folder of a first stage", "{}=FOLDER names one that `histoldm export` made of a training"),
    "teacher": ("model folder of the teacher", "{}=FOLDER names one that `histoldm export` made of a training"),
    "stores": ("tiles", "{}=FOLDER names a cohort, as `python -m data_prep.tile_slides` makes them"),
    "encoder": ("tile encoder", "{}=FOLDER names another one"),
}


def check_files(cfg: Mapping[str, Any]) -> None:
    """Raise UserError if files that a training config names do not exist.

    The message says of each what it is, where to get it and what else can be done.

    >>> check_files({"model": {"target": "ldm.autoencoder.stage.AutoencoderStage", "params": {"ckpt_path": "a.ckpt"}}})
    Traceback (most recent call last):
    ldm.errors.UserError: a.ckpt is missing (weights to start from); model.params.ckpt_path=null starts from scratch
    """
    missing = list(dict.fromkeys([*_missing(cfg.get("model"), "model"), *_missing_data(cfg.get("data") or {})]))
    if len(missing) > 1:
        listed = "".join(f"\n  {told}" for told in missing)
        raise UserError(f"the config names {len(missing)} things that are missing:{listed}")
    if missing:
        raise UserError(missing[0])


def _missing_data(node: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each missing file of the data; of stores that datasets share, those that one of them reads."""
    from ldm.data.module import with_shared

    params = dict(node.get("params") or {})
    stores = params.pop("stores", None)
    shared = {"stores": stores} if stores else {}
    for key, value in params.items():
        if isinstance(value, Mapping) and "target" in value:
            yield from _missing(with_shared(value, shared), f"data.params.{key}", stores)


def _missing(value: object, where: str, shared: object = None) -> Iterator[str]:
    """A sentence for each missing file that a part of a config names. shared: the value of `data.params.stores`."""
    if isinstance(value, list):
        for index, child in enumerate(value):
            yield from _missing(child, f"{where}.{index}", shared)
    if not isinstance(value, Mapping):
        return
    if isinstance(value.get("target"), str):
        yield from _looked_for(value["target"], value.get("params") or {})
    for key, child in value.items():
        if absent := _absent(key, child):
            what, way = WAYS[key]
            source = f": {SOURCES[absent[0]]}" if absent[0] in SOURCES else ""
            place = "data.params.stores" if shared and child == shared else f"{where}.{key}"
            verb = "is" if len(absent) == 1 else "are"
            yield f"{', '.join(absent)} {verb} missing ({what}){source}; {way.format(place)}"
        yield from _missing(child, f"{where}.{key}", shared)


def _absent(key: str, value: object) -> list[str]:
    """The paths in a param that do not exist; none if the param does not name files."""
    paths = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    named = key in WAYS and (key != "encoder" or any("/" in path for path in paths))  # encoders also have names
    return [path for path in paths if named and not Path(path).exists()]


def _looked_for(target: str, params: Mapping[str, Any]) -> Iterator[str]:
    """A message for each weight file of a loss or a text tower that does not exist."""
    try:
        if target.endswith("LPIPSWithDiscriminator") and params.get("perceptual_weight", 1.0):
            from ldm.autoencoder.perceptual import find_backbone

            net = params.get("perceptual_loss", "vgg")
            if isinstance(net, str):
                find_backbone(net, params.get("lpips_weights"))
        if target == "ldm.conditioners.text.TextEmbedder" and "model" in params:
            from ldm.encoders.text_models import find_tower

            find_tower(params["model"], params.get("weights"), params.get("tokenizer"))
    except UserError as error:
        yield str(error)
