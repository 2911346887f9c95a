"""The notebooks as they are committed: run from top to bottom, with their pictures. `make notebooks` executes them."""

from __future__ import annotations

import importlib.util
import re
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from typer.testing import CliRunner

from ldm.cli import app

ROOT = Path(__file__).resolve().parent.parent
NAMES = [
    "01_slide_to_tile_store", "02_first_stage", "03_tiles_from_embeddings", "04_large_image", "05_domain_translation",
    "06_omics_editing", "07_mitosis_sequences_and_scorers", "08_text_to_image_and_filter", "09_lmi_translation",
    "10_evaluation", "11_your_own_cohort", "12_published_checkpoints",
]  # fmt: skip
LARGEST = 1_200_000  # bytes of a file
LONGEST = 40  # lines of an output
PICTURES = {"image/png", "image/jpeg", "image/svg+xml"}
PLACE = re.compile(
    r"(?<![\w.:/])/(?:home|root|tmp|work(?:space)?|Users|usr|opt|mnt|var|private|content)/|[A-Z]:\\Users"
)
BEGINS = """\
from workspace import begin

out = begin("{number}")  # the empty folder out/notebooks/{number}"""
HIDDEN = re.compile(r"os\.chdir|rmtree|filterwarnings|^\s*%config", re.MULTILINE)  # notebooks/workspace.py does it


@cache
def notebook(name: str) -> Any:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def code_cells(name: str) -> list[Any]:
    return [cell for cell in notebook(name).cells if cell.cell_type == "code"]


def outputs(name: str) -> list[Any]:
    return [output for cell in code_cells(name) for output in cell.outputs]


def texts(cell: Any) -> list[str]:
    """What a cell's outputs say in letters; a stream is one text, however many pieces it came in."""
    streams: dict[str, str] = {}
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            streams[output.name] = streams.get(output.name, "") + output.text
        found += [str(value) for kind, value in output.get("data", {}).items() if kind not in PICTURES]
    return [*streams.values(), *found]


def test_the_notebooks_are_there_and_listed():
    files = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert files == NAMES
    listed = re.findall(r"\(\.\./notebooks/(\w+)\.ipynb\)", (ROOT / "docs" / "notebooks.md").read_text())
    assert listed == [name for name in NAMES for _ in range(2)]  # its picture, then its title


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_whole_and_small(name):
    book = notebook(name)
    nbformat.validate(book)
    assert (book.nbformat, book.metadata.kernelspec.name) == (4, "python3")
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size <= LARGEST
    first, prose = book.cells[0], "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert "Limits" in prose
    assert "Next" in prose


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_begins_with_its_result_and_two_lines_of_code(name):
    prose, code = notebook(name).cells[:2]
    assert f"](../docs/images/notebooks/{name}.jpg)" in prose.source
    assert BEGINS.format(number=name[:2]) in code.source
    assert code.source.count("\n") < 9
    for cell in code_cells(name):
        assert not HIDDEN.search(cell.source), cell.source[:500]


@pytest.mark.slow
def test_a_notebook_starts_in_its_own_folder_and_works_in_the_repositorys(tmp_path):
    """As Jupyter and VS Code start it: a copy of the module, so that nothing of the repository is touched."""
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "workspace.py", tmp_path / "notebooks")
    old = tmp_path / "out" / "notebooks" / "01" / "old.txt"
    old.parent.mkdir(parents=True)
    old.touch()
    cells = [
        BEGINS.format(number="01") + '\nassert out.is_dir() and not list(out.iterdir())',
        '%%bash\npython -c "import sys; print(sys.prefix)"\necho kept >&2\ntouch out/notebooks/01/made',
        'import sys\nassert (out / "made").exists()\nprint(sys.prefix)',
        "%%bash\necho first\necho the reason >&2\nfalse\necho not reached",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(book, resources={"metadata": {"path": str(tmp_path / "notebooks")}})
    with pytest.raises(CellExecutionError, match="CalledProcessError"):
        client.execute()
    _, command, python, failing = book.cells
    assert texts(command) == texts(python)
    assert [output.text for output in failing.outputs[:2]] == ["first\n", "the reason\n"]


@pytest.mark.slow
def test_a_command_gives_the_images_of_a_notebook_bit_for_bit(tmp_path, monkeypatch):
    """The cell of 08 that guides a prompt runs in a kernel, in two steps, and its words are given to the command."""
    cell = next(cell.source for cell in code_cells("08_text_to_image_and_filter") if "negative=" in cell.source)
    assert "steps=12" in cell
    cell = cell.replace("steps=12", "steps=2")
    arrays = "{name: ldm.to_uint8(images) for name, images in guided.items()}"
    save = f"import numpy\nnumpy.savez({str(tmp_path / 'guided.npz')!r}, **{arrays})"
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (cell, save)])
    NotebookClient(book, resources={"metadata": {"path": str(ROOT)}}).execute()
    few = ["--condition", "text=skin, few nuclei", "--condition", "modality=H&E", "--guidance-scale", "3"]
    many = ["--negative-condition", "text=skin, many nuclei", "--negative-condition", "modality=H&E"]
    settings = ["--count", "5", "--steps", "2", "--seed", "1", "--out", str(tmp_path / "tiles")]
    call = ["sample", "--model", "data/models/demo-text", *few, *many, *settings]
    assert CliRunner().invoke(app, call, catch_exceptions=False).exit_code == 0
    made = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "tiles").glob("0*.png"))])
    assert np.array_equal(made, np.load(tmp_path / "guided.npz")['3, away from "many"'])


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_was_run_from_top_to_bottom_without_errors(name):
    cells = [cell for cell in code_cells(name) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output.ename for output in outputs(name) if output.output_type == "error"]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_short_and_name_no_place_of_a_machine(name):
    for cell in code_cells(name):
        for text in texts(cell):
            assert not PLACE.search(text), text[:500]
            assert str(ROOT) not in text
            if not text.lstrip().startswith("<"):  # tables in HTML
                assert text.rstrip().count("\n") < LONGEST, text[:500]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_ends_with_a_picture_and_checks_what_it_shows(name):
    cells = code_cells(name)
    shown = [kind for cell in cells[-3:] for output in cell.outputs for kind in output.get("data", {})]
    assert PICTURES & set(shown)
    assert any(re.search(r"^\s*assert ", cell.source, re.MULTILINE) for cell in cells)


@pytest.mark.parametrize("name", NAMES)
def test_a_failing_command_fails_its_cell(name):
    """`!command` goes on after an error, %%bash does not."""
    for cell in code_cells(name):
        assert not re.search(r"^\s*(?:\w+\s*=\s*)?(?:!|%sx\b|%system\b)", cell.source, re.MULTILINE), cell.source[:500]
        assert not re.search(r"^%%(?:bash|sh|script)\b.*--no-raise-error", cell.source), cell.source[:500]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_cell_printed_is_in_one_piece(name):
    """`python docs/tidy_notebooks.py` joins it."""
    for cell in code_cells(name):
        streams = [output.get("name", "") for output in cell.outputs]
        assert not any(one and one == other for one, other in pairwise(streams)), streams


@pytest.mark.parametrize("name", NAMES)
def test_the_pictures_of_pages_are_those_of_the_notebooks(name):
    """`python docs/pictures.py` writes them."""
    found = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    pictures = importlib.util.module_from_spec(found)
    found.loader.exec_module(pictures)
    picture, ending = pictures.last_picture(ROOT / "notebooks" / f"{name}.ipynb")
    assert (ROOT / "docs" / "images" / "notebooks" / (name + ending)).read_bytes() == picture
