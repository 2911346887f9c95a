"""The differentiable LMI, and guidance by it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.diffusion.guidance import likeness_guidance
from ldm.diffusion.samplers import sample_euler, sample_heun
from ldm.errors import UserError
from ldm.networks.lmi import lmi_score


def smooth(count: int = 2, side: int = 24, seed: int = 0) -> torch.Tensor:
    """Smooth images (count,1,side,side) in [0, 1]."""
    coarse = torch.rand(count, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)


def test_a_score_is_of_structure_and_not_of_grey_levels():
    image = smooth()
    itself, inverted = lmi_score(image, image), lmi_score(image, 1 - 0.6 * image)
    other = lmi_score(image, smooth(seed=1))
    turned = lmi_score(image, image.flip(-1))
    assert itself.shape == (2,)
    assert ((itself > 0.3) & (itself < 1)).all()
    assert (inverted > 0.7 * itself).all()
    assert (torch.maximum(other, turned) < 0.6 * itself).all()
    assert (lmi_score(image, torch.full_like(image, 0.4)) < 0.01).all()


def test_black_ground_of_the_source_counts_for_nothing():
    image, target = smooth(side=24), smooth(seed=3)
    framed, others = F.pad(image, [0, 24, 0, 0]), F.pad(target, [0, 24, 0, 0], value=0.7)
    others[..., 36:] += 0.1 * torch.rand(2, 1, 24, 12)
    near = lmi_score(framed[..., :24], others[..., :24], window=6, stride=6)
    torch.testing.assert_close(lmi_score(framed, others, window=6, stride=6), near)


def test_its_gradient_is_that_of_finite_differences():
    source, target = smooth(1, 12), 0.2 + 0.6 * torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(2))
    target.requires_grad_()
    (gradient,) = torch.autograd.grad(lmi_score(source, target).sum(), target)
    step = torch.randn(target.shape, generator=torch.Generator().manual_seed(4))
    step /= step.norm()
    with torch.no_grad():
        ahead, behind = (lmi_score(source, target + sign * 5e-3 * step) for sign in (1, -1))
    assert float((gradient * step).sum()) == pytest.approx(float(ahead - behind) / 1e-2, rel=0.05)


def test_images_smaller_than_a_window_are_one_message():
    with pytest.raises(UserError, match="smaller than a window of 9"):
        lmi_score(torch.zeros(1, 1, 8, 20), torch.zeros(1, 1, 8, 20))


def gaussian(x, sigma, cond):
    """The exact denoiser of images drawn from N(0, 1)."""
    return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


def test_guidance_by_a_quadratic_likeness_is_the_posterior_mean():
    """N(0,1) seen through y = x0 + noise of variance 1/w: at one noise level x0 is known in closed form."""
    x, y, sigma, weight = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0.1, 1.0, 5.0]), 0.7
    guided = likeness_guidance(gaussian, lambda x0: -(x0 - y).square().mean((1, 2, 3)) / 2, weight)
    s = sigma.view(-1, 1, 1, 1)
    x0 = x / (1 + s**2)
    expected = x0 + weight * s**2 * (y - x0) / (1 + s**2)
    torch.testing.assert_close(guided(x, sigma, {}), expected)


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_a_sampler_without_gradients_is_led_to_the_source(sampler):
    source = smooth()
    start = 20 * torch.randn(source.shape, generator=torch.Generator().manual_seed(5))
    sigmas = torch.tensor([20.0, 8.0, 3.0, 1.5, 0.8, 0.4, 0.2, 0.1, 0.0])

    def likeness(x0):
        return lmi_score(source, (x0 + 1) / 2)

    found = {}
    for scale in (0.0, 0.3):
        with torch.no_grad():
            found[scale] = likeness(sampler(likeness_guidance(gaussian, likeness, scale), start, sigmas, {}))
    assert (found[0.3] > 1.5 * found[0.0]).all()
