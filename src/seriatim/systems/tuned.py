"""A language model that there is already, as training takes it: all its weights, or an adapter on them.

What is kept is in the format the base came in: a published model's own names and number format, or PEFT's names.
Weights are float32 while they are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.decoding.layers import LayerPlan, begun
from seriatim.interop.export import published_tensors
from seriatim.interop.peft import WEIGHTS as ADAPTER
from seriatim.interop.peft import adapter_tensors
from seriatim.posttraining.lora import LoRA, attach, folded
from seriatim.posttraining.skipping import skipping_loss
from seriatim.random import Generator
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.published import Published
from seriatim.systems.published_masked import PublishedMasked
from seriatim.systems.system import evenly
from seriatim.training.recipe import Recipe
from seriatim.training.run import WEIGHTS

# Steps of 8 texts or conversations. A tenth of the rate, or less, of a first training: much is to be kept. An adapter
# begins at zero and takes ten times as much.
ALL_WEIGHTS = Recipe(200, batch=8, learning_rate=2e-5, weight_decay=0.0, bf16=True)
ADAPTER_ALONE = Recipe(200, batch=8, learning_rate=2e-4, weight_decay=0.0, bf16=True)


@dataclass(frozen=True)
class Tuning:
    """length: the longest text in tokens that is learned at once (None: the model's, at most 1,024); lora: rank of the
    adapter (None: all weights are trained), lora_alpha and lora_targets: as in `LoRA`; decoder: one that leaves out
    layers, such as skipdecode+least=4: what the model learns to do without (None: all layers run); teacher: a model of
    the same tokenizer: what it writes greedily behind so many `prompts`, pieces of the data, is learned in their place
    (None: the data themselves)."""

    length: int | None = None
    lora: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None
    decoder: str | None = None
    teacher: str | None = None
    prompts: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.lora_targets, str):
            object.__setattr__(self, "lora_targets", tuple(self.lora_targets.replace(",", " ").split()))
        if self.length is not None and self.length < 2:
            raise ValueError(f"at least 2 tokens are learned at once, got a length of {self.length}")
        if self.prompts is not None and (self.teacher is None or self.prompts < 1):
            raise ValueError(f"a teacher (--teacher MODEL) writes behind at least 1 prompt, got prompts {self.prompts}")
        if self.lora is None and (self.lora_alpha, self.lora_targets) != (None, None):
            raise ValueError("lora_alpha and lora_targets are of an adapter: give its rank, too (--lora 16)")

    @property
    def adapter(self) -> LoRA | None:
        return None if self.lora is None else LoRA(self.lora, self.lora_alpha, self.lora_targets)

    @property
    def recipe(self) -> Recipe:
        return ALL_WEIGHTS if self.lora is None else ADAPTER_ALONE


class Tuned(nn.Module):
    """A learner (`training.trainer`): a system whose weights are trained on. Fresh adapters are drawn from torch's
    generator.

    Raises ValueError for weights that cannot be trained, and adapters that do not fit.
    """

    def __init__(self, system: LanguageModel | PublishedMasked, adapter: LoRA | None = None):
        super().__init__()
        named = dict(system.model.named_parameters(remove_duplicate=False))
        gone = [part.ours for part in system.parts if part.ours not in named]
        if gone:
            raise ValueError(
                f"the weights of this {system.meta.key} are quantised ({gone[0]}), and cannot be trained: give the "
                "unquantised model"
            )
        self.dtype = max(named.values(), key=torch.numel).dtype
        self.system, self.adapter = system, adapter
        self.figures: Mapping[str, float] = {}
        for p in system.parameters():  # copies: what was read may be a view of the file
            p.data = p.data.to(torch.float32, copy=True)
        system.requires_grad_(True)
        self.targets = () if adapter is None else attach(system.model, system.parts, adapter)

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        return self.system.losses(batch, random, 0.0)

    def validate(self, examples: Any) -> dict[str, float]:
        return self.system.validate(examples)

    def weights_to_keep(self) -> nn.Module:
        return self.system.model

    def stored(self, weights: Mapping[str, Tensor]) -> tuple[str, Mapping[str, Tensor]]:
        """An adapter alone; a published model as it was published; a run of ours as it is."""
        if self.adapter is not None:
            return ADAPTER, adapter_tensors(weights, self.system.parts)
        if not isinstance(self.system, Published | PublishedMasked):
            return WEIGHTS, weights
        tensors = published_tensors(weights, self.system.parts, self.system.config.backbone)
        return WEIGHTS, {name: x.to(self.dtype) for name, x in tensors.items()}

    def finished(self) -> Any:
        """The system as it is used: adapters folded into its weights."""
        folded(self.system.model)
        return self.system.eval().requires_grad_(False)


class Aligned(Tuned):
    """The same for a model that learns what another one writes: how often it would write that, too."""

    system: LanguageModel

    def validate(self, examples: Any) -> dict[str, float]:
        """And `agreement`: the share of the teacher's tokens that are this model's likeliest behind the same text."""
        same = count = 0
        for part in evenly(len(examples), self.system.validation_size).split(8):
            batch = {k: v.to(self.system.model.device) for k, v in examples.take(part).items()}
            ids, counts = batch["token"], batch["counts"][:, 1:]
            best = self.system.logits(ids)[:, :-1].argmax(-1)
            same += int(((best == ids[:, 1:]) & counts).sum())
            count += int(counts.sum())
        return {**super().validate(examples), "agreement": same / count}


class TunedByLayers(Tuned):
    """The same for a model that leaves out layers when it decodes: each text has a prompt, of random length or up to
    the first answer, and what is learned stands behind it, every token with the layers that it will have."""

    def __init__(self, system: LanguageModel, layers: LayerPlan, adapter: LoRA | None = None):
        super().__init__(system, adapter)
        self.layers = layers
        begun(layers, system.model)  # refuses what does not fit

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        return skipping_loss(self.system.model, batch, begun(self.layers, self.system.model), random)

    def validate(self, examples: Any) -> dict[str, float]:
        """The loss behind prompts on held-out windows, the same windows and prompts each time."""
        nats, count = 0.0, 0
        for n, part in enumerate(evenly(len(examples), self.system.validation_size).split(8)):
            batch = {k: v.to(self.system.model.device) for k, v in examples.take(part).items()}
            loss, tokens = self(batch, Generator(n), 0, 1)
            nats, count = nats + float(loss), count + int(tokens)
        return {"loss": nats / count}
