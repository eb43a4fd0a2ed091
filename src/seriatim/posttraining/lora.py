"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W stays, and a product of two narrow matrices is learned
beside it, W + scale * B A.

Adapters belong to matrices as they were published (`q_proj`, `gate_proj`): where ours holds several of them in one,
each slice of its rows has its own, so that other programs' adapters fit. `attach` trains them, `merge` folds them in,
after which the model costs what it cost before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from seriatim.backbones.layer import TransformerConfig
from seriatim.interop.blueprint import Part, how_of
from seriatim.model import Model

ADAPTABLE = ("rows", "columns", "heads")  # how a published matrix became ours; experts share a tensor, and have none


@dataclass(frozen=True)
class LoRA:
    """rank: columns of B and rows of A; alpha: the scale is alpha / rank (None: 2); targets: last names of published
    matrices, such as q_proj (None: all matrices of the layers, which Dettmers et al. 2023, arXiv 2305.14314, find
    best)."""

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", (self.targets,))
        if self.rank < 1:
            raise ValueError(f"the rank of an adapter is at least 1, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha of an adapter is positive, got {self.alpha}")

    @property
    def scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.rank


class Factors(NamedTuple):
    """The adapter of one published matrix: what is added to it is scale * B A."""

    a: Float[Tensor, "rank columns"]
    b: Float[Tensor, "rows rank"]
    scale: float


def adaptable(model: Model, parts: Sequence[Part]) -> dict[str, Part]:
    """Published matrix -> the part of ours that it is in: all matrices of the layers, without the router of experts."""
    found: dict[str, Part] = {}
    for part in parts:
        if part.how in ADAPTABLE and part.ours.startswith("backbone.layers.") and not part.ours.endswith(".router"):
            if model.get_parameter(part.ours).dim() == 2:
                found |= dict.fromkeys(map(module_of, part.theirs), part)
    return found


def module_of(tensor: str) -> str:
    """The module that holds a published tensor."""
    return tensor.removesuffix(".weight")


def attach(model: Model, parts: Sequence[Part], config: LoRA) -> tuple[str, ...]:
    """Freeze a model and put fresh adapters on it, which change nothing yet; the last names of the matrices that have
    got one. They are drawn from torch's generator.

    Raises ValueError for targets that it does not have, and a rank that saves nothing.
    """
    there = adaptable(model, parts)
    names = list(dict.fromkeys(map(_last, there)))
    odd = [name for name in config.targets or () if name not in names]
    if odd or not names:
        raise ValueError(f"there are no matrices {', '.join(odd)} to adapt; there are {', '.join(names) or 'none'}")
    chosen = tuple(config.targets or names)
    widths = [min(model.get_parameter(part.ours).shape) for part in there.values()]
    if config.rank >= min(widths):
        raise ValueError(f"an adapter of rank {config.rank} is no smaller than the matrices, the least {min(widths)}")
    model.requires_grad_(False)
    for part in dict.fromkeys(there.values()):
        if any(_last(module) in chosen for module in map(module_of, part.theirs)):
            owner, _, name = part.ours.rpartition(".")
            layer = model.get_submodule(owner)
            made = LowRank(getattr(layer, name), part, model.backbone.config, config, chosen)  # type: ignore[arg-type]
            parametrize.register_parametrization(layer, name, made, unsafe=True)
    return chosen


