"""Any-subset autoregressive models: texts with gaps anywhere, whose infilling has an exact likelihood (AS-ARM).

New in it (Guo & Ermon 2025, arXiv 2504.20456): a two-stream transformer that is trained on 2^n of the n! orders, any
known tokens at once and then the others from left to right, so that one forward says how likely any infilling is; and
any-subset speculative decoding, in which the model drafts several unknown tokens independently and verifies them itself
by that one forward: the law of sequential decoding by never more forwards than tokens.

The share of unknown tokens grows in training, from `share` to between `least` and `most`. With nothing known it is a
next-token model, as which it is scored; the paper's `most` of 0.99 leaves it one known token at least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.backbones.xlnet import XLNet
from seriatim.decoding.loop import Decider, Proposer, decode
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.subset import Ahead, ContextBigrams, InOrder, SelfDraft, Together
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.static import Blocks
from seriatim.factorization.subset import AnySubset
from seriatim.heads.categorical import CategoricalHead
from seriatim.interop import xlnet
from seriatim.interop.tokenizer import PublishedTokenizer, published_tokenizer
from seriatim.laws.case import Case, Limit, Unmasked, randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.objectives.masked import fewest
from seriatim.random import Generator, Keyed, enumerate_law
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import Decoding
from seriatim.systems.infill import Parts
from seriatim.systems.meta import Meta
from seriatim.systems.system import Sampling
from seriatim.systems.text_system import TextSystem
from seriatim.training.recipe import Recipe

META = Meta(
    key="as-arm",
    title="AS-ARM: any-subset autoregressive model",
    family="text",
    modality="text",
    paper="Reviving Any-Subset Autoregressive Models with Principled Parallel Sampling and Speculative Decoding "
    "(2025), arXiv 2504.20456",
    likelihood="exact",
    summary="Any known tokens, then the others from left to right; drafts for itself and verifies exactly.",
)

Way = Literal["sequential", "assd", "assd-bigram", "independent"]


@dataclass(frozen=True)
class Config:
    """Sizes; `length` is the longest text in tokens, `hidden` the width of the feed-forward layers (None: 8/3 of the
    width, in steps of 8), `tied` makes input and output matrices one. In training the share of unknown tokens is
    `share` at first, and lies between `least` and `most` after `growth`, a share of the steps. How texts are decoded:
    `decode` (`ASARM.decoding`), and how many tokens are drafted at once (`draft`)."""

    length: int = 256
    vocab: int = 272
    width: int = 256
    depth: int = 6
    heads: int = 4
    hidden: int | None = None
    theta: float = 10_000.0
    tied: bool = False
    share: float = 0.15
    least: float = 0.85
    most: float = 1.0
    growth: float = 0.1
    decode: Way = "assd"
    draft: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.share <= self.least <= self.most <= 1:
            raise ValueError(
                f"shares of unknown tokens grow: 0 < share <= least <= most <= 1, got {self.share}, {self.least} and "
                f"{self.most}"
            )
        if not 0 <= self.growth <= 1:
            raise ValueError(f"growth is a share of the steps from 0 to 1, got {self.growth}")
        if self.decode not in get_args(Way):
            raise ValueError(f"decode is {', '.join(get_args(Way))}, not {self.decode!r}")
        Ahead(self.draft)  # refuses what is no length

    def unknown(self, step: int, steps: int) -> tuple[float, float]:
        """The least and the largest share of unknown tokens at a training step."""
        grown = min(1.0, step / max(self.growth * steps, 1))
        return self.share + grown * (self.least - self.share), self.share + grown * (self.most - self.share)


def build(config: Config | None = None) -> Model:
    """The model, with fresh weights."""
    c = config or Config()
    backbone = Transformer(TransformerConfig(c.width, c.depth, c.heads, hidden=c.hidden, rope=RoPE(c.theta)))
    embed = TokenEmbed(c.vocab, c.width, mask=True, start=False)
    head = CategoricalHead(c.width, c.vocab, tied=embed.table if c.tied else None)
    return Model(line(c.length), AnySubset(), embed, backbone, head)


class ASARM(TextSystem):
    """Any known tokens, then the others one after another."""

    meta, Config = META, Config
    sizes = MappingProxyType({
        "tiny": {},
        "small": {"length": 512, "depth": 8, "hidden": 640, "tied": True},
    })  # fmt: skip
    recipes = MappingProxyType({
        "tiny": Recipe(800, batch=4, learning_rate=2e-3, weight_decay=0.1, bf16=True),
        "small": Recipe(6000, batch=8, learning_rate=2e-3, weight_decay=0.1, bf16=True),
    })  # fmt: skip
    begins_as = "next-token"
    normed = False

    @staticmethod
    def build(config: Any, tokenizer: Any) -> Model:
        return build(config)

    # ---- training ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """The loss of the unknown tokens, in nats, of texts of which others are known."""
        hidden = self.hidden(batch["token"].shape, self.config.unknown(step, steps), random)
        canvas = self.model.canvas({"token": batch["token"]}, ~hidden)
        return self.model.losses(canvas).sum(), hidden.sum()

    def hidden(self, shape: Sequence[int], share: tuple[float, float], random: Generator) -> Bool[Tensor, "b n"]:
        """Which tokens of each row are unknown: the shares of a batch lie evenly between the least and the largest,
        and of each number every set is equally likely."""
        (rows, n), (low, high), generator = shape, share, random.generator
        unit = (torch.randperm(rows, generator=generator) + torch.rand(rows, generator=generator)) / rows
        count = ((low + (high - low) * unit) * n).round().long().clamp(1, n)
        return fewest(torch.ones(rows, n, dtype=torch.bool), count, torch.rand(rows, n, generator=generator))

    # ---- generation -------------------------------------------------------------------------------------------------

    def decider(self, sampling: Sampling) -> Decider:
        return self.decoding(sampling).decider

    def proposer(self, sampling: Sampling) -> Proposer | None:
        return self.decoding(sampling).proposer

    def decoding(self, sampling: Sampling, way: Way | None = None, stop: Sequence[int] | None = None) -> Decoding:
        """How texts are decoded (None: by the config). "sequential": a token a forward; "assd": the model drafts for
        itself, and the law stays that of "sequential"; "assd-bigram": so it does with drafts from pairs of tokens that
        are known; "independent": `draft` tokens at a time, each as if the others did not matter, which is another law.
        stop: ids that end a text (None: its end).

        Penalties follow a text token by token: with them, what is exact is sequential. Raises ValueError for tokens
        drawn independently under penalties."""
        way, stop, length = way or self.config.decode, self.stop if stop is None else stop, self.config.draft
        if sampling.shapers and way == "independent":
            raise ValueError("penalties depend on each token before: leave them out, or do not decode independently")
        if way == "sequential" or sampling.shapers:
            return Decoding(SampleAll(stop))
        if way == "independent":
            return Decoding(Together(stop), Ahead(length))
        if way == "assd":
            return Decoding(InOrder(stop, sure=1), SelfDraft(length))
        return Decoding(InOrder(stop), ContextBigrams(length))

    fills = "known"

    def filling(self, parts: Parts, sampling: Sampling) -> Decoding:
        return self.decoding(sampling, stop=())  # what stands behind a gap cannot be cut off


# ---- published ones --------------------------------------------------------------------------------------------------


class Pieces(PublishedTokenizer):
    """A published tokenizer that adds nothing around a text: pieces of it stand side by side."""

    def encode(self, text: str) -> list[int]:
        return self.encode_templated(text)


def published(place: Path, raw: Mapping[str, Any], dtype: torch.dtype | None = None) -> ASARM:
    """The any-subset model of a folder in XLNet's format (therealgabeguo/ASARM), in `dtype` (None: as stored). It never
    writes XLNet's <mask>, as its authors decode it. Raises FileNotFoundError, ValueError that says what is missing or
    not understood."""
    tokenizer = published_tokenizer(place)
    if tokenizer is None:
        raise ValueError(f"{place} has no tokenizer.json: put that of xlnet-base-cased beside the weights")
    model = xlnet.published(place, raw, dtype)
    mask, head, backbone = tokenizer.inner.token_to_id("<mask>"), model.heads["token"], model.backbone
    assert isinstance(head, CategoricalHead) and isinstance(backbone, XLNet)
    if mask is not None and head.bias is not None:
        with torch.no_grad():
            head.bias[mask] = -torch.inf
    sizes = {name: getattr(backbone.config, name) for name in ("width", "depth", "heads", "hidden")}
    system = ASARM.__new__(ASARM)
    nn.Module.__init__(system)
    system.config, system.model = Config(model.layout.size, head.vocab, **sizes, tied=True), model
    system.__dict__["tokenizer"] = Pieces(tokenizer.inner)
    return system.eval().requires_grad_(False)


# ---- what it claims --------------------------------------------------------------------------------------------------

HIDDEN, TEXTS, JUDGE = 0.9, 24, "zoo:text-base"


def trial(way: Way) -> Callable[[Any, int], Mapping[str, float]]:
    """Held-out texts of which nine tokens in ten are missing, others for each seed, filled at temperature 1: how many
    tokens a forward decides, and what a next-token model finds in the texts, in nats a token; beside it the entropy of
    their tokens, since dull texts are likely. Raises ValueError for a model of other ids than that one's."""

    def measure(system: Any, seed: int, texts: int = TEXTS, judge: Any = None) -> Mapping[str, float]:
        from seriatim.data.base import load_data
        from seriatim.verbs.load import load

        judge = judge or load(JUDGE)
        if judge.tokenizer.to_json() != system.tokenizer.to_json():
            raise ValueError(f"{JUDGE} reads other ids than this model: begin with its weights (--from {JUDGE})")
        windows = system.examples(load_data("stdlib", "text").test.documents)
        generator = torch.Generator().manual_seed(seed)
        ids = windows.take(torch.randint(len(windows), (texts,), generator=generator))["token"]
        hidden = system.hidden(ids.shape, (HIDDEN, HIDDEN), Generator(seed))
        forwards, nats, entropy = 0, 0.0, 0.0
        for row, (text, gone) in enumerate(zip(ids, hidden, strict=True)):
            canvas = system.model.canvas({"token": text[None]}, ~gone[None], row=torch.tensor([row]))
            how = system.decoding(Sampling(), way, stop=())
            for step in decode(system.target(None, Sampling()), canvas, how.decider, how.proposer, Keyed(seed)):
                forwards += step.forwards
            written = canvas.value["token"]
            with torch.no_grad():
                said = judge.model.canvas({"token": written}, layout=line(written.shape[1]))
                nats += float(judge.model.losses(said).mean())
            share = written[0].unique(return_counts=True)[1] / written.shape[1]
            entropy -= float((share * share.log()).sum())
        return {
            "tokens_per_forward": int(hidden.sum()) / forwards, "nats_per_token": nats / texts,
            "entropy": entropy / texts,
        }  # fmt: skip

    return measure


