"""large_image and decode_canvas: what goes where, what costs what."""

from __future__ import annotations

import argparse
import importlib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor, nn

from ldm.autoencoder.autoencoder import AutoencoderKL, IdentityFirstStage
from ldm.autoencoder.latent import LatentScale
from ldm.devices import receive, send
from ldm.diffusion import samplers, schedules
from ldm.diffusion.denoiser import TableDenoiser
from ldm.diffusion.fields import FeatureField
from ldm.diffusion.guidance import cfg
from ldm.diffusion.tiled import tiled
from ldm.errors import UserError
from ldm.rng import canvas_noise
from ldm.sampling.canvas import decode_canvas, large_image
from ldm.sampling.sampler import Sampler, Windows

WINDOW = 16


class Stub:
    """A model in pixels whose denoiser is a function of window and feature: `paint(x, feature (B,1,1,1))`."""

    def __init__(self, paint, first_stage: nn.Module | None = None):
        self.first_stage_model = first_stage or IdentityFirstStage()
        self.channels, self.image_size, self.latent_scale = self.first_stage_model.channels, WINDOW, LatentScale(1.0)
        self.latent_shape = (self.channels, WINDOW, WINDOW)
        self.tile_size = WINDOW * self.first_stage_model.downsampling
        self.device, self.cond_stage_model, self.learn_sigma = torch.device("cpu"), None, False
        self.cond_stage_model = SimpleNamespace(dropout=0.1, describe=dict)
        self.metadata, self.student, self.small_decoder = {}, None, None
        betas = schedules.make_betas("linear", 1000, 0.0015, 0.0195)
        self.sigmas = schedules.sigmas_from_alphas_cumprod((1 - betas).cumprod(0)).float()
        self.paint, self.rows = paint, []  # rows: windows of each call

    def denoiser(self, *_: object) -> TableDenoiser:
        def network(x: Tensor, time: Tensor, vector: Tensor) -> Tensor:
            self.rows.append(len(x))
            return self.paint(x, vector.view(-1, 1, 1, 1))

        return TableDenoiser(network, self.sigmas, "x0")

    def condition(self, features: Tensor) -> dict[str, Tensor]:
        return {"vector": torch.as_tensor(features)}

    def null_condition(self) -> dict[str, Tensor]:
        return {"vector": torch.zeros(1, 1)}

    def decode(self, latents: Tensor, decoder: str = "full") -> Tensor:
        own, latents = self.decoding(latents, decoder)
        return own.decode(latents)

    def decoding(self, latents: Tensor, decoder: str = "full") -> tuple[nn.Module, Tensor]:
        return self.first_stage_model, self.latent_scale.undo(latents)


def flat(x: Tensor, feature: Tensor) -> Tensor:
    return feature.expand_as(x)


def mixed(x: Tensor, feature: Tensor) -> Tensor:
    """Depends on all of the window and on the feature."""
    return 0.3 * x.roll(3, -1) + 0.2 * x.mean((1, 2, 3), keepdim=True) + 0.2 * feature


def grid(rows: int = 3, cols: int = 4) -> Tensor:
    return torch.linspace(-0.9, 0.9, rows * cols).view(rows, cols, 1)


