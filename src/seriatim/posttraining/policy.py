"""Reinforcement of masked generators: what a sample's decisions were worth, by the probabilities they were made with.

A sample is decided in steps; what each step saw is known from the sample and the step that decided each element. The
log-probability of the decisions is then exact, one forward a step, all in one batch (CJ-GRPO, Yang et al. 2025). It is
compared with estimates that need fewer: all elements at once from the empty canvas (mean field), the same with some of
the prompt hidden (diffu-GRPO, Zhao et al. 2025), and two complementary halves (coupled, Gong et al. 2025), in which
each element is read once, from the half in which it is hidden.

Elements must be decided once and for good, at temperature 1 without filters; which elements a step decides is no part
of the probability, as it follows from what was drawn, or is drawn from a law of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import Canvas, Set
from seriatim.decoding.loop import Decider, decode
from seriatim.decoding.target import Target
from seriatim.layout import Layout
from seriatim.objectives.masked import Masked
from seriatim.random import Random

CLIP, KL = 0.5, 0.04  # of the ratio, and the weight of the reference (CJ-GRPO)


class Sight(NamedTuple):
    """One forward over finished samples: what is hidden in it, and of which elements the probability counts."""

    hidden: Bool[Tensor, "r n"]
    counts: Bool[Tensor, "r n"]


Estimator = Callable[[Int[Tensor, "r n"], torch.Generator], Sequence[Sight]]


def roll_out(target: Target, canvas: Canvas, decider: Decider, random: Random) -> Int[Tensor, "r n"]:
    """Decode a canvas to its end; the step that decided each element (-1: it was given). Raises ValueError where
    something is decided twice: it has no probability of its own then."""
    turn = torch.full((canvas.batch, canvas.layout.size), -1)
    with torch.inference_mode():
        for i, step in enumerate(decode(target, canvas, decider, random=random)):
            for edit in step.edits:
                if not isinstance(edit, Set) or edit.element is None:
                    raise ValueError(f"a trajectory is made of elements that are set, and step {i} does something else")
                row, column = (edit.element >= 0).nonzero(as_tuple=True)
                element = edit.element[row, column]
                if bool((turn[row, element] >= 0).any()):
                    raise ValueError("an element was decided twice: reinforce a decider that takes nothing back")
                turn[row, element] = i
    return turn


def trajectory(turn: Int[Tensor, "r n"], generator: torch.Generator) -> list[Sight]:
    """What every step saw: exact."""
    return [Sight(turn >= i, turn == i) for i in range(int(turn.max()) + 1)]


def mean_field(turn: Int[Tensor, "r n"], generator: torch.Generator) -> list[Sight]:
    """All elements from the prompt alone."""
    return [Sight(turn >= 0, turn >= 0)]


def diffu(turn: Int[Tensor, "r n"], generator: torch.Generator, share: float = 0.15) -> list[Sight]:
    """All elements from the prompt, of which some is hidden."""
    some = torch.rand(turn.shape, generator=generator) < share
    return [Sight((turn >= 0) | some, turn >= 0)]


def coupled(turn: Int[Tensor, "r n"], generator: torch.Generator) -> list[Sight]:
    """Each element from the prompt and about half of the others: two forwards, in one of which it is hidden."""
    first = (torch.rand(turn.shape, generator=generator) < 0.5) & (turn >= 0)
    second = (turn >= 0) & ~first
    return [Sight(first, first), Sight(second, second)]


def log_probs(
    model: Masked, ids: Int[Tensor, "r n"], sights: Sequence[Sight], layout: Layout | None = None
) -> Float[Tensor, "r n"]:
    """The log-probability of each element, from the forward in which it counts; 0 where it counts in none. layout: of
    the samples, where it is not the model's."""
    (kind,) = model.layout.kinds
    seen = [(i, rows) for i, s in enumerate(sights) if len(rows := s.counts.any(1).nonzero()[:, 0])]
    if not seen:
        return torch.zeros(ids.shape, device=model.device)
    rows = torch.cat([r for _, r in seen])
    hidden = torch.cat([sights[i].hidden[r] for i, r in seen])
    counts = torch.cat([sights[i].counts[r] for i, r in seen])
    losses = model.hidden_losses(model.canvas({kind: ids[rows]}, layout=layout), hidden)
    losses = torch.where(counts.to(losses.device), losses, 0)
    return losses.new_zeros(ids.shape).index_add(0, rows.to(losses.device), -losses)


def advantages(reward: Float[Tensor, "r"], group: int) -> Float[Tensor, "r"]:
    """How much better each sample is than those of the same prompt, which stand together: in standard deviations, 0
    where all are alike (GRPO, Shao et al. 2024)."""
    each = reward.view(-1, group)
    deviation = each.std(1, keepdim=True, correction=0)
    return ((each - each.mean(1, keepdim=True)) / deviation.clamp(min=1e-4)).flatten()


def weights(turn: Int[Tensor, "r n"], by_step: bool) -> Float[Tensor, "r n"]:
    """How much each element counts, 1 a row: the mean over the elements of a step, then over steps (`by_step`), or over
    all elements."""
    made = turn >= 0
    if not by_step:
        return made / made.sum(1, keepdim=True).clamp(min=1)
    count = torch.zeros(len(turn), int(turn.max()) + 2).scatter_add(1, turn + 1, torch.ones(turn.shape))
    mine = count.gather(1, turn + 1)
    return made / mine / (count[:, 1:] > 0).sum(1, keepdim=True).clamp(min=1)


def surrogate(
    new: Float[Tensor, "r n"],
    old: Float[Tensor, "r n"],
    reference: Float[Tensor, "r n"],
    advantage: Float[Tensor, "r"],
    weight: Float[Tensor, "r n"],
    clip: float = CLIP,
    kl: float = KL,
) -> Float[Tensor, "r"]:
    """What is minimised, of each row: the clipped ratio to the probabilities at the roll-out times the advantage, and
    the divergence from a reference by its estimate of low variance (PPO, Schulman et al. 2017; GRPO)."""
    ratio, gain = (new - old).exp(), advantage[:, None]
    reward = torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
    apart = (reference - new).exp() - (reference - new) - 1
    return -((reward - kl * apart) * weight).sum(1)
