"""A part of a sample that is known beforehand, taken as it comes in the order: for orders in which what is known later
must not be seen earlier. (Where it may, it is given on the canvas.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from seriatim.canvas import Canvas, Edit, Set, Unset
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Decider, Step
from seriatim.model import Rows
from seriatim.random import Random


@dataclass(frozen=True)
class Kept:
    """Another decider, in whose steps elements that are known get their own values, and are never made unknown again.

    value: by kind (batch, elements of the kind, ...); keep: which elements are known. What is drawn next has seen the
    known values, not those that were drawn for them. For deciders that take back nothing they decided otherwise; with
    drafts, whose later tokens hang on earlier ones, it has no meaning.
    """

    decider: Decider
    value: Mapping[str, Tensor]
    keep: Bool[Tensor, "E"]

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        step = self.decider.decide(canvas, guess, rows, random)
        return replace(step, edits=tuple(self._edited(canvas, edit) for edit in step.edits))

    def _edited(self, canvas: Canvas, edit: Edit) -> Edit:
        if type(edit) is Unset:
            return Unset(torch.where(self.keep[edit.element.clamp(min=0)], -1, edit.element))
        if type(edit) is not Set:
            return edit
        element = edit.element
        if element is None:
            start = canvas.length or 0
            end = min(start + edit.value.shape[1], canvas.layout.size)
            element = torch.arange(start, end).expand(canvas.batch, -1)
        x = edit.value[:, : element.shape[1]].clone()
        for kind in canvas.layout.kinds:
            mine = self.keep & (canvas.layout.kind == canvas.layout.kinds.index(kind))
            b, i = (mine[element.clamp(min=0)] & (element >= 0)).nonzero(as_tuple=True)
            x[b, i] = self.value[kind][b, canvas.layout.index[element[b, i]]].to(x.dtype)
        return Set(x, edit.element)