@pytest.mark.parametrize("mode", ["shifted", "overlap"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_features_land_at_row_col(mode, interpolation):
    sampler = Sampler(steps=3, guidance_scale=1.0, progress=False)
    windows = Windows(mode=mode, interpolation=interpolation)
    image = large_image(Stub(flat), grid(), sampler=sampler, windows=windows)
    assert image.shape == (1, 3, 3 * WINDOW, 4 * WINDOW)
    corners = image[0, 0][[0, 0, -1, -1], [0, -1, 0, -1]]  # one window alone covers each of them
    torch.testing.assert_close(corners, grid()[[0, 0, -1, -1], [0, -1, 0, -1], 0], rtol=0, atol=1e-5)
    middles = image[0, 0, WINDOW // 2 :: WINDOW, WINDOW // 2 :: WINDOW]
    assert (middles - grid()[..., 0]).abs().max() < 0.3  # neighbours below differ by 0.65


@pytest.mark.parametrize("mode", ["shifted", "overlap"])
def test_one_window_is_the_untiled_sample_bitwise(mode):
    model, features = Stub(mixed), torch.full((1, 1, 1), 0.4)
    sampler = Sampler(steps=4, seed=3, guidance_interval="all", progress=False)
    image = large_image(model, features, sampler=sampler, windows=Windows(mode=mode))
    settled, cond = sampler.settled(model, "large_image"), model.condition(features[0])
    sigmas = settled.sigmas(model)
    x = canvas_noise(3, 3, WINDOW, WINDOW) * sigmas[0]
    alone = settled.guided(model, cond).solve(x, sigmas, cond, lambda i: x, lambda *_: None)
    assert torch.equal(image, alone.clamp(-1, 1))


@pytest.mark.parametrize("mode", ["shifted", "overlap"])
def test_a_canvas_in_main_memory_and_any_chunks_give_the_same_image(mode):
    images = [
        large_image(
            Stub(mixed),
            grid(),
            sampler=Sampler(steps=4, batch_size=size, progress=False),
            windows=Windows(mode=mode, offload=offload),
        )
        for size, offload in ((64, False), (1, False), (5, True))
    ]
    for image in images[1:]:
        torch.testing.assert_close(image, images[0], rtol=0, atol=1e-5)


def test_guidance_in_an_interval_saves_the_second_evaluation_elsewhere():
    def cost(**settings) -> tuple[Tensor, int]:
        model = Stub(mixed)
        return large_image(model, grid(), sampler=Sampler(steps=6, progress=False, **settings)), sum(model.rows)

    (always, twice), (never, once) = cost(guidance_interval="all"), cost(guidance_scale=1.0)
    assert twice == 2 * once
    everywhere, count = cost(guidance_interval=(0.0, 1e9))
    assert torch.equal(everywhere, always)
    assert count == twice
    partly, count = cost(guidance_interval=(1.0, 10.0))
    assert once < count < twice
    assert not torch.allclose(partly, always)
    assert not torch.allclose(partly, never)


def test_the_image_goes_into_an_array_of_the_user(tmp_path):
    image = large_image(Stub(flat), grid(), sampler=Sampler(steps=2, progress=False))
    bytes_ = image.add(1).mul(127.5).round()[0].movedim(0, -1).to(torch.uint8).numpy()
    memory = np.memmap(tmp_path / "image", np.uint8, "w+", shape=bytes_.shape)
    store = zarr.create_array(str(tmp_path / "z"), shape=bytes_.shape, dtype="u1", chunks=(16, 16, 3))
    for out in (memory, store):
        assert large_image(Stub(flat), grid(), out=out, sampler=Sampler(steps=2, progress=False)) is out
        assert np.array_equal(out[:], bytes_)
    with pytest.raises(UserError, match=r"out must be \(48, 64, 3\) uint8, as the image; got \(48, 60, 3\) uint8"):
        large_image(Stub(flat), grid(), out=np.zeros((48, 60, 3), np.uint8))


@pytest.mark.slow
def test_a_large_canvas_is_decoded_in_parts_into_an_array(monkeypatch):
    torch.manual_seed(0)
    ddconfig = dict(z_channels=4, resolution=64, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2], num_res_blocks=1,
                    attn_resolutions=[], dropout=0.0, mid_attention=False)  # fmt: skip
    model = Stub(mixed, AutoencoderKL(ddconfig, 4).eval())
    latents = torch.randn(1, 4, 40, 56)
    whole = decode_canvas(model, latents, progress=False)
    one = latents[..., :WINDOW, :WINDOW]
    assert torch.equal(decode_canvas(model, one, progress=False), model.decode(one).clamp(-1, 1))
    monkeypatch.setattr("ldm.sampling.canvas.DECODE_PART", 32)
    out = np.zeros((80, 112, 3), np.uint8)
    decode_canvas(model, latents, progress=False, out=out)
    parts = decode_canvas(model, latents, progress=False)
    assert parts.shape == (1, 3, 80, 112)
    assert np.array_equal(out, parts[0].movedim(0, -1).add(1).mul(127.5).round().numpy().astype(np.uint8))
    assert (parts - whole).abs().mean() < 0.15 * whole.std()  # halos are for trained decoders


def test_the_benchmarks_published_procedure_is_what_reproduces_the_published_code(monkeypatch):
    """Against `tiled` with the step's own noise, which test_tiled.py compares with the published latents."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    published = importlib.import_module("large_image").published
    model, features = Stub(mixed), grid(2, 2)
    size = (2 * WINDOW, 2 * WINDOW)
    options = argparse.Namespace(size=size, steps=5, batch_size=3, guidance_scale=2.0, precision="fp32")
    image = published(model, features, options, seed=1)

    field = FeatureField(features, size, WINDOW, "slerp")
    guided = cfg(model.denoiser(), model.null_condition(), 2.0)
    canvas = tiled(guided, WINDOW, WINDOW // 4, lambda corners: model.condition(field.at(corners)))
    alphas, visited = 1 / (1 + model.sigmas**2), [999, 799, 599, 399, 199]
    betas = 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])
    sigmas = torch.cat([model.sigmas[visited], torch.zeros(1)])
    x = canvas_noise(1, 3, *size) / alphas[999].sqrt()
    for step, (sigma, target) in enumerate(pairwise(sigmas)):
        eta = float((betas[visited[step]] / (1 - (1 + target**2) / (1 + sigma**2))).sqrt())
        noise = canvas_noise(1, 3, *size, stream=step + 1)
        x = samplers.sample_ddim(canvas, x, torch.stack([sigma, target]), {}, lambda _, n=noise: n, eta=eta)
    torch.testing.assert_close(image, x.clamp(-1, 1), rtol=0, atol=1e-5)


def test_copies_within_main_memory_are_none():
    values, home = torch.arange(3.0), torch.device("cpu")
    assert send(values, home) is values
    assert receive(values, home)() is values


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_to_a_gpu_and_back_arrive():
    values, device = torch.randn(64, 1024), torch.device("cuda")
    waiting = [receive(send(values + i, device) * 2, torch.device("cpu")) for i in range(4)]
    for i, arrived in enumerate(waiting):
        torch.testing.assert_close(arrived(), (values + i) * 2)
