"""Published tile encoders: architecture, preprocessing, licence, and where their weights come from.

Numbers are those of the authors' releases. `mpp` is the resolution that the authors trained for or recommend; ImageNet
encoders have none. Non-commercial licences taint features and models conditioned on them, so they travel with both.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ldm.errors import UserError, suggest

POOLINGS = ("token", "avg", "token+avg", "grid")
INTERPOLATIONS = ("bilinear", "bicubic")
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class EncoderSpec:
    """All that defines an encoder except its weights.

    name, source, licence: what it is called, where its weights come from, on what terms.
    non_commercial: the terms forbid commercial use.
    arch, kwargs: `timm.create_model(arch, num_classes=0, **kwargs)`; layers are given by name.
    pooling: "token" (class token), "avg" (mean of patch tokens or feature map), "token+avg" (both, concatenated, as
        Virchow does), "grid" (mean over each of grid x grid cells of the map; channel-major, then row, column).
    tile_size, mpp: its field of view, tile_size px at mpp µm per px (None: any), resized to input_size px.
    mean, std: of the network's input, for images in [0, 1].
    standardise: features are (f - feature_mean) / feature_std, both stored beside the weights.
    dim: length of the feature (checked when the encoder is made).
    file: name of the weight file. checkpoint_key: the entry of the file that holds the weights ("": the file itself).
    """

    name: str
    arch: str
    licence: str
    source: str
    dim: int
    mpp: float | None = 0.5
    kwargs: dict[str, Any] = field(default_factory=dict)
    pooling: str = "token"
    grid: int = 1
    tile_size: int = 224
    input_size: int = 224
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    standardise: bool = False
    non_commercial: bool = False
    file: str = "model.safetensors"
    checkpoint_key: str = ""

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        for name, allowed in (("pooling", POOLINGS), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise UserError(f"encoder {self.name}: unknown {name} '{value}'{suggest(value, allowed)}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as encoder.yaml holds them."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    def preprocessing(self) -> dict[str, Any]:
        """What happens between a tile and a feature, for the attributes of stores and models."""
        names = ("tile_size", "input_size", "interpolation", "mean", "std", "pooling", "grid", "standardise")
        return {name: self.as_dict()[name] for name in names}


def weights_home() -> Path:
    """The folder that holds one folder of weights per published encoder.

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, HISTOLDM_WEIGHTS="/scratch/weights"):
    ...     print(weights_home())
    /scratch/weights
    """
    return Path(os.environ.get("HISTOLDM_WEIGHTS") or "~/.cache/histoldm/weights").expanduser()


def _registry() -> dict[str, EncoderSpec]:
    swiglu = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
    dynamic = {"img_size": 224, "dynamic_img_size": True}
    nc_nd = "CC BY-NC-ND 4.0, gated: academic, non-commercial use"
    specs = [
        # Chen et al. 2024, "Towards a general-purpose foundation model for computational pathology"
        EncoderSpec(
            name="uni", arch="vit_large_patch16_224", dim=1024, kwargs={**dynamic, "init_values": 1e-5},
            tile_size=256, interpolation="bilinear", licence=nc_nd, non_commercial=True,
            source="https://huggingface.co/MahmoodLab/UNI", file="pytorch_model.bin",
        ),
        EncoderSpec(
            name="uni2-h", arch="vit_giant_patch14_224", dim=1536,
            kwargs={**dynamic, **swiglu, "patch_size": 14, "depth": 24, "num_heads": 24, "embed_dim": 1536,
                    "init_values": 1e-5, "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8},
            tile_size=256, interpolation="bilinear", licence=nc_nd, non_commercial=True,
            source="https://huggingface.co/MahmoodLab/UNI2-h", file="pytorch_model.bin",
        ),
        # Zimmermann et al. 2024, "Virchow2: Scaling Self-Supervised Mixed Magnification Models in Pathology"
        EncoderSpec(
            name="virchow2", arch="vit_huge_patch14_224", dim=2560, pooling="token+avg",
            kwargs={**dynamic, **swiglu, "init_values": 1e-5, "mlp_ratio": 5.3375, "reg_tokens": 4, "global_pool": ""},
            licence=nc_nd, non_commercial=True,
            source="https://huggingface.co/paige-ai/Virchow2", file="pytorch_model.bin",
        ),
        # Saillard et al. 2024, H-optimus-0
        EncoderSpec(
            name="h-optimus-0", arch="vit_giant_patch14_reg4_dinov2", dim=1536,
            kwargs={"img_size": 224, "init_values": 1e-5}, licence="Apache-2.0",
            mean=(0.707223, 0.578729, 0.703617), std=(0.211883, 0.230117, 0.177517),
            source="https://huggingface.co/bioptimus/H-optimus-0", file="pytorch_model.bin",
        ),
        # Wang et al. 2022, "Transformer-based unsupervised contrastive learning for histopathological image
        # classification" (resolution: as Filiot et al. 2023 used it, following its authors)
        EncoderSpec(
            name="ctranspath", arch="swin_tiny_patch4_window7_224", dim=768, pooling="avg", mpp=1.0,
            kwargs={"embed_layer": "ConvStem"}, interpolation="bilinear",
            licence="GPL-3.0, for non-commercial academic purposes", non_commercial=True,
            source="https://github.com/Xiyue-Wang/TransPath", file="ctranspath.pth", checkpoint_key="model",
        ),
        # Chen et al. 2022, "Scaling Vision Transformers to Gigapixel Images via Hierarchical Self-Supervised Learning"
        EncoderSpec(
            name="hipt-vits16", arch="vit_small_patch16_224", dim=384, kwargs=dynamic, tile_size=256, input_size=256,
            mean=HALF, std=HALF, licence="GPL-3.0, for non-commercial academic purposes", non_commercial=True,
            source="https://github.com/mahmoodlab/HIPT (HIPT_4K/Checkpoints, Git LFS)", file="vit256_small_dino.pth",
            checkpoint_key="teacher",
        ),
        # Filiot et al. 2023, "Scaling Self-Supervised Learning for Histopathology with Masked Image Modeling". The
        # authors' extractor loads the student; the transformers release is the entry "phikon".
        EncoderSpec(
            name="ibot-vitb16", arch="vit_base_patch16_224", dim=768, kwargs=dynamic, tile_size=256, input_size=256,
            licence="Owkin non-commercial licence", non_commercial=True,
            source="https://github.com/owkin/HistoSSLscaling", file="ibot_vit_base_pancan.pth",
            checkpoint_key="student",
        ),
        EncoderSpec(
            name="phikon", arch="vit_base_patch16_224", dim=768, kwargs=dynamic, interpolation="bilinear",
            licence="Owkin non-commercial licence", non_commercial=True,
            source="https://huggingface.co/owkin/phikon", file="pytorch_model.bin",
        ),
        # Kang et al. 2023, "Benchmarking Self-Supervised Learning on Diverse Pathology Datasets"
        EncoderSpec(
            name="lunit-dino-vits16", arch="vit_small_patch16_224", dim=384, kwargs=dynamic,
            mean=(0.70322989, 0.53606487, 0.66096631), std=(0.21716536, 0.26081574, 0.20723464),
            licence="Lunit public licence, non-commercial research", non_commercial=True,
            source="https://github.com/lunit-io/benchmark-ssl-pathology/releases/tag/pretrained-weights",
            file="dino_vit_small_patch16_ep200.torch",
        ),
        # Supervised on ImageNet: the conditioning of the NAIP model, and a baseline
        EncoderSpec(
            name="vitb16-imagenet", arch="vit_base_patch16_224", dim=768, kwargs=dynamic, mpp=None, mean=HALF, std=HALF,
            licence="Apache-2.0", source="https://huggingface.co/timm/vit_base_patch16_224.augreg2_in21k_ft_in1k",
        ),
        EncoderSpec(
            name="resnet50-imagenet", arch="resnet50", dim=2048, pooling="avg", mpp=None,
            licence="Apache-2.0", source="https://huggingface.co/timm/resnet50.a1_in1k",
        ),
    ]  # fmt: skip
    return {spec.name: spec for spec in specs}


REGISTRY = _registry()
