"""Mamba-2 and attention in one stack (Bamba, IBM 2024; Waleffe et al. 2024, arXiv 2406.07887): most layers mix slots by
a state, some attend; each has a feed-forward network of its own.

It is the transformer with another mixer in some of its layers, and its cache is a cache of keys and values beside one
of states, which take each step together. What a state cannot honour (windows and entries that are forgotten) the whole
stack cannot, but for layers of another kind than "all", which may see less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.backbones.cache import Keep, KVCache
from seriatim.backbones.driven import Vector
from seriatim.backbones.layer import Layer, TransformerConfig, Weights
from seriatim.backbones.mamba import MIXER_MATRICES, MambaConfig, mix, mixer_parameters, path_of
from seriatim.backbones.state import StateCache
from seriatim.backbones.transformer import Context, Transformer
from seriatim.plan import OrderError, Plan
from seriatim.view import View

STATE = "state"  # the kind of a layer that mixes by a state; it sees what the view "all" shows


@dataclass(frozen=True)
class HybridConfig(TransformerConfig):
    """A transformer's, and: `attends`, which layers attend; `mixer`, sizes of the state-space mixers in all others (its
    depth is their number)."""

    attends: tuple[int, ...] = ()
    mixer: MambaConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = sorted(set(self.attends))
        if len(layers) != len(self.attends) or layers[:1] < [0] * bool(layers) or layers[-1:] >= [self.depth]:
            raise ValueError(f"layers that attend are named by different numbers below {self.depth}: {self.attends}")
        if self.mixer is None or self.mixer.width != self.width or self.mixer.depth != self.depth - len(layers):
            raise ValueError(
                f"{self.depth - len(layers)} of {self.depth} layers mix by states: give a mixer of that depth, "
                f"{self.width} wide, got {self.mixer}"
            )

    @property
    def attending(self) -> int:
        return len(self.attends)

    @property
    def numbers(self) -> int:
        assert self.mixer is not None
        return super().numbers + self.mixer.numbers


class StateLayer(Layer):
    """The parameters of a layer that mixes by a state: the mixer's in place of those of attention."""

    matrices = (*MIXER_MATRICES, "up", "down")

    def __init__(self, c: HybridConfig):
        super().__init__(c)
        assert c.mixer is not None
        for name in ("qkv", "qkv_bias", "q_norm", "k_norm", "q_norm_bias", "k_norm_bias"):
            self.register_parameter(name, None)
        for name, parameter in mixer_parameters(c.mixer).items():
            self.register_parameter(name, parameter)


class Hybrid(Transformer):
    """Layers over slots, some of which attend. `mixers` says what they honour: as soon as one mixes by a state, a
    sequence, packed samples, or a draft tree."""

    config: HybridConfig

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        kinds = list(self.each_kind)
        self.number: list[int] = []  # of each layer among those that mix as it does
        for i in range(config.depth):
            if i not in config.attends:
                self.layers[i], kinds[i] = StateLayer(config), STATE
            self.number.append(sum((kind == STATE) == (kinds[i] == STATE) for kind in kinds[:i]))
        self.each_kind = tuple(kinds)
        self.mixers = {**dict.fromkeys(config.kinds, "any"), "all": "scan"}
        self.skippable = frozenset({"feedforward"})  # a state takes in every slot

    def new_cache(self, batch: int, capacity: int = 256) -> HybridCache:  # type: ignore[override]
        """A cache for `batch` rows: keys and values of the layers that attend, states of the others."""
        assert self.config.mixer is not None
        first = next(layer for layer in self.layers if isinstance(layer, StateLayer))
        states = self.config.mixer.new_cache(batch, first.D.dtype, first.D.device)  # type: ignore[arg-type]
        return HybridCache(super().new_cache(batch, capacity), states)

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        plan: Plan,
        cache: Any = None,
        vector: Vector | None = None,
        memory: Float[Tensor, "b m e"] | None = None,
        there: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Contextualise slots, as a transformer does. Raises `OrderError` where a state cannot honour the plan."""
        if plan.layers is not None or plan.spawns:
            raise OrderError("a state takes in every slot in every layer, but this plan has slots that skip layers")
        return super().forward(x, plan, cache, vector, memory, there)

    def compile_decoding(self) -> None:
        """Nothing: a step of a recurrence is left as it is."""

    def _sights(self, plan: Plan, cache: HybridCache | None, x: Tensor, some: bool) -> dict[str, Any]:
        assert self.config.mixer is not None
        keys, states = (None, None) if cache is None else (cache.keys, cache.states)
        weights = [layer.weights() for layer in self.layers if isinstance(layer, StateLayer)]
        return super()._sights(plan, keys, x, some) | {STATE: path_of(plan, x, self.config.mixer, weights, states)}

    def _attend(self, i: int, w: Weights, h: Tensor, sight: Any, context: Context) -> Float[Tensor, "b s e"]:
        if self.each_kind[i] == STATE:
            assert self.config.mixer is not None
            return mix(self.config.mixer, w, h, sight, self.number[i])
        cache: Any = context.cache
        keys = context if cache is None else context._replace(cache=cache.keys)
        return super()._attend(self.number[i], w, h, sight, keys)


class HybridCache:
    """Keys and values of some layers, states of the others: what one cannot do, both cannot."""

    skips = False  # a state takes in every slot

    def __init__(self, keys: KVCache, states: StateCache):
        self.keys, self.states = keys, states
        self.can = keys.can & states.can

    @property
    def length(self) -> int | Tensor:
        return self.states.length

    @property
    def columns(self) -> int:
        return self.states.columns

    @property
    def batch(self) -> int:
        return self.states.batch

    @property
    def device(self) -> torch.device:
        return self.states.device

    @property
    def room(self) -> int | Tensor:
        return self.keys.room  # type: ignore[attr-defined]

    def compressed(self, codec: Any, capacity: int) -> HybridCache:
        return HybridCache(self.keys.compressed(codec, capacity), self.states)

    def labels(self, view: str) -> View | None:
        return self.keys.labels(view)

    def kept(self, name: str, source: Tensor) -> Any:
        return self.keys.kept(name, source)

    def keep(self, name: str, source: Tensor, value: Any) -> Any:
        return self.keys.keep(name, source, value)

    # the states come first: they refuse more, and then nothing has happened

    def begin(self, plan: Plan) -> None:
        self.states.begin(plan)
        self.keys.begin(plan)

    def commit(self, keep: Keep, plan: Plan) -> None:
        self.states.commit(keep, plan)
        self.keys.commit(keep, plan)

    def evict(self, retain: Int[Tensor, "#b m"]) -> None:
        self.states.evict(retain)
        self.keys.evict(retain)

    def select(self, rows: Int[Tensor, "b2"], new: Sequence[HybridCache] = ()) -> None:
        self.states.select(rows, [other.states for other in new])
        self.keys.select(rows, [other.keys for other in new])

    def join(self, others: Sequence[HybridCache]) -> None:
        self.states.join([other.states for other in others])
        self.keys.join([other.keys for other in others])

    def nbytes(self) -> int:
        return self.keys.nbytes() + self.states.nbytes()
