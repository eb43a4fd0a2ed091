"""What a recurrence can make of visibility: whose state each slot goes on from.

A state holds everything that it was given, in one order. So a recurrent layer honours a view exactly when the slots
that a slot sees are one path: all earlier ones of its lane (a sequence, packed samples), or its ancestors in a draft
tree. Anything else (full visibility, windows, two streams over blocks) is refused here, with the pair of slots that
shows why. Knows nothing of networks.

Where slots stand in chunks, a state may be handed on from chunk to chunk while the slots of a chunk see each other by
attention (`chunks_of`). Chunks may go on from one another in a tree: two streams over blocks are such a tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.view import INF, View


@dataclass(frozen=True, eq=False)
class Scan:
    """Whose state each slot goes on from; every field is (batch, slots), batch 1 when the batch shares it.

    lane: packed samples, and padding (-1); None: one sample without padding. parent: the slot right before each one on
    its path (-1: what came before this forward; at the start of a packed sample, nothing); None: the slot before it in
    the array. tree: paths fork, or run against the array, so that taking the slots in array order will not do.
    """

    lane: Int[Tensor, "b s"] | None = None
    parent: Int[Tensor, "b s"] | None = None
    tree: bool = False

    @cached_property
    def trunk(self) -> int:
        """How many first columns of a tree every row takes one after the other, before any path forks.

        Slots behind them go on from one another or from their row's last slot in the trunk.
        """
        assert self.parent is not None
        parent, size = self.parent, self.parent.shape[1]
        column = torch.arange(size)
        lane = torch.zeros_like(parent) if self.lane is None else self.lane.expand_as(parent)
        live = lane >= 0
        forks = live & (parent != samples(lane)[1])
        # the first live slot at each column or behind it: the trunk may not reach beyond the one after a fork's parent
        first = F.pad(torch.where(live, column, size), (0, 1), value=size).flip(1).cummin(1).values.flip(1)
        limit = torch.minimum(first.gather(1, parent + 1), column)
        return int(torch.where(forks, limit, size).min()) if size else 0


CHAIN = Scan()


def scan_of(view: View) -> Scan:
    """Whose state each slot goes on from so that it sees what the view says.

    Raises ValueError, naming slots, where no recurrence can honour the view. Linear in the slots where they stand in
    array order; otherwise it looks at the mask.
    """
    lane = view.lane
    if lane is not None and bool((lane == 0).all()):
        lane = None
    if _in_array_order(view):
        if lane is None:
            return CHAIN
        sample, before = samples(lane)
        same = sample == sample.gather(1, before.clamp(min=0))
        return Scan(lane, torch.where((lane >= 0) & (before >= 0) & same, before, -1))
    mask = view.mask()
    own = torch.eye(view.size, dtype=torch.bool)
    depth = mask.sum(2)
    # the nearest of the slots that a slot sees is the one that sees most
    nearest = torch.where(mask & ~own, depth[:, None], 0).max(2)
    parent = torch.where(nearest.values > 0, nearest.indices, -1)
    path = mask.gather(1, nearest.indices[..., None].expand_as(mask)) & (parent >= 0)[..., None] | own
    honest = (path == mask).all(2) & (nearest.values == depth - 1)
    if not bool(honest.all()):
        row, slot = (~honest).nonzero()[0].tolist()
        raise ValueError(_why_not(mask[row], path[row], slot, int(parent[row, slot])))
    return Scan(lane, parent, tree=True)


def samples(lane: Int[Tensor, "b s"]) -> tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]:
    """The number of each slot's sample (padding: that of the sample before), and the last live slot before it or -1."""
    slot = torch.arange(lane.shape[1], device=lane.device)
    last = torch.where(lane >= 0, slot, -1).cummax(1).values
    before = F.pad(last[:, :-1], (1, 0), value=-1)
    changed = (lane >= 0) & (before >= 0) & (lane != lane.gather(1, before.clamp(min=0)))
    return changed.long().cumsum(1), before


