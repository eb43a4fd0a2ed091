"""A static order is decoded alike from any cache: the steps' own, none, or one that was lost on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.conditions.condition import PerElementCondition
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.base import Factorization
from seriatim.factorization.static import Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.layout import grid, line
from seriatim.model import Model
from seriatim.plan import MASK, VALUE, OrderError, Plan, Reads, Slots
from seriatim.random import Forced, Keyed
from seriatim.view import two_stream

VOCAB, WIDTH = 3, 16


class Ranked(Factorization):
    """Masks read elements of the same rank, values of earlier ones are seen: by rows of a grid, or in any given order.
    `window`: how many ranks back."""

    def __init__(self, ranks=None, window=None):
        self.ranks, self.window = ranks, window

    def order(self, layout, random=None):
        return layout.coord[:, 0][None] if self.ranks is None else self.ranks

    def packed(self, canvas):
        layout, rank = canvas.layout, canvas.rank
        n = layout.size
        query = torch.arange(2 * n)[None] < n
        e = torch.arange(n).repeat(2)[None]
        source = torch.where(query, MASK, VALUE)
        needs = torch.where(query, -1, rank.repeat(1, 2))
        view = two_stream(rank.repeat(1, 2) + 1, query)
        if self.window is not None:
            view = view.narrow(window=2 * self.window)
        read = torch.where(rank >= 0, e[:, :n], -1)
        slots = Slots(e[..., None], source, layout.coord.repeat(2, 1)[None], needs)
        return Plan(slots, {"all": view}, Reads(torch.where(read >= 0, e[:, :n], -1), read), rank, layout=layout)


class PeeksLater(Ranked):
    """Honest in its first step; in the last one the mask of the last element holds the element."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        source, needs = plan.slots.source.clone(), plan.slots.needs.clone()
        last = canvas.layout.size - 1
        source[:, last], needs[:, last] = VALUE, canvas.rank[:, last]
        return replace(plan, slots=replace(plan.slots, source=source, needs=needs))


SHUFFLED = torch.tensor([[0, 2, 1, 2, 0, 1], [1, 1, 0, 2, 2, 0]])


def model_of(order, layout=None, conditions=None):
    layout = layout or grid(3, 2)
    embed = TokenEmbed(VOCAB, WIDTH, mask=True, start=False)
    axes = (WIDTH // 4,) * 2 if layout.coord.shape[1] == 2 else None
    backbone = Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE(axes=axes)))
    return randomise(Model(layout, order, embed, backbone, CategoricalHead(WIDTH, VOCAB), conditions), std=0.5)


def blank(model, rows=2, layout=None):
    return model.canvas({"token": torch.zeros(rows, 6, dtype=torch.long)}, layout=layout)


ORDERS = {
    "rows": lambda: model_of(Ranked()),
    "rows in a window": lambda: model_of(Ranked(window=1)),
    "blocks": lambda: model_of(Blocks(2), line(6)),
    "rows of the batch in orders of their own": lambda: model_of(Ranked(SHUFFLED)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_without_a_cache_the_same_law_is_sampled(name):
    model = ORDERS[name]()
    x = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        packed = model.log_prob(model.canvas({"token": x}))
    for cached in (True, False):
        random = Forced(x)
        generate(Target(model, cached=cached), blank(model), SampleAll(), random=random)
        assert (random.log_prob - packed).abs().max() < 1e-9


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("turns", [1, 2])
def test_a_half_finished_sample_goes_on_without_its_cache(name, turns):
    model = ORDERS[name]()
    whole = generate(Target(model), blank(model), SampleAll(), random=Keyed(3))
    canvas = blank(model)
    stream = decode(Target(model), canvas, SampleAll(), random=Keyed(3))
    for _ in range(turns):
        next(stream)
    assert not canvas.done
    other = Target(model)
    steps = list(decode(other, canvas, SampleAll(), random=Keyed(3)))
    assert len(steps) == 3 - turns
    assert torch.equal(canvas.value["token"], whole.value["token"])


def test_conditions_of_single_elements_are_met_again_without_a_cache():
    model = model_of(Ranked(), conditions={"hint": PerElementCondition(4, WIDTH)})
    hint = {"hint": torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}
    x = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        packed = model.log_prob(model.canvas({"token": x}), hint)
    for cached in (True, False):
        random = Forced(x)
        generate(Target(model, hint, cached=cached), blank(model), SampleAll(), random=random)
        assert (random.log_prob - packed).abs().max() < 1e-9


def test_one_order_serves_layouts_of_one_size():
    """Steps compiled for 3 x 2 elements are not taken for 2 x 3, though ranks are the same."""
    ranks, x = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 2, 2, 1, 0]])

    def scored(model, layout):
        random = Forced(x)
        generate(Target(model), blank(model, 1, layout), SampleAll(), random=random)
        return random.log_prob

    tall, wide = grid(3, 2), grid(2, 3)
    model, fresh = model_of(Ranked(ranks)), model_of(Ranked(ranks))
    first, second = scored(model, tall), scored(model, wide)
    assert torch.equal(second, scored(fresh, wide))
    assert (first - second).abs() > 1e-3


def test_an_order_that_peeks_in_a_later_step_is_refused_before_the_first():
    model = model_of(PeeksLater())
    with pytest.raises(OrderError, match="slot 4 reads element 4, but sees element 5 through slot 5"):
        generate(Target(model), blank(model), SampleAll())


def test_a_cache_that_fits_no_step_is_refused():
    model = model_of(Ranked())
    canvas = blank(model)
    next(decode(Target(model), canvas, SampleAll(), random=Keyed()))
    with pytest.raises(OrderError, match=r"5 slots are cached, but the step that decides rank 1 follows \[0\]"):
        model.factorization.step(canvas, None, 5)
