"""Models and layer plans made for each other: a model is trained as it will be used, with layers left out behind a
prompt, and a threshold is found for a model that is not trained.

Decoding goes through its layers one token at a time; here all tokens of a window go through theirs in one pass. It is
the same, since a token looks only for entries of tokens that went through at least its own layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.backbones.route import Block
from seriatim.canvas import Canvas
from seriatim.decoding.layers import LayerPlan, Saturation, Skipping, begun, cosines
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import Plan
from seriatim.random import Generator


def prompts_in(batch: Mapping[str, Tensor], random: Generator) -> Int[Tensor, "b"]:
    """How many first tokens of each window stand for the prompt: all before the first that counts (of a conversation:
    before the first answer), or where all count, any number of them."""
    ids = batch["token"]
    most = ids.shape[1] - 1
    if "counts" in batch:
        return batch["counts"].long().cpu().argmax(1).clamp(1, most)
    return torch.randint(1, most + 1, (len(ids),), generator=random.generator)


def skipping_losses(
    model: Model, ids: Int[Tensor, "b n"], prompts: Int[Tensor, "b"], skipping: Skipping
) -> Float[Tensor, "b n"]:
    """The loss in nats of every token behind the prompts (0 before), each through its layers, as in decoding."""
    canvas = model.canvas({"token": ids}, prompts, layout=line(ids.shape[1]))
    plan = model.factorization.packed(canvas)
    assert plan is not None
    return model.losses_by(skipping.along(plan, canvas), canvas)


def skipping_loss(
    model: Model, batch: Mapping[str, Tensor], skipping: Skipping, random: Generator
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """What training minimises: the sum of a batch's losses behind its prompts, and over how many tokens."""
    prompts = prompts_in(batch, random)
    losses = skipping_losses(model, batch["token"], prompts, skipping)
    counts = torch.arange(losses.shape[1]) >= prompts[:, None]
    if "counts" in batch:
        counts = counts & batch["counts"].cpu()
    counts = counts.to(losses.device)
    return torch.where(counts, losses, 0).sum(), counts.sum()


# ---- what a plan costs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A plan on held-out text. nats: the loss of each token behind the prompts (windows, tokens); computed: of its
    layers, or networks, the share of windows in which each token went through (layers, tokens), where it stands."""

    nats: Float[Tensor, "w n"]
    computed: Float[Tensor, "L n"]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats.mean())

    @property
    def share(self) -> float:
        """Of layers, or networks, that were computed."""
        return float(self.computed.mean(dtype=torch.float64))


@torch.no_grad()
def judged(model: Model, ids: Int[Tensor, "w n"], prompt: int, layers: LayerPlan) -> Judged:
    """The loss of windows behind their first `prompt` tokens under a plan, and what it computed for the tokens that
    stand there (the last of a window is carried nowhere)."""
    nats, computed = [], []
    first = prompt + model.factorization.prefix  # type: ignore[attr-defined]  # of their slots
    for part in ids.split(AT_ONCE):
        skipping = begun(layers, model)
        nats.append(skipping_losses(model, part, torch.full((len(part),), prompt), skipping)[:, prompt:].cpu())
        size = len(part), first + part.shape[1] - 1 - prompt
        runs = [torch.as_tensor(run, device="cpu").expand(size)[:, first:] for run in skipping.last.ran]
        computed.append(torch.stack(runs).float())
    return Judged(torch.cat(nats), torch.cat(computed, 1).mean(1))


AT_ONCE = 8  # windows of a forward

# ---- where feed-forward networks change little -----------------------------------------------------------------------


class Watched(Skipping):
    """Skips nothing, and notes the cosine of every feed-forward network: (layers, b, s)."""

    blocks: Block = "feedforward"

    def __init__(self, depth: int):
        super().__init__(depth)
        self.cosines: list[Float[Tensor, "b s"]] = []

    def route(self, plan: Plan, canvas: Canvas) -> Watched:
        return self

    def enters(self, i: int, x: Float[Tensor, "b s d"]) -> bool:
        return True

    def leaves(self, i: int, x: Float[Tensor, "b s d"], y: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        self.cosines.append(cosines(x, y))
        return y


@torch.no_grad()
def feedforward_cosines(model: Model, ids: Int[Tensor, "b n"]) -> Float[Tensor, "L b n"]:
    """How near what leaves each feed-forward network (the residual included) is to what enters it, where each token of
    the text is carried but the last: the first plot to look at, before a threshold is chosen."""
    watched = Watched(model.backbone.config.depth)  # type: ignore[union-attr, arg-type]
    skipping_losses(model, ids, torch.ones(len(ids), dtype=torch.long), watched)
    return torch.stack(watched.cosines)


def fitted(layers: Saturation, model: Model, ids: Int[Tensor, "b n"], share: float, prompt: int = 1) -> Saturation:
    """The plan with the lowest threshold at which at least `share` of the networks is computed on this text, found by
    bisection in ten forwards. Raises ValueError where no threshold leaves out so much."""
    if not 0 < share <= 1:
        raise ValueError(f"a share of networks lies in (0, 1], got {share}")
    least = judged(model, ids, prompt, replace(layers, threshold=-1.0)).share
    if least > share:
        raise ValueError(
            f"at every threshold at least {least:.2f} of the networks are computed, more than {share:.2f}: let a run "
            f"be longer, or protect fewer layers; got {layers}"
        )
    found = feedforward_cosines(model, ids).flatten().sort().values
    grades = [*found[:: max(len(found) // GRADES, 1)].tolist(), 2.0]
    low, high = 0, len(grades) - 1  # the last computes everything
    while low < high:
        middle = (low + high) // 2
        if judged(model, ids, prompt, replace(layers, threshold=grades[middle])).share >= share:
            high = middle
        else:
            low = middle + 1
    return replace(layers, threshold=grades[high])


GRADES = 1000  # thresholds that are told apart
