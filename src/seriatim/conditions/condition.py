"""What a sample is conditioned on, in the four forms that a backbone can take, each with a null for guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Condition:
    """Encoded conditions of a batch.

    prefix (b, n, d) stands in the learned slots in front; vector (b, e) drives adaptive layer norm, or (b, s, e) of
    each slot where every forward has the same slots; memory (b, m, e) is attended to, where it is `there` (b, m; None:
    everywhere); per_element (b, E, d) is added at the slots that READ each element (a control image).
    """

    prefix: Float[Tensor, "b n d"] | None = None
    vector: Float[Tensor, "b e"] | Float[Tensor, "b s e"] | None = None
    memory: Float[Tensor, "b m e"] | None = None
    per_element: Float[Tensor, "b E d"] | None = None
    there: Bool[Tensor, "b m"] | None = None

    def __post_init__(self) -> None:
        forms = {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}
        if self.there is not None and (self.memory is None or self.there.shape != self.memory.shape[:2]):
            raise ValueError("`there` says of each place of a condition's memory whether it is there: (batch, places)")
        for name, x in forms.items():
            if name != "there" and x.dim() != 3 and not (name == "vector" and x.dim() == 2):
                raise ValueError(f"a condition's {name} has {'2 or ' if name == 'vector' else ''}3 axes, got {x.dim()}")
        if len({x.shape[0] for x in forms.values()}) > 1:
            rows = ", ".join(f"{name} of {x.shape[0]}" for name, x in forms.items())
            raise ValueError(f"conditions of different numbers of samples: {rows}")

    @cached_property
    def rows(self) -> int | None:
        """How many samples it is of; None where there is no condition."""
        forms = (self.prefix, self.vector, self.memory, self.per_element)
        return next((x.shape[0] for x in forms if x is not None), None)

    @cached_property
    def padding(self) -> tuple[Tensor, ...]:
        """What a backbone is told beyond vector and memory: where the memory is there, if not everywhere."""
        return () if self.there is None else (self.there,)

    def merge(self, other: Condition) -> Condition:
        """Both; each form may come from one encoder only, but vectors add up."""
        out = {}
        for f in fields(self):
            a, b = getattr(self, f.name), getattr(other, f.name)
            if a is not None and b is not None:
                if f.name != "vector":
                    raise ValueError(f"two conditions give a {f.name}; combine them in one encoder")
                if a.shape != b.shape:
                    raise ValueError(f"vectors add up, so they have one shape: got {tuple(a.shape)}, {tuple(b.shape)}")
                out[f.name] = a + b
            else:
                out[f.name] = a if a is not None else b
        return Condition(**out)

    def select(self, rows: Int[Tensor, "b2"]) -> Condition:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Condition(**{k: None if v is None else v[rows.to(v.device)] for k, v in parts.items()})


def alike(conditions: Sequence[Condition]) -> list[Condition]:
    """The same, their memories equally long: padded behind their ends."""
    memories = [c.memory for c in conditions if c.memory is not None]
    longest = max((x.shape[1] for x in memories), default=0)
    if all(x.shape[1] == longest for x in memories) and len({c.there is None for c in conditions}) == 1:
        return list(conditions)
    out = []
    for c in conditions:
        if c.memory is not None:
            there = torch.ones_like(c.memory[..., 0], dtype=torch.bool) if c.there is None else c.there
            more = longest - c.memory.shape[1]
            c = replace(c, memory=F.pad(c.memory, (0, 0, 0, more)), there=F.pad(there, (0, more)))
        out.append(c)
    return out


class Encoder(Protocol):
    """Turns a raw condition (labels, features, a control image) into a `Condition`.

    `drop` is true for rows whose condition is replaced by the null, learned where `has_null`.
    """

    has_null: bool

    def __call__(self, raw: Tensor, drop: Bool[Tensor, "b"] | None = None) -> Condition: ...


class ClassCondition(nn.Module):
    """A class label as an AdaLN vector, a prefix slot, or both, from one table with one more row for the null.

    Without `null` the table has no such row, and the condition can be neither dropped nor guided. `slots`: how many
    slots of the prefix hold it (MAR: 64).
    """

    def __init__(
        self, classes: int, width: int, forms: tuple[str, ...] = ("vector",), std: float = 0.02, null: bool = True,
        slots: int = 1,
    ):  # fmt: skip
        super().__init__()
        if not forms or set(forms) - {"vector", "prefix"}:
            raise ValueError(f"a class is given in the forms vector, prefix, or both; got {tuple(forms)}")
        if classes < 1:
            raise ValueError(f"there is at least 1 class, got {classes}")
        self.classes, self.forms, self.has_null, self.slots = classes, forms, null, slots
        self.table = nn.Parameter(torch.randn(classes + null, width) * std)

    def forward(self, raw: Int[Tensor, "b"], drop: Bool[Tensor, "b"] | None = None) -> Condition:
        if raw.dim() != 1 or raw.is_floating_point() or raw.is_complex() or raw.dtype == torch.bool:
            raise ValueError(f"class labels are integers of shape (batch,), got {tuple(raw.shape)} {raw.dtype}")
        if raw.numel() and not 0 <= int(raw.min()) <= int(raw.max()) < self.classes:
            raise ValueError(f"class labels lie in 0..{self.classes - 1}, got {int(raw.min())}..{int(raw.max())}")
        label = raw.long()
        if (dropped := _dropped(drop, self, raw)) is not None:
            label = torch.where(dropped, self.classes, label)
        x = self.table[label.to(self.table.device)]
        prefix = x[:, None].expand(-1, self.slots, -1) if "prefix" in self.forms else None
        return Condition(prefix=prefix, vector=x if "vector" in self.forms else None)


class MemoryCondition(nn.Module):
    """Feature vectors (b, m, e) to attend to; the null is one learned vector in every place."""

    has_null = True

    def __init__(self, width: int):
        super().__init__()
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, raw: Float[Tensor, "b m e"], drop: Bool[Tensor, "b"] | None = None) -> Condition:
        x = _features(raw, self.null, self.null.shape[0], "a memory is (batch, places, {})")
        if (dropped := _dropped(drop, self, x)) is not None:
            x = torch.where(dropped[:, None, None], self.null, x)
        return Condition(memory=x)


class PerElementCondition(nn.Module):
    """A feature for each element (b, E, e), projected and added where the element is read; null: zero."""

    has_null = True

    def __init__(self, features: int, width: int):
        super().__init__()
        self.project = nn.Linear(features, width)

    def forward(self, raw: Float[Tensor, "b E e"], drop: Bool[Tensor, "b"] | None = None) -> Condition:
        p = self.project
        x = p(_features(raw, p.weight, p.in_features, "per-element features are (batch, elements, {})"))
        if (dropped := _dropped(drop, self, x)) is not None:
            x = x.masked_fill(dropped[:, None, None], 0.0)
        return Condition(per_element=x)


def _features(raw: Tensor, like: Tensor, width: int, what: str) -> Float[Tensor, "b n e"]:
    """Features in the format of the encoder's weights; refuses wrong shapes, NaN and infinity."""
    if raw.dim() != 3 or raw.shape[-1] != width:
        raise ValueError(f"{what.format(width)}, got {tuple(raw.shape)}")
    if not bool(torch.isfinite(raw).all()):
        raise ValueError(f"{what.format(width)}; these contain NaN or infinity")
    return raw.to(like)


def _dropped(drop: Tensor | None, encoder: Encoder, rows: Tensor) -> Bool[Tensor, "b"] | None:
    """Which rows take the null; refuses what is no such choice."""
    if drop is None:
        return None
    if not encoder.has_null:
        raise ValueError(f"this {type(encoder).__name__} was made without a null: no row can be dropped")
    if drop.dtype != torch.bool or tuple(drop.shape) != (rows.shape[0],):
        raise ValueError(f"`drop` is boolean ({rows.shape[0]},), got {tuple(drop.shape)} {drop.dtype}")
    return drop.to(rows.device)
