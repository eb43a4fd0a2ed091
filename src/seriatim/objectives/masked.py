"""Training of orders without a packed form: some elements are hidden, the others shown, one forward reads the hidden.

What a masked generator learns, whatever is hidden by which rule: the law of each hidden element given those shown. The
rules differ in how many are hidden and in the weight of a row's loss; with the weights of `by_time` and `by_count` the
expected loss of a row is the bound of absorbing diffusion on its negative log-likelihood, which is the mean over all
orders of the any-order log-likelihood (MDLM, Sahoo et al. 2024, arXiv 2406.07524; LLaDA, Nie et al. 2025, arXiv
2502.09992). Nothing here knows what elements are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import DELETED, Canvas, Delete, Set
from seriatim.conditions.condition import Condition
from seriatim.factorization.static import Blocks
from seriatim.factorization.varying import VaryingBlocks
from seriatim.model import Model
from seriatim.noise import LINEAR, Noise, noise_of
from seriatim.random import ORDER, Generator, Key, Random, numbered

LEAST = 1e-3  # share that is hidden at time 0 (LLaDA): weights stay below a thousand


class Masking(Protocol):
    """Which elements are hidden."""

    def __call__(
        self, free: Bool[Tensor, "b E"], unit: Float[Tensor, "b"], noise: Float[Tensor, "b E"]
    ) -> tuple[Bool[Tensor, "b E"], Float[Tensor, "b"]]:
        """Hidden ones of those that are `free` (to be decided at all), and the weight of each row's summed loss.

        unit: one number in [0, 1) a row, spread evenly over the batch; noise: one an element, uniform in [0, 1)."""
        ...


@dataclass(frozen=True)
class ByTime:
    """Absorbing diffusion at a time t: each element hidden with the probability that a noise schedule gives, and the
    schedule's weight. The bound is the same under every schedule.

    t runs from `LEAST` to 1 rather than from 0, as in LLaDA, so the expectation misses the bound by about a thousandth
    of it; figures are taken by `by_count`."""

    noise: Noise = LINEAR

    def __call__(
        self, free: Bool[Tensor, "b E"], unit: Float[Tensor, "b"], noise: Float[Tensor, "b E"]
    ) -> tuple[Bool[Tensor, "b E"], Float[Tensor, "b"]]:
        t = LEAST + (1 - LEAST) * unit
        return free & (noise < self.noise.hidden(t)[:, None]), self.noise.weight(t)


by_time = ByTime()  # hidden with probability t, weight 1/t


def by_count(
    free: Bool[Tensor, "b E"], unit: Float[Tensor, "b"], noise: Float[Tensor, "b E"]
) -> tuple[Bool[Tensor, "b E"], Float[Tensor, "b"]]:
    """The same bound with far less variance: exactly l of n hidden, l uniform in 1..n, weight n/l (LLaDA's evaluation).

    Weighing counts evenly is no change: hidden at a uniform time with weight 1/t, a given set of l elements counts
    t^(l-1) (1-t)^(n-l) dt, which integrates to 1 / (l C(n, l))."""
    n = free.sum(1)
    count = (1 + (unit * n).long()).clamp(max=n)
    return fewest(free, count, noise), n / count.clamp(min=1)


@dataclass(frozen=True)
class Unweighted:
    """What another masking hides, all of weight 1: each hidden element counts the same, in whatever company (MaskGIT,
    Chang et al. 2022). No bound on anything."""

    masking: Masking

    def __call__(
        self, free: Bool[Tensor, "b E"], unit: Float[Tensor, "b"], noise: Float[Tensor, "b E"]
    ) -> tuple[Bool[Tensor, "b E"], Float[Tensor, "b"]]:
        hidden, weight = self.masking(free, unit, noise)
        return hidden, torch.ones_like(weight)


@dataclass(frozen=True)
class ByRate:
    """A share of the elements hidden, drawn from a normal law cut to [`least`, `mean`]; weight n/l, so that the loss is
    the mean over the hidden ones (MAR, Li et al. 2024, section 4.2 and its code). No bound on anything."""

    mean: float = 1.0
    deviation: float = 0.25
    least: float = 0.7

    def __call__(
        self, free: Bool[Tensor, "b E"], unit: Float[Tensor, "b"], noise: Float[Tensor, "b E"]
    ) -> tuple[Bool[Tensor, "b E"], Float[Tensor, "b"]]:
        low = 0.5 * math.erfc((self.mean - self.least) / self.deviation / math.sqrt(2))
        z = torch.special.ndtri(low + (0.5 - low) * unit.double())
        n = free.sum(1)
        count = (n * (self.mean + self.deviation * z)).ceil().long()
        count = torch.minimum(count.clamp(min=1), n)
        return fewest(free, count, noise), n / count.clamp(min=1)


@dataclass(frozen=True)
class ByShare:
    """The share of the elements that a noise schedule hides at a time drawn evenly, rounded up; weight n/l, so that the
    loss is the mean over the hidden ones. No bound on anything."""

    noise: Noise = LINEAR

    def __call__(
        self, free: Bool[Tensor, "b E"], unit: Float[Tensor, "b"], noise: Float[Tensor, "b E"]
    ) -> tuple[Bool[Tensor, "b E"], Float[Tensor, "b"]]:
        n = free.sum(1)
        count = torch.minimum((n * self.noise.hidden(unit.double())).ceil().long().clamp(min=1), n)
        return fewest(free, count, noise), n / count.clamp(min=1)


@dataclass(frozen=True)
class ByGroups:
    """As generation in groups at random places meets them: so many elements are decided at each step (the last one
    decides what is left), and what a step drawn evenly would find unknown is hidden. The expected loss is the mean over
    all groupings of the negative log-likelihood of that generation: a bound, for these groups the best that it has."""

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"groups have at least one element each, got {self.sizes}")

    def __call__(
        self, free: Bool[Tensor, "b E"], unit: Float[Tensor, "b"], noise: Float[Tensor, "b E"]
    ) -> tuple[Bool[Tensor, "b E"], Float[Tensor, "b"]]:
        n = free.sum(1, keepdim=True)
        begin = torch.tensor([0, *accumulate(self.sizes[:-1])], device=n.device)[None].expand(len(n), -1)
        steps = (begin < n).sum(1)
        step = torch.minimum((unit * steps).long(), steps - 1).clamp(min=0)[:, None]
        shown = begin.gather(1, step)
        after = torch.cat([begin, n], 1).gather(1, step + 1).clamp(max=n)
        hidden = n - shown
        weight = steps * ((after - shown) / hidden.clamp(min=1))[:, 0]
        return fewest(free, hidden[:, 0], noise), weight


def masking_of(noise: str = "linear", weight: str = "bound", by: str = "time") -> Masking:
    """A masking by the words of a config: hidden `by` "time", under a `noise` schedule (`NOISES`), or by "count";
    weighed so that the expectation is the "bound", or with an "even" weight. Raises ValueError for words that mean
    nothing, alone or together."""
    if by not in ("time", "count"):
        raise ValueError(f"masking is by time or count, not {by!r}")
    if weight not in ("bound", "even"):
        raise ValueError(f"weight is bound or even, not {weight!r}")
    if by == "count" and noise != "linear":
        raise ValueError(f"a noise schedule is one of times, and masking is by count: leave out the noise {noise!r}")
    chosen: Masking = by_count if by == "count" else by_time if noise == "linear" else ByTime(noise_of(noise))
    return chosen if weight == "bound" else Unweighted(chosen)


def fewest(free: Bool[Tensor, "b E"], count: Int[Tensor, "b"], noise: Float[Tensor, "b E"]) -> Bool[Tensor, "b E"]:
    """`count` of the free elements of each row, those of smallest noise: every set equally likely."""
    order = noise.masked_fill(~free, math.inf).argsort(1).argsort(1)
    return free & (order < count[:, None])


def showing(model: Model, canvas: Canvas, known: Bool[Tensor, "b E"]) -> Canvas:
    """The same samples with these elements given; what is deleted stays so."""
    gone = canvas.status == DELETED
    shown = model.canvas(canvas.value, known & ~gone, row=canvas.row, layout=canvas.layout)
    if bool(gone.any()):
        shown.apply([Delete(torch.where(gone, torch.arange(gone.shape[1]), -1))])
    return shown


class Masked(Model):
    """A model whose order is found while decoding; its losses are those of one draw of a masking.

    `masking` is the rule of training; in evaluation mode it is `judging`, of the same expectation and less variance
    where there is one (None: the same).
    """

    def __init__(self, *parts: Any, masking: Masking, judging: Masking | None = None):
        super().__init__(*parts)
        self.masking, self.judging = masking, judging or masking

    def losses(
        self,
        canvas: Canvas,
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
        strict: bool = False,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """The weighted loss of each element under one draw of the masking (0 where it was shown or given), all drawn
        from `random`. The sum of a row has the expectation that the masking promises. `strict` is refused: one draw of
        a bound is no likelihood."""
        if strict:
            raise TypeError("one draw of a bound is no likelihood; average `losses` over draws")
        random = random or Generator()
        hidden, weight = self.drawn(canvas, random)
        losses = self.hidden_losses(canvas, hidden, condition, drop, random)
        return losses * weight.to(losses)

    def drawn(self, canvas: Canvas, random: Random) -> tuple[Bool[Tensor, "b E"], Float[Tensor, "b #E"]]:
        """Which elements are hidden, and the weights of their losses."""
        free, rows = canvas.open, torch.arange(canvas.batch)
        unit = random.uniform((canvas.batch, 1), Key(canvas.row, 0, numbered(ORDER, 0, 1)))[:, 0]
        noise = random.uniform(free.shape, Key(canvas.row, 0, numbered(ORDER)))
        masking = self.masking if self.training else self.judging
        hidden, weight = masking(free, (rows + unit) / canvas.batch, noise)
        return hidden, weight[:, None]

    def hidden_losses(
        self,
        canvas: Canvas,
        hidden: Bool[Tensor, "b E"],
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """The loss of each hidden element of a finished sample given all others, in one forward; 0 elsewhere.

        It is the very step that decoding takes on such a canvas, and the head runs at hidden elements only."""
        shown = showing(self, canvas, ~hidden)
        plan = self.factorization.step(shown, None, 0)
        if plan is None:  # nothing is hidden: a loss of zero that still knows the weights
            return sum(p.sum() * 0.0 for p in self.parameters()) + torch.zeros(hidden.shape, device=self.device)
        if self._sound is not self.factorization:  # an order that peeks is refused before it is trained
            plan.check(self.mixers, hidden)
            self._sound = self.factorization
        encoded = condition if isinstance(condition, Condition) else self.encode(condition, drop)
        h = self.hidden(plan, shown, None, encoded)
        element = plan.reads.element.expand(canvas.batch, -1)
        row, column = (element >= 0).nonzero(as_tuple=True)
        element, slot = element[row, column], plan.reads.slot.expand(canvas.batch, -1)[row, column]
        (kind,) = canvas.layout.kinds
        value = canvas.value[kind][row, element][:, None]
        noise = () if random is None else (random, Key(canvas.row[row], element[:, None]))
        loss = self.heads[kind].loss(h[row, slot][:, None], None, value, *noise)[:, 0]  # type: ignore[operator]
        out = torch.zeros(hidden.shape, dtype=loss.dtype, device=loss.device)
        return out.index_put((row.to(loss.device), element.to(loss.device)), loss)


class MaskedBlocks(Masked):
    """A model of `Blocks(size, "any")`: block after block, the elements of a block in any order (BD3-LM, Arriola et al.
    2025, arXiv 2503.09573). Each block is masked by a draw of its own, and all are read in one forward.

    The sum over blocks of their bounds bounds the negative log-likelihood. together: all blocks of a row are masked at
    the same time, as SDAR trains; else each at its own, and those of a batch spread evenly, which varies less.
    """

    factorization: Blocks

    def __init__(self, *parts: Any, masking: Masking, judging: Masking | None = None, together: bool = False):
        super().__init__(*parts, masking=masking, judging=judging)
        self.together = together

    def places(self, canvas: Canvas) -> tuple[Int[Tensor, "#b E"], Int[Tensor, "#b E"]]:
        """The number of the block of each element, and its place in it."""
        e = torch.arange(canvas.layout.size)[None]
        return e // self.factorization.size, e % self.factorization.size

    def drawn(self, canvas: Canvas, random: Random) -> tuple[Bool[Tensor, "b E"], Float[Tensor, "b E"]]:
        """As of `Masked`, block by block."""
        (b, n), (block, place) = canvas.open.shape, self.places(canvas)
        blocks, size = int(block.max()) + 1, int(place.max()) + 1
        cell, block = (block * size + place).expand(b, n), block.expand(b, n)
        rows, together = torch.arange(b)[:, None], self.together and self.training
        unit = random.uniform((b, 1 if together else blocks), Key(canvas.row, 0, numbered(ORDER, 0, 1)))
        noise = random.uniform((b, n), Key(canvas.row, 0, numbered(ORDER)))
        apart = torch.arange(unit.shape[1]) / blocks  # those of a row lie evenly, and those of a block in all rows
        unit = (((rows + unit) / b + apart) % 1).expand(b, blocks)
        free, noise = (
            x.new_zeros(b, blocks * size).scatter(1, cell, x).view(b * blocks, size) for x in (canvas.open, noise)
        )
        masking = self.masking if self.training else self.judging
        hidden, weight = masking(free, unit.reshape(-1), noise)
        return hidden.view(b, -1).gather(1, cell), weight.view(b, blocks).gather(1, block)

    def hidden_losses(
        self,
        canvas: Canvas,
        hidden: Bool[Tensor, "b E"],
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """The loss of each hidden element given those shown of its block and all of earlier blocks, in one forward; 0
        elsewhere."""
        return Model.losses(self, self.shown(canvas, hidden), condition, drop, random=random)

    def shown(self, canvas: Canvas, hidden: Bool[Tensor, "b E"]) -> Canvas:
        """The sample with all elements decided but the hidden ones."""
        gone = canvas.status == DELETED
        shown = Canvas(canvas.layout, canvas.value, ~canvas.open & ~gone, canvas.rank, canvas.row)  # in its own blocks
        if bool(gone.any()):
            shown.apply([Delete(torch.where(gone, torch.arange(gone.shape[1]), -1))])
        (kind,) = canvas.layout.kinds
        element = torch.where(canvas.open & ~hidden, torch.arange(canvas.layout.size), -1)
        return shown.apply([Set(canvas.value[kind], element)])


class MaskedVaryingBlocks(MaskedBlocks):
    """The same with blocks of the lengths that stand on each canvas (`VaryingBlocks`)."""

    factorization: VaryingBlocks

    def places(self, canvas: Canvas) -> tuple[Int[Tensor, "#b E"], Int[Tensor, "#b E"]]:
        block, e = self.factorization.block(canvas), torch.arange(canvas.layout.size)[None]
        first = torch.diff(block, dim=1, prepend=torch.full_like(block[:, :1], -1)) > 0
        return block, e - torch.where(first, e, 0).cummax(1).values


class PairedBlocks(MaskedBlocks):
    """Trained on two views of each row: the second hides what the first one shows, so that each element is read once,
    and the loss is the plain mean of all that is read (Fast-dLLM v2, Wu et al. 2025, arXiv 2509.26328). With times
    drawn evenly that is a bound's sum with a weight of 2 in place of 1/t, and no bound; in evaluation mode it is.

    complementary: False hides a second draw instead, of other elements at other times, to compare with.
    """

    def __init__(self, *parts: Any, masking: Masking, judging: Masking | None = None, complementary: bool = True):
        super().__init__(*parts, masking=masking, judging=judging)
        self.complementary = complementary

    def losses(
        self,
        canvas: Canvas,
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
        strict: bool = False,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """In training the losses of both views, scaled so that their mean over all elements to be decided is that over
        all that are read."""
        if strict or not self.training:
            return super().losses(canvas, condition, drop, strict, random)
        random, twice = random or Generator(), torch.arange(canvas.batch).repeat(2)
        if self.complementary:
            hidden, _ = self.drawn(canvas, random)
            both = torch.cat([hidden, canvas.open & ~hidden])
        else:
            rows = canvas.select(twice)
            rows.row = torch.cat([canvas.row, canvas.row + int(canvas.row.max()) + 1])  # whose noise is another
            both, _ = self.drawn(rows, random)
        encoded = condition if isinstance(condition, Condition) else self.encode(condition, drop)
        losses = self.hidden_losses(canvas.select(twice), both, encoded.select(twice), random=random)
        return losses.view(2, canvas.batch, -1).sum(0) * (canvas.open.sum() / both.sum().clamp(min=1))
