"""Two orders of a text trained in one forward: token by token, and masks in blocks (`factorization.beside`)."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.factorization.beside import beside_line
from seriatim.model import Model
from seriatim.random import Random


def losses_of_both(
    model: Model,
    canvas: Canvas,
    hidden: Bool[Tensor, "b E"],
    size: int,
    causal: bool = False,
    random: Random | None = None,
) -> tuple[Float[Tensor, "b E"], Float[Tensor, "b E"]]:
    """The loss of each element in the order of blocks (0 where it is shown), and in that of the line, by one forward.
    Raises OrderError for one that peeks, before it is trained."""
    plan, line = beside_line(canvas, hidden, size, causal=causal)
    if model._sound is not model.factorization:
        plan.check(model.mixers, (line.rank >= 0) & hidden)
        line.check(model.mixers, line.rank >= 0)
        model._sound = model.factorization
    h = model.hidden(plan, canvas)
    blocks, tokens = (model.losses_at(h, p.reads, canvas, random=random) for p in (plan, line))
    return blocks, tokens
