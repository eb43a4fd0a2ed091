"""Mamba-2: a stack of state-space mixers over slots (Dao & Gu 2024, "Transformers are SSMs", arXiv 2405.21060).

Each layer is the published one: norm, one projection to gate, channels and steps, a short causal convolution, the
state, a skip, the gated norm, one projection back. Whose state a slot goes on from is the plan's business
(`Plan.scan`): a sequence and packed samples are scanned in chunks, a draft tree is one masked product (STree, arXiv
2505.14969), a single slot is one step of the recurrence. Training and decoding run the same functions on tuples of
weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seriatim.backbones.layer import Weights, weights_of
from seriatim.backbones.quantize import Quantizable, linear
from seriatim.backbones.ssd import (
    ancestors,
    causal_conv,
    conv_step,
    ssd_chunked,
    ssd_step,
    ssd_tree,
    tree_conv,
    tree_taps,
)
from seriatim.backbones.state import Replay, StateCache
from seriatim.plan import OrderError, Plan
from seriatim.scan import Scan

TREE = 32  # slots that a tree takes along rather than being scanned before it: two products cost more than one of 32
OPEN = 256  # slots at the end of a long forward that may still be dropped, so that a prompt leaves little pending


@dataclass(frozen=True)
class MambaConfig:
    """Sizes of a Mamba-2 stack.

    `heads` of `head_dim` channels make the inner width, twice `width` as published (None). `groups` of heads share what
    is written and read (B and C), `state` wide. `kernel`: slots that the convolution sees, itself included. `chunk`:
    slots that a scan takes at once, a matter of speed only. `bias` is that of the projections, `conv_bias` that of the
    convolution. `step_limits`: the shortest and the longest step that a slot takes (None: any).
    """

    width: int
    depth: int
    heads: int | None = None
    head_dim: int = 64
    state: int = 128
    groups: int = 1
    kernel: int = 4
    chunk: int = 64
    bias: bool = False
    conv_bias: bool = True
    eps: float = 1e-5
    step_limits: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("width", "depth", "head_dim", "state", "groups", "kernel", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.heads is None and 2 * self.width % self.head_dim:
            raise ValueError(
                f"an inner width of {2 * self.width} does not divide into heads of {self.head_dim} channels; choose "
                "another head_dim, or say how many heads"
            )
        if self.count < 1 or self.count % self.groups:
            raise ValueError(f"{self.count} heads cannot share {self.groups} groups evenly")
        if self.step_limits is not None and not 0 <= self.step_limits[0] < self.step_limits[1]:
            raise ValueError(f"steps lie between two limits, the first from 0 on, got {self.step_limits}")

    @property
    def numbers(self) -> int:
        """About how many parameters there are."""
        return self.depth * self.width * (2 * self.inner + self.channels + self.count)

    @property
    def count(self) -> int:
        """Number of heads."""
        return 2 * self.width // self.head_dim if self.heads is None else self.heads

    @property
    def inner(self) -> int:
        return self.count * self.head_dim

    @property
    def channels(self) -> int:
        """What passes through the convolution: the heads' channels, B and C."""
        return self.inner + 2 * self.groups * self.state

    def new_cache(
        self, batch: int, dtype: torch.dtype, device: torch.device, made: type[StateCache] = StateCache
    ) -> StateCache:
        """States of all mixers for `batch` rows, beside weights of this format, in a cache of the kind `made`."""
        conv, state = (self.channels, self.kernel - 1), (self.count, self.head_dim, self.state)
        return made(self.depth, batch, conv, state, dtype, device)


MIXER_MATRICES = ("into", "out")  # that `quantize` may keep as integers


def mixer_parameters(c: MambaConfig) -> dict[str, nn.Parameter | None]:
    """Fresh parameters of one mixer, drawn as published: steps of 0.001 to 0.1, decays of -1 to -16.

    `into` gives, in this order: gate (inner), channels (inner), B (groups x state), C (groups x state), step (heads).
    """
    rows = c.inner + c.channels + c.count
    into = torch.randn(rows, c.width) * 0.02
    conv = (2 * torch.rand(c.channels, c.kernel) - 1) * c.kernel**-0.5
    step = torch.exp(torch.empty(c.count).uniform_(math.log(1e-3), math.log(1e-1)))
    drawn = {
        "into": into,
        "conv": conv,
        "dt_bias": step + torch.log(-torch.expm1(-step)),  # the inverse of softplus
        "A_log": torch.empty(c.count).uniform_(1, 16).log(),
        "D": torch.ones(c.count),
        "gated_norm": torch.ones(c.inner),
        "out": torch.randn(c.width, c.inner) * 0.02 / c.depth**0.5,
        "into_bias": torch.zeros(rows) if c.bias else None,
        "conv_bias": torch.zeros(c.channels) if c.conv_bias else None,
        "out_bias": torch.zeros(c.width) if c.bias else None,
    }
    return {name: None if x is None else nn.Parameter(x) for name, x in drawn.items()}


