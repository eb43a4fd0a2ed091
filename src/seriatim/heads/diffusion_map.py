"""Whole maps of vectors by a diffusion whose network sees the map, known places and all: a small diffusion transformer.

Hi-MAR (Zheng et al. 2025, arXiv 2505.20288): where many elements of a map are decided in one step, each by itself, they
do not know of each other. Here all of the map is denoised together, each place driven by its own hidden state
(`heads.flow_map`), and of that any part may be taken: what was known is drawn along, and left aside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seriatim.canvas import DECIDED, Canvas
from seriatim.heads.denoiser import precise
from seriatim.heads.diffusion import Diffusion, DiffusionConfig, Process, process
from seriatim.heads.dist import drawn
from seriatim.heads.flow import CLOCK
from seriatim.heads.flow_map import MapDenoiser
from seriatim.layout import Layout
from seriatim.plan import DERIVED, Plan, Reads, Slots
from seriatim.random import VALUE, Key, Random, numbered
from seriatim.view import full


@dataclass(frozen=True)
class MapDiffusionConfig(DiffusionConfig):
    """Sizes and choices of a diffusion over a map, beside those of a diffusion; hidden, blocks, heads, inject: of the
    transformer, as in `MapFlowConfig`. placed: it is plain, as published (layer norms and biases), with a learned
    vector for each place in place of rotary positions. anchored: known places stand in each step as what they are and
    their first noise, as in the released code; else they are drawn along.
    """

    hidden: int = 512
    blocks: int = 6
    heads: int = 8
    inject: Literal["spatial", "pooled", "concat"] = "spatial"
    steps: int = 250
    draws: int = 1
    learned_variance: bool = False
    placed: bool = False
    anchored: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inject not in ("spatial", "pooled", "concat"):
            raise ValueError(f"states enter as 'spatial', 'pooled' or 'concat', not {self.inject!r}")
        if self.draws != 1 or self.learned_variance:
            raise ValueError("a map is trained by one draw of noise a forward, and its variance is not learned")


class MapDiffusion(Diffusion):
    """The joint law of a map, and of any part of it that is taken (`picks`; None: all). `turn` (b, 1): how much of it
    is decided, so that each step draws noise of its own. `known`: which places are, and what (None: all are drawn)."""

    __slots__ = ("known", "picks", "turn")

    def __init__(
        self, head: Any, states: Float[Tensor, "k b m d"], weights: Sequence[float | Tensor] = (1.0,),
        warper: Any = None, turn: Int[Tensor, "b 1"] | int = 0, picks: Int[Tensor, "b n"] | None = None,
        known: tuple[Bool[Tensor, "b m 1"], Float[Tensor, "b m d"]] | None = None,
    ):  # fmt: skip
        super().__init__(head, states, weights, warper)
        self.turn, self.picks, self.known = turn, picks, known

    def _with(self, states: Float[Tensor, "k b m d"], weights: Sequence[float | Tensor], warper: Any) -> Self:
        return type(self)(self.head, states, weights, warper, self.turn, self.picks, self.known)

    def take(self, index: Int[Tensor, "b m"]) -> Self:
        picks = index.clamp(min=0) if self.picks is None else self.picks.gather(1, index.clamp(min=0))
        return type(self)(self.head, self.states, self.weights, self.warper, self.turn, picks, self.known)

    def sample(self, random: Random, key: Key) -> Float[Tensor, "b m d"]:
        whole = super().sample(
            random, Key(key.row, self.head.elements[None], numbered(VALUE, torch.as_tensor(self.turn)))
        )
        if self.picks is None:
            return whole
        picks = self.picks.to(whole.device).expand(len(whole), -1)
        return whole.gather(1, picks[..., None].expand(-1, -1, whole.shape[2]))

    def held(self, x: Float[Tensor, "b m d"], first: Float[Tensor, "b m d"], signal: float) -> Float[Tensor, "b m d"]:
        if self.known is None:
            return x
        there, value = self.known
        return torch.where(there, math.sqrt(signal) * value.to(x) + math.sqrt(1 - signal) * first, x)

    def predictions(self, p: Process) -> Callable[[Tensor, int], Float[Tensor, "k b m out"]]:
        net, k = self.head.net, len(self.weights)
        told = net.told(self.states.flatten(0, 1), self.head.plan)

        def predicted(x: Tensor, i: int) -> Tensor:
            said = net(x.repeat(k, 1, 1), int(p.time[i]) / CLOCK, told, self.head.plan)
            return said.unflatten(0, (k, -1)).to(x.dtype)

        return predicted


class MapDiffusionHead(nn.Module):
    """A map of vectors of `dim` numbers from the hidden states, of `width`, of all its places.

    elements: of the layout that make up the map, in the order in which their states are handed over, known ones too
    (`Reads.slot` says where they stand; what is not read has no element). The loss is that of all of them (`whole`),
    since all are denoised. `config` may be replaced at any time by one that samples in another way.
    """

    exact = False
    continuous = True
    whole = True

    def __init__(
        self, width: int, dim: int, layout: Layout, elements: Int[Tensor, "m"], config: MapDiffusionConfig | None = None
    ):
        super().__init__()
        self.config = config or MapDiffusionConfig()
        self.net = MapDenoiser(width, dim, self.config, len(elements) if self.config.placed else 0)
        self.width, self.dim, self.value_shape, self.elements = width, dim, (dim,), elements
        m = len(elements)
        nobody, nothing = torch.full((1, m), -1), torch.zeros(1, 0, dtype=torch.long)
        slots = Slots(nobody[..., None], torch.full_like(nobody, DERIVED), layout.coord[elements][None, :, -2:], nobody)
        self.plan = Plan(slots, {"all": full(m)}, Reads(nothing, nothing), nothing)

    def _check(self, h: Tensor) -> None:
        if h.shape[1] != len(self.elements):
            raise ValueError(
                f"this map has {len(self.elements)} places, and the states of {h.shape[1]} were handed over: an order "
                "reads all of them in one step, known ones too"
            )

    def dist(self, h: Float[Tensor, "b m w"], reads: Reads, canvas: Canvas) -> MapDiffusion:
        self._check(h)
        turn, known = (canvas.status[:, self.elements] == DECIDED).sum(1, keepdim=True), None
        if self.config.anchored:
            (kind,) = canvas.layout.kinds
            known = canvas.known[:, self.elements, None].to(h.device), canvas.value[kind][:, self.elements].to(h.device)
        return MapDiffusion(self, h[None], turn=turn, known=known)

    def loss(
        self,
        h: Float[Tensor, "b m w"],
        reads: Reads | None,
        value: Float[Tensor, "b m d"],
        random: Random | None = None,
        key: Key | None = None,
    ) -> Float[Tensor, "b m"]:
        """Squared error of the predicted noise, mean over numbers, at one step of the diffusion for each map."""
        if random is None or key is None:
            raise TypeError("the loss of MapDiffusionHead is an expectation over noise: pass random= to Model.losses")
        self._check(h)
        (b, m, _), p = h.shape, process(self.config.train_steps, self.config.train_steps)
        step = (random.uniform((b, m), key, h.device)[:, :1] * len(p.time)).long()
        noise = random.normal((b, m, self.dim), drawn(key, 1), h.device).to(precise(h))
        signal = p.signal.to(noise)[step][..., None]
        x = signal.sqrt() * value.to(noise) + (1 - signal).sqrt() * noise
        said = self.net(x, (step / CLOCK).to(noise).expand(-1, m), self.net.told(h, self.plan), self.plan)
        return (said.to(noise) - noise).square().mean(-1)
