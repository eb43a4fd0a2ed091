"""Scales that are refined: after a scale was drawn at once, some of it is kept, and the rest drawn again in view of it.

HMAR, Kumbong et al. 2025, arXiv 2506.04421: next-scale prediction with own-rank visibility, and inside each scale a
masked generation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seriatim.canvas import DECIDED, Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.static import Scales, before
from seriatim.plan import MASK, VALUE, OrderError, Plan, Reads, Slots
from seriatim.view import INF, own_rank


@dataclass(frozen=True, eq=False)
class MaskPass(Plan):
    """A forward that reads what is hidden of some scales, in view of what is shown of them. It goes through the second
    end of a backbone, and is not guided (as in the released code, whatever the paper says)."""

    fork = True
    guided = False


class RefinedScales(Scales):
    """Own-rank scales; one of which a part has been decided goes on by mask passes.

    Decoded by a decider that decides everything it reads, it is plain next-scale prediction. A row's elements that were
    given beforehand do not count as decided: a scale begins with a plain pass. All rows are at the same scale.
    """

    def __init__(self) -> None:
        super().__init__(own_rank)

    def step(self, canvas: Canvas, guess: Guess | None, cached: int | Tensor) -> Plan | None:
        if canvas.done:
            return None
        if guess is None:
            rank = torch.where(canvas.open, canvas.rank, INF).amin(1, keepdim=True)
            begun = (canvas.rank == rank) & (canvas.status == DECIDED)
            if bool(begun.any()):
                scale = canvas.layout.coord[:, 0]
                mine = canvas.open.any(0)
                now = int(scale[mine].min())
                if bool((canvas.open & (canvas.rank == rank) & (scale != now)).any()):
                    raise OrderError("rows whose scales are refined go together: they are at different scales here")
                return self.masked(canvas, scale == now)
        return super().step(canvas, guess, cached)

    def masked(self, canvas: Canvas, which: Bool[Tensor, "E"]) -> MaskPass:
        """A mask pass over these elements, whole scales of them: what is known is shown, the rest is read. Of several
        scales each sees itself only, and is told what all coarser ones hold, known or not: training in one pass."""
        e = which.nonzero()[:, 0]
        open_, rank = canvas.open, canvas.rank
        if bool((open_ == open_[:1]).all()) and bool((rank == rank[:1]).all()):
            open_, rank = open_[:1], rank[:1]
        rank = torch.where(rank >= 0, 2 * rank + open_, -1)  # what is shown of a scale is decided before the rest
        scale, hidden = canvas.layout.coord[:, 0][None], open_[:, e]
        source = torch.where(hidden, MASK, VALUE)
        needs = torch.maximum(before(scale, rank)[:, e], torch.where(hidden, -1, shown(scale, rank, open_)[:, e]))
        slots = Slots(e[None, :, None], source, canvas.layout.coord[e][None], needs)
        at = torch.arange(len(e))[None]
        read, slot = torch.where(hidden, e, -1), torch.where(hidden, at, -1)
        reads = Reads(slot, read, torch.ones_like(read))
        nothing = torch.zeros(1, 0, dtype=torch.long)
        return MaskPass(slots, {"all": own_rank(scale[:, e])}, reads, rank, layout=canvas.layout, kept=nothing)


def shown(scale: Int[Tensor, "1 E"], rank: Int[Tensor, "b E"], open_: Bool[Tensor, "b E"]) -> Int[Tensor, "b E"]:
    """The highest rank among the known elements of each element's scale: what stands in a slot reaches over to its
    neighbours where maps are resized."""
    known = rank.masked_fill(open_, -1)
    scale = scale.expand(len(rank), -1)
    highest = torch.full((len(rank), int(scale.max()) + 1), -1).scatter_reduce(1, scale, known, "amax")
    return highest.gather(1, scale)
