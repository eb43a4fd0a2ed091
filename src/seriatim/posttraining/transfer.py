"""Maps that move a state ahead inside a frozen base: hidden transfer (Wu et al. 2024, arXiv 2404.12022).

In front of layer l_j, map W_j makes of the state of token t a pseudo state of token t + j, which runs through the
remaining layers as a slot of its own: it sees everything up to t and the pseudo states before it, and the base's own
head reads token t + j + 1 out of what becomes of it. The base's own slots never see a pseudo state.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.decoding.guess import Guess, Transfer
from seriatim.factorization.line import Line
from seriatim.layout import line
from seriatim.model import Model
from seriatim.posttraining.drafting import Base, DraftConfig, losses_ahead
from seriatim.posttraining.heads import AheadHeads
from seriatim.random import Generator


@dataclass(frozen=True)
class TransferConfig(DraftConfig):
    """heads: how many tokens are looked ahead; at: in front of which layers their states are made, never falling (as
    many as layers: behind the last; None: evenly from half the layers to three quarters of them); decay: how much less
    each further one counts in the loss; places: neighbouring tokens of each window whose states are moved ahead in a
    step of training, drawn anew each time (None: all, which takes longer)."""

    heads: int = 3
    at: tuple[int, ...] | None = None
    decay: float = 1.0
    places: int | None = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.at, int):
            object.__setattr__(self, "at", (self.at,))
        if self.heads < 1 or (self.places is not None and self.places < 1):
            raise ValueError(
                f"at least 1 token is looked ahead, from at least 1 place; got {self.heads}, {self.places}"
            )
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay lies above 0 and up to 1, got {self.decay}")

    def layers(self, depth: int) -> tuple[int, ...]:
        """In front of which layers of so many states are made. Raises ValueError where they do not fit."""
        if self.at is None:
            steps = max(self.heads - 1, 1)
            return tuple((2 * depth * steps + depth * j) // (4 * steps) for j in range(self.heads))
        falling = sorted(self.at) != list(self.at)  # a state sees those before it: they begin no later
        if len(self.at) != self.heads or falling or not 0 <= self.at[0] <= self.at[-1] <= depth:
            raise ValueError(
                f"`at` names a layer for each of {self.heads} states, 0 to {depth} and never falling, got {self.at}"
            )
        return tuple(self.at)


class HiddenTransfer(AheadHeads):
    """The maps. They begin as the identity: what is guessed of the next states is the present one."""

    key, Config = "hidden-transfer", TransferConfig
    config: Any

    def __init__(self, config: TransferConfig, base: Base):
        super().__init__(config, base)
        backbone = base.model.backbone
        if "layer" not in getattr(backbone, "skippable", ()) or backbone.config.relative is not None:
            raise ValueError(
                f"a state cannot be moved ahead in {base}: that takes attention in all layers, and scores that do not "
                "depend on a table of distances"
            )
        self.layers = config.layers(backbone.config.depth)
        eye = torch.eye(base.width, device=base.device)
        self.maps = nn.Parameter(eye.repeat(config.heads, 1, 1))

    def transfers(self) -> tuple[Transfer, ...]:
        """The maps with their layers, as a forward is told."""
        return tuple(Transfer(layer, matrix) for layer, matrix in zip(self.layers, self.maps, strict=True))

    def forward(self, pseudo: Float[Tensor, "*rest k d"]) -> Float[Tensor, "*rest k d"]:
        """What each head reads out: the pseudo states behind the last layer, as they are."""
        return pseudo

    def reads(self, base: Base, h: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n k d"]:
        return transferred(base.model, ids, self.transfers(), 0)[1]

    def loss(
        self, base: Base, h: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"], random: Generator
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Cross-entropy of what the base says behind the token that each pseudo state stands for, p(.|x_0 .. x_{t+j}):
        the divergence KL(base || guess) but for what the maps cannot change."""
        n, places, first = ids.shape[1], self.config.places, 0
        if places is not None:
            n = min(places + self.ahead + 1, n)  # the last ones stand for tokens beyond, and teach nothing
            first = int(torch.randint(ids.shape[1] - n + 1, (), generator=random.generator))
        x = transferred(base.model, ids[:, : first + n], self.transfers(), first)[1]
        ids, h = ids[:, first : first + n], h[:, first : first + n]
        return losses_ahead(self.output, x.to(h.dtype), ids, self.config.decay, h)


def transferred(
    model: Model, ids: Int[Tensor, "b n"], transfers: Sequence[Transfer], first: int
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b m k d"]]:
    """What becomes of the tokens of texts, and of the states of tokens `first`, ... that are moved ahead, in one
    forward: that of decoding a text which is known up to there, and whose rest is looked at as a draft."""
    order: Any = model.factorization
    n, known = ids.shape[1], first + 1
    canvas = model.canvas({"token": F.pad(ids, (0, 1))}, known, layout=line(n + 1))
    guess = Guess(ids[:, known:], spawn=tuple(transfers))
    plan: Any = Line(order.prefix, order.windows).step(canvas, guess, 0)  # the model's own would remember its shape
    h = model.hidden(plan, canvas, guess=guess)
    fed = plan.spawns[0].first
    return h[:, order.prefix : fed], h[:, fed:].unflatten(1, (len(transfers), n - first)).transpose(1, 2)


@torch.no_grad()
def similarities(part: HiddenTransfer, base: Base, ids: Int[Tensor, "b n"]) -> list[dict[int, float]]:
    """How near pseudo states come to the states that they stand for, on the way up: for each distance the mean cosine
    between the two, by how many layers they have behind them."""
    depth: int = base.model.backbone.config.depth  # type: ignore[assignment, union-attr]
    found: list[dict[int, float]] = [{} for _ in part.layers]
    for layers in range(max(part.layers[0], 1), depth + 1):
        there = [t for t in part.transfers() if t.layer <= layers]
        real, pseudo = transferred(_first_layers(base.model, layers), ids, there, 0)
        for j in range(len(there)):
            meant = real[:, j + 1 :].float()
            guessed = pseudo[:, : meant.shape[1], j].float()
            found[j][layers] = float(F.cosine_similarity(guessed, meant, -1).mean())
    return found


def _first_layers(model: Model, layers: int) -> Model:
    """The same model, ending behind so many layers (from 1) and without the last norm; the weights are shared."""
    cut, backbone = copy.copy(model), copy.copy(model.backbone)
    config: Any = backbone.config
    kinds = config.kinds if len(config.kinds) == 1 else config.kinds[:layers]
    rope = {k: v for k, v in config.rope.items() if k in kinds} if isinstance(config.rope, Mapping) else config.rope
    some = nn.ModuleList(list(backbone.layers)[:layers])  # type: ignore[arg-type]
    changed = replace(config, depth=layers, kinds=kinds, rope=rope, last_norm=False)
    backbone.__dict__ |= {"config": changed, "layers": some, "_modules": {**backbone._modules, "layers": some}}
    cut.__dict__ |= {"backbone": backbone, "_modules": {**model._modules, "backbone": backbone}}
    return cut
