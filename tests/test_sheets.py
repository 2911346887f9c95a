"""Sheets of images: where each image lies, how large it is, and the words beside and under it."""

from __future__ import annotations

import numpy as np

from ldm.commands.sequence_pictures import AXIS, GAP, film, sheet
from ldm.images.sheets import LEAST, LINE, ROOM, contact_sheet, fitted, grid, labelled_sheet


def plain(value: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_images_of_any_size_fill_places_of_one_size():
    page = grid([[plain(10), plain(20, 256, 128)], [None, plain(30, 16, 64)]], gap=4, most=128)
    assert page.shape == (4 + 128 + 4 + 128 + 4, 4 + 128 + 4 + 128 + 4, 3)
    assert (page[4:132, 4:132] == 10).all()
    assert (page[4:132, 136:200] == 20).all()  # made smaller, as wide as it then is
    assert (page[4:132, 200:] == 255).all()
    assert (page[136:, :132] == 255).all()  # the place of None
    assert (page[184:216, 136:264] == 30).all()  # in the middle of its place


def test_small_images_are_seen_and_large_ones_stay_as_they_are():
    ramps = np.mgrid[:32, :32].transpose(1, 2, 0) * 8
    small = np.concatenate([ramps, ramps[..., :1] // 2], -1).astype(np.uint8)
    large = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    page = contact_sheet([small], columns=1)
    assert page.shape[0] > LEAST
    assert np.abs(page[6:134, 6:134].reshape(32, 4, 32, 4, 3).mean((1, 3)) - small).mean() < 1  # it is the image
    assert np.array_equal(contact_sheet([large])[6:306, 6:306], large)
    assert fitted(large, 300) is large


def test_a_real_image_lies_right_above_its_own():
    real = [plain(110, 64, 64), plain(120), plain(130)]
    page = contact_sheet([plain(10), plain(20), plain(30)], real, columns=2)
    column, gap = page[:, -6 - LEAST // 2, 0], [255] * 6
    assert column.tolist() == [*gap, *[120] * LEAST, *gap, *[20] * LEAST, *gap, *[255] * (2 * LEAST + 12)]
    column = page[:, -6 - LEAST - 6 - LEAST // 2, 0]
    assert column[6 :: LEAST + 6].tolist() == [110, 10, 130, 30]
    titles = page[:, : page.shape[1] - 2 * (LEAST + 6) - 12]
    words = [titles[6 + k * (LEAST + 6) :][:LEAST] < 128 for k in range(4)]
    assert np.array_equal(words[0], words[2])  # "real"
    assert np.array_equal(words[1], words[3])  # "SYNTHETIC"
    assert 0 < words[0].any((0, 2)).sum() < words[1].any((0, 2)).sum()


def test_words_stand_under_their_image_and_are_cut_to_its_place():
    words = ["a", "a far longer label than this place has room for"]
    page = grid([[plain(0), plain(0)]], [words], ["title\nof two lines"])
    place = ROOM + 6
    foot, side = page[6 + LEAST :], page[6 : 6 + LEAST, : page.shape[1] - 2 * place]
    assert (side < 128).any()
    assert 0 < (foot[:, -2 * place : -place] < 128).any(2).any(0).sum() < 12
    assert 80 < (foot[:, -place:] < 128).any(2).any(0).sum() <= ROOM
    short = grid([[plain(0), plain(0)]], [["a", ""]])
    assert short.shape[1] == 2 * (LEAST + 6) + 6
    assert (short[6 + LEAST :, LEAST:] == 255).all()


def test_long_rows_of_a_labelled_sheet_go_on_below():
    page = labelled_sheet([[(str(i), plain(i)) for i in range(7)], [("maps", None), ("", plain(9))]])
    assert page.shape == grid([[plain(0)] * 6] * 3, [[""] * 6] * 3).shape


def test_curves_lie_under_the_images_of_their_value():
    images = np.stack([np.stack([plain(40 * i + k) for k in range(5)]) for i in range(3)])
    scores = np.linspace(0, 1, 15).reshape(3, 5)
    page = sheet(images, [0, 0.25, 0.5, 0.75, 1], "score", scores, images[:, 0])
    row, head = page[LINE + 10, :, 0], (page[:LINE] < 128).any((0, 2))
    assert 0 < head[AXIS : AXIS + 96].sum() < head[AXIS + 96 + 5 * GAP - 1 :].sum()  # "real", "SYNTHETIC"
    centre = [int(np.flatnonzero(row == k)[-96:].mean()) for k in range(1, 5)]
    under = page[LINE + 3 * (96 + GAP) :]
    blue = (np.abs(under.astype(int) - (0x1F, 0x4E, 0x9C)).sum(-1) < 30).sum(0)
    assert all(blue[c - 2 : c + 3].max() > blue[c - 12 : c - 7].max() for c in centre)  # the mean's markers
    assert (row[:AXIS] == 255).all()
    frames = film(images, [0, 0.25, 0.5, 0.75, 1], "score", scores)
    assert len(frames) == 8
    assert len({frame.shape for frame in frames}) == 1
