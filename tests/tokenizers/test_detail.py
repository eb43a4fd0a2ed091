"""The tokenizer of DetailFlow: growing resolution, prefixes, and wrong ids with their repair."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from seriatim.tokenizers.detail import DetailConfig, DetailTokenizer

SIZES = {"side": 16, "vocab": 12, "dim": 4, "queries": 8, "group": 2, "width": 16, "heads": 2, "depth": 1}
SIZES |= {"draw_depth": 1, "near": 3, "warm_up": 0.0}


def tokenizer(**changes):
    torch.manual_seed(0)
    made = DetailTokenizer(DetailConfig(**SIZES | changes)).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype) * 0.3)
    return made


def pictures(n=3):
    return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- resolution ------------------------------------------------------------------------------------------------------


def test_sides_grow_along_the_line_as_published():
    c = DetailConfig.for_pictures(256, 3)
    assert (c.queries, c.group, c.vocab) == (128, 8, 8192)
    assert {t: c.resolution(t) for t in (1, 8, 16, 32, 64, 128)} == {1: 1, 8: 21, 16: 44, 32: 88, 64: 164, 128: 256}
    sides = [c.resolution(t) for t in range(1, 129)]
    assert sides == sorted(sides)
    assert [c.drawn(t) for t in (1, 8, 16, 128)] == [16, 32, 48, 256]
    assert c.lengths[:10] == (1, 2, 3, 4, 5, 6, 7, 8, 16, 24)


@pytest.mark.parametrize(("side", "queries"), [(32, 16), (8, 4), (100, 50)])
def test_one_id_is_one_pixel_and_all_ids_are_all(side, queries):
    c = DetailConfig(side=side, queries=queries, group=2, patch=1 if side == 8 else 4)
    assert c.resolution(1) == 1 and c.resolution(queries) == side == c.drawn(queries)


def test_a_prefix_is_drawn_at_its_own_size_and_one_inside_a_later_group_is_refused():
    t, c = tokenizer(), DetailConfig(**SIZES)
    ids = t.encode(pictures())
    for length in c.lengths:
        assert t.decode_prefix(ids[:, :length]).shape == (3, 1, c.drawn(length), c.drawn(length))
    assert torch.equal(t.decode_prefix(ids), t.decode(ids))
    for length in (0, 3, 5, 9):
        with pytest.raises(ValueError, match="prefixes of 1, 2, 4, 6, 8 ids"):
            t.decode_prefix(torch.zeros(1, length, dtype=torch.long))


def test_a_prefix_is_to_be_drawn_as_the_picture_with_as_many_pixels():
    t, images = tokenizer(), pictures()
    assert torch.equal(t.target(images, 8), images)
    one = t.target(images, 1)
    assert one.shape[2:] == (4, 4)
    torch.testing.assert_close(one, images.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4))


# ---- codes -----------------------------------------------------------------------------------------------------------


def test_ids_of_a_prefix_are_those_of_the_whole_line():
    whole = tokenizer()
    short = DetailTokenizer(DetailConfig(**SIZES | {"queries": 4})).double().eval()
    cut = {"encoder.queries", "encoder.follow.queries", "encoder.follow.place", "decoder.place"}
    short.load_state_dict({k: v[:4] if k in cut else v for k, v in whole.state_dict().items()})
    assert torch.equal(short.encode(pictures(8)), whole.encode(pictures(8))[:, :4])


def test_a_latent_sees_its_group_and_those_before_and_in_the_first_group_the_ids_before():
    view = tokenizer().encoder.plan.views["all"].mask()[0][16:, 16:]
    turn = torch.tensor([0, 1, 2, 2, 3, 3, 4, 4])
    assert torch.equal(view, turn[None] <= turn[:, None])


# ---- self-correction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "end"), [(0, 1), (1, 2), (2, 4), (4, 6)])
def test_wrong_ids_are_near_ones_of_one_group_and_what_is_said_is_true_up_to_it(at, end):
    t, images = tokenizer(), pictures(20)
    lines = t.corrupted(images, at, seeded())
    assert t.end_of(at) == end
    assert torch.equal(lines.clean, t.encode(images))
    assert torch.equal(lines.fed[:, :at], lines.clean[:, :at]), "nothing before is touched"
    assert torch.equal(lines.said[:, :end], lines.clean[:, :end]), "true ids up to the corrupted group"
    assert torch.equal(lines.said[:, end:], lines.fed[:, end:]), "and what repairs behind it"
    latents = F.normalize(t.latents(images), dim=-1)
    table = F.normalize(t.quantizer.table, dim=-1)
    near = (latents[:, at:end] @ table.T).topk(3, -1).indices
    picked = near == lines.fed[:, at:end, None]
    assert picked.any(-1).all() and picked.any((0, 1)).all(), "all of the nearest, and no others"
    assert not torch.equal(lines.fed[:, end:], lines.clean[:, end:]), "the rest is said anew"


def test_the_repair_sees_the_wrong_ids_and_the_picture():
    t, images = tokenizer(), pictures(8)
    first, second = (t.corrupted(images, 4, seeded(s)) for s in (0, 1))
    assert not torch.equal(first.fed[:, 4:6], second.fed[:, 4:6])
    changed = (first.fed[:, 4:6] != second.fed[:, 4:6]).any(1)
    prefix = t.quantizer.decode_ids(first.fed[:, :6])
    moved = (t.encoder(images, prefix) - t.encoder(images, t.quantizer.decode_ids(second.fed[:, :6])))[:, 6:]
    assert torch.equal(moved.abs().amax((1, 2)) > 1e-9, changed)
    assert (t.encoder(images, prefix) - t.encoder(images.flip(3), prefix))[:, 6:].abs().max() > 1e-3


def test_places_of_wrong_ids_leave_a_group_behind_them():
    t, g = tokenizer(), seeded()
    assert {t.start(8, g) for _ in range(100)} == {0, 1, 2, 4}
    assert {t.start(4, g) for _ in range(100)} == {0, 1}
    assert {t.start(2, g) for _ in range(100)} == {0, 1}
    for at in (3, 6, 8, -1):
        with pytest.raises(ValueError, match="first of a later one"):
            t.corrupted(pictures(1), at, g)


def test_training_draws_prefixes_a_group_short_at_least():
    t, g = tokenizer(shorter=0.5), seeded()
    met = [t._length(g) for _ in range(400)]
    assert set(met) == {1, 2, 4, 6, 8} and 0.4 < met.count(8) / 400 < 0.6
    assert {tokenizer(shorter=0.0)._length(g) for _ in range(20)} == {8}


def test_the_repaired_line_trains_its_queries_and_not_the_ids_before_it():
    t, images = tokenizer(shorter=0.0).train(), pictures()
    latents = t.latents(images).detach().requires_grad_()
    z = t.quantizer.quantize(latents).z_q
    repaired, _ = t._repaired(images, latents, z, 8, torch.zeros(()), seeded(3))
    repaired.square().sum().backward()
    assert latents.grad is None or not latents.grad.any()
    assert t.encoder.follow.queries.grad.abs().sum() > 0
    without = tokenizer(shorter=0.0, corrupt=0.0).train()
    without.loss(images, 5, 10, seeded())[0].backward()
    assert not without.encoder.follow.queries.grad.any()


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 9}, "whole groups of 2"),
        ({"queries": 2}, "at least 2 groups"),
        ({"patch": 5}, "do not tile"),
        ({"near": 13}, "1 to 12 nearest"),
        ({"shorter": 1.5}, "shares from 0 to 1"),
        ({"width": 20}, "multiple of 4"),
        ({"depth": 0}, "depth is at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DetailConfig(**SIZES | settings)


def test_settings_follow_the_size_of_pictures():
    assert DetailConfig.for_pictures(32, 1) == DetailConfig()
    with pytest.raises(ValueError, match="multiple of 8"):
        DetailConfig.for_pictures(30, 1)


def test_nearest_codes_begin_with_the_chosen_one():
    t = tokenizer()
    latents = t.latents(pictures())
    near = t.quantizer.nearest(latents, 12)
    assert torch.equal(near[..., 0], t.quantizer.quantize(latents).ids)
    assert torch.equal(near.sort(-1).values, torch.arange(12).expand_as(near))
    with pytest.raises(ValueError, match="1 to 12 codes"):
        t.quantizer.nearest(latents, 13)
