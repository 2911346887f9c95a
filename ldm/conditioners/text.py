"""Conditioning on text: the token sequence of a text tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.conditioners.base import About, Conditioner, as_list, where_kept
from ldm.conditioners.text_tokens import ClipWords, FileWords, capacity, lay_out
from ldm.conditioners.text_towers import build_tower, tower_sha256
from ldm.encoders.text_models import find_tower
from ldm.encoders.text_registry import LAYOUTS, PADS
from ldm.errors import UserError, note
from ldm.foreign.settings import settings_text


class TextEmbedder(Conditioner):
    """Captions as the token features of a text tower, {"crossattn": (B,L,D)}; the null is the empty caption.

    Reads batch[key]: captions (list of B), or their features (B,L,D) cached by `data_prep.encode_captions`; and, where
    the prompt names it, batch[modality_key] (list of B). L is chunks times the tower's context length, 77 for CLIP. The
    tower's weights are part of the model; the towers known by name are in `ldm.encoders.text_registry`.

    Args:
        model: a name of that registry, a local folder (open_clip_config.json or transformers' config.json, weights), a
            JSON model config, or an open_clip architecture such as ViT-L-14.
        weights: checkpoint on disk, in open_clip's or transformers' names. tokenizer: tokenizer.json of a BERT.
        chunks: context lengths that a caption may fill; what is longer is cut.
        layout: how a caption fills several chunks. joint: one beginning and one end over all of them, positions anew in
            each, one pass with attention over the whole length (PathLDM, arXiv:2309.00748). separate: each by itself.
        mask_padding: tokens do not look at padding (PathLDM and BERTs); Stable Diffusion has no such mask.
        pad: what fills the rest: eos (transformers' CLIP, so Stable Diffusion 1.x and PathLDM) or zero (open_clip).
        trainable: train the tower along; else it is frozen.
        layer: last, or penultimate (Stable Diffusion 2), both under the final norm.
        context_dim: project features to this dimension; None is the tower's own.
        prompt: what the tower reads, such as "{modality}: {text}". text_only: read the caption alone, whatever the
            prompt; a user who gives no modality gets that too.
    """

    def __init__(
        self,
        model: str,
        weights: str | None = None,
        tokenizer: str | None = None,
        chunks: int = 1,
        layout: str = "joint",
        mask_padding: bool = True,
        pad: str = "eos",
        trainable: bool = False,
        layer: str = "last",
        context_dim: int | None = None,
        prompt: str = "{text}",
        text_only: bool = False,
        dropout: float = 0.1,
        key: str = "text",
        modality_key: str = "modality",
    ):
        super().__init__(dropout)
        for name, value, allowed in (("layout", layout, LAYOUTS), ("pad", pad, PADS)):
            if value not in allowed:
                raise UserError(f"`{name}` of a text condition is one of {', '.join(allowed)}; got '{value}'.")
        if chunks < 1:
            raise UserError(f"`chunks` of a text condition is 1 or more; got {chunks}.")
        self.source = find_tower(model, weights, tokenizer)
        self.chunks, self.layout, self.mask_padding, self.pad, self.layer = chunks, layout, mask_padding, pad, layer
        self.prompt, self.trainable = "{text}" if text_only else prompt, trainable
        fields = _fields(self.prompt)
        self.modality_key = modality_key if "modality" in fields else None
        self.keys = (key, modality_key) if self.modality_key else (key,)
        words = self.source.tokenizer
        self._tokenizer = settings_text(words, "the tokenizer") if words else None
        self._words: ClipWords | FileWords | None = None
        self.cut_told = False
        self._null: tuple[Any, Tensor] | None = None

        self.tower = build_tower(self.source, layer).requires_grad_(trainable)
        self.project = nn.Identity() if context_dim is None else nn.Linear(self.tower.width, context_dim)
        self.filled = self.source.weights is not None
        self.register_load_state_dict_post_hook(_note_filled)

    @property
    def length(self) -> int:
        """Tokens of a condition, L."""
        return self.chunks * self.tower.context_length

    def train(self, mode: bool = True) -> TextEmbedder:
        super().train(mode)
        if not self.trainable:
            self.tower.eval()
        return self

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        value = self._value(batch, self.keys[0])
        if isinstance(value, Tensor):
            return {"crossattn": self.project(where_kept(self._cached(value), self._empty(), drop))}
        ids, keep = self.tokens(self.prompts(batch))
        if drop is not None:
            empty, kept = self.empty_tokens()
            drop = drop.to(ids.device)
            ids, keep = where_kept(ids, empty, drop), where_kept(keep, kept, drop)
        return {"crossattn": self.project(self.encode(ids, keep))}

    def null(self) -> dict[str, Tensor]:
        return {"crossattn": self.project(self._empty())}

    def prompts(self, batch: Mapping[str, Any]) -> list[str]:
        """What the tower reads for the samples of a batch."""
        texts = [_caption(text) for text in as_list(batch[self.keys[0]])]
        if self.modality_key is None:
            return texts if self.prompt == "{text}" else [self.prompt.format(text=text) for text in texts]
        kinds = as_list(self._value(batch, self.modality_key))
        return [
            self.prompt.format(text=text, modality=kind) if isinstance(kind, str) and kind.strip() else text
            for text, kind in zip(texts, kinds, strict=True)
        ]

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (B,L) of texts and which of them (B,L) are no padding, on the tower's device."""
        words = [self.words.ids(text) for text in texts]
        if not self.cut_told and (told := self.told_cut(words)):
            self.cut_told = True  # once: a training reads the same captions again and again
            note(told)
        ids, keep = self._laid_out(words)
        return ids.to(self._device), keep.to(self._device)

    def told_cut(self, words: Sequence[Sequence[int]]) -> str:
        """How many captions, by the ids of their words, are longer than the tower reads, and what the longest loses."""
        long = [ids for ids in words if len(ids) > self.capacity]
        if not long:
            return ""
        most = max(long, key=len)
        lost = self.words.text(most[self.capacity :])
        return (
            f"{len(long)} of {len(words)} captions are longer than {self.capacity} tokens and were cut; the longest "
            f"one, of {len(most)}, loses '{lost[:80]}{'...' * (len(lost) > 80)}'. More chunks keep more."
        )

    def encode(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Token ids (B,L), and which of them (B,L) are no padding -> features (B,L,D) of the tower, not projected."""
        if not self.mask_padding:
            keep = None
        parts = 1 if self.layout == "joint" else self.chunks
        ids = rearrange(ids, "b (parts n) -> (b parts) n", parts=parts)
        keep = None if keep is None else rearrange(keep.bool(), "b (parts n) -> (b parts) n", parts=parts)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            features = self.tower(ids, keep)
        return rearrange(features, "(b parts) n d -> b (parts n) d", parts=parts)

    def empty_tokens(self) -> tuple[Tensor, Tensor]:
        """Ids (1,L) of the empty caption and which of them are no padding."""
        ids, keep = self._laid_out([[]])
        return ids.to(self._device), keep.to(self._device)

    @property
    def capacity(self) -> int:
        """How many tokens of words there is room for; a longer caption is cut."""
        return capacity(self.chunks, self.tower.context_length, self.layout)

    @property
    def words(self) -> ClipWords | FileWords:
        """The tokenizer, made at its first use."""
        if self._words is None:
            self._words = ClipWords() if self._tokenizer is None else FileWords(self._tokenizer)
            if self._words.vocab_size > self.tower.vocab_size:
                raise UserError(
                    f"the text model '{self.source.name}' knows {self.tower.vocab_size} words, its tokenizer "
                    f"{self._words.vocab_size}; give token ids to `encode`, or a model of that vocabulary."
                )
        return self._words

    @property
    def _device(self) -> torch.device:
        return next(self.tower.parameters()).device

    def _laid_out(self, words: list[list[int]]) -> tuple[Tensor, Tensor]:
        if self.source.is_bert:
            bos, eos, pad = (self.words.special(name) for name in ("[CLS]", "[SEP]", "[PAD]"))
        else:
            bos, eos = self.tower.bos, self.tower.eos
            pad = eos if self.pad == "eos" else 0
        return lay_out(words, self.chunks, self.tower.context_length, self.layout, bos, eos, pad)

    def _empty(self) -> Tensor:
        """Features (1,L,D) of the empty caption; of a frozen tower they are computed once."""
        weight = next(self.tower.parameters())
        if weight.is_meta:  # the shape alone is asked for
            return weight.new_empty(1, self.length, self.tower.width)
        if self.trainable:
            return self.encode(*self.empty_tokens())
        state = (weight.data_ptr(), weight._version, weight.device, weight.dtype)
        if self._null is None or self._null[0] != state:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                self._null = (state, self.encode(*self.empty_tokens()))
        return self._null[1]

    def _cached(self, features: Tensor) -> Tensor:
        if self.trainable:
            raise UserError(f"a trainable text tower reads captions, not cached features: make '{self.keys[0]}' text.")
        if features.ndim != 3 or features.shape[1:] != (self.length, self.tower.width):
            raise UserError(
                f"the text condition takes captions, or features of shape (B, {self.length}, {self.tower.width}) made "
                f"by data_prep.encode_captions; got an array of shape {tuple(features.shape)}."
            )
        return features.to(next(self.tower.parameters()))

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if self.keys[0] not in values:
            raise UserError(f"a {self.modality_key} goes with a {self.keys[0]}; give that too.")
        texts = [_caption(text) for text in as_list(values[self.keys[0]])]
        if self.modality_key is None:
            return {self.keys[0]: texts}
        kinds = as_list(values.get(self.modality_key))
        count = max(len(texts), len(kinds))
        if {len(texts), len(kinds)} - {1, count}:
            raise UserError(f"{len(texts)} texts and {len(kinds)} modalities: give one, or equally many.")
        return {
            self.keys[0]: texts * count if len(texts) == 1 else texts,
            self.modality_key: kinds * count if len(kinds) == 1 else kinds,
        }

    def parse(self, key: str, text: str) -> str:
        return text

    def settings(self) -> dict[str, Any]:
        """All that features of a caption depend on, for what is cached."""
        about = {"model": self.source.name, "weights_sha256": tower_sha256(self.tower), "chunks": self.chunks}
        names = ("layout", "mask_padding", "pad", "layer", "prompt")
        return about | {name: getattr(self, name) for name in names}

    def check_data(self, metadata: Mapping[str, Any]) -> None:
        if not (self.filled or self.trainable):
            raise UserError(
                f"the text model '{self.source.name}' is frozen and has no weights: name them as `weights`, or train "
                "it along (`trainable: true`)."
            )
        known = metadata.get("conditions", {}).get(self.keys[0], {})
        if any(not name.strip() for name in known.get("names", ())):
            raise UserError(f"{known['source']} holds an empty caption; write one, or leave its tile out with `where`.")
        if "shape" not in known:
            return
        if self.trainable:
            raise UserError(f"{known['source']} holds cached features, which a trainable text tower cannot use.")
        for name, own in self.settings().items():
            if name != "model" and known.get(name) != own:
                raise UserError(
                    f"{known['source']} was made with {name} {known.get(name)}, the model's text tower has {own}; make "
                    "it again with `python -m data_prep.encode_captions`."
                )

    def describe(self) -> dict[str, About]:
        known = {self.keys[0]: About("text", model=self.source.name, licence=self.source.licence, prompt=self.prompt)}
        return known | ({self.modality_key: About("modality")} if self.modality_key else {})

    def portable(self) -> tuple[dict[str, Any], dict[str, str]]:
        params: dict[str, Any] = {"model": "./text_model.json", "weights": None, "tokenizer": None}
        files = {"text_model.json": self.source.as_json()}
        if self._tokenizer is not None:
            params["tokenizer"] = "./tokenizer.json"
            files["tokenizer.json"] = self._tokenizer
        return params, files


def _note_filled(module: TextEmbedder, _: Any) -> None:
    module.filled = True


def _fields(prompt: str) -> set[str]:
    """The names in a prompt's braces, checked."""
    try:
        fields = {name for _, name, _, _ in Formatter().parse(prompt) if name is not None}
    except ValueError as error:
        raise UserError(f"the prompt '{prompt}' cannot be read: {error}.") from error
    if "text" not in fields or fields - {"text", "modality"}:
        raise UserError(f"a prompt has {{text}}, and maybe {{modality}}, as '{{modality}}: {{text}}'; got '{prompt}'.")
    return fields


def _caption(text: Any) -> str:
    if not isinstance(text, str):
        raise UserError(f"a caption is text; got {text!r}.")
    if not text.strip():
        raise UserError("a caption is empty; to generate without text, leave the condition out.")
    return text
