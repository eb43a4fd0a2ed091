"""Small tokenizers of every kind, and a training loop such as the trainer's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from seriatim.tokenizers import make_tokenizer

SMALL: dict[str, tuple[str, dict[str, object]]] = {
    "multi-scale": ("multi-scale", {"scales": (1, 2, 3, 4), "vocab": 16, "dim": 4, "width": 8, "halvings": 2}),
    "vq": ("vq", {"side": 16, "vocab": 16, "dim": 4, "width": 8, "quantizer": "vq"}),
    "vq-l2": ("vq", {"side": 16, "vocab": 16, "dim": 4, "width": 8, "entropy": 0.1}),
    "vq-ibq": ("vq", {"side": 16, "vocab": 16, "dim": 4, "width": 8, "quantizer": "ibq", "vq_weight": 0.1}),
    "vq-bsq": ("vq", {"side": 16, "vocab": 16, "width": 8, "quantizer": "bsq"}),
    "vq-fsq": ("vq", {"side": 16, "vocab": 256, "width": 8, "quantizer": "fsq"}),
    "vq-lfq": ("vq", {"side": 16, "vocab": 16, "width": 8, "quantizer": "lfq"}),
    "vq-bernoulli": ("vq", {"side": 16, "vocab": 16, "width": 8, "quantizer": "bernoulli"}),
    "vq-sim": ("vq", {"side": 16, "vocab": 16, "dim": 4, "width": 8, "quantizer": "sim-vq"}),
    "vq-residual": ("vq", {"side": 16, "vocab": 8, "dim": 4, "width": 8, "quantizer": "residual-vq", "depth": 3}),
    "vq, residual body": (
        "vq",
        {"side": 16, "vocab": 16, "dim": 4, "width": 32, "halvings": 1, "inner": 8, "body": "residual"},
    ),
    "vq, critic": ("vq", {"side": 32, "vocab": 16, "dim": 4, "width": 8, "adversarial": 0.02, "critic_width": 8}),
    "flexible": ("flexible", {"side": 16, "scales": (1, 2, 3, 4), "vocab": 16, "dim": 4, "width": 8}),
    "detail": (
        "detail",
        {"side": 16, "vocab": 16, "dim": 4, "queries": 6, "group": 2, "width": 16, "heads": 2, "depth": 1}
        | {"draw_depth": 1, "near": 4, "shorter": 0.5},
    ),
    "sequential": (
        "sequential",
        {"side": 16, "vocab": 16, "dim": 4, "queries": 4, "groups": 2, "width": 16, "heads": 2, "depth": 1}
        | {"read_depth": 1, "flow_depth": 1, "rank": 2},
    ),
    "kl": ("kl", {"side": 16, "dim": 4, "width": 8}),
    "kl, residual body": ("kl", {"side": 16, "dim": 4, "width": 32, "halvings": 1, "body": "residual"}),
    "pixels": ("pixels", {"side": 16, "levels": 256}),
    "pixels, colour": ("pixels", {"side": 16, "channels": 3, "levels": 5}),
    "patches": ("patches", {"side": 16, "channels": 3, "patch": 4}),
}
PACKAGED = {"vq-fsq", "vq-lfq", "vq-sim", "vq-residual"}  # of the extra `quantizers`
TRAINED = [name for name, (kind, _) in SMALL.items() if kind not in ("pixels", "patches")]
LIGHT = [name for name in TRAINED if "body" not in name]  # trained for many steps within a second


@pytest.fixture
def make() -> Callable[..., nn.Module]:
    """make(name, seed, **changes): a small tokenizer with fresh weights; skips where its package is missing."""

    def build(name: str, seed: int = 0, **changes: object) -> nn.Module:
        if name in PACKAGED:
            pytest.importorskip("vector_quantize_pytorch")
        kind, settings = SMALL[name]
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(kind, settings | changes)
        assert isinstance(tokenizer, nn.Module)
        if kind == "sequential":  # gates that begin at zero let no gradient through
            for p in tokenizer.decoder.parameters():  # type: ignore[union-attr]
                if not p.any():
                    nn.init.normal_(p, std=0.1)
        return tokenizer

    return build


@pytest.fixture
def pictures() -> Callable[..., Tensor]:
    """pictures(tokenizer, n, seed): smooth random pictures that it takes."""

    def draw(tokenizer: nn.Module, n: int = 8, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rough = torch.rand(n, tokenizer.channels, 4, 4, generator=generator) * 2 - 1  # type: ignore[arg-type]
        return nn.functional.interpolate(rough, size=(tokenizer.side, tokenizer.side), mode="bicubic").clamp(-1, 1)

    return draw


@pytest.fixture
def steps_of(pictures: Callable[..., Tensor]) -> Callable[..., list[dict[str, float]]]:
    """steps_of(tokenizer, optimizer, begin, end, steps): train from one step to another; batch and noise follow from
    the step."""

    def train(
        tokenizer: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int, steps: int
    ) -> list[dict[str, float]]:
        said = []
        for step in range(begin, end):
            torch.manual_seed(10_000 + step)
            loss, figures = tokenizer.loss(  # type: ignore[operator]
                pictures(tokenizer, seed=step % 2), step, steps, torch.Generator().manual_seed(step)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            said.append(figures)
        return said

    return train


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Arguments `any_name`, `trained_name` and `light_name` run over the small tokenizers."""
    for argument, names in (("any_name", list(SMALL)), ("trained_name", TRAINED), ("light_name", LIGHT)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names)
