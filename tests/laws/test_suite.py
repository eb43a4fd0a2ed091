"""The suite itself: it finds what is wrong, says so, and cannot be talked out of it."""

import dataclasses

import pytest

from seriatim.cli.laws import _each
from seriatim.laws.case import Case
from seriatim.laws.laws import LAWS, NotApplicable
from seriatim.laws.mutants import MUTANTS
from seriatim.laws.suite import judge, law_mutant_finding, mutant_finding
from seriatim.plan import OrderError
from seriatim.systems.decoders import FAMILIES
from seriatim.systems.meta import catalogue, load


def test_there_are_twelve_laws_each_with_a_mutant():
    assert list(LAWS) == list(MUTANTS) == list(range(1, 13))


@pytest.mark.parametrize("number", LAWS)
def test_each_law_catches_its_mutant_by_its_own_finding(number):
    found = law_mutant_finding(number)
    assert found.status == "holds", found.note


@pytest.mark.parametrize("key", ["next-token", "prompt-lookup", "unmask", "dlinear"])
def test_mutants_of_each_kind_of_system_are_caught(key):
    """`seriatim laws` holds all of them to it."""
    found = mutant_finding(key)
    assert found.status == "holds", found.note


def test_findings_are_the_same_in_several_processes():
    keys = ["next-token", "dlinear"]
    alone, apart = ([[f.status for f in found] for found in _each(keys, workers)] for workers in (1, 2))
    assert alone == apart and len(alone[0]) == len(LAWS) + 1


def test_an_error_inside_a_law_is_not_a_pass():
    def broken() -> Case:
        raise RuntimeError("no case")

    assert judge("nothing", 1, broken).status == "broken"


def test_only_laws_one_and_two_can_be_waived():
    case = load("next-token").case()
    with pytest.raises(ValueError, match="laws 1 and 2 only"):
        dataclasses.replace(case, exempt={5: "too hard"})


def test_what_does_not_apply_says_why():
    with pytest.raises(NotApplicable) as reason:
        LAWS[8][1](load("next-token").case())
    assert len(str(reason.value)) > 10


def test_cards_match_their_modules():
    for key, (meta, module) in catalogue().items():
        loaded = load(key)
        assert loaded.__name__ == module
        assert meta == loaded.META
        if meta.family in FAMILIES:
            assert meta.likelihood == ("relaxed" if loaded.case().neutral or loaded.case().greedy else "lossless")
        elif meta.family not in ("tokenizer", "series"):  # these have no order
            case = loaded.case()
            assert case.model.factorization.likelihood == ("exact" if case.over_ids else meta.likelihood)
            assert not case.over_ids or meta.likelihood == "none"


def test_an_order_that_peeks_is_refused_before_it_is_trained():
    wrong = load("raster-ar").mutant()
    x = wrong.sample(2)
    with pytest.raises(OrderError, match=r"slot 0 reads element 0, but sees element 0 through slot 1"):
        wrong.model.losses(wrong.canvas(x), wrong.rows(2))
