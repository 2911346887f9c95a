"""Damaged files of every kind end in a result or in one message: a short, seeded run of `tests/fuzzing.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

KINDS = (
    "png", "jpg", "webp", "bmp", "tiff", "ome-tiff", "svs", "dicom", "ome-zarr", "tile-store", "features-h5",
    "features-pt", "features-npy", "feature-set", "h5ad", "captions", "labels", "ratings", "midog", "sliderunner",
    "votes", "nifti",
)  # fmt: skip


@pytest.mark.slow
def test_damaged_files_are_read_or_told_in_one_message(tmp_path: Path):
    words = ["--seed", "0", "--count", "40", "--json", str(tmp_path / "found.json"), "--only", *KINDS]
    done = subprocess.run([sys.executable, "tests/fuzzing.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == set(KINDS)
    for kind, each in found.items():
        assert each["results"] + each["messages"] == 40, kind
        assert each["messages"] > 5, kind  # whole files would be read
