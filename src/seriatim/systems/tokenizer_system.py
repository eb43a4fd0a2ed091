"""Tokenizers of pictures as systems: trained by the same verb, without an order."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seriatim.random import Generator
from seriatim.systems.system import System
from seriatim.tokenizers.files import make_tokenizer
from seriatim.training.recipe import Recipe


class TokenizerSystem(System):
    """`kind` names the tokenizer's class; its config decides the losses and what is due at which step."""

    kind: ClassVar[str]
    source = "glyphs"
    recipes = MappingProxyType({
        "tiny": Recipe(900, batch=32, learning_rate=3e-3, weight_decay=0.01, warm_up=0.0),
        "photos": Recipe(200_000, batch=128, learning_rate=1e-4, weight_decay=0.05, warm_up=0.02, bf16=True, ema=0.999),
    })  # fmt: skip
    sizes = MappingProxyType({"tiny": MappingProxyType({}), "photos": MappingProxyType({})})
    validation_size = 256
    validation_batch = 64

    normed = False

    model: Any

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Any:
        raise NotImplementedError

    def __init__(self, config: Any, tokenizer: Any = None):
        nn.Module.__init__(self)
        self.config = config
        settings = {k: getattr(config, k) for k in config.__dataclass_fields__}
        self.model = make_tokenizer(self.kind, settings)
        self.__dict__["tokenizer"] = self.model

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        images = batch["image"]
        loss, figures = self.model.loss(images, step, steps, random.generator)
        self.figures = {k: v for k, v in figures.items() if k != "loss"}
        count = torch.tensor(float(len(images)), device=images.device)
        return loss * count, count

    def validate(self, examples: Any) -> dict[str, float]:
        """Squared error and peak signal-to-noise ratio in dB of held-out reconstructions."""
        index = torch.linspace(0, len(examples) - 1, min(len(examples), self.validation_size)).long()
        error, count = 0.0, 0
        for part in index.split(self.validation_batch):
            images = examples.take(part)["image"].to(next(self.model.parameters()).device)
            rebuilt = self.model.decode(self.model.encode(images))
            error += float((rebuilt - images).double().square().sum())
            count += images.numel()
        mse = error / count
        return {"squared_error": mse, "psnr": 10 * torch.tensor(4 / max(mse, 1e-12)).log10().item()}
