"""What a tokenizer of pictures is trained on: error of pixels, distance of features, and a critic of patches.

Source: VQGAN (Esser et al. 2021, arXiv 2012.09841, equations 4 to 7) with LPIPS-like features (Zhang et al. 2018,
arXiv 1801.03924); constants of LlamaGen. A critic is trained by the same optimizer in the same step: its own loss
reaches only its own weights, and the tokenizer's share goes through a copy of them that gets no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from seriatim.tokenizers.codebook import idle

FeatureMaps = Callable[[Tensor], Sequence[Tensor]]
"""Pictures (n, c, h, w) in [-1, 1] -> maps (n, d, h', w') of a frozen network, gradients flowing to the pictures."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The terms of a tokenizer's loss; the defaults (squared error only) suit small pictures.

    error: of pixels, squared or absolute; perceptual: weight of the distance between the maps of `features`, which is
    "efficientnet-lite0" (extra `features`) or "timm:NAME" (any network of an installed timm); adversarial: weight of
    the critic, from the share `adversarial_start` of the steps on; balance: "adaptive" multiplies it so that its
    gradient at the last layer is as large as that of the rest.
    """

    error: Literal["l2", "l1"] = "l2"
    perceptual: float = 0.0
    features: str = "efficientnet-lite0"
    adversarial: float = 0.0
    adversarial_start: float = 0.5
    balance: Literal["fixed", "adaptive"] = "fixed"
    critic_width: int = 64

    def check_loss(self) -> None:
        """Raises ValueError for terms that do not exist."""
        hints = {"error": ("l2", "l1"), "balance": ("fixed", "adaptive")}
        for name, choices in hints.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.perceptual < 0 or self.adversarial < 0 or not 0 <= self.adversarial_start <= 1:
            raise ValueError("weights of losses are not negative, adversarial_start is a share from 0 to 1")
        if self.perceptual and not self.features:
            raise ValueError("a perceptual loss needs features: efficientnet-lite0, or timm:NAME")


class PictureLoss(nn.Module):
    """The loss of drawn pictures against their originals."""

    def __init__(self, config: LossConfig, channels: int, side: int) -> None:
        super().__init__()
        config.check_loss()
        if config.adversarial and side < 32:
            raise ValueError(
                f"the critic looks at patches of pictures of at least 32 pixels, not {side}: adversarial=0"
            )
        self.config = config
        self.critic = PatchCritic(channels, config.critic_width) if config.adversarial else None
        self.own_features: tuple[FeatureMaps, ...] = ()  # in a tuple: no part of this module

    def use_features(self, maps: FeatureMaps) -> None:
        """Measure the perceptual distance on these maps, whatever the config names."""
        self.own_features = (maps,)

    def forward(
        self,
        drawn: Float[Tensor, "n c h w"],
        images: Float[Tensor, "n c h w"],
        last: nn.Parameter,
        step: int,
        steps: int,
        error: Float[Tensor, ""] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The sum of all terms, and each of them; `last` is the weight that drew the pixels. error: what stands in the
        place of that of pixels (the error of a velocity)."""
        c = self.config
        drawn, images = drawn.float(), images.float()
        squared = F.mse_loss(drawn, images)
        loss = error
        if loss is None:
            loss = squared if c.error == "l2" else F.l1_loss(drawn, images)
        figures = {"psnr": -10 * math.log10(max(squared.item(), 1e-12) / 4)}
        if c.perceptual:
            distance = feature_distance(self._maps(images), drawn, images).mean()
            loss = loss + c.perceptual * distance
            figures["perceptual"] = distance.item()
        if self.critic is not None and step >= c.adversarial_start * steps:
            fooled, sharpness = critic_losses(self.critic, drawn, images)
            weight = c.adversarial * (_balance(loss, fooled, last) if c.balance == "adaptive" else 1.0)
            loss = loss + weight * fooled + sharpness
            figures |= {"critic": sharpness.item(), "fooled": fooled.item(), "critic_weight": float(weight)}
        elif self.critic is not None:
            loss = loss + idle(self.critic)
        return loss, figures

    def _maps(self, images: Tensor) -> FeatureMaps:
        return self.own_features[0] if self.own_features else feature_maps(self.config.features, images.device)


def _balance(loss: Tensor, fooled: Tensor, last: nn.Parameter) -> float:
    """Norms of the gradients of loss and critic's share, divided, at the weight that drew the pixels (VQGAN, eq. 7)."""
    if not loss.requires_grad:
        return 1.0
    (rest,) = torch.autograd.grad(loss, last, retain_graph=True)
    (share,) = torch.autograd.grad(fooled, last, retain_graph=True)
    return float((rest.norm() / (share.norm() + 1e-4)).clamp(0, 1e4))


