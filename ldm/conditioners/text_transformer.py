"""The text transformer that CompVis trained along with its text-to-image models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

HEAD = 64  # width of an attention head


class TokenAttention(nn.Module):
    """Self-attention over x (B,L,D), of inner width heads*HEAD whatever D is."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * HEAD, bias=False)
        self.to_k = nn.Linear(width, heads * HEAD, bias=False)
        self.to_v = nn.Linear(width, heads * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        of = (self.to_q, self.to_k, self.to_v)
        q, k, v = (rearrange(to(x), "b n (heads c) -> b heads n c", heads=self.heads) for to in of)
        out = F.scaled_dot_product_attention(q, k, v, mask)
        return self.to_out(rearrange(out, "b heads n c -> b n (heads c)"))


class TokenFeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        project = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
        self.net = nn.Sequential(project, nn.Dropout(0.0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.net(x)


class TokenTransformer(nn.Module):
    """Ids (B,L) -> (B,L,D): the encoder of x-transformers, pre-normalised, with learned positions (arXiv:2112.10752,
    section 4.3.1). Names of parameters are the published ones; the layer that predicts words is left out.

    config: `text_cfg` with width, layers, heads, vocab_size and context_length.
    """

    layers, probe = "attn_layers.layers.", "pos_emb.emb.weight"

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        text = config["text_cfg"]
        self.width, self.vocab_size, self.context_length = (
            text[name] for name in ("width", "vocab_size", "context_length")
        )
        self.token_emb = nn.Embedding(self.vocab_size, self.width)
        self.pos_emb = nn.ModuleDict({"emb": nn.Embedding(self.context_length, self.width)})
        blocks = [
            block
            for _ in range(text["layers"])
            for block in (TokenAttention(self.width, text["heads"]), TokenFeedForward(self.width))
        ]
        layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(self.width), block]) for block in blocks)
        self.attn_layers = nn.ModuleDict({"layers": layers})
        self.norm = nn.LayerNorm(self.width)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.attn_layers["layers"]

    @property
    def inner(self) -> nn.Module:
        return self

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep (B,L) bool: tokens that others may look at; None is all, as published."""
        place = torch.arange(ids.shape[1], device=ids.device) % self.context_length
        x = self.token_emb(ids) + self.pos_emb["emb"](place)
        mask = None if keep is None else keep[:, None, None].bool()             # (B,1,1,L)
        for norm, block in self.blocks:
            x = x + block(norm(x), mask)
        return self.norm(x)
