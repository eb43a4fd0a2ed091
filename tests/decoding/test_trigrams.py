"""Tri-grams: tables are counts, adaptation is arithmetic, searches make trees of the table, and the text is the model's
own."""

from __future__ import annotations

import itertools
import random as stdlib
from collections import Counter
from dataclasses import replace

import pytest
import torch

from seriatim.decoding import trigrams
from seriatim.decoding.loop import decode
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.tree_search import (
    MonteCarlo,
    SearchedDraft,
    Trie,
    beam,
    best_first,
    drafting_seconds,
    together,
)
from seriatim.decoding.trigrams import Adapted, no_trigrams, trigram_table
from seriatim.decoding.verify import GreedyMatch, Walk
from seriatim.laws.interface import small
from seriatim.layout import line
from seriatim.random import Generator, Keyed
from seriatim.systems.decoder.aded import read_table, write_table
from seriatim.systems.decoders import LEARNED, decoder_of, forget
from seriatim.systems.system import Sampling

SEARCHES = [beam, best_first, MonteCarlo(), MonteCarlo(30, value="first")]


def _name(search) -> str:
    return getattr(search, "__name__", str(search))  # the same in every process


def documents(seed: int = 0, vocab: int = 6, count: int = 5, length: int = 60) -> list[list[int]]:
    rng = stdlib.Random(seed)
    weights = [2.0**-i for i in range(vocab)]
    return [rng.choices(range(vocab), weights, k=rng.randrange(length)) for _ in range(count)]


def counts(texts: list[list[int]]) -> dict[tuple[int, int], Counter]:
    """How often each token followed each pair, one by one."""
    found: dict[tuple[int, int], Counter] = {}
    for ids in texts:
        for a, b, c in zip(ids, ids[1:], ids[2:], strict=False):
            found.setdefault((a, b), Counter())[c] += 1
    return found


def of_scores(scores: dict[tuple[int, int], dict[int, float]], vocab: int = 20) -> Adapted:
    """A table that holds these scores and does not adapt."""
    table = Adapted(no_trigrams(vocab), bonus=0.0)
    table._raised = {a * vocab + b: dict(found) for (a, b), found in scores.items()}
    return table


def arbitrary(seed: int, vocab: int = 8, width: int = 4) -> Adapted:
    """Scores of random numbers of successors for all pairs."""
    rng = stdlib.Random(seed)
    pairs = itertools.product(range(vocab), repeat=2)
    own = {p: {c: rng.random() / 2 for c in rng.sample(range(vocab), rng.randrange(width + 1))} for p in pairs}
    return of_scores(own, vocab)


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 70, 10**6])
def test_the_table_holds_the_counts_of_a_corpus(monkeypatch, chunk):
    """Shares of all successors, however many documents are counted at once; no tri-gram spans two documents."""
    monkeypatch.setattr(trigrams, "CHUNK", chunk)
    texts = [*documents(), [], [1], [1, 2]]
    table, naive = trigram_table(texts, 6), counts(texts)
    for pair in itertools.product(range(6), repeat=2):
        found = table.successors(*pair)
        total = sum(naive.get(pair, Counter()).values())
        assert found == pytest.approx({c: n / total for c, n in naive.get(pair, Counter()).items()}, rel=1e-6)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    assert table.pair.tolist() == sorted(a * 6 + b for a, b in naive)


def test_of_each_pair_the_likeliest_successors_are_kept_and_rare_ones_left_out():
    texts = documents(3, 9, 8, 120)
    naive = counts(texts)
    cut, rare = trigram_table(texts, 9, width=2), trigram_table(texts, 9, least=3)
    for pair, own in naive.items():
        total = sum(own.values())
        best = sorted((n / total for n in own.values()), reverse=True)
        assert list(cut.successors(*pair).values()) == pytest.approx(best[:2], rel=1e-6)
        assert rare.successors(*pair) == pytest.approx({c: n / total for c, n in own.items() if n >= 3}, rel=1e-6)
    assert len(rare.pair) < len(naive)


def test_an_empty_table_says_nothing():
    for table in (no_trigrams(6), trigram_table([], 6), trigram_table([[1, 2]], 6)):
        assert table.successors(1, 2) == {}
        assert best_first(Adapted(table), 1, 2, 12, 4).token == []
        assert MonteCarlo()(Adapted(table), 1, 2, 12, 4).token == []


