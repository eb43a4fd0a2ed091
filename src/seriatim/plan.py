"""One forward pass as data: slots, views by kind of layer, read-outs; and what follows from them.

Training in one pass, a decoding step, a draft tree: every forward is a `Plan`. From the same integers follow the
decoding steps (when is a slot computable?), the exact cache plan (will anybody still look?), the cost, and the static
no-peeking check. Knows nothing of networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.layout import Layout
from seriatim.view import INF, View, join

VALUE, MASK, NOISE, DERIVED, LEARNED = 0, 1, 2, 3, 4
SOURCES = ("value", "mask", "noise", "derived", "learned")


class OrderError(ValueError):
    """An order that peeks at what it predicts, or whose steps cannot be computed."""


@dataclass(frozen=True, eq=False)
class Slots:
    """Rows of one forward: labels only, batch 1 when the batch shares them.

    `element` lists what a slot carries (-1: nothing; several: summed codes, a fused window), `source` how: its VALUE,
    a MASK in its place, its NOISE, something DERIVED from other elements, a LEARNED vector. `needs` is the highest
    rank on which the content depends (-1: nothing that is generated). `node` marks slots that carry a node of the
    guess under verification (-1: none) in place of what stands in the canvas.
    """

    element: Int[Tensor, "b s c"]
    source: Int[Tensor, "b s"]
    coord: Int[Tensor, "b s axes"]
    needs: Int[Tensor, "b s"]
    node: Int[Tensor, "b s"] | None = None

    def take(self, index: Int[Tensor, "b m"]) -> Slots:
        node = None if self.node is None else _gather(self.node, index)
        return Slots(*(_gather(x, index) for x in (self.element, self.source, self.coord, self.needs)), node)


@dataclass(frozen=True, eq=False)
class Reads:
    """Read-outs: at `slot`, the distribution of `element`, by the head's `role` (several predictors of one element)."""

    slot: Int[Tensor, "b m"]
    element: Int[Tensor, "b m"]
    role: Int[Tensor, "b m"] | None = None


@dataclass(frozen=True)
class Cost:
    """What a plan costs when decoded step by step with its exact cache."""

    forwards: int
    slots: int
    pairs: int
    peak_cache: int


@dataclass(frozen=True)
class Leak:
    """A read-out that depends on something not decided before it."""

    row: int
    slot: int
    element: int
    through: int
    carries: int
    why: str = "value"

    def __str__(self) -> str:
        where = f"slot {self.slot} reads element {self.element}"
        what = f"element {self.carries}" if self.carries >= 0 else "something no earlier"
        if self.why == "same datum":
            what += ", which is the same datum in another form,"
        how = "itself" if self.through == self.slot else f"slot {self.through}"
        return f"{where}, but sees {what} through {how}" + (f" (row {self.row} of the batch)" if self.row else "")


