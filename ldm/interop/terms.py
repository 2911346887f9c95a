"""Licences of what others published: what a card beside the weights says, and those of several parts together."""

from __future__ import annotations

import re
from pathlib import Path

from ldm.foreign.paths import lies_in

CARD = "README.md"
PIPELINE = "model_index.json"  # marks the folder whose card is that of all parts within


def card_licence(folder: Path) -> str | None:
    """The licence that the head of a folder's card, README.md, names.

    >>> _ = Path("README.md").write_text("---\\nlicense: cc-by-nc-4.0\\n---\\n")
    >>> card_licence(Path("."))
    'cc-by-nc-4.0'
    """
    card = folder / CARD
    if not card.is_file() or not lies_in(card, folder) or card.stat().st_size > 2**20:
        return None
    head = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    if head is None:
        return None
    names = dict(re.findall(r"^(license|license_name):\s*['\"]?([\w .+-]{1,99})", head[1], re.MULTILINE))
    named = names.get("license_name") or names.get("license")  # of licences of one's own, license is "other"
    return named.strip() if named else None


def licence_beside(path: Path) -> str | None:
    """The licence on the card of a folder, or of the folder that a file lies in; of a part of a pipeline, on the
    pipeline's.

    >>> _ = Path("README.md").write_text("---\\nlicense: mit\\n---\\n")
    >>> licence_beside(Path("epoch_1.pth"))
    'mit'
    """
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    above = [folder.parent] if (folder.parent / PIPELINE).is_file() else []
    return next((terms for each in (folder, *above) if (terms := card_licence(each))), None)


def together(terms: str | None, what: str, more: str | None) -> str | None:
    """The licence of a model with another part, whose licence is named where it is another.

    >>> together("apache-2.0", "ControlNet", "mit"), together("mit", "ControlNet", "mit")
    ('apache-2.0; ControlNet: mit', 'mit')
    """
    if more is None or more == terms:
        return terms
    return f"{terms or 'licence not recorded'}; {what}: {more}"
