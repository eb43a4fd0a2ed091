"""What a published model is in this library's terms: parts, and where each of their parameters comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seriatim.backbones.hybrid import Hybrid, HybridConfig
from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.mamba import Mamba, MambaConfig
from seriatim.backbones.transformer import Transformer
from seriatim.conditions.text import TextEncoder
from seriatim.decoding.sample import Rule
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder, Blocks, KnownFirst
from seriatim.heads.categorical import CategoricalHead
from seriatim.layout import line
from seriatim.model import Model
from seriatim.objectives.masked import Masked, MaskedBlocks, by_count, by_time

BACKBONES: dict[type, Callable[[Any], nn.Module]] = {
    TransformerConfig: Transformer,
    MambaConfig: Mamba,
    HybridConfig: Hybrid,
}
UNBOUNDED = 2**20  # the length in tokens of models that have no longest one: more than is worth a layout


class Part(NamedTuple):
    """One of our parameters: from which published tensors, and how (a key of `HOW`, or what only its family does);
    row: it is one row of what they give."""

    ours: str
    theirs: tuple[str, ...]
    how: str | How = "rows"
    row: int | None = None


@dataclass(frozen=True)
class Blueprint:
    """length: the longest text in tokens; positions: learned ones; windows: by kind of layer; scale: of embeddings;
    softcap: of logits; parts: every parameter; ignored: published tensors that say nothing new, by how they end."""

    backbone: TransformerConfig | MambaConfig
    vocab: int
    length: int
    tied: bool
    parts: tuple[Part, ...]
    windows: Mapping[str, int] = field(default_factory=dict)
    positions: int | None = None
    scale: float = 1.0
    softcap: float | None = None
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def build(self) -> Model:
        """The model; its parameters are as the device context makes them."""
        c = self.backbone
        positions = () if self.positions is None else (self.positions,)
        embed = TokenEmbed(self.vocab, c.width, positions=positions, start=False, scale=self.scale)
        tied = embed.table if self.tied else None
        head = CategoricalHead(c.width, self.vocab, tied=tied, softcap=self.softcap)
        order, backbone = Line(windows=self.windows), BACKBONES[type(c)](c)
        return Model(line(self.length), order, embed, backbone, head, self._conditions(embed.table))

    def _conditions(self, table: nn.Parameter) -> Mapping[str, nn.Module]:
        """What the text depends on beside itself."""
        return {}

    @property
    def same(self) -> tuple[str, ...]:
        """Our other parameters that are the table of embeddings itself."""
        return ("heads.token.weight",) if self.tied else ()

    @property
    def numbers(self) -> int:
        """About how many parameters there are: what is absurd is refused before anything is allocated."""
        return self.backbone.numbers + (1 + (not self.tied)) * self.vocab * self.backbone.width


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderBlueprint(Blueprint):
    """A text that answers another one, which an encoder reads. start: the id that stands before every answer."""

    encoder: TransformerConfig
    start: int

    def _conditions(self, table: nn.Parameter) -> Mapping[str, nn.Module]:
        return {"text": TextEncoder(self.encoder, table)}

    @property
    def same(self) -> tuple[str, ...]:
        return (*super().same, "conditions.text.table")

    @property
    def numbers(self) -> int:
        return super().numbers + self.encoder.numbers


@dataclass(frozen=True, kw_only=True)
class MaskedBlueprint(Blueprint):
    """A text whose tokens are decided in any order: of all of it, or block after block.

    mask: the id whose row of the table stands where a token is unknown; it is never written. shift: tokens are read one
    slot before their own. block: how many see no later ones (None: everybody sees everybody, or, with `causal`, what is
    known and stands before). ends: ids that end a text whatever the settings say. biased: the head has a bias. How it
    is decoded where its users say nothing else: `within` parts of so many tokens, which first by `rule`, all above a
    `threshold` at once (`Unmask`), and by which `sampling`.
    """

    mask: int
    shift: bool = False
    block: int | None = None
    causal: bool = False
    ends: tuple[int, ...] = ()
    biased: bool = False
    within: int | None = None
    rule: Rule = "confidence"
    threshold: float | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Model:
        c = self.backbone
        positions = () if self.positions is None else (self.positions,)
        embed = TokenEmbed(self.vocab, c.width, positions=positions, mask=True, start=False, scale=self.scale)
        tied = embed.table if self.tied else None
        head = CategoricalHead(c.width, self.vocab, tied=tied, bias=self.biased, softcap=self.softcap)
        parts = (embed, BACKBONES[type(c)](c), head)
        if self.block is None:
            order = KnownFirst() if self.causal else AnyOrder(self.shift)
            return Masked(line(self.length), order, *parts, masking=by_time, judging=by_count)
        blocks = Blocks(self.block, "any", shift=self.shift)
        return MaskedBlocks(line(self.length), blocks, *parts, masking=by_time, judging=by_count)


def masked(plan: Blueprint, where: str, mask: int, **more: Any) -> MaskedBlueprint:
    """The blueprint of a next-token model that was trained on to decide masks. Raises ValueError for what no such model
    has here."""
    if not 0 <= mask < plan.vocab:
        raise ValueError(f"{where}: the mask is id {mask}, and there are {plan.vocab} ids")
    if plan.windows:
        raise ValueError(f"{where}: sliding windows of models that unmask are not understood")
    table = next(part for part in plan.parts if part.ours == "embed.table").theirs
    same = {f.name: getattr(plan, f.name) for f in fields(plan)}
    parts = (*plan.parts, Part("embed.mask", table, row=mask))
    return MaskedBlueprint(**{**same, "parts": parts}, mask=mask, **more)


# ---- how tensors are put together, and taken apart again -------------------------------------------------------------


class How(NamedTuple):
    """together: published tensors -> ours. apart: ours -> the published ones of these names."""

    together: Callable[[Sequence[Tensor], Any], Tensor]
    apart: Callable[[Tensor, Sequence[str], Any], Sequence[Tensor]]


def _split(x: Tensor, names: Sequence[str], c: TransformerConfig) -> Sequence[Tensor]:
    """Rows of queries, keys and values, or of gate and up."""
    if len(names) == 3:
        return x.split([c.heads * c.dim, c.groups * c.dim, c.groups * c.dim])
    return x.chunk(len(names))


def _by_head(x: Tensor, c: TransformerConfig) -> Tensor:
    """Rows ordered (head, q k v, dim) -> (q k v, head, dim)."""
    return x.unflatten(0, (c.heads, 3, c.dim)).transpose(0, 1).flatten(0, 2)


def _by_part(x: Tensor, c: TransformerConfig) -> Tensor:
    return x.unflatten(0, (3, c.heads, c.dim)).transpose(0, 1).flatten(0, 2)


def _experts(parts: Sequence[Tensor], c: TransformerConfig) -> Tensor:
    """gate and up of each expert in turn, or down of each -> (experts, rows, columns)."""
    assert c.experts is not None
    each = len(parts) // c.experts.count
    return torch.stack([torch.cat(list(parts[i : i + each])) for i in range(0, len(parts), each)])


def _apart(x: Tensor, names: Sequence[str], c: TransformerConfig) -> Sequence[Tensor]:
    return [part for expert in x for part in expert.chunk(len(names) // len(x))]


def how_of(part: Part) -> How:
    """How the tensors of a part are put together and taken apart."""
    return HOW[part.how] if isinstance(part.how, str) else part.how


HOW: dict[str, How] = {
    "rows": How(lambda parts, c: parts[0] if len(parts) == 1 else torch.cat(list(parts)), _split),
    "columns": How(lambda parts, c: parts[0].T.contiguous(), lambda x, names, c: [x.T]),
    "heads": How(lambda parts, c: _by_head(parts[0], c), lambda x, names, c: [_by_part(x, c)]),
    "taps": How(lambda parts, c: parts[0].flatten(1), lambda x, names, c: [x[:, None]]),
    "from one": How(lambda parts, c: parts[0].float() + 1, lambda x, names, c: [x - 1]),
    "over root": How(lambda parts, c: parts[0].float() * c.width**-0.5, lambda x, names, c: [x * c.width**0.5]),
    "experts": How(_experts, _apart),
}
FINE = ("from one", "over root")  # stay in float32: what was stored coarsely is not coarse any more
