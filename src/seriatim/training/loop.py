"""Training in a few lines of Python: draw a canvas, take the mean loss of its elements under teacher forcing, step.

Knows nothing of systems and files: what is saved and resumed is trained by `trainer.py`. The same seed gives the same
weights on the same machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from seriatim.canvas import Canvas
from seriatim.model import Model
from seriatim.random import Generator
from seriatim.training.precision import autocast
from seriatim.training.recipe import Recipe

Draw = Callable[[int, torch.Generator], tuple[Canvas, Mapping[str, Tensor] | None]]
Progress = Callable[[int, int, Mapping[str, float]], None]


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
    with autocast(device, recipe.bf16):
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
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
