"""The small decoder: what it learns, that it travels in the model's folder, and that parts of a canvas fit together."""

from __future__ import annotations

import pytest
import torch
from test_distillation import batch, teacher
from typer.testing import CliRunner

import ldm
from ldm.autoencoder.small import SmallDecoder
from ldm.cli import app
from ldm.distillation.decoder import DecoderDistillation
from ldm.errors import UserError
from ldm.model_folder import load_model, write_model_folder
from ldm.sampling import canvas

SIZE = {"widths": [8, 8], "blocks": [1, 1]}


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = teacher(tmp_path_factory.mktemp("small") / "teacher")
    return DecoderDistillation(str(folder), **SIZE), folder


@pytest.fixture(scope="module")
def model(training, tmp_path_factory):
    """A model with a decoder that learnt nothing, read from its folder."""
    folder = tmp_path_factory.mktemp("small") / "own"
    return load_model(write_model_folder(folder, training[0].node, training[0].state_dict(), {}))


def test_it_is_told_of(training, tmp_path):
    folder = write_model_folder(tmp_path / "own", training[0].node, training[0].state_dict(), {})
    told = [CliRunner().invoke(app, ["describe", str(each)]).output for each in (folder, training[1])]
    assert ["small decoder: --decoder small" in each for each in told] == [True, False]


def test_only_the_decoder_learns_and_it_learns_all_over(training):
    own = training[0]
    own.loss(batch(own), torch.Generator()).mean().backward()
    moved = {name for name, weight in own.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert moved == {f"small_decoder.{name}" for name, _ in own.small_decoder.named_parameters()}


def test_it_comes_to_decode_what_the_first_stage_does(tmp_path):
    own = DecoderDistillation(str(teacher(tmp_path / "teacher")), **SIZE)
    optimizer = torch.optim.Adam(own.small_decoder.parameters(), 3e-3)
    given, losses = batch(own), []
    for _ in range(60):
        loss = own.loss(given, torch.Generator()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_parts_of_a_canvas_are_the_whole_of_it(model, monkeypatch):
    latents = torch.randn(1, 4, 60, 40)
    whole = model.small_decoder(latents)
    monkeypatch.setattr(canvas, "DECODE_PART", 64)
    parts = canvas.decode_canvas(model, latents, progress=False, decoder="small")
    assert torch.allclose(parts, whole.clamp(-1, 1), atol=1e-5)


def test_a_place_depends_on_as_many_latents_as_it_says():
    decoder = SmallDecoder(4, factor=8, widths=(8, 8, 8), blocks=(2, 1, 1))
    z = torch.zeros(1, 4, 64, 64, requires_grad=True)
    decoder(z)[0, 0, 256, 256].backward()
    rows = z.grad[0].abs().sum((0, 2)).nonzero()[:, 0]
    assert 32 - decoder.reach <= int(rows.min()) < int(rows.max()) <= 32 + decoder.reach


def test_it_is_chosen_by_every_way_of_sampling(model, training):
    cond, grid = model.condition(features=torch.randn(2, 6)), torch.randn(2, 2, 6)
    small, full = (ldm.Sampler(steps=2, progress=False, decoder=name) for name in ("small", "full"))
    calls = (
        lambda s: ldm.sample(model, cond, sampler=s),
        lambda s: ldm.large_image(model, grid, sampler=s),
        lambda s: ldm.translate(model, torch.zeros(1, 3, 32, 32), sampler=s),
    )
    for call in calls:
        one, other = call(small), call(full)
        assert one.shape == other.shape
        assert not torch.equal(one, other)
    plain = load_model(training[1])
    assert torch.equal(ldm.sample(plain, cond, sampler=full), ldm.sample(model, cond, sampler=full))
    with pytest.raises(UserError, match="has no small decoder"):
        ldm.sample(plain, cond, sampler=small)


def test_what_it_cannot_be_of_is_told(model, tmp_path, training):
    with pytest.raises(UserError, match="shrink images by a power of 2; got 1"):
        DecoderDistillation(str(teacher(tmp_path / "pixels", pixels=True)), **SIZE)
    with pytest.raises(UserError, match="has 2 widths and blocks"):
        DecoderDistillation(str(training[1]), widths=[8], blocks=[1])
    again = write_model_folder(tmp_path / "again", training[0].node, training[0].state_dict(), {})
    with pytest.raises(UserError, match="has a small decoder already"):
        DecoderDistillation(str(again), **SIZE)
