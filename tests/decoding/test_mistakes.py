"""What is wrong with an input, an edit, a decider or the weights is said where it enters, before work is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import EditError, Set, Truncate
from seriatim.decoding.beam import Beam
from seriatim.decoding.draft import DraftModel
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import SampleAll, Select
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Chain, GreedyMatch, Walk
from seriatim.embed import CodesEmbed, TokenEmbed, VectorEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.depthwise import DepthwiseHead
from seriatim.heads.flow import FlowConfig, FlowHead
from seriatim.laws.case import randomise
from seriatim.laws.tabular import tabular
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import OrderError
from seriatim.random import Generator, Keyed

VOCAB, WIDTH, LENGTH = 7, 16, 12
BACKBONE = TransformerConfig(WIDTH, 2, 4, kv_heads=2, rope=RoPE(50.0))


def plain(prefix: int = 1, length: int = LENGTH) -> Model:
    embed, head = TokenEmbed(VOCAB, WIDTH), CategoricalHead(WIDTH, VOCAB)
    return randomise(Model(line(length), Line(prefix), embed, Transformer(BACKBONE), head))


def ids(*shape: int, value: int = 0) -> Tensor:
    return torch.full(shape, value)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda m: m.canvas({"token": ids(2, LENGTH, value=VOCAB)}), ValueError, "lie in 0..6, got 7..7"),
        (lambda m: m.canvas({"token": ids(2, LENGTH, value=-1)}), ValueError, "lie in 0..6, got -1..-1"),
        (lambda m: m.canvas({"token": torch.zeros(2, LENGTH)}), TypeError, "ids, integers, got torch.float32"),
        (lambda m: m.canvas({"token": ids(2, LENGTH).bool()}), TypeError, "ids, integers, got torch.bool"),
        (lambda m: m.canvas({"token": [[0] * LENGTH]}), TypeError, "are a tensor, got list"),
        (lambda m: m.canvas({"token": ids(0, LENGTH)}), ValueError, "at least one row; the batch is empty"),
        (lambda m: m.canvas({"token": ids(2, 5)}), ValueError, r"must be \(2, 12, ...\), got \(2, 5\)"),
        (lambda m: m.canvas({"word": ids(2, LENGTH)}), ValueError, "no values for kind 'token'; got word"),
        (lambda m: m.canvas({}), ValueError, "values of at least one kind"),
        (
            lambda m: m.canvas({"token": ids(2, LENGTH)}, 13),
            ValueError,
            "first elements are given, but the layout has 12",
        ),
        (lambda m: m.canvas({"token": ids(2, LENGTH)}, -1), ValueError, "first elements are given"),
        (
            lambda m: m.canvas({"token": ids(2, LENGTH)}, ids(2, value=13)),
            ValueError,
            "13, 13.* first elements are given",
        ),
        (lambda m: m.canvas({"token": ids(2, LENGTH)}, ids(3)), ValueError, "is a number, one a row"),
        (lambda m: m.canvas({"token": ids(2, LENGTH)}, ids(3, LENGTH).bool()), ValueError, "3 rows, the values have 2"),
        (lambda m: m.canvas({"token": ids(2, LENGTH)}, row=ids(3)), ValueError, "names each of 2 rows"),
    ],
)
def test_what_is_no_canvas_of_the_model_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make(plain())


def test_ids_of_any_integer_type_are_taken():
    canvas = plain().canvas({"token": ids(2, LENGTH).to(torch.int16)})
    assert canvas.value["token"].dtype == torch.int64


def test_a_canvas_copies_what_it_is_given():
    """Generation changes neither the tensor of the prompts nor a batch expanded from one row."""
    model, prompt = plain(), torch.arange(LENGTH)[None] % VOCAB
    before = prompt.clone()
    canvas = model.canvas({"token": prompt.expand(3, -1)}, 2)
    generate(Target(model), canvas, SampleAll(), random=Keyed(5))
    assert torch.equal(prompt, before) and len({tuple(t.tolist()) for t in canvas.read("token")}) == 3


def test_edits_that_do_not_fit_are_refused():
    canvas = plain().canvas({"token": ids(2, LENGTH)}, torch.tensor([2, 3]))
    with pytest.raises(EditError, match="element 2 of row 1 is given and cannot be set"):
        canvas.apply([Set(ids(2, 1), ids(2, 1, value=2))])
    with pytest.raises(EditError, match="element 12 cannot be set: the layout has 12"):
        canvas.apply([Set(ids(2, 1), ids(2, 1, value=12))])
    with pytest.raises(EditError, match=r"elements are integers \(2, n\), got \(1, 1\)"):
        canvas.apply([Set(ids(1, 1), ids(1, 1, value=5))])
    with pytest.raises(EditError, match="take as many values"):
        canvas.apply([Set(ids(2, 2), ids(2, 1, value=5))])
    with pytest.raises(EditError, match="name the elements to set"):
        canvas.apply([Set(ids(2, 1))])
    with pytest.raises(EditError, match="cannot be cut off"):
        canvas.apply([Truncate(torch.tensor([1, 9]))])


def test_a_line_without_a_start_is_refused_in_any_row():
    """Without a prefix slot, every row needs a first element."""
    model = plain(prefix=0)
    with pytest.raises(OrderError, match="nothing to start from in row 0"):
        generate(Target(model), model.canvas({"token": ids(1, LENGTH)}), SampleAll())
    with pytest.raises(OrderError, match="nothing to start from in row 1"):
        generate(Target(model), model.canvas({"token": ids(2, LENGTH)}, torch.tensor([2, 0])), SampleAll())


def test_a_decider_that_keeps_what_it_did_not_decide_is_told_so():
    model = plain()
    canvas = model.canvas({"token": ids(1, LENGTH)}, 3)
    target = Target(model)
    plan = target.plan(canvas, guess := Guess(torch.tensor([[1, 2]])))
    target.forward(plan, canvas, guess)
    target.commit(6, plan)  # both nodes, but nothing was set
    with pytest.raises(OrderError, match="3 known elements and 1 prefix slots, but 6 slots are cached"):
        target.plan(canvas)


@pytest.mark.parametrize("broken", ["table", "head", "layer"])
def test_broken_weights_are_named_at_the_first_step(broken):
    model = plain()
    weight = {"table": model.embed.table, "head": model.heads["token"].weight, "layer": model.backbone.layers[1].down}
    with torch.no_grad():
        weight[broken][3] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinity: its weights or inputs are broken"):
        generate(Target(model), model.canvas({"token": ids(1, LENGTH, value=3)}, 2), SampleAll())


class _Breaks(Transformer):
    """Overflows when it has come far enough."""

    at = 0

    def forward(self, x, plan, cache=None, vector=None, memory=None):
        x = super().forward(x, plan, cache, vector, memory)
        return x * float("inf") if cache is not None and cache.columns >= self.at else x


@pytest.mark.parametrize("at", [3, 15, 16, 17, 30, 38])
def test_a_model_that_breaks_down_on_the_way_is_found_out(at):
    """No later than 16 steps after, or at the end: also where the last step breaks."""
    model = plain(length=40)
    model.backbone.__class__, model.backbone.at = _Breaks, at
    canvas = model.canvas({"token": ids(1, 40)}, 2)
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        generate(Target(model, warp=Warper(temperature=0)), canvas, SampleAll())
    assert at <= canvas.length <= min(at + 17, 40)


class _HeadBreaks(CategoricalHead):
    """Says NaN or infinity from a forward on, of sound hidden states."""

    at, what, made = 0, float("nan"), 0

    def logits(self, h, reads=None):
        self.made += 1
        x = super().logits(h, reads)
        return x if self.made < self.at else x.index_fill(-1, torch.tensor([2]), self.what)


@pytest.mark.parametrize("what", ["nan", "inf"])
@pytest.mark.parametrize("at", [2, 15, 16, 17, 30, 38])
def test_a_head_that_breaks_down_on_the_way_is_found_out(at, what):
    """As soon as the backbone is: no later than 16 steps after, or at the end."""
    model = plain(length=40)
    head = model.heads["token"]
    head.__class__, head.at, head.what = _HeadBreaks, at, float(what)
    canvas = model.canvas({"token": ids(1, 40)}, 2)
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        generate(Target(model, warp=Warper(temperature=0.5)), canvas, SampleAll())
    assert head.made <= at + 16


def test_a_head_that_breaks_down_among_masks_is_found_at_once():
    model = tabular(line(6), AnyOrder(), VOCAB)
    head = model.heads["token"]
    bare, made = head.logits, []
    head.logits = lambda h, reads=None: made.append(1) or bare(h, reads) * (1 if len(made) < 3 else float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        generate(Target(model), model.blank(1), Select("entropy", steps=6))
    assert len(made) == 3


def test_impossible_ids_are_not_broken_weights():
    """A head may rule ids out by -inf; only NaN and +inf are errors."""

    class Forbids(CategoricalHead):
        def logits(self, h, reads=None):
            x = super().logits(h, reads)
            return x.masked_fill(torch.arange(VOCAB) == 2, -torch.inf)

    model = plain()
    model.heads["token"].__class__ = Forbids
    canvas = generate(Target(model), model.canvas({"token": ids(3, LENGTH)}, 1), SampleAll(), random=Keyed(5))
    assert bool((canvas.value["token"] != 2).all())


# ---- parts that do not go together -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 30])
@pytest.mark.parametrize("decider", [Chain, Walk])
def test_a_draft_of_another_vocabulary_is_refused(size, decider):
    model, small = plain(), tabular(line(LENGTH), Line(1), size)
    with pytest.raises(ValueError, match=f"the draft predicts {size} ids and the target {VOCAB}"):
        generate(Target(model), model.blank(1), decider(), DraftModel(Target(small), 2))


def test_a_draft_of_another_kind_of_element_is_refused():
    model = plain()
    small = tabular(line(LENGTH, "byte"), Line(1), VOCAB)
    with pytest.raises(ValueError, match="the draft model has no head for 'token', which is drafted; it has byte"):
        generate(Target(model), model.blank(1), Walk(), DraftModel(Target(small), 2))


def of_codes():
    config = TransformerConfig(8, 1, 1)
    head = DepthwiseHead(8, 4, 2, config)
    return Model(line(4), Line(1), CodesEmbed(4, 2, 8), Transformer(config), head)


def of_vectors():
    head = FlowHead(8, 3, FlowConfig(8, 1, steps=2))
    return Model(line(4), Line(1), VectorEmbed(3, 8), Transformer(TransformerConfig(8, 1, 1)), head)


@pytest.mark.parametrize(("make", "shape"), [(of_codes, r"\(2,\)"), (of_vectors, r"\(3,\)")])
def test_stop_ids_end_rows_of_ids_only(make, shape):
    model = make()
    with pytest.raises(TypeError, match=f"stop ids end rows of ids, but a value here is a .* of shape {shape}"):
        generate(Target(model), model.blank(2), SampleAll(stop=(1,)))
    assert generate(Target(model), model.blank(2), SampleAll()).done


@pytest.mark.parametrize(("make", "name"), [(of_codes, "Depthwise"), (of_vectors, "Flow")])
def test_a_beam_ranks_texts_of_ids_only(make, name):
    model = make()
    with pytest.raises(TypeError, match=f"a beam ranks texts of ids, not what {name} is a distribution of"):
        generate(Target(model), model.blank(1), Beam(2))


@pytest.mark.parametrize("decider", [SampleAll, Walk, Chain, GreedyMatch, lambda stop: Beam(2, stop)])
def test_stop_is_a_collection_of_ids(decider):
    for wrong in (3, "3", (0.5,), None, ("a",)):
        with pytest.raises(TypeError, match="stop is a collection of ids, such as"):
            decider(stop=wrong)
    for right in ([3], {3}, (3,), range(3, 4), torch.tensor([3]).tolist(), np.array([3])):
        assert decider(stop=right).stop == frozenset({3})


def test_a_draft_of_fewer_than_no_tokens_is_refused():
    with pytest.raises(ValueError, match="a draft has 0 or more tokens, got -1"):
        DraftModel(Target(plain()), -1)


@pytest.mark.parametrize("k", [1.5, 0, -1, "2"])
def test_top_k_is_a_number_of_tokens(k):
    with pytest.raises(ValueError, match=f"top_k keeps a whole number of tokens, at least 1, got {k}"):
        Warper(top_k=k)


def test_without_a_source_of_randomness_every_call_draws_the_same():
    model = plain()
    first, again = (generate(Target(model), model.blank(2), SampleAll()).value["token"] for _ in range(2))
    named, other = (
        generate(Target(model), model.blank(2), SampleAll(), random=Generator(i)).value["token"] for i in (0, 1)
    )
    assert torch.equal(first, again) and torch.equal(first, named) and not torch.equal(first, other)
