"""Next token: elements of a line decided one by one, and drafts of several verified in one forward.

Slot j carries element j - prefix and reads out the one behind it. `prefix` slots in front carry no element: a class,
a learned start. Without one, the first element must be given (a start-of-text token).

Kinds of layers named in `windows` see the last so many places only, the slot itself among them.

Plans along a line are runs: while every row has the same length they are a compiled shape plus one integer, and make
no tensors (`LinePlan`). Rows of different lengths get labels (`_ragged`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.canvas import DELETED, GIVEN, Canvas
from seriatim.decoding.guess import Guess, Transfer, depths, spawning
from seriatim.factorization.base import Factorization
from seriatim.plan import DERIVED, LEARNED, MASK, VALUE, OrderError, Plan, Reads, Slots
from seriatim.slots import Spawn
from seriatim.view import INF, View, inclusive, timed, tree

NO_WINDOWS: Mapping[str, int] = {}


class LineShape:
    """What does not depend on where the cache stands: known slots, then the nodes of a draft, then so many slots for
    each of them and for the last known one: that these spawn (`spawned`), or `masks`. Made once a shape."""

    def __init__(self, known: int, nodes: int, parent: tuple[int, ...] | None, spawned: int = 0, masks: int = 0):
        self.known, self.fed = known, known + nodes
        behind = spawned + masks
        self.size, self.spawned, self.masks = self.fed + behind * (nodes + 1), spawned, masks * (nodes + 1)
        self.chain = parent is None and not behind
        self.read = slice(known - 1, self.fed) if self.size > 1 else None
        self.view = inclusive(range(self.size))
        self.depth: Tensor | None = None
        if not self.chain:
            parents = tuple(range(-1, nodes - 1)) if parent is None else parent
            self.view, depth = _drafted(parents, spawned, masks, known)
            self.depth = depth - 1
            self.source = torch.arange(known - 1, self.fed)[None]
        self._tail: Tensor | None = None

    def band(self, base: int, window: int, device: torch.device) -> Bool[Tensor, "1 1 q k"]:
        """The same where only the last `window` places are seen: by depth, in a draft tree."""
        offset = torch.arange(self.size) if self.depth is None else self.depth
        place = torch.cat([torch.arange(base), base + offset]).to(device)
        near = place[None] > (base + offset.to(device))[:, None] - window
        return self.tail(base, device) & near

    def tail(self, base: int, device: torch.device) -> Bool[Tensor, "1 1 q k"]:
        """The mask over `base` cached entries, all seen, and these slots: a slice of one buffer."""
        tail = self._tail
        if tail is None or tail.shape[1] < base + self.size or tail.device != device:
            capacity = max(512, 2 * base)
            with torch.inference_mode(False):  # shapes outlive the loop that first asks for them
                tail = torch.ones(self.size, capacity + self.size, dtype=torch.bool)
                tail[:, capacity:] = self.view.mask()[0]
                tail = self._tail = tail.to(device)
        return tail[None, None, :, tail.shape[1] - self.size - base :]


class LinePlan(Plan):
    """A compiled shape and the number of cached slots before it; labels are made only when asked for."""

    plain = True

    def __init__(
        self, shape: LineShape, base: int, prefix: int, elements: int, windows: Mapping[str, int] = NO_WINDOWS,
        transfers: Sequence[Transfer] = (),
    ):  # fmt: skip
        # what the hot path needs, past the frozen base class, whose fields are made on demand below
        d = self.__dict__
        d["shape"], d["base"], d["prefix"], d["elements"] = shape, base, prefix, elements
        d["size"], d["run"], d["windows"] = shape.size, (base, shape.depth), windows
        if transfers:
            d["spawns"] = _spawns(transfers, shape.fed, shape.source)
        d["masks"] = shape.masks

    shape: LineShape
    base: int
    prefix: int
    elements: int
    size = 0  # in place of the property of the base class; each instance has its own
    run: tuple[int, Tensor | None]  # type: ignore[assignment]

    def attention(self, view: str, cache) -> Tensor | str | None:
        shape, base = self.shape, self.base
        if cache is not None and not cache.plain:
            return super().attention(view, cache)
        window = self.windows.get(view) if self.windows else None
        if window is not None and base + shape.size > window:
            return shape.band(base, window, torch.device("cpu") if cache is None else cache.device)
        if shape.chain:
            if shape.size == 1:
                return None
            if base == 0:
                return "causal"
        return shape.tail(base, torch.device("cpu") if cache is None else cache.device)

    # ---- labels, for checks, costs, and caches that are not plain --------------------------------------------------

    @cached_property
    def _places(self) -> Int[Tensor, "1 s"]:
        offset = torch.arange(self.size) if self.shape.depth is None else self.shape.depth
        return (self.base + offset)[None]

    @cached_property
    def slots(self) -> Slots:  # type: ignore[override]
        place = self._places
        element = place - self.prefix
        node = torch.arange(self.size)[None] - self.shape.known
        source = torch.where(element >= 0, VALUE, LEARNED)
        rank = element  # everything known counts as decided one by one: a draft is checked against its own path
        coord = _within(place, self.prefix, self.elements)
        if (fed := self.shape.fed) < self.size:
            there = torch.arange(self.size)[None] < fed
            element, node = torch.where(there, element, -1), torch.where(there, node, -1)
            source = torch.where(there, source, MASK if self.shape.masks else DERIVED)
            rank = element
        if self.shape.spawned:  # what was spawned carries what its source does
            rank = torch.cat([rank[:, :fed], rank[:, self.shape.source[0]].repeat(1, self.shape.spawned)], 1)
        return Slots(element.clamp(min=-1)[..., None], source, coord[..., None], rank.clamp(min=-1), node.clamp(min=-1))

    @cached_property
    def views(self) -> Mapping[str, View]:  # type: ignore[override]
        v = self.shape.view
        view = View(v.at + self.base, v.born + self.base, torch.where(v.dies < INF, v.dies + self.base, INF))
        return _Same(view, self.windows, self.shape.depth is None)

    @cached_property
    def settled(self) -> Mapping[str, View]:  # type: ignore[override]
        return _Same(timed(self._places), self.windows)

    @cached_property
    def reads(self) -> Reads:  # type: ignore[override]
        slot = torch.arange(self.shape.known - 1, self.shape.fed)[None]
        return Reads(slot, self._places[:, slot[0]] - self.prefix + 1)

    @cached_property
    def readers(self) -> Reads:  # type: ignore[override]
        """Every slot stands before an element; without a cache it is computed again when that one is long decided."""
        return Reads(torch.arange(self.shape.fed)[None], self._places[:, : self.shape.fed] - self.prefix + 1)

    @cached_property
    def rank(self) -> Int[Tensor, "1 E"]:  # type: ignore[override]
        return torch.arange(max(self.elements, int(self.reads.element.max()) + 1))[None]


def run(start: int, size: int) -> LinePlan:
    """The slots `start`, `start` + 1, ... of a line, each of which sees all before it: for layers beside a model."""
    return LinePlan(_chain(size), start, 0, start + size)


@lru_cache(maxsize=256)
def _chain(size: int) -> LineShape:
    with torch.inference_mode(False):
        return LineShape(size, 0, None)


def runs(start: Int[Tensor, "b"], size: Int[Tensor, "b"]) -> Plan:
    """The same where each row has a run of its own; what is behind it is padding."""
    offset = torch.arange(int(size.max()))[None].expand(len(size), -1)
    place = start[:, None] + offset
    live = offset < size[:, None]
    element, none = torch.where(live, place, -1), torch.zeros(len(size), 0, dtype=torch.long)
    slots = Slots(element[..., None], torch.full_like(place, VALUE), place[..., None], element)
    view = timed(place, lane=torch.where(live, 0, -1))
    return Plan(slots, _Same(view), Reads(none, none), torch.arange(int(place.max()) + 1)[None])


class _Same(Mapping):
    """One view for every kind of layer, but for those that see less."""

    def __init__(self, view: View, windows: Mapping[str, int] = NO_WINDOWS, chain: bool = True):
        self.view, self.windows, self.chain = view, windows, chain

    def __getitem__(self, name: str) -> View:
        window = self.windows.get(name)
        if window is None:
            return self.view
        if not self.chain:
            raise OrderError(
                "a draft tree in layers that see a window only has no labels: its clock is no count of places; draft "
                "a chain, or decode rows one by one"
            )
        return self.view.narrow(window=window)

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self):
        return iter(("all", *self.windows))

    def __len__(self) -> int:
        return 1 + len(self.windows)


def _within(place: Int[Tensor, "b s"], prefix: int, elements: int) -> Int[Tensor, "b s"]:
    """Coordinates: a draft may reach past the end, where nothing is read; tables of positions end there."""
    return place.clamp(max=max(prefix + elements - 2, 0))


SHAPES = 256  # compiled shapes that are remembered; drafts of ever new shapes must not pile up


class Line(Factorization):
    """Elements one after another, each after all earlier ones."""

    draftable = True

    def __init__(self, prefix: int = 0, windows: Mapping[str, int] = NO_WINDOWS):
        if prefix < 0:
            raise ValueError(f"a line has 0 or more prefix slots, got {prefix}")
        if any(w < 1 for w in windows.values()):
            raise ValueError(f"a window is at least 1, got {dict(windows)}")
        self.prefix, self.windows = prefix, dict(windows)
        self._shapes: dict[tuple, LineShape] = {}

    def packed(self, canvas: Canvas) -> Plan:
        n, p = canvas.layout.size, self.prefix
        size = p + n - 1
        status = canvas.status
        alive = status != DELETED
        first = torch.zeros(1, dtype=torch.bool) if p else alive[:, 0] & (status[:, 0] != GIVEN)
        if size < 1 or bool(first.any()):
            raise OrderError(
                "without a prefix slot the first element of a line must be given (a start token), in every row; in row "
                f"{int(first.long().argmax())} it is not"
            )
        element = torch.arange(size)[None] - p
        rank = canvas.rank
        if canvas.length is not None:
            rank, alive = rank[:1], alive[:1]
        read = (rank >= 0) & alive
        target = torch.arange(n)[None].expand(read.shape[0], -1)
        target = torch.where(read, target, -1)[:, 1 if p == 0 else 0 :]
        slot = torch.where(target >= 0, target + p - 1, -1)
        needs = torch.where(element >= 0, rank.gather(1, element.clamp(min=0).expand(rank.shape[0], -1)), -1)
        source = torch.where(element >= 0, VALUE, LEARNED)
        slots = Slots(element.clamp(min=-1)[..., None], source, torch.arange(size)[None, :, None], needs)
        views = _Same(inclusive(range(size)), self.windows)
        return _Causal(slots, views, Reads(slot, target), rank, windows=self.windows)

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        length, layout = canvas.length, canvas.layout
        if length is None or not isinstance(cached, int) or len(layout.kinds) > 1:
            return self._ragged(canvas, guess, cached)
        if length >= layout.size:
            return None
        known = self.prefix + length - cached
        key: tuple = (known, 0, None)
        if guess is not None:
            key = (known, guess.size, guess.parent, len(guess.spawn), guess.masks)
        shape = self._shapes.get(key)
        if shape is None:
            if known < 1:
                raise _nothing_new(self.prefix, length, cached)
            shape = self._shapes[key] = LineShape(*key)
            if len(self._shapes) > SHAPES:
                del self._shapes[next(iter(self._shapes))]
        return LinePlan(shape, cached, self.prefix, layout.size, self.windows, () if guess is None else guess.spawn)

    def fill(self, canvas: Canvas, cached: int | Tensor, most: int, leave: int = 0) -> Plan | None:
        if not isinstance(cached, int) or len(canvas.layout.kinds) > 1:
            return None
        length = canvas.length if canvas.length is not None else int(canvas.lengths().min())
        count = min(self.prefix + length - 1 - cached, most)  # of what all rows know
        if count < 1 or self.prefix + length - 1 - cached <= leave:
            return None
        return LinePlan(LineShape(count, 0, None), cached, self.prefix, canvas.layout.size, self.windows)

    def _ragged(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        """Rows of different lengths: labels by position, padding in lane -1."""
        if canvas.done:
            return None
        size, batch = canvas.layout.size, canvas.batch
        alive = ((canvas.status != DELETED) & ~canvas.known).any(1)
        last = self.prefix + canvas.lengths()  # slots that stand for what is known
        cached = torch.full((batch,), cached) if isinstance(cached, int) else cached
        known = torch.where(alive, last - cached, 0)
        if bool((alive & (known < 1)).any()):
            row = int((alive & (known < 1)).nonzero()[0, 0])
            raise _nothing_new(self.prefix, int(last[row]) - self.prefix, int(cached[row]), row)
        last = last[:, None]
        offset = torch.arange(int(known.max()))[None].expand(batch, -1)
        live = offset < known[:, None]
        place = cached[:, None] + offset
        at, dies, node = place, torch.full_like(place, INF), torch.full_like(place, -1)
        slot = torch.where(alive, known - 1, -1)[:, None]  # the last known slot; then the nodes, each in its column
        spawned, masks, first = 0, 0, place.shape[1]
        if guess is not None:
            spawned, masks, first = len(guess.spawn), guess.masks, first + guess.size
            there = alive[:, None] & (guess.value >= 0).cpu()
            slot = torch.cat([slot, torch.where(there, torch.arange(first - guess.size, first), -1)], 1)
            shape, depth = _drafted(guess.parents(), spawned, masks)
            place = torch.cat([place, last - 1 + depth], 1)
            at = torch.cat([at, last + shape.at], 1)
            dies = torch.cat([dies, last + shape.dies], 1)
            node = torch.cat([node, torch.arange(guess.size)[None].expand(batch, -1)], 1)
            node = F.pad(node, (0, (spawned + masks) * slot.shape[1]), value=-1)
            live = torch.cat([live, there, (slot >= 0).repeat(1, spawned + masks)], 1)
        lane = torch.where(live, 0, -1)
        element = torch.where(live & (place >= self.prefix), place - self.prefix, -1)
        source = torch.where(live & (place < self.prefix), LEARNED, VALUE)
        coord, beyond = _within(place, self.prefix, size), torch.arange(place.shape[1]) >= first
        needs = element = element.masked_fill(beyond, -1)
        if spawned:  # what was spawned carries what its source does
            needs = torch.cat([element[:, :first], element.gather(1, slot.clamp(min=0)).repeat(1, spawned)], 1)
            source = torch.where(beyond, DERIVED, source)
        if masks:  # one that stands behind the end is seen by its block: it keeps its place
            source, coord = torch.where(beyond, MASK, source), torch.where(beyond, place, coord)
        slots = Slots(element.clamp(max=size - 1)[..., None], source, coord[..., None], needs, node)
        target = torch.where(slot >= 0, place.gather(1, slot.clamp(min=0)) - self.prefix + 1, -1)
        padded = guess is None and not bool(live.all())
        chain = guess is None or (guess.parent is None and not spawned and not masks)
        return _Ragged(
            slots,
            _Same(timed(at, at, dies, lane=lane), self.windows, chain),
            Reads(slot, torch.where(target < size, target, -1)),
            torch.arange(size)[None],
            settled=_Same(timed(place, place, torch.full_like(place, INF), lane=lane), self.windows),
            kept=torch.where(live, offset, -1) if padded else None,
            prefix=self.prefix,
            windows=self.windows,
            spawns=_spawns(() if guess is None else guess.spawn, first, slot.clamp(min=0)),
            masks=masks * slot.shape[1],
        )


def _drafted(parents: tuple[int, ...], spawned: int, masks: int, known: int = 0) -> tuple[View, Int[Tensor, "s"]]:
    """Labels and depths (from 1) of a draft and what stands behind its nodes, below a chain of known slots, the last of
    which is its root. All masks of a block have the labels of its first one."""
    below = spawning(parents, spawned + masks)
    below = (*range(-1, known - 1), *(known + p for p in below))
    view, fed = tree(below), known + len(parents)
    if masks > 1:
        index = torch.arange(len(below))
        view = view.take(torch.where(index < fed, index, fed + (index - fed) % (len(parents) + 1))[None])
    return view, torch.tensor(depths(below), dtype=torch.long)


def _spawns(transfers: Sequence[Transfer], first: int, source: Int[Tensor, "b m"]) -> tuple[Spawn, ...]:
    """What these slots spawn: as many as they are by each map, from slot `first` on."""
    count = source.shape[1]
    return tuple(Spawn(t.layer, first + j * count, source, t.matrix) for j, t in enumerate(transfers))


def _nothing_new(prefix: int, known: int, cached: int, row: int = 0) -> OrderError:
    if prefix + known == 0:
        return OrderError(f"nothing to start from in row {row}: give its first element, or use a prefix slot")
    return OrderError(
        f"row {row} has {known} known elements and {prefix} prefix slots, but {cached} slots are cached: nothing is "
        "left to compute; a step keeps no more than what was known before it and the accepted nodes of its draft"
    )


@dataclass(frozen=True, eq=False)
class _Ragged(Plan):
    """A step of a line whose rows differ."""

    prefix: int = 0

    @property
    def readers(self) -> Reads:  # type: ignore[override]
        """The element behind each slot, as in `LinePlan`."""
        coord = self.slots.coord[..., 0]
        return Reads(torch.arange(self.size).expand_as(coord), coord - self.prefix + 1)


@dataclass(frozen=True, eq=False)
class _Causal(Plan):
    """A packed line: plain causal attention where rows are whole."""

    def attention(self, view: str, cache) -> Tensor | str | None:
        if cache is None and self.windows.get(view, self.size) >= self.size:
            return "causal" if self.size > 1 else None
        return super().attention(view, cache)
