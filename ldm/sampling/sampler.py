"""Sampler: the one carrier of sampling settings. Windows and Inversion carry those of canvases and translations.

Checked when made. Python functions take them, command options are made from their fields, files record what of them
differs from the default, and an unfinished folder is continued by the same record. What a setting is by default
depends on the task, and stands in TASKS alone. Torch is imported when it is first needed: help need not wait for it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ldm.diffusion.choices import INTERPOLATIONS, OF_STUDENTS, SCHEDULES, SOLVERS, STOCHASTIC
from ldm.errors import UserError
from ldm.sampling.calls import explained

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ldm.diffusion.denoiser import Cond
    from ldm.latent_diffusion import LatentDiffusion
    from ldm.sampling.adapters import Adapters
    from ldm.sampling.guided import Classifier, GuidedSolver

Guidance = float | Mapping[str, float]  # one scale, or one for each condition by name
Interval = tuple[float, float] | Literal["all"]
Task = Literal["sample", "large_image", "field", "translate", "invert", "sweep"]

PRECISIONS = ("fp32", "bf16", "fp16")
DECODERS = ("full", "small")
MODES = ("shifted", "overlap")
STARTS = ("invert", "noise", "none")
ODE_SOLVERS = ("euler", "heun", "dpmpp_2m", "unipc")  # that are followed both ways
EXACT = ("euler", "heun")

# What is taken where nothing is said. Guidance and precision depend on the model and its device (`Sampler.settled`).
TASKS: dict[Task, dict[str, Any]] = {
    "sample": {"steps": 20, "solver": "dpmpp_2m", "schedule": "trailing", "guidance_interval": "all"},
    "large_image": {"steps": 10, "solver": "dpmpp_2m", "schedule": "trailing", "guidance_interval": (1.0, 7.0)},
    "field": {"steps": 20, "solver": "dpmpp_2m", "schedule": "trailing", "guidance_interval": "all"},
    "translate": {"steps": 25, "solver": "dpmpp_2m", "schedule": "karras", "guidance_interval": "all"},
    "invert": {"steps": 25, "solver": "dpmpp_2m", "schedule": "karras", "guidance_interval": "all"},
    "sweep": {"steps": 50, "solver": "euler", "schedule": "uniform", "guidance_interval": "all"},
}


def setting(
    default: Any,
    help: str,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    kind: str = "",
    recorded: bool = True,
) -> Any:
    """A field of a carrier of settings, with what its command option needs.

    kind: how a command reads it where its type does not say: scale, interval; "" as it is, "none" not at all.
    recorded: whether it can change an image, so that files say it.

    >>> setting(1, "Number of steps", low=1).metadata["help"]
    'Number of steps'
    """
    about = {"help": help, "choices": tuple(choices), "low": low, "high": high, "kind": kind, "recorded": recorded}
    return field(default=default, metadata=about)


def check_settings(carrier: Any) -> None:
    """UserError for a value outside of the choices or bounds of its `setting`.

    >>> check_settings(Windows(mode="overlap"))
    """
    for each in dataclasses.fields(carrier):
        value, about = getattr(carrier, each.name), each.metadata
        if value is None or not about:
            continue
        if about["choices"] and value not in about["choices"]:
            raise UserError(f"{each.name} must be one of {', '.join(about['choices'])}; got {value!r}.")
        low, high = about["low"], about["high"]
        if low is None and high is None:
            continue
        whole = isinstance(low, int)
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not (low <= value <= (math.inf if high is None else high)):
            bounds = f"of {low} or more" if high is None else f"in {low:g}..{high:g}"
            raise UserError(f"{each.name} must be a {'whole ' if whole else ''}number {bounds}; got {value!r}.")


@explained
@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How images are sampled. Every generating function and command takes all of it, or says why not.

    None is what TASKS has for the task, and for guidance and precision what suits the model and its device.

    Attributes:
        steps: of the solver. solver: one of SOLVERS; a model that was distilled to few steps has its own.
        schedule: one of SCHEDULES, where the steps lie between the model's highest and lowest noise level; `legacy` is
            the spacing of published DDIM codes, which ends above 0.
        eta: noise of the solvers in STOCHASTIC; 0 adds none.
        guidance_scale: of classifier-free guidance (arXiv:2207.12598): one number, 1 for none; or one for each
            condition by name, `{"class": 3.0, "text": 1.5}`, "a+b" guiding by both jointly (arXiv:2206.01714): each
            adds its own difference to the unconditional prediction. By default 2 for models that were trained to do
            without their condition, 1 for others and for inversions.
        guidance_interval: (low, high) noise levels; steps at low < sigma <= high are guided, others follow the
            condition alone and cost half (arXiv:2404.07724); "all" guides every step.
        guidance_rescale: 0..1, draws contrast that guidance raised back (arXiv:2305.08891).
        negative: a condition of one sample, of `model.condition`, to move away from, in place of the null.
        guide: a smaller or less trained model to move away from (autoguidance, arXiv:2406.02507).
        classifier: see `Classifier`.
        control_scale: of what a ControlNet adds, where a condition is an image that leads (arXiv:2302.05543).
        lora: adapters of the network, `{"adapters/her2": 0.8}`: folder or file, and the scale of each (`Adapters`).
        precision: of the network's arithmetic: fp32, bf16 or fp16; by default bf16 on GPUs that have it, and fp32
            elsewhere, so that an image does not depend on the machine.
        decoder: of latents: full, the first stage's; small, one that was distilled from it, where the model has one.
        compile: run the network through torch.compile, which takes a minute at first.
        cache: compute the network's deep features at every `cache`-th step only (DeepCache, arXiv:2312.00858): faster,
            approximate.
        seed: image i depends on it, on i and on its condition, not on batch_size (to rounding).
        batch_size: tiles or windows that the network sees at once. progress: show a bar.

    >>> Sampler(steps=10, guidance_scale=3.0).settled(model, "sample").solver
    'dpmpp_2m'
    """

    steps: int | None = setting(None, "Sampling steps: more are slower and closer to the solver's limit", low=1)
    solver: str | None = setting(None, "Solver that takes the steps; a student has its own", (*SOLVERS, *OF_STUDENTS))
    schedule: str | None = setting(None, "Spacing of the steps between the highest and the lowest noise", SCHEDULES)
    eta: float = setting(
        1.0, f"Share of fresh noise at every step of {', '.join(STOCHASTIC)}: 0 adds none", low=0.0, high=1.0
    )
    guidance_scale: Guidance | None = setting(
        None, "Guidance by the condition: 1 is none; or name=scale, as class=3 (repeat)", kind="scale"
    )
    guidance_interval: Interval | None = setting(
        None, "Noise levels that are guided, as low,high; 'all' guides every step", kind="interval"
    )
    guidance_rescale: float = setting(0.0, "How far contrast that guidance raised is drawn back", low=0.0, high=1.0)
    control_scale: float = setting(1.0, "Strength of a ControlNet's image", low=0.0)
    negative: Cond | None = field(default=None, compare=False)
    guide: LatentDiffusion | None = field(default=None, compare=False)
    classifier: Classifier | None = field(default=None, compare=False)
    lora: Adapters | Mapping[str, float] | None = field(default=None, compare=False)
    precision: str | None = setting(
        None, "Precision of the network's arithmetic: bf16 on GPUs that have it, else fp32", PRECISIONS
    )
    decoder: str = setting("full", "Decoder: the small one, of models that have it, is many times as fast", DECODERS)
    compile: bool = setting(False, "Compile the network first: pays for many images")
    cache: int = setting(1, "Compute deep features at every n-th step only: faster, approximate", low=1)
    seed: int = setting(0, "Seed of all noise: the same seed gives the same image at any batch size", low=0)
    batch_size: int = setting(16, "Tiles or windows that the network sees at once", low=1, recorded=False)
    progress: bool = setting(True, "Show a bar", kind="none", recorded=False)

    def __post_init__(self) -> None:
        check_settings(self)
        if isinstance(self.lora, Mapping):
            from ldm.sampling.adapters import Adapters

            object.__setattr__(self, "lora", Adapters(self.lora))  # frozen for all others
        scales = self.guidance_scale.values() if self.named else [self.guidance_scale or 0.0]
        if not all(isinstance(scale, (int, float)) and math.isfinite(scale) for scale in scales):
            raise UserError(f"a guidance scale is a finite number; got {self.guidance_scale}.")
        if self.guidance_interval not in (None, "all"):
            low, high = self.guidance_interval
            if not 0 <= low < high:
                raise UserError(f"a guidance interval is (low, high) noise levels, or 'all'; got {(low, high)}.")
        if self.compile and self.cache > 1:
            raise UserError("a network is either compiled or keeps its deep features; leave one of them out.")
        if self.cache > 1 and self.guidance_interval not in (None, "all"):
            raise UserError("deep features are kept over steps of one kind; guide all steps, or leave the cache out.")
        if self.named and (self.negative or self.guidance_rescale or self.guide):
            raise UserError("guidance scales by name go without a negative condition, rescale or guiding model.")
        if self.guide is not None and (self.negative or self.guidance_rescale):
            raise UserError("a guiding model stands in for the null: it goes without negative condition and rescale.")
        if self.eta != 1 and self.solver is not None and self.solver not in STOCHASTIC:
            raise UserError(f"eta is of {', '.join(STOCHASTIC)}; {self.solver} does not take it, leave it out.")

    @property
    def named(self) -> bool:
        """Whether guidance has a scale for each condition by name."""
        return isinstance(self.guidance_scale, Mapping)

    def settled(self, model: LatentDiffusion, task: Task) -> Sampler:
        """The settings with nothing left to choose, checked against the model. UserError: what it cannot do."""
        from ldm.networks.takes import declared

        makes = getattr(model, "makes", "images")
        if (task == "field") != (makes == "fields"):
            raise UserError(
                f"the model makes {makes}, not fields of features; configs/own/field.yaml trains one that does."
                if task == "field"
                else "the model makes fields of features, not images: sample it by `histoldm field` "
                "(ldm.feature_field), and give what it makes to `histoldm large-image` as --features."
            )
        defaults = {**TASKS[task], "guidance_scale": self._default_guidance(model, task)}
        defaults |= {"precision": "bf16" if _has_bf16(model.device) else "fp32"}
        student = getattr(model, "student", None)
        if student is not None:
            from ldm.sampling.students import student_defaults

            defaults |= student_defaults(self, model)
        elif self.solver in OF_STUDENTS:
            raise UserError(f"the solver '{self.solver}' is of models that were distilled to few steps; this is none.")
        if self.decoder == "small" and getattr(model, "small_decoder", None) is None:
            raise UserError("the model has no small decoder; configs/distil/decoder.yaml trains one. Leave it out.")
        if task == "large_image" and self.cache > 1:
            raise UserError("deep features are kept between steps, and windows of a large image move; leave cache out.")
        own = replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
        if own.guidance_scale != 1.0 and model.cond_stage_model is None and self.guide is None:
            raise UserError(
                f"an unconditional model has no guidance; set the guidance scale to 1 (got {own.guidance_scale})."
            )
        if task != "sample" and len(getattr(model, "latent_shape", (1, 1, 1))) == 2:
            raise UserError("the model makes tokens, not images: it can be sampled, and nothing else.")
        if task in ("invert", "sweep") and own.solver in OF_STUDENTS:
            raise UserError(
                "a student goes from noise to an image, and no way back: an image is not inverted by it. Begin from "
                "the image noised (start 'noise', strength below 1), or take the teacher."
            )
        if own.classifier is not None and not hasattr(model.denoiser(), "table"):
            raise UserError("a classifier of noisy images guides models with a noise table; this one has none.")
        if own.control_scale != 1.0 and not declared(model.model.diffusion_model).control:
            raise UserError("the model has no ControlNet; leave the control scale out.")
        if student is not None:
            from ldm.sampling.students import told_scales

            told_scales(student, own.guidance_scale)
        own.sigmas(model)
        return own

    def _default_guidance(self, model: LatentDiffusion, task: Task) -> float:
        if self.guide is not None:
            return 2.0
        trained = model.cond_stage_model is not None and bool(model.cond_stage_model.dropout)
        return 2.0 if trained and task != "invert" else 1.0

    def record(self, model: LatentDiffusion, task: Task) -> dict[str, Any]:
        """What files say of the settings: the seed, and what differs from what the task takes where nothing is said.

        A setting that is new is absent where it has its default: it changes no record that was made before it was.
        """
        usual = self.usual(model, task)
        own = _plain(self.settled(model, task))
        told = {"lora": self.lora.record()} if self.lora else {}
        return {"seed": self.seed} | {name: value for name, value in own.items() if value != usual[name]} | told

    @staticmethod
    def usual(model: LatentDiffusion, task: Task) -> dict[str, Any]:
        """What `record` leaves out: the settings of a task where nothing is said, on a CPU."""
        return _plain(replace(Sampler().settled(model, task), precision="fp32"))

    def sigmas(self, model: LatentDiffusion) -> Tensor:
        """Descending noise levels (steps+1,) for a model (`guided.sampling_sigmas`)."""
        from ldm.sampling.guided import sampling_sigmas

        return sampling_sigmas(self, model)

    def network(self, model: LatentDiffusion) -> nn.Module | None:
        """The model's network with the adapters and the scale of its ControlNet, if there are any."""
        from ldm.networks.control import controlled

        network = self.lora.network(model) if self.lora else None
        if self.control_scale == 1.0:
            return network
        return controlled(model.model if network is None else network, self.control_scale)

    def guided(
        self, model: LatentDiffusion, cond: Cond | None = None, given: Collection[str] | None = None
    ) -> GuidedSolver:
        """The model's denoiser under guidance, and the solver that follows it (`guided.guided_solver`)."""
        from ldm.sampling.guided import guided_solver

        return guided_solver(self, model, cond, given)


