"""What a tokenizer of pictures is to training and generation, and what all of them check."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class PictureTokenizer(Protocol):
    """Square pictures in [-1, 1] <-> ids, or latent vectors where `vocab` is None. An nn.Module.

    kind: the name of the class in files; grid: rows and columns of the latent map (of the finest one, where there are
    several); side, channels: of the pictures it takes.
    """

    kind: ClassVar[str]
    config: Any

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def vocab(self) -> int | None: ...

    @property
    def side(self) -> int: ...

    @property
    def channels(self) -> int: ...

    def encode(self, images: Float[Tensor, "n c h w"]) -> Tensor:
        """ids (n, elements) or (n, elements, depth), or latents (n, elements, dim). Raises ValueError for pictures of
        another shape."""
        ...

    def decode(self, codes: Tensor) -> Float[Tensor, "n c h w"]:
        """Pictures in [-1, 1]. Raises ValueError for codes of another shape."""
        ...

    def loss(
        self, images: Float[Tensor, "n c h w"], step: int, steps: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """What training minimises at a step (from 0) of so many, and figures to show: at least psnr, in dB.

        In training mode it also does what else is due at this step (a codebook is filled, unused codes are revived), so
        it is called once for each part of a batch, in order. Everything follows from its arguments and the module's
        own parameters and buffers: a training that resumes with these goes on bit for bit. Every parameter gets a
        gradient in every step, be it zero.
        """
        ...


def check_pictures(images: Tensor, channels: int, side: int) -> None:
    """Raises ValueError unless these are floating-point pictures (n, channels, side, side)."""
    if images.dim() != 4 or tuple(images.shape[1:]) != (channels, side, side):
        raise ValueError(
            f"this tokenizer is for square pictures of shape {(channels, side, side)}, got {tuple(images.shape[1:])}: "
            f"crop or resize them to {side}x{side}, or make a tokenizer for their size"
        )
    if not images.is_floating_point():
        raise ValueError(f"pictures are floating point in [-1, 1], got {images.dtype}")


def check_codes(codes: Tensor, shape: tuple[int, ...], vocab: int | None) -> None:
    """Raises ValueError unless these are codes (n, *shape), and ids below `vocab` where there is one."""
    what = "latents" if vocab is None else "ids"
    if tuple(codes.shape[1:]) != shape or codes.dim() != len(shape) + 1:
        raise ValueError(f"{what} of a picture have shape {shape}, got {tuple(codes.shape[1:])}")
    if vocab is not None and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < vocab:
        raise ValueError(f"ids lie in 0..{vocab - 1}, got {int(codes.min())}..{int(codes.max())}")
