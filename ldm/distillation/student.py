"""Distillation: a student that needs two to four evaluations of its teacher's network, and one where guidance took two.

    python main.py -t --base configs/distil/ssl.yaml model.params.teacher=models/my-model
    histoldm export logs/<time>_distil --out models/my-student

The run's checkpoints export as any other: what comes out is a model folder that samples by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from ldm.autoencoder.autoencoder import IdentityFirstStage
from ldm.conditioners.compose import ConditionerSet
from ldm.diffusion.denoiser import Cond, Denoiser, per_sample
from ldm.diffusion.guidance import cfg, clip, compose
from ldm.diffusion.losses import error_scale, scaled_error
from ldm.diffusion.policies import Draws, Imitation, clipped, clock, follow, level
from ldm.diffusion.samplers import sample_consistency, sample_dpmpp_2m, sample_policy
from ldm.diffusion.schedules import karras_sigmas
from ldm.diffusion.student import Student
from ldm.distillation.base import Distilling, read_teacher
from ldm.errors import UserError
from ldm.latent_diffusion import LatentDiffusion
from ldm.networks.ema import EMA
from ldm.rng import sample_noise

STUDENT = "ldm.networks.student.StudentNetwork"
LEVELS = 40  # noise levels between which consistency is trained
HUBER = 1e-3  # of the consistency loss: below it errors count by their square


class Distillation(Distilling):
    """Trains a student of a model: `unet_config`, first stage and conditioner are the teacher's, whatever it is.

    The student begins as its teacher. Data give the teacher's conditions, and latents or images; without these, a
    policy is trained on the student's own way from noise alone.

    Args:
        teacher: model folder of the teacher, of any parameterisation and network, on latents or pixels.
        method: policy (pi-Flow, arXiv:2510.14974), consistency (arXiv:2310.04378) or guidance (arXiv:2210.03142).
        steps, policy, components, substeps, shift: of the student (`ldm.diffusion.student.Student`).
        guidance: lowest and highest guidance scale that it is told; null for a student that is told none. Ignored of
            teachers that were not trained to do without their condition.
        states: places of a step where the teacher is asked. window: substeps that velocities are averaged over.
        teacher_steps: training steps in which the teacher leads at first, less and less, on the way between.
        spread: random differences between the copies of the network's outputs at first.
        use_ema, ema_decay, weight_decay, warmup_steps, decay_steps, monitor, seed: as of LatentDiffusion.
    """

    def __init__(
        self,
        teacher: str,
        method: str = "policy",
        steps: Sequence[int] = (2, 4),
        policy: str = "mixture",
        components: int = 8,
        substeps: int = 32,
        shift: float = 1.0,
        guidance: Sequence[float] | None = (1.0, 6.0),
        states: int = 2,
        window: int = 1,
        teacher_steps: int = 0,
        spread: float = 0.05,
        use_ema: bool = True,
        ema_decay: float = 0.999,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        monitor: str = "val/loss",
        seed: int = 0,
    ):
        params, metadata, leader = read_teacher(teacher)
        if leader.student is not None:
            raise UserError(f"the teacher {teacher} is itself a student; give the model that it was distilled from.")
        if states < 1 or not 0 <= window < substeps:
            raise UserError(f"states are 1 or more, window from 0 below substeps; got {states} and {window}.")
        conditioner = leader.cond_stage_model
        names: Sequence[str] = ()
        if conditioner is None or not conditioner.dropout:
            guidance = None
        elif guidance is not None and isinstance(conditioner, ConditionerSet):
            names = list(conditioner.members)
        about = Student(method, tuple(steps), policy, components, substeps, shift, guidance, tuple(names))
        params = {**params, "learn_sigma": False, "student": _plain(about)}
        params["unet_config"] = {
            "target": STUDENT,
            "params": {"network": params["unet_config"], "channels": leader.channels, **about.outputs},
        }
        training = {"weight_decay": weight_decay, "warmup_steps": warmup_steps, "decay_steps": decay_steps}
        about_teacher = {**metadata, "teacher": Path(teacher).name}
        super().__init__(params, about_teacher, {**training, "monitor": monitor, "seed": seed})
        self.first_stage_model.load_state_dict(leader.first_stage_model.state_dict())
        if conditioner is not None:
            self.cond_stage_model.load_state_dict(conditioner.state_dict())
            self.cond_stage_model.requires_grad_(False).eval()
        if self.scale_by_std:
            self.scale_factor.copy_(leader.scale_factor)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model.diffusion_model.begin(leader.model.diffusion_model.state_dict(), spread)
        self.model_ema = EMA(self.model, ema_decay) if use_ema else None
        if self.model_ema is not None:
            self._ddp_params_and_buffers_to_ignore = [f"model_ema.{name}" for name, _ in self.model_ema.named_buffers()]
        self._leader = [leader]  # no part of the student, which is saved without it
        self.imitation = Imitation(states, substeps, window, shift)
        self.teacher_steps = teacher_steps
        if guidance is None:
            rank_zero_info(f"{teacher} is not guided: the student follows it as it is")

    @property
    def leader(self) -> LatentDiffusion:
        """The teacher."""
        return self._leader[0]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._leader = [self.leader.to(self.device)]

    def train(self, mode: bool = True) -> Distillation:
        """Only the network trains: the conditioner is the teacher's, as it was."""
        super().train(mode)
        if self.cond_stage_model is not None:
            self.cond_stage_model.eval()
        return self

    def teacher_denoiser(self, scales: Tensor) -> Denoiser:
        """The teacher under guidance scales (B,S) of each sample; clipped, of pixels."""
        plain, null = self.leader.denoiser(), self.null_condition()
        if not scales.shape[1]:
            guided = plain
        elif self.student.conditions:
            groups = {name: [key for key in null if key.partition("/")[0] == name] for name in self.student.conditions}
            terms = [
                ({key: null[key] for key in null if key not in groups[name]}, scale)
                for name, scale in zip(self.student.conditions, scales.unbind(1))
            ]
            guided = compose(plain, null, terms)
        else:
            guided = cfg(plain, null, scales[:, 0])
        return clip(guided) if isinstance(self.first_stage_model, IdentityFirstStage) else guided

    def loss(self, batch: Mapping[str, Tensor], rng: torch.Generator, dropout: bool = True) -> Tensor:
        """The student's loss (B,): how far it is from its teacher, at places of a step that are drawn from rng."""
        x0 = self.latents_of(batch, rng) if "latent" in batch or "image" in batch else None
        drop = None
        count = len(next(iter(batch.values()))) if x0 is None else len(x0)
        if dropout and self.cond_stage_model is not None:
            drop = self.cond_stage_model.draw(count, rng)
        with torch.no_grad():
            cond = self.condition_of(batch, drop)
        scales = torch.zeros(count, 0, device=self.device)
        if self.student.scales:
            low, high = self.student.guidance
            place = torch.rand(count, self.student.scales, generator=rng, device=self.device)
            scales = low * (high / low) ** place  # evenly by their logarithm, as it is told them
        teacher, told = self.teacher_denoiser(scales), self.student.told(cond, scales)
        if self.student.method == "policy":
            return self._imitation(count, x0, cond, told, teacher, rng)
        if x0 is None:
            raise UserError(f"the method {self.student.method} is trained on latents or images; the data give none.")
        run = self._consistency if self.student.method == "consistency" else self._guidance
        return run(x0, cond, told, teacher, rng)

    def _imitation(
        self, count: int, x0: Tensor | None, cond: Cond, told: Cond, teacher: Denoiser, rng: torch.Generator
    ) -> Tensor:
        student, policies = self.student, self.policies()
        if isinstance(self.first_stage_model, IdentityFirstStage):
            policies = clipped(policies)
        steps = student.steps[int(torch.randint(len(student.steps), (1,), generator=rng, device=self.device))]
        sigmas = student.sigmas(steps, self.denoiser().sigma_max).to(self.device)
        noise = torch.randn(count, *self.latent_shape, generator=rng, device=self.device)
        if x0 is None:  # one step for all, which the student itself comes to
            at = int(torch.randint(steps, (1,), generator=rng, device=self.device))
            x, index = noise * sigmas[0], torch.full((count,), at, device=self.device)
            for each in range(at):
                with torch.no_grad():
                    start, end = (sigmas[i].expand(count) for i in (each, each + 1))
                    policy = policies(x, start, end, told)
                    x = follow(policy, x, start, end, told, self._substeps(start, end), student.shift)
        else:
            index = torch.randint(steps, (count,), generator=rng, device=self.device)
            x = x0 + per_sample(sigmas[index], x0) * noise
        start, end = sigmas[index], sigmas[index + 1]
        policy = policies(x, start, end, told)
        share = 0.0
        if self.training and self.teacher_steps:
            share = max(0.0, 1 - self.global_step / self.teacher_steps)
        draws = Draws.of(count, self.imitation.states, rng)
        return self.imitation.compare(policy, teacher, x, start, end, told, cond, share, draws)[0]

    def _substeps(self, start: Tensor, end: Tensor) -> Tensor:
        length = clock(start, self.student.shift) - clock(end, self.student.shift)
        return (length * self.student.substeps).round().clamp(min=1)

    def _guidance(self, x0: Tensor, cond: Cond, told: Cond, teacher: Denoiser, rng: torch.Generator) -> Tensor:
        sigma = self.training_sigmas(len(x0), rng)
        x = x0 + per_sample(sigma, x0) * torch.randn(x0.shape, generator=rng, device=self.device)
        with torch.no_grad():
            wanted = teacher(x, sigma, cond)
        scale = error_scale(self.parameterization, sigma, self.sigma_data)
        return scaled_error(self.make_denoiser(self.model)(x, sigma, told), wanted, scale)

    def _consistency(self, x0: Tensor, cond: Cond, told: Cond, teacher: Denoiser, rng: torch.Generator) -> Tensor:
        times = torch.linspace(0, 1, LEVELS + 1, device=self.device)[1:] * clock(
            torch.tensor(self.denoiser().sigma_max, device=self.device), self.student.shift
        )
        levels = torch.cat([times.new_zeros(1), level(times, self.student.shift)])
        index = torch.randint(1, LEVELS + 1, (len(x0),), generator=rng, device=self.device)
        sigma, lower = levels[index], levels[index - 1]
        x = x0 + per_sample(sigma, x0) * torch.randn(x0.shape, generator=rng, device=self.device)
        student = self.make_denoiser(self.model)
        with torch.no_grad():
            guess = teacher(x, sigma, cond)
            below = guess + (x - guess) * per_sample(lower / sigma, x)
            with self.averaged_weights() if self.training else nullcontext():
                wanted = student(below, lower.clamp(min=float(levels[1]) / 2), told)
            wanted = torch.where(per_sample(lower > 0, x), wanted, below)
        error = (student(x, sigma, told) - wanted).float().square().flatten(1).mean(1)
        return (error + HUBER**2).sqrt() - HUBER

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], n: int = 8) -> dict[str, Tensor]:
        """The same noise under the batch's conditions, by the teacher in 20 steps and by the student in its own."""
        batch = {key: value[:n] for key, value in batch.items()}
        cond = self.condition_of(batch)
        count = len(next(iter(batch.values())))
        highest = self.denoiser().sigma_max
        noise = sample_noise(range(count), self.latent_shape).to(self.device, self.sample_dtype)
        low, high = self.student.guidance or (1.0, 1.0)
        scales = torch.full((count, self.student.scales), min(max(2.0, low), high), device=self.device)
        levels = karras_sigmas(20, self.denoiser().sigma_min, highest).to(noise)
        made = {"teacher_20_steps": sample_dpmpp_2m(self.teacher_denoiser(scales), noise * levels[0], levels, cond)}
        told, pixels = self.student.told(cond, scales), isinstance(self.first_stage_model, IdentityFirstStage)
        with self.averaged_weights():
            for steps in self.student.steps:
                sigmas = self.student.sigmas(steps, highest).to(noise)
                x = noise * sigmas[0]
                if self.student.method == "policy":
                    policies = clipped(self.policies()) if pixels else self.policies()
                    x = sample_policy(policies, x, sigmas, told, self.student.substeps, self.student.shift)
                else:
                    run = sample_consistency if self.student.method == "consistency" else sample_dpmpp_2m
                    levels_of = sigmas if self.student.method == "consistency" else levels
                    more = {"noise": lambda step: sample_noise(range(count), self.latent_shape, stream=step + 1)}
                    x = noise * levels_of[0]
                    x = run(self.denoiser(), x, levels_of, told, **(more if run is sample_consistency else {}))
                made[f"student_{steps}_steps"] = x
        return {name: self.decode(x.float()) for name, x in made.items()}


def _plain(student: Student) -> dict[str, Any]:
    """What a model folder holds of a student: plain lists, and what differs from the default alone."""
    usual = asdict(Student())
    own = asdict(student)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in own.items() if v != usual[k] or k == "method"}
