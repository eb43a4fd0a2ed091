"""Pictures as a grid of ids: a convolutional autoencoder with a quantizer in the middle.

Source: VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937), VQGAN (Esser et al. 2021, arXiv 2012.09841), in the form
of LlamaGen (Sun et al. 2024, arXiv 2406.06525): codes and latents on the unit sphere, codebook by gradient, beta 0.25.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seriatim.tokenizers import library, quantizers
from seriatim.tokenizers.base import check_codes, check_pictures
from seriatim.tokenizers.bernoulli import Bernoulli
from seriatim.tokenizers.codebook import CodebookConfig, Phase, count_uses, fill, idle, phase, revive, unused
from seriatim.tokenizers.conv import Body, check_body, conv_body, map_to_rows, rows_to_map
from seriatim.tokenizers.losses import LossConfig, PictureLoss
from seriatim.tokenizers.quantizers import Quantized, Quantizer

QuantizerName = Literal["vq", "vq-l2", "ibq", "bsq", "fsq", "lfq", "bernoulli", "sim-vq", "residual-vq"]

FSQ_LEVELS = {8: (8, 6, 5), 10: (8, 5, 5, 5), 12: (7, 5, 5, 5, 5), 14: (8, 8, 8, 6, 5), 16: (8, 8, 8, 5, 5, 5)}
"""Levels that FSQ's paper recommends for about 2^k codes."""


@dataclass(frozen=True, kw_only=True)
class VQConfig(LossConfig, CodebookConfig):
    """The shape of a tokenizer and how it is trained; the defaults suit 32x32 glyphs (8x8 ids of 256).

    dim: of the codes (bsq, lfq and bernoulli have log2(vocab), fsq has the levels recommended for about `vocab` codes,
    whatever is given here); depth: ids a place, for residual-vq; entropy: weight of the penalty on unsure and uneven
    choices (None: the quantizer's own: 0 for vq and vq-l2, 0.5 for ibq, 0.1 for bsq, lfq and bernoulli; the rest have
    no such penalty); inner: channels between the residual body and the code.
    """

    side: int = 32
    channels: int = 1
    vocab: int = 256
    dim: int = 8
    quantizer: QuantizerName = "vq-l2"
    depth: int = 1
    beta: float = 0.25
    entropy: float | None = None
    body: Body = "plain"
    width: int = 64
    halvings: int = 2
    inner: int = 256

    def __post_init__(self) -> None:
        check_body(self.body, self.width, self.halvings)
        self.check_codebook()
        self.check_loss()
        if self.side < 1 or self.side % 2**self.halvings:
            raise ValueError(
                f"a side of {self.side} pixels cannot be halved {self.halvings} times: take a multiple of "
                f"{2**self.halvings}"
            )
        if self.quantizer not in get_args(QuantizerName):
            raise ValueError(f"quantizer is one of {', '.join(get_args(QuantizerName))}, got {self.quantizer!r}")
        if self.entropy is not None and not self.entropy >= 0:
            raise ValueError(f"entropy is a weight and not negative, got {self.entropy}")
        if self.depth < 1 or (self.depth > 1 and self.quantizer != "residual-vq"):
            raise ValueError(f"only residual-vq has several ids a place; {self.quantizer} got depth {self.depth}")
        if min(self.vocab, self.dim, self.channels, self.inner) < 1:
            raise ValueError("vocab, dim, channels and inner are at least 1")

    @classmethod
    def for_pictures(cls, side: int, channels: int, **changes: object) -> VQConfig:
        """A config for square pictures of this size: 8x8 ids up to 64 pixels, LlamaGen's shape from 128 on."""
        if side >= 128:
            shape = dict(
                body="residual", width=128, halvings=4, vocab=16384, warm_up=0.05, perceptual=1.0, adversarial=0.5
            )
        else:
            shape = dict(halvings=max(0, math.ceil(math.log2(max(side, 1) / 8))))
        return cls(**{"side": side, "channels": channels, **shape, **changes})  # type: ignore[arg-type]


def make_quantizer(c: VQConfig) -> Quantizer:
    """The quantizer a config names. Raises ValueError where it cannot have so many codes."""
    options = {"beta": c.beta} | ({} if c.entropy is None else {"entropy": c.entropy})
    tables: dict[str, Callable[..., Quantizer]]
    tables = {"vq": quantizers.VQ, "vq-l2": quantizers.NormalizedVQ, "ibq": quantizers.IBQ}
    if c.quantizer in tables:
        return tables[c.quantizer](c.vocab, c.dim, **options)
    if c.quantizer == "sim-vq":
        return library.SimVQ(c.vocab, c.dim, c.beta)
    if c.quantizer == "residual-vq":
        return library.ResidualVQ(c.vocab, c.dim, c.depth, c.beta)
    bits = c.vocab.bit_length() - 1
    if c.vocab != 2**bits or bits < 1:
        raise ValueError(f"{c.quantizer} has a power of two of codes, got {c.vocab}")
    if c.quantizer == "fsq":
        if bits not in FSQ_LEVELS:
            raise ValueError(
                f"fsq has levels for about {', '.join(str(2**b) for b in FSQ_LEVELS)} codes, not {c.vocab}"
            )
        return library.FSQ(FSQ_LEVELS[bits])
    if c.quantizer == "bernoulli":
        return Bernoulli(bits, **({} if c.entropy is None else {"entropy": c.entropy}))
    return quantizers.BSQ(bits, **options) if c.quantizer == "bsq" else library.LFQ(bits, **options)


