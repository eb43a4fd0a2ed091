"""D-AR: a diffusion over pixels, written as next-token prediction (Gao & Shou 2025, arXiv 2505.23660).

New in it: the tokenizer makes a line of ids of a picture, each group of which tells a flow over pixels one slice of its
time; so a plain causal transformer, id by id, generates a picture from coarse to fine, and it can be seen after every
group: one step of the flow, and a preview. The generator is raster-ar as it is; guidance grows linearly along the line.

What is new is in the tokenizer (tokenizers/sequential.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode
from seriatim.decoding.target import Branch
from seriatim.laws.case import Case, Limit, randomise
from seriatim.layout import Layout
from seriatim.model import Model
from seriatim.random import Generator
from seriatim.systems.claim import Claim, Trial, brief
from seriatim.systems.image import raster_ar
from seriatim.systems.meta import Meta
from seriatim.systems.query_system import QueryConfig, QuerySystem
from seriatim.systems.query_trials import nats_an_id, previews_settle
from seriatim.systems.system import Sampling
from seriatim.tokenizers.sequential import Stream

META = Meta(
    key="d-ar",
    title="D-AR: diffusion as next-token prediction",
    family="image",
    modality="image",
    paper="D-AR: Diffusion via Autoregressive Models (2025), arXiv 2505.23660",
    likelihood="exact",
    summary="A line of ids, whose groups are the steps of a diffusion over pixels: previews on the way.",
)

CLAIM = Claim(
    text="The ids of a sequential diffusion tokenizer have an order: a causal transformer is surer of them, in nats an "
    "id, group by group from high noise to low than with the groups shuffled (one order for all pictures).",
    paper="ImageNet 256x256: FID 2.09 and IS 298.4 (XL, 775M), 2.44 and 262.9 (L, 343M), by 256 ids; rFID 1.52",
    metric="nats_an_id",
    arms={
        "d-ar": brief("d-ar", "zoo:image-sequential", measure=nats_an_id),
        "shuffled": brief("d-ar", "zoo:image-sequential", measure=nats_an_id, shuffled=True),
        "raster-ar": brief("raster-ar", "zoo:image-vq", measure=nats_an_id),
        "previews": Trial("zoo:image-sequential", previews_settle),
    },
    ours="d-ar",
    baseline="shuffled",
    spread_seeds=(0, 1, 2),
    other_seeds=(0,),
    data="glyphs",
)


@dataclass(frozen=True)
class Config(QueryConfig):
    """Sizes; the defaults suit 32x32 glyphs (8 groups of 4 ids). shuffled: groups are generated in another order,
    always the same one, to see what theirs is worth. guided_from: where guidance begins, which grows along the line.
    form llama: rotary positions along the line, the class in front alone, as released."""

    shuffled: bool = False
    guided_from: float = 0.0

    @property
    def order(self) -> Int[Tensor, "N"]:
        """Which id of the tokenizer's line each element is."""
        order = torch.randperm(self.groups, generator=torch.Generator().manual_seed(0))
        order = order if self.shuffled else torch.arange(self.groups)
        return (order[:, None] * self.group_size + torch.arange(self.group_size)).flatten()


def build(config: Config | None = None) -> Model:
    """The model, with fresh weights: that of raster-ar over a line of ids."""
    c = config or Config()
    same = raster_ar.Config(c.groups, c.vocab, c.classes, c.width, c.depth, c.heads, c.dropout, c.form, c.hidden)
    return raster_ar.build(same, c.groups, c.group_size, along=True)


