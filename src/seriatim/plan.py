"""One forward pass as data: slots, views by kind of layer, read-outs; and what follows from them.

Training in one pass, a decoding step, a draft tree: every forward is a `Plan`. From the same integers follow the
decoding steps (when is a slot computable?), the exact cache plan (will anybody still look?), the cost, and the static
no-peeking check. Knows nothing of networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.layout import Layout
from seriatim.reach import closure, last_look, nearest, transitive
from seriatim.scan import CHAIN, Chunks, Scan, chunks_of, scan_of
from seriatim.slots import (
    DERIVED,
    LEARNED,
    MASK,
    NOISE,
    SOURCES,
    VALUE,
    Reads,
    Slots,
    gather,
    only,
    ragged,
    reads_at,
    slots_of,
)
from seriatim.view import INF, View

__all__ = [
    "VALUE", "MASK", "NOISE", "DERIVED", "LEARNED", "SOURCES", "MIXERS", "Slots", "Reads", "slots_of", "reads_at",
    "Plan", "plan_of", "Cost", "Leak", "OrderError",
]  # fmt: skip

MIXERS = ("any", "causal", "scan", "chunks", "full")


class OrderError(ValueError):
    """An order that peeks at what it predicts, or whose steps cannot be computed."""


@dataclass(frozen=True)
class Cost:
    """What one sample costs when decoded step by step with its exact cache.

    `pairs`: (query, key) pairs of attention in one layer of each kind. `peak_cache`: entries that are live at once, the
    pending ones of the present step included. `kept`: the most that are carried from one step to a later one.
    """

    forwards: int
    slots: int
    pairs: int
    peak_cache: int
    kept: int = 0


@dataclass(frozen=True)
class Leak:
    """A read-out that depends on something not decided before it.

    `slot` reads `element`, which is decided at step `rank`, but sees slot `through`, whose content depends on rank
    `needs`: on element `carries`, where that slot lists what it carries (else -1).
    """

    row: int
    slot: int
    element: int
    through: int
    carries: int
    why: str = "value"
    rank: int = -1
    needs: int = -1

    def __str__(self) -> str:
        where = f"slot {self.slot} reads element {self.element}"
        if self.carries >= 0:
            what = f"element {self.carries}"
        else:
            where += f" of rank {self.rank}"
            what = f"content of rank {self.needs}"
        if self.why == "same datum":
            what += ", which is the same datum in another form,"
        how = "itself" if self.through == self.slot else f"slot {self.through}"
        return f"{where}, but sees {what} through {how}{_of_row(self.row)}"


def _of_row(row: int) -> str:
    return f" (row {row} of the batch)" if row else ""


@dataclass(frozen=True, eq=False)
class Plan:
    """One forward pass.

    `rank` is the step that decides each element (-1: given). `layers` says which layers compute which slot (None:
    all). With a `layout`, elements declared to hold the same datum are kept apart too. A plan made by `steps()` also
    says which of its slots to append to the cache (`kept`), then which entries of the cache anybody still looks at
    (`retain`; None: all of them), and which rank it `decides`.
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
    decides: int | None = field(default=None, repr=False)
    windows: Mapping[str, int] = field(default_factory=dict, repr=False)  # kinds of layer that see the last places only
    route: Any = field(default=None, repr=False)  # a `backbones.route.Route`; None: all slots go through all blocks
    spawns: tuple[Any, ...] = ()  # `slots.Spawn`s in the order of their layers: the last slots, which begin on the way
    progress: Any = field(default=None, repr=False)  # how far it is, 0 to 1 or (b, 1); None: `decoding.target.progress`
    masks: int = 0  # so many of the last slots are masks for who drafts next: no step keeps or reads them

    def __post_init__(self) -> None:
        n, elements = self.size, self.rank.shape[1]
        if not self.views:
            raise OrderError("a plan needs at least one view")
        for name, view in self.views.items():
            if view.size != n:
                raise OrderError(f"view {name!r} has {view.size} slots, the plan has {n}")
        for name in ("element", "source", "coord"):
            if getattr(self.slots, name).shape[1] != n:
                raise OrderError(f"`{name}` labels {getattr(self.slots, name).shape[1]} slots, `needs` labels {n}")
        if self.reads.slot.shape[1] != self.reads.element.shape[1]:
            raise OrderError(f"{self.reads.slot.shape[1]} slots read {self.reads.element.shape[1]} elements")
        for name, view in (self.settled or {}).items():
            if view.size != n:
                raise OrderError(f"view {name!r} has {view.size} slots once settled, the plan has {n}")
        if self.layers is not None and self.layers.shape[1] != n:
            raise OrderError(f"`layers` labels {self.layers.shape[1]} slots, the plan has {n}")
        if self.layout is not None and self.layout.size != elements:
            raise OrderError(f"{elements} elements have a rank, but the layout has {self.layout.size}")
        numbers = (("slot", self.reads.slot, "read", n), ("element", self.reads.element, "read", elements))
        for noun, number, verb, count in (*numbers, ("element", self.slots.element, "carried", elements)):
            if number.numel() and int(number.max()) >= count:
                raise OrderError(f"{noun} {int(number.max())} is {verb}, but there are only {count} {noun}s")

    @property
    def size(self) -> int:
        """Number of slots."""
        return self.slots.needs.shape[1]

    # What a backbone asks; runs along a line answer without tensors (factorization/line.py).

    plain = False  # are all slots seen by everything later, so that a cache needs no labels?
    run = None  # (start, None or offsets): the slots stand at start + 0, 1, ... (or + offsets) of a line
    readers = None  # `Reads`: where conditions of single elements stand; None: where the elements are read now
    fork = False  # is this a forward of the second end of a backbone that has two (`backbones.forked`)?
    phase = 0  # of an order that has several (`factorization.pivots`)
    guided = True  # may guidance change what is said here?
    grids = None  # (channels, rows, columns), where the slots are whole channels (`factorization.axes`)
    fixed = None  # (b, m): slots that stay as they are while the step is repeated (denoising); None: it is not known

    def along(self, route: Any) -> Plan:
        """The same forward, whose slots go the way of a route."""
        plan = copy(self)
        plan.__dict__["route"] = route
        return plan

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

    def scan(self, view: str) -> Scan:
        """Whose state each slot goes on from in a recurrent kind of layer; `OrderError` where none can honour the view.

        Made once a plan; once a shape for runs along a line, whose chains cost nothing.
        """
        run = self.run
        if run is not None and run[1] is None:
            return CHAIN
        owner = self if run is None else self.shape  # type: ignore[attr-defined]
        memo: dict[str, Scan] = owner.__dict__.setdefault("_scans", {})
        if view not in memo:
            if view not in self.views:
                raise OrderError(f"the backbone has layers of kind {view!r}, the plan has {', '.join(self.views)}")
            try:
                with torch.inference_mode(False):  # shapes outlive the loop that first asks for them
                    memo[view] = scan_of(self.views[view] if run is None else owner.view)
            except ValueError as error:
                raise OrderError(f"layers of kind {view!r}: {error}") from None
        return memo[view]

    def chunks(self, view: str) -> Chunks:
        """Which chunks of slots hand a state on to which; `OrderError` where a kind of layer cannot honour the view."""
        try:
            return chunks_of(self.views[view])
        except ValueError as error:
            raise OrderError(f"layers of kind {view!r}: {error}") from None

    @cached_property
    def batch(self) -> int:
        """Number of rows; 1 when the batch shares all labels."""
        slots, reads = self.slots, self.reads
        rows = (slots.element, slots.source, slots.coord, slots.needs, reads.slot, reads.element, self.rank)
        return max([x.shape[0] for x in rows] + [v.batch for v in self.views.values()])

    # ---- what follows from the labels --------------------------------------------------------------------------------

    def seen(self, mixers: Mapping[str, str] | None = None) -> Bool[Tensor, "b s s"]:
        """Who influences whom directly in at least one kind of layer.

        `mixers` says what a kind of layer can honour: "any" mask (the default); "causal" lets a slot see all earlier
        slots of its lane, whatever the view says; "full" has no mask but the lane; "scan" honours all earlier slots of
        a lane, or the paths of a draft tree, and refuses any other view (`OrderError`); "chunks" so honours what whole
        chunks of slots see.
        """
        total = torch.eye(self.size, dtype=torch.bool)[None]
        for name, view in self.views.items():
            honour = (mixers or {}).get(name, "any")
            if honour not in MIXERS:
                raise ValueError(f"layers {name!r} honour {honour!r}; a mixer is one of {', '.join(MIXERS)}")
            if honour in ("scan", "chunks"):
                self.scan(name) if honour == "scan" else self.chunks(name)
            if honour in ("any", "scan", "chunks"):
                total = total | view.mask()
                continue
            wide = torch.ones(1, self.size, self.size, dtype=torch.bool)
            if honour != "full":
                wide = wide.tril()
            if view.lane is not None:
                wide = wide & (view.lane[:, :, None] == view.lane[:, None]) & (view.lane >= 0)[:, None]
            total = total | wide
        return total

    def reach(self, mixers: Mapping[str, str] | None = None) -> Int[Tensor, "b s"]:
        """The highest rank that can influence each slot through any number of layers."""
        return closure(self.seen(mixers), self.needs)

    def leaks(self, mixers: Mapping[str, str] | None = None) -> list[Leak]:
        """Read-outs that peek, by the closure of `needs` over all views; empty when the order is honest. (Read-outs of
        given elements predict nothing, and are not looked at.)"""
        seen = self.seen(mixers)
        slot, element, due, live = self._readouts()
        reach = closure(seen, self.needs).expand(self.batch, -1)
        bad = live & (due >= 0) & (reach.gather(1, slot.clamp(min=0)) >= due)
        twins = self._twins()
        if twins is None and not bool(bad.any()):
            return []
        found = []
        for b in range(self.batch):
            one, graph = self.row(b), only(seen, b)[0]
            found += [one._explain(graph, b, int(slot[b, m]), int(element[b, m])) for m in bad[b].nonzero()[:, 0]]
            if twins is not None:
                found += one._datum_leaks(transitive(graph), twins, b)
        return found

    @cached_property
    def needs(self) -> Int[Tensor, "b s"]:
        """The highest rank on which the content of each slot depends: what its label says, and at least the rank of
        every element whose value stands in it, so that a wrong label hides nothing. (Nodes of a draft stand for
        themselves, whatever the canvas holds.)"""
        slots = self.slots
        if not self.rank.shape[1]:
            return slots.needs
        value = slots.source == VALUE if slots.node is None else (slots.source == VALUE) & (slots.node < 0)
        rows = max(slots.element.shape[0], self.rank.shape[0])
        element, rank = slots.element.expand(rows, -1, -1), self.rank.expand(rows, -1)
        carried = rank.gather(1, element.clamp(min=0).flatten(1)).view_as(element).masked_fill(element < 0, -1)
        return torch.maximum(slots.needs, carried.amax(2).masked_fill(~value, -1))

    def _readouts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(slot, element, rank of the element, whether it is no padding) of each read-out, in every row."""
        slot, element = (x.expand(self.batch, -1) for x in (self.reads.slot, self.reads.element))
        live = (slot >= 0) & (element >= 0)
        due = self.rank.expand(self.batch, -1).gather(1, element.clamp(min=0))
        return slot, element, due, live

    def _explain(self, graph: Bool[Tensor, "s s"], row: int, slot: int, element: int) -> Leak:
        """In a plan of one row: the nearest slot through which `slot` sees what it must not, best one that carries the
        element itself."""
        rank, needs, carried = self.rank[0], self.needs[0], self.slots.element[0]
        limit = int(rank[element])
        guilty = nearest(graph, slot, needs >= limit)
        through = min(guilty, key=lambda k: not bool((carried[k] == element).any()))
        late = [e for e in carried[through].tolist() if e >= 0 and int(rank[e]) >= limit]
        carries = element if element in late else next(iter(late), -1)
        return Leak(row, slot, element, through, carries, "value", limit, int(needs[through]))

    def _twins(self) -> Bool[Tensor, "E E"] | None:
        """Pairs of elements that hold the same datum in two forms; None if there are none."""
        if self.layout is None:
            return None
        datum, kind = self.layout.datum, self.layout.kind
        twins = (datum[:, None] == datum) & (kind[:, None] != kind)
        return twins if bool(twins.any()) else None

    def _datum_leaks(self, graph: Bool[Tensor, "s s"], twins: Bool[Tensor, "E E"], row: int) -> list[Leak]:
        """In a plan of one row: read-outs that see the same datum in another form, its noise or its value. (Its own
        noise may reach an element's read-out: that is what denoising is. And a form that is made from another may see
        the value of that one, which `needs` puts before it.)"""
        assert self.layout is not None
        source, carried = self.slots.source[0], self.slots.element[0]
        noise = (source == NOISE)[:, None]
        tells = (noise | ((source == VALUE) | (source == DERIVED))[:, None]) & (carried >= 0)
        found = []
        for slot, element in zip(self.reads.slot[0].tolist(), self.reads.element[0].tolist(), strict=True):
            if slot < 0 or element < 0:
                continue
            secret = twins[element] & ~self.layout.follows[element]
            guilty = tells & torch.where(noise, twins[element][carried], secret[carried]) & graph[slot][:, None]
            for through, c in guilty.nonzero()[:1].tolist():
                rank, needs = int(self.rank[0, element]), int(self.needs[0, through])
                found.append(Leak(row, slot, element, through, int(carried[through, c]), "same datum", rank, needs))
        return found

    def check(self, mixers: Mapping[str, str] | None = None, due: Bool[Tensor, "b E"] | None = None) -> Plan:
        """Raise `OrderError`, naming slot and element, when a read-out peeks, when a given element is read, or when one
        of the elements `due` is read nowhere (in a packed plan: all that are to be decided); else return this plan."""
        slot, element, rank, live = self._readouts()
        if bool((given := live & (rank < 0)).any()):
            b, m = given.nonzero()[0].tolist()
            raise OrderError(
                f"slot {int(slot[b, m])} reads element {int(element[b, m])}, which is given and must not be read; let "
                f"it read -1 where the rank is below 0{_of_row(b)}"
            )
        if due is not None:
            read = torch.zeros(self.batch, self.rank.shape[1] + 1, dtype=torch.bool)
            read = read.scatter(1, torch.where(live, element, self.rank.shape[1]), True)[:, :-1]
            if bool((unread := due & ~read).any()):
                b, e = unread.nonzero()[0].tolist()
                raise OrderError(
                    f"no slot reads element {e}, which is to be decided{_of_row(b)}; every element that is not given "
                    "needs a read-out"
                )
        leaks = self.leaks(mixers)
        if leaks:
            more = f" (and {len(leaks) - 1} more)" if len(leaks) > 1 else ""
            raise OrderError(f"this order peeks: {leaks[0]}{more}")
        return self

    @cached_property
    def step(self) -> Int[Tensor, "b s"]:
        """The step at which each slot is computed: not before what it depends on is decided, nor before it is read.

        Steps are the ranks of the elements that are read; what could be computed between two of them is fused into the
        later one. Slots that come too late for any read-out, and padding, get step `INF`.
        """
        seen = self.seen()
        slot, element, due, live = self._readouts()
        ready = closure(seen, self.needs).expand(self.batch, -1) + 1
        # the first read-out at each slot; one more column takes the padding of reads
        first = torch.full((self.batch, self.size + 1), INF)
        first = first.scatter_reduce(1, torch.where(live, slot, self.size), torch.where(live, due, INF), "amin")[:, :-1]
        step = closure(seen, torch.where(first < INF, torch.maximum(ready, first), ready))
        late = live & (step.gather(1, slot.clamp(min=0)) > due)
        if bool(late.any()):
            b, m = late.nonzero()[0].tolist()
            s, e = int(slot[b, m]), int(element[b, m])
            raise OrderError(
                f"not computable: slot {s} reads element {e} of rank {int(due[b, m])}, but can only be computed at "
                f"step {int(step[b, s])}: it sees a slot that is read or decided later"
            )
        times = torch.cat([torch.where(live, due, INF), torch.full((self.batch, 1), INF)], 1).sort(1).values
        step = times.gather(1, torch.searchsorted(times, step.clamp(max=INF).contiguous()))
        return step.masked_fill(self._padding(), INF)

    def _padding(self) -> Bool[Tensor, "b s"]:
        """Slots that take part in no kind of layer."""
        pad = torch.ones(1, self.size, dtype=torch.bool)
        for view in self.views.values():
            pad = pad & (view.lane < 0) if view.lane is not None else torch.zeros_like(pad)
        return pad

    def used(self) -> Bool[Tensor, "b s"]:
        """Slots that are read, or seen by a used slot; the others need not be computed when decoding."""
        slot, _, _, live = self._readouts()
        read = torch.zeros(self.batch, self.size + 1, dtype=torch.long)
        read = read.scatter(1, torch.where(live, slot, self.size), 1)[:, :-1]
        return closure(self.seen().transpose(1, 2), read) > 0

    @cached_property
    def _schedule(self) -> tuple[Tensor, Tensor]:
        """(step of each slot, INF where it is not used; last step at which a used slot sees it)."""
        step = self.step.masked_fill(~self.used(), INF)
        return step, last_look(self.seen(), step)

    def keep(self, view: str | None = None) -> Bool[Tensor, "b s"]:
        """Slots that a used slot of a later step sees, in one kind of layer or in any: the exact cache plan."""
        step, until = self._schedule
        if view is not None:
            until = last_look(self.views[view].mask(), step)
        return (step < INF) & (until > step)

    def steps(self) -> list[Plan]:
        """The decoding steps, one for each rank that is read: the slots that are computable once all ranks below are
        decided, unless nobody looks at them.

        Each is a plan of its own, to be run over the cached entries of the earlier ones: append its `kept` slots right
        behind what each row of the cache holds, then reduce the cache to its `retain` entries. `decides` is the rank
        that its read-outs decide.
        """
        step, until = self._schedule
        cached = torch.full((step.shape[0], 0), -1)  # the slots that stand in the cache
        plans = []
        for r in torch.unique(step[step < INF]).tolist():
            index = ragged(step == r)
            kept = ragged((gather(until, index) > r) & (index >= 0))
            cached = torch.cat([cached, gather(index, kept)], 1)
            cached = gather(cached, ragged(cached >= 0))  # rows of different lengths stand left-aligned in a cache
            wanted = (gather(until, cached) > r) & (cached >= 0)
            retain = None
            if not torch.equal(wanted, cached >= 0):
                retain = ragged(wanted)
                cached = gather(cached, retain)
            plans.append(replace(self.take(index), kept=kept, retain=retain, decides=r))
        return plans

    def take(self, index: Int[Tensor, "b m"]) -> Plan:
        """A plan of these slots only (-1: padding), with the read-outs at them."""
        batch = max(index.shape[0], self.reads.slot.shape[0])
        where = torch.where(index >= 0, index, self.size).expand(batch, -1)
        new = torch.full((batch, self.size + 1), -1)  # the new place of each slot; the last column is for padding
        new = new.scatter(1, where, torch.arange(index.shape[1]).expand(batch, -1))
        new[:, self.size] = -1
        slot = self.reads.slot.expand(batch, -1)
        at = new.gather(1, torch.where(slot >= 0, slot, self.size))
        pick = ragged(at >= 0)
        role = None if self.reads.role is None else gather(self.reads.role, pick)
        reads = Reads(gather(at, pick), gather(self.reads.element, pick), role)
        layers = self.layers
        if layers is not None:
            if not bool((index == index[:1]).all()):
                raise OrderError("layers that depend on the slot need the same order in every row")
            layers = layers[:, index[0].clamp(min=0)]
        views = {name: view.take(index) for name, view in self.views.items()}
        settled = None
        if self.settled is not None:
            settled = {name: view.take(index) for name, view in self.settled.items()}
        return Plan(self.slots.take(index), views, reads, self.rank, layers, self.layout, settled)

    def row(self, row: int) -> Plan:
        """The plan of one row of the batch."""
        settled = None
        if self.settled is not None:
            settled = {name: view.row(row) for name, view in self.settled.items()}
        kept = None if self.kept is None else only(self.kept, row)
        retain = None if self.retain is None else only(self.retain, row)
        views = {name: view.row(row) for name, view in self.views.items()}
        slots, reads, rank = self.slots.row(row), self.reads.row(row), only(self.rank, row)
        return Plan(slots, views, reads, rank, self.layers, self.layout, settled, kept, retain, self.decides)

    def cost(self, view: str | None = None) -> Cost:
        """What decoding the first row step by step costs, in one kind of layer or in all kinds together."""
        if self.batch > 1:
            return self.row(0).cost(view)
        step = self._schedule[0][0]
        masks = [v.mask()[0] for name, v in self.views.items() if view in (None, name)]
        until = last_look(torch.stack(masks).any(0)[None], step[None])[0]
        live = step < INF
        pairs = sum(int(mask[live].sum()) for mask in masks)
        peak = most = 0
        times = torch.unique(step[live]).tolist()
        for r in times:
            held = int((live & (step < r) & (until >= r)).sum())
            peak = max(peak, held + int((step == r).sum()))
            most = max(most, int((live & (step <= r) & (until > r)).sum()))
        return Cost(len(times), int(live.sum()), pairs, peak, most)


def plan_of(
    views: View | Mapping[str, View],
    rank: Sequence[int] | Tensor,
    carries: Sequence[int | Sequence[int]],
    reads: Sequence[tuple[int, int]],
    source: int | Sequence[int] = VALUE,
    needs: Sequence[int] | Tensor | None = None,
    coord: Sequence[Sequence[int]] | Tensor | None = None,
    layout: Layout | None = None,
) -> Plan:
    """A plan shared by the batch, from plain lists: the shortest way to write an order down.

    `rank` of each element, what each slot `carries` (see `slots_of`), and (slot, element) for each read-out.
    """
    ranks = torch.as_tensor(rank, dtype=torch.long).reshape(1, -1)
    named = {"all": views} if isinstance(views, View) else views
    slots = slots_of(carries, ranks, source, needs, coord)
    return Plan(slots, named, reads_at([s for s, _ in reads], [e for _, e in reads]), ranks, layout=layout)
