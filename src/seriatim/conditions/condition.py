"""What a sample is conditioned on, in the four forms that a backbone can take, each with a null for guidance."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Condition:
    """Encoded conditions of a batch.

    prefix (b, n, d) stands in the learned slots in front; vector (b, e) drives adaptive layer norm; memory (b, m, e) is
    attended to; per_element (b, E, d) is added at the slots that READ each element (a control image).
    """

    prefix: Float[Tensor, "b n d"] | None = None
    vector: Float[Tensor, "b e"] | None = None
    memory: Float[Tensor, "b m e"] | None = None
    per_element: Float[Tensor, "b E d"] | None = None

    def merge(self, other: Condition) -> Condition:
        """Both; each form may come from one encoder only, but vectors add up."""
        out = {}
        for f in fields(self):
            a, b = getattr(self, f.name), getattr(other, f.name)
            if a is not None and b is not None:
                if f.name != "vector":
                    raise ValueError(f"two conditions give a {f.name}; combine them in one encoder")
                out[f.name] = a + b
            else:
                out[f.name] = a if a is not None else b
        return Condition(**out)

    def select(self, rows: Int[Tensor, "b2"]) -> Condition:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Condition(**{k: None if v is None else v[rows] for k, v in parts.items()})


class Encoder(Protocol):
    """Turns a raw condition (labels, features, a control image) into a `Condition`.

    `drop` is true for rows whose condition is replaced by the null, learned where `has_null`.
    """

    has_null: bool

    def __call__(self, raw: Tensor, drop: Bool[Tensor, "b"] | None = None) -> Condition: ...


class ClassCondition(nn.Module):
    """A class label as an AdaLN vector, a prefix slot, or both, from one table with one more row for the null."""

    has_null = True

    def __init__(self, classes: int, width: int, forms: tuple[str, ...] = ("vector",), std: float = 0.02):
        super().__init__()
        unknown = set(forms) - {"vector", "prefix"}
        if unknown or not forms:
            raise ValueError(f"a class is given as vector or prefix, not {sorted(unknown)}")
        self.classes, self.forms = classes, forms
        self.table = nn.Parameter(torch.randn(classes + 1, width) * std)

    def forward(self, raw: Int[Tensor, "b"], drop: Bool[Tensor, "b"] | None = None) -> Condition:
        if raw.dim() != 1 or raw.is_floating_point():
            raise ValueError(f"class labels are integers of shape (batch,), got {tuple(raw.shape)} {raw.dtype}")
        if raw.numel() and not 0 <= int(raw.min()) <= int(raw.max()) < self.classes:
            raise ValueError(f"class labels lie in 0..{self.classes - 1}, got {int(raw.min())}..{int(raw.max())}")
        label = raw if drop is None else torch.where(drop, self.classes, raw)
        x = self.table[label.to(self.table.device)]
        return Condition(
            prefix=x[:, None] if "prefix" in self.forms else None, vector=x if "vector" in self.forms else None
        )


class MemoryCondition(nn.Module):
    """Feature vectors (b, m, e) to attend to; the null is one learned vector in every place."""

    has_null = True

    def __init__(self, width: int):
        super().__init__()
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, raw: Float[Tensor, "b m e"], drop: Bool[Tensor, "b"] | None = None) -> Condition:
        if raw.dim() != 3 or raw.shape[-1] != self.null.shape[0]:
            raise ValueError(f"a memory is (batch, places, {self.null.shape[0]}), got {tuple(raw.shape)}")
        if drop is not None:
            raw = torch.where(drop[:, None, None], self.null, raw)
        return Condition(memory=raw)


class PerElementCondition(nn.Module):
    """A feature for each element (b, E, e), projected and added where the element is read; null: zero."""

    has_null = True

    def __init__(self, features: int, width: int):
        super().__init__()
        self.project = nn.Linear(features, width)

    def forward(self, raw: Float[Tensor, "b E e"], drop: Bool[Tensor, "b"] | None = None) -> Condition:
        if raw.dim() != 3 or raw.shape[-1] != self.project.in_features:
            raise ValueError(f"per-element features are (batch, E, {self.project.in_features}), got {tuple(raw.shape)}")
        x = self.project(raw)
        return Condition(per_element=x if drop is None else x.masked_fill(drop[:, None, None], 0.0))
