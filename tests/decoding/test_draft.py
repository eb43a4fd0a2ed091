"""Proposers: what a draft model records is what it drew from, in every round; lookup copies what its index says."""

from __future__ import annotations

import random as stdlib

import pytest
import torch

from seriatim.canvas import Set
from seriatim.decoding.draft import DraftModel, DraftTree, NGram
from seriatim.decoding.filters import Warper
from seriatim.decoding.growth import Dynamic
from seriatim.decoding.guess import Guess, branching, children, depths, moved, room
from seriatim.decoding.loop import Step, decode, generate, select_rows
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Chain, GreedyMatch, Recursive, Walk
from seriatim.factorization.line import Line
from seriatim.laws.tabular import tabular
from seriatim.layout import line
from seriatim.random import Keyed

TREE = branching((3, 2, 1))


@pytest.fixture(scope="module")
def model(transformer):
    return transformer()


@pytest.fixture(scope="module")
def near(model, perturbed):
    return perturbed(model, 0.02)


# ---- trees -----------------------------------------------------------------------------------------------------------


def test_branching_lists_parents_depth_by_depth():
    assert branching((1, 1, 1)) == (-1, 0, 1)
    assert branching((2, 1)) == (-1, -1, 0, 1)
    assert branching((2, 2)) == (-1, -1, 0, 0, 1, 1)
    assert branching(()) == ()
    assert depths(branching((2, 2))) == (1, 1, 2, 2, 2, 2)
    assert children(branching((2, 1))) == {-1: (0, 1), 0: (2,), 1: (3,), 2: (), 3: ()}


def test_impossible_trees_are_refused(near):
    with pytest.raises(ValueError, match="at least 1"):
        branching((2, 0))
    with pytest.raises(ValueError, match="parents come before"):
        children((1, -1))
    with pytest.raises(ValueError, match="depth by depth"):
        DraftModel(Target(near), (-1, 0, -1))
    with pytest.raises(ValueError, match="independent, distinct or top"):
        DraftModel(Target(near), 2, "sorted")


# ---- the draft model -------------------------------------------------------------------------------------------------


def behind(target, canvas, row, path):
    """What a fresh forward of the draft says behind a row's text and a path of tokens."""
    text = [*canvas.value["token"][row, : int(canvas.lengths()[row])].tolist(), *path]
    value = torch.tensor([text + [0] * (canvas.layout.size - len(text))])
    fresh, alone = (
        Target(target.model, warp=target.warp, cached=False),
        target.model.canvas({"token": value}, len(text)),
    )
    with torch.no_grad():
        return fresh.forward(fresh.plan(alone), alone).dist.probs()[0, -1]


