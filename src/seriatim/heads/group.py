"""A head that is a whole model: the distribution of a group of ids, such as the bytes of a word.

The hidden state of a slot is the condition of a small model over the group (its prefix, as in hierarchical
autoregressive transformers, arXiv 2501.10322). Teacher forcing, sampling and likelihood are those of that model, by
its own order; groups may end early, by a stop id. A group of known length and one table a depth is `depthwise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.canvas import Canvas, Truncate
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.heads.dist import FromStates, drawn
from seriatim.model import Model, counted
from seriatim.plan import Reads
from seriatim.random import Key, Random


class Inside:
    """The randomness of a model inside a head: its rows are the read-outs of the model outside, its elements their
    draws."""

    def __init__(self, random: Random, key: Key, batch: int, reads: int):
        element = torch.arange(key.element, key.element + reads) if isinstance(key.element, int) else key.element
        self.random, self.key = random, key._replace(element=element.expand(batch, reads))

    def categorical(self, logits: Float[Tensor, "r n v"], key: Key) -> Int[Tensor, "r n"]:
        assert isinstance(self.key.element, Tensor)
        rows, n, _ = logits.shape
        place = torch.arange(key.element, key.element + n) if isinstance(key.element, int) else key.element
        place = place.expand(rows, n)
        columns = []
        for j, number in enumerate(place.amax(0).tolist()):
            here = place[:, j].view(self.key.element.shape)
            if bool(((here >= 0) & (here != number)).any()):
                raise ValueError("groups are decided side by side: all rows of a step read the same place")
            element = torch.where(here >= 0, self.key.element, -1)
            outside = drawn(self.key, max(number, 0))._replace(element=element)
            x = self.random.categorical(logits[:, j].view(*element.shape, -1), outside)
            columns.append(x.view(rows))
        return torch.stack(columns, 1)

    def heads(self, probability: Tensor, key: Key) -> Tensor:
        raise TypeError("the model inside a head is sampled id by id, without coins")

    def uniform(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        raise TypeError("the model inside a head is sampled id by id, without uniform numbers")

    def normal(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        raise TypeError("the model inside a head is sampled id by id, without normal numbers")


class Group(FromStates):
    """The joint distribution of a group of ids at each read-out. The j-th draw of an element is id j of its group;
    temperature and filters apply to every id."""

    __slots__ = ()

    def sample(self, random: Random, key: Key) -> Int[Tensor, "b m n"]:
        """Ids behind the stop id are 0."""
        head: GroupHead = self.head
        _, b, m, _ = self.states.shape
        canvas = head.model.blank(b * m)
        target = Target(head.model, head.raw(self.states[0]), warp=self.warper)
        generate(target, canvas, SampleAll(head.stops), random=Inside(random, key, b, m))
        return torch.where(canvas.known, canvas.value[head.kind], 0).view(b, m, -1)

    def log_prob(self, x: Int[Tensor, "b m n"]) -> Float[Tensor, "b m"]:
        """Log-probability of each group up to its stop id, in one pass; nats."""
        return self.log_probs(x).sum(-1)

    def log_probs(self, x: Int[Tensor, "b m n"]) -> Float[Tensor, "b m n"]:
        """Log-probability of each id given what the order puts before it; 0 behind the stop id. Nats."""
        head: GroupHead = self.head
        _, b, m, _ = self.states.shape
        if tuple(x.shape) != (b, m, *head.value_shape):
            raise ValueError(f"values are ({b}, {m}, {head.value_shape[0]}) ids, got {tuple(x.shape)}")
        model, ids = head.model, x.flatten(0, 1)
        canvas = head.finished(ids)
        plan = model.factorization.packed(canvas)
        assert plan is not None
        h = model.hidden(plan, canvas, None, model.encode(head.raw(self.states[0])))
        dist, read, _ = model.dist(h, plan, canvas)
        dist = dist if self.warper is None else self.warper(dist)
        live, element = (x.to(h.device) for x in counted(canvas, torch.as_tensor(read).cpu()))
        terms = dist.log_prob(ids.to(h.device).gather(1, element)).masked_fill(~live, 0.0)
        return terms.new_zeros(ids.shape).scatter_add(1, element, terms).view(x.shape)

    def mix(self, others: Sequence[Self], weights: Sequence[float | Tensor]) -> Self:
        raise TypeError("groups have no mixture: guide by a depth-wise head, whose branches are mixed at every id")


class GroupHead(nn.Module):
    """A small `model` over each group, conditioned on the hidden state as its condition `state` (b, 1, width).

    Its layout is one line of ids of one kind, as long as the longest group. With `stop`, a group ends behind that id,
    or at full length without it. Its order must have an exact likelihood.
    """

    exact = True
    continuous = False

    def __init__(self, model: Model, stop: int | None = None):
        super().__init__()
        kinds = model.layout.kinds
        if len(kinds) != 1 or set(model.conditions) != {"state"}:
            raise ValueError(
                f"the model inside a head has elements of one kind and the one condition 'state'; this one has "
                f"{', '.join(kinds)} and {', '.join(model.conditions) or 'no condition'}"
            )
        if model.factorization.likelihood != "exact":
            name = type(model.factorization).__name__
            raise ValueError(f"{name} has no exact likelihood, so it cannot be the order inside a head")
        if not getattr(model.heads[kinds[0]], "exact", False):
            raise ValueError(
                f"{type(model.heads[kinds[0]]).__name__} has no log_prob: it cannot be the head inside a head"
            )
        self.model, self.kind = model, kinds[0]
        self.vocab: int = model.heads[self.kind].vocab  # type: ignore[assignment]
        if stop is not None and not 0 <= stop < self.vocab:
            raise ValueError(f"the stop id lies in 0..{self.vocab - 1}, got {stop}")
        self.stop, self.value_shape = stop, (model.layout.size,)

    @property
    def stops(self) -> tuple[int, ...]:
        return () if self.stop is None else (self.stop,)

    def raw(self, states: Float[Tensor, "b m d"]) -> dict[str, Tensor]:
        """The condition of the model inside: one row a read-out."""
        return {"state": states.flatten(0, 1)[:, None]}

    def finished(self, x: Int[Tensor, "r n"]) -> Canvas:
        """Groups on a canvas of the model inside, each cut behind its stop id."""
        canvas = self.model.canvas({self.kind: x})
        if self.stop is not None:
            going = (x != self.stop).long().cumprod(1).sum(1)
            canvas.apply([Truncate((going + 1).clamp(max=x.shape[1]))])
        return canvas

    def dist(self, h: Float[Tensor, "b m d"], reads: Reads | None, canvas: Canvas) -> Group:
        return Group(self, h[None])

    def loss(
        self,
        h: Float[Tensor, "b m d"],
        reads: Reads | None,
        value: Int[Tensor, "b m n"],
        random: Random | None = None,
        key: Key | None = None,
    ) -> Float[Tensor, "b m"]:
        """Cross-entropy of a whole group (the sum over its ids, its stop id included) in nats."""
        return -Group(self, h[None]).log_prob(value)
