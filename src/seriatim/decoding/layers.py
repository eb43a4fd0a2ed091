"""Layer plans: forwards in which not every token goes through every layer. They change the law, so they are part of the
`Target`, and every proposer and decider works with them.

Three are published: fewer layers the further a text has come (`Staircase`), feed-forward networks that are left out
where they change little (`Saturation`), and layers that the prompt decides to leave out (`PromptRouters`). In all three
a later token goes through no layer that an earlier one has skipped (`missing_entries`): no entry of a cache is ever
missing, so nobody is masked and nothing is computed twice. A layer, or network, that no slot of a forward goes through
is not computed, which is what saves time: its weights are not read.

Tokens are counted from the prompt, and each by itself, so that rows of a batch may stand at different steps and drafts
may reach ahead. A plan is a value; what follows from one canvas is in the `Skipping` that it begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.backbones.route import Block, Route
from seriatim.canvas import GIVEN, Canvas
from seriatim.plan import OrderError, Plan

Run = bool | Bool[Tensor, "#b #s"]  # which slots go through a block: all, none, or some


class LayerPlan(Protocol):
    """Which layers, or feed-forward networks, compute which token of a text.

    blocks: of which kind; whole_prompt: it looks at the prompt, which then stands in one forward.
    """

    @property
    def blocks(self) -> Block: ...

    @property
    def whole_prompt(self) -> bool: ...

    def begin(self, depth: int) -> Skipping:
        """The plan on a new canvas, for a model of so many layers. Raises ValueError where it does not fit."""
        ...


@dataclass
class Tally:
    """Blocks that the forwards behind prompts came to, and those of them that were computed."""

    met: int = 0
    entered: int = 0

    @property
    def share(self) -> float:
        """Of blocks that were computed: what is left of the weights that a token reads."""
        return self.entered / self.met if self.met else 1.0


class Skipping:
    """A layer plan at work on one canvas. last: the route of the last forward; layers: those that are still needed
    (None: it is not known before)."""

    layers: tuple[int, ...] | None = None

    def __init__(self, depth: int):
        self.depth, self.tally = depth, Tally()
        self.last: Any = None

    def along(self, plan: Plan, canvas: Canvas) -> Plan:
        """A forward whose slots skip what they may."""
        self.last = self.route(plan, canvas)
        return plan if self.last is None else plan.along(self.last)

    def route(self, plan: Plan, canvas: Canvas) -> Route | None:
        """The way of these slots; None: all of them through everything."""
        raise NotImplementedError

    def select(self, rows: Int[Tensor, "b2"]) -> None:
        """Follow the rows of the canvas; -1 is a new one."""


def begun(layers: LayerPlan, model: Any) -> Skipping:
    """A layer plan on a model. Raises ValueError where the model's order or backbone cannot have it."""
    backbone, order = model.backbone, model.factorization
    if not order.draftable:
        raise ValueError(f"layers are skipped along a text, token by token; {type(order).__name__} has another order")
    if layers.blocks not in getattr(backbone, "skippable", frozenset()):
        what = "whole layers" if layers.blocks == "layer" else "feed-forward networks"
        raise ValueError(f"{type(layers).__name__} skips {what}, which {type(backbone).__name__} cannot leave out")
    return layers.begin(backbone.config.depth)


def missing_entries(layers: Bool[Tensor, "L n"]) -> tuple[int, int] | None:
    """The first (layer, token) where a token goes through a layer and one before it has left no entry there, which it
    would look for; None: every cached token has been where later ones go."""
    missing = (layers[:, 1:] & ~layers[:, :-1]).nonzero()  # two neighbours tell
    return None if not len(missing) else (int(missing[0, 0]), int(missing[0, 1]) + 1)


# ---- where slots stand -----------------------------------------------------------------------------------------------


def steps_of_run(plan: Plan, canvas: Canvas) -> tuple[int, ...] | None:
    """Which token behind the prompt each slot carries, from 0 (below it: a token of the prompt), where all rows are
    alike along a line; else None. Makes no tensors."""
    if plan.run is None or canvas.length is None:
        return None
    start, offset = plan.run
    first = start - plan.prefix - canvas.given_length  # type: ignore[attr-defined]
    return tuple(first + i for i in (range(plan.size) if offset is None else offset.tolist()))


def steps_of(plan: Plan, canvas: Canvas) -> tuple[Int[Tensor, "b s"], Bool[Tensor, "b s"]]:
    """The same for each row, and which slots are no padding."""
    lane = plan.views[next(iter(plan.views))].lane
    steps = (plan.slots.element[..., 0] - prompts_of(canvas)[:, None]).clamp(min=-1)
    return steps, torch.ones_like(steps, dtype=torch.bool) if lane is None else (lane >= 0).expand_as(steps)


