"""A pre-norm transformer over slots: whom a slot sees is the plan's business, what it computes is here.

Normalisation (RMS or layer), rotary embedding from coordinates, grouped-query attention, SwiGLU or GELU, normalised
queries and keys, adaptive layer norm per sample or per slot (AdaLN-zero, Peebles & Xie 2022), cross-attention to a
memory. Training and decoding run the same function on tuples of weights: in a decoding step a tree of small modules
would cost a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
        for name, value, allowed in (
            ("norm", self.norm, ("rms", "layer")),
            ("activation", self.activation, ("swiglu", "gelu")),
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

    @property
    def dim(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def inner(self) -> int:
        return self.hidden or (4 * self.width if self.activation == "gelu" else -(-8 * self.width // 3 // 8) * 8)

    def kind(self, layer: int) -> str:
        return self.kinds[layer if len(self.kinds) > 1 else 0]


@dataclass(slots=True)
class _Weights:
    """One layer's weights, for fast access."""

    norm1: Tensor | None
    norm1_bias: Tensor | None
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    norm2: Tensor | None
    norm2_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    ada: Tensor | None
    ada_bias: Tensor | None
    norm3: Tensor | None
    cross_q: Tensor | None
    cross_kv: Tensor | None
    cross_out: Tensor | None


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

    def weights(self) -> _Weights:
        return _Weights(*(getattr(self, name) for name in _Weights.__slots__))


