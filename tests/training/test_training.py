"""Training repeats with its seed, stops at what is not a number, and never loses or mistakes a file."""

import itertools
import math

import pytest
import torch

from seriatim import Recipe, fit
from seriatim.systems.text import next_token
from seriatim.training.checkpoint import load_weights, save_weights

CONFIG = next_token.Config(length=8, vocab=4, width=16, depth=1, heads=2)


def model(seed=0, config=CONFIG):
    torch.manual_seed(seed)
    return next_token.build(config)


def draw_for(m):
    def draw(n, generator):
        return m.canvas({"token": torch.randint(4, (n, 1), generator=generator).expand(n, 8).clone()}), None

    return draw


def test_the_same_seed_gives_the_same_weights():
    runs = []
    for _ in range(2):
        m = model()
        torch.rand(3)  # whatever else happened in the process
        fit(m, draw_for(m), Recipe(5, batch=4))
        runs.append(m.state_dict())
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def test_the_global_random_state_is_left_alone():
    m = model()
    before = torch.random.get_rng_state()
    fit(m, draw_for(m), Recipe(2, batch=4))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_loss_that_is_not_a_number_stops_the_run():
    m = model()
    with torch.no_grad():
        m.backbone.norm.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 0"):
        fit(m, draw_for(m), Recipe(3, batch=4))


def test_the_rate_warms_up_and_falls_to_its_floor():
    recipe = Recipe(100, warm_up=0.1, floor=0.2)
    rates = [recipe.rate(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.2, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_weights_come_back(tmp_path):
    one, two = model(0), model(1)
    load_weights(two, save_weights(one, tmp_path / "m.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"], "no half-written file is left"


def test_a_file_cut_short_is_refused(tmp_path):
    path = save_weights(model(), tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        load_weights(model(), path)


def test_weights_of_another_model_are_refused(tmp_path):
    path = save_weights(model(), tmp_path / "m.safetensors")
    wide = next_token.Config(length=8, vocab=5, width=16, depth=1, heads=2)
    with pytest.raises(ValueError, match="other shapes for"):
        load_weights(model(config=wide), path)
    deep = next_token.Config(length=8, vocab=4, width=16, depth=2, heads=2)
    with pytest.raises(ValueError, match="lacks"):
        load_weights(model(config=deep), path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights(model(), tmp_path / "nothing.safetensors")
