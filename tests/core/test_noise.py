"""Noise schedules: what they are, that the bound does not depend on them, and the steps of decoding that follow."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from seriatim.decoding.ancestral import Drawn
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import Above, Select, schedule
from seriatim.decoding.target import Target
from seriatim.decoding.unmask import Unmask
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.laws.case import randomise
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.tabular import tabular
from seriatim.laws.unmasking import UnmaskingCase
from seriatim.layout import line
from seriatim.noise import NOISES, Cosine, Polynomial
from seriatim.objectives.masked import LEAST, ByTime, Unweighted, by_count, by_time, masking_of
from seriatim.random import Generator, Keyed
from seriatim.systems.decoders import decoder_of
from seriatim.systems.system import Sampling
from seriatim.systems.text import ctrldiff, mdlm, sdar

ALL = [*NOISES.values(), Polynomial(3.0), Polynomial(0.5)]
L, V = 4, 2
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=L)))
MASKS = torch.tensor(list(itertools.product((False, True), repeat=L)))
COUNTS = MASKS.sum(1).double()
NODES, WEIGHTS = (torch.tensor(x) for x in np.polynomial.legendre.leggauss(60))
TIMES = (NODES + 1) / 2  # of the integral over times from 0 to 1


@pytest.mark.parametrize("noise", ALL, ids=str)
def test_nothing_is_hidden_at_first_all_at_the_end_and_the_weight_is_the_slope(noise):
    t = torch.linspace(0.001, 0.999, 500, dtype=torch.float64, requires_grad=True)
    hidden = noise.hidden(t)
    (slope,) = torch.autograd.grad(hidden.sum(), t)  # -alpha'
    torch.testing.assert_close(noise.weight(t), slope / hidden)
    assert bool((hidden.diff() > 0).all())
    ends = noise.hidden(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert bool((noise.weight(torch.tensor([1.0, 1 - 2**-24])) >= 0).all()), "rounded, it is no negative weight"


def test_the_cosine_hides_much_and_the_square_little():
    half = torch.tensor(0.5)
    assert float(NOISES["quadratic"].hidden(half)) < float(NOISES["linear"].hidden(half)) == 0.5
    assert float(NOISES["cosine"].hidden(half)) == pytest.approx(math.cos(math.pi / 4))


# ---- training --------------------------------------------------------------------------------------------------------


def sums():
    """Summed losses of the hidden tokens of a model: (masks, texts)."""
    model = randomise(mdlm.build(mdlm.Config(length=L, vocab=V, width=16, depth=2, heads=2)))
    canvas = model.canvas({"token": TEXTS})
    with torch.no_grad():
        return torch.stack([model.hidden_losses(canvas, m.expand(len(TEXTS), -1)).sum(1) for m in MASKS])


def integrated(share, weight, found):
    """The expectation over times and masks: of each text."""
    hidden = share[:, None] ** COUNTS * (1 - share[:, None]) ** (L - COUNTS)  # (times, masks)
    return (WEIGHTS / 2) @ ((weight[:, None] * hidden) @ found)


@pytest.mark.parametrize("noise", [*NOISES.values(), Polynomial(3.0)], ids=str)
def test_the_bound_of_every_text_is_the_same_under_every_schedule(noise):
    """By quadrature over times and enumeration of masks: the mean over all orders, as counts have it."""
    found = sums()
    want = sum(found[i] / (int(k) * math.comb(L, int(k))) for i, k in enumerate(COUNTS) if k)
    t = TIMES.clamp(min=1e-12)
    torch.testing.assert_close(integrated(noise.hidden(t), noise.weight(t), found), want, rtol=1e-9, atol=1e-9)
    if noise != by_time.noise:  # the weight of one schedule under another is another loss
        other = integrated(noise.hidden(t), 1 / t, found)
        assert float((other / want - 1).abs().min()) > 0.1


@pytest.mark.parametrize("noise", ALL, ids=str)
def test_training_hides_and_weighs_by_the_schedule(noise):
    free, unit = torch.ones(3, 1, dtype=torch.bool), torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    t = LEAST + (1 - LEAST) * unit
    share = noise.hidden(t)[:, None]
    masking = ByTime(noise)
    assert bool(masking(free, unit, share - 1e-9)[0].all()) and not bool(masking(free, unit, share + 1e-9)[0].any())
    torch.testing.assert_close(masking(free, unit, share)[1], noise.weight(t))
    assert torch.equal(Unweighted(masking)(free, unit, share - 1e-9)[1], torch.ones(3, dtype=torch.float64))
    assert not bool(masking(~free, unit, share * 0)[0].any()), "what is given is never hidden"


@pytest.mark.parametrize("name", ["cosine", "quadratic"])
@pytest.mark.parametrize("block", [None, 2])
def test_what_a_batch_learns_has_the_bound_as_its_mean(name, block):
    """40 batches of 64 texts, within 4.5 standard errors, of text in any order and of blocks."""
    shape = {"length": L, "vocab": V, "width": 8, "depth": 1, "heads": 1, "noise": name}
    if block is None:
        model = mdlm.build(mdlm.Config(**shape))
    else:
        model = sdar.build(sdar.Config(**shape, block=block, together=False))
    assert model.masking == ByTime(NOISES[name]) and model.judging is by_count
    randomise(model)
    text = TEXTS[5].expand(64, -1)
    canvas, means = model.canvas({"token": text}), {}
    with torch.no_grad():
        for training in (True, False):
            model.train(training)
            many = torch.stack([model.losses(canvas, random=Generator(n)).sum(1).mean() for n in range(40)])
            means[training] = float(many.mean()), float(many.std()) / 40**0.5
    (got, error), (want, other) = means[True], means[False]
    assert abs(got - want) < 4.5 * math.hypot(error, other) + 3 * LEAST * want


def test_configs_say_the_schedule_and_the_weight_in_words():
    assert masking_of() == by_time and masking_of(by="count") is by_count
    assert masking_of("cosine", "even") == Unweighted(ByTime(Cosine()))
    model = ctrldiff.build(ctrldiff.Config(length=8, width=8, depth=1, heads=1, lengths=(2,), noise="quadratic"))
    assert model.masking == ByTime(Polynomial(2.0))
    for config, length in ((mdlm.Config, {}), (sdar.Config, {}), (ctrldiff.Config, {})):
        with pytest.raises(ValueError, match="noise is linear, cosine, quadratic, not 'sine'"):
            config(noise="sine", **length)
        with pytest.raises(ValueError, match="weight is bound or even"):
            config(weight="odd", **length)
    with pytest.raises(ValueError, match="leave out the noise 'cosine'"):
        mdlm.Config(masking="count", noise="cosine")
    with pytest.raises(ValueError, match="positive and finite"):
        Polynomial(0.0)


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cosine", "quadratic"])
def test_decoding_leaves_what_the_schedule_hides(name):
    """hidden(1 - k/T) of n after step k, rounded down; one at least is decided at each step."""
    for n, steps in itertools.product((1, 5, 64), (1, 4, 9)):
        left, want = n, []
        for k in range(1, steps + 1):
            share = float(NOISES[name].hidden(torch.tensor(1 - k / steps, dtype=torch.float64)))
            left = 0 if k == steps else max(0, min(left - 1, math.floor(n * share + 1e-9)))
            want.append(left)
            if not left:
                break
        assert list(schedule(n, steps, name)) == want
    assert schedule(100, 5, "quadratic") == (64, 36, 16, 4, 0)


def ancestral(model, noise, steps, size, vocab):
    """The law of the reverse process: each element is put into a step by the schedule, and those of a step are drawn at
    once from the elements of earlier steps."""
    t = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    chance = (-noise.hidden(t).diff()).tolist()
    target, law = Target(model, cached=False), {}
    texts = torch.tensor(list(itertools.product(range(vocab), repeat=size)))
    for turns in itertools.product(range(steps), repeat=size):
        p = torch.full((len(texts),), math.prod(chance[k] for k in turns), dtype=torch.float64)
        for k in sorted(set(turns)):
            known = torch.tensor([x < k for x in turns]).expand(len(texts), -1)
            canvas = model.canvas({"token": texts}, known)
            rows = target.forward(target.plan(canvas), canvas)
            said = rows.dist.log_prob(texts.gather(1, rows.element.clamp(min=0).expand(len(texts), -1)))
            mine = torch.tensor([e >= 0 and turns[e] == k for e in rows.element[0].tolist()])
            p = p * said[:, mine].sum(1).exp()
        for text, q in zip(texts.tolist(), p.tolist(), strict=True):
            law[tuple(text)] = law.get(tuple(text), 0.0) + q
    return law


def enumerated(model, decider):
    def run(random, rows):
        canvas = generate(Target(model, cached=False), model.blank(rows), decider(), random=random)
        return [tuple(text) for text in canvas.value["token"].tolist()]

    return enumerate_rows(run)


def gap(a, b):
    return sum(abs(a.get(x, 0.0) - b.get(x, 0.0)) for x in {*a, *b}) / 2


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_drawn_counts_sample_the_reverse_process(name, steps):
    """Its law, by enumeration; counts at their means have another."""
    model = tabular(line(3), AnyOrder(), 2, 1)
    want = ancestral(model, NOISES[name], steps, 3, 2)
    assert gap(enumerated(model, lambda: Drawn("random", steps, name)), want) < 1e-12
    if steps == 2:
        assert gap(enumerated(model, lambda: Select("random", steps, name)), want) > 1e-3


def test_drawn_counts_begin_anew_in_each_block():
    """The second block of two has the law that it has alone, behind a first one that is given."""
    model = tabular(line(4), Blocks(2, "any"), 2, 3)
    law, first = enumerated(model, lambda: Drawn("random", 2)), {}
    for text, p in law.items():
        first[text[:2]] = first.get(text[:2], 0.0) + p

    def behind(random, rows):
        canvas = model.canvas({"token": torch.tensor([[0, 1, 0, 0]]).expand(rows, -1)}, 2)
        generate(Target(model, cached=False), canvas, Drawn("random", 2), random=random)
        return [tuple(text) for text in canvas.value["token"].tolist()]

    alone = enumerate_rows(behind)
    assert len(alone) == 4 and len(law) == 16
    for text, p in alone.items():
        assert law[text] == pytest.approx(first[0, 1] * p, abs=1e-12)


def test_counts_are_drawn_step_by_step_and_rows_do_not_depend_on_each_other():
    model = tabular(line(40), AnyOrder(), 3)
    many = model.canvas({"token": torch.zeros(50, 40, dtype=torch.long)})
    taken = [(s.edits[0].element >= 0).sum(1) for s in decode(Target(model), many, Drawn("random", 4), random=Keyed(1))]
    counts = torch.stack(taken)
    assert many.done and len(taken) <= 4 and bool((counts[0] > 0).all())
    assert len(set(counts[0].tolist())) > 5 and abs(float(counts[0].double().mean()) - 10) < 4.5 * (7.5 / 50) ** 0.5
    alone = model.canvas({"token": torch.zeros(1, 40, dtype=torch.long)}, row=torch.tensor([7]))
    generate(Target(model), alone, Drawn("random", 4), random=Keyed(1))
    assert torch.equal(alone.value["token"][0], many.value["token"][7])


def test_the_decoder_takes_them_by_name():
    system = UnmaskingCase(lambda ask: None, None).systems[0]  # type: ignore[arg-type, return-value]
    way = decoder_of(system, "unmask+rule=random+counts=drawn+schedule=cosine", Sampling(steps=3))
    assert isinstance(way.decider, Unmask) and way.decider.select == Drawn("random", 3, "cosine")
    for spec, said in (
        ("unmask+counts=few", "counts are mean or drawn"),
        ("unmask+counts=drawn+schedule=powers", "under a noise schedule"),
        ("unmask+counts=drawn+threshold=0.5", "leave one of them out"),
    ):
        with pytest.raises(ValueError, match=said):
            decoder_of(system, spec, Sampling(steps=3))
    with pytest.raises(ValueError, match="leave one of them out"):
        Drawn(commit=Above(0.5))
