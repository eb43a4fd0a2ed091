"""Hi-MAR: what the two phases know of each other, how they are drawn, and the map that is denoised as a whole."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from seriatim.canvas import Canvas, EditError, Remember, Set
from seriatim.data.digits import digits
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.nested import Nested
from seriatim.decoding.remembered import Remembered
from seriatim.decoding.sample import schedule
from seriatim.decoding.target import Target
from seriatim.heads.by_level import ByLevel
from seriatim.heads.diffusion import process
from seriatim.heads.diffusion_map import MapDiffusionConfig, MapDiffusionHead
from seriatim.laws.case import randomise
from seriatim.layout import grid, line
from seriatim.maps import area_down
from seriatim.noise import NOISES
from seriatim.objectives.masked import ByShare
from seriatim.plan import MASK, OrderError, Reads
from seriatim.random import Generator, Key, Keyed
from seriatim.systems.image import hi_mar
from seriatim.systems.system import Sampling
from seriatim.tokenizers.kl import KLConfig, KLTokenizer
from seriatim.tokenizers.patches import PatchConfig, PatchTokenizer

TINY = hi_mar.Config(
    width=16, depth=2, heads=2, dropout=0.0, head_width=16, head_depth=1, head_steps=3, map_width=16, map_depth=1,
    map_steps=3, pivot_steps=3,
)  # fmt: skip
PIVOTS, FINE = torch.arange(4), torch.arange(4, 20)
ALL = torch.arange(20)


def model_of(**changes):
    return randomise(hi_mar.build(replace(TINY, **changes)), std=0.3)


def values(n, seed=0):
    return torch.randn(n, 20, 4, generator=torch.Generator().manual_seed(seed)).double()


def labels(n):
    return {"class": torch.arange(n) % 10}


def steps(coarse=3, fine=4):
    return Remembered(Nested((coarse, fine), rule="random"))


def known(model, x, which, memo=None):
    """Samples of which some elements are given, and the pivots decided, from states."""
    given = torch.isin(ALL, torch.as_tensor(which))
    canvas = model.canvas({"token": x}, given[None])
    if memo is not None:
        canvas.apply([Set(x[:, :4], PIVOTS.expand(len(x), -1)), Remember(PIVOTS.expand(len(x), -1), memo)])
    return canvas


def states(model, plan, canvas):
    with torch.no_grad():
        return model.hidden(plan, canvas, None, model.encode(labels(canvas.batch)))


# ---- the two phases --------------------------------------------------------------------------------------------------


def test_at_first_both_phases_are_one_function():
    """With places and masks tied, the same slots have the same states, until the phases have learned to differ."""
    model, x = model_of(), values(2)
    with torch.no_grad():
        for table in (model.embed.position, model.embed.mask):
            table[4:8] = table[:4]
        model.clock.phase.copy_(hi_mar.PhaseClock(16).phase)
    canvas = known(model, x, [1, 2])
    plan = model.factorization.coarse(canvas)
    before = states(model, plan, canvas)
    assert torch.equal(before, states(model, replace(plan, phase=1), canvas))
    with torch.no_grad():
        model.clock.phase[1] += 0.1
    assert (before - states(model, replace(plan, phase=1), canvas)).abs().max() > 1e-3


def test_pivots_that_are_not_told_are_nothing_to_the_fine_phase():
    model, x, memo = model_of(), values(2), torch.randn(2, 4, 16, dtype=torch.float64)
    other = x.clone()
    other[:, :4] += 1.0

    def fine(x, memo=None, which=(5, 9)):
        canvas = known(model, x, which, memo)
        return states(model, model.factorization.fine(canvas), canvas)

    masked = fine(x)
    assert torch.equal(masked, fine(other))
    assert torch.equal(masked, fine(other, which=(0, 1, 2, 3, 5, 9)))  # given ones have no states
    assert torch.equal(fine(x, memo), fine(other, memo))
    assert (fine(x, memo) - fine(x, memo + 1)).abs().amax((0, 2)).min() > 1e-6
    assert (fine(x, memo) - masked).abs().max() > 1e-3


def test_pivots_know_nothing_of_fine_elements():
    model, x = model_of(), values(2)
    other = x.clone()
    other[:, 4:] += 1.0
    canvases = [known(model, y, [1, 7]) for y in (x, other)]
    a, b = (states(model, model.factorization.step(c, None, 0), c) for c in canvases)
    assert a.shape[1] == 4 and torch.equal(a, b)


def test_values_are_told_where_states_are_not():
    model, x = model_of(told="values"), values(2)
    other = x.clone()
    other[:, 2] += 1.0
    canvases = [known(model, y, [0, 1, 2, 3, 6]) for y in (x, other)]
    a, b = (states(model, model.factorization.fine(c), c) for c in canvases)
    assert (a - b).abs().amax((0, 2)).min() > 1e-6


def test_no_gradient_flows_back_into_the_states_of_pivots():
    model, x = model_of(), values(8)
    model.train()
    hidden = torch.rand(8, 20, generator=torch.Generator().manual_seed(1)) < 0.7
    losses = model.hidden_losses(model.canvas({"token": x}), hidden, labels(8), random=Generator(0))
    losses[:, 4:].sum().backward(retain_graph=True)
    mask, head = model.embed.mask, model.heads["token"]
    assert float(mask.grad[:4].abs().max()) == 0 and float(mask.grad[8:].abs().max()) > 0
    assert all(p.grad is None or not bool(p.grad.any()) for p in head.coarse.parameters())
    assert float(model.embed.state.weight.grad.abs().max()) > 0  # what is told is learned
    losses[:, :4].sum().backward()
    assert float(mask.grad[:4].abs().max()) > 0


def test_training_tells_the_states_of_hidden_pivots_only_and_of_so_many_rows():
    model, x = model_of(), values(400)
    canvas, hidden = model.canvas({"token": x}), (ALL % 2 == 0).expand(400, -1)
    h = torch.randn(400, 4, 16, dtype=torch.float64)
    model.train()
    model.told = 0.3
    second = model.second(canvas, hidden, h, Generator(0))
    told = (second.memo != 0).any(2)
    assert not bool(told[:, ALL % 2 == 1].any()) and torch.equal(told[:, 0], told[:, 2])
    assert 70 < int(told[:, 0].sum()) < 170  # 120, four deviations
    assert torch.equal(second.memo[told[:, 0]][:, 2], h[told[:, 0]][:, 2])
    source = model.factorization.fine(second).slots.source
    assert torch.equal((source[:, :4] == MASK), ~told[:, :4])
    model.eval()
    assert bool((model.second(canvas, hidden, h, Generator(0)).memo[:, 0] != 0).all())


def test_the_share_of_rows_that_are_told_grows():
    system = system_of(config=replace(TINY, rate=0.4)).train()
    batch = {"image": torch.zeros(2, 1, 8, 8), "label": torch.zeros(2, dtype=torch.long)}
    for step, want in ((0, 0.0), (5, 0.2), (10, 0.4), (79, 0.4)):
        system(batch, Generator(0), step, 80)
        assert abs(system.model.told - want) < 1e-9


def test_losses_are_weighed_as_released():
    """The sum over elements is that of 64/320 * 2 * mean of hidden pivots and 256/320 * 0.75 * mean of all fine ones,
    times the number of elements."""
    model = model_of().train()
    canvas = model.canvas({"token": values(16)})
    hidden, weight = model.drawn(canvas, Generator(3))
    losses = model.hidden_losses(canvas, hidden, labels(16), random=Generator(4))
    pivots = (losses[:, :4] * hidden[:, :4]).sum(1) / hidden[:, :4].sum(1)
    want = 20 * (0.2 * 2 * pivots + 0.8 * 0.75 * losses[:, 4:].mean(1))
    assert ((losses * weight).sum(1) / want - 1).abs().max() < 1e-6  # weights are float32
    assert bool((hidden[:, :4].sum(1) >= 3).all()) and bool(hidden[:, 4:].any(1).all())


def test_a_share_of_a_schedule_is_hidden():
    unit = (torch.arange(400) + 0.5) / 400
    hidden, weight = ByShare(NOISES["cosine"])(torch.ones(400, 16, dtype=torch.bool), unit, torch.rand(400, 16))
    want = (16 * torch.sin(torch.pi / 2 * unit.double())).ceil()
    assert torch.equal(hidden.sum(1).double(), want) and torch.allclose(weight.double(), 16 / want)


# ---- decoding --------------------------------------------------------------------------------------------------------


def test_each_phase_follows_its_schedule_and_decides_everything_once():
    model = model_of()
    canvas, counts, before = model.blank(3), [], torch.zeros(3, 20, dtype=torch.bool)
    for _ in decode(Target(model, labels(3), Guidance(1.0, "linear")), canvas, steps(3, 4), random=Keyed(0)):
        assert not bool((before & ~canvas.known).any())
        counts.append((canvas.known & ~before).sum(1).tolist())
        before = canvas.known.clone()
    left = [(4, *schedule(4, 3, "cosine")), (16, *schedule(16, 4, "cosine"))]
    want = [a - b for remain in left for a, b in itertools.pairwise(remain)]
    assert counts == [[n] * 3 for n in want] and canvas.done and sum(want) == 20


def test_guidance_grows_within_each_phase():
    model, met = model_of(), []
    target, canvas, decider = Target(model, labels(2), Guidance(1.0, "linear")), model.blank(2), steps(4, 4)
    with torch.inference_mode():
        while (plan := target.plan(canvas)) is not None:
            met.append((plan.phase, float(plan.progress[0, 0])))
            step = decider.decide(canvas, None, target.forward(plan, canvas), Keyed(0))
            canvas.apply(step.edits)
            target.commit(step.keep, plan)
    for phase, total in ((0, 4), (1, 16)):
        left = (total, *schedule(total, 4, "cosine"))[:-1]
        assert [share for k, share in met if k == phase] == [(total - n) / (total - 1) for n in left]


def test_guidance_of_nothing_is_the_conditional_law():
    model = model_of()
    drawn = [
        generate(Target(model, labels(2), g), model.blank(2), steps(), random=Keyed(3)).value["token"]
        for g in (None, Guidance(0.0), Guidance(2.0))
    ]
    assert (drawn[0] - drawn[1]).abs().max() < 1e-5
    assert (drawn[0] - drawn[2]).abs().max() > 1e-2


def test_both_branches_of_the_fine_phase_are_told_the_states_of_the_conditional_one():
    model = model_of()
    target, canvas = Target(model, labels(2), Guidance(1.0)), model.blank(2)
    with torch.inference_mode():
        plan = target.plan(canvas)
        rows = target.forward(plan, canvas)
        canvas.apply(Remembered(Nested((1, 4), rule="random")).decide(canvas, None, rows, Keyed(0)).edits)
        plain = states(model, model.factorization.coarse(model.blank(2)), model.blank(2))
    assert (canvas.memo[:, :4] - plain).abs().max() < 1e-6


def test_given_parts_stay_and_rows_do_not_depend_on_company():
    model, x = model_of(), values(3)
    which = torch.isin(ALL, torch.tensor([1, 4, 11]))

    def draw(rows):
        canvas = model.canvas({"token": x[rows]}, which[None], row=torch.tensor(rows))
        return generate(Target(model, {"class": torch.tensor(rows)}), canvas, steps(), random=Keyed(5)).value["token"]

    together = draw([0, 1, 2])
    assert torch.equal(together[:, which], x[:, which])
    assert (draw([2, 0]) - together[[2, 0]]).abs().max() < 1e-5


def test_drafts_are_refused():
    model = model_of()
    with pytest.raises(OrderError, match="no drafts"):
        model.factorization.step(model.blank(1), object(), 0)


# ---- the map head ----------------------------------------------------------------------------------------------------


def head_of(**changes):
    config = MapDiffusionConfig(16, 2, heads=2, steps=3, **changes)
    return randomise(MapDiffusionHead(12, 3, grid(2, 3), torch.arange(6), config), std=0.3)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def jacobian(head, x, h):
    """Which places of a map what is said of each depends on."""
    told = head.net.told(h, head.plan)
    whole = torch.autograd.functional.jacobian(lambda x: head.net(x, 0.4, told, head.plan), x)
    return whole[0, :, :, 0].abs().amax((1, 3)) > 1e-9


def test_without_attention_the_map_head_acts_place_by_place():
    head, x, h = head_of(), draw(1, 6, 3), draw(1, 6, 12, seed=1)
    assert bool(jacobian(head, x, h).all())
    with torch.no_grad():
        for layer in head.net.transformer.layers:
            layer.out.zero_()
        assert torch.equal(jacobian(head, x, h), torch.eye(6, dtype=torch.bool))
        turn = torch.tensor([3, 1, 5, 0, 2, 4])
        said = head.net(x, 0.4, head.net.told(h, head.plan), head.plan)[:, turn]
        again = head.net(x[:, turn], 0.4, head.net.told(h[:, turn], head.plan), head.plan)
    assert (said - again).abs().max() < 1e-12


def test_part_of_a_map_is_that_part_of_the_whole_and_each_step_draws_anew():
    head, h = head_of(), draw(2, 6, 12)
    reads, row = Reads(torch.arange(6)[None], torch.arange(6)[None]), torch.arange(2)
    canvas = Canvas(grid(2, 3), {"token": torch.zeros(2, 6, 3)})
    dist, key = head.dist(h, reads, canvas), Key(row, torch.arange(6)[None])
    whole, pick = dist.sample(Keyed(0), key), torch.tensor([[4, 1], [0, 5]])
    part = dist.take(pick).sample(Keyed(0), Key(row, pick))
    assert torch.equal(part, whole.gather(1, pick[..., None].expand(-1, -1, 3)))
    again = dist.take(pick).take(torch.tensor([[1], [0]])).sample(Keyed(0), key)
    assert torch.equal(again, part[torch.arange(2)[:, None], torch.tensor([[1], [0]])])
    canvas.apply([Set(torch.zeros(2, 1, 3), torch.tensor([[4], [0]]))])
    later = head.dist(h, reads, canvas).sample(Keyed(0), key)
    assert (later - whole).abs().amax(2).min() > 1e-3


def test_the_loss_of_a_map_is_the_error_of_its_noise_at_one_step():
    head, h, x = head_of(), draw(3, 6, 12), draw(3, 6, 3, seed=1)
    key = Key(torch.arange(3), torch.arange(6)[None])
    with torch.no_grad():
        loss = head.loss(h, None, x, Keyed(2), key)
        step = (Keyed(2).uniform((3, 6), key)[:, :1] * 1000).long()
        noise = Keyed(2).normal((3, 6, 3), key._replace(draw=4)).double()
        signal = process(1000, 1000).signal[step][..., None]
        noisy = signal.sqrt() * x + (1 - signal).sqrt() * noise
        said = head.net(noisy, (step / 1000).double().expand(-1, 6), head.net.told(h, head.plan), head.plan)
    assert (loss - (said - noise).square().mean(-1)).abs().max() < 1e-5


def test_the_map_head_refuses_what_it_cannot_do():
    head, h = head_of(), draw(1, 5, 12)
    with pytest.raises(ValueError, match="6 places, and the states of 5"):
        head.loss(h, None, draw(1, 5, 3), Keyed(0), Key(torch.arange(1), torch.arange(5)[None]))
    with pytest.raises(TypeError, match="expectation over noise"):
        head.loss(draw(1, 6, 12), None, draw(1, 6, 3))
    for wrong in ({"draws": 2}, {"learned_variance": True}, {"inject": "beside"}):
        with pytest.raises(ValueError):
            MapDiffusionConfig(**wrong)


def test_a_step_reads_one_level():
    head = model_of().heads["token"]
    assert isinstance(head, ByLevel)
    assert head.at(Reads(PIVOTS[None], PIVOTS[None])) is head.coarse
    assert head.at(Reads(FINE[None], torch.where(FINE > 6, FINE, -1)[None])) is head.fine
    with pytest.raises(ValueError, match="this one both"):
        head.at(Reads(ALL[None], ALL[None]))


# ---- what is remembered ----------------------------------------------------------------------------------------------


def test_memories_follow_their_rows():
    canvas = Canvas(line(3), {"token": torch.zeros(2, 3, dtype=torch.long)}, 1)
    assert canvas.memo is None
    vectors = torch.arange(4.0).view(2, 1, 2)
    canvas.apply([Remember(torch.tensor([[2], [-1]]), vectors)])
    assert canvas.memo[0, 2].tolist() == [0, 1] and float(canvas.memo[1].abs().max()) == 0
    assert torch.equal(canvas.select(torch.tensor([1, 0])).memo, canvas.memo[[1, 0]])
    fresh = Canvas(line(3), {"token": torch.zeros(1, 3, dtype=torch.long)}, 1)
    assert torch.equal(canvas.select(torch.tensor([-1, 0]), fresh).memo[1], canvas.memo[0])
    with pytest.raises(EditError, match="given and cannot be remembered"):
        canvas.apply([Remember(torch.tensor([[0], [2]]), vectors)])
    with pytest.raises(EditError, match="as many vectors"):
        canvas.apply([Remember(torch.tensor([[1], [2]]), vectors.expand(2, 2, 2))])


# ---- the system ------------------------------------------------------------------------------------------------------


def system_of(kind="patches", config=TINY):
    torch.manual_seed(0)
    patches = PatchTokenizer(PatchConfig(side=8, channels=1, patch=2))
    tokenizer = patches if kind == "patches" else KLTokenizer(KLConfig(side=8, dim=3, width=8, halvings=1)).eval()
    system = hi_mar.HiMAR(replace(config, **hi_mar.HiMAR.known(tokenizer, digits())), tokenizer).eval()
    randomise(system.model, std=0.3).float()
    return system


@pytest.mark.parametrize("kind", ["patches", "kl"])
def test_pivots_are_the_small_picture_encoded_by_itself(kind):
    system, batch = system_of(kind), digits().test.take(torch.arange(4))
    canvas, label = system.canvas(batch)
    c, small = system.config, system.halved(8)
    assert canvas.layout.size == 20 and small.side == 4
    want = small.encode(area_down(batch["image"], (4, 4)))
    assert (canvas.value["token"][:, :4] * c.deviation + c.mean - want).abs().max() < 1e-5
    assert bool(torch.isfinite(system.model.losses(canvas, label, random=Generator(0))).all())


def test_a_film_shows_pivots_and_then_what_covers_them():
    system = system_of()
    out = system.draw(torch.tensor([3, 5]), sampling=Sampling(guidance=0.5, steps=4), film=True)
    assert out.images.shape == (2, 1, 8, 8) and out.forwards == 3 + 4 and len(out.frames) == 7
    assert torch.equal(out.frames[-1], out.images)
    pivots = out.frames[2].unfold(2, 2, 2).unfold(3, 2, 2)
    assert (pivots - pivots[..., :1, :1]).abs().max() < 1e-6 and float(pivots.abs().max()) > 0
    covered = (out.frames[3] != out.frames[2]).any(1)
    assert bool(covered.any()) and not bool(covered.all())


def test_known_parts_of_a_picture_stay():
    system, images = system_of(), digits().test.take(torch.arange(2))["image"]
    keep = torch.zeros(8, 8, dtype=torch.bool)
    keep[:4, :6] = True
    known = system.known_elements(keep, system.model.layout)
    assert known[:4].tolist() == [True, False, False, False]
    assert torch.equal(known[4:].view(4, 4), (ALL[:4, None] < 2) & (ALL[:4] < 3))
    out = system.repaint(images, keep, torch.tensor([3, 5]))
    assert torch.equal(out.images[..., keep], images[..., keep]) and not torch.equal(out.images, images)


@pytest.mark.parametrize("wrong", [{"pivots": 3}, {"pivots": 4}, {"head": "mlp"}, {"told": "all"}, {"rate": 2.0}])
def test_sizes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError):
        replace(TINY, **wrong)


class Odd(list):
    """Pictures that are no built-in data."""

    classes, train = ("a",), property(lambda self: self)

    def take(self, index):
        return {"image": torch.stack([self[i] for i in index.tolist()])}


def test_an_odd_grid_cannot_be_halved():
    images = torch.rand(8, 1, 9, 9) * 2 - 1
    with pytest.raises(ValueError, match="hi-mar halves pictures"):
        hi_mar.HiMAR.known(PatchTokenizer(PatchConfig(side=9, channels=1, patch=3)), Odd(images))


def test_every_tensor_is_trained_in_either_form():
    for changes in ({}, {"head": "token"}, {"told": "values"}):
        model = model_of(**changes)
        model.train()
        losses = model.losses(model.canvas({"token": values(16)}), labels(16), random=Generator(1))
        losses.sum().backward()
        idle = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
        assert idle == (["embed.state.weight", "embed.state.bias"] if changes.get("told") else [])
