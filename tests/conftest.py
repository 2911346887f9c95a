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


@pytest.fixture(scope="session")
def tiny_store(demo_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo slide as a tile store of 256 px tiles side by side, background tiles included. Do not write to it."""
    from data_prep.tile_slides import tile_slide

    return tile_slide(demo_slide, tmp_path_factory.mktemp("cohort"), keep_background=1.0)
