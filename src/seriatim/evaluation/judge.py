"""Judging generated pictures: a classifier trained on real ones only, and what must be reported beside its accuracy.

Accuracy alone flatters: a generator that draws one perfect digit per class scores 1. `spread` shows lost diversity,
`nearest_distances` shows copying from the training set, `psnr` measures reconstructions. The judge never sees what it
judges during its training, and its own accuracy on held-out real pictures is the ceiling of every figure it gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class Judge(nn.Module):
    """A small convolutional classifier of pictures in [-1, 1]: two resolutions, 45 thousand weights for one channel."""

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(8 * width, 64),
            nn.ReLU(),
        )
        self.top = nn.Linear(64, classes)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        return self.top(self.body(images))

    @torch.no_grad()
    def features(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 64"]:
        """What the last layer reads, for distances between sets of pictures."""
        return self.body(images)

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
    """How `train_judge` trains: AdamW, a one-cycle learning rate, cross entropy with smoothed labels."""

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
    recipe = recipe or JudgeRecipe()
    generator = torch.Generator().manual_seed(seed)
    steps = recipe.epochs * math.ceil(len(images) / recipe.batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(images.shape[1], int(labels.max()) + 1).train()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps)
        step = 0
        for _ in range(recipe.epochs):
            for rows in torch.randperm(len(images), generator=generator).split(recipe.batch):
                batch = augment(images[rows], generator) if augment else images[rows]
                loss = F.cross_entropy(judge(batch), labels[rows], label_smoothing=recipe.label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                if progress:
                    progress(step, steps, {"loss": loss.item()})
    return judge.eval()


def spread(images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> float:
    """Diversity within classes: the mean, over classes and pixels, of the standard deviation over a class's pictures.

    In units of the pixels. Compare with real pictures; classes with a single picture are left out.
    """
    _check_rows(images, labels)
    groups = [images[labels == label] for label in labels.unique()]
    deviations = [group.float().std(dim=0).mean() for group in groups if len(group) > 1]
    if not deviations:
        raise ValueError("spread needs a class with at least two pictures")
    return torch.stack(deviations).mean().item()


def nearest_distances(
    images: Float[Tensor, "n c h w"], reference: Float[Tensor, "m c h w"], chunk: int = 1024
) -> Float[Tensor, " n"]:
    """Euclidean distance of each picture to the nearest one of `reference` (the training set): 0 is a copy.

    Compare the mean with that of real held-out pictures; much smaller means copying.
    """
    if images.shape[1:] != reference.shape[1:] or len(reference) == 0:
        raise ValueError(f"shapes differ or nothing to compare with: {tuple(images.shape)}, {tuple(reference.shape)}")
    flat = reference.flatten(1)
    pieces = [torch.cdist(part.flatten(1), flat).amin(dim=1) for part in images.split(chunk)]
    return torch.cat(pieces)


def psnr(images: Float[Tensor, "n c h w"], originals: Float[Tensor, "n c h w"]) -> float:
    """Peak signal to noise ratio in dB of pictures in [-1, 1], from the squared error over all of them."""
    if images.shape != originals.shape:
        raise ValueError(f"pictures and originals differ in shape: {tuple(images.shape)}, {tuple(originals.shape)}")
    error = F.mse_loss(images, originals).item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def _check_rows(images: Tensor, labels: Tensor) -> None:
    if images.dim() != 4 or labels.shape != images.shape[:1] or len(images) == 0:
        raise ValueError(f"want (n, c, h, w) and (n,), n > 0; got {tuple(images.shape)} and {tuple(labels.shape)}")
