"""The transformer under every conditioner, and under three at once: a training step reaches all weights, and guidance
samples."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor

import ldm
import ldm.conditioners
from conftest import ROOT
from ldm.conditioners.base import Conditioner
from ldm.config import instantiate_from_config
from ldm.latent_diffusion import LatentDiffusion

COUNT, SIZE, WIDTH, CONTEXT = 6, 8, 32, 16
DRAW = torch.Generator().manual_seed(5)
FORMS = {
    "DiT": {},
    "PixArt": {"modulation": "shared"},
    "modern": {"positions": "rotary", "norm": "rms", "mlp": "swiglu", "qk_norm": "rms"},
    "in the sequence": {"context": "sequence", "qk_norm": "layer"},
}


def node(name: str, **params: Any) -> dict[str, Any]:
    return {"target": f"ldm.conditioners.{name}", "params": {"dropout": 0.5, **params}}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW)


CLASSES, GENES, IMAGES = ["LUAD", "LUSC", "HNSC"], ["TP53", "KRAS", "EGFR", "MYC"], drawn(COUNT, 3, SIZE, SIZE)
OMICS = {"mutation": (drawn(COUNT, 4) > 0).float(), "expression": drawn(COUNT, 4).sigmoid()}
for values in OMICS.values():
    values[::2, 1] = float("nan")  # unknown
LABELS, SCORES = {"class": CLASSES * 2}, {"score": drawn(COUNT).sigmoid()}
LEVELS = {"magnification": ["20x", "5x"] * 3}
# conditioner, what a batch holds for it, channels of its maps
CONDITIONERS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "class": (node("class_token.ClassEmbedder", classes=CLASSES, dim=CONTEXT), LABELS, 0),
    "class, as a vector": (node("class_token.ClassEmbedder", classes=CLASSES, dim=WIDTH, acts="vector"), LABELS, 0),
    "score": (node("score.ScoreEmbedder", dim=WIDTH, hidden=8), SCORES, 0),
    "score, as a token": (node("score.ScoreEmbedder", dim=CONTEXT, acts="crossattn"), SCORES, 0),
    "feature": (node("ssl.PatchEmbedder", embed_dim=12, context_dim=CONTEXT), {"ssl": drawn(COUNT, 12)}, 0),
    "feature and its cells": (node("ssl.GridPatchEmbedder", embed_dim=12, context_dim=CONTEXT, map_channels=2),
                              {"ssl": drawn(COUNT, 12)}, 2),
    "feature and region": (
        node("ssl.SSLEmbedder", embed_dim=12, region_embed_dim=8, context_dim=CONTEXT, region_dropout=0.2),
        {"ssl": drawn(COUNT, 12), "region": drawn(COUNT, 8)}, 0,
    ),
    "features of a grid": (node("grid.GridTokens", embed_dim=12, context_dim=CONTEXT, grid=2),
                           {"ssl": drawn(COUNT, 12, 2, 2)}, 0),
    "features and a magnification": (
        node("grid.GridEmbedder", embed_dim=12, context_dim=CONTEXT, magnifications=["20x", "5x"], hidden=16, depth=1,
             heads=2, mlp=16),
        {"ssl": drawn(COUNT, 12, 2, 2), **LEVELS}, 0,
    ),
    "features as they are": (node("raw.FeatureTokens", embed_dim=CONTEXT, grid=2),
                             {"ssl": drawn(COUNT, CONTEXT, 2, 2)}, 0),
    "a feature as it is": (node("raw.FeatureVector", embed_dim=WIDTH), {"ssl": drawn(COUNT, WIDTH)}, 0),
    "omics": (node("omics.OmicsEmbedder", dim=WIDTH, mutation_genes=GENES, expression_genes=GENES), OMICS, 0),
    "gene sets": (node("omics.GeneSetEmbedder", gene_sets={"A": GENES[:2], "B": GENES[1:]}, dim=CONTEXT, width=8,
                       mutation_genes=GENES, expression_genes=GENES), OMICS, 0),
    "text": (node("text.TextEmbedder", model=str(ROOT / "configs" / "demo" / "tiny_clip.json"), trainable=True,
                  context_dim=CONTEXT), {"text": ["a lymph node", "colon", "skin", "a", "nuclei", "fat"]}, 0),
    "map": (node("rescaler.SpatialRescaler", in_channels=5, out_channels=2, stages=1),
            {"map": drawn(COUNT, 5, 2 * SIZE, 2 * SIZE)}, 2),
    "source image": (node("source_image.SourceImage", size=SIZE, channels=3, key="source"),
                     {"source": drawn(COUNT, 3, SIZE, SIZE).clamp(-1, 1)}, 3),
}  # fmt: skip
OTHERS = {"ConditionerSet", "LucidrainsScore", "ControlImage"}  # of three below, of its own network, of a ControlNet
BASES = {"Conditioner", "Score", "FeatureGrid"}
TRIPLES = {
    "class, score, feature": ("class", "score", "feature"),
    "text, omics, cells": ("text", "omics", "feature and its cells"),
    "gene sets, grid, map": ("gene sets", "features of a grid", "map"),
    "region, vector, source": ("feature and region", "class, as a vector", "source image"),
}


def build(conditioner: dict[str, Any], channels: int, **form: Any) -> LatentDiffusion:
    """A model on pixels, all of whose weights are drawn, as a fresh transformer tells its conditions nothing."""
    torch.manual_seed(0)
    params = {"in_channels": 3 + channels, "out_channels": 3, "image_size": SIZE, "hidden_size": WIDTH, "depth": 2,
              "num_heads": 2, **form}  # fmt: skip
    parts = {part.rpartition("/")[2] for part in instantiate_from_config(conditioner).null()}
    params |= {"context_dim": CONTEXT if "crossattn" in parts else None}
    params |= {"vector_dim": WIDTH if "vector" in parts else None}
    model = LatentDiffusion(
        {"target": "ldm.networks.dit.DiT", "params": params},
        {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage"}, conditioner, "flow", use_ema=False,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def check(model: LatentDiffusion, batch: dict[str, Any]) -> None:
    """A step of training reaches every weight; guidance samples, and counts."""
    model.loss({"image": IMAGES.clamp(-1, 1), **batch}, torch.Generator().manual_seed(2)).mean().backward()
    tokens = sum(value.shape[1] for part, value in model.null_condition().items() if part.endswith("crossattn"))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or (tokens == 1 and "cross_attn.q_linear" in name):
            continue  # one token has weight 1 whatever the query
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    model.eval()
    cond = {part: value[:2] for part, value in model.condition_of(batch).items()}
    plain, guided = (ldm.sample(model, cond, sampler=ldm.Sampler(steps=2, seed=1, guidance_scale=s, progress=False))
                     for s in (1.0, 4.0))  # fmt: skip
    assert guided.shape == (2, 3, SIZE, SIZE)
    assert guided.isfinite().all()
    assert (guided - plain).abs().max() > 1e-3
    null = {part: value.expand(2, *value.shape[1:]) for part, value in model.null_condition().items()}
    with torch.no_grad():
        told, x, time = model.denoiser(), IMAGES[:2], torch.ones(2)
        assert (told(x, time, cond) - told(x, time, null)).abs().max() > 1e-4


@pytest.mark.parametrize("name", CONDITIONERS)
def test_a_conditioner_trains_and_samples_with_the_transformer(name):
    conditioner, batch, channels = CONDITIONERS[name]
    check(build(conditioner, channels), batch)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", TRIPLES.values(), ids=TRIPLES)
def test_three_at_once_train_and_sample_with_the_transformer(names, form):
    parts = [CONDITIONERS[name] for name in names]
    members = {f"c{i}": conditioner for i, (conditioner, _, _) in enumerate(parts)}
    whole = {"target": "ldm.conditioners.compose.ConditionerSet", "params": {"conditioners": members}}
    batch = {key: value for _, values, _ in parts for key, value in values.items()}
    model = build(whole, sum(channels for *_, channels in parts), **FORMS[form])
    check(model, batch)
    scales = {name: 1.0 + i for i, name in enumerate(members)}  # one each: their differences are added
    cond = {part: value[:2] for part, value in model.condition_of(batch).items()}
    made = ldm.sample(model, cond, sampler=ldm.Sampler(steps=2, guidance_scale=scales, progress=False))
    assert made.isfinite().all()


def test_every_conditioner_is_tried_here():
    homes = [importlib.import_module(each.name) for each in pkgutil.iter_modules(ldm.conditioners.__path__,
                                                                                "ldm.conditioners.")]  # fmt: skip
    known = {
        name for home in homes for name, kind in vars(home).items()
        if inspect.isclass(kind) and issubclass(kind, Conditioner) and kind.__module__ == home.__name__
    }  # fmt: skip
    tried = {conditioner["target"].rpartition(".")[2] for conditioner, *_ in CONDITIONERS.values()}
    assert known - BASES - OTHERS == tried
