"""A model whose conditionals are a table: pseudo-random, exact, and quick enough to enumerate decoders.

What a slot reads out is a hash of all that the plan lets it see (contents with their coordinates, cached entries
included) and of itself, turned into logits in float64. So it drives the real target, loop, canvas, orders and
key-value cache, and any slip in a mask, a position or the cache gives other numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.backbones.cache import KVCache
from seriatim.canvas import Canvas
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Decider, Proposer, decode
from seriatim.decoding.target import Target
from seriatim.embed import gather_values
from seriatim.factorization.base import Factorization
from seriatim.factorization.line import LinePlan
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.enumeration import Paths, enumerate_rows
from seriatim.layout import Layout
from seriatim.model import Model
from seriatim.plan import VALUE, Plan, Reads
from seriatim.random import mix

Law = dict[tuple[int, ...], float]


class Codes(nn.Module):
    """What stands in slots, as integers: a hash of content and coordinate."""

    kind = "token"

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Int[Tensor, "b s 1"]:
        if isinstance(plan, LinePlan):
            content, place = self._run(canvas, plan, guess)
        else:
            slots = plan.slots
            ids = gather_values(canvas, slots.element, self.kind)[..., 0]
            if guess is not None and slots.node is not None:
                node = slots.node.expand(canvas.batch, -1)
                ids = torch.where(node >= 0, guess.value.clamp(min=0).gather(1, node.clamp(min=0)), ids)
            content = torch.where(slots.source == VALUE, ids, -1 - slots.source)
            place = (slots.coord * torch.tensor([1, 1009, 1000003])[: slots.coord.shape[-1]]).sum(-1)
        return mix(content * 0x1E3779B97F4A7C15 + place * 0x2545F4914F6CDD1D).expand(canvas.batch, -1)[..., None]

    def _run(self, canvas: Canvas, plan: LinePlan, guess: Guess | None) -> tuple[Tensor, Tensor]:
        first = plan.base - plan.prefix
        ids = canvas.value[self.kind][:, max(first, 0) : canvas.length]
        if guess is not None:
            ids = torch.cat([ids, guess.value.clamp(min=0)], 1)
        if first < 0:
            ids = F.pad(ids, (-first, 0), value=-5)
        start, offset = plan.run
        return ids, start + (torch.arange(plan.size) if offset is None else offset)


class Seen(nn.Module):
    """One number a slot: a hash of the codes that it sees, and of its own."""

    mixers: Mapping[str, str] = {"all": "any"}

    def new_cache(self, batch: int, capacity: int = 256) -> KVCache:
        return KVCache(1, batch, 1, 1, torch.long, capacity=32)

    def forward(
        self,
        x: Int[Tensor, "b s 1"],
        plan: Plan,
        cache: KVCache | None = None,
        vector: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Float[Tensor, "b s 1"]:
        if cache is not None:
            cache.begin(plan)
        mask = plan.attention("all", cache)
        keys = x[:, None] if cache is None else cache.append(0, x[:, None], x[:, None])[0]  # (b, 1, k, 1)
        codes = keys[..., 0]  # (b, 1, k)
        if mask is None:
            total = codes.sum(-1, keepdim=True)
        elif isinstance(mask, str):
            total = codes.cumsum(-1).transpose(1, 2)
        else:
            total = (mask[:, 0].long() * codes).sum(-1, keepdim=True)
        # 52 bits, so that a float64 holds the number exactly
        return (mix(mix(total) + x) & ((1 << 52) - 1)).double()


class TableHead(CategoricalHead):
    """Logits of each value, uniform in a range of `spread`, looked up by the hash."""

    def __init__(self, vocab: int, seed: int, spread: float):
        super().__init__(1, vocab)
        self.key, self.spread = mix(torch.tensor(seed)), spread

    def logits(self, h: Float[Tensor, "b m 1"], reads: Reads | None = None) -> Float[Tensor, "b m v"]:
        which = self.key + torch.arange(self.vocab) * 0x3C6EF372FE94F82B
        unit = (mix(h.long() + which) & ((1 << 52) - 1)).double() / float(1 << 52)
        return unit * self.spread


def tabular(layout: Layout, factorization: Factorization, vocab: int, seed: int = 0, spread: float = 3.0) -> Model:
    """A model of ids below `vocab` with the conditionals of table `seed`; `spread` 0 makes them uniform."""
    return Model(layout, factorization, Codes(), Seen(), TableHead(vocab, seed, spread)).eval()


def true_law(model: Model, length: int, warp: Warper | None = None) -> Law:
    """The law of the first `length` tokens of a line by the packed form: every sequence scored in one pass."""
    values = range(model.heads["token"].vocab)  # type: ignore[arg-type]
    heads = torch.tensor(list(itertools.product(values, repeat=length)))
    value = F.pad(heads, (0, model.layout.size - length))
    canvas = model.canvas({"token": value})
    plan = model.factorization.packed(canvas)
    assert plan is not None
    dist, element, _ = model.dist(model.hidden(plan, canvas), plan, canvas)
    dist = dist if warp is None else warp(dist)
    taken = dist.log_prob(value).masked_fill(torch.as_tensor(element) >= length, 0.0)
    return {tuple(x): float(p) for x, p in zip(heads.tolist(), taken.sum(1).exp(), strict=True)}


def decoded_law(
    model: Model,
    length: int,
    decider: Callable[[], Decider],
    proposer: Callable[[], Proposer] | None = None,
    warp: Warper | None = None,
    batch: int = 512,
) -> Law:
    """The exact law of the first `length` tokens that a decoder emits, by enumeration, `batch` outcomes at a time.

    With a batch of 1 rows never differ in length, and decoding takes the path without labels."""

    def run(random: Paths, rows: int) -> list[tuple[int, ...]]:
        canvas = model.blank(rows)
        for _ in decode(Target(model, warp=warp), canvas, decider(), proposer and proposer(), random):
            complete = (canvas.lengths() >= length).tolist()
            if all(complete):
                break
            random.close(complete)
        return [tuple(row) for row in canvas.value["token"][:, :length].tolist()]

    return enumerate_rows(run, batch)  # type: ignore[return-value]


def total_variation(a: Mapping[tuple[int, ...], float], b: Mapping[tuple[int, ...], float]) -> float:
    """Half the sum of absolute differences: 0 for equal laws, 1 for laws that have nothing in common."""
    return sum(abs(a.get(x, 0.0) - b.get(x, 0.0)) for x in a.keys() | b.keys()) / 2
