"""Reinforcement of masked generators: roll-outs by the very decoder that will be used, several steps on each of them.

Of each prompt a group of samples is drawn at temperature 1 and rewarded; how much better each is than its group (GRPO)
weighs the log-probability of what its steps decided, by any estimate of `posttraining.policy`: that of the trajectory
(CJ-GRPO, Yang et al. 2025, arXiv 2509.23924), or of one forward (mean field; diffu-GRPO, Zhao et al. 2025).

The samples and all that is known of them stand in buffers of fixed sizes, and so does the reference, so that a training
that was stopped between two steps on the same samples goes on bit for bit. Which elements a step decides is no part of
the probability. That is exact where it does not depend on the values that were drawn (rules random, entropy, margin);
by confidence the surest of the drawn values are kept, whose law is another than theirs, which CJ-GRPO passes over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seriatim.canvas import Canvas
from seriatim.decoding.filters import Warper
from seriatim.decoding.loop import Decider, generate
from seriatim.decoding.target import Target
from seriatim.objectives.masked import Masked
from seriatim.posttraining.policy import (
    CLIP,
    KL,
    Sight,
    advantages,
    coupled,
    diffu,
    log_probs,
    mean_field,
    roll_out,
    surrogate,
    trajectory,
    weights,
)
from seriatim.random import Generator, Keyed
from seriatim.training.run import WEIGHTS

Estimate = Literal["trajectory", "mean-field", "diffu", "coupled"]
ESTIMATORS: Mapping[str, Callable[..., list[Sight]]] = {
    "trajectory": trajectory, "mean-field": mean_field, "diffu": diffu, "coupled": coupled,
}  # fmt: skip
DRAWING = ("diffu", "coupled")  # estimates that hide something at random, anew for each step on the same samples


class Reward(Protocol):
    """What a finished sample is worth."""

    def __call__(self, ids: Int[Tensor, "r n"], given: Bool[Tensor, "r n"]) -> Float[Tensor, "r"]:
        """One number a row; `given`: what was not the model's to decide."""
        ...


@dataclass(frozen=True)
class Reinforcement:
    """estimate: of log-probabilities; prompts, group: how many there are at once, and samples of each; inner: steps on
    the same samples; clip, kl: of the ratio, and the weight of the reference; synchronise: steps after which the
    reference becomes what the model is (None: it stays what it was). Defaults are CJ-GRPO's."""

    estimate: Estimate = "trajectory"
    prompts: int = 8
    group: int = 6
    inner: int = 8
    clip: float = CLIP
    kl: float = KL
    synchronise: int | None = 64

    def __post_init__(self) -> None:
        if self.estimate not in get_args(Estimate):
            raise ValueError(f"an estimate is {', '.join(get_args(Estimate))}, not {self.estimate!r}")
        if self.prompts < 1 or self.group < 2 or self.inner < 1 or self.synchronise == 0:
            raise ValueError(
                f"there is at least 1 prompt with a group of 2 samples or more, and 1 step on them; got "
                f"{self.prompts}, {self.group} and {self.inner}, synchronised after {self.synchronise}"
            )
        if self.clip <= 0 or self.kl < 0:
            raise ValueError(f"a clip is above 0 and a weight not below; got {self.clip} and {self.kl}")

    @property
    def draws(self) -> int:
        """How many estimates of a sample's probability there are at a time."""
        return self.inner if self.estimate in DRAWING else 1


