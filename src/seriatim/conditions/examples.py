"""Pictures of each class that were met in training, to show one beside what is generated."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn


class Examples(nn.Module):
    """The latest `size` pictures of each class, as ids; kept with the weights."""

    ids: Tensor
    met: Tensor

    def __init__(self, classes: int, size: int, elements: int):
        super().__init__()
        self.register_buffer("ids", torch.full((classes, size, elements), -1))
        self.register_buffer("met", torch.zeros(classes, dtype=torch.long))

    @torch.no_grad()
    def add(self, labels: Int[Tensor, "b"], ids: Int[Tensor, "b E"]) -> None:
        """Pictures of a batch take the places of the oldest of their classes."""
        earlier = (labels[:, None] == labels).tril(-1).sum(1)  # of the same class in this batch
        self.ids[labels, (self.met[labels] + earlier) % self.ids.shape[1]] = ids
        self.met += labels.bincount(minlength=len(self.met))

    def draw(
        self, labels: Int[Tensor, "b"], generator: torch.Generator, but: Int[Tensor, "b E"] | None = None
    ) -> tuple[Int[Tensor, "b E"], Bool[Tensor, "b"]]:
        """A picture of each class, any with equal chance but those equal to `but`; and where there was one (else it is
        of no meaning)."""
        there = self.ids[labels]
        fit = there[..., 0] >= 0
        if but is not None:
            fit = fit & (there != but[:, None]).any(2)
        found = fit.any(1)
        chance = torch.where(found[:, None], fit, True).float()
        pick = torch.multinomial(chance, 1, generator=generator)[:, 0]
        return there[torch.arange(len(labels)), pick], found
