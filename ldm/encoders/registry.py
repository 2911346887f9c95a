"""Published tile encoders by name, and the folder of their weights.

Non-commercial licences taint features and models conditioned on them, so they travel with both.
"""

from __future__ import annotations

import os
from pathlib import Path

from ldm.encoders.published import table

REGISTRY = table()


def weights_home() -> Path:
    """The folder that holds one folder of weights per published encoder.

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, HISTOLDM_WEIGHTS="/scratch/weights"):
    ...     print(weights_home())
    /scratch/weights
    """
    return Path(os.environ.get("HISTOLDM_WEIGHTS") or "~/.cache/histoldm/weights").expanduser()