# ---- features --------------------------------------------------------------------------------------------------------
def feature_distance(
    maps: FeatureMaps, drawn: Float[Tensor, "n c h w"], images: Float[Tensor, "n c h w"]
) -> Float[Tensor, " n"]:
    """LPIPS without its learned weights: 1 - cosine of the features at each place, averaged over places and maps.

    0 for equal pictures, 1 for unrelated ones, at most 2. (LPIPS takes the squared distance of features normalised over
    channels, which is twice that, and adds up maps by learned weights.)
    """
    distances = []
    with torch.no_grad():
        wanted = maps(images)
    for got, want in zip(maps(drawn), wanted, strict=True):
        unit = F.normalize(got, dim=1, eps=1e-8) - F.normalize(want, dim=1, eps=1e-8)
        distances.append(unit.square().sum(1).flatten(1).mean(1) / 2)
    return torch.stack(distances).mean(0)


class _Frozen(nn.Module):
    """A network that stays as it is: its batch norms keep their statistics, whatever mode the rest is in."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def train(self, mode: bool = True) -> Self:
        return self


class EfficientNetMaps(_Frozen):
    """Five maps of EfficientNet-Lite0 with its ImageNet weights: the last of strides 2, 4, 8, 16 and 32."""

    blocks = (0, 2, 4, 10, 15)

    def __init__(self) -> None:
        super().__init__()
        from seriatim.evaluation.features import Lite0

        self.net = Lite0().net.requires_grad_(False).eval()

    def forward(self, images: Float[Tensor, "n c h w"]) -> list[Tensor]:
        levels = (images.expand(-1, 3, -1, -1) + 1) * 127.5
        x = self.net._swish(self.net._bn0(self.net._conv_stem((levels - 127) / 128)))
        maps = []
        for i, block in enumerate(self.net._blocks):
            x = block(x)
            if i in self.blocks:
                maps.append(x)
        return maps


class TimmMaps(_Frozen):
    """The maps of a pretrained timm network, with the normalisation it was trained with."""

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            import timm  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise ValueError(f"features 'timm:{name}' need timm: pip install timm, or use efficientnet-lite0") from None
        try:
            self.net = timm.create_model(name, pretrained=True, features_only=True).requires_grad_(False).eval()
        except Exception as error:
            raise ValueError(f"timm could not make {name!r} with its weights: {error}") from error
        settings: Mapping[str, Any] = getattr(self.net, "pretrained_cfg", None) or {}
        for what, default in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(what, torch.tensor(settings.get(what, default)).view(1, 3, 1, 1))

    def forward(self, images: Float[Tensor, "n c h w"]) -> list[Tensor]:
        light = (images.expand(-1, 3, -1, -1) + 1) / 2
        return list(self.net((light - self.get_buffer("mean")) / self.get_buffer("std")))


@lru_cache(maxsize=4)
def feature_maps(name: str, device: torch.device | str = "cpu") -> nn.Module:
    """The frozen network of that name, loaded once. Raises ValueError for an unknown name or a missing package."""
    if name == "efficientnet-lite0":
        return EfficientNetMaps().to(device)
    if name.startswith("timm:"):
        return TimmMaps(name.removeprefix("timm:")).to(device)
    raise ValueError(f"features are efficientnet-lite0 or timm:NAME, got {name!r}")


# ---- the critic ------------------------------------------------------------------------------------------------------
class PatchCritic(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv 1611.07004): how real each patch looks, by 4x4 convolutions.

    Pictures are at least 32 pixels wide. GroupNorm stands where the paper has batch norm, so that a picture's score
    does not depend on its company.
    """

    def __init__(self, channels: int, width: int = 64, halvings: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        now = width
        for i in range(1, halvings + 1):
            out = width * min(2**i, 8)
            layers += [nn.Conv2d(now, out, 4, 2 if i < halvings else 1, 1), nn.GroupNorm(1, out), nn.LeakyReLU(0.2)]
            now = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(now, 1, 4, 1, 1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1 h2 w2"]:
        return self.layers(images)


def critic_losses(
    critic: nn.Module, drawn: Float[Tensor, "n c h w"], images: Float[Tensor, "n c h w"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The tokenizer's share, -mean critic(drawn), with no gradient to the critic; and the critic's hinge loss, with no
    gradient to the tokenizer."""
    frozen = {name: p.detach() for name, p in critic.named_parameters()}
    fooled = -functional_call(critic, frozen, (drawn,)).mean()
    real, fake = critic(images), critic(drawn.detach())
    return fooled, (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
