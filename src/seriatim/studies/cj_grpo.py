"""CJ-GRPO: reinforcement of masked generators by the steps that were taken (Yang et al. 2025, arXiv 2509.23924).

New in it: the log-probability of a sample is that of its own steps, each from what that step saw, so that what is
reinforced is the decoder that is used; estimates from one forward score something else (`posttraining.policy`).

It is measured on sudokus of 4 x 4 cells that are decided in few steps. A model that was trained on puzzles decides
cells one at a time almost without error; several at once it fills with what does not go together. Reinforcement by the
decoder's own steps should mend that. Cells are elements and digits values: what is given is known, there is no text.
The base is trained once, in minutes, and kept under SERIATIM_HOME.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.data import list_tasks
from seriatim.data.list_tasks import DIGITS
from seriatim.decoding.sample import Schedule, Select
from seriatim.home import HOME
from seriatim.objectives.masked import Masked
from seriatim.posttraining.reinforce import Estimate, Reinforced, Reinforcement, decoded
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.meta import Meta
from seriatim.systems.text.mdlm import MDLM, Config
from seriatim.training.checkpoint import load_weights
from seriatim.training.recipe import Recipe
from seriatim.training.run import RunFolder
from seriatim.training.trainer import train

META = Meta(
    key="cj-grpo",
    title="CJ-GRPO: trajectory-consistent reinforcement",
    family="study",
    modality="text",
    paper="Taming Masked Diffusion Language Models via Consistency Trajectory Reinforcement Learning with Fewer "
    "Decoding Step (2025), arXiv 2509.23924",
    likelihood="none",
    summary="Estimates of what a decoder's sample was worth, by how many sudokus are solved after reinforcement.",
)

# ---- sudokus ---------------------------------------------------------------------------------------------------------

CELLS = torch.arange(16).view(4, 4)
CORNERS = CELLS.view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
UNITS = torch.cat([CELLS, CELLS.T, CORNERS])  # rows, columns and corners: each holds every digit


@lru_cache(maxsize=1)
def sudokus() -> Int[Tensor, "288 16"]:
    """All of them, of digits 0 to 3."""
    return torch.tensor([[DIGITS.index(x) for x in s] for s in list_tasks.sudokus()])


def units_right(ids: Int[Tensor, "r 16"], given: Tensor | None = None) -> Float[Tensor, "r"]:
    """A reward: the share of rows, columns and corners that hold every digit; 1 where the puzzle is solved, whichever
    of its solutions it is."""
    return (ids[:, UNITS].sort(-1).values == torch.arange(4)).all(-1).float().mean(1)


@dataclass(frozen=True)
class Puzzles:
    """Sudokus of which `least` to `most` cells are given, drawn anew each time they are taken; every fourth sudoku is
    held out. Without a generator a puzzle is always the same."""

    test: bool = False
    least: int = 6
    most: int = 10
    count: int = 512

    def __len__(self) -> int:
        return self.count

    def take(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "token": Int[b 16], "given": Bool[b 16]."""
        mine = sudokus()[(torch.arange(288) % 4 == 3) == self.test]
        if generator is None:
            parts = [self._draw(torch.Generator().manual_seed(i), 1) for i in index.tolist()]
            number, given = (torch.cat(x) for x in zip(*parts, strict=True))
        else:
            number, given = self._draw(generator, len(index))
        return {"token": mine[number % len(mine)], "given": given}

    def _draw(self, generator: torch.Generator, rows: int) -> tuple[Int[Tensor, "b"], Bool[Tensor, "b 16"]]:
        number = torch.randint(1 << 30, (rows,), generator=generator)
        count = torch.randint(self.least, self.most + 1, (rows, 1), generator=generator)
        return number, torch.rand(rows, 16, generator=generator).argsort(1).argsort(1) < count


class Solver(MDLM):
    """Cells in any order."""

    def canvas(self, batch: Mapping[str, Tensor]) -> tuple[Canvas, None]:
        return self.model.canvas({"token": batch["token"]}, batch["given"].cpu()), None


SHAPE: Mapping[str, Any] = {"length": 16, "vocab": 4, "width": 64, "depth": 3, "heads": 4, "short": 0.0, "block": None}
LEARNING = Recipe(3000, batch=64, learning_rate=2e-3, weight_decay=0.1)


