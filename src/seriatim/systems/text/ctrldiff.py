"""Block diffusion whose blocks are as long as the text allows, and that a classifier can steer (CtrlDiff).

New in it: how many tokens are decided together is chosen block by block, by a small policy that sees what the model had
in mind while it wrote the last blocks, and is learned by reinforcement; and a classifier steers the text by one
gradient a step instead of one call for each token and place (`decoding.steering`, which other masked models can use).

The base is SDAR's, trained on blocks of random lengths. Each block is written in a few forwards (`steps`), however long
it is: the price of a forward makes long blocks worthwhile, and what their tokens tell of each other makes them dear.
The policy learns in the last part of a training, on the same texts (`posttraining.lengths`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.data.base import load_data
from seriatim.decoding.lengths import Blind, InLengths, LengthPolicy, Lengths, begun
from seriatim.decoding.loop import Decider
from seriatim.decoding.sample import Rule, Select
from seriatim.embed import TokenEmbed
from seriatim.factorization.static import Blocks
from seriatim.factorization.varying import VaryingBlocks, in_blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.home import HOME
from seriatim.laws.case import Case, Limit, Unmasked, randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.objectives.masked import MaskedBlocks, MaskedVaryingBlocks, by_count, by_time, masking_of
from seriatim.posttraining.lengths import Pacing, cut
from seriatim.random import ORDER, Generator, Key, numbered
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Block
from seriatim.systems.masked_text import MaskedText
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling, evenly
from seriatim.training.recipe import Recipe

META = Meta(
    key="ctrldiff",
    title="CtrlDiff: block diffusion with lengths chosen on the way",
    family="text",
    modality="text",
    paper="CtrlDiff: Boosting Large Diffusion Language Models with Dynamic Block Prediction and Controllable "
    "Generation (2025), arXiv 2505.14455",
    likelihood="bound",
    summary="Blocks from left to right, as long as a learned policy dares; begins as a next-token model.",
)


@dataclass(frozen=True)
class Config:
    """Sizes as of `sdar`; `lengths`: those a block may have; `steps`: forwards of a block; `rule`: which of its tokens
    first (`Select`); `noise` and `weight` of what is hidden in training (`masking_of`). Of the policy: `price` of a
    forward in nats, `discount` of later blocks, blocks it looks back on (`memory`), the share of the training behind
    which it learns (`learns`), and on how many tokens of each text (`paced`)."""

    length: int = 512
    vocab: int = 272
    width: int = 256
    depth: int = 6
    heads: int = 4
    hidden: int | None = None
    theta: float = 10_000.0
    tied: bool = False
    window: int | None = None
    lengths: tuple[int, ...] = (2, 4, 8, 16)
    steps: int = 2
    rule: Rule = "confidence"
    noise: str = "linear"
    weight: str = "bound"
    price: float = 1.0
    discount: float = 0.5
    memory: int = 4
    learns: float = 0.7
    paced: int = 64

    def __post_init__(self) -> None:
        words = self.lengths.replace(",", " ").split() if isinstance(self.lengths, str) else self.lengths
        object.__setattr__(self, "lengths", tuple(map(int, words)))  # JSON knows lists only
        Select(self.rule, self.steps)  # refuses what is no rule
        masking_of(self.noise, self.weight)  # refuses what means nothing
        most = self.window or self.length
        if not self.lengths or not 1 <= min(self.lengths) <= max(self.lengths) <= most <= self.length:
            raise ValueError(
                f"blocks hold 1 to {most} tokens and a window up to {self.length}, got lengths of {self.lengths}"
            )
        if not 0 <= self.learns <= 1 or self.paced < 1:
            raise ValueError(
                f"the policy learns behind a share of the training, on at least 1 token; got {self.learns}, "
                f"{self.paced}"
            )


def build(config: Config | None = None) -> MaskedVaryingBlocks:
    """The model, with fresh weights."""
    c = config or Config()
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, hidden=c.hidden, rope=RoPE(c.theta)))
    embed = TokenEmbed(c.vocab, c.width, mask=True, start=False)
    head = CategoricalHead(c.width, c.vocab, tied=embed.table if c.tied else None)
    order, masking = VaryingBlocks(max(c.lengths)), masking_of(c.noise, c.weight)
    return MaskedVaryingBlocks(line(c.length), order, embed, backbone, head, masking=masking, judging=by_count)


class CtrlDiff(MaskedText):
    """Blocks one after another, each as long as the policy says."""

    meta, Config = META, Config
    sizes = MappingProxyType({"tiny": {}, "small": {"length": 1024, "depth": 8, "hidden": 640, "tied": True}})
    recipes = MappingProxyType({
        "tiny": Recipe(800, batch=4, learning_rate=1e-3, weight_decay=0.1, bf16=True),
        "small": Recipe(2000, batch=8, learning_rate=1e-3, weight_decay=0.1, bf16=True),
    })  # fmt: skip
    sampling = Sampling(temperature=0.7, top_p=0.95)
    begins_as = "next-token"

    model: MaskedVaryingBlocks

    def __init__(self, config: Any, tokenizer: Any = None):
        super().__init__(config, tokenizer)
        c = config
        policy = LengthPolicy(c.width, c.lengths, c.memory)
        self.pacing = Pacing(policy, c.steps, c.price, c.discount)

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    def weights_to_keep(self) -> nn.Module:
        return self

    @property
    def window(self) -> int:
        return self.config.window or self.config.length

    # ---- training ---------------------------------------------------------------------------------------------------

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        """In blocks of random lengths, other ones in each text."""
        ids, sizes = batch["token"], torch.tensor(self.config.lengths)
        b, n = ids.shape
        unit = random.uniform((b, -(-n // int(sizes.min()))), Key(torch.arange(b), 0, numbered(ORDER, 0, 2)))
        rank = in_blocks(sizes[(unit * len(sizes)).long()], n)
        canvas = Canvas(line(n), {"token": ids}, 0, rank)
        return self.summed(self.model.losses(canvas, random=random), canvas.open)

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        total, count = super().forward(batch, random, step, steps)
        if step < self.config.learns * steps:  # the policy gets no gradient yet, but is part of every step
            return total + 0 * sum(p.sum() for p in self.pacing.parameters()), count
        loss, self.figures = self.pacing.loss(self.model, batch["token"][:, : self.config.paced], random)
        return total + count * (loss - loss.detach()), count  # what is told is the loss of the base

    # ---- generation -------------------------------------------------------------------------------------------------

    def begun(self, ids: Sequence[int], length: int | None) -> Canvas:
        """As for all text, in blocks whose ends may be moved."""
        canvas = super().begun(ids, length)
        canvas.given_length = len(ids)
        return self._ranked(canvas, begun(self.config.lengths, canvas.layout.size, len(ids)))

    def blocked(self, canvas: Canvas, block: Block) -> Canvas:
        size, start = canvas.layout.size, canvas.given_length
        if isinstance(block, int):  # behind what completes the last block of the prompt
            lengths = [-start % max(self.config.lengths) or block, *[block] * -(-size // max(block, 1))]
        else:
            lengths = list(block(size - start) if callable(block) else block)
        return self._ranked(canvas, in_blocks(torch.tensor([lengths]), size, start))

    def _ranked(self, canvas: Canvas, rank: Tensor) -> Canvas:
        new = Canvas(canvas.layout, canvas.value, canvas.known, rank, canvas.row)
        new.given_length = canvas.given_length
        return new

    def decider(self, sampling: Sampling) -> Decider:
        """`steps` that are asked for are those of a block."""
        select = Select(self.config.rule, sampling.steps or self.config.steps)
        return InLengths(select, self.pacing.policy, self.stop)


# ---- what it claims --------------------------------------------------------------------------------------------------

TRAINED: Mapping[str, Any] = {"window": 128, "batch": 8, "steps": 400}


def trained() -> CtrlDiff:
    """The model of the claim: begun as zoo:text-base, trained once, and kept under SERIATIM_HOME."""
    from seriatim.verbs.load import load
    from seriatim.verbs.train import train

    folder = HOME / "claims" / META.key / "-".join(f"{k}{v}" for k, v in TRAINED.items())
    if not (folder / "finished").is_file():
        train("ctrldiff", "stdlib", from_="zoo:text-base", out=folder, settings=TRAINED, resume=True)
        (folder / "finished").touch()
    return load(folder)  # type: ignore[return-value]


def written(system: CtrlDiff, lengths: Lengths, seed: int, windows: int = 48) -> dict[str, Any]:
    """Held-out windows in blocks of these lengths: the bound of the sampler of the model's steps in bits a byte, tokens
    a forward, and both together as the policy weighs them (`cost`, in nats a token); how often each length was
    chosen."""
    examples, c = system.examples(load_data("stdlib", "text").test.documents), system.config
    nats = cost = forwards = tokens = size = 0.0
    chosen = torch.zeros(len(lengths.sizes))
    for n, part in enumerate(evenly(len(examples), windows).split(16)):
        ids = examples.take(part)["token"]
        made = cut(system.model, ids, lengths, c.steps, Generator(1000 * seed + n))
        nats, cost = nats + float(made.nats.sum()), cost + float(made.cost(c.price).sum())
        forwards, tokens = forwards + int(made.forwards.sum()), tokens + ids.numel()
        size += int(system.tokenizer.bytes_of[ids].sum())
        for choice in made.choices:
            chosen += torch.bincount(choice.option, minlength=len(chosen))
    shares = (chosen / chosen.sum()).tolist() if float(chosen.sum()) else [1.0] + [0.0] * (len(chosen) - 1)
    return {
        "cost": cost / tokens, "bits_per_byte": nats / size / torch.tensor(2.0).log().item(),
        "tokens_per_forward": tokens / forwards, "shares": shares,
    }  # fmt: skip


def pace(kind: str) -> Callable[[Any, int], Mapping[str, Any]]:
    """A measure of a `Trial`: "policy", "random" (lengths as often as the policy takes them, whatever was written), or
    a number: all blocks of this length."""

    def measure(system: Any, seed: int) -> Mapping[str, Any]:
        model = trained()
        policy = model.pacing.policy
        if kind == "policy":
            return written(model, policy, seed)
        if kind == "random":
            shares = written(model, policy, seed)["shares"]
            return written(model, Blind(policy.sizes, tuple(shares)), seed)
        return written(model, Blind((int(kind),)), seed)

    return measure


CLAIM = Claim(
    text="Blocks whose lengths the policy chooses cost less, in nats a token and a nat for each forward, than blocks "
    "of random lengths that are each as frequent: it knows where blocks may be long. Blocks of one length are further "
    "arms, with bits a byte (a bound) and tokens a forward of each.",
    paper="the best perplexity bounds of hybrid diffusion models",
    metric="cost",
    arms={
        "policy": Trial("zoo:text-base", pace("policy")),
        "random": Trial("zoo:text-base", pace("random")),
        **{f"all of {n}": Trial("zoo:text-base", pace(str(n))) for n in (2, 4, 8, 16)},
    },
    ours="policy",
    baseline="random",
    other_seeds=(0,),
)

# ---- what the laws run -----------------------------------------------------------------------------------------------

WHY = {1: "decided in any order inside a block", 2: "decided in any order inside a block"}


def case() -> Case:
    """A tiny instance for the laws, a block of three and one of one, decided in random order inside a block."""
    limits = (as_sdar, blocks_of_one)
    return Case(tiny(3), vocab=2, decider=lambda: Select("random", steps=3), limits=limits, exempt=WHY)


def tiny(most: int, length: int = 4, vocab: int = 2, seed: int = 0) -> MaskedVaryingBlocks:
    config = Config(length=length, vocab=vocab, width=16, depth=2, heads=2, lengths=(1, most))
    model = randomise(build(config), seed)
    assert isinstance(model, MaskedVaryingBlocks)
    return model


def cut_into(model: MaskedVaryingBlocks, x: Tensor, lengths: Sequence[int]) -> Canvas:
    """Texts in blocks of these lengths."""
    return Canvas(model.layout, {"token": x}, 0, in_blocks(torch.tensor([list(lengths)]), x.shape[1]))


def as_sdar() -> Limit:
    """Blocks of one length are SDAR's, in losses under the same draw."""
    ours, x = tiny(3), torch.tensor(list(product(range(2), repeat=4)))
    theirs = MaskedBlocks(
        ours.layout, Blocks(2, "any"), ours.embed, ours.backbone, ours.heads["token"], masking=by_time, judging=by_count
    ).eval()
    with torch.no_grad():
        got = ours.losses(cut_into(ours, x, (2, 2)), random=Generator(1))
        return Limit(
            "blocks of one length = SDAR", got, theirs.losses(theirs.canvas({"token": x}), random=Generator(1))
        )


def blocks_of_one() -> Limit:
    """Blocks of one are next-token prediction: the bound is exact."""
    model, x = tiny(3), torch.tensor(list(product(range(2), repeat=4)))
    exact = Model(model.layout, Blocks(1), model.embed, model.backbone, model.heads["token"])
    with torch.no_grad():
        canvas = cut_into(model, x, (1, 1, 1, 1))
        ours = model.hidden_losses(canvas, canvas.open).sum(1)
        return Limit("blocks of one = next-token", ours, -exact.log_prob(exact.canvas({"token": x})))


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    wrong = case()
    wrong.model.embed.__class__ = Unmasked
    return wrong
