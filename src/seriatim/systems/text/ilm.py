"""Text by insertion: one token at a time, anywhere (ILM, Patel et al. 2025, arXiv 2505.05755).

New in it: the tokens so far are all there is, without masks and places kept free, and a bidirectional transformer
chooses slot and token together, by one softmax over all pairs. It learns to put back tokens that were dropped, which is
the exact reversal of dropping them in random order, so it decides in an order of its own, fills gaps of unknown length,
and writes texts of any length.

Whether the text is complete is read at the learned start, which is also the slot in front of the first token (the paper
has a token for each); both answers make one distribution, trained by one cross-entropy. Decoding takes a forward over
all tokens for each one, since places move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.decoding.insert import Inserting
from seriatim.decoding.loop import Decider
from seriatim.embed import TokenEmbed
from seriatim.factorization.insertion import Insertion
from seriatim.heads.insertion import InsertionHead
from seriatim.laws.case import Limit, randomise
from seriatim.laws.inserted import ByArrival, InsertedCase
from seriatim.layout import line
from seriatim.model import Model
from seriatim.objectives.inserted import Dropped
from seriatim.random import Generator
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.inserted_text import InsertedText
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling, evenly
from seriatim.training.recipe import Recipe

META = Meta(
    key="ilm",
    title="ILM: text by insertion",
    family="text",
    modality="text",
    paper="Insertion Language Models: Sequence Generation with Arbitrary-Position Insertions (2025), arXiv 2505.05755",
    likelihood="bound",
    summary="Slot and token chosen together, one insertion after another; fills gaps of unknown length.",
)


def paths_found(trained: Any, count: int = 200, turns: int | None = None) -> dict[str, float]:
    """Shares of held-out star graphs whose path is written exactly, and whose first step is right: greedily, in so many
    decoding steps (None: the system's own choice)."""
    system, pairs = trained.system, trained.data.test.pairs[:count]
    sampling, exact, first = Sampling(temperature=0.0, steps=turns), 0, 0
    for prompt, answer in pairs:
        room = system.model.layout.size - len(system.tokenizer.encode(prompt))
        said, want = system.write(prompt, min(room, LONGEST), sampling).split(), answer.split()
        exact, first = exact + (said == want), first + (said[:2] == want[:2])
    return {"exact_paths": exact / len(pairs), "first_steps": first / len(pairs)}


LONGEST = 5  # tokens of an answer: 4 nodes and an end
GRAPHS: dict[str, Any] = {"degree": 3, "shortest": 2, "longest": 3, "nodes": 12}
SHAPE: dict[str, Any] = {"length": 36, "width": 128, "depth": 3, "heads": 4}
TRAINING: dict[str, Any] = {"batch": 64, "learning_rate": 2e-3, "bf16": True}
STEPS = 1500


def arm_of(system: str, arms: str = "uneven", turns: int | None = None, **more: Any) -> Arm:
    """A training on star graphs: all of one shape, and for as many steps."""
    settings, options = {**SHAPE, **TRAINING, **more}, {**GRAPHS, "arms": arms}
    measure = partial(paths_found, turns=turns)
    return Arm(system, settings, tokenizer="words", steps=STEPS, measure=measure, options=options)


CLAIM = Claim(
    text="On star graphs with arms of different lengths, ILM writes at least one and a half times as many exact paths "
    "as next-token prediction of the same shape, after as many steps (mdlm, and equal arms, beside it).",
    paper="star graphs with unequal arms: ILM solves nearly all, next-token prediction and masked diffusion far fewer",
    metric="exact_paths",
    better="higher",
    margin=1.5,
    arms={
        "ilm": arm_of("ilm"),
        "next-token": arm_of("next-token"),
        "mdlm": arm_of("mdlm", rule="confidence", block=None),
        "ilm-equal": arm_of("ilm", "equal"),
        "next-token-equal": arm_of("next-token", "equal"),
        "mdlm-equal": arm_of("mdlm", "equal", rule="confidence", block=None),
    },
    ours="ilm",
    baseline="next-token",
    spread_seeds=(0, 1, 2),
    other_seeds=(0,),
    data="stars",
)


@dataclass(frozen=True)
class Config:
    """Sizes; `length` is the longest text in tokens, `hidden` the width of the feed-forward layers (None: 8/3 of the
    width, in steps of 8). `length_weight`: texts weigh in training so that the optimum is the law of the data also
    where lengths differ (the paper: not; then texts tend to be too short). `short`: share of the windows that are cut
    to a random length. How texts are decoded: `stop`, the probability of being complete from which on a text is (None:
    by chance), and `slots`, how many of the likeliest slots are asked (None: all)."""

    length: int = 256
    vocab: int = 272
    width: int = 256
    depth: int = 6
    heads: int = 4
    hidden: int | None = None
    theta: float = 10_000.0
    length_weight: bool = False
    short: float = 1.0
    stop: float | None = 0.5
    slots: int | None = None

    def __post_init__(self) -> None:
        Inserting(self.length, self.stop, self.slots)  # refuses what is impossible
        if not 0 <= self.short <= 1:
            raise ValueError(f"short is a share of the windows from 0 to 1, got {self.short}")


def build(config: Config | None = None) -> Dropped:
    """The model, with fresh weights."""
    c = config or Config()
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, hidden=c.hidden, rope=RoPE(c.theta)))
    embed, head = TokenEmbed(c.vocab, c.width), InsertionHead(c.width, c.vocab)
    return Dropped(line(c.length), Insertion(), embed, backbone, head, length_weight=c.length_weight)


