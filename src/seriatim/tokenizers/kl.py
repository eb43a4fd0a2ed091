"""Pictures as a grid of continuous latents: a convolutional variational autoencoder with a very small KL weight.

Source: latent diffusion (Rombach et al. 2021, arXiv 2112.10752), as MAR (Li et al. 2024, arXiv 2406.11838) uses it: 16
channels at stride 16, scaled to about unit variance by one number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seriatim.tokenizers.base import check_codes, check_pictures
from seriatim.tokenizers.codebook import same_everywhere
from seriatim.tokenizers.conv import Attends, Body, check_body, conv_body, map_to_rows, rows_to_map
from seriatim.tokenizers.losses import LossConfig, PictureLoss

MEASURED = 0.05  # the last share of the steps, over which the latents' variance is measured


@dataclass(frozen=True, kw_only=True)
class KLConfig(LossConfig):
    """The shape of a tokenizer and how it is trained; the defaults suit 32x32 glyphs (8x8 latents of 8 numbers).

    kl_weight: of the sum of KL terms of a picture over the number of its pixel values, beside their mean error.
    attends, multipliers: of the residual body (`conv_body`; none: as usual); that of MAR attends in its encoder, that
    of Stable Diffusion in the middle only. patch: so many rows and columns of latents are one vector, row by row.
    """

    side: int = 32
    channels: int = 1
    dim: int = 8
    kl_weight: float = 1e-4
    body: Body = "plain"
    width: int = 64
    halvings: int = 2
    attends: Attends = "lowest"
    multipliers: tuple[int, ...] = ()
    patch: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))  # JSON knows lists only
        check_body(self.body, self.width, self.halvings)
        self.check_loss()
        if self.attends not in get_args(Attends):
            raise ValueError(f"attends is one of {', '.join(get_args(Attends))}, got {self.attends!r}")
        if self.multipliers and len(self.multipliers) != self.halvings + 1:
            raise ValueError(
                f"{self.halvings} halvings leave {self.halvings + 1} widths, and {len(self.multipliers)} are given"
            )
        stride = 2**self.halvings * self.patch
        if self.patch < 1 or self.side < 1 or self.side % stride:
            raise ValueError(
                f"a side of {self.side} pixels cannot be halved {self.halvings} times and cut into patches of "
                f"{self.patch}: take a multiple of {stride}"
            )
        if min(self.dim, self.channels) < 1 or self.kl_weight < 0:
            raise ValueError("dim and channels are at least 1, kl_weight is not negative")

    @classmethod
    def for_pictures(cls, side: int, channels: int, **changes: object) -> KLConfig:
        """A config for square pictures of this size: 8x8 latents up to 64 pixels, the published f16 from 128 on."""
        if side >= 128:
            shape = dict(
                body="residual", width=128, halvings=4, dim=16, kl_weight=1e-6, perceptual=1.0, adversarial=0.5
            )
        else:
            shape = dict(halvings=max(0, math.ceil(math.log2(max(side, 1) / 8))))
        return cls(**{"side": side, "channels": channels, **shape, **changes})  # type: ignore[arg-type]


class Posterior:
    """A Gaussian of independent latents, from what the encoder says of mean and log-variance."""

    def __init__(self, moments: Float[Tensor, "b 2*d h w"]) -> None:
        self.mean, log_variance = moments.float().chunk(2, dim=1)
        self.log_variance = log_variance.clamp(-30, 20)

    def sample(self, generator: torch.Generator) -> Float[Tensor, "b d h w"]:
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device).to(self.mean.device)
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Float[Tensor, " b"]:
        """KL divergence from the standard normal, summed over the latents of a picture, in nats."""
        terms = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * terms.flatten(1).sum(1)


class KLTokenizer(nn.Module):
    """Pictures in [-1, 1] <-> latents (n, rows * columns, dim) of about unit variance, a patch of them each.

    `scale` is one over the standard deviation of latents, measured over the end of training.
    """

    kind: ClassVar[str] = "kl"
    vocab = None

    scale: Tensor
    sums: Tensor

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config = c = config
        self.encoder, self.decoder = conv_body(
            c.body, c.channels, c.width, c.dim, c.halvings, inner=c.dim, kernel=1, moments=2,
            attends=c.attends, multipliers=c.multipliers or None,
        )  # fmt: skip
        self.picture_loss = PictureLoss(c, c.channels, c.side)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))  # number, sum and squares of latents met

    side = property(lambda self: self.config.side)
    channels = property(lambda self: self.config.channels)
    dim = property(lambda self: self.config.dim * self.config.patch**2)

    @property
    def grid(self) -> tuple[int, int]:
        n = self.config.side // 2**self.config.halvings // self.config.patch
        return n, n

    def _rows(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b n d2"]:
        """A map as vectors."""
        p = self.config.patch
        return map_to_rows(z.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3))

    def _map(self, rows: Float[Tensor, "b n d2"]) -> Float[Tensor, "b d h w"]:
        """Vectors as a map."""
        p = self.config.patch
        parts = rows_to_map(rows, self.grid).unflatten(1, (p, p, -1))  # row and column in the patch, channel
        return parts.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)

    def posterior(self, images: Float[Tensor, "b c h w"]) -> Posterior:
        """Mean and variance of each latent, not scaled."""
        check_pictures(images, self.channels, self.side)
        return Posterior(self.encoder(images))

    @torch.no_grad()
    def encode(
        self, images: Float[Tensor, "b c h w"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "b n d"]:
        """A sample of the latents where a generator is given, as generators are trained on; else their mean."""
        posterior = self.posterior(images)
        z = posterior.mean if generator is None else posterior.sample(generator)
        return self._rows(z) * self.scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b n d"]) -> Float[Tensor, "b c h w"]:
        check_codes(latents, (math.prod(self.grid), self.dim), None)
        return self.decoder(self._map(latents / self.scale)).clamp(-1, 1)

    def loss(
        self, images: Float[Tensor, "b c h w"], step: int, steps: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """As `PictureTokenizer.loss`."""
        posterior = self.posterior(images)
        z = posterior.sample(generator)
        if self.training and step >= (1 - MEASURED) * steps:
            self._measure(z.detach())
        loss, figures = self.picture_loss(self.decoder(z), images, self.decoder.last, step, steps)
        kl = posterior.kl().mean()
        loss = loss + self.config.kl_weight * kl / images[0].numel()
        return loss, {"loss": loss.item(), **figures, "kl": kl.item(), "deviation": z.detach().std().item()}

    @torch.no_grad()
    def _measure(self, z: Tensor) -> None:
        """Take these latents into account for the scale."""
        z = z.double()
        self.sums += torch.stack([z.new_tensor(z.numel()), z.sum(), z.square().sum()])
        number, total, squares = self.sums
        variance = squares / number - (total / number).square()
        self.scale.copy_(variance.clamp(min=1e-12).rsqrt())
        same_everywhere(self.scale)
