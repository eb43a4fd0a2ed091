"""Mamba-2: a stack of state-space mixers over slots (Dao & Gu 2024, "Transformers are SSMs", arXiv 2405.21060).

Each layer is the published one: norm, one projection to gate, channels and steps, a short causal convolution, the
state, a skip, the gated norm, one projection back. Whose state a slot goes on from is the plan's business
(`Plan.scan`): a sequence and packed samples are scanned in chunks, a draft tree is one masked product (STree, arXiv
2505.14969), a single slot is one step of the recurrence. Training and decoding run the same functions on tuples of
weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

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
from seriatim.backbones.state import Replay, StateCache, States
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
    convolution.
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


@dataclass(slots=True)
class _Weights:
    """One layer's weights, for fast access."""

    norm: Tensor
    into: Tensor
    into_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    gated_norm: Tensor
    out: Tensor
    out_bias: Tensor | None


class MambaLayer(nn.Module):
    """The parameters of one layer, drawn as published: steps of 0.001 to 0.1, decays of -1 to -16.

    `into` gives, in this order: gate (inner), channels (inner), B (groups x state), C (groups x state), step (heads).
    """

    def __init__(self, c: MambaConfig):
        super().__init__()

        def optional(name: str, there: bool, size: int) -> None:
            self.register_parameter(name, nn.Parameter(torch.zeros(size)) if there else None)

        rows = c.inner + c.channels + c.count
        self.norm = nn.Parameter(torch.ones(c.width))
        self.into = nn.Parameter(torch.randn(rows, c.width) * 0.02)
        self.conv = nn.Parameter((2 * torch.rand(c.channels, c.kernel) - 1) * c.kernel**-0.5)
        step = torch.exp(torch.empty(c.count).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.empty(c.count).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(c.count))
        self.gated_norm = nn.Parameter(torch.ones(c.inner))
        self.out = nn.Parameter(torch.randn(c.width, c.inner) * 0.02 / c.depth**0.5)
        optional("into_bias", c.bias, rows)
        optional("conv_bias", c.conv_bias, c.channels)
        optional("out_bias", c.bias, c.width)

    def weights(self) -> _Weights:
        """Read anew in each forward, so that they are never stale; from the module's own table, which is quicker."""
        if "parametrizations" in self._modules:  # computed from other parameters: a low-rank adapter, a masked matrix
            return _Weights(*(getattr(self, name) for name in _Weights.__slots__))
        return _Weights(**self._parameters)  # type: ignore[arg-type]


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
        c = self.config
        conv, state = (c.channels, c.kernel - 1), (c.count, c.head_dim, c.state)
        return StateCache(c.depth, batch, conv, state, self.norm.dtype, self.norm.device)

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        plan: Plan,
        cache: StateCache | None = None,
        vector: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Contextualise slots. With a cache, what they were made of is left pending."""
        if vector is not None or memory is not None:
            raise ValueError(
                "Mamba takes a condition as a prefix only: it has no use for a conditioning vector or a memory"
            )
        if plan.layers is not None:
            raise OrderError("Mamba computes every slot in every layer, but this plan has slots that skip layers")
        scan = plan.scan("all")
        if cache is not None:
            if cache.batch != x.shape[0]:
                raise ValueError(f"the cache has {cache.batch} rows, the slots have {x.shape[0]}")
            cache.begin(plan)
        elif plan.run is not None and plan.run[0]:
            raise ValueError(f"this plan goes on after {plan.run[0]} slots: pass the cache that holds them")
        kind, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)  # the residual stream is never half precision
        weights = [layer.weights() for layer in self.layers]  # type: ignore[operator]
        rates = -torch.stack([w.A_log for w in weights]).to(wide).exp()
        lane = None if scan.lane is None else scan.lane.to(x.device).expand(x.shape[0], -1)
        tree = _tree(scan, self.config.kernel, x.device) if scan.tree else None
        x = x.to(wide)
        for i, (w, A) in enumerate(zip(weights, rates, strict=True)):
            h = F.rms_norm(x.to(kind), (self.config.width,), w.norm, self.config.eps)
            states = None if cache is None else cache.states[i]
            y, after, activations = _mix(self.config, w, A, h, lane, tree, states)
            x = x + y
            if cache is not None:
                cache.leave(after, activations)
        return F.rms_norm(x.to(kind), (self.config.width,), self.norm, self.config.eps)


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


def _mix(
    c: MambaConfig,
    w: _Weights,
    A: Float[Tensor, "h"],
    h: Float[Tensor, "b s d"],
    lane: Int[Tensor, "b s"] | None,
    tree: _Tree | None,
    states: States | None,
) -> tuple[Float[Tensor, "b s d"], States | None, Replay | None]:
    """One mixer: its output, the states after a sequence, and what a path can be replayed from."""
    gate, conv_x, dt = F.linear(h, w.into, w.into_bias).split([c.inner, c.channels, c.count], -1)
    dt = F.softplus(dt.to(A.dtype) + w.dt_bias)
    if h.shape[1] == 1 and states is not None:  # whether the slot is padding is asked when it is committed
        conv, conv_state = conv_step(conv_x[:, 0], w.conv, w.conv_bias, states[0])
        x, B, C = _scan_inputs(c, conv)
        y, state = ssd_step(x, dt[:, 0], A, B, C, states[1])
        y = torch.addcmul(y, x, w.D[:, None])
        return _close(c, w, y[:, None], gate), (conv_state, state), None
    conv_before, before = (None, None) if states is None else states
    if tree is None:
        conv, conv_after = causal_conv(conv_x, w.conv, w.conv_bias, conv_before, lane)
    else:
        conv = tree_conv(conv_x, w.conv, w.conv_bias, tree.taps, conv_before)
    x, B, C = _scan_inputs(c, conv)
    settled = 0 if states is None or lane is not None else _settled(c, h.shape[1] if tree is None else tree.trunk)
    y, middle, after = _scan(c, (x, dt, A, B, C), lane, tree, before, settled)
    y = _close(c, w, torch.addcmul(y, x, w.D[:, None]), gate)
    if states is None:
        return y, None, None
    activations = Replay(conv_x, x, dt, A, B)
    if settled and middle is not None:  # copies, so that the rest is let go
        conv_x, tail = conv_x[:, settled:].clone(), conv_x[:, settled - c.kernel + 1 : settled].mT.clone()
        x, dt, B = (t[:, settled:].clone() for t in (x, dt, B))
        activations = Replay(conv_x, x, dt, A, B, settled, (tail, middle))
    return y, None if tree is not None or after is None else (conv_after, after), activations


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


def _close(
    c: MambaConfig, w: _Weights, y: Float[Tensor, "b s h p"], gate: Float[Tensor, "b s e"]
) -> Float[Tensor, "b s d"]:
    """Gate, norm over each group of heads, projection back."""
    y = y.flatten(2) * F.silu(gate)
    if c.groups == 1:
        y = F.rms_norm(y, (c.inner,), w.gated_norm, c.eps)
    else:
        y = F.rms_norm(y.unflatten(2, (c.groups, -1)), (c.inner // c.groups,), None, c.eps).flatten(2) * w.gated_norm
    return F.linear(y, w.out, w.out_bias)
