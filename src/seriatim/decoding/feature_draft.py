"""Drafting in the states of the target: one small layer goes on where the target stopped (EAGLE, Chimera).

The state of token t, which the target's head reads out, has seen tokens 0 to t. A draft layer is given pairs of a state
and the token behind it, and estimates the next state, from which the next token is read out; estimate and token make
the next pair. The layer remembers the pairs of known tokens, with the target's true states, in a cache of its own; the
pairs of drafted tokens are fed again at each depth and remembered never. So a draft depends on the known text alone,
and is verified exactly by `Walk`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.backbones.cache import KVCache
from seriatim.canvas import Canvas
from seriatim.decoding.features import kept_states
from seriatim.decoding.growth import Choices, Tree
from seriatim.decoding.guess import Guess, moved, room
from seriatim.decoding.loop import Step
from seriatim.decoding.target import Target
from seriatim.factorization.line import run
from seriatim.model import Rows
from seriatim.plan import Plan
from seriatim.random import Random
from seriatim.view import INF, View, tree

Embed = Callable[[Tensor], Tensor]  # ids -> the vectors that the target reads


class FeatureLayer(Protocol):
    """A draft layer as decoding uses it. A pair takes `places` in it: slots so far behind that of its state (EAGLE
    fuses a pair into one slot, Chimera gives state and token one each); its estimate stands in the last of them."""

    places: tuple[int, ...]
    layer: Any  # a `Transformer`

    def looks_at(self, place: Int[Tensor, "*n"]) -> Int[Tensor, "*n g"]:
        """The tokens that are looked at for the token at a place, itself the last; all within the text."""
        ...

    def enter(self, h: Float[Tensor, "b m d"], e: Float[Tensor, "b m g d"]) -> Float[Tensor, "b s d"]:
        """What stands in the slots of pairs, from states and the vectors of tokens."""
        ...

    def choices(
        self, estimate: Float[Tensor, "b m d"], last: Float[Tensor, "b 1 d"], depth: int, width: int
    ) -> Choices:
        """The likeliest tokens behind estimated states; `last` is the last true state, and `depth` how far ahead of it
        an estimate is (from 1)."""
        ...


class Pass(Plan):
    """A forward of a draft layer: slots at given places of a line under a given mask.

    run: as in `Plan`; coord: places of the slots of each row, where they differ. What is committed is seen by all that
    comes later.
    """

    plain = True

    def __init__(
        self,
        size: int,
        mask: Bool[Tensor, "b 1 q k"] | str | None,
        run: tuple[int, Int[Tensor, "s"] | None] | None = None,
        coord: Int[Tensor, "b s"] | None = None,
    ):
        # what a backbone and a cache ask, past the frozen base class
        d = self.__dict__
        d["size"], d["mask"], d["run"], d["windows"] = size, mask, run, {}
        d["slots"] = SimpleNamespace(coord=None if coord is None else coord[..., None])

    size = 0
    mask: Tensor | str | None
    run: tuple[int, Tensor | None] | None  # type: ignore[assignment]

    def attention(self, view: str, cache: Any) -> Tensor | str | None:
        return self.mask

    @property
    def views(self) -> dict[str, View]:  # type: ignore[override]
        """For caches whose rows differ in length."""
        zero = torch.zeros(1, self.size, dtype=torch.long)
        return {"all": View(zero, zero, torch.full_like(zero, INF))}


def chain(start: int, pairs: int, places: tuple[int, ...], cache: KVCache | None = None) -> Pass:
    """Pairs one behind another, the first state at place `start`, behind all that a cache holds."""
    size = pairs * len(places)
    offset = None if places == (0,) else _offsets(pairs, places)
    columns = 0 if cache is None else cache.columns
    return Pass(size, run(columns, size).attention("all", cache), (start, offset))


@lru_cache(maxsize=64)
def _offsets(pairs: int, places: tuple[int, ...]) -> Int[Tensor, "s"]:
    with torch.inference_mode(False):  # they outlive the loop that first asks for them
        return (torch.arange(pairs)[:, None] + torch.tensor(places)).flatten()


class Known(NamedTuple):
    """States that stand after a step: the element whose state is the first (-1: of a learned start), and how many each
    row has; one number where rows are alike."""

    h: Float[Tensor, "b w d"]
    first: Int[Tensor, "b"] | int
    size: Int[Tensor, "b"] | int


class Front(NamedTuple):
    """Where the layer stands behind all known tokens of each row.

    estimate: of the state behind the last token; last: the last true one, and the place of its element (one number
    where rows are alike); before: what is looked at for a token that follows, without itself; seen: columns of the
    cache that a row has (None: all); there: rows that have all known tokens behind them, and so can draft.
    """

    estimate: Float[Tensor, "b 1 d"]
    last: Float[Tensor, "b 1 d"]
    place: Int[Tensor, "b 1"] | int
    before: Int[Tensor, "b 1 h"]
    seen: Bool[Tensor, "b c"] | None
    there: list[bool]


class FeatureDraft:
    """Drafts a tree by a layer that goes on in the target's states. Follows one canvas at a time.

    part: the layer, in the target's number format and on its device; tree: how drafts grow.
    """

    reads_prompt = True

    def __init__(self, part: FeatureLayer, tree: Tree):
        self.part, self.tree = part, tree
        self._canvas: Canvas | None = None
        self._row = torch.zeros(0, dtype=torch.long)
        self._cache: Any = None
        self._new: list[Known] = []  # what the layer has not seen yet

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        if canvas is not self._canvas:
            self._begin(canvas, canvas.batch)
        self._follow(canvas, moved(self._row, canvas.row))
        deepest = [n - 1 for n in room(canvas)]
        if not self._new or max(deepest) < 1:
            return None
        embed: Any = target.model.embed.vectors
        new, self._new = self._new, []
        for known in new:
            front = self._feed(known, canvas, embed)
        if front is None:
            return None
        deepest = [n if there else 0 for n, there in zip(deepest, front.there, strict=True)]
        if max(deepest) < 1:
            return None
        branches = Branches(self.part, self._cache, embed, front, self.tree.width)
        return self.tree.grow(branches.first(), branches.expand, deepest)

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        h, count = kept_states(rows, step)
        if canvas is not self._canvas:
            self._begin(canvas, len(h))
        slot, read = rows.slot, rows.element  # the last known token's slot reads the element behind it
        if isinstance(slot, Tensor):
            first = torch.as_tensor(read)[:, 0] - 1 - slot[:, 0]
            self._new.append(Known(h, first.cpu().expand(len(h)), count))
        else:
            self._new.append(Known(h, int(read) - 1 - (0 if slot is None else slot.start), count))
        self._follow(canvas, step.select)

    def _begin(self, canvas: Canvas, batch: int) -> None:
        self._canvas, self._row, self._new = canvas, canvas.row, []
        self._cache = self.part.layer.new_cache(batch, canvas.layout.size * len(self.part.places))

    def _follow(self, canvas: Canvas, rows: Int[Tensor, "b"] | None) -> None:
        """Rows were copied, dropped or admitted."""
        if rows is None:
            return
        self._cache.select(rows)
        where, new = rows.clamp(min=0), rows < 0
        for i, known in enumerate(self._new):
            first, size = (torch.as_tensor(x).cpu().expand(len(known.h))[where] for x in known[1:])
            self._new[i] = Known(known.h[where], first, size.masked_fill(new, 0))
        self._row = canvas.row

    # ---- known tokens ------------------------------------------------------------------------------------------------

    def _feed(self, known: Known, canvas: Canvas, embed: Embed) -> Front | None:
        """Let the layer see more known tokens; None where there is no pair yet."""
        ids = canvas.value[canvas.layout.kinds[0]]
        h, first, size = known
        if isinstance(first, int) and isinstance(size, int) and isinstance(self._cache.length, int):
            if canvas.length is not None:
                return self._feed_alike(h, first, size, ids, canvas.length, embed)
        return self._feed_rows(known, ids, canvas.lengths(), embed)

    def _feed_alike(
        self, h: Float[Tensor, "b w d"], first: int, size: int, ids: Int[Tensor, "b n"], length: int, embed: Embed
    ) -> Front | None:
        """All rows have the same places."""
        part, cache, skip = self.part, self._cache, max(-first, 0)
        first += skip
        pairs = min(size - skip, length - 1 - first)
        if pairs < 1:
            return None
        h = h[:, skip : skip + pairs]
        look = part.looks_at(torch.arange(first + 1, first + 2 + pairs))
        tokens = ids[:, look[:-1]]
        plan = chain(first, pairs, part.places, cache)
        f = part.layer(part.enter(h, embed(tokens)), plan, cache)
        cache.commit(plan.size, plan)
        last, before = first + pairs - 1, ids[:, look[-1:, :-1]]
        return Front(f[:, -1:], h[:, -1:], last, before, None, [last == length - 2] * len(h))

    def _feed_rows(self, known: Known, ids: Int[Tensor, "b n"], length: Int[Tensor, "b"], embed: Embed) -> Front | None:
        """Rows differ in how many pairs are new, or in how many they have."""
        part, cache, slots = self.part, self._cache, len(self.part.places)
        b, w = known.h.shape[:2]
        first, size = (torch.as_tensor(x).cpu().expand(b)[:, None] for x in known[1:])
        place, length = first + torch.arange(w), length[:, None]  # of the elements whose states these are
        there = (torch.arange(w) < size) & (place >= 0) & (place < length - 1)
        if not bool(there.any()):
            return None
        tokens = _at(ids, part.looks_at(torch.where(there, place + 1, 1)))
        live = there.repeat_interleave(slots, 1)
        own = torch.ones(w * slots, w * slots, dtype=torch.bool).tril() & live[:, None]
        own |= torch.eye(w * slots, dtype=torch.bool)  # what is padding sees itself: nothing must become NaN
        seen = _held(cache)[:, None].expand(-1, w * slots, -1)
        coord = (place.clamp(min=0)[..., None] + torch.tensor(part.places)).flatten(1)
        plan = Pass(w * slots, torch.cat([seen, own], 2)[:, None], coord=coord)
        f = part.layer(part.enter(known.h, embed(tokens)), plan, cache)
        cache.commit(torch.where(live, torch.arange(w * slots), -1), plan)
        at = torch.where(there, torch.arange(w), -1).amax(1, keepdim=True).clamp(min=0)
        row, last = torch.arange(b)[:, None], place.gather(1, at)
        ready = there.gather(1, at) & (last == length - 2)
        before = _at(ids, part.looks_at(last.clamp(min=0) + 2)[..., :-1])
        estimate = f[row, (at + 1) * slots - 1]
        return Front(estimate, known.h[row, at], last, before, _held(cache), ready[:, 0].tolist())


def _at(ids: Int[Tensor, "b n"], index: Int[Tensor, "b m g"]) -> Int[Tensor, "b m g"]:
    """The tokens at these places, the last one behind the end."""
    index = index.clamp(max=ids.shape[1] - 1).to(ids.device)
    return ids.gather(1, index.flatten(1)).view(index.shape)


def _held(cache: KVCache) -> Bool[Tensor, "b c"]:
    """Which columns each row of a cache has."""
    held = torch.as_tensor(cache.length).expand(cache.batch)
    return torch.arange(cache.columns) < held[:, None]


class Branches:
    """Where the layer stands behind the nodes of a draft that were expanded last. What it is given here stays pending
    in its cache, and is gone with the next forward."""

    def __init__(self, part: FeatureLayer, cache: KVCache, embed: Embed, front: Front, width: int):
        self.part, self.cache, self.embed, self.front, self.width = part, cache, embed, front, width
        self.estimate, self.depth = front.estimate, 1
        self._before = front.before
        self._x: Float[Tensor, "b s d"] | None = None  # what stands in the slots of all nodes that were expanded
        self._grown: Grown = ()

    def first(self) -> Choices:
        """What is likely behind the last known tokens."""
        return self.part.choices(self.estimate, self.front.last, self.depth, self.width)

    def expand(self, token: Int[Tensor, "b k"], rows: Sequence[int]) -> Choices:
        """As `growth.Expand` says."""
        part, where, slots = self.part, torch.tensor(rows), len(self.part.places)
        tokens = token[..., None]
        if self._before.shape[2]:
            tokens = torch.cat([self._before[:, where], tokens], 2)
            self._before = tokens[..., 1:]
        x = part.enter(self.estimate[:, where], self.embed(tokens))
        self._x = x if self._x is None else torch.cat([self._x, x], 1)
        self._grown = (*self._grown, tuple(rows))
        f = part.layer(self._x, self._plan(), self.cache)
        self.estimate = f[:, f.shape[1] - len(rows) * slots + slots - 1 :: slots]
        self.depth += 1
        return part.choices(self.estimate, self.front.last, self.depth, self.width)

    def _plan(self) -> Pass:
        """All nodes that were expanded, behind what is known."""
        sees, offset = _branching(self._grown, self.part.places)
        seen, place, size, columns = self.front.seen, self.front.place, len(offset), self.cache.columns
        if seen is None:
            assert isinstance(place, int)
            mask = F.pad(sees, (columns, 0), value=True)[None, None] if size > 1 else None
            return Pass(size, mask, (place + 1, offset))
        both = torch.cat([seen[:, None].expand(-1, size, -1), sees.expand(len(seen), -1, -1)], 2)
        return Pass(size, both[:, None], coord=place + 1 + offset)


Grown = tuple[tuple[int, ...], ...]  # for each depth, behind which of the nodes of the depth above its nodes stand


@lru_cache(maxsize=1024)
def _branching(grown: Grown, places: tuple[int, ...]) -> tuple[Bool[Tensor, "s s"], Int[Tensor, "s"]]:
    """Which slots of the nodes of a tree see which others of these (those of nodes on the way to them, and their own),
    and how far behind the first depth they stand. Trees of few shapes come again and again."""
    with torch.inference_mode(False):  # they outlive the loop that first asks for them
        first, parent = 0, list[int]()  # first: of the depth above
        for level, rows in enumerate(grown):
            start = len(parent)
            parent += [first + r if level else -1 for r in rows]
            first = start
        depth = torch.tensor([level for level, rows in enumerate(grown) for _ in rows])
        sees = tree(parent).mask()[0]
        offset = depth[:, None] + torch.tensor(places)
        return sees.repeat_interleave(len(places), 0).repeat_interleave(len(places), 1), offset.flatten()