class Reinforced(nn.Module):
    """A learner (`training.trainer`): a masked generator, rewarded for what a decoder makes of it.

    Batches hold `prompts` samples each: "token", and "given": which of its elements are known. Of those that come
    between two roll-outs nothing is used. Trained are the parameters that ask for gradients, an adapter alone for
    example; `decider` makes the decoder. Raises ValueError for batches of another size.
    """

    decider: Callable[[], Decider]
    reward: Reward
    ids: Tensor
    turn: Tensor
    old: Tensor
    reference: Tensor
    advantage: Tensor
    rewards: Tensor
    seed: Tensor
    anchor: Tensor

    def __init__(self, model: Masked, decider: Callable[[], Decider], reward: Reward, config: Reinforcement):
        super().__init__()
        self.model, self.config = model, config
        self.__dict__.update(decider=decider, reward=reward)
        self.figures: Mapping[str, float] = {}
        rows, n = config.prompts * config.group, model.layout.size
        self.register_buffer("ids", torch.zeros(rows, n, dtype=torch.long))
        self.register_buffer("turn", torch.full((rows, n), -1))  # the step that decided each element; -1: given
        self.register_buffer("old", torch.zeros(config.draws, rows, n))  # log-probabilities when they were made
        self.register_buffer("reference", torch.zeros(config.draws, rows, n))  # and by the reference
        self.register_buffer("advantage", torch.zeros(rows))
        self.register_buffer("rewards", torch.zeros(rows))
        self.register_buffer("seed", torch.zeros((), dtype=torch.long))  # of what estimates draw
        self.register_buffer("anchor", torch.cat([p.detach().flatten().float() for p in self._trained()]))

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    # ---- training ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        c = self.config
        inner = step % c.inner
        if inner == 0:
            if c.synchronise is not None and step // c.synchronise > max(step - c.inner, 0) // c.synchronise:
                self.anchor.copy_(torch.cat([p.detach().flatten().float() for p in self._trained()]))
            self._roll_out(batch, random)
        draw = inner if c.draws > 1 else 0
        new = self.said(draw)
        weight = weights(self.turn.cpu(), by_step=c.estimate == "trajectory").to(new)
        loss = surrogate(new, self.old[draw], self.reference[draw], self.advantage, weight, c.clip, c.kl)
        with torch.no_grad():
            apart = self.reference[draw] - new
            divergence = float(((apart.exp() - apart - 1) * weight).sum(1).mean())
        self.figures = {"reward": float(self.rewards.mean()), "divergence": divergence, "forwards": self.steps}
        return loss.sum(), torch.tensor(len(loss))

    @property
    def steps(self) -> float:
        """Of a roll-out, on the mean."""
        return float(self.turn.amax(1).float().mean()) + 1

    def said(self, draw: int = 0) -> Float[Tensor, "r n"]:
        """The log-probabilities of what the samples' steps decided, as the model is now."""
        generator = torch.Generator().manual_seed(int(self.seed) + draw)
        sights = ESTIMATORS[self.config.estimate](self.turn.cpu(), generator)
        return log_probs(self.model, self.ids.cpu(), sights)

    @torch.no_grad()
    def _roll_out(self, batch: Mapping[str, Tensor], random: Generator) -> None:
        """New samples of each prompt, what they are worth, and how likely they were."""
        c, (prompts, n) = self.config, batch["token"].shape
        if (prompts, n) != (c.prompts, self.model.layout.size):
            raise ValueError(
                f"batches of {c.prompts} prompts of {self.model.layout.size} elements are reinforced, computed in one "
                f"part; got {prompts} of {n}"
            )
        ids, given = (batch[name].cpu().repeat_interleave(c.group, 0) for name in ("token", "given"))
        seeds = torch.randint(1 << 62, (2,), generator=random.generator)
        canvas, was = self._canvas(ids, given), self.model.training
        self.model.eval()
        turn = roll_out(Target(self.model), canvas, self.decider(), Keyed(int(seeds[0])))
        self.model.train(was)
        (kind,) = self.model.layout.kinds
        self.ids.copy_(canvas.value[kind])
        self.turn.copy_(turn)
        self.seed.copy_(seeds[1])
        self.rewards.copy_(self.reward(self.ids.cpu(), given))
        self.advantage.copy_(advantages(self.rewards, c.group))
        self._note(self.old)
        with self._anchored():
            self._note(self.reference)

    def _note(self, into: Float[Tensor, "k r n"]) -> None:
        """What is said now, computed as training computes it: without gradients other kernels round otherwise."""
        torch.clear_autocast_cache()  # weights that were cast without gradients, or are others
        for draw in range(self.config.draws):
            with torch.enable_grad():
                said = self.said(draw)
            into[draw] = said.detach()
        torch.clear_autocast_cache()

    def _canvas(self, ids: Int[Tensor, "r n"], given: Bool[Tensor, "r n"]) -> Canvas:
        (kind,) = self.model.layout.kinds
        return self.model.canvas({kind: ids.masked_fill(~given, 0)}, given)

    @contextmanager
    def _anchored(self) -> Iterator[None]:
        """The model as the reference is."""
        trained = self._trained()
        now = [p.data for p in trained]
        try:
            for p, x in zip(trained, self.anchor.split([p.numel() for p in trained]), strict=True):
                p.data = x.view(p.shape).to(p.dtype)
            yield
        finally:
            for p, x in zip(trained, now, strict=True):
                p.data = x

    # ---- what comes of it -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, examples: Any, most: int = 256) -> dict[str, float]:
        """The mean reward of held-out prompts, decoded greedily, and the share of those with a reward of 1 or more."""
        index = torch.linspace(0, len(examples) - 1, min(len(examples), most)).long()
        batch = examples.take(index)
        reward = decoded(self.model, batch, self.decider(), self.reward)
        return {"reward": float(reward.mean()), "solved": float((reward >= 1).double().mean())}

    def weights_to_keep(self) -> nn.Module:
        return self.model

    def stored(self, weights: Mapping[str, Tensor]) -> tuple[str, Mapping[str, Tensor]]:
        return WEIGHTS, weights


def decoded(
    model: Masked, batch: Mapping[str, Tensor], decider: Decider, reward: Reward, temperature: float = 0.0,
    seed: int = 0,
) -> Float[Tensor, "b"]:  # fmt: skip
    """What a decoder's samples of a batch of prompts are worth, one each."""
    (kind,) = model.layout.kinds
    given = batch["given"].cpu()
    canvas = model.canvas({kind: batch["token"].cpu().masked_fill(~given, 0)}, given)
    generate(Target(model, warp=Warper(temperature)), canvas, decider, random=Keyed(seed))
    return reward(canvas.value[kind].cpu(), given)
