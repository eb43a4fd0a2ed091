"""Judge decoding (Bachmann et al. 2025, arXiv 2501.19309): a drafted token stands where the usual rule accepts it, or
where a linear judge finds it good.

The usual rule asks whether the target would have written a token; a good token in other words than the target's fails
it. The judge reads the target's own state of the drafted token, which says whether the text is right up to there, in
the forward that verifies it. Relaxed on purpose: with a threshold of 1 the judge is never heard, and the law is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seriatim.backbones.route import Block
from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.decoding.layers import Skipping
from seriatim.decoding.verify import Chain, Round
from seriatim.plan import Plan


class Look:
    """A route through everything, which notes what slots carry behind one layer (from 0)."""

    blocks: Block = "feedforward"

    def __init__(self, layer: int):
        self.layer = layer
        self.states: Float[Tensor, "b s d"] | None = None

    def enters(self, i: int, x: Float[Tensor, "b s d"]) -> bool:
        return True

    def leaves(self, i: int, x: Float[Tensor, "b s d"], y: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        if i == self.layer:
            self.states = y
        return y


class Watch:
    """Looks at one layer in every forward of a target (`Target(layers=...)`) and leaves none out: `states` are those of
    all slots of the last forward. layer: from 0 (None: the last, before the norm in front of the head)."""

    blocks: ClassVar[Block] = "feedforward"
    whole_prompt: ClassVar[bool] = False

    def __init__(self, layer: int | None = None):
        self.layer, self.look = layer, Look(-1)

    @property
    def states(self) -> Float[Tensor, "b s d"]:
        assert self.look.states is not None, "a forward comes first"
        return self.look.states

    def begin(self, depth: int) -> Skipping:
        layer = depth - 1 if self.layer is None else self.layer
        if not 0 <= layer < depth:
            raise ValueError(f"layers are counted from 0 to {depth - 1}, got {layer}")
        self.look = Look(layer)
        return _Watching(depth, self.look)


class _Watching(Skipping):
    def __init__(self, depth: int, look: Look):
        super().__init__(depth)
        self.look = look

    def route(self, plan: Plan, canvas: Canvas) -> Look:
        return self.look


class Judged(Chain):
    """Speculative sampling of a chain, in which a token also stands where the judge is surer than `delta` of it.

    judge: from states to logits (`posttraining.judge.Judge`); watch: where it reads them, also given to the target.
    What filters and constraints exclude never stands. At delta = 1 it is `Chain`: exact.
    """

    def __init__(
        self, judge: Callable[[Float[Tensor, "b n d"]], Float[Tensor, "b n"]], watch: Watch, delta: float = 0.5,
        stop: Iterable[int] = (),
    ):  # fmt: skip
        super().__init__(stop)
        if not 0 <= delta <= 1:
            raise ValueError(f"delta is a threshold on a probability, from 0 to 1 (exact), got {delta}")
        self.judge, self.watch, self.delta = judge, watch, delta

    def chances(self, turn: Round, guess: Guess) -> Float[Tensor, "b n"]:
        usual = super().chances(turn, guess)
        good = self.good(self.watch.states[:, -guess.size :])  # of drafted tokens themselves, not of those before them
        node = guess.value.clamp(min=0).to(usual.device)[..., None]
        possible = turn.dist.logits[:, : guess.size].gather(-1, node)[..., 0] > -torch.inf
        return usual.masked_fill(good & possible, 1.0)

    def good(self, states: Float[Tensor, "b n d"]) -> Bool[Tensor, "b n"]:
        """Which tokens the judge lets stand, by their states."""
        return torch.sigmoid(self.judge(states)) > self.delta
