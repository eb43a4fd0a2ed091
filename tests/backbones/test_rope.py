"""Rotary positions: what a rotation is, that only differences count, and that slices of a table are no other thing."""

from __future__ import annotations

import math

import pytest
import torch

from seriatim.backbones.rope import RoPE, RotaryTable, rotate
from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.factorization.line import Line
from seriatim.layout import line
from seriatim.plan import plan_of
from seriatim.view import full

DOUBLE = torch.float64


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


def test_pairs_are_turned_as_complex_numbers():
    """Dimension i is the real part and i + half the imaginary part, turned by position times theta^(-2i/d)."""
    x, places = noise(1, 5, 2, 8), torch.tensor([[0, 1, 7, 300, 4096]])
    got = rotate(x, *RotaryTable(RoPE(500.0), 8).at(places[..., None], DOUBLE))
    turn = torch.exp(1j * places[0, :, None] * 500.0 ** (-torch.arange(4, dtype=DOUBLE) / 4))
    want = torch.complex(x[..., :4], x[..., 4:]) * turn[None, :, None]
    assert (got - torch.cat([want.real, want.imag], -1)).abs().max() < 1e-12


@pytest.mark.parametrize("axes", [(8,), (4, 4), (2, 4, 2)])
def test_scores_depend_on_differences_and_lengths_stay(axes):
    table = RotaryTable(RoPE(100.0, axes), 8)
    q, k = noise(1, 1, 1, 8), noise(2, 1, 1, 8)[1:]
    near, far = torch.tensor([[[3, 1, 4][: len(axes)]]]), torch.tensor([[[9, 2, 6][: len(axes)]]])

    def score(shift: int) -> float:
        a, b = (rotate(x, *table.at(c + shift, DOUBLE)) for x, c in ((q, near), (k, far)))
        assert math.isclose(float(a.norm()), float(q.norm()), rel_tol=1e-12)
        return float((a * b).sum())

    assert math.isclose(score(0), score(11), rel_tol=1e-9)
    moved = far.clone()
    moved[..., -1] += 1
    assert (
        abs(float((rotate(q, *table.at(near, DOUBLE)) * rotate(k, *table.at(moved, DOUBLE))).sum()) - score(0)) > 1e-4
    )


def test_axes_take_their_dimensions_in_order():
    """Over two axes, the second pair block turns with the second coordinate only."""
    table = RotaryTable(RoPE(100.0, (4, 2)), 6)
    cos, _ = table.at(torch.tensor([[[0, 9]]]), DOUBLE)
    assert cos[0, 0, 0, :2].tolist() == [1, 1] and cos[0, 0, 0, 2] != 1
    cos, _ = table.at(torch.tensor([[[9, 0]]]), DOUBLE)
    assert cos[0, 0, 0, 2] == 1 and (cos[0, 0, 0, :2] != 1).all()


@pytest.mark.parametrize("start", [0, 5, 254, 255, 256, 1000])
def test_runs_and_trees_are_rows_of_one_table(start):
    """The same numbers as from explicit coordinates, also where the table has to grow."""
    table = RotaryTable(RoPE(), 8)
    device = torch.device("cpu")
    for n in (1, 3):
        explicit = table.at(torch.arange(start, start + n)[None, :, None], DOUBLE)
        for got, want in zip(table.run(start, n, DOUBLE, device), explicit, strict=True):
            assert torch.equal(got, want[0])
    depth = torch.tensor([0, 1, 1, 2])
    explicit = table.at((start + depth)[None, :, None], DOUBLE)
    for got, want in zip(table.run(start, len(depth), DOUBLE, device, depth), explicit, strict=True):
        assert torch.equal(got, want[0])
    assert table.run(start, 1, torch.bfloat16, device)[0].dtype == torch.bfloat16


def test_a_plan_gets_the_positions_of_its_slots():
    """A step over a cache, a draft tree behind it, and labelled slots: each at its own place."""
    table, x = RotaryTable(RoPE(), 8), torch.zeros(1, 1, 8, dtype=DOUBLE)
    canvas = Canvas(line(20), {"token": torch.zeros(1, 20, dtype=torch.long)}, 9)
    guess = Guess(torch.zeros(1, 3, dtype=torch.long), (-1, -1, 0))
    for plan in (Line().step(canvas, None, 6), Line().step(canvas, guess, 6), Line(2).step(canvas, guess, 0)):
        for got, want in zip(table.of(plan, x), table.at(plan.slots.coord, DOUBLE), strict=True):
            assert torch.equal(got, want[0])
    labelled = plan_of(full(3), range(3), range(3), [(0, 0)], coord=[[4], [2], [9]])
    for got, want in zip(table.of(labelled, x), table.at(torch.tensor([[[4], [2], [9]]]), DOUBLE), strict=True):
        assert torch.equal(got, want)


def test_a_table_made_in_inference_mode_serves_training():
    table = RotaryTable(RoPE(), 8)
    with torch.inference_mode():
        table.run(0, 4, DOUBLE, torch.device("cpu"))
    x = noise(1, 4, 1, 8).requires_grad_()
    rotate(x, *table.run(0, 4, DOUBLE, torch.device("cpu"))).sum().backward()
    assert x.grad is not None


def test_impossible_tables_are_refused():
    with pytest.raises(ValueError, match="must be even and add up to the head dimension 6"):
        RotaryTable(RoPE(axes=(3, 3)), 6)
    with pytest.raises(ValueError, match="add up to the head dimension 8"):
        RotaryTable(RoPE(axes=(4, 2)), 8)
    with pytest.raises(ValueError, match="the base of rotary embedding is positive, got -1"):
        RoPE(-1.0)
    with pytest.raises(ValueError, match="over 2 axes met coordinates with 1"):
        RotaryTable(RoPE(axes=(4, 4)), 8).at(torch.zeros(1, 3, 1, dtype=torch.long), DOUBLE)
    with pytest.raises(ValueError, match="over 2 axes met slots along a line"):
        RotaryTable(RoPE(axes=(4, 4)), 8).run(0, 1, DOUBLE, torch.device("cpu"))
