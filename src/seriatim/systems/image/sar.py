"""SAR: self-autoregressive refinement of a scale-wise model (Zhou et al. 2025, arXiv 2512.06421).

New in it: a trained model goes on learning in view of its own mistakes, by two forwards and no rollout. The first is
teacher forcing; what it finds likeliest at each scale, raised to the next one, is the context of the second, which is
to say again what the first said: with a context that has drifted the truth may be out of reach
(`seriatim train sar --from RUN`, a run of flexvar).

What is predicted is the likeliest id, as by default in the released code, which can sample it, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.conditions.condition import Condition
from seriatim.heads.dist import Categorical
from seriatim.laws.case import Case, Limit, randomise
from seriatim.model import Model
from seriatim.objectives.scales import drawn_scales
from seriatim.plan import Plan
from seriatim.random import Generator
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.image import flexvar
from seriatim.systems.meta import Meta
from seriatim.systems.pyramid_system import PeekingEmbed, PyramidSystem, one_scale
from seriatim.systems.pyramid_trials import exposure_gap
from seriatim.training.recipe import Recipe

META = Meta(
    key="sar",
    title="SAR: self-autoregressive refinement",
    family="image",
    modality="image",
    paper="Rethinking Training Dynamics in Scale-wise Autoregressive Generation (2025), arXiv 2512.06421",
    likelihood="exact",
    summary="FlexVAR trained further on what it predicts itself, a scale ahead, in two forwards.",
)


@dataclass(frozen=True)
class Config(flexvar.Config):
    """FlexVAR's sizes. sigma: weight of the second forward (0: FlexVAR's training goes on); last_only: it is of the
    last scale alone, without what lies between that and the first, as in the released code; truth: it is to say what is
    true instead (plain student forcing, which the paper finds unstable)."""

    sigma: float = 0.01
    last_only: bool = True
    truth: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma >= 0:
            raise ValueError(f"the weight of the second forward is not negative, got sigma {self.sigma}")


build = flexvar.build


def predicted(model: Model, plan: Plan, canvas: Canvas, h: Float[Tensor, "b s d"]) -> Int[Tensor, "b E"]:
    """The likeliest id of each element by a forward that reads them all; what is given stays. No gradient."""
    with torch.no_grad():
        dist, element, _ = model.dist(h, plan, canvas)
        assert isinstance(dist, Categorical) and isinstance(element, Tensor)
        ids: Tensor = canvas.value["token"]
        element = element.expand(canvas.batch, -1)
        at = element.clamp(min=0)
        return ids.scatter(1, at, torch.where(element >= 0, dist.mode(), ids.gather(1, at)))


def student_plan(plan: Plan, last_only: bool) -> Plan:
    """The plan of the second forward: all scales; or the first, which holds the class, and the last."""
    scale = plan.slots.coord[0, :, 0]
    if not last_only:
        return plan
    return plan.take((((scale == 0) | (scale == scale.max())).nonzero()[:, 0])[None])


def student_losses(model: Model, plan: Plan, own: Canvas, condition: Condition, target: Canvas) -> Float[Tensor, "b E"]:
    """The losses of the ids of `target` where every scale is fed the map before of `own`. The first scale, which is fed
    none, and whatever the plan does not read: 0."""
    losses = model.losses_at(model.hidden(plan, own, None, condition), plan.reads, target)
    return losses * (target.layout.coord[:, 0] > 0).to(losses)


class SAR(flexvar.FlexVAR):
    """FlexVAR, trained further in view of its own predictions."""

    meta, Config = META, Config
    begins_as = "flexvar"
    recipes = MappingProxyType({
        **PyramidSystem.recipes,
        "further": Recipe(1000, batch=64, learning_rate=1e-4, drop=0.1, bf16=True, ema=0.995),
    })  # fmt: skip

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        """In training teacher forcing and sigma times student forcing, each its mean over elements."""
        c = self.config
        if not self.training or c.sigma == 0:
            return super().losses(batch, random, drop)
        canvas, condition = self.canvas(batch, drawn_scales(c.scales, random.generator))
        dropped = torch.rand(canvas.batch, generator=random.generator) < drop if drop else None
        encoded, count = self.model.encode(condition, dropped), canvas.open.sum()
        first, second = self.two_forwards(canvas, encoded)
        read = canvas.layout.coord[:, 0]
        read = read == read.max() if c.last_only else read > 0
        share = count / (read.sum() * canvas.batch).clamp(min=1)
        return first.sum() + c.sigma * share.to(second.device) * second.sum(), count

    def two_forwards(self, canvas: Canvas, encoded: Condition) -> tuple[Float[Tensor, "b E"], Float[Tensor, "b E"]]:
        """Losses under the true context, and under the model's own of one forward."""
        model, c = self.model, self.config
        plan = model.factorization.packed(canvas)
        assert plan is not None
        h = model.hidden(plan, canvas, None, encoded)
        own = model.canvas({"token": predicted(model, plan, canvas, h)}, layout=canvas.layout)
        second = student_losses(model, student_plan(plan, c.last_only), own, encoded, canvas if c.truth else own)
        return model.losses_at(h, plan.reads, canvas), second


CLAIM = Claim(
    text="Two minutes of refinement narrow the gap between the loss in view of the model's own predictions and that in "
    "view of the truth, against as much further training as before.",
    paper="ImageNet 256x256, FlexVAR: FID 3.05 to 2.89 (d16), 2.41 to 2.35 (d20), 2.21 to 2.14 (d24)",
    metric="gap",
    arms={
        "sar": Arm("sar", {"sigma": 1.0, "last_only": False}, base="zoo:flexvar", minutes=2, measure=exposure_gap),
        "as released": Arm("sar", base="zoo:flexvar", minutes=2, measure=exposure_gap),
        "towards the truth": Arm(
            "sar",
            {"sigma": 1.0, "last_only": False, "truth": True},
            base="zoo:flexvar",
            minutes=2,
            measure=exposure_gap,
        ),
        "teacher forcing": Arm("sar", {"sigma": 0.0}, base="zoo:flexvar", minutes=2, measure=exposure_gap),
    },
    ours="sar",
    baseline="teacher forcing",
    data="glyphs",
)


# ---- what the laws run -----------------------------------------------------------------------------------------------


def case(scales: tuple[int, ...] = (1, 2), vocab: int = 2) -> Case:
    """A tiny instance for the laws."""
    c = Config(scales, vocab, dim=3, grid=4, classes=3, width=16, depth=2, heads=2, dropout=0.0)
    limits = (lambda: one_scale(case), perfect_predictions)
    return Case(randomise(build(c)), vocab=vocab, condition={"class": torch.tensor([1])}, limits=limits)


def perfect_predictions() -> Limit:
    """Where everything is predicted as it is, the second forward is the first."""
    one = case((1, 2, 3))
    canvas = one.canvas(one.sample(4))
    plan = one.model.factorization.packed(canvas)
    assert plan is not None
    second = student_losses(one.model, plan, canvas, one.model.encode(one.rows(4)), canvas)
    first = one.model.losses(canvas, one.rows(4))
    return Limit("with perfect predictions both forwards agree", second[:, 1:], first[:, 1:])


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch."""
    wrong = case()
    wrong.model.embed.__class__ = PeekingEmbed
    return wrong
