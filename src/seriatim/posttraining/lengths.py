"""A policy of block lengths, learned by reinforcement on texts that there are: how long may the next block be?

A text is cut by the policy and written block by block, each in a few steps, as the decoder would: the elements of a
step are drawn at random and held to the text. What the blocks cost is the surprise of their elements at the steps that
decided them (in expectation the bound of a sampler of so many steps) and a price of each forward. A long block is cheap
where its elements tell little of each other, and dear elsewhere.

REINFORCE with a running baseline: the mean cost of an element so far, times the elements that are still to come, is
what a choice is compared with (CtrlDiff, 2025, arXiv 2505.14455, in our reading: it leaves rewards open).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.canvas import Canvas
from seriatim.decoding.lengths import Chosen, InLengths, LengthPolicy, Lengths, Written, begun
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import Select, schedule
from seriatim.decoding.target import Target
from seriatim.layout import line
from seriatim.objectives.masked import MaskedVaryingBlocks
from seriatim.random import ORDER, Generator, Key, Random

DECAY = 0.98  # of the running figures, a step of training


class Told:
    """A source of randomness that gives the elements of a text, and notes how surprising each is, in nats (batch,
    elements); what is no element is drawn from `other`."""

    def __init__(self, value: Int[Tensor, "b E"], other: Random):
        self.value, self.other = value, other
        self.nats = torch.zeros(value.shape, dtype=torch.float64)

    def categorical(self, logits: Float[Tensor, "b n v"], key: Key) -> Int[Tensor, "b n"]:
        if int(torch.as_tensor(key.draw).flatten()[0]) % 4 == ORDER:
            return self.other.categorical(logits, key)
        assert isinstance(key.element, Tensor)
        element = key.element.expand(logits.shape[:2])
        x = self.value.gather(1, element.clamp(min=0))
        nats = -torch.log_softmax(logits.double(), -1).gather(-1, x[..., None].to(logits.device))[..., 0].cpu()
        b, m = (element >= 0).nonzero(as_tuple=True)
        self.nats[b, element[b, m]] = nats[b, m]
        return x

    def heads(self, probability: Float[Tensor, "b n"], key: Key) -> Int[Tensor, "b"]:
        raise TypeError("coins cannot be held to a text")

    def uniform(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        raise TypeError("a uniform number cannot be held to a text")

    def normal(self, shape: Sequence[int], key: Key, device: torch.device | str = "cpu") -> Tensor:
        raise TypeError("a normal number cannot be held to a text")


class Cut(NamedTuple):
    """Texts in blocks. block: of each element, from 0; nats: surprise of each element; forwards: of each block, and
    length: its elements (both 0 behind the last); choices: of all blocks but the first."""

    block: Int[Tensor, "b E"]
    nats: Float[Tensor, "b E"]
    forwards: Int[Tensor, "b k"]
    length: Int[Tensor, "b k"]
    choices: list[Chosen]

    def cost(self, price: float) -> Float[Tensor, "b k"]:
        """Of each block: its nats, and the price of each forward."""
        nats = torch.zeros(self.length.shape, dtype=torch.float64).scatter_add(1, self.block, self.nats)
        return nats + price * self.forwards


def cut(model: MaskedVaryingBlocks, ids: Int[Tensor, "b E"], lengths: Lengths, steps: int, random: Random) -> Cut:
    """Texts as a sampler would have written them, in blocks of lengths that are chosen on the way, each in at most
    `steps` forwards. The first block has the smallest size."""
    ids, log = ids.cpu(), []  # type: ignore[var-annotated]
    told, rank = Told(ids, random), begun(lengths.sizes, ids.shape[1])
    canvas = Canvas(line(ids.shape[1]), {"token": torch.zeros_like(ids)}, 0, rank)
    decider = InLengths(Select("random", steps), lengths, log=log)
    with torch.autocast(model.device.type, enabled=False):
        generate(Target(model), canvas, decider, random=told)  # type: ignore[arg-type]
    block = canvas.rank.clone()
    length = torch.zeros(len(ids), int(block.max()) + 1, dtype=torch.long).scatter_add(1, block, torch.ones_like(block))
    forwards = length.clone().apply_(lambda n: len(schedule(int(n), steps, "linear")) if n else 0)
    return Cut(block, told.nats.clone(), forwards, length, [_own(c) for c in log])


def _own(choice: Chosen) -> Chosen:
    """Tensors that gradients may flow past: those of the loop are made in inference mode."""
    written = Written(*(x.clone() for x in choice.written))
    return Chosen(choice.row.clone(), choice.block.clone(), choice.option.clone(), written)


class Pacing(nn.Module):
    """A policy of lengths, and how it learns. price: of a forward, in nats; discount: how much the cost of each later
    block counts for a choice (1: as much, which is exact; a text that is there is hardly changed by how its beginning
    was cut, so that less means less noise)."""

    mean: Tensor
    square: Tensor
    seen: Tensor

    def __init__(self, policy: LengthPolicy, steps: int, price: float, discount: float):
        super().__init__()
        if steps < 1 or price < 0 or not 0 <= discount <= 1:
            raise ValueError(
                f"a block takes at least 1 step, a price is at least 0 and a discount a share; got {steps}, {price}, "
                f"{discount}"
            )
        self.policy, self.steps, self.price, self.discount = policy, steps, price, discount
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))  # cost of an element
        self.register_buffer("square", torch.zeros((), dtype=torch.float64))  # of the advantages
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))  # weight of both

    def advantages(self, made: Cut, mean: float | Tensor) -> Float[Tensor, "b k"]:
        """How much less each block and those after it cost than so many elements do."""
        gain = mean * made.length - made.cost(self.price)
        total = torch.zeros_like(gain)
        for k in reversed(range(gain.shape[1])):
            total[:, k] = gain[:, k] + (self.discount * total[:, k + 1] if k + 1 < gain.shape[1] else 0)
        return total

    def surrogate(self, made: Cut, advantage: Float[Tensor, "b k"]) -> Float[Tensor, "b"]:
        """What is minimised, of each text: its gradient is that of the expected cost."""
        loss = torch.zeros(len(made.block), dtype=self.policy.pool.dtype, device=self.policy.pool.device)
        for row, block, option, written in made.choices:
            said = self.policy.logits(written).log_softmax(1).gather(1, option.to(loss.device)[:, None])[:, 0]
            loss = loss.index_add(0, row.to(loss.device), -said * advantage[row, block].to(said))
        return loss

    def loss(
        self, model: MaskedVaryingBlocks, ids: Int[Tensor, "b E"], random: Generator
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """What training minimises, an element, in units of the advantages' running spread; and figures."""
        made = cut(model, ids, self.policy, self.steps, random)
        cost = made.cost(self.price).sum() / ids.numel()
        mean = self.mean / self.seen if float(self.seen) else cost
        gain = self.advantages(made, mean)
        live = made.length > 0
        self.seen.lerp_(torch.ones_like(self.seen), 1 - DECAY)
        self.mean.lerp_(cost.to(self.mean), 1 - DECAY)
        self.square.lerp_(gain[live].square().mean().to(self.square), 1 - DECAY)
        spread = float((self.square / self.seen).sqrt().clamp(min=1e-6))
        with torch.autocast(model.device.type, enabled=False):
            loss = self.surrogate(made, gain / spread).sum() / ids.numel()
        blocks, forwards = int(live.sum()), int(made.forwards.sum())
        return loss, {
            "cut_nats": float(made.nats.mean()), "tokens_per_block": ids.numel() / blocks,
            "tokens_per_forward": ids.numel() / forwards, "advantage": spread,
        }  # fmt: skip
