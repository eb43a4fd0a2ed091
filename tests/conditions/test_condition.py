"""Conditions in all forms: one law in one pass and step by step, seen where they should be, hidden by the null."""

from __future__ import annotations

import itertools

import pytest
import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.conditions.condition import ClassCondition, Condition, MemoryCondition, PerElementCondition
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import decode
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.verify import GreedyMatch
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.static import Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import Plan, reads_at, slots_of
from seriatim.random import Forced
from seriatim.view import inclusive

V, E, WIDTH, CLASSES, FEATURES = 3, 4, 16, 3, 5


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TwoSlots(ClassCondition):
    """A class that fills two prefix slots, each with a vector of its own."""

    def forward(self, raw, drop=None):
        x = super().forward(raw, drop).vector
        return Condition(prefix=torch.stack([x, x.flip(-1)], 1))


FORMS = {
    "vector": lambda: {"class": ClassCondition(CLASSES, WIDTH, ("vector",))},
    "prefix": lambda: {"class": ClassCondition(CLASSES, WIDTH, ("prefix",))},
    "both": lambda: {"class": ClassCondition(CLASSES, WIDTH, ("vector", "prefix"))},
    "two slots": lambda: {"class": TwoSlots(CLASSES, WIDTH)},
    "memory": lambda: {"text": MemoryCondition(FEATURES)},
    "per element": lambda: {"edges": PerElementCondition(FEATURES, WIDTH)},
    "two vectors": lambda: {"class": ClassCondition(CLASSES, WIDTH), "style": ClassCondition(CLASSES, WIDTH)},
    "all": lambda: {
        "class": ClassCondition(CLASSES, WIDTH, ("vector", "prefix")),
        "text": MemoryCondition(FEATURES),
        "edges": PerElementCondition(FEATURES, WIDTH),
    },
}
WITHOUT_PREFIX = ("vector", "memory", "per element", "two vectors")  # blocks have no prefix slot
every_form = pytest.mark.parametrize("form", FORMS)
every_form_and_order = pytest.mark.parametrize(
    "form, order", [(form, "line") for form in FORMS] + [(form, "blocks") for form in WITHOUT_PREFIX]
)


def model_of(form, order="line"):
    conditions = FORMS[form]()
    vector = WIDTH if form in ("vector", "both", "two vectors", "all") else None
    memory = FEATURES if "text" in conditions else None
    backbone = Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE(), vector=vector, memory=memory))
    prefix = 2 if form == "two slots" else 1
    factorization = Line(prefix) if order == "line" else Blocks(2)
    embed = TokenEmbed(V, WIDTH, mask=order == "blocks", positions=(E + 1,))
    return randomise(Model(line(E), factorization, embed, backbone, CategoricalHead(WIDTH, V), conditions))


def raw_of(model, rows, seed=0):
    """Raw conditions by name; every seed gives other ones."""
    what = {"text": (3, FEATURES), "edges": (E, FEATURES)}
    labels = (torch.arange(rows) + seed) % CLASSES
    return {n: normal(rows, *what[n], seed=seed) if n in what else labels for n in model.conditions}


def samples(rows, seed=0):
    return torch.randint(V, (rows, E), generator=torch.Generator().manual_seed(seed))


def losses(model, x, raw, drop=None):
    with torch.no_grad():
        return model.losses(model.canvas({"token": x}), raw, drop)


# ---- one law ---------------------------------------------------------------------------------------------------------


@every_form_and_order
@pytest.mark.parametrize("known", [0, 2])
@pytest.mark.parametrize("cached", [True, False])
def test_one_pass_equals_step_by_step(form, order, known, cached):
    model, x = model_of(form, order), samples(3)
    raw, random = raw_of(model, 3), Forced(x)
    canvas = model.canvas({"token": torch.where(torch.arange(E) < known, x, 0)}, known)
    for _ in decode(Target(model, raw, cached=cached), canvas, SampleAll(), random=random):
        pass
    with torch.no_grad():
        want = model.log_prob(model.canvas({"token": x}, known), raw)
    torch.testing.assert_close(random.log_prob, want, rtol=0, atol=1e-12)


