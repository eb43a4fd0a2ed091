"""One model that writes token by token and drafts for itself by masks, in one forward (TiDAR).

New in it: every forward verifies the last draft token by token, and beside it drafts the next one by blocks of masks,
behind every token at which verification may end; there is no second model and no second pass. A next-token model is
trained further on [the text; masks in all its places] in one forward: the text is causal, a block of masks sees itself
and the text before it, and both halves predict every token; all masks are masks always, as a draft takes one step.

What is written has the law of the next-token half, whatever is drafted: a token is sampled and compared with the
draft, or drafted tokens are accepted by the ratio of both laws (`verify`). That half is an ordinary next-token model
with an exact likelihood, and all decoders work with it. A `trust` below 1 (the paper's beta) mixes its logits with
those of the first mask behind the same text: a law of its own, and drafts are exact with regard to that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.conditions.condition import Condition
from seriatim.decoding.filters import Warper
from seriatim.decoding.loop import Decider, Proposer, decode
from seriatim.decoding.own_masks import OwnMasks
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Chain, Walk
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line, LineShape
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, Limit, randomise
from seriatim.laws.enumeration import enumerate_rows
from seriatim.layout import line
from seriatim.model import Model
from seriatim.objectives.beside import losses_of_both
from seriatim.plan import Plan
from seriatim.random import Generator, Random
from seriatim.systems.claim import Arm, Claim, Trial
from seriatim.systems.decoders import Decoding
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.trials import tokens_per_forward
from seriatim.training.recipe import Recipe

META = Meta(
    key="tidar",
    title="TiDAR: drafts by masks, writes token by token",
    family="text",
    modality="text",
    paper="TiDAR: Think in Diffusion, Talk in Autoregression (2025), arXiv 2511.08923",
    likelihood="exact",
    summary="A next-token model that drafts for itself by masks in the forward that verifies; begins as one.",
)


Verify = Literal["match", "ratio"]

# ---- the claim -------------------------------------------------------------------------------------------------------


PROMPT, NEW = 120, 128  # tokens, within the 256 of an arm


def drafting(trained: Any, prompts: int = 16, new_tokens: int = NEW) -> dict[str, Any]:
    """Tokens a forward, by either way to verify, and bits per byte of the next-token half, of what was just trained."""
    system = trained.system.eval().requires_grad_(False)
    measure = tokens_per_forward("own", prompts, new_tokens, PROMPT)
    found, chosen = {}, system.config
    for verify in get_args(Verify):
        system.config = replace(chosen, verify=verify)
        found[verify] = measure(system, 0)
    system.config = chosen
    held_out = system.examples(trained.data.test.documents)
    return {
        **found[chosen.verify], "ratio_tokens_per_forward": found["ratio"]["tokens_per_forward"],
        "bits_per_byte": system.validate(held_out)["bits_per_byte"],
    }  # fmt: skip


def _arm(**settings: Any) -> Arm:
    settings = {"length": 256, "batch": 4, **settings}
    return Arm("tidar", settings, steps=120, base="zoo:text-base", measure=drafting)


CLAIM = Claim(
    text="Trained further for 120 steps, a next-token model that drafts for itself by blocks of 4 masks writes at "
    "least 1.5 tokens a forward by the law of its next-token half, where plain decoding writes 1.",
    paper="7.45 tokens a forward and 4.71 times as fast (1.5B, 50 B tokens), 8.25 and 5.91 times (8B, 150 B tokens)",
    metric="tokens_per_forward",
    arms={
        "tidar": _arm(block=4),
        "plain": Trial("zoo:text-base", tokens_per_forward("ancestral", new_tokens=NEW, length=PROMPT)),
        "blocks of 8": _arm(block=8),
    },
    ours="tidar",
    baseline="plain",
    better="higher",
    margin=1.5,
    seeds=(0, 1),
    spread_seeds=(0, 1, 2),
    other_seeds=(0,),
    data="stdlib",
)


# ---- the system ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sizes, as of a next-token model; `block`: masks behind each token, of which a draft has one less; `alpha`: the
    weight of the next-token loss beside that of the masks. How it decodes: `verify` ("match": sample, then compare;
    "ratio": accept by the ratio of both laws) and `trust` in the next-token half, below 1 another law."""

    length: int = 512
    vocab: int = 272
    width: int = 256
    depth: int = 6
    heads: int = 4
    hidden: int | None = None
    theta: float = 10_000.0
    tied: bool = False
    block: int = 4
    alpha: float = 1.0
    verify: Verify = "match"
    trust: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.block <= self.length:
            raise ValueError(f"a block holds 1 to {self.length} masks, got {self.block}")
        if self.alpha < 0:
            raise ValueError(f"alpha is a weight of at least 0, got {self.alpha}")
        if self.verify not in get_args(Verify):
            raise ValueError(f"verify is match or ratio, not {self.verify!r}")
        if not 0 <= self.trust <= 1:
            raise ValueError(f"trust is a share from 0 to 1, got {self.trust}")

    @property
    def relaxed(self) -> bool:
        """Whether it writes by another law than that of its next-token half."""
        return self.trust < 1


