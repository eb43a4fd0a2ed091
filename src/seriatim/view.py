"""Who sees whom, as data: three integers a slot, a lane, a small relation between groups.

A slot has a clock time `at` and is visible from `born` until `dies`. A query sees a key when
`born(key) <= at(query) < dies(key)`, both are in the same lane, and the relation between their groups says TIMED
(or ALWAYS, whatever the clock). A slot always sees itself. Training masks, rows of a cached decoding step and cache
plans are all this one rule (`visible`). The constructors below are plain functions; there is no registry of patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

INF = 1 << 30
NEVER, TIMED, ALWAYS = 0, 1, 2

Labels = Sequence[int] | Tensor


def _rows(x: Labels) -> Int[Tensor, "b s"]:
    t = torch.as_tensor(x, dtype=torch.long)
    if t.dim() not in (1, 2):
        raise ValueError(f"labels are (slots) or (batch, slots), got shape {tuple(t.shape)}")
    return t if t.dim() == 2 else t[None]


@dataclass(frozen=True, eq=False, slots=True)
class View:
    """Visibility in one kind of layer; every field is (batch, slots), batch 1 when the batch shares it.

    Only equal lanes meet: a packed sample, a row, a column, a word. A slot in lane -1 takes no part in this kind of
    layer; one that is in lane -1 everywhere is padding. `relation` says for (query group, key group) whether the clock
    decides (TIMED) or is not asked (NEVER, ALWAYS).
    """

    at: Int[Tensor, "b s"]
    born: Int[Tensor, "b s"]
    dies: Int[Tensor, "b s"]
    lane: Int[Tensor, "b s"] | None = None
    group: Int[Tensor, "b s"] | None = None
    relation: Int[Tensor, "g g"] | None = None

    @property
    def size(self) -> int:
        """Number of slots."""
        return self.at.shape[1]

    @property
    def batch(self) -> int:
        """Number of rows; 1 when the batch shares all labels."""
        rows = (self.at, self.born, self.dies, self.lane, self.group)
        return max(x.shape[0] for x in rows if x is not None)

    def mask(self) -> Bool[Tensor, "b q k"]:
        """Who sees whom among these slots, themselves included."""
        return visible(self, self) | torch.eye(self.size, dtype=torch.bool, device=self.at.device)

    def over(self, keys: View | None) -> Bool[Tensor, "b q k"]:
        """Rows of a decoding step: these slots over cached `keys`, then over themselves."""
        new = self.mask()
        if keys is None or keys.size == 0:
            return new
        old = visible(self, keys)
        batch = max(old.shape[0], new.shape[0])
        return torch.cat([old.expand(batch, -1, -1), new.expand(batch, -1, -1)], 2)

    def then(self, other: View) -> View:
        """Both, `other` later: its clock starts after ours, so it sees what of ours is still alive.

        Lanes and groups keep their numbers: where only one of the two has lanes, the other's slots are in lane 0.
        """
        if self.size == 0 or other.size == 0:
            return join([self, other])
        ends = [x[x < INF].max() for x in (self.at, self.born, self.dies) if (x < INF).any()]
        shift = int(max(ends)) + 1 - int(torch.stack([other.at.min(), other.born.min()]).min()) if ends else 0
        late = replace(
            other,
            at=other.at + shift,
            born=other.born + shift,
            dies=torch.where(other.dies < INF, other.dies + shift, other.dies),
        )
        return join([self, late])

    def narrow(self, lane: Labels | None = None, window: int | None = None) -> View:
        """The same with less: only within lanes, only the last `window` clock times. Layers may only narrow.

        A lane of -1 takes a slot out of this kind of layer; padding is out of all of them.
        """
        view = self
        if window is not None:
            if window < 1:
                raise ValueError(f"a window is at least 1, got {window}")
            view = replace(view, dies=torch.minimum(view.dies, view.born + window))
        if lane is not None:
            new = _rows(lane)
            if new.shape[1] != view.size:
                raise ValueError(f"{new.shape[1]} lanes for {view.size} slots")
            if view.lane is not None:
                both = view.lane * (int(new.max()) + 1) + new
                new = torch.where((view.lane < 0) | (new < 0), -1, both)
            view = replace(view, lane=new)
        return view

    def take(self, index: Int[Tensor, "b m"]) -> View:
        """These slots in this order; -1 gives padding, which nobody sees."""
        pad = index < 0
        where = index.clamp(min=0)

        def pick(x: Tensor) -> Tensor:
            if x.shape[1] == 0:  # nothing to pick from: all padding
                return torch.zeros_like(where)
            batch = max(x.shape[0], where.shape[0])
            return x.expand(batch, -1).gather(1, where.expand(batch, -1))

        lane = None if self.lane is None else pick(self.lane)
        if bool(pad.any()):
            lane = torch.zeros_like(where) if lane is None else lane
            lane = torch.where(pad.expand_as(lane), -1, lane)
        group = None if self.group is None else pick(self.group)
        return View(pick(self.at), pick(self.born), pick(self.dies), lane, group, self.relation)

    def row(self, row: int) -> View:
        """The labels of one row of the batch."""

        def only(x: Tensor) -> Tensor:
            return x[row if x.shape[0] > 1 else 0][None]

        lane = None if self.lane is None else only(self.lane)
        group = None if self.group is None else only(self.group)
        return View(only(self.at), only(self.born), only(self.dies), lane, group, self.relation)

    def to(self, device: torch.device | str) -> View:
        """The same labels on another device."""
        names = ("at", "born", "dies", "lane", "group", "relation")
        return View(*(None if (x := getattr(self, name)) is None else x.to(device) for name in names))  # type: ignore[arg-type]

    def block_mask(self, heads: int | None = None) -> BlockMask:
        """The same visibility for FlexAttention, from the same integers."""
        from torch.nn.attention.flex_attention import create_block_mask

        batch, size = self.batch, self.size
        zeros = torch.zeros_like(self.at)
        group = zeros if self.group is None else self.group
        lane = zeros if self.lane is None else self.lane
        at, born, dies, lane, group = (x.expand(batch, -1) for x in (self.at, self.born, self.dies, lane, group))
        relation = self.relation

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            r = b if batch > 1 else 0
            sees = (born[r, k] <= at[r, q]) & (at[r, q] < dies[r, k])
            if relation is not None:
                how = relation[group[r, q], group[r, k]]
                sees = (sees & (how == TIMED)) | (how == ALWAYS)
            return (sees & (lane[r, q] == lane[r, k]) & (lane[r, k] >= 0)) | (q == k)

        shared = None if batch == 1 else batch
        return create_block_mask(rule, shared, heads, size, size, device=str(at.device))


def visible(query: View, key: View) -> Bool[Tensor, "b q k"]:
    """The one rule, without the clause that a slot sees itself."""
    at = query.at[:, :, None]
    timed = (key.born[:, None] <= at) & (at < key.dies[:, None])
    relation = query.relation if query.relation is not None else key.relation
    if relation is not None:
        gq = query.group if query.group is not None else torch.zeros_like(query.at)
        gk = key.group if key.group is not None else torch.zeros_like(key.at)
        how = relation[gq[:, :, None], gk[:, None]]
        timed = (timed & (how == TIMED)) | (how == ALWAYS)
    if query.lane is not None or key.lane is not None:
        lq = query.lane if query.lane is not None else torch.zeros_like(query.at)
        lk = key.lane if key.lane is not None else torch.zeros_like(key.at)
        timed = timed & (lq[:, :, None] == lk[:, None]) & (lk >= 0)[:, None]
    return timed


def below(views: Sequence[View]) -> View:
    """The rows of several views of equally many slots, one below the other."""
    lanes, groups = any(v.lane is not None for v in views), any(v.group is not None for v in views)

    def stacked(name: str) -> Tensor:
        parts = [getattr(v, name) for v in views]
        return torch.cat([torch.zeros_like(v.at) if p is None else p for v, p in zip(views, parts, strict=True)])

    return View(
        stacked("at"), stacked("born"), stacked("dies"), stacked("lane") if lanes else None,
        stacked("group") if groups else None, next((v.relation for v in views if v.relation is not None), None),
    )  # fmt: skip


def join(views: Sequence[View]) -> View:
    """Slots of several views side by side, labels untouched (packed samples: give each its own lane)."""
    if not views:
        raise ValueError("there are no views to join")
    batch = max(v.batch for v in views)

    def side_by_side(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([p.expand(batch, -1) for p in parts], 1)

    def optional(name: str) -> Tensor | None:
        """A label that some views leave out: their slots get 0."""
        parts = [getattr(v, name) for v in views]
        if all(p is None for p in parts):
            return None
        return side_by_side([torch.zeros_like(v.at) if p is None else p for v, p in zip(views, parts, strict=True)])

    relation: Tensor | None = None
    for v in views:
        if v.relation is None:
            continue
        if relation is not None and v.relation is not relation and not torch.equal(v.relation, relation):
            raise ValueError("views with different group relations cannot be joined; state one relation for all groups")
        relation = v.relation if relation is None else relation
    at, born, dies = (side_by_side([getattr(v, name) for v in views]) for name in ("at", "born", "dies"))
    return View(at, born, dies, optional("lane"), optional("group"), relation)


# ---- constructors: r is the rank of what a slot stands for ----------------------------------------------------------


def timed(
    at: Labels,
    born: Labels | None = None,
    dies: Labels | None = None,
    lane: Labels | None = None,
    group: Labels | None = None,
    relation: Sequence[Sequence[int]] | Tensor | None = None,
) -> View:
    """Any visibility, from its integers: edit histories, memories, two resolutions. `born` defaults to `at`."""
    a = _rows(at)
    b = a if born is None else _rows(born)
    given = {"dies": dies, "lane": lane, "group": group}
    more = {name: None if x is None else _rows(x) for name, x in given.items()}
    for name, x in {"born": b, **more}.items():
        if x is not None and x.shape[1] != a.shape[1]:
            raise ValueError(f"`at` labels {a.shape[1]} slots, but `{name}` labels {x.shape[1]}")
    d = torch.full_like(b, INF) if more["dies"] is None else more["dies"]
    table = None if relation is None else torch.as_tensor(relation, dtype=torch.long)
    if table is not None and (table.dim() != 2 or table.shape[0] != table.shape[1]):
        raise ValueError(f"a relation is a square table (query group, key group), got shape {tuple(table.shape)}")
    if table is not None and more["group"] is not None and bool((more["group"] >= len(table)).any()):
        raise ValueError(f"group {int(more['group'].max())} has no row in a relation of {len(table)} groups")
    return View(a, b, d, more["lane"], more["group"], table)


def inclusive(rank: Labels) -> View:
    """Everything of this rank or earlier: causal, block-causal, next-scale."""
    return timed(rank)


def own_rank(rank: Labels) -> View:
    """Only the same rank: Markov orders, which need no cache."""
    r = _rows(rank)
    return timed(r, r, r + 1)


def earlier(rank: Labels) -> View:
    """Everything strictly earlier, and itself."""
    r = _rows(rank)
    return timed(r, r + 1)


def two_stream(rank: Labels, query: Labels) -> View:
    """Query slots see earlier values and their own rank's queries; value slots see values up to their own rank.

    Block diffusion, skip-causal, any-order two-stream attention: losses are read at queries.
    """
    r, q = _rows(rank), _rows(query).bool()
    t = 2 * r + (~q).long()
    return timed(t, t, torch.where(q, t + 1, INF))


def full(size: int) -> View:
    """Everybody sees everybody."""
    return timed([0] * size)


def local(size: int, radius: int) -> View:
    """Everybody within `radius`, both ways."""
    a = torch.arange(size)
    return timed(a, a - radius, a + radius + 1)


def tree(parent: Sequence[int], clock: int = 0) -> View:
    """Each node sees its ancestors (Euler tour: born on entry, dies on exit). parent[i] < i, or -1 for a root."""
    n = len(parent)
    children: list[list[int]] = [[] for _ in range(n)]
    roots: list[int] = []
    for i, p in enumerate(parent):
        if not -1 <= p < i:
            raise ValueError(f"node {i} has parent {p}; parents come before their children (or -1 for a root)")
        (children[p] if p >= 0 else roots).append(i)
    enter, leave, now = [0] * n, [0] * n, clock
    stack = [(r, False) for r in reversed(roots)]
    while stack:
        node, done = stack.pop()
        if done:
            leave[node] = now
            continue
        enter[node] = now
        now += 1
        stack.append((node, True))
        stack.extend((c, False) for c in reversed(children[node]))
    return timed(enter, enter, leave)
