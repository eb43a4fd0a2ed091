"""The rows in flight of one decoder: they join and leave between any two steps, each with settings of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seriatim.canvas import DELETED, Canvas, Grow, Truncate
from seriatim.decoding.draft import Drafting
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Decider, Step, decode, select_rows
from seriatim.layout import Segment, line
from seriatim.model import Rows
from seriatim.random import Random
from seriatim.serving.compaction import compacted
from seriatim.serving.request import Piece, Request
from seriatim.serving.rows import RowConstraint, RowKeyed, RowPenalties, RowWarper
from seriatim.systems.decoders import Decoding, decoder_of
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.system import Sampling
from seriatim.systems.text_system import TextSystem

LEAST = 256  # elements of a canvas; it is doubled where a text needs more


@dataclass
class Ready:
    """A request that may join: its prompt was read (cache: all but its last token; None: it is read with the others),
    and a grammar has a matcher."""

    number: int
    request: Request
    cache: Any = None
    matcher: Any = None

    @property
    def size(self) -> int:
        return len(self.request.prompt) + self.request.max_new_tokens


def way_of(system: TextSystem, decoder: str) -> Decoding:
    """A way to decode by its name, "own" that of the system, whatever is asked of single rows. Raises ValueError where
    there is none."""
    if decoder == "own" and not isinstance(system, LanguageModel):
        return Decoding(system.decider(system.sampling), system.proposer(system.sampling))
    return decoder_of(system, "ancestral" if decoder == "own" else decoder, Sampling(), system.stop)


class Overhearing:
    """A decider whose last rows can be looked at."""

    def __init__(self, decider: Decider):
        self.decider = decider
        self.rows: Rows | None = None
        self.needs: frozenset[str] = getattr(decider, "needs", frozenset())

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        self.rows = rows
        return self.decider.decide(canvas, guess, rows, random)


class Batch:
    """All texts that one decoder writes at present.

    Raises ValueError for decoders that take back what they decided, or keep several versions of a text: nothing could
    be given out before the end; and for orders whose rows have to go together.
    """

    def __init__(self, system: TextSystem, decoder: str, rows: int):
        self.system, self.most = system, rows
        way = way_of(system, decoder)
        if getattr(way.decider, "redraws", False):
            raise ValueError(f"{decoder} may take back what it decided, so that nothing can be streamed: leave it out")
        if getattr(system.model.factorization, "shift", False) or way.block is not None:
            raise ValueError(f"rows of {system.meta.key} by {decoder} go together, block by block: they cannot join")
        self.decider, self.proposer = Overhearing(way.decider), way.proposer
        self.reads_prompt = bool(getattr(way.proposer, "reads_prompt", False))
        self.more, self.stop = dict(way.target), torch.tensor(system.stop, dtype=torch.long)
        self.warp, self.penalties, self.random = RowWarper(), RowPenalties(), RowKeyed()
        if isinstance(way.proposer, Drafting):
            draft = way.proposer.draft  # sampled as the row is that it is for
            draft.warp, draft.shapers = self.warp, (self.penalties,)
        vocab = getattr(system.model.heads["token"], "vocab", 0) or 0
        self.constraint = RowConstraint(vocab)
        self.drafted = 0  # tokens, so far
        self.clear()

    def clear(self) -> None:
        """Nothing is in flight."""
        self.rows: list[Ready] = []
        self.target: Any = None
        self.canvas: Canvas | None = None
        self.stream: Iterator[Step] | None = None
        self.told = torch.zeros(0, dtype=torch.long)
        self.constraint.matchers, self.constraint.taken = [], None

    # ---- who is in it ------------------------------------------------------------------------------------------------

    def change(self, leave: Collection[int], come: Sequence[Ready]) -> None:
        """Between two steps some leave (by number), and others join."""
        stays = [row.number not in leave for row in self.rows]
        if all(stays) and not come:
            return
        if not any(stays):
            self.clear()
            if come:
                self._begin(come)
            return
        assert self.canvas is not None
        cache = self.target.cache
        first, room = getattr(cache, "window", (0, self.most))
        rows = compacted(stays, len(come), first, max(room, sum(stays) + len(come)))
        self._grow(max((row.size for row in come), default=0))
        new = self._canvas(come, self.canvas.layout.size) if come else None
        caches = [row.cache for row in come if row.cache is not None]
        select_rows(self.target, self.canvas, torch.tensor(rows), new, None, caches)
        coming = iter(come)
        self._follow(rows, [self.rows[r] if r >= 0 else next(coming) for r in rows], come)

    def _begin(self, come: Sequence[Ready]) -> None:
        """The first rows of an empty batch."""
        size = LEAST
        while size < max(row.size for row in come):
            size *= 2
        self.canvas = self._canvas(come, min(size, self.system.model.layout.size))
        self.target = self.system.target(None, Sampling(), **self.more)
        self.target.warp = self.warp
        self.target.shapers = (self.penalties, self.constraint)
        caches = [row.cache for row in come]
        if caches[0] is None:
            self.target.begin(self.canvas)
        else:
            empty = self.system.model.new_cache(1, 1)
            empty.select(torch.full((len(come),), -1), caches)
            if hasattr(empty, "reserve"):
                empty.reserve(self.most, self.canvas.layout.size + LEAST)
            self.target.begin(self.canvas, empty)
        self._follow([-1] * len(come), list(come), come)

    def _canvas(self, come: Sequence[Ready], size: int) -> Canvas:
        """Rows of this size with the prompts given, each with room for its new tokens."""
        value = torch.zeros(len(come), size, dtype=torch.long)
        known = torch.tensor([len(row.request.prompt) for row in come])
        for b, row in enumerate(come):
            value[b, : len(row.request.prompt)] = torch.tensor(row.request.prompt)
        names = torch.tensor([row.number for row in come])
        if isinstance(self.system, LanguageModel):
            canvas = self.system.model.canvas({"token": value}, known, row=names, layout=line(size))
        else:  # in the order in which the system would write each of them
            rank = torch.zeros(len(come), size, dtype=torch.long)
            for b, row in enumerate(come):
                alone = self.system.begun(row.request.prompt, row.request.max_new_tokens).rank[0]
                rank[b, : len(alone)], rank[b, len(alone) :] = alone, alone[-1]
            canvas = Canvas(line(size), {"token": value}, known, rank, names)
        canvas.apply([Truncate(torch.tensor([row.size for row in come]))])
        return canvas

    def _grow(self, size: int) -> None:
        """Make room for texts of so many tokens."""
        canvas = self.canvas
        assert canvas is not None
        old = new = canvas.layout.size
        while new < size:
            new *= 2
        new = min(new, self.system.model.layout.size)
        if new <= old:
            return
        alive = (canvas.status != DELETED).sum(1)
        more = Segment(canvas.layout.kinds[0], torch.arange(old, new)[:, None])
        canvas.apply([Grow(more), Truncate(alive)])

    def _follow(self, rows: Sequence[int], now: list[Ready], come: Sequence[Ready]) -> None:
        """Everything that is kept for each row follows them."""
        matchers = [row.matcher for row in come]
        self.constraint.follow(rows, matchers, [len(row.request.prompt) for row in come])
        requests = [row.request for row in now]
        self.rows = now
        self.warp.follow([r.sampling.warp for r in requests])
        self.penalties.follow(requests)
        self.random.follow([row.number for row in now], requests)
        assert self.canvas is not None
        self.told = self.canvas.lengths()

    # ---- a step ------------------------------------------------------------------------------------------------------

    def step(self) -> list[Piece]:
        """One forward of all rows; what it added to them. Rows that are finished are to leave before the next."""
        assert self.canvas is not None
        if self.stream is None:
            self.stream = decode(self.target, self.canvas, self.decider, self.proposer, self.random)
        step = next(self.stream, None)
        if step is None:
            raise RuntimeError("nothing is left to decide, and rows were told to go on")
        canvas = self.canvas
        held = canvas.lengths()
        at = self.told[:, None] + torch.arange(max(int((held - self.told).max()), 1))
        new = canvas.value["token"].gather(1, at.clamp(max=canvas.layout.size - 1)).cpu()
        stops = torch.isin(new, self.stop) & (at < held[:, None])  # what stands behind an end may yet go
        first = torch.where(stops, torch.arange(new.shape[1]), new.shape[1]).amin(1) + 1
        count, ids = torch.minimum(held - self.told, first), new.tolist()
        ended = (~canvas.open.any(1) | stops.any(1)).tolist()
        accepted = torch.as_tensor(step.accepted).expand(len(ids)).tolist()
        scored = self._scores(step, ids, count.tolist())
        self.told, stop = held, self.system.stop
        self.drafted += int(torch.as_tensor(step.drafted).expand(len(ids)).sum())
        return [
            _piece(row.number, got[:n], hit, done, stop, scored.get(b))
            for b, (row, got, n, hit, done) in enumerate(
                zip(self.rows, ids, count.tolist(), accepted, ended, strict=True)
            )
            if n or done
        ]

    def _scores(self, step: Step, ids: list[list[int]], count: list[int]) -> dict[int, Any]:
        """Log-probabilities of the new tokens of the rows that want them, and of the likeliest ones."""
        wanted = [b for b, row in enumerate(self.rows) if row.request.logprobs is not None and count[b]]
        rows = self.decider.rows
        if not wanted or rows is None:
            return {}
        out = {}
        for b in wanted:
            reads = torch.tensor(_reads(step, rows, b, count[b]))
            said = torch.log_softmax(rows.said.logits[b if len(rows.said.logits) > 1 else 0, reads].float(), -1)
            mine = said.gather(1, torch.tensor(ids[b][: count[b]])[:, None])[:, 0].tolist()
            most = self.rows[b].request.logprobs or 0
            best = said.topk(most, -1) if most else None
            top = [] if best is None else [
                tuple(zip(i, x, strict=True)) for i, x in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]  # fmt: skip
            out[b] = tuple(mine), tuple(top) or None
        return out


def _piece(number: int, ids: list[int], accepted: int, done: bool, stop: Collection[int], scored: Any) -> Piece:
    finish = None if not done else "stop" if ids and ids[-1] in stop else "length"
    logprobs, top = scored or (None, None)
    return Piece(number, tuple(ids), min(accepted, len(ids)), logprobs, top, finish)  # type: ignore[arg-type]


def _reads(step: Step, rows: Rows, b: int, count: int) -> list[int]:
    """Which read-outs of a row the new tokens were drawn from: behind what was known, then behind each node of the
    draft that stood."""
    if count == 1 or not isinstance(rows.slot, Tensor):
        return list(range(count))
    slot = rows.slot[b if len(rows.slot) > 1 else 0].tolist()
    keep = torch.as_tensor(step.keep)
    kept = (keep[b] if keep.dim() == 2 else keep).tolist()
    known = kept.index(slot[0])
    return [slot.index(s) for s in kept[known : known + count]]
