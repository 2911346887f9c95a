"""Text towers, from token ids to one vector per token: CLIP's (open_clip's, transformers') and BERTs, from disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from einops import repeat
from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer
from torch import Tensor, nn

from ldm.conditioners.text_transformer import TokenTransformer
from ldm.encoders.text_models import TOKEN_TRANSFORMER, TowerSource, read_config
from ldm.encoders.text_registry import LAYERS
from ldm.errors import UserError
from ldm.foreign.modules import as_large_as, made
from ldm.interop.checkpoint import read_checkpoint, state_dict_of
from ldm.interop.text_names import is_transformers, to_open_clip
from ldm.interop.weights import check_finite

# of open_clip's text settings: those that shape the tower, and those of the pooling after it, which is not used
SHAPE = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "ls_init_value"}
BERT = {  # of a BERT's config.json: what shapes it; the rest says where its code and its weights are
    "attention_probs_dropout_prob", "hidden_act", "hidden_dropout_prob", "hidden_size", "initializer_range",
    "intermediate_size", "layer_norm_eps", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "pad_token_id", "position_embedding_type", "type_vocab_size", "vocab_size",
}  # fmt: skip
POOLING = {"pool_type", "proj_type", "proj_bias", "pad_id", "eos_id", "output_tokens", "final_ln_after_pool"}


def build_tower(source: TowerSource, layer: str = "last") -> ClipTower | BertTower | TokenTransformer:
    """The text tower of a model with its weights, in eval mode; layer `penultimate` leaves its last block out.

    >>> shape = {"width": 8, "heads": 2, "layers": 2, "vocab_size": 16, "context_length": 4}
    >>> tower = build_tower(TowerSource("tiny", "", {"text_cfg": shape}), layer="penultimate")
    >>> tower(torch.tensor([[14, 3, 15, 15]])).shape, len(tower.blocks)
    (torch.Size([1, 4, 8]), 1)
    """
    if layer not in LAYERS:
        raise UserError(f"`layer` of a text model is one of {', '.join(LAYERS)}; got '{layer}'.")
    kind = BertTower if source.is_bert else ClipTower
    kind = TokenTransformer if source.config["text_cfg"].get(TOKEN_TRANSFORMER) else kind
    try:
        if source.weights is None:
            tower = kind(source.config)
        else:
            state = state_dict_of(read_checkpoint(source.weights), source.weights)
            with as_large_as(state, f"the text model '{source.name}'"):
                tower = made(lambda: kind(source.config))
            _load_tower(tower, source, state)
    except UserError:
        raise
    except Exception as error:  # a module raises whatever it stumbles over in a config of the wrong kind
        reason = str(error).partition("\n")[0]
        raise UserError(f"the text model '{source.name}' cannot be built by its config: {reason}") from error
    if layer == "penultimate":
        del tower.blocks[-1]
    return tower.eval()


class ClipTower(nn.Module):
    """The text tower of a CLIP: ids (B,L) -> (B,L,D), after the final norm. Names are those of open_clip.

    L is any multiple of `context_length`: positions start anew in every chunk, attention looks back over all of L.
    """

    layers, probe = "transformer.resblocks.", "ln_final.weight"

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        text = dict(config["text_cfg"])
        for key, value in text.items():
            if key not in SHAPE | POOLING and value:
                raise UserError(f"text towers with `{key}` in their config are not supported; it is {value!r}.")
        text = {key: value for key, value in text.items() if key in SHAPE}
        width, heads = text.get("width", 512), text.get("heads", 8)
        if width % heads:
            raise UserError(f"a text tower's width is a multiple of its heads; its config has {width} and {heads}.")
        act = QuickGELU if config.get("quick_gelu") else nn.GELU
        full = TextTransformer(**text, output_dim=None, act_layer=act, norm_layer=LayerNorm)
        self.token_embedding, self.positional_embedding = full.token_embedding, full.positional_embedding
        self.transformer, self.ln_final = full.transformer, full.ln_final
        self.width, self.heads, self.context_length = full.width, full.heads, full.context_length
        self.bos, self.eos = full.vocab_size - 2, full.vocab_size - 1
        self.vocab_size = full.vocab_size

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.resblocks

    @property
    def inner(self) -> nn.Module:
        """What a checkpoint's names are the names of."""
        return self

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep (B,L) bool: tokens that others may look at; None is all."""
        length = ids.shape[1]
        positions = self.positional_embedding.repeat(length // self.context_length, 1)  # (L,D)
        x = self.token_embedding(ids) + positions
        mask = torch.full((length, length), float("-inf"), device=ids.device).triu(1)
        if keep is not None:
            hidden = torch.zeros(keep.shape, device=ids.device).masked_fill(~keep, float("-inf"))
            mask = repeat(mask + hidden[:, None], "b q k -> (b heads) q k", heads=self.heads)
        return self.ln_final(self.transformer(x, attn_mask=mask))


class BertTower(nn.Module):
    """A BERT as text tower (BiomedCLIP): ids (B,L), keep (B,L) -> last hidden states (B,L,D). Needs `transformers`."""

    layers, probe = "encoder.layer.", "embeddings.word_embeddings.weight"

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        try:
            from transformers import AutoConfig, AutoModel
        except ImportError:
            raise UserError(
                f"the text tower {config['text_cfg']['hf_model_name']} needs the package transformers: "
                "`pip install transformers`."
            ) from None
        own = dict(config["hf_config"])
        kind = own.pop("model_type", None)
        if kind != "bert":
            raise UserError(f"the text tower's config.json is of a '{kind}' model; a BERT is supported.")
        settings = AutoConfig.for_model(kind, **{name: value for name, value in own.items() if name in BERT})
        self.bert = AutoModel.from_config(settings, add_pooling_layer=False)
        self.width, self.vocab_size = settings.hidden_size, settings.vocab_size
        self.context_length = config["text_cfg"].get("context_length", 77)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.bert.encoder.layer

    @property
    def inner(self) -> nn.Module:
        return self.bert

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        place = torch.arange(ids.shape[1], device=ids.device) % self.context_length
        keep = torch.ones_like(ids) if keep is None else keep.long()
        out = self.bert(
            input_ids=ids, attention_mask=keep, position_ids=place.expand_as(ids), token_type_ids=torch.zeros_like(ids)
        )
        return out.last_hidden_state


def _load_tower(tower: ClipTower | BertTower, source: TowerSource, state: Mapping[str, Tensor]) -> None:
    """Fill a tower from a checkpoint that holds it under any prefix, in open_clip's or transformers' names."""
    path = source.weights
    if isinstance(tower, ClipTower) and is_transformers(state):
        _check_settings(source)
        state = to_open_clip(state)
    prefixes = [name.removesuffix(tower.probe) for name in state if name.endswith(tower.probe)]
    prefix = min((p for p in prefixes if p == "" or p.endswith(".")), key=len, default=None)
    wanted = tower.inner.state_dict()
    misfit = f"{path} does not fit the text model '{source.name}'"
    if prefix is None:
        raise UserError(f"{misfit}: it holds no {tower.probe}.")
    given = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    missing = [name for name in wanted if name not in given]
    surplus = [name for name in given if name.startswith(tower.layers) and name not in wanted]
    if missing or surplus:
        what = f"{missing[0]} is missing" if missing else f"{surplus[0]} is more than its config has"
        raise UserError(f"{misfit}: {what}. Is it of another model?")
    for name, value in wanted.items():
        if given[name].shape != value.shape:
            shapes = f"{tuple(given[name].shape)}, expected {tuple(value.shape)}"
            raise UserError(f"{misfit}: {name} is {shapes}. Is it of another model?")
    taken = {name: given[name].float() for name in wanted}
    check_finite(taken, path)
    tower.inner.load_state_dict(taken)


def _check_settings(source: TowerSource) -> None:
    """UserError where the config.json beside a transformers checkpoint contradicts the config: weights cannot tell."""
    beside = source.weights.with_name("config.json")
    if not beside.is_file():
        return
    told = read_config(beside)
    pairs = {"quick_gelu": (bool(told["quick_gelu"]), bool(source.config.get("quick_gelu")))}
    pairs["heads"] = (told["text_cfg"]["heads"], source.config["text_cfg"].get("heads", 8))
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise UserError(
                f"{beside} says {name}: {theirs}, the text model '{source.name}' has {ours}. Give the folder as "
                "`model`, or the architecture that fits (such as ViT-L-14-quickgelu for OpenAI's weights)."
            )


def tower_sha256(tower: nn.Module) -> str:
    """SHA-256 of a tower's weights, whatever file they came from.

    >>> tower = torch.nn.Linear(2, 2)
    >>> tower_sha256(tower) == tower_sha256(tower.double()), len(tower_sha256(tower))
    (True, 64)
    """
    digest = hashlib.sha256()
    for name, value in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
