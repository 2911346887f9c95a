"""Conditioning on omics: mutated genes and gene expression."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioners.base import About, Conditioner, where_kept
from ldm.conditioners.gene_sets import KINDS, GeneSource, gmt_text, read_gene_sets
from ldm.errors import UserError

TEMPERATURE = 0.1
MODULES = {"mutation": "genomics_emb", "expression": "transcriptomics_emb"}
Genes = Sequence[str] | str | None


class GeneMLP(nn.Module):
    """Linear, BatchNorm and ReLU twice, then Linear; the normalisation is over genes."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = [[nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU()] for _ in range(2)]
        self.network = nn.Sequential(*hidden[0], *hidden[1], nn.Linear(dim, dim))

    def forward(self, genes: Tensor) -> Tensor:
        return self.network(genes)                                              # (G,dim)


class OmicsEmbedder(Conditioner):
    """Mutations and expression, added to the time embedding: {"vector": (B,dim)}, the sum of its sources.

    The form of His-MMDM (doi:10.1101/2024.07.11.24310294), whose weights load by name. Every gene has an embedding,
    which an MLP maps to f(g). Mutations M add the mean of f over the genes with M = 1: sum(f) / (count + 1e-6). An
    expression e adds the mean of f under the weights softmax(e / 0.1), where an unknown e is 0.5. Each is multiplied by
    its multiplier, 1 where none is given. The null is the zero vector, and what a user does not give adds nothing.

    Reads batch["mutation"] (B,G1): 1, 0 or NaN (unknown; 2 too), batch["expression"] (B,G2) in [0, 1] or NaN, and
    where they are there batch["mutation_multiplier"] and batch["expression_multiplier"] (B,).

    Args:
        dim: size of the vector: 4*model_channels of the UNet.
        mutation_genes, expression_genes: names in the order of their columns; or the path of a text file (one per
            line) or of the omics/<source>.json of a cohort; None where the model has no such source.
    """

    def __init__(
        self, dim: int, mutation_genes: Genes = None, expression_genes: Genes = None, dropout: float = 0.1
    ):
        super().__init__(dropout)
        self.dim = dim
        self.sources = _sources({"mutation": mutation_genes, "expression": expression_genes}, dict(zip(KINDS, KINDS)))
        self.keys = (*self.sources, *(f"{key}_multiplier" for key in self.sources))
        for source in self.sources.values():
            setattr(self, MODULES[source.kind], nn.Embedding(len(source), dim))
            setattr(self, f"{MODULES[source.kind]}_mlp", GeneMLP(dim))
        self._held: dict[str, tuple[list[Tensor], list[tuple[int, int]], Tensor]] = {}

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        parts = []
        for key, source in self.sources.items():
            genes = self.gene_vectors(source.kind)                              # (G,dim)
            values = source.of(self._value(batch, key)).to(genes)               # (B,G)
            if source.kind == "mutation":
                mutated = (values == 1).to(genes)
                part = mutated @ genes / (mutated.sum(1, keepdim=True) + 1e-6)
            else:
                part = F.softmax(values.nan_to_num(nan=0.5) / TEMPERATURE, dim=1) @ genes
            if (multiplier := batch.get(f"{key}_multiplier")) is not None:
                part = part * torch.as_tensor(multiplier).to(part).reshape(-1, 1)
            parts.append(part)
        return {"vector": where_kept(sum(parts[1:], parts[0]), parts[0].new_zeros(self.dim), drop)}

    def null(self) -> dict[str, Tensor]:
        return {"vector": getattr(self, MODULES[next(iter(self.sources))]).weight.new_zeros(1, self.dim)}

    def gene_vectors(self, kind: str) -> Tensor:
        """f(g) (G,dim) of a source's genes. In eval mode computed once, and again when weights have changed."""
        embedding, mlp = getattr(self, MODULES[kind]), getattr(self, f"{MODULES[kind]}_mlp")
        tensors = [*embedding.parameters(), *mlp.parameters(), *mlp.buffers()]
        if self.training or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            return mlp(embedding.weight)
        state = [(t.data_ptr(), t._version) for t in tensors]
        held = self._held.get(kind)
        if held is None or held[1] != state or any(a is not b for a, b in zip(held[0], tensors)):
            device = embedding.weight.device.type
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                held = self._held[kind] = (tensors, state, mlp(embedding.weight))
        return held[2]

    def train(self, mode: bool = True) -> OmicsEmbedder:
        self._held = {}
        return super().train(mode)

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        batch: dict[str, Tensor] = {}
        for key, source in self.sources.items():
            multiplier = values.get(f"{key}_multiplier")
            if key not in values:
                if multiplier is not None:
                    raise UserError(f"'{key}_multiplier' is given without '{key}'.")
                batch[key], multiplier = torch.full((1, len(source)), math.nan), 0.0
            else:
                batch[key] = source.read(values[key])
            if multiplier is not None:
                batch[f"{key}_multiplier"] = _multipliers(f"{key}_multiplier", multiplier)
        return _as_many(batch)

    def parse(self, key: str, text: str) -> Any:
        return self.sources[key].parse(text) if key in self.sources else float(_multipliers(key, text))

    def check_data(self, metadata: Mapping[str, Any]) -> None:
        for source in self.sources.values():
            source.check_data(metadata)

    def describe(self) -> dict[str, About]:
        return _described(self.sources) | {f"{key}_multiplier": About("multiplier") for key in self.sources}

    def portable(self) -> tuple[dict[str, Any], dict[str, str]]:
        return _portable_genes(self.sources)


