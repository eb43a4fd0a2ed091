"""Token-Shuffle: a window of ids in the place of one (Ma et al. 2025, arXiv 2504.17789).

New in it: the vocabulary of pictures needs few dimensions, so the ids of a window share one vector: fused in front of
the transformer, taken apart behind it. A picture then takes as many slots and forwards as it has windows, in raster
order; the ids of a window are independent of each other. Guidance grows linearly over the first half, then stays.

The paper's model is a language model with text and pictures in one vocabulary. Here a class stands in the place of the
text, or (`told` "text") the words of a prompt, such as "a bold italic letter g", in slots of their own that the
transformer reads in front of the picture; the words are what data call their styles and classes. Of a style, words are
left out at random in training, so that shorter prompts are understood. Text itself is not generated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.backbones.flanked import Flanked
from seriatim.backbones.transformer import TransformerConfig
from seriatim.conditions.condition import ClassCondition
from seriatim.conditions.text import TextPrefix
from seriatim.factorization.cells import cells
from seriatim.factorization.windows import NextGroup
from seriatim.heads.fused import FusedEmbed, MultiTokenHead
from seriatim.laws.case import Case, Limit, randomise
from seriatim.layout import grid
from seriatim.model import Model
from seriatim.systems.claim import Claim, brief
from seriatim.systems.image import raster_ar
from seriatim.systems.meta import Meta
from seriatim.systems.prompted_system import PromptedSystem, Told, check_told
from seriatim.systems.prompts import Prompts
from seriatim.systems.system import Sampling

META = Meta(
    key="token-shuffle",
    title="Token-Shuffle",
    family="image",
    modality="image",
    paper="Token-Shuffle: Towards High-Resolution Image Generation with Autoregressive Models (2025), arXiv 2504.17789",
    likelihood="exact",
    summary="Windows of ids in raster order, each fused into one vector: fewer slots and forwards by its area.",
)


def effective_rank(table: Float[Tensor, "n d"]) -> float:
    """How many directions the rows of a table fill: the exponential of the entropy of the shares of its singular
    values, as a share of the most that there could be (Roy & Vetterli 2007)."""
    values = torch.linalg.svdvals(table.detach().double())
    return float(torch.special.entr(values / values.sum()).sum().exp()) / len(values)


def judged(trained: Any) -> dict[str, Any]:
    """The usual figures, and how many directions the rows of ids and of words fill."""
    from seriatim.systems.pyramid_trials import trained_seed
    from seriatim.verbs.evaluate import evaluate

    model = trained.system.model
    ranks = {"rank_of_ids": effective_rank(model.embed.table)}
    ranks["rank_of_words"] = effective_rank(next(iter(model.conditions.values())).table)
    return {**evaluate(trained.system, trained.data, seed=trained_seed(trained)), **ranks}


CLAIM = Claim(
    text="With windows of 2x2 ids, pictures of 8x8 take 16 forwards instead of 64 and are about as good after equal "
    "minutes of training: FD-s, at most a tenth worse than id by id. Windows of 4x4, in 4 forwards, lose more. "
    "Beside it: told by text, and how many directions the rows of ids and of words fill.",
    paper="GenAI-Bench .77 on hard prompts (LlamaGen .59) with windows of 2x2 at 1024x1024; 4x4 blur",
    metric="fd_s",
    arms={
        "token-shuffle": brief("token-shuffle", "zoo:image-vq"),
        "raster-ar": brief("raster-ar", "zoo:image-vq"),
        "windows of 4": brief("token-shuffle", "zoo:image-vq", window=4),
        "text": brief("token-shuffle", "zoo:image-vq", measure=judged, told="text"),
    },
    ours="token-shuffle",
    baseline="raster-ar",
    margin=0.9,
    spread_seeds=(0, 1, 2),
    other_seeds=(0,),
    data="glyphs",
)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits at 17 grey levels. side: ids in a row; window: ids in a row of a window;
    blocks: residual networks before the transformer, and as many behind it; z_loss: its weight in training; told: what
    pictures are asked for by; styles, names: of the data, which prompts are made of."""

    side: int = 8
    vocab: int = 17
    classes: int = 10
    width: int = 96
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1
    window: int = 2
    blocks: int = 2
    z_loss: float = 0.0
    told: Told = "class"
    styles: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_told(self.told, self.names)
        for name in ("styles", "names"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON knows lists only

    @cached_property
    def prompts(self) -> Prompts:
        return Prompts(self.styles, self.names)


def build(config: Config | None = None, *shape: int) -> Model:
    """The model, with fresh weights; shape: rows and columns of a grid that is no square."""
    c = config or Config()
    rows, columns = shape or (c.side, c.side)
    prefix, forms = 1 if c.told == "class" else c.prompts.slots, ("prefix", "vector")
    order, count = NextGroup(cells(rows, columns, c.window, c.window), prefix), c.window**2
    backbone = Flanked(TransformerConfig(c.width, c.depth, c.heads, dropout=c.dropout, vector=c.width), c.blocks)
    embed = FusedEmbed(c.vocab, c.width, count, positions=(rows * columns // count + prefix - 1,))
    condition: dict[str, Any] = {"class": ClassCondition(c.classes, c.width, forms, std=0.4)}
    if c.told == "text":
        condition = {"text": TextPrefix(len(c.prompts.words), c.width, forms, std=0.4)}
    head = MultiTokenHead(c.width, c.vocab, count, c.z_loss)
    return Model(grid(rows, columns), order, embed, backbone, head, condition)


class TokenShuffle(PromptedSystem):
    """Pixels of small pictures, or ids of a VQ tokenizer, window by window."""

    meta, Config = META, Config
    sampling = Sampling(top_p=0.96, guidance=1.0)
    schedule = "half-linear"

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)


# ---- what the laws run -----------------------------------------------------------------------------------------------


def case() -> Case:
    """A tiny instance for the laws."""
    c = Config(vocab=2, classes=3, width=16, depth=2, heads=2, dropout=0.0, blocks=1)
    model = randomise(build(c, 2, 4), std=0.35)
    return Case(model, vocab=2, condition={"class": torch.tensor([1])}, limits=(id_by_id,))


def id_by_id() -> Limit:
    """Windows of one id, without networks around the transformer, are raster autoregression."""
    sizes = {"side": 2, "vocab": 2, "classes": 3, "width": 16, "depth": 2, "heads": 2, "dropout": 0.0}
    one = randomise(build(Config(**sizes, window=1, blocks=0)))  # type: ignore[arg-type]
    other = raster_ar.build(raster_ar.Config(**sizes)).double().eval()  # type: ignore[arg-type]
    other.load_state_dict(one.state_dict())
    x, label = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]]), {"class": torch.tensor([1, 2])}
    got, want = (m.losses(m.canvas({"token": x}), label) for m in (one, other))
    return Limit("windows of one id are raster autoregression", got, want)


def told_by_text() -> Case:
    """The same told by the words of a prompt: laws hold for this form, too."""
    c = Config(
        vocab=2, classes=3, width=16, depth=2, heads=2, dropout=0.0, blocks=1, told="text", styles=("bold", ""),
        names=("a", "b", "7"),
    )  # fmt: skip
    spread = {"text": c.prompts.of(torch.arange(3), torch.tensor([0, 1, 0]))}
    return Case(randomise(build(c, 2, 4), std=0.35), 2, condition={"text": spread["text"][:1]}, spread=spread)


class _ReadsItself(NextGroup):
    """Wrong on purpose: each slot reads the window that it carries."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        slot = (plan.reads.slot + 1).clamp(max=plan.size - 1)
        return replace(plan, reads=replace(plan.reads, slot=slot))


def mutant() -> Case:
    """The case with read-outs at the slots that carry what is read, which the laws must catch."""
    wrong = case()
    wrong.model.factorization = _ReadsItself(cells(2, 4, 2, 2))
    return wrong
