"""Films of text: what stands where after each step, which step decided it, how sure the model was, what was drafted.

A `Recorder` looks on while one text is generated, whatever the order and the decoder. It stands in the place of the
proposer, hands on what that one drafts, and is told what came of it, as every proposer is: the loop knows nothing of
films, and what is generated stays the same.
"""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from seriatim.canvas import DELETED, GIVEN, Canvas, Set
from seriatim.decoding.guess import Guess, children
from seriatim.decoding.loop import Proposer, Step
from seriatim.decoding.target import Target
from seriatim.factorization.insertion import Insertion
from seriatim.heads.dist import Categorical
from seriatim.model import Rows
from seriatim.random import Random
from seriatim.tokenizers.pieces import Piece, pieces

By = Literal["given", "open", "model", "draft"]
News = Mapping[int, tuple[By, float | None]]  # element -> who decided it, and its chance


class Place(NamedTuple):
    """An element as it stands in a frame.

    token: its id, and text: what it adds to the text (None: not decided yet); by: it was given, is still open, or was
    decided by the model's own draw, or by a draft that stood; frame: the one in which it was decided (0: from the
    beginning); chance: the probability that the model gave it then, before temperature and filters, where it is known.
    """

    element: int
    token: int | None
    text: str | None
    by: By
    frame: int = 0
    chance: float | None = None


@dataclass(frozen=True)
class Frame:
    """A text after a step. places: in reading order; forwards: so far; drafted, accepted: tokens of this step's draft,
    and those that stood; rejected: how the draft went on where it was left (the first of several ways)."""

    places: tuple[Place, ...]
    forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected: str = ""

    @property
    def decided(self) -> int:
        """Places that were decided so far."""
        return sum(place.by in ("model", "draft") for place in self.places)


class Recorder:
    """Frames of one text as it is generated: hand it over as `watch`, one for each generation. Of several rows it
    watches the first; of a beam the best text.

    frames: the canvas before the first step and after each, by whom and how surely each token was decided; histories:
    the same as ids alone.
    """

    def __init__(self, tokenizer: Any):
        self.spell = Speller(tokenizer)
        self.frames: list[Frame] = []
        self.reads_prompt = False
        self._proposer: Proposer | None = None
        self._canvas: Canvas | None = None
        self._name = self._known = 0  # of the row that is watched; elements known before the present step
        self._gaps = False  # unknown elements stand for what is to be inserted, and are no places

    def __call__(self, way: Any) -> Any:
        """The way to decode (`Decoding`), watched."""
        if self.frames or self._proposer is not None:
            raise ValueError("a recorder watches one generation: make another one")
        self._proposer = way.proposer
        self.reads_prompt = getattr(way.proposer, "reads_prompt", False)
        return dataclasses.replace(way, proposer=self)

    # ---- as a proposer ----------------------------------------------------------------------------------------------

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        if self._canvas is None:
            self._canvas, self._name = canvas, int(canvas.row[0])
            self._gaps = isinstance(target.model.factorization, Insertion)
            self.frames.append(Frame(self._places({})))
        self._known = canvas.length or 0
        return None if self._proposer is None else self._proposer.propose(canvas, target, random)

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        if self._proposer is not None:
            self._proposer.observe(canvas, rows, step)
        row = self._row if step.select is None else int(step.select[self._row])  # before the step
        path = [] if rows.guess is None else _path(rows, step, row)
        places = self._places(self._news(rows, step, row, path))
        forwards, drafted, accepted = self.frames[-1].forwards + step.forwards, step.drafted, step.accepted
        left = "" if rows.guess is None else self._left(rows.guess, row, path)
        self.frames.append(Frame(places, forwards, _of(drafted, row), _of(accepted, row), left))

    @property
    def histories(self) -> list[list[int | None]]:
        """The ids of every frame, in reading order; None where none is decided yet."""
        return [[place.token for place in frame.places] for frame in self.frames]

    def finish(self) -> None:
        """Take in what was done to the text behind the last step, as where a string ended it."""
        if self._canvas is not None and (places := self._places({})) != self.frames[-1].places:
            self.frames.append(Frame(places, self.frames[-1].forwards))

    # ---- looking ----------------------------------------------------------------------------------------------------

    @property
    def _row(self) -> int:
        """Where the watched text stands now."""
        assert self._canvas is not None
        return int((self._canvas.row == self._name).nonzero()[0])

    def _places(self, news: News) -> tuple[Place, ...]:
        canvas, row = self._canvas, self._row
        assert canvas is not None
        status = canvas.status[row]
        order = canvas.place[row].masked_fill(status == DELETED, canvas.layout.size).argsort(stable=True)
        order = order[: int((status != DELETED).sum())]
        if self._gaps:
            order = order[canvas.known[row, order]]
        ids, known = canvas.value[canvas.layout.kinds[0]][row, order].tolist(), canvas.known[row, order].tolist()
        tokens = [token if there else None for token, there in zip(ids, known, strict=True)]
        before = {place.element: place for place in self.frames[-1].places} if self.frames else {}
        given, out = (status[order] == GIVEN).tolist(), []
        for e, token, text, old in zip(order.tolist(), tokens, self.spell(tokens), given, strict=True):
            was = before.get(e)
            if was is not None and was.token == token and e not in news:
                out.append(was if was.text == text else was._replace(text=text))
            elif token is None or old:
                out.append(Place(e, token, text, "open" if token is None else "given"))
            else:
                by, chance = news.get(e, ("model", None))
                out.append(Place(e, token, text, by, len(self.frames), chance))
        return tuple(out)

    def _news(self, rows: Rows, step: Step, row: int, path: Sequence[int]) -> News:
        """Who decided each element that a step set, and its chance."""
        out: dict[int, tuple[By, float | None]] = {}
        for edit in step.edits:
            if not isinstance(edit, Set) or edit.value.dim() != 2 or edit.value.is_floating_point():
                continue
            token = edit.value[self._row].tolist()
            first = range(self._known, self._known + len(token))
            element = first if edit.element is None else edit.element[self._row].tolist()
            live = [(e, t) for e, t in zip(element, token, strict=True) if e >= 0]
            chances = _chances(rows, row, path, live)
            for i, ((e, _), chance) in enumerate(zip(live, chances, strict=True)):
                out[e] = ("draft" if i < len(path) else "model", chance)
        return out

    def _left(self, guess: Guess, row: int, path: Sequence[int]) -> str:
        """How a draft went on behind what stood of it."""
        below, value = children(guess.parents()), guess.value[row].tolist()
        node, tokens = path[-1] if path else -1, list[int]()
        while (node := next((c for c in below[node] if value[c] >= 0), -1)) >= 0:
            tokens.append(value[node])
        return "".join(text or "" for text in self.spell(tokens))


