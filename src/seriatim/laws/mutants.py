"""For each law a deliberately wrong part that it must catch; a law that lets its mutant pass is broken itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from seriatim.backbones.rope import RotaryTable
from seriatim.backbones.transformer import Transformer
from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step
from seriatim.decoding.sample import SampleAll
from seriatim.embed import TokenEmbed
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, Limit
from seriatim.model import Rows
from seriatim.plan import VALUE
from seriatim.random import Random


class _Restarts(RotaryTable):
    """Positions begin anew at every step."""

    def run(self, start: int, *more):
        return super().run(0, *more)


def restarting_positions(case: Case) -> Case:
    """Law 1: a decoding step forgets where it stands."""
    for table in case.model.backbone.rotary.values():  # type: ignore[union-attr, operator]
        table.__class__ = _Restarts
    return case


class _OwnFeed(TokenEmbed):
    """In one pass slots are fed what they read, whatever their labels say."""

    def forward(self, canvas, plan, guess=None, prefix=None):
        if plan.run is None:
            element = (plan.slots.element + 1).clamp(max=canvas.layout.size - 1)
            slots = replace(plan.slots, element=element, source=torch.full_like(plan.slots.source, VALUE))
            plan = replace(plan, slots=slots)
        return super().forward(canvas, plan, guess, prefix)


def own_feed(case: Case) -> Case:
    """Law 2: the packed form peeks, which enumerating the decoder would never show."""
    case.model.embed.__class__ = _OwnFeed
    return case


def denied_feed(case: Case) -> Case:
    """Law 3: it peeks and its labels deny it: only edits show."""
    case.model.embed.__class__ = _OwnFeed
    return case


class _Credulous:
    """Accepts every draft."""

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if guess is None:
            return SampleAll().decide(canvas, guess, rows, random)
        from seriatim.canvas import Set

        path = [0]
        below = guess.children()
        while below[path[-1]]:
            path.append(below[path[-1]][0])
        known = rows.hidden.shape[1] - guess.size
        keep = list(range(known)) + [known + i for i in path[:-1]]
        return Step((Set(guess.value[:, path]),), keep, drafted=guess.size, accepted=len(path))


class _CredulousCase(Case):
    def verifier(self, kind):
        return _Credulous


def credulous(case: Case) -> Case:
    """Law 4: drafts are believed."""
    return _CredulousCase(**{f: getattr(case, f) for f in case.__dataclass_fields__})


class _Forgetful(Transformer):
    """Its cache loses the content of the newest entry."""

    def forward(self, x, plan, cache=None, vector=None, memory=None, there=None):
        if cache is not None and cache.columns:
            cache.buffer[..., cache.columns - 1, :] = 0
        return super().forward(x, plan, cache, vector, memory, there)


def forgetful(case: Case) -> Case:
    """Law 5: something that is still seen is gone from the cache."""
    case.model.backbone.__class__ = _Forgetful
    return case


class _Sociable(CategoricalHead):
    """Logits lean on those of the batch."""

    def logits(self, h, reads=None):
        x = super().logits(h, reads)
        return x - x.mean(0, keepdim=True)


def sociable(case: Case) -> Case:
    """Law 6: batch mates matter."""
    case.model.heads["token"].__class__ = _Sociable
    return case


class _TwoFeeds(TokenEmbed):
    """In training, slots are fed a little more than in decoding."""

    def forward(self, canvas, plan, guess=None, prefix=None):
        x = super().forward(canvas, plan, guess, prefix)
        return x if plan.run is not None else x + 0.1


def two_feeds(case: Case) -> Case:
    """Law 7: training and decoding meet different inputs."""
    case.model.embed.__class__ = _TwoFeeds
    return case


def wrong_limit(case: Case) -> Case:
    """Law 8: the limit names another composition."""

    def limit() -> Limit:
        x = case.sample(4)
        right = case.total(x)
        other = copy.deepcopy(case)
        with torch.no_grad():
            other.model.heads["token"].weight.mul_(1.01)  # type: ignore[union-attr, operator]
        return Limit("a slightly different model", right, other.total(x))

    case.limits = (limit,)
    return case


class _Hesitant(SampleAll):
    """Now and then decides nothing."""

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if canvas.length == 2 and not getattr(self, "waited", False):
            self.waited = True
            return Step((), keep=0)
        return super().decide(canvas, guess, rows, random)


def hesitant(case: Case) -> Case:
    """Law 9: a forward that achieves nothing."""
    case.decider = _Hesitant
    return case


class _Detached(TokenEmbed):
    def forward(self, canvas, plan, guess=None, prefix=None):
        return super().forward(canvas, plan, guess, prefix).detach()


def detached(case: Case) -> Case:
    """Law 10: the embedding never learns."""
    case.model.embed.__class__ = _Detached
    return case


class _Hidden(nn.Module):
    """Holds a tensor that is not saved with the weights."""

    def __init__(self, head: nn.Module, width: int, seed: int):
        super().__init__()
        self.head, self.exact = head, True
        self.secret = [torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)]

    def __deepcopy__(self, memo: dict) -> _Hidden:
        return _Hidden(copy.deepcopy(self.head, memo), len(self.secret[0]), 1)

    def dist(self, h: Tensor, reads, canvas):
        return self.head.dist(h * (1 + self.secret[0].to(h.dtype)), reads, canvas)  # type: ignore[operator]


def unsaved(case: Case) -> Case:
    """Law 11: part of the model is not in its file."""
    case.model.heads["token"] = _Hidden(case.model.heads["token"], case.model.backbone.config.width, 0)  # type: ignore
    return case


class _Shuffled(Case):
    def data(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.vocab, (n, self.model.layout.size), generator=generator)


def shuffled(case: Case) -> Case:
    """Law 12: contexts tell nothing, so nothing can be learnt."""
    return _Shuffled(**{f: getattr(case, f) for f in case.__dataclass_fields__})


MUTANTS: dict[int, Callable[[Case], Case]] = {
    1: restarting_positions,
    2: own_feed,
    3: denied_feed,
    4: credulous,
    5: forgetful,
    6: sociable,
    7: two_feeds,
    8: wrong_limit,
    9: hesitant,
    10: detached,
    11: unsaved,
    12: shuffled,
}
