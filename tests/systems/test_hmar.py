"""HMAR: who sees whom, loss weights and mask passes, beyond the laws that every system obeys."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from seriatim.backbones.forked import Forked
from seriatim.canvas import Revise, Set
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.nested import Nested
from seriatim.decoding.sample import SampleAll, schedule
from seriatim.decoding.target import Target
from seriatim.objectives.scales import element_weights, scale_weights
from seriatim.plan import OrderError
from seriatim.random import Keyed, enumerate_law
from seriatim.systems.image import hmar
from seriatim.systems.pyramid_system import kept
from seriatim.tokenizers import MultiScaleVQ

LIST = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # of the paper


def refined(scales=(1, 2, 3), vocab=5):
    """A model of the second stage."""
    return hmar.case(scales, vocab, mask_layers=1).model


def ids_for(scales, vocab=5, rows=3, seed=0):
    n = sum(side * side for side in scales)
    return torch.randint(vocab, (rows, n), generator=torch.Generator().manual_seed(seed))


def labels(n):
    return {"class": torch.arange(n) % 3}


def shown(model, ids, open_):
    """The canvas of a sample of which all but some elements are decided."""
    canvas = model.canvas({"token": ids})
    element = torch.where(open_, -1, torch.arange(ids.shape[1])).expand(len(ids), -1)
    return canvas.apply([Set(ids, element)])


def mask_rows(model, ids, hidden, scale=None):
    """Log-probabilities at the hidden elements by a mask pass over one scale, or all behind the first."""
    which = model.layout.coord[:, 0]
    canvas = shown(model, ids, hidden)
    plan = model.factorization.masked(canvas, which > 0 if scale is None else which == scale).check(model.mixers)
    with torch.no_grad():
        h = model.hidden(plan, canvas, None, model.encode(labels(len(ids))))
        dist, element, _ = model.dist(h, plan, canvas)
    return {e: row for e, row in zip(element[0].tolist(), dist.log_probs().unbind(1), strict=True) if e >= 0}


def some(model, share=0.5, seed=0):
    return hmar.hidden_elements(model.layout.coord[:, 0], share, torch.Generator().manual_seed(seed))


# ---- who sees whom ---------------------------------------------------------------------------------------------------


def test_pairs_of_attention_are_the_papers_and_nothing_is_cached():
    model = hmar.case(LIST).model
    plan = model.factorization.packed(model.blank(1))
    assert int(plan.views["all"].mask().sum()) == 110_468 and plan.size == 680
    cost = hmar.case((1, 2, 4)).plan(ids_for((1, 2, 4), 2, 1)).cost()
    assert (cost.kept, cost.peak_cache, cost.forwards) == (0, 16, 3)


def test_what_stands_in_a_scale_reaches_no_other_one():
    case = hmar.case((1, 2, 3), 5)
    model, plan = case.model, case.plan(case.sample(1))
    x = case.embed(plan, case.sample(1))
    with torch.no_grad():
        vector = model.encode(labels(1)).vector
        base = model.backbone(x, plan, None, vector)
        for j in range(3):
            mine = plan.slots.coord[0, :, 0] == j
            moved = model.backbone(x + mine[:, None] * torch.randn(x.shape), plan, None, vector)
            changed = (moved - base).abs().amax(-1)[0] > 1e-9
            assert bool((changed == mine).all())


def test_the_weights_of_scales_are_the_papers():
    want = [0.025, 0.064, 0.115, 0.138, 0.140, 0.133, 0.121, 0.105, 0.088, 0.071]
    assert [round(w, 3) for w in scale_weights(LIST)] == want
    each = element_weights(LIST)
    assert float(each.sum()) == pytest.approx(1) and float(each[-256:].sum()) == pytest.approx(0.071, abs=5e-4)
    assert scale_weights((4,)) == (1.0,) and scale_weights((2, 2)) == (0.5, 0.5)


# ---- the feed of a mask pass -----------------------------------------------------------------------------------------


def embedded(model, ids, hidden):
    canvas = shown(model, ids, hidden)
    with torch.no_grad():
        return model.embed(canvas, model.factorization.masked(canvas, model.layout.coord[:, 0] > 0))


def test_a_slot_holds_the_next_scale_feature_and_its_own_part_by_one_matrix():
    """W a + W b + bias, where b is phi(up(code)) area-downed, of the shown codes alone; the mask where it is hidden."""
    model = refined((1, 2, 4))
    ids, hidden = ids_for((1, 2, 4)), some(refined((1, 2, 4)))
    embed, q = model.embed, model.embed.quantizer
    got = embedded(model, ids, hidden)
    with torch.no_grad():
        plain = model.embed(model.canvas({"token": ids}), model.factorization.packed(model.canvas({"token": ids})))
        codes = q.codebook[ids[:, 1:5]] * ~hidden[1:5, None]
        up = F.interpolate(codes.transpose(1, 2).reshape(3, 3, 2, 2), size=(4, 4), mode="bicubic")
        own = F.interpolate(q.phis[q.phi_of_scale[1]](up), size=(2, 2), mode="area").flatten(2).transpose(1, 2)
        want = torch.where(hidden[1:5, None], embed.mask, own @ embed.project.weight.T)
    torch.testing.assert_close(got[:, :4] - plain[:, 1:5], want, rtol=0, atol=1e-12)
    torch.testing.assert_close(got[:, hidden[1:]] - plain[:, 1:][:, hidden[1:]], embed.mask.expand(3, 10, -1))


def leaks(model):
    """How far an id that is hidden moves what is read in its own scale."""
    ids, hidden = ids_for((1, 2, 3)), some(model)
    hidden[5:] = torch.tensor([True, False, False] * 3)
    moved = torch.where(hidden & (model.layout.coord[:, 0] == 2), (ids + 1) % 5, ids)
    one, other = mask_rows(model, ids, hidden), mask_rows(model, moved, hidden)
    return max(float((one[e] - other[e]).abs().max()) for e in one)


def test_what_is_hidden_is_not_seen_in_its_scale():
    assert leaks(refined()) == 0


def test_values_that_reach_over_to_their_neighbours_are_found(monkeypatch):
    """As the released code resizes them: hidden ones, too."""
    plain = MultiScaleVQ.own_part
    monkeypatch.setattr(MultiScaleVQ, "own_part", lambda q, ids, k, seen: plain(q, ids, k, torch.ones_like(seen)))
    assert leaks(refined()) > 1e-3


def test_a_guess_that_stands_in_a_hidden_element_reaches_its_neighbours_alone():
    model = refined()
    ids, hidden = ids_for((1, 2, 3)), some(refined())
    hidden[5:] = torch.tensor([True, False, False] * 3)
    element = torch.where(hidden, torch.arange(14), -1).expand(3, -1)
    plan = model.factorization.masked(shown(model, ids, hidden), model.layout.coord[:, 0] == 2)
    x = [model.embed(shown(model, ids, hidden).apply([Revise(element, (ids + n) % 5)]), plan) for n in (0, 1)]
    moved = (x[0] - x[1]).detach().abs().amax((0, 2))
    assert bool((moved[::3] == 0).all()) and bool((moved[1::3] > 1e-6).all())


def test_what_is_shown_is_seen_in_its_scale_and_by_finer_ones():
    model = refined()
    ids, hidden = ids_for((1, 2, 3)), some(refined())
    hidden[1], hidden[2] = False, True
    moved = ids.clone()
    moved[:, 1] = (ids[:, 1] + 1) % 5
    one, other = mask_rows(model, ids, hidden), mask_rows(model, moved, hidden)
    assert all((one[e] - other[e]).abs().max() > 1e-6 for e in one)
    moved = torch.where(~hidden & (model.layout.coord[:, 0] == 2), (ids + 1) % 5, ids)
    other = mask_rows(model, moved, hidden)
    assert all(torch.equal(one[e], other[e]) == (e < 5) for e in one)


def test_training_in_one_pass_meets_the_rows_of_decoding():
    """All scales at once, hidden ones of coarser scales told as they are, against a pass for each scale alone."""
    model, ids = refined(), ids_for((1, 2, 3))
    hidden = some(model)
    together = mask_rows(model, ids, hidden)
    for scale in (1, 2):
        mine = hidden & (model.layout.coord[:, 0] == scale)
        later = model.layout.coord[:, 0] > scale
        canvas = shown(model, ids, mine | later)
        target = Target(model, labels(3))
        plan = target.plan(canvas)
        with torch.no_grad():
            rows = target.forward(plan, canvas)
        assert plan.fork and plan.size == (4, 9)[scale - 1]
        alone = dict(zip(rows.element[0].tolist(), rows.dist.log_probs().unbind(1), strict=True))
        for e in mine.nonzero()[:, 0].tolist():
            torch.testing.assert_close(alone[e], together[e], rtol=0, atol=1e-9)


def test_rows_at_different_scales_are_refused():
    model = refined()
    canvas = model.blank(2)
    ids = ids_for((1, 2, 3), rows=2)
    element = torch.tensor([[0, 1, -1, -1, -1, -1], [0, 1, 2, 3, 4, 5]])
    canvas.apply([Set(ids.gather(1, element.clamp(min=0)), element)])
    with pytest.raises(OrderError, match="go together"):
        model.factorization.step(canvas, None, 0)


# ---- decoding --------------------------------------------------------------------------------------------------------


def drawn(model, rows=4, steps=(1, 2, 3), seed=0, row=None, cached=True, guidance=None):
    canvas = model.canvas({"token": torch.zeros(rows, model.layout.size, dtype=torch.long)}, row=row)
    label = {"class": (canvas.row % 3)}
    target = Target(model, label, guidance, cached=cached)
    counts, before = [], canvas.known.clone()
    ids = canvas.value["token"].clone()
    with torch.inference_mode():
        for _ in decode(target, canvas, Nested(steps), random=Keyed(seed)):
            assert torch.equal(canvas.value["token"][before], ids[before]), "a kept token was changed"
            counts.append(int((canvas.known & ~before)[0].sum()))
            before, ids = canvas.known.clone(), canvas.value["token"].clone()
    return canvas.value["token"], counts


def test_kept_tokens_stay_and_counts_follow_the_schedule():
    _, counts = drawn(refined())
    left = [(n, *schedule(n, steps, "cosine")) for n, steps in ((1, 1), (4, 2), (9, 3))]
    assert counts == [a - b for one in left for a, b in itertools.pairwise(one)]
    assert [sum(counts[:1]), sum(counts[1:3]), sum(counts[3:])] == [1, 4, 9]


@pytest.mark.parametrize("steps", [(), (1, 1, 1)])
def test_without_mask_passes_it_is_the_first_stage(steps):
    """The law of the decoder, and the strings under keyed noise, are those of deciding everything at once."""
    model = refined((1, 2), 2)
    label = {"class": torch.tensor([1])}

    def law(decider):
        def run(random):
            canvas = generate(Target(model, label), model.blank(1), decider, random=random)
            return tuple(canvas.value["token"][0].tolist())

        return enumerate_law(run)

    one, other = law(Nested(steps)), law(SampleAll())
    values = torch.tensor(list(one))
    with torch.no_grad():
        p = model.log_prob(model.canvas({"token": values}), {"class": torch.ones(len(values), dtype=torch.long)}).exp()
    assert len(one) == 32 and float(p.sum()) == pytest.approx(1, abs=1e-9)
    assert max(abs(one[k] - other[k]) for k in other) < 1e-12
    assert max(abs(one[tuple(v.tolist())] - float(q)) for v, q in zip(values, p, strict=True)) < 1e-9


def test_the_law_with_a_mask_pass_is_the_one_by_hand():
    """Sum over all first draws of the second scale: the two likeliest are kept, the others drawn in view of them."""
    model = refined((1, 2), 2)
    label = {"class": torch.tensor([0])}

    def run(random):
        canvas = generate(Target(model, label), model.blank(1), Nested((1, 2)), random=random)
        return tuple(canvas.value["token"][0].tolist())

    law, want = enumerate_law(run), {}
    with torch.no_grad():
        for x0 in (0, 1):
            start = torch.tensor([[x0, 0, 0, 0, 0]])
            canvas = model.canvas({"token": start})
            plan = model.factorization.packed(canvas)
            rows = model.dist(model.hidden(plan, canvas, None, model.encode(label)), plan, canvas)[0].probs()[0]
            for y in itertools.product((0, 1), repeat=4):
                said = [float(rows[i + 1, v]) for i, v in enumerate(y)]
                first = float(rows[0, x0]) * math.prod(said)
                keep = sorted(range(4), key=lambda i, said=said: (-said[i], i))[:2]
                hidden = torch.ones(5, dtype=torch.bool)
                hidden[[0, *(i + 1 for i in keep)]] = False
                again = mask_rows(model, torch.tensor([[x0, *y]]), hidden)
                free = sorted(again)
                for z in itertools.product((0, 1), repeat=2):
                    x = [x0, *y]
                    for e, v in zip(free, z, strict=True):
                        x[e] = v
                    p = first * math.prod(float(again[e][0, v].exp()) for e, v in zip(free, z, strict=True))
                    want[tuple(x)] = want.get(tuple(x), 0.0) + p
    assert max(abs(law.get(k, 0.0) - p) for k, p in want.items()) < 1e-9
    plain = enumerate_law(
        lambda random: tuple(
            generate(Target(model, label), model.blank(1), SampleAll(), random=random).value["token"][0].tolist()
        )
    )
    assert sum(abs(plain[k] - p) for k, p in want.items()) / 2 > 0.01, "the mask pass changes nothing"


def test_a_row_does_not_depend_on_its_company():
    model = refined()
    together, _ = drawn(model)
    for order in ([2, 0, 3, 1], [1], [3, 2]):
        apart, _ = drawn(model, len(order), row=torch.tensor(order))
        assert torch.equal(apart, together[order])


@pytest.mark.parametrize("guidance", [None, Guidance(2.0, "linear")])
def test_the_cache_is_invisible(guidance):
    one, other = (drawn(refined(), cached=cached, guidance=guidance)[0] for cached in (True, False))
    assert torch.equal(one, other)


def test_ends_that_share_what_a_cache_keeps_are_found(monkeypatch):
    """Both ends have shifts and scales of their own, and a cache that took one for the other would be wrong."""
    plain = Forked._other

    def mistaken(self):
        other = plain(self)
        other.kept_as = self.kept_as
        return other

    right, _ = drawn(refined())
    monkeypatch.setattr(Forked, "_other", mistaken)
    assert not torch.equal(drawn(refined())[0], right)


def test_mask_passes_are_not_guided():
    model, ids = refined(), ids_for((1, 2, 3))
    hidden = torch.arange(14) > 3
    rows = []
    for guidance in (None, Guidance(3.0)):
        target, canvas = Target(model, labels(3), guidance), shown(model, ids, hidden)
        with torch.no_grad():
            rows.append(target.forward(target.plan(canvas), canvas).dist.log_probs())
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=1e-12)
    plain = []
    for guidance in (None, Guidance(3.0)):
        target, canvas = Target(model, labels(3), guidance), shown(model, ids, torch.arange(14) > 4)
        with torch.no_grad():
            plain.append(target.forward(target.plan(canvas), canvas).dist.log_probs())
    assert (plain[0] - plain[1]).abs().max() > 0.1


def test_given_tokens_are_never_remasked():
    model, ids = refined((1, 2, 4)), ids_for((1, 2, 4))
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:, 2:] = True
    known = kept(keep, ((1, 1), (2, 2), (4, 4)))
    canvas = model.canvas({"token": ids}, known[None])
    generate(Target(model, labels(3)), canvas, Nested((1, 2, 3)), random=Keyed(1))
    assert canvas.done and torch.equal(canvas.value["token"][:, known], ids[:, known])
    assert not torch.equal(canvas.value["token"], ids)


@pytest.mark.parametrize("steps", [(0,), (1, 2, -1)])
def test_scales_without_a_forward_are_refused(steps):
    with pytest.raises(ValueError, match="at least 1 forward"):
        Nested(steps)
