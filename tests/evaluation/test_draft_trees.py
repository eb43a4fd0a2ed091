"""Pictures of draft trees: what is noted of a draft is what came of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import decode
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Walk
from seriatim.evaluation.draft_trees import Drafted, Watched, save_trees, some_trees
from seriatim.laws.case import randomise
from seriatim.laws.drafts import Guessing
from seriatim.random import Keyed
from seriatim.systems.text.next_token import Config, NextToken

torch.set_num_threads(1)


def test_nodes_that_stood_are_the_text_behind_the_draft():
    system = NextToken(Config(length=40, vocab=3, width=16, depth=1, heads=2), SimpleNamespace(special={}))  # type: ignore[arg-type]
    randomise(system.model, 1)
    canvas, watched = system._begun([[1, 0, 1]], 30), Watched(Guessing(3, 0))
    with torch.inference_mode():
        steps = list(decode(Target(system.model), canvas, Walk(), watched, Keyed(0)))
    assert not watched.reads_prompt
    text = canvas.value["token"][0].tolist()
    drafted = [step for step in steps if int(step.drafted)]
    assert len(drafted) == len(watched.drafts) > 8 and sum(int(s.accepted) for s in steps) > 3
    for draft, step in zip(watched.drafts, drafted, strict=True):
        assert list(draft.before) == text[: len(draft.before)] and len(draft.stood) == int(step.accepted)
        for node in draft.stood:
            assert draft.parent[node] < 0 or draft.parent[node] in draft.stood
        told = [draft.token[node] for node in sorted(draft.stood)]
        assert told == text[len(draft.before) : len(draft.before) + len(told)]


def test_a_draft_of_nothing_is_no_tree():
    """Hidden transfer has no states to begin with."""
    system = NextToken(Config(length=40, vocab=3, width=16, depth=1, heads=2), SimpleNamespace(special={}))  # type: ignore[arg-type]
    canvas = system._begun([[1, 0, 1]], 4)
    nothing = Guess(torch.zeros(1, 0, dtype=torch.long))
    watched = Watched(SimpleNamespace(propose=lambda *_: nothing, observe=lambda *_: None))  # type: ignore[arg-type]
    watched.propose(canvas, Target(system.model), Keyed(0))
    watched.observe(canvas, None, SimpleNamespace(accepted=0))  # type: ignore[arg-type]
    assert watched.drafts == []


def drafted(*parent: int) -> Drafted:
    return Drafted((0, 1), (2,) * len(parent), parent, frozenset({0}))


def test_some_trees_are_of_different_shapes_from_the_shallowest_to_the_deepest():
    chains = [drafted(*range(-1, n)) for n in (3, 0, 5, 2, 4, 1, 3)]
    assert [d.depth for d in some_trees(chains, 3)] == [1, 3, 6]
    assert [d.depth for d in some_trees(chains[:2], 4)] == [1, 4]
    assert some_trees(chains, 10)[3] is chains[0]


@pytest.mark.filterwarnings("error")
def test_a_picture_has_room_for_every_tree(tmp_path):
    def size(*drafts: Drafted) -> tuple[int, int]:
        with Image.open(save_trees(drafts, lambda i: "_$a b\n"[i:], tmp_path / "trees.png", "trees")) as image:
            return image.size

    one, deep, broad = size(drafted(-1)), size(drafted(-1, 0, 1, 2)), size(drafted(-1, -1, -1, -1))
    assert deep[0] > one[0] and deep[1] == one[1] and broad[1] > one[1] and broad[0] == one[0]
    assert size(drafted(-1), drafted(-1))[0] > one[0]
    save_trees([drafted(-1)], lambda i: "\x17漢\n\t"[i:], tmp_path / "odd.png")  # a glyph that is missing would warn
    with pytest.raises(ValueError, match="no drafts"):
        save_trees([], str, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
