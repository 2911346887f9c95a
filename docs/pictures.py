"""The last picture of each notebook as a file for pages: `python docs/pictures.py` writes docs/images/notebooks/."""

from __future__ import annotations

import base64
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "images" / "notebooks"
ENDINGS = {"image/jpeg": ".jpg", "image/png": ".png"}


def last_picture(notebook: Path) -> tuple[bytes, str]:
    """The bytes of a notebook's last picture and the ending of their format. ValueError if it has none."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    for data in reversed(outputs):
        for kind, ending in ENDINGS.items():
            if kind in data:
                return base64.b64decode("".join(data[kind])), ending
    raise ValueError(f"{notebook} has no picture")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.iterdir():
        path.unlink()
    for notebook in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
        picture, ending = last_picture(notebook)
        (FOLDER / (notebook.stem + ending)).write_bytes(picture)
        print(f"{notebook.stem}{ending}  {len(picture) // 1024} kB")


if __name__ == "__main__":
    main()
