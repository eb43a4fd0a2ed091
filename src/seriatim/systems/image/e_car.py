"""E-CAR: continuous autoregression in stages that each denoise a part (Yuan et al. 2024, arXiv 2412.14170).

New in it: a transformer says a map of vectors for each of a few growing resolutions, in parallel; and the flow that
turns such a map into a picture goes only a part of the way from noise to data, from where the stage before, half as
large, left it. So the flow costs once, not once for each group of tokens, and its early parts run on small maps.

A re-construction: no code was released, and the stages' parts, the conditioning and the sizes are not known from the
paper. Taken are: the algebra of pyramidal flow matching (`heads.flow_stages`); stages that start at equal strides of
signal; the half-denoised picture of the stage before, enlarged, as what the transformer is fed for a stage, so that
training meets what sampling does; one flow network for all stages, which knows the stage by its map (Spatial-adaLN, as
`flowar`); a loss that is the mean over all vectors; Euler's method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.data.base import Data
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.flow_stages import Cells, StagedFlowConfig, StagedFlowHead, Stages
from seriatim.laws.case import Case, randomise
from seriatim.layout import pyramid
from seriatim.maps import Shape, nearest_up
from seriatim.model import Model
from seriatim.objectives.staged import Staged
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.decoders import Decoding
from seriatim.systems.flow_trials import splits
from seriatim.systems.image.flowar import assembled
from seriatim.systems.image_system import FRAMES, Pictures, Watcher
from seriatim.systems.meta import Meta
from seriatim.systems.pyramid_system import PeekingEmbed, one_scale
from seriatim.systems.system import Sampling
from seriatim.systems.vector_system import VectorSystem
from seriatim.tokenizers.quantizers import NormalizedVQ
from seriatim.training.recipe import Recipe

META = Meta(
    key="e-car",
    title="E-CAR: each stage denoises a part",
    family="image",
    modality="image",
    paper="Efficient Continuous Autoregressive Image Generation via Multistage Modeling (2024), arXiv 2412.14170",
    likelihood="none",
    summary="Maps that double, each carried by a flow from where the smaller one was left half denoised.",
)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults suit 8x8 digits in patches of 2x2 pixels. `side`: vectors in a row of the finest map; `dim`:
    numbers in each; `patch`: pixels in a row of each (1: latents); mean, deviation: of the numbers that the tokenizer
    gives. stages: how many maps there are, each twice as large as the one before (0: as many halvings as there are, at
    most 3).

    flow_width, flow_depth: of the network of the flow; flow_steps: of each stage; split: of each stage by itself.
    """

    side: int = 4
    dim: int = 4
    patch: int = 1
    stages: int = 0
    classes: int = 10
    width: int = 96
    depth: int = 3
    heads: int = 4
    dropout: float = 0.0
    mean: float = 0.0
    deviation: float = 1.0
    flow_width: int = 96
    flow_depth: int = 3
    flow_steps: int = 10
    split: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        most = next(n for n in range(self.side.bit_length()) if self.side % 2 ** (n + 1))
        stages = self.stages or min(3, 1 + most)
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "split", tuple(self.split))
        if not 1 <= stages <= 1 + most:
            raise ValueError(f"a side of {self.side} vectors is that of 1 to {1 + most} stages, not of {stages}")
        if len(self.split) not in (0, stages):
            raise ValueError(f"split gives the steps of each of {stages} stages, got {self.split}")
        if not self.deviation > 0:
            raise ValueError(f"the deviation is positive, got {self.deviation}")

    @property
    def scales(self) -> tuple[int, ...]:
        """Sides of all maps."""
        return tuple(self.side >> k for k in reversed(range(self.stages)))


@dataclass(frozen=True)
class Enlarged:
    """A feed: the map before alone, each of its single values in all places that it covers. codes: a quantizer; None:
    values are vectors."""

    patch: int = 1

    def __call__(
        self, codes: Any, known: Tensor, shapes: Sequence[Shape], first: int, last: int
    ) -> list[Float[Tensor, "b n d"]]:
        begin = (0, *accumulate(rows * columns for rows, columns in shapes))
        out = []
        for k in range(max(first, 1), last + 1):
            part = known[:, begin[k - 1] : begin[k]]
            cells = Cells((shapes[k - 1][0],), self.patch)
            x = cells.values(part if codes is None else codes.decode_ids(part), 0)
            out.append(cells.elements(nearest_up(x, (shapes[k][0] * self.patch, shapes[k][1] * self.patch))))
        return out


def build(config: Config | None = None) -> Staged:
    """The model, with fresh weights: it says that nothing moves."""
    c = config or Config()
    flow = StagedFlowConfig(c.flow_width, c.flow_depth, c.flow_steps, heads=c.heads, split=c.split)
    head = StagedFlowHead(c.width, c.dim, pyramid(c.scales), Stages.even(c.stages), c.patch, flow)
    return assembled(c, None, head, Enlarged(c.patch), Staged)


