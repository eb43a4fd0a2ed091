"""A pre-norm transformer over slots: whom a slot sees is the plan's business, what it computes is here.

Normalisation (RMS or layer), rotary embedding from coordinates, grouped-query attention, SwiGLU or GELU, normalised
queries and keys, adaptive layer norm per sample or per slot (AdaLN-zero, Peebles & Xie 2022), cross-attention to a
memory. Training and decoding run the same function on tuples of weights: in a decoding step a tree of small modules
would cost a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seriatim.backbones.cache import KVCache
from seriatim.backbones.rope import RoPE, RotaryTable, rotate
from seriatim.plan import Plan


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of a transformer.

    `kinds` names the kind of each layer (its view in the plan); one name serves all layers. `vector` is the width of
    the conditioning vector for AdaLN, `memory` that of the memory for cross-attention (None: absent). `qk_norm` is
    "rms" (with weights) or "l2" (unit length, learned temperature a head, as in VAR).
    """

    width: int
    depth: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    norm: str = "rms"
    activation: str = "swiglu"
    rope: RoPE | None = None
    qk_norm: str | None = None
    vector: int | None = None
    memory: int | None = None
    bias: bool = False
    eps: float = 1e-5
    dropout: float = 0.0
    kinds: tuple[str, ...] = ("all",)

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "kv_heads", "head_dim", "hidden", "vector", "memory"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} is at least 1, got {size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share from 0 to below 1, got {self.dropout}")
        for name, value, allowed in (
            ("norm", self.norm, ("rms", "layer")),
            ("activation", self.activation, ("swiglu", "gelu", "gelu_tanh")),
            ("qk_norm", self.qk_norm, (None, "rms", "l2")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is one of {allowed}, got {value!r}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads evenly")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"a width of {self.width} does not divide into {self.heads} heads")
        if len(self.kinds) not in (1, self.depth):
            raise ValueError(f"kinds must name one kind, or one for each of {self.depth} layers")

    @cached_property
    def dim(self) -> int:
        return self.head_dim or self.width // self.heads

    @cached_property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @cached_property
    def inner(self) -> int:
        return self.hidden or (-(-8 * self.width // 3 // 8) * 8 if self.activation == "swiglu" else 4 * self.width)


Weights = dict[str, Any]  # of one layer, by name
NAMES = (
    *("norm1", "norm1_bias", "qkv", "qkv_bias", "out", "out_bias", "norm2", "norm2_bias", "up", "up_bias"),
    *("down", "down_bias", "q_norm", "k_norm", "ada", "ada_bias", "norm3", "cross_q", "cross_kv", "cross_out"),
)
LOG_100 = 4.605170185988092  # the largest logarithm of a learned temperature, as in VAR


class Context(NamedTuple):
    """What all layers of a forward share."""

    cache: KVCache | None
    rope: tuple[Tensor, Tensor] | None
    vector: Tensor | None
    memory: Tensor | None
    modulation: Sequence[Tensor] | None = None  # shifts, scales and gates of each layer and the last norm, if at hand


class Layer(nn.Module):
    """The parameters of one layer."""

    def __init__(self, c: TransformerConfig):
        super().__init__()
        d, hd = c.width, c.dim

        def matrix(rows: int, columns: int, std: float = 0.02) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns) * std)

        def optional(name: str, there: bool, value: Tensor) -> None:
            self.register_parameter(name, nn.Parameter(value) if there else None)

        affine, layer_norm = c.vector is None, c.norm == "layer"
        optional("norm1", affine, torch.ones(d))
        optional("norm1_bias", affine and layer_norm, torch.zeros(d))
        optional("norm2", affine, torch.ones(d))
        optional("norm2_bias", affine and layer_norm, torch.zeros(d))
        qkv = (c.heads + 2 * c.groups) * hd
        self.qkv, self.out = matrix(qkv, d), matrix(d, c.heads * hd, 0.02 / (2 * c.depth) ** 0.5)
        up = 2 * c.inner if c.activation == "swiglu" else c.inner
        self.up, self.down = matrix(up, d), matrix(d, c.inner, 0.02 / (2 * c.depth) ** 0.5)
        for name, size in (("qkv", qkv), ("out", d), ("up", up), ("down", d)):
            optional(name + "_bias", c.bias, torch.zeros(size))
        l2 = c.qk_norm == "l2"
        optional("q_norm", c.qk_norm is not None, torch.full((c.heads, 1), 4.0).log() if l2 else torch.ones(hd))
        optional("k_norm", c.qk_norm == "rms", torch.ones(hd))
        optional("ada", c.vector is not None, torch.zeros(6 * d, c.vector or 0))
        optional("ada_bias", c.vector is not None, torch.zeros(6 * d))
        optional("norm3", c.memory is not None, torch.ones(d))
        optional("cross_q", c.memory is not None, torch.randn(c.heads * hd, d) * 0.02)
        optional("cross_kv", c.memory is not None, torch.randn(2 * c.heads * hd, c.memory or 0) * 0.02)
        optional("cross_out", c.memory is not None, torch.randn(d, c.heads * hd) * 0.02)

    def weights(self) -> Weights:
        """By name. Read from the module's own table, at the cost of a dictionary, so that they are never stale."""
        if "parametrizations" in self._modules:  # computed from other parameters: a low-rank adapter, a masked matrix
            return {name: getattr(self, name) for name in NAMES}
        return self._parameters


class Transformer(nn.Module):
    """Layers over slots. `mixers` says what each kind of layer honours: here any visibility."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config, self.width = config, config.width
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        d, plain = config.width, config.vector is None  # with a vector, the last norm is adaptive too (VAR, DiT)
        self.norm = nn.Parameter(torch.ones(d)) if plain else None
        self.norm_bias = nn.Parameter(torch.zeros(d)) if plain and config.norm == "layer" else None
        self.ada = None if plain else nn.Parameter(torch.zeros(2 * d, config.vector or 0))
        self.ada_bias = None if plain else nn.Parameter(torch.zeros(2 * d))
        self.rotary = RotaryTable(config.rope, config.dim) if config.rope else None
        self.mixers = dict.fromkeys(config.kinds, "any")
        self.each_kind = config.kinds if len(config.kinds) > 1 else config.kinds * config.depth  # of each layer
        self._compiled: Callable[..., Tensor] | None = None
        self.__dict__.update(self._modules)  # at hand: torch's way to a part costs a call (assigning one undoes this)

    def new_cache(self, batch: int, capacity: int = 256) -> KVCache:
        """A cache for `batch` rows. On a CPU in bf16 it is float32: attention of one row is three times faster so."""
        weight: Tensor = self.layers[0].out  # type: ignore[union-attr, assignment]
        dtype = torch.float32 if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" else weight.dtype
        c = self.config
        return KVCache(c.depth, batch, c.groups, c.dim, dtype, weight.device, capacity, tuple(self.mixers))

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        plan: Plan,
        cache: KVCache | None = None,
        vector: Tensor | None = None,
        memory: Float[Tensor, "b m e"] | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Contextualise slots. `vector` is (b, e) or per slot (b, s, e). With a cache, entries are left pending."""
        c = self.config
        if x.shape[2] != c.width or x.shape[1] != plan.size:
            raise ValueError(f"this plan needs (batch, {plan.size}, {c.width}) vectors, got {tuple(x.shape)}")
        if (vector is None) != (c.vector is None):
            raise ValueError("this backbone " + ("needs a conditioning vector" if c.vector else "takes no vector"))
        if (memory is None) != (c.memory is None):
            raise ValueError(
                "this backbone attends to a memory; pass one (encoder states, text features)"
                if c.memory
                else "this backbone attends to no memory"
            )
        rotary = self.rotary
        rope = None if rotary is None else rotary.of(plan, x)
        if rope is not None and self.training and torch.is_autocast_enabled(x.device.type):
            narrow = torch.get_autocast_dtype(x.device.type)  # that of queries and keys: nothing is widened
            rope = rope[0].to(narrow), rope[1].to(narrow)
        if cache is not None:
            cache.begin(plan)
        some = plan.layers is not None or (cache is not None and cache.skips)
        masks: dict[str, Tensor | str | None] = {}
        for kind in self.mixers:
            mask = plan.attention(kind, cache)
            masks[kind] = _placed(mask, c, x, cache) if isinstance(mask, Tensor) and not some else mask
        modulation = None
        if vector is not None:
            condition, vector = vector, F.silu(vector if vector.dim() == 3 else vector[:, None])
            if cache is not None and condition.dim() == 2:
                modulation = cache.kept("modulation", condition)
                modulation = modulation or cache.keep("modulation", condition, self._modulation(vector))
        context = Context(cache, rope, vector, memory, modulation)
        if some:
            return self._some(x, plan, masks, context)
        if self._compiled is not None and cache is None and self.training:
            return self._compiled(x, masks, context)
        return self._all(x, masks, context)

    def compile_training(self) -> None:
        """Compile the layers as training runs them; decoding stays as it is."""
        self._compiled = torch.compile(self._all)

    def _all(self, x: Tensor, masks: dict[str, Tensor | str | None], context: Context) -> Tensor:
        c, vector = self.config, context.vector
        for i, layer in enumerate(self.layers._modules.values()):
            w = layer.weights() if layer._modules else layer._parameters  # type: ignore[operator, union-attr]
            x = self._layer(i, w, x, masks[self.each_kind[i]], context)
        return _normalise(c, x, self.norm, self.norm_bias) if vector is None else self._last(x, context)

    def _last(self, x: Tensor, context: Context) -> Tensor:
        """The norm before the head."""
        x = _normalise(self.config, x, self.norm, self.norm_bias)
        if context.vector is None:
            return x
        assert self.ada is not None
        of = context.modulation
        shift, scale = (F.linear(context.vector, self.ada, self.ada_bias) if of is None else of[-1]).chunk(2, -1)
        return torch.addcmul(shift, x, scale + 1)

    def _modulation(self, vector: Float[Tensor, "b s e"]) -> list[Tensor]:
        """What the vector says to every layer, and to the last norm."""
        assert self.ada is not None
        pairs: list[tuple[Any, Any]] = [(layer.ada, layer.ada_bias) for layer in self.layers]
        return [F.linear(vector, weight, bias) for weight, bias in (*pairs, (self.ada, self.ada_bias))]

    def _some(self, x: Tensor, plan: Plan, masks: dict[str, Tensor | str | None], context: Context) -> Tensor:
        """Layers that some of the slots skip: they keep what they have, and are not seen there."""
        c = self.config
        if plan.layers is not None and plan.layers.shape[0] != c.depth:
            raise ValueError(f"the plan names {plan.layers.shape[0]} layers, the backbone has {c.depth}")
        for i, layer in enumerate(self.layers):
            mask, ran = _partial(masks[self.each_kind[i]], plan, context.cache, i)
            if ran is None or bool(ran.any()):
                w = layer.weights()  # type: ignore[operator]
                y = self._layer(i, w, x, _placed(mask, c, x, context.cache), context)
                x = y if ran is None else torch.where(ran.to(x.device)[:, None], y, x)
        return self._last(x, context)

    def _layer(self, i: int, w: Weights, x: Tensor, mask: Tensor | str | None, context: Context) -> Tensor:
        c, vector = self.config, context.vector
        rms = c.norm == "rms"
        h = rms_norm(x, w["norm1"], c.eps) if rms else _normalise(c, x, w["norm1"], w["norm1_bias"])
        if vector is not None:
            of = context.modulation
            parts = F.linear(vector, w["ada"], w["ada_bias"]) if of is None else of[i]
            shift1, scale1, gate1, shift2, scale2, gate2 = parts.chunk(6, -1)
            h = torch.addcmul(shift1, h, scale1 + 1)
        h = F.linear(self._attend(i, w, h, mask, context), w["out"], w["out_bias"])
        if self.training and c.dropout:
            h = F.dropout(h, c.dropout)
        x = x + (h if vector is None else gate1 * h)
        if context.memory is not None:
            x = x + self._cross(i, w, x, context)
        h = rms_norm(x, w["norm2"], c.eps) if rms else _normalise(c, x, w["norm2"], w["norm2_bias"])
        if vector is not None:
            h = torch.addcmul(shift2, h, scale2 + 1)
        h = F.linear(h, w["up"], w["up_bias"])
        if c.activation == "swiglu":
            gate, up = h.chunk(2, -1)
            h = F.silu(gate) * up
        else:
            h = F.gelu(h, approximate="tanh" if c.activation == "gelu_tanh" else "none")
        h = F.linear(h, w["down"], w["down_bias"])
        if self.training and c.dropout:
            h = F.dropout(h, c.dropout)
        return x + (h if vector is None else gate2 * h)

    def _attend(
        self, i: int, w: Weights, h: Tensor, mask: Tensor | str | None, context: Context
    ) -> Float[Tensor, "b s hd"]:
        c, cache, rope = self.config, context.cache, context.rope
        b, n, _ = h.shape
        heads, groups, dim = c.heads, c.groups, c.dim
        qkv = F.linear(h, w["qkv"], w["qkv_bias"]).view(b, n, heads + 2 * groups, dim)
        qk, v = qkv.split_with_sizes((heads + groups, groups), 2)
        scale = None
        if c.qk_norm is not None:
            qk = _qk_norm(c, w, qk).to(v.dtype)  # autocast makes norms float32
            scale = 1.0 if c.qk_norm == "l2" else None
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.transpose(1, 2).split_with_sizes((heads, groups), 1)
        v = v.transpose(1, 2)
        dtype = q.dtype
        if cache is not None:
            k, v = cache.append(i, k, v)
            q = q.to(k.dtype)
        if groups == heads and not isinstance(mask, str) and not (self.training and _by_blocks(q)):
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        else:
            out = _attention(q, k, v, mask, scale)
        out = out.to(dtype)
        return (out if n == 1 else out.transpose(1, 2)).reshape(b, n, heads * dim)

    def _cross(self, i: int, w: Weights, x: Tensor, context: Context) -> Tensor:
        """Attention to a memory, whose keys and values a cache remembers."""
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
        q = F.linear(_normalise(c, x, w["norm3"], None), w["cross_q"]).view(b, n, c.heads, c.dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, both[0], both[1])
        return F.linear(out.transpose(1, 2).reshape(b, n, -1), w["cross_out"])


SMALL = 4096  # numbers; up to here the passes of a kernel cost more than the numbers


def rms_norm(x: Float[Tensor, "*rest d"], weight: Float[Tensor, "d"] | None, eps: float) -> Float[Tensor, "*rest d"]:
    """Divide vectors by their root mean square (Zhang & Sennrich 2019).

    On a CPU torch's own takes some seven passes, a tenth of the time of a small model's step; layer norm takes one, and
    of a vector beside its negative, whose mean is zero, it is the same.
    """
    d = x.shape[-1]
    if not x.is_cpu or x.numel() > SMALL:
        return torch.rms_norm(x, (d,), weight, eps)
    y = torch.layer_norm(torch.cat((x, -x), -1), (2 * d,), None, None, eps).narrow(-1, 0, d)
    return y if weight is None else y * weight


def _normalise(c: TransformerConfig, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if c.norm == "rms":
        return rms_norm(x, weight, c.eps)
    return F.layer_norm(x, (c.width,), weight, bias, c.eps)


def _qk_norm(c: TransformerConfig, w: Weights, qk: Float[Tensor, "b s h d"]) -> Tensor:
    if c.qk_norm == "rms":
        q = rms_norm(qk[:, :, : c.heads], w["q_norm"], c.eps)
        return torch.cat([q, rms_norm(qk[:, :, c.heads :], w["k_norm"], c.eps)], 2)
    qk = F.normalize(qk, dim=-1)
    q = qk[:, :, : c.heads] * w["q_norm"].clamp(max=LOG_100).exp()
    return torch.cat([q, qk[:, :, c.heads :]], 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | str | None, scale: float | None) -> Tensor:
    """Attention where heads share keys or the mask is "causal"; else `mask` is None or what `_placed` gives."""
    b, heads, n, d = q.shape
    groups = k.shape[1]
    if groups == heads and _by_blocks(q):
        return _attend_by_blocks(q, k, v, mask, scale)
    if isinstance(mask, str):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups < heads)
    # queries that share keys become rows of one head: no copy of the keys
    q = q.reshape(b, groups, heads // groups * n, d)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).reshape(b, heads, n, d)


BLOCK = 256  # queries that are attended together in training


def _by_blocks(q: Float[Tensor, "b h n d"]) -> bool:
    """Training in bf16 on a CPU, where torch's fused attention takes up to twice the time of products and a softmax;
    as long as the scores are small."""
    return q.is_cpu and q.dtype == torch.bfloat16 and q.requires_grad and q.shape[2] <= 4 * BLOCK


def _attend_by_blocks(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"], mask: Tensor | str | None,
    scale: float | None,
) -> Float[Tensor, "b h n d"]:  # fmt: skip
    """Attention, a block of queries at a time; where it is causal over the keys up to it: half of the products are
    never made."""
    n, d = q.shape[2:]
    q = q * (d**-0.5 if scale is None else scale)
    out = []
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        seen = end if isinstance(mask, str) else n
        scores = q[:, :, start:end] @ k[:, :, :seen].transpose(2, 3)
        if isinstance(mask, Tensor):
            scores += mask[:, :, start:end].to(q.dtype)
        elif mask is not None:
            scores[..., start:] += torch.full((end - start, end - start), -torch.inf, dtype=q.dtype).triu(1)
        out.append(torch.softmax(scores, -1) @ v[:, :, :seen])
    return torch.cat(out, 2)


def _placed(mask: Tensor, c: TransformerConfig, x: Tensor, cache: KVCache | None) -> Tensor | None:
    """The mask as attention wants it, once for all layers: where the vectors are, rows repeated for the queries that
    share a key-value head, and as what is added to the scores. None where a step of decoding sees everything."""
    if cache is not None and bool(mask.all()):
        return None
    mask = mask.to(x.device)
    if c.groups < c.heads:
        mask = mask.repeat(1, 1, c.heads // c.groups, 1)
    kind = x.dtype if cache is None else cache.buffer.dtype
    return torch.zeros(mask.shape, dtype=kind, device=x.device).masked_fill_(~mask, -torch.inf)


def _partial(
    mask: Tensor | str | None, plan: Plan, cache: KVCache | None, layer: int
) -> tuple[Bool[Tensor, "b 1 q k"], Bool[Tensor, "s"] | None]:
    """The mask in a layer that some slots skip: their keys are not there; and which of the new slots run."""
    n = plan.size
    old = 0 if cache is None else cache.columns
    ran = None if plan.layers is None else plan.layers[layer].cpu()
    if not isinstance(mask, Tensor):
        full = torch.ones(n, old + n, dtype=torch.bool)
        mask = (full if mask is None else full.tril(old))[None, None]
    known = None if cache is None else cache.computed(layer)
    known = torch.ones(1, old, dtype=torch.bool) if known is None else known
    new = torch.ones(n, dtype=torch.bool) if ran is None else ran
    there = torch.cat([known, new.expand(len(known), -1)], 1)
    own = torch.eye(n, old + n, dtype=torch.bool).roll(old, 1)
    return mask.cpu() & there[:, None, None] | own, ran
