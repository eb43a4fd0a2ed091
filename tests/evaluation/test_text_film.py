"""Films of text: a frame says what stood where after a step, who decided it, when, and how sure the model was; and
looking on changes nothing."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from seriatim.canvas import GIVEN, Set
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import Step, decode
from seriatim.decoding.sample import Remask
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Chain, Walk
from seriatim.evaluation.text_film import Recorder, Speller
from seriatim.heads.dist import Categorical
from seriatim.laws.case import randomise
from seriatim.random import Keyed
from seriatim.systems.decoders import Decoding
from seriatim.systems.infill import parted
from seriatim.systems.system import Sampling
from seriatim.systems.text import as_arm, mdlm, next_token, sdar
from seriatim.tokenizers.text import ByteTokenizer, PairTokenizer, WordTokenizer
from support.inserting import inserting

torch.set_num_threads(1)
SMALL = {"width": 16, "depth": 1, "heads": 2, "length": 64}
HOT = Sampling(temperature=1.5, top_k=100)


@pytest.fixture(scope="module")
def plain() -> next_token.NextToken:
    made = next_token.NextToken(next_token.Config(**SMALL)).eval()
    randomise(made.model)
    return made


def masked() -> mdlm.MDLM:
    made = mdlm.MDLM(mdlm.Config(block=8, **SMALL), ByteTokenizer()).eval()
    randomise(made.model)
    return made


def blocks() -> sdar.SDAR:
    made = sdar.SDAR(sdar.Config(block=4, threshold=0.02, **SMALL), ByteTokenizer()).eval()
    randomise(made.model)
    return made


def text_of(frame) -> str:
    return "".join(place.text or "" for place in frame.places)


class Kept:
    """Notes the laws that a forward said, and the canvas before and after."""

    def __init__(self, proposer=None):
        self.proposer, self.turns = proposer, []

    def __call__(self, way):
        self.proposer = way.proposer
        return Decoding(way.decider, self, way.target)

    def propose(self, canvas, target, random):
        self.before = canvas.known.clone()
        return None if self.proposer is None else self.proposer.propose(canvas, target, random)

    def observe(self, canvas, rows, step):
        self.turns.append((self.before, canvas.copy(), rows, step))
        if self.proposer is not None:
            self.proposer.observe(canvas, rows, step)


# ---- what a frame says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [masked, blocks])
def test_every_place_appears_where_and_when_it_is_decided_with_its_chance(make):
    one, recorder, kept = make(), Recorder(ByteTokenizer()), Kept()
    text = "".join(one.stream("ab", 24, HOT, watch=lambda way: recorder(kept(way))))
    assert len(recorder.frames) == len(kept.turns) + 1 and recorder.frames[0].decided == 0
    assert [p.by for p in recorder.frames[0].places] == ["given"] * 2 + ["open"] * 24
    orders = set()
    for k, (before, canvas, rows, _) in enumerate(kept.turns, 1):
        frame = recorder.frames[k]
        assert [p.element for p in frame.places] == list(range(26)) and frame.forwards == k
        for place in frame.places:
            e = place.element
            assert (place.token is not None) == bool(canvas.known[0, e])
            if place.token is None or place.by == "given":
                continue
            assert place.token == int(canvas.value["token"][0, e]) and place.by == "model"
            assert (place.frame == k) == (not bool(before[0, e]))
            if place.frame == k:
                orders.add((e, k))
                column = rows.element[0].tolist().index(e)
                want = rows.said.log_probs()[0, column, place.token].exp()
                assert place.chance == pytest.approx(float(want), rel=1e-6)
    assert sorted(e for e, _ in orders) == list(range(2, 26))
    assert [e for e, _ in sorted(orders, key=lambda x: x[1])] != list(range(2, 26)), "out of order"
    assert one.tokenizer.decode([p.token for p in recorder.frames[-1].places]) == "ab" + text


def chances(system, prompt, text_ids):
    """What the model gives each token, one pass."""
    ids = torch.tensor([[*prompt, *text_ids]])
    said = torch.log_softmax(system.logits(ids[:, :-1])[0], -1)[len(prompt) - 1 :]
    return said.gather(1, torch.tensor(text_ids)[:, None])[:, 0].exp().tolist()


@pytest.mark.parametrize("decoder", ["ancestral", "jacobi", "token-recycling", "prompt-lookup"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafted_tokens_are_told_from_the_models_own_and_all_have_their_chances(plain, decoder, temperature):
    recorder, prompt = Recorder(ByteTokenizer()), list(b"abcabcabcabc")
    settings = {"max_new_tokens": 30, "temperature": temperature, "top_k": 4, "seed": 2}
    alone = plain.generate(prompt, decoder + "+hot=false" * (decoder == "token-recycling"), **settings)
    made = plain.generate(prompt, decoder + "+hot=false" * (decoder == "token-recycling"), watch=recorder, **settings)
    recorder.finish()
    assert made.ids == alone.ids and made.forwards == alone.forwards == recorder.frames[-1].forwards
    places = [p for p in recorder.frames[-1].places if p.by in ("model", "draft")]
    assert [p.token for p in places] == made.ids
    assert sum(p.by == "draft" for p in places) == made.accepted == sum(f.accepted for f in recorder.frames)
    assert made.drafted == sum(f.drafted for f in recorder.frames)
    assert [p.chance for p in places] == pytest.approx(chances(plain, prompt, made.ids), rel=1e-3)


class Draws:
    """Drafts these trees (None: chains) of three ids, whatever the text is."""

    def __init__(self, parent):
        self.parent, self.drafts = parent, []

    def propose(self, canvas, target, random):
        if canvas.length + 8 > canvas.layout.size:
            return None
        generator = torch.Generator().manual_seed(canvas.length)
        return Guess(torch.randint(3, (1, 6), generator=generator), self.parent)

    def observe(self, canvas, rows, step):
        self.drafts.append(rows.guess)


@pytest.mark.parametrize("way", ["sequential", "assd", "assd-bigram"])
def test_drafts_in_gaps_are_told_too(way):
    """Any known tokens, the others verified from left to right: what was drafted, and all chances, by one pass."""
    made = as_arm.ASARM(as_arm.Config(draft=4, **SMALL), ByteTokenizer()).eval()
    randomise(made.model)
    recorder, trace, kept = Recorder(ByteTokenizer()), [], Kept()
    s = Sampling(temperature=0.7)
    drafts = made.decoding(s, way, ())
    list(made.infill("ab<mask:9>cd<mask:6>e", s, 1, drafts, trace, watch=lambda way: recorder(kept(way))))
    places = [p for p in recorder.frames[-1].places if p.by in ("model", "draft")]
    assert [p.element for p in places] == [*range(2, 11), *range(13, 19)]
    assert sum(p.by == "draft" for p in places) == sum(int(step.accepted) for step in trace)
    assert (way == "assd") == any(p.by == "draft" for p in places) or way == "assd-bigram"
    assert recorder.frames[-1].forwards == sum(step.forwards for step in trace) <= 15
    canvas = kept.turns[-1][1]
    with torch.no_grad():
        whole = made.model.canvas(canvas.value, canvas.status == GIVEN, layout=canvas.layout)
        said = (-made.model.losses(whole)).exp()[0]
    assert [p.chance for p in places] == pytest.approx([float(said[p.element]) for p in places], rel=1e-3)


@pytest.mark.parametrize(("decider", "parent"), [(Chain, None), (Walk, None), (Walk, (-1, -1, 0, 0, 1, 3))])
def test_a_draft_goes_on_in_the_film_where_it_was_left(decider, parent):
    tiny = next_token.NextToken(next_token.Config(**SMALL, vocab=3), SimpleNamespace(special={}))  # type: ignore[arg-type]
    randomise(tiny.model, 1)
    canvas, recorder, proposer = tiny._begun([[1, 0, 1]], 50), Recorder(None), Draws(parent)
    way = recorder(Decoding(decider(), proposer))
    with torch.inference_mode():
        list(decode(Target(tiny.model), canvas, way.decider, way.proposer, Keyed(0)))
    ids, left = canvas.value["token"][0].tolist(), 0
    for frame, guess, before in zip(recorder.frames[1:], proposer.drafts, recorder.frames, strict=False):
        if guess is None:
            assert frame.rejected == "" and frame.drafted == 0
            continue
        start, value, node = 3 + before.decided, guess.value[0].tolist(), -1
        for i in range(frame.accepted):  # down the draft by what stands in the text
            node = next(c for c in guess.children()[node] if value[c] == ids[start + i])
        want = []
        while below := guess.children()[node]:
            node = below[0]
            want.append(str(value[node]))
        assert frame.rejected.split() == want
        left += bool(want)
    assert left > 3 and sum(f.accepted for f in recorder.frames) > 3


def test_a_remasked_place_is_open_again():
    one, recorder = masked(), Recorder(ByteTokenizer())
    list(one.stream("ab", 24, Sampling(), decoding=Decoding(Remask("confidence", 6, again=3)), watch=recorder))
    again = [
        (a.element, k)
        for k, (now, then) in enumerate(zip(recorder.frames[1:], recorder.frames, strict=False), 1)
        for a, b in zip(now.places, then.places, strict=True)
        if a.token is None and b.token is not None
    ]
    assert again
    element, k = again[0]
    final = recorder.frames[-1].places[element]
    assert final.frame > k and recorder.frames[k].places[element].by == "open"


def test_a_token_that_is_decided_again_counts_anew():
    """Though it is the same one."""

    class Again:
        def decide(self, canvas, guess, rows, random):
            left = canvas.open[0].nonzero()[:1]
            return Step((Set(torch.full((1, 2), ord("x")), torch.tensor([[2, int(left)]])),))

    one, recorder = masked(), Recorder(ByteTokenizer())
    list(one.stream("ab", 4, HOT, decoding=Decoding(Again()), watch=recorder))
    assert [[p.frame for p in f.places[2:]] for f in recorder.frames[1:]] == [
        [1, 0, 0, 0], [2, 2, 0, 0], [3, 2, 3, 0], [4, 2, 3, 4],
    ]  # fmt: skip


def test_inserted_places_appear_between_others():
    one, recorder = inserting(), Recorder(ByteTokenizer())
    text = "".join(one.infill(parted("ab<fill>cd"), Sampling(), 1, watch=recorder))
    assert text_of(recorder.frames[0]) == "abcd" and len(recorder.frames[0].places) == 4, "a gap is no place"
    sizes = [len(frame.places) for frame in recorder.frames]
    assert sizes[:-1] == list(range(4, 3 + len(sizes))) and sizes[-1] == sizes[-2] > 8, "one a frame, and the end"
    assert all(f.decided == len(f.places) - 4 for f in recorder.frames)
    last = [p.element for p in recorder.frames[-1].places]
    assert last[:2] == [0, 1] and last[-2:] == [2, 3] and last != sorted(last)
    shown = re.sub(r"<\d+>", "", text_of(recorder.frames[-1]))  # ids that are no letters are shown as such
    assert shown == text


def test_of_a_beam_the_best_text_is_watched(plain):
    recorder = Recorder(ByteTokenizer())
    made = plain.generate("abc", "beam+width=4", max_new_tokens=10, watch=recorder)
    assert [p.token for p in recorder.frames[-1].places if p.by == "model"] == made.ids


def test_what_a_stop_string_cut_off_is_not_in_the_last_frame(plain):
    whole = plain.generate("abc", max_new_tokens=20, seed=3)
    recorder, stop = Recorder(ByteTokenizer()), whole.text[8:10]
    made = plain.generate("abc", max_new_tokens=20, seed=3, stop=[stop], watch=recorder)
    recorder.finish()
    assert [p.token for p in recorder.frames[-1].places if p.token is not None][3:] == made.ids
    assert all(p.by != "open" for p in recorder.frames[-1].places)
    count = len(recorder.frames)
    recorder.finish()
    assert len(recorder.frames) == count


@pytest.mark.parametrize("make", [masked, blocks])
def test_looking_on_changes_nothing(make):
    one = make()
    alone = list(one.stream("ab", 24, HOT, seed=4))
    assert list(one.stream("ab", 24, HOT, seed=4, watch=Recorder(ByteTokenizer()))) == alone


def test_a_recorder_watches_once(plain):
    recorder = Recorder(ByteTokenizer())
    plain.generate("abc", max_new_tokens=2, watch=recorder)
    with pytest.raises(ValueError, match="make another"):
        plain.generate("abc", max_new_tokens=2, watch=recorder)


def test_a_law_that_is_no_choice_of_ids_has_no_chances():
    one, recorder = masked(), Recorder(ByteTokenizer())

    def blind(way):
        inner = recorder(way).proposer
        hides = SimpleNamespace(
            propose=inner.propose, observe=lambda c, rows, step: inner.observe(c, rows._replace(said=None), step)
        )
        return Decoding(way.decider, hides)

    list(one.stream("ab", 4, HOT, watch=blind))
    assert all(p.chance is None for p in recorder.frames[-1].places)


# ---- spelling --------------------------------------------------------------------------------------------------------


def test_a_letter_of_several_ids_belongs_to_the_last_and_waits_for_none():
    spell, ids = Speller(ByteTokenizer()), list("aé€".encode())
    assert spell(ids) == ["a", "", "é", "", "", "€"]
    assert spell([*ids[:2], None, *ids[3:]]) == ["a", "\ufffd", None, "", "", "€"], "its other half is not known yet"
    assert spell([256, 97, 259, 263]) == ["<bos>", "a", "<mask>", "<263>"]
    assert spell([]) == []


def test_pairs_and_words_are_spelled_as_they_are_decoded():
    texts = ["the quick brown fox, the lazy dog"] * 10
    pairs, words = PairTokenizer.train(texts, 300), WordTokenizer.train(texts, 40)
    for tokenizer in (pairs, words):
        ids = tokenizer.encode("the lazy brown fox")
        assert "".join(Speller(tokenizer)(ids)) == tokenizer.decode(ids)
    assert Speller(None)([5, None, 17]) == ["5", None, " 17"]


def test_a_dist_of_one_row_serves_all_rows_of_a_beam():
    """Rows before a selection and after it are told apart."""
    said = Categorical(torch.tensor([[[0.0, 1.0]], [[2.0, 0.0]]]))
    recorder = Recorder(None)
    recorder._canvas = SimpleNamespace(row=torch.tensor([0, 0]))  # type: ignore[assignment]
    rows = SimpleNamespace(said=said, guess=None, element=torch.tensor([[3]]))
    step = SimpleNamespace(edits=(Set(torch.tensor([[1], [0]]), torch.tensor([[3], [3]])),))
    news = recorder._news(rows, step, 1, [])  # type: ignore[arg-type]
    assert news[3][1] == pytest.approx(float(torch.tensor([2.0, 0.0]).softmax(0)[1]))
