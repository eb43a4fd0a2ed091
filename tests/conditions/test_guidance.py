"""Guidance in one batched forward equals two forwards mixed by hand, under every schedule, form and order."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.conditions.condition import ClassCondition, MemoryCondition, PerElementCondition
from seriatim.decoding.filters import Warper
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode
from seriatim.decoding.sample import SampleAll, Select
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.random import Forced, Keyed

V, E, WIDTH, CLASSES, FEATURES = 3, 4, 16, 3, 5
W = 1.7
every_schedule = pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
every_order = pytest.mark.parametrize("order", ["line", "blocks"])


def model_of(order="line", size=E):
    """A class as vector (and prefix, where there is a slot for it), a text to attend to, a feature of each element."""
    factorization = {"line": lambda: Line(1), "blocks": lambda: Blocks(2), "any": AnyOrder}[order]()
    conditions = {
        "class": ClassCondition(CLASSES, WIDTH, ("vector", "prefix") if order == "line" else ("vector",)),
        "text": MemoryCondition(FEATURES),
        "edges": PerElementCondition(FEATURES, WIDTH),
    }
    backbone = Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE(), vector=WIDTH, memory=FEATURES))
    embed = TokenEmbed(V, WIDTH, mask=order != "line", positions=(size + 1,))
    return randomise(Model(line(size), factorization, embed, backbone, CategoricalHead(WIDTH, V), conditions))


def raw_of(rows, seed=0, size=E):
    g = torch.Generator().manual_seed(seed)
    text, edges = (torch.randn(rows, n, FEATURES, generator=g).double() for n in (2, size))
    return {"class": torch.arange(rows) % CLASSES, "text": text, "edges": edges}


def one(raw, b):
    return {name: v[b : b + 1] for name, v in raw.items()}


class Recording(SampleAll):
    """Keeps the logits of every element as they were when it was decided."""

    def __init__(self):
        super().__init__()
        self.logits = {}

    def decide(self, canvas, guess, rows, random):
        for b in range(canvas.batch):
            for m in range(rows.dist.logits.shape[1]):
                e = (
                    rows.element + m
                    if isinstance(rows.element, int)
                    else int(rows.element.expand(canvas.batch, -1)[b, m])
                )
                if e >= 0:
                    self.logits[b, e] = rows.dist.logits[b, m]
        return super().decide(canvas, guess, rows, random)


def decoded(model, raw, guidance=None, known=None, random=None, **more):
    """(values, logits of each element when it was decided)."""
    recording, rows = Recording(), len(raw["class"])
    canvas = model.canvas({"token": torch.zeros(rows, E, dtype=torch.long)}, 0 if known is None else known)
    for _ in decode(Target(model, raw, guidance, **more), canvas, recording, random=random or Keyed(3)):
        pass
    return canvas.value["token"], recording.logits


def by_hand(model, x, raw, weight):
    """Two separate forwards over the finished sample, one with every condition, one with every null; mixed."""
    canvas, parts = model.canvas({"token": x}), []
    plan = model.factorization.packed(canvas)
    for drop in (None, torch.ones(len(x), dtype=torch.bool)):
        with torch.no_grad():
            h = model.hidden(plan, canvas, None, model.encode(raw, drop))
            parts.append(model.heads["token"].logits(h[:, plan.reads.slot[0]]))
    element = plan.reads.element[0].tolist()
    w = torch.tensor([weight(e) for e in element], dtype=torch.float64)[:, None]
    mixed = (1 + w) * parts[0] - w * parts[1]
    return {(b, e): mixed[b, m] for b in range(len(x)) for m, e in enumerate(element)}


def worst(got, want):
    assert got.keys() == want.keys()
    return max(float((got[k] - want[k]).abs().max()) for k in got)


def shape(schedule, share):
    return {"constant": 1.0, "linear": share, "cosine": (1 - math.cos(math.pi * share)) / 2}[schedule]


def progress(order, e):
    """The share of steps that are done when an element is decided."""
    return e / (E - 1) if order == "line" else float(e // 2)


# ---- one forward equals two ------------------------------------------------------------------------------------------


@every_schedule
@every_order
@pytest.mark.parametrize("cached", [True, False])
def test_one_batched_forward_equals_two_mixed_by_hand(schedule, order, cached):
    model, raw = model_of(order), raw_of(3)
    x, logits = decoded(model, raw, Guidance(W, schedule), cached=cached)
    weight = lambda e: W * shape(schedule, progress(order, e))  # noqa: E731
    assert worst(logits, by_hand(model, x, raw, weight)) < 1e-12 * max(float(v.abs().max()) for v in logits.values())


@every_schedule
@every_order
def test_mutants_of_sign_and_schedule_are_caught(schedule, order):
    model, raw = model_of(order), raw_of(3)
    x, logits = decoded(model, raw, Guidance(W, schedule))
    others = [s for s in ("constant", "linear", "cosine") if s != schedule]
    if order == "blocks":  # two steps, at 0 and at 1: linear and cosine agree there
        others = ["constant"] if schedule != "constant" else others
    wrong = [lambda e: -W * shape(schedule, progress(order, e))]
    wrong += [lambda e, s=s: W * shape(s, progress(order, e)) for s in others]
    for weight in wrong:
        assert worst(logits, by_hand(model, x, raw, weight)) > 1e-2


@every_order
def test_scale_zero_is_unguided(order):
    model, raw = model_of(order), raw_of(3)
    x, logits = decoded(model, raw, Guidance(0.0))
    y, plain = decoded(model, raw)
    assert torch.equal(x, y) and worst(logits, plain) < 1e-12


@every_order
def test_scale_minus_one_is_the_null_alone(order):
    """(1 + w) conditional - w null: at w = -1 the condition is not followed at all."""
    model, raw = model_of(order), raw_of(3)
    x, _ = decoded(model, raw, Guidance(-1.0))
    y, _ = decoded(model, {n: v.flip(0) for n, v in raw.items()}, Guidance(-1.0))
    assert torch.equal(x, y)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_the_guided_law_is_a_distribution(schedule):
    model, total = model_of(), 0.0
    for values in itertools.product(range(V), repeat=E):
        random = Forced(torch.tensor([values]))
        decoded(model, raw_of(1), Guidance(W, schedule), random=random)
        total += float(random.log_prob.exp())
    assert total == pytest.approx(1, abs=1e-12)


def test_guidance_comes_before_temperature():
    model, raw = model_of(), raw_of(3)
    x, logits = decoded(model, raw, Guidance(W), warp=Warper(temperature=0.5))
    want = {k: (2 * v).log_softmax(-1) for k, v in by_hand(model, x, raw, lambda e: W).items()}
    assert worst({k: v.log_softmax(-1) for k, v in logits.items()}, want) < 1e-11


# ---- company ---------------------------------------------------------------------------------------------------------


@every_schedule
def test_rows_at_different_progress_are_guided_each_by_its_own(schedule):
    """Rows with 0, 2 and 1 given elements, in one batch and alone."""
    model, raw, known = model_of(), raw_of(3), torch.tensor([0, 2, 1])
    x, logits = decoded(model, raw, Guidance(W, schedule), known)
    for b in range(3):
        recording = Recording()
        canvas = model.canvas({"token": torch.zeros(1, E, dtype=torch.long)}, int(known[b]), row=torch.tensor([b]))
        for _ in decode(Target(model, one(raw, b), Guidance(W, schedule)), canvas, recording, random=Keyed(3)):
            pass
        assert torch.equal(canvas.value["token"][0], x[b])
        got = {k: v for k, v in logits.items() if k[0] == b}
        assert worst(got, {(b, e): v for (_, e), v in recording.logits.items()}) < 1e-11


# ---- schedules -------------------------------------------------------------------------------------------------------


def test_schedules_start_and_end_where_they_should():
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        for schedule in ("constant", "linear", "cosine"):
            assert Guidance(3.0, schedule).weight(share) == pytest.approx(3 * shape(schedule, share))
    assert Guidance(3.0, "cosine").weight(0.25) < Guidance(3.0, "linear").weight(0.25)


def test_progress_of_an_order_that_is_found_on_the_way_is_the_share_of_elements():
    """Masked generation in random order: linear guidance grows with the number of known elements."""
    met = []

    class Watching(Guidance):
        def weight(self, progress):
            met.append(progress)
            return super().weight(progress)

    model = model_of("any")
    canvas = model.blank(1)
    target = Target(model, raw_of(1), Watching(W, "linear"))
    for _ in decode(target, canvas, Select("random", steps=E), random=Keyed(1)):
        pass
    assert [float(p) for p in met] == pytest.approx([0, 1 / 3, 2 / 3, 1])


# ---- mistakes --------------------------------------------------------------------------------------------------------


def no_null():
    conditions = {"class": ClassCondition(CLASSES, WIDTH, null=False)}
    backbone = Transformer(TransformerConfig(WIDTH, 1, 2, vector=WIDTH))
    return Model(line(E), Line(1), TokenEmbed(V, WIDTH), backbone, CategoricalHead(WIDTH, V), conditions)


def unconditional():
    backbone = Transformer(TransformerConfig(WIDTH, 1, 2))
    return Model(line(E), Line(1), TokenEmbed(V, WIDTH), backbone, CategoricalHead(WIDTH, V))


@pytest.mark.parametrize(
    "run, says",
    [
        (lambda: Guidance(1.0, "quadratic"), "constant, linear, half-linear, cosine"),
        (lambda: Guidance(math.nan), "finite"),
        (lambda: Guidance(math.inf), "finite"),
        (lambda: Target(no_null(), {"class": torch.tensor([0])}, Guidance(1.0)), "has no null"),
        (lambda: Target(unconditional(), None, Guidance(1.0)), "unconditional"),
        (lambda: Target(model_of(), None, Guidance(1.0)), "got: none"),
        (
            lambda: Target(model_of(), {**raw_of(1), "hue": torch.zeros(1)}, Guidance(1.0)),
            "got: class, text, edges, hue",
        ),
        (lambda: Target(model_of(), {**raw_of(1), "class": torch.tensor([3])}, Guidance(1.0)), r"0\.\.2, got 3\.\.3"),
    ],
)
def test_mistakes_are_named(run, says):
    with pytest.raises(ValueError, match=says):
        run()