class Transformer(nn.Module):
    """Layers over slots. `mixers` says what each kind of layer honours: here any visibility."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.Parameter(torch.ones(config.width))
        self.norm_bias = nn.Parameter(torch.zeros(config.width)) if config.norm == "layer" else None
        self.rotary = RotaryTable(config.rope, config.dim) if config.rope else None
        self.mixers = dict.fromkeys(config.kinds, "any")
        self._weights = [layer.weights() for layer in self.layers]  # type: ignore[operator]

    def new_cache(self, batch: int, capacity: int = 256) -> KVCache:
        """A cache for `batch` rows. On a CPU in bf16 it is float32: attention of one row is three times faster so."""
        weight = self.norm
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
        if (vector is None) != (c.vector is None):
            raise ValueError("this backbone " + ("needs a conditioning vector" if c.vector else "takes no vector"))
        rope = None if self.rotary is None else _rope(self.rotary, plan, x)
        if cache is not None:
            cache.begin(plan)
        masks = {kind: plan.attention(kind, cache) for kind in self.mixers}
        if vector is not None:
            vector = F.silu(vector if vector.dim() == 3 else vector[:, None])
        partial = plan.layers is not None or (cache is not None and cache.computed(0) is not None)
        for i, w in enumerate(self._weights):
            mask = masks[c.kind(i)]
            ran = None
            if partial:
                mask, ran = _partial(mask, plan, cache, i, x)
                if ran is not None and not bool(ran.any()):
                    continue
            y = self._layer(i, w, x, mask, cache, rope, vector, memory)
            x = y if ran is None else torch.where(ran[:, None], y, x)
        return _normalise(c, x, self.norm, self.norm_bias)

    def _layer(
        self,
        i: int,
        w: _Weights,
        x: Tensor,
        mask: Tensor | str | None,
        cache: KVCache | None,
        rope: tuple[Tensor, Tensor] | None,
        vector: Tensor | None,
        memory: Tensor | None,
    ) -> Tensor:
        c = self.config
        h = _normalise(c, x, w.norm1, w.norm1_bias)
        if w.ada is not None:
            assert vector is not None
            shift1, scale1, gate1, shift2, scale2, gate2 = F.linear(vector, w.ada, w.ada_bias).chunk(6, -1)
            h = torch.addcmul(shift1, h, scale1 + 1)
        h = F.linear(self._attend(i, w, h, mask, cache, rope), w.out, w.out_bias)
        if self.training and c.dropout:
            h = F.dropout(h, c.dropout)
        x = x + (h if w.ada is None else gate1 * h)
        if w.cross_q is not None:
            x = x + self._cross(w, x, memory)
        h = _normalise(c, x, w.norm2, w.norm2_bias)
        if w.ada is not None:
            h = torch.addcmul(shift2, h, scale2 + 1)
        h = F.linear(h, w.up, w.up_bias)
        if c.activation == "swiglu":
            gate, up = h.chunk(2, -1)
            h = F.silu(gate) * up
        else:
            h = F.gelu(h)
        h = F.linear(h, w.down, w.down_bias)
        if self.training and c.dropout:
            h = F.dropout(h, c.dropout)
        return x + (h if w.ada is None else gate2 * h)

    def _attend(
        self, i: int, w: _Weights, h: Tensor, mask: Tensor | str | None, cache: KVCache | None, rope
    ) -> Float[Tensor, "b s hd"]:
        c = self.config
        b, n, _ = h.shape
        heads, groups = c.heads, c.groups
        qkv = F.linear(h, w.qkv, w.qkv_bias).view(b, n, heads + 2 * groups, c.dim)
        qk, v = qkv[:, :, : heads + groups], qkv[:, :, heads + groups :].transpose(1, 2)
        scale = None
        if w.q_norm is not None:
            qk = _qk_norm(c, w, qk)
            scale = 1.0 if c.qk_norm == "l2" else None
        if rope is not None:
            qk = rotate(qk, *rope)
        qk = qk.transpose(1, 2)
        q, k = qk[:, :heads], qk[:, heads:]
        dtype = q.dtype
        if cache is not None:
            k, v = cache.append(i, k, v)
            q = q.to(k.dtype)
        out = _attention(q, k, v, mask, scale)
        return out.to(dtype).transpose(1, 2).reshape(b, n, heads * c.dim)

    def _cross(self, w: _Weights, x: Tensor, memory: Tensor | None) -> Tensor:
        if memory is None:
            raise ValueError("this backbone attends to a memory; pass one (encoder states, text features)")
        assert w.cross_q is not None and w.cross_kv is not None and w.cross_out is not None
        c = self.config
        b, n, _ = x.shape
        q = F.linear(_normalise(c, x, w.norm3, None), w.cross_q).view(b, n, c.heads, c.dim).transpose(1, 2)
        k, v = F.linear(memory, w.cross_kv).view(b, -1, 2, c.heads, c.dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return F.linear(out.transpose(1, 2).reshape(b, n, -1), w.cross_out)


def _normalise(c: TransformerConfig, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if c.norm == "rms":
        return F.rms_norm(x, (c.width,), weight, c.eps)
    return F.layer_norm(x, (c.width,), weight, bias, c.eps)


def _qk_norm(c: TransformerConfig, w: _Weights, qk: Float[Tensor, "b s h d"]) -> Tensor:
    assert w.q_norm is not None
    if c.qk_norm == "rms":
        q = F.rms_norm(qk[:, :, : c.heads], (c.dim,), w.q_norm, c.eps)
        return torch.cat([q, F.rms_norm(qk[:, :, c.heads :], (c.dim,), w.k_norm, c.eps)], 2)
    qk = F.normalize(qk, dim=-1)
    q = qk[:, :, : c.heads] * w.q_norm.clamp(max=4.6052).exp()
    return torch.cat([q, qk[:, :, c.heads :]], 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | str | None, scale: float | None) -> Tensor:
    """Attention with shared key-value heads; `mask` is None (see all), "causal", or boolean (b, 1, q, k)."""
    b, heads, n, d = q.shape
    groups = k.shape[1]
    if isinstance(mask, str):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups < heads)
    if groups == heads:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    share = heads // groups  # queries that share keys become rows of one head: no copy of the keys
    q = q.reshape(b, groups, share * n, d)
    if mask is not None:
        mask = mask.repeat(1, 1, share, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).reshape(b, heads, n, d)


def _rope(table: RotaryTable, plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
    run = plan.run
    if run is None:
        return table.at(plan.slots.coord.to(x.device), x.dtype)
    start, offset = run
    if offset is None:
        return table.run(start, plan.size, x.dtype, x.device)
    return table.offsets(start, offset, x.dtype, x.device)


def _partial(
    mask: Tensor | str | None, plan: Plan, cache: KVCache | None, layer: int, x: Tensor
) -> tuple[Tensor, Bool[Tensor, "s"] | None]:
    """The mask in a layer that some slots skip: their keys are not there; and which of the new slots run."""
    n = plan.size
    old = 0 if cache is None else cache.columns
    ran = None if plan.layers is None else plan.layers[layer].to(x.device)
    there = torch.ones(old + n, dtype=torch.bool, device=x.device)
    if cache is not None and cache.computed(layer) is not None:
        there[:old] = cache.computed(layer)
    if ran is not None:
        there[old:] = ran
    if not isinstance(mask, Tensor):
        full = torch.ones(n, old + n, dtype=torch.bool, device=x.device)
        mask = (full if mask is None else full.tril(old))[None, None]
    own = torch.eye(n, old + n, dtype=torch.bool, device=x.device).roll(old, 1)
    return mask & there | own, ran


def mixers_of(backbone: nn.Module) -> Mapping[str, str]:
    """What each kind of layer honours: any, causal, scan or full."""
    return getattr(backbone, "mixers", {"all": "any"})
