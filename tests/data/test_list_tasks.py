"""List tasks: which answers are right, by full enumeration; what follows from a seed; which side a problem is on."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch

from seriatim.data.base import load_data, share
from seriatim.data.list_tasks import (
    BLANK,
    DIGITS,
    GROUPS,
    LISTS,
    NAMES,
    Problem,
    asked,
    list_tasks,
    problem,
    squares,
    sudokus,
    vocabulary,
)  # fmt: skip
from seriatim.systems.text.mdlm import MDLM, Config
from seriatim.systems.text_system import Answered, beside
from seriatim.tokenizers.text import ByteTokenizer, WordTokenizer, from_json

A, B, C, W = "Ada", "Ben", "Carl", "Rosa"
ITEMS = (A, B, C)


def every(length):
    """Every answer of so many names, of the four that there are."""
    return set(itertools.product((A, B, C, W), repeat=length))


def accepted(p, lengths=(2, 3, 4)):
    return {x for n in lengths for x in every(n) if p.right(x)}


def words(*answers):
    return {tuple(x.split()) for x in answers}


@pytest.mark.parametrize(
    ("p", "right"),
    [
        (Problem("copy", ITEMS), ["Ada Ben Carl"]),
        (Problem("reverse", ITEMS), ["Carl Ben Ada"]),
        (Problem("sort", (C, A, B)), ["Ada Ben Carl"]),
        (
            Problem("shuffle", ITEMS),
            ["Ada Carl Ben", "Ben Ada Carl", "Ben Carl Ada", "Carl Ada Ben", "Carl Ben Ada"],
        ),
        (Problem("insert-index", ITEMS, W, "0"), ["Rosa Ada Ben Carl"]),
        (Problem("insert-index", ITEMS, W, "3"), ["Ada Ben Carl Rosa"]),
        (
            Problem("insert-random", ITEMS, W),
            ["Rosa Ada Ben Carl", "Ada Rosa Ben Carl", "Ada Ben Rosa Carl", "Ada Ben Carl Rosa"],
        ),
        (Problem("remove-index", ITEMS, index="1"), ["Ada Carl"]),
        (Problem("remove-random", ITEMS), ["Ben Carl", "Ada Carl", "Ada Ben"]),
        (Problem("replace-index", ITEMS, W, "2"), ["Ada Ben Rosa"]),
        (Problem("replace-random", ITEMS, W), ["Rosa Ben Carl", "Ada Rosa Carl", "Ada Ben Rosa"]),
    ],
    ids=lambda x: x.task if isinstance(x, Problem) else "",
)
def test_every_valid_answer_is_accepted_and_every_other_one_refused(p, right):
    assert accepted(p) == words(*right) == set(p.answers())


def test_the_list_as_it_was_is_not_shuffled():
    assert not Problem("shuffle", ITEMS).right(ITEMS)


def test_latin_squares_are_those_of_the_books_and_no_others():
    assert len(squares()) == len(set(squares())) == 576 and len(sudokus()) == 288
    p = problem("latin-square", 0, random.Random(0))
    right = set(p.answers())
    assert all(p.right(x) for x in right)
    spoilt = [list(next(iter(right))) for _ in range(16)]
    for i, square in enumerate(spoilt):
        square[i] = p.items[(p.items.index(square[i]) + 1) % 4]
        assert not p.right(square)
    assert not p.right(next(iter(right))[:15]) and not p.right(DIGITS * 4)


def test_a_sudoku_keeps_what_is_given_and_has_every_digit_everywhere():
    p, answer = asked(3, ("sudoku",), (0,))
    assert p.items.count(BLANK) == 4 and p.right(answer)
    for i, given in enumerate(p.items):
        other = [*answer[:i], DIGITS[DIGITS.index(answer[i]) - 1], *answer[i + 1 :]]
        assert not p.right(other), given
    assert all(p.right(x) == all(g in (BLANK, y) for g, y in zip(p.items, x, strict=True)) for x in sudokus())


def test_sentences_agree():
    said = Problem("sentence-medium", ("dog", "help", "cat"))
    assert said.right(["the", "dog", "helps", "the", "cats"]) and said.right(["the", "cats", "help", "the", "dog"])
    for wrong in ("the dogs helps the cat", "the dog help the cat", "the dog helps the dog", "dog helps the cat"):
        assert not said.right(wrong.split())
    hard = Problem("sentence-hard", ("help", "cat", "dog"))
    assert hard.right(["these", "dogs", "help", "a", "cat"]) and not hard.right(["these", "dog", "helps", "a", "cat"])
    counts = {t: len(problem(t, 0, random.Random(0)).answers()) for t in GROUPS["sentences"]}
    assert list(counts.values()) == [2, 8, 32]


@pytest.mark.parametrize("task", GROUPS["all"])
def test_answers_are_drawn_evenly_from_the_right_ones(task):
    """No share strays by 6 standard deviations: by chance once in 1e6 times."""
    p, rng, draws = problem(task, 3, random.Random(1)), random.Random(2), 500
    found, m = Counter(p.answer(rng) for _ in range(draws)), len(p.answers())
    assert len(set(p.answers())) == m and all(p.right(x) for x in found)
    slack = 6 * (draws * (1 / m) * (1 - 1 / m)) ** 0.5
    assert all(abs(n - draws / m) <= slack for n in found.values())


@pytest.mark.parametrize("task", GROUPS["all"])
@pytest.mark.parametrize("length", [3, 6, 15])
def test_every_word_is_known_and_prompts_of_a_task_are_equally_long(task, length):
    both = [asked(seed, (task,), (length,)) for seed in range(20)]
    assert all({*p.prompt, *answer} <= set(vocabulary()) and p.right(answer) for p, answer in both)
    assert len({len(p.prompt) for p, _ in both}) == len({len(answer) for _, answer in both}) == 1


def test_everything_follows_from_the_seed():
    some = [list_tasks(1000, seed=s).train.pairs[:20] for s in (0, 0, 1)]
    assert some[0] == some[1] != some[2]
    assert list_tasks(1000).train.pairs[-1] == list_tasks(1000).train.pairs[949]


def test_no_prompt_is_on_both_sides():
    data = load_data("list-tasks", "text", count=4000, lengths=(3,), tasks=("copy", "remove-random"), held_out=0.2)
    train, test = ({prompt for prompt, _ in side.pairs} for side in (data.train, data.test))
    assert len(data.train) == 3200 and len(data.test) == 800 and not train & test
    assert all(share(x) < 0.2 for x in test)


@pytest.mark.parametrize(
    "wrong", [{"tasks": "juggle"}, {"tasks": ()}, {"lengths": (16,)}, {"lengths": (1,)}, {"count": 1}, {"held_out": 1}]
)
def test_what_there_is_not_is_refused(wrong):
    with pytest.raises(ValueError):
        list_tasks(**wrong)


def test_a_word_is_a_token_and_comes_back():
    tokenizer = from_json(WordTokenizer.of(vocabulary()).to_json())
    assert all(len(tokenizer.encode(word)) == 1 for word in vocabulary())
    p, answer = asked(0, LISTS, (5,))
    text = " ".join((*p.prompt, *answer))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert min(tokenizer.encode(text)) >= 16 > max(tokenizer.special.values())  # reserved ids are no words
    assert len(set(NAMES)) == 20


def test_a_tokenizer_that_splits_names_is_refused():
    with pytest.raises(ValueError, match=r"'copy' is 4 tokens in this tokenizer.*leave out --tokenizer"):
        Answered(list_tasks(100).train, ByteTokenizer(), (), 64)


def test_answers_alone_are_open_and_nothing_stands_behind_them():
    tokenizer = WordTokenizer.of(vocabulary())
    system = MDLM(Config(length=32, vocab=tokenizer.vocab, width=16, depth=1, heads=2), tokenizer)
    examples = system.answered(list_tasks(100).train)
    batch = examples.take(torch.arange(8))
    canvas, _ = system.canvas(batch)
    for row, (prompt, answer) in enumerate(map(examples.ids, range(8))):
        assert canvas.open[row].nonzero()[:, 0].tolist() == [len(prompt) + i for i in range(len(answer))]
        assert canvas.status[row, len(prompt) + len(answer) :].eq(4).all() and answer[-1] == tokenizer.special["eos"]
        assert batch["token"][row, : len(prompt) + len(answer)].tolist() == prompt + answer


def test_a_window_that_is_too_short_is_an_error_that_says_so():
    tokenizer = WordTokenizer.of(vocabulary())
    with pytest.raises(ValueError, match="give a longer --length"):
        Answered(list_tasks(100).train, tokenizer, (1,), 10).take(torch.arange(3))


def test_beside_counts_answers_only():
    batch = beside([([5, 6], [7]), ([5], [8, 9])])
    assert batch["token"].tolist() == [[5, 6, 7], [5, 8, 9]]
    assert batch["counts"].tolist() == [[False, False, True], [False, True, True]]
