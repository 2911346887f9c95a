"""Cut the sample files of data/samples out of the published ones that data/README.md names.

SOURCES has he/, ihc/, mr/, mitosis/ and omics/ with the files under their published names. Images that fit are copied
unchanged; of large ones a region or a range of slices is cut out, of tables the columns and rows that demos need.

Example:

    python -m demo.build.cut_samples --sources SOURCES --out data/samples
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import nibabel
import numpy as np
import pandas as pd
from PIL import Image

from data_prep.options import inputs, output
from ldm.cli.script import script
from ldm.errors import UserError
from ldm.images.slides import open_image

CELLS = 24  # of each class
HELD_OUT = slice(95, 120)  # axial slices that demo-slices was not trained on
REGION = (1600, 2400, 1024, 320)  # of the slide, level-0 px: in the band that was held out


def stains(sources: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(sources / "ihc/OS-2-ndpi.ome.tif", out / "OS-2-ndpi.ome.tif")
    shutil.copy(sources / "ihc/skimage_ihc.png", out / "ihc.png")


def cancers(sources: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for tile in sorted((sources / "he/mopadi_TCGA-AD-6964").glob("*.jpg")):
        shutil.copy(tile, out / f"TCGA-AD-6964_{tile.name}")
    slide = open_image(sources / "he/TCGA-CR-7395-01A-01-TS1.svs")
    Image.fromarray(slide.read(*REGION)).save(out / "TCGA-CR-7395_1600,2400.png", optimize=True)
    omics = sources / "omics"
    for kind in ("expression", "mutation"):
        shutil.copy(omics / f"{kind}-matrix-all-samples.tsv", out)
    genes = pd.read_csv(omics / "expression-genes.tsv", sep="\t", dtype=str)
    named = pd.read_csv(omics / "expression-matrix-all-samples.tsv", sep="\t", nrows=0).columns
    named = named.append(pd.read_csv(omics / "mutation-matrix-all-samples.tsv", sep="\t", nrows=0).columns)
    genes[genes["entrez_gene_id"].isin(named)].to_csv(out / "expression-genes.tsv", sep="\t", index=False)
    samples = pd.read_csv(omics / "samples.tsv", sep="\t", dtype=str)
    samples[["sample_id", "acronym"]].to_csv(out / "samples.tsv", sep="\t", index=False)


def cells(sources: Path, out: Path) -> None:
    votes = pd.read_csv(sources / "mitosis/AtNorM-MD_expert_votes.csv")
    kept = []
    for name in ("Atypical", "Normal"):
        (out / name).mkdir(parents=True, exist_ok=True)
        files = sorted((sources / "mitosis/AtNorM-MD" / name).glob("*.png"))
        for i in np.linspace(0, len(files) - 1, CELLS).astype(int):
            shutil.copy(files[i], out / name)
            kept.append(files[i].name)
    votes[votes["Filename"].isin(kept)].to_csv(out / "AtNorM-MD_expert_votes.csv", index=False)


def slices(sources: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("t1", "t2", "fla"):
        image = nibabel.load(sources / f"mr/TCGA-FG-6692/{name}.nii.gz")
        nibabel.save(image.slicer[:, :, HELD_OUT], out / f"TCGA-FG-6692_{name}.nii.gz")


@script("demo.build.cut_samples", __doc__)
def main(
    sources: Annotated[Path, inputs("--sources", help="Folder of the published files.")],
    out: Annotated[Path, output("--out", help="Folder of the samples to write.")],
) -> None:
    if not (sources / "he").is_dir():
        raise UserError(f"{sources} has no folder he/; give the folder of the published files by --sources")
    for write in (stains, cancers, cells, slices):
        write(sources, out / write.__name__)


if __name__ == "__main__":
    main.run()
