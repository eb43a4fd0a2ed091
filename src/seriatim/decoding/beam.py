"""Beam search: of all continuations of the best texts so far, keep the best."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas, Set, Truncate
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step, stop_ids
from seriatim.heads.dist import Categorical
from seriatim.model import Rows
from seriatim.random import Random


class Beam:
    """Keeps the `width` likeliest texts of each sample; draws nothing.

    Texts of one sample are rows of one name (`Canvas.row`), best first: a canvas of b rows ends with up to b x width.
    `stop` ids end a text, which stays a candidate. Candidates are ranked by log-probability / length ** `penalty`,
    length in generated elements (0: by log-probability; 1: by its mean). Afterwards `log_prob` (rows,) holds the
    log-probability of each row under the target's law, in nats, and `score` what it was ranked by.

    Between two steps rows may change places, go, or be admitted: a beam knows each by its sample and its text. A text
    that it does not know starts a beam of its own.
    """

    redraws = True  # the best text may be another one after the next step

    def __init__(self, width: int, stop: Iterable[int] = (), penalty: float = 0.0):
        if width < 1:
            raise ValueError(f"a beam is at least 1 wide, got {width}")
        if not penalty >= 0:
            raise ValueError(f"a length penalty is 0 (none) or more, got {penalty}")
        self.width, self.stop, self.penalty = width, stop_ids(stop), penalty
        self.log_prob: Float[Tensor, "b"] = torch.zeros(0, dtype=torch.float64)
        self.score: Float[Tensor, "b"] = torch.zeros(0)
        self._canvas: Canvas | None = None
        self._length: Int[Tensor, "b"] = torch.zeros(0, dtype=torch.long)
        self._text: dict[tuple[int, ...], int] = {}  # where the row of each sample and text stands

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if guess is not None:
            raise ValueError("a beam verifies nothing: use no proposer")
        if not isinstance(rows.dist, Categorical):
            raise TypeError(f"a beam ranks texts of ids, not what {type(rows.dist).__name__} is a distribution of")
        element = torch.atleast_2d(torch.as_tensor(rows.element)).expand(canvas.batch, -1)
        lp = rows.dist.log_probs().double().cpu()
        if lp.shape[1] != 1:
            raise ValueError(f"a beam extends texts by one element a step, but this order reads {lp.shape[1]} at once")
        texts = _texts(canvas)
        self._follow(canvas, texts)
        alive = element[:, 0] >= 0
        parent, token = self._best(canvas, lp[:, 0], alive)
        goes = alive[parent]
        added = lp[parent, 0, token.clamp(min=0)]
        self.log_prob = self.log_prob[parent] + torch.where(goes, added, 0.0)
        self._length = self._length[parent] + goes.long()
        self.score = self._ranked(self.log_prob, self._length)
        self._remember(texts, parent, token, element)
        return Step(self._edits(canvas, element[parent], token, goes), select=parent)

    def _follow(self, canvas: Canvas, texts: Int[Tensor, "b E+1"]) -> None:
        """Another canvas starts anew; rows may have moved, come and gone."""
        if canvas is not self._canvas:
            self._canvas, self._text = canvas, {}
        was = torch.tensor([self._text.get(tuple(text), -1) for text in texts.tolist()])
        self.log_prob = torch.cat([self.log_prob, torch.zeros(1, dtype=torch.float64)])[was]  # -1: the zero
        self._length = torch.cat([self._length, torch.zeros(1, dtype=torch.long)])[was]

    def _remember(self, texts: Tensor, parent: Int[Tensor, "n"], token: Int[Tensor, "n"], element: Tensor) -> None:
        """The texts as they will stand after this step."""
        after, place = texts[parent], 1 + element[parent, 0]
        row = (token >= 0).nonzero()[:, 0]
        after[row, place[row]] = token[row]
        self._text = {tuple(text): i for i, text in enumerate(after.tolist())}

    def _ranked(self, log_prob: Float[Tensor, "*n"], length: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return log_prob / length.clamp(min=1).double() ** self.penalty

    def _best(self, canvas: Canvas, lp: Float[Tensor, "b v"], alive: Tensor) -> tuple[Int[Tensor, "n"], Tensor]:
        """The rows to continue and the tokens to add (-1: an ended text stays), best first in each sample."""
        total = self.log_prob[:, None] + lp
        score = self._ranked(total, (self._length + 1)[:, None].expand_as(total))
        # an ended text competes as it is, in the first column
        stays = self._ranked(self.log_prob, self._length)
        score = torch.where(alive[:, None], score, -torch.inf)
        score[:, 0] = torch.where(alive, score[:, 0], stays)
        parents, tokens = [], []
        for name in dict.fromkeys(canvas.row.tolist()):
            mine = (canvas.row == name).nonzero()[:, 0]
            flat = score[mine].flatten()
            best = flat.topk(min(self.width, int((flat > -torch.inf).sum()))).indices
            parent = mine[best // lp.shape[1]]
            parents.append(parent)
            tokens.append(torch.where(alive[parent], best % lp.shape[1], -1))
        return torch.cat(parents), torch.cat(tokens)

    def _edits(self, canvas: Canvas, element: Int[Tensor, "n 1"], token: Int[Tensor, "n"], goes: Tensor) -> tuple:
        value = token.clamp(min=0)[:, None]
        ended = goes & torch.isin(token, torch.tensor(sorted(self.stop), dtype=torch.long))
        if canvas.length is not None and not bool(ended.any()):
            return (Set(value),)
        edits: tuple = (Set(value, element),)
        if bool(ended.any()):
            edits += (Truncate(torch.where(ended, element[:, 0] + 1, canvas.layout.size)),)
        return edits


def _texts(canvas: Canvas) -> Int[Tensor, "b E+1"]:
    """What is known of each row, led by the name of its sample: ids in the order of their elements, -1 elsewhere."""
    text = torch.full((canvas.batch, canvas.layout.size), -1)
    for kind, value in canvas.value.items():
        if value.dim() == 2 and not value.is_floating_point():
            text[:, canvas.layout.elements(kind)] = value.cpu()
    return torch.cat([canvas.row[:, None].cpu(), text.masked_fill(~canvas.known, -1)], 1)
