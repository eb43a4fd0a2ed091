"""Rows of the taxonomy follow what systems do: change a part, and the row changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from seriatim.decoding.sample import SampleAll, Select
from seriatim.factorization.static import AnyOrder
from seriatim.laws.case import Case
from seriatim.systems.decoders import FAMILIES
from seriatim.systems.meta import catalogue, load
from seriatim.systems.taxonomy import begun, decoder_row, orders, row_of, system_row, taxonomy, toy, watched
from seriatim.systems.text import mdlm, next_token, sdar

ESTIMATES = ("trajectory", "mean-field", "diffu", "coupled")
KNOWN = {
    "next-token": ("tokens", "1 of 24", (1, 1), "exact", "none", ("exact",)),
    "mdlm": ("tokens and masks", "6 of 6", (1, 1), "none", "known", ESTIMATES),
    "sdar": ("tokens and masks", "4 of 24", (1, 4), "exact", "known", ESTIMATES),
    "as-arm": ("tokens and masks", "1 of 24", (2, 10), "exact", "known", ("exact",)),
    "ilm": ("tokens, insertions", "6 of 6", (1, 1), "none", "unknown", ()),
}


@pytest.mark.parametrize("key", KNOWN)
def test_what_is_known_of_a_system_is_found(key):
    row = system_row(key)
    assert (row.states, row.orders, row.commits, row.cache, row.fills, row.estimates) == KNOWN[key]


@pytest.mark.parametrize(
    ("key", "most", "cache", "part"),
    [
        ("ancestral", 1, "exact", ""), ("prompt-lookup", 2, "exact", ""), ("medusa", 2, "exact", "a trained part"),
        ("unmask", 5, "none", ""), ("fast-dllm", 2, "approximate", ""), ("learn2pd", 1, "none", "a trained part"),
    ],
)  # fmt: skip
def test_what_is_known_of_a_decoder_is_found(key, most, cache, part):
    row = decoder_row(key)
    assert row.commits[0] >= 1 and row.commits[1] >= most and row.cache == cache and row.begins == part
    assert (row.commits[1] == 1) == (key == "ancestral")


def test_another_order_is_another_row():
    """The same system in any order in place of blocks: nothing else was told."""
    system = toy("sdar")
    system.model.factorization = AnyOrder()
    row = row_of(system, mdlm.case(), *watched(system.model, lambda: begun(system)))
    assert (row.key, row.cache, row.orders) == ("sdar", "none", "6 of 6")


def test_orders_are_counted_as_they_are_decided():
    made = next_token.case()
    assert orders(made) == "1 of 24"
    model = sdar.case().model
    together = Case(model, vocab=2, decider=lambda: Select("random", steps=1))
    assert orders(together) == "1 of 24", "blocks as a whole: one way"
    assert orders(dataclasses.replace(made, decider=SampleAll)) == "1 of 24"


def test_weights_are_as_they_were_after_a_look():
    system = toy("sdar")
    before = {name: x.clone() for name, x in system.model.state_dict().items()}
    watched(system.model, lambda: begun(system))
    assert all(torch.equal(x, before[name]) for name, x in system.model.state_dict().items())


@pytest.mark.slow
def test_every_text_system_and_decoder_has_a_row():
    rows = taxonomy()
    assert {row.key for row in rows} == {
        key for key, (meta, _) in catalogue().items() if meta.family in ("text", *FAMILIES)
    }
    for row in rows:
        assert 0 < row.commits[0] <= row.commits[1], row
        assert (row.likelihood == "relaxed") or row.cache != "approximate", row
        assert ("exact" in row.estimates) == (row.likelihood == "exact"), row
    assert all(load(row.key).META.title == row.title for row in rows)
