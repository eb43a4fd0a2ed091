"""M-VAR: who depends on whom by which branch, and what is remembered, beyond the laws that every system obeys."""

from __future__ import annotations

import pytest
import torch

from seriatim.backbones import mamba
from seriatim.backbones.decoupled import OWN, Decoupled, DecoupledConfig
from seriatim.backbones.mamba import MambaConfig
from seriatim.backbones.ssd import ssd_recurrent
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.factorization.static import Scales
from seriatim.plan import OrderError
from seriatim.random import Keyed
from seriatim.systems.image import m_var
from seriatim.systems.image.m_var import silence
from seriatim.tokenizers.multiscale import MultiScaleConfig
from seriatim.view import inclusive

SCALES = (1, 2, 3, 4)
LIST = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # of the paper


def ids_for(case, rows=3, seed=0):
    return case.sample(rows, seed)


def labels(n):
    return {"class": torch.arange(n) % 3}


def influence(model):
    """[q, k]: does what stands in slot k reach what is read at slot q? By the Jacobian of the stack."""
    canvas = model.blank(1)
    plan = model.factorization.packed(canvas)
    condition = model.encode(labels(1))
    x = torch.randn(1, plan.size, model.backbone.width, generator=torch.Generator().manual_seed(2)).double()
    x.requires_grad_(True)
    h = model.backbone(x, plan, None, condition.vector)
    weights = torch.randn(h.shape[2], generator=torch.Generator().manual_seed(3)).double()
    rows = [torch.autograd.grad((h[0, q] * weights).sum(), x, retain_graph=True)[0][0].abs().amax(-1) for q in
            range(plan.size)]  # fmt: skip
    return torch.stack(rows) > 0, plan.slots.coord[0, :, 0]


# ---- who depends on whom ---------------------------------------------------------------------------------------------


def test_a_scale_depends_on_all_of_itself_and_of_coarser_ones_and_on_nothing_finer():
    seen, scale = influence(m_var.case(SCALES).model)
    assert torch.equal(seen, scale[:, None] >= scale)


def test_without_the_state_a_scale_depends_on_itself_alone():
    model = m_var.case(SCALES).model
    silence(model, "mixer.out")
    seen, scale = influence(model)
    assert torch.equal(seen, scale[:, None] == scale)


def test_without_attention_it_is_a_state_that_runs_from_left_to_right():
    model = m_var.case(SCALES).model
    silence(model, "out")
    seen, _ = influence(model)
    assert torch.equal(seen, torch.ones_like(seen).tril())


def test_in_one_layer_earlier_scales_arrive_by_the_state_alone():
    """Attention stands before the mixer: in one layer a place sees its scale, and what the state was given before."""
    c = m_var.Config(MultiScaleConfig(scales=SCALES, vocab=2, dim=3, width=8), 3, 16, 1, 2, 0.0, 4, 8)
    model = m_var.randomise(m_var.build(c))
    seen, scale = influence(model)
    assert torch.equal(seen, scale[:, None] >= scale)
    order = model.factorization.packed(model.blank(1))
    assert int(order.views[OWN].mask().sum()) == sum(n**4 for n in SCALES)
    assert torch.equal(order.views["all"].mask()[0], torch.ones(30, 30).tril().bool())


def test_pairs_of_attention_are_the_papers():
    """110,468 of 462,400 pairs, 23.9%; of those that VAR attends to, 38.6%."""
    own, every = sum(n**4 for n in LIST), sum(n * n for n in LIST) ** 2
    model = m_var.case(LIST).model
    plan = model.factorization.packed(model.blank(1))
    assert int(plan.views[OWN].mask().sum()) == own == 110_468
    assert own / every == pytest.approx(0.239, abs=5e-4)
    assert own / int(Scales().packed(model.blank(1)).views["all"].mask().sum()) == pytest.approx(0.386, abs=5e-4)


def test_attention_over_coarser_scales_is_refused_where_nothing_of_them_is_kept():
    model = m_var.case(SCALES).model
    model.factorization.visibility = {OWN: inclusive, "all": m_var.in_turn}
    model.losses(model.canvas({"token": ids_for(m_var.case(SCALES))}), labels(3))  # in one pass it may be had
    with pytest.raises(OrderError, match="keys and values are not kept"):
        generate(Target(model, labels(2)), model.blank(2), SampleAll(), random=Keyed(0))
    generate(Target(model, labels(2), cached=False), model.blank(2), SampleAll(), random=Keyed(0))