CLAIM = Claim(
    text="Drafting for itself and verifying, the model fills nine tokens in ten of a text with at least a twentieth "
    "more tokens a forward than one after another, and by the same law.",
    paper="about a tenth fewer forwards than token by token, at equal perplexity and entropy (WikiText, 95% hidden)",
    metric="tokens_per_forward",
    arms={way: Trial("zoo:text-as-arm", trial(way)) for way in get_args(Way)},
    ours="assd",
    baseline="sequential",
    better="higher",
    margin=1.05,
)


# ---- what the laws run -----------------------------------------------------------------------------------------------


def case() -> Case:
    """A tiny instance for the laws."""
    return Case(_tiny(), vocab=3, limits=(left_to_right, *(drafted(way) for way in ("assd", "assd-bigram"))))


def _tiny(length: int = 4, vocab: int = 3) -> Model:
    return randomise(build(Config(length=length, vocab=vocab, width=16, depth=2, heads=2)))


def left_to_right() -> Limit:
    """With nothing known it is next-token prediction, with queries."""
    ours, x = _tiny(), torch.tensor(list(product(range(3), repeat=4)))
    plain = Model(ours.layout, Blocks(1), ours.embed, ours.backbone, ours.heads["token"])
    with torch.no_grad():
        got, want = (m.log_prob(m.canvas({"token": x})) for m in (ours, plain))
    return Limit("nothing known = next-token", got, want)


