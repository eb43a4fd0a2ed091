"""Judging generated pictures: a classifier trained on real ones only, and what must be reported beside its accuracy.

Accuracy alone flatters: a generator that draws one perfect digit per class scores 1; `metrics` has what must stand
beside it. The judge never sees what it judges during its training, and its own accuracy on held-out real pictures is
the ceiling of every figure it gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 64
MOST_PIXELS = 64 * 64
Take = Callable[[Int[Tensor, " b"], torch.Generator], tuple[Tensor, Tensor]]
Progress = Callable[[int, int, dict[str, float]], None]


def stages_for(height: int, width: int) -> int:
    """Halvings that leave the shorter side of a picture, as the judge sees it, at 4 to 7 pixels."""
    return max(1, (min(_seen(height, width)) // 4).bit_length() - 1)


def _seen(height: int, width: int) -> tuple[int, int]:
    ratio = math.sqrt(MOST_PIXELS / (height * width))
    return (height, width) if ratio >= 1 else (max(1, round(height * ratio)), max(1, round(width * ratio)))


class Judge(nn.Module):
    """A small convolutional classifier of pictures in [-1, 1]: 45 thousand weights for one channel and one stage.

    stages: how often the picture is halved, see `stages_for`; any height and width then go in. Pictures of more than
    64 x 64 pixels are shrunk to that area first: what is finer, it does not see.
    """

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 32, stages: int = 1) -> None:
        super().__init__()
        if min(channels, classes, width, stages) < 1:
            raise ValueError(f"channels={channels}, classes={classes}, width={width}, stages={stages} start at 1")
        # Full resolution is where the time goes: larger pictures leave it at once.
        layers = [*_convolve(channels, width, 1 if stages == 1 else 2), *_convolve(width, width)]
        into = width
        for _ in range(max(1, stages - 1)):
            layers += [nn.MaxPool2d(2, ceil_mode=True), *_convolve(into, 2 * width)]
            into = 2 * width
        last = [nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8 * width, FEATURES), nn.ReLU()]
        self.body = nn.Sequential(*layers, *last)
        self.top = nn.Linear(FEATURES, classes)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        return self.top(self.body(_shrink(images)))

    @torch.no_grad()
    def features(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 64"]:
        """What the last layer reads, for distances between sets of pictures."""
        return self.body(_shrink(images))

    def maps(self, images: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "n d h2 w2"]]:
        """What each resolution ends with, for distances between a picture and what was made of it."""
        x, found = _shrink(images), []
        for layer in self.body:
            if isinstance(layer, nn.MaxPool2d | nn.AdaptiveMaxPool2d):
                found.append(x)
            if isinstance(layer, nn.AdaptiveMaxPool2d):
                break
            x = layer(x)
        return found

    @torch.no_grad()
    def predict(self, images: Float[Tensor, "n c h w"]) -> Int[Tensor, " n"]:
        return self(images).argmax(dim=-1)

    def accuracy(self, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> float:
        """Share of pictures that the judge takes for their label. Raises ValueError if the two differ in number."""
        _check_rows(images, labels)
        if self.training:
            raise ValueError("the judge is in training mode, its batch norm would depend on the batch: call .eval()")
        return (self.predict(images) == labels).float().mean().item()


@dataclass(frozen=True)
class JudgeRecipe:
    """How a judge is trained: AdamW, a one-cycle learning rate, cross entropy with smoothed labels."""

    epochs: int = 15
    batch: int = 64
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.05


def train_judge(
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    recipe: JudgeRecipe | None = None,
    *,
    seed: int = 0,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Judge:
    """Train a judge on real pictures, deterministic given the seed; the global random state is left as it was.

    `augment(batch, generator)` may vary each batch; `progress(step, steps, metrics)` is called after every step.
    """
    _check_rows(images, labels)

    def take(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return augment(images[rows], generator) if augment else images[rows], labels[rows]

    def make() -> Judge:
        return Judge(images.shape[1], int(labels.max()) + 1)

    return fit_judge(make, len(images), take, recipe or JudgeRecipe(), seed, progress)


def fit_judge(
    make: Callable[[], Judge],
    count: int,
    take: Take,
    recipe: JudgeRecipe,
    seed: int = 0,
    progress: Progress | None = None,
) -> Judge:
    """Make a judge and train it on `count` pictures, of which `take(rows, generator)` gives a batch with its labels.

    Weights, dropout, order and augmentation follow from the seed. Raises FloatingPointError if the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = recipe.epochs * math.ceil(count / recipe.batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = make().train()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps)
        step = 0
        for _ in range(recipe.epochs):
            for rows in torch.randperm(count, generator=generator).split(recipe.batch):
                batch, labels = take(rows, generator)
                loss = F.cross_entropy(judge(batch), labels, label_smoothing=recipe.label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"the judge's loss is {value} at step {step}: do the pictures hold NaN?")
                if progress:
                    progress(step, steps, {"loss": value})
    return judge.eval()


def _shrink(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
    size = _seen(*images.shape[2:])
    if size == tuple(images.shape[2:]):
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def _convolve(into: int, out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(into, out, 3, stride=stride, padding=1), nn.BatchNorm2d(out), nn.ReLU()]


def _check_rows(images: Tensor, labels: Tensor) -> None:
    if images.dim() != 4 or labels.shape != images.shape[:1] or len(images) == 0:
        raise ValueError(f"want (n, c, h, w) and (n,), n > 0; got {tuple(images.shape)} and {tuple(labels.shape)}")