@explained
@dataclass(frozen=True, kw_only=True)
class Windows:
    """How windows cover a canvas.

    Attributes:
        mode: `shifted`: windows that overlap by 3/16 on average, at places drawn anew at every step, by half in the
            last one; `overlap`: windows every `stride` pixels, averaged (the published procedure; 10 times the work
            at the default stride of a quarter tile).
        stride: pixels between the windows of `overlap`.
        interpolation: between the features of the grid.
        overview_strength: 0..1, how much of what the image lacks of its overview, where one is given, is made up at
            each step.
        offload: keep the canvas in main memory while windows visit the GPU: for one larger than the GPU holds.

    >>> Windows(mode="overlap", stride=64).stride
    64
    """

    mode: str = setting("shifted", "Windows at places drawn anew at every step, or overlapping as published", MODES)
    stride: int | None = setting(None, "Pixels between the windows of --mode overlap: by default a quarter tile", low=1)
    interpolation: str = setting("linear", "Interpolation between the features of the grid", INTERPOLATIONS)
    overview_strength: float = setting(
        1.0, "Share of what the image lacks of its overview that is made up at each step", low=0.0, high=1.0
    )
    offload: bool = setting(False, "Keep the canvas in main memory, for one larger than the GPU holds", recorded=False)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.stride is not None and self.mode != "overlap":
            raise UserError(f"a stride goes with the mode 'overlap'; got mode '{self.mode}', stride {self.stride}.")


