"""Probe `far` (FAR, Gu et al. 2025): lifetimes and two resolutions.

Frames one after another, all of a frame at once (here from masks; FAR denoises them). The last `window` frames, the one
in the making included, are seen at full resolution; when a frame leaves the window its slots die, and coarse slots of
its own, each of a whole patch, are born in their place.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed, gather_values
from seriatim.factorization.base import Factorization
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, randomise
from seriatim.laws.laws import LAWS, Broken
from seriatim.layout import grid
from seriatim.model import Model
from seriatim.plan import DERIVED, MASK, VALUE, OrderError, Plan, Reads, Slots
from seriatim.random import Forced, Keyed
from seriatim.view import INF, NEVER, TIMED, timed

VOCAB, WIDTH = 2, 16

# ---- the composition -------------------------------------------------------------------------------------------------


class TwoResolutions(Factorization):
    """Slots: a query in place of each element, its value, and one coarse slot a patch of every frame that leaves the
    window in time to be seen. A coarse slot sees coarse slots only."""

    def __init__(self, window, patch):
        self.window, self.patch = window, torch.tensor([1, *patch])

    def order(self, layout, random=None):
        return layout.coord[:, 0][None]

    def packed(self, canvas):
        layout, rank = canvas.layout, canvas.rank
        n, frame = layout.size, layout.coord[:, 0]
        patches, mine = (layout.coord // self.patch).unique(dim=0, return_inverse=True)
        members = mine.argsort(stable=True).view(len(patches), -1)
        old = patches[:, 0] + self.window <= int(frame.max())
        patches, members = patches[old] * self.patch, members[old]
        single = nn.functional.pad(torch.arange(n)[:, None], (0, members.shape[1] - 1), value=-1)
        source = torch.tensor([MASK] * n + [VALUE] * n + [DERIVED] * len(members))
        at = torch.cat([2 * frame, 2 * frame + 1, 2 * (patches[:, 0] + self.window)])
        dies = torch.cat([2 * frame + 1, 2 * (frame + self.window), torch.full_like(patches[:, 0], INF)])
        view = timed(at, at, dies, group=source == DERIVED, relation=[[TIMED, TIMED], [NEVER, TIMED]])
        needs = torch.cat([torch.full_like(rank, -1), rank, rank[:, members].amax(2)], 1)
        coord = torch.cat([layout.coord, layout.coord, patches])
        slots = Slots(torch.cat([single, single, members])[None], source[None], coord[None], needs)
        read = torch.where(rank >= 0, torch.arange(n), -1)
        return Plan(slots, {"all": view}, Reads(read, read), rank, layout=layout)


class TwoEmbed(TokenEmbed):
    """Coarse slots have an embedding of their own: a table for each place in the patch."""

    def __init__(self, vocab, width, places):
        super().__init__(vocab, width, mask=True, start=False)
        self.coarse = nn.Parameter(torch.randn(places, vocab, width))

    def forward(self, canvas, plan, guess=None, prefix=None):
        ids = gather_values(canvas, plan.slots.element, self.kind)
        coarse = self.coarse[torch.arange(ids.shape[2]), ids].sum(2)
        fine = super().forward(canvas, plan, guess, prefix)
        return torch.where((plan.slots.source == DERIVED)[..., None], coarse, fine)


def far(frames, side, window, patch, order=TwoResolutions, depth=2):
    backbone = Transformer(TransformerConfig(WIDTH, depth, 2, rope=RoPE(axes=(4, 2, 2))))
    embed = TwoEmbed(VOCAB, WIDTH, patch[0] * patch[1])
    return Model(grid(frames, *side), order(window, patch), embed, backbone, CategoricalHead(WIDTH, VOCAB))


# ---- laws ------------------------------------------------------------------------------------------------------------


def case(order=TwoResolutions, given=0, frames=5):
    """Frames of two elements, a window of two frames: three of five frames leave it in time to be seen coarsely."""
    return Case(randomise(far(frames, (1, 2), 2, (1, 2), order)), VOCAB, given)


@pytest.mark.parametrize("given", [0, 6], ids=["nothing given", "three frames given"])
@pytest.mark.parametrize("number", [1, 3, 5, 6, 7, 9, 10, 11])
def test_law(number, given):
    LAWS[number][1](case(given=given))


def test_law_2_the_decoder_and_one_pass_agree_on_all_that_can_follow():
    LAWS[2][1](case(given=6))


def test_probabilities_of_all_clips_sum_to_one():
    model = case().model
    x = torch.tensor(list(itertools.product(range(VOCAB), repeat=10)))
    with torch.no_grad():
        total = model.log_prob(model.canvas({"token": x})).exp().sum()
    assert abs(float(total) - 1) < 1e-12


class BornTooEarly(TwoResolutions):
    """Coarse slots are seen by the queries of their own frame."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        view = plan.views["all"]
        born = torch.where(view.group == 1, view.born - 2 * self.window, view.born)
        return replace(plan, views={"all": replace(view, born=born)})