class Talking(Model):
    """A next-token model whose masks are trained, too."""

    def __init__(self, *parts: Any, block: int, alpha: float = 1.0, trust: float = 1.0):
        super().__init__(*parts)
        self.block, self.alpha, self.trust = block, alpha, trust

    def losses(
        self,
        canvas: Canvas,
        condition: Mapping[str, Tensor] | Condition | None = None,
        drop: Bool[Tensor, "b"] | None = None,
        strict: bool = False,
        random: Random | None = None,
    ) -> Float[Tensor, "b E"]:
        """Of each element: the weighted mean of what token and mask say of it. strict: of the token alone, which is
        exact."""
        if strict:
            return super().losses(canvas, condition, drop, strict, random)
        all_of_them = torch.ones(1, canvas.layout.size, dtype=torch.bool)
        masks, tokens = losses_of_both(self, canvas, all_of_them, self.block, random=random)
        return (self.alpha * tokens + masks) / (1 + self.alpha)

    def dist(self, h: Float[Tensor, "b s d"], plan: Plan, canvas: Canvas) -> tuple[Any, Any, Any]:
        """What each token says of the next, mixed with what the first mask behind it says where trust is not full."""
        said: Any
        said, element, slot = super().dist(h, plan, canvas)
        if self.trust < 1 and plan.masks:
            fed = plan.size - plan.masks
            first = h[:, fed : fed + said.logits.shape[1]]
            masks = self.heads["token"].dist(first, None, canvas)  # type: ignore[operator]
            said = said.mix([masks], [self.trust, 1 - self.trust])
        return said, element, slot


def build(config: Config | None = None) -> Talking:
    """The model, with fresh weights."""
    c = config or Config()
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, hidden=c.hidden, rope=RoPE(c.theta)))
    embed = TokenEmbed(c.vocab, c.width, mask=True)
    head = CategoricalHead(c.width, c.vocab, tied=embed.table if c.tied else None)
    return Talking(
        line(c.length), Line(prefix=1), embed, backbone, head, block=c.block, alpha=c.alpha, trust=c.trust
    )  # fmt: skip


