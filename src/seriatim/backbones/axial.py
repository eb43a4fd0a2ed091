"""Attention along one axis at a time, in three stages (Axial Transformer, Ho et al. 2019, arXiv 1912.12180).

A layer looks along rows or along columns: over a square of N slots at N times the root of N pairs in place of N
squared. Layers of the first stage see what earlier channels hold, whole rows and columns; those of the second whole
rows, and columns down to their own row; those of the third their row up to themselves. Between stages, what became of a
slot is added to others (`factorization.axes`). A forward over whole channels folds all other rows or columns into the
batch and makes no masks; a step of decoding goes by its plan, over a cache of keys, values and what is handed on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seriatim.backbones.attention import placed
from seriatim.backbones.cache import KVCache
from seriatim.backbones.driven import Vector
from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.transformer import Context, Sight, Transformer
from seriatim.factorization.axes import (
    COLUMN,
    DOWN,
    EARLIER,
    EARLIER_COLUMN,
    EARLIER_ROW,
    INNER,
    LEFT,
    ROW,
    TOLD,
    UPPER,
    Size,
)
from seriatim.plan import OrderError, Plan

HANDED = {UPPER: (TOLD,), INNER: (TOLD, DOWN)}  # what is added to slots of a stage before its layers
HANDS_ON = {EARLIER: TOLD, UPPER: DOWN}
COLUMNS = (COLUMN, EARLIER_COLUMN)


def kinds_of(earlier: int, upper: int, inner: int) -> tuple[str, ...]:
    """The kinds of so many layers of each stage, rows first. Raises ValueError for numbers that do not alternate."""
    if min(earlier, upper) < 0 or earlier % 2 or upper % 2 or upper + inner < 1 or inner < 0:
        raise ValueError(
            f"layers along rows and columns take turns, so there is an even number of them in both outer stages; got "
            f"{earlier}, {upper} and {inner}"
        )
    return (EARLIER_ROW, EARLIER_COLUMN) * (earlier // 2) + (ROW, COLUMN) * (upper // 2) + (LEFT,) * inner


@dataclass(frozen=True)
class AxialConfig(TransformerConfig):
    """A transformer's, whose `kinds` are those of `kinds_of`. No vector, memory or angles; heads share no keys."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vector or self.memory or self.rope or self.relative or self.groups != self.heads or self.head_dim:
            raise ValueError("axial layers have heads of their own, and neither vector, memory nor angles")

    @property
    def attending(self) -> int:
        """Layers that remember, and what is handed on between stages."""
        return self.depth + 2