def test_ids_and_sizes_that_make_no_table_are_refused():
    with pytest.raises(ValueError, match=r"lie in 0\.\.5, got 1\.\.6"):
        trigram_table([[1, 2, 6]], 6)
    for bad in ({"vocab": 0}, {"vocab": 2**21}, {"vocab": 6, "width": 0}, {"vocab": 6, "least": 0}):
        with pytest.raises(ValueError, match="a table keeps at least 1 of 1 to"):
            trigram_table([], **bad)


# ---- adaptation ------------------------------------------------------------------------------------------------------


def test_each_tri_gram_of_a_text_is_raised_by_the_bonus_up_to_the_cap():
    table = trigram_table([[1, 2, 3, 1, 2, 4, 1, 2, 3]], 6)
    adapted = Adapted(table)
    adapted.reinforce([1, 2, 4, 5])
    assert adapted.after(1, 2).token == [3, 4]
    assert adapted.after(1, 2).score == pytest.approx([2 / 3, 1 / 3 + 0.04], abs=1e-6)
    assert adapted.after(2, 4).token == [1, 5]
    assert adapted.after(2, 4).score == pytest.approx([1.0, 0.04], abs=1e-6)
    adapted.reinforce([1, 2, 4], times=9)
    assert adapted.after(1, 2).score == pytest.approx([1 / 3 + 0.4, 2 / 3], abs=1e-6)
    for _ in range(100):
        adapted.reinforce([1, 2, 4])
    assert adapted.after(1, 2).score == pytest.approx([3.0, 2 / 3], abs=1e-6)
    assert adapted.after(1, 2).total == pytest.approx(3.0 + 2 / 3, abs=1e-6)
    assert table.successors(1, 2) == pytest.approx({3: 2 / 3, 4: 1 / 3})  # the table itself stays
    still = Adapted(table, bonus=0.0)
    still.reinforce([1, 2, 4, 5], 1000)
    assert still.after(1, 2).score == pytest.approx([2 / 3, 1 / 3])


def test_a_text_is_read_once_from_its_beginning_and_then_window_by_window(transformer):
    """Each call raises the tri-grams of the last tokens, 2 fewer than the window has; the first all there are, as often
    as a window that passes over them."""
    model = transformer(vocab=40, length=60)
    value = torch.zeros(1, 40, dtype=torch.long)
    value[0, :20] = torch.arange(20)
    canvas = model.canvas({"token": value}, 20, layout=line(40))
    adapted = Adapted(no_trigrams(40))
    draft = SearchedDraft(adapted, best_first, window=6)
    assert draft.propose(canvas, Target(model), Generator(0)) is None  # nothing followed the last two tokens yet
    raised = {a: adapted.after(a, a + 1).score for a in range(18)}
    assert all(score == pytest.approx([4 * 0.04]) for score in raised.values())
    draft.propose(canvas, Target(model), Generator(0))
    again = {a: adapted.after(a, a + 1).score[0] for a in range(18)}
    assert [a for a in again if again[a] != raised[a][0]] == [14, 15, 16, 17]
    assert again[17] == pytest.approx(5 * 0.04)


def test_what_a_pair_was_followed_by_and_pairs_themselves_are_forgotten_when_they_are_too_many():
    adapted = Adapted(no_trigrams(100), entries=3)
    for a in (1, 2, 3, 1, 4):
        adapted.reinforce([a, 50, 51])
    assert [bool(adapted.after(a, 50).token) for a in (1, 2, 3, 4)] == [True, False, True, True]
    for c in range(99):
        adapted.reinforce([1, 50, c])
    found = adapted.after(1, 50)
    assert found.token[0] == 51  # raised twice
    assert len(found.token) == trigrams.WIDTH
    assert len(adapted._raised[150]) <= 2 * trigrams.WIDTH + 1


def test_a_table_that_follows_the_text_drafts_what_repeats():
    """Of a text of period 5 every token is drafted once it was seen."""
    adapted, text = Adapted(no_trigrams(10)), [1, 2, 3, 4, 5] * 4
    adapted.reinforce(text)
    for search in SEARCHES:
        assert search(adapted, 5, 1, 4, 4).token == [2, 3, 4, 5], search


# ---- searches --------------------------------------------------------------------------------------------------------


