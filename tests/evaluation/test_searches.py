"""What is shown of searched drafts: the tokens that they give along a text, and a search with its visits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess, depths
from seriatim.decoding.loop import decode
from seriatim.decoding.shaping import Shaper
from seriatim.decoding.target import Target
from seriatim.decoding.tree_search import MonteCarlo, SearchedDraft, accepted_along, best_first
from seriatim.decoding.trigrams import Adapted, no_trigrams, trigram_table
from seriatim.decoding.verify import Walk
from seriatim.evaluation.draft_trees import save_trees
from seriatim.evaluation.searches import rates, save_rates, searched
from seriatim.random import Generator
from seriatim.systems.text.next_token import Config, NextToken

VOCAB = 7


def text(length: int = 120, seed: int = 0) -> list[int]:
    """Words that come back now and then."""
    g = torch.Generator().manual_seed(seed)
    words = [torch.randint(VOCAB, (5,), generator=g).tolist() for _ in range(6)]
    return [x for i in torch.randint(6, (length,), generator=g).tolist() for x in words[i]][:length]


def writes(ids: list[int]) -> Shaper:
    """What makes any model write this text: behind a node of a draft what stands at its place."""

    def shape(logits: Tensor, canvas: Canvas, guess: Guess | None) -> Tensor:
        ahead = [0, *(depths(guess.parents()) if guess is not None else ())]
        said = [ids[min(canvas.length + d, len(ids) - 1)] for d in ahead]
        return torch.nn.functional.one_hot(torch.tensor(said), VOCAB).float().log().expand_as(logits)

    return shape


@pytest.mark.parametrize("bonus", [0.0, 0.04])
def test_tokens_along_a_text_are_those_of_a_model_that_writes_it(bonus):
    """The same drafts and the same acceptance as `SearchedDraft` and `Walk` with a model that knows nothing else."""
    ids = text()
    table = trigram_table([text(400, seed=1), ids[:60]], VOCAB)
    system = NextToken(Config(length=120, vocab=VOCAB, width=8, depth=1, heads=1), SimpleNamespace(special={}))
    for search in (MonteCarlo(iterations=20), best_first):
        canvas = system._begun([ids[:2]], len(ids) - 2)
        proposer = SearchedDraft(Adapted(table, bonus), search, nodes=6, depth=3)
        target = Target(system.model, shapers=(writes(ids),))
        steps = list(decode(target, canvas, Walk(), proposer, Generator(0)))
        assert canvas.value["token"][0].tolist() == ids
        want = [int(step.accepted) + 1 for step in steps]
        assert accepted_along(Adapted(table, bonus), search, ids, nodes=6, depth=3) == want
        assert sum(want) == len(ids) - 2 and max(want) > 2


def test_a_table_that_adapts_gives_more_and_more_along_a_text_that_repeats_itself():
    ids = text(400)
    adapting, static = (accepted_along(Adapted(no_trigrams(VOCAB), bonus), best_first, ids) for bonus in (0.04, 0.0))
    assert static == [1] * (len(ids) - 2)
    assert len(adapting) < 0.6 * len(static)
    half = len(adapting) // 2
    assert sum(adapting[half:]) > sum(adapting[:half])


def test_rates_are_means_over_the_last_tokens():
    place, rate = rates([1] * 10 + [4] * 10, over=8)
    assert place == [*range(1, 11), *range(14, 51, 4)]
    assert rate[:10] == [1.0] * 10 and rate[-1] == 4.0
    assert rates([1, 1, 3], over=10) == ([2, 5], [1.0, 5 / 3])


def test_a_search_is_shown_with_its_visits_and_the_draft_is_part_of_it(tmp_path):
    table, ids, search = Adapted(trigram_table([text(400)], VOCAB)), text(400)[:40], MonteCarlo(iterations=30)
    found = searched(search, table, ids, nodes=6, depth=3)
    assert found.notes is not None
    draft = search(table, *ids[-2:], 6, 3)
    assert len(found.stood) == len(draft.token)
    visits = [int(note) if note else 0 for note in found.notes]
    top = [i for i, above in enumerate(found.parent) if above < 0]
    assert sum(visits[i] for i in top) == search.iterations  # every search goes through one child of the root
    for i, above in enumerate(found.parent):
        assert above < i and (above < 0 or visits[i] <= visits[above])
        assert i not in found.stood or above < 0 or above in found.stood
    file = save_trees([found], str, tmp_path / "search.png")
    with Image.open(file) as picture:
        assert picture.width > 200
    with Image.open(save_rates({"a": [1, 2, 3] * 50, "b": [1] * 200}, tmp_path / "rates.png", 100)) as picture:
        assert picture.width > picture.height
