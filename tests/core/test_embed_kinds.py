"""Slots of several kinds: each is embedded by the part of its kind, as if it stood alone."""

from __future__ import annotations

import pytest
import torch

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.embed import TokenEmbed, VectorEmbed
from seriatim.embed_kinds import ByKind
from seriatim.layout import Layout, Segment, line
from seriatim.plan import LEARNED, MASK, VALUE, Plan, Reads, Slots
from seriatim.view import full

WIDTH = 6
LAYOUT = Layout(
    (*line(2, "word").segments, Segment("pose", torch.arange(3)[:, None]), *line(2, "word", start=2).segments)
)


def parts():
    torch.manual_seed(0)
    word = TokenEmbed(5, WIDTH, "word", positions=(4,), mask=True, start=False)
    return {"word": word, "pose": VectorEmbed(2, WIDTH, "pose", start=False)}


def canvas():
    g = torch.Generator().manual_seed(1)
    return Canvas(
        LAYOUT, {"word": torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]]), "pose": torch.randn(2, 3, 2, generator=g)}
    )


def plan_over(element, source, place=None):
    element, source = torch.tensor(element), torch.tensor(source)
    n = element.shape[1]
    coord = LAYOUT.coord[element.clamp(min=0)] if place is None else torch.tensor(place)[..., None]
    nothing = torch.zeros(1, 0, dtype=torch.long)
    slots = Slots(element[..., None], source, coord, torch.full_like(source, -1))
    return Plan(slots, {"all": full(n)}, Reads(nothing, nothing), torch.zeros(1, LAYOUT.size, dtype=torch.long))


def test_each_slot_holds_what_its_kind_makes_of_it():
    embed, c = ByKind(parts(), WIDTH, learned=2), canvas()
    word, pose = embed.embeds["word"], embed.embeds["pose"]
    x = embed(c, plan_over([[5, 2, -1, 0, 4, 6]], [[VALUE, VALUE, LEARNED, MASK, VALUE, VALUE]], [[2, 0, 1, 0, 2, 3]]))
    place = word.positions[0]
    assert torch.equal(x[:, 0], word.table[c.value["word"][:, 2]] + place[2])
    assert torch.equal(x[:, 1], pose.project(c.value["pose"][:, 0]))
    assert torch.equal(x[:, 2], embed.learned[1].expand(2, -1))
    assert torch.equal(x[:, 3], (word.mask + place[0]).expand(2, -1))
    assert torch.equal(x[:, 4], pose.project(c.value["pose"][:, 2]))
    assert torch.equal(x[:, 5], word.table[c.value["word"][:, 3]] + place[3])


def test_rows_may_hold_different_kinds_in_one_column():
    embed, c = ByKind(parts(), WIDTH, learned=1), canvas()
    both = embed(c, plan_over([[0, 2, -1], [3, 1, -1]], [[VALUE] * 3] * 2))
    for row, elements in enumerate(([0, 2], [3, 1])):
        alone = embed(c.select(torch.tensor([row])), plan_over([elements], [[VALUE] * 2]))
        assert torch.equal(both[row, :2], alone[0])
    assert bool((both[:, 2] == 0).all())  # padding holds nothing


def test_a_condition_stands_in_the_slots_that_carry_nothing():
    embed, prefix = ByKind(parts(), WIDTH), torch.randn(2, 2, WIDTH)
    x = embed(canvas(), plan_over([[-1, 0, -1]], [[LEARNED, VALUE, LEARNED]], [[1, 0, 0]]), None, prefix)
    assert torch.equal(x[:, 0], prefix[:, 1]) and torch.equal(x[:, 2], prefix[:, 0])


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="at least one kind"):
        ByKind({}, WIDTH)
    only = ByKind({"word": parts()["word"]}, WIDTH, learned=1)
    with pytest.raises(ValueError, match="no embedding for elements of kind 'pose'; there are word"):
        only(canvas(), plan_over([[0, 2]], [[VALUE, VALUE]]))
    with pytest.raises(ValueError, match="ask for 4 learned vectors, there are 1"):
        only(canvas(), plan_over([[0, -1]], [[VALUE, LEARNED]], [[0, 3]]))
    with pytest.raises(ValueError, match="drafts stand in slots of one kind"):
        only(canvas(), plan_over([[0]], [[VALUE]]), Guess(torch.zeros(2, 1, dtype=torch.long)))
