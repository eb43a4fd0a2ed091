"""How to train: the settings of one training, and the schedule that follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from seriatim.training.norm import NORMS


@dataclass(frozen=True)
class Recipe:
    """AdamW, linear warm-up, cosine to `floor` times the learning rate.

    steps, batch: optimizer steps, and samples in each (of all processes and accumulated parts together); accumulate:
    parts a batch is computed in; warm_up: share of the steps; clip: largest gradient norm; drop: share of samples whose
    condition is replaced by the null; bf16: autocast of the forward, where the machine has instructions for it; ema:
    decay of the averaged weights that generation uses (None: the last weights); norm: by what the losses of a batch are
    divided (`NORMS`: token, sequence, batch); compile: compile the layers where a C++ compiler is found;
    validate_every: steps between two looks at held-out data (None: ten looks, or fewer where steps are few).

    epoch: samples are drawn in passes, in none of which a sample comes twice, and so many steps are a turn (None: they
    are drawn anew at every step); halving: the learning rate is halved after every turn but the first, with neither
    warm-up nor cosine; patience: training ends after so many looks at held-out data without a smaller loss, and the
    weights of the smallest are kept (None: it goes on to the end, and the last are).
    """

    steps: int
    batch: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warm_up: float = 0.05
    floor: float = 0.0
    clip: float = 1.0
    drop: float = 0.0
    bf16: bool = False
    ema: float | None = None
    accumulate: int = 1
    norm: str = "token"
    compile: bool = False
    validate_every: int | None = None
    seed: int = 0
    epoch: int | None = None
    halving: bool = False
    patience: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON knows lists only
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"training takes at least 1 step of at least 1 sample, got {self.steps} of {self.batch}")
        if self.accumulate < 1 or self.batch % self.accumulate:
            raise ValueError(f"a batch of {self.batch} cannot be computed in {self.accumulate} equal parts")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"the decay of averaged weights lies in [0, 1), got {self.ema}")
        if not self.learning_rate > 0:
            raise ValueError(f"the learning rate is positive, got {self.learning_rate}")
        if self.norm not in NORMS:
            raise ValueError(f"norm is {', '.join(NORMS)}, not {self.norm!r}")
        for name in ("epoch", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.halving and self.epoch is None:
            raise ValueError("the learning rate is halved after turns: say how many steps are one (epoch)")
        if self.patience is not None and self.ema is not None:
            raise ValueError("the best weights are kept, or averaged ones: leave out patience or ema")
        for name in ("warm_up", "floor", "drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, got {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """The factor on the learning rate at a step, from 0."""
        if self.halving and self.epoch is not None:
            return 0.5 ** max(step // self.epoch - 1, 0)
        warm = self.warm_up * self.steps
        if step < warm:
            return (step + 1) / warm
        share = (step - warm) / max(self.steps - warm, 1)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * share)) / 2

    def decay(self, step: int) -> float:
        """The decay of the averaged weights at a step: shorter memory at first, so that fresh weights are forgotten."""
        return min(self.ema or 0.0, (1 + step) / (10 + step))