@explained
@dataclass(frozen=True, kw_only=True)
class Inversion:
    """Where a translation begins, and what of the image it keeps.

    Attributes:
        start: `invert`: the image is followed up the noise levels under its own condition; `noise`: noise of the first
            level is added to it (SDEdit, arXiv:2108.01073); `none`: noise alone, for models whose condition is the
            image itself (translation between modalities). By default what suits the model: `none` for those, `noise`
            for an image that is enlarged, else `invert`.
        strength: above 0, up to 1: the share of the steps that are taken, the last ones; the less, the more stays.
        exact: each step up is solved such that the step down undoes it: the source's condition gives the image back
            to 1e-4. Costs two to four times the evaluations up; solvers in EXACT.
        published: the procedure of His-MMDM in all details (`inversion.invert_published`, DDIM over every 1000/steps-th
            entry of the model's noise table).
        enlarge: so many times the image's size; the result, shrunk, is the image (DDNM, arXiv:2212.00490).

    >>> Inversion(strength=0.5).start is None
    True
    """

    start: str | None = setting(
        None, "Begin from the image inverted, noised (SDEdit), or none of it: by default what suits the model", STARTS
    )
    strength: float = setting(1.0, "Share of the steps that are taken, up to 1: the less, the more of the image stays")
    exact: bool = setting(False, "Invert such that the source's own condition gives the image back; slower")
    published: bool = setting(False, "Follow His-MMDM's procedure in all details: DDIM, steps that divide 1000")
    enlarge: int | None = setting(None, "Enlarge so many times; the result, shrunk again, is the image", low=2)

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 < self.strength <= 1:
            raise UserError(f"strength is a share of the steps, above 0 and up to 1; got {self.strength:g}.")
        if self.exact and self.start not in (None, "invert"):
            raise UserError(f"exact is of inversions; got start '{self.start}'.")
        if self.published and (self.exact or self.start not in (None, "invert")):
            raise UserError("the published procedure is DDIM inversion, and not exact; leave the others out.")
        if self.enlarge and (self.start == "invert" or self.exact or self.published):
            raise UserError("enlarging makes details that are not in the image: it starts from noise or none of it.")

    def settled(self, model: LatentDiffusion) -> Inversion:
        """The same with its start chosen. UserError: a start that the model cannot have."""
        shown = model.image_condition
        start = self.start or ("noise" if self.enlarge else "none" if shown else "invert")
        if start != "invert" and (self.exact or self.published):
            raise UserError("the model's condition is the image itself: there is nothing to invert; leave exact out.")
        if start == "none" and not shown:
            raise UserError("start 'none' keeps nothing of the image: it is for models whose condition is the image.")
        return replace(self, start=start)

    @property
    def task(self) -> Task:
        """What of `sampler.TASKS` it is."""
        return "invert" if self.start == "invert" else "translate"


def changed(carrier: Windows | Inversion, usual: Windows | Inversion | None = None) -> dict[str, Any]:
    """What files say of a carrier: what of it differs from `usual`, or from the default.

    >>> changed(Windows(mode="overlap"))
    {'mode': 'overlap'}
    """
    own, usual = _plain(carrier), _plain(usual or type(carrier)())
    return {name: value for name, value in own.items() if value != usual[name]}


def _has_bf16(device: torch.device) -> bool:
    import torch

    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def _plain(settings: Sampler | Windows | Inversion) -> dict[str, Any]:
    """The settings that files record, as they read back from JSON."""
    fields = [each for each in dataclasses.fields(settings) if each.metadata.get("recorded")]
    names = [each.name for each in fields if each.name != "seed"]
    return json.loads(json.dumps({name: getattr(settings, name) for name in names}, default=dict))
