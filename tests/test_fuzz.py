"""Damaged files of every kind end in a result or in one message: a short, seeded run of `tests/fuzzing.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

WITHOUT = ("ldm_ckpt_lid_vq", "pathldm_class_ckpt", "mid_ddpm_model")  # diffusers_sd1 stands for them
NO_MESSAGES = ("page-request",)  # which the server answers


@pytest.mark.slow
def test_damaged_files_are_read_or_told_in_one_message(tmp_path: Path):
    """About 50 s on a core of 2024."""
    words = ["--seed", "0", "--count", "40", "--json", str(tmp_path / "found.json"), "--without", *WITHOUT]
    done = subprocess.run([sys.executable, "tests/fuzzing.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) >= 38
    for kind, each in found.items():
        assert each["results"] + each["messages"] == 40, kind
        assert each["messages"] > 5 or kind in NO_MESSAGES, kind  # whole files would be read