def paths_of(trie: Trie) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for above, token in zip(trie.parent, trie.token, strict=True):
        paths.append((*paths[above], token) if above >= 0 else (token,))
    return paths


@pytest.mark.parametrize("search", SEARCHES, ids=_name)
@pytest.mark.parametrize(("nodes", "depth"), [(1, 1), (5, 1), (5, 2), (12, 4), (64, 4)])
def test_a_tree_has_each_beginning_once_and_keeps_to_its_size(search, nodes, depth):
    for seed in range(12):
        table = arbitrary(seed)
        trie = search(table, seed % 8, 3, nodes, depth)
        paths = paths_of(trie)
        assert len(paths) == len(set(paths)) <= nodes
        assert all(len(p) <= depth for p in paths)
        for path in paths:  # every node is a successor of the two before it
            a, b, c = (seed % 8, 3, *path)[-3:]
            assert c in table.after(a, b).token
        assert paths_of(search(table, seed % 8, 3, nodes, depth)) == paths


@pytest.mark.parametrize("seed", range(6))
def test_best_first_takes_the_paths_of_largest_probability(seed):
    table, root = arbitrary(seed, width=3), (seed, 3)
    worth: dict[tuple[int, ...], float] = {}
    level = {(): 1.0}
    for _ in range(3):
        below = {}
        for path, p in level.items():
            found = table.after(*(*root, *path)[-2:])
            for token, score in zip(found.token, found.score, strict=True):
                below[(*path, token)] = p * score / max(found.total, 1.0)
        worth |= below
        level = below
    found = paths_of(best_first(table, *root, 7, 3))
    best = sorted(worth.values(), reverse=True)[:7]
    assert sorted((worth[p] for p in found), reverse=True) == pytest.approx(best, rel=1e-12)


def test_a_beam_keeps_equally_many_at_every_depth():
    table = of_scores({(a, b): {c: 0.5 - c / 20 for c in range(4)} for a in range(4) for b in range(4)})
    paths = paths_of(beam(table, 0, 1, 12, 4))
    assert [sum(len(p) == d for p in paths) for d in (1, 2, 3, 4)] == [3, 3, 3, 3]
    assert paths[:3] == [(0,), (1,), (2,)]


def test_without_exploration_a_search_follows_the_greedy_path():
    table = of_scores({(a, a + 1): {a + 2: 1.0} for a in range(18)})
    trie = MonteCarlo(20, c1=0.0)(table, 3, 4, 4, 4)
    assert paths_of(trie) == [(5,), (5, 6), (5, 6, 7), (5, 6, 7, 8)]


def test_with_strong_exploration_a_search_goes_breadth_first():
    """Equal scores, and only how seldom a child was visited decides: no sibling is ahead by more than a visit."""
    table = of_scores({(a, b): {0: 0.3, 1: 0.3, 2: 0.3} for a in range(4) for b in range(4)})
    for iterations in (12, 39, 80):
        tree = MonteCarlo(iterations, c1=1e9).search(table, 3, 3, 4)
        for parent, children in enumerate(tree.below):
            visits = [tree.visits[i] for i in children or ()]
            assert max(visits, default=0) - min(visits, default=0) <= 1, (parent, visits)
        assert tree.visits[0] == iterations


def test_the_two_values_of_a_step_differ_where_the_last_token_is_likely_and_the_first_is_not():
    """Below 1 the table is sure of what comes next; below 2 it is not, but 2 itself stands behind (0, 2)."""
    table = of_scores({
        (9, 0): {1: 0.5, 2: 0.5}, (0, 1): {3: 0.9}, (1, 3): {4: 0.9}, (0, 2): {5: 0.05, 2: 0.04}, (2, 5): {6: 0.05},
        (2, 2): {6: 0.01},
    })  # fmt: skip
    visits = {}
    for value in ("last", "first"):
        tree = MonteCarlo(60, c1=0.5, value=value).search(table, 9, 0, 4)
        first, second = (tree.visits[tree.token.index(token)] for token in (1, 2))
        visits[value] = first - second
    assert visits["last"] > 0 > visits["first"]