@dataclass(frozen=True, eq=False)
class Plan:
    """One forward pass.

    `rank` is the step that decides each element (-1: given). `layers` says which layers compute which slot (None:
    all). With a `layout`, elements declared to hold the same datum are kept apart too. A plan made by `steps()` also says which of its slots are
    worth keeping in a cache (`keep`) and which cached entries anybody still looks at afterwards (`retain`).
    """

    slots: Slots
    views: Mapping[str, View]
    reads: Reads
    rank: Int[Tensor, "b E"]
    layers: Bool[Tensor, "L s"] | None = None
    layout: Layout | None = None
    settled: Mapping[str, View] | None = field(default=None, repr=False)  # labels once committed, where they change
    kept: Int[Tensor, "b m"] | None = field(default=None, repr=False)
    retain: Int[Tensor, "b m"] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        n = self.size
        for name, view in self.views.items():
            if view.size != n:
                raise OrderError(f"view {name!r} has {view.size} slots, the plan has {n}")
        if not self.views:
            raise OrderError("a plan needs at least one view")
        if self.reads.slot.numel() and int(self.reads.slot.max()) >= n:
            raise OrderError(f"slot {int(self.reads.slot.max())} is read, but the plan has only {n} slots")
        if self.reads.element.numel() and int(self.reads.element.max()) >= self.rank.shape[1]:
            raise OrderError(
                f"element {int(self.reads.element.max())} is read, but there are only {self.rank.shape[1]} elements"
            )

    @property
    def size(self) -> int:
        """Number of slots."""
        return self.slots.needs.shape[1]

    # What a backbone asks; runs along a line answer without tensors (factorization/line.py).

    plain = False  # are all slots seen by everything later, so that a cache needs no labels?
    run = None  # (start, None or offsets): the slots stand at start + 0, 1, ... (or + offsets) of a line

    def attention(self, view: str, cache) -> Bool[Tensor, "b 1 q k"] | str | None:
        """The mask of one kind of layer over what a cache holds and these slots; None: see all, or "causal"."""
        if view not in self.views:
            raise OrderError(f"the backbone has layers of kind {view!r}, the plan has views {', '.join(self.views)}")
        keys = None
        if cache is not None and cache.columns:
            keys = cache.labels(view)
            if keys is None:
                start = torch.arange(cache.columns)[None]
                keys = View(start, start, torch.full_like(start, INF))
        return self.views[view].over(keys)[:, None]

    @cached_property
    def batch(self) -> int:
        rows = [self.slots.needs, self.reads.slot, self.rank, *(v.at for v in self.views.values())]
        return max(r.shape[0] for r in rows)

    # ---- what follows from the labels --------------------------------------------------------------------------------

    def seen(self, mixers: Mapping[str, str] | None = None) -> Bool[Tensor, "b s s"]:
        """Who influences whom directly in at least one layer. Layers that scan see all earlier slots of their lane;
        layers without a mask ("full") see everybody in their lane."""
        total = torch.eye(self.size, dtype=torch.bool)[None]
        for name, view in self.views.items():
            honour = (mixers or {}).get(name, "any")
            if honour in ("scan", "full"):
                wide = torch.ones(1, self.size, self.size, dtype=torch.bool)
                wide = wide.tril() if honour == "scan" else wide
                if view.lane is not None:
                    wide = wide & (view.lane[:, :, None] == view.lane[:, None]) & (view.lane >= 0)[:, None]
                total = total | wide | torch.eye(self.size, dtype=torch.bool)
            else:
                total = total | view.mask()
        return total

    def reach(self, mixers: Mapping[str, str] | None = None) -> Int[Tensor, "b s"]:
        """The highest rank that can influence each slot through any number of layers."""
        return _closure(self.seen(mixers), self.slots.needs)

    def leaks(self, mixers: Mapping[str, str] | None = None) -> list[Leak]:
        """Read-outs that peek, by the closure of `needs` over all views; empty when the order is honest."""
        seen, reads = self.seen(mixers), self.reads
        reach = _closure(seen, self.slots.needs)
        rank = self.rank.expand(self.batch, -1)
        reach = reach.expand(self.batch, -1)
        slot, element = reads.slot.expand(self.batch, -1), reads.element.expand(self.batch, -1)
        live = (slot >= 0) & (element >= 0)
        bad = live & (reach.gather(1, slot.clamp(min=0)) >= rank.gather(1, element.clamp(min=0)))
        found = [self._explain(seen, int(b), int(slot[b, m]), int(element[b, m])) for b, m in bad.nonzero()]
        return found + self._datum_leaks(seen)

    def _explain(self, seen: Tensor, row: int, slot: int, element: int) -> Leak:
        """The nearest slot through which `slot` sees what it must not."""
        limit = int(_row(self.rank, row)[element])
        needs, graph = _row(self.slots.needs, row), _row(seen, row)
        through = _nearest(graph, slot, needs >= limit)
        carried = _row(self.slots.element, row)[through]
        ranks = _row(self.rank, row)
        worst = [int(e) for e in carried if e >= 0 and int(ranks[e]) >= limit]
        same = [e for e in worst if e == element]
        return Leak(row, slot, element, through, (same or worst or [-1])[0])

    def _datum_leaks(self, seen: Tensor) -> list[Leak]:
        """Noise of an element may reach its own read-out, but no other element that is the same datum."""
        if self.layout is None or not (self.slots.source == NOISE).any():
            return []
        datum, kind = self.layout.datum, self.layout.kind
        found = []
        for row in range(self.batch):
            graph = _transitive(_row(seen, row))
            noisy = (_row(self.slots.source, row) == NOISE).nonzero()[:, 0].tolist()
            carried = _row(self.slots.element, row)
            for s, e in zip(_row(self.reads.slot, row).tolist(), _row(self.reads.element, row).tolist(), strict=True):
                for k in noisy if s >= 0 else []:
                    twins = [c for c in carried[k].tolist() if c >= 0 and datum[c] == datum[e] and kind[c] != kind[e]]
                    if twins and graph[s, k]:
                        found.append(Leak(row, s, e, k, twins[0], "same datum"))
        return found

    def check(self, mixers: Mapping[str, str] | None = None) -> Plan:
        """Raise `OrderError` when a read-out peeks, naming slot and element; otherwise return this plan."""
        leaks = self.leaks(mixers)
        if leaks:
            more = f" (and {len(leaks) - 1} more)" if len(leaks) > 1 else ""
            raise OrderError(f"this order peeks: {leaks[0]}{more}")
        return self

    @cached_property
    def step(self) -> Int[Tensor, "b s"]:
        """The step at which each slot is computed: not before what it depends on is decided, nor before it is read.
        Padding gets step `INF`."""
        seen = self.seen()
        batch = max(self.batch, seen.shape[0])
        slot, element = (x.expand(batch, -1) for x in (self.reads.slot, self.reads.element))
        rank = self.rank.expand(batch, -1)
        live = (slot >= 0) & (element >= 0)
        due = torch.where(live, rank.gather(1, element.clamp(min=0)), INF)
        floor = torch.full((batch, self.size + 1), INF).scatter_reduce(
            1, torch.where(live, slot, self.size), due, "amin"
        )[:, :-1]
        ready = _closure(seen, self.slots.needs).expand(batch, -1) + 1
        start = torch.where(floor < INF, torch.maximum(ready, floor), ready)
        step = _closure(seen, start)
        late = live & (step.gather(1, slot.clamp(min=0)) != due)
        if late.any():
            b, m = late.nonzero()[0].tolist()
            s, e = int(slot[b, m]), int(element[b, m])
            raise OrderError(
                f"slot {s} reads element {e} of rank {int(rank[b, e])}, but can only be computed at step "
                f"{int(step[b, s])}: it sees a slot that is read or decided later"
            )
        pad = torch.zeros(1, self.size, dtype=torch.bool)
        for view in self.views.values():
            if view.lane is not None:
                pad = pad | (view.lane < 0)
        return torch.where(pad.expand_as(step), INF, step)

    def used(self) -> Bool[Tensor, "b s"]:
        """Slots that are read, or seen by a used slot; the others need not be computed when decoding."""
        seen = self.seen()
        batch = max(self.batch, seen.shape[0])
        slot = self.reads.slot.expand(batch, -1)
        used = torch.zeros(batch, self.size + 1, dtype=torch.bool).scatter(1, slot.remainder(self.size + 1), True)
        used = used[:, :-1]
        graph = seen.expand(batch, -1, -1)
        while True:
            wider = used | (graph & used[:, :, None]).any(1)
            if bool((wider == used).all()):
                return used
            used = wider

    def keep(self) -> Bool[Tensor, "b s"]:
        """Slots that a used slot of a later step sees: the exact cache plan."""
        step, used, seen = self.step, self.used(), self.seen()
        later = (step[:, :, None] > step[:, None]) & used[:, :, None] & (step < INF)[:, :, None]
        return (seen & later).any(1) & (step < INF)

    def steps(self) -> list[Plan]:
        """The decoding steps: at step r, the slots computable once ranks below r are decided; unused ones pruned.

        Each is a plan of its own, to be run over the cached entries of the earlier ones.
        """
        step = torch.where(self.used(), self.step, INF)
        keep, seen = self.keep(), self.seen()
        last = int(torch.where(step < INF, step, -1).max())
        cached = torch.full((step.shape[0], 0), -1)
        plans = []
        for r in range(last + 1):
            index = _ragged(step == r)
            plan = self.take(index)
            kept = _ragged(keep.gather(1, index.clamp(min=0)) & (index >= 0))
            future = (step > r) & (step < INF)
            cached = torch.cat([cached, _gather(index, kept)], 1)
            wanted = (seen & future[:, :, None]).any(1)  # by slot: does any later slot see it?
            retain = _ragged(wanted.gather(1, cached.clamp(min=0)) & (cached >= 0))
            plans.append(replace(plan, kept=kept, retain=None if retain.shape[1] == cached.shape[1] else retain))
            cached = _gather(cached, retain)
        return plans

    def take(self, index: Int[Tensor, "b m"]) -> Plan:
        """A plan of these slots only (-1: padding), with the read-outs at them."""
        batch = max(self.batch, index.shape[0])
        place = torch.full((batch, self.size + 1), -1)
        where = torch.where(index >= 0, index, self.size).expand(batch, -1)
        place = place.scatter(1, where, torch.arange(index.shape[1]).expand(batch, -1))
        place[:, self.size] = -1
        slot = self.reads.slot.expand(batch, -1)
        at = place.gather(1, torch.where(slot >= 0, slot, self.size))
        pick = _ragged(at >= 0)
        if self.reads.slot.shape[0] == 1 and bool((pick == pick[:1]).all()) and index.shape[0] == 1:
            at, pick = at[:1], pick[:1]
        role = None if self.reads.role is None else _gather(self.reads.role, pick)
        reads = Reads(_gather(at, pick), _gather(self.reads.element, pick), role)
        views = {k: v.take(index) for k, v in self.views.items()}
        layers = self.layers
        if layers is not None:
            if index.shape[0] > 1 and not bool((index == index[:1]).all()):
                raise OrderError("layers that depend on the slot need the same order in every row")
            layers = layers[:, index[0].clamp(min=0)]
        return replace(self, slots=self.slots.take(index), views=views, reads=reads, layers=layers)

    def cost(self) -> Cost:
        """Forwards, slots, attention pairs and the largest cache of decoding one row step by step."""
        slots = pairs = peak = held = 0
        cached: dict[str, View | None] = dict.fromkeys(self.views)
        plans = self.steps()
        for plan in plans:
            slots += plan.size
            first = next(iter(plan.views))
            pairs += int(plan.views[first].over(cached[first])[0].sum())
            peak = max(peak, held + plan.size)
            for name, view in plan.views.items():
                assert plan.kept is not None
                old, new = cached[name], view.take(plan.kept)
                both = new if old is None else join([old, new])
                cached[name] = both if plan.retain is None else both.take(plan.retain)
            view = cached[first]
            held = 0 if view is None else view.size
        return Cost(len(plans), slots, pairs, peak)


