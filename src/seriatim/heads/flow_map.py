"""Whole maps of vectors by a rectified flow whose network sees the map: a small diffusion transformer.

Each vector of a map has a hidden state, and the network attends within the map. FlowAR (Ren et al. 2024, arXiv
2412.15205): the state enters at its own place, by adaptive norms of each position ("Spatial-adaLN"). Time and steps are
those of `heads.flow`; what is drawn jointly is a map: the elements that are read together and share a map number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.heads.denoiser import FREQUENCIES, precise, time_features
from seriatim.heads.dist import drawn
from seriatim.heads.flow import CLOCK, Flow, FlowConfig
from seriatim.initial import drawn as initial
from seriatim.layout import Layout
from seriatim.plan import DERIVED, Plan, Reads, Slots
from seriatim.random import Key, Random
from seriatim.view import timed


@dataclass(frozen=True)
class MapFlowConfig(FlowConfig):
    """Sizes and choices of a flow over maps, beside those of a flow.

    hidden, blocks: of the transformer, with so many `heads`. inject: how hidden states enter, "spatial" by the norms of
    their own position, "pooled" by those of all positions of the map, as their mean, or "concat" beside the noisy
    values.
    """

    hidden: int = 128
    blocks: int = 3
    heads: int = 4
    inject: Literal["spatial", "pooled", "concat"] = "spatial"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inject not in ("spatial", "pooled", "concat"):
            raise ValueError(f"states enter as 'spatial', 'pooled' or 'concat', not {self.inject!r}")
        if self.draws != 1:
            raise ValueError("a map is trained by one draw of noise a forward; enlarge the batch instead")


class MapSizes(Protocol):
    """What a network over maps asks of a config, as in `MapFlowConfig`."""

    @property
    def hidden(self) -> int: ...

    @property
    def blocks(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def inject(self) -> str: ...


class MapDenoiser(nn.Module):
    """From noisy maps to velocities (or the noise in them), given time and a hidden state at each position. Gates and
    output start at zero. places: how many a map has, for a plain transformer with learned positions (0: rotary)."""

    def __init__(self, width: int, dim: int, c: MapSizes, places: int = 0):
        super().__init__()
        half = c.hidden // c.heads // 2
        self.inject = c.inject
        self.value, self.state = nn.Linear(dim, c.hidden), nn.Linear(width, c.hidden)
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, c.hidden), nn.SiLU(), nn.Linear(c.hidden, c.hidden))
        self.position = nn.Parameter(initial(places, c.hidden)) if places else None
        rotary: dict[str, Any] = {"rope": RoPE(axes=(half, half)), "qk_norm": "rms"}
        plain: dict[str, Any] = {"norm": "layer", "activation": "gelu_tanh", "bias": True, "eps": 1e-6}
        config = TransformerConfig(c.hidden, c.blocks, c.heads, vector=c.hidden, **(plain if places else rotary))
        self.transformer, self.out = Transformer(config), nn.Linear(c.hidden, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def told(self, h: Float[Tensor, "b m w"], plan: Plan) -> tuple[Tensor | None, Tensor | None]:
        """What hidden states say to the norms, and beside the values."""
        state = self.state(h)
        if self.inject == "concat":
            return None, state
        if self.inject == "pooled":
            here = plan.views["all"].mask()[0].to(state)
            state = (here / here.sum(1, keepdim=True)) @ state
        return state, None

    def forward(
        self, x: Float[Tensor, "b m d"], t: Float[Tensor, "b m"] | float, told: tuple[Tensor | None, Tensor | None],
        plan: Plan,
    ) -> Float[Tensor, "b m d"]:  # fmt: skip
        """t: from 0 (noise) to 1, the same in all positions of a map."""
        weight = self.value.weight
        clock = torch.as_tensor(CLOCK * t, dtype=weight.dtype, device=weight.device)  # a step's number stays one
        driven = self.time(time_features(clock)).expand(*x.shape[:2], -1)
        norms, beside = told
        x = self.value(x.to(weight.dtype))
        x = x if self.position is None else x + self.position
        x = x if beside is None else x + beside
        driven = driven if norms is None else driven + norms
        return self.out(self.transformer(x, plan, None, driven))


class MapFlow(Flow):
    """The joint law of the maps that are read. Draw 0 of an element is the noise it starts from; guidance mixes
    velocities."""

    __slots__ = ("plan",)

    def __init__(
        self, head: Any, states: Float[Tensor, "k b m d"], weights: Sequence[float | Tensor] = (1.0,),
        warper: Any = None, plan: Plan | None = None,
    ):  # fmt: skip
        super().__init__(head, states, weights, warper)
        self.plan = plan

    def _with(self, states: Float[Tensor, "k b m d"], weights: Sequence[float | Tensor], warper: Any) -> Self:
        return type(self)(self.head, states, weights, warper, self.plan)

    def take(self, index: Int[Tensor, "b m"]) -> Self:
        raise TypeError("a map is drawn as a whole: take a decider that decides everything it reads (SampleAll)")

    def velocities(self) -> Callable[[Tensor, float], Tensor]:
        net, k = self.head.net, len(self.weights)
        told = net.told(self.states.flatten(0, 1), self.plan)

        def velocity(x: Tensor, t: float) -> Tensor:
            said = net(x.repeat(k, 1, 1), t, told, self.plan)
            return self.combine(said.unflatten(0, (k, -1)).to(x.dtype))

        return velocity


class MapFlowHead(nn.Module):
    """Maps of vectors of `dim` numbers from hidden states of `width`.

    layout: elements with the same first of three coordinates (a scale, a frame) are a map; of two coordinates (a grid)
    all are one. `config` may be replaced at any time by one that samples in another way.
    """

    exact = False
    continuous = True

    def __init__(self, width: int, dim: int, layout: Layout, config: MapFlowConfig | None = None):
        super().__init__()
        self.config = config or MapFlowConfig()
        self.net = MapDenoiser(width, dim, self.config)
        self.width, self.dim, self.value_shape = width, dim, (dim,)
        coord = layout.coord
        self.map = coord[:, 0] if coord.shape[1] > 2 else torch.zeros_like(coord[:, 0])
        self.place = coord[:, -2:]
        self._plans: dict[tuple[int, ...], Plan] = {}

    def plan(self, element: Int[Tensor, "#b m"]) -> Plan:
        """The forward of the network over these elements: each sees those of its map. Raises ValueError where rows read
        different ones."""
        if not bool((element == element[:1]).all()):
            raise ValueError("rows of a batch read the same elements of a map; give them the same known parts")
        key = tuple(element[0].tolist())
        if key not in self._plans:
            if len(self._plans) > 64:
                self._plans.clear()
            with torch.inference_mode(False):
                e = torch.tensor([key])
                at, nothing = e.clamp(min=0)[0], torch.zeros(1, 0, dtype=torch.long)
                carried, source = torch.full((*e.shape, 1), -1), torch.full_like(e, DERIVED)
                slots = Slots(carried, source, self.place[at][None], torch.full_like(e, -1))
                view = timed(torch.zeros_like(e), lane=torch.where(e < 0, -1, self.map[at]))
                self._plans[key] = Plan(slots, {"all": view}, Reads(nothing, nothing), nothing)
        return self._plans[key]

    def dist(self, h: Float[Tensor, "b m w"], reads: Reads, canvas: Canvas) -> MapFlow:
        return MapFlow(self, h[None], plan=self.plan(reads.element))

    def loss(
        self,
        h: Float[Tensor, "b m w"],
        reads: Reads,
        value: Float[Tensor, "b m d"],
        random: Random | None = None,
        key: Key | None = None,
    ) -> Float[Tensor, "b m"]:
        """Squared error of the predicted velocity, mean over numbers, at one time for each map."""
        if random is None or key is None:
            raise TypeError("the loss of MapFlowHead is an expectation over noise: pass random= to Model.losses")
        plan, (b, m, _) = self.plan(reads.element), h.shape
        first = plan.views["all"].mask()[0].int().argmax(1).to(h.device)  # of the map of each read-out
        t = self.config.time(random.uniform((b, m), key, h.device))[:, first].to(precise(h))
        noise = random.normal((b, m, self.dim), drawn(key, 1), h.device).to(precise(h))
        value = value.to(h.device, precise(h))
        said = self.net(torch.lerp(noise, value, t[..., None]), t, self.net.told(h, plan), plan)
        return (said.to(precise(h)) - (value - noise)).square().mean(-1)
