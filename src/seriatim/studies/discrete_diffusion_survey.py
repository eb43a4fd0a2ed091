"""The survey of discrete diffusion: which of its techniques are here, and two of them measured (Yu et al. 2025).

New in it is the map: noise, training and inference of discrete diffusion language models as independent choices. So
they are here: kernels (`d3pm`, `d3pm-pixels`, which have claims of their own), objectives, decoders; `TECHNIQUES` says
where each is.

Measured on one trained model: how much the gradient varies with the masks that are drawn, with two views of each text
that hide complementary tokens and with two that are drawn apart, by as many forwards; and what few steps leave of lines
of code, which tokens are decided first at random, by confidence or by margin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.objectives.masked import LEAST, Masked
from seriatim.random import ORDER, Generator, Key, Random, numbered
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.masked_trials import lines_trial
from seriatim.systems.meta import Meta
from seriatim.systems.unmasking_trials import held_out

META = Meta(
    key="discrete-diffusion-survey",
    title="Discrete diffusion: a map of its techniques",
    family="study",
    modality="text",
    paper="Discrete Diffusion in Large Language and Multimodal Models: A Survey (2025), arXiv 2506.13759",
    likelihood="none",
    summary="Which techniques of the survey are here; complementary masks and unmasking rules, measured.",
)

# Of the survey's techniques: the system, decoder or study that has it, or the part of this library.
TECHNIQUES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "noise": {
            "absorbing": "mdlm",
            "uniform, Gaussian, nearest neighbours, mixtures": "d3pm",
            "score entropy": "seriatim.objectives.noised:score_entropy",
            "blocks": "sdar",
            "edits in continuous time": "edit-flows",
            "reparameterised: which tokens are denoised": "seriatim.decoding.sample:Select",
        },
        "training": {
            "begun as a next-token model": "fast-dllm-v2",
            "complementary masks": "seriatim.objectives.masked:PairedBlocks",
            "mask rates": "seriatim.objectives.masked:by_count",
            "loss weights": "seriatim.objectives.masked:by_time",
            "rewards": "seriatim.posttraining.reinforce",
        },
        "inference": {
            "unmasking by a rule": "unmask",
            "remasking": "seriatim.decoding.remask:ReMDM",
            "learned unmasking": "learn2pd",
            "cache": "fast-dllm",
            "cache and guidance by another model": "freecache-guided",
            "guidance": "ctrldiff",
            "block sizes on the way": "adablock-dllm",
            "length of the answer": "eoser-ass",
            "several tokens at once": "parallelbench",
        },
    }
)


# ---- complementary masks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """Two views of each text: what each hides, and at which time (the second at 1 - t)."""

    hidden: Bool[Tensor, "v b E"]
    time: Float[Tensor, "v b"]


def views(canvas: Canvas, complementary: bool, random: Random) -> Views:
    """The first view hides each token with probability t, spread evenly over the rows; the second what the first one
    shows, or each token with probability 1 - t in a draw of its own."""
    free, rows = canvas.open, torch.arange(canvas.batch)
    unit = random.uniform((canvas.batch, 1), Key(canvas.row, 0, numbered(ORDER, 0, 1)))[:, 0]
    t = LEAST + (1 - 2 * LEAST) * (rows + unit) / canvas.batch
    one, two = (random.uniform(free.shape, Key(canvas.row, 0, numbered(ORDER, 0, i))) for i in (2, 3))
    first = free & (one < t[:, None])
    second = free & ~first if complementary else free & (two < 1 - t[:, None])
    return Views(torch.stack([first, second]), torch.stack([t, 1 - t]))


def plain(losses: Float[Tensor, "v b E"], drawn: Views) -> Float[Tensor, ""]:
    """The mean over all that is hidden (Fast-dLLM v2)."""
    return losses.sum() / drawn.hidden.sum().clamp(min=1)


def bound(losses: Float[Tensor, "v b E"], drawn: Views) -> Float[Tensor, ""]:
    """Weighed by 1/t: the mean of both views' bounds, by token."""
    return (losses.sum(2) / drawn.time.to(losses)).mean() / losses.shape[2]


def gradient_variance(
    model: Masked,
    canvas: Canvas,
    complementary: bool,
    loss: Callable[[Tensor, Views], Tensor] = plain,
    draws: int = 48,
    seed: int = 0,
) -> tuple[float, float]:
    """The variance of the gradient of a fixed batch over draws of two views, summed over all weights, and the squared
    norm of its mean, both without bias."""
    weights = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float64) for p in weights]
    squares, random = 0.0, Generator(seed)
    for _ in range(draws):
        drawn = views(canvas, complementary, random)
        losses = torch.stack([model.hidden_losses(canvas, hidden) for hidden in drawn.hidden])
        found = torch.autograd.grad(loss(losses, drawn), weights, allow_unused=True)
        for mean, g in zip(total, found, strict=True):
            if g is not None:
                mean += g / draws
                squares += float(g.double().square().sum()) / draws
    norm = sum(float(m.square().sum()) for m in total)
    variance = (squares - norm) * draws / (draws - 1)
    return variance, norm - variance / draws


def varies(
    complementary: bool, texts: int = 4, window: int = 128, draws: int = 48
) -> Callable[[Any, int], dict[str, float]]:
    """A trial: held-out texts, always the same; a seed takes other masks."""

    def trial(system: Any, seed: int) -> dict[str, float]:
        model, ids = system.model.eval().requires_grad_(True), held_out(system, texts, window)
        canvas, _ = system.canvas({"token": ids})
        variance, norm = gradient_variance(model, canvas, complementary, plain, draws, seed)
        other, _ = gradient_variance(model, canvas, complementary, bound, draws, seed)
        model.requires_grad_(False)
        return {"gradient_variance": variance, "gradient_norm": norm, "gradient_variance_bound": other}

    return trial


MODEL, STEPS = "zoo:text-mdlm", 8
CLAIM = Claim(
    text="With two views of each text that hide complementary tokens the gradient of masked diffusion varies less than "
    "with two views drawn apart, by as many forwards (beside them: lines of code in 8 steps of 4 tokens, by the rule "
    "which come first).",
    paper="complementary masks: every token is learned from, and training is steadier; confidence and margin are "
    "better metrics than random unmasking",
    metric="gradient_variance",
    arms={
        "complementary": Trial(MODEL, varies(True)),
        "apart": Trial(MODEL, varies(False)),
        **{
            rule: Trial(MODEL, lines_trial(f"unmask+rule={rule}", 100, STEPS))
            for rule in ("random", "confidence", "margin")
        },
    },
    ours="complementary",
    baseline="apart",
    spread_seeds=(0, 1, 2),
    other_seeds=(0,),
)
