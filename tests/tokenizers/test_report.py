"""The figures of a tokenizer, against slow references and cases whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from seriatim.tokenizers import PatchConfig, PatchTokenizer, PixelConfig, PixelTokenizer, report, ssim


def pictures(n: int = 5, seed: int = 0, channels: int = 1, side: int = 16) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def slow_ssim(x: Tensor, y: Tensor) -> float:
    """One channel of two pictures, window by window, with 11x11 Gaussian weights of deviation 1.5."""
    weight = torch.tensor([[math.exp(-(i * i + j * j) / 4.5) for j in range(-5, 6)] for i in range(-5, 6)]).double()
    weight /= weight.sum()
    x, y = (x.double() + 1) / 2, (y.double() + 1) / 2
    scores = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (weight * a).sum(), (weight * b).sum()
            va, vb, ab = (
                (weight * (a - ma) ** 2).sum(),
                (weight * (b - mb) ** 2).sum(),
                (weight * (a - ma) * (b - mb)).sum(),
            )
            scores.append((2 * ma * mb + 1e-4) * (2 * ab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return torch.stack(scores).mean().item()


def test_ssim_is_wangs() -> None:
    x, y = pictures(2, 0, channels=2), pictures(2, 1, channels=2)
    mixed = 0.7 * x + 0.3 * y
    want = [sum(slow_ssim(mixed[n, c], x[n, c]) for c in range(2)) / 2 for n in range(2)]
    torch.testing.assert_close(ssim(mixed, x), torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=torch.float64))
    assert ssim(-x, x).max() < 0 < min(want)


def test_ssim_of_tiny_pictures_takes_a_smaller_window() -> None:
    x = pictures(2, 0, side=8)
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=torch.float64))
    assert ssim(x, pictures(2, 1, side=8)).max() < 0.6
    with pytest.raises(ValueError, match="differ in shape"):
        ssim(x, x[:, :, 1:])


class Halves(nn.Module):
    """Pictures become one bit: is the mean above zero? Drawn as -0.5 or 0.5 everywhere."""

    kind, vocab, grid, side, channels = "halves", 4, (1, 1), 16, 1

    def encode(self, images: Tensor) -> Tensor:
        return (images.mean((1, 2, 3)) > 0).long()[:, None]

    def decode(self, ids: Tensor) -> Tensor:
        return (ids - 0.5).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)


def test_figures_of_a_tokenizer_that_is_easy_to_reckon() -> None:
    images = torch.full((8, 1, 16, 16), -0.5)
    images[6:] = 0.3
    said = report(Halves(), images, batch=3)  # type: ignore[arg-type]
    assert said["pictures"] == 8 and said["elements"] == 1
    assert said["psnr"] == pytest.approx(10 * math.log10(4 / (0.04 * 2 / 8)), abs=1e-4)
    assert (said["vocab"], said["codes_used"], said["codebook_usage"]) == (4, 2, 0.5)
    assert said["perplexity"] == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))), rel=1e-5)
    assert said["bits_per_pixel"] == 2 / 256
    assert "feature_distance" not in said and "deviation" not in said


def test_nothing_lost_is_infinite_psnr() -> None:
    images = pictures(channels=3)
    said = report(PatchTokenizer(PatchConfig(side=16, channels=3)), images)
    assert said["psnr"] == math.inf and said["ssim"] == pytest.approx(1)
    assert said["deviation"] == pytest.approx(images.std().item(), rel=1e-3) and "vocab" not in said


def test_more_levels_lose_less_in_every_figure() -> None:
    images = pictures(20)
    network = nn.Conv2d(1, 8, 3)
    for p in network.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    few, many = (
        report(PixelTokenizer(PixelConfig(side=16, levels=n)), images, features=lambda x: [network(x)]) for n in (3, 32)
    )
    assert few["psnr"] < many["psnr"] and few["ssim"] < many["ssim"]
    assert few["feature_distance"] > 2 * many["feature_distance"] > 0
    assert few["bits_per_pixel"] == pytest.approx(math.log2(3)) and many["bits_per_pixel"] == 5


def test_figures_do_not_depend_on_the_batch() -> None:
    images, tokenizer = pictures(7), PixelTokenizer(PixelConfig(side=16, levels=5))
    assert report(tokenizer, images, batch=2) == pytest.approx(report(tokenizer, images, batch=7))


def test_no_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        report(PixelTokenizer(PixelConfig(side=16)), pictures(0))