def folded(model: Model) -> Model:
    """The same model with its adapters folded into its weights."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                merged = getattr(module, name).merged().detach()
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                setattr(module, name, nn.Parameter(merged, requires_grad=False))
    return model


@torch.no_grad()
def merge(model: Model, parts: Sequence[Part], adapter: Mapping[str, Factors]) -> None:
    """Add an adapter (published matrix -> factors) to the weights, in float32, whatever their format.

    Raises ValueError that names matrices which there are not, or of another shape.
    """
    there = adaptable(model, parts)
    odd = sorted(set(adapter) - set(there))
    if odd:
        raise ValueError(f"the adapter is for matrices that this model does not have: {', '.join(odd[:5])}")
    config: TransformerConfig = model.backbone.config  # type: ignore[assignment]
    for part in dict.fromkeys(there[module] for module in adapter):
        owner, _, name = part.ours.rpartition(".")
        weight = model.get_parameter(part.ours)
        mine = {n: adapter[module] for n in part.theirs if (module := module_of(n)) in adapter}
        _check(mine, _shapes(weight, part, config), part)
        change = _change(mine, part, _shapes(weight, part, config), config)
        made = nn.Parameter((weight.float() + change).to(weight.dtype), requires_grad=False)
        setattr(model.get_submodule(owner), name, made)


def _check(factors: Mapping[str, Factors], shapes: Mapping[str, torch.Size], part: Part) -> None:
    for name, f in factors.items():
        rows, columns = shapes[name] if part.how != "columns" else shapes[name][::-1]
        if f.a.dim() != 2 or f.b.dim() != 2 or (f.b.shape[0], f.a.shape[1]) != (rows, columns):
            said = f"A {tuple(f.a.shape)} and B {tuple(f.b.shape)}"
            raise ValueError(f"the adapter of {name} has {said}; the matrix is {(rows, columns)}: another model's?")
        if f.a.shape[0] != f.b.shape[1]:
            raise ValueError(f"the adapter of {name} has rank {f.a.shape[0]} in A and {f.b.shape[1]} in B")


def _shapes(weight: Tensor, part: Part, config: TransformerConfig) -> dict[str, torch.Size]:
    """Of the published matrices that one of ours is made of."""
    return {n: x.shape for n, x in zip(part.theirs, how_of(part).apart(weight, part.theirs, config), strict=True)}


def _change(
    factors: Mapping[str, Factors], part: Part, shapes: Mapping[str, torch.Size], config: TransformerConfig
) -> Float[Tensor, "rows columns"]:
    """What adapters of published matrices add to ours."""
    some = next(iter(factors.values())).a
    changes = []
    for name in part.theirs:
        if name not in factors:
            changes.append(some.new_zeros(shapes[name]))
            continue
        f = factors[name]
        change = (f.b @ f.a) * f.scale
        changes.append(change.T if part.how == "columns" else change)
    return how_of(part).together(changes, config)


class LowRank(nn.Module):
    """Adapters on one of our matrices, as a parametrization of it: `a` and `b` by the last name of each published
    matrix. B begins at zero, so a fresh adapter is its base bit for bit."""

    def __init__(self, weight: Tensor, part: Part, backbone: TransformerConfig, config: LoRA, targets: Sequence[str]):
        super().__init__()
        self.part, self.backbone, self.scale = part, backbone, config.scale
        self.shapes = _shapes(weight, part, backbone)
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name, shape in self.shapes.items():
            key = _last(module_of(name))
            if key in targets:
                rows, columns = shape if part.how != "columns" else shape[::-1]
                bound = 1 / math.sqrt(columns)  # as the paper's code and PEFT draw it
                self.a[key] = nn.Parameter(torch.empty(config.rank, columns).uniform_(-bound, bound))
                self.b[key] = nn.Parameter(torch.zeros(rows, config.rank))

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Adapted:
        """The adapters of all slices as one: narrow matrices side by side, wide ones on a diagonal of blocks."""
        keys = {name: _last(module_of(name)) for name in self.shapes}
        narrow = [self.a[key] for key in keys.values() if key in self.a]
        width, at, wide = sum(len(a) for a in narrow), 0, []
        for name, key in keys.items():
            rows = self.shapes[name][1 if self.part.how == "columns" else 0]
            if key not in self.b:
                wide.append(narrow[0].new_zeros(rows, width))
                continue
            rank = self.b[key].shape[1]
            wide.append(F.pad(self.b[key], (at, width - at - rank)))
            at += rank
        b = wide[0] if self.part.how == "columns" else how_of(self.part).together(wide, self.backbone)
        return Adapted(self.scale, torch.cat(narrow), b, weight)


class Adapted(NamedTuple):
    """A matrix with what is learned beside it: the product of both, without the sum of the two ever being made."""

    scale: float
    a: Float[Tensor, "rank columns"]
    b: Float[Tensor, "rows rank"]
    weight: Float[Tensor, "rows columns"]

    def times(self, x: Float[Tensor, "*rest columns"], bias: Tensor | None = None) -> Float[Tensor, "*rest rows"]:
        """x @ (weight + scale * B A).T + bias."""
        return F.linear(x, self.weight, bias) + F.linear(F.linear(x, self.a), self.b) * self.scale

    def merged(self) -> Float[Tensor, "rows columns"]:
        """The sum of the two, in the format of the weight."""
        change = (self.b.float() @ self.a.float()) * self.scale
        return (self.weight.float() + change).to(self.weight.dtype)


def _last(module: str) -> str:
    return module.rpartition(".")[2]