class DAR(QuerySystem):
    """Ids of a sequential tokenizer, one after another; a picture after every group."""

    meta, Config, codes, tokenizers = META, Config, "sequential", ("image-sequential",)
    sampling = Sampling(guidance=1.0)
    schedule = "linear"

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    def guidance(self, sampling: Sampling) -> Guidance | Sequence[Branch] | None:
        if not self.config.guided_from or not sampling.guidance:
            return super().guidance(sampling)
        return Guidance(sampling.guidance, "linear", self.config.guided_from)

    def elements(self, images: Float[Tensor, "n c h w"], layout: Layout) -> Int[Tensor, "n N"]:
        return super().elements(images, layout)[:, self.config.order]

    def picture(self, codes: Int[Tensor, "n N"]) -> Float[Tensor, "n c h w"]:
        return self.tokenizer.decode(codes[:, self.config.order.argsort()])

    def so_far(self, canvas: Canvas) -> Float[Tensor, "n c h w"]:
        """The preview after the groups that are known; grey before the first. The last frame is the picture."""
        c, t = self.config, self.tokenizer
        known = canvas.known[:, c.order.argsort()].view(-1, c.groups, c.group_size).all((0, 2))
        groups = int(known.long().cumprod(0).sum())
        if groups == c.groups:
            return self.finished(canvas)
        if groups == 0:
            return torch.zeros(canvas.batch, t.channels, t.side, t.side)
        return t.previews(canvas.value["token"][:, c.order.argsort()][:, : groups * c.group_size])[-1]

    def stream(
        self, labels: Int[Tensor, " n"], sampling: Sampling | None = None, seed: int = 0,
        given: Int[Tensor, "n m"] | None = None,
    ) -> Iterator[Float[Tensor, "n c h w"]]:  # fmt: skip
        """What pictures of these classes will be, while they are generated: after each group, then the pictures.

        given: the ids of the first groups, of other pictures, say, whose layout these are to take over. Raises
        ValueError for ids that are no whole groups, and where groups are shuffled."""
        c, s = self.config, sampling or self.sampling
        if c.shuffled:
            raise ValueError("groups that are generated in another order cannot be drawn one by one")
        start = torch.zeros(len(labels), 0, dtype=torch.long) if given is None else given
        if start.shape[1] % c.group_size or start.shape[1] > c.groups * c.group_size or len(start) != len(labels):
            raise ValueError(
                f"what is given are whole groups of {c.group_size} ids, {c.groups} at most, a row for each of "
                f"{len(labels)} labels; got {tuple(start.shape)}"
            )
        ids = torch.nn.functional.pad(start, (0, c.groups * c.group_size - start.shape[1]))
        canvas = self.model.canvas({"token": ids}, start.shape[1])
        stream, told = Stream(self.tokenizer, len(labels)), 0
        steps = decode(
            self.target(self.condition(labels, len(labels)), s), canvas, self.decider(s), None, Generator(seed)
        )
        while told < c.groups:
            while int(canvas.known.sum(1).min()) < (told + 1) * c.group_size:
                next(steps)
            with torch.inference_mode():
                preview = stream.push(canvas.value["token"][:, told * c.group_size : (told + 1) * c.group_size])
            told += 1
            yield preview
        yield stream.picture

    def transfer(
        self, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"], groups: int = 2,
        sampling: Sampling | None = None, seed: int = 0,
    ) -> Float[Tensor, "n c h w"]:  # fmt: skip
        """Pictures of other classes that begin as these do: the first groups are those of `images`, the rest is
        generated. Raises ValueError for more groups than there are."""
        if not 0 <= groups <= self.config.groups:
            raise ValueError(f"0 to {self.config.groups} groups are taken over, got {groups}")
        given = self.tokenizer.encode(images)[:, : groups * self.config.group_size]
        return list(self.stream(labels, sampling, seed, given))[-1]


# ---- what the laws run -----------------------------------------------------------------------------------------------


def case() -> Case:
    """A tiny instance for the laws."""
    model = randomise(build(_tiny()))
    return Case(model, vocab=2, condition={"class": torch.tensor([1])}, limits=(raster,))


def _tiny() -> Config:
    return Config(2, 2, vocab=2, classes=3, width=16, depth=2, heads=2, dropout=0.0)


def raster() -> Limit:
    """The generator is that of raster order, to the last bit."""
    one = randomise(build(_tiny()))
    other = raster_ar.build(raster_ar.Config(2, 2, 3, 16, 2, 2, 0.0)).double().eval()
    other.load_state_dict(one.state_dict())
    x, label = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]]), {"class": torch.tensor([1, 2])}
    got, want = (m.losses(m.canvas({"token": x}), label) for m in (one, other))
    return Limit("the generator is raster-ar", got, want, 0.0)


def mutant() -> Case:
    """The case with a mask that lets pairs of slots see each other, which the laws must catch."""
    return replace(case(), model=raster_ar.mutant().model)
