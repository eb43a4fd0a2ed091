"""The life of a learned codebook in training: a warm-up without it, its filling, the revival of codes nobody uses.

What happens at a step follows from the step, the number of steps and the generator. Nearest-neighbour codebooks
collapse without this: codes far from all latents are never chosen, get no gradient, and stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """When a codebook is filled and looked after. Shares are of all steps.

    warm_up: share spent as a plain autoencoder, before the codebook is filled with latents of that time; revive_every:
    steps between two revivals of unused codes; revive_until: share after which the codebook is left alone;
    revive_below: a code counts as unused that was used less than this share of the mean use since the last revival;
    vq_weight: of the quantizer's loss beside the picture's; latent_weight: of mean z^2 during the warm-up, which keeps
    latents at a size that codes can follow.
    """

    warm_up: float = 1 / 3
    revive_every: int = 50
    revive_until: float = 0.8
    revive_below: float = 0.05
    vq_weight: float = 0.5
    latent_weight: float = 1e-3

    def check_codebook(self) -> None:
        """Raises ValueError for shares out of range."""
        if not (0 <= self.warm_up < 1 and 0 <= self.revive_until <= 1 and self.revive_below >= 0):
            raise ValueError(
                "warm_up lies in [0, 1), revive_until in [0, 1], revive_below is at least 0; got "
                f"{self.warm_up}, {self.revive_until}, {self.revive_below}"
            )
        if self.revive_every < 1 or self.vq_weight < 0 or self.latent_weight < 0:
            raise ValueError("revive_every is at least 1 step; weights of losses are not negative")


class Phase(Enum):
    """What a step does with the codebook before the loss is taken."""

    PLAIN = auto()  # it is not used yet
    FILL = auto()
    REVIVE = auto()
    USE = auto()


def phase(config: CodebookConfig, step: int, steps: int, fills: int = 1) -> tuple[Phase, int]:
    """The phase of a step, and how many steps it lies behind the end of the warm-up; filling takes `fills` steps."""
    since = step - round(config.warm_up * steps)
    if since < 0:
        return Phase.PLAIN, since
    if since < fills:
        return Phase.FILL, since
    due = since % config.revive_every == 0 and step < config.revive_until * steps
    return (Phase.REVIVE if due else Phase.USE), since


@torch.no_grad()
def fill(codebook: nn.Parameter, vectors: Float[Tensor, "m d"], generator: torch.Generator) -> None:
    """Codes become vectors met now, each taken once before any is taken twice."""
    codebook.copy_(draw(vectors, len(codebook), generator))
    same_everywhere(codebook)


@torch.no_grad()
def revive(
    codebook: nn.Parameter, dead: Int[Tensor, " k"], vectors: Float[Tensor, "m d"], generator: torch.Generator
) -> None:
    """The codes `dead` become vectors met now."""
    codebook[dead] = draw(vectors, len(dead), generator).to(codebook.dtype)
    same_everywhere(codebook)


def draw(vectors: Float[Tensor, "m d"], count: int, generator: torch.Generator) -> Float[Tensor, "count d"]:
    """So many of the vectors, each once before any comes twice."""
    rounds = -(-count // len(vectors))
    order = [torch.randperm(len(vectors), generator=generator, device=generator.device) for _ in range(rounds)]
    rows = torch.cat([torch.zeros(0, dtype=torch.long, device=generator.device), *order])[:count]
    return vectors[rows.to(vectors.device)]


def unused(uses: Float[Tensor, " v"], below: float) -> Int[Tensor, " k"]:
    """Codes that were used less than `below` times the mean use; none where nothing was counted."""
    return (uses < below * uses.mean()).nonzero().flatten()


def count_uses(uses: Float[Tensor, " v"], ids: Int[Tensor, "*n"]) -> None:
    """Add how often each code occurs, in place."""
    uses.add_(ids.flatten().bincount(minlength=len(uses)))


def same_everywhere(x: Tensor) -> None:
    """The first process's values on all of them, where there are several: each met other pictures."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(x.detach(), src=0)


def idle(module: nn.Module) -> Float[Tensor, ""]:
    """Zero, with a zero gradient for every trained parameter of a module that takes no part in a step."""
    zero = torch.zeros(())
    for p in module.parameters():
        if p.requires_grad:
            zero = zero.to(p.device) + 0.0 * p.sum()
    return zero
