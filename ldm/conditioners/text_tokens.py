"""From captions to token ids: words to ids, and ids to chunks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from open_clip.tokenizer import SimpleTokenizer, basic_clean, whitespace_clean
from torch import Tensor

from ldm.errors import UserError


class ClipWords:
    """CLIP's byte-pair words, whose vocabulary open_clip brings along."""

    vocab_size = 49408

    @staticmethod
    @lru_cache(maxsize=1)
    def _tokenizer() -> SimpleTokenizer:
        return SimpleTokenizer()

    def ids(self, text: str) -> list[int]:
        return self._tokenizer().encode(text)

    def text(self, ids: Sequence[int]) -> str:
        return self._tokenizer().decode(list(ids)).strip()


class FileWords:
    """Words as a tokenizer.json has them, as a BERT's. Needs the package `tokenizers`, which transformers brings."""

    def __init__(self, text: str):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("a tokenizer.json needs the package transformers: `pip install transformers`.") from None
        self._tokenizer = Tokenizer.from_str(text)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size()

    def ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(whitespace_clean(basic_clean(text)), add_special_tokens=False).ids

    def text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids)).strip()

    def special(self, name: str) -> int:
        found = self._tokenizer.token_to_id(name)
        if found is None:
            raise UserError(f"the text model's tokenizer.json has no token {name}; is it that of a BERT?")
        return found


def lay_out(
    words: Sequence[Sequence[int]], chunks: int, length: int, layout: str, bos: int, eos: int, pad: int
) -> tuple[Tensor, Tensor]:
    """Ids (B,chunks*length) of captions' words, and which of them (B,chunks*length) are no padding.

    joint: bos words eos pad... over the whole length. separate: so in each chunk, which takes length-2 words. What is
    longer is cut.

    >>> ids, keep = lay_out([[5, 6, 7]], chunks=1, length=8, layout="joint", bos=1, eos=2, pad=0)
    >>> ids.tolist(), int(keep.sum())
    ([[1, 5, 6, 7, 2, 0, 0, 0]], 5)
    """
    each = length * chunks if layout == "joint" else length
    ids = torch.full((len(words), chunks * length), pad, dtype=torch.long)
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    for row, caption in enumerate(words):
        for start in range(0, chunks * length, each):
            first = start // each * (each - 2)
            part = [bos, *caption[first : first + each - 2], eos]
            ids[row, start : start + len(part)] = torch.tensor(part)
            keep[row, start : start + len(part)] = True
    return ids, keep


def capacity(chunks: int, length: int, layout: str) -> int:
    """How many words' tokens `lay_out` has room for.

    >>> capacity(2, 77, "joint"), capacity(2, 77, "separate")
    (152, 150)
    """
    return chunks * length - 2 if layout == "joint" else chunks * (length - 2)