def drafted(way: Way) -> Callable[[], Limit]:
    """The law of any-subset speculative decoding is that of one pass over every infilling."""

    def limit() -> Limit:
        model, known = _tiny(length=4, vocab=2), torch.tensor([[False, True, False, False]])
        start = torch.tensor([[0, 1, 0, 0]])

        def write(random: Any) -> tuple[int, ...]:
            proposer = SelfDraft(3) if way == "assd" else ContextBigrams(3)
            canvas = model.canvas({"token": start}, known)
            for _ in decode(Target(model), canvas, InOrder(sure=int(way == "assd")), proposer, random):
                pass
            return tuple(canvas.value["token"][0].tolist())

        law = enumerate_law(write)
        x = torch.tensor([(a, 1, b, c) for a, b, c in product(range(2), repeat=3)])
        with torch.no_grad():
            want = model.log_prob(model.canvas({"token": x}, known.expand(len(x), -1))).exp()
        got = torch.tensor([law.get(tuple(row), 0.0) for row in x.tolist()], dtype=torch.float64)
        return Limit(f"{way} = one after another", got, want)

    return limit


def mutant() -> Case:
    """The case with a wrong feed, which the laws must catch: a query carries the token that it reads."""
    wrong = case()
    wrong.model.embed.__class__ = Unmasked
    return wrong
