"""What tests of attacks share: a secret that nothing may tell, a stranger's model folder, a refusal in one line."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from torch import nn

from ldm import model_folder
from ldm.errors import UserError

SECRET = "hunter2-not-to-be-told"
VARIABLE = "HISTOLDM_TEST_TOKEN"
NODE = {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 1}}


def refused(call: Callable[[], object], message: str) -> str:
    """What is said: one line, soon, without the secret."""
    begun = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        call()
    assert time.monotonic() - begun < 30
    assert SECRET not in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def model_of(folder: Path, metadata: dict | None = None, node: dict | None = None) -> Path:
    """A model folder as a stranger may write it."""
    model_folder.write_model_folder(folder, NODE, nn.Linear(2, 1).state_dict(), {})
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": node or NODE, "metadata": metadata or {}}))
    return folder
