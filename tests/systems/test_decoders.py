"""Every decoder on every request: it does what is asked as plain decoding would, or says why it cannot."""

import pytest

from seriatim.laws.interface import COLUMNS, REQUIRED, cell
from seriatim.systems.decoders import Ask, Decoding, decoder_names, decoder_of, named, options_of
from seriatim.systems.meta import catalogue
from seriatim.systems.system import Sampling

DECODERS = decoder_names("decoder")


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("key", DECODERS)
def test_each_cell_of_the_table(key, column):
    said = cell(key, column)
    lossless = catalogue()[key][0].likelihood == "lossless"
    if column in REQUIRED or lossless:
        assert said == "yes", f"{key} refuses: {said}"


def test_names_with_a_source_and_options_are_taken_apart():
    assert named("jacobi") == ("jacobi", None, {})
    assert named("beam:runs/a+b=c/x") == ("beam", "runs/a", {"b": "c/x"})
    assert named("beam:zoo:text-draft+width=2+penalty=0.5") == ("beam", "zoo:text-draft", {"width": 2, "penalty": 0.5})
    assert named("prompt-lookup+whole=true")[2] == {"whole": True}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prompt-lokup", "did you mean prompt-lookup"), ("jacobi+windo=3", "no option 'windo'; it has window"),
        ("jacobi+window=wide", "window of jacobi is a int"), ("jacobi+window=2.5", "window of jacobi is a int"),
        ("ancestral:zoo:text-draft", "needs no other model"), ("ancestral+x=1", "it has none"), ("", "no decoder ''"),
    ],
)  # fmt: skip
def test_mistaken_names_are_refused_with_what_there_is(spec, message):
    from seriatim.laws.interface import small

    with pytest.raises(ValueError, match=message):
        decoder_of(small(), spec, Sampling())


def test_a_decoding_of_ones_own_is_taken_as_it_is():
    from seriatim.decoding.sample import SampleAll

    mine = Decoding(SampleAll())
    assert decoder_of(None, mine, Sampling()) is mine


def test_options_have_defaults_and_asks_say_what_a_source_should_be():
    assert options_of("jacobi", {"window": 3}).window == 3
    with pytest.raises(ValueError, match="name a small model"):
        Ask(None, Sampling(), (), None, None).draft_model()


def test_of_a_beam_the_best_text_of_each_row_comes_out():
    from seriatim.laws.interface import PROMPTS, small

    system = small()
    many = system.generate(PROMPTS, "beam+width=3", max_new_tokens=8, temperature=1.0)
    alone = [system.generate(prompt, "beam+width=3", max_new_tokens=8, temperature=1.0) for prompt in PROMPTS]
    assert [g.ids for g in many] == [g.ids for g in alone]
    assert [g.text for g in many] == [g.text for g in alone]
