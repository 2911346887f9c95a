"""Decoding a canvas: as tiles are decoded, but without their borders, in parts of any size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.autoencoder.autoencoder import AutoencoderKL
from ldm.sampling import local_norm as tiled_decode
from ldm.sampling.local_norm import decode_tiles, local_group_norm, local_statistics, spans, spread

DDCONFIG = dict(double_z=True, z_channels=4, resolution=64, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2],
                num_res_blocks=1, attn_resolutions=[], dropout=0.0, mid_attention=False)  # fmt: skip
WINDOW = 16


def first_stage() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(DDCONFIG, 4).eval()


def canvas() -> torch.Tensor:
    z = torch.randn(1, 4, 64, 96, generator=torch.Generator().manual_seed(1)) * 0.3
    z[..., :48] += 3.0  # two halves of different tone
    return z


def decoded(model: AutoencoderKL, z: torch.Tensor, window: int, **settings: int) -> torch.Tensor:
    """The image of latents z, put together from its parts."""
    image = torch.full((1, 3, 2 * z.shape[-2], 2 * z.shape[-1]), torch.nan)
    for rows, cols, part in decode_tiles(model, z, window, **settings):
        image[..., rows, cols] = part
    return image


def test_the_middle_of_a_tile_is_decoded_as_the_tile_alone():
    """Beside a half of another tone, where statistics of the whole canvas would spoil it."""
    model, z = first_stage(), canvas()
    with torch.no_grad():
        whole = model.decode(z)
        tile = model.decode(z[..., 16:48, 64:96])[..., 28:36, 28:36]
    ours = decoded(model, z, window=32)[..., 60:68, 156:164]
    near, far = (float((image - tile).abs().mean()) for image in (ours, whole[..., 60:68, 156:164]))
    assert near < 0.2 * far, (near, far)


@pytest.mark.slow
def test_parts_fit_together():
    model, z = first_stage(), canvas()
    whole = decoded(model, z, WINDOW, part=96)
    apart = decoded(model, z, WINDOW, part=32, halo=24)
    narrow = decoded(model, z, WINDOW, part=32, halo=1)
    error, careless = (float((image - whole).abs().mean() / whole.std()) for image in (apart, narrow))
    assert error < 0.01, (error, careless)
    assert careless > 5 * error, (error, careless)


@pytest.mark.slow
def test_any_size_is_covered_and_a_canvas_of_one_tile_is_decoded_as_it_is():
    model, z = first_stage(), canvas()
    assert decoded(model, z[..., :50, :70], WINDOW, part=32).shape == (1, 3, 100, 140)
    assert decoded(model, z[..., :50, :70], WINDOW, part=32).isfinite().all()
    assert decoded(model, z[..., :9, :70], WINDOW, part=32).isfinite().all()
    with torch.no_grad():
        assert torch.equal(decoded(model, z[..., :16, :12], WINDOW), model.decode(z[..., :16, :12]))


@pytest.mark.slow
def test_parts_cover_the_image_once_and_come_as_they_are_made():
    model, z, calls = first_stage(), canvas(), []
    decode = model.decode
    model.decode = lambda z: calls.append(1) or decode(z)
    parts = decode_tiles(model, z, WINDOW, part=32)
    next(parts)
    assert len(calls) == 2  # the part and the next one, which is under way meanwhile
    covered = torch.zeros(128, 192)
    for rows, cols, part in decode_tiles(model, z, WINDOW, part=32):
        covered[rows, cols] += 1
        assert part.shape == (1, 3, 64, 64)
    assert (covered == 1).all()


def test_parts_are_as_equal_as_can_be():
    for size, count in ((512, 3), (192, 1), (193, 2)):
        parts = spans(size, 192, 20)
        sizes = [span.tile.stop - span.tile.start for span in parts]
        assert (len(sizes), sum(sizes)) == (count, size)
        assert max(sizes) - min(sizes) <= 1
        assert parts[0].window.start == 0
        assert all(a.window.stop == a.tile.stop + 20 for a in parts[:-1])
    assert [span.window for span in spans(100, 30, 5, 8)] == [
        slice(0, 32),
        slice(16, 56),
        slice(40, 80),
        slice(64, 100),
    ]


def test_statistics_are_of_the_window_about_a_place():
    x = torch.randn(1, 6, 40, 56, generator=torch.Generator().manual_seed(2))
    mean, variance = local_statistics(x, 2, 16)
    assert mean.shape == (1, 2, 7, 11)  # every 4 of 40 - 16 and of 56 - 16
    window = x[0, 3:, 8:24, 20:36]
    torch.testing.assert_close(mean[0, 1, 2, 5], window.mean())
    torch.testing.assert_close(variance[0, 1, 2, 5], window.var(correction=0))
    across = spread(11, 56, 16)
    assert across.shape == (56, 11)
    torch.testing.assert_close(across.sum(1), torch.ones(56))
    assert across[28, 5] > 0.999  # the middle of that window
    assert 0.4 < across[30, 5] < across[29, 5] < 1
    assert across[0, 0] == across[-1, -1] == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_canvas_is_normalised_the_same_in_strips_of_any_height(monkeypatch, memory_format):
    norm = nn.GroupNorm(2, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 41, 56, generator=torch.Generator().manual_seed(2)) + torch.arange(56) / 9
    x = x.contiguous(memory_format=memory_format)
    with torch.no_grad():
        whole = tiled_decode.normalised(norm, x, 16)
    mean, variance = local_statistics(x, 2, 16)
    place = (x[1, :, 16, 28].view(2, 3) - mean[1, :, 2, 5, None]) / (variance[1, :, 2, 5, None] + norm.eps).sqrt()
    torch.testing.assert_close(whole[1, :, 16, 28], norm.weight * place.flatten() + norm.bias)
    monkeypatch.setattr(tiled_decode, "STRIP", 2 * 6 * 56)  # one row at a time
    with torch.no_grad():
        torch.testing.assert_close(tiled_decode.normalised(norm, x, 16), whole)
        half = tiled_decode.normalised(norm.bfloat16(), x.bfloat16(), 16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, atol=0.1, rtol=0.02)


@torch.no_grad()
def test_a_layer_that_sees_one_window_is_the_layer_itself_and_layers_are_given_back():
    norm, x = nn.GroupNorm(2, 4), torch.randn(1, 4, 16, 16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    plain = norm(x)
    with local_group_norm(norm, 16, 16):
        torch.testing.assert_close(norm(x), plain)
    wide = torch.cat([x, 5 * x + 3], -1)
    with local_group_norm(norm, 16, 32):
        torch.testing.assert_close(norm(wide)[..., :8], plain[..., :8])  # up to the window's middle
    assert torch.equal(norm(x), plain)