class GeneSetEmbedder(Conditioner):
    """One cross-attention token per set of genes (a signature, a pathway): {"crossattn": (B,S,dim)}.

    The token of a set is its own embedding, plus W times the sum over its genes of value * gene embedding / sqrt(n).
    The value of an expression e is 2e - 1 and n counts the genes known; the value of a mutation is 1, and n counts the
    mutated ones. Unknown genes are left out, and their share of the set, times a learned vector, says so. The null is
    learned, a token per set.

    Reads batch[expression_key] (B,G1) in [0, 1] and batch[mutation_key] (B,G2) of 0 and 1; NaN is unknown.

    Args:
        gene_sets: path of a GMT file, or name -> genes. Genes that no source has are left out and named in a warning.
        dim: size of a token, the UNet's context_dim.
        mutation_genes, expression_genes: as OmicsEmbedder's; None where the model has no such source.
        width: size of a gene's embedding.
        mutation_key, expression_key: batch keys, and the names under which users give the values.
    Raises:
        UserError: a set of which no source has a gene.
    """

    def __init__(
        self, gene_sets: Mapping[str, Sequence[str]] | str, dim: int, mutation_genes: Genes = None,
        expression_genes: Genes = None, width: int = 128, dropout: float = 0.1, mutation_key: str = "mutation",
        expression_key: str = "expression",
    ):  # fmt: skip
        super().__init__(dropout)
        self.sources = _sources(
            {"mutation": mutation_genes, "expression": expression_genes},
            {"mutation": mutation_key, "expression": expression_key},
        )
        self.keys = tuple(self.sources)
        self.gene_sets = self._kept(read_gene_sets(gene_sets))
        for source in self.sources.values():
            self._add_source(source, width)
        self.project = nn.Linear(width, dim)
        self.set_emb = nn.Parameter(torch.randn(len(self.gene_sets), dim) * dim**-0.5)
        self.null_tokens = nn.Parameter(torch.randn(len(self.gene_sets), dim) * dim**-0.5)
        self.unknown_emb = nn.ParameterDict(
            {source.kind: nn.Parameter(torch.randn(dim) * dim**-0.5) for source in self.sources.values()}
        )

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        tokens = self.set_emb                                                   # (S,dim)
        for key, source in self.sources.items():
            tokens = tokens + self._tokens(source, self._value(batch, key))     # (B,S,dim)
        return {"crossattn": where_kept(tokens, self.null_tokens, drop)}

    def null(self) -> dict[str, Tensor]:
        return {"crossattn": self.null_tokens[None]}

    def _tokens(self, source: GeneSource, values: Any) -> Tensor:
        rows, columns, sets = (getattr(self, f"{source.kind}_{name}") for name in ("rows", "columns", "sets"))
        weight = getattr(self, f"{source.kind}_emb").weight                     # (genes of any set, width)
        values = source.of(values).to(weight)[:, columns]                       # (B,P): one for each gene of each set
        if source.kind == "mutation":
            known, scaled = (values == 0) | (values == 1), (values == 1).to(weight)
            counted = scaled
        else:
            known = ~values.isnan()
            scaled, counted = torch.where(known, 2 * values - 1, 0.0), known.to(weight)
        batch, count = len(values), len(self.gene_sets)
        zeros = weight.new_zeros(batch, count)
        size = zeros[0].index_add(0, sets, torch.ones_like(sets, dtype=zeros.dtype))  # (S,)
        first = F.pad(size.cumsum(0)[:-1], (1, 0)).long()
        starts = first + len(sets) * torch.arange(batch, device=first.device)[:, None]  # (B,S)
        sums = F.embedding_bag(
            rows.repeat(batch), weight, starts.flatten(), mode="sum", per_sample_weights=scaled.flatten()
        ).unflatten(0, (batch, count))                                          # (B,S,width)
        n = zeros.index_add(1, sets, counted).clamp(min=1)
        unknown = 1 - zeros.index_add(1, sets, known.to(weight)) / size.clamp(min=1)
        unknown = torch.where(size > 0, unknown, 0.0)
        return self.project(sums / n.sqrt()[..., None]) + unknown[..., None] * self.unknown_emb[source.kind]

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        batch = {key: torch.full((1, len(source)), math.nan) for key, source in self.sources.items()}
        used = {gene for genes in self.gene_sets.values() for gene in genes}
        for key, value in values.items():
            batch[key] = self.sources[key].read(value)
            idle = [gene for gene in value if gene not in used] if isinstance(value, Mapping) else []
            if idle:
                raise UserError(f"{idle[0]} is in none of the model's gene sets: '{key}' of it would change nothing.")
        return _as_many(batch)

    def parse(self, key: str, text: str) -> Any:
        return self.sources[key].parse(text)

    def check_data(self, metadata: Mapping[str, Any]) -> None:
        for source in self.sources.values():
            source.check_data(metadata)

    def describe(self) -> dict[str, About]:
        return _described(self.sources)

    def portable(self) -> tuple[dict[str, Any], dict[str, str]]:
        params, files = _portable_genes(self.sources)
        return params | {"gene_sets": "./gene_sets.gmt"}, files | {"gene_sets.gmt": gmt_text(self.gene_sets)}

    def _kept(self, sets: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        """The sets without the genes that no source has."""
        known = {gene for source in self.sources.values() for gene in source.genes}
        kept = {name: tuple(gene for gene in genes if gene in known) for name, genes in sets.items()}
        if empty := [name for name, genes in kept.items() if not genes]:
            raise UserError(
                f"the omics tables have no gene of the set '{empty[0]}' ({', '.join(sets[empty[0]][:5])}, ...); "
                f"{len(empty)} of {len(sets)} sets have none left. Leave them out, or name genes as the tables do."
            )
        if lost := sorted({gene for genes in sets.values() for gene in genes} - known):
            message = f"{len(lost)} genes of gene sets are in no omics table and left out: {', '.join(lost)}"
            warnings.warn(message, stacklevel=3)
        return kept

    def _add_source(self, source: GeneSource, width: int) -> None:
        """Embeddings of the source's genes that some set has, and the pairs (set, gene) in the order of sets."""
        column = {gene: index for index, gene in enumerate(source.genes)}
        pairs = [
            (number, column[gene])
            for number, genes in enumerate(self.gene_sets.values())
            for gene in genes
            if gene in column
        ]
        if not pairs:
            raise UserError(f"no gene set has a gene of `{source.kind}_genes`; leave that source out.")
        row = {index: number for number, index in enumerate(sorted({index for _, index in pairs}))}
        setattr(self, f"{source.kind}_emb", nn.Embedding(len(row), width))
        for name, numbers in {
            "sets": [number for number, _ in pairs],
            "columns": [index for _, index in pairs],
            "rows": [row[index] for _, index in pairs],
        }.items():
            self.register_buffer(f"{source.kind}_{name}", torch.tensor(numbers))


def _sources(genes: Mapping[str, Genes], keys: Mapping[str, str]) -> dict[str, GeneSource]:
    found = {keys[kind]: GeneSource(kind, named, keys[kind]) for kind, named in genes.items() if named is not None}
    if not found:
        raise UserError("an omics conditioner needs mutation_genes, expression_genes or both.")
    if len(found) < sum(named is not None for named in genes.values()):
        raise UserError(f"both sources of an omics conditioner read '{next(iter(found))}'; give each its own key.")
    return found


def _portable_genes(sources: Mapping[str, GeneSource]) -> tuple[dict[str, Any], dict[str, str]]:
    names = {source.kind: f"{source.kind}_genes" for source in sources.values()}
    files = {f"{names[source.kind]}.txt": "\n".join(source.genes) + "\n" for source in sources.values()}
    return {name: f"./{name}.txt" for name in names.values()}, files


def _described(sources: Mapping[str, GeneSource]) -> dict[str, About]:
    return {key: About(source.kind, genes=tuple(source.genes)) for key, source in sources.items()}


def _multipliers(key: str, value: Any) -> Tensor:
    try:
        values = torch.as_tensor(float(value) if isinstance(value, str) else value, dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError) as error:
        raise UserError(f"'{key}' is a number; got {value!r}.") from error
    if not values.isfinite().all():
        raise UserError(f"'{key}' is a finite number; got {value!r}.")
    return values


def _as_many(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of one sample repeated to as many as the others have."""
    counts = {len(value) for value in batch.values()} - {1}
    if len(counts) > 1:
        given = ", ".join(f"{len(value)} of {key}" for key, value in batch.items())
        raise UserError(f"omics of one call are one sample or equally many; got {given}.")
    count = counts.pop() if counts else 1
    return {key: value.expand(count, *value.shape[1:]) for key, value in batch.items()}
