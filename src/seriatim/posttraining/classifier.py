"""A small classifier of texts that are known in part: what steers masked models (`decoding.steering`).

It is trained as it is asked: a share of each text is hidden, between none and all, as masked diffusion hides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.initial import drawn
from seriatim.plan import VALUE, Plan, Reads, Slots
from seriatim.random import Generator
from seriatim.training.recipe import Recipe
from seriatim.training.run import WEIGHTS
from seriatim.view import full

CLASSIFYING = Recipe(300, batch=32, learning_rate=2e-3, weight_decay=0.05, bf16=True)


class MaskedClassifier(nn.Module):
    """A bidirectional transformer, the mean of whose states is read by one matrix."""

    def __init__(self, vocab: int, classes: int, width: int = 64, depth: int = 2, heads: int = 2):
        super().__init__()
        if vocab < 1 or classes < 2:
            raise ValueError(f"a classifier tells at least 2 classes of texts apart, got {classes} and {vocab} tokens")
        self.table = nn.Parameter(drawn(vocab, width))
        self.mask = nn.Parameter(drawn(width))
        self.backbone = Transformer(TransformerConfig(width, depth, heads, rope=RoPE()))
        self.out = nn.Linear(width, classes)

    def vectors(self, ids: Int[Tensor, "b n"], known: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return torch.where(known[..., None], self.table[ids.to(self.table.device)], self.mask)

    def log_prob(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b c"]:
        place = torch.arange(x.shape[1])[None]
        slots = Slots(place[..., None], torch.full_like(place, VALUE), place[..., None], torch.full_like(place, -1))
        nothing = torch.zeros(1, 0, dtype=torch.long)
        plan = Plan(slots, {"all": full(x.shape[1])}, Reads(nothing, nothing), torch.full_like(place, -1))
        said = self.out(self.backbone(x, plan).mean(1))
        return torch.log_softmax(said if said.dtype == torch.float64 else said.float(), 1)


@dataclass(frozen=True)
class Labelled:
    """Windows of texts, each of a class, as training draws them."""

    ids: Int[Tensor, "windows n"]
    label: Int[Tensor, "windows"]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Int[Tensor, " w"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "token": Int[w n], "label": Int[w]."""
        return {"token": self.ids[index].long(), "label": self.label[index]}


class Classifying(nn.Module):
    """A learner (`training.trainer`) of a classifier."""

    def __init__(self, part: MaskedClassifier):
        super().__init__()
        self.part = part
        self.figures: Mapping[str, float] = {}

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        ids, label = batch["token"], batch["label"]
        noise = torch.rand(ids.shape, generator=random.generator)
        share = (torch.arange(len(ids)) + torch.rand(1, generator=random.generator)) / len(ids)  # all shares alike
        said = self.part.log_prob(self.part.vectors(ids, (noise >= share[:, None]).to(ids.device)))
        self.figures = {"accuracy": float((said.argmax(1) == label).double().mean())}
        return F.nll_loss(said, label, reduction="sum"), torch.tensor(len(ids))

    def validate(self, examples: Any) -> dict[str, float]:
        """The loss of held-out texts, and how many are told right: of whole ones, and under the noise of training."""
        index = torch.linspace(0, len(examples) - 1, min(len(examples), 256)).long()
        batch = examples.take(index)
        loss, count = self(batch, Generator(0), 0, 1)
        accuracy = self.figures["accuracy"]
        said = self.part.log_prob(self.part.vectors(batch["token"], torch.ones_like(batch["token"]).bool()))
        whole = float((said.argmax(1) == batch["label"]).double().mean())
        return {"loss": float(loss) / int(count), "accuracy": accuracy, "accuracy_whole": whole}

    def weights_to_keep(self) -> nn.Module:
        return self.part

    def stored(self, weights: Mapping[str, Tensor]) -> tuple[str, Mapping[str, Tensor]]:
        return WEIGHTS, weights
