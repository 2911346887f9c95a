"""Fixtures of the tests and of the examples in docstrings.

An example runs in an empty folder and knows the names in tests/examples.py. Floats are compared to the digits that are
written (pytest's NUMBER).
"""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest

ROOT = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A path of the larger sample data, which stand beside the repository where it is developed."""

    def find(name: str) -> Path:
        path = ROOT.parent / "shared" / name
        return path if path.exists() else pytest.skip(f"../shared/{name} does not come with the repository")

    return find


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tensors computed by the published implementations, and the checkpoints that they were computed with."""
    from published import unpack

    yield (folder := unpack(ROOT / "tests" / "oracle", tmp_path_factory.mktemp("oracle")))
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def demo_slide() -> Path:
    return ROOT / "data" / "demo" / "CMU-1-Small-Region.svs"


@pytest.fixture(scope="session")
def tiny_store(demo_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo slide as a tile store of 256 px tiles side by side, background tiles included. Do not write to it."""
    from data_prep.tile_slides import tile_slide

    return tile_slide(demo_slide, tmp_path_factory.mktemp("cohort"), keep_background=1.0)


@pytest.fixture(autouse=True)
def _example(request: pytest.FixtureRequest) -> None:
    """The folder and the names of the examples of a docstring."""
    if not (found := getattr(request.node, "dtest", None)):
        return
    import examples

    request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
    source = "".join(example.source for example in found.examples)
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    names = request.getfixturevalue("doctest_namespace")
    names |= examples.EVERYWHERE | {name: make(request) for name, make in examples.BY_NAME.items() if name in used}
