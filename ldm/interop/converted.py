"""What a reader of published weights gives: everything that a model folder holds, and an account of every tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Converted:
    """A published model in this toolkit's terms.

    Attributes:
        node: `{target, params}` that builds the module, targets of this toolkit alone.
        state: its weights by the module's own names; averaged weights where the file has any and they were asked for.
        metadata: class names, encoder, licence, mpp, scheduler settings: what sampling needs and is no weight.
        files: name -> text of further files that the node names as "./name".
        unused: name of a tensor of the source -> why it is not needed. Every tensor is in `state` or here.
        notes: what was guessed or is to be known, in sentences.
        positions: fixed positions of a transformer's tokens, to be compared with those that it computes.
        averages: averaged weights of a file that holds no others, by the part's beginning and CompVis' names without
            dots: they stand for the weights of that part.
        schedule: buffers of the noise schedule by CompVis' names, to be compared with the schedule of the node.
    """

    node: dict[str, Any]
    state: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    schedule: dict[str, Tensor] = field(default_factory=dict)
    positions: Tensor | None = None
    averages: dict[str, Tensor] = field(default_factory=dict)
