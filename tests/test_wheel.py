"""A wheel built from the repository and installed elsewhere: commands, data preparation and training without it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import ROOT

pytestmark = pytest.mark.slow

SOURCE = ("ldm", "data_prep", "configs", "pyproject.toml", "README.md", "LICENSE")
NEEDED = Path(sysconfig.get_path("purelib"))  # the packages that this one needs
TELL = """
import atexit, os, sys

def tell():
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    with open(os.environ["IMPORTED"], "a") as told:
        told.write("\\n".join(files) + "\\n")

if "IMPORTED" in os.environ:
    atexit.register(tell)
"""


def run(command: list[str | Path], folder: Path, **environment: str) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=own | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass
class Elsewhere:
    """A working folder, and an environment that has the wheel, what it needs, and not the repository."""

    environment: Path
    folder: Path

    @property
    def packages(self) -> Path:
        (packages,) = self.environment.glob("lib/python*/site-packages")
        return packages

    def run(self, line: str) -> str:
        """What a command line prints, after a look at what it imported."""
        program, *words = shlex.split(line)
        told = self.folder.parent / "imported"
        said = run([self.environment / "bin" / program, *words], self.folder, IMPORTED=str(told))
        files = [Path(file) for file in told.read_text().split("\n") if file]
        assert self.packages / "ldm" / "config.py" in files
        assert not [path for path in files if path.is_relative_to(ROOT) and not path.is_relative_to(NEEDED)]
        return said


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    pytest.importorskip("setuptools", minversion="77")  # builds it, as pyproject.toml says
    base = tmp_path_factory.mktemp("wheel")
    made, source = Elsewhere(base / "environment", base / "work"), base / "source"
    made.folder.mkdir()
    source.mkdir()
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip, offline = [sys.executable, "-m", "pip", "--disable-pip-version-check"], ["--quiet", "--no-deps", "--no-index"]
    run([*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", base, "."], source)
    (wheel,) = base.glob("*.whl")
    run([sys.executable, "-m", "venv", "--without-pip", made.environment], base)
    run([*pip, "--python", made.environment, "install", *offline, wheel], base)
    shutil.rmtree(source)
    (made.packages / "needed.pth").write_text(str(NEEDED))
    (made.packages / "sitecustomize.py").write_text(TELL)
    return made


def test_a_model_samples(elsewhere):
    shutil.copytree(ROOT / "data" / "models" / "demo-mitosis", elsewhere.folder / "demo-mitosis")
    elsewhere.run("histoldm sample --model demo-mitosis --condition score=0.6 --count 2 --steps 2 --out cells")
    assert len(list((elsewhere.folder / "cells").rglob("*.png"))) >= 2


def test_cells_are_cut_and_a_shipped_config_trains_on_them(elsewhere):
    shutil.copytree(ROOT / "data" / "samples" / "cells", elsewhere.folder / "crops")
    said = elsewhere.run(
        "python -m data_prep.mitosis_cells --crops crops --votes crops/AtNorM-MD_expert_votes.csv --positive Atypical "
        "--labels soft --size 32 --slide-mpp 0.25 --mpp 0.5 --out my-cells"
    )
    assert "in split 'val', on which a training validates" in said
    said = elsewhere.run(
        "histoldm train --base demo/mitosis_score --max_steps 2 --limit_val_batches 1 --num_sanity_val_steps 0 "
        "data.params.stores=my-cells data.params.batch_size=4"
    )
    (trained,) = (elsewhere.folder / "logs").glob("*_mitosis_score")
    assert f"trained to step 2: logs/{trained.name}/checkpoints/last.ckpt" in said


def test_every_command_shows_its_help(elsewhere):
    commands = elsewhere.run("histoldm --help")
    for command in ("sample", "large-image", "translate", "train", "evaluate", "doctor"):
        assert command in commands
    assert "usage: histoldm train" in elsewhere.run("histoldm train --help")
