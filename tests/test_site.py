"""The documentation site: its reference tells every option and parameter, its pages name every source."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

from conftest import ROOT
from ldm.cli import app

DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    """A module of docs/."""
    found = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # where dataclasses look
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """The folder of pages that a build of the site makes."""
    pages = script("reference_pages")
    pages.OUT = tmp_path_factory.mktemp("site") / "reference"
    pages.main()
    return pages.OUT


def test_every_command_has_a_page_with_each_of_its_options(reference):
    listed = (reference / "commands.md").read_text(encoding="utf-8")
    for name, command in get_command(app).commands.items():
        page = (reference / "commands" / f"{name}.md").read_text(encoding="utf-8")
        assert f"[histoldm {name}](reference/commands/{name}.md)" in listed
        assert f"```bash\nhistoldm {name}" in page or name in ("train", "doctor")
        for option in command.params:
            assert all(f"`{word}`" in page for word in option.opts), (name, option.opts)
            assert option.help.split(" (")[0].rstrip(".") in page.replace("\\", ""), (name, option.opts)


def test_a_script_of_data_preparation_has_its_panels_choices_and_defaults(reference):
    page = (reference / "commands" / "tile_slides.md").read_text(encoding="utf-8")
    assert "## Splits" in page
    assert re.search(r"\| `--slides` \| path; several \| \*\*required\*\* \|", page)
    assert re.search(r"\| `--tile-size` \| whole number \| `256` \| Side of the square tiles in pixels\. \|", page)
    axis = (reference / "commands" / "slice_volumes.md").read_text(encoding="utf-8")
    assert re.search(r"\| `--axis` \| `sagittal`, `coronal`, `axial`.* \| `axial` \|", axis)


def test_training_has_its_options_and_those_of_the_trainer(reference):
    page = (reference / "commands" / "train.md").read_text(encoding="utf-8")
    for option in ("--base", "--resume", "--scale_lr", "--max_steps", "--accumulate_grad_batches"):
        assert f"`{option}`" in page
    assert "\n# start a new run\nhistoldm train --base" in page
    assert "`--logger`" not in page  # which the training sets


def test_every_encoder_is_in_the_table_with_its_terms(reference):
    from ldm.encoders.registry import REGISTRY

    rows = (reference / "encoders.md").read_text(encoding="utf-8").splitlines()
    for name, spec in REGISTRY.items():
        told = "\n".join(row for row in rows if row.startswith(f"| `{name}` |"))
        for part in (spec.licence, spec.unloadable or f"| {spec.dim} |", spec.source.partition(" ")[0]):
            assert part in told, name


def test_classes_that_configs_name_are_in_the_reference(reference):
    page = (reference / "classes.md").read_text(encoding="utf-8")
    for name in ("ssl.GridPatchEmbedder", "omics.GeneSetEmbedder", "unet.UNetModel", "stage.AutoencoderStage"):
        assert f".{name}\n" in page


def test_a_docstring_becomes_a_table_of_parameters():
    def paint(walls, colour="red", coats=2, *rest):
        """Paint walls.

        Args:
            walls: (N,) of them. colour: of the paint, `*` for any.
        coats: how often. UserError: no wall.

        >>> paint([1] * 3)
        """

    docstrings = script("docstrings")
    lines = [line.removeprefix("        ") for line in paint.__doc__.splitlines()]
    docstrings.plain_to_rest(None, "function", "paint", paint, None, lines)
    text = "\n".join(lines)
    assert "   * - ``walls``\n     - required\n     - (N,) of them." in text
    assert "   * - ``colour``\n     - ``'red'``\n     - Of the paint, `*` for any." in text
    assert "   * - ``coats``\n     - ``2``\n     - How often." in text
    assert "**Raises** `UserError`: no wall." in text
    assert text.rstrip().endswith(">>> paint([1] * 3)")


def test_every_publication_that_the_code_cites_is_in_the_references():
    cited = re.compile(r"(?:arXiv:|doi:)(\d[\d.]+/?[\w./()-]*\w)")
    listed = set(cited.findall((DOCS / "references.md").read_text(encoding="utf-8")))
    for path in sorted((ROOT / "ldm").rglob("*.py")):
        for found in cited.findall(path.read_text(encoding="utf-8")):
            assert found in listed, f"{path.name}: {found}"


def test_pictures_are_small_and_shown():
    shown = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *DOCS.rglob("*.md")))
    for path in sorted((DOCS / "images").rglob("*.jpg")):
        assert path.stat().st_size < 450_000, path.name
        assert path.name in shown, path.name
