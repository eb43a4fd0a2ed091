"""Counting, timing in turn, and the peak memory of a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from seriatim.decoding.loop import Step
from seriatim.evaluation import cost
from seriatim.evaluation.cost import Others, Timing, drain, fresh_process, parameters, time_interleaved

MODULE = """
import os, time

def hold(megabytes):
    data = bytearray(os.urandom(1024)) * (1024 * megabytes)
    return {"held": len(data), "pid": os.getpid()}

def fail(word):
    raise ArithmeticError(f"no {word} today")

def sleep():
    time.sleep(60)

def mute():
    os._exit(3)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "measured_module.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "measured_module"


def test_a_drained_stream_is_counted_and_seconds_are_shared_by_the_batch() -> None:
    spent = drain((Step((), forwards=f, slots=s) for f, s in ((1, 4), (2, 4), (1, 9))), samples=5)
    assert (spent.steps, spent.forwards, spent.slots, spent.samples) == (3, 4, 17, 5)
    assert spent.seconds_per_sample == spent.seconds / 5 > 0
    with pytest.raises(ValueError, match="at least 1 sample"):
        drain((), 0)


def test_shared_parameters_count_once_and_buffers_never() -> None:
    a, b = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
    b.weight = a.weight
    assert parameters(nn.ModuleList([a, b, nn.BatchNorm1d(5)])) == 12 + 4 + 10


def test_arms_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    timings = time_interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert all(len(t.rounds) == 3 and t.median > 0 for t in timings.values())
    assert Timing((3.0, 1.0, 100.0), 0.0, None).median == 3.0
    with pytest.raises(ValueError, match="at least one arm"):
        time_interleaved({})


def test_the_work_of_this_process_and_idle_time_are_not_that_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick = 1 / cost.os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(cost, "PROC", tmp_path)

    def at(now: float, user: float, system: float, idle: float, waiting: float, own: float) -> None:
        fields = [round(x / tick) for x in (user, 0, system, idle, waiting, 0, 0, 0)]
        (tmp_path / "stat").write_text(f"cpu  {' '.join(map(str, fields))} 5 5\ncpu0 1 2 3\n", encoding="ascii")
        monkeypatch.setattr(cost.time, "perf_counter", lambda: now)
        monkeypatch.setattr(cost.os, "times", lambda: (own, 0.0, 0.0, 0.0, now))

    at(now=100, user=50, system=10, idle=1000, waiting=5, own=7)
    others = Others()
    at(now=110, user=58, system=11, idle=1010, waiting=6, own=12)
    assert others.share() == pytest.approx((8 + 1 - 5) / 10)
    (tmp_path / "stat").unlink()
    assert others.share() is None


def test_peak_memory_is_of_the_function_alone_though_this_process_holds_much(module: str) -> None:
    ballast = torch.ones(500 << 18)  # 500 MB, touched: the child's ru_maxrss would report them
    fresh = fresh_process(f"{module}:hold", {"megabytes": 100})
    assert len(ballast) and fresh.result["held"] == 100 << 20
    assert 100e6 < fresh.peak - fresh.before < 150e6
    assert fresh.peak < cost.peak_memory() - 100e6 and fresh.seconds > 0


def test_what_goes_wrong_in_the_other_process_is_told_here(module: str) -> None:
    with pytest.raises(RuntimeError, match="no luck today"):
        fresh_process(f"{module}:fail", {"word": "luck"})
    with pytest.raises(RuntimeError, match="exit code 3"):
        fresh_process(f"{module}:mute")
    with pytest.raises(TimeoutError, match=r"longer than 0\.2 seconds"):
        fresh_process(f"{module}:sleep", timeout=0.2)


def test_a_malformed_call_starts_no_process() -> None:
    with pytest.raises(ValueError, match="module:function"):
        fresh_process("os.getpid")
    with pytest.raises(ValueError, match="JSON"):
        fresh_process("os:getpid", {"x": object()})
