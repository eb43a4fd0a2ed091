"""Systems over one map of ids whose pictures are asked for by classes, or by the words of a prompt."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.data.base import Data
from seriatim.random import Generator
from seriatim.systems.image_system import ImageSystem
from seriatim.systems.prompts import styles_of
from seriatim.systems.raster_system import RasterSystem

Told = Literal["class", "text"]
KEPT = 2 / 3  # chance of a word of a style to be said in training


def check_told(told: str, names: Sequence[str]) -> None:
    """Raises ValueError for another form, and for texts about data that name nothing."""
    if told not in get_args(Told):
        raise ValueError(f"told is {' or '.join(get_args(Told))}, got {told!r}")
    if told == "text" and not names:
        raise ValueError("prompts are made of the names of classes, and there are none: take told class")


class PromptedSystem(RasterSystem):
    """The config says by what pictures are asked for (`told`) and, of the data, `styles` and `names`, of which its
    `prompts` are made; where that is text, the model has the condition "text". A label is asked for by its name."""

    asked: Int[Tensor, "n slots"] | None = None  # the prompts that labels count, in place of classes

    @classmethod
    def known(cls, tokenizer: Any, data: Data) -> dict[str, Any]:
        names = tuple(map(str, data.classes))
        return {**super().known(tokenizer, data), "styles": styles_of(data), "names": names}

    def prompted(self, texts: Sequence[str]) -> ImageSystem:
        """This system, same weights, asked for pictures of these texts: labels are their numbers. Raises ValueError for
        words that no picture was called by, and where it was trained by classes."""
        if self.config.told != "text":
            return super().prompted(texts)
        bound = copy.copy(self)
        bound.__dict__["asked"] = self.config.prompts.read(texts)
        return bound

    def canvas(self, batch: Mapping[str, Tensor]) -> tuple[Canvas, dict[str, Tensor] | None]:
        """Pictures with the texts about them, where the batch has some, else with their labels."""
        if "text" not in batch:
            return super().canvas(batch)
        codes = self.elements(batch["image"], self.model.layout)
        return self.model.canvas({"token": codes}), {"text": batch["text"]}

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        """Told by text: of all that can be said about a picture, in training of some of it."""
        if self.config.told == "text" and "label" in batch:
            prompts, label = self.config.prompts, batch["label"].cpu()
            keep = None
            if self.training:
                keep = torch.rand(len(label), prompts.slots, generator=random.generator) < KEPT
            batch = {**batch, "text": prompts.of(label, batch.get("style"), keep)}
        return super().losses(batch, random, drop)

    def condition(self, labels: Tensor | None, count: int) -> dict[str, Tensor] | None:
        """The raw condition of labels: of classes, or of what was asked for."""
        if self.config.told != "text":
            return super().condition(labels, count)
        label = torch.zeros(count, dtype=torch.long) if labels is None else labels.cpu()
        return {"text": self.config.prompts.of(label) if self.asked is None else self.asked[label]}
