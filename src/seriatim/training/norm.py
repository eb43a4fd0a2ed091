"""By what the summed losses of a batch are divided: what counts alike, tokens or texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Norm = Callable[[Float[Tensor, "b E"], Bool[Tensor, "b E"]], tuple[Float[Tensor, ""], Tensor]]
"""From the loss of each element (0 where it counts for nothing), and which are learned, to a sum, and by what it is
divided; both are added up over the parts of a batch and the processes that share it."""


def per_token(losses: Float[Tensor, "b E"], counts: Bool[Tensor, "b E"]) -> tuple[Float[Tensor, ""], Tensor]:
    """The mean over all elements: a text counts as much as it is long."""
    return losses.sum(), counts.sum()


def per_sequence(losses: Float[Tensor, "b E"], counts: Bool[Tensor, "b E"]) -> tuple[Float[Tensor, ""], Tensor]:
    """The mean over texts of the mean over the elements of each: short and long ones count alike (LLaDA's fine-tuning,
    Nie et al. 2025, arXiv 2502.09992, which divides by the length of the answer, ends of text that fill it
    included)."""
    return (losses.sum(1) / counts.sum(1).clamp(min=1)).sum(), torch.tensor(len(losses))


def per_batch(losses: Float[Tensor, "b E"], counts: Bool[Tensor, "b E"]) -> tuple[Float[Tensor, ""], Tensor]:
    """The mean over texts of the sum over the elements of each: what a step learns grows with their length."""
    return losses.sum(), torch.tensor(len(losses))


NORMS: Mapping[str, Norm] = MappingProxyType({"token": per_token, "sequence": per_sequence, "batch": per_batch})
