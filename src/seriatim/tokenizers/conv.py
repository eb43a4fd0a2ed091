"""Convolutional encoder and decoder: a picture to a map of latents and back.

Three bodies behind one interface. *Plain*: convolutions without normalisation, small enough for pictures of 8 to 64
pixels on a CPU. *Residual*: the shape that VQGAN published and everybody kept (LlamaGen, VAR, latent diffusion), for
photographs. *Elm*: the same as ELM released it, with as many blocks in the decoder as in the encoder, no activation
behind the last norms, and an encoder that reads pixels from 0 to 1; *elm-normed*: its decoder begins with a norm.
`conv_body` makes a pair of any. Quantizing what lies between the two is somebody else's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Body = Literal["plain", "residual", "elm", "elm-normed"]
Attends = Literal["lowest", "encoder", "middle"]  # blocks of the lowest resolution, those of the encoder, or neither

MULTIPLIERS = {0: (1,), 1: (1, 2), 2: (1, 2, 4), 3: (1, 2, 2, 4), 4: (1, 1, 2, 2, 4), 5: (1, 1, 2, 2, 4, 4)}
"""Widths of the residual body, finest resolution first, by how often a side is halved: f4, f8 and f16 as published."""


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
        return self.layers(images.to(self.layers[0].get_parameter("weight").dtype))


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

    @property
    def last(self) -> nn.Parameter:
        """The weight that draws the pixels; losses are balanced by their gradients here."""
        return self.layers[-1].get_parameter("weight")

    def forward(self, latent: Float[Tensor, "b dim h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.layers(latent.to(self.last.dtype))


# ---- the published body ----------------------------------------------------------------------------------------------
def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = _norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        once = not torch.is_grad_enabled()  # nobody asks again for a map of a whole picture: it is written over
        h = self.conv1(F.silu(self.norm1(x), inplace=once))
        h = self.conv2(F.silu(self.norm2(h), inplace=once))
        return h.add_(self.shortcut(x)) if once else self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """x plus single-head self-attention over all places of the map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = _norm(width), nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape))


class Halve(nn.Conv2d):
    """3x3 convolution of stride 2, padded at the right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Conv2d):
    """Each pixel repeated twice in both directions, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return super().forward(F.interpolate(x, scale_factor=2.0))


def _level(width: int, out: int, blocks: int, attention: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i in range(blocks):
        layers.append(ResidualBlock(out if i else width, out))
        if attention:
            layers.append(AttentionBlock(out))
    return layers


def _middle(width: int) -> list[nn.Module]:
    return [ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width)]