def prompts_of(canvas: Canvas) -> Int[Tensor, "b"]:
    """How many elements are given in front of each row."""
    if canvas.length is not None:
        return torch.full((canvas.batch,), canvas.given_length)
    return (canvas.status == GIVEN).long().cumprod(1).sum(1)


def through(run: Run, x: Float[Tensor, "b s d"], y: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
    """What slots carry behind a block that makes y of x, and that some of them go through."""
    if isinstance(run, bool):
        return y if run else x
    return torch.where(run.to(x.device)[..., None], y, x)


def summed_up(runs: Bool[Tensor, "L b s"], live: Bool[Tensor, "b s"]) -> list[Run]:
    """Of each block, which slots go through it, padding apart."""
    some, all_ = ((runs & live).flatten(1).any(1).tolist(), (runs | ~live).flatten(1).all(1).tolist())
    return [True if a else run if s else False for run, s, a in zip(runs, some, all_, strict=True)]


class Given:
    """A route that is known before the forward."""

    def __init__(self, ran: Sequence[Run], tally: Tally, blocks: Block = "layer"):
        self.ran, self.tally, self.blocks = ran, tally, blocks

    def enters(self, i: int, x: Float[Tensor, "b s d"]) -> bool:
        entered = self.ran[i] is not False
        self.tally.met += 1
        self.tally.entered += entered
        return entered

    def leaves(self, i: int, x: Float[Tensor, "b s d"], y: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        return through(self.ran[i], x, y)


# ---- fewer layers, token by token ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Staircase:
    """Fewer layers the further a text has come (SkipDecode, Del Corro et al. 2023, arXiv 2307.02628).

    counts[0] layers for every token of the prompt, counts[n] for the n-th behind it, the last of them from there on.
    The first `warmup` layers always run; then a token jumps to the uppermost ones. Counts never increase, or entries
    would be missing: `begin` refuses that.
    """

    counts: tuple[int, ...]
    warmup: int = 1
    blocks: ClassVar[Block] = "layer"
    whole_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < max(self.warmup, 1) or self.warmup < 0:
            raise ValueError(
                f"every token goes through at least 1 layer, the {self.warmup} first ones included; got {self.counts}"
            )

    @classmethod
    def linear(cls, most: int, least: int, length: int, warmup: int = 1) -> Staircase:
        """From `most` layers at the end of the prompt to `least` at the `length`-th token behind it (section 3.2)."""
        if length < 1:
            raise ValueError(f"a text has an expected length of at least 1 token, got {length}")
        return cls(tuple(int(most - (most - least) * n / length + 0.5) for n in range(length + 1)), warmup)

    def stair(self, count: int, depth: int) -> list[bool]:
        """Which layers a token goes through that has so many: the first ones, then the uppermost."""
        return [i < self.warmup or i >= depth - (count - self.warmup) for i in range(depth)]

    def begin(self, depth: int) -> Stairs:
        return Stairs(self, depth)


class Stairs(Skipping):
    """A staircase on one canvas."""

    def __init__(self, plan: Staircase, depth: int):
        super().__init__(depth)
        if max(plan.counts) > depth:
            raise ValueError(f"a token cannot go through {max(plan.counts)} layers of {depth}")
        self.table = torch.tensor([plan.stair(count, depth) for count in plan.counts]).T  # (layers, stairs)
        if (gap := missing_entries(self.table)) is not None:
            layer, token = gap
            raise ValueError(
                f"token {token} behind the prompt goes through layer {layer}, where the one before has left no entry: "
                f"layers may only become fewer, and {plan.counts[token]} follow {plan.counts[token - 1]}"
            )
        self.full_prompt = plan.counts[0] == depth
        self._routes: dict[tuple[int, ...], Given] = {}

    def route(self, plan: Plan, canvas: Canvas) -> Given | None:
        steps, last = steps_of_run(plan, canvas), self.table.shape[1] - 1
        if steps is None:
            each, live = steps_of(plan, canvas)
            return None if self.full_prompt and not bool(((each >= 0) & live).any()) else self.at(each, live)
        if self.full_prompt and max(steps) < 0:
            return None
        stairs = tuple(max(min(step + 1, last), 0) for step in steps)
        if stairs not in self._routes:
            if len(self._routes) > ROUTES:
                self._routes.clear()
            self._routes[stairs] = self.at(torch.tensor([steps]))
        return self._routes[stairs]

    def at(self, steps: Int[Tensor, "b s"], live: Bool[Tensor, "b s"] | None = None) -> Given:
        """The way of slots that carry these tokens behind the prompt (below 0: the prompt)."""
        live = torch.ones_like(steps, dtype=torch.bool) if live is None else live
        runs = self.table[:, (steps + 1).clamp(0, self.table.shape[1] - 1)]
        return Given(summed_up(runs, live), self.tally if bool(((steps >= 0) & live).any()) else Tally())


ROUTES = 1024  # that are remembered: a text goes down its stairs once for each shape of draft

# ---- feed-forward networks that change little ------------------------------------------------------------------------


@dataclass(frozen=True)
class Saturation:
    """Leave out feed-forward networks where they change little (FFN-SkipLLM, Jaiswal et al. 2024, arXiv 2404.03865,
    algorithm 1). Attention always runs, so that the cache has every entry.

    A token's network is computed and measured: the cosine between what enters it and what leaves it, the residual
    included. From `threshold` on, the networks of the next `run` layers are left out for this token; then the next one
    is measured again. The prompt and `warmup` tokens behind it are computed in full, as are the networks of the
    `bottom` first and `top` last layers. No cosine is above 1, so a threshold above it leaves nothing out.
    """

    threshold: float
    run: int = 2
    bottom: int = 1
    top: int = 1
    warmup: int = 16
    blocks: ClassVar[Block] = "feedforward"
    whole_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.run < 1 or min(self.bottom, self.top, self.warmup) < 0:
            raise ValueError(f"at least 1 network is left out at a time, and none less than 0 times; got {self}")

    def begin(self, depth: int) -> Saturating:
        if self.bottom + self.top > depth:
            raise ValueError(f"{self.bottom} bottom and {self.top} top layers are more than the {depth} there are")
        return Saturating(self, depth)


class Saturating(Skipping):
    """Saturation on one canvas. Every token's networks are decided anew, so nothing is remembered."""

    def __init__(self, plan: Saturation, depth: int):
        super().__init__(depth)
        self.plan = plan

    def route(self, plan: Plan, canvas: Canvas) -> Greedy | None:
        run = steps_of_run(plan, canvas)
        if run is not None:
            steps, live = run * canvas.batch, (True,) * (len(run) * canvas.batch)
        else:
            steps, live = (tuple(x.expand(canvas.batch, -1).flatten().tolist()) for x in steps_of(plan, canvas))
        return None if max(steps) < 0 else Greedy(self, [step >= self.plan.warmup for step in steps], live)


class Greedy:
    """The way through feed-forward networks, found layer by layer. Numbers of each slot are kept in lists: there are
    few, and an operation on a tensor costs as much as all of them."""

    blocks: Block = "feedforward"

    def __init__(self, of: Saturating, free: Sequence[bool], live: Sequence[bool]):
        plan, self.tally = of.plan, of.tally
        self.threshold, self.skipped, self.free = plan.threshold, plan.run, free
        self.open, self.some = range(plan.bottom, of.depth - plan.top), any(free)
        self.left = [0 if there else of.depth for there in live]  # networks to be left out now; all of padding
        self.ran: list[Run] = []

    def enters(self, i: int, x: Float[Tensor, "b s d"]) -> bool:
        run: Run = True
        if i in self.open and any(self.left):
            computed = [n == 0 for n in self.left]
            run = torch.tensor(computed).view(x.shape[:2]) if any(computed) else False
        self.ran.append(run)
        self.tally.met += 1
        self.tally.entered += run is not False
        if run is False:
            self.left = [n - 1 for n in self.left]
        return run is not False

    def leaves(self, i: int, x: Float[Tensor, "b s d"], y: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        if i in self.open and self.some:
            near = (cosines(x, y) >= self.threshold).flatten().tolist()
            self.left = [
                n - 1 if n else self.skipped if close and free else 0
                for n, close, free in zip(self.left, near, self.free, strict=True)
            ]
        return through(self.ran[i], x, y)


def cosines(x: Float[Tensor, "b s d"], y: Float[Tensor, "b s d"]) -> Float[Tensor, "b s"]:
    """Between what enters a block and what leaves it, slot by slot."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.cosine_similarity(x.to(wide), y.to(wide), dim=-1)


# ---- layers that the prompt decides on -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PromptRouters:
    """Leave out layers for a whole generation, as the prompt decides (FiRST, Jain et al. 2024, arXiv 2410.12513).

    In front of each layer a linear map and a sigmoid look at every token of the prompt, brought to a root mean square
    of 1; a layer whose mean is below `threshold` is left out: each row's own mean, or (`together`) that of the batch.
    prompt: what the prompt itself does with such a layer, "skips" it, so that the routers behind see what generation
    will see, or "runs" through it. The layers in `always` are never left out. At a threshold of 0 nothing is.
    """

    weight: Float[Tensor, "L d"]
    bias: Float[Tensor, "L"]
    threshold: float = 0.5
    prompt: Literal["skips", "runs"] = "skips"
    together: bool = False
    always: frozenset[int] = frozenset()
    blocks: ClassVar[Block] = "layer"
    whole_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.prompt not in ("skips", "runs"):
            raise ValueError(f"a prompt skips layers or runs through all of them, got {self.prompt!r}")

    def rho(self, i: int, x: Float[Tensor, "b s d"], prompt: Bool[Tensor, "b s"]) -> Float[Tensor, "b"]:
        """How much each row wants layer i, from 0 to 1: the mean over the slots of its prompt."""
        wide, prompt = torch.promote_types(x.dtype, torch.float32), prompt.to(x.device)
        weight, bias = (p[i].to(x.device, wide) for p in (self.weight, self.bias))
        each = torch.sigmoid((F.rms_norm(x.to(wide), x.shape[-1:]) * weight).sum(-1) + bias)
        return torch.where(prompt, each, 0).sum(1) / prompt.sum(1).clamp(min=1)

    def begin(self, depth: int) -> Decided:
        if len(self.weight) != depth:
            raise ValueError(f"{len(self.weight)} routers do not fit {depth} layers: they are another model's")
        return Decided(self, depth)


class Decided(Skipping):
    """What the prompts of one canvas have decided: rho and runs (layers, rows), once their forward is done."""

    def __init__(self, plan: PromptRouters, depth: int):
        super().__init__(depth)
        self.plan = plan
        self.rho: Float[Tensor, "L b"] = torch.ones(depth, 0)
        self.runs: Bool[Tensor, "L b"] = torch.ones(depth, 0, dtype=torch.bool)
        self.open: Bool[Tensor, "b"] = torch.zeros(0, dtype=torch.bool)  # rows whose prompt has not been seen

    def route(self, plan: Plan, canvas: Canvas) -> Given | Deciding:
        if not len(self.open):
            self.open = torch.ones(canvas.batch, dtype=torch.bool)
            self.rho = torch.ones(self.depth, canvas.batch)
            self.runs = torch.ones(self.depth, canvas.batch, dtype=torch.bool)
            self._note()
        run = steps_of_run(plan, canvas)
        if not self._undecided and (self.plan.prompt == "skips" or (run is not None and min(run) >= 0)):
            return self._settled
        steps, live = steps_of(plan, canvas)
        prompt = (steps < 0) & live
        if not self._undecided:
            return Given(summed_up(self.runs[..., None] | prompt, live), self.tally)
        now, there = self.open & prompt.any(1), prompt & (plan.slots.element[..., 0] >= 0)
        if bool((now & (there.sum(1) < prompts_of(canvas))).any()):
            raise OrderError("routers look at whole prompts, and a part of one has been cached before")
        return Deciding(self, prompt.expand(canvas.batch, -1), now)

    def select(self, rows: Int[Tensor, "b2"]) -> None:
        if len(self.open):
            new, where = rows < 0, rows.clamp(min=0)
            self.open, self.rho, self.runs = self.open[where] | new, self.rho[:, where], self.runs[:, where] | new
            self._note()

    def _note(self) -> None:
        """What follows from the decisions, as long as rows and decisions stay the same."""
        self._undecided = bool(self.open.any())
        rows = torch.ones(len(self.open), 1, dtype=torch.bool)
        self._settled = Given(summed_up(self.runs[..., None], rows), self.tally)
        self.layers = tuple(self.runs.any(1).nonzero()[:, 0].tolist())

    def decide(self, i: int, rho: Float[Tensor, "b"], rows: Bool[Tensor, "b"]) -> None:
        """Layer i, by what these rows' prompts want."""
        said = rho[rows].mean().expand_as(rho) if self.plan.together else rho
        self.rho[i, rows] = said[rows].to(self.rho.dtype)
        self.runs[i, rows] = (said[rows] >= self.plan.threshold) | (i in self.plan.always)
        if i == self.depth - 1:
            self.open = self.open & ~rows
            self._note()


class Deciding:
    """The way of a forward that holds prompts, which decide layer by layer."""

    blocks: Block = "layer"

    def __init__(self, of: Decided, prompt: Bool[Tensor, "b s"], rows: Bool[Tensor, "b"]):
        self.of, self.prompt, self.rows = of, prompt, rows
        self.ran: list[Run] = []

    def enters(self, i: int, x: Float[Tensor, "b s d"]) -> bool:
        of = self.of
        of.decide(i, of.plan.rho(i, x, self.prompt).detach().cpu(), self.rows)
        run = of.runs[i].clone()[:, None].expand_as(self.prompt)  # decisions on other layers are written beside it
        run = run | self.prompt if of.plan.prompt == "runs" else run
        self.ran.append(bool(run.all()) or (run if bool(run.any()) else False))
        return self.ran[i] is not False

    def leaves(self, i: int, x: Float[Tensor, "b s d"], y: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        return through(self.ran[i], x, y)
