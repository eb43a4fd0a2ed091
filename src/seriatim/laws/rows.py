"""What a model says of every element: in one pass, and step by step under a forced sample."""

from __future__ import annotations

import torch
from torch import Tensor

from seriatim.decoding.loop import generate
from seriatim.decoding.target import Target
from seriatim.laws.case import Case


def packed_rows(case: Case, x: Tensor) -> dict[int, Tensor]:
    """Element -> log-probabilities (batch, vocab), by one packed forward."""
    model, canvas = case.model, case.canvas(x)
    plan = model.factorization.packed(canvas)
    assert plan is not None
    with torch.no_grad():
        h = model.hidden(plan, canvas, None, model.encode(case.rows(len(x))))
        dist, element, _ = model.dist(h, plan, canvas)
        rows = dist.log_probs()  # type: ignore[attr-defined]
    element = torch.atleast_2d(torch.as_tensor(element))[0].tolist()  # a case has one order for all rows
    return {e: rows[:, i] for i, e in enumerate(element) if e >= 0}


def step_rows(case: Case, x: Tensor, cached: bool) -> tuple[dict[int, Tensor], Tensor]:
    """The same met when decoding, forced to the sample; and the sample's log-probability (batch,)."""
    forced = case.forced(x)
    generate(Target(case.model, case.rows(len(x)), cached=cached), case.blank(x), case.decider(), random=forced)
    return {e: row for e, row in forced.met.items() if e >= 0}, forced.log_prob
