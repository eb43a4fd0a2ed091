"""What a transformer is made of: its config, and the parameters of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.backbones.quantize import Quantizable
from seriatim.backbones.relative import Relative
from seriatim.backbones.rope import RoPE
from seriatim.initial import drawn

MATRICES = ("qkv", "out", "up", "down")
GATED = ("swiglu", "geglu", "geglu_tanh")  # the first half of `up` is a gate on the second


@dataclass(frozen=True)
class Experts:
    """Feed-forward networks of which a router picks some for each slot (Shazeer et al. 2017, arXiv 1701.06538).

    count: how many there are; active: how many work; hidden: width of each; normalised: the shares of those that work
    add up to 1.
    """

    count: int
    active: int
    hidden: int
    normalised: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.count or self.hidden < 1:
            raise ValueError(f"{self.active} of {self.count} experts of width {self.hidden} cannot work")


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of a transformer.

    `kinds` names the kind of each layer (its view in the plan); one name serves all layers. `rope` turns queries and
    keys of all layers, or of each kind (a mapping; None: not at all). `vector` is the width of the conditioning vector
    for AdaLN, `memory` that of the memory for cross-attention (None: absent). `qk_norm` is "rms" (with weights, within
    a head), "rms_all" (over all heads together), "layer" (within a head, with weights and biases) or "l2" (unit length,
    learned temperature a head, as in VAR). `dropout` is of branches, `inner_dropout` of what an activation gives.
    `place` says where norms stand: "pre" (before each branch), "post" (behind it, before it is added), "both", or "sum"
    (behind the addition, as in Vaswani et al. 2017). `parallel`: both branches read what came into the layer. `bias`:
    of all matrices, none, or those named. `score_scale`: of queries times keys (None: 1 over the root of the head's
    dimension). `softcap` bounds scores. `relative`: they depend on distance, in all layers alike. `experts` stand in
    place of one feed-forward network. `first_norm`, `last_norm`: whether a norm stands before the first branch of all,
    and behind the last layer (a layer that goes on in the states of another model may have neither). `scaled`: norms
    have weights beside what a conditioning vector says (without one they always have).
    """

    width: int
    depth: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    norm: str = "rms"
    place: str = "pre"
    parallel: bool = False
    activation: str = "swiglu"
    rope: RoPE | Mapping[str, RoPE | None] | None = None
    qk_norm: str | None = None
    vector: int | None = None
    memory: int | None = None
    bias: bool | tuple[str, ...] = False
    score_scale: float | None = None
    softcap: float | None = None
    relative: Relative | None = None
    experts: Experts | None = None
    eps: float = 1e-5
    dropout: float = 0.0
    inner_dropout: float = 0.0
    kinds: tuple[str, ...] = ("all",)
    first_norm: bool = True
    last_norm: bool = True
    scaled: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "kv_heads", "head_dim", "hidden", "vector", "memory"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} is at least 1, got {size}")
        for rate in (self.dropout, self.inner_dropout):
            if not 0 <= rate < 1:
                raise ValueError(f"dropout is a share from 0 to below 1, got {rate}")
        for name, value, allowed in (
            ("norm", self.norm, ("rms", "layer")),
            ("place", self.place, ("pre", "post", "both", "sum")),
            ("activation", self.activation, (*GATED, "gelu", "gelu_tanh", "relu", "silu")),
            ("qk_norm", self.qk_norm, (None, "rms", "rms_all", "layer", "l2")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is one of {allowed}, got {value!r}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads evenly")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"a width of {self.width} does not divide into {self.heads} heads")
        if len(self.kinds) not in (1, self.depth):
            raise ValueError(f"kinds must name one kind, or one for each of {self.depth} layers")
        if isinstance(self.rope, Mapping) and set(self.rope) != set(self.kinds):
            raise ValueError(f"rope names the kinds {sorted(self.rope)}, the layers are {sorted(set(self.kinds))}")
        if isinstance(self.bias, tuple) and set(self.bias) - set(MATRICES):
            raise ValueError(f"biases are of {', '.join(MATRICES)}, got {', '.join(self.bias)}")
        if self.vector is not None and (self.place != "pre" or self.parallel):
            raise ValueError("a conditioning vector drives norms before each branch, of branches one after the other")
        if self.place == "sum" and (self.parallel or not self.first_norm):
            raise ValueError("norms of sums are of all branches, one after the other")
        if self.vector is not None and not self.first_norm:
            raise ValueError("a conditioning vector drives all norms of a stack, the first among them")
        if self.experts is not None and (self.activation not in GATED or self.bias is True):
            raise ValueError("experts are gated networks without biases")
        if self.qk_norm == "l2" and self.score_scale is None:
            object.__setattr__(self, "score_scale", 1.0)  # the temperature is learned
        if self.relative is not None and (self.softcap is not None or self.groups < self.heads):
            raise ValueError("scores that depend on distance are of heads with keys of their own, and not capped")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is positive, got {self.softcap}")

    @cached_property
    def dim(self) -> int:
        return self.head_dim or self.width // self.heads

    @cached_property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @cached_property
    def inner(self) -> int:
        return self.hidden or (-(-8 * self.width // 3 // 8) * 8 if self.activation in GATED else 4 * self.width)

    @cached_property
    def pre(self) -> bool:
        return self.place in ("pre", "both")

    @property
    def attending(self) -> int:
        """How many layers attend, and so remember keys and values."""
        return self.depth

    @property
    def numbers(self) -> int:
        """About how many parameters there are."""
        layer = self.width * self.dim * (2 * self.heads + 2 * self.groups) + 3 * self.width * self.inner
        if self.experts is not None:
            layer += 3 * self.width * self.experts.hidden * self.experts.count
        return self.depth * layer

    def biased(self, matrix: str) -> bool:
        """Whether a matrix has a bias."""
        return self.bias if isinstance(self.bias, bool) else matrix in self.bias


Weights = dict[str, Any]  # of one layer, by name


def weights_of(layer: nn.Module) -> Weights:
    """By name. Read anew in each forward, so that they are never stale; from the module's own table, at the cost of a
    dictionary."""
    if "parametrizations" in layer._modules:  # computed from other parameters: a low-rank adapter, a masked matrix
        names = {*layer._parameters, *layer._modules["parametrizations"]._modules}  # type: ignore[union-attr]
        return {name: getattr(layer, name) for name in names}
    return layer._parameters


class Layer(Quantizable):
    """The parameters of one layer."""

    matrices: tuple[str, ...] = MATRICES  # that `quantize` may keep as integers

    def __init__(self, c: TransformerConfig):
        super().__init__()
        d, hd = c.width, c.dim

        def matrix(*shape: int, std: float = 0.02) -> nn.Parameter:
            return nn.Parameter(drawn(*shape, std=std))

        def optional(name: str, there: bool, value: Tensor) -> None:
            self.register_parameter(name, nn.Parameter(value) if there else None)

        affine, layer_norm = (c.vector is None or c.scaled) and c.place != "post", c.norm == "layer"
        optional("norm1", affine, torch.ones(d))
        optional("norm1_bias", affine and layer_norm, torch.zeros(d))
        optional("norm2", affine, torch.ones(d))
        optional("norm2_bias", affine and layer_norm, torch.zeros(d))
        optional("post1", c.place in ("post", "both"), torch.ones(d))
        optional("post2", c.place in ("post", "both"), torch.ones(d))
        qkv, small = (c.heads + 2 * c.groups) * hd, 0.02 / (2 * c.depth) ** 0.5
        self.qkv, self.out = matrix(qkv, d), matrix(d, c.heads * hd, std=small)
        many = () if c.experts is None else (c.experts.count,)
        inner = c.inner if c.experts is None else c.experts.hidden
        up = 2 * inner if c.activation in GATED else inner
        self.up, self.down = matrix(*many, up, d), matrix(*many, d, inner, std=small)
        for name, size in (("qkv", qkv), ("out", d), ("up", up), ("down", d)):
            optional(name + "_bias", c.biased(name), torch.zeros(size))
        optional("router", c.experts is not None, drawn(*many, d))
        q, k = {"rms_all": (c.heads * hd, c.groups * hd)}.get(c.qk_norm or "", (hd, hd))
        l2 = c.qk_norm == "l2"
        optional("q_norm", c.qk_norm is not None, torch.full((c.heads, 1), 4.0).log() if l2 else torch.ones(q))
        optional("k_norm", c.qk_norm in ("rms", "rms_all", "layer"), torch.ones(k))
        optional("q_norm_bias", c.qk_norm == "layer", torch.zeros(q))
        optional("k_norm_bias", c.qk_norm == "layer", torch.zeros(k))
        optional("ada", c.vector is not None, torch.zeros(6 * d, c.vector or 0))
        optional("ada_bias", c.vector is not None, torch.zeros(6 * d))
        optional("norm3", c.memory is not None, torch.ones(d))
        optional("cross_q", c.memory is not None, drawn(c.heads * hd, d))
        optional("cross_kv", c.memory is not None, drawn(2 * c.heads * hd, c.memory or 0))
        optional("cross_out", c.memory is not None, drawn(d, c.heads * hd))

    def weights(self) -> Weights:
        return self.quantized() if self._formats else weights_of(self)
