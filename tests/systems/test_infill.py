"""Gaps in a text: how they are marked, that only they are filled, and that both sides of them are seen."""

from __future__ import annotations

import itertools

import pytest
import torch

from seriatim.canvas import GIVEN, Set
from seriatim.decoding.loop import Step
from seriatim.decoding.sample import Remask, Select
from seriatim.decoding.target import Target
from seriatim.decoding.unmask import Unmask
from seriatim.heads.dist import Categorical
from seriatim.laws.case import randomise
from seriatim.systems.decoders import Decoding
from seriatim.systems.infill import Gap, joined, parted
from seriatim.systems.system import Sampling
from seriatim.systems.text import mdlm, next_token, sdar
from seriatim.tokenizers.text import ByteTokenizer, PairTokenizer
from support.inserting import inserting

torch.set_num_threads(1)
SMALL = {"width": 16, "depth": 1, "heads": 2}


def masked(length=64, **settings) -> mdlm.MDLM:
    made = mdlm.MDLM(mdlm.Config(**{"length": length, "block": 8, **SMALL, **settings}), ByteTokenizer()).eval()
    randomise(made.model)
    return made


def blocks(block, length=32) -> sdar.SDAR:
    made = sdar.SDAR(sdar.Config(length=length, block=block, **SMALL), ByteTokenizer()).eval()
    randomise(made.model)
    return made


def plain() -> next_token.NextToken:
    return next_token.NextToken(next_token.Config(length=32, **SMALL))


# ---- marks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a<mask:12>b", ("a", Gap(12), "b")),
        ("<fill>", (Gap(),)),
        ("a<mask:3>", ("a", Gap(3))),
        ("<mask:1>\n<mask:002>", (Gap(1), "\n", Gap(2))),
        ("a<mask:3><mask:4>b", ("a", Gap(7), "b")),
        ("<fill><fill>x", (Gap(), "x")),
        (r"\<mask:3>a<mask:3>", ("<mask:3>a", Gap(3))),
        (r"a\<fill>\<mask:x>b<fill>", ("a<fill><mask:x>b", Gap())),
        (r"a\\<fill>b", ("a\\", Gap(), "b")),
        (r"a\\\<fill>b<fill>", (r"a\<fill>b", Gap())),
        (r"\n\t\\ \d <mask:1>\\", (r"\n\t\\ \d ", Gap(1), r"\\")),
        ("<mask> [MASK] <eos> <mask:2> <fill", ("<mask> [MASK] <eos> ", Gap(2), " <fill")),
    ],
)
def test_a_marked_text_falls_into_its_parts(text, parts):
    assert parted(text) == parts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing is to be filled"),
        ("def f(): <mask>", "nothing is to be filled"),
        (r"\<mask:3> \<fill>", "nothing is to be filled"),
        ("a<mask:0>b", "from 1 on.*<mask:0>"),
        ("a<mask:-3>b", "from 1 on.*<mask:-3>"),
        ("a<mask:>b", "from 1 on"),
        ("a<mask:2.5>b<mask:1>", "from 1 on"),
        ("a<mask:٣>b", "from 1 on"),
        ("a<mask:99999999999>b", "from 1 on"),
        ("a<mask:2>b<fill>", "of one kind"),
    ],
)
def test_marks_that_are_none_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parted(text)


def test_empty_texts_are_no_parts_and_a_gap_of_nothing_is_none():
    assert joined(["", "a", "", "b", Gap(1), "", Gap(1)]) == ("ab", Gap(2))
    with pytest.raises(ValueError, match="at least 1 token"):
        Gap(0)


# ---- filling ---------------------------------------------------------------------------------------------------------


class Letters(Unmask):
    """Decides like `Unmask`, and writes one letter everywhere."""

    def decide(self, canvas, guess, rows, random):
        step = super().decide(canvas, guess, rows, random)
        for edit in step.edits:
            if isinstance(edit, Set):
                edit.value = torch.full_like(edit.value, ord("x"))
        return step