class MambaLayer(Quantizable):
    """The parameters of one layer: a norm and a mixer."""

    matrices = MIXER_MATRICES

    def __init__(self, c: MambaConfig):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(c.width))
        for name, parameter in mixer_parameters(c).items():
            self.register_parameter(name, parameter)

    def weights(self) -> Weights:
        return self.quantized() if self._formats else weights_of(self)


class Mamba(nn.Module):
    """Layers over slots. `mixers` says what they honour: a sequence, packed samples, or a draft tree."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config, self.width = config, config.width
        self.layers = nn.ModuleList(MambaLayer(config) for _ in range(config.depth))
        self.norm = nn.Parameter(torch.ones(config.width))
        self.mixers = {"all": "scan"}

    def new_cache(self, batch: int, capacity: int = 0) -> StateCache:
        """A cache for `batch` rows. Its size does not depend on `capacity`: a state is a state."""
        return self.config.new_cache(batch, self.norm.dtype, self.norm.device)

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        plan: Plan,
        cache: StateCache | None = None,
        vector: Tensor | None = None,
        memory: Tensor | None = None,
        there: Tensor | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Contextualise slots. With a cache, what they were made of is left pending."""
        if vector is not None or memory is not None:
            raise ValueError(
                "Mamba takes a condition as a prefix only: it has no use for a conditioning vector or a memory"
            )
        if plan.layers is not None or plan.spawns:
            raise OrderError("Mamba computes every slot in every layer, but this plan has slots that skip layers")
        if cache is not None:
            cache.begin(plan)
        kind, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)  # the residual stream is never half precision
        weights = [layer.weights() for layer in self.layers]  # type: ignore[operator]
        path = path_of(plan, x, self.config, weights, cache)
        x = x.to(wide)
        for i, w in enumerate(weights):
            h = F.rms_norm(x.to(kind), (self.config.width,), w["norm"], self.config.eps)
            x = x + linear(mix(self.config, w, h, path, i), w["out"], w["out_bias"])
        return F.rms_norm(x.to(kind), (self.config.width,), self.norm, self.config.eps)


# ---- one mixer -------------------------------------------------------------------------------------------------------


class Path(NamedTuple):
    """What all mixers of a forward share: the decay of each, packed samples and padding, a draft tree, the cache."""

    rates: Float[Tensor, "layers h"]
    lane: Int[Tensor, "b s"] | None
    tree: _Tree | None
    cache: StateCache | None


def path_of(
    plan: Plan, x: Float[Tensor, "b s d"], c: MambaConfig, weights: Sequence[Weights], cache: StateCache | None
) -> Path:
    """Whose state each slot goes on from. `weights` are those of all mixers. Raises `OrderError` where no recurrence
    can honour the plan, ValueError where the cache is of other rows, or missing."""
    scan = plan.scan("all")
    if cache is not None and cache.batch != x.shape[0]:
        raise ValueError(f"the cache has {cache.batch} rows, the slots have {x.shape[0]}")
    if cache is None and plan.run is not None and plan.run[0]:
        raise ValueError(f"this plan goes on after {plan.run[0]} slots: pass the cache that holds them")
    wide = torch.promote_types(x.dtype, torch.float32)
    rates = -torch.stack([w["A_log"] for w in weights]).to(wide).exp()
    lane = None if scan.lane is None else scan.lane.to(x.device).expand(x.shape[0], -1)
    return Path(rates, lane, _tree(scan, c.kernel, x.device) if scan.tree else None, cache)


@dataclass(frozen=True, slots=True)
class _Tree:
    """A draft tree as indices: where windows of the convolution look, and who descends from whom behind the trunk."""

    taps: Int[Tensor, "#b s k"]
    trunk: int
    ancestor: Bool[Tensor, "#b t t"]


def _tree(scan: Scan, kernel: int, device: torch.device) -> _Tree:
    """Made once a scan."""
    memo: dict[tuple, _Tree] = scan.__dict__.setdefault("_trees", {})
    if (kernel, device) not in memo:
        assert scan.parent is not None
        trunk = scan.trunk if scan.trunk > TREE else 0
        with torch.inference_mode(False):  # shapes outlive the loop that first asks for them
            taps = tree_taps(scan.parent, kernel).to(device)
            ancestor = ancestors((scan.parent[:, trunk:] - trunk).clamp(min=-1)).to(device)
        memo[kernel, device] = _Tree(taps, trunk, ancestor)
    return memo[kernel, device]


