"""The two bodies: shapes, and the residual one against its published formulae."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.tokenizers.conv import (
    AttentionBlock,
    Double,
    Halve,
    ResidualBlock,
    ResidualDecoder,
    ResidualEncoder,
    conv_body,
    map_to_rows,
    rows_to_map,
)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight drawn anew, in float64."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / max(1, math.prod(p.shape[1:])) ** 0.5)
    return module


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("body", ["plain", "residual", "elm", "elm-normed"])
@pytest.mark.parametrize("halvings", [0, 2, 4])
def test_bodies_halve_and_double_sides(body, halvings: int) -> None:
    torch.manual_seed(0)
    encoder, decoder = conv_body(body, 3, 32, 5, halvings, inner=32, kernel=1, moments=2)
    images = torch.randn(2, 3, 32, 32)
    latent = encoder(images)
    assert latent.shape == (2, 10, 32 >> halvings, 32 >> halvings)
    drawn = decoder(latent[:, :5])
    assert drawn.shape == images.shape
    assert decoder.last.shape[0] == 3
    (grad,) = torch.autograd.grad(drawn.sum(), decoder.last)
    assert grad.abs().sum() > 0


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """32 groups, biased variance, epsilon 1e-6."""
    parts = x.reshape(len(x), 32, -1)
    parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return parts.reshape(x.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def test_residual_block_is_the_published_one() -> None:
    block, x = randomised(ResidualBlock(32, 64)), draw(2, 32, 5, 5)
    assert isinstance(block, ResidualBlock)
    h = F.conv2d(silu(group_norm(x, block.norm1)), block.conv1.weight, block.conv1.bias, padding=1)
    h = F.conv2d(silu(group_norm(h, block.norm2)), block.conv2.weight, block.conv2.bias, padding=1)
    assert isinstance(block.shortcut, nn.Conv2d)
    want = h + F.conv2d(x, block.shortcut.weight, block.shortcut.bias)
    torch.testing.assert_close(block(x), want)
    same = randomised(ResidualBlock(32, 32))
    assert isinstance(same.shortcut, nn.Identity), "no shortcut where the width stays"


def test_attention_block_is_the_published_one() -> None:
    block, x = randomised(AttentionBlock(32)), draw(2, 32, 3, 4)
    assert isinstance(block, AttentionBlock)
    qkv = F.conv2d(group_norm(x, block.norm), block.qkv.weight, block.qkv.bias).flatten(2)
    q, k, v = qkv[:, :32], qkv[:, 32:64], qkv[:, 64:]
    weights = (q.transpose(1, 2) @ k / math.sqrt(32)).softmax(-1)  # (b, query, key)
    mixed = (v @ weights.transpose(1, 2)).reshape(x.shape)
    torch.testing.assert_close(block(x), x + F.conv2d(mixed, block.out.weight, block.out.bias))


def test_halving_pads_right_and_below_only() -> None:
    halve, x = randomised(Halve(2)), draw(1, 2, 6, 6)
    padded = torch.zeros(1, 2, 7, 7, dtype=torch.float64)
    padded[:, :, :6, :6] = x
    want = F.conv2d(padded, halve.weight, halve.bias, stride=2)  # type: ignore[arg-type]
    torch.testing.assert_close(halve(x), want)
    both = F.conv2d(x, halve.weight, halve.bias, stride=2, padding=1)  # type: ignore[arg-type]
    assert both.shape == want.shape and not torch.allclose(both, want), "the usual padding would shift the picture"


def test_doubling_repeats_pixels() -> None:
    double, x = randomised(Double(2)), draw(1, 2, 3, 3)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(double(x), F.conv2d(repeated, double.weight, double.bias, padding=1))  # type: ignore[arg-type]


def test_the_published_shape_has_the_published_number_of_weights() -> None:
    """LlamaGen's VQ-16 (ch 128, z 256, code 8) has 72 M weights with its table of 16,384 x 8; VAR's (ch 160) has 109 M
    with 4,096 x 32 and four phi."""

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        llamagen = count(ResidualEncoder(3, 128, 8)) + count(ResidualDecoder(3, 128, 8)) + 16384 * 8
        shape = dict(inner=32, kernel=3)
        var = count(ResidualEncoder(3, 160, 32, **shape)) + count(ResidualDecoder(3, 160, 32, **shape))  # type: ignore[arg-type]
        var += 4096 * 32 + 4 * (32 * 32 * 9 + 32)
    assert (llamagen, var) == (71_883_403, 108_948_355)


def test_attention_stands_at_the_lowest_resolution_only() -> None:
    with torch.device("meta"):
        encoder, decoder = ResidualEncoder(3, 32, 4), ResidualDecoder(3, 32, 4)
    kinds = [
        "A" if isinstance(m, AttentionBlock) else "R"
        for m in encoder.layers
        if isinstance(m, (ResidualBlock, AttentionBlock))
    ]
    assert "".join(kinds) == "RR" * 4 + "RARA" + "RAR"
    kinds = [
        "A" if isinstance(m, AttentionBlock) else "R"
        for m in decoder.layers
        if isinstance(m, (ResidualBlock, AttentionBlock))
    ]
    assert "".join(kinds) == "RAR" + "RARARA" + "RRR" * 4


def test_rows_are_in_raster_order() -> None:
    latent = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4)
    rows = map_to_rows(latent)
    assert torch.equal(rows[1, 4 + 1], latent[1, :, 1, 1])
    assert torch.equal(rows_to_map(rows, (2, 4)), latent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deep", 32, 2), "plain, residual"),
        (("residual", 48, 2), "32 divides"),
        (("residual", 32, 6), "at most 5"),
        (("plain", 0, 2), "at least 1"),
        (("plain", 8, 9), "0..8"),
    ],
)
def test_impossible_bodies_are_refused(arguments, message: str) -> None:
    body, width, halvings = arguments
    with pytest.raises(ValueError, match=message):
        conv_body(body, 3, width, 4, halvings, inner=4, kernel=1)