@pytest.mark.parametrize(
    "text", ["b<mask:5>c", "<mask:3>é", "a<mask:2>b<mask:9>c<mask:1>", "<mask:4>", r"\<fill><mask:2>"]
)
def test_gaps_are_filled_and_all_else_stays(text):
    one = masked()
    want = "".join("x" * part.tokens if isinstance(part, Gap) else part for part in parted(text))
    pieces = list(one.infill(parted(text), Sampling(), decoding=Decoding(Letters(Select("confidence", 64)))))
    assert "".join(pieces) == want


@pytest.mark.parametrize("make", [masked, lambda: blocks(32)])
def test_what_is_given_out_is_never_taken_back_and_never_ahead_of_a_gap(make):
    one, canvases, told = make(), [], ""

    def watch(way):
        class Seen:
            def propose(self, canvas, target, random):
                canvases.append(canvas)

            def observe(self, canvas, rows, step):
                pass

        return Decoding(way.decider, Seen())

    parts = parted("ab<mask:6>cd<mask:3>ef")
    for piece in one.infill(parts, Sampling(), watch=watch):
        told += piece
        first = int(canvases[-1].known[0].long().cumprod(0).sum())
        assert len(told.encode()) <= first or "\ufffd" in told
    ids = canvases[-1].value["token"][0].tolist()
    assert told.startswith("ab") and told.endswith("ef")
    assert told == "ab" + one.tokenizer.decode(ids[2:8]) + "cd" + one.tokenizer.decode(ids[10:13]) + "ef"


def test_letters_that_are_cut_by_a_gap_stay_whole():
    """The text around a gap is given out as it was written, whatever ids it takes."""
    pairs = PairTokenizer.train(["äöü and ß, äöü or ß"] * 20, 300)
    one = mdlm.MDLM(mdlm.Config(length=64, vocab=pairs.vocab, **SMALL), pairs).eval()
    text = "".join(one.infill(parted("äö<mask:3>ü ß"), Sampling()))
    assert text.startswith("äö") and text.endswith("ü ß")


def test_no_text_ends_in_a_gap():
    """Though the model is all but sure of it: there is text behind."""
    one = masked()
    eos, head = one.tokenizer.special["eos"], one.model.heads["token"]
    likely = torch.nn.functional.one_hot(torch.tensor(eos), 272) * 20
    plain = head.dist
    head.dist = lambda *given: Categorical(plain(*given).logits + likely)  # type: ignore[method-assign]
    assert "".join(one.stream("a", 8)) == ""
    trace: list[Step] = []
    text = "".join(one.infill(parted("a<mask:20>b"), Sampling(steps=20), trace=trace))
    assert text.startswith("a") and text.endswith("b") and len(trace) > 10
    decided = [x for step in trace for e in step.edits if isinstance(e, Set) for x in e.value[e.element >= 0].tolist()]
    assert len(decided) == 20 and eos not in decided


def test_a_gap_is_decided_in_blocks_like_a_continuation():
    one = masked(block=4)
    canvas = one.gapped(parted("abc<mask:6>d<mask:3>"))
    assert canvas.rank[0].tolist() == [-1, -1, -1, 0, 0, 0, 0, 1, 1, -1, 1, 1, 2]
    assert (canvas.status[0] == GIVEN).tolist() == [True] * 3 + [False] * 6 + [True] + [False] * 3
    a, b = one.gapped(parted("abc<mask:7>")), one.prompted("abc", 7)
    assert a.rank.tolist() == b.rank.tolist() and a.status.tolist() == b.status.tolist()


def test_the_same_seed_fills_alike_as_it_continues():
    one = masked()
    filled = "".join(one.infill(parted("abc<mask:12>"), seed=3))
    assert filled == "abc" + "".join(
        one.stream("abc", 12, seed=3, decoding=Decoding(Unmask(Select("confidence", 128))))
    )


# ---- what is seen of the text behind a gap ---------------------------------------------------------------------------


