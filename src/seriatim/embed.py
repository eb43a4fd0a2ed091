"""What stands in slots, as vectors: values, masks, noise, learned starts, conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.line import LinePlan
from seriatim.plan import LEARNED, MASK, Plan


class Embed(Protocol):
    """Vectors for the slots of a plan."""

    def __call__(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        """`prefix` (b, n, d) stands in the learned slots: a class, a learned start."""
        ...


class TokenEmbed(nn.Module):
    """Ids of one kind through a table; optional learned positions by coordinate, one table an axis.

    A slot that carries several elements gets the sum of their vectors; one that carries a mask the mask vector.
    """

    def __init__(
        self, vocab: int, width: int, kind: str = "token", positions: Sequence[int] = (), mask: bool = False, std=0.02
    ):
        super().__init__()
        self.kind, self.vocab = kind, vocab
        self.table = nn.Parameter(torch.randn(vocab, width) * std)
        self.start = nn.Parameter(torch.randn(width) * std)
        self.mask = nn.Parameter(torch.randn(width) * std) if mask else None
        self.positions = nn.ParameterList(nn.Parameter(torch.randn(n, width) * std) for n in positions)

    def forward(
        self, canvas: Canvas, plan: Plan, guess: Guess | None = None, prefix: Tensor | None = None
    ) -> Float[Tensor, "b s d"]:
        if isinstance(plan, LinePlan):
            x = self._run(canvas, plan, guess, prefix)
        else:
            x = self._slots(canvas, plan, guess, prefix)
        if len(self.positions):
            coord = plan.slots.coord.to(x.device)
            for axis, table in enumerate(self.positions):
                x = x + F.embedding(coord[..., axis], table)
        return x

    def _run(self, canvas: Canvas, plan: LinePlan, guess: Guess | None, prefix: Tensor | None) -> Tensor:
        first = plan.base - plan.prefix
        ids = canvas.value[self.kind][:, max(first, 0) : canvas.length]
        if guess is not None:
            ids = torch.cat([ids, guess.value.clamp(min=0)], 1)
        x = F.embedding(ids, self.table)
        if first < 0:
            x = torch.cat([self._prefix(prefix, canvas.batch, plan.prefix)[:, first:].to(x.dtype), x], 1)
        return x

    def _prefix(self, prefix: Tensor | None, batch: int, n: int) -> Float[Tensor, "b n d"]:
        if prefix is not None:
            return prefix
        return self.start.expand(batch, n, -1)

    def _slots(self, canvas: Canvas, plan: Plan, guess: Guess | None, prefix: Tensor | None) -> Tensor:
        slots, b = plan.slots, canvas.batch
        ids = gather_values(canvas, slots.element, self.kind)
        if guess is not None and slots.node is not None:
            node = slots.node.expand(b, -1)
            drafted = guess.value.clamp(min=0).gather(1, node.clamp(min=0))
            ids = torch.where((node >= 0)[..., None], drafted[..., None], ids)
        carried = (slots.element >= 0)[..., None].to(ids.device)
        x = (F.embedding(ids.clamp(max=self.vocab - 1), self.table) * carried).sum(2)
        source = slots.source.to(x.device)
        learned = source == LEARNED
        if bool(learned.any()):
            n = int(learned[0].sum())
            vector = self._prefix(prefix, b, n).to(x.dtype)
            index = slots.coord[..., :1].to(x.device).clamp(max=vector.shape[1] - 1)
            vector = vector.gather(1, index.expand(b, -1, vector.shape[-1]))
            x = torch.where(learned[..., None], vector, x)
        if self.mask is not None:
            x = torch.where((source == MASK)[..., None], self.mask, x)
        return x.expand(b, -1, -1)


def gather_values(canvas: Canvas, element: Int[Tensor, "b s c"], kind: str) -> Tensor:
    """The values of elements of a kind, (b, s, c) or (b, s, c, d); anything where `element` is -1."""
    value = canvas.value[kind]
    index = canvas.layout.index[element.clamp(min=0)].expand(value.shape[0], -1, -1).to(value.device)
    rows = torch.arange(value.shape[0], device=value.device)[:, None, None]
    return value[rows, index.clamp(max=value.shape[1] - 1)]
