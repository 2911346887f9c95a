"""Every command and example of README.md and of docs/guide runs as printed, page by page, in a scratch folder.

The folder has the repository's data and programs, and `slides/`: the demo slide ten times, as ten patients. What the
README leaves there (a cohort, models, images) is what the guide's pages find. Commands of minutes are shortened by what
SHRINK adds to them, and by nothing else; the viewer is stopped after a while. In the Markdown, `<!-- not run: why -->`
before a block says that it is not run, `<!-- stops: message -->` that it ends with this message, at the first file that
is not there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs/guide").glob("*.md"))]
PROGRAMS = ("main.py", "configs", "data_prep", "demo", "benchmarks", "notebooks", "ldm")
PATIENTS = "abcdefghij"
SERVED = 10  # seconds that the viewer serves
MARKED = re.compile(r"(?:<!-- (not run|stops): (.*?) -->\n\s*)?^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# the beginning of a command -> what is added to it, so that it takes seconds
TRAINING = (
    "lightning.trainer.max_steps=2 lightning.trainer.limit_val_batches=1 lightning.trainer.limit_test_batches=1 "
    "data.params.batch_size=2 data.params.num_workers=0 lightning.trainer.precision=32-true"
)
SMALL_FIRST_STAGE = " ".join(
    f"model.params.first_stage.params.ddconfig.{value}" for value in ("ch=8", "num_groups=8", "num_res_blocks=1")
)
SMALL_UNET = "model.params.unet_config.params.model_channels=32 model.params.unet_config.params.num_head_channels=16"
SHRINK = {
    "python main.py -t --base configs/own/first_stage.yaml": f"{TRAINING} {SMALL_FIRST_STAGE}",
    "histoldm train --base own/first_stage": f"{TRAINING} {SMALL_FIRST_STAGE}",
    "python main.py -t --base configs/own/ssl.yaml": f"{TRAINING} {SMALL_UNET}",
    "histoldm train --base own/ssl": f"{TRAINING} {SMALL_UNET}",
    "python main.py -t --base configs/demo": TRAINING,
    "histoldm train --base demo": TRAINING,
    "histoldm sample": "--count 8 --steps 2",  # as many as `evaluate` needs
    "histoldm large-image --model data/models/demo-ssl": "--region 768,1280,512,512 --steps 2",
    "histoldm large-image --model models/my-model": "--region 769,1026,514,514 --steps 2",
    "histoldm translate": "--count 2 --steps 2",
    "histoldm sequence": "--count 1 --steps 2",
    "histoldm view": "--no-browser",
}
# the same for Python: what is printed -> what is run
SHRINK_PYTHON = {
    "Sampler(": "Sampler(steps=2, ",
    "steps=2, steps=10": "steps=2",
    "1026, 1026), ": "514, 514), ",
    "size=(1024, 1024)": "size=(512, 512)",
}


@dataclass(frozen=True)
class Block:
    """A block of a page: `mark` is "", "not run" or "stops", `said` the reason or the message."""

    page: str
    mark: str
    said: str
    language: str
    text: str


def blocks_of(page: str) -> list[Block]:
    """The bash and python blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(page, mark, said, language, body) for mark, said, language, body in MARKED.findall(text)]


def shrunk(text: str) -> str:
    """A bash block whose commands take seconds."""
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        command, *remark = re.split(r"\s+(?=#)", line, maxsplit=1)
        words = " ".join(command.split())
        added = next((more for start, more in SHRINK.items() if words.startswith(start)), "")
        if words.startswith("histoldm view"):
            command, added = f"timeout --signal INT {SERVED} {command}", f"{added} || test $? = 124"
        lines.append(" ".join([command, added, *remark]))
    return "\n".join(lines)


def shrunk_python(text: str) -> str:
    """A Python block that takes seconds."""
    for printed, done in SHRINK_PYTHON.items():
        text = text.replace(printed, done)
    return text


def run(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block in a folder, its programs those of this repository and this Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    told = ["bash", "-euo", "pipefail", "-c", shrunk(block.text)]
    command = told if block.language == "bash" else [sys.executable, "-c", shrunk_python(block.text)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def follow(page: str, folder: Path) -> None:
    """Do what a page says, in a folder."""
    for block in blocks_of(page):
        if block.mark == "not run":
            continue
        done = run(block, folder)
        told = f"{page}:\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        if block.mark == "stops":
            assert done.returncode != 0, told
            assert block.said in " ".join(done.stderr.split()), told
            assert "Traceback" not in done.stderr, told
        else:
            assert done.returncode == 0, told


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """A folder in which the README was followed from top to bottom."""
    folder = tmp_path_factory.mktemp("documented")
    for name in PROGRAMS:
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    for path in (ROOT / "data").iterdir():
        (folder / "data" / path.name).symlink_to(path)
    (folder / "slides").mkdir()
    for patient in PATIENTS:
        (folder / "slides" / f"{patient}.svs").symlink_to(ROOT / "data/demo/CMU-1-Small-Region.svs")
    follow("README.md", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.mark != "not run" for b in blocks_of(page))])
def test_a_page_runs_as_printed(scratch, page):
    if page == "README.md":
        assert (scratch / "image.tif").is_file()
        assert len(list((scratch / "tiles").glob("0*.png"))) == 8
        assert (scratch / "report").is_dir()
    else:
        follow(page, scratch)


def test_the_readme_is_short_and_its_links_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8")):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_sound_and_a_mark_says_why(page):
    for block in blocks_of(page):
        if block.language == "python":
            compile(block.text, page, "exec")
        else:
            subprocess.run(["bash", "-n"], input=shrunk(block.text), text=True, check=True)
        assert not block.mark or len(block.said) > 10, block.text


def test_what_is_not_marked_is_the_rule():
    blocks = [block for page in PAGES for block in blocks_of(page) if block.language == "bash"]
    assert 2 * sum(block.mark != "not run" for block in blocks) >= len(blocks)
