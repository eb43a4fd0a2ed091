"""Multi-scale residual vector quantization: a picture as token maps of growing size, each adding what is still missing.

Source: Visual Autoregressive Modeling (VAR), Tian et al. 2024, arXiv 2404.02905, algorithms 1 and 2, with the
constants of the released models. `MultiScaleVQ` quantizes a latent map and keeps the book of its scales;
`MultiScaleTokenizer` puts a convolutional encoder and decoder around it.
Nothing here knows the generator that predicts the ids, but its inputs (`next_input`, `teacher_inputs`) are made here,
so that training and decoding meet the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.maps import area_down, bicubic_up
from seriatim.tokenizers.base import check_codes, check_pictures
from seriatim.tokenizers.codebook import CodebookConfig, Phase, count_uses, draw, idle, phase, same_everywhere, unused
from seriatim.tokenizers.conv import Body, check_body, conv_body
from seriatim.tokenizers.losses import LossConfig, PictureLoss
from seriatim.tokenizers.quantizers import Quantized, StraightThrough, full_precision

SCALES = {
    4: (1, 2, 3, 4),
    8: (1, 2, 3, 4, 6, 8),
    16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    32: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}
"""The scales of pyramids by their last: those of 16 and 32 are VAR's for 256 and 512 pixels."""

