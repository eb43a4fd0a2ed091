"""The states that stand after a step: what draft heads, feature drafts and judges go on from.

A verifying forward holds slots of known tokens and of drafted ones; `Step.keep` names those whose content was accepted.
The last of them is the state behind which the newest token was drawn: it has seen every known token but that one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.loop import Step
from seriatim.model import Rows


def kept_states(rows: Rows, step: Step) -> tuple[Float[Tensor, "b w d"], Int[Tensor, "b"] | int]:
    """The states that stand after a step, in order, and how many each row has (one number: all rows equally many);
    what is behind them is padding. Rows are those before `step.select`."""
    h, keep = rows.hidden, step.keep
    if keep is None:  # all that is known; a draft is never kept unnamed
        slot = rows.slot
        return (h, slot[:, 0].to(h.device).expand(len(h)) + 1) if isinstance(slot, Tensor) else (h, h.shape[1])
    if isinstance(keep, int):
        return h[:, :keep], keep
    if not isinstance(keep, Tensor):
        return h[:, keep], len(keep)
    there, keep = (keep >= 0).sum(1).to(h.device), keep.clamp(min=0).to(h.device)
    return h.gather(1, keep[..., None].expand(-1, -1, h.shape[2])), there


def last_states(rows: Rows, step: Step) -> Float[Tensor, "b d"]:
    """The last state of each row that stands after a step; anything where a row has none."""
    keep = step.keep
    if isinstance(keep, int):
        return rows.hidden[:, keep - 1]
    if keep is not None and not isinstance(keep, Tensor):
        return rows.hidden[:, keep[-1]]
    states, count = kept_states(rows, step)
    if isinstance(count, int):
        return states[:, count - 1]
    return states[torch.arange(len(states), device=states.device), count - 1]


def states_behind(rows: Rows, step: Step, count: int) -> Float[Tensor, "b k d"]:
    """The states of the `count` slots that stand in the forward behind the last token which stands after a step: what
    it has spawned, or its block of masks."""
    assert rows.spawned is not None
    spawned, keep = rows.spawned.unflatten(1, (count, -1)), step.keep
    first = rows.hidden.shape[1] - spawned.shape[2]  # the slot before the nodes; of a longer row it is the last known
    if isinstance(keep, Tensor):
        which = (keep.amax(1) - first).clamp(min=0).to(spawned.device)
        return spawned[torch.arange(len(spawned), device=spawned.device), :, which]
    last = keep - 1 if isinstance(keep, int) else keep[-1]
    return spawned[:, :, last - first]


def last_tokens(canvas: Canvas) -> Int[Tensor, "b"]:
    """The newest known token of each row of a line."""
    value = canvas.value[canvas.layout.kinds[0]]
    if canvas.length is not None:
        return value[:, canvas.length - 1]
    return value.gather(1, (canvas.lengths() - 1).clamp(min=0)[:, None].to(value.device))[:, 0]
