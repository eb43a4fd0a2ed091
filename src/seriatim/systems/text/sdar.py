"""Block diffusion from a next-token model: blocks from left to right, the tokens of a block together (SDAR).

New in it: a trained next-token model becomes a block-diffusion model by further training in which only mask and loss
change. A text is a chain of blocks, each a masked diffusion of its own given all earlier ones (BD3-LM, Arriola et al.
2025, arXiv 2503.09573): noisy queries see the queries of their block and the clean tokens before it, all blocks trained
in one forward over two streams. A mask predicts its own place, with no shift.

Finished blocks stay in the cache, which is exact, as they see nothing that comes later; a block is written with the
first forward of the next. In a block all tokens that the model is sure of (`threshold`) are decided together
("dynamic"), or so many at each step (`steps`: "static").
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.decoding.sample import Rule, Select, check_threshold
from seriatim.embed import TokenEmbed
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, Limit, Unmasked, randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.objectives.masked import Masked, MaskedBlocks, by_count, by_time, masking_of
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.masked_text import MaskedText
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.training.recipe import Recipe

META = Meta(
    key="sdar",
    title="SDAR: block diffusion from a next-token model",
    family="text",
    modality="text",
    paper="SDAR: A Synergistic Diffusion-AutoRegression Paradigm for Scalable Sequence Generation (2025), arXiv "
    "2510.06303",
    likelihood="bound",
    summary="Blocks from left to right, the tokens of a block together; begins as a next-token model.",
)

SHORT = {"length": 256, "batch": 4}
CLAIM = Claim(
    text="Begun as a next-token model, the bound is at least a fifth lower than begun with fresh weights, after as "
    "many steps: bits per byte of block diffusion with blocks of 4.",
    paper="keeps the quality of the next-token model after 50 B tokens more (Qwen3, of 36 T tokens)",
    metric="bits_per_byte",
    arms={
        "next-token": Arm("sdar", SHORT, steps=150, base="zoo:text-base"),
        "fresh": Arm("sdar", SHORT, size="small", tokenizer="zoo:text-bpe", steps=150),
    },
    ours="next-token",
    baseline="fresh",
    margin=1.2,
    data="stdlib",
)


@dataclass(frozen=True)
class Config:
    """Sizes, as of a next-token model; `window`: tokens that are trained and scored together (None: `length`), enough
    of them for a model that knows longer texts already; `block`: tokens that are decided together; `together`: all
    blocks of a text are masked at one time, as in the paper, or each at its own; `noise`: the schedule of times,
    `weight` of what is hidden (`masking_of`). How blocks are decoded: `rule` (`Select`), and all whose score exceeds
    `threshold` at once (for entropy: minus the entropy, in nats)."""

    length: int = 512
    vocab: int = 272
    width: int = 256
    depth: int = 6
    heads: int = 4
    hidden: int | None = None
    theta: float = 10_000.0
    tied: bool = False
    window: int | None = None
    block: int = 4
    together: bool = True
    noise: str = "linear"
    weight: str = "bound"
    rule: Rule = "confidence"
    threshold: float = 0.9

    def __post_init__(self) -> None:
        Select(self.rule)  # refuses what is no rule
        check_threshold(self.threshold, self.rule)
        masking_of(self.noise, self.weight)  # refuses what means nothing
        if not 1 <= self.block <= (self.window or self.length) <= self.length:
            raise ValueError(
                f"a block holds 1 to {self.window or self.length} tokens and a window up to {self.length}, got a block "
                f"of {self.block}"
            )


def build(config: Config | None = None) -> MaskedBlocks:
    """The model, with fresh weights."""
    c = config or Config()
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, hidden=c.hidden, rope=RoPE(c.theta)))
    embed = TokenEmbed(c.vocab, c.width, mask=True, start=False)
    head = CategoricalHead(c.width, c.vocab, tied=embed.table if c.tied else None)
    order = Blocks(c.block, "any")
    masking = masking_of(c.noise, c.weight)
    return MaskedBlocks(
        line(c.length), order, embed, backbone, head, masking=masking, judging=by_count, together=c.together
    )


class SDAR(MaskedText):
    """Blocks one after another, each unmasked."""

    meta, Config = META, Config
    sizes = MappingProxyType({"tiny": {}, "small": {"length": 1024, "depth": 8, "hidden": 640, "tied": True}})
    recipes = MappingProxyType({
        "tiny": Recipe(800, batch=4, learning_rate=1e-3, weight_decay=0.1, bf16=True),
        "small": Recipe(2000, batch=8, learning_rate=1e-3, weight_decay=0.1, bf16=True),
    })  # fmt: skip
    sampling = Sampling(temperature=0.7, top_p=0.95)
    begins_as = "next-token"

    model: MaskedBlocks

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    @property
    def window(self) -> int:
        return self.config.window or self.config.length


# ---- what the laws run -----------------------------------------------------------------------------------------------

WHY = {1: "decided in any order inside a block", 2: "decided in any order inside a block"}


def case() -> Case:
    """A tiny instance for the laws, decoded one token at a time, in random order inside a block."""
    limits = (blocks_of_one, one_block)
    return Case(_tiny(2), vocab=2, decider=lambda: Select("random", steps=2), limits=limits, exempt=WHY)


def _tiny(block: int) -> MaskedBlocks:
    model = build(Config(length=4, vocab=2, width=16, depth=2, heads=2, block=block))
    randomise(model)
    return model


def blocks_of_one() -> Limit:
    """Blocks of one are next-token prediction: every mask is hidden, and the bound is exact."""
    model, x = _tiny(1), torch.tensor(list(product(range(2), repeat=4)))
    exact = Model(model.layout, Blocks(1), model.embed, model.backbone, model.heads["token"])
    with torch.no_grad():
        canvas = model.canvas({"token": x})
        ours = model.hidden_losses(canvas, canvas.open).sum(1)
        return Limit("blocks of one = next-token", ours, -exact.log_prob(exact.canvas({"token": x})))


def one_block() -> Limit:
    """A block as long as the text is masked diffusion of all of it."""
    ours, x = _tiny(4), torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]])
    whole = Masked(ours.layout, AnyOrder(), ours.embed, ours.backbone, ours.heads["token"], masking=by_time)
    hidden = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]]).bool()
    with torch.no_grad():
        canvas = ours.canvas({"token": x})
        return Limit("one block = MDLM", ours.hidden_losses(canvas, hidden), whole.hidden_losses(canvas, hidden))


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    wrong = case()
    wrong.model.embed.__class__ = Unmasked
    return wrong
