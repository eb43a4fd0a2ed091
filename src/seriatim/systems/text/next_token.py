"""Next-token prediction: the line from which everything else departs.

A decoder-only transformer over bytes (Radford et al. 2019, in the shape of Llama: RMSNorm, rotary positions, SwiGLU).
Slot i carries byte i-1 (a learned start in front) and reads out byte i; slots see all earlier slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.data.stdlib import load_stdlib, windows
from seriatim.decoding.filters import Warper
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.evaluation.pictures import save_curve
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.random import Generator
from seriatim.systems.meta import Meta
from seriatim.training.loop import Recipe, fit
from seriatim.training.run import Run

META = Meta(
    key="next-token",
    title="Next-token language model",
    family="text",
    modality="text",
    paper="Language Models are Unsupervised Multitask Learners (2019)",
    likelihood="exact",
    summary="Bytes one after another, each from all before it; a Llama-shaped decoder.",
)


@dataclass(frozen=True)
class Config:
    """Sizes of the model; `length` is the longest text in bytes."""

    length: int = 512
    vocab: int = 256
    width: int = 256
    depth: int = 6
    heads: int = 4
    theta: float = 10_000.0


def build(config: Config | None = None) -> Model:
    """The model, with fresh weights."""
    c = config or Config()
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, rope=RoPE(c.theta)))
    embed = TokenEmbed(c.vocab, c.width)
    return Model(line(c.length), Line(prefix=1), embed, backbone, CategoricalHead(c.width, c.vocab))


def continue_text(model: Model, prompt: str, length: int, seed: int = 0, temperature: float = 0.7) -> str:
    """Prompt and `length` more bytes; what is not UTF-8 is shown as a replacement sign."""
    known = torch.tensor([list(prompt.encode())], dtype=torch.long)
    if not known.numel() or known.shape[1] + length > model.layout.size:
        raise ValueError(
            f"prompt and continuation take 1 to {model.layout.size} bytes, got {known.shape[1]} + {length}"
        )
    layout = line(known.shape[1] + length)
    canvas = model.canvas({"token": torch.nn.functional.pad(known, (0, length))}, known.shape[1], layout=layout)
    target = Target(model, warp=Warper(temperature, top_p=0.95))
    generate(target, canvas, SampleAll(), random=Generator(seed))
    return bytes(canvas.value["token"][0].tolist()).decode(errors="replace")


def train(run: Run) -> dict[str, Any]:
    """Bytes of Python's standard library; weights, loss curve, a continuation and figures go to the run's folder."""
    text = load_stdlib()
    config = Config()
    torch.manual_seed(run.seed)
    model = build(config)

    def draw(n: int, generator: torch.Generator):
        return model.canvas({"token": windows(text.train, n, config.length, generator)}), None

    recipe = Recipe(run.steps or 800, batch=4, learning_rate=2e-3, weight_decay=0.1, bf16=True, seed=run.seed)
    with run.track("generator") as tick:
        history = fit(model, draw, recipe, tick)
    run.save("model", model, config)
    bits = held_out_bits(model, text.test, config.length)
    story = continue_text(model, "def read(path", 300, run.seed)
    (run.path / "continuation.txt").write_text(story, encoding="utf-8")
    save_curve(
        {"next-token on the standard library": history}, run.path / "loss.png", y_label="nats per byte", smooth=20
    )
    return run.finish(bits_per_byte=bits, held_out_bytes=64 * config.length, continuation=story)


def held_out_bits(model: Model, text: Tensor, length: int, count: int = 64) -> float:
    """Bits per byte of `count` held-out windows, each scored alone from its first byte on: an exact likelihood."""
    x = windows(text, count, length, torch.Generator().manual_seed(1))
    with torch.no_grad():
        nats = sum(float(-model.log_prob(model.canvas({"token": part})).sum()) for part in x.split(8))
    return nats / math.log(2) / x.numel()


def case() -> Case:
    """A tiny instance for the laws."""
    return Case(randomise(build(Config(length=4, vocab=3, width=16, depth=2, heads=2))), vocab=3)


class _SeesItself(Line):
    """Wrong on purpose: slot i carries the very byte that it reads out."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        element = (plan.slots.element + 1).clamp(max=canvas.layout.size - 1)
        return replace(plan, slots=replace(plan.slots, element=element, source=torch.zeros_like(plan.slots.source)))


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    right = case()
    right.model.factorization = _SeesItself(prefix=1)
    return right