# ---- the state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_a_scan_in_chunks_is_the_recurrence(monkeypatch, chunk):
    case = m_var.case(SCALES)
    x = ids_for(case)
    object.__setattr__(case.model.backbone.config.mixer, "chunk", chunk)
    with torch.no_grad():
        fast = case.total(x)

        def plainly(x, dt, A, B, C, chunk, state, lane):
            return ssd_recurrent(x, dt, A, B, C, state, lane)

        monkeypatch.setattr(mamba, "ssd_chunked", plainly)
        torch.testing.assert_close(fast, case.total(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("guidance", [None, Guidance(1.5, "linear")])
def test_going_on_from_the_state_is_running_over_everything_again(guidance):
    model = m_var.case(SCALES, 5).model

    def drawn(cached):
        target = Target(model, labels(3), guidance, cached=cached)
        return generate(target, model.blank(3), SampleAll(), random=Keyed(1)).value["token"]

    assert torch.equal(drawn(True), drawn(False))


def test_the_cache_is_as_large_after_every_scale_and_for_any_pyramid():
    sizes = []
    for scales in ((1, 2, 3), (1, 2, 3, 4, 5, 6)):
        model = m_var.case(scales).model
        target = Target(model, labels(2))
        held = []
        for _ in decode(target, model.blank(2), SampleAll(), random=Keyed(0)):
            held.append(target.cache.nbytes())
        sizes += held
    c = m_var.case().model.backbone.config.mixer
    assert set(sizes) == {2 * 2 * 8 * (c.channels * 3 + c.inner * c.state)}  # layers, rows, bytes


def test_what_a_condition_says_to_all_three_branches_is_worked_out_once(monkeypatch):
    model, calls = m_var.case(SCALES).model, []
    plain = Decoupled._modulation
    monkeypatch.setattr(Decoupled, "_modulation", lambda self, v: calls.append(1) or plain(self, v))
    generate(Target(model, labels(2)), model.blank(2), SampleAll(), random=Keyed(0))
    assert len(calls) == 1


def test_a_layer_has_nine_parts_of_modulation_and_begins_as_almost_the_identity():
    torch.manual_seed(0)
    c = m_var.Config(MultiScaleConfig(scales=SCALES, vocab=4, dim=3, width=8), width=64, depth=2, heads=2, dropout=0.0)
    model = m_var.build(c)
    layer = model.backbone.layers[0]
    parts = [*layer.ada.chunk(6), *layer.mixer.ada.chunk(3)]
    std = [float(p.detach().std()) / (3 * 64) ** -0.5 for p in parts]
    assert [round(s, 1) for s in std] == [0.5, 0.5, 0.0] * 3 and 0 < std[2] < 2e-5 and 0 < std[8] < 2e-5
    plan = model.factorization.packed(model.blank(1))
    x = torch.randn(1, plan.size, 64)
    with torch.no_grad():
        stack = model.backbone
        sights = stack._sights(plan, None, x, False)
        vector = model.encode(labels(1)).vector
        context = m_var_context(vector)
        y = stack._layer(0, layer.weights(), x, sights[OWN], context)
    assert float((y - x).abs().max()) < 1e-3


def m_var_context(vector):
    from seriatim.backbones.driven import active
    from seriatim.backbones.transformer import Context

    return Context(None, active(vector), None, condition=vector)


# ---- configs and pictures --------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said():
    mixer = MambaConfig(16, 2, head_dim=8, state=4)
    with pytest.raises(ValueError, match="give a mixer of that depth, 16 wide"):
        DecoupledConfig(16, 3, 2, vector=16, mixer=mixer)
    with pytest.raises(ValueError, match="driven by a vector"):
        DecoupledConfig(16, 2, 2, mixer=mixer)
    with pytest.raises(ValueError, match="does not divide into heads of 64"):
        m_var.build(m_var.Config(width=48, heads=2))


def test_known_parts_of_scales_stay_while_the_rest_is_drawn_behind_them():
    """With the state, and by running over everything again: a finer scale hears of what is known of a coarser one."""
    model = m_var.case(SCALES, 5).model
    ids = ids_for(m_var.case(SCALES, 5))
    known = (torch.arange(30) % 3 > 0).expand(3, -1)
    made = []
    for cached in (True, False):
        canvas = model.canvas({"token": ids.clone()}, known)
        generate(Target(model, labels(3), cached=cached), canvas, SampleAll(), random=Keyed(1))
        made.append(canvas.value["token"])
    assert torch.equal(made[0][known], ids[known]) and not torch.equal(made[0], ids)
    assert torch.equal(made[0], made[1])
