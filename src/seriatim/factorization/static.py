"""Static orders that are a clock and a feed: scales, blocks, any order.

`Scales` gives each slot one element to read and a vector derived from what is decided before it (next-scale
generation); `Blocks` two streams, clean values and masked or noisy queries (block diffusion, skip-causal).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.canvas import DELETED, Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.base import Factorization
from seriatim.layout import Layout
from seriatim.plan import DERIVED, LEARNED, MASK, NOISE, VALUE, OrderError, Plan, Reads, Slots
from seriatim.random import Random
from seriatim.view import INF, View, full, inclusive, two_stream


class Scales(Factorization):
    """Coarse to fine: all elements of a scale at once, each at a slot fed by what the coarser scales derive for it.

    The first coordinate of an element is its scale. `visibility`: `inclusive` (VAR), `own_rank` (HMAR), or one for each
    kind of layer by its name (M-VAR).
    """

    def __init__(self, visibility: Callable[[Tensor], View] | Mapping[str, Callable[[Tensor], View]] = inclusive):
        self.visibility = visibility

    def order(self, layout: Layout, random: Random | None = None) -> Int[Tensor, "1 E"]:
        return layout.coord[:, 0][None]

    def packed(self, canvas: Canvas) -> Plan:
        layout = canvas.layout
        scale = layout.coord[:, 0][None]
        element = torch.arange(layout.size)[None]
        carried = torch.full((1, layout.size, 1), -1)
        slots = Slots(carried, torch.full_like(scale, DERIVED), layout.coord[None], before(scale, canvas.rank))
        read = torch.where(canvas.rank >= 0, element, -1)
        each = self.visibility if isinstance(self.visibility, Mapping) else {"all": self.visibility}
        views = {kind: sees(scale) for kind, sees in each.items()}
        return Plan(slots, views, Reads(element, read), canvas.rank, layout=layout)


def before(scale: Int[Tensor, "1 E"], rank: Int[Tensor, "b E"]) -> Int[Tensor, "b E"]:
    """The highest rank among the elements of coarser scales, for each element; -1 where there are none."""
    scale = scale.expand(len(rank), -1)
    highest = torch.full((len(rank), int(scale.max()) + 2), -1).scatter_reduce(1, scale + 1, rank, "amax")
    return highest.cummax(1).values.gather(1, scale)


class Blocks(Factorization):
    """Blocks one after another, all of a block at once or in any order inside it.

    Two streams: values see values up to their own block; queries (a mask or noise in place of each element) see their
    own block's queries and the values of earlier blocks. Losses are read at queries. `inside` is "parallel" (one step a
    block: exact likelihood as independent elements) or "any" (elements of a block decided in any order by the decoder:
    block diffusion, whose likelihood is a bound). Queries show what of their block is known: given elements, and for
    "any" whatever is decided on the canvas, so that an objective draws its masks by deciding the rest.

    shift: each element is read at the slot before its own, as in models that began as next-token ones (Fast-dLLM v2,
    Wu et al. 2025): inside a block at the query of the element before, the first of a block at the clean value that
    ends the block before (the very first at its own). That value so stays out of the cache while its successor's block
    is at work. Where a canvas gives the first of a block a rank of its own, the step that decides it needs no query.
    """

    def __init__(self, size: int, inside: str = "parallel", source: int = MASK, shift: bool = False):
        if size < 1 or inside not in ("parallel", "any") or source not in (MASK, NOISE):
            raise ValueError(
                f"blocks have a positive size and are decided 'parallel' or in 'any' order; got {size}, {inside!r}"
            )
        self.size, self.inside, self.source, self.shift = size, inside, source, shift
        self.free = inside == "any"
        self.likelihood = "exact" if inside == "parallel" and source == MASK else "bound"

    def order(self, layout: Layout, random: Random | None = None) -> Int[Tensor, "1 E"]:
        return (torch.arange(layout.size) // self.size)[None]

    def block(self, canvas: Canvas) -> Int[Tensor, "#b E"]:
        """The number of the block of each element."""
        return (torch.arange(canvas.layout.size) // self.size)[None]

    def packed(self, canvas: Canvas) -> Plan:
        """[queries; values]: values of the last block are fed too, so that prefixes and whole samples look alike."""
        layout, rank = canvas.layout, canvas.rank
        e = torch.arange(layout.size)
        block = self.block(canvas)
        hidden = rank >= 0
        if self.inside == "any":  # what is shown of a block is decided before the rest of it
            hidden = canvas.open
            rank = torch.where(rank >= 0, 2 * rank + hidden, -1)
        both = torch.cat([e, e])[None]
        query = torch.arange(2 * layout.size)[None] < layout.size
        needs = torch.cat([torch.where(hidden, -1, rank), rank], 1)
        source = torch.cat([torch.where(hidden, self.source, VALUE), torch.full_like(rank, VALUE)], 1)
        slots = Slots(both[..., None], source, layout.coord[None].repeat(1, 2, 1), needs)
        view = two_stream(block.repeat(1, 2), query)
        gone = canvas.status == DELETED
        if self.inside == "any" and bool(gone.any()):  # padding; a row that ended had its whole block before it did
            view = view.narrow(lane=torch.where(gone, -1, 0).repeat(1, 2))
        at = e
        if self.shift:
            before = (e - 1).clamp(min=0)
            at = torch.where((e % self.size == 0) & (e > 0), layout.size + before, before)
        slot, read = torch.where(hidden, at, -1), torch.where(hidden, e, -1)
        return Plan(slots, {"all": view}, Reads(slot, read), rank, layout=layout)

    def due(self, canvas: Canvas) -> Bool[Tensor, "b E"]:
        return super().due(canvas) if self.inside == "parallel" else canvas.open  # what is shown is not read

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        if self.inside == "parallel":
            return super().step(canvas, guess, cached)
        if canvas.done:
            return None
        layout, size, unknown = canvas.layout, self.size, canvas.open
        firsts = torch.where(unknown, self.block(canvas), INF).amin(1)  # of each row the block at work
        if guess is not None:
            raise OrderError("blocks decided in any order verify no drafts")
        first = int(firsts.min())  # the block at work: the first with anything unknown
        ended = bool((canvas.status[:, : (first + 1) * size] == DELETED).any())  # rows that end within it
        if not isinstance(cached, int) or (ended and not self.shift):
            return self._ragged(canvas, cached)
        before = int(self.shift and first > 0)  # slots of earlier blocks that are read
        if cached > first * size - before:
            raise OrderError(
                f"an element of block {first} is unknown again, but the cache holds {cached} slots: blocks that are "
                "finished stay so (remask within the block at work, or decode without a cache)"
            )
        clean = torch.arange(cached, first * size)
        work = torch.arange(first * size, min((first + 1) * size, layout.size))
        if before and self._alone(canvas, unknown, work):
            work = work[:0]  # the first of a block is read at a value, which sees no query
        element = torch.cat([clean, work])[None]
        open_ = unknown[:, element[0]]
        now = canvas.rank.masked_fill(unknown, -1).amax(1, keepdim=True).clamp(min=-1) + 1
        source = torch.where(open_, self.source, VALUE)
        block = torch.cat([clean, work])[None] // size
        rank = torch.where(unknown, now, -1)
        read = torch.where(unknown, torch.arange(layout.size), -1)[:, first * size : first * size + max(len(work), 1)]
        at = (torch.arange(read.shape[1]) + len(clean) - int(self.shift)).clamp(min=0)
        slot = torch.where(read >= 0, at, -1)
        slots = Slots(element[..., None], source, layout.coord[element[0]][None], torch.full_like(source, -1))
        kept = torch.arange(len(clean) - before)[None]
        # one stream will do: no value stands here beside the query of its element
        return Plan(slots, {"all": inclusive(block)}, Reads(slot, read), rank, layout=layout, kept=kept)

    def _ragged(self, canvas: Canvas, cached: int | Tensor) -> Plan:
        """Rows whose blocks at work are different ones. What was cut off takes part in nothing."""
        if self.shift:
            raise OrderError("rows that are read at the slot before their own go together, block by block")
        layout, unknown, block = canvas.layout, canvas.open, self.block(canvas).expand(canvas.batch, -1)
        held = torch.as_tensor(cached).reshape(-1, 1).expand(canvas.batch, 1)
        now = torch.where(unknown, block, INF).amin(1, keepdim=True)
        at_work = now < INF
        first = torch.where(at_work, (block < now).sum(1, keepdim=True), held)
        end = torch.where(at_work, (block <= now).sum(1, keepdim=True), held)
        if bool((held > first).any()):
            raise OrderError(
                "an element of a finished block is unknown again, but the cache holds it: blocks that are finished "
                "stay so (remask within the block at work, or decode without a cache)"
            )
        slot = torch.arange(int((end - held).max()))[None]
        element = torch.where(held + slot < end, held + slot, -1)
        gone = canvas.status.gather(1, element.clamp(min=0)) == DELETED
        element = element.masked_fill(gone, -1)
        open_ = unknown.gather(1, element.clamp(min=0)) & (element >= 0)
        start = int(torch.where(open_, slot, INF).amin())  # no row reads before it
        read = torch.where(open_, element, -1)[:, start:]
        source, at = torch.where(open_, self.source, VALUE), torch.where(open_, slot, -1)[:, start:]
        kept = torch.where(slot < first - held, slot, -1)[:, : int((first - held).max())]
        element, kept = shared_rows(element), shared_rows(kept)
        view = inclusive(shared_rows(block.gather(1, element.clamp(min=0).expand(canvas.batch, -1))))
        if bool((element < 0).any()):
            view = view.narrow(lane=torch.where(element < 0, -1, 0))
        slots = Slots(element[..., None], source, layout.coord[element.clamp(min=0)], torch.full_like(source, -1))
        turn = canvas.rank.masked_fill(unknown, -1).amax(1, keepdim=True) + 1
        rank = torch.where(unknown, turn, -1)
        return Plan(slots, {"all": view}, Reads(at, read), rank, layout=layout, kept=kept)

    def fill(self, canvas: Canvas, cached: int | Tensor, most: int, leave: int = 0) -> Plan | None:
        """Whole blocks that all rows know."""
        if self.inside == "parallel" or self.shift or not isinstance(cached, int):
            return None
        size, layout = self.size, canvas.layout
        whole = int(canvas.lengths().min()) // size * size
        count = min(whole - cached, max(most // size, 1) * size)
        if count < 1 or whole - cached <= leave:
            return None
        element = torch.arange(cached, cached + count)
        source = torch.full((1, count), VALUE)
        slots = Slots(element[None, :, None], source, layout.coord[element][None], torch.full_like(source, -1))
        none = torch.full((1, 1), -1)
        return Plan(slots, {"all": inclusive(element[None] // size)}, Reads(none, none), canvas.rank, layout=layout)

    @staticmethod
    def _alone(canvas: Canvas, unknown: Bool[Tensor, "b E"], work: Int[Tensor, "w"]) -> bool:
        """Whether no row decides anything of a block in this step but its first element."""
        rank = torch.where(unknown, canvas.rank, INF)[:, work]
        rest = rank[:, 1:].amin(1) if len(work) > 1 else INF
        return bool(((rank[:, 0] < rest) | (rank.amin(1) == INF)).all())


def shared_rows(x: Int[Tensor, "b n"]) -> Int[Tensor, "#b n"]:
    """One row where all are alike: labels that the batch shares are cheaper."""
    return x[:1] if bool((x == x[:1]).all()) else x


class AnyOrder(Factorization):
    """Unknown elements as masks among the known ones, everybody sees everybody: masked generation, any order.

    No single pass scores a sample; a forward reads all unknown elements. Its likelihood is a bound (the mean over
    orders). shift: each element is read at the slot before its own (the first at its own), as in models that began as
    next-token ones (DiffuLLaMA, Gong et al. 2024, arXiv 2410.17891; Dream). prefix: so many slots in front carry no
    element (a class).
    """

    likelihood = "bound"
    free = True

    def __init__(self, shift: bool = False, prefix: int = 0):
        if prefix < 0 or (prefix and shift):
            raise ValueError(f"0 or more slots stand in front of elements read at their own; got {prefix}, {shift}")
        self.shift, self.prefix = shift, prefix

    def order(self, layout: Layout, random: Random | None = None) -> Int[Tensor, "1 E"]:
        return torch.arange(layout.size)[None]

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        if canvas.done:
            return None
        layout = canvas.layout
        gone = canvas.status == DELETED
        size = int((~gone).any(0).nonzero().amax()) + 1  # what stands behind the end of all rows is not computed
        unknown, gone, e = canvas.open[:, :size], gone[:, :size], torch.arange(size)[None]
        source, read = torch.where(unknown, MASK, VALUE), torch.where(unknown, e, -1)
        slots = Slots(e[..., None], source, layout.coord[:size][None], torch.full_like(source, -1))
        view = full(size)
        if bool(gone.any()):
            view = view.narrow(lane=torch.where(gone, -1, 0))
        slot = torch.where(unknown, (e - int(self.shift)).clamp(min=0), -1)
        rank, nothing = torch.where(canvas.open, 0, -1), torch.zeros(1, 0, dtype=torch.long)
        if self.prefix:
            slots, view, slot = behind(self.prefix, slots, gone, slot)
        return Plan(slots, {"all": view}, Reads(slot, read), rank, layout=layout, kept=nothing)


def behind(
    n: int, slots: Slots, gone: Bool[Tensor, "b s"], slot: Int[Tensor, "b m"]
) -> tuple[Slots, View, Int[Tensor, "b m"]]:
    """The same behind n learned slots, whose first coordinate counts them: slots, whom all of them see, and where they
    are read."""
    rows, axes = len(slots.source), slots.coord.shape[-1]
    number = F.pad(torch.arange(n)[None, :, None], (0, axes - 1)).expand(len(slots.coord), -1, -1)
    both = Slots(
        F.pad(slots.element, (0, 0, n, 0), value=-1),
        torch.cat([torch.full((rows, n), LEARNED), slots.source], 1),
        torch.cat([number, slots.coord], 1),
        F.pad(slots.needs, (n, 0), value=-1),
    )
    view = full(n + slots.source.shape[1])
    if bool(gone.any()):
        view = view.narrow(lane=F.pad(torch.where(gone, -1, 0), (n, 0)))
    return both, view, torch.where(slot >= 0, slot + n, -1)


class KnownFirst(AnyOrder):
    """Any order with causal attention: known elements stand first, in their order, then the masks, in theirs, and each
    slot sees those that stand before it, whatever its coordinate (WeDLM, Liu et al. 2025, arXiv 2512.22737).

    So the known elements before the first unknown one see nothing that is decided later, and stay in the cache.
    """

    def __init__(self) -> None:
        super().__init__()

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        if canvas.done:
            return None
        if guess is not None or not isinstance(cached, int):
            raise OrderError("rows whose known elements stand first go together and verify no drafts")
        layout, unknown = canvas.layout, canvas.open
        known = int((unknown.cumsum(1) == 0).sum(1).min())  # before the first unknown one, in every row
        if cached > known:
            raise OrderError(
                f"element {known} is unknown again, but the cache holds {cached} slots before the first mask"
            )
        e = torch.arange(cached, layout.size)[None]
        hidden = unknown[:, cached:]
        place = cached + hidden.long().argsort(dim=1, stable=True).argsort(dim=1)
        view = inclusive(place)
        gone = canvas.status[:, cached:] == DELETED
        if bool(gone.any()):
            view = view.narrow(lane=torch.where(gone, -1, 0))
        source = torch.where(hidden, MASK, VALUE)
        slots = Slots(e[..., None], source, layout.coord[cached:][None], torch.full_like(source, -1))
        read, slot = torch.where(hidden, e, -1), torch.where(hidden, e - cached, -1)
        rank, kept = torch.where(unknown, 0, -1), torch.arange(known - cached)[None]
        return Plan(slots, {"all": view}, Reads(slot, read), rank, layout=layout, kept=kept)
