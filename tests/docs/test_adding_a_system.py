"""The system that the documentation adds is short, meets the laws, trains, is resumed and draws."""

from __future__ import annotations

import re

import pytest
import torch

import seriatim
from seriatim.laws.suite import mutant_finding, system_findings
from seriatim.systems.meta import _read, catalogue
from seriatim.verbs.generate import draw

KEY = "interlaced"


@pytest.fixture
def added(example, tmp_path, monkeypatch):
    """The catalogue with the example in it, as a file of its own."""
    path = tmp_path / "documented_interlaced.py"
    path.write_text(example, encoding="utf-8")
    meta = _read(path)
    assert meta is not None and meta.key == KEY
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(catalogue(), KEY, (meta, path.stem))
    return KEY


def test_it_has_fewer_than_sixty_lines(example):
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) < 60
    assert max(map(len, lines)) <= 120
    for name in ("META", "Config", "def case", "def mutant", "class InterlacedPixels"):
        assert name in example


def test_it_meets_the_laws_and_its_mutant_does_not(added, documents):
    findings = list(system_findings(added))
    assert not [f for f in findings if f.status == "broken"]
    assert [f.law for f in findings if f.status == "n/a"] == [4, 8], "as the page says"
    caught = mutant_finding(added)
    assert caught.status == "holds" and caught.law == 3
    quoted = re.search(r"^> (this order peeks: .*)$", documents["docs/adding-a-system.md"], re.M)
    assert quoted is not None and quoted[1] in caught.note


def test_its_steps_are_those_of_the_page(added, documents):
    from seriatim.systems.meta import load

    shown = re.search(r"```\n((?:\d \d \d \d\n){4})```", documents["docs/adding-a-system.md"])
    assert shown is not None
    system = load(added)
    for side, forwards in ((4, 7), (8, 19)):
        model = system.InterlacedPixels.build(system.Config(side=side, width=8, depth=1, heads=1))
        plan = model.factorization.packed(model.blank(1)).check(model.mixers)
        assert plan.cost().forwards == forwards
        if side == 4:
            assert plan.rank[0].tolist() == [int(n) for n in shown[1].split()]


def test_it_trains_is_loaded_and_draws(added, tmp_path):
    small = {"steps": 2, "batch": 4, "width": 16, "depth": 1, "heads": 2, "validate_every": 2}
    trained = seriatim.train(added, "digits", out=tmp_path / "run", settings=small)
    assert [h["step"] for h in trained.history] == [1, 2]
    assert all(torch.isfinite(torch.tensor(h["loss"])) for h in trained.history)
    pictures = draw(seriatim.load(tmp_path / "run"), labels=[3], count=2, film=True)
    assert pictures.images.shape == (2, 1, 8, 8)
    assert pictures.forwards == 19
    assert len(pictures.frames) == 16
