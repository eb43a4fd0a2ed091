"""Drafts by heads that look ahead from the state behind which the newest token was drawn: Medusa, Hydra.

The state is that of the verifying forward, so a draft costs no forward of the model. The tree has a fixed shape, filled
with the heads' likeliest tokens: no randomness is involved, and `Walk` verifies it exactly at every temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.draft import beside
from seriatim.decoding.features import kept_states, last_states, last_tokens
from seriatim.decoding.guess import Guess, moved, room
from seriatim.decoding.loop import Step
from seriatim.decoding.target import Target
from seriatim.decoding.templates import CHANCE, Template, likeliest, of_paths
from seriatim.factorization.line import run, runs
from seriatim.model import Rows
from seriatim.random import Random


class Heads:
    """Fills a template from a trained part; subclasses say how (`fill`), and may work states up first (`behind`).

    part: a `posttraining.heads` module, which looks `ahead` so many tokens; base: the model it was trained for, as it
    sees it (`posttraining.drafting.Base`). Nodes that are deeper, or candidates that are not drafted, are left out of
    the template. The first step of a text drafts nothing: no state is known before it.
    """

    reads_prompt = False

    def __init__(self, part: Any, base: Any, template: Template):
        paths = [p for p in template.paths if len(p) <= part.ahead and max(p) < part.output.size]
        self.part, self.base, self.template = part, base, of_paths(paths)
        self._canvas: Canvas | None = None
        self._row = torch.zeros(0, dtype=torch.long)
        self._state: Float[Tensor, "b d"] | None = None
        self._known: Bool[Tensor, "b"] | None = None  # rows whose state is known; None: all

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        if canvas is not self._canvas:
            self._canvas, self._row, self._state, self._known = canvas, canvas.row, None, None
            self.begin()
        self._follow(canvas, moved(self._row, canvas.row))
        left = room(canvas)
        template = self.template.cut(max(left) - 1)
        if self._state is None or template.size == 0:
            return None
        value = self.fill(template, self._state, canvas)
        if canvas.batch > 1 or self._known is not None:
            gone = torch.tensor(template.depths)[None] >= torch.tensor(left)[:, None]
            gone = gone if self._known is None else gone | ~self._known[:, None]
            value = value.masked_fill(gone.to(value.device), -1)
        return Guess(beside(canvas, value), None if template.width == 1 else template.parent)

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        self._state, self._known = self.behind(rows, step), None
        self._follow(canvas, step.select)

    def _follow(self, canvas: Canvas, rows: Int[Tensor, "b"] | None) -> None:
        """Rows were copied, dropped or admitted."""
        if rows is None:
            return
        self._row = canvas.row
        if self._state is not None:
            known = rows >= 0
            self._known = known if self._known is None else known & self._known[rows.clamp(min=0)]
            self._state = self._state[rows.clamp(min=0)]
            self.select(rows)

    def begin(self) -> None:
        """Another canvas."""

    def select(self, rows: Int[Tensor, "b"]) -> None:
        """What a subclass remembers of rows follows them (-1: a new one)."""

    def behind(self, rows: Rows, step: Step) -> Float[Tensor, "b d"]:
        """The state from which each row's next draft starts."""
        return last_states(rows, step)

    def fill(self, template: Template, state: Float[Tensor, "b d"], canvas: Canvas) -> Int[Tensor, "b n"]:
        """The tokens of the nodes."""
        raise NotImplementedError


class MedusaHeads(Heads):
    """Every head reads the state alone: all of them in one product, candidates at different depths independent (Cai et
    al. 2024, section 2.1)."""

    def fill(self, template: Template, state: Float[Tensor, "b d"], canvas: Canvas) -> Int[Tensor, "b n"]:
        best = self.part.output.best(self.part(state)[:, : template.depth], template.width)
        return best.flatten(1)[:, _independent(template)]


@lru_cache(maxsize=64)
def _independent(template: Template) -> Int[Tensor, "n"]:
    """Where the nodes' tokens stand among `width` candidates of each depth."""
    depth, child = torch.tensor(template.depths), torch.tensor(template.child)
    with torch.inference_mode(False):
        return (depth - 1) * template.width + child