def solver(recipe: Recipe = LEARNING) -> Masked:
    """A model of puzzles, trained where there is none yet."""
    folder = RunFolder(HOME / "claims" / "sudoku" / f"{recipe.steps}-{SHAPE['width']}")
    torch.manual_seed(recipe.seed)
    system = Solver(Config(**SHAPE), _NoTokenizer())  # type: ignore[arg-type]
    if not (folder.path / "finished").is_file():
        train(system, Puzzles(), recipe, folder, {"system": "mdlm"}, resume=True)
        (folder.path / "finished").touch()
    load_weights(system.model, folder.weights)
    return system.eval().model


class _NoTokenizer:
    """Cells are no text."""

    special: Mapping[str, int] = {}
    vocab = 4


# ---- what it claims --------------------------------------------------------------------------------------------------

UNSEEN = 1_000_000  # puzzles from here on are for the figures alone: recipes were tried on others
STEPS = 3  # of either schedule for most puzzles: as many as powers of two make of 6 to 10 cells (2 for 6 and 7)
TUNING = Recipe(120, batch=128, learning_rate=1e-4, weight_decay=0.0, warm_up=0.05, floor=1.0)
REINFORCED = Reinforcement(prompts=128, group=4, inner=2)


def few(schedule: Schedule) -> Callable[[], Select]:
    """A decoder of few steps."""
    return lambda: Select("confidence", STEPS, schedule)


def reinforced(
    model: Masked, estimate: Estimate, schedule: Schedule, seed: int, recipe: Recipe = TUNING
) -> list[dict[str, float]]:
    """Reinforce a model in place; the figures of every step. A run that was begun goes on."""
    config = replace(REINFORCED, estimate=estimate, prompts=recipe.batch)
    learner = Reinforced(model, few(schedule), units_right, config)
    folder = RunFolder(HOME / "claims" / "sudoku" / f"{estimate}-{schedule}-{recipe.steps}-{seed}")
    card = {"system": "mdlm", "estimate": estimate, "schedule": schedule}
    return train(learner, Puzzles(), replace(recipe, seed=seed), folder, card, resume=True)


def solved(estimate: Estimate | None, schedule: Schedule, count: int = 512) -> Callable[[Any, int], Mapping[str, Any]]:
    """A measure of a `Trial` on the solver: the share of held-out puzzles that
    are solved in few steps, greedily, after reinforcement by an estimate (None: without)."""

    def measure(system: Any, seed: int) -> Mapping[str, Any]:
        model, curve = solver(), []
        if estimate is not None:
            curve = [h["reward"] for h in reinforced(model, estimate, schedule, seed)][:: REINFORCED.inner]
        puzzles = Puzzles(test=True)
        batch = puzzles.take(UNSEEN + torch.arange(count) + count * seed)
        reward = decoded(model.eval(), batch, few(schedule)(), units_right)
        return {"solved": float((reward == 1).double().mean()), "units": float(reward.mean()), "curve": curve}

    return measure


def _arm(estimate: Estimate | None, schedule: Schedule) -> Trial:
    return Trial(None, solved(estimate, schedule))


NAMES: Mapping[str, Estimate | None] = {
    "CJ-GRPO": "trajectory", "mean field": "mean-field", "diffu-GRPO": "diffu", "no RL": None,
}  # fmt: skip
SCHEDULES: Mapping[str, Schedule] = {"ascending": "powers", "even": "linear"}
CLAIM = Claim(
    text="After as many roll-outs, reinforcement by the log-probabilities of the steps that were taken solves at least "
    "as many sudokus as by those of one forward, in steps of 1, 2, 4, ... cells; the same for even steps, diffu-GRPO "
    "and no reinforcement are further arms.",
    paper="ahead of one-step estimates on GSM8K, MATH, Countdown and 4x4 sudoku (LLaDA-8B)",
    metric="solved",
    arms={
        f"{name}, {said}": _arm(estimate, schedule)
        for said, schedule in SCHEDULES.items()
        for name, estimate in NAMES.items()
    },
    ours="CJ-GRPO, ascending",
    baseline="mean field, ascending",
    better="higher",
    seeds=(0, 1, 2),
    other_seeds=(0,),
)