def _in_array_order(view: View) -> bool:
    """Does each slot see exactly the earlier slots of its lane, and do lanes not return? Makes no mask."""
    if view.relation is not None or view.size == 0:
        return view.size == 0
    lane = torch.zeros_like(view.at) if view.lane is None else view.lane
    at, born, dies, lane = torch.broadcast_tensors(view.at, view.born, view.dies, lane)
    live = lane >= 0
    sample, before = samples(lane)
    starts = live & ((before < 0) | (sample != sample.gather(1, before.clamp(min=0))))
    names = torch.where(starts, lane, -1 - torch.arange(view.size)).sort(1).values
    if bool((names.diff(dim=1) == 0).any()):
        return False
    # running extremes within each sample: its number outweighs every label
    far = 4 * INF * sample
    born_before = F.pad((far + torch.where(live, born, -INF)).cummax(1).values[:, :-1], (1, 0), value=-INF)
    dies_before = F.pad((-far + torch.where(live, dies, INF)).cummin(1).values[:, :-1], (1, 0), value=INF + 1)
    born_after = (far + torch.where(live, born, INF + 1)).flip(1).cummin(1).values.flip(1)
    born_after = F.pad(born_after[:, 1:], (0, 1), value=int(far.max()) + INF + 1)
    fine = (born_before <= at + far) & (at - far < dies_before) & (at + far < born_after)
    return bool((fine | ~live).all())


# ---- chunks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Chunks:
    """Slots in chunks, each of which goes on from the state of another one; parents come before their children.

    slots: those of each chunk, in array order, -1 behind the last of a shorter one; parent: the chunk that each goes on
    from (-1: what came before this forward); chunk: that of each slot.
    """

    slots: Int[Tensor, "z m"]
    parent: tuple[int, ...]
    chunk: Int[Tensor, "s"]

    @cached_property
    def place(self) -> Int[Tensor, "s"]:
        """Where each slot stands in `slots`, flattened."""
        flat = self.slots.flatten()
        live = (flat >= 0).nonzero()[:, 0]
        return live[flat[live].argsort()]

    @cached_property
    def even(self) -> bool:
        """Are all chunks of one size?"""
        return bool((self.slots >= 0).all())


def chunks_of(view: View) -> Chunks:
    """The chunks of a view in which every slot sees all of its own chunk and of those on the path to it: whole scales
    or frames one after another, and blocks in two streams.

    Raises ValueError, naming slots, for any other view, and where rows of the batch differ or stand in lanes.
    """
    if view.lane is not None and bool((view.lane != 0).any()):
        raise ValueError("a state that is handed from chunk to chunk has one lane a row, and no padding")
    masks = view.mask()
    mask, slot = masks[0], torch.arange(view.size)
    if bool((masks != mask).any()):
        raise ValueError("chunks are the same in all rows of a batch")
    mutual = mask & mask.T
    depth = mask.sum(1)
    first = mutual.long().argmax(1)  # of its chunk
    if bool((wrong := (mask != mask[first]).any(1)).any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"slots {int(first[at])} and {at} see each other, but not the same slots: a chunk sees as a whole what is "
            "handed on to it. Windows and masks inside of a chunk need attention layers"
        )
    heads = first.unique()
    heads = heads[depth[heads].argsort(stable=True)]
    number = torch.full((view.size,), -1).scatter(0, heads, torch.arange(len(heads)))[first]
    parent = []
    for z, head in enumerate(heads.tolist()):
        earlier = mask[head] & (number != z)
        nearest = int(torch.where(earlier, depth, 0).argmax()) if bool(earlier.any()) else -1
        if nearest >= 0 and not torch.equal(mask[nearest], earlier):
            odd = int((mask[nearest] ^ earlier).nonzero()[0])
            raise ValueError(
                f"slot {head} sees slot {nearest}, and one of them sees slot {odd}, but not both: a state that is "
                "handed from chunk to chunk holds all that it was given"
            )
        parent.append(int(number[nearest]) if nearest >= 0 else -1)
    sizes = number.bincount(minlength=len(heads))
    slots = torch.full((len(heads), int(sizes.max()) if view.size else 0), -1)
    for z in range(len(heads)):
        slots[z, : sizes[z]] = slot[number == z]
    return Chunks(slots, tuple(parent), number)


def _why_not(mask: Bool[Tensor, "s s"], path: Bool[Tensor, "s s"], slot: int, parent: int) -> str:
    """Which slots show that a view is no recurrence."""
    missing, extra = (path & ~mask)[slot], (mask & ~path)[slot]
    mutual = (mask & mask.T)[slot].clone()
    mutual[slot] = False
    if bool(mutual.any()):
        what = f"slots {slot} and {int(mutual.nonzero()[0])} see each other"
    elif bool(missing.any()):
        what = f"slot {slot} sees slot {parent}, but not slot {int(missing.nonzero()[0])}, which slot {parent} sees"
    else:
        other = int(extra.nonzero()[0])
        what = f"slot {slot} sees slots {parent} and {other}, of which neither sees the other"
    return (
        f"a recurrent layer cannot honour this view: {what}. A state holds all that it was given, in one order, so a "
        "slot sees all earlier slots of its lane, or its path in a draft tree. Windows, full visibility and training "
        "in two streams (queries beside clean values) over blocks need attention layers"
    )
