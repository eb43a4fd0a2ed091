"""E-CAR: stages that double, each from where the one before was left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.data.digits import digits
from seriatim.laws.case import randomise
from seriatim.maps import area_down, nearest_up
from seriatim.random import Generator
from seriatim.systems.flow_trials import gflops
from seriatim.systems.image import e_car
from seriatim.systems.system import Sampling
from seriatim.tokenizers.kl import KLConfig, KLTokenizer
from seriatim.tokenizers.patches import PatchConfig, PatchTokenizer

TINY = e_car.Config(width=16, depth=2, heads=2, flow_width=16, flow_depth=1, flow_steps=3)


def system_of(kind="patches", **changes):
    torch.manual_seed(0)
    patches = PatchTokenizer(PatchConfig(side=8, channels=1, patch=2))
    tokenizer = patches if kind == "patches" else KLTokenizer(KLConfig(side=8, dim=3, width=8, halvings=1)).eval()
    system = e_car.ECAR(replace(TINY, **e_car.ECAR.known(tokenizer, digits()), **changes), tokenizer).eval()
    randomise(system.model, std=0.3).float()
    return system


@pytest.mark.parametrize("kind", ["patches", "kl"])
def test_maps_are_means_of_single_values(kind):
    """Of pixels where elements are patches, of latents where they are latents."""
    system, batch = system_of(kind), digits().test.take(torch.arange(4))
    canvas, label = system.canvas(batch)
    assert canvas.layout.size == 21 and system.config.patch == (2 if kind == "patches" else 1)
    if kind == "patches":
        small = area_down(batch["image"], (4, 4))
        shown = system.enlarged(1, canvas.value["token"][:, 1:5])
        assert (shown - nearest_up(small, (8, 8))).abs().max() < 1e-5
    assert bool(torch.isfinite(system.model.losses(canvas, label, random=Generator(0))).all())


def test_each_stage_is_fed_the_one_before_it_enlarged():
    system = system_of()
    codes = torch.randn(2, 21, 4, generator=torch.Generator().manual_seed(0))
    shapes = ((1, 1), (2, 2), (4, 4))
    middle, finest = e_car.Enlarged(2)(None, codes, shapes, 0, 2)
    cells = system.head.cells
    for fed, k in ((middle, 1), (finest, 2)):
        up = cells.values(fed, k)
        assert torch.equal(area_down(up, (up.shape[2] // 2,) * 2), cells.values(codes[:, cells.span(k - 1)], k - 1))


def test_a_film_goes_through_the_stages_and_marks_the_jumps():
    system = system_of()
    out = system.draw(torch.tensor([3, 5]), sampling=Sampling(guidance=0.5), film=True)
    assert out.images.shape == (2, 1, 8, 8) and out.forwards == 3
    assert out.captions == [
        "noise", "stage 1, step 1", "stage 1, step 2", "stage 1, step 3",
        "jump to stage 2", "stage 2, step 1", "stage 2, step 2", "stage 2, step 3",
        "jump to stage 3", "stage 3, step 1", "stage 3, step 2", "stage 3, step 3",
    ]  # fmt: skip
    assert torch.equal(out.frames[-1], out.images) and system.head.watch is None
    blocks = out.frames[3].unfold(2, 4, 4).unfold(3, 4, 4)
    assert (blocks - blocks[..., :1, :1]).abs().max() < 1e-6  # 2x2 values, each in 4x4 places
    assert torch.equal(out.images, system.draw(torch.tensor([3, 5]), sampling=Sampling(guidance=0.5)).images)


def test_a_film_of_many_steps_keeps_the_jumps():
    system = system_of(flow_steps=20)
    out = system.draw(torch.tensor([1]), film=True)
    assert len(out.frames) == 16 and [c for c in out.captions if "jump" in c] == ["jump to stage 2", "jump to stage 3"]
    assert out.captions[-1] == "stage 3, step 20"


def test_stages_save_operations_where_steps_are_as_many():
    staged, whole = (system_of(stages=n, flow_steps=6 // n) for n in (3, 1))
    assert gflops(staged) < 0.7 * gflops(whole)


def test_every_tensor_is_trained():
    system = system_of().train()
    canvas, label = system.canvas(digits().train.take(torch.arange(16)))
    drop = torch.arange(16) == 0
    system.model.losses(canvas, label, drop, random=Generator(0)).sum().backward()
    assert not [n for n, p in system.model.named_parameters() if p.grad is None or not bool(p.grad.any())]


def test_sizes_are_halvings():
    assert e_car.Config(side=8).scales == (2, 4, 8) and e_car.Config(side=6).scales == (3, 6)
    assert e_car.Config(side=8, stages=1).scales == (8,) and e_car.Config(side=5).scales == (5,)
    for wrong in ({"stages": 4}, {"split": (1, 2)}, {"deviation": 0.0}):
        with pytest.raises(ValueError):
            e_car.Config(**{"side": 4, **wrong})