class TiDAR(LanguageModel):
    """Thinks by masks, talks token by token."""

    meta, Config = META, Config
    sizes = MappingProxyType({"tiny": {}, "small": {"length": 1024, "depth": 8, "hidden": 640, "tied": True}})
    recipes = MappingProxyType({
        "tiny": Recipe(800, batch=4, learning_rate=1e-3, weight_decay=0.1, bf16=True),
        "small": Recipe(2000, batch=8, learning_rate=1e-3, weight_decay=0.1, bf16=True),
    })  # fmt: skip
    begins_as = "next-token"

    model: Talking

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    def losses(self, batch: Mapping[str, Tensor], random: Generator, drop: float) -> tuple[Tensor, Tensor]:
        """Of both halves in training; else of the next-token half, whose likelihood is exact."""
        canvas, _ = self.canvas(batch)
        losses = self.model.losses(canvas, strict=not self.model.training, random=random)
        counts = batch.get("counts", canvas.rank >= 0).to(losses.device)
        return self.summed(torch.where(counts, losses, 0), counts)

    def own(self, sampling: Sampling, stop: tuple[int, ...]) -> Decoding:
        return own(self.config, stop)

    def decider(self, sampling: Sampling) -> Decider:
        return self.own(sampling, self.stop).decider

    def proposer(self, sampling: Sampling) -> Proposer | None:
        return self.own(sampling, self.stop).proposer


def own(config: Config, stop: tuple[int, ...] = ()) -> Decoding:
    """Drafts by its own masks, verified."""
    decider = Walk(stop) if config.verify == "match" else Chain(stop)
    return Decoding(decider, OwnMasks(config.block, always=config.relaxed))


# ---- what the laws run -----------------------------------------------------------------------------------------------


PLAIN = Decoding(SampleAll())


def case() -> Case:
    """A tiny instance for the laws: all of them are about its next-token half, the limits about its drafts."""
    model = randomise(build(Config(length=3, vocab=3, width=16, depth=2, heads=2, block=2)))
    assert isinstance(model, Talking)
    texts = [partial(same_text, model, block) for block in (1, 2, 3, 5)]
    return Case(model, vocab=3, limits=(*texts, partial(same_law, model, "match"), partial(same_law, model, "ratio")))


def same_text(model: Talking, block: int) -> Limit:
    """At temperature 0, with blocks of any size, the text of the next-token half; of one, in as many steps."""
    greedy, written = Warper(temperature=0), []
    for way in (own(Config(block=block)), PLAIN):
        canvas = model.blank(1, layout=line(16))
        steps = list(decode(Target(model, warp=greedy), canvas, way.decider, way.proposer))
        written.append(torch.tensor([*canvas.value["token"][0].tolist(), len(steps) if block == 1 else 0]))
    return Limit(f"blocks of {block} = next-token, greedy", written[0], written[1])


def same_law(model: Talking, verify: Verify) -> Limit:
    """With drafts that are drawn, the law of the next-token half, by enumeration."""
    ours, theirs = (law(model, way) for way in (partial(own, Config(block=3, verify=verify)), lambda: PLAIN))
    texts = sorted({*ours, *theirs})
    got, want = (torch.tensor([x.get(t, 0.0) for t in texts], dtype=torch.float64) for x in (ours, theirs))
    return Limit(f"its law is the next-token half's ({verify})", got, want)


def law(model: Talking, make: Callable[[], Decoding], length: int = 3) -> dict[Any, float]:
    """The exact law of the first tokens that a way of decoding writes, over every outcome of every draw."""

    def run(random: Any, rows: int) -> list[tuple[int, ...]]:
        canvas, way = model.blank(rows, layout=line(length)), make()
        with torch.inference_mode():
            for _ in decode(Target(model), canvas, way.decider, way.proposer, random):
                pass
        return [tuple(row) for row in canvas.value["token"].tolist()]

    return enumerate_rows(run)


class _Open(LineShape):
    """Wrong on purpose: a text sees the masks that stand behind it."""

    def tail(self, base: int, device: torch.device) -> Tensor:
        return torch.ones_like(super().tail(base, device))


class _Seen(Line):
    def step(self, canvas, guess, cached):
        plan = super().step(canvas, guess, cached)
        if plan is not None and plan.masks and plan.run is not None:
            plan.shape.__class__ = _Open  # type: ignore[attr-defined]
        return plan


def mutant() -> Case:
    """The case with that, which the laws must catch."""
    wrong = case()
    wrong.model.factorization = _Seen(1)
    return wrong
