"""One training loop: draw a canvas, take the mean loss of its elements under teacher forcing, step.

Knows nothing of systems, files or the command line. The same seed gives the same weights on the same machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seriatim.canvas import Canvas
from seriatim.model import Model
from seriatim.random import Generator

Draw = Callable[[int, torch.Generator], tuple[Canvas, Mapping[str, Tensor] | None]]
Progress = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, linear warm-up, cosine to `floor` times the learning rate.

    warm_up is a share of the steps; drop the share of samples whose condition is replaced by the null; clip the
    largest gradient norm; bf16 autocasts the forward.
    """

    steps: int
    batch: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warm_up: float = 0.05
    floor: float = 0.0
    clip: float = 1.0
    drop: float = 0.0
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"training takes at least 1 step of at least 1 sample, got {self.steps} of {self.batch}")

    def rate(self, step: int) -> float:
        """The factor on the learning rate at a step, from 0."""
        warm = self.warm_up * self.steps
        if step < warm:
            return (step + 1) / warm
        share = (step - warm) / max(self.steps - warm, 1)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * share)) / 2


def fit(model: Model, draw: Draw, recipe: Recipe, progress: Progress | None = None) -> list[float]:
    """Train in place; the loss of each step in nats an element.

    Raises FloatingPointError as soon as a loss is not finite.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # dropout
        optimizer = adamw(model, recipe)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
        model.train()
        history = []
        for step in range(recipe.steps):
            loss = mean_loss(model, draw, recipe, generator)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {step}: lower the learning rate, check the data")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], recipe.clip)
            optimizer.step()
            schedule.step()
            history.append(value)
            if progress:
                progress(step + 1, recipe.steps, {"loss": value})
    model.eval()
    return history


def mean_loss(model: Model, draw: Draw, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Mean loss over the elements that are not given, of one drawn batch."""
    canvas, condition = draw(recipe.batch, generator)
    drop = torch.rand(canvas.batch, generator=generator) < recipe.drop if recipe.drop else None
    device = model.device.type
    random = Generator()
    random.generator = generator  # one state for everything that is drawn
    with torch.autocast(device, torch.bfloat16, enabled=recipe.bf16):
        losses = model.losses(canvas, condition, drop, random=random)
    count = (canvas.rank >= 0).sum() if canvas.length is None else losses.numel() - canvas.batch * canvas.given_length
    return losses.sum() / count


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; no weight decay on what has fewer than two axes (norms, biases)."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
