"""What an array of imported features says of its encoder: by the list of published ones, the files, and the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.data.slide_files import SlideFiles, told_in
from ldm.encoders.registry import REGISTRY
from ldm.encoders.tool_names import published_name
from ldm.errors import UserError, note, some

_TOLD = ("encoder", "licence", "non_commercial", "source", "weights_sha256")  # taken from files of our own


def told_of(files: Sequence[SlideFiles]) -> dict[str, Any]:
    """What files say of the encoder of their features. UserError where they are of different weights.

    >>> told_of([SlideFiles("a", encoder="uni_v1")])
    {'encoder': 'uni_v1'}
    """
    told = [{"encoder": own.encoder} | told_in(own.features, own.feature) for own in files if own.features]
    told = told or [{"encoder": own.encoder} for own in files]
    if len(made := sorted({str(own["weights_sha256"]) for own in told if "weights_sha256" in own})) > 1:
        raise UserError(f"the files have features of different weights ({some(made, 2)}); give those of one encoder.")
    return told[0]


def encoder_attrs(name: str, dim: int, licence: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of an array of imported features.

    Args:
        name: of the array. dim: values of a feature. licence: as the user says it. told: see `told_of`.
    Raises:
        UserError: the name is that of a published encoder, and the features are of another one.

    >>> encoder_attrs("mine", 1024, "", {"encoder": "uni_v1"})["licence"]
    'CC BY-NC-ND 4.0, gated: academic, non-commercial use'
    """
    named, theirs = published_name(name), published_name(str(told.get("encoder", "")))
    if named and theirs and named != theirs:
        raise UserError(
            f"--name {name} is the encoder '{named}', and the files say that they are of '{theirs}'; give --name "
            f"{theirs}, or a name of your own"
        )
    if name in REGISTRY and REGISTRY[name].dim != dim:
        raise UserError(
            f"encoder '{name}' has {REGISTRY[name].dim} values, the files have {dim}; give the name of theirs by --name"
        )
    attrs: dict[str, Any] = {"encoder": name, "dim": dim, "imported": True}
    spec = REGISTRY.get(named or theirs or "")
    if spec is not None:
        attrs |= {key: getattr(spec, key) for key in ("licence", "non_commercial", "source")}
        attrs["encoder"] = spec.name if spec.dim == dim else told.get("encoder") or name
    own = {key: told[key] for key in _TOLD if isinstance(told.get(key), (str, bool))}
    attrs |= own if "licence" in own else {}  # of a file of our own
    if licence:
        attrs["licence"] = licence
    if "licence" not in attrs:
        note(f"the licence of encoder '{name}' is not known; record it by --encoder-licence.")
    elif attrs.get("non_commercial"):
        tell_terms(attrs["encoder"], attrs["licence"])
    return attrs


def tell_terms(encoder: str, licence: str) -> None:
    """Say that an encoder may not be used commercially, nor what is made with it.

    >>> tell_terms("uni", "CC BY-NC-ND 4.0")
    """
    note(
        f"encoder '{encoder}' is licensed for non-commercial use ({licence}); so are its features and the models "
        "conditioned on them. The licence is recorded in the store."
    )
