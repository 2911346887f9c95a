"""The arms of `convergence.py`, and a run of one: trained for a processor time, judged at fractions of it.

How long a step takes is timed once, all arms in turns, and the least counts: other work on a machine lengthens steps,
and would give one arm more of them than another. The budget of an arm is then a number of steps.

A run is a folder. `state.pt` holds all that it goes on from, `<fraction>.json` and `.pt` what was measured there, so a
run that was killed loses what came after its last checkpoint, and a finished one is not trained again.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from convergence_data import ENCODER, judged
from torch import Tensor

from ldm.files import write_text
from ldm.images.write import to_uint8

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

PACE = "pace.json"
PUBLISHED_SAMPLER = {"solver": "ddim", "steps": 50, "schedule": "uniform", "eta": 0.0}
SHOWN = 10  # samples that a checkpoint keeps as pictures
LAST = 1.0


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    budget: processor seconds of a run; checkpoints: fractions of it, ascending; candidate: that which arms are tried
    for; longer: those to which one run of the recipe goes on. rounds: of timing. count: images that are judged; steps:
    of their sampler, dpmpp_2m.
    """

    budget: float = 144.0
    checkpoints: tuple[float, ...] = (1 / 8, 1 / 4, 1 / 2, LAST)
    candidate: float = 1 / 4
    longer: tuple[float, ...] = (2.0, 4.0)
    seeds: int = 3
    count: int = 192
    steps: int = 8
    rounds: int = 21
    batch: int = 16
    stride: int = 64
    first_stage_steps: int = 228
    channels: int = 32
    hidden: int = 128
    depth: int = 4