PUBLISHED_PHI_TABLE = (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
"""Which of four phi serves each of the ten scales of the released VAR weights."""


def phi_table(scales: int, phis: int) -> tuple[int, ...]:
    """The index of the phi that serves each scale: the tick nearest to k / (scales - 1), k from 0.

    The ticks of four phi are linspace(1/12, 11/12, 4), those of any other number n linspace(1/2n, 1 - 1/2n, n). Some
    scales lie exactly between two ticks (k = 2 and 7 of ten); there the official code leaves it to floating-point
    rounding. Exact arithmetic with ties to the finer phi for four, to the coarser otherwise, agrees with it for one to
    five phi and 2 to 40 scales; beyond that a tie may fall otherwise.
    """
    if scales < 1 or phis < 1:
        raise ValueError(f"need at least one scale and one phi, got {scales} and {phis}")
    if scales == 1 or phis == 1:
        return (0,) * scales
    if (scales, phis) == (10, 4):
        return PUBLISHED_PHI_TABLE
    margin = Fraction(1, 12) if phis == 4 else Fraction(1, 2 * phis)
    ticks = [margin + (1 - 2 * margin) * Fraction(i, phis - 1) for i in range(phis)]
    finer_first = -1 if phis == 4 else 1

    def nearest(place: Fraction) -> int:
        return min(range(phis), key=lambda i: (abs(ticks[i] - place), finer_first * i))

    return tuple(nearest(Fraction(k, scales - 1)) for k in range(scales))


class Phi(nn.Conv2d):
    """phi(x) = (1 - ratio) x + ratio conv3x3(x): smooths an upsampled map. `ratio` 0 is the identity, bit for bit."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__(dim, dim, 3, padding=1)
        self.ratio = ratio

    def forward(self, x: Float[Tensor, "b dim h w"]) -> Float[Tensor, "b dim h w"]:
        return x if self.ratio == 0 else (1 - self.ratio) * x + self.ratio * super().forward(x)


class ScaleStep(NamedTuple):
    """What one scale of the analysis met and did."""

    pooled: Float[Tensor, "b dim p p"]  # the rest, area-downed to this scale: what was quantized
    ids: Int[Tensor, "b p*p"]
    f_hat: Float[Tensor, "b dim h w"]  # the sum of all contributions up to this scale
    rest: Float[Tensor, "b dim h w"]  # what is still missing of the bands so far


class MultiScaleVQ(nn.Module):
    """One codebook of `vocab` x `dim` for all `scales`; the latent map has the side of the last scale.

    At each scale: area-down the rest, take the nearest codewords (Euclidean), bicubic-up, phi, add to f_hat, subtract
    from the rest. Raises ValueError for scales that are not positive or shrink.
    """

    def __init__(
        self,
        scales: Sequence[int],
        vocab: int,
        dim: int,
        phis: int = 4,
        phi_ratio: float = 0.5,
        beta: float = 0.25,
    ) -> None:
        super().__init__()
        if not scales or min(scales) < 1 or list(scales) != sorted(scales):
            raise ValueError(f"scales are sides of token maps, from coarse to fine, at least 1: got {tuple(scales)}")
        self.vocab, self.dim, self.beta = vocab, dim, beta
        self._count(scales)
        self.codebook = nn.Parameter(torch.randn(vocab, dim) / math.sqrt(dim))
        self.phi_of_scale = phi_table(len(self.scales), phis)
        self.phis = nn.ModuleList(Phi(dim, phi_ratio) for _ in range(phis))

    def _count(self, scales: Sequence[int]) -> None:
        self.scales = tuple(scales)
        self.side = self.scales[-1]
        self.sizes = tuple(p * p for p in self.scales)
        self.total = sum(self.sizes)

    def skip(self, k: int) -> None:
        """Leave out an inner scale from here on; the others keep their phi. Raises ValueError for the last one."""
        if not 0 <= k < len(self.scales) - 1:
            raise ValueError(f"of {len(self.scales)} scales all but the last can be left out, not scale {k}")
        self.phi_of_scale = self.phi_of_scale[:k] + self.phi_of_scale[k + 1 :]
        self._count(self.scales[:k] + self.scales[k + 1 :])

    # ---- from a latent map to ids ------------------------------------------------------------------------------------
    def nearest(self, x: Float[Tensor, "b dim p p"]) -> Int[Tensor, "b p*p"]:
        """The id of the codeword nearest to each vector, in raster order. |x|^2 is the same for all and left out."""
        flat, codebook = x.detach().flatten(2).transpose(1, 2), self.codebook.detach()
        with full_precision(x):
            return (codebook.square().sum(1) - 2 * flat @ codebook.T).argmin(dim=-1)

    def bands(self, f: Float[Tensor, "b dim h w"]) -> list[Float[Tensor, "b dim h w"]]:
        """The analysis: what each scale is to code beside what the coarser ones left, together f. Here (VAR) all of f
        from the first scale on; NFIG takes rings of frequencies."""
        return [f]

    def analyse(self, f: Float[Tensor, "b dim h w"]) -> Iterator[ScaleStep]:
        """The scales one by one, coarse to fine. The rest carries no gradient; f_hat carries the codebook's and phi's.

        After every scale f_hat + rest is the sum of the bands so far (here f), to rounding.
        """
        if f.shape[1:] != (self.dim, self.side, self.side):
            raise ValueError(f"the latent is (b, {self.dim}, {self.side}, {self.side}), got {tuple(f.shape)}")
        bands = self.bands(f.detach().to(self.codebook.dtype))
        rest = f_hat = torch.zeros_like(bands[0])
        for k in range(len(self.scales)):
            rest = rest + bands[k] if k < len(bands) else rest
            pooled = self._down(rest, k)
            ids = self.nearest(pooled)
            h = self.contribution(ids, k)
            f_hat = f_hat + h
            rest = rest - h.detach()
            yield ScaleStep(pooled, ids, f_hat, rest)

    def quantize(self, f: Float[Tensor, "b dim h w"]) -> Quantized:
        """Ids of all scales, the sum they decode to, and the loss beta |sg f_hat - f|^2 + |f_hat - sg f|^2.

        The loss is the mean over scales, each with its partial f_hat. The straight-through estimator is applied once,
        to the last f_hat, whose value it leaves alone: `z_q` equals `decode_latent(ids)` exactly.
        """
        f = f.to(self.codebook.dtype)
        steps = list(self.analyse(f))
        loss = torch.stack(
            [self.beta * F.mse_loss(s.f_hat.detach(), f) + F.mse_loss(s.f_hat, f.detach()) for s in steps]
        ).mean()
        ids = torch.cat([s.ids for s in steps], dim=1)
        z_q = StraightThrough.apply(steps[-1].f_hat, f)
        return Quantized(z_q, ids, loss, self._stats([s.ids for s in steps]))

    # ---- from ids to a latent map ------------------------------------------------------------------------------------
    def contribution(self, ids: Int[Tensor, "b p*p"], k: int) -> Float[Tensor, "b dim h w"]:
        """What the token map of scale `k` adds to f_hat: phi(bicubic-up(embed)); the finest scale is not resized."""
        p = self.scales[k]
        if ids.shape[1] != p * p:
            raise ValueError(f"scale {k} has {p}x{p} = {p * p} ids, got {ids.shape[1]}")
        return self._raised(F.embedding(ids, self.codebook), k)

    def own_part(self, ids: Int[Tensor, "b p*p"], k: int, shown: Bool[Tensor, "b p*p"]) -> Float[Tensor, "b p*p dim"]:
        """What the shown ids of scale `k` alone add to f_hat, area-downed to that scale (HMAR, Kumbong et al. 2025).

        Hidden ids add nothing: phi and the resizing reach over to neighbours, which must not learn of them."""
        vectors = F.embedding(ids, self.codebook) * shown[..., None].to(self.codebook.dtype)
        return self._down(self._raised(vectors, k), k).flatten(2).transpose(1, 2)

    def _raised(self, vectors: Float[Tensor, "b p*p dim"], k: int) -> Float[Tensor, "b dim h w"]:
        """Vectors of scale k on the finest grid, behind phi."""
        p = self.scales[k]
        h = vectors.transpose(1, 2).reshape(len(vectors), self.dim, p, p).contiguous()
        h = bicubic_up(h, (self.side, self.side))
        with full_precision(h):
            return self.phis[self.phi_of_scale[k]](h)

    def partial_latents(self, ids: Int[Tensor, "b n"]) -> list[Float[Tensor, "b dim h w"]]:
        """f_hat after each scale. `ids` may end after any scale, so a sample in the making has its latents too."""
        f_hat = self.codebook.new_zeros(len(ids), self.dim, self.side, self.side)
        partial = []
        for k, ids_k in enumerate(self.split(ids)):
            f_hat = f_hat + self.contribution(ids_k, k)
            partial.append(f_hat)
        return partial

    def decode_latent(self, ids: Int[Tensor, "b total"]) -> Float[Tensor, "b dim h w"]:
        """f_hat of all scales."""
        if ids.shape[1] != self.total:
            raise ValueError(f"all scales together have {self.total} ids, got {ids.shape[1]}")
        return self.partial_latents(ids)[-1]

    def split(self, ids: Int[Tensor, "b n"]) -> list[Int[Tensor, "b p*p"]]:
        """The ids of each scale; raises ValueError unless `ids` ends where a scale ends."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        if ids.shape[1] not in ends:
            raise ValueError(f"ids end with a scale, that is after one of {ends}, got {ids.shape[1]}")
        return list(ids.split(self.sizes[: ends.index(ids.shape[1]) + 1], dim=1))

    # ---- what a next-scale generator reads ---------------------------------------------------------------------------
    def next_input(self, f_hat: Float[Tensor, "b dim h w"], k: int) -> Float[Tensor, "b p*p dim"]:
        """Input of the generator at scale k + 1: f_hat after scale `k`, area-downed, in raster order."""
        if not 0 <= k < len(self.scales) - 1:
            raise ValueError(f"no scale follows scale {k} of {len(self.scales)}")
        return self._down(f_hat, k + 1).flatten(2).transpose(1, 2)

    def teacher_inputs(self, ids: Int[Tensor, "b total"]) -> Float[Tensor, "b total-p1*p1 dim"]:
        """`next_input` after every scale but the last, side by side; the same operations as step by step."""
        known = self.partial_latents(ids[:, : self.total - self.sizes[-1]]) if len(self.scales) > 1 else []
        empty = self.codebook.new_zeros(len(ids), 0, self.dim)
        return torch.cat([empty, *(self.next_input(f_hat, k) for k, f_hat in enumerate(known))], dim=1)

    def _down(self, x: Float[Tensor, "b dim h w"], k: int) -> Float[Tensor, "b dim p p"]:
        return area_down(x, (self.scales[k], self.scales[k]))

    def _stats(self, ids: list[Int[Tensor, "b p*p"]]) -> dict[str, Tensor]:
        hits = torch.stack([i.flatten().bincount(minlength=self.vocab) for i in ids])
        share = hits.sum(0) / hits.sum()
        return {"hits": hits, "used": (share > 0).sum(), "perplexity": torch.special.entr(share).sum().exp()}


@dataclass(frozen=True, kw_only=True)
class MultiScaleConfig(LossConfig, CodebookConfig):
    """The shape of a tokenizer and how it is trained; the defaults suit the 8x8 digits. Pictures are square, `side`
    pixels wide."""

    scales: tuple[int, ...] = (1, 2, 4, 8)
    vocab: int = 64
    dim: int = 8
    channels: int = 1
    width: int = 48
    halvings: int = 0
    body: Body = "plain"
    phis: int = 4
    phi_ratio: float = 0.5
    beta: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))  # JSON knows lists only
        check_body(self.body, self.width, self.halvings)
        self.check_codebook()
        self.check_loss()
        if min(self.vocab, self.dim, self.channels, self.phis) < 1:
            raise ValueError("vocab, dim, channels and phis are at least 1")

    @classmethod
    def for_pictures(cls, side: int, channels: int, **changes: object) -> MultiScaleConfig:
        """A config for square pictures of this size. Raises ValueError for sides that no pyramid here ends in.

        Up to 8 pixels: a pyramid of pixels; up to 64: one that ends in 8x8 (32x32 glyphs); from 128 on: stride 16 and
        the published body, which for 256 is VAR's (160 channels, 4,096 codes of 32 dimensions, ten scales).
        """
        if side >= 128:
            halvings = 4
            shape = dict(body="residual", width=160, vocab=4096, dim=32, perceptual=1.0, adversarial=0.5, warm_up=0.05)
        elif side <= 8:
            halvings, shape = 0, {"scales": cls.scales} if side == cls.scales[-1] else {}
        else:
            halvings = max(1, (side - 1).bit_length() - 3)
            shape = dict(vocab=256, dim=16, width=64)
        last, rest = divmod(side, 2**halvings)
        if rest or last not in SCALES:
            ends = ", ".join(str(n * 2**halvings) for n in SCALES)
            raise ValueError(f"no pyramid of scales for pictures of {side} pixels; near it there are {ends}: resize")
        fields = {"scales": SCALES[last], "channels": channels, "halvings": halvings, **shape, **changes}
        return cls(**fields)  # type: ignore[arg-type]

    @property
    def side(self) -> int:
        return self.scales[-1] * 2**self.halvings

    def quantizer(self) -> MultiScaleVQ:
        """The quantizer of this shape, with fresh weights."""
        return MultiScaleVQ(self.scales, self.vocab, self.dim, self.phis, self.phi_ratio, self.beta)