class Repeating:
    """Drafts that repeat the last known value, to the end of the sample and beyond."""

    def propose(self, canvas, target, random):
        if canvas.length in (None, E):
            return None
        last = canvas.value["token"][:, max(canvas.length - 1, 0)]
        return Guess(last[:, None].expand(-1, 3).contiguous())

    def observe(self, canvas, rows, step):
        pass


@every_form
def test_drafts_under_a_condition_are_verified_by_the_same_law(form):
    """Greedy decoding with drafts gives the greedy string, also where a draft reaches beyond the end."""
    model, raw, texts = model_of(form), raw_of(model_of(form), 1), []
    for proposer, decider in ((None, SampleAll()), (Repeating(), GreedyMatch())):
        canvas = model.blank(1)
        for _ in decode(Target(model, raw, warp=Warper(temperature=0)), canvas, decider, proposer):
            pass
        texts.append(canvas.value["token"].tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("form", ["all", "two slots"])
def test_the_law_under_a_condition_sums_to_one(form):
    model = model_of(form)
    x = torch.tensor(list(itertools.product(range(V), repeat=E)))
    raw = {name: v.expand(len(x), *v.shape[1:]) for name, v in raw_of(model, 1).items()}
    assert float((-losses(model, x, raw).sum(1)).exp().sum()) == pytest.approx(1, abs=1e-12)


@every_form_and_order
def test_every_element_depends_on_every_condition(form, order):
    model, x = model_of(form, order), samples(3)
    raw = raw_of(model, 3)
    for name in raw:
        other = {**raw, name: raw_of(model, 3, seed=1)[name]}
        changed = (losses(model, x, raw) - losses(model, x, other)).abs()
        assert float(changed.min()) > 1e-6, f"{name} does not reach every element"


@pytest.mark.parametrize("order", ["line", "blocks"])
def test_a_condition_of_one_element_reaches_it_and_what_follows_alone(order):
    model, x = model_of("per element", order), samples(3)
    raw = raw_of(model, 3)
    for e in range(E):
        edges = raw["edges"].clone()
        edges[:, e] += 1
        changed = (losses(model, x, raw) - losses(model, x, {"edges": edges})).abs().amin(0) > 1e-9
        first = e if order == "line" else e // 2 * 2
        last = E if order == "line" else first + 2  # what stands in values carries no condition
        want = torch.tensor([first <= i < last for i in range(E)])
        assert torch.equal(changed, want), (e, changed)


@every_form
def test_a_row_does_not_depend_on_the_conditions_of_others(form):
    model, x = model_of(form), samples(3)
    raw = raw_of(model, 3)
    for b in range(3):
        alone = losses(model, x[b : b + 1], {name: v[b : b + 1] for name, v in raw.items()})
        torch.testing.assert_close(alone[0], losses(model, x, raw)[b], rtol=0, atol=1e-12)


# ---- adaptive layer norm ---------------------------------------------------------------------------------------------


def backbone_and_plan(size=5):
    backbone = randomise(Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE(), vector=6)))
    rank = torch.arange(size)[None]
    slots = slots_of(range(size), rank[0])
    return backbone, Plan(slots, {"all": inclusive(range(size))}, reads_at([], []), rank)


