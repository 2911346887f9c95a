"""What defines a tile encoder except its weights, and in words what happens to an image before its network."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ldm.errors import UserError, suggest
from ldm.foreign.shape import ABOVE_0, COUNT, MAPPING, NUMBER, SWITCH, TEXT, Is, check_shape, maybe, so_many

POOLINGS = ("token", "avg", "token+avg", "grid", "attention")
INTERPOLATIONS = ("bilinear", "bicubic")
POSITIONS = ("", "size", "antialias", "scale")


_SIDE = Is("a whole number from 1 to 8192", lambda value: type(value) is int and 1 <= value <= 8192)
_FORM = {
    **dict.fromkeys(("name", "arch", "licence", "source", "unloadable", "file", "folder", "checkpoint_key"), TEXT),
    **dict.fromkeys(("head_bias", "unit_length", "pillow", "standardise", "gated", "non_commercial"), SWITCH),
    **dict.fromkeys(("dim", "grid", "tile_size", "input_size"), _SIDE),
    "mpp": maybe(ABOVE_0), "kwargs": MAPPING, "head": [_SIDE], "resize": maybe(_SIDE), "tokens": COUNT,
    "mean": so_many(3, NUMBER), "std": so_many(3, ABOVE_0),
}  # fmt: skip


@dataclass(frozen=True)
class EncoderSpec:
    """All that defines an encoder except its weights.

    name, source, licence: what it is called, where its weights come from, on what terms.
    gated: its source wants an account and consent. non_commercial: the terms forbid commercial use.
    unloadable: why it is not made here ("": it is); its features can be imported.
    arch, kwargs: `timm.create_model(arch, num_classes=0, **kwargs)`; layers are given by name.
    pooling: "token" (class token), "avg" (mean of patch tokens or feature map), "token+avg" (both, concatenated, as
        Virchow does), "grid" (mean over each of grid x grid cells of the map; channel-major, then row, column),
        "attention" (one learned query that attends to all tokens, as in CONCH).
    head: widths of the linear layers behind the pooling, GELU between them; head_bias: they have biases.
    unit_length: features have length 1.
    tile_size, mpp: its field of view, tile_size px at mpp µm per px (None: any).
    resize, input_size: tiles are resized to resize px (None: input_size), of which the middle input_size px go in.
    interpolation: bilinear or bicubic, both with antialiasing. pillow: in whole grey levels as Pillow resizes, and with
        it torchvision's transforms of pictures; False: in floating point.
    mean, std: of the network's input, for images in [0, 1].
    positions: how position embeddings come from the checkpoint's grid to the input's: bicubic by "size", by size with
        "antialias", or as DINO by "scale", with 0.1 added to the number of patches; "": they have its grid.
    standardise: features are (f - feature_mean) / feature_std, both stored beside the weights.
    dim: length of the feature. tokens: patch tokens, or cells of the feature map, along each side (0: not said).
    file: name of the weight file. folder: that it lies in, in the folder of all weights ("": its name).
    checkpoint_key: the entry of the file that holds the weights ("": the file itself).
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
    head: tuple[int, ...] = ()
    head_bias: bool = True
    unit_length: bool = False
    tile_size: int = 224
    input_size: int = 224
    resize: int | None = None
    interpolation: str = "bicubic"
    pillow: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    positions: str = ""
    standardise: bool = False
    tokens: int = 0
    gated: bool = False
    non_commercial: bool = False
    unloadable: str = ""
    file: str = "model.safetensors"
    folder: str = ""
    checkpoint_key: str = ""

    def __post_init__(self):
        check_shape(vars(self), _FORM, f"encoder {self.name}")
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        object.__setattr__(self, "head", tuple(int(width) for width in self.head))
        for name, allowed in (
            ("pooling", POOLINGS),
            ("interpolation", INTERPOLATIONS),
            ("positions", POSITIONS),
        ):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise UserError(f"encoder {self.name}: unknown {name} '{value}'{suggest(value, allowed)}")
        if (self.resize or self.input_size) < self.input_size:
            raise UserError(
                f"encoder {self.name}: tiles resized to {self.resize} px have no middle of {self.input_size} px; "
                "resize is at least input_size"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as encoder.yaml holds them: what differs from the defaults, and what every encoder says."""
        plain = asdict(self) | {"mean": list(self.mean), "std": list(self.std), "head": list(self.head)}
        return {name: value for name, value in plain.items() if name not in LATER or value != LATER[name]}

    def preprocessing(self) -> dict[str, Any]:
        """What happens between a tile and a feature, for the attributes of stores and models."""
        names = ("tile_size", "input_size", "interpolation", "mean", "std", "pooling", "grid", "standardise")
        own = self.as_dict()
        changing = ("resize", "pillow", "positions", "head", "head_bias", "unit_length")
        return {name: own[name] for name in (*names, *changing) if name in own}


# fields that an encoder.yaml of before may lack, and that are not written where they say nothing
LATER: dict[str, Any] = {
    "head": [],
    "head_bias": True,
    "unit_length": False,
    "resize": None,
    "pillow": False,
    "positions": "",
    "tokens": 0,
    "gated": False,
    "unloadable": "",
    "folder": "",
}
