"""Body of `histoldm translate` of a slide into a slide: in parts, of any size, by one process or several.

The slide is read at the model's micrometres per pixel, a part at a time; `ldm.commands.slide_making` makes the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.commands.outputs import provenance
from ldm.commands.slide_making import Making, check_outs, check_sampler, inside, make_slide, scratch_of
from ldm.commands.translate import conditions
from ldm.convert import load_model, weights_of
from ldm.errors import UserError, note
from ldm.files import sha256
from ldm.images.slides import Slide, open_image
from ldm.requests.sampling import AskedSampler
from ldm.requests.translations import AskedTranslations, plan_of_all
from ldm.sampling.sampler import Inversion, Sampler, changed
from ldm.sampling.slide_translation import SlideTranslation

NEAR = 0.02  # relative difference of micrometres per pixel below which a slide is not resampled
MARGIN = 16  # pixels about a part that are resampled with it, and cut away with what its border did
ENCODED = "encoded"  # folder of the source's latents, in that of the unfinished slide


@dataclass(frozen=True)
class Region:
    """A rectangle of a slide, read as pixels of a model: (height, width) of them, `step` level-0 pixels apart.

    >>> region = Region(open_image(slide_path), (100, 200), 2.0, (300, 400))
    >>> region.read(slice(0, 64), slice(10, 42)).shape
    (64, 32, 3)
    """

    slide: Slide
    corner: tuple[int, int]
    step: float
    size: tuple[int, int]

    @classmethod
    def of(cls, slide: Slide, region: Sequence[int] | None, mpp: float | None) -> Region:
        """All of a slide, or x, y, width, height in level-0 pixels, at about `mpp` where both scales are known.

        UserError: a region that reaches outside.

        >>> Region.of(open_image(slide_path), None, 0.998).size
        (1483, 1110)
        """
        x, y, width, height = region or (0, 0, *slide.dimensions)
        if not (0 <= x and 0 <= y and 0 < width <= slide.dimensions[0] - x and 0 < height <= slide.dimensions[1] - y):
            wide, tall = slide.dimensions
            raise UserError(f"the region {x},{y},{width},{height} reaches outside of {slide.path}, {wide} x {tall} px.")
        step = mpp / slide.mpp if mpp and slide.mpp and abs(mpp / slide.mpp - 1) > NEAR else 1.0
        return cls(slide, (x, y), step, (int(height / step), int(width / step)))

    def read(self, rows: slice, cols: slice) -> np.ndarray:
        """(h,w,3) uint8 of rows and columns; beyond the last ones as these."""
        sides = zip((rows, cols), self.size, self.corner[::-1], self.slide.dimensions[::-1])
        (top, bottom, above, below), (left, right, before, after) = (self._axis(*side) for side in sides)
        x, y = (corner + start * self.step for corner, start in zip(self.corner, (left - before, top - above)))
        height, width = bottom - top + above + below, right - left + before + after
        made = self.slide.read(x, y, width * self.step, height * self.step, (width, height))
        made = made[above : height - below, before : width - after]
        return np.pad(made, ((0, rows.stop - bottom), (0, cols.stop - right), (0, 0)), mode="edge")

    def _axis(self, asked: slice, size: int, corner: int, whole: int) -> tuple[int, int, int, int]:
        """First pixel that is read along an axis, the one after the last, and how many about them are read too."""
        start, stop = asked.start, min(asked.stop, size)
        around = MARGIN if self.step != 1 else 0
        room = corner / self.step + start, (whole - corner) / self.step - stop
        return start, stop, *(min(around, int(each)) for each in room)


def translate_slide(
    model_path: Path, image: Path, out: Path, device: str, asked: AskedTranslations, sampler: AskedSampler,
    inversion: Inversion,
) -> None:  # fmt: skip
    """`histoldm translate` with an --out that ends as slides do. Stopped, the same command goes on."""
    check_outs([out])
    check_sampler(sampler)
    make_slide(device, lambda own: making_of(model_path, image, out, own, asked, sampler, inversion))


def making_of(
    model_path: Path, image: Path, out: Path, device: str, asked: AskedTranslations, sampler: AskedSampler,
    inversion: Inversion,
) -> Making:  # fmt: skip
    """What is asked, checked. UserError: several targets, a region outside, what the model or its solver cannot do."""
    model = load_model(model_path, device)
    plan = plan_of_all(model, asked, "a slide", also=("region", "mpp"))
    if len(plan.targets) > 1:
        raise UserError(f"there are {len(plan.targets)} targets and --out is one slide, {out.name}; give one target.")
    slide = open_image(image, asked.mpp)
    for told in slide.notes:
        note(f"{image.name}: {told}")
    region = Region.of(slide, asked.region, model.metadata.get("mpp"))
    mpp = slide.mpp * region.step or model.metadata.get("mpp")
    if not mpp:
        raise UserError(f"neither {image} nor the model says how many micrometres a pixel has; give --mpp.")
    source, target = (conditions(model, [values]) for values in (plan.source, plan.targets[0].values))
    chosen = sampler.loaded(model)
    if chosen.classifier is not None:
        target |= chosen.classifier.target_of(model, [plan.targets[0].values])
    kept = scratch_of([out]) / ENCODED
    canvas = SlideTranslation.of(model, region.size, region.read, kept, source, target, chosen, inversion)
    usual = Inversion().settled(model)
    about = sampler.record(canvas.sampler, model, canvas.inversion.task) | changed(canvas.inversion, usual)
    height, width = region.size
    place = {"source": image.name, "region": [*asked.region] if asked.region else None, "mpp": mpp}
    text = provenance(
        model_path, model, f"{image.name} as {plan.targets[0].label}",
        about | {"model_sha256": weights_of(model_path)} | place | {"size": f"{width}x{height}"},
    )  # fmt: skip
    record = text | inside(canvas, Making.quality) | {"values": [plan.source, plan.targets[0].values]}
    record |= {"source_sha256": sha256(image)} if image.is_file() else {"source_path": str(image.resolve())}
    left_out = Sampler.usual(model, canvas.inversion.task) | {"strength": 1.0, "start": usual.start}
    return Making(canvas, [out], region.size, mpp, text, record, left_out, beside=1)