class HydraHeads(Heads):
    """Head i reads the state and the tokens on the way to a node of depth i - 1, and gives that node its children:
    depth by depth, each in one product (Ankner et al. 2024, section 3)."""

    def fill(self, template: Template, state: Float[Tensor, "b d"], canvas: Canvas) -> Int[Tensor, "b n"]:
        token = last_tokens(canvas).to(state.device)
        path = torch.cat([state, self.base.embed(token)], -1)[:, None]
        found = []
        for i, level in enumerate(_levels(template)):
            x = self.part(i + 1, path)[..., None, :]
            value = self.part.output.best(x, level.width, first=i).flatten(1)[:, level.take]
            found.append(value)
            if level.onward is not None:
                path = torch.cat([path[:, level.parent], self.base.embed(value[:, level.onward])], -1)
        return torch.cat(found, 1)


@dataclass(frozen=True, eq=False)
class Level:
    """One depth of a template: how many candidates its parents are asked for, where among these the tokens of its nodes
    are, which of the nodes go on (None: none), and as which of the parents of this depth their own parents stand."""

    width: int
    take: Int[Tensor, "n"]
    onward: Int[Tensor, "m"] | None
    parent: Int[Tensor, "m"]


@lru_cache(maxsize=64)
def _levels(template: Template) -> tuple[Level, ...]:
    levels = []
    above = [-1]  # the nodes of the depth before that have children
    with torch.inference_mode(False):
        for first, end in template.levels:
            place = {node: i for i, node in enumerate(above)}
            width = max(template.child[first:end]) + 1
            nodes = range(first, end)
            take = [place[template.parent[n]] * width + template.child[n] for n in nodes]
            above = [n for n in nodes if n in template.parent]
            onward = torch.tensor([n - first for n in above]) if above else None
            parent = torch.tensor([place[template.parent[n]] for n in above], dtype=torch.long)
            levels.append(Level(width, torch.tensor(take), onward, parent))
    return tuple(levels)


class PrefixedHydraHeads(HydraHeads):
    """Hydra++: states go through a decoder layer over all accepted ones, once a round, which keeps a cache of its own.

    A row that is admitted later has that layer read what its own first forward holds."""

    reads_prompt = True

    def begin(self) -> None:
        self._cache: Any = None

    def behind(self, rows: Rows, step: Step) -> Float[Tensor, "b d"]:
        states, count = kept_states(rows, step)
        if self._cache is None:
            self._cache = self.part.prefix.new_cache(len(states), states.shape[1] + 256)
        held = self._cache.length
        if isinstance(count, int) and isinstance(held, int):
            plan: Any = run(held, count)
            h = self.part.passed(states, plan, self._cache)
            self._cache.commit(count, plan)
            return h[:, -1]
        b = len(states)
        count, held = (torch.as_tensor(x).cpu().expand(b) for x in (count, held))
        plan = runs(held, count)
        h = self.part.passed(states[:, : plan.size], plan, self._cache)
        offset = torch.arange(plan.size)[None]
        self._cache.commit(torch.where(offset < count[:, None], offset, -1), plan)
        last = h[torch.arange(b), (count - 1).clamp(min=0)]
        return last if self._state is None else torch.where((count > 0)[:, None].to(h.device), last, self._state)

    def select(self, rows: Int[Tensor, "b"]) -> None:
        self._cache.select(rows)


def shaped(part: Any, nodes: int) -> Template:
    """The draft tree of so many nodes that is accepted most by what was measured of a part, or else by what is usual.
    Fewer where it looks so little ahead that there are no more. Raises ValueError for none."""
    if nodes < 1:
        raise ValueError(f"a draft tree has at least 1 node, got {nodes}")
    chance = part.chance or (CHANCE,) * part.ahead
    most, level = 0, 1
    for row in chance[: part.ahead]:
        level *= len(row)
        most += level
    return likeliest(chance, min(nodes, most))
