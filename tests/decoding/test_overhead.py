"""What a plain decoding step costs beside its mathematics, counted rather than timed: operations and calls a step.

The reference is the hand-written loop of benchmarks/next_token.py. Where a count rises, so does the time of every
token; the benchmark then says by how much.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import seriatim
from seriatim.canvas import Set
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import decode
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.verify import GreedyMatch

PACKAGE = str(Path(seriatim.__file__).parent)


@pytest.fixture(scope="module")
def bench():
    """The benchmark, as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "next_token.py"
    spec = importlib.util.spec_from_file_location("next_token_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Counted(TorchDispatchMode):
    """Counts the operations that reach torch."""

    def __init__(self):
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(run, count: int) -> int:
    with Counted() as counted:
        run(count)
    return counted.ops.total()


def a_step(measure, run, short: int = 6, steps: int = 8) -> float:
    """Of each further step."""
    run(short + steps)  # what is made once
    return (measure(run, short + steps) - measure(run, short)) / steps


def model_of(bench, depth: int):
    return bench.build({**bench.TINY, "depth": depth}, 64, torch.float32)


def prompt_of(bench):
    return torch.randint(bench.TINY["vocab"], (1, 8), generator=torch.Generator().manual_seed(0))


def test_a_plain_step_takes_no_more_operations_than_a_loop_written_by_hand(bench):
    """No operation a layer more, and at most ten a step: the views of the cache, the check for NaN, the canvas."""
    cost = {}
    for depth in (2, 4):
        model, prompt = model_of(bench, depth), prompt_of(bench)
        for name, arm in (("bare", bench.bare), ("core", bench.core)):
            cost[name, depth] = a_step(operations, lambda n, arm=arm, model=model, prompt=prompt: arm(model, prompt, n))
    a_layer = {name: (cost[name, 4] - cost[name, 2]) / 2 for name in ("bare", "core")}
    once = {name: cost[name, 2] - 2 * a_layer[name] for name in ("bare", "core")}
    assert a_layer["core"] <= a_layer["bare"]
    assert once["core"] <= once["bare"] + 10


def calls(run, count: int) -> int:
    """Python functions of the package that are entered."""
    total = 0

    def note(frame, event, arg):
        nonlocal total
        total += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(note)
    try:
        run(count)
    finally:
        sys.setprofile(None)
    return total


def test_a_plain_step_enters_few_functions(bench):
    """At most six of the package a layer and 45 a step: each costs as much as a small object."""
    cost = {}
    for depth in (2, 4):
        model, prompt = model_of(bench, depth), prompt_of(bench)
        cost[depth] = a_step(calls, lambda n, model=model, prompt=prompt: bench.core(model, prompt, n))
    a_layer = (cost[4] - cost[2]) / 2
    assert a_layer <= 6
    assert cost[2] - 2 * a_layer <= 45


@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafted"])
def test_a_step_makes_no_labels(bench, drafts):
    """Neither the plan nor the cache writes down who sees whom, not even where draft trees are verified."""
    canvas, target = bench._start(model_of(bench, 2), prompt_of(bench), 20)
    plans, make = [], target.plan
    target.plan = lambda *args: plans.append(make(*args)) or plans[-1]

    class Trees:
        def propose(self, canvas, target, random):
            return Guess(torch.tensor([[1, 2, 3]]), (-1, -1, 0))

        def observe(self, canvas, rows, step):
            """Learns nothing."""

    for _ in decode(target, canvas, GreedyMatch() if drafts else SampleAll(), Trees() if drafts else None):
        pass
    assert target.cache.plain and plans.pop() is None and len(plans) > 5
    for plan in plans[1:]:  # the first is checked for peeking, label by label
        assert set(vars(plan)) == {"shape", "base", "prefix", "elements", "size", "run", "windows", "masks"}


def test_a_tree_costs_no_operation_a_layer_more(bench):
    """Its mask is made once for all layers: a layer does what it does for a prompt."""
    cost = {}
    guess = Guess(torch.ones(1, 5, dtype=torch.long), (-1, -1, 0, 0, 1))
    for depth in (2, 4):
        model = model_of(bench, depth)
        canvas, target = bench._start(model, prompt_of(bench), 20)
        with torch.inference_mode(), Counted() as prompt:
            target.forward(target.plan(canvas), canvas)
        target.commit(8, target.plan(canvas))
        canvas.apply([Set(torch.ones(1, 1, dtype=torch.long))])
        with torch.inference_mode(), Counted() as drafted:
            target.forward(target.plan(canvas, guess), canvas, guess)
        cost[depth] = prompt.ops.total(), drafted.ops.total()
    assert cost[4][1] - cost[2][1] == cost[4][0] - cost[2][0]