class ILM(InsertedText):
    """Any token anywhere, from all that are there."""

    meta, Config = META, Config
    sizes = MappingProxyType({"tiny": {}, "small": {"length": 512, "depth": 8, "hidden": 640}})
    recipes = MappingProxyType({
        "tiny": Recipe(800, batch=8, learning_rate=1e-3, weight_decay=0.1, bf16=True),
        "small": Recipe(6000, batch=16, learning_rate=1e-3, weight_decay=0.1, bf16=True, compile=True),
    })  # fmt: skip
    sampling = Sampling(temperature=0.7, top_p=0.95)

    model: Dropped

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        """Of each text, as in the paper, not of each token."""
        canvas, _ = self.canvas(batch)
        return self.model.losses(canvas, random=random).sum(), torch.tensor(canvas.batch)

    @torch.no_grad()
    def score(self, examples: Any, most: int | None = None) -> tuple[float, int]:
        """The bound in nats, summed over texts, and their tokens: one draw a text, the counts of dropped tokens spread
        evenly over a batch."""
        nats, elements = 0.0, 0
        for n, part in enumerate(evenly(len(examples), most or self.score_size).split(self.validation_batch)):
            canvas, _ = self.canvas({k: v.to(self.model.device) for k, v in examples.take(part).items()})
            nats += float(self.model.bound(canvas, Generator(n)).sum())
            elements += int(canvas.open.sum())
        return nats, elements

    def inserter(self, sampling: Sampling, limit: int) -> Decider:
        return Inserting(limit, self.config.stop, self.config.slots)


# ---- what the laws run -----------------------------------------------------------------------------------------------

WHY = {1: "inserted in any order", 2: "a text is reached in as many ways as it has orders"}


class InsertionsOf(InsertedCase):
    """Every way to insert, from texts that are given at once and not inserted one by one."""

    def law(self) -> Mapping[tuple[int, ...], float]:
        size, law = self.model.layout.size, dict[tuple[int, ...], float]()
        now = {self.start: 1.0}
        for _ in range(size + 1):
            later: dict[tuple[int, ...], float] = {}
            for text, p in now.items():
                *pairs, ends = [0.0] * (len(text) + 1) * self.vocab + [1.0] if len(text) == size else self._said(text)
                whole = (*text, *[-1] * (size - len(text)))
                law[whole] = law.get(whole, 0.0) + p * ends
                for i, q in enumerate(pairs if len(text) < size else ()):
                    slot, token = divmod(i, self.vocab)
                    longer = (*text[:slot], token, *text[slot:])
                    later[longer] = later.get(longer, 0.0) + p * q
            now = later
        return law

    def _said(self, text: tuple[int, ...]) -> list[float]:
        x = torch.tensor([text], dtype=torch.long)
        canvas, plan = self.holding(x), self.plan(x)
        with torch.no_grad():
            dist, _, _ = self.model.dist(self.model.hidden(plan, canvas), plan, canvas)
        return dist.logits[0, 0].exp().tolist()  # type: ignore[attr-defined]

    def tokens(self, dist: Any) -> Tensor:
        return dist.logits[:, 0, :-1].unflatten(1, (-1, self.vocab)).logsumexp(1)


def case() -> InsertionsOf:
    """A tiny instance for the laws, decoded until it stops by chance."""
    model = randomise(build(Config(length=3, vocab=2, width=16, depth=2, heads=2)))
    return InsertionsOf(model, vocab=2, decider=lambda: Inserting(3), limits=(mean_over_orders,), exempt=WHY)


def mean_over_orders() -> Limit:
    """The losses of all sets that can be dropped add up to the mean over all orders of the surprise of inserting a text
    one token after another."""
    made, n = case(), 3
    model, x = made.model, torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 0]])
    assert isinstance(model, Dropped)
    canvas, orders = model.canvas({"token": x}), list(permutations(range(n)))
    bound, surprise = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for order in orders:
        for count in range(n + 1):
            dropped = torch.isin(torch.arange(n), torch.tensor(order[:count], dtype=torch.long)).expand(3, -1)
            with torch.no_grad():
                bound += model.dropped_losses(canvas, dropped) / len(orders)
        for row, text in enumerate(x.tolist()):
            there: list[int] = []
            for e in order:
                slot = sum(other < e for other in there)
                said = made._said(tuple(text[other] for other in sorted(there)))
                surprise[row] -= torch.tensor(said[2 * slot + text[e]], dtype=torch.float64).log() / len(orders)
                there.append(e)
            surprise[row] -= torch.tensor(made._said(tuple(text))[-1], dtype=torch.float64).log() / len(orders)
    return Limit("the bound = the mean over orders", bound, surprise)


def mutant() -> InsertionsOf:
    """The case with wrong places, which the laws must catch."""
    wrong = case()
    wrong.model.factorization = ByArrival()
    return wrong
