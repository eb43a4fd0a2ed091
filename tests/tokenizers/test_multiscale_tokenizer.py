"""The tokenizer around the quantizer: round trips, its training, and how well it draws the digits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seriatim.data import load_digits, shift_sideways
from seriatim.evaluation import psnr, train_judge
from seriatim.tokenizers import MultiScaleConfig, MultiScaleTokenizer
from seriatim.verbs.train import train


def pictures(n: int = 40, channels: int = 1, side: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(
    "config",
    [MultiScaleConfig(width=8), MultiScaleConfig(scales=(1, 2, 3, 4), width=8, channels=3, halvings=2, vocab=9)],
    ids=["digits", "colour, 16x16"],
)
def test_shapes_and_the_picture_after_each_scale(config: MultiScaleConfig) -> None:
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(config).eval()
    images = pictures(3, config.channels, config.side)
    ids = tokenizer.encode(images)
    assert ids.shape == (3, sum(p * p for p in config.scales))
    assert ids.min() >= 0 and ids.max() < config.vocab
    assert torch.equal(ids, tokenizer.encode(images))
    parts = tokenizer.partial_decode(ids)
    assert [part.shape for part in parts] == [images.shape] * len(config.scales)
    assert torch.equal(parts[-1], tokenizer.decode(ids))
    assert torch.equal(tokenizer.partial_decode(ids[:, :5])[-1], parts[1])
    assert parts[-1].abs().max() <= 1


def test_the_training_path_draws_what_the_ids_decode_to() -> None:
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(MultiScaleConfig(width=8))
    images = pictures(4)
    drawn, quantized = tokenizer(images)
    assert torch.equal(quantized.ids, tokenizer.encode(images))
    assert torch.equal(drawn.clamp(-1, 1), tokenizer.decode(quantized.ids))
    (drawn.square().mean() + quantized.loss).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in tokenizer.parameters())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_digits_are_drawn_well(tmp_path) -> None:
    """Held-out digits: at least 24.5 dB (the mean picture reaches 11.3), 60 of 64 codes, and still judged right."""
    digits = load_digits()
    tokenizer = train("image-msvq", "digits", out=tmp_path / "run").system.model
    judge = train_judge(digits.train.images, digits.train.labels, seed=0, augment=shift_sideways)
    ids = tokenizer.encode(digits.test.images)
    drawn = tokenizer.decode(ids)
    assert psnr(drawn, digits.test.images) >= 24.5
    assert ids.unique().numel() >= 60
    assert judge.accuracy(drawn, digits.test.labels) >= 0.97
