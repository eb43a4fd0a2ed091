"""Convolutional encoder and decoder: a picture to a map of latents and back.

Plain convolutions without normalisation, small enough for pictures of 8 to 64 pixels on a CPU. Quantizing what lies
between the two is somebody else's business.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class ConvEncoder(nn.Module):
    """Picture -> latent map, each side halved `halvings` times."""

    def __init__(self, channels: int, width: int, dim: int, halvings: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
        for _ in range(halvings):
            layers += [nn.Conv2d(width, width, 4, stride=2, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, dim, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim h2 w2"]:
        return self.layers(images)


class ConvDecoder(nn.Module):
    """Latent map -> picture, each side doubled `halvings` times; the mirror of `ConvEncoder`."""

    def __init__(self, channels: int, width: int, dim: int, halvings: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(dim, width, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        for _ in range(halvings):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(width, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Float[Tensor, "b dim h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.layers(latent)
