"""The law that is sampled, whatever the way: a model, conditions and guidance, filters, a cache policy.

Composes values and has no algorithm of its own. What changes the law is here; what changes the way (drafts, selection,
remasking) is a `Proposer` or a `Decider`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.backbones.cache import Keep
from seriatim.backbones.compressed import Codec
from seriatim.canvas import Canvas
from seriatim.conditions.condition import Condition, alike
from seriatim.decoding.filters import Suppress, Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.layers import LayerPlan, Skipping, begun
from seriatim.decoding.policy import CachePolicy, Memory
from seriatim.decoding.shaping import Shaper
from seriatim.decoding.steering import Steer
from seriatim.heads.dist import Categorical
from seriatim.model import Model, Rows
from seriatim.plan import DERIVED, MASK, VALUE, Plan
from seriatim.slots import Reads, Slots, below_own
from seriatim.view import INF, View

PADDED = 1.25  # slots computed for rows of different lengths together, over those that are needed
CHUNK = 512  # slots of a forward that only remembers
MARGIN = 64  # slots of a cache beyond the elements: a learned start, a draft that is looked at
EXAMINE = 16  # forwards along a line between two looks for NaN: a look costs as much as the bookkeeping of a step


@dataclass(frozen=True, eq=False)
class Branch:
    """A second opinion to move away from: the same step with something taken away.

    What is sampled is (1 + sum of w_i) times the full branch minus w_i times each of these. drop: names of conditions
    that are replaced by their null (None: all). hide: known elements shown as masks, "given" ones (a prompt), those
    "earlier" than the present step (a fully masked history), or the ones that a boolean (elements,) marks; but not
    those whose ids are to be kept (`keep`: what every prompt has in common, such as the marks of turns).
    """

    guidance: Guidance
    drop: frozenset[str] | None = None
    hide: Literal["given", "earlier"] | Bool[Tensor, "E"] | None = None
    keep: tuple[int, ...] = ()


class Target:
    """What is sampled.

    condition: raw conditions by name; guidance: how strongly they are followed (needs conditions with a null), or the
    branches to move away from; warp: temperature and filters; cached: use the exact cache (False recomputes everything,
    for tests); policy: what an order without an exact cache may read as it once was; suppress: ids that are not
    written; shapers: penalties and constraints, before temperature and filters; layers: which layers compute which
    token (None: all); codec: how the keys and values of a line are remembered (None: as they are); steer: what else
    changes the law of what is read, by what stands on the canvas (a classifier), before what is suppressed. The cache
    belongs to one canvas: another one starts anew.
    """

    def __init__(
        self,
        model: Model,
        condition: Mapping[str, Tensor] | None = None,
        guidance: Guidance | Sequence[Branch] | None = None,
        warp: Warper | None = None,
        cached: bool = True,
        policy: CachePolicy | None = None,
        shapers: Sequence[Shaper] = (),
        layers: LayerPlan | None = None,
        codec: Codec | None = None,
        steer: Steer | None = None,
        suppress: Suppress | None = None,
    ):
        if isinstance(guidance, Guidance):
            if not model.conditions:
                raise ValueError("guidance needs a condition with a null; this model is unconditional")
            guidance = (Branch(guidance),)
        self.model = model
        self.branches = tuple(guidance or ())
        for branch in self.branches:
            _check_branch(branch, model)
        self.warp = None if warp is None or warp.neutral else warp
        self.shapers = tuple(shapers)
        self.suppress = None if suppress is None or suppress.neutral else suppress
        if self.suppress is not None:
            self.suppress.check(_vocabulary(model))
        self.conditions = self._encode(condition)  # of the full branch, then of the others
        if policy is not None and not cached:
            raise ValueError("a cache policy needs a cache; use cached=True, or no policy to recompute everything")
        self.cached = cached
        self.steer = steer
        self.policy = policy
        self.memory: Memory | None = None
        if layers is not None and (policy is not None or self.branches):
            raise ValueError("layers are skipped without guidance and without a cache policy; leave one of them out")
        self.layers = layers
        self.skipping: Skipping | None = None if layers is None else begun(layers, model)
        if codec is not None and not model.factorization.draftable:
            order = type(model.factorization).__name__
            raise ValueError(f"a codec compresses what stands along a line, and {order} is another order; leave it out")
        self.codec = codec
        if codec is not None:
            self._new_cache(1, 1)  # refuses what does not fit
        self.cache: Any = None
        self._canvas: Canvas | None = None
        self._repeated: tuple[Plan, Plan] | None = None  # the present plan, and the same for the rows of all branches
        self._joined: tuple[Any, Condition] = (None, Condition())  # the conditions, and their rows below each other
        self._turn = 0  # forwards of this canvas
        self._unseen: tuple[Tensor, Any] | None = None  # the last hidden states and law, if not yet looked at for NaN
        if policy is not None:
            self.demand(frozenset({"subset", "evict"}), type(policy).__name__)

    def demand(self, abilities: frozenset[str], who: str) -> None:
        """Refuse a part that asks of the cache what it cannot do, before anything is computed."""
        lacking = abilities - self._new_cache(1, 1).can if abilities and self.cached else frozenset()
        if lacking:
            raise ValueError(
                f"{who} needs a cache that can {' and '.join(sorted(lacking))}; that of "
                f"{type(self.model.backbone).__name__} cannot (it keeps paths only). Use a part that keeps a path, a "
                "backbone with keys and values, or no cache"
            )

    @property
    def copies(self) -> int:
        """Rows of the model for each row of the canvas: one a branch."""
        return 1 + len(self.branches)

    def _encode(self, raw: Mapping[str, Tensor] | None) -> list[Condition]:
        out = [self.model.encode(raw)]
        for branch in self.branches:
            names = self.model.conditions.keys() if branch.drop is None else branch.drop
            rows = out[0].rows or 0
            out.append(self.model.encode(raw, {name: torch.ones(rows, dtype=torch.bool) for name in names}))
        return out

    def plan(self, canvas: Canvas, guess: Guess | None = None) -> Plan | None:
        """The next forward; None when everything is decided."""
        order = self.model.factorization
        if guess is not None and not (order.draftable or order.verifies):
            name = type(order).__name__
            raise ValueError(f"{name} cannot verify drafts; use a decider without a proposer")
        self._follow(canvas)
        cache = self.cache
        held = 0 if cache is None or self.memory is not None else cache.length
        if isinstance(held, Tensor):
            held = held[: canvas.batch]  # branches remember equally many
        plan = self.model.factorization.step(canvas, guess, held)
        if plan is None:
            self._examine()
        elif self._turn == 0:
            plan.check(self.model.mixers)
        if self.codec is not None and self.cached and guess is not None and plan is not None:
            self._shorten(guess, plan, self.codec.buffer if cache is None else cache.room)
        if plan is not None and self.skipping is not None:
            return self.skipping.along(plan, canvas)
        return plan if plan is None or self.memory is None else self._remember(plan, canvas, self.memory)

    def _follow(self, canvas: Canvas) -> None:
        """Start anew with another canvas."""
        if canvas is not self._canvas:
            self._canvas, self.cache, self._turn, self._unseen = canvas, None, 0, None
            self.memory = None if self.policy is None else Memory(self.policy)
            self.skipping = None if self.layers is None else begun(self.layers, self.model)

    def begin(self, canvas: Canvas, cache: Any = None) -> None:
        """Begin with a canvas of which a cache of the model remembers what has been computed already."""
        self._follow(canvas)
        self.cache = cache

    def _shorten(self, guess: Guess, plan: Plan, room: int | Int[Tensor, "b"]) -> None:
        """Leave out nodes behind the place where a block will be compressed: from there on the past looks different,
        which the forward that verifies them cannot know yet. So a draft leaves the law as it is with a codec too."""
        depth, known = torch.tensor([guess.depths()]), plan.reads.slot[:, :1] + 1
        rows = len(guess.value)
        left = torch.as_tensor(room).expand(rows * self.copies)[:rows, None] - known
        if bool((depth > left).any()):
            guess.value = guess.value.masked_fill(depth > left, -1)

    def _new_cache(self, rows: int, slots: int) -> Any:
        """An empty cache with room for so many slots a row."""
        if self.codec is None:
            return self.model.new_cache(rows, slots)
        latest = min(slots, self.codec.buffer + MARGIN)
        return self.model.new_cache(rows, latest).compressed(self.codec, slots)

    def prefill(self, canvas: Canvas, chunk: int = CHUNK, shared: bool = False) -> None:
        """Remember what is known, `chunk` slots a forward, so that memory stays small. The last chunk is left to the
        first step, unless rows are to be copied afterwards and share the work (`shared`); then all but the last slot is
        remembered. Where the order or the layer plan cannot, nothing: the first step computes it."""
        self._follow(canvas)
        if not self.cached or self.memory is not None or self.branches:
            return
        if self.layers is not None and self.layers.whole_prompt:
            return
        lengths = canvas.lengths()
        if self.conditions[0].rows is None and int(lengths.max()) * canvas.batch > PADDED * int(lengths.sum()):
            caches = [self._new_cache(1, canvas.layout.size + MARGIN) for _ in lengths]
            for row, cache in enumerate(caches):  # each alone: rows of other lengths are not computed as padding
                self._fill(canvas.select(torch.tensor([row])), cache, chunk, 0)
            caches[0].join(caches[1:])
            self.cache = caches[0]
        else:
            self._fill(canvas, self._room(canvas), chunk, 0 if shared else chunk - 1)

    def _fill(self, canvas: Canvas, cache: Any, chunk: int, leave: int) -> None:
        while (plan := self.model.factorization.fill(canvas, cache.length, chunk, leave)) is not None:
            plan = plan if self.skipping is None else self.skipping.along(plan, canvas)
            self.model.hidden(plan, canvas, cache, self.conditions[0])
            cache.commit(plan.size, plan)

    def _room(self, canvas: Canvas) -> Any:
        """The cache, with room for all there will be."""
        if self.cache is None and self.cached:
            self.cache = self._new_cache(canvas.batch * self.copies, canvas.layout.size + MARGIN)
        return self.cache

    def _remember(self, plan: Plan, canvas: Canvas, memory: Memory) -> Plan:
        """What is left of an exact plan when the policy has its way with the cache."""
        keep, labels, retain, live = memory.next(plan, canvas.rank)
        if self.cache is not None and labels is not None:
            self.cache.commit(_plain_keep(self._times(keep)), repeated(labels, self.copies))
        if self.cache is not None and retain is not None:
            self.cache.evict(self._times(retain))
        return live

    def _times(self, rows: Int[Tensor, "b m"]) -> Int[Tensor, "b2 m"]:
        """The same for the rows of every branch."""
        return rows.repeat(self.copies, 1) if len(rows) > 1 else rows

    def forward(self, plan: Plan, canvas: Canvas, guess: Guess | None = None) -> Rows:
        """Distributions of what the plan reads, guided and filtered; cache entries are left pending."""
        model = self.model
        self._room(canvas)
        if self.memory is not None:
            self.memory.pending = plan.slots
        if self.branches:
            dist, element, h, slot = self._guided(plan, canvas, guess)
        else:
            h = model.hidden(plan, canvas, self.cache, self.conditions[0], guess)
            dist, element, slot = model.dist(h, plan, canvas)
        if self.steer is not None:
            dist = self.steer(dist, element, canvas)
        if self.suppress is not None:
            dist = self.suppress(dist, element, canvas)
        self._unseen = (h, dist)
        if plan.run is None or self._turn % EXAMINE == 0:
            self._examine()
        self._turn += 1
        said = dist
        if self.shapers:
            dist = self._shaped(dist, canvas, guess)
        if self.warp is not None:
            dist = self.warp(dist)
        h = h if not self.branches else h[: canvas.batch]
        if not plan.spawns and not plan.masks:
            return Rows(dist, element, h, slot, said, None, guess)
        fed = plan.spawns[0].first if plan.spawns else plan.size - plan.masks
        return Rows(dist, element, h[:, :fed], slot, said, h[:, fed:], guess)

    def _shaped(self, dist: Any, canvas: Canvas, guess: Guess | None) -> Any:
        """The law after the text behind which each read-out stands."""
        if not isinstance(dist, Categorical):
            raise TypeError(f"penalties and constraints are of ids, not of what {type(dist).__name__} is a law of")
        logits = dist.logits if dist.logits.dtype == torch.float64 else dist.logits.float()
        for shape in self.shapers:
            logits = shape(logits, canvas, guess)
        return Categorical(logits)

    def _examine(self) -> None:
        """Raise where the model broke down. Along a line NaN in a hidden state stays in the cache, so that a look now
        and then, and at the end, misses nothing; a broken head is found where it breaks in a forward looked at."""
        if self._unseen is None:
            return
        (h, dist), self._unseen = self._unseen, None
        if math.isfinite(h.sum(dtype=torch.float32).item()) and _sound(dist):
            return
        raise FloatingPointError(
            "the model returned NaN or infinity: its weights or inputs are broken (check the checkpoint and the number "
            "format; bfloat16 needs no loss scaling, float16 does)"
        )

    def _guided(self, plan: Plan, canvas: Canvas, guess: Guess | None) -> tuple[Any, Any, Tensor, Any]:
        """All branches in one forward, each in its own rows of the cache; mixed as the head defines it."""
        model, batch = self.model, canvas.batch
        if plan.spawns:
            raise ValueError("states are transferred in a forward of one branch: draft in another way, or do not guide")
        plans = [plan, *(hidden(plan, canvas, branch.hide, branch.keep) for branch in self.branches)]
        parts = [
            model.vectors(shown, canvas, c, guess).expand(batch, -1, -1)
            for shown, c in zip(plans, self.conditions, strict=True)
        ]
        if self._joined[0] is not self.conditions:  # the very same tensors each time: a cache knows them again
            self._joined = self.conditions, joined(self.conditions)
        both = self._joined[1]
        self._repeated = (plan, repeated(plan, self.copies))
        vector = model.driving(plan, canvas, both.vector)
        h = model.backbone(torch.cat(parts), self._repeated[1], self.cache, vector, both.memory, *both.padding)
        (full, element, slot), *others = [model.dist(part, plan, canvas) for part in h.chunk(self.copies)]
        done = plan.progress
        if done is None:
            done = progress(canvas, None if guess is None else plan.reads.element)
        weights = [_weight(branch.guidance.of(plan.phase), done, h) if plan.guided else 0.0 for branch in self.branches]
        dist = full.mix([other[0] for other in others], [1 + sum(weights), *(-w for w in weights)])
        return dist, element, h, slot

    def commit(self, keep: Keep | None, plan: Plan, repeats: bool = False) -> None:
        """Keep pending entries: what the decider names, or (None) what the plan says is worth keeping. Of a step that
        is going to be repeated (denoising) that is what stays the same, and it drops nothing yet."""
        cache = self.cache
        if cache is None or self.memory is not None:
            return  # a policy keeps what it likes at the next step, when it is known what was decided
        if repeats and keep is None and plan.fixed is not None:
            keep = _plain_keep(plan.fixed)
        if self.branches:
            if isinstance(keep, Tensor):
                keep = self._times(keep)
            if self._repeated is not None and self._repeated[0] is plan:
                plan = self._repeated[1]
        if keep is None:
            keep = plan.size if plan.kept is None else _plain_keep(plan.kept)
        cache.commit(keep, plan)
        if plan.retain is not None and not repeats:
            cache.evict(plan.retain)
        if self.skipping is not None:
            self._hold()

    def _hold(self) -> None:
        """Remember nothing of layers that no row goes through any more."""
        if self.cache is not None and self.skipping is not None and self.skipping.layers is not None:
            self.cache.hold(self.skipping.layers)

    def select(
        self, rows: Int[Tensor, "b2"], batch: int, condition: Mapping[str, Tensor] | None = None,
        caches: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        """Follow a canvas of `batch` rows: keep, copy or drop rows. -1 is a new row, for which the cache holds what
        `caches` do, or nothing; `condition` holds the raw conditions of the new rows."""
        fresh = rows < 0
        if bool(fresh.any()):
            new = self._encode(condition)
            where = below_own(rows, batch)
            self.conditions = [joined(pair).select(where) for pair in zip(self.conditions, new, strict=True)]
        else:
            self.conditions = [c.select(rows) for c in self.conditions]
        if self.memory is not None:
            self.memory.select(rows)
        if self.cache is not None:
            self.cache.select(torch.cat([torch.where(fresh, -1, rows + i * batch) for i in range(self.copies)]), caches)
        if self.skipping is not None:
            self.skipping.select(rows)
            self._hold()


def progress(canvas: Canvas, drafted: Int[Tensor, "b m"] | None = None) -> float | Float[Tensor, "b m"]:
    """How far generation is before this step: the share of steps done, from 0 to 1. One number where it is the same for
    all rows, else (batch, 1). A draft reaches ahead: (batch, m), before the step that decides each `drafted` element.

    Where elements were decided ahead of their rank (an order that is found on the way), the share of elements."""
    if canvas.length is not None and drafted is None:
        done, total = canvas.length - canvas.given_length, canvas.layout.size - canvas.given_length
        return done / max(total - 1, 1)
    rank = canvas.rank
    last = rank.amax(1, keepdim=True).clamp(min=1)
    now = torch.where(canvas.open, rank, INF).amin(1, keepdim=True)
    decided = canvas.known & (rank >= 0)
    ahead = (decided & (rank > now)).any(1, keepdim=True)
    count, left = decided.sum(1, keepdim=True), canvas.open.sum(1, keepdim=True)
    elements = count / (count + left - 1).clamp(min=1).double()
    if drafted is not None:
        now = rank.gather(1, drafted.clamp(min=0, max=canvas.layout.size - 1).expand(canvas.batch, -1)).clamp(min=0)
    share = torch.where(ahead, elements, torch.minimum(now, last).double() / last)
    return float(share[0, 0]) if bool((share == share[0, 0]).all()) else share


def _weight(guidance: Guidance, done: float | Tensor, like: Tensor) -> float | Tensor:
    if isinstance(done, float):
        return guidance.weight(done)
    kind = torch.float64 if like.dtype == torch.float64 else torch.float32
    weights = [[guidance.weight(share) for share in row] for row in done.tolist()]
    return torch.tensor(weights, dtype=kind, device=like.device)[..., None]


def hidden(plan: Plan, canvas: Canvas, hide: str | Tensor | None, keep: tuple[int, ...] = ()) -> Plan:
    """The plan as a branch embeds it: elements that it may not see stand as masks, unless they are kept."""
    if hide is None:
        return plan
    if isinstance(hide, Tensor):
        gone = hide.expand(canvas.batch, -1)
    else:
        now = torch.where(canvas.open, canvas.rank, INF).amin(1, keepdim=True)
        gone = canvas.rank < (0 if hide == "given" else now)
    if keep:
        gone = gone & ~torch.isin(canvas.value[canvas.layout.kinds[0]].cpu(), torch.tensor(keep))
    slots = plan.slots
    if bool((slots.source == DERIVED).any()):
        raise ValueError("elements cannot be hidden where slots hold what is derived from them")
    element = slots.element.expand(canvas.batch, -1, -1)
    index = element.clamp(min=0, max=canvas.layout.size - 1)
    carries = (gone.gather(1, index.flatten(1)).view_as(index) & (element >= 0)).any(2)
    if slots.node is not None:  # a draft is earlier than what it leads to, and was not given
        drafted = slots.node >= 0
        carries = carries | drafted if isinstance(hide, str) and hide == "earlier" else carries & ~drafted
    source = torch.where(carries & (slots.source == VALUE), MASK, slots.source)
    masked = Slots(slots.element, source, slots.coord, slots.needs, slots.node)
    return _Masked(masked, plan.views, plan.reads, plan.rank, plan.layers, plan.layout, readers=plan.readers)


@dataclass(frozen=True, eq=False)
class _Masked(Plan):
    """What a branch embeds: conditions of single elements stand where they stood."""

    readers: Reads | None = None  # type: ignore[assignment]


def repeated(plan: Plan, copies: int) -> Plan:
    """The plan of a batch that stands `copies` times one below the other; labels that the batch shares stay shared."""
    if plan.run is not None or plan.batch == 1:
        return plan

    def times(x: Any) -> Any:
        return x if x is None or x.shape[0] == 1 else x.repeat(copies, *[1] * (x.dim() - 1))

    def view(v: View) -> View:
        return View(times(v.at), times(v.born), times(v.dies), times(v.lane), times(v.group), v.relation)

    s, r = plan.slots, plan.reads
    return replace(
        plan,
        slots=Slots(times(s.element), times(s.source), times(s.coord), times(s.needs), times(s.node)),
        views={name: view(v) for name, v in plan.views.items()},
        reads=Reads(times(r.slot), times(r.element), times(r.role)),
        rank=times(plan.rank),
        settled=None if plan.settled is None else {name: view(v) for name, v in plan.settled.items()},
        kept=times(plan.kept),
        retain=times(plan.retain),
    )


def joined(conditions: Sequence[Condition]) -> Condition:
    """The rows of all, one below the other."""
    conditions, out = alike(conditions), {}
    for f in fields(Condition):
        parts = [x for c in conditions if (x := getattr(c, f.name)) is not None]
        if len({x.shape[1:] for x in parts}) > 1:
            shapes = ", ".join(str(tuple(x.shape[1:])) for x in parts)
            raise ValueError(f"conditions of different sizes cannot stand in one batch: {f.name} of {shapes}; pad them")
        out[f.name] = torch.cat(parts) if parts else None
    return Condition(**out)


def _check_branch(branch: Branch, model: Model) -> None:
    unknown = (branch.drop or frozenset()) - model.conditions.keys()
    if unknown:
        raise ValueError(
            f"there is no condition {', '.join(sorted(unknown))} to drop; got {', '.join(model.conditions)}"
        )
    if isinstance(branch.hide, Tensor):
        if branch.hide.dtype != torch.bool or branch.hide.dim() != 1:
            raise ValueError(f"elements to hide are marked by a boolean (elements,), got {branch.hide.dtype}")
    elif branch.hide not in (None, "given", "earlier"):
        raise ValueError(f"a branch hides 'given' or 'earlier' elements or marked ones, not {branch.hide!r}")
    if branch.keep:
        vocab = _vocabulary(model)
        wrong = [i for i in branch.keep if not 0 <= i < vocab]
        if wrong or branch.hide is None:
            said = "hides nothing" if branch.hide is None else f"knows the ids 0 to {vocab - 1:,}, not {wrong[0]}"
            raise ValueError(f"kept ids are shown where others are hidden, and this branch {said}")


def _vocabulary(model: Model) -> int:
    """How many ids there are. Raises ValueError for a model of something else, or of several kinds."""
    heads = list(model.heads.values())
    vocab = getattr(heads[0], "vocab", None) if len(heads) == 1 else None
    if vocab is None:
        raise ValueError("ids are suppressed, or kept, of a model that writes ids of one kind")
    return vocab


def _sound(dist: Any) -> bool:
    """No NaN and nothing infinitely likely; -inf is what is impossible."""
    logits = getattr(dist, "logits", None)
    return logits is None or math.isfinite(logits.amax().item())


def _plain_keep(kept: Int[Tensor, "b m"]) -> Keep:
    """A row shared by the batch as a list, which costs no ragged commit."""
    if kept.shape[0] == 1:
        row = kept[0].tolist()
        return len(row) if row == list(range(len(row))) else row
    return kept
