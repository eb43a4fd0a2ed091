"""By what losses are divided: tokens, texts, or the batch; the same whatever parts a batch is computed in."""

from __future__ import annotations

import pytest
import torch

from seriatim.laws.case import randomise
from seriatim.random import Generator
from seriatim.systems.text import ctrldiff, ilm, mdlm, next_token, sdar, tidar
from seriatim.systems.text_system import beside
from seriatim.training.norm import NORMS, per_batch, per_sequence, per_token
from seriatim.training.recipe import Recipe
from seriatim.verbs.train import train

LOSSES = torch.tensor([[0.0, 2.0, 4.0, 6.0], [0.0, 5.0, 0.0, 0.0]])
COUNTS = torch.tensor([[False, True, True, True], [False, True, False, False]])
SHAPE = {"length": 12, "vocab": 20, "width": 16, "depth": 1, "heads": 2}
PAIRS = [([3, 4, 5, 6], [7, 8, 9, 10, 11, 1]), ([2, 9], [9, 1])]


def mean(norm, losses, counts):
    total, by = norm(losses, counts)
    return float(total) / float(by)


@pytest.mark.parametrize(
    ("norm", "want"), [(per_token, 17 / 4), (per_sequence, (4 + 5) / 2), (per_batch, (12 + 5) / 2)]
)
def test_what_is_divided_by_what(norm, want):
    assert mean(norm, LOSSES, COUNTS) == pytest.approx(want)


@pytest.mark.parametrize("name", NORMS)
def test_parts_of_a_batch_add_up(name):
    parts = [NORMS[name](LOSSES[i : i + 1], COUNTS[i : i + 1]) for i in range(2)]
    total, by = (sum(float(x) for x in side) for side in zip(*parts, strict=True))
    assert total / by == pytest.approx(mean(NORMS[name], LOSSES, COUNTS))


def test_a_text_without_anything_to_learn_breaks_nothing():
    for norm in NORMS.values():
        assert mean(norm, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool) | torch.tensor([[True], [False]])) == 0


def system_of(key):
    kinds = {"mdlm": mdlm.MDLM, "sdar": sdar.SDAR, "next-token": next_token.NextToken, "tidar": tidar.TiDAR}
    more = {"mdlm": {"masking": "count"}, "sdar": {"block": 4}, "tidar": {"block": 2}}.get(key, {})
    system = kinds[key](kinds[key].Config(**SHAPE, **more), None)
    randomise(system.model)
    return system


@pytest.mark.parametrize("key", ["mdlm", "sdar", "next-token", "tidar"])
def test_by_sequence_each_answer_counts_alike_ends_of_text_included(key):
    """Twice as long an answer weighs twice as much by token, and the same by sequence; noise is that of the batch."""
    system, batch, got = system_of(key), beside(PAIRS), {}
    system.train()
    for norm in NORMS:
        system.trained_by(Recipe(1, norm=norm))
        total, by = system(batch, Generator(3), 0, 1)
        system.zero_grad()
        (total / by).backward()
        got[norm] = float(total.detach() / by), system.model.heads["token"].weight.grad.clone()
        assert int(by) == (8 if norm == "token" else 2)
    canvas, _ = system.canvas(batch)
    losses = system.model.losses(canvas, random=Generator(3)).double()
    losses = torch.where(batch["counts"], losses, 0).detach()
    long, short = losses.sum(1).tolist()
    assert got["token"][0] == pytest.approx((long + short) / 8)
    assert got["sequence"][0] == pytest.approx((long / 6 + short / 2) / 2)
    assert got["batch"][0] == pytest.approx((long + short) / 2)
    torch.testing.assert_close(got["batch"][1], 4 * got["token"][1])
    assert not torch.allclose(got["sequence"][1] * 4, got["batch"][1], rtol=0.05)


def test_what_is_measured_does_not_depend_on_it():
    batch = beside(PAIRS)
    for key in ("mdlm", "sdar"):
        system = system_of(key).eval()
        system.requires_grad_(False)
        plain = system.losses(batch, Generator(0), 0.0)
        system.trained_by(Recipe(1, norm="batch"))
        same = system.losses(batch, Generator(0), 0.0)
        assert float(plain[0]) == float(same[0]) and int(plain[1]) == int(same[1]) == 8


def test_blocks_of_learned_lengths_heed_it_too():
    settings = {**SHAPE, "lengths": (2, 4), "paced": 4}
    one = ctrldiff.CtrlDiff(ctrldiff.Config(**settings), None).train()
    one.trained_by(Recipe(1, norm="sequence"))
    batch = {"token": torch.arange(24).view(2, 12) % 20}
    assert int(one(batch, Generator(0), 0, 10)[1]) == 2


def test_a_norm_that_there_is_not_or_that_a_system_has_itself_is_refused():
    with pytest.raises(ValueError, match="norm is token, sequence, batch, not 'tokens'"):
        Recipe(1, norm="tokens")
    with pytest.raises(ValueError, match="the loss of ilm is divided as its paper says: leave out --norm"):
        ilm.ILM(ilm.Config(length=8, width=8, depth=1, heads=1)).trained_by(Recipe(1, norm="batch"))


def test_the_recipe_says_it(tmp_path):
    book, losses = tmp_path / "book.txt", {}
    book.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 50, encoding="utf-8")
    for norm in ("token", "batch"):
        tiny = {"length": 32, "width": 8, "depth": 1, "heads": 1, "steps": 1, "batch": 2, "short": 0.0, "norm": norm}
        losses[norm] = train("mdlm", book, out=tmp_path / norm, settings=tiny).history[0]["loss"]
    assert losses["batch"] == pytest.approx(32 * losses["token"], rel=1e-4)


def test_a_run_that_is_older_than_a_setting_goes_on_with_its_default(tmp_path):
    """Recipes and configs get new fields: a run that was begun without them is resumed, and no other value is taken."""
    import json

    book = tmp_path / "book.txt"
    book.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 50, encoding="utf-8")
    tiny = {"length": 32, "width": 8, "depth": 1, "heads": 1, "steps": 2, "batch": 2}
    train("mdlm", book, out=tmp_path / "run", settings=tiny)
    card = tmp_path / "run" / "run.json"
    about = json.loads(card.read_text())
    del about["recipe"]["norm"], about["config"]["noise"]
    card.write_text(json.dumps(about))
    train("mdlm", book, out=tmp_path / "run", settings=tiny, resume=True)
    for other in ({"norm": "batch"}, {"noise": "cosine"}):
        with pytest.raises(ValueError, match="started with other settings"):
            train("mdlm", book, out=tmp_path / "run", settings=tiny | other, resume=True)
