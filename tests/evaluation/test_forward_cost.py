"""The curve t(n): what it says between its points, what it predicts, and when it is measured anew."""

from __future__ import annotations

import json
import time

import pytest
import torch

from seriatim.backbones.quantize import quantize
from seriatim.evaluation import forward_cost as module
from seriatim.evaluation.bench import Written, figures
from seriatim.evaluation.forward_cost import ROWS, ForwardCost, forward_cost, measured, what
from seriatim.systems.text.next_token import Config, NextToken

CURVE = ForwardCost((1, 2, 4, 8), (10.0, 11.0, 12.0, 20.0), 64, {})


def model(length: int = 200, seed: int = 0) -> NextToken:
    torch.manual_seed(seed)
    return NextToken(Config(length=length, width=32, depth=2, heads=2)).eval().requires_grad_(False)


# ---- the curve -------------------------------------------------------------------------------------------------------


def test_between_two_points_the_curve_is_straight_and_goes_on_beyond_the_last():
    assert [CURVE.at(n) for n in (1, 2, 3, 4, 6, 8, 10)] == [10, 11, 11.5, 12, 16, 20, 24]
    assert CURVE.t(8) == 2 and CURVE.t(1) == 1
    assert ForwardCost((1,), (3.0,), 64, {}).at(16) == 3


def test_the_gain_is_tokens_over_forward_and_draft():
    """E / (t(N) + draft), by hand; plain decoding gains nothing."""
    assert CURVE.predict(1.0, 1) == 1
    assert CURVE.predict(2.5, 5, 1.0) == pytest.approx(2.5 * 10 / (14 + 1))


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [((), ()), ((2, 4), (1.0, 2.0)), ((1, 2), (1.0,)), ((1, 2, 2), (1.0, 2.0, 3.0)), ((1, 2), (1.0, 0.0)),
     ((1, 2), (1.0, float("nan")))],
)  # fmt: skip
def test_what_is_no_curve_is_refused(rows, seconds):
    with pytest.raises(ValueError, match="a curve has seconds"):
        ForwardCost(rows, seconds, 64, {})


def test_a_bench_predicts_by_the_rows_of_each_forward():
    """Two forwards, over 1 and over 8 rows, and 2 seconds of drafts: 3 tokens in 32 seconds, and plainly in 30."""
    ours = [[Written((1, 2, 3), 2, 7, 1, 16.0, 6.0, (1, 8), 2.0)]]
    plain = [[Written((1, 2, 3), 3, 0, 0, 33.0, 11.0, (1, 1, 1))]]
    told = figures(ours, plain, CURVE)
    assert told["predicted_ratio"] == pytest.approx(30 / 32)
    assert told["decode_ratio"] == pytest.approx((2 / 10) / (2 / 22))
    assert told["mean_rows"] == 4.5 and told["draft_seconds"] == 1.0
    assert figures(plain, plain, CURVE)["predicted_ratio"] == figures(plain, plain, CURVE)["decode_ratio"] == 1
    assert figures(ours, plain)["predicted_ratio"] is None


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_the_forwards_that_are_timed_have_so_many_rows_behind_the_context(monkeypatch):
    met = []
    forward = module.Target.forward

    def watched(self, plan, canvas, guess=None):
        met.append((plan.size, plan.base, self.cache.length))
        return forward(self, plan, canvas, guess)

    monkeypatch.setattr(module.Target, "forward", watched)
    cost = measured(model(), 100, budget=0.0)
    assert cost.rows == ROWS and cost.context == 100
    assert set(met) == {(n, 100, 100) for n in ROWS}  # a learned start more, the last token less
    assert len(met) == (1 + module.LEAST) * len(ROWS)


def test_a_forward_that_sleeps_longer_with_more_rows_is_seen(monkeypatch):
    forward = module.Target.forward

    def slow(self, plan, canvas, guess=None):
        time.sleep(0.002 * plan.size)
        return forward(self, plan, canvas, guess)

    monkeypatch.setattr(module.Target, "forward", slow)
    cost = measured(model(), 64, rows=(1, 8), budget=0.0)
    assert cost.at(8) - cost.at(1) > 0.007 and cost.t(8) > 2


def test_a_short_model_is_measured_as_far_as_it_goes():
    cost = measured(model(20), 500, budget=0.0)
    assert cost.context == 1 and cost.rows == (1, 2, 3, 4, 5, 6, 8, 12, 16)
    assert measured(model(100), 500, budget=0.0).context == 100 - 64 - 1


def test_a_curve_is_kept_by_weights_format_threads_and_context(tmp_path, monkeypatch):
    asked = []

    def known(system, context):
        asked.append(context)
        return ForwardCost(ROWS, tuple(float(n + len(asked)) for n in ROWS), context, what(system), False)

    monkeypatch.setattr(module, "measured", known)
    system = model(2000)
    first = forward_cost(system, 100, tmp_path)
    assert forward_cost(system, 120, tmp_path) == first == forward_cost(model(2000), 65, tmp_path)
    assert asked == [128]
    forward_cost(system, 200, tmp_path)
    forward_cost(model(2000, seed=1), 100, tmp_path)
    forward_cost(model(2000).to(torch.bfloat16), 100, tmp_path)
    whole = model(2000)
    quantize(whole.model, "int8")
    forward_cost(whole, 100, tmp_path)
    assert asked == [128, 256, 128, 128, 128]
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    forward_cost(system, 100, tmp_path)
    assert len(asked) == 6 and len(list(tmp_path.rglob("*.json"))) == 6


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"rows": [1], "seconds": [0], "context": 128, "about": {}}'])
def test_a_broken_file_is_measured_anew(tmp_path, monkeypatch, content):
    monkeypatch.setattr(module, "measured", lambda s, c: ForwardCost((1,), (1.0,), c, what(s), False))
    system = model()
    first = forward_cost(system, 100, tmp_path)
    (path,) = tmp_path.rglob("*.json")
    path.write_text(content, encoding="utf-8")
    assert forward_cost(system, 100, tmp_path) == first
    assert json.loads(path.read_text(encoding="utf-8"))["context"] == first.context


def test_what_was_measured_beside_others_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "measured", lambda s, c: ForwardCost((1,), (1.0,), c, what(s), True))
    assert forward_cost(model(), 100, tmp_path).disturbed
    assert not list(tmp_path.rglob("*.json"))


def test_a_curve_of_fewer_rows_is_measured_again(tmp_path, monkeypatch):
    system, measured_rows = model(), [ROWS[:3], ROWS, ROWS]

    def told(system, context):
        rows = measured_rows.pop(0)
        return ForwardCost(rows, tuple(float(n) for n in rows), context, what(system), False)

    monkeypatch.setattr(module, "measured", told)
    for expected in (ROWS[:3], ROWS, ROWS):
        assert forward_cost(system, 64, tmp_path).rows == expected
    assert len(measured_rows) == 1