def mix(c: MambaConfig, w: Weights, h: Float[Tensor, "b s d"], path: Path, i: int) -> Float[Tensor, "b s e"]:
    """The mixer number i: what its projection back (`out`) takes. With a cache, what it was made of is left pending."""
    A, lane, tree, cache = path.rates[i], path.lane, path.tree, path.cache
    states = None if cache is None else cache.states[i]
    gate, conv_x, dt = linear(h, w["into"], w["into_bias"]).split([c.inner, c.channels, c.count], -1)
    dt = F.softplus(dt.to(A.dtype) + w["dt_bias"])
    if c.step_limits is not None:
        dt = dt.clamp(*c.step_limits)
    if h.shape[1] == 1 and cache is not None and states is not None:
        # whether the slot is padding is asked when it is committed
        conv, conv_state = conv_step(conv_x[:, 0], w["conv"], w["conv_bias"], states[0])
        x, B, C = _scan_inputs(c, conv)
        y, state = ssd_step(x, dt[:, 0], A, B, C, states[1])
        cache.leave((conv_state, state), None)
        return _gated(c, w, torch.addcmul(y, x, w["D"][:, None])[:, None], gate)
    conv_before, before = (None, None) if states is None else states
    if tree is None:
        conv, conv_after = causal_conv(conv_x, w["conv"], w["conv_bias"], conv_before, lane)
    else:
        conv = tree_conv(conv_x, w["conv"], w["conv_bias"], tree.taps, conv_before)
    x, B, C = _scan_inputs(c, conv)
    settled = 0 if states is None or lane is not None else _settled(c, h.shape[1] if tree is None else tree.trunk)
    y, middle, after = _scan(c, (x, dt, A, B, C), lane, tree, before, settled)
    if cache is not None:
        activations = Replay(conv_x, x, dt, A, B)
        if settled and middle is not None:
            activations = _end_of(activations, settled, middle, c.kernel)
        cache.leave(None if tree is not None or after is None else (conv_after, after), activations)
    return _gated(c, w, torch.addcmul(y, x, w["D"][:, None]), gate)


def _end_of(r: Replay, settled: int, state: Float[Tensor, "b h p n"], kernel: int) -> Replay:
    """Without the first slots, whose `state` stands in their place: copies, so that the rest is let go."""
    tail = r.conv_x[:, settled - kernel + 1 : settled].mT.clone()
    conv_x, x, dt, B = (t[:, settled:].clone() for t in (r.conv_x, r.x, r.dt, r.B))
    return Replay(conv_x, x, dt, r.A, B, settled, (tail, state))


def _settled(c: MambaConfig, line: int) -> int:
    """How many first slots of a forward that starts with so many in a line are kept, if any is; enough for a window.

    Not asked where rows have padding: what one of them may still drop can stand anywhere.
    """
    return line - OPEN if line - OPEN >= c.kernel else 0


def _scan_inputs(c: MambaConfig, conv: Float[Tensor, "... c"]) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., heads, head_dim), B and C (..., groups, state) from what leaves the convolution."""
    x, B, C = F.silu(conv).split([c.inner, c.groups * c.state, c.groups * c.state], -1)
    lead = conv.shape[:-1]
    x, B, C = x.view(*lead, c.count, c.head_dim), B.view(*lead, c.groups, c.state), C.view(*lead, c.groups, c.state)
    return x, B, C


def _scan(
    c: MambaConfig,
    inputs: tuple[Tensor, ...],
    lane: Int[Tensor, "b s"] | None,
    tree: _Tree | None,
    state: Float[Tensor, "b h p n"] | None,
    settled: int,
) -> tuple[Float[Tensor, "b s h p"], Tensor | None, Tensor | None]:
    """Outputs, the state after the first `settled` slots, and that after the last slot in a line.

    A long trunk (the prompt before a draft) is scanned; the tree is one product that goes on from its state.
    """
    size = inputs[0].shape[1]
    trunk = size if tree is None else tree.trunk

    def part(first: int, end: int) -> list[Tensor]:
        return [t if t.dim() == 1 or (first, end) == (0, size) else t[:, first:end] for t in inputs]

    ys, middle = [], None
    for first, end in ((0, settled), (settled, trunk)):
        if first < end:
            x, dt, A, B, C = part(first, end)
            y, state = ssd_chunked(x, dt, A, B, C, c.chunk, state, None if lane is None else lane[:, first:end])
            middle = state if end == settled else middle
            ys.append(y)
    if tree is not None:
        x, dt, A, B, C = part(trunk, size)
        ys.append(ssd_tree(x, dt, A, B, C, tree.ancestor, state))
    return ys[0] if len(ys) == 1 else torch.cat(ys, 1), middle, state


def _gated(c: MambaConfig, w: Weights, y: Float[Tensor, "b s h p"], gate: Float[Tensor, "b s e"]) -> Tensor:
    """Gate, then norm over each group of heads: (b, s, inner)."""
    y = y.flatten(2) * F.silu(gate)
    if c.groups == 1:
        return F.rms_norm(y, (c.inner,), w["gated_norm"], c.eps)
    y = F.rms_norm(y.unflatten(2, (c.groups, -1)), (c.inner // c.groups,), None, c.eps)
    return y.flatten(2) * w["gated_norm"]