class FromZero(nn.Module):
    """Pixels in [-1, 1] as numbers from 0 to 1: a convolution pads them with black."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return (x + 1) / 2


class ResidualEncoder(nn.Module):
    """Encoder of VQGAN (Esser et al. 2021, arXiv 2012.09841, table 7): residual blocks, attention at the lowest
    resolution, GroupNorm of 32 groups; then the convolution to the code (1x1 from `inner` channels in VQGAN and
    LlamaGen, 3x3 from as many as the code has in VAR).

    multipliers: width of each resolution over `width`, finest first; a side is halved between two of them. attends:
    whether blocks of the lowest resolution do, not only the middle; activation: whether one stands behind the last
    norm; from_zero: whether pixels are read as numbers from 0 to 1.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        dim: int,
        multipliers: Sequence[int] = MULTIPLIERS[4],
        blocks: int = 2,
        inner: int = 256,
        kernel: int = 1,
        attends: bool = True,
        activation: bool = True,
        from_zero: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [FromZero()] if from_zero else []
        layers.append(nn.Conv2d(channels, width, 3, padding=1))
        now = width
        for i, multiplier in enumerate(multipliers):
            lowest = i == len(multipliers) - 1
            layers += _level(now, width * multiplier, blocks, attention=attends and lowest)
            now = width * multiplier
            if not lowest:
                layers.append(Halve(now))
        layers += [*_middle(now), _norm(now), nn.SiLU() if activation else nn.Identity()]
        layers.append(nn.Conv2d(now, inner, 3, padding=1))
        self.layers = nn.Sequential(*layers)
        self.to_code = nn.Conv2d(inner, dim, kernel, padding=kernel // 2)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim h2 w2"]:
        return self.to_code(self.layers(images.to(self.to_code.weight.dtype)))


class ResidualDecoder(nn.Module):
    """The mirror of `ResidualEncoder`, with one more block a resolution, as published. attends: whether blocks of the
    lowest resolution do; activation: whether one stands behind the last norm; normed: whether one begins it."""

    def __init__(
        self,
        channels: int,
        width: int,
        dim: int,
        multipliers: Sequence[int] = MULTIPLIERS[4],
        blocks: int = 3,
        inner: int = 256,
        kernel: int = 1,
        attends: bool = True,
        activation: bool = True,
        normed: bool = False,
    ) -> None:
        super().__init__()
        self.from_code = nn.Conv2d(dim, inner, kernel, padding=kernel // 2)
        now = width * multipliers[-1]
        layers: list[nn.Module] = [_norm(inner)] if normed else []
        layers += [nn.Conv2d(inner, now, 3, padding=1), *_middle(now)]
        for i, multiplier in reversed(list(enumerate(multipliers))):
            layers += _level(now, width * multiplier, blocks, attention=attends and i == len(multipliers) - 1)
            now = width * multiplier
            if i:
                layers.append(Double(now))
        layers += [_norm(now), nn.SiLU() if activation else nn.Identity(), nn.Conv2d(now, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    @property
    def last(self) -> nn.Parameter:
        """The weight that draws the pixels; losses are balanced by their gradients here."""
        return self.layers[-1].get_parameter("weight")

    def forward(self, latent: Float[Tensor, "b dim h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.layers(self.from_code(latent.to(self.last.dtype)))


# ---- either ----------------------------------------------------------------------------------------------------------
def check_body(body: str, width: int, halvings: int) -> None:
    """Raises ValueError for a body that cannot be built."""
    if body not in get_args(Body):
        raise ValueError(f"body is one of {', '.join(get_args(Body))}, got {body!r}")
    if width < 1 or not 0 <= halvings <= 8:
        raise ValueError(f"width is at least 1 and halvings lie in 0..8, got {width} and {halvings}")
    if body != "plain" and (width % 32 or halvings not in MULTIPLIERS):
        raise ValueError(
            f"the residual body has a width that 32 divides (groups of its norms) and at most {max(MULTIPLIERS)} "
            f"halvings, got {width} and {halvings}"
        )


def conv_body(
    body: Body,
    channels: int,
    width: int,
    dim: int,
    halvings: int,
    *,
    inner: int,
    kernel: int,
    moments: int = 1,
    attends: Attends = "lowest",
    multipliers: Sequence[int] | None = None,
) -> tuple[ConvEncoder | ResidualEncoder, ConvDecoder | ResidualDecoder]:
    """Encoder (channels -> moments * dim) and decoder (dim -> channels) of a body.

    inner, kernel: of the convolution between the residual body and the code; the plain body has none. moments: 2 where
    the encoder gives a mean and a variance; attends, multipliers: of the residual body (None: `MULTIPLIERS`). Raises
    ValueError for a body that cannot be built.
    """
    check_body(body, width, halvings)
    if body == "plain":
        return ConvEncoder(channels, width, moments * dim, halvings), ConvDecoder(channels, width, dim, halvings)
    shape, sizes = multipliers or MULTIPLIERS[halvings], {"kernel": kernel, "attends": attends != "middle"}
    elm = body in ("elm", "elm-normed")
    if body == "elm-normed" and inner % 32:
        raise ValueError(f"the norm in front of the decoder has 32 groups, which do not divide {inner} channels")
    sizes["activation"] = not elm
    encoder = ResidualEncoder(channels, width, moments * dim, shape, inner=moments * inner, from_zero=elm, **sizes)  # type: ignore[arg-type]
    sizes |= {"attends": attends == "lowest", "blocks": 2 if elm else 3, "normed": body == "elm-normed"}
    return encoder, ResidualDecoder(channels, width, dim, shape, inner=inner, **sizes)  # type: ignore[arg-type]


def map_to_rows(latent: Float[Tensor, "b d h w"]) -> Float[Tensor, "b h*w d"]:
    """The vectors of a map in raster order."""
    return latent.flatten(2).transpose(1, 2)


def rows_to_map(rows: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b d h w"]:
    """The inverse of `map_to_rows`."""
    return torch.unflatten(rows.transpose(1, 2), 2, grid).contiguous()
