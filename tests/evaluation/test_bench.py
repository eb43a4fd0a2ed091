"""What a bench computes from what was written: rates, lengths, outputs that loop, losslessness, and its prompts."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from seriatim.evaluation.bench import Prompt, Written, apart, figures, loops, take_turns
from seriatim.evaluation.lossless import ERROR, allowed, divergences, first_difference, step_of, two_samples
from seriatim.evaluation.questions import Question, builtin_questions, read_questions

VARIED, LOOPING = tuple(range(10)), (1, 2) * 5


def wrote(ids=VARIED, forwards=10, seconds=1.0, drafted=0, accepted=0):
    return Written(tuple(ids), forwards, drafted, accepted, seconds, seconds / 10)


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_plain_beside_plain_is_as_fast_and_takes_a_forward_for_each_token():
    runs = [[wrote(seconds=s) for s in (1.0, 3.0, 2.0)], [wrote(VARIED[:5], 5, s) for s in (4.0, 4.0, 9.0)]]
    told = figures(runs, runs)
    assert told["ratio"] == told["ratio_of_mean_rates"] == told["mean_accepted_length"] == 1
    assert told["ratios"] == [1, 1, 1]
    assert (told["tokens"], told["forwards"], told["prompts"]) == (15, 15, 2)


def test_rates_are_all_tokens_over_all_seconds_of_median_runs():
    plain = [[wrote(seconds=2.0)] * 3, [wrote(VARIED[:2], 2, seconds=1.0)] * 3]
    ours = [
        [wrote(forwards=4, seconds=s, drafted=8, accepted=6) for s in (1.0, 50.0, 0.5)],
        [wrote(VARIED[:2], 2, seconds=1.0)] * 3,
    ]
    told = figures(ours, plain)
    assert told["tokens_per_second"] == 12 / 2.0  # not the mean of 10 and 2
    assert told["ratio"] == pytest.approx((12 / 2) / (12 / 3))
    assert told["ratio_of_mean_rates"] == pytest.approx((10 + 2) / (5 + 2))  # Spec-Bench's figure
    assert told["mean_accepted_length"] == 12 / 6
    assert (told["drafted"], told["accepted"]) == (8, 6)
    assert told["first_token_seconds"] == pytest.approx(0.1)


def test_a_slower_decoder_has_a_ratio_below_one():
    assert figures([[wrote(seconds=1.5)]], [[wrote(seconds=1.0)]])["ratio"] < 1


def test_outputs_that_loop_are_averaged_apart_for_all_decoders_alike():
    prompts = [Prompt((1,), "code"), Prompt((2,), "English"), Prompt((3,), "code")]
    plain = [[wrote()], [wrote(LOOPING)], [wrote()]]
    ours = [[wrote(forwards=10)], [wrote(LOOPING, forwards=2, seconds=0.2)], [wrote(LOOPING, forwards=5)]]
    assert loops(plain) == [False, True, False]
    told = apart(ours, plain, prompts)
    assert (told["outputs"], told["prompts"], told["ratio"]) == ("varied", 2, 1)
    assert told["mean_accepted_length"] == pytest.approx(20 / 15)
    assert told["looping"]["ratio"] == pytest.approx(5) and told["looping"]["prompts"] == 1
    assert {group: part["prompts"] for group, part in told["groups"].items()} == {"code": 2}
    assert told["distinct_share"] == pytest.approx((1.0 + 0.2) / 2)


def test_where_all_outputs_loop_the_figures_say_so():
    told = apart([[wrote(LOOPING)]], [[wrote(LOOPING)]], [Prompt((1,), "code")])
    assert told["outputs"] == "looping" and told["looping"]["tokens"] == told["tokens"] == 10


def test_every_run_gives_every_prompt_to_every_decoder_in_changing_order():
    said: list[tuple[str, int]] = []

    def arm(name):
        return lambda prompt: (said.append((name, prompt.ids[0])), wrote())[1]

    told: list[tuple[int, int]] = []
    prompts = [Prompt((n,), "") for n in range(6)]
    written = take_turns({"a": arm("a"), "b": arm("b")}, prompts, 2, 0, lambda *at: told.append(at))
    assert all(len(runs) == 2 for own in written.values() for runs in own)
    pairs = [said[i : i + 2] for i in range(0, len(said), 2)]
    assert [{n for _, n in pair} for pair in pairs] == [{n} for n in range(6)] * 2
    assert {tuple(name for name, _ in pair) for pair in pairs} == {("a", "b"), ("b", "a")}
    assert told[-1] == (24, 24)


# ---- greedy texts ----------------------------------------------------------------------------------------------------


def test_a_change_of_one_token_is_found_and_a_text_that_goes_on_too():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 9, 3], [1, 2, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


@pytest.mark.parametrize("size", [0.3, 1.0, 11.7, 16.0, 31.9, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_is_the_distance_to_the_next_number_of_the_format(size, dtype):
    x = torch.tensor(size, dtype=dtype)
    bits = x.view(torch.int16) + 1
    assert step_of(float(x), dtype) == float(bits.view(dtype)) - float(x)


@pytest.mark.parametrize(
    ("gap", "dtype", "right"),
    [
        (0.24, torch.bfloat16, True),  # a step at 20 is 0.125
        (0.25, torch.bfloat16, False),
        (1.0, torch.bfloat16, False),
        (0.24, torch.float32, False),
        (0.0, torch.float64, False),
    ],
)
def test_texts_may_part_where_two_logits_are_near_in_sixteen_bits_only(gap, dtype, right):
    rows = torch.zeros(8)
    rows[5], rows[6] = 20.0, 20.0 - gap
    met = []
    found = divergences([[1, 6, 7]], [[1, 5, 3]], lambda n, said: (met.append((n, list(said))), rows)[1], dtype)
    assert met == [(0, [1])]
    assert [(d.prompt, d.at) for d in found] == [(0, 1)]
    assert allowed(found, dtype) == right


@pytest.mark.parametrize(("other", "right"), [(2.0, False), (0.5, False), (-0.1, True), (3.0, True)])
def test_a_gap_is_allowed_where_two_plain_forwards_differ_by_more(other, right):
    """The plain step says 1.0, which is 8 steps; the other forward says `other`."""
    said = [torch.zeros(8), torch.zeros(8)]
    said[0][5], said[0][6] = 20.0, 19.0
    said[1][5], said[1][6] = 20.0, 20.0 - other
    found = divergences([[6]], [[5]], lambda n, s: said[0], torch.bfloat16, lambda n, s: said[1])
    assert found[0].steps == 8 and allowed(found, torch.bfloat16) == right


def test_a_text_that_ends_elsewhere_is_never_allowed():
    found = divergences([[1, 2]], [[1, 2, 3]], lambda n, said: torch.zeros(8), torch.bfloat16)
    assert found[0].steps == math.inf and not allowed(found, torch.bfloat16)


# ---- the test of two samples -----------------------------------------------------------------------------------------

HEAVY = [0.3, 0.2, 0.1, *[0.4 / 300] * 300]  # some likely tokens, and a long tail


def draws(n, seed, law):
    dice = random.Random(seed)
    return [(i % 4, *dice.choices(range(len(law)), law, k=3)) for i in range(n)]


def test_samples_of_one_law_pass_about_as_often_as_they_should():
    """Of 150 pairs fewer than 16 have p < 0.05 (by chance 1 in 2,000 runs of a right test), and none p < 0.001."""
    values = [two_samples(draws(800, 2 * s, HEAVY), draws(800, 2 * s + 1, HEAVY)) for s in range(150)]
    assert sum(p < 0.05 for p in values) < 16
    assert min(values) >= ERROR
    assert max(values) > 0.5, "or the test never passes anything easily"


@pytest.mark.parametrize("place", [0, 5])
def test_a_biased_sampler_is_rejected(place):
    """A tenth of the mass elsewhere (0.07 in total variation where the token is likely anyway), in 10,000 draws."""
    law = [0.9 * p for p in HEAVY]
    law[place] += 0.1
    assert two_samples(draws(10_000, 1, law), draws(10_000, 2, HEAVY)) < ERROR


def test_tokens_that_are_right_one_by_one_but_not_together_are_rejected():
    dice = random.Random(0)
    ours = [(0, x, x) for x in dice.choices(range(4), k=2000)]
    theirs = [(0, *dice.choices(range(4), k=2)) for _ in range(2000)]
    assert two_samples(ours, theirs) < ERROR
    assert two_samples([o[:2] for o in ours], [o[:2] for o in theirs]) >= ERROR


def test_samples_of_other_prompts_are_not_compared():
    with pytest.raises(ValueError, match="equally many"):
        two_samples([(0, 1)], [(1, 1)])


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_half_of_the_built_in_prompts_are_our_own(chat):
    groups = [q.group for q in builtin_questions(chat)]
    assert 2 * sum(g.startswith("own") for g in groups) == len(groups)
    assert {g.split()[1] for g in groups} == ({"code", "English", "chat"} if chat else {"code", "English"})
    assert all(q.chat == q.group.endswith("chat") for q in builtin_questions(chat))


def test_questions_in_the_format_of_spec_bench_are_read(tmp_path):
    path = tmp_path / "questions.jsonl"
    lines = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite.\u2028Now."]},
        {"question_id": 1, "category": "qa", "turns": ["Why?"], "reference": ["Because."]},
    ]
    path.write_text("\ufeff" + "\n".join(json.dumps(x, ensure_ascii=False) for x in lines) + "\n\n", encoding="utf-8")
    expected = [Question(("Write.", "Rewrite.\u2028Now."), "writing", True), Question(("Why?",), "qa", True)]
    assert read_questions(path) == expected


def test_lines_with_a_prompt_are_texts_to_continue(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Once\\n\\nupon"}\n{"prompt": "def f(", "category": "code"}', encoding="utf-8")
    assert read_questions(path) == [Question(("Once\n\nupon",), "text", False), Question(("def f(",), "code", False)]


def test_paragraphs_of_a_text_file_are_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('{"a": 1}\r\n  two \r\n\r\n\r\n   \r\nThe end', encoding="utf-8")
    assert [q.turns for q in read_questions(path)] == [('{"a": 1}\n  two',), ("The end",)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\n", "empty"),
        ("a.jsonl", b"\n", "empty"),
        ("a.txt", b"caf\xe9", "not UTF-8: byte 3 is 0xe9"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2 of .* is no JSON"),
        ("a.jsonl", b'{"question": "a"}', 'line 1 of .*"turns"'),
        ("a.jsonl", b'{"turns": "a"}', "turns are a list of texts"),
        ("a.jsonl", b'{"turns": []}', "turns are a list of texts"),
        ("a.jsonl", b'{"prompt": " "}', "none is empty"),
        ("a.jsonl", b'["a"]', "line 1 of"),
        ("a.jsonl", b'{"prompt": "a", "category": 3}', "a category is a text"),
        ("a.jsonl", b"[" * 100_000, "line 1 of .* is no JSON"),
    ],
)
def test_files_without_prompts_are_refused_with_the_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_questions(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        read_questions(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match="give a file"):
        read_questions(tmp_path)
