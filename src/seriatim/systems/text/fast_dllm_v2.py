"""Block diffusion from a next-token model that keeps its habit: each token is read one place before its own (Fast-dLLM
v2).

New in it: outputs stay shifted by one, as those of a next-token model are, so that little has to be learned anew; and
each text is trained on in two views of complementary masks, so that every token is learned once, by plain
cross-entropy. A block is decided part after part, and inside it a second, approximate cache computes the part at work
only (`reuse`).

The first token of a block is read at the last one of the block before. Official training reads it there in the noisy
stream, official decoding in the clean one; here both read the clean one, so that what starts a block is predicted as by
a next-token model, from all that is known. Texts are windows of a stream, and need no padding: where a block is cut
short, nothing stands behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.decoding.policy import InsideBlock, check_part
from seriatim.decoding.sample import Rule, Select, check_threshold
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, Limit, randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.objectives.masked import Masked, PairedBlocks, by_count, by_time
from seriatim.plan import Plan, Reads
from seriatim.systems.claim import Arm, Claim
from seriatim.systems.masked_text import MaskedText
from seriatim.systems.masked_trials import written
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.trials import held_out
from seriatim.training.recipe import Recipe

META = Meta(
    key="fast-dllm-v2",
    title="Fast-dLLM v2: block diffusion that keeps a next-token model's shift",
    family="text",
    modality="text",
    paper="Fast-dLLM v2: Efficient Block-Diffusion LLM (2025), arXiv 2509.26328",
    likelihood="bound",
    summary="Blocks, part after part, read one place before their own; two views of complementary masks in training.",
)


# ---- the claim -------------------------------------------------------------------------------------------------------


def figures(trained: Any, prompts: int = 8, new_tokens: int = 64) -> dict[str, float]:
    """Of a system that was just trained: bits per byte, also in blocks of half the length; and, greedily behind
    held-out texts, tokens a forward by threshold, slots a token without and with reuse inside a block, and how many
    tokens a reuse changes."""
    system = trained.system.eval().requires_grad_(False)
    test = system.examples(trained.data.test.documents)
    out = {"bits_per_byte": system.validate(test)["bits_per_byte"]}
    own, config = system.model.factorization, system.config
    system.model.factorization = Blocks(max(config.block // 2, 1), "any", shift=own.shift)
    out["bits_per_byte_other_block"] = system.validate(test)["bits_per_byte"]
    system.model.factorization = own
    given = held_out(system, prompts, 64)
    for threshold in (0.7, 0.8, 0.9, 1.0):
        system.config = replace(config, threshold=threshold)
        made = written(system, "own", given, new_tokens, 0.0)
        out[f"tokens_per_forward_{threshold:g}"] = made.tokens / made.forwards
        if threshold == 0.9:
            system.config = replace(system.config, reuse=True)
            reused = written(system, "own", given, new_tokens, 0.0)
            out["slots_per_token"], out["slots_per_token_reuse"] = made.slots / made.tokens, reused.slots / made.tokens
            pairs = [p for a, b in zip(made.ids, reused.ids, strict=True) for p in zip(a, b, strict=True)]
            out["changed_by_reuse"] = sum(a != b for a, b in pairs) / len(pairs)
    system.config = config
    return out


def _arm(key: str = "fast-dllm-v2", batch: int = 2, **settings: Any) -> Arm:
    return Arm(key, {"length": 256, "batch": batch, **settings}, steps=150, base="zoo:text-base", measure=figures)


CLAIM = Claim(
    text="Begun as the same next-token model and trained further for 150 steps of equal cost with blocks of 16, two "
    "views with complementary masks give a lower bound, in bits per byte, than two with masks drawn apart.",
    paper="mean of benchmarks at 1.5 B: 42.2 with shift and padding, 45.0 with complementary masks, too; 2.6 times as "
    "many tokens a second at a threshold of 0.9 as one by one (7 B)",
    metric="bits_per_byte",
    arms={"complementary": _arm(), "apart": _arm(complementary=False)},
    ours="complementary",
    baseline="apart",
    data="stdlib",
)


# ---- the system ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sizes, as of a next-token model; `window`: tokens that are trained and scored together (None: `length`); `block`:
    tokens that see each other; `complementary`: the second view of a text hides what the first one shows (False: a draw
    of its own). How a block is decided: `part` tokens of it after another, by `rule` (`Select`), all whose score
    exceeds `threshold` at once; `reuse`: what stands outside the part at work is read as it was at the block's last
    whole forward, which is approximate (`InsideBlock`)."""

    length: int = 512
    vocab: int = 272
    width: int = 256
    depth: int = 6
    heads: int = 4
    hidden: int | None = None
    theta: float = 10_000.0
    tied: bool = False
    window: int | None = None
    block: int = 16
    complementary: bool = True
    part: int = 4
    rule: Rule = "confidence"
    threshold: float = 0.9
    reuse: bool = False

    def __post_init__(self) -> None:
        Select(self.rule)  # refuses what is no rule
        check_threshold(self.threshold, self.rule)
        most = self.window or self.length
        if not 1 <= self.block <= most <= self.length:
            raise ValueError(
                f"a block holds 1 to {most} tokens and a window up to {self.length}, got a block of {self.block}"
            )
        check_part(self.block, self.part)


