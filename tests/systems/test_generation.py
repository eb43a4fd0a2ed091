"""Generation of text as its users meet it: stops, penalties, several samples, constraints, prefill in chunks, compiled
steps. On tiny random models in float64, where nothing is a matter of rounding."""

import math

import pytest
import torch

from seriatim.backbones.quantize import quantize
from seriatim.decoding.loop import decode
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.shaping import Constraint, Penalties
from seriatim.decoding.target import Target
from seriatim.random import Generator, Keyed
from seriatim.systems.generation import Watch
from seriatim.systems.text.next_token import Config, NextToken
from seriatim.tokenizers.text import ByteTokenizer

PROMPT = "abcabcab"


@pytest.fixture(scope="module")
def system() -> NextToken:
    torch.manual_seed(0)
    made = NextToken(Config(length=96, width=32, depth=2, heads=2))
    for p in made.parameters():
        p.data.mul_(6 if p.dim() > 1 else 1)
    return made.double().eval().requires_grad_(False)


# ---- strings that end a text -----------------------------------------------------------------------------------------


def letters(text: str) -> list[int]:
    return ByteTokenizer().encode(text)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_watch_gives_out_everything_before_the_first_stop_string_and_never_a_letter_of_it(size):
    watch, ids, out = Watch(ByteTokenizer(), ["END", "ENE"]), letters("so EN and ENEND more"), []
    for at in range(0, len(ids), size):
        out.append(watch.push(ids[at : at + size]))
    assert "".join(out) + watch.rest() == "so EN and " == watch.text
    assert watch.ended
    assert watch.count == len("so EN and ENE")


def test_what_began_like_a_stop_string_is_given_out_at_the_end():
    watch = Watch(ByteTokenizer(), ["END"])
    assert watch.push(letters("the EN")) == "the "
    assert watch.rest() == "EN"
    assert not watch.ended


def test_half_a_letter_waits_for_its_other_half():
    watch, ids = Watch(ByteTokenizer(), ["é!"]), letters("aé?")
    assert [watch.push([i]) for i in ids] == ["a", "", "", "é?"]


def test_stop_strings_end_rows_one_by_one_and_leave_the_others_as_they_are(system):
    whole = system.generate([PROMPT, "xyz", "q"], temperature=1, max_new_tokens=30, seed=5)
    stop = whole[1].text[4:6]
    cut = system.generate([PROMPT, "xyz", "q"], temperature=1, max_new_tokens=30, seed=5, stop=[stop])
    for full, short in zip(whole, cut, strict=True):
        at = full.text.find(stop)
        assert short.text == (full.text if at < 0 else full.text[:at])
        assert full.ids[: len(short.ids)] == short.ids
    assert len(cut[1].ids) < 30


def test_streamed_text_is_the_text(system):
    pieces: list[str] = []
    made = system.generate(PROMPT, temperature=1, max_new_tokens=40, seed=1, stream=pieces.append, stop=["\x07\x07"])
    assert "".join(pieces) == made.text
    assert made.first <= made.seconds


# ---- penalties -------------------------------------------------------------------------------------------------------


def by_hand(logits, text, given, p: Penalties):
    out = logits.clone()
    for token in set(text):
        out[token] = out[token] / p.repetition if out[token] > 0 else out[token] * p.repetition
    for token in set(text[given:]):
        out[token] -= p.presence + p.frequency * text[given:].count(token)
    return out


@pytest.mark.parametrize("penalties", [Penalties(1.7), Penalties(1.0, 0.8), Penalties(1.2, -0.3, 0.5)])
def test_penalties_follow_their_definition_at_every_step(system, penalties):
    canvas = system._begun([letters(PROMPT)], 12)
    target = Target(system.model, shapers=(penalties,))
    given, plain = len(PROMPT), Target(system.model, cached=False)
    steps = decode(target, canvas, SampleAll(), random=Generator(3))
    said = []
    forward = target.forward
    target.forward = lambda *a: said.append(forward(*a)) or said[-1]
    for _ in steps:
        text = canvas.value["token"][0, : canvas.length].tolist()[:-1]
        before = system._begun([text], 1)
        row = plain.forward(plain.plan(before), before).dist.logits[0, -1]
        torch.testing.assert_close(said[-1].dist.logits[0, -1].double(), by_hand(row, text, given, penalties))
        torch.testing.assert_close(said[-1].said.logits[0, -1], row)  # what scores are taken from


