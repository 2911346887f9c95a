"""Published encoders by the names that CLAM, TRIDENT, STAMP and LazySlide give them."""

from __future__ import annotations

from ldm.encoders.registry import REGISTRY

# in small letters and with hyphens, where they differ from ours otherwise
NAMES = {
    "uni-v1": "uni", "mahmood-uni": "uni", "uni-v2": "uni2-h", "uni2": "uni2-h", "mahmood-uni2": "uni2-h",
    "conch-v1": "conch", "mahmood-conch": "conch",
    "conch-v15": "conch-v1.5", "conch1-5": "conch-v1.5", "mahmood-conch1-5": "conch-v1.5",
    "gigapath": "prov-gigapath", "hoptimus0": "h-optimus-0", "hoptimus1": "h-optimus-1", "h0mini": "h0-mini",
    "phikonv2": "phikon-v2", "virchow-full": "virchow", "chief": "chief-ctranspath",
    "midnight": "midnight-12k", "midnight12k": "midnight-12k", "open-midnight": "openmidnight",
    "lunit-vits8": "lunit-dino-vits8", "lunit-dino-s8": "lunit-dino-vits8", "lunit-dino-s16": "lunit-dino-vits16",
    "quiltnet-b16": "quiltnet-b-16", "quiltnet-b32": "quiltnet-b-32",
}  # fmt: skip


def published_name(name: str) -> str | None:
    """What the list of published encoders calls an encoder that another tool calls so; None if it does not know it.

    >>> published_name("uni_v1"), published_name("phikon_v2"), published_name("my-encoder")
    ('uni', 'phikon-v2', None)
    """
    plain = name.lower().replace("_", "-")
    found = NAMES.get(plain, plain)
    return found if found in REGISTRY else None