def _of(count: int | Tensor, row: int) -> int:
    """A count of one row."""
    return int(count[row]) if isinstance(count, Tensor) and count.dim() else int(count)


def _path(rows: Rows, step: Step, row: int) -> list[int]:
    """The nodes of a draft that stood, from the root."""
    guess, keep = rows.guess, step.keep
    assert guess is not None
    if guess.chain or keep is None:
        return list(range(_of(step.accepted, row)))
    slots = range(keep) if isinstance(keep, int) else keep[row].tolist() if isinstance(keep, Tensor) else keep
    first = rows.hidden.shape[1] - guess.size
    return [slot - first for slot in slots if slot >= first]


def _chances(rows: Rows, row: int, path: Sequence[int], live: Sequence[tuple[int, int]]) -> list[float | None]:
    """The probability of each decided (element, token) where it was read out; None where that is not known."""
    if not isinstance(rows.said, Categorical):
        return [None] * len(live)
    logits = rows.said.logits[row if len(rows.said.logits) > 1 else 0]
    element = rows.element
    if rows.guess is not None and not rows.guess.chain:  # several nodes of a tree read one element
        reads = {e: column for (e, _), column in zip(live, [0, *(1 + node for node in path)], strict=False)}
    elif isinstance(element, int):
        reads = {element + i: i for i in range(len(logits))}
    else:
        reads = {e: i for i, e in enumerate(element[row if len(element) > 1 else 0].tolist())}
    found = [(reads[e], token) for e, token in live if e in reads]
    if not found:
        return [None] * len(live)
    column, token = torch.tensor(found).unbind(1)
    chance = iter(Categorical(logits[None, column]).log_prob(token[None].to(logits.device))[0].exp().tolist())
    return [next(chance) if e in reads else None for e, _ in live]


class Speller:
    """The text that each id adds, of ids in reading order. A letter of several ids belongs to its last; between words
    of a tokenizer that drops spaces there is one; special ids are their names."""

    def __init__(self, tokenizer: Any):
        self.pieces: Sequence[Piece] | None = None if tokenizer is None else pieces(tokenizer)
        self.between = " " if tokenizer is None or tokenizer.kind == "words" else ""

    def __call__(self, ids: Sequence[int | None]) -> list[str | None]:
        """None: the id is not known yet."""
        read = codecs.getincrementaldecoder("utf-8")("replace").decode
        out: list[str | None] = []
        said = [self._piece(i) for i in ids]
        for n, piece in enumerate(said):
            if isinstance(piece, bytes):
                last = n + 1 == len(said) or not isinstance(said[n + 1], bytes)
                piece = read(piece, last)
            out.append(self.between + piece if self.between and n and piece else piece)
        return out

    def _piece(self, token: int | None) -> bytes | str | None:
        if token is None:
            return None
        if self.pieces is None:
            return str(token)
        piece = self.pieces[token] if token < len(self.pieces) else None
        return f"<{token}>" if piece is None else piece
