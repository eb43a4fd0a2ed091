"""Pictures as a line of ids, any prefix of which is the picture at a lower resolution: the tokenizer of DetailFlow.

Source: DetailFlow (Liu et al. 2025, arXiv 2505.21473, section 3) and its code. Queries look at the patches of a picture
(`queries.py`): the first group one after another, then group by group. The decoder is a vision transformer over masks,
one a patch, and the ids that are there. A prefix of t ids is drawn at a side of R(t) pixels, rounded up to whole
patches; in a fifth of the steps training draws a prefix, and compares it with the picture made as small.

*Self-correction*: ids of a group are generated independently, and some will be wrong. So in training ids of one group
are replaced by near ones, and other queries, which see what stands there, say the rest once more from the picture: the
later ids then hold what repairs the earlier ones (`corrupted`).

Ours: the encoder is a small vision transformer trained from scratch with rotary positions (there SigLIP2's weights),
the first id's code is not matched to features of that network, and the codebook is filled and revived as elsewhere
here. In the form "released" encoder and decoder are as published, and released weights load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.factorization.opened import opened_turns
from seriatim.maps import area_down, bicubic_up
from seriatim.plan import Plan
from seriatim.tokenizers.base import check_codes, check_pictures
from seriatim.tokenizers.codebook import CodebookConfig, Phase, idle, phase
from seriatim.tokenizers.conv import map_to_rows
from seriatim.tokenizers.losses import LossConfig, PictureLoss
from seriatim.tokenizers.quantizers import NormalizedVQ, Quantized
from seriatim.tokenizers.queries import LookingAtAll, QueryEncoder, axial, from_patches, looking, vit
from seriatim.tokenizers.vq import CodedTokenizer
from seriatim.view import full

SIGLIP: MappingProxyType[str, Any] = MappingProxyType({"activation": "gelu_tanh", "qk_norm": None})  # its layers


@dataclass(frozen=True, kw_only=True)
class DetailConfig(LossConfig, CodebookConfig):
    """The shape of a tokenizer and how it is trained; the defaults suit 32x32 glyphs (16 ids of 256, groups of 4).

    group: ids of a group; patch: side of patches, of encoder and decoder; depth, draw_depth: layers of the encoder and
    of the decoder; power: how slowly sides grow along the line; shorter: share of the steps that draw a prefix;
    corrupt: share of those that train self-correction, once there are codes; near: among how many nearest codes the
    wrong ones are (published: 50 of 8,192).

    form: "own", or "released" for the layers that were published, those of SigLIP2 with learned positions; the encoder
    may there be of another width, with other heads and feed-forward layers (encoder_...; 0: as the decoder).
    """

    side: int = 32
    channels: int = 1
    vocab: int = 256
    dim: int = 8
    beta: float = 0.25
    queries: int = 16
    group: int = 4
    patch: int = 4
    width: int = 128
    heads: int = 4
    depth: int = 3
    draw_depth: int = 3
    power: float = 1.5
    shorter: float = 0.2
    corrupt: float = 1.0
    near: int = 8
    form: Literal["own", "released"] = "own"
    encoder_width: int = 0
    encoder_heads: int = 0
    encoder_hidden: int = 0

    def __post_init__(self) -> None:
        self.check_codebook()
        self.check_loss()
        for name in ("side", "channels", "vocab", "dim", "queries", "patch", "width", "heads", "depth", "draw_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        opened_turns(self.queries, self.group)
        if self.queries < 2 * self.group:
            raise ValueError(f"there are at least 2 groups: {self.queries} ids are too few for groups of {self.group}")
        if self.side % self.patch:
            raise ValueError(f"patches of {self.patch} pixels do not tile a side of {self.side}")
        if not self.power > 0 or not 0 <= self.shorter <= 1 or not 0 <= self.corrupt <= 1:
            raise ValueError("power is positive, shorter and corrupt are shares from 0 to 1")
        if not 1 <= self.near <= self.vocab:
            raise ValueError(f"wrong ids are among 1 to {self.vocab} nearest ones, not {self.near}")
        if self.form not in ("own", "released"):
            raise ValueError(f"form is own or released, got {self.form!r}")
        if self.form == "released":
            return
        if max(self.encoder_width, self.encoder_heads, self.encoder_hidden) > 0:
            raise ValueError("an encoder of another width is of form released: leave encoder_... out")
        axial(self.width, self.heads)

    @classmethod
    def for_pictures(cls, side: int, channels: int, **changes: object) -> DetailConfig:
        """A config for square pictures of this size: 8x8 patches up to 64 pixels; from 128 on the published shape (128
        ids of 8,192 in groups of 8, patches of 16 pixels)."""
        shape: dict[str, object] = {"patch": max(1, side // 8)}
        if side >= 128:
            shape = dict(
                vocab=8192, queries=128, group=8, patch=16, width=768, heads=12, depth=12, draw_depth=12, near=50,
                warm_up=0.05, vq_weight=1.0, perceptual=1.0,
            )  # fmt: skip
        elif side % 8 and side > 8:
            raise ValueError(f"pictures of {side} pixels are not cut into 8x8 patches: resize them to a multiple of 8")
        return cls(**{"side": side, "channels": channels, **shape, **changes})  # type: ignore[arg-type]

    @property
    def encoding(self) -> TransformerConfig:
        """Layers of the encoder."""
        if self.form == "own":
            return vit(self.width, self.depth, self.heads, rope=axial(self.width, self.heads))
        width, heads = self.encoder_width or self.width, self.encoder_heads or self.heads
        return vit(width, self.depth, heads, hidden=self.encoder_hidden or None, **SIGLIP)

    @property
    def drawing(self) -> TransformerConfig:
        """Layers of the decoder."""
        return vit(self.width, self.draw_depth, self.heads, **(SIGLIP if self.form == "released" else {}))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the prefixes that can be drawn: any up to the first group, then whole groups."""
        return (*range(1, self.group), *range(self.group, self.queries + 1, self.group))

    def resolution(self, length: int) -> int:
        """R(t): how many pixels a side the first t ids stand for; 1 for one id, all for all of them."""
        n = self.queries
        return max(1, int(self.side - (self.side - 1) * ((n - length) / (n - 1)) ** self.power))

    def drawn(self, length: int) -> int:
        """The side of the picture that is drawn of them: whole patches."""
        return -(-self.resolution(length) // self.patch) * self.patch


class Corrupted(NamedTuple):
    """Three lines of ids of each picture: as they are; with wrong ones in a group and behind it those that repair
    them (`fed`, what a generator sees); and what it should say in view of that: the true ids up to the group, the
    repairing ones behind it."""

    clean: Int[Tensor, "b n"]
    fed: Int[Tensor, "b n"]
    said: Int[Tensor, "b n"]


class DetailDecoder(nn.Module):
    """Masks, one for each patch of a picture of any side, and a prefix of codes; all see all."""

    def __init__(self, c: DetailConfig):
        super().__init__()
        self.patch = c.patch
        self.mask = nn.Parameter(torch.randn(c.width) * 0.02)
        grid = c.side // c.patch
        self.grid = nn.Parameter(torch.randn(c.width, grid, grid) * 0.02)
        self.from_code, self.place = nn.Linear(c.dim, c.width), nn.Parameter(torch.randn(c.queries, c.width) * 0.02)
        self.net = Transformer(c.drawing)
        self.released = c.form == "released"
        self.to_patch = nn.Linear(c.width, c.channels * c.patch**2)

    @property
    def last(self) -> nn.Parameter:
        """The weight that draws the pixels."""
        return self.to_patch.get_parameter("weight")

    def forward(self, codes: Float[Tensor, "b t d"], side: int) -> Float[Tensor, "b c side side"]:
        """The picture of a prefix at this many pixels a side, whole patches."""
        rows, t = side // self.patch, codes.shape[1]
        if self.released:
            smaller = F.interpolate(self.grid[None], (rows, rows), mode="bilinear", antialias=True)
        else:
            smaller = area_down(self.grid[None], (rows, rows))
        places = map_to_rows(smaller)
        x = torch.cat([(places + self.mask).expand(len(codes), -1, -1), self.from_code(codes) + self.place[:t]], 1)
        h = self.net(x, _everybody(rows * rows + t))
        return from_patches(self.to_patch(h[:, : rows * rows]), self.patch, rows)


@lru_cache(maxsize=64)
def _everybody(size: int) -> Plan:
    return looking(full(size), kind=LookingAtAll)


class DetailTokenizer(CodedTokenizer):
    """Pictures in [-1, 1] <-> a line of ids; prefixes of it are smaller pictures."""

    kind: ClassVar[str] = "detail"
    config: DetailConfig
    quantizer: NormalizedVQ

    def __init__(self, config: DetailConfig) -> None:
        super().__init__()
        self.config = c = config
        turn, placed = opened_turns(c.queries, c.group), c.form == "released"
        self.encoder = QueryEncoder(c.channels, c.side, c.patch, c.encoding, turn, c.dim, again=True, placed=placed)
        self.quantizer = NormalizedVQ(c.vocab, c.dim, c.beta)
        self.decoder = DetailDecoder(c)
        self.picture_loss = PictureLoss(c, c.channels, c.side)
        self._count_from_now()

    @property
    def grid(self) -> tuple[int, int]:
        """Groups, and ids of each."""
        return self.config.queries // self.config.group, self.config.group

    # ---- codes and pictures -----------------------------------------------------------------------------------------

    def latents(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """What is quantized."""
        check_pictures(images, self.channels, self.side)
        return self.encoder(images)

    def draw(self, codes: Float[Tensor, "b t d"]) -> Float[Tensor, "b c s s"]:
        """The picture of a prefix of quantized latents at its own size, not clamped."""
        return self.decoder(codes, self.config.drawn(codes.shape[1]))

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Quantized]:
        """Reconstruction (not clamped) and what the quantizer did."""
        quantized = self.quantizer.quantize(self.latents(images))
        return self.draw(quantized.z_q), quantized

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Int[Tensor, "b n"]:
        return self.quantizer.quantize(self.latents(images)).ids

    @torch.no_grad()
    def decode(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
        check_codes(ids, (self.config.queries,), self.vocab)
        return self.decode_prefix(ids)

    @torch.no_grad()
    def decode_prefix(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b c s s"]:
        """The picture of the first ids, as large as they allow (`DetailConfig.drawn`). Raises ValueError for prefixes
        that end inside a later group."""
        if ids.dim() != 2 or ids.shape[1] not in self.config.lengths:
            lengths = ", ".join(map(str, self.config.lengths))
            raise ValueError(f"prefixes of {lengths} ids can be drawn, not of {tuple(ids.shape[1:])}")
        check_codes(ids, (ids.shape[1],), self.vocab)
        return self.draw(self.quantizer.decode_ids(ids)).clamp(-1, 1)

    def target(self, images: Float[Tensor, "b c h w"], length: int) -> Float[Tensor, "b c s s"]:
        """What a prefix should be drawn as: the picture with R(t) pixels a side, on whole patches."""
        small, drawn = self.config.resolution(length), self.config.drawn(length)
        return bicubic_up(area_down(images, (small, small)), (drawn, drawn))

    # ---- self-correction --------------------------------------------------------------------------------------------

    def end_of(self, at: int) -> int:
        """Where what is corrupted at an id ends: there in the first group, else with its group. Raises ValueError
        where that is no id to begin with."""
        g, n = self.config.group, self.config.queries
        if not 0 <= at < n - g or (at >= g and at % g):
            raise ValueError(f"an id of the first group, or the first of a later one before the last, not {at} of {n}")
        return at + 1 if at < g else at + g

    def start(self, length: int, generator: torch.Generator) -> int:
        """A place for wrong ids in a prefix of this length, with a group behind it where it is longer than one."""
        g = self.config.group
        most = length if length <= g else length - g
        at = int(torch.randint(most, (), generator=generator, device=generator.device))
        return at if at < g else at // g * g

    def wrong(self, latents: Float[Tensor, "b m d"], generator: torch.Generator) -> Int[Tensor, "b m"]:
        """Ids among the nearest ones of each latent, all as likely."""
        near = self.quantizer.nearest(latents, self.config.near)
        pick = torch.randint(self.config.near, near.shape[:2], generator=generator, device=generator.device)
        return near.gather(2, pick.to(near.device)[..., None])[..., 0]

    @torch.no_grad()
    def corrupted(self, images: Float[Tensor, "b c h w"], at: int, generator: torch.Generator) -> Corrupted:
        """Ids of pictures with wrong ones from `at` on, a group of them (one id in the first group)."""
        end, latents = self.end_of(at), self.latents(images)
        clean = self.quantizer.quantize(latents).ids
        prefix = torch.cat([clean[:, :at], self.wrong(latents[:, at:end], generator)], 1)
        again = self.encoder(images, self.quantizer.decode_ids(prefix))
        rest = self.quantizer.quantize(again).ids[:, end:]
        return Corrupted(clean, torch.cat([prefix, rest], 1), torch.cat([clean[:, :end], rest], 1))

    # ---- training ---------------------------------------------------------------------------------------------------

    def loss(
        self, images: Float[Tensor, "b c h w"], step: int, steps: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """As `PictureTokenizer.loss`, of all ids or of a prefix, the same for the whole batch; and of the same prefix
        with wrong ids and the repair that follows."""
        c, latents = self.config, self.latents(images)
        length = self._length(generator)
        z, cost, said = self.coded(latents, step, steps, generator)
        repairing = self._chance(generator) < c.corrupt and phase(c, step, steps)[0] is not Phase.PLAIN and length > 1
        drawn, wanted = self.draw(z[:, :length]), self.target(images, length)
        if repairing:
            repaired, cost = self._repaired(images, latents, z, length, cost, generator)
            drawn, wanted = torch.cat([drawn, self.draw(repaired[:, :length])]), torch.cat([wanted, wanted])
        else:
            assert self.encoder.follow is not None
            cost = cost + idle(self.encoder.follow)
        loss, figures = self._error(drawn, wanted, length, step, steps)
        loss = loss + cost
        return loss, {"loss": loss.item(), **figures, **said}

    def _chance(self, generator: torch.Generator) -> float:
        return float(torch.rand((), generator=generator, device=generator.device))

    def _length(self, generator: torch.Generator) -> int:
        """All ids, or with the chance of `shorter` a prefix, at least a group short of all."""
        c, short = self.config, self._chance(generator) < self.config.shorter
        t = 1 + int(torch.randint(c.queries - c.group, (), generator=generator, device=generator.device))
        return c.queries if not short else t if t <= c.group else math.ceil(t / c.group) * c.group

    def _repaired(
        self, images: Tensor, latents: Tensor, z: Tensor, length: int, cost: Tensor, generator: torch.Generator
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, ""]]:
        """Codes with wrong ones in a group and a repair behind it, and the cost of quantizing both lines, each id
        counted once."""
        n, at = self.config.queries, self.start(length, generator)
        end = at + (1 if at < self.config.group else self.config.group)
        wrong = self.quantizer.decode_ids(self.wrong(latents[:, at:end], generator))
        prefix = torch.cat([z[:, :at], wrong], 1).detach()
        rest = self.quantizer.quantize(self.encoder(images, prefix)[:, end:])
        both = n * cost + (n - end) * self.config.vq_weight * rest.loss
        return torch.cat([prefix, rest.z_q], 1), both / (2 * n - end)

    def _error(
        self, drawn: Tensor, wanted: Tensor, length: int, step: int, steps: int
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """How far pictures are from what they should be; whole ones alone meet features and critic."""
        if length == self.config.queries:
            return self.picture_loss(drawn, wanted, self.decoder.last, step, steps)
        squared = F.mse_loss(drawn.float(), wanted.float())
        error = squared if self.config.error == "l2" else F.l1_loss(drawn.float(), wanted.float())
        if self.picture_loss.critic is not None:
            error = error + idle(self.picture_loss.critic)
        return error, {"psnr": -10 * math.log10(max(squared.item(), 1e-12) / 4)}