def test_the_value_of_a_node_is_one_and_the_scores_on_the_way():
    """By hand: one iteration, a single path of three nodes."""
    table = of_scores({(8, 9): {1: 0.5}, (9, 1): {2: 0.25, 1: 0.125}, (1, 2): {3: 0.75}})
    last = MonteCarlo(1).search(table, 8, 9, 4)
    assert (last.visits[:2], last.value[0]) == ([1, 1], pytest.approx(1 + 0.5 + 0.25 + 0.75))
    first = MonteCarlo(1, value="first").search(table, 8, 9, 4)
    assert first.value[0] == pytest.approx(1 + 0.0 + 0.125 + 0.0)  # 9 behind (8, 9), 1 behind (9, 1), 2 behind (1, 2)


def test_mistaken_settings_of_a_search_are_refused():
    for bad in ({"iterations": 0}, {"c1": -1.0}, {"c2": 0.0}, {"paths": 0}):
        with pytest.raises(ValueError, match="1 or more iterations and paths"):
            MonteCarlo(**bad)
    with pytest.raises(ValueError, match="'last' or 'first' token, not 'middle'"):
        MonteCarlo(value="middle")
    with pytest.raises(ValueError, match="a window 3 or more tokens; got 12, 4 and 2"):
        SearchedDraft(Adapted(no_trigrams(5)), best_first, window=2)
    with pytest.raises(ValueError, match="a bonus is 0 or more"):
        Adapted(no_trigrams(5), bonus=-0.1)


def test_the_time_of_each_draft_of_a_text_is_told():
    seconds = drafting_seconds(arbitrary(0), best_first, [1, 2, 3, 4, 5, 6, 7])
    assert len(seconds) == 5
    assert all(0 < s < 1 for s in seconds)


# ---- drafts of a batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_trees_of_several_rows_stand_in_one(seed):
    """Each row finds its own tree again where its tokens are, parents before children, nothing of others."""
    table = arbitrary(seed)
    tries = [best_first(table, a, 3, 9, 4) for a in range(4)] + [Trie(0)]
    parent, value = together(tries)
    assert all(p < i for i, p in enumerate(parent))
    assert len(parent) <= sum(len(t.token) for t in tries)
    for trie, row in zip(tries, value, strict=True):
        paths: dict[int, tuple[int, ...]] = {-1: ()}
        for i, (above, token) in enumerate(zip(parent, row, strict=True)):
            if token >= 0:
                paths[i] = (*paths[above], token)
        assert sorted(paths.values()) == sorted([(), *paths_of(trie)])


@torch.inference_mode()
def test_a_row_has_the_same_draft_whoever_is_beside_it(transformer):
    model = transformer(vocab=8, length=40)
    rows = [[1, 2, 3, 1, 2], [4, 5], [6], [7, 7, 7, 7]]

    def drafts(chosen):
        value = torch.zeros(len(chosen), 20, dtype=torch.long)
        for i, r in enumerate(chosen):
            value[i, : len(rows[r])] = torch.tensor(rows[r])
        canvas = model.canvas({"token": value}, torch.tensor([len(rows[r]) for r in chosen]), layout=line(20))
        guess = SearchedDraft(unchanging(arbitrary(1)), MonteCarlo()).propose(canvas, Target(model), Generator(0))
        out = []
        for row in guess.value.tolist() if guess else [[]] * len(chosen):
            paths = {-1: ()}
            for i, token in enumerate(row):
                if token >= 0:
                    paths[i] = (*paths[guess.parents()[i]], token)
            out.append(sorted(paths.values()))
        return out

    beside = drafts([0, 1, 2, 3])
    assert beside == [drafts([r])[0] for r in range(4)]
    assert beside[2] == [()]  # a text of one token has no last pair


@torch.inference_mode()
def test_drafts_end_one_token_before_the_text_does(transformer):
    model = transformer(vocab=8, length=40)
    for left, depth in ((1, 0), (2, 1), (3, 2), (9, 4)):
        value = torch.zeros(1, 5 + left, dtype=torch.long)
        canvas = model.canvas({"token": value}, 5, layout=line(5 + left))
        table = of_scores({(0, 0): {0: 1.0}}, vocab=8)
        guess = SearchedDraft(table, best_first).propose(canvas, Target(model), Generator(0))
        assert (0 if guess is None else max(guess.depths())) == depth


def unchanging(table: Adapted) -> Adapted:
    """The same scores, which texts do not change: rows share a table."""
    table.bonus = 0.0
    return table


