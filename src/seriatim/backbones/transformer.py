"""A transformer over slots: whom a slot sees is the plan's business, what it computes is here.

Norms before or behind each branch or behind its sum, rotary embedding from coordinates, grouped-query attention, gated
and plain feed-forward networks and mixtures of them, normalised queries and keys, adaptive layer norm per sample or per
slot (AdaLN-zero, Peebles & Xie 2022), cross-attention to a memory. Training and decoding run the same function on
tuples of weights: in a decoding step a tree of small modules would cost a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seriatim.backbones.attention import attend, fast_to_attend, normalise_heads, partial, placed
from seriatim.backbones.cache import KVCache
from seriatim.backbones.driven import Vector, active, modulation
from seriatim.backbones.feedforward import activate, mixture
from seriatim.backbones.layer import Layer, TransformerConfig, Weights
from seriatim.backbones.norm import normalise, rms_norm
from seriatim.backbones.quantize import linear, refuse_packed
from seriatim.backbones.relative import with_distances
from seriatim.backbones.rope import RotaryTable, rotate
from seriatim.backbones.route import Route
from seriatim.compiling import compiled
from seriatim.initial import drawn
from seriatim.plan import OrderError, Plan


class Sight(NamedTuple):
    """What the layers of one kind see, and how they turn queries and keys."""

    mask: Tensor | str | None
    rope: tuple[Tensor, Tensor] | None


class Context(NamedTuple):
    """What all layers of a forward share."""

    cache: Any  # of all layers, or the entry of one
    vector: Vector | None
    memory: Tensor | None
    there: Tensor | None = None  # (b, 1, 1, m): places of the memory that are no padding
    modulation: Sequence[Tensor] | None = None  # shifts, scales and gates of each layer and the last norm, if at hand
    product: Callable[..., Tensor] = F.linear  # with matrices; `linear` knows all formats, at the cost of a call
    route: Any = None  # of a forward whose slots skip feed-forward networks
    condition: Vector | None = None  # the vector as it came, before its activation


class Transformer(nn.Module):
    """Layers over slots. `mixers` says what each kind of layer honours: here any visibility."""

    kept_as = "modulation"  # the name by which a cache keeps what a condition says to every layer
    between = False  # is there a third branch, other than attention to a memory?
    watch: Callable[[int, Tensor, Tensor, Tensor | str | None], None] | None = None  # is shown layer, q, k and mask
    below = 0  # layers of another stack whose keys and values stand in the same cache, before those of this one

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config, self.width = config, config.width
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        if not config.first_norm:
            for name in ("norm1", "norm1_bias"):
                self.layers[0].register_parameter(name, None)
        d, plain = config.width, config.vector is None  # with a vector, the last norm is adaptive too (VAR, DiT)
        there = (plain or config.scaled) and config.last_norm
        self.norm = nn.Parameter(torch.ones(d)) if there else None
        self.norm_bias = nn.Parameter(torch.zeros(d)) if there and config.norm == "layer" else None
        plain = plain or not config.last_norm
        self.ada = None if plain else nn.Parameter(torch.zeros(2 * d, config.vector or 0))
        self.ada_bias = None if plain else nn.Parameter(torch.zeros(2 * d))
        r = config.relative
        self.relative = None if r is None else nn.Parameter(drawn(r.buckets, config.heads))
        ropes = config.rope if isinstance(config.rope, Mapping) else dict.fromkeys(config.kinds, config.rope)
        tables = {rope: RotaryTable(rope, config.dim) for rope in ropes.values() if rope is not None}
        self.rotary = {kind: None if rope is None else tables[rope] for kind, rope in ropes.items()}
        self.mixers = dict.fromkeys(config.kinds, "any")
        self.skippable: frozenset[str] = frozenset({"layer", "feedforward"})  # blocks that a route may lead around
        self.each_kind = config.kinds if len(config.kinds) > 1 else config.kinds * config.depth  # of each layer
        self._compiled: Callable[..., Tensor] | None = None
        self._compiled_layer: Callable[..., Tensor] | None = None
        self.__dict__.update(self._modules)  # at hand: torch's way to a part costs a call (assigning one undoes this)

    def new_cache(self, batch: int, capacity: int = 256) -> KVCache:
        """A cache for `batch` rows, in the format in which attention over it is fast (`fast_to_attend`)."""
        c, dtype, device = self.config, self.format, next(self.parameters()).device
        if dtype == torch.bfloat16 and not (c.softcap is None and fast_to_attend(dtype, device.type)):
            dtype = torch.float32
        return KVCache(c.attending, batch, c.groups, c.dim, dtype, device, capacity, tuple(self.mixers))

    @property
    def format(self) -> torch.dtype:
        """That of activations."""
        weight = self.layers[0].weights()["out"]  # type: ignore[operator]
        return weight[-1].dtype if isinstance(weight, tuple) else weight.dtype  # integers have scales in it

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        plan: Plan,
        cache: KVCache | None = None,
        vector: Vector | None = None,
        memory: Float[Tensor, "b m e"] | None = None,
        there: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Contextualise slots. `vector` is (b, e), per slot (b, s, e) or by groups of slots; `there`: places of the
        memory that are seen (None: all). With a cache, entries are left pending."""
        c = self.config
        fed = plan.spawns[0].first if plan.spawns else plan.size
        if x.shape[2] != c.width or x.shape[1] != fed:
            raise ValueError(f"this plan needs (batch, {fed}, {c.width}) vectors, got {tuple(x.shape)}")
        if (vector is None) != (c.vector is None):
            raise ValueError("this backbone " + ("needs a conditioning vector" if c.vector else "takes no vector"))
        if (memory is None) != (c.memory is None):
            raise ValueError(
                "this backbone attends to a memory; pass one (encoder states, text features)"
                if c.memory
                else "this backbone attends to no memory"
            )
        if cache is not None:
            cache.begin(plan)
        some = bool(plan.spawns) or plan.layers is not None or (cache is not None and cache.skips)
        sights = self._sights(plan, cache, x, some)
        modulation, condition = None, vector
        if vector is not None:
            vector = active(vector)
            if cache is not None and isinstance(condition, Tensor) and condition.dim() == 2:
                modulation = cache.kept(self.kept_as, condition)
                modulation = modulation or cache.keep(self.kept_as, condition, self._modulation(vector))
        seen = None if there is None else there[:, None, None]
        context = Context(cache, vector, memory, seen, modulation, condition=condition)
        if plan.spawns:
            return self._growing(x, plan, sights, context)
        if some:
            return self._some(x, plan, sights, context)
        if plan.route is not None:
            return self._routed(x, plan.route, sights, context)
        if self._compiled is not None and cache is None and self.training:
            return self._compiled(x, sights, context)
        return self._all(x, sights, context)

    def _sights(self, plan: Plan, cache: Any, x: Tensor, some: bool) -> dict[str, Any]:
        """What each kind of layer sees; `some`: masks are still to be narrowed layer by layer."""
        sights: dict[str, Any] = {}
        turns: dict[RotaryTable | None, Any] = {None: None}
        for kind, table in self.rotary.items():
            mask = plan.attention(kind, cache)
            if table is not None and table not in turns:
                turns[table] = self._turns(table, plan, x)
            mask = placed(mask, self.config, x, cache) if isinstance(mask, Tensor) and not some else mask
            if self.relative is not None:
                if some:
                    raise OrderError("scores that depend on distance are of slots in all layers; this plan skips some")
                dtype, r = x.dtype if cache is None else cache.dtype, self.config.relative
                mask = with_distances(r, self.relative, mask, plan, kind, cache, dtype)  # type: ignore[arg-type]
            sights[kind] = Sight(mask, turns[table])
        return sights

    def _turns(self, table: RotaryTable, plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
        rope = table.of(plan, x)
        if self.training and torch.is_autocast_enabled(x.device.type):
            narrow = torch.get_autocast_dtype(x.device.type)  # that of queries and keys: nothing is widened
            rope = rope[0].to(narrow), rope[1].to(narrow)
        return rope

    def compile_training(self) -> None:
        """Compile the layers as training runs them; decoding stays as it is."""
        self._compiled = torch.compile(self._all)

    def compile_decoding(self) -> None:
        """Compile the step of one slot a row: one graph for all layers of a kind, so that it takes seconds. Layers that
        route to experts, are conditioned, or differ in their norms stay as they are. Raises ValueError where weights
        are packed."""
        refuse_packed(self)
        c = self.config
        if c.experts is None and c.memory is None and c.vector is None and c.first_norm:
            self._compiled_layer = compiled(self._layer)

    def _all(self, x: Tensor, sights: dict[str, Sight], context: Context) -> Tensor:
        cache, step = context.cache, self._compiled_layer
        if step is not None and cache is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            for i, layer in enumerate(self.layers):
                alone = Context(cache.entry(i), None, None, product=linear)
                x = step(0, layer.weights(), x, sights[self.each_kind[i]], alone)  # type: ignore[operator]
            return self._last(x, context)
        for i, layer in enumerate(self.layers._modules.values()):
            special = layer._modules or layer._formats  # type: ignore[union-attr]
            w = layer.weights() if special else layer._parameters  # type: ignore[operator, union-attr]
            if special and context.product is F.linear:
                context = context._replace(product=linear)
            x = self._layer(i, w, x, sights[self.each_kind[i]], context)
        return self._last(x, context)

    def _last(self, x: Tensor, context: Context) -> Tensor:
        """The norm before the head."""
        if not self.config.last_norm:
            return x
        x = normalise(self.config.norm, x, self.norm, self.norm_bias, self.config.eps)
        if context.vector is None:
            return x
        assert self.ada is not None
        of = context.modulation
        shift, scale = (modulation(context.vector, self.ada, self.ada_bias, 2) if of is None else of[-1]).chunk(2, -1)
        return torch.addcmul(shift, x, scale + 1)

    def _modulation(self, vector: Vector) -> list[Tensor]:
        """What the vector says to every layer, and to the last norm."""
        of: list[tuple[Any, Any, int]] = [(layer.ada, layer.ada_bias, 6) for layer in self.layers]
        last = [] if self.ada is None else [(self.ada, self.ada_bias, 2)]
        return [modulation(vector, *one) for one in (*of, *last)]

    def _some(self, x: Tensor, plan: Plan, sights: dict[str, Sight], context: Context) -> Tensor:
        """Layers that some of the slots skip: they keep what they have, and are not seen there."""
        c, context = self.config, context._replace(product=linear)
        if plan.layers is not None and plan.layers.shape[0] != c.depth:
            raise ValueError(f"the plan names {plan.layers.shape[0]} layers, the backbone has {c.depth}")
        for i, layer in enumerate(self.layers):
            sight = sights[self.each_kind[i]]
            mask, ran = partial(sight.mask, plan, context.cache, i)
            if ran is None or bool(ran.any()):
                w = layer.weights()  # type: ignore[operator]
                y = self._layer(i, w, x, Sight(placed(mask, c, x, context.cache), sight.rope), context)
                x = y if ran is None else torch.where(ran.to(x.device)[:, None], y, x)
        return self._last(x, context)

    def _growing(self, x: Tensor, plan: Plan, sights: dict[str, Sight], context: Context) -> Tensor:
        """Slots that begin on the way: between two such layers the forward is one of those that are there by then."""
        c, cache, context = self.config, context.cache, context._replace(product=linear)
        if plan.layers is not None or plan.route is not None or (cache is not None and cache.skips):
            raise OrderError("slots that begin on the way are in a forward that skips no layers; this one does")
        starts = [*(spawn.layer for spawn in plan.spawns), c.depth]
        if min(starts) < 0 or starts != sorted(starts):
            raise OrderError(f"slots begin in front of layers 0 to {c.depth}, in their order; got {starts[:-1]}")
        layers: list[Any] = list(self.layers._modules.values())
        old, at = 0 if cache is None else cache.columns, 0
        for begins, start in enumerate(starts):
            n = x.shape[1]
            if at < start:
                if cache is not None:
                    cache.reach(n)
                near = {kind: _first(sight, n, old, c, x, cache) for kind, sight in sights.items()}
                for i in range(at, start):
                    x = self._layer(i, layers[i].weights(), x, near[self.each_kind[i]], context)
            if begins < len(plan.spawns):
                spawn = plan.spawns[begins]
                source = spawn.source.to(x.device)[..., None].expand(len(x), -1, x.shape[2])
                x = torch.cat([x, F.linear(x.gather(1, source), spawn.matrix.to(x.dtype))], 1)
            at = start
        return self._last(x, context)

    def _routed(self, x: Tensor, route: Route, sights: dict[str, Sight], context: Context) -> Tensor:
        """Blocks that a route leads around: they keep what they have, and weights that nobody needs are not read."""
        whole, cache, step = route.blocks == "layer", context.cache, self._compiled_layer
        alone = step is not None and whole and cache is not None and x.shape[1] == 1 and not torch.is_grad_enabled()
        context = context._replace(product=linear, route=None if whole else route)
        for i, layer in enumerate(self.layers):
            if whole and not route.enters(i, x):
                continue
            w, sight = layer.weights(), sights[self.each_kind[i]]  # type: ignore[operator]
            if alone:
                y = step(0, w, x, sight, Context(cache.entry(i), None, None, product=linear))  # type: ignore[misc]
            else:
                y = self._layer(i, w, x, sight, context)
            x = route.leaves(i, x, y) if whole else y
        return self._last(x, context)

    def _layer(self, i: int, w: Weights, x: Tensor, sight: Sight, context: Context) -> Tensor:
        c, vector, route = self.config, context.vector, context.route
        rms, came = c.norm == "rms", x
        h = x
        if c.pre and (i or c.first_norm):
            h = rms_norm(x, w["norm1"], c.eps) if rms else normalise("layer", x, w["norm1"], w["norm1_bias"], c.eps)
        if vector is not None:
            of = context.modulation
            parts = modulation(vector, w["ada"], w["ada_bias"], 6) if of is None else of[i]
            shift1, scale1, gate1, shift2, scale2, gate2 = parts.chunk(6, -1)
            h = torch.addcmul(shift1, h, scale1 + 1)
        h = context.product(self._attend(i, w, h, sight, context), w["out"], w["out_bias"])
        if w["post1"] is not None:
            h = normalise(c.norm, h, w["post1"], None, c.eps)
        if self.training and c.dropout:
            h = F.dropout(h, c.dropout)
        x = x + (h if vector is None else gate1 * h)
        if c.place == "sum":
            x = normalise(c.norm, x, w["norm1"], w["norm1_bias"], c.eps)
        if self.between or context.memory is not None:
            x = x + self._between(i, w, x, sight, context)
        if route is not None and not route.enters(i, x):
            return x
        h = came if c.parallel else x
        if c.pre:
            h = rms_norm(h, w["norm2"], c.eps) if rms else normalise("layer", h, w["norm2"], w["norm2_bias"], c.eps)
        if vector is not None:
            h = torch.addcmul(shift2, h, scale2 + 1)
        if c.experts is not None:
            h = mixture(c.experts, c.activation, w, h)
        else:
            h = context.product(h, w["up"], w["up_bias"])
            if c.activation == "swiglu":
                gate, up = h.chunk(2, -1)
                h = F.silu(gate) * up
            else:
                h = activate(c.activation, h)
            if self.training and c.inner_dropout:
                h = F.dropout(h, c.inner_dropout)
            h = context.product(h, w["down"], w["down_bias"])
        if w["post2"] is not None:
            h = normalise(c.norm, h, w["post2"], None, c.eps)
        if self.training and c.dropout:
            h = F.dropout(h, c.dropout)
        y = x + (h if vector is None else gate2 * h)
        if c.place == "sum":
            y = normalise(c.norm, y, w["norm2"], w["norm2_bias"], c.eps)
        return y if route is None else route.leaves(i, x, y)

    def _attend(self, i: int, w: Weights, h: Tensor, sight: Sight, context: Context) -> Float[Tensor, "b s hd"]:
        c, cache = self.config, context.cache
        mask, rope = sight
        b, n, _ = h.shape
        heads, groups, dim = c.heads, c.groups, c.dim
        qkv = context.product(h, w["qkv"], w["qkv_bias"]).view(b, n, heads + 2 * groups, dim)
        qk, v = qkv.split_with_sizes((heads + groups, groups), 2)
        if c.qk_norm is not None:
            qk = normalise_heads(c, w, qk).to(v.dtype)  # autocast makes norms float32
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.transpose(1, 2).split_with_sizes((heads, groups), 1)
        v = v.transpose(1, 2)
        dtype = q.dtype
        if cache is not None:
            k, v = cache.append(i + self.below, k, v)
            q = q.to(k.dtype)
        if self.watch is not None:
            self.watch(i, q, k, mask)
        if groups == heads and not isinstance(mask, str) and not self.training and c.softcap is None:
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=c.score_scale)
        else:
            out = attend(c, q, k, v, mask, self.training)
        out = out.to(dtype)
        return (out if n == 1 else out.transpose(1, 2)).reshape(b, n, heads * dim)

    def _between(self, i: int, w: Weights, x: Tensor, sight: Sight, context: Context) -> Tensor:
        """Attention to a memory, whose keys and values a cache remembers: a branch between the two others."""
        c, cache, memory = self.config, context.cache, context.memory
        assert memory is not None
        b, n, _ = x.shape
        both = None if cache is None else cache.kept(f"cross {i}", memory)
        if both is None:
            if memory.shape[0] not in (1, b):
                raise ValueError(f"a memory of {memory.shape[0]} rows does not fit a batch of {b}")
            both = F.linear(memory, w["cross_kv"]).unflatten(-1, (2, c.heads, c.dim)).permute(2, 0, 3, 1, 4)
            both = both.expand(-1, b, -1, -1, -1)
            if cache is not None:
                cache.keep(f"cross {i}", memory, both)
        q = (
            F.linear(normalise(c.norm, x, w["norm3"], None, c.eps), w["cross_q"])
            .view(b, n, c.heads, c.dim)
            .transpose(1, 2)
        )
        scale = None if c.qk_norm == "l2" else c.score_scale  # a learned temperature is of normalised queries
        out = F.scaled_dot_product_attention(q, both[0], both[1], context.there, scale=scale)
        return F.linear(out.transpose(1, 2).reshape(b, n, -1), w["cross_out"])


def _first(sight: Sight, n: int, old: int, c: TransformerConfig, x: Tensor, cache: Any) -> Sight:
    """What the first n slots of a forward see of each other and of `old` cached entries."""
    mask, rope = sight
    assert isinstance(mask, Tensor)
    turned = None if rope is None else (rope[0].narrow(-3, 0, n), rope[1].narrow(-3, 0, n))
    return Sight(placed(mask[:, :, :n, : old + n], c, x, cache), turned)
