"""VARiant: depths, paths and what is trained, beyond the laws (tests/probes/test_variant.py has those of the order)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from seriatim.random import Generator
from seriatim.systems.image import var, variant
from seriatim.systems.image.raster_ar import Config as RasterConfig
from seriatim.systems.image.raster_ar import RasterAR
from seriatim.systems.pyramid_trials import both_depths
from seriatim.systems.system import Sampling
from seriatim.tokenizers import MultiScaleConfig, MultiScaleTokenizer
from seriatim.verbs.train import train

SETTINGS = MultiScaleConfig(scales=(1, 2, 4), vocab=8, dim=4, width=8)


def system(cls=variant.VARiant, **changes):
    """With weights drawn at random, the same ones for the same shape."""
    torch.manual_seed(0)
    c = cls.Config(SETTINGS, classes=3, width=16, depth=4, heads=2, dropout=0.0, **changes)
    made = cls(c, MultiScaleTokenizer(SETTINGS).eval()).eval()
    with torch.no_grad():
        for p in made.model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return made


def batch(n=6):
    images = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"image": images, "label": torch.arange(n) % 3}


def loss(made):
    with torch.no_grad():
        return made.losses(batch(), Generator(0), 0.0)[0]


class Examples:
    def __len__(self):
        return 6

    def take(self, index):
        return {k: v[index] for k, v in batch().items()}


def test_the_share_of_fewer_layers_at_its_corners():
    """Of 25 epochs: a fifth for 5, growing evenly for 15, always for 5."""
    share = [variant.share_of_fewer(epoch / 25) for epoch in (0, 2, 5, 12.5, 20, 22, 25)]
    assert share == pytest.approx([0.2, 0.2, 0.2, 0.6, 1, 1, 1])


@pytest.mark.parametrize("scales, bridge", [(10, 6), (6, 4), (4, 2), (1, 1)])
def test_six_of_ten_scales_run_all_layers(scales, bridge):
    c = variant.Config(MultiScaleConfig(scales=tuple(range(1, scales + 1))), depth=8)
    assert c.by_scale(3) == (8,) * bridge + (3,) * (scales - bridge)


def test_paths_of_training_follow_the_schedule():
    made, g = system(depths=(2, 3)), torch.Generator().manual_seed(0)
    for progress, share in ((0.0, 0.2), (0.5, 0.6), (1.0, 1.0)):
        drawn = torch.tensor([made.drawn_depth(progress, g) for _ in range(2000)])
        assert float((drawn != 4).float().mean()) == pytest.approx(share, abs=0.04)
        assert float((drawn == 2).float().mean()) == pytest.approx(share / 2, abs=0.04)
    for share, want in ((0.0, {4}), (1.0, {2})):
        fixed = system(share=share)
        assert {fixed.drawn_depth(p / 10, g) for p in range(11)} == want


def test_a_step_of_training_is_that_of_the_path_drawn():
    full, fewer = (system(share=share).train() for share in (0.0, 1.0))
    for made, want in ((full, loss(system(var.VAR))), (fewer, loss(system()))):
        assert torch.equal(made(batch(), Generator(0), 0, 10)[0].detach(), want)
    assert not torch.equal(loss(full), loss(full.at(4)))


def test_layers_outside_the_subnet_learn_from_coarse_scales_alone():
    made = system(share=1.0, bridge=0).train()
    made(batch(), Generator(0), 0, 10)[0].backward()
    learned = [layer.qkv.grad is not None and bool(layer.qkv.grad.any()) for layer in made.model.backbone.layers]
    assert learned == [True, False, False, True]
    made = system(share=1.0).train()
    made(batch(), Generator(0), 0, 10)[0].backward()
    assert all(bool(layer.qkv.grad.any()) for layer in made.model.backbone.layers)


def test_depth_changes_between_pictures_over_the_same_weights():
    made, plain = system(depths=(2, 3)), system(var.VAR)
    labels = torch.arange(3)

    def images(one):
        return one.draw(labels, seed=1).images

    two, full = images(made), images(made.at(4))
    assert torch.equal(full, images(plain)), "with all layers it is VAR to the last bit"
    assert not torch.equal(two, full) and not torch.equal(images(made.at(3)), two)
    assert torch.equal(images(made.at(2)), two) and torch.equal(images(made), two), "another depth was left behind"
    assert all(a is b for a, b in zip(made.parameters(), made.at(3).parameters(), strict=True))


def test_it_begins_with_the_weights_of_var():
    base = system(var.VAR)
    made = variant.VARiant(variant.Config(**variant.VARiant.inherited(base, {}), depths=(3,)), base.tokenizer).eval()
    made.take_over(base)
    assert torch.equal(loss(made.at(4)), loss(base)) and not torch.equal(loss(made), loss(base))


def test_held_out_figures_and_the_claims_measure():
    made = system()
    with torch.no_grad():
        figures = made.validate(Examples())
    assert figures["loss"] == pytest.approx(float(loss(made)) / 126)
    assert figures["loss_full"] == pytest.approx(float(loss(made.at(4))) / 126)
    said = both_depths(SimpleNamespace(system=made, data=SimpleNamespace(test=Examples())))
    assert (said["loss_fewer"], said["loss_full"]) == (figures["loss"], figures["loss_full"])
    assert said["loss_both"] == pytest.approx((figures["loss"] + figures["loss_full"]) / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": ()}, "run 1 to 4 layers"),
        ({"depths": (5,)}, "run 1 to 4 layers"),
        ({"bridge": 4}, "of 3 scales 0 to 3"),
        ({"share": 1.5}, "lies in"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        system(**changes)


def test_impossible_depths_are_refused():
    with pytest.raises(ValueError, match="run 1 to 4 layers, got 0"):
        system().at(0)


def test_the_depth_of_what_is_drawn_is_asked_for():
    """The same pictures as by another system over the same weights; other systems run all their layers."""
    made = system()
    labels = torch.arange(2)
    for depth in (1, 2, 4):
        asked, other = (
            s.draw(labels, sampling=sampling, seed=3).images
            for s, sampling in ((made, replace(made.sampling, depth=depth)), (made.at(depth), made.sampling))
        )
        assert torch.equal(asked, other)
    with pytest.raises(ValueError, match="run 1 to 4 layers, got 5"):
        made.draw(labels, sampling=Sampling(depth=5))
    with pytest.raises(ValueError, match="raster-ar runs all of its layers at every step"):
        RasterAR(RasterConfig()).draw(labels, sampling=Sampling(depth=2))


@pytest.mark.slow
def test_it_is_trained_from_a_run_of_var(tmp_path):
    train("var", "digits", out=tmp_path / "var", settings={"steps": 3, "tokenizer_steps": 6})
    made = train("variant", from_=tmp_path / "var", out=tmp_path / "out", settings={"steps": 3, "depths": (2,)})
    assert made.system.config.depths == (2,) and made.system.draw(torch.arange(2)).forwards == 4
