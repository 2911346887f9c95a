"""Joins what a cell printed in pieces, and drops times and versions: `make notebooks SAVE=1` does this at its end."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat


def joined(outputs: list) -> list:
    """Outputs with neighbouring pieces of one stream as one."""
    whole: list = []
    for output in outputs:
        if whole and output.output_type == "stream" == whole[-1].output_type and output.name == whole[-1].name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def main(paths: list[str]) -> None:
    for path in paths or sorted(map(str, (Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = joined(cell.outputs)
                cell.metadata.pop("execution", None)  # when it ran
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