@torch.no_grad()
def test_a_vector_of_each_sample_is_the_same_vector_at_each_slot():
    backbone, plan = backbone_and_plan()
    x, vector = normal(2, 5, WIDTH), normal(2, 6, seed=1)
    want = backbone(x, plan, None, vector)
    torch.testing.assert_close(backbone(x, plan, None, vector[:, None].expand(-1, 5, -1)), want, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_vector_of_one_slot_reaches_the_slots_that_see_it_alone():
    backbone, plan = backbone_and_plan()
    x, vector = normal(2, 5, WIDTH), normal(2, 5, 6, seed=1)
    want = backbone(x, plan, None, vector)
    for s in range(5):
        other = vector.clone()
        other[:, s] += 1
        changed = (backbone(x, plan, None, other) - want).abs().amax((0, 2)) > 1e-9
        assert changed.tolist() == [i >= s for i in range(5)]


def test_a_backbone_and_its_conditions_must_fit():
    for form, says in (("vector", "takes no vector"), ("memory", "attends to a memory")):
        right = model_of(form)
        config = TransformerConfig(WIDTH, 1, 2, memory=FEATURES if form == "memory" else None)
        wrong = Model(line(E), Line(1), TokenEmbed(V, WIDTH), Transformer(config), CategoricalHead(WIDTH, V))
        if form == "vector":
            wrong.conditions = right.conditions
        with pytest.raises(ValueError, match=says):
            wrong.float().losses(wrong.canvas({"token": samples(2)}), raw_of(wrong, 2))


# ---- the null --------------------------------------------------------------------------------------------------------


@every_form
def test_the_null_hides_what_it_replaces_and_leaves_other_rows_alone(form):
    model, x = model_of(form), samples(4)
    raw, other = raw_of(model, 4), raw_of(model, 4, seed=1)
    drop = torch.tensor([True, False, True, False])
    got, hidden, full = (losses(model, x, *c) for c in ((raw, drop), (other, drop), (raw,)))
    assert torch.equal(got[drop], hidden[drop])
    assert float((got[~drop] - hidden[~drop]).abs().min()) > 1e-6
    torch.testing.assert_close(got[~drop], full[~drop], rtol=0, atol=1e-12)
    assert float((got[drop] - full[drop]).abs().min()) > 1e-6


@pytest.mark.parametrize("form, table", [("both", "class.table"), ("memory", "text.null")])
def test_dropped_rows_train_the_null(form, table):
    model, x = model_of(form), samples(2)
    weight = dict(model.conditions.named_parameters())[table]
    model.losses(model.canvas({"token": x}), raw_of(model, 2), torch.ones(2, dtype=torch.bool)).sum().backward()
    moved = weight.grad.abs().reshape(-1, weight.shape[-1]).sum(1) > 0
    assert moved.tolist() == [False] * (len(moved) - 1) + [True]


def test_a_null_per_element_is_no_condition_at_all():
    model, x = model_of("per element"), samples(2)
    dropped = losses(model, x, raw_of(model, 2), torch.ones(2, dtype=torch.bool))
    without = losses(model, x, Condition())
    assert torch.equal(dropped, without)


# ---- merging ---------------------------------------------------------------------------------------------------------


def test_vectors_add_up_and_other_forms_stand_side_by_side():
    a = Condition(vector=normal(2, 3), prefix=normal(2, 1, 4))
    b = Condition(vector=normal(2, 3, seed=1), memory=normal(2, 5, 4))
    both = a.merge(b)
    assert torch.equal(both.vector, a.vector + b.vector)
    assert both.prefix is a.prefix and both.memory is b.memory and both.per_element is None
    nothing = Condition().merge(a)
    assert nothing.vector is a.vector and nothing.rows == 2 and Condition().rows is None


def test_rows_are_selected_in_every_form():
    c = Condition(normal(3, 1, 2), normal(3, 2), normal(3, 4, 2), normal(3, 5, 2)).select(torch.tensor([2, 0, 2, 1]))
    assert c.rows == 4
    for got, shape in ((c.prefix, (3, 1, 2)), (c.vector, (3, 2)), (c.memory, (3, 4, 2)), (c.per_element, (3, 5, 2))):
        assert torch.equal(got, normal(*shape)[[2, 0, 2, 1]])


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors, slots", [(2, 1), (1, 2), (2, 3)])
def test_a_prefix_of_another_length_than_its_slots_is_refused(vectors, slots):
    model = model_of("two slots" if vectors == 2 else "prefix")
    model.factorization = Line(slots)
    with pytest.raises(ValueError, match=f"prefix of {vectors} vectors for {slots} prefix slots"):
        for _ in decode(Target(model, raw_of(model, 2)), model.blank(2), SampleAll()):
            pass
    if vectors < slots:
        with pytest.raises(ValueError, match=f"prefix of {vectors} vectors for {slots} prefix slots"):
            losses(model, samples(2), raw_of(model, 2))


LABELS = torch.tensor([0, 1])
x22 = torch.zeros(2, 2)


@pytest.mark.parametrize(
    "run, says",
    [
        (lambda: ClassCondition(3, 4, ()), "vector, prefix, or both"),
        (lambda: ClassCondition(3, 4, ("memory",)), "vector, prefix, or both"),
        (lambda: ClassCondition(0, 4), "at least 1 class"),
        (lambda: ClassCondition(3, 4)(torch.tensor([0, 3])), r"0\.\.2, got 0\.\.3"),
        (lambda: ClassCondition(3, 4)(torch.tensor([-1])), r"0\.\.2, got -1\.\.-1"),
        (lambda: ClassCondition(3, 4)(torch.tensor([[1]])), r"shape \(batch,\), got \(1, 1\)"),
        (lambda: ClassCondition(3, 4)(torch.tensor([1.0])), "integers"),
        (lambda: ClassCondition(3, 4)(torch.tensor([True, False])), "integers"),
        (lambda: ClassCondition(3, 4)(LABELS, torch.tensor([1, 0])), "`drop` is boolean"),
        (lambda: ClassCondition(3, 4)(LABELS, torch.tensor([True])), r"boolean \(2,\), got \(1,\)"),
        (lambda: ClassCondition(3, 4, null=False)(LABELS, LABELS.bool()), "without a null"),
        (lambda: MemoryCondition(4)(torch.zeros(2, 4)), r"\(batch, places, 4\), got \(2, 4\)"),
        (lambda: MemoryCondition(4)(torch.zeros(2, 3, 5)), r"\(batch, places, 4\), got \(2, 3, 5\)"),
        (lambda: MemoryCondition(4)(torch.full((2, 3, 4), torch.nan)), "NaN or infinity"),
        (lambda: PerElementCondition(4, 8)(torch.zeros(2, 3, 5)), r"\(batch, elements, 4\), got \(2, 3, 5\)"),
        (lambda: Condition(prefix=x22), "prefix has 3 axes, got 2"),
        (lambda: Condition(vector=torch.zeros(2)), "vector has 2 or 3 axes, got 1"),
        (lambda: Condition(vector=x22, memory=torch.zeros(3, 1, 2)), "vector of 2, memory of 3"),
        (lambda: Condition(memory=x22[None]).merge(Condition(memory=x22[None])), "two conditions give a memory"),
        (
            lambda: Condition(vector=x22).merge(Condition(vector=torch.zeros(2, 3))),
            r"one shape: got \(2, 2\), \(2, 3\)",
        ),
    ],
)
def test_mistakes_are_named(run, says):
    with pytest.raises(ValueError, match=says):
        run()


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda raw: None, "takes the conditions: class, text, edges; got: none"),
        (lambda raw: {"class": raw["class"]}, "takes the conditions: class, text, edges; got: class"),
        (lambda raw: {**raw, "colour": raw["class"]}, "got: class, text, edges, colour"),
        (lambda raw: {**raw, "class": raw["class"][:1]}, "different numbers of samples"),
        (lambda raw: {name: v[:1] for name, v in raw.items()}, "conditions of 1 samples were given for a canvas of 2"),
        (lambda raw: {**raw, "edges": raw["edges"][:, :3]}, "has 3 elements, the canvas has 4"),
    ],
)
def test_what_does_not_fit_the_model_or_the_canvas_is_refused(change, says):
    model = model_of("all")
    with pytest.raises(ValueError, match=says):
        losses(model, samples(2), change(raw_of(model, 2)))
    with pytest.raises(ValueError, match=says):
        for _ in decode(Target(model, change(raw_of(model, 2))), model.blank(2), SampleAll()):
            pass
