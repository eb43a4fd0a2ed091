"""Attention inside of a scale, a state across all of them, in every layer (M-VAR, Ren et al. 2024, arXiv 2411.10433).

A layer has three branches: attention, whose slots see what the view "own" shows, a Mamba-2 mixer, which takes in the
slots of the view "all" one after the other, and a feed-forward network. Each has an adaptive norm in front of it and a
gate behind: nine vectors a layer where a transformer has six. The state is the only way from one scale to the next, so
it is all that a cache holds: it is as large after a thousand scales as after one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seriatim.backbones.driven import Vector, modulation
from seriatim.backbones.layer import Layer, TransformerConfig, Weights, weights_of
from seriatim.backbones.mamba import MIXER_MATRICES, MambaConfig, Path, mix, mixer_parameters, path_of
from seriatim.backbones.norm import normalise
from seriatim.backbones.quantize import Quantizable
from seriatim.backbones.state import StateCache
from seriatim.backbones.transformer import Context, Sight, Transformer
from seriatim.plan import OrderError, Plan

OWN = "own"  # the kind of layer that attends; its slots see nothing of other times


@dataclass(frozen=True)
class DecoupledConfig(TransformerConfig):
    """A transformer's, driven by a vector, and the sizes of its `mixer`s, one in every layer. Its layers attend by the
    view "own", and mix by the view "all"."""

    kinds: tuple[str, ...] = (OWN,)
    mixer: MambaConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixer is None or (self.mixer.width, self.mixer.depth) != (self.width, self.depth):
            raise ValueError(
                f"each of {self.depth} layers mixes by a state: give a mixer of that depth, {self.width} wide, got "
                f"{self.mixer}"
            )
        if self.vector is None or self.memory is not None or self.kinds != (OWN,):
            raise ValueError(f"branches are driven by a vector, read no memory, and attend by the view {OWN!r}")

    @property
    def numbers(self) -> int:
        assert self.mixer is not None
        return super().numbers + self.mixer.numbers


class Mixer(Quantizable):
    """The parameters of one mixer, what drives it included."""

    matrices = MIXER_MATRICES

    def __init__(self, c: DecoupledConfig):
        super().__init__()
        assert c.mixer is not None
        for name, parameter in mixer_parameters(c.mixer).items():
            self.register_parameter(name, parameter)
        self.ada = nn.Parameter(torch.zeros(3 * c.width, c.vector or 0))
        self.ada_bias = nn.Parameter(torch.zeros(3 * c.width))

    def weights(self) -> Weights:
        return self.quantized() if self._formats else weights_of(self)


class DecoupledLayer(Layer):
    """The parameters of one layer: a transformer's, and a mixer's."""

    def __init__(self, c: DecoupledConfig):
        super().__init__(c)
        self.mixer = Mixer(c)


class Both(NamedTuple):
    """What the slots of a scale see of it, and whose state each goes on from, with the weights of all mixers."""

    sight: Sight
    path: Path
    mixers: list[Weights]


class Decoupled(Transformer):
    """Layers over slots. `mixers` says what they honour: any visibility within a step by attention, a sequence, packed
    samples or a draft tree by the state."""

    config: DecoupledConfig
    between = True

    def __init__(self, config: DecoupledConfig):
        super().__init__(config)
        for i in range(config.depth):
            self.layers[i] = DecoupledLayer(config)
        self.mixers = {OWN: "any", "all": "scan"}
        self.skippable = frozenset({"feedforward"})  # a state takes in every slot

    def new_cache(self, batch: int, capacity: int = 0) -> DecoupledCache:  # type: ignore[override]
        """The states of `batch` rows, whatever `capacity`."""
        assert self.config.mixer is not None
        like: Any = self.layers[0].mixer.D  # type: ignore[union-attr]
        return self.config.mixer.new_cache(batch, like.dtype, like.device, DecoupledCache)  # type: ignore[return-value]

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        plan: Plan,
        cache: Any = None,
        vector: Vector | None = None,
        memory: Float[Tensor, "b m e"] | None = None,
        there: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Contextualise slots, as a transformer does. Raises `OrderError` where a state cannot honour the plan, or
        where layers that attend would have to remember."""
        if plan.layers is not None or plan.spawns:
            raise OrderError("a state takes in every slot in every layer, but this plan has slots that skip layers")
        return super().forward(x, plan, cache, vector, memory, there)

    def compile_decoding(self) -> None:
        """Nothing: a step of a recurrence is left as it is."""

    def _sights(self, plan: Plan, cache: DecoupledCache | None, x: Tensor, some: bool) -> dict[str, Any]:
        assert self.config.mixer is not None
        mixers = [layer.mixer.weights() for layer in self.layers]  # type: ignore[operator, union-attr]
        path = path_of(plan, x, self.config.mixer, mixers, cache)
        return {OWN: Both(super()._sights(plan, None, x, False)[OWN], path, mixers)}

    def _modulation(self, vector: Vector) -> list[Tensor]:
        *layers, last = super()._modulation(vector)
        of: list[Any] = [layer.mixer for layer in self.layers]
        return [*layers, *(modulation(vector, mixer.ada, mixer.ada_bias, 3) for mixer in of), last]

    def _attend(self, i: int, w: Weights, h: Tensor, sight: Any, context: Context) -> Float[Tensor, "b s hd"]:
        return super()._attend(i, w, h, sight.sight, context._replace(cache=None))

    def _between(self, i: int, w: Weights, x: Tensor, sight: Any, context: Context) -> Float[Tensor, "b s d"]:
        """What the state says, behind attention and before the feed-forward network."""
        c, mixer, vector, of = self.config, sight.mixers[i], context.vector, context.modulation
        assert c.mixer is not None and vector is not None
        parts = modulation(vector, mixer["ada"], mixer["ada_bias"], 3) if of is None else of[c.depth + i]
        shift, scale, gate = parts.chunk(3, -1)
        h = torch.addcmul(shift, normalise(c.norm, x, None, None, c.eps), scale + 1)
        h = context.product(mix(c.mixer, mixer, h, sight.path, i), mixer["out"], mixer["out_bias"])
        if self.training and c.dropout:
            h = F.dropout(h, c.dropout)
        return gate * h


class DecoupledCache(StateCache):
    """The state of each layer after all slots that a row has taken in."""

    skips = False  # a state takes in every slot

    def __init__(self, *sizes: Any):
        super().__init__(*sizes)
        self._kept: dict[str, tuple[Tensor, Any]] = {}

    def begin(self, plan: Plan) -> None:
        own = plan.views.get(OWN)
        if own is not None and bool(((own.dies > own.at + 1) | (own.born < own.at)).any()):
            raise OrderError(
                f"keys and values are not kept, but view {OWN!r} shows slots to other times than their own; decode "
                "without a cache, or let slots see their own rank alone (`own_rank`)"
            )
        super().begin(plan)

    def kept(self, name: str, source: Tensor) -> Any:
        """What was kept under this name of this very tensor; None where it was of another, or nothing."""
        of, value = self._kept.get(name, (None, None))
        return value if of is source else None

    def keep(self, name: str, source: Tensor, value: Any) -> Any:
        """Remember what follows from a condition that stays the same over the steps; returns it."""
        self._kept[name] = source, value
        return value


__all__ = ["OWN", "Decoupled", "DecoupledCache", "DecoupledConfig", "DecoupledLayer", "Mixer"]
