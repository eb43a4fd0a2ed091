"""What decoders that leave out layers claim, measured: each way to leave out as much, on the same held-out text.

A trial takes a loaded model and a seed, as `claim.Trial` has it; figures are nats per token behind a prompt, and over
those of the plain model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.backbones.route import Block
from seriatim.data.base import load_data
from seriatim.decoding.layers import LayerPlan, PromptRouters, Saturation, Staircase
from seriatim.evaluation.skipping import AtRandom, always, best_layers, network_share, text_windows
from seriatim.model import Model
from seriatim.posttraining.drafting import Base
from seriatim.posttraining.lora import LoRA
from seriatim.posttraining.routers import ROUTING, RouterConfig, Routers
from seriatim.posttraining.skipping import fitted, judged
from seriatim.posttraining.states import Tokens
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.tuned import TunedByLayers
from seriatim.training.recipe import Recipe
from seriatim.training.run import RunFolder
from seriatim.training.trainer import train

PROMPT, WINDOW = 64, 256  # tokens
FIT = 8  # windows by which thresholds and layers are chosen


@dataclass(frozen=True)
class Texts:
    """Windows of the standard library: to fit and train on, and held out."""

    fit: Int[Tensor, "w n"]
    held_out: Int[Tensor, "v n"]


def texts(system: LanguageModel, fit: int = FIT, held_out: int = 24) -> Texts:
    """So many windows of both sides, the same each time."""
    data = load_data("stdlib", "text")
    sides = ((data.train, fit), (data.test, held_out))
    first, second = (text_windows(system, side.documents, count, WINDOW) for side, count in sides)  # type: ignore[union-attr]
    return Texts(first, second)


def told(system: LanguageModel, ids: Int[Tensor, "w n"], layers: LayerPlan) -> dict[str, float]:
    """The figures of a plan: `loss`, `over_plain`, and the share that is `computed`."""
    model = system.model
    plain = judged(model, ids, PROMPT, Staircase((model.backbone.config.depth,)))  # type: ignore[union-attr, arg-type]
    ours = judged(model, ids, PROMPT, layers)
    return {"loss": ours.loss, "over_plain": ours.loss - plain.loss, "computed": ours.share}


def trained(
    system: LanguageModel, layers: LayerPlan, ids: Int[Tensor, "w n"], recipe: Recipe, adapter: LoRA | None = None
) -> LanguageModel:
    """The model, trained on as it will be used under a plan: all weights, or an adapter that is folded in. Changes the
    one that is given."""
    torch.manual_seed(recipe.seed)
    learner = TunedByLayers(system, layers, adapter)
    with tempfile.TemporaryDirectory(prefix="seriatim-") as folder:
        train(learner, Tokens(ids), recipe, RunFolder(folder), {"seed": recipe.seed})
    return learner.finished()


# ---- trials ----------------------------------------------------------------------------------------------------------

Measure = Callable[[Any, int], Mapping[str, float]]
TUNING = Recipe(200, batch=8, learning_rate=2e-4, weight_decay=0.0, bf16=True)
TRAINED = 800  # windows to train on


def after_training(layers: LayerPlan) -> Measure:
    """All weights are trained on under a plan, which is then judged."""

    def measure(system: Any, seed: int) -> Mapping[str, float]:
        given = texts(system, fit=TRAINED)
        return told(trained(system, layers, given.fit, replace(TUNING, seed=seed)), given.held_out, layers)

    return measure


def saturated(system: LanguageModel, given: Texts, share: float) -> Saturation:
    """The plan that computes this share of the networks of other texts."""
    return fitted(Saturation(0.0, run=2), system.model, given.fit, share, PROMPT)


def networks(share: float) -> Measure:
    """Feed-forward networks are left out where they change little, so that this share is computed."""

    def measure(system: Any, seed: int) -> Mapping[str, float]:
        given = texts(system)
        return told(system, given.held_out, saturated(system, given, share))

    return measure


def by_chance(share: float, blocks: Block) -> Measure:
    """As many networks, or layers with as many weights, are left out at random by the seed, and of the same tokens."""

    def measure(system: Any, seed: int) -> Mapping[str, float]:
        given, size = texts(system), network_share(system.model)
        plan = saturated(system, given, share)
        gone = 1 - judged(system.model, given.held_out, PROMPT, plan).share
        tokens = WINDOW - 1 - PROMPT
        gone *= tokens / (tokens - plan.warmup) * (1 if blocks == "feedforward" else size)
        return told(system, given.held_out, AtRandom(1 - gone, blocks, plan.bottom, plan.top, plan.warmup, seed))

    return measure


def routed(kept: float, penalty: float) -> Measure:
    """Routers are trained beside the frozen model, with a threshold at which this share of the layers runs on the texts
    they are judged by: held-out prompts are wanted less, and arms are compared at equal shares."""

    def measure(system: Any, seed: int) -> Mapping[str, float]:
        given, base = texts(system, fit=TRAINED), Base(system)
        torch.manual_seed(seed)
        part = Routers(RouterConfig(penalty), base)
        with tempfile.TemporaryDirectory(prefix="seriatim-") as folder:
            train(part.learner(base), Tokens(given.fit), replace(ROUTING, steps=200, seed=seed), RunFolder(folder), {})
        return told(system, given.held_out, tightened(part.plan(), system.model, given.held_out, kept))

    return measure


def tightened(plan: PromptRouters, model: Model, ids: Int[Tensor, "w n"], kept: float) -> PromptRouters:
    """The same routers with the highest threshold at which at least this share of the layers runs on these texts."""
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        enough = judged(model, ids, PROMPT, replace(plan, threshold=middle)).share >= kept
        low, high = (middle, high) if enough else (low, middle)
    return replace(plan, threshold=low)


def fixed(kept: float, best: bool) -> Measure:
    """This share of the layers for every text: the best ones by windows that the seed draws, or any."""

    def measure(system: Any, seed: int) -> Mapping[str, float]:
        given, depth = texts(system, fit=TRAINED), system.model.backbone.config.depth
        g, count = torch.Generator().manual_seed(seed), round(kept * depth)
        ends = (0, depth - 1)
        if best:
            some = given.fit[torch.randperm(len(given.fit), generator=g)[:FIT]]
            layers = best_layers(system.model, some, PROMPT, count, ends)
        else:
            layers = [*ends, *(1 + torch.randperm(depth - 2, generator=g)[: count - 2]).tolist()]
        return told(system, given.held_out, always(layers, system.model))

    return measure