QUICK = Scale(
    budget=2.0, checkpoints=(1 / 4, LAST), seeds=2, count=16, steps=4, rounds=1, batch=4, stride=128,
    first_stage_steps=2, hidden=64, depth=2, longer=(2.0,),
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A way of training. grid: the condition is a map beside the latent too, else one token alone, as published.

    rate: the learning rate; reached in `warmup` steps, then constant.
    """

    words: str
    network: str = "unet"
    parameterization: str = "eps"
    min_snr: float | None = None
    grid: bool = False
    repa: float | None = None
    rate: float = 1e-3
    warmup: int = 50


RECIPES = ("recipe", "recipe-1e-4")
ARMS = {
    "recipe": Arm("the recipe: UNet, eps, one token"),
    "recipe-1e-4": Arm("the recipe with learning rate 1e-4", rate=1e-4, warmup=100),
    "grid": Arm("the recipe + the condition as a map", grid=True),
    "token-v": Arm("the recipe + v, min-SNR 5", parameterization="v", min_snr=5.0),
    "v": Arm("the condition as a map; v, min-SNR 5", parameterization="v", min_snr=5.0, grid=True),
    "flow": Arm("the condition as a map; flow, times logit-normal", parameterization="flow", grid=True),
    "v-repa": Arm("v + REPA", parameterization="v", min_snr=5.0, grid=True, repa=0.5),
    "flow-repa": Arm("flow + REPA", parameterization="flow", grid=True, repa=0.5),
    "transformer": Arm("flow by a transformer", "transformer", "flow", grid=True),
    "transformer-repa": Arm("flow by a transformer + REPA", "transformer", "flow", grid=True, repa=0.5),
}
CANDIDATES = tuple(name for name in ARMS if name not in RECIPES)
MAP, CONTEXT, FEATURE = 8, 128, 512


def network(arm: Arm, scale: Scale, channels: int, side: int) -> dict[str, Any]:
    """The node of an arm's network, for latents of `channels` x side x side."""
    own = {
        "image_size": side, "in_channels": channels + MAP * arm.grid, "out_channels": channels, "context_dim": CONTEXT,
    }  # fmt: skip
    if arm.network == "transformer":
        own |= {"patch_size": 2, "hidden_size": scale.hidden, "depth": scale.depth, "num_heads": scale.hidden // 32}
        return {
            "target": "ldm.networks.dit.DiT",
            "params": own | {"qk_norm": "rms", "mlp": "swiglu", "positions": "rotary"},
        }
    own |= {"model_channels": scale.channels, "channel_mult": [1, 2], "attention_resolutions": [2]}
    own |= {"num_res_blocks": 1, "num_heads": 1, "use_spatial_transformer": True}
    return {"target": "ldm.networks.unet.UNetModel", "params": own}


def build(arm: Arm, scale: Scale, data: dict[str, Tensor], first_stage: Path, seed: int) -> LatentDiffusion:
    """An untrained model; latents are brought to unit variance, for all arms alike."""
    from ldm.latent_diffusion import LatentDiffusion
    from ldm.networks.repa import projection

    torch.manual_seed(seed)
    _, channels, side, _ = data["latent"].shape
    kind = "GridPatchEmbedder" if arm.grid else "PatchEmbedder"
    middle = {"unet": 5, "transformer": max(1, scale.depth // 2)}[arm.network]
    repa = (
        {"feature": f"{ENCODER.name}-tokens4", "block": middle, "weight": arm.repa, "hidden": 256} if arm.repa else None
    )
    model = LatentDiffusion(
        network(arm, scale, channels, side),
        {"target": "ldm.model_folder.load_first_stage", "params": {"folder": str(first_stage)}},
        {
            "target": f"ldm.conditioners.ssl.{kind}",
            "params": {"embed_dim": FEATURE, "context_dim": CONTEXT, **({"map_channels": MAP} if arm.grid else {})},
        },
        parameterization=arm.parameterization, linear_start=0.0015, linear_end=0.0195, min_snr_gamma=arm.min_snr,
        scale_factor=float(1 / data["latent"].std()), repa=repa, warmup_steps=arm.warmup, seed=seed,
    )  # fmt: skip
    model.learning_rate = arm.rate
    if repa:
        model.repa = projection(model.alignment, model.model.diffusion_model, data["repa"][0], seed)
    return model


class Run:
    """A training of one arm with one seed in a folder, `step` steps of it done."""

    def __init__(self, name: str, seed: int, scale: Scale, out: Path):
        self.name, self.seed, self.scale, self.out = name, seed, scale, out
        self.folder = out / "runs" / f"{name}-{seed}"
        self.arm, self.step = ARMS[name], 0

    def measured(self, fraction: float) -> Path:
        return self.folder / f"{fraction:.4f}.json"

    def marks(self, until: float) -> list[float]:
        """The fractions up to one at which it is measured."""
        return [at for at in (*self.scale.checkpoints, *self.scale.longer) if at <= until]

    def finished(self, until: float) -> bool:
        return all(self.measured(at).exists() for at in self.marks(until))

    def go(self, until: float = LAST) -> None:
        """Train up to a fraction of the budget, and measure at each checkpoint on the way."""
        if self.finished(until):
            return
        torch.set_num_threads(1)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.load()
        pace = json.loads((self.out / PACE).read_text())[self.name]
        for at in self.marks(until):
            if self.step < (steps := max(1, round(at * self.scale.budget / pace))):
                while self.step < steps:
                    self.advance()
                self._save()
            if not self.measured(at).exists():
                self._measure(at)

    def load(self) -> None:
        """The model, untrained or as it was saved."""
        self.data = torch.load(self.out / "train.pt", weights_only=True)
        self.real = torch.load(self.out / "real.pt", weights_only=True)
        self.model = build(self.arm, self.scale, self.data, self.out / "first-stage", self.seed)
        self.model.train()
        made = self.model.configure_optimizers()
        self.optimizer, self.schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        if (self.folder / "state.pt").exists():
            state = torch.load(self.folder / "state.pt", weights_only=True)
            self.step = state["step"]
            self.model.load_state_dict(state["model"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])

    def _save(self) -> None:
        own = {k: v for k, v in self.model.state_dict().items() if not k.startswith("first_stage_model.")}
        state = {"step": self.step, "model": own}
        state |= {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        torch.save(state, self.folder / "state.new")
        os.replace(self.folder / "state.new", self.folder / "state.pt")

    def advance(self) -> None:
        """One step of training."""
        from ldm.networks.repa import watched
        from ldm.rng import generator, training_generator

        model = self.model
        rows = torch.randint(
            len(self.data["latent"]), (self.scale.batch,), generator=generator(self.seed, 1, self.step)
        )
        batch = {key: values[rows] for key, values in self.data.items()}
        with watched(model.model.diffusion_model, model.alignment) as maps:
            loss = model.loss(batch, training_generator(self.seed, 0, self.step)).mean()
        if model.alignment is not None:
            loss = loss + model.alignment.weight * model.repa(maps[0], batch["repa"]).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        self.optimizer.step()
        self.schedule.step()
        model.model_ema.update(model.model)
        self.step += 1

    @torch.no_grad()
    def sampled(self, count: int, **settings: Any) -> np.ndarray:
        """Images (N,H,W,3) uint8 by the averaged weights, without guidance, under held-out conditions."""
        import ldm

        how = {"steps": self.scale.steps, "solver": "dpmpp_2m", **settings}
        sampler = ldm.Sampler(**how, guidance_scale=1.0, seed=0, precision="fp32", progress=False)
        self.model.eval()
        with self.model.averaged_weights():
            cond = self.model.condition(features=self.real["ssl"][:count].numpy())
            made = to_uint8(ldm.sample(self.model, cond, sampler=sampler))
        self.model.train()
        return made

    def by_published_sampler(self) -> float:
        """KID of the last weights by the recipe's own sampler."""
        from ldm.metrics import kernels

        if not (path := self.folder / "published-sampler.json").exists():
            torch.set_num_threads(1)
            self.load()
            features = judged(self.sampled(self.scale.count, **PUBLISHED_SAMPLER))
            write_text(path, json.dumps({"kid": kernels.kid(features, self.real["features"].numpy()).value}))
        return json.loads(path.read_text())["kid"]

    def _measure(self, at: float) -> None:
        from ldm.metrics import frechet, kernels

        made = self.sampled(self.scale.count)
        features, real = judged(made), self.real["features"].numpy()
        kept, figures = {}, {}
        for name, estimate in (("kid", kernels.kid(features, real)), ("fd", frechet.fid(features, real))):
            figures[name] = estimate.value
            kept[name] = torch.from_numpy(estimate.generated + estimate.real)  # of a condition and its real tile
        figures["kid_rebuilt"] = kernels.kid(features, self.real["features_rebuilt"].numpy()).value
        shown = np.linspace(0, len(made) - 1, min(SHOWN, len(made))).round().astype(int)
        torch.save(kept | {"pictures": torch.from_numpy(made[shown])}, self.measured(at).with_suffix(".pt"))
        told = {"arm": asdict(self.arm), "seed": self.seed, "fraction": at, "steps": self.step}
        write_text(self.measured(at), json.dumps(told | figures, indent=1))


def time_steps(scale: Scale, out: Path) -> None:
    """out/pace.json: processor seconds of a step of each arm on one thread, timed in turns; the least of all rounds."""
    if (out / PACE).exists():
        return
    torch.set_num_threads(1)
    runs = {name: Run(name, 0, scale, out / "timing") for name in ARMS}
    for run in runs.values():
        run.out = out
        run.load()
        run.advance()
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(scale.rounds):
        for name, run in runs.items():
            for _ in range(2):
                before = time.process_time()
                run.advance()
                least[name] = min(least[name], time.process_time() - before)
    write_text(out / PACE, json.dumps(least, indent=1))


def trained(name: str, seed: int, until: float, scale: Scale, out: Path) -> str:
    """A run up to a fraction, for a process of its own; returns a line that says so."""
    run = Run(name, seed, scale, out)
    run.go(until)
    told = json.loads(run.measured(run.marks(until)[-1]).read_text())
    return f"{name}, seed {seed}: KID {told['kid']:.3f} after {told['steps']} steps"