class CodedTokenizer(nn.Module):
    """What tokenizers around one quantizer of single vectors share: the life of its codebook in training. Subclasses
    give `config` (a `CodebookConfig`), `quantizer` and `uses`."""

    config: Any
    quantizer: Quantizer
    uses: Tensor | None

    side = property(lambda self: self.config.side)
    channels = property(lambda self: self.config.channels)
    vocab = property(lambda self: self.quantizer.vocab)
    depth = property(lambda self: self.quantizer.depth)

    def _count_from_now(self) -> None:
        """Make the count of uses, once there is a quantizer."""
        table = self.quantizer.codebook
        self.register_buffer("uses", None if table is None else torch.zeros(len(table)))  # since the last revival

    def coded(
        self, latents: Float[Tensor, "b n d"], step: int, steps: int, generator: torch.Generator, **options: Any
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, ""], dict[str, float]]:
        """What the decoder is given at a step of training, what that costs, and figures. Quantizers with a table train
        as a plain autoencoder first, then fill it. options: of `quantize`."""
        c, revived = self.config, 0
        if self.quantizer.codebook is not None:
            now, _ = phase(c, step, steps)
            if now is Phase.PLAIN:
                return latents, c.latent_weight * latents.square().mean() + idle(self.quantizer), {}  # type: ignore[arg-type]
            revived = self._tend(now, latents.detach(), generator) if self.training else 0
        with seeded(generator):
            quantized = self.quantizer.quantize(latents, **options)
        if self.uses is not None and self.training:
            count_uses(self.uses, quantized.ids)
        figures = {"vq_loss": quantized.loss.item(), "codes_used": float(quantized.stats["used"])}
        figures |= {"perplexity": float(quantized.stats["perplexity"]), "codes_revived": float(revived)}
        return quantized.z_q, c.vq_weight * quantized.loss, figures

    def _tend(self, now: Phase, latents: Float[Tensor, "b n d"], generator: torch.Generator) -> int:
        """Fill the codebook or revive its unused codes, where it is time; how many were revived."""
        table = self.quantizer.codebook
        assert table is not None
        if now is Phase.FILL:
            fill(table, latents.flatten(0, 1), generator)
        elif now is Phase.REVIVE and self.uses is not None:
            dead = unused(self.uses, self.config.revive_below)
            revive(table, dead, latents.flatten(0, 1), generator)
            self.uses.zero_()
            return len(dead)
        return 0


class VQTokenizer(CodedTokenizer):
    """Pictures in [-1, 1] <-> ids of a grid in raster order, several ids a place where the quantizer is residual."""

    kind: ClassVar[str] = "vq"

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = c = config
        self.quantizer = make_quantizer(c)
        self.encoder, self.decoder = conv_body(
            c.body, c.channels, c.width, self.quantizer.code_dim, c.halvings, inner=c.inner, kernel=1
        )
        self.picture_loss = PictureLoss(c, c.channels, c.side)
        self._count_from_now()

    @property
    def grid(self) -> tuple[int, int]:
        n = self.config.side // 2**self.config.halvings
        return n, n

    def latents(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """What is quantized."""
        check_pictures(images, self.channels, self.side)
        return map_to_rows(self.encoder(images))

    def draw(self, latents: Float[Tensor, "b n d"]) -> Float[Tensor, "b c h w"]:
        """The picture of quantized latents, not clamped."""
        return self.decoder(rows_to_map(latents, self.grid))

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Quantized]:
        """Reconstruction (not clamped) and what the quantizer did: the training path."""
        quantized = self.quantizer.quantize(self.latents(images))
        return self.draw(quantized.z_q), quantized

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Int[Tensor, "b n *depth"]:
        return self.quantizer.quantize(self.latents(images)).ids

    @torch.no_grad()
    def decode(self, ids: Int[Tensor, "b n *depth"]) -> Float[Tensor, "b c h w"]:
        shape = (math.prod(self.grid), self.depth) if self.depth > 1 else (math.prod(self.grid),)
        check_codes(ids, shape, self.vocab)
        return self.draw(self.quantizer.decode_ids(ids)).clamp(-1, 1)

    def loss(
        self, images: Float[Tensor, "b c h w"], step: int, steps: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """As `PictureTokenizer.loss`."""
        z, cost, said = self.coded(self.latents(images), step, steps, generator)
        loss, figures = self.picture_loss(self.draw(z), images, self.decoder.last, step, steps)
        loss = loss + cost
        return loss, {"loss": loss.item(), **figures, **said}


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Global draws inside follow from the generator; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        yield