class MultiScaleTokenizer(nn.Module):
    """Pictures in [-1, 1] <-> ids of all scales."""

    kind: ClassVar[str] = "multi-scale"
    uses: Tensor

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__()
        self.config = c = config
        self.encoder, self.decoder = conv_body(c.body, c.channels, c.width, c.dim, c.halvings, inner=c.dim, kernel=3)
        self.quantizer = c.quantizer()
        self.picture_loss = PictureLoss(c, c.channels, c.side)
        self.register_buffer("uses", torch.zeros(c.vocab))  # of each code, since the last revival

    side = property(lambda self: self.config.side)
    channels = property(lambda self: self.config.channels)
    vocab = property(lambda self: self.config.vocab)
    grid = property(lambda self: (self.quantizer.side, self.quantizer.side))

    def latents(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim h2 w2"]:
        """What is quantized."""
        check_pictures(images, self.channels, self.side)
        return self.encoder(images)

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Quantized]:
        """Reconstruction (not clamped) and what the quantizer did: the training path."""
        quantized = self.quantizer.quantize(self.latents(images))
        return self.decoder(quantized.z_q), quantized

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Int[Tensor, "b total"]:
        return self.quantizer.quantize(self.latents(images)).ids

    @torch.no_grad()
    def decode(self, ids: Int[Tensor, "b total"]) -> Float[Tensor, "b c h w"]:
        check_codes(ids, (self.quantizer.total,), self.vocab)
        return self.decoder(self.quantizer.decode_latent(ids)).clamp(-1, 1)

    @torch.no_grad()
    def partial_decode(self, ids: Int[Tensor, "b n"]) -> list[Float[Tensor, "b c h w"]]:
        """The picture after each scale, for films; `ids` may end after any scale."""
        return [self.decoder(f_hat).clamp(-1, 1) for f_hat in self.quantizer.partial_latents(ids)]

    def loss(
        self, images: Float[Tensor, "b c h w"], step: int, steps: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """As `PictureTokenizer.loss`. VAR published no training of its tokenizer; this is ours: a plain autoencoder
        first, then the codebook is filled scale by scale, one scale a step, each with rests the coarser ones leave."""
        c = self.config
        f = self.latents(images)
        now, since = phase(c, step, steps, fills=len(c.scales))
        if now is Phase.PLAIN:
            loss, figures = self.picture_loss(self.decoder(f), images, self.decoder.last, step, steps)
            loss = loss + c.latent_weight * f.square().mean() + idle(self.quantizer)
            return loss, {"loss": loss.item(), **figures}
        revived = self._tend(now, since, f.detach(), generator) if self.training else 0
        quantized = self.quantizer.quantize(f)
        if self.training:
            count_uses(self.uses, quantized.ids)
        loss, figures = self.picture_loss(self.decoder(quantized.z_q), images, self.decoder.last, step, steps)
        loss = loss + c.vq_weight * quantized.loss + idle(self.quantizer)  # a phi may serve no scale
        figures |= {"vq_loss": quantized.loss.item(), "codes_used": float(quantized.stats["used"])}
        figures |= {"perplexity": float(quantized.stats["perplexity"]), "codes_revived": float(revived)}
        return loss, {"loss": loss.item(), **figures}

    @torch.no_grad()
    def _tend(self, now: Phase, since: int, f: Float[Tensor, "b dim h w"], generator: torch.Generator) -> int:
        """Fill the codebook or revive its unused codes, where it is time; how many were revived."""
        vq, codes = self.quantizer, self.quantizer.codebook
        if now is Phase.FILL:
            # The share of each scale is drawn from its own rests; until finer scales follow, they copy what is there.
            begin, end = (vq.vocab * k // len(vq.scales) for k in (since, since + 1))
            known = torch.cat([codes[:begin], draw(self._rests(f)[since], end - begin, generator).to(codes.dtype)])
            if len(known):
                codes.copy_(known[torch.arange(vq.vocab, device=codes.device) % len(known)])
        elif now is Phase.REVIVE:
            dead = unused(self.uses, self.config.revive_below)
            rests = self._rests(f)
            for k in range(len(rests)):  # in equal numbers from every scale
                codes[dead[k :: len(rests)]] = draw(rests[k], len(dead[k :: len(rests)]), generator).to(codes.dtype)
            self.uses.zero_()
        else:
            return 0
        same_everywhere(codes)
        return len(dead) if now is Phase.REVIVE else 0

    def _rests(self, f: Float[Tensor, "b dim h w"]) -> list[Float[Tensor, "m dim"]]:
        """What is quantized at each scale, as rows."""
        return [s.pooled.transpose(0, 1).flatten(1).T for s in self.quantizer.analyse(f)]