@pytest.mark.parametrize("warp", [None, Warper(0.7, top_k=4)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("shape", "siblings"), [(4, "independent"), (TREE, "independent"), (TREE, "distinct")])
def test_the_recorded_law_is_that_of_the_draft_behind_each_node(model, near, warp, batch, shape, siblings):
    """In every round, also after fully accepted drafts (whose last token the draft has not seen); distinct siblings
    without the earlier ones, renormalised."""
    draft = DraftModel(Target(near, warp=warp), shape, siblings)
    propose, met = draft.propose, []

    def watched(canvas, target, random):
        guess = propose(canvas, target, random)
        if guess is None or len(met) >= 7:
            return guess
        parent = guess.parents()
        for row in range(batch):
            for i, p in enumerate(parent):
                if guess.value[row, i] < 0:
                    continue
                path, node = [], p
                while node >= 0:
                    path.insert(0, int(guess.value[row, node]))
                    node = parent[node]
                want = behind(draft.draft, canvas, row, path)
                for elder in range(i) if siblings == "distinct" else ():
                    if parent[elder] == p:
                        want[guess.value[row, elder]] = 0
                got = guess.laws([row], [i], want[None])[0]
                assert float((got - want / want.sum()).abs().max()) < 1e-9
                assert float(got[guess.value[row, i]]) > 0
        met.append(guess.size)
        return guess

    draft.propose = watched
    accepted = [
        int(torch.as_tensor(s.accepted).max())
        for s in decode(Target(model, warp=warp), model.blank(batch), Recursive(), draft, Keyed(1))
    ]
    assert len(met) == 7 and max(accepted[:6]) == max(depths(draft.parent))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_likeliest_children_are_those_of_the_draft(model, near, batch):
    draft = DraftModel(Target(near), TREE, "top")
    canvas = model.blank(batch)
    guess = draft.propose(canvas, Target(model), Keyed(0))
    assert guess.q is None
    for row in range(batch):
        for node, below in guess.children().items():
            if below:
                path = [] if node < 0 else [int(guess.value[row, node])]
                while node >= 0 and (node := guess.parents()[node]) >= 0:
                    path.insert(0, int(guess.value[row, node]))
                best = behind(draft.draft, canvas, row, path).topk(len(below)).indices
                assert guess.value[row, list(below)].tolist() == best.tolist()


def test_distinct_children_differ_and_end_with_the_law(near, model):
    """With two possible tokens there are two children, and nothing below the third."""
    draft = DraftModel(Target(near, warp=Warper(top_k=2)), branching((3, 1)), "distinct")
    guess = draft.propose(model.blank(1), Target(model), Keyed(0))
    a, b, c, below_a, below_b, below_c = guess.value[0].tolist()
    assert a != b and min(a, b, below_a, below_b) >= 0 and c == below_c == -1
    canvas = generate(Target(model, warp=Warper(top_k=2)), model.blank(1), Recursive(), draft, Keyed(0))
    assert canvas.done


@pytest.mark.parametrize("batch", [1, 3])
def test_a_tree_that_grows_is_of_the_likeliest_paths_of_the_draft(model, near, batch):
    """All paths of two tokens are looked at, so the nodes are the best of all there are; in a batch, by their sum."""
    draft = DraftTree(Target(near), Dynamic(8, 2, 7))
    canvas = model.canvas({"token": torch.randint(7, (batch, 40), generator=torch.Generator().manual_seed(3))}, 9)
    for _ in range(2):  # the second time from the cache
        guess = draft.propose(canvas, Target(model), Keyed(0))
    assert guess.q is None and guess.size == 8
    worth = {}
    for a in range(7):  # by the rank of the token behind the text, and behind that
        ordered = [behind(draft.draft, canvas, row, []).sort(descending=True) for row in range(batch)]
        below = [behind(draft.draft, canvas, row, [int(o.indices[a])]) for row, o in enumerate(ordered)]
        worth[(a,)] = sum(float(o.values[a]) for o in ordered)
        for b in range(7):
            ranked = [float(x.sort(descending=True).values[b]) for x in below]
            worth[a, b] = sum(float(o.values[a]) * x for o, x in zip(ordered, ranked, strict=True))
    best = sorted(worth, key=lambda path: -worth[path])[:8]
    paths, kids = [], guess.children()
    for node, parent in enumerate(guess.parents()):
        rank = kids[parent].index(node)
        paths.append((rank,) if parent < 0 else (*paths[parent], rank))
    assert sorted(paths) == sorted(best)
    for row in range(batch):
        for node, parent in enumerate(guess.parents()):
            said = behind(draft.draft, canvas, row, [] if parent < 0 else [int(guess.value[row, parent])])
            assert int(guess.value[row, node]) == int(said.sort(descending=True).indices[kids[parent].index(node)])


def test_nothing_is_drafted_where_a_text_outgrows_its_draft(model, near, transformer):
    """The draft ends at 12 elements, the text at 40: with 11 known one more would be one too many."""
    short = Target(transformer(12))
    canvas = model.canvas({"token": torch.zeros(2, 40, dtype=torch.long)}, torch.tensor([4, 9]))
    proposer = DraftModel(short, 4)
    assert proposer.propose(canvas, Target(model), Keyed(0)).size == 2
    canvas = model.canvas({"token": torch.zeros(2, 40, dtype=torch.long)}, torch.tensor([4, 11]))
    assert proposer.propose(canvas, Target(model), Keyed(0)) is None
    assert DraftTree(short, Dynamic()).propose(canvas, Target(model), Keyed(0)) is None


@pytest.mark.parametrize("batch", [1, 3])
def test_the_draft_caches_what_is_known_and_nothing_of_what_it_drafted(model, near, batch):
    """All but the last known element, whatever was accepted; so a full acceptance leaves no hole."""
    draft = DraftModel(Target(near), 3)
    canvas = model.blank(batch)
    before, holes = torch.zeros(batch, dtype=torch.long), 0
    for step in decode(Target(model), canvas, Chain(), draft, Keyed(1)):
        held = torch.as_tensor(draft.draft.cache.length).expand(batch)
        alive = before < model.layout.size - 1
        assert torch.equal(held[alive], before[alive])  # a prefix slot, less the last element
        holes += int((torch.as_tensor(step.accepted) == 3).sum())
        before = canvas.lengths()
    assert holes > 2


def test_with_the_target_as_draft_everything_is_accepted(model):
    """Length 4: five tokens a forward."""
    steps = list(decode(Target(model), model.blank(1), Chain(), DraftModel(Target(model), 4), Keyed(0)))
    assert len(steps) == model.layout.size // 5
    assert all(s.accepted == 4 for s in steps)


def test_another_canvas_starts_the_draft_anew(model, near):
    draft = DraftModel(Target(near), 3)
    first = generate(Target(model), model.blank(1), Chain(), draft, Keyed(0)).value["token"]
    again = generate(Target(model), model.blank(1), Chain(), draft, Keyed(0)).value["token"]
    assert torch.equal(first, again)


@pytest.mark.parametrize("make", [lambda n: DraftModel(Target(n), 3), lambda n: NGram(3)], ids=["model", "lookup"])
def test_drafts_follow_rows_that_come_and_go(model, near, make):
    """Rows dropped, turned round and admitted between rounds end as they would alone."""
    target, canvas, random = Target(model), model.blank(3), Keyed(4)
    proposer = make(near)
    stream = decode(target, canvas, Walk(), proposer, random)
    for _ in range(3):
        next(stream)
    new = model.canvas({"token": torch.zeros(1, model.layout.size, dtype=torch.long)}, row=torch.tensor([7]))
    select_rows(target, canvas, torch.tensor([2, -1, 0]), new)
    for _ in stream:
        pass
    assert canvas.row.tolist() == [2, 7, 0]
    for row, name in enumerate([2, 7, 0]):
        blank = {"token": torch.zeros(1, model.layout.size, dtype=torch.long)}
        alone = model.canvas(blank, row=torch.tensor([name]))
        generate(Target(model), alone, Walk(), make(near), random)
        assert torch.equal(canvas.value["token"][row], alone.value["token"][0])


def test_room_counts_what_is_left_in_each_row(model):
    assert room(model.blank(2)) == [40, 40]
    assert room(model.canvas({"token": torch.zeros(2, 40, dtype=torch.long)}, torch.tensor([3, 38]))) == [37, 2]


def test_moved_says_where_rows_stood():
    row = torch.tensor([3, 1, 2])
    assert moved(row, row) is None and moved(row, row.clone()) is None
    assert moved(row, torch.tensor([2, 9, 3])).tolist() == [2, -1, 0]


# ---- lookup ----------------------------------------------------------------------------------------------------------


def drafted(text, proposer, size=200):
    """The draft behind a text."""
    value = torch.tensor([list(text) + [0] * (size - len(text))])
    model = tabular(line(size), Line(1), 50, 0)
    guess = proposer.propose(model.canvas({"token": value}, len(text)), Target(model), Keyed(0))
    return [] if guess is None else guess.value[0].tolist()


def test_the_longest_match_decides_then_the_most_recent():
    assert drafted([1, 2, 3, 7, 8, 9, 2, 3, 4, 5, 1, 2, 3], NGram(2)) == [7, 8]  # three tokens, although older
    assert drafted([2, 3, 7, 7, 2, 3, 4, 5, 2, 3], NGram(2)) == [4, 5]  # two matches of two: the later
    assert drafted([1, 2, 3, 4], NGram(2)) == []  # no match: no draft
    assert drafted([1, 2, 1, 3, 4, 1], NGram(3, sizes=(2,))) == []


def test_a_copy_may_run_into_itself():
    assert drafted([5, 1, 2, 1, 2], NGram(7)) == [1, 2, 1, 2, 1, 2, 1]
    assert drafted([4, 4], NGram(3)) == [4, 4, 4]


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_a_periodic_text_is_drafted_perfectly_after_one_period_and_n_tokens(period):
    text = [int(i % period) for i in range(60)]
    proposer, size = NGram(6, sizes=(3,)), 200
    model = tabular(line(size), Line(1), 50, 0)
    canvas = model.blank(1)
    for n in range(40):
        guess = proposer.propose(canvas, Target(model), Keyed(0))
        if n >= period + 3:
            assert guess.value[0].tolist() == text[n : n + 6]
        if n < period + 1:
            assert guess is None
        canvas.apply([Set(torch.tensor([[text[n]]]))])
        proposer.observe(canvas, None, Step(()))


def test_no_match_costs_what_plain_decoding_costs(model):
    """Greedy text without a repetition: as many forwards, of one slot each."""

    class Fresh(NGram):
        def _draft(self, row, canvas, most):
            assert super()._draft(row, canvas, 0) == []
            return []

    steps = list(decode(Target(model), model.blank(1), GreedyMatch(), Fresh(5)))
    assert [s.slots for s in steps] == [1] * model.layout.size


def spec_bench(text, length, largest=3):
    """`find_candidate_pred_tokens` of Spec-Bench, on a list; None where it drafts its arbitrary id."""
    n_text = len(text)
    for n in range(largest, 0, -1):
        gram = text[-n:]
        for at in range(n_text - n + 1):
            if text[at : at + n] == gram:
                start, end = at + n, at + n + length
                if end <= n_text and start < n_text - n:
                    return text[start:end]
    return None


@pytest.mark.parametrize("length", [1, 3, 10])
def test_with_both_policies_it_is_the_lookup_of_spec_bench(length):
    rng, met = stdlib.Random(0), 0
    for _ in range(150):
        text = [rng.randrange(5) for _ in range(rng.randrange(4, 40))]
        want = spec_bench(text, length)
        got = drafted(text, NGram(length, earliest=True, whole=True), size=60)
        met += want is not None
        assert got == (want or [])
    assert met > 50


def test_the_index_is_read_once_a_token(model):
    """Round after round only what is new: the work does not grow with the text."""
    proposer, target = NGram(3), Target(model)
    canvas = model.blank(1)
    read, original = [], proposer._read

    def counted(text, index, canvas, row):
        before = len(text)
        original(text, index, canvas, row)
        read.append(len(text) - before)

    proposer._read = counted
    generate(target, canvas, GreedyMatch(), proposer)
    assert sum(read) == canvas.layout.size and max(read) <= 4


def test_rows_have_an_index_of_their_own(model):
    x = torch.zeros(2, 40, dtype=torch.long)
    x[0, :5], x[1, :5] = torch.tensor([1, 2, 3, 1, 2]), torch.tensor([4, 5, 6, 0, 1])
    guess = NGram(3).propose(model.canvas({"token": x}, 5), Target(model), Keyed(0))
    assert guess.value.tolist() == [[3, 1, 2], [-1, -1, -1]]


@pytest.mark.parametrize("wrong", [{"length": -1}, {"sizes": ()}, {"sizes": (0,)}])
def test_impossible_lookups_are_refused(wrong):
    with pytest.raises(ValueError, match="n-gram"):
        NGram(**wrong)


def test_a_guess_without_randomness_says_so():
    assert Guess(torch.tensor([[1, 2]])).chain and Guess(torch.tensor([[1, 2]])).q is None