def law(system, text):
    """The laws of the tokens of a gap as they are read first, before anything of it is decided."""
    canvas = system.gapped(text)
    target, seen = Target(system.model), {}
    with torch.no_grad():
        while (plan := target.plan(canvas)) is not None:
            rows = target.forward(plan, canvas)
            for j, e in enumerate(rows.element[0].tolist()):
                if e >= 0 and e not in seen:
                    seen[e] = rows.dist.log_probs()[0, j]
            target.commit(None, plan)
            now = rows.element[0][rows.element[0] >= 0]
            canvas.apply([Set(torch.full((1, len(now)), ord("x")), now[None])])
    return torch.stack([seen[e] for e in sorted(seen)])


def test_a_masked_system_sees_both_sides():
    one = masked()
    for other in ("Xb<mask:4>cd", "aX<mask:4>cd", "ab<mask:4>Xd", "ab<mask:4>cX"):
        moved = (law(one, parted(other)) - law(one, parted("ab<mask:4>cd"))).abs().amax(1)
        assert bool((moved > 1e-9).all()), other


@pytest.mark.parametrize("block", [1, 2, 4, 8])
def test_blocks_refuse_exactly_what_they_would_not_see(block):
    """For every gap in eight letters: either all of the text reaches all of the gap, or the system says no."""
    one, letters, refused = blocks(block), "abcdefgh", 0
    for start, end in itertools.combinations(range(len(letters) + 1), 2):
        parts = joined([letters[:start], Gap(end - start), letters[end:]])
        unseen = end < len(letters) and (len(letters) - 1) // block > start // block
        if unseen:
            refused += 1
            with pytest.raises(ValueError, match=rf"gap at token {start} .* from token"):
                list(one.infill(parts))
            continue
        before = law(one, parts)
        for i in (*range(start), *range(end, len(letters))):
            changed = letters[:i] + "Z" + letters[i + 1 :]
            moved = (law(one, joined([changed[:start], Gap(end - start), changed[end:]])) - before).abs().amax(1)
            assert bool((moved > 1e-9).all()), (start, end, i)
    assert (refused == 0) == (block == 8)


# ---- what cannot be filled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text", "said"),
    [
        (masked, "a<fill>b", "mdlm fills gaps of a given number of tokens"),
        (masked, "a<mask:64>b", "the text takes 66 tokens, 64 of them in gaps; this model takes 64"),
        (inserting, "a<mask:3>b", "ilm finds out how many tokens"),
        (
            lambda: next_token.NextToken(next_token.Config(length=32, **SMALL)),
            "a<mask:3>b",
            "next-token writes each token",
        ),
        (lambda: next_token.NextToken(next_token.Config(length=32, **SMALL)), "a<fill>b", "it fills none"),
    ],
)
def test_gaps_that_a_system_cannot_fill_are_refused_with_what_to_do(make, text, said):
    with pytest.raises(ValueError, match=said):
        list(make().infill(parted(text)))


def test_a_text_without_gaps_is_refused_from_python_too():
    with pytest.raises(ValueError, match="no gap among"):
        list(masked().infill(["ab"]))


@pytest.mark.parametrize(("length", "said"), [(0, "at least 1 token"), (70, "this model takes 64 in all")])
def test_prompts_are_refused_where_nothing_is_asked_for_or_there_is_no_room(length, said):
    with pytest.raises(ValueError, match=said):
        list(masked().stream("ab", length))


def test_a_gap_of_unknown_length_is_filled_by_insertion_and_nothing_else_is():
    one = inserting()
    texts = {"".join(one.infill(parted("ab<fill>cd"), Sampling(), seed)) for seed in range(6)}
    assert all(text.startswith("ab") and text.endswith("cd") for text in texts) and len(texts) > 3
    two = "".join(one.infill(parted("<fill>b<fill>c"), Sampling()))
    assert two.endswith("c") and "b" in two and len(two) > 2


# ---- what is streamed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [lambda remask: remask, Unmask])
def test_nothing_is_streamed_that_may_be_taken_back(wrapped):
    """A decider that remasks gives its text out at the end, and as it is then."""
    one, trace, counts = masked(), [], []
    decider = wrapped(Remask("confidence", 12, again=3))
    for _ in one.stream("ab", 24, Sampling(), decoding=Decoding(decider), trace=trace):
        counts.append(len(trace))
    assert counts == [len(trace)] and any(len(step.edits) > 1 for step in trace)
