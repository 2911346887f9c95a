"""Make lazyslide_tiles.tar.xz: the demo slide as LazySlide tiles it, with features that are the tiles' own colours.

In v2/ lies the same in Zarr v2, as older versions wrote it.

Needs `pip install lazyslide==0.13.0 wsidata==0.12.0 spatialdata==0.7.3 anndata==0.12.19 zarr==3.1.6`, with which the
file was made; the tests need none of them. Run it in this folder.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

SLIDE = Path(__file__).resolve().parents[2] / "data" / "demo" / "CMU-1-Small-Region.svs"


def main() -> None:
    import lazyslide
    import torch
    from spatialdata._io.format import SpatialDataContainerFormatV01
    from wsidata import open_wsi

    def quarters(images: torch.Tensor) -> torch.Tensor:
        """The mean red, green and blue of 2 x 2 parts, row by row: (B,3,H,W) -> (B,12)."""
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).permute(0, 2, 3, 1).flatten(1)

    def spread(images: torch.Tensor) -> torch.Tensor:
        """The standard deviation of red, green and blue, (B,3)."""
        return images.flatten(2).std(2)

    def pixels(image) -> torch.Tensor:
        return torch.as_tensor(image).permute(2, 0, 1).float()

    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "zarr" / f"{SLIDE.stem}.zarr"
        wsi = open_wsi(SLIDE, store=str(store))
        lazyslide.pp.find_tissues(wsi)
        for tiles, mpp in (("tiles", 1.0), ("tiles_20x", None)):
            lazyslide.pp.tile_tissues(wsi, 256, mpp=mpp, key_added=tiles)
            lazyslide.tl.feature_extraction(wsi, quarters, transform=pixels, tile_key=tiles)
        lazyslide.tl.feature_extraction(wsi, spread, transform=pixels)
        lazyslide.tl.feature_aggregation(wsi, "quarters")
        lazyslide.pp.tile_graph(wsi, tile_key="tiles_20x")
        wsi.write()
        wsi.write(store.parent / "v2" / store.name, sdata_formats=SpatialDataContainerFormatV01())  # as before 0.6
        shutil.make_archive("lazyslide_tiles", "xztar", store.parent)


if __name__ == "__main__":
    main()
