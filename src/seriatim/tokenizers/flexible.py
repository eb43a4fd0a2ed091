"""Pictures as token maps of any size, each a coding of the whole picture, independent of the others.

Source: FlexVAR (Jiao et al. 2025, arXiv 2502.20313), section 3.2 and its code: the latent is area-downed to the size of
a map and quantized there (codes and latents on the unit sphere, as in `VQTokenizer`); a map alone is decoded to a
picture of its own size. In training some sizes are drawn at each step, and each decoded map is compared with the
picture resized to it, so that one decoder serves all sizes.

The paper publishes no training of its tokenizer; ours is: the finest size in every step and others at random, all of
equal weight; the finest alone meets features and critic, which small pictures would not fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from seriatim.maps import Shape, area_down
from seriatim.tokenizers.base import check_codes, check_pictures
from seriatim.tokenizers.codebook import Phase, count_uses, idle, phase
from seriatim.tokenizers.conv import map_to_rows, rows_to_map
from seriatim.tokenizers.multiscale import SCALES
from seriatim.tokenizers.quantizers import Quantized, usage
from seriatim.tokenizers.vq import VQConfig, VQTokenizer, seeded


@dataclass(frozen=True, kw_only=True)
class FlexConfig(VQConfig):
    """The shape of a tokenizer and how it is trained; the defaults suit 32x32 glyphs.

    scales: sides of the maps that `encode` gives where none are named, the last one of the whole latent; drawn: sizes
    in each step of training, the finest among them.
    """

    scales: tuple[int, ...] = SCALES[8]
    drawn: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scales", tuple(self.scales))  # JSON knows lists only
        if self.depth != 1:
            raise ValueError(f"a map has one id a place, got depth {self.depth}")
        if list(self.scales) != sorted(set(self.scales)) or not self.scales or self.scales[0] < 1:
            raise ValueError(f"scales are sides of maps, each larger than the one before, got {self.scales}")
        if self.scales[-1] != self.side // 2**self.halvings:
            raise ValueError(
                f"the last scale is that of the latent, {self.side // 2**self.halvings}, not {self.scales[-1]}"
            )
        if not 1 <= self.drawn <= self.scales[-1]:
            raise ValueError(f"1 to {self.scales[-1]} sizes are drawn at a step, got {self.drawn}")

    @classmethod
    def for_pictures(cls, side: int, channels: int, **changes: object) -> FlexConfig:
        """A config for square pictures of this size: maps of up to 8x8 ids for up to 64 pixels; from 128 on FlexVAR's
        shape (16 pixels a place, 8,912 codes of 32 dimensions). Raises ValueError for sides that no list of scales here
        ends in."""
        halvings = 4 if side >= 128 else max(0, (side - 1).bit_length() - 3)
        last, rest = divmod(side, 2**halvings)
        if rest or last not in SCALES:
            ends = ", ".join(str(n * 2**halvings) for n in SCALES)
            raise ValueError(f"no list of scales for pictures of {side} pixels; near it there are {ends}: resize")
        shape: dict[str, object] = {"scales": SCALES[last], "halvings": halvings}
        if side >= 128:
            shape |= dict(
                body="residual", width=128, vocab=8912, dim=32, warm_up=0.05, perceptual=1.0, adversarial=0.5, drawn=4
            )
        return cls(**{"side": side, "channels": channels, **shape, **changes})  # type: ignore[arg-type]


class FlexTokenizer(VQTokenizer):
    """Pictures in [-1, 1] <-> ids of maps of any sizes. A picture of other sides than the trained ones is taken and
    drawn, too, where its sides are multiples of a place's."""

    kind: ClassVar[str] = "flexible"
    config: FlexConfig

    @property
    def stride(self) -> int:
        """Pixels of a place in the finest map."""
        return 2**self.config.halvings

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the maps that `encode` gives where none are named."""
        return tuple((side, side) for side in self.config.scales)

    def latent(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """What is area-downed and quantized."""
        if images.dim() == 4 and any(n % self.stride for n in images.shape[2:]):
            raise ValueError(f"sides of pictures are multiples of {self.stride} here, got {tuple(images.shape[2:])}")
        if images.dim() != 4 or images.shape[1] != self.channels or not images.is_floating_point():
            check_pictures(images, self.channels, self.side)
        return self.encoder(images)

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Quantized]:
        """The finest map's picture (not clamped), and what the quantizer did to all maps that `encode` gives."""
        latent = self.latent(images)
        steps = [self._quantized(latent, shape) for shape in self.shapes]
        ids, loss = torch.cat([q.ids for q in steps], 1), torch.stack([q.loss for q in steps]).mean()
        return self._drawn(steps[-1].z_q, self.shapes[-1]), Quantized(steps[-1].z_q, ids, loss, usage(ids))

    @torch.no_grad()
    def encode(  # type: ignore[override]
        self, images: Float[Tensor, "b c h w"], shapes: Sequence[Shape] | None = None
    ) -> Int[Tensor, "b total"]:
        """Ids of maps of these shapes (rows, columns), side by side."""
        latent = self.latent(images)
        return torch.cat([self._quantized(latent, shape).ids for shape in shapes or self.shapes], 1)

    @torch.no_grad()
    def decode(self, ids: Int[Tensor, "b total"], shapes: Sequence[Shape] | None = None) -> Float[Tensor, "b c h w"]:
        """The picture of the last of these maps."""
        shapes = shapes or self.shapes
        check_codes(ids, (sum(rows * columns for rows, columns in shapes),), self.vocab)
        rows, columns = shapes[-1]
        return self.decode_map(ids[:, -rows * columns :], shapes[-1])

    @torch.no_grad()
    def decode_map(self, ids: Int[Tensor, "b n"], shape: Shape) -> Float[Tensor, "b c h w"]:
        """The picture of one map alone, `stride` times as large as the map."""
        check_codes(ids, (shape[0] * shape[1],), self.vocab)
        return self._drawn(self.quantizer.decode_ids(ids), shape).clamp(-1, 1)

    def _quantized(self, latent: Float[Tensor, "b d h w"], shape: Shape) -> Quantized:
        return self.quantizer.quantize(map_to_rows(area_down(latent, shape)))

    def _drawn(self, vectors: Float[Tensor, "b n d"], shape: Shape) -> Float[Tensor, "b c h w"]:
        return self.decoder(rows_to_map(vectors, shape))

    # ---- training ---------------------------------------------------------------------------------------------------

    def loss(
        self, images: Float[Tensor, "b c h w"], step: int, steps: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """As of `VQTokenizer`, the mean over the sizes that are drawn."""
        c, latent = self.config, self.latent(images)
        shapes = self._sizes(generator)
        plain, revived = False, 0
        if self.quantizer.codebook is not None:
            now, _ = phase(c, step, steps)
            plain = now is Phase.PLAIN
            if not plain and self.training:
                met = torch.cat([map_to_rows(area_down(latent.detach(), shape)) for shape in shapes], 1)
                revived = self._tend(now, met, generator)
        total, ids = torch.zeros((), device=images.device), []
        figures: dict[str, float] = {}
        for shape in shapes:
            if plain:
                z = map_to_rows(area_down(latent, shape))
                total = total + c.latent_weight * z.square().mean()
            else:
                with seeded(generator):
                    quantized = self._quantized(latent, shape)
                z = quantized.z_q
                ids.append(quantized.ids)
                total = total + c.vq_weight * quantized.loss
            error, said = self._error(self._drawn(z, shape), images, shape, step, steps)
            total, figures = total + error, said or figures
        total = total / len(shapes)
        if plain:
            total = total + idle(self.quantizer)  # type: ignore[arg-type]
            return total, {"loss": total.item(), **figures}
        met_ids = torch.cat(ids, 1)
        if self.uses is not None and self.training:
            count_uses(self.uses, met_ids)
        stats = usage(met_ids)
        figures |= {"codes_used": float(stats["used"]), "perplexity": float(stats["perplexity"])}
        return total, {"loss": total.item(), **figures, "codes_revived": float(revived)}

    def _sizes(self, generator: torch.Generator) -> list[Shape]:
        """The sizes of a step: the finest, and others drawn among all smaller ones."""
        side = self.config.scales[-1]
        others = torch.randperm(side - 1, generator=generator, device=generator.device)[: self.config.drawn - 1] + 1
        return [(side, side), *((n, n) for n in sorted(others.tolist(), reverse=True))]

    def _error(
        self, drawn: Tensor, images: Tensor, shape: Shape, step: int, steps: int
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """How far a map's picture is from the true one at its size; figures of the finest alone."""
        if shape == self.grid:
            return self.picture_loss(drawn, images, self.decoder.last, step, steps)
        small = area_down(images, (drawn.shape[2], drawn.shape[3])).float()
        error = F.mse_loss if self.config.error == "l2" else F.l1_loss
        return error(drawn.float(), small), {}