class Axial(Transformer):
    """Layers over slots in three stages. `mixers` says what they honour: any visibility."""

    config: AxialConfig

    def __init__(self, config: AxialConfig):
        super().__init__(config)
        self.each_kind = config.kinds if len(config.kinds) == config.depth else config.kinds * config.depth
        self.stages = (EARLIER, UPPER, INNER) if EARLIER_ROW in config.kinds else (UPPER, INNER)
        self.handed = (TOLD, DOWN) if len(self.stages) == 3 else (DOWN,)
        self.mixers = dict.fromkeys((*config.kinds, *self.handed), "any")
        self.skippable = frozenset()

    @cached_property
    def layers_of(self) -> dict[int, list[int]]:
        """The numbers of the layers of each stage."""
        stage = {EARLIER_ROW: EARLIER, EARLIER_COLUMN: EARLIER, ROW: UPPER, COLUMN: UPPER, LEFT: INNER}
        return {s: [i for i, kind in enumerate(self.each_kind) if stage[kind] == s] for s in self.stages}

    def compile_decoding(self) -> None:
        """Nothing: steps differ in what they compute."""

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        plan: Plan,
        cache: KVCache | None = None,
        vector: Vector | None = None,
        memory: Float[Tensor, "b m e"] | None = None,
        there: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Contextualise slots of an order of `factorization.axes`. With a cache, entries are left pending."""
        if vector is not None or memory is not None:
            raise ValueError("an axial transformer takes a condition as a prefix only")
        if plan.layers is not None or plan.spawns or plan.route is not None:
            raise OrderError("axial layers compute all slots of their stage, but this plan has slots that skip layers")
        if cache is not None:
            cache.begin(plan)
        grids: Size | None = plan.grids if cache is None else None
        if grids is not None and plan.size == len(self.stages) * grids[0] * grids[1] * grids[2]:
            x = self._compiled(x, grids) if self._compiled is not None and self.training else self._whole(x, grids)
        else:
            x = self._step(x, plan, cache)
        return self._last(x, Context(None, None, None))

    def compile_training(self) -> None:
        """Compile the layers as training runs them; decoding stays as it is."""
        self._compiled = torch.compile(self._whole)  # type: ignore[assignment]

    # ---- whole channels ----------------------------------------------------------------------------------------------

    def _whole(self, x: Float[Tensor, "b s d"], grids: Size) -> Float[Tensor, "b s d"]:
        parts = dict(zip(self.stages, x.chunk(len(self.stages), 1), strict=True))
        told = None
        for stage in self.stages:
            h = parts[stage] if told is None else parts[stage] + told
            if stage == INNER:
                h = h + _shifted_down(parts[UPPER], grids)
            for i in self.layers_of[stage]:
                h = self._along(i, h, grids)
            parts[stage] = h
            told = h if stage == EARLIER else told
        return torch.cat([parts[stage] for stage in self.stages], 1)

    def _along(self, i: int, h: Float[Tensor, "b s d"], grids: Size) -> Float[Tensor, "b s d"]:
        """A layer over lines, each for itself."""
        kind, w, (_, rows, columns) = self.each_kind[i], self.layers[i].weights(), grids  # type: ignore[operator]
        sight = Sight("causal" if kind in (COLUMN, LEFT) else None, None)
        context = Context(None, None, None)
        b, s, d = h.shape
        if kind not in COLUMNS:
            return self._layer(i, w, h.reshape(-1, columns, d), sight, context).view(b, s, d)
        upright = h.view(-1, rows, columns, d).transpose(1, 2).reshape(-1, rows, d)
        y = self._layer(i, w, upright, sight, context)
        return y.view(-1, columns, rows, d).transpose(1, 2).reshape(b, s, d)

    # ---- any slots ---------------------------------------------------------------------------------------------------

    def _step(self, x: Float[Tensor, "b s d"], plan: Plan, cache: KVCache | None) -> Float[Tensor, "b s d"]:
        made: dict[str, Tensor] = {}
        stages = plan.slots.coord[..., 0]
        for stage in self.stages:
            mine = (stages == stage).any(0).nonzero()[:, 0].to(x.device)
            if len(mine):
                h = x[:, mine]
                for kind in HANDED.get(stage, ()):
                    if kind in self.handed:
                        h = h + _taken(made[kind], plan.attention(kind, cache), mine)
                there = (stages == stage)[:, mine.cpu(), None].to(x.device)
                h = torch.where(there, self._layers(stage, h, mine, plan, cache), x[:, mine])
                x = x.index_copy(1, mine, h)
            elif cache is not None:
                self._nothing(self.layers_of[stage], x, cache)
            if stage in HANDS_ON:
                made[HANDS_ON[stage]] = self._hand_on(HANDS_ON[stage], x, cache)
        return x

    def _layers(
        self, stage: int, h: Float[Tensor, "b m d"], mine: Int[Tensor, "m"], plan: Plan, cache: KVCache | None
    ) -> Float[Tensor, "b m d"]:
        masks: dict[str, Any] = {}
        context = Context(None if cache is None else _Part(cache, mine, plan.size), None, None)
        for i in self.layers_of[stage]:
            kind = self.each_kind[i]
            if kind not in masks:
                mask: Any = plan.attention(kind, cache)
                mask = mask[:, :, mine.cpu()]
                mask = mask if cache is not None else mask[..., mine.cpu()]
                masks[kind] = Sight(placed(mask, self.config, h, cache), None)
            h = self._layer(i, self.layers[i].weights(), h, masks[kind], context)  # type: ignore[operator]
        return h

    def _nothing(self, layers: list[int], x: Float[Tensor, "b s d"], cache: KVCache) -> None:
        """No slot of this forward has entries in these layers; what nobody sees is finite all the same."""
        nothing = x.new_zeros(len(x), self.config.heads, x.shape[1], self.config.dim)
        for i in layers:
            cache.append(i, nothing, nothing)

    def _hand_on(self, kind: str, x: Float[Tensor, "b s d"], cache: KVCache | None) -> Float[Tensor, "b k d"]:
        """What all slots so far have become: those that are remembered, then those of this forward."""
        if cache is None:
            return x
        values = x.unflatten(2, (self.config.heads, self.config.dim)).transpose(1, 2)
        _, all_ = cache.append(self.config.depth + (TOLD, DOWN).index(kind), torch.zeros_like(values), values)
        if kind == DOWN and len(self.handed) == 1:
            self._nothing([self.config.depth], x, cache)
        return all_.transpose(1, 2).flatten(2).to(x.dtype)


def _shifted_down(h: Float[Tensor, "b s d"], grids: Size) -> Float[Tensor, "b s d"]:
    """Each row to the next one; zeros come first."""
    maps = h.view(-1, *grids[1:], h.shape[2])
    return nn.functional.pad(maps[:, :-1], (0, 0, 0, 0, 1, 0)).reshape(h.shape)


def _taken(
    made: Float[Tensor, "b k d"], seen: Bool[Tensor, "b 1 q k"] | Any, mine: Int[Tensor, "m"]
) -> Float[Tensor, "b m d"]:
    """What each of these slots is handed by the one other slot that it sees; zeros where it sees none."""
    before = seen.shape[3] - seen.shape[2]
    seen = seen[:, 0, mine.cpu()].clone()
    seen[:, torch.arange(len(mine)), before + mine.cpu()] = False
    where = seen.long().argmax(2).to(made.device).expand(len(made), -1)
    taken = made.gather(1, where[..., None].expand(-1, -1, made.shape[2]))
    return taken * seen.any(2)[..., None].to(taken)


class _Part:
    """A cache as layers meet it that compute some of a forward's slots."""

    def __init__(self, cache: KVCache, mine: Int[Tensor, "m"], size: int):
        self.cache, self.mine, self.size = cache, mine, size

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*k.shape[:2], self.size, k.shape[3])
        k, v = (x.new_zeros(shape).index_copy(2, self.mine, x) for x in (k, v))
        return self.cache.append(layer, k, v)


__all__ = ["Axial", "AxialConfig", "kinds_of"]
