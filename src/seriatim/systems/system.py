"""What a published system is to training, generation and evaluation: a config, a tokenizer, a model, and a few answers.

A system's file subclasses `TextSystem` or `ImageSystem` (text_system.py, image_system.py), gives `META`, `Config` and
`build`, and overrides what is different about it. Nothing here knows a modality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seriatim.canvas import Canvas
from seriatim.decoding.filters import Suppress, Warper
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import Decider, Proposer
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.shaping import Penalties, Shaper
from seriatim.decoding.target import Branch, Target
from seriatim.model import Model
from seriatim.random import Generator
from seriatim.systems.meta import Meta
from seriatim.training.norm import NORMS, Norm, per_token
from seriatim.training.recipe import Recipe
from seriatim.training.run import WEIGHTS


@dataclass(frozen=True)
class Sampling:
    """How to sample: temperature and filters, guidance, and decoding steps where the order leaves a choice (None: the
    system's own); ids that are not written, or not as the first new one (`Suppress`), and those of a prompt that
    guidance leaves visible (`Branch.keep`). Of pictures, where a system draws others than it was trained on: size
    (width, height) in pixels, the sizes of all maps of a pyramid, coarse to fine (`scales`), and, where that was
    learned, how many layers its fine scales run (`depth`)."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical: float | None = None
    guidance: float = 0.0
    steps: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    size: tuple[int, int] | None = None
    scales: tuple[int | tuple[int, int], ...] | None = None
    depth: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    keep_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"decoding takes at least 1 step, got {self.steps}")

    @property
    def suppress(self) -> Suppress:
        return Suppress(self.suppress_tokens, self.begin_suppress_tokens)

    @property
    def warp(self) -> Warper:
        return Warper(self.temperature, self.top_k, self.top_p, self.min_p, self.typical)

    @property
    def unfiltered(self) -> Sampling:
        """The same at temperature 1 and without filters: how sure a model is shows there."""
        return replace(self, temperature=1.0, top_k=None, top_p=None, min_p=None, typical=None)

    @property
    def shapers(self) -> tuple[Shaper, ...]:
        penalties = Penalties(self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return () if penalties.neutral else (penalties,)


class System(nn.Module):
    """A published system at some size, with its tokenizer."""

    meta: ClassVar[Meta]
    Config: ClassVar[Any]
    tokenizer: Any
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {"tiny": {}}
    )  # changes of the config's defaults
    recipes: ClassVar[Mapping[str, Recipe]]  # by size; the first is the default
    sampling: ClassVar[Sampling] = Sampling()
    schedule: ClassVar[str] = "constant"  # of guidance, in progress
    source: ClassVar[str]  # built-in data it is trained on by default
    begins_as: ClassVar[str | None] = None  # the system whose weights it may begin with

    def __init__(self, config: Any, tokenizer: Any = None):
        super().__init__()
        self.config = config
        self.__dict__["tokenizer"] = tokenizer  # frozen, and saved apart: no part of the module
        self.model = self.build(config, tokenizer)

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        """The model with fresh weights."""
        raise NotImplementedError

    @classmethod
    def inherited(cls, base: System, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the config that are those of the system whose weights it begins with. settings: what a user says
        of the others."""
        mine = {f.name for f in fields(cls.Config)}
        return {f.name: getattr(base.config, f.name) for f in fields(base.config) if f.name in mine}

    def take_over(self, base: System) -> None:
        """Begin with the weights of another system. Raises ValueError where it is of another shape."""
        begin_as(self, base)

    # ---- training ---------------------------------------------------------------------------------------------------

    def canvas(self, batch: Mapping[str, Tensor]) -> tuple[Canvas, dict[str, Tensor] | None]:
        """Elements and raw conditions of a batch of examples."""
        raise NotImplementedError

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        """The losses of a batch, in nats where the likelihood is exact or a bound: their sum, and over how many
        elements. `drop`: share of samples whose condition is replaced by the null."""
        canvas, condition = self.canvas(batch)
        dropped = None
        if drop and condition:
            dropped = torch.rand(canvas.batch, generator=random.generator) < drop
        losses = self.model.losses(canvas, condition, dropped, random=random)
        return self.summed(losses, canvas.open)

    def summed(self, losses: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The losses (batch, elements) of a batch, and by what they are divided: in training as the recipe says, else
        by the elements that count."""
        return (self.norm if self.training else per_token)(losses, counts.to(losses.device))

    drop: float = 0.0  # set by whoever trains
    norm: Norm = staticmethod(per_token)  # the same, of systems that divide as the recipe says (`normed`)
    normed: ClassVar[bool] = True
    classes: tuple[str, ...] = ()  # names of labels
    ink = False  # are its pictures ink on paper, 1 for black?
    figures: Mapping[str, float] = MappingProxyType({})  # of the last batch, beside its loss

    def trained_by(self, recipe: Recipe) -> None:
        """Heed what a recipe says of the loss. Raises ValueError for a norm where the system has its own."""
        if recipe.norm != "token" and not self.normed:
            raise ValueError(f"the loss of {self.meta.key} is divided as its paper says: leave out --norm")
        self.drop, self.norm = recipe.drop, NORMS[recipe.norm]

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        return self.losses(batch, random, self.drop)

    def validate(self, examples: Any) -> dict[str, float]:
        """Figures on held-out samples, always the same ones."""
        nats, elements = self.score(examples, self.validation_size)
        return {"loss": nats / elements}

    def score(self, examples: Any, most: int | None = None) -> tuple[float, int]:
        """The summed losses of held-out samples (at most so many, spread evenly), and over how many elements: the same
        samples and noise each time."""
        total, elements = 0.0, 0
        for n, part in enumerate(evenly(len(examples), most or self.score_size).split(self.validation_batch)):
            batch = {k: v.to(self.model.device) for k, v in examples.take(part).items()}
            loss, number = self.losses(batch, Generator(n), 0.0)
            total, elements = total + float(loss), elements + int(number)
        return total, elements

    validation_size: ClassVar[int] = 64
    validation_batch: ClassVar[int] = 16
    score_size: ClassVar[int] = 2000

    def weights_to_keep(self) -> nn.Module:
        return self.model

    def stored(self, weights: Mapping[str, Tensor]) -> tuple[str, Mapping[str, Tensor]]:
        """The file that generation loads, and what is in it, of the weights to keep by their names."""
        return WEIGHTS, weights

    # ---- generation -------------------------------------------------------------------------------------------------

    def target(self, condition: Mapping[str, Tensor] | None, sampling: Sampling, **more: Any) -> Target:
        """The law that is sampled; `more`: further arguments of `Target`. Raises ValueError for a number of layers
        where all are needed."""
        if sampling.depth is not None:
            raise ValueError(f"{self.meta.key} runs all of its layers at every step: leave the depth out")
        said = {"shapers": sampling.shapers, "suppress": sampling.suppress, **more}
        return Target(self.model, condition, self.guidance(sampling), sampling.warp, **said)

    def guidance(self, sampling: Sampling) -> Guidance | Sequence[Branch] | None:
        """How strongly, and away from what, it is guided. Raises ValueError for tokens to keep where there is no prompt
        that is hidden."""
        if sampling.keep_tokens:
            raise ValueError(f"{self.meta.key} is guided by no hidden prompt, so there are no tokens of it to keep")
        return Guidance(sampling.guidance, self.schedule) if sampling.guidance else None  # type: ignore[arg-type]

    def decider(self, sampling: Sampling) -> Decider:
        """How this system decides: here, everything that is read."""
        return SampleAll()

    def proposer(self, sampling: Sampling) -> Proposer | None:
        """What is drafted, if anything."""
        return None


def begin_as(system: System, base: System) -> None:
    """Take over the weights of another system of the same shape. What it has none of (a mask's vector) stays as it is,
    and what only it has (a learned start) is left out. Raises ValueError where shapes differ."""
    mine, theirs = system.model.state_dict(), base.model.state_dict()
    shared = {name: x for name, x in theirs.items() if name in mine}
    other = [f"there is no {n}" for n in mine if n not in theirs and not n.startswith("embed.")]
    for n, x in shared.items():
        if mine[n].shape != x.shape:
            other.append(f"{n}: {tuple(mine[n].shape)} here, {tuple(x.shape)} there")
    if other:
        raise ValueError(f"{system.meta.key} is no model of the same shape as {base.meta.key}: {'; '.join(other[:3])}")
    system.model.load_state_dict({**mine, **shared})


def evenly(count: int, most: int) -> Tensor:
    """At most so many numbers below `count`, spread evenly."""
    return torch.linspace(0, count - 1, min(count, most)).long()


def numbers_are(kind: Any, settings: Mapping[str, Any]) -> None:
    """Raises ValueError for words where a dataclass has a number."""
    for f in fields(kind):
        number = str(f.type).removesuffix(" | None") in ("int", "float")
        if number and isinstance(settings.get(f.name), str):
            raise ValueError(f"{f.name} is a number, got {settings[f.name]!r}")


def config_from(cls: type[System], settings: Mapping[str, Any], size: str | None = None, **known: Any) -> Any:
    """A config: the defaults, changed by the size, by what follows from data and tokenizer (`known`), and by the
    user's settings. Raises ValueError for unknown sizes and fields, naming near ones."""
    import difflib

    names = {f.name for f in fields(cls.Config)}
    if size is not None and size not in cls.sizes:
        raise ValueError(f"{cls.meta.key} comes in the sizes {', '.join(cls.sizes)}, not {size!r}")
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"{cls.meta.key} has no setting {name!r}{hint} Its settings: {', '.join(sorted(names))}")
    for name, value in known.items():
        if name in settings and settings[name] != value:
            raise ValueError(f"{name} is {value} for these data and this tokenizer, and cannot be {settings[name]}")
    numbers_are(cls.Config, settings)
    chosen = next(iter(cls.sizes)) if size is None else size
    return cls.Config(**{**cls.sizes[chosen], **{k: v for k, v in known.items() if k in names}, **settings})
