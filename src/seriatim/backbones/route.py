"""Which blocks of a backbone a forward's slots go through: asked block by block, on the way.

A plan that carries a `Route` (`Plan.along`) has slots that skip whole layers, or feed-forward networks alone: they keep
the vector they have. A block that no slot goes through is not computed, so its weights are not read.

Nobody is masked for it: whoever computes a layer finds there all earlier entries that it sees, because later slots go
through no layer that earlier ones have skipped. Where this is not so, `Plan.layers` says which slots a layer has, and
the others are not seen there.
"""

from __future__ import annotations

from typing import Literal, Protocol

from jaxtyping import Float
from torch import Tensor

Block = Literal["layer", "feedforward"]


class Route(Protocol):
    """The way of a forward's slots through the blocks of one kind, first to last."""

    blocks: Block

    def enters(self, i: int, x: Float[Tensor, "b s d"]) -> bool:
        """Whether any slot goes through block i; x is what the slots carry in front of it."""
        ...

    def leaves(self, i: int, x: Float[Tensor, "b s d"], y: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """What the slots carry behind block i, which makes y of x (the residual stream, not the branch alone)."""
        ...
