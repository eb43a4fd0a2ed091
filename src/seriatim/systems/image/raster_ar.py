"""Raster autoregression: pixels (or token maps) row by row, as text is written.

A class in a prefix slot, then every element in raster order (PixelRNN, van den Oord et al. 2016; in the shape of
LlamaGen, Sun et al. 2024: RMSNorm, SwiGLU). Positions are learned. Plain grey levels serve as tokens for small
pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.conditions.condition import ClassCondition
from seriatim.data.digits import levels_to_images, load_digits, shift_sideways
from seriatim.decoding.filters import Warper
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.evaluation.digits import digit_judge, judge_digits
from seriatim.evaluation.pictures import save_curve, save_film, save_grid
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, randomise
from seriatim.layout import grid
from seriatim.model import Model
from seriatim.plan import Plan
from seriatim.random import Generator
from seriatim.systems.meta import Meta
from seriatim.training.loop import Recipe, fit
from seriatim.training.run import Run
from seriatim.view import inclusive

META = Meta(
    key="raster-ar",
    title="Raster autoregression",
    family="image",
    modality="image",
    paper="Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation (2024), arXiv 2406.06525",
    likelihood="exact",
    summary="The elements of a picture row by row, each from all before it and the class.",
)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits at 17 grey levels."""

    side: int = 8
    vocab: int = 17
    classes: int = 10
    width: int = 96
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1


def build(config: Config | None = None) -> Model:
    """The model, with fresh weights."""
    c = config or Config()
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, dropout=c.dropout, vector=c.width))
    embed = TokenEmbed(c.vocab, c.width, positions=(c.side * c.side,), start=False, std=0.4)
    condition = {"class": ClassCondition(c.classes, c.width, ("prefix", "vector"), std=0.4)}
    return Model(grid(c.side, c.side), Line(prefix=1), embed, backbone, CategoricalHead(c.width, c.vocab), condition)


def sample(model: Model, labels: Tensor, seed: int = 0, guidance: float = 0.5, top_p: float = 0.96) -> Tensor:
    """Levels (n, elements) of samples of these classes."""
    target = Target(model, {"class": labels}, Guidance(guidance), Warper(top_p=top_p))
    return generate(target, model.blank(len(labels)), SampleAll(), random=Generator(seed)).value["token"]


def train(run: Run) -> dict[str, Any]:
    """Grey levels of scikit-learn's digits, without a tokenizer; weights, pictures and figures go to the run."""
    digits = load_digits()
    config = Config()
    torch.manual_seed(run.seed)
    model = build(config)

    def draw(n: int, generator: torch.Generator):
        i = torch.randint(len(digits.train), (n,), generator=generator)
        shifted = shift_sideways(digits.train.images[i], generator)
        levels = ((shifted[:, 0] + 1) * 8).round().long().flatten(1)
        return model.canvas({"token": levels}), {"class": digits.train.labels[i]}

    with run.track("generator") as tick:
        history = fit(model, draw, Recipe(run.steps or 800, drop=0.1, seed=run.seed), tick)
    run.save("model", model, config)
    with torch.no_grad():
        held_out = model.canvas({"token": digits.test.levels.flatten(1)})
        nats = model.losses(held_out, {"class": digits.test.labels}).mean()
    with run.track("judge") as tick:
        judge = digit_judge(run.seed, tick)
    labels = torch.arange(10).repeat_interleave(20)
    images = levels_to_images(sample(model, labels, run.seed).view(-1, 8, 8))
    figures = judge_digits(images, labels, judge)
    rows = [str(d) for d in range(10)]
    shown = images.view(10, 20, 1, 8, 8)[:, :10].flatten(0, 1)
    save_grid(shown, run.path / "samples.png", row_labels=rows, resample="bicubic", invert=True)
    raster = torch.arange(64).view(8, 8)
    film = [torch.where(raster < n, shown, -torch.ones(())) for n in range(8, 65, 8)]
    captions = [f"{n} of 64 pixels" for n in range(8, 65, 8)]
    save_film(film, run.path / "film.gif", captions=captions, row_labels=rows, invert=True, pause=0.4)
    save_curve({"raster on digits": history}, run.path / "loss.png", y_label="nats per pixel", smooth=20)
    bits = float(nats) / math.log(2)
    return run.finish(bits_per_pixel=bits, forwards=64, **figures)


def case() -> Case:
    """A tiny instance for the laws."""
    model = randomise(build(Config(side=2, vocab=2, classes=3, width=16, depth=2, heads=2, dropout=0.0)))
    return Case(model, vocab=2, condition={"class": torch.tensor([1])})


class _SkipsOne(Line):
    """Wrong on purpose: in one pass every slot also sees the slot behind it."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        rank = torch.arange(plan.size) // 2
        return Plan(plan.slots, {"all": inclusive(rank)}, replace(plan.reads), plan.rank)


def mutant() -> Case:
    """The case with a mask that lets pairs of slots see each other, which the laws must catch."""
    wrong = case()
    wrong.model.factorization = _SkipsOne(prefix=1)
    return wrong
