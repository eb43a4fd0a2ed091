"""What steering is measured by, on tiny models."""

from __future__ import annotations

import pytest
import torch

from seriatim.posttraining.classifier import MaskedClassifier
from seriatim.systems import steering_trials as trials
from seriatim.systems.text import ctrldiff, next_token
from seriatim.tokenizers.text import ByteTokenizer
from seriatim.training.recipe import Recipe


def system():
    torch.manual_seed(0)
    config = ctrldiff.Config(length=64, width=16, depth=1, heads=2)
    return ctrldiff.CtrlDiff(config, ByteTokenizer()).eval().requires_grad_(False)


def test_a_sweep_tells_rates_nats_and_seconds_of_both_ways():
    torch.manual_seed(1)
    judge = next_token.NextToken(next_token.Config(length=64, width=16, depth=1, heads=2), ByteTokenizer()).eval()
    parts = [MaskedClassifier(272, 2, 8, 1, 2).eval().requires_grad_(False) for _ in range(2)]
    rows = trials.sweep(system(), judge, (0.0, 400.0), *parts[:1], parts[0], texts=6, new=20)
    by = {(r["class"], r["weight"], r["exact"]): r for r in rows}
    for name in trials.CLASSES:
        assert by[name, 400.0, False]["rate"] >= by[name, 0.0, False]["rate"]
    assert sum(by[name, 400.0, False]["rate"] for name in trials.CLASSES) == 2.0  # the very guide is asked here
    assert by["code", 400.0, True]["seconds"] > 2 * by["code", 400.0, False]["seconds"] / 6
    assert all(r["nats_per_token"] > 0 and len(r["texts"]) <= 2 for r in rows)


@pytest.mark.slow  # it reads the standard library
def test_two_classifiers_learn_from_other_files_and_tell_code_from_prose(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "HOME", tmp_path)
    one = system()
    sides = [trials.labelled(one, 64, part) for part in range(3)]
    seen = [{tuple(row) for row in side.ids[:2000].tolist()} for side in sides]
    assert all(float(side.label.double().mean()) == 0.5 for side in sides)
    assert len(seen[0] & seen[2]) < 20 and len(sides[2]) < 0.3 * len(sides[0])
    made = trials.classifier(one, 0, recipe=Recipe(60, batch=32, learning_rate=3e-3))
    said = made.log_prob(made.vectors(sides[2].ids[::7].long(), torch.ones_like(sides[2].ids[::7]).bool()))
    assert float((said.argmax(1) == sides[2].label[::7]).double().mean()) > 0.7
