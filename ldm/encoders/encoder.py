"""Tile encoders: a timm trunk, its preprocessing and its pooling, behind one callable.

    encoder = load_encoder("hipt-vits16", device="cuda")       # a published encoder, weights from disk
    encoder = load_encoder("data/models/demo-encoder")         # an encoder folder: encoder.yaml + model.safetensors
    features = encoder(images)                                 # (B,3,H,W) in [-1,1] -> (B,D) float32

Nothing is downloaded. Weights of published encoders (`ldm.encoders.published`) are looked for at `weights`, then in
`$HISTOLDM_WEIGHTS/<name>/`, by default `~/.cache/histoldm/weights/<name>/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import SwiGLUPacked, to_2tuple
from torch import Tensor, nn

from ldm.devices import pick_device
from ldm.encoders.preprocessing import normalise, prepare
from ldm.encoders.registry import REGISTRY, weights_home
from ldm.encoders.spec import EncoderSpec
from ldm.encoders.timm_networks import make_network
from ldm.encoders.weight_names import network_weights
from ldm.errors import UserError, suggest
from ldm.foreign.modules import as_large_as
from ldm.foreign.paths import inside, only_within
from ldm.foreign.settings import read_yaml
from ldm.interop.checkpoint import read_checkpoint, state_dict_of
from ldm.interop.weights import check_finite

STANDARDISATION = ("feature_mean", "feature_std")


class ConvStem(nn.Module):
    """CTransPath's patch embedding: two strided 3x3 convolutions, a 1x1 and a norm. (B,3,H,W) -> (B,H/4,W/4,C)."""

    def __init__(self, img_size=224, patch_size=4, in_chans=3, embed_dim=96, norm_layer=nn.LayerNorm, **_):
        super().__init__()
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        self.grid_size = tuple(size // patch for size, patch in zip(self.img_size, self.patch_size, strict=True))
        widths = [in_chans, embed_dim // 8, embed_dim // 4]
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))
        self.norm = norm_layer(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


LAYERS = {"SwiGLUPacked": SwiGLUPacked, "ConvStem": ConvStem}


class AttentionPool(nn.Module):
    """One learned query attends to all tokens, as in CoCa: (B,L,C) -> (B,D), with a norm behind it."""

    def __init__(self, dim: int, context_dim: int, heads: int = 8):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.attn = nn.MultiheadAttention(dim, heads, kdim=context_dim, vdim=context_dim, batch_first=True)
        self.ln_q, self.ln_k, self.norm = nn.LayerNorm(dim), nn.LayerNorm(context_dim), nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        keys, query = self.ln_k(tokens), self.ln_q(self.query).expand(len(tokens), -1, -1)
        return self.norm(self.attn(query, keys, keys, need_weights=False)[0][:, 0])


def token_map(model: nn.Module, features: Tensor) -> Tensor:
    """timm's `forward_features`, tokens (B,L,C) or a map (B,C,h,w) or (B,h,w,C), as a map (B,C,h,w).

    >>> model = make_network("vit_tiny_patch16_224", 0, {"depth": 1})
    >>> token_map(model, torch.zeros(2, 1 + 14 * 14, 192)).shape
    torch.Size([2, 192, 14, 14])
    """
    if features.ndim == 3:  # class token, registers, patches
        prefix = getattr(model, "num_prefix_tokens", 0)
        side = round((features.shape[1] - prefix) ** 0.5)
        return rearrange(features[:, prefix:], "b (h w) c -> b c h w", h=side)
    return rearrange(features, "b h w c -> b c h w") if getattr(model, "output_fmt", "NCHW") == "NHWC" else features


def pooled_tokens(cells: Tensor, side: int, name: str) -> Tensor:
    """A map (B,C,h,w) as (B,side*side,C): the mean of its cells in each of side x side parts, row by row.

    UserError: more parts than cells.

    >>> pooled_tokens(torch.zeros(2, 384, 14, 14), 4, "mine").shape
    torch.Size([2, 16, 384])
    """
    height, width = cells.shape[-2:]
    if not 1 <= side <= min(height, width):
        raise UserError(
            f"encoder '{name}' has {height} x {width} patch tokens; pool them to 1 to {min(height, width)} along each "
            f"side, not {side}"
        )
    return F.adaptive_avg_pool2d(cells, side).flatten(2).mT


class Encoder(nn.Module):
    """A tile encoder. Call it: images (B,3,H,W) float in [-1,1] -> features (B,D) float32. Any H, W: it resizes itself.

    Attributes: spec (an `EncoderSpec`); name, licence, source, dim, tile_size (px), mpp (µm per px or None) of it;
    weights_path: the file its weights came from.
    """

    weights_path: Path | None = None

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        self.spec = spec
        named = {key: LAYERS[value] for key, value in spec.kwargs.items() if isinstance(value, str) and value in LAYERS}
        self.model = make_network(spec.arch, 0, spec.kwargs | named)
        cut = spec.kwargs.get("features_only")
        self.token_dim = self.model.feature_info.channels()[-1] if cut else self.model.num_features
        dim = self.token_dim * {"token+avg": 2, "grid": spec.grid**2}.get(spec.pooling, 1)
        if spec.pooling == "attention":
            dim = spec.dim
            self.pooler = AttentionPool(dim, self.token_dim)
        if spec.head:
            layers: list[nn.Module] = []
            for narrow, wide in pairwise([dim, *spec.head]):
                layers += [nn.Linear(narrow, wide, bias=spec.head_bias), nn.GELU()]
            self.head, dim = nn.Sequential(*layers[:-1]), spec.head[-1]
        if dim != spec.dim:
            raise UserError(f"encoder {spec.name}: {spec.arch} with {spec.pooling} gives {dim} values, not {spec.dim}")
        if spec.standardise:
            self.register_buffer("feature_mean", torch.zeros(dim))
            self.register_buffer("feature_std", torch.ones(dim))

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def licence(self) -> str:
        return self.spec.licence

    @property
    def source(self) -> str:
        return self.spec.source

    @property
    def dim(self) -> int:
        return self.spec.dim

    @property
    def tile_size(self) -> int:
        return self.spec.tile_size

    @property
    def mpp(self) -> float | None:
        return self.spec.mpp

    def forward(self, images: Tensor) -> Tensor:
        return self.features(self._inputs(images))

    def with_tokens(self, images: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """The features (B,D) of images, and of the same pass their patch tokens pooled to (B,side*side,C), float32."""
        raw = self._raw(self._inputs(images))
        return self._finished(raw), pooled_tokens(token_map(self.model, raw), side, self.name).float()

    def _inputs(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B,3,H,W), got {tuple(images.shape)}")
        return prepare(images, self.spec)

    def normalise(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) in [0, 1] -> the network's input, same shape."""
        return normalise(images, self.spec)

    def features(self, inputs: Tensor) -> Tensor:
        """The network's input (B,3,S,S) -> features (B,D) float32."""
        return self._finished(self._raw(inputs))

    def _raw(self, inputs: Tensor) -> Tensor:
        """The network's input -> tokens (B,L,C) or a map, as timm's `forward_features` gives them."""
        try:
            if self.spec.kwargs.get("features_only"):
                return self.model(inputs)[-1]
            return self.model.forward_features(inputs)
        except AssertionError as error:  # of timm, where a network takes one size alone
            size = f"its input_size of {inputs.shape[-1]} px"
            raise UserError(f"encoder {self.name}: {self.spec.arch} does not take {size} ({error}).") from error

    def _finished(self, raw: Tensor) -> Tensor:
        features = self.pool(raw).float()
        return (features - self.feature_mean) / self.feature_std if self.spec.standardise else features

    def pool(self, raw: Tensor) -> Tensor:
        """What `forward_features` gives -> (B,D), with the head behind the pooling, not standardised."""
        features = self._pooled(raw)
        if self.spec.head:
            features = self.head(features)
        return F.normalize(features, dim=1) if self.spec.unit_length else features

    def _pooled(self, raw: Tensor) -> Tensor:
        pooling, prefix = self.spec.pooling, getattr(self.model, "num_prefix_tokens", 0)
        if pooling == "attention":
            return self.pooler(raw)
        if raw.ndim == 3 and pooling == "token":
            return raw[:, 0]
        if raw.ndim == 3 and pooling == "token+avg":
            return torch.cat([raw[:, 0], raw[:, prefix:].mean(1)], 1)
        cells = self.spec.grid if pooling == "grid" else 1
        return F.adaptive_avg_pool2d(token_map(self.model, raw), cells).flatten(1)  # (B,C*cells*cells)


def load_encoder(name_or_folder: str | Path, weights: str | Path | None = None, device: str = "cpu") -> Encoder:
    """A tile encoder in eval mode, without gradients for its weights.

    name_or_folder: a name of `REGISTRY`, or an encoder folder (encoder.yaml, model.safetensors).
    weights: a weight file, or a folder that holds it, instead of the usual place.

    Raises UserError: unknown name; weights missing (it says where to get them, their licence and where to put them),
    unreadable, or not of this encoder.

    >>> encoder = load_encoder(models / "demo-encoder")
    >>> encoder(torch.zeros(2, 3, 256, 256)).shape
    torch.Size([2, 512])
    """
    spec, path = find_encoder(name_or_folder, weights)
    with as_large_as(read_weights(path, spec.checkpoint_key), f"encoder '{spec.name}'"):
        encoder = Encoder(spec)
    load_weights(encoder, path)
    encoder.weights_path = path
    return encoder.eval().requires_grad_(False).to(pick_device(str(device)))


def find_encoder(name_or_folder: str | Path, weights: str | Path | None = None) -> tuple[EncoderSpec, Path]:
    """The specification of an encoder and its weight file, which exists.

    >>> spec, path = find_encoder(models / "demo-encoder")
    >>> spec.dim, path.name
    (512, 'model.safetensors')
    """
    name, folder = str(name_or_folder), Path(name_or_folder)
    if name in REGISTRY:
        spec = REGISTRY[name]
        if spec.unloadable:
            raise UserError(
                f"encoder '{name}' cannot be loaded here: {spec.unloadable}. Extract its features where its code runs "
                f"({spec.source}), with TRIDENT or the like, and import them: `python -m data_prep.import_features "
                f"--name {name}`."
            )
        home = weights_home() / (spec.folder or name)
    elif folder.is_dir():
        spec, home = _read_spec(folder / "encoder.yaml"), folder
    else:
        raise UserError(f"'{name}' is neither an encoder folder nor the name of an encoder{suggest(name, REGISTRY)}")
    path = home / spec.file if name in REGISTRY else inside(home, spec.file)
    if weights is not None:
        path = Path(weights) / spec.file if Path(weights).is_dir() else Path(weights)
    if not path.is_file():
        raise UserError(
            f"weights of encoder '{spec.name}' are not at {path}. Get {spec.file} from {spec.source} "
            f"(licence: {spec.licence}{'; gated: ask for access there' * spec.gated}) and put it there, or say where "
            f"it is (weights=, --weights; $HISTOLDM_WEIGHTS replaces {weights_home()})."
        )
    return spec, path


def _read_spec(path: Path) -> EncoderSpec:
    """The specification in an encoder.yaml. Its keys `training` and `figures` are a record for people."""
    if not path.is_file():
        raise UserError(f"encoder folder {path.parent} has no {path.name}")
    with only_within(path.parent):
        record = read_yaml(path, "the encoder's specification")
    if not isinstance(record, dict):
        raise UserError(f"{path} holds no specification of an encoder")
    known = [entry.name for entry in fields(EncoderSpec)]
    for key in record.keys() - {*known, "training", "figures"}:
        raise UserError(f"{path}: unknown key '{key}'{suggest(key, known)}")
    try:
        return EncoderSpec(**{key: value for key, value in record.items() if key in known})
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def load_weights(encoder: Encoder, path: Path) -> None:
    """Load a checkpoint into an encoder: every weight must be there and fit. UserError names those that do not.

    >>> spec, path = find_encoder(models / "demo-encoder")
    >>> encoder = Encoder(spec)
    >>> load_weights(encoder, path)
    >>> bool((encoder.feature_std != 1).all())
    True
    """
    spec = encoder.spec
    state = read_weights(path, spec.checkpoint_key)
    stored = {key: state.pop(key) for key in STANDARDISATION if key in state}
    name = f"encoder '{spec.name}' ({spec.arch})"
    try:
        state = network_weights(state, spec, encoder.model) | (stored if spec.standardise else {})
    except KeyError as error:
        raise UserError(f"{path} is not the weight file of {name}: it lacks {error.args[0]}") from None
    fill(encoder, state, path, name)


def fill(network: nn.Module, state: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Load a state dict, every tensor of which must be there and fit. UserError names those that do not.

    path, name: of the file and of what it should hold, for the message.

    >>> fill(nn.Linear(1, 1), {"weight": torch.zeros(1, 2)}, Path("mine.pth"), "my head")
    Traceback (most recent call last):
    ldm.errors.UserError: mine.pth is not the weight file of my head: it lacks bias; holds weight (1, 2), not (1, 1)
    """
    expected = network.state_dict()
    counters = {key: value for key, value in expected.items() if key.endswith("num_batches_tracked")}
    state = {**counters, **state}  # old files lack them, and nothing but training uses them
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    misfit = [
        f"{key.removeprefix('model.')} {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if missing or unexpected or misfit:
        problems = (("lacks", missing), ("holds unknown", unexpected), ("holds", misfit))
        said = "; ".join(
            f"{verb} {', '.join(key.removeprefix('model.') for key in keys[:3])}{_more(keys)}"
            for verb, keys in problems
            if keys
        )
        raise UserError(f"{path} is not the weight file of {name}: it {said}")
    check_finite(state, path)
    network.load_state_dict(state)


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - 3} more" if len(keys) > 3 else ""


def read_weights(path: Path, key: str = "") -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file, those under `key` where it has it.

    >>> torch.save({"teacher": {"weight": torch.zeros(2)}, "epoch": 3}, "dino.pth")
    >>> list(read_weights(Path("dino.pth"), "teacher"))
    ['weight']
    """
    content = read_checkpoint(path)
    inner = content.get(key) if isinstance(content, Mapping) else None  # converted files hold the weights themselves
    return state_dict_of(inner if isinstance(inner, Mapping) else content, path)