def _row(x: Tensor, row: int) -> Tensor:
    return x[row if x.shape[0] > 1 else 0]


def _gather(x: Tensor, index: Int[Tensor, "b m"]) -> Tensor:
    """x[b, index[b, j]]; padding (-1) gives -1."""
    batch = max(x.shape[0], index.shape[0])
    x, index = x.expand(batch, *x.shape[1:]), index.expand(batch, -1)
    where = index.clamp(min=0).reshape(batch, -1, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    if x.shape[1] == 0:
        return torch.full((batch, index.shape[1], *x.shape[2:]), -1, dtype=x.dtype)
    out = x.gather(1, where)
    pad = (index < 0).reshape(batch, -1, *[1] * (x.dim() - 2))
    return torch.where(pad, -1, out) if bool(pad.any()) else out


def _ragged(chosen: Bool[Tensor, "b n"]) -> Int[Tensor, "b m"]:
    """Indices of the true entries of each row, padded with -1 to the longest row."""
    n = chosen.shape[1]
    order = torch.where(chosen, torch.arange(n), n).sort(1).values
    order = order[:, : int(chosen.sum(1).max())] if n else order
    return torch.where(order < n, order, -1)


def _closure(seen: Bool[Tensor, "b s s"], start: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
    """The largest start value among all slots that can influence each slot through any number of layers."""
    batch = max(seen.shape[0], start.shape[0])
    x = start.expand(batch, -1)
    while True:
        y = torch.where(seen, x[:, None], -INF).amax(2) if x.shape[1] else x
        y = torch.maximum(x, y)
        if bool((y == x).all()):
            return x
        x = y


def _transitive(graph: Bool[Tensor, "s s"]) -> Bool[Tensor, "s s"]:
    x = graph
    while True:
        y = (x.float() @ x.float()) > 0
        if bool((y == x).all()):
            return x
        x = y


def _nearest(graph: Bool[Tensor, "s s"], start: int, wanted: Bool[Tensor, "s"]) -> int:
    """Breadth first from `start` along visibility to the nearest wanted slot."""
    reached = torch.zeros(graph.shape[0], dtype=torch.bool)
    reached[start] = True
    while not bool((reached & wanted).any()):
        reached = reached | graph[reached].any(0)
    return int((reached & wanted).nonzero()[0])


def reads_at(slot: Sequence[int] | Tensor, element: Sequence[int] | Tensor, role: Sequence[int] | None = None) -> Reads:
    """Read-outs shared by the batch, from plain lists."""
    rows = [torch.as_tensor(x, dtype=torch.long).reshape(1, -1) for x in (slot, element)]
    return Reads(rows[0], rows[1], None if role is None else torch.as_tensor(role)[None])
