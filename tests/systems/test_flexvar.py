"""FlexVAR: feeds, places, schedules and sizes, beyond the laws that every system obeys."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from seriatim.canvas import Set
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed_pyramid import PlaceGrid, PyramidEmbed, previous
from seriatim.factorization.static import Scales
from seriatim.heads.dist import Categorical
from seriatim.layout import pyramid, shapes_of
from seriatim.model import Rows
from seriatim.objectives.scales import drawn_scales, scales_to
from seriatim.plan import Plan
from seriatim.random import Forced, Generator, Keyed
from seriatim.systems import pyramid_trials
from seriatim.systems.image import flexvar, var
from seriatim.systems.pyramid_system import kept, layout_of
from seriatim.systems.pyramid_trials import skipping, without_scale
from seriatim.systems.system import Sampling
from seriatim.tokenizers import FlexConfig, FlexTokenizer, MultiScaleConfig, MultiScaleTokenizer
from seriatim.training.checkpoint import save_json
from seriatim.training.loop import Recipe, fit

LIST = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # of the paper


def tiny(scales=(1, 2, 3), vocab=5):
    return flexvar.case(scales, vocab).model


def ids_for(scales, vocab=5, rows=3, seed=0):
    n = sum(a * b for a, b in shapes_of(pyramid(scales)))
    return torch.randint(vocab, (rows, n), generator=torch.Generator().manual_seed(seed))


def labels(n):
    return {"class": torch.arange(n) % 3}


def system(side=16, scales=(1, 2, 3, 4)):
    torch.manual_seed(0)
    tokenizer = FlexTokenizer(FlexConfig(side=side, scales=scales, vocab=16, dim=4, width=8)).eval()
    config = flexvar.Config(scales, vocab=16, dim=4, grid=8, classes=3, width=16, depth=2, heads=2, dropout=0.0)
    made = flexvar.FlexVAR(config, tokenizer).eval()
    with torch.no_grad():
        for p in made.model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return made


def pictures(n=3, side=16, seed=0):
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- feed ------------------------------------------------------------------------------------------------------------


def slots(model, ids, scales):
    canvas = model.canvas({"token": ids}, layout=layout_of(scales))
    with torch.no_grad():
        return model.embed(canvas, model.factorization.packed(canvas))


def test_a_scale_is_told_the_map_before_alone_bicubic_up():
    model, scales = tiny(), (1, 2, (3, 4))
    ids = ids_for(scales)
    got, embed = slots(model, ids, scales), model.embed
    codes = F.normalize(embed.quantizer.table, dim=-1)[ids[:, 1:5]].transpose(1, 2).reshape(3, 3, 2, 2)
    up = F.interpolate(codes, size=(3, 4), mode="bicubic").flatten(2).transpose(1, 2)
    place = F.interpolate(embed.position[None], size=(3, 4), mode="area").flatten(2)[0].T
    torch.testing.assert_close(got[:, 5:], embed.project(up) + place, rtol=0, atol=1e-12)
    first = F.interpolate(embed.position[None], size=(1, 1), mode="area").flatten()
    torch.testing.assert_close(got[:, 0], (embed.start + first).expand(3, -1), rtol=0, atol=1e-12)


def test_dropping_a_scale_changes_the_input_of_the_next_one_only():
    model = tiny()
    ids = ids_for((1, 2, 3, 4))
    whole, fewer = slots(model, ids, (1, 2, 3, 4)), slots(model, torch.cat([ids[:, :1], ids[:, 5:]], 1), (1, 3, 4))
    assert torch.equal(whole[:, :1], fewer[:, :1]) and torch.equal(whole[:, 14:], fewer[:, 10:])
    assert not torch.isclose(whole[:, 5:14], fewer[:, 1:10]).any(-1).all()


def test_vectors_are_fed_as_ids_are():
    """The feed of a continuous pyramid (FlowAR): values are the vectors themselves."""
    shapes, model, ids = ((1, 1), (2, 2), (3, 3)), tiny(), ids_for((1, 2))
    vectors = model.embed.quantizer.decode_ids(ids)
    by_id, by_vector = previous(model.embed.quantizer, ids, shapes, 0, 2), previous(None, vectors, shapes, 0, 2)
    assert len(by_id) == 2 and all(torch.equal(a, b) for a, b in zip(by_id, by_vector, strict=True))


# ---- places ----------------------------------------------------------------------------------------------------------


def test_the_grid_at_its_own_size_is_the_parameter_and_smaller_ones_are_means():
    places = PlaceGrid(8)
    table = torch.randn(6, 8, 8)
    assert torch.equal(places(table, [(1, 1), (8, 8)], 1, 1), table.flatten(1).T)
    small = places(table, [(2, 4)], 0, 0)
    torch.testing.assert_close(small, table.view(6, 2, 4, 4, 2).mean((2, 4)).flatten(1).T)


def test_the_grid_begins_as_waves():
    table = PlaceGrid(32).fresh(16, 0.0)
    for c, row, column in ((0, 3, 9), (4, 30, 1), (5, 30, 7), (15, 2, 31)):
        turn = 10_000 ** (-(c - c % 2) / 16)
        want = math.sin(row * turn) if c % 2 == 0 else math.cos(column * turn)
        assert float(table[c, row, column]) == pytest.approx(want, abs=1e-5)


def test_a_table_of_places_refuses_other_sizes():
    model = var.case((1, 2, 3)).model
    canvas = model.blank(1, layout=layout_of((1, 2, 4)))
    with pytest.raises(ValueError, match="a place for each of the 14 elements"):
        model.embed(canvas, model.factorization.packed(canvas))


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [LIST, (1, 2, 3, 4, 6, 8), (1, 2, 3, 4)], ids=str)
def test_drawn_schedules_grow_and_are_not_larger_than_the_own_one(scales):
    most = sum(n * n for n in scales)
    g = torch.Generator().manual_seed(0)
    drawn = [drawn_scales(scales, g) for _ in range(600)]
    for one in drawn:
        assert all(a < b for a, b in pairwise(one)) and one[0] == 1 and one[-1] <= scales[-1]
        assert sum(n * n for n in one) <= most and len(one) <= len(scales)
    if len(scales) > 4:
        assert {n for one in drawn for n in one} == set(range(1, scales[-1] + 1)), "some size is never met"
        assert sum(one[1] == 2 for one in drawn) / 600 > 0.9


def test_schedules_of_sixteen_are_the_papers():
    """Five of 3 to 10 and two of 11 to 15 beside 1, 2 and 16, before any is left out: as many as the own list."""
    g = torch.Generator().manual_seed(1)
    whole = [one for one in (drawn_scales(LIST, g) for _ in range(4000)) if len(one) == 10 and one != LIST]
    assert whole and all(len([n for n in one if 3 <= n <= 10]) == 5 for one in whole)
    assert all(len([n for n in one if 11 <= n <= 15]) == 2 for one in whole)
    own = sum(drawn_scales(LIST, g) == LIST for _ in range(4000))
    assert 140 < own < 270  # 5%, four standard deviations, and a little by chance


def test_short_pyramids_stay_as_they_are():
    assert drawn_scales((1, 2), torch.Generator().manual_seed(0)) == (1, 2)


@pytest.mark.parametrize(
    ("shape", "steps", "want"),
    [
        ((16, 16), None, [(n, n) for n in LIST]),
        ((16, 16), 16, [(n, n) for n in range(1, 17)]),
        ((16, 16), 1, [(16, 16)]),
        ((32, 32), None, [*((n, n) for n in LIST), (24, 24), (32, 32)]),
        ((8, 16), None, [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6), (4, 8), (5, 10), (7, 13), (8, 16)]),
        ((4, 4), None, [(1, 1), (2, 2), (3, 3), (4, 4)]),
    ],
    ids=str,
)
def test_scales_for_a_shape(shape, steps, want):
    assert list(scales_to(shape, LIST, steps)) == want


@pytest.mark.parametrize("steps", range(1, 9))
def test_any_number_of_steps_grows_to_the_last(steps):
    shapes = scales_to((8, 8), (1, 2, 3, 4, 6, 8), steps)
    assert len(shapes) == steps and shapes[-1] == (8, 8) and all(a < b for a, b in pairwise(shapes))
    assert steps == 1 or shapes[0] == (1, 1)


def test_more_steps_than_sizes_are_refused():
    with pytest.raises(ValueError, match="from 1 to 8 there are 1 to 8 sizes"):
        scales_to((8, 8), (1, 2, 3, 4, 6, 8), 9)


# ---- one pass and steps ----------------------------------------------------------------------------------------------


def gap(model, scales, order=None):
    """Teacher forcing against guided-free decoding, forced to the same ids, in any pyramid."""
    ids, layout = ids_for(scales), layout_of(scales)
    model.factorization = order or model.factorization
    with torch.no_grad():
        packed = -model.losses(model.canvas({"token": ids}, layout=layout), labels(3)).sum(1)
    forced = Forced(ids)
    generate(Target(model, labels(3)), model.blank(3, layout=layout), SampleAll(), random=forced)
    return float((packed - forced.log_prob).abs().max())


@pytest.mark.parametrize("scales", [drawn_scales((1, 2, 3, 4, 6), torch.Generator().manual_seed(i)) for i in (3, 4)])
def test_one_pass_is_step_by_step_for_drawn_scales(scales):
    assert gap(tiny(), scales) < 1e-9


def test_one_pass_is_step_by_step_for_maps_of_other_forms():
    assert gap(tiny(), (1, (2, 3), (4, 6))) < 1e-9


class Later(PyramidEmbed):
    """Wrong on purpose: in decoding, scales are counted from the one at work."""

    def forward(self, canvas, plan, guess=None, prefix=None):
        x = super().forward(canvas, plan, guess, prefix)
        scale = plan.slots.coord[..., :1]
        return x + torch.cat([scale - scale.min(), torch.zeros(*scale.shape[:2], x.shape[2] - 1)], 2)


def test_a_feed_that_knows_its_pass_is_found():
    model = tiny()
    model.embed.__class__ = Later
    assert gap(model, (1, 2, 3)) > 1e-3


@pytest.mark.parametrize("scales", [(1, 2, 3, 5), (1, 2, 4)])
def test_pyramids_that_begin_alike_are_drawn_alike(scales):
    """Lists of scales give the same samples up to the first size in which they differ."""
    model = tiny()

    def drawn(layout):
        canvas = model.blank(4, layout=layout)
        return generate(Target(model, labels(4)), canvas, SampleAll(), random=Keyed(3)).value["token"]

    one, other = drawn(layout_of((1, 2, 3, 4))), drawn(layout_of(scales))
    same = 14 if 3 in scales else 5
    assert torch.equal(one[:, :same], other[:, :same])


# ---- the system ------------------------------------------------------------------------------------------------------


def test_training_draws_scales_and_evaluation_takes_its_own():
    made = system(24, (1, 2, 3, 4, 6))
    batch = {"image": pictures(8, 24), "label": torch.arange(8) % 3}
    counts = {int(made.train().losses(batch, Generator(i), 0.1)[1]) // 8 for i in range(12)}
    assert len(counts) > 2 and max(counts) <= 66
    assert int(made.eval().losses(batch, Generator(0), 0.0)[1]) == 8 * 66
    one, other = (float(made.train().losses(batch, Generator(5), 0.1)[0].detach()) for _ in range(2))
    assert one == other


def test_fresh_weights_learn_on_any_scales():
    """Pictures of one code everywhere: after 40 steps, scales that were never met in training are predicted, too."""
    torch.manual_seed(0)
    c = flexvar.Config((1, 2, 3), vocab=4, dim=3, grid=4, classes=1, width=24, depth=1, heads=2, dropout=0.0)
    model = flexvar.build(c)

    def draw(n, generator, scales=(1, 2, 4)):
        layout = layout_of(scales)
        ids = torch.randint(4, (n, 1), generator=generator).expand(-1, layout.size)
        return model.canvas({"token": ids}, layout=layout), {"class": torch.zeros(n, dtype=torch.long)}

    fit(model, draw, Recipe(40, 32, 1e-2, weight_decay=0.0))
    canvas, condition = draw(32, torch.Generator().manual_seed(9), (1, 3, 5))
    with torch.no_grad():
        losses = model.losses(canvas, condition)
    assert float(losses[:, 1:].mean()) < 0.2 < 1.0 < float(losses[:, 0].mean())


@pytest.mark.parametrize(
    ("sampling", "size", "forwards"),
    [
        (Sampling(), (16, 16), 4),
        (Sampling(steps=2), (16, 16), 2),
        (Sampling(size=(24, 8)), (8, 24), 5),
        (Sampling(scales=(1, (2, 3), (2, 5))), (8, 20), 3),
    ],
    ids=str,
)
def test_pictures_of_any_size_with_their_film(sampling, size, forwards):
    made = system()
    out = made.draw(torch.arange(3), sampling=replace(sampling, guidance=1.0), seed=1, film=True)
    again = made.draw(torch.arange(3), sampling=replace(sampling, guidance=1.0), seed=1)
    assert out.images.shape == (3, 1, *size) and torch.equal(out.images, again.images) and out.forwards == forwards
    assert len(out.frames) == forwards and all(frame.shape == out.images.shape for frame in out.frames)
    assert torch.equal(out.frames[-1], out.images)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(size=(15, 16)), "multiples of 4 pixels"),
        (Sampling(scales=(2, 1)), "maps that grow"),
        (Sampling(scales=(1, 2, 2)), "maps that grow"),
        (Sampling(scales=(1, 2), steps=2), "scales say all"),
        (Sampling(steps=9), "1 to 4 sizes"),
    ],
)
def test_impossible_sizes_are_refused(sampling, message):
    with pytest.raises(ValueError, match=message):
        system().draw(torch.arange(1), sampling=sampling)


def test_maps_beyond_the_trained_ones_are_the_likeliest():
    made = system()
    layout = layout_of((1, 2, 5))
    logits = torch.randn(2, 25, 16, generator=torch.Generator().manual_seed(0))
    for begin, n, greedy in ((1, 4, False), (5, 25, True)):
        element = torch.arange(begin, begin + n)[None]
        dist = Categorical(logits[:, :n])
        step = made.decider(Sampling()).decide(
            made.model.blank(2, layout=layout), None, Rows(dist, element, torch.zeros(0)), Keyed(0)
        )
        (edit,) = step.edits
        assert isinstance(edit, Set) and torch.equal(edit.value, dist.mode()) == greedy


def test_linear_guidance_reaches_its_weight_at_the_last_scale():
    """w k / (K - 1), as the released code up to ten scales."""
    model, seen = tiny(), []

    class Watched(Guidance):
        def weight(self, progress):
            seen.append(progress)
            return super().weight(progress)

    canvas = model.blank(2, layout=layout_of((1, 2, 3, 4, 5)))
    generate(Target(model, labels(2), Watched(2.0, "linear")), canvas, SampleAll(), random=Keyed(0))
    assert seen == [k / 4 for k in range(5)]


def test_what_follows_from_the_tokenizer():
    tokenizer = FlexTokenizer(FlexConfig(side=8, halvings=1, scales=(1, 2, 4), vocab=12, dim=5, width=8))
    data = SimpleNamespace(classes=("a",) * 10)
    known = flexvar.FlexVAR.known(tokenizer, data)
    assert known == {"vocab": 12, "classes": 10, "scales": (1, 2, 4), "dim": 5}
    with pytest.raises(ValueError, match="maps of any size"):
        flexvar.FlexVAR.known(MultiScaleTokenizer(MultiScaleConfig(width=8)), data)


def pixels(keep):
    """Places of 4 x 4 pixels."""
    return keep.repeat_interleave(4, 0).repeat_interleave(4, 1)


# ---- known parts -----------------------------------------------------------------------------------------------------


def test_kept_places_follow_the_map_at_every_scale():
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:, :2] = True
    got = kept(keep, ((1, 1), (2, 2), (4, 4)))
    assert got[0] and got[1:5].view(2, 2).tolist() == [[True, False]] * 2
    assert torch.equal(got[5:].view(4, 4), keep)


def test_kept_parts_stay_and_the_rest_is_drawn_anew():
    made, x = system(), pictures()
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:2] = True
    seen = []
    made.finished = lambda canvas, finish=made.finished: (seen.append(canvas.value["token"]), finish(canvas))[1]
    for seed in (0, 1):
        out = made.repaint(x, pixels(keep), torch.arange(3), seed=seed).images
        assert torch.equal(out[..., :8, :], x[..., :8, :]) and not torch.equal(out, x)
    true = made.elements(x, made.model.layout)
    known = kept(keep, shapes_of(made.model.layout))
    assert torch.equal(seen[0][:, known], true[:, known]) and torch.equal(seen[1][:, known], true[:, known])
    assert not torch.equal(seen[0][:, ~known], seen[1][:, ~known])


def test_a_picture_is_taken_up_from_a_scale():
    made, x = system(), pictures()
    whole = made.refine(x, 4, torch.arange(3))
    assert torch.equal(whole.images, made.tokenizer.decode(made.tokenizer.encode(x))) and whole.forwards == 0
    assert made.refine(x, 2, torch.arange(3)).forwards == 2
    with pytest.raises(ValueError, match="are to be kept"):
        made.refine(x, 5)


def test_outpainting_takes_a_picture_of_another_form():
    made, s = system(), Sampling(size=(24, 16))
    keep = torch.zeros(4, 6, dtype=torch.bool)
    keep[:, 1:5] = True
    canvas = torch.zeros(2, 1, 16, 24)
    canvas[..., 4:20] = pictures(2)
    made = made.repaint(canvas, pixels(keep), torch.arange(2), sampling=s)
    assert made.images.shape == (2, 1, 16, 24) and torch.equal(made.images[..., 4:20], canvas[..., 4:20])


# ---- the claim -------------------------------------------------------------------------------------------------------


def test_a_system_of_the_residual_pyramid_without_a_scale():
    """Its sum is that of the other scales, its places and phis are theirs."""
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(MultiScaleConfig(scales=(1, 2, 3, 4), vocab=8, dim=4, width=8)).eval()
    c = var.Config(tokenizer.config, classes=3, width=16, depth=2, heads=2, dropout=0.0)
    whole = var.VAR(c, tokenizer).eval()
    less = without_scale(whole, 1)
    q, r = whole.tokenizer.quantizer, less.tokenizer.quantizer
    assert q.scales == (1, 2, 3, 4) and r.scales == (1, 3, 4)
    ids = ids_for((1, 3, 4), 8)
    parts = [q.contribution(part, k) for part, k in zip(ids.split([1, 9, 16], 1), (0, 2, 3), strict=True)]
    torch.testing.assert_close(r.decode_latent(ids), sum(parts))
    assert torch.equal(less.model.embed.position, whole.model.embed.position[[0, *range(5, 30)]])
    assert torch.equal(less.model.embed.scale, whole.model.embed.scale[[0, 2, 3]])
    assert less.draw(torch.arange(2)).forwards == 3
    with pytest.raises(ValueError, match="all but the last"):
        r.skip(2)


def test_the_claims_measure(tmp_path, monkeypatch):
    """FD-s of 100, 200 and 50 for all scales and for each inner one skipped: the cost is the geometric mean, 1."""
    said = []

    def measured(system, data, sampling, seed, samples):
        said.append((sampling.scales, seed))
        return {"fd_s": {None: 100.0, (1, 3, 4): 200.0, (1, 2, 4): 50.0}[sampling.scales]}

    monkeypatch.setattr(pyramid_trials, "fd_s", measured)
    save_json({"recipe": {"seed": 7}}, tmp_path / "run.json")
    figures = skipping(SimpleNamespace(system=system(), data=None, folder=tmp_path))
    assert figures == {"fd_s": 100.0, "fd_s_without_2": 200.0, "fd_s_without_3": 50.0, "skip_ratio": pytest.approx(1)}
    assert {seed for _, seed in said} == {7}


def test_all_scales_see_the_coarser_ones():
    model = tiny()
    plan = model.factorization.packed(model.blank(1))
    assert isinstance(plan, Plan) and isinstance(model.factorization, Scales)
    assert int(plan.views["all"].mask().sum()) == 1 + 4 * 5 + 9 * 14


@pytest.mark.parametrize("given", [(5, 0, 1), (3, 7, 14), (0, 14, 5)], ids=str)
def test_rows_may_know_different_parts(given):
    """Whole scales given in one row only: rows are at different scales then, and still one pass is step by step."""
    model, ids = tiny(), ids_for((1, 2, 3))
    known = torch.arange(14) < torch.tensor(given)[:, None]
    with torch.no_grad():
        packed = -model.losses(model.canvas({"token": ids}, known), labels(3)).sum(1)
    forced = Forced(ids)
    canvas = model.canvas({"token": torch.where(known, ids, 0)}, known)
    generate(Target(model, labels(3)), canvas, SampleAll(), random=forced)
    torch.testing.assert_close(forced.log_prob, packed, rtol=0, atol=1e-9)
