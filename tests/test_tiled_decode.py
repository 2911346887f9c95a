"""Decoding in tiles against decoding at once."""

from __future__ import annotations

import torch

from ldm.autoencoder.autoencoder import AutoencoderKL
from ldm.autoencoder.tiled_decode import decode_tiled, decode_tiles, joint_group_norm, sampled_spans

DDCONFIG = dict(double_z=True, z_channels=4, resolution=64, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2],
                num_res_blocks=1, attn_resolutions=[], dropout=0.0)  # fmt: skip


def first_stage() -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(DDCONFIG, 4).eval()
    model.decoder.mid.attn_1 = torch.nn.Identity()  # attention sees the whole canvas, which tiles cannot
    return model


def canvas() -> torch.Tensor:
    z = torch.randn(1, 4, 64, 96, generator=torch.Generator().manual_seed(1)) * 0.3
    z[..., :48] += 3.0  # two halves of different tone
    return z


def test_tiles_share_the_tone_of_the_canvas():
    model, z = first_stage(), canvas()
    with torch.no_grad():
        whole = model.decode(z)
        apart = torch.cat(
            [torch.cat([model.decode(z[..., r : r + 32, c : c + 32]) for c in (0, 32, 64)], -1) for r in (0, 32)], -2
        )
    ours = decode_tiled(model, z, tile=32, halo=12)
    error, naive = (float((image - whole).abs().mean() / whole.std()) for image in (ours, apart))
    assert error < 0.02, (error, naive)
    assert naive > 5 * error, (error, naive)


def test_any_size_is_covered_and_a_single_tile_is_untouched():
    model = first_stage()
    z = canvas()[..., :50, :70]
    assert decode_tiled(model, z, tile=32, halo=8).isfinite().all()
    assert decode_tiled(model, z, tile=32, halo=8).shape == (1, 3, 100, 140)
    with torch.no_grad():
        assert torch.equal(decode_tiled(model, z, tile=96), model.decode(z))


def test_joint_statistics_of_one_image_are_its_own_and_the_layers_are_given_back():
    model, z = first_stage(), canvas()
    with torch.no_grad():
        plain = model.decode(z)
        with joint_group_norm(model, {}):
            torch.testing.assert_close(model.decode(z), plain, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.decode(z), plain)


def test_tiles_cover_the_image_once_and_come_as_they_are_made():
    model, z, calls = first_stage(), canvas(), []
    decode = model.decode
    model.decode = lambda z: calls.append(tuple(z.shape[-2:])) or decode(z)
    covered = torch.zeros(128, 192)
    tiles = decode_tiles(model, z, tile=32, halo=8)
    next(tiles)
    assert len(calls) == 3  # the statistics, the tile, and the next one, under way meanwhile
    for rows, cols, part in decode_tiles(model, z, tile=32, halo=8):
        covered[rows, cols] += 1
        assert part.shape == (1, 3, 64, 64)
    assert (covered == 1).all()


def test_the_statistics_are_taken_from_few_pixels_of_a_large_canvas():
    for size in (512, 1024):
        spans_ = sampled_spans(size, 24, 8, 4)
        assert [span.tile.stop - span.tile.start for span in spans_] == [24] * 4
        assert spans_[0].tile.start == 0
        assert spans_[-1].tile.stop == spans_[-1].window.stop == size
        assert all(span.window.stop - span.window.start == 40 for span in spans_)
    (whole,) = sampled_spans(20, 24, 8, 4)
    assert whole.tile == whole.window == slice(0, 20)