@pytest.mark.parametrize("decoder", ["prompt-lookup", "jacobi"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_drafts_are_verified_against_the_penalised_law(system, decoder, temperature):
    settings = {"temperature": temperature, "max_new_tokens": 60, "repetition_penalty": 1.3, "frequency_penalty": 0.4}
    plain = system.generate(PROMPT, seed=2, **settings)
    drafted = system.generate(PROMPT, decoder, seed=2, **settings)
    assert drafted.ids == plain.ids
    assert drafted.drafted > 0


def test_neutral_penalties_are_no_penalties_and_wrong_ones_are_refused(system):
    assert not system.sampling.shapers
    with pytest.raises(ValueError, match="repetition penalty is positive"):
        Penalties(0.0)
    with pytest.raises(ValueError, match="finite"):
        Penalties(presence=math.nan)


# ---- several samples, and prefill ------------------------------------------------------------------------------------


def test_samples_of_one_prefill_are_those_of_a_batch_of_the_same_prompt(system):
    one = system.generate(PROMPT, temperature=1, max_new_tokens=20, seed=4, n=3)
    many = system.generate([PROMPT] * 3, temperature=1, max_new_tokens=20, seed=4)
    assert [g.ids for g in one] == [g.ids for g in many]
    assert len({tuple(g.ids) for g in one}) == 3


def test_several_samples_of_several_prompts_stand_prompt_by_prompt(system):
    made = system.generate([PROMPT, "xyz"], temperature=0, max_new_tokens=5, n=2)
    alone = [system.generate(p, temperature=0, max_new_tokens=5).ids for p in (PROMPT, "xyz")]
    assert [g.ids for g in made] == [alone[0], alone[0], alone[1], alone[1]]
    with pytest.raises(ValueError, match="at least 1 generation"):
        system.generate(PROMPT, max_new_tokens=5, n=0)


@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, "xyzxyzxyzxyz", "q"]])
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("shared", [True, False])
def test_prefill_in_chunks_changes_nothing_but_the_size_of_forwards(system, prompts, chunk, shared, monkeypatch):
    rows = [letters(p) for p in prompts]
    out, sizes = [], []
    backbone = system.model.backbone
    forward = backbone.forward
    for size in (None, chunk):
        canvas, target = system._begun(rows, 10), Target(system.model)
        if size is not None:
            monkeypatch.setattr(
                backbone, "forward", lambda x, plan, *a: sizes.append(plan.size) or forward(x, plan, *a)
            )
            target.prefill(canvas, size, shared)
            monkeypatch.undo()
        for _ in decode(target, canvas, SampleAll(), random=Keyed(1)):
            pass
        out.append([row.tolist() for row in canvas.read("token")])
    assert out[0] == out[1]
    assert max(sizes, default=0) <= chunk
    if shared or len(rows) > 1:  # a start, and all letters but the last: nothing twice, nothing as padding
        assert sum(sizes) == sum(map(len, rows))
    else:  # the last chunk is the first step's
        assert len(rows[0]) - chunk < sum(sizes) <= len(rows[0]) or chunk > len(rows[0])


# ---- constraints -----------------------------------------------------------------------------------------------------


class Alternating:
    """a and b in turn, for a number of letters; then the end."""

    def __init__(self, letters: int):
        self.left, self.said = letters, []

    def allowed(self):
        mask = torch.zeros(256, dtype=torch.bool)
        mask[ord("ab"[len(self.said) % 2]) if len(self.said) < self.left else ord("\n")] = True
        return mask

    def take(self, ids):
        self.said += ids

    def back(self, count):
        del self.said[len(self.said) - count :]


@pytest.mark.parametrize("decoder", ["ancestral", "prompt-lookup"])
def test_a_constraint_holds_in_every_row_and_under_drafts(system, decoder):
    class Grammar:
        def matchers(self, tokenizer, stop, rows):
            return [Alternating(3 + b) for b in range(rows)]

    settings = {"temperature": 1, "max_new_tokens": 12, "stop": [ord("\n")], "grammar": Grammar()}
    made = system.generate(["ab" * 5, "xyz"], decoder, **settings)
    assert [g.text for g in made] == ["aba\n", "abab\n"]
    if decoder != "ancestral":
        assert made[0].accepted > 0


def test_matchers_and_rows_are_equally_many(system):
    target = Target(system.model, shapers=(Constraint([Alternating(3)]),))
    with pytest.raises(ValueError, match="1 matchers for 2 rows"):
        next(iter(decode(target, system._begun([letters(PROMPT)] * 2, 4), SampleAll())))


# ---- compiled steps --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "int8", "int4"])
def test_compiled_steps_say_what_the_others_say(name):
    torch.manual_seed(0)
    made = NextToken(Config(length=64, width=64, depth=2, heads=2)).eval().requires_grad_(False)
    for p in made.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)
    if name:
        quantize(made.model, name)
    prompts = [PROMPT, [PROMPT, "xyz"]]
    before = [made.generate(p, temperature=0, max_new_tokens=30, logprobs=True) for p in prompts]
    made.model.compile_decoding()
    after = [made.generate(p, temperature=0, max_new_tokens=30, logprobs=True) for p in prompts]
    assert before[0].ids == after[0].ids
    assert [g.ids for g in before[1]] == [g.ids for g in after[1]]


@pytest.mark.parametrize("stop", [None, ["\n"], ["ab"]])
def test_a_beam_is_streamed_as_it_ends(system, stop):
    """The best text may be another one after the next step: nothing is given out before the last."""
    for seed in range(3):
        pieces: list[str] = []
        prompt = PROMPT + "xyz"[seed]
        made = system.generate(prompt, "beam+width=4", max_new_tokens=12, stream=pieces.append, stop=stop)
        assert "".join(pieces) == made.text and len(pieces) <= 1
        assert stop is None or stop[0] not in made.text