def build(config: Config | None = None) -> PairedBlocks:
    """The model, with fresh weights."""
    c = config or Config()
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, hidden=c.hidden, rope=RoPE(c.theta)))
    embed = TokenEmbed(c.vocab, c.width, mask=True, start=False)
    head = CategoricalHead(c.width, c.vocab, tied=embed.table if c.tied else None)
    order = Blocks(c.block, "any", shift=True)
    return PairedBlocks(
        line(c.length), order, embed, backbone, head, masking=by_time, judging=by_count, complementary=c.complementary
    )


class FastDLLMv2(MaskedText):
    """Blocks one after another, each unmasked part after part."""

    meta, Config = META, Config
    sizes = MappingProxyType({"tiny": {}, "small": {"length": 1024, "depth": 8, "hidden": 640, "tied": True}})
    recipes = MappingProxyType({
        "tiny": Recipe(800, batch=2, learning_rate=1e-3, weight_decay=0.1, bf16=True),
        "small": Recipe(2000, batch=4, learning_rate=1e-3, weight_decay=0.1, bf16=True),
    })  # fmt: skip
    sampling = Sampling(temperature=0.7, top_p=0.95)
    begins_as = "next-token"

    model: PairedBlocks

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    @property
    def window(self) -> int:
        return self.config.window or self.config.length

    def begun(self, ids: Sequence[int], length: int | None) -> Canvas:
        return self.blocked(super().begun(ids, length), self.config.part)

    def target(self, condition: Mapping[str, Tensor] | None, sampling: Sampling, **more: Any) -> Target:
        if self.config.reuse:
            more = {"policy": InsideBlock(self.config.block, self.config.part), **more}
        return super().target(condition, sampling, **more)


# ---- what the laws run -----------------------------------------------------------------------------------------------

WHY = {1: "decided in any order inside a block", 2: "decided in any order inside a block"}


def case() -> Case:
    """A tiny instance for the laws, decoded one token at a time, in random order inside a block."""
    model = tiny(2)
    limits = (partial(as_trained, model), blocks_of_one, one_block)
    return Case(model, vocab=2, decider=lambda: Select("random", steps=2), limits=limits, exempt=WHY)


def tiny(block: int, length: int = 4, **settings: Any) -> PairedBlocks:
    c = Config(length=length, vocab=2, width=16, depth=2, heads=2, block=block, part=block, **settings)
    model = randomise(build(c))
    assert isinstance(model, PairedBlocks)
    return model


def as_trained(model: PairedBlocks) -> Limit:
    """What is read of a block in training, where the one before it is masked, too, is read in decoding, where that one
    is finished."""
    x, got, want = torch.tensor([[0, 1, 1, 0]]), [], []
    target = Target(model, cached=False)
    for hidden in ((1, 1, 1, 1), (0, 1, 1, 0), (1, 1, 0, 1)):
        noisy = model.shown(model.canvas({"token": x}), torch.tensor([hidden]).bool())
        plan = model.factorization.packed(noisy)
        finished = model.canvas({"token": x}, torch.tensor([[1, 1, *(1 - h for h in hidden[2:])]]).bool())
        step = target.plan(finished)
        assert step is not None
        with torch.no_grad():
            said: Any = model.dist(model.hidden(plan, noisy), plan, noisy)[0]
            want.append(said.log_probs()[0, plan.reads.element[0] >= 2])
            got.append(target.forward(step, finished).dist.log_probs()[0, step.reads.element[0] >= 2])
    return Limit("read in decoding = read in training", torch.cat(got), torch.cat(want))


def blocks_of_one() -> Limit:
    """Blocks of one are next-token prediction behind a first token: every token is read at the one before it."""
    model, x = tiny(1), torch.tensor(list(product(range(2), repeat=4)))
    exact = Model(model.layout, Line(), model.embed, model.backbone, model.heads["token"])
    with torch.no_grad():
        canvas = model.canvas({"token": x}, 1)
        ours = model.hidden_losses(canvas, canvas.open).sum(1)
        return Limit("blocks of one = next-token", ours, -exact.log_prob(exact.canvas({"token": x}, 1)))


def one_block() -> Limit:
    """A block as long as the text is masked diffusion of all of it, read one place before."""
    ours, x = tiny(4), torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]])
    whole = Masked(ours.layout, AnyOrder(shift=True), ours.embed, ours.backbone, ours.heads["token"], masking=by_time)
    hidden = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]]).bool()
    with torch.no_grad():
        canvas = ours.canvas({"token": x})
        got, want = ours.hidden_losses(canvas, hidden), whole.hidden_losses(canvas, hidden)
        return Limit("one block = shifted masked diffusion", got, want)


class NoisySide(Blocks):
    """Wrong on purpose: in training the first token of a block is read at the mask, or whatever stands there, that ends
    the noisy block before."""

    def packed(self, canvas: Canvas) -> Plan:
        plan = super().packed(canvas)
        slot = torch.where(plan.reads.slot >= canvas.layout.size, plan.reads.slot - canvas.layout.size, plan.reads.slot)
        return replace(plan, reads=Reads(slot, plan.reads.element))


def mutant() -> Case:
    """The case with that, which the laws must catch."""
    wrong = case()
    wrong.model.factorization = NoisySide(2, "any", shift=True)
    return wrong
