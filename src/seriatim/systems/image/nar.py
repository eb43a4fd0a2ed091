"""NAR: neighbours next to what is there (He et al. 2025, arXiv 2503.10696).

New in it: a picture grows from its first corner, an anti-diagonal a forward: rows + columns - 1 forwards. Every element
predicts its neighbour along each axis by a head of that direction, and where two predict the same element their logits
are averaged.

The head to the right is a matrix behind the last norm; the head below has one more layer of its own before it. Here the
class also drives adaptive norms, as in raster-ar (form "llama": as released, it stands in front alone), and the last
norm is shared by both heads. A third axis (time) needs no other code than a third head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from seriatim.backbones.branched import Branched, DirectedHead
from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import TransformerConfig
from seriatim.conditions.condition import ClassCondition
from seriatim.embed import TokenEmbed
from seriatim.factorization.neighbours import Neighbours
from seriatim.laws.case import Case, randomise
from seriatim.layout import grid
from seriatim.model import Model
from seriatim.plan import Reads
from seriatim.systems.claim import Claim, brief
from seriatim.systems.image.raster_ar import Form
from seriatim.systems.meta import Meta
from seriatim.systems.raster_system import RasterSystem
from seriatim.systems.system import Sampling

META = Meta(
    key="nar",
    title="NAR: neighbouring autoregression",
    family="image",
    modality="image",
    paper="Neighboring Autoregressive Modeling for Efficient Visual Generation (2025), arXiv 2503.10696",
    likelihood="exact",
    summary="Anti-diagonals from the first corner on; two heads predict each element, one from each side.",
)

LOOKED_AT = 500  # held-out pictures


@torch.no_grad()
def by_direction(system: Any, data: Any, most: int = LOOKED_AT) -> dict[str, float]:
    """Bits of an inner element (one with a neighbour before it on every axis) by all heads together (`bits_merged`) and
    by each alone: `bits_below`, `bits_right` (of three axes `bits_axis_0` and so on)."""
    model, said = system.model, {"merged": 0.0}
    canvas, condition = system.canvas(data.test.take(torch.arange(min(most, len(data.test)))))
    plan = model.factorization.packed(canvas)
    h = model.hidden(plan, canvas, None, model.encode(condition))
    inner = (canvas.layout.coord > 0).all(1)
    names = ("below", "right") if canvas.layout.coord.shape[1] == 2 else [
        f"axis_{a}" for a in range(canvas.layout.coord.shape[1])
    ]  # fmt: skip
    slot, element, role = (x[0] for x in (plan.reads.slot, plan.reads.element, plan.reads.role))
    for name, wanted in {"merged": None, **{name: a for a, name in enumerate(names)}}.items():
        here = (element >= 0) & inner[element.clamp(min=0)]
        here = here if wanted is None else here & (role == wanted)
        reads = Reads(slot[here][None], element[here][None], role[here][None])
        dist, read, _ = model.dist(h, replace(plan, reads=reads), canvas)
        value = canvas.value["token"].gather(1, read.expand(canvas.batch, -1))
        said[name] = float(-dist.log_probs().gather(-1, value[..., None]).mean()) / math.log(2)
    return {f"bits_{name}": bits for name, bits in said.items()}


def judged(trained: Any) -> dict[str, Any]:
    """The usual figures, and what each head knows."""
    from seriatim.systems.pyramid_trials import trained_seed
    from seriatim.verbs.evaluate import evaluate

    usual = evaluate(trained.system, trained.data, seed=trained_seed(trained))
    return {**usual, **by_direction(trained.system, trained.data)}


CLAIM = Claim(
    text="Anti-diagonal by anti-diagonal, pictures of 8x8 ids take 15 forwards instead of 64 and are about as good as "
    "row by row after equal minutes of training of nets of equally many layers: FD-s, at most a tenth worse. "
    "Beside it: what each head knows of inner ids alone and together; groups of the same sizes at random places, "
    "filled in by a masked generator; and 16 windows of 2x2 ids.",
    paper="ImageNet 256x256 (L): FID 3.06 in 31 forwards; LlamaGen-L 3.80 in 256, row by row",
    metric="fd_s",
    arms={
        "nar": brief("nar", "zoo:image-vq", measure=judged, depth=3),
        "raster-ar": brief("raster-ar", "zoo:image-vq"),
        "random groups": brief("maskgit", "zoo:image-vq", groups="diagonals"),
        "windows": brief("token-shuffle", "zoo:image-vq"),
    },
    ours="nar",
    baseline="raster-ar",
    margin=0.9,
    spread_seeds=(0, 1, 2),
    other_seeds=(0,),
    data="glyphs",
)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits at 17 grey levels. side: elements in a row; depth: layers of the trunk, to
    which the head below adds one; rope: rotary positions over both axes (else learned ones); form, hidden: as of
    raster-ar."""

    side: int = 8
    vocab: int = 17
    classes: int = 10
    width: int = 96
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1
    rope: bool = True
    form: Form = "driven"
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"form is one of {', '.join(get_args(Form))}, got {self.form!r}")
        if self.form == "llama" and not self.rope:
            raise ValueError("form llama has rotary positions: leave rope as it is")


def build(config: Config | None = None, *shape: int) -> Model:
    """The model, with fresh weights; shape: of a grid that is no square, or has an axis of time in front."""
    c = config or Config()
    shape = shape or (c.side, c.side)
    branches, dim = len(shape) - 1, c.width // c.heads
    driven = c.form == "driven"
    rope = RoPE(axes=axes_of(dim, len(shape)), still=not driven) if c.rope else None
    layers = TransformerConfig(
        c.width, c.depth + branches, c.heads, hidden=c.hidden, dropout=c.dropout, vector=c.width if driven else None,
        rope=rope,
    )  # fmt: skip
    backbone = Branched(layers, branches)
    embed = TokenEmbed(c.vocab, c.width, positions=() if c.rope else shape, start=False, std=0.4)
    told = ("prefix", "vector") if driven else ("prefix",)
    condition = {"class": ClassCondition(c.classes, c.width, told, std=0.4)}
    head = DirectedHead(c.width, c.vocab, roles=len(shape))
    return Model(grid(*shape), Neighbours(), embed, backbone, head, condition)


def axes_of(dim: int, axes: int) -> tuple[int, ...]:
    """The dimensions of an attention head, shared by so many axes: each an even number, the first gets the rest."""
    share = dim // axes // 2 * 2
    return (dim - share * (axes - 1), *[share] * (axes - 1))


class NAR(RasterSystem):
    """Pixels of small pictures, or ids of a VQ tokenizer, anti-diagonal by anti-diagonal."""

    meta, Config = META, Config
    sampling = Sampling(top_p=0.96, guidance=1.0)

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)


# ---- what the laws run -----------------------------------------------------------------------------------------------


def case() -> Case:
    """A tiny instance for the laws."""
    model = build(Config(vocab=2, classes=3, width=16, depth=2, heads=2, dropout=0.0), 2, 3)
    return Case(randomise(model), vocab=2, condition={"class": torch.tensor([1])})


class _OneFurther(Neighbours):
    """Wrong on purpose: slots also see the next anti-diagonal, which they predict."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        view = plan.views["all"]
        return replace(plan, views={"all": replace(view, born=view.born - (view.at > 0).long())})


def mutant() -> Case:
    """The case with a mask that shows what is predicted, which the laws must catch."""
    wrong = case()
    wrong.model.factorization = _OneFurther()
    return wrong
