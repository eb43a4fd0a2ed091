"""Recurrent states, remembered in two phases.

A state has one size whatever the length. A forward reads the committed states and leaves its activations *pending*
(what went into the convolution and into the scan, nothing per path); `commit` replays the kept path from the committed
states, over all layers at once (STree, arXiv 2505.14969, "activation replay"). Where a sequence is kept whole, the
states that its scan ended in are taken as they are. Committing nothing leaves no trace: committed states are never
written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.backbones.cache import Keep
from seriatim.backbones.ssd import replay
from seriatim.plan import OrderError, Plan
from seriatim.scan import CHAIN, Scan
from seriatim.slots import below_own, gather, ragged
from seriatim.view import INF

States = tuple[Tensor, Tensor]  # inputs that the convolution looks back on (b, c, k - 1); state (b, h, p, n)


class Replay(NamedTuple):
    """Activations of one layer from which the states after any path follow; see `ssd.replay`.

    Those of the first `settled` slots are gone, in their place stand the states `before` the others.
    """

    conv_x: Float[Tensor, "b s c"]
    x: Float[Tensor, "b s h p"]
    dt: Float[Tensor, "b s h"]
    A: Float[Tensor, "h"]
    B: Float[Tensor, "b s g n"]
    settled: int = 0
    before: States | None = None


class StateCache:
    """The states of all layers of a state-space model, for rows that may have different lengths.

    It keeps paths of what is pending and nothing else: single entries cannot be left out, evicted or replaced, since a
    state holds everything that it was given.
    """

    can: frozenset[str] = frozenset()

    def __init__(
        self,
        layers: int,
        batch: int,
        conv: tuple[int, int],
        state: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        kind: str = "all",
    ):
        """conv: channels and places that the convolution looks back on; state: heads, channels of a head, state size.

        `dtype` is that of the weights; states are float32 at least. `kind` names the layers' view in plans.
        """
        if batch < 1:
            raise ValueError(f"a cache needs at least one row, got {batch}")
        wide = torch.promote_types(dtype, torch.float32)
        zeros = torch.zeros(layers, batch, *conv, dtype=dtype, device=device)
        self.kind = kind
        self.states: list[States] = list(
            zip(zeros, torch.zeros(layers, batch, *state, dtype=wide, device=device), strict=True)
        )
        self._count: int | Tensor = 0
        self._after: list[States | None] = []
        self._replay: list[Replay | None] = []
        self._scan: Scan | None = None  # of the pending forward
        self._bounds: tuple[Tensor, Tensor] | None = None  # latest birth, earliest death among what is committed

    @property
    def batch(self) -> int:
        return self.states[0][1].shape[0]

    @property
    def length(self) -> int | Tensor:
        """Committed slots: one number, or (batch,) where rows differ."""
        return self._count

    @property
    def columns(self) -> int:
        """Committed slots of the longest row."""
        return int(self._count.max()) if isinstance(self._count, Tensor) else self._count

    @property
    def device(self) -> torch.device:
        return self.states[0][1].device

    def labels(self, view: str) -> None:
        """None: everything committed is seen by everything later."""
        return None

    # ---- a forward ---------------------------------------------------------------------------------------------------

    def begin(self, plan: Plan) -> None:
        """A forward of this plan starts: drop what is pending.

        Raises `OrderError` where the slots would see something else than the plan says.
        """
        scan = plan.scan(self.kind)
        if plan.run is not None:
            if isinstance(self._count, Tensor) or plan.run[0] != self._count:
                raise ValueError(f"this plan goes on after {plan.run[0]} slots, but the cache holds {self._count}")
        else:
            self._check_seen(plan, scan)
        self._scan = scan
        self._after, self._replay = [], []

    def leave(self, after: States | None, activations: Replay | None) -> None:
        """What the next layer leaves pending: the states after the last slot of a sequence, and what a path is replayed
        from (None: of a single slot, where nothing lies between all and nothing)."""
        self._after.append(after)
        self._replay.append(activations)

    def _check_seen(self, plan: Plan, scan: Scan) -> None:
        """Every new slot must see everything that is committed, in the one lane that a state has."""
        view = plan.views[self.kind]
        last = 0 if scan.lane is None else int(scan.lane.max())
        if last > 0:
            raise OrderError(
                f"a cached state holds one sample a row, in lane 0; this plan has slots in lane {last}. Score packed "
                "samples without a cache, or give each a row of its own"
            )
        bounds = self._bounds
        if bounds is None:  # only runs so far: slots 0, 1, ... that never die
            count = torch.as_tensor(self._count).reshape(-1)
            bounds = (count - 1, torch.full_like(count, INF))
        at, born, dies = view.at, bounds[0][:, None], bounds[1][:, None]
        blind = ~((born <= at) & (at < dies)) & torch.as_tensor(self._count).reshape(-1, 1).gt(0)
        if scan.lane is not None:
            blind = blind & (scan.lane >= 0)
        if bool(blind.any()):
            slot = int(blind.any(0).nonzero()[0])
            raise OrderError(
                f"slot {slot} does not see everything that was committed, but a state cannot leave anything out; "
                "windows and entries that are forgotten need a key-value cache"
            )

    # ---- commit ------------------------------------------------------------------------------------------------------

    def commit(self, keep: Keep, plan: Plan) -> None:
        """Keep a path of pending slots: the first n, a list of slots, or (batch, m) padded with -1. Padding among them
        is left out.

        Raises ValueError where the slots are no path, or too few of a long forward (`Replay.settled`).
        """
        scan, size = self._scan, plan.size if self._replay else 0
        after = [a for a in self._after if a is not None]
        if scan is CHAIN and isinstance(keep, int) and keep == size > 0:  # plain generation: no tensors
            self.states = after
            self._count = self._count + size
            if plan.run is None or self._bounds is not None:
                self._note(torch.arange(size)[None], plan)
        elif not isinstance(keep, int | Sequence) or (keep if isinstance(keep, int) else len(keep)):
            self._keep(self._path(keep, size), after, plan)
        self._scan, self._after, self._replay = None, [], []

    def _path(self, keep: Keep, size: int) -> Int[Tensor, "#b m"]:
        """The live slots among those to be kept, left-aligned, once they are known to be a path."""
        if isinstance(keep, int):
            keep = range(keep)
        path = keep if isinstance(keep, Tensor) else torch.tensor(keep, dtype=torch.long)[None]
        path = path.cpu()
        if path.dim() != 2 or path.shape[0] not in (1, self.batch):
            raise ValueError(f"slots to keep are (batch, m) for {self.batch} rows, got shape {tuple(path.shape)}")
        if path.numel() and int(path.max()) >= size:
            raise ValueError(f"slot {int(path.max())} cannot be kept of {size} pending ones")
        scan = self._scan
        if scan is None or not path.shape[1]:
            return path
        if scan.lane is not None:
            path = torch.where(gather(scan.lane, path) < 0, -1, path)
        path = gather(path, ragged(path >= 0))
        parent = torch.arange(-1, size - 1)[None] if scan.parent is None else scan.parent
        above, before = gather(parent, path), torch.nn.functional.pad(path[:, :-1], (1, 0), value=-1)
        broken = (path >= 0) & (above != before)
        if bool(broken.any()):
            b, j = broken.nonzero()[0].tolist()
            where = "before everything that is pending" if above[b, j] < 0 else f"behind slot {int(above[b, j])}"
            raise ValueError(
                f"these slots are no path: slot {int(path[b, j])} stands {where}, not "
                + ("first" if before[b, j] < 0 else f"behind slot {int(before[b, j])}")
                + ". A state cannot leave slots out; keep a path, or use a key-value cache"
            )
        return path

    def _keep(self, path: Int[Tensor, "#b m"], after: list[States], plan: Plan) -> None:
        scan, count = self._scan, (path >= 0).sum(1)
        if scan is None or bool((count == 0).all()):
            return
        live = torch.tensor([plan.size]) if scan.lane is None else (scan.lane >= 0).sum(1)
        if not after or bool(((count != live) & (count != 0)).any()):
            after = self._replayed(path, count, plan.size)
        self._take(after, (count > 0).expand(self.batch))
        self._count = _one_number((torch.as_tensor(self._count) + count).expand(self.batch))
        if plan.run is None or self._bounds is not None:
            self._note(path, plan)

    def _take(self, after: list[States], rows: Bool[Tensor, "b"]) -> None:
        """New states for these rows."""
        if not bool(rows.all()):
            here = rows.to(self.device)
            conv, state = here[:, None, None], here[:, None, None, None]
            old = self.states
            after = [
                (torch.where(conv, a[0], b[0].to(a[0].dtype)), torch.where(state, a[1], b[1]))
                for a, b in zip(after, old, strict=True)
            ]
        self.states = after

    def _replayed(self, path: Int[Tensor, "#b m"], count: Int[Tensor, "#b"], size: int) -> list[States]:
        """The states after a path: all layers at once, folded into the batch."""
        pending = [r for r in self._replay if r is not None]
        settled = pending[0].settled
        if bool(((count > 0) & (count < settled)).any()):
            raise ValueError(
                f"of a forward of {size} slots a state keeps all, nothing, or all but some of the last "
                f"{size - settled}; {int(count[count > 0].min())} were to be kept"
            )
        layers = len(pending)
        states = [old if r.before is None else r.before for old, r in zip(self.states, pending, strict=True)]
        conv, state = (torch.stack(part).flatten(0, 1) for part in zip(*states, strict=True))
        conv_x, x, dt, B = (
            torch.stack([getattr(r, name) for r in pending]).flatten(0, 1) for name in ("conv_x", "x", "dt", "B")
        )
        rates = torch.stack([r.A for r in pending]).repeat_interleave(self.batch, 0)[:, None]
        path = torch.where(path < 0, -1, path - settled)[:, settled:].to(self.device)
        path = path if path.shape[0] == 1 else path.repeat(layers, 1)
        conv, state = replay(conv_x, x, dt, rates, B, path, conv, state)
        return list(zip(conv.unflatten(0, (layers, -1)), state.unflatten(0, (layers, -1)), strict=True))

    def _note(self, path: Int[Tensor, "#b m"], plan: Plan) -> None:
        """Remember when the last of the committed slots was born and the first of them dies."""
        count = torch.as_tensor(self._count).expand(self.batch)
        if self._bounds is None:
            before = count - (path >= 0).sum(1)
            self._bounds = (before - 1, torch.full_like(before, INF))
        if plan.run is not None:
            born, dies = (count - 1)[:, None], torch.full((1, 1), INF)
        else:
            view = (plan.settled or plan.views)[self.kind]
            born = torch.where(path >= 0, gather(view.born, path), -INF)
            dies = torch.where(path >= 0, gather(view.dies, path), INF)
        latest, earliest = self._bounds
        self._bounds = (torch.maximum(latest, born.amax(1)), torch.minimum(earliest, dies.amin(1)))

    # ---- rows --------------------------------------------------------------------------------------------------------

    def evict(self, retain: Int[Tensor, "#b m"]) -> None:
        """Keep all that a row has committed, or nothing of it; ValueError for anything between, see `can`."""
        left = (retain >= 0).sum(1).expand(self.batch)
        if bool(((left > 0) & (left != torch.as_tensor(self._count))).any()):
            raise ValueError(
                "a state cannot forget single slots; orders that evict (windows, memories) need a key-value cache"
            )
        self.select(torch.where(left > 0, torch.arange(self.batch), -1))

    def select(self, rows: Int[Tensor, "b2"], new: Sequence[StateCache] = ()) -> None:
        """As of every cache."""
        if new:
            rows = below_own(rows, self.batch)
            self.join(new)
        fresh, at = rows < 0, rows.clamp(min=0)
        if rows.numel() == 0 or int(at.max()) >= self.batch:
            raise ValueError(f"rows {rows.tolist()} cannot be selected of {self.batch}")
        picked = [(conv[at.to(conv.device)], state[at.to(state.device)]) for conv, state in self.states]
        if bool(fresh.any()):
            empty = fresh.to(self.device)[:, None, None]
            picked = [(c.masked_fill(empty, 0), s.masked_fill(empty[..., None], 0)) for c, s in picked]
        fresh, at = fresh.cpu(), at.cpu()
        count = torch.as_tensor(self._count).expand(self.batch)[at].masked_fill(fresh, 0)
        if self._bounds is not None:
            born, dies = (x.expand(self.batch)[at] for x in self._bounds)
            self._bounds = born.masked_fill(fresh, -INF), dies.masked_fill(fresh, INF)
        self.states, self._count = picked, _one_number(count)
        self._scan, self._after, self._replay = None, [], []

    def join(self, others: Sequence[StateCache]) -> None:
        """Take in the rows of other caches below one's own. What is pending is dropped."""
        parts = [self, *others]
        if any(part._bounds is not None for part in parts):
            raise ValueError("states that took in other slots than a run cannot be joined")
        self._count = _one_number(torch.cat([torch.as_tensor(part._count).expand(part.batch) for part in parts]))
        layers = zip(*(part.states for part in parts), strict=True)
        self.states = [(torch.cat([conv for conv, _ in of]), torch.cat([state for _, state in of])) for of in layers]
        self._scan, self._after, self._replay = None, [], []

    def compressed(self, codec: Any, capacity: int) -> Any:
        """Refused: raises ValueError."""
        raise ValueError("there are no keys and values to compress: states take the same room whatever the length")

    def nbytes(self) -> int:
        """Bytes held by the committed states, whatever the length."""
        return sum(t.numel() * t.element_size() for both in self.states for t in both)


def _one_number(count: Int[Tensor, "b"]) -> int | Tensor:
    """One number where all rows have the same length."""
    return int(count[0]) if bool((count == count[0]).all()) else count
