"""Models, checkpoints, encoders, scorers, reports and settings that are damaged, and what reads them."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fuzz_data import GENES, cohort, each
from fuzzing import ROOT, Kind
from safetensors.torch import save_file

import ldm
from ldm.commands.describe import describe
from ldm.commands.models import convert_model
from ldm.conditioners.compose import ConditionerSet
from ldm.conditioners.text_towers import build_tower
from ldm.convert import load_model
from ldm.encoders.encoder import load_encoder
from ldm.encoders.feature_map import Transport, load_transport, save_transport
from ldm.encoders.text_models import find_tower
from ldm.metrics.measure import Measure
from ldm.model_folder import export, load_first_stage, write_model_folder
from ldm.report.compare import compare_lines, compare_page, compared, read_report
from ldm.report.page import Report, Section
from ldm.requests.spec import read_pairs, read_spec
from ldm.scorers.ensemble import Ensemble, View, load_scorer, save_scorer
from ldm.scorers.labelled import Task
from ldm.tables.gene_lists import read_scaler
from ldm.training.command import MAIN
from ldm.training.command import _run as train

ORACLE = ROOT / "tests" / "oracle"

FIRST_STAGE = {
    "target": "ldm.autoencoder.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 4, "ddconfig": {
        "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}},
}  # fmt: skip
UNET = {
    "target": "ldm.networks.unet.UNetModel",
    "params": {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1,
               "attention_resolutions": [1], "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True,
               "context_dim": 8},
}  # fmt: skip
CONDITIONERS = {
    "ssl": {"target": "ldm.conditioners.ssl.PatchEmbedder", "params": {"embed_dim": 8, "context_dim": 8}},
    "class": {"target": "ldm.conditioners.class_token.ClassEmbedder",
              "params": {"classes": ["A", "B"], "dim": 128, "acts": "vector"}},
    "omics": {"target": "ldm.conditioners.omics.OmicsEmbedder",
              "params": {"dim": 8, "mutation_genes": GENES, "expression_genes": GENES}},
}  # fmt: skip
MODEL = {
    "target": "ldm.latent_diffusion.LatentDiffusion",
    "params": {"unet_config": UNET, "first_stage_config": FIRST_STAGE, "use_ema": False, "timesteps": 50,
               "beta_schedule": "linear", "linear_start": 0.001, "linear_end": 0.02, "parameterization": "v",
               "cond_stage_config": {"target": "ldm.conditioners.compose.ConditionerSet",
                                     "params": {"conditioners": {k: CONDITIONERS[k] for k in ("ssl", "class")}}}},
}  # fmt: skip
METADATA = {"mpp": 0.5, "tile_size": 16, "licence": "CC0", "encoder": {"encoder": "e", "licence": "MIT", "mpp": 0.5},
            "conditions": {"omics": {"scaler": {"low": [0, 0, 0, 0], "high": [1, 1, 1, 1]}}}}  # fmt: skip


@cache
def weights() -> dict[str, torch.Tensor]:
    from ldm.config import instantiate_from_config

    torch.manual_seed(0)
    return instantiate_from_config(MODEL).state_dict()


def _model_folder(folder: Path) -> None:
    files = {"expression_genes.txt": "\n".join(GENES)}
    write_model_folder(folder / "m", MODEL, weights(), METADATA, torch.float16, files)


def _load_model(folder: Path, out: Path) -> None:
    path = folder / "m"

    def sampled() -> None:
        model = ldm.load_model(path)
        cond = model.condition(features=np.zeros(8, np.float32), class_="A")
        ldm.sample(model, cond, sampler=ldm.Sampler(steps=2, progress=False))

    each(
        sampled, lambda: describe(path), lambda: load_first_stage(str(path)),
        lambda: read_scaler(path),
    )  # fmt: skip


def _model_config(folder: Path) -> None:
    _model_folder(folder)


def training_config(folder: Path) -> dict[str, Any]:
    """A training on a cohort that is written to `folder`."""
    cohort(folder / "cohort")
    train = {"target": "ldm.data.datasets.TileDataset", "params": {
        "keys": ["image", "ssl"], "feature": "e", "where": {"split": "train"}}}  # fmt: skip
    data = {"target": "ldm.data.module.TileDataModule", "params": {
        "batch_size": 2, "stores": str(folder / "cohort"), "train": train}}  # fmt: skip
    embedder = {"target": CONDITIONERS["ssl"]["target"], "params": {"embed_dim": 6, "context_dim": 8}}
    model = {**MODEL, "base_learning_rate": 1e-4, "params": {**MODEL["params"], "cond_stage_config": embedder}}
    return {"model": model, "data": data, "seed": 1, "name": "n"}


TRAINER = {"max_steps": 2, "accelerator": "cpu", "precision": "32-true"}
LIGHTNING = {"trainer": TRAINER, "callbacks": {"image_logger": None}}


def _checkpoint(folder: Path) -> None:
    from ldm.config import instantiate_from_config

    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    cfg = training_config(folder)
    node = {"target": MODEL["target"], "params": cfg["model"]["params"]}
    content = {
        "state_dict": instantiate_from_config(node).state_dict(), "histoldm_config": cfg, "histoldm_metadata": METADATA,
        "global_step": 3, "epoch": 0, "optimizer_states": [{"param_groups": [{"lr": 0.1}]}],
        "histoldm_learning_rate": 0.1, "histoldm_conditioner": node["params"]["cond_stage_config"],
        "histoldm_first_stage": FIRST_STAGE, "histoldm_files": {"genes.txt": "TP53\nEGFR"},
    }  # fmt: skip
    torch.save(content, run / "checkpoints" / "last.ckpt")
    (run / "configs").mkdir()
    (run / "configs" / "0-project.yaml").write_text(yaml.safe_dump(cfg))
    (run / "configs" / "0-lightning.yaml").write_text(yaml.safe_dump({"lightning": LIGHTNING}))


def _load_checkpoint(folder: Path, out: Path) -> None:
    run = folder / "run"
    each(lambda: load_model(run), lambda: export(run, out / "m"), lambda: resumed(run))


def resumed(run: Path) -> None:
    """Check that a run can be resumed, by the command."""
    train(["--resume", str(run), "--no-test"], MAIN)


def oracle(name: str, **options: Any) -> Kind:
    """A published checkpoint of the oracle."""

    def make(folder: Path) -> None:
        from published import unpack

        if (packed := ORACLE / name).is_dir():
            unpack(packed, folder)
            (folder / "io.pt").unlink(missing_ok=True)
        else:
            shutil.copy(packed, folder)

    def enter(folder: Path, out: Path) -> None:
        each(lambda: convert_model(folder, out / "m", options, None, False), lambda: load_model(folder))

    return Kind(name.rpartition("/")[2], make, enter, ("*", "*/*"))


def _encoder(folder: Path) -> None:
    import timm

    arguments = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    save_file(model.state_dict(), folder / "w.safetensors")
    spec = {
        "name": "tiny", "arch": "vit_tiny_patch16_224", "file": "w.safetensors", "dim": 16, "kwargs": arguments,
        "licence": "MIT", "source": "here", "input_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip
    (folder / "encoder.yaml").write_text(yaml.safe_dump(spec))


def _load_encoder(folder: Path, out: Path) -> None:
    load_encoder(folder)(torch.zeros(1, 3, 32, 32))


def _scorer(folder: Path) -> None:
    torch.manual_seed(0)
    task = Task("binary", "class", ("Normal", "Atypical"))
    scorer = Ensemble(task, View(16), "resnet10t", 2, {"channels": [8, 8, 16, 16], "stem_width": 8}, name="cells")
    save_scorer(folder / "s", scorer)


def _load_scorer(folder: Path, out: Path) -> None:
    load_scorer(folder / "s")(torch.zeros(1, 3, 64, 64))


def _feature_map(folder: Path) -> None:
    save_transport(folder / "map", Transport(8, 8), {"licence": "MIT", "source": "a"})


def _text_tower(folder: Path) -> None:
    from ldm.conditioners.text_towers import ClipTower

    text = {"width": 8, "heads": 2, "layers": 1, "vocab_size": 16, "context_length": 4}
    torch.manual_seed(0)
    tower = ClipTower({"text_cfg": text})
    torch.save(tower.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 8, "text_cfg": text}}))


def _load_tower(folder: Path, out: Path) -> None:
    build_tower(find_tower(str(folder)))


def _report(folder: Path) -> None:
    for name, fid in (("a", 10.0), ("b", 12.0)):
        figure = Measure("fid", "FID", fid, fid - 1, fid + 1, better="lower")
        section = Section("distances", "Distance", measures=[figure])
        about = Report("An evaluation", {"real": {"path": "r"}}, sections=[section]).as_dict()
        (folder / name).mkdir()
        (folder / name / "report.json").write_text(json.dumps(about))


def _compare(folder: Path, out: Path) -> None:
    a, b = (read_report(folder / name) for name in "ab")
    rows, warnings = compared(a, b)
    compare_lines(rows)
    compare_page(a, b, rows, warnings)


def _training(folder: Path) -> None:
    (folder / "train.yaml").write_text(yaml.safe_dump(training_config(folder) | {"lightning": LIGHTNING}))


def _check_training(folder: Path, out: Path) -> None:
    train(["--base", str(folder / "train.yaml"), "--logdir", str(out)], MAIN)


def _spec(folder: Path) -> None:
    spec = {
        "default": {"source": {"class": "A"}, "targets": ["class=B"]},
        "files": {"a.png": {"edits": ["mutation=TP53:1"], "targets": [{"class": "B", "label": "x"}]}},
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    (folder / "pairs.csv").write_text("file,source.class,target.class,label\na.png,A,B,x\nb.png,B,A,y\n")


def _read_spec(folder: Path, out: Path) -> None:
    conditioner = ConditionerSet({name: CONDITIONERS[name] for name in ("class", "omics")})
    names = ["a.png", "b.png"]
    own = lambda name: {"class": "A", "mutation": np.zeros(4), "expression": np.zeros(4)}  # noqa: E731
    each(
        lambda: read_spec(folder / "spec.yaml", conditioner, names, own),
        lambda: read_pairs(folder / "pairs.csv", conditioner, names, own),
    )


KINDS = [
    Kind("model-folder", _model_folder, _load_model, ("m/model.safetensors", "m/expression_genes.txt")),
    Kind("model-config", _model_config, _load_model, ("m/config.yaml",)),
    Kind("checkpoint", _checkpoint, _load_checkpoint, ("run/checkpoints/*",)),
    Kind("run-configs", _checkpoint, lambda folder, out: resumed(folder / "run"), ("run/configs/*",)),
    oracle("ldm_ckpt_lid_vq"),
    oracle("more/pathldm_class_ckpt"),
    oracle("more/mid_ddpm_model"),
    oracle("diffusers_sd1"),
    Kind("encoder", _encoder, _load_encoder),
    Kind("scorer", _scorer, _load_scorer, ("s/*",)),
    Kind("feature-map", _feature_map, lambda folder, out: load_transport(folder / "map"), ("map/*",)),
    Kind("text-tower", _text_tower, _load_tower),
    Kind("report", _report, _compare, ("a/*",)),
    Kind("training", _training, _check_training, ("train.yaml",), own=True),
    Kind("translations", _spec, _read_spec),
]
