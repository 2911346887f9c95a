"""Guidance: functions from denoiser to denoiser. They nest in any order with each other and with tiling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ldm.diffusion.denoiser import Cond, Denoiser, RangeDenoiser, per_sample

TARGET = "target"  # of a condition: labels that guide and that the network is not told
LogProbability = Callable[[Tensor, Tensor, Cond], Tensor]
Likeness = Callable[[Tensor], Tensor]


def cat_conds(*conds: Cond) -> dict[str, Tensor]:
    """Conditions of several batches as the condition of one; all must have the same parts.

    >>> cat_conds({"crossattn": torch.zeros(1, 5, 16)}, {"crossattn": torch.zeros(2, 5, 16)})["crossattn"].shape
    torch.Size([3, 5, 16])
    """
    for cond in conds:
        if set(cond) != set(conds[0]):
            raise ValueError(f"conditions to batch have parts {sorted(conds[0])} and {sorted(cond)}; they must agree")
    return {part: torch.cat(_as_large([cond[part] for cond in conds])) for part in conds[0]}


def _as_large(values: list[Tensor]) -> list[Tensor]:
    """The values; maps (B,C,1,1) of one value, such as a null, as large as the others."""
    if values[0].ndim != 4:
        return values
    size = max(value.shape[2:] for value in values)
    return [value.expand(-1, -1, *size) if value.shape[2:] == (1, 1) else value for value in values]


def expand_cond(cond: Cond, count: int) -> dict[str, Tensor]:
    """A condition of one sample, or of `count`, as one of `count` samples.

    >>> expand_cond({"vector": torch.zeros(1, 16)}, 4)["vector"].shape
    torch.Size([4, 16])
    """
    return {part: value.expand(count, *value.shape[1:]) for part, value in cond.items()}


def null_of(null: Cond, cond: Cond, count: int) -> dict[str, Tensor]:
    """The null of `count` samples, with the maps of their condition that it lacks.

    >>> null, image = {"vector": torch.zeros(1, 16)}, torch.ones(2, 4, 8, 8)
    >>> {part: tuple(value.shape) for part, value in null_of(null, {"control/concat": image}, 2).items()}
    {'control/concat': (2, 4, 8, 8), 'vector': (2, 16)}
    """
    return {part: value for part, value in cond.items() if part.endswith("concat")} | expand_cond(null, count)


def cfg(denoiser: Denoiser, null: Cond, scale: float | Tensor, rescale: float = 0.0) -> Denoiser:
    """Classifier-free guidance (arXiv:2207.12598): x0 = null + scale*(conditional - null), in one batched call.

    `null` is the unconditional condition of one sample, (1,...) for each part, or of every sample of the batch. A
    negative condition in its place moves the image away from that. A map that it lacks, such as the image of a
    ControlNet, is on both sides. Scale 1 is no guidance and costs none; scales (B,) are of each sample. `rescale` in
    [0,1] draws each sample's standard deviation back to the conditional one's (arXiv:2305.08891, equations 15, 16).

    >>> guided = cfg(echo, null={"vector": torch.tensor([[0.1]])}, scale=3.0)
    >>> guided(x, torch.tensor([10.0, 10.0]), {"vector": torch.tensor([[0.2], [0.4]])}).mean((1, 2, 3))
    tensor([0.4000, 1.0000])
    """
    if not isinstance(scale, Tensor) and scale == 1.0:
        return denoiser

    def guided(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        nulls = null_of(null, cond, len(x))
        both = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cat_conds(nulls, cond))
        unconditional, conditional = both.chunk(2)
        x0 = unconditional + _strength(scale, x) * (conditional - unconditional)
        if rescale:
            ratio = conditional.flatten(1).std(1) / x0.flatten(1).std(1)
            x0 = x0 * per_sample(1 + rescale * (ratio - 1), x0)
        return x0

    return guided


def _strength(scale: float | Tensor, x: Tensor) -> float | Tensor:
    return per_sample(scale.to(x), x) if isinstance(scale, Tensor) else scale


def compose(denoiser: Denoiser, null: Cond, terms: Sequence[tuple[Cond, float | Tensor]]) -> Denoiser:
    """Guidance with a scale for each condition (composable diffusion, arXiv:2206.01714, equation 11).

    A term (dropped, scale) evaluates the condition with the parts in `dropped` put in place of its own:
    x0 = null + sum_k scale_k*(x0_k - null). `null` and all terms go in one batched call, the shared null once; terms of
    scale 0 are left out. Parts are of one sample (1,...) or of the batch. `[({}, s)]` is `cfg` at scale s;
    `[({"vector": no_class}, 3.0), ({"crossattn": no_text}, 1.5)]` follows the text at 3 and the class at 1.5.

    >>> both = lambda x, sigma, cond: echo(x, sigma, cond) + cond["label"].view(-1, 1, 1, 1)
    >>> null = {"vector": torch.tensor([[0.0]]), "label": torch.tensor([0])}
    >>> guided = compose(both, null, [({"label": null["label"]}, 3.0), ({"vector": null["vector"]}, 1.5)])
    >>> guided(x[:1], sigmas[:1], {"vector": torch.tensor([[0.1]]), "label": torch.tensor([1])}).mean()
    tensor(1.8000)
    """
    terms = [(dict(dropped), scale) for dropped, scale in terms if isinstance(scale, Tensor) or scale]
    for dropped, _ in terms:
        if unknown := set(dropped) - set(null):
            raise ValueError(f"a term drops {', '.join(sorted(unknown))}; the condition has {', '.join(null)}")

    def guided(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        conds = [null_of(null, cond, len(x)), *({**cond, **expand_cond(drop, len(x))} for drop, _ in terms)]
        count = len(conds)
        base, *parts = denoiser(x.repeat(count, 1, 1, 1), sigma.repeat(count), cat_conds(*conds)).chunk(count)
        return base + sum(_strength(scale, x) * (part - base) for part, (_, scale) in zip(parts, terms))

    return guided


def within(guided: Denoiser, otherwise: Denoiser, low: float, high: float) -> Denoiser:
    """`guided` at noise levels low < sigma <= high, `otherwise` elsewhere (guidance interval, arXiv:2404.07724).

    `within(cfg(d, null, 3.0), d, 0.2, 5.0)` saves the second evaluation outside the interval.

    >>> guided = within(lambda x, *_: x + 1, lambda x, *_: x, low=0.2, high=5.0)
    >>> guided(torch.zeros(3, 1, 1, 1), torch.tensor([0.1, 1.0, 10.0]), {}).flatten()
    tensor([0., 1., 0.])
    """

    def chosen(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        inside = (sigma > low) & (sigma <= high)
        if inside.all():
            return guided(x, sigma, cond)
        if not inside.any():
            return otherwise(x, sigma, cond)
        return torch.where(per_sample(inside, x), guided(x, sigma, cond), otherwise(x, sigma, cond))

    return chosen


def autoguidance(denoiser: Denoiser, weak: Denoiser, scale: float) -> Denoiser:
    """Guidance by a smaller or earlier version of the model (arXiv:2406.02507): x0 = weak + scale*(model - weak).

    >>> guided = autoguidance(lambda x, *_: x + 1, weak=lambda x, *_: x + 0.5, scale=2.0)
    >>> guided(torch.zeros(1, 3, 8, 8), torch.tensor([1.0]), {}).mean()
    tensor(1.5000)
    """
    if scale == 1.0:
        return denoiser

    def guided(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        poor = weak(x, sigma, cond)
        return poor + scale * (denoiser(x, sigma, cond) - poor)

    return guided


def target_gradient(log_probability: LogProbability, scale: float) -> Denoiser:
    """scale * d log p(target | x) / dx as a function of (x, sigma, cond) -> (B,C,H,W), also inside no-grad samplers.

    `log_probability(x, sigma, cond)` -> (B,) is differentiable and works on x in variance-exploding coordinates, see
    `class_log_probability`. `classifier_guidance` adds it to the denoised image; `sample_ddpm` moves its mean by it.

    >>> towards = lambda x, sigma, cond: -(x - 1).square().flatten(1).sum(1) / 2  # a Gaussian around 1
    >>> target_gradient(towards, scale=0.5)(torch.zeros(1, 3, 8, 8), torch.tensor([0.2]), {}).mean()
    tensor(0.5000)
    """

    def gradient(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(log_probability(at, sigma, cond).sum(), at)
        return scale * slope

    return gradient


def classifier_guidance(denoiser: Denoiser, gradient: Denoiser) -> Denoiser:
    """Guidance by a classifier (arXiv:2105.05233, algorithm 2): x0 + sigma^2 * gradient(x), of `target_gradient`.

    The denoiser is not differentiated, and does not see `cond["target"]`, which is for the classifier alone.

    >>> gradient = target_gradient(lambda x, sigma, cond: -(x - 1).square().flatten(1).sum(1) / 2, scale=0.5)
    >>> classifier_guidance(denoiser, gradient)(torch.zeros(1, 3, 8, 8), torch.tensor([0.2]), {}).mean()
    tensor(0.0200)
    """
    untold = without_target(denoiser)

    def guided(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return untold(x, sigma, cond) + per_sample(sigma, x) ** 2 * gradient(x, sigma, cond)

    return guided


def without_target(denoiser: Denoiser) -> Denoiser:
    """The denoiser, which is not told the `target` of a classifier.

    >>> without_target(lambda x, sigma, cond: sorted(cond))(0, 0, {"label": 1, "target": 2})
    ['label']
    """

    def untold(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return denoiser(x, sigma, {part: value for part, value in cond.items() if part != TARGET})

    return untold


def class_log_probability(
    classifier: Callable[[Tensor, Tensor], Tensor], timestep: Callable[[Tensor], Tensor]
) -> LogProbability:
    """log p(target | x) of a classifier(x_t, timestep) -> logits (B,K) of noisy images, for `target_gradient`.

    x_t = x / sqrt(1 + sigma^2); `timestep` maps sigma (B,) to the classifier's time, as `TableDenoiser.timestep`. The
    labels (B,) are `cond["target"]`, and those below 0 guide nowhere.

    >>> brightness = lambda x, timestep: torch.stack([-x.mean((1, 2, 3)), x.mean((1, 2, 3))], 1)  # logits: dark, bright
    >>> log_probability = class_log_probability(brightness, lambda sigma: sigma)
    >>> log_probability(torch.ones(2, 3, 8, 8), torch.zeros(2), {"target": torch.tensor([0, 1])}).exp()
    tensor([0.1192, 0.8808])
    """

    def log_probability(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        logits = classifier(x / (1 + per_sample(sigma, x) ** 2).sqrt(), timestep(sigma))
        labels = cond[TARGET]
        return log_softmax(logits, dim=-1).gather(1, labels.clamp(min=0)[:, None])[:, 0] * (labels >= 0)

    return log_probability


def likeness_guidance(denoiser: Denoiser, likeness: Likeness, scale: float) -> Denoiser:
    """Guidance of the denoised image to where `likeness` is greater: x0 + scale * N * sigma^2 * d likeness(x0) / dx.

    With p(source | x) proportional to exp(scale * N * likeness(x0(x))) this is classifier guidance (arXiv:2105.05233,
    algorithm 2) whose classifier sees the denoised image (arXiv:2209.14687, equation 10): the gradient goes through the
    denoiser, also inside no-grad samplers. N, the number of pixels, makes one scale fit every size.

    likeness(x0) -> (B,) of images (B,C,H,W), differentiable and a mean over places: zero-shot translation compares a
    source of another modality, by the LMI of networks, `lambda x0: lmi_score(source, (x0 + 1) / 2)`.

    >>> guided = likeness_guidance(denoiser, lambda x0: -(x0 - 1).square().mean((1, 2, 3)), scale=1.0)
    >>> guided(torch.zeros(1, 1, 8, 8), torch.tensor([0.2]), {}).mean()
    tensor(0.0769)
    """

    def guided(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            x0 = denoiser(at, sigma, cond)
            (gradient,) = torch.autograd.grad(likeness(x0).sum(), at)
        return x0.detach() + scale * x.shape[-2:].numel() * per_sample(sigma, x) ** 2 * gradient

    return guided


def clip(denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Clip the denoised image, as pixel-space models are sampled.

    >>> clip(denoiser)(x, torch.tensor([0.0, 0.0]), {}).abs().max()
    tensor(1.)
    """

    def clipped(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return denoiser(x, sigma, cond).clamp(low, high)

    return clipped


def keep_variance(denoiser: RangeDenoiser, guide: Callable[[Denoiser], Denoiser]) -> RangeDenoiser:
    """Guidance of a denoiser that returns (x0, variance) for `sample_ddpm`: `guide` acts on x0, the variance of the
    whole condition stays. `keep_variance(model.with_variance, lambda d: clip(cfg(d, null, 2.0)))`.

    Where the batch that guidance makes does not end with the condition, as `compose` of several terms, the condition
    is evaluated along with it.

    >>> learned = lambda x, sigma, cond: (echo(x, sigma, cond), torch.full_like(x, 0.3))
    >>> guided = keep_variance(learned, lambda d: cfg(d, {"vector": torch.zeros(1, 1)}, 2.0))
    >>> [part.mean() for part in guided(x, torch.tensor([10.0, 10.0]), {"vector": torch.ones(2, 1)})]
    [tensor(2.), tensor(0.3000)]
    """

    def guided(x: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        count, variances = len(x), []
        whole = expand_cond(cond, count)

        def x0_alone(points: Tensor, sigmas: Tensor, conds: Cond) -> Tensor:
            seen = {part: whole[part] for part in conds}
            if all(torch.equal(expand_cond(conds, len(points))[part][-count:], seen[part]) for part in seen):
                x0, variance = denoiser(points, sigmas, conds)
                variances.append(variance[-count:])
                return x0
            batch = cat_conds(expand_cond(conds, len(points)), seen)
            x0, variance = denoiser(torch.cat([points, x]), torch.cat([sigmas, sigma]), batch)
            variances.append(variance[-count:])
            return x0[:-count]

        return guide(x0_alone)(x, sigma, cond), variances[0]

    return guided