# ---- the text --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("search", SEARCHES[1:3], ids=_name)
def test_under_the_same_noise_the_text_is_that_of_plain_decoding(transformer, search, temperature):
    model = transformer(length=100, vocab=7, std=0.6)
    texts = []
    for proposer in (None, SearchedDraft(Adapted(no_trigrams(7)), search), SearchedDraft(arbitrary(2, 7), search)):
        canvas = model.canvas({"token": torch.zeros(1, 99, dtype=torch.long)}, 3, layout=line(99))
        decider = SampleAll() if proposer is None else Walk() if temperature else GreedyMatch()
        target = Target(model, warp=Sampling(temperature=temperature).warp)
        forwards = sum(1 for _ in decode(target, canvas, decider, proposer, Keyed(4)))
        texts.append(canvas.value["token"])
        assert (forwards < 96) == (proposer is not None)
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


@pytest.fixture(scope="module")
def system():
    return small()


@pytest.fixture(scope="module")
def file(system, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "tri-grams.safetensors"
    write_table(system, ["the cat sat on the mat", "the cat ate the rat", ""], path)
    return path


def test_a_table_is_written_and_read_back(system, file):
    e, space, *rest = (ord(letter) for letter in "e cmtr")
    chances = dict(zip(rest, (2 / 5, 1 / 5, 1 / 5, 1 / 5), strict=True))
    assert read_table(system, file).successors(e, space) == pytest.approx(chances, rel=1e-6)
    assert [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("way", ["", "+search=best-first", "+search=beam+nodes=5+depth=2", "+value=first", "+hot=true"])
def test_a_decoder_of_a_file_writes_the_text_of_plain_decoding(system, file, way):
    for temperature in (0.0, 1.0):
        ask = {"max_new_tokens": 20, "temperature": temperature, "seed": 2}
        plain = system.generate("the cat ", "ancestral", **ask)
        ours = system.generate("the cat ", f"aded:{file}{way}", **ask)
        assert ours.ids == plain.ids
        assert ours.drafted > 0


def test_what_was_learned_goes_on_only_where_that_is_asked_for(system):
    forget(system)
    ask = {"max_new_tokens": 24, "temperature": 0.0}
    first = [system.generate("abcab", "aded", **ask).forwards for _ in range(2)]
    assert first[0] == first[1]
    assert system.model not in LEARNED
    hot = [system.generate("abcab", "aded+hot=true", **ask).forwards for _ in range(2)]
    assert hot[0] == first[0]
    assert hot[1] < hot[0]


def test_mistaken_files_and_settings_are_refused(system, file, tmp_path):
    from safetensors.torch import load_file, save_file

    def told(spec: str, message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            decoder_of(system, spec, Sampling())

    told(f"aded:{tmp_path}/none.safetensors", "there is no table of tri-grams", FileNotFoundError)
    told("aded+search=dfs", "search is mcts, best-first or beam, not 'dfs'")
    told("aded+nodes=0", "1 or more nodes")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:200])
    told(f"aded:{tmp_path}/cut.safetensors", "not a whole safetensors file")
    save_file({"pair": torch.zeros(1)}, tmp_path / "other.safetensors", {"about": "{}"})
    told(f"aded:{tmp_path}/other.safetensors", "is no table of tri-grams")
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    tensors = load_file(file)
    for name, change in (
        ("token", lambda x: x + 1000), ("start", lambda x: x.flip(0)), ("pair", lambda x: x.flip(0)),
        ("chance", lambda x: -x), ("token", lambda x: x[:-1]), ("pair", lambda x: x.float()),
    ):  # fmt: skip
        save_file({**tensors, name: change(tensors[name]).contiguous()}, tmp_path / "bad.safetensors", about)
        told(f"aded:{tmp_path}/bad.safetensors", "is damaged")
    about = {"about": about["about"].replace('"vocab": 272', '"vocab": 300')}
    save_file(tensors, tmp_path / "foreign.safetensors", about)
    told(f"aded:{tmp_path}/foreign.safetensors", "counted with another tokenizer: of 300 ids, and this model has 272")
    bare = without_tokenizer(system)
    with pytest.raises(ValueError, match="came without a tokenizer"):
        write_table(bare, ["a"], tmp_path / "x.safetensors")


def without_tokenizer(system):
    """The model alone."""
    bare = type(system)(replace(system.config), system.tokenizer)
    bare.tokenizer = None
    return bare
