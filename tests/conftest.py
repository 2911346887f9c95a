from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of larger sample data and oracles that stands beside the repository where it is developed."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("the shared sample data do not stand beside this checkout")
    return path


@pytest.fixture(scope="session")
def oracle(shared: Path) -> Path:
    """Tensors computed by the published implementations."""
    return shared / "oracle"


@pytest.fixture(scope="session")
def demo_slide() -> Path:
    return ROOT / "data" / "demo" / "CMU-1-Small-Region.svs"