class ECAR(VectorSystem):
    """A class, then stage after stage."""

    meta, Config = META, Config
    sizes = MappingProxyType({
        "tiny": {},
        "small": {"width": 160, "depth": 5, "heads": 5, "flow_width": 160, "flow_depth": 5},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": Recipe(1500, batch=64, learning_rate=2e-3, drop=0.1, ema=0.995),
        "small": Recipe(5000, batch=64, learning_rate=1e-3, drop=0.1, bf16=True, ema=0.998),
    })  # fmt: skip
    sampling = Sampling(guidance=0.5)

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    @classmethod
    def known(cls, tokenizer: Any, data: Data) -> dict[str, Any]:
        return {**super().known(tokenizer, data), "patch": int(getattr(tokenizer.config, "patch", 1))}

    @property
    def head(self) -> StagedFlowHead:
        head = self.model.heads["token"]
        assert isinstance(head, StagedFlowHead)
        return head

    def vectors(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Those of all maps, clean; each is the mean of the finest over the values that it covers."""
        cells = self.head.cells
        return torch.cat([cells.elements(x) for x in cells.pyramid(super().vectors(images))], 1)

    def picture(self, codes: Tensor) -> Float[Tensor, "n c h w"]:
        return super().picture(codes[:, self.head.cells.span(self.config.stages - 1)])

    def enlarged(self, stage: int, x: Float[Tensor, "n m d"]) -> Float[Tensor, "n c h w"]:
        """A map of some stage as it stands, noise and all, as a picture."""
        cells, side = self.head.cells, self.config.side * self.config.patch
        return self.picture_of(cells.elements(nearest_up(cells.values(x, stage), (side, side))).float())

    def picture_of(self, finest: Float[Tensor, "n m d"]) -> Float[Tensor, "n c h w"]:
        return VectorSystem.picture(self, finest)

    def so_far(self, canvas: Canvas) -> Float[Tensor, "n c h w"]:
        """The last map that is there."""
        cells, codes = self.head.cells, canvas.value["token"]
        there = [k for k in range(self.config.stages) if bool(canvas.known[:, cells.span(k)].all())]
        return self.enlarged(there[-1], codes[:, cells.span(there[-1])]) if there else self.picture(codes * 0)

    def _draw(
        self, labels: Tensor | None, n: int, sampling: Sampling, seed: int, film: bool | Watcher, way: Decoding,
        canvas: Canvas | None = None,
    ) -> Pictures:  # fmt: skip
        """As others do, but a film goes through the steps of the flow and shows the jumps between its stages."""
        met: list[tuple[int, int, Tensor]] = []

        def watch(stage: int, step: int, x: Tensor) -> None:
            if callable(film):
                film(lambda: self.enlarged(stage, x), _caption(stage, step))
            else:
                met.append((stage, step, x))

        self.head.watch = watch if film else None
        try:
            out = super()._draw(labels, n, sampling, seed, False, way, canvas)
        finally:
            self.head.watch = None
        for i in _shown(met):
            stage, step, x = met[i]
            out.frames.append(self.enlarged(stage, x))
            out.captions.append(_caption(stage, step))
        return out


def _caption(stage: int, step: int) -> str:
    """What a state of the flow is."""
    begun = "noise" if not stage else f"jump to stage {stage + 1}"
    return begun if step < 0 else f"stage {stage + 1}, step {step + 1}"


def _shown(met: Sequence[tuple[int, int, Tensor]]) -> list[int]:
    """Which of the steps a film shows: those where a stage begins, the last, and others evenly."""
    ends = [i for i, (_, step, _) in enumerate(met) if step < 0 or i + 1 == len(met)]
    rest = [i for i in range(len(met)) if i not in ends]
    some = torch.linspace(0, len(rest) - 1, max(0, min(FRAMES - len(ends), len(rest)))).long().tolist()
    return sorted({*ends, *(rest[i] for i in some)})


CLAIM = Claim(
    text="A flow in three stages of growing size draws glyphs about as well as one that goes all the way at full size, "
    "at equal parameters and training seconds and 30 steps in all: at least 0.8 of its FD-s, by how many times fewer "
    "operations is counted (`gflops`), also where the last stage takes fewer steps. A re-construction: the paper's own "
    "settings are not known.",
    paper="ImageNet 256x256: quality comparable to DiT with 10 times fewer FLOPs and 5 times the speed",
    metric="fd_s",
    margin=0.8,
    arms={
        "e-car": Arm("e-car", minutes=3, measure=splits),
        "one stage": Arm(
            "e-car", {"stages": 1, "depth": 1, "flow_depth": 5, "flow_steps": 30}, minutes=3, measure=splits
        ),
        "two stages": Arm("e-car", {"stages": 2, "flow_steps": 15}, minutes=3, measure=splits),
    },
    ours="e-car",
    baseline="one stage",
    other_seeds=(0,),
    data="glyphs",
)


# ---- what the laws run -----------------------------------------------------------------------------------------------


def case(scales: tuple[int, ...] = (1, 2), vocab: int = 2) -> Case:
    """A tiny instance for the laws, over ids of a codebook (the flow is tested apart)."""
    c = Config(scales[-1], 3, stages=len(scales), classes=3, width=16, depth=2, heads=2)
    model: Model = assembled(c, NormalizedVQ(vocab, c.dim), CategoricalHead(c.width, vocab), Enlarged())
    limits = (lambda: one_scale(case),)
    return Case(randomise(model), vocab, condition={"class": torch.tensor([1])}, limits=limits, over_ids=True)


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    wrong = case()
    wrong.model.embed.__class__ = PeekingEmbed
    return wrong
