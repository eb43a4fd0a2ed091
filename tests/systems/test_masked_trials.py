"""Decoders of tokens in any order are judged by what they write: lines as they stand, and continuations."""

import math

import pytest

from seriatim.laws.case import randomise
from seriatim.systems.masked_trials import Line, _leading, continuations, lines_of, next_lines, paired, written
from seriatim.systems.text.mdlm import MDLM, Config
from seriatim.tokenizers.text import ByteTokenizer


@pytest.fixture(scope="module")
def system():
    one = MDLM(Config(length=240, width=16, depth=1, heads=2, block=None), ByteTokenizer())
    randomise(one.model)
    return one.eval()


def test_rows_of_a_batch_are_counted_each_by_itself(system):
    """What a row writes, and how many of the forwards decide some of it, do not depend on the others."""
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8], [9, 9, 9]]
    for spec in ("unmask+threshold=0.02", "fast-dllm+block=4+threshold=0.02"):
        together = written(system, spec, prompts, 12, 0.0)
        alone = [written(system, spec, [prompt], 12, 0.0) for prompt in prompts]
        assert together.ids == [one.ids[0] for one in alone]
        assert together.forwards == sum(one.forwards for one in alone) < 48
        assert together.tokens == 48


def test_a_line_is_right_that_stands_behind_the_line_break():
    class Says:
        tokenizer = ByteTokenizer()

    texts = {"a\n": "b\nc", "x": "\n  y = 1\nz", "y": "\n  y = 2\nz"}
    lines = [Line(tuple(k.encode()), "  y = 1") for k in texts]
    made = {tuple(k.encode()): list(v.encode()) for k, v in texts.items()}
    import seriatim.systems.masked_trials as trials

    was = trials.written
    trials.written = lambda *_, **__: trials.Written([made[line.context] for line in lines], 10, 30)  # type: ignore[assignment]
    try:
        found = next_lines(Says(), "unmask", lines)  # type: ignore[arg-type]
    finally:
        trials.written = was
    assert found["right"] == [0, 1, 0] and found["matches"] == 1 / 3
    assert found["leading"] == pytest.approx((0 + 1 + 6 / 7) / 3)
    assert _leading("", "ab") == 0 and _leading("abc", "ab") == 1


def test_lines_are_of_held_out_files_and_have_room(system):
    found = lines_of(system, 20, context=40)
    assert len(found) == 20
    assert all(len(line.context) == 40 and len(system.tokenizer.encode(line.text)) <= 28 for line in found)
    assert not any(bytes(line.context).endswith(b"\n\n\n") for line in found)


def test_continuations_are_judged_by_a_model_of_the_same_ids(system):
    class Judge:
        def scores(self, ids, count):
            assert len(ids) == 96 + 8 and count == 8
            return [-math.log(272)] * count

    said = continuations(system, "unmask", Judge(), prompts=2, new=8)
    assert said["nats_per_token"] == pytest.approx(math.log(272))
    assert said["tokens_per_forward"] == 1 and 0 < said["distinct_3"] <= 1


def test_pairs_are_compared_line_by_line():
    gap, error = paired([1, 1, 0, 0], [1, 0, 0, 0])
    assert gap == 0.25 and error == pytest.approx(0.25)
