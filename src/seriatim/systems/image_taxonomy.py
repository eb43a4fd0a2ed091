"""Image systems by what they do: order, groups, who sees whom, feed, head, forwards, cache. Nothing is typed in.

Each is built at toy size, over a tokenizer that was never trained, and watched while it draws one picture, of three
sizes. A picture is `side` pixels wide; systems of pixels decide each of them, those of codes one place for 4 x 4
pixels, so that columns of several systems may be compared at equal pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.data.base import Data
from seriatim.model import Model
from seriatim.objectives.noised import Noised
from seriatim.plan import SOURCES, Plan
from seriatim.systems.image_orders import ImageOrder, Level, class_of, watched
from seriatim.systems.image_system import ImageSystem
from seriatim.systems.meta import catalogue
from seriatim.systems.system import Sampling, config_from
from seriatim.tokenizers.files import make_tokenizer
from seriatim.view import View

SIDES = (8, 16, 32)  # pixels in a row of the pictures that are watched
PLACE = 4  # pixels in a row of a place of a map of codes
LIKE = 32  # the size for which a system chooses its tokenizer, whatever is watched
SHAPE = {"width": 32, "depth": 2, "heads": 2, "shown": 4}
SCALES = ("multi-scale", "rings", "flexible")  # kinds of tokenizers with maps of several sizes


@dataclass(frozen=True)
class Row:
    """One system. level, element: of `ImageOrder`; order: which pattern the steps make of the places; groups: least and
    most elements of a step; visibility, feed: of the slots of one forward; steps, forwards: of a picture of each of
    `SIDES`; growth: of the forwards with the number n of places in a row; cache: how what it remembers grows; tasks:
    what it can be asked for."""

    key: str
    title: str
    level: Level
    element: str
    order: str
    groups: tuple[int, int]
    visibility: str
    feed: str
    head: str
    likelihood: str
    steps: tuple[int, ...]
    forwards: tuple[int, ...]
    growth: str
    cache: str
    tasks: tuple[str, ...]


def taxonomy(keys: Iterable[str] | None = None) -> list[Row]:
    """The rows of all image systems, or of these. Raises KeyError for one that there is not."""
    found = [key for key, (meta, _) in catalogue().items() if meta.family == "image"]
    return [row(key) for key in (found if keys is None else keys)]


@lru_cache(maxsize=64)
def row(key: str) -> Row:
    """The row of a system."""
    systems = [toy(key, side) for side in SIDES]
    return row_of(systems, [watched(key, s) for s in systems])


def row_of(systems: Sequence[ImageSystem], drawn: Sequence[ImageOrder]) -> Row:
    """The row of a system that was watched at several sizes."""
    system, last, plan = systems[-1], drawn[-1], first_plan(systems[-1])
    model, forwards = system.model, tuple(d.forwards for d in drawn)
    order = order_of(drawn[1], watched(last.key, systems[1], 1), system.placed)
    return Row(
        last.key, last.title, last.level, last.element, order, last.groups, visibility_of(plan),
        feed_of(plan), ", ".join(_words(type(h).__name__) for h in model.heads.values()),
        likelihood_of(model), tuple(d.steps for d in drawn), forwards, growth_of(forwards),
        growth_of([d.held for d in drawn]), tasks_of(system),
    )  # fmt: skip


# ---- watching --------------------------------------------------------------------------------------------------------


class _Noise:
    """Grey pictures of nothing, from which a system takes mean and deviation."""

    def __init__(self, side: int):
        self.side = side

    def __len__(self) -> int:
        return 8

    def take(self, index: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        images = torch.rand(len(index), 1, self.side, self.side, generator=torch.Generator().manual_seed(0))
        return {"image": 2 * images - 1, "label": index % 3}


def toy(key: str, side: int) -> ImageSystem:
    """A system at the smallest size for grey pictures `side` pixels wide, with random weights; its tokenizer too."""
    cls, names = class_of(key), ("a", "b", "c")
    torch.manual_seed(0)
    tokenizer = toy_tokenizer(cls, side)
    known = cls.known(tokenizer, Data("noise", "image", _Noise(side), _Noise(side), names))
    mine = {f.name for f in fields(cls.Config)}
    own = {k: v for k, v in SHAPE.items() if k in mine}
    return cls(config_from(cls, own, None, **known), tokenizer).eval().requires_grad_(False)


def toy_tokenizer(cls: type[ImageSystem], side: int) -> Any:
    """What makes elements of pictures of this size, in the kind that the system chooses for glyphs."""
    kind = cls.tokenizer_for((1, LIKE, LIKE))
    if kind not in catalogue():
        settings = {} if kind == "pixels" else {"patch": PLACE}
        given = {k: v for k, v in cls.tokenizer_settings_for((1, LIKE, LIKE)).items() if k != "patch"}
        return make_tokenizer(kind, {"side": side, "channels": 1, **settings, **given})
    tokens: Any = class_of(kind)
    if tokens.kind in SCALES:
        rows = side // PLACE
        scales = tuple(2**k for k in range(rows.bit_length()))
        sized = {"side": side, "drawn": 1} if tokens.kind == "flexible" else {}
        return tokens(tokens.Config(scales=scales, halvings=2, width=16, **sized)).model
    if "halvings" in {f.name for f in fields(tokens.Config)}:
        return tokens(tokens.Config.for_pictures(side, 1, halvings=2, width=16)).model
    return tokens(tokens.Config.for_pictures(side, 1)).model


def unguided(system: ImageSystem) -> Sampling:
    """How a system samples, without guidance."""
    return replace(system.sampling, guidance=0.0)


def first_plan(system: ImageSystem) -> Plan:
    """All steps of a picture in one forward; for orders that have no such form, the first one."""
    canvas = system.blank(torch.zeros(1, dtype=torch.long), 1, unguided(system), 0)
    plan = system.model.factorization.packed(canvas)
    plan = plan or system.model.factorization.step(canvas, None, 0)
    assert plan is not None
    return plan


# ---- what follows ----------------------------------------------------------------------------------------------------


def likelihood_of(model: Model) -> str:
    """Exact, a bound or none: what the order allows, where all heads can say it."""
    allowed = model.factorization.likelihood
    exact = all(getattr(head, "exact", False) for head in model.heads.values())
    if isinstance(model, Noised):  # the chain of its steps bounds it
        return "bound" if exact else "none"
    return allowed if exact else "none"


def tasks_of(system: ImageSystem) -> tuple[str, ...]:
    """What a system can be asked for, as it answers."""
    tasks = ["class" if "class" in system.model.conditions else "unconditional"]
    side = system.tokenizer.side
    half = torch.zeros(side, side, dtype=torch.bool)
    half[: side // 2] = True
    asked: dict[str, Callable[[], object]] = {
        "in-painting": lambda: system.known_elements(half, system.layout(unguided(system))),
        "any size": lambda: system.layout(replace(unguided(system), size=(side // 2, side))),
    }
    for name, ask in asked.items():
        try:
            ask()
        except (ValueError, NotImplementedError):
            continue
        tasks.append(name)
    return tuple(tasks)


def growth_of(counts: Sequence[int]) -> str:
    """How a count grows where the places in a row double: none, 1, log n, n or n²."""
    if not any(counts):
        return "none"
    if counts[-1] == counts[-2]:
        return "1"
    steps = [b - a for a, b in pairwise(counts)]
    power = math.log2(counts[-1] / counts[-2]) if counts[-2] else 2.0
    if len(set(steps)) == 1 or power < 0.5:
        return "log n"
    return "n²" if power >= 1.5 else "n"


def feed_of(plan: Plan) -> str:
    """What stands in the slots that are read, and in others."""
    source, slot = plan.slots.source[0], plan.reads.slot[0]
    read = torch.zeros(plan.size, dtype=torch.bool).index_fill(0, slot[slot >= 0], True)
    said = [" and ".join(SOURCES[i] for i in source[mine].unique().tolist()) for mine in (read, ~read)]
    return said[0] if said[1] in ("", said[0]) else f"{said[0]} beside {said[1]}"


def visibility_of(plan: Plan) -> str:
    """Who sees whom, in each kind of layer."""
    said = {name: seen_in(view) for name, view in plan.views.items()}
    return (
        next(iter(said.values())) if len(set(said.values())) == 1 else "; ".join(f"{k}: {v}" for k, v in said.items())
    )


def seen_in(view: View) -> str:
    """Who sees whom in one kind of layer, in words."""
    mask, at = view.mask()[0], view.at[0]
    other = ~torch.eye(len(at), dtype=torch.bool)
    if bool(mask.all()):
        return "everything"
    where = "" if view.lane is None else " in its lane"
    if view.lane is not None:
        other &= view.lane[0][:, None] == view.lane[0]
    alike, before = at[:, None] == at, at[:, None] > at
    own, earlier = (_share(mask[pairs & other]) for pairs in (alike, before))
    together = {"all": "its step", "some": "some of its step"}.get(own, "")
    past = {"all": "all before", "some": "some of what is before"}.get(earlier, "")
    return (" and ".join(part for part in (together, past) if part) or "itself") + where


def _share(seen: Tensor) -> str:
    return "none" if not bool(seen.any()) else "all" if bool(seen.all()) else "some"


def _words(name: str) -> str:
    """A class of heads in words."""
    letters = "".join(f" {c.lower()}" if c.isupper() else c for c in name.removesuffix("Head"))
    return letters.strip()


# ---- orders ----------------------------------------------------------------------------------------------------------


def order_of(drawn: ImageOrder, again: ImageOrder, placed: bool = True) -> str:
    """Which pattern the turns of the elements make of their places, in two pictures; placed: whether coordinates tell
    places in the picture."""
    coord = drawn.coord if placed else torch.arange(len(drawn.turn))[:, None]
    rank, other = (torch.unique(d.turn, return_inverse=True)[1] for d in (drawn, again))
    level = coord[:, 0] if coord.shape[1] == 3 else torch.zeros_like(rank)
    several = bool(level.max() > 0) and _after(level, rank)
    prefix = "map by map, " if several else ""
    if not torch.equal(rank, other):
        return f"{prefix}places at random"
    if not several:
        return _within(coord[:, -2:], rank)
    parts = [_within(coord[level == k][:, 1:], rank[level == k]) for k in level.unique().tolist()]
    return "map by map" if set(parts) == {"all at once"} else prefix + ", then ".join(dict.fromkeys(parts))


def _after(level: Tensor, rank: Tensor) -> bool:
    """Is every map finished before the next one begins?"""
    ends = [(int(rank[level == k].min()), int(rank[level == k].max())) for k in level.unique().tolist()]
    return all(a[1] < b[0] for a, b in pairwise(ends))


def _within(coord: Int[Tensor, "e axes"], rank: Int[Tensor, "e"]) -> str:
    """The pattern in one map, or along a line."""
    rank = torch.unique(rank, return_inverse=True)[1]
    count = rank.bincount()
    if len(count) == 1:
        return "all at once"
    if torch.equal(rank, torch.arange(len(rank))):
        return "one by one along a line" if coord.shape[1] == 1 else "one by one, row by row"
    if coord.shape[1] == 2 and torch.equal(rank, coord.sum(1)):
        return "anti-diagonals"
    steady = bool((rank.diff() >= 0).all())
    if coord.shape[1] == 2 and not steady and len(count.unique()) == 1 and _cells(coord, rank):
        rows, columns = (int(x) for x in (coord[rank == 0].amax(0) - coord[rank == 0].amin(0) + 1))
        return f"cells of {rows} x {columns}"
    if steady:
        sizes = [str(n) for n in count.unique().tolist()]
        return f"runs of {' and '.join(sizes)} along a line"
    return "groups"


def _cells(coord: Tensor, rank: Tensor) -> bool:
    """Does each step fill a rectangle?"""
    for k in range(int(rank.max()) + 1):
        mine = coord[rank == k]
        if int((mine.amax(0) - mine.amin(0) + 1).prod()) != len(mine):
            return False
    return True
