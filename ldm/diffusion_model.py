"""What a diffusion model is to those who sample: its denoiser, conditions and latents, and nothing of its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoder.autoencoder import IdentityFirstStage, UnitFirstStage
from ldm.autoencoder.feature_codec import FeatureCodec
from ldm.autoencoder.latent import LatentScale
from ldm.conditioners.compose import conditions_given, keys_of
from ldm.diffusion.denoiser import Cond, Denoiser, EDMDenoiser, FlowDenoiser, TableDenoiser
from ldm.diffusion.policies import Policies
from ldm.errors import UserError
from ldm.networks.cache import CastNetwork, CompiledNetwork, DeepCache
from ldm.networks.takes import declared


class DiffusionWrapper(nn.Module):
    """Holds the network as `diffusion_model`, the name under which published checkpoints know it."""

    def __init__(self, diffusion_model: nn.Module):
        super().__init__()
        self.diffusion_model = diffusion_model

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.diffusion_model(*args, **kwargs)


class DiffusionModel(nn.Module):
    """The callables that samplers, guidance and tiling work with, of a network, a first stage and a conditioner.

    Attributes:
        model: the network, as `diffusion_model`. first_stage_model, cond_stage_model: its other parts; the latter None
            of an unconditional model. small_decoder: a decoder distilled from the first stage's, or None.
        channels, image_size: of a tile's latent. sigmas: the noise table. parameterization: what the network predicts.
        student: what a distilled model was trained for, or None.
    """

    first_stage_model: nn.Module
    cond_stage_model: nn.Module | None
    device: torch.device

    @property
    def latent_scale(self) -> LatentScale:
        """How first-stage latents become those of this model."""
        return LatentScale(self.scale_factor, self.shift_factor)

    @property
    def tile_size(self) -> int:
        """Side in pixels of the images that it was trained on."""
        return self.image_size * self.first_stage_model.downsampling

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of what is denoised of one sample: (C,h,w), or (C,N) of models of tokens."""
        sides = 1 if declared(self.model.diffusion_model).sequence else 2
        return (self.channels, *[self.image_size] * sides)

    @property
    def makes(self) -> str:
        """What its samples are: images, tokens that condition images, or fields of features that do."""
        if isinstance(self.first_stage_model, FeatureCodec):
            return "fields"
        return "tokens" if declared(self.model.diffusion_model).sequence else "images"

    @property
    def image_channels(self) -> int:
        """Channels of its images: 3 (RGB) or 1 (gray)."""
        pixels = isinstance(self.first_stage_model, (IdentityFirstStage, UnitFirstStage))
        return self.channels if pixels else 3

    @property
    def image_condition(self) -> str | None:
        """The condition that is an image of the same place: of a model that translates modalities, or is led by one."""
        return next((key for kind in ("image", "control") for key in keys_of(self.cond_stage_model, kind)), None)

    @property
    def sample_dtype(self) -> torch.dtype:
        """What a sampler's x is: float32, but for networks that float32 is too coarse for, where the device can."""
        return torch.float32 if self.device.type == "mps" else declared(self.model.diffusion_model).dtype

    def make_denoiser(self, network: Callable[..., Tensor]) -> Denoiser:
        """`network` as denoiser(x, sigma, cond) -> x0, with this model's parameterisation and noise table."""
        if self.parameterization == "edm":
            return EDMDenoiser(network, self.sigma_data)
        if self.parameterization == "flow":
            return FlowDenoiser(network, self.time_shift)
        return TableDenoiser(network, self.sigmas, self.parameterization)

    def denoiser(
        self,
        precision: torch.dtype = torch.float32,
        compile: bool = False,
        cache: int = 1,
        network: nn.Module | None = None,
    ) -> Denoiser:
        """The model as denoiser(x, sigma, cond) -> x0; below float32 the network runs under autocast.

        compile: through torch.compile, for batches of one size. cache: compute the network's deep features at every
        `cache`-th step only (`DeepCache`; approximate); such a denoiser is for one sampling run after another. network:
        in place of `model`, as one with adapters is.
        """
        return self.make_denoiser(self._prepared(precision, compile, cache, network))

    def policies(
        self, precision: torch.dtype = torch.float32, compile: bool = False, network: nn.Module | None = None
    ) -> Policies:
        """The policies of a student, one for each step of it; arguments as of `denoiser`."""
        return self.student.policies(self._prepared(precision, compile, 1, network), self.make_denoiser)

    def _prepared(
        self, precision: torch.dtype, compile: bool, cache: int, network: nn.Module | None
    ) -> Callable[..., Tensor]:
        """The network as it is called."""
        if compile and cache > 1:
            raise UserError("a network is either compiled or keeps its deep features; leave one of them out.")

        def wrap(model: nn.Module) -> Callable[..., Tensor]:
            if cache > 1:
                return DeepCache(model.diffusion_model, cache)
            return CompiledNetwork(model) if compile else model

        network = self.model if network is None else network
        return wrap(network) if precision == torch.float32 else CastNetwork(network, precision, wrap)

    @torch.no_grad()
    def condition(self, features: Any = None, **given: Any) -> Cond:
        """The condition of what is given by name: `condition(score=0.7, class_="LUAD", features=array)`.

        Each is a value, or a list or array of N: one value goes with N of another condition. `features` stands for
        the SSL features (N,D), whatever their key; a trailing underscore (`class_`) is dropped. Conditions of the model
        that are not given are null. UserError: an unknown name or value, numbers that do not go together.
        """
        given |= {} if features is None else {"features": features}
        if self.cond_stage_model is None:
            raise UserError(f"the model is unconditional; it takes no {' or '.join(given) or 'condition'}.")
        return self._encoded(conditions_given(self.cond_stage_model, given))

    def condition_of(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> Cond:
        """The condition of a batch; samples where drop (B,) is true get the unconditional value."""
        return {} if self.cond_stage_model is None else self._encoded(self.cond_stage_model(batch, drop))

    def _encoded(self, cond: Cond) -> Cond:
        """A condition whose images are latents, where the network is told those."""
        images = set(cond) & set(self.cond_stage_model.encoded)
        return {**cond, **{part: self.encode(cond[part].to(self.device)) for part in images}} if images else cond

    def null_condition(self) -> Cond:
        """The unconditional condition of one sample."""
        return {} if self.cond_stage_model is None else self.cond_stage_model.null()

    def encode(self, images: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Scaled latents (B,C,h,w) of images (B,3,H,W) in [-1,1]: the posterior's mode, or a sample if rng is given."""
        with torch.no_grad():
            return self.latent_scale.apply(self.first_stage_model.latent(images, rng).float())

    def decode(self, latents: Tensor, decoder: str = "full") -> Tensor:
        """Images (B,3,H,W) of scaled latents (B,C,h,w), by the first stage or the small decoder."""
        own, latents = self.decoding(latents, decoder)
        return own.decode(latents)

    def decoding(self, latents: Tensor, decoder: str = "full") -> tuple[nn.Module, Tensor]:
        """What decodes, `full` or `small`, and scaled latents as it takes them."""
        if decoder == "small":
            return self.small_decoder, latents
        return self.first_stage_model, self.latent_scale.undo(latents)