class BornTooEarlyDenied(BornTooEarly):
    """The same, and the labels deny that coarse slots hold anything."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        needs = torch.where(plan.slots.source == DERIVED, -1, plan.slots.needs)
        return replace(plan, slots=replace(plan.slots, needs=needs))


class EvictsTooEarly(TwoResolutions):
    """After each step one more entry than is dead is dropped."""

    def step(self, canvas, guess, cached):
        plan = super().step(canvas, guess, cached)
        if plan is None or plan.retain is None or plan.retain.shape[1] == 0:
            return plan
        return replace(plan, retain=plan.retain[:, 1:])


def test_a_coarse_slot_born_too_early_is_found_by_its_labels():
    with pytest.raises(OrderError, match="sees element"):
        LAWS[3][1](case(BornTooEarly))


@pytest.mark.parametrize("number", [1, 3])
def test_a_coarse_slot_born_too_early_is_found_though_its_labels_deny_it(number):
    with pytest.raises(Broken):
        LAWS[number][1](case(BornTooEarlyDenied))


@pytest.mark.parametrize("number", [1, 5])
def test_an_entry_that_dies_too_early_is_found(number):
    with pytest.raises((Broken, OrderError)):
        LAWS[number][1](case(EvictsTooEarly))


# ---- what the sheet says ---------------------------------------------------------------------------------------------


def packed(model, x):
    return model.factorization.packed(model.canvas({"token": x}))


def zeros(model, batch=1):
    return torch.zeros(batch, model.layout.size, dtype=torch.long)


def test_who_sees_whom():
    """A frame sees itself, the frames of its window finely, all before them coarsely."""
    model = far(6, (2, 2), 3, (2, 2))
    plan = packed(model, zeros(model))
    mask = plan.views["all"].mask()[0]
    frame, kind = plan.slots.coord[0, :, 0].tolist(), plan.slots.source[0].tolist()
    for q, k in itertools.product(range(plan.size), repeat=2):
        f, g = frame[q], frame[k]
        if kind[q] == DERIVED:
            expected = kind[k] == DERIVED and g <= f
        elif kind[k] == DERIVED:
            expected = g + 3 <= f
        elif kind[k] == MASK:
            expected = kind[q] == MASK and g == f
        else:
            expected = f - 3 < g < f + (kind[q] == VALUE)
        assert bool(mask[q, k]) == expected, (q, k)


def test_one_frame_is_predicted_in_one_shot():
    """It equals the first forward of masked generation: everybody sees everybody."""
    model = randomise(far(1, (2, 2), 2, (2, 2)))
    masked = Model(model.layout, AnyOrder(), model.embed, model.backbone, model.heads["token"])
    first = [
        m.dist(m.hidden(plan, canvas), plan, canvas)[0].logits
        for m in (model, masked)
        for canvas in [m.blank(1)]
        for plan in [m.factorization.step(canvas, None, 0)]
    ]
    assert torch.allclose(*first, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_clip_within_the_window_is_the_short_version_to_the_last_bit(frames):
    """Frame by frame at full resolution, as blocks."""
    model = randomise(far(frames, (2, 2), 3, (2, 2)))
    short = Model(model.layout, Blocks(4), model.embed, model.backbone, model.heads["token"])
    x = torch.randint(VOCAB, (4, model.layout.size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(*(m.losses(m.canvas({"token": x})) for m in (model, short)))


def test_a_longer_clip_is_not_the_short_version():
    model = randomise(far(4, (2, 2), 3, (2, 2)))
    short = Model(model.layout, Blocks(4), model.embed, model.backbone, model.heads["token"])
    x = torch.randint(VOCAB, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (m.losses(m.canvas({"token": x})) for m in (model, short))
    assert torch.allclose(a[:, :12], b[:, :12], rtol=0, atol=1e-12)
    assert (a[:, 12:] - b[:, 12:]).abs().min() > 1e-6


def test_beyond_the_window_a_frame_is_known_by_its_coarse_slots_only():
    """In one layer (in more, frames pass on what they saw), with coarse slots that carry nothing: an edit of frame g
    reaches the frames of its window and no others. With coarse slots that carry it, it reaches all later frames."""
    model = randomise(far(6, (1, 2), 3, (1, 2), depth=1))
    x = torch.randint(VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))

    def reached(g):
        y = x.clone()
        y[0, 2 * g] = 1 - y[0, 2 * g]
        with torch.no_grad():
            h = [model.hidden(packed(model, v), model.canvas({"token": v}))[0, :12] for v in (x, y)]
        return [f for f in range(6) if not torch.equal(h[0][2 * f : 2 * f + 2], h[1][2 * f : 2 * f + 2])]

    assert [reached(g) for g in range(6)] == [[1, 2, 3, 4, 5], [2, 3, 4, 5], [3, 4, 5], [4, 5], [5], []]
    with torch.no_grad():
        model.embed.coarse.zero_()
    assert [reached(g) for g in range(6)] == [[1, 2], [2, 3], [3, 4], [4, 5], [5], []]


def test_the_coarse_embedding_learns_from_frames_behind_the_window_only():
    model = randomise(far(5, (2, 2), 2, (2, 2)))
    x = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    losses = model.losses(model.canvas({"token": x})).sum(0).view(5, 4).sum(1)
    grown = [torch.autograd.grad(loss, model.embed.coarse, retain_graph=True)[0].abs().sum() > 0 for loss in losses]
    assert [bool(g) for g in grown] == [False, False, True, True, True]


def test_forty_frames_with_the_two_level_cache_equal_recomputation():
    model = randomise(far(40, (1, 2), 3, (1, 2)))
    x = torch.randint(VOCAB, (2, 80), generator=torch.Generator().manual_seed(0))
    met = []
    for cached in (True, False):
        forced = Forced(x)
        generate(Target(model, cached=cached), model.blank(2), SampleAll(), random=forced)
        met.append(torch.stack([forced.met[e] for e in range(80)]))
    assert torch.allclose(*met, rtol=0, atol=1e-9)


def test_rows_with_different_contexts_decode_as_they_train():
    """Each row continues another number of given frames: its entries die and are born at steps of their own."""
    model = randomise(far(6, (1, 2), 2, (1, 2)))
    x = torch.randint(VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    known = torch.arange(12) < torch.tensor([[0], [2], [6], [9]])
    with torch.no_grad():
        log_p = model.log_prob(model.canvas({"token": x}, known))
    for cached in (True, False):
        forced = Forced(x)
        canvas = model.canvas({"token": torch.where(known, x, 0)}, known)
        generate(Target(model, cached=cached), canvas, SampleAll(), random=forced)
        assert torch.allclose(forced.log_prob, log_p, rtol=0, atol=1e-9)


def test_the_cache_holds_the_window_finely_and_the_rest_coarsely():
    """While frame f is made, the window's f - w + 1 .. f - 1 are held finely; the finished ones are held coarsely as
    soon as they are known, if there will ever be somebody to see them."""
    frames, window, fine, coarse = 9, 3, 4, 1
    model = far(frames, (2, 2), window, (2, 2)).double().eval()
    target, canvas, held = Target(model), model.blank(2), []
    for _ in decode(target, canvas, SampleAll(), random=Keyed(0)):
        held.append(target.cache.columns)
    expected = [fine * min(f, window - 1) + coarse * min(f, frames - window) for f in range(frames)]
    assert held == [*expected[:-1], 0]
    assert max(held) < fine * (frames - 1)  # less than all frames at full resolution
