"""State-space duality: every fast form equals the recurrence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seriatim.backbones.ssd import (
    ancestors,
    causal_conv,
    conv_step,
    replay,
    ssd_chunked,
    ssd_recurrent,
    ssd_replay,
    ssd_step,
    ssd_tree,
    tree_conv,
    tree_taps,
)
from support.lines import path_to

drawn = settings(deadline=None, max_examples=40, derandomize=True)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def normal(*shapes: Sequence[int], seed: int = 1) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes]


@dataclass(frozen=True)
class Case:
    """Random activations of b rows of s slots; `args` is what the scans take."""

    b: int = 2
    s: int = 13
    h: int = 4
    p: int = 3
    g: int = 2
    n: int = 5
    decay: float = 1.0
    seed: int = 0

    def make(self, kind: torch.dtype = torch.float64) -> tuple[tuple[Tensor, ...], Tensor]:
        """(x, dt, A, B, C) and an initial state."""
        b, s, h, p, g, n = self.b, self.s, self.h, self.p, self.g, self.n
        x, dt, A, B, C, s0 = normal(
            (b, s, h, p), (b, s, h), (h,), (b, s, g, n), (b, s, g, n), (b, h, p, n), seed=self.seed
        )
        args = x, F.softplus(dt), -self.decay * A.abs(), B, C
        return tuple(t.to(kind) for t in args), s0.to(kind)


def along(args: Sequence[Tensor], row: int, path: Sequence[int]) -> tuple[Tensor, ...]:
    """The same activations, only those of one row on a path."""
    x, dt, A, B, C = args
    at = torch.tensor(path, dtype=torch.long)
    return x[row, at][None], dt[row, at][None], A, B[row, at][None], C[row, at][None]


def random_tree(draw: st.DrawFn, size: int) -> list[int]:
    """Parents in any order of slots: a parent may stand after its child."""
    name = draw(st.permutations(range(size)))
    parent = [-1] * size
    for i in range(size):
        above = draw(st.integers(-1, i - 1))
        parent[name[i]] = -1 if above < 0 else name[above]
    return parent


trees = st.composite(lambda draw: random_tree(draw, draw(st.integers(1, 14))))()

# ---- recurrence and chunks -------------------------------------------------------------------------------------------


def test_the_recurrence_is_the_weighted_sum_of_the_paper() -> None:
    args, s0 = Case().make()
    x, dt, A, B, C = args
    y, last = ssd_recurrent(*args, s0)
    for i, head, t in itertools.product(range(2), range(4), range(13)):
        group = head // 2  # the first two heads share the first group
        total = torch.exp(dt[i, : t + 1, head].sum() * A[head]) * s0[i, head] @ C[i, t, group]
        for j in range(t + 1):
            weight = torch.exp(dt[i, j + 1 : t + 1, head].sum() * A[head]) * dt[i, j, head]
            total = total + weight * (C[i, t, group] @ B[i, j, group]) * x[i, j, head]
        close(y[i, t, head], total)
    zero_step, kept = ssd_step(x[:, 0], torch.zeros(2, 4, dtype=torch.float64), A, B[:, 0], C[:, 0], last)
    assert torch.equal(kept, last)
    close(zero_step[0, 3], last[0, 3] @ C[0, 0, 1])


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 33])
@pytest.mark.parametrize("chunk", [1, 4, 8, 64])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_chunks_equal_the_recurrence(length: int, chunk: int, groups: int) -> None:
    args, s0 = Case(s=length, g=groups).make()
    for start in (None, s0):
        y, last = ssd_chunked(*args, chunk=chunk, state=start)
        want_y, want_last = ssd_recurrent(*args, state=start)
        close(y, want_y)
        close(last, want_last)


@pytest.mark.parametrize("cut", [1, 5, 8, 20])
def test_a_scan_goes_on_from_its_state(cut: int) -> None:
    (x, dt, A, B, C), s0 = Case(s=21).make()
    whole, end = ssd_chunked(x, dt, A, B, C, 4, s0)
    first, middle = ssd_chunked(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], 4, s0)
    second, last = ssd_chunked(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], 8, middle)
    close(torch.cat([first, second], 1), whole)
    close(last, end)


def gradients(scan: Callable[..., tuple[Tensor, Tensor]], case: Case, **kwargs: object) -> list[Tensor]:
    args, s0 = case.make()
    leaves = [t.requires_grad_() for t in (*args, s0)]
    y, last = scan(*leaves[:5], state=leaves[5], **kwargs)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return list(torch.autograd.grad((y * weight).sum() + last.sin().sum(), leaves))


LANES = torch.tensor([[0, 0, 0, 1, 1, -1, 1, 2, 2, 2, 2, -1, -1], [-1, -1, 5, 5, 5, 5, 3, 3, 5, 5, 3, 0, 0]])


@pytest.mark.parametrize("lane", [None, LANES], ids=["plain", "lanes"])
@pytest.mark.parametrize("decay", [1.0, 1e4])
def test_gradients_equal_those_of_the_recurrence(lane: Tensor | None, decay: float) -> None:
    case = Case(decay=decay)
    for got, want in zip(
        gradients(ssd_chunked, case, chunk=4, lane=lane), gradients(ssd_recurrent, case, lane=lane), strict=True
    ):
        assert got.isfinite().all()
        close(got, want)


def test_gradients_are_derivatives() -> None:
    args, s0 = Case(b=1, s=5, h=2, p=2, g=1, n=2).make()
    leaves = tuple(t.requires_grad_() for t in (*args, s0))
    assert torch.autograd.gradcheck(lambda *t: ssd_chunked(*t[:5], chunk=2, state=t[5], lane=LANES[:1, 1:6]), leaves)
    seen = ancestors(torch.tensor([[-1, 0, 0, 2, -1]]))
    assert torch.autograd.gradcheck(lambda *t: ssd_tree(*t[:5], seen, t[5]), leaves)


@pytest.mark.parametrize("decay", [0.0, 1e-8, 1e2, 1e4, 1e30])
def test_no_decay_overflows(decay: float) -> None:
    args, s0 = Case(s=40, decay=decay).make()
    y, last = ssd_chunked(*args, 16, s0)
    want_y, want_last = ssd_recurrent(*args, s0)
    close(y, want_y)
    close(last, want_last)
    parent = torch.arange(-1, 39)[None]
    close(ssd_tree(*args, ancestors(parent), s0), want_y)
    close(ssd_replay(*args[:4], parent + 1, s0), want_last)


def test_a_strong_decay_costs_its_neighbours_no_digits() -> None:
    """One slot forgets everything, the others little: a difference of running sums would lose what the others say."""
    (x, dt, A, B, C), s0 = Case(s=32, decay=0.05).make()
    dt = dt.clone()
    dt[:, 3] = 1e7
    x = x.clone()
    x[:, 3] *= 1e-7
    want, want_last = ssd_recurrent(x, dt, A, B, C, s0)
    small = [t.float() for t in (x, dt, A, B, C)]
    y, last = ssd_chunked(*small, 32, s0.float())
    close(y.double(), want, 2e-5)
    close(last.double(), want_last, 2e-5)
    parent = torch.arange(-1, 31)[None]
    close(ssd_tree(*small, ancestors(parent), s0.float()).double(), want, 2e-5)
    close(ssd_replay(*small[:4], parent + 1, s0.float()).double(), want_last, 2e-5)
    running = (small[1] * small[2]).cumsum(1)  # that this test can tell: the cheap formula fails it
    assert (running[:, 31] - running[:, 4]).sub((small[1] * small[2])[:, 5:].sum(1)).abs().max() > 1e-2


def test_half_precision_keeps_a_float32_state() -> None:
    args, s0 = Case(s=40).make()
    half = [t.bfloat16() for t in args]
    want, want_last = ssd_recurrent(*(t.double() for t in half), s0)
    y, last = ssd_chunked(*half, 16, s0.float())
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    close(last.double(), want_last, 1e-4)
    close(y.double(), want, 1e-2)
    one, after = ssd_step(half[0][:, 0], half[1][:, 0], half[2], half[3][:, 0], half[4][:, 0], s0.float())
    assert one.dtype == torch.bfloat16
    assert after.dtype == torch.float32
    close(one, y[:, 0], 1e-2)


# ---- lanes -----------------------------------------------------------------------------------------------------------


def runs(lane: Sequence[int]) -> list[list[int]]:
    """Live slots, cut where the lane changes."""
    live = [i for i, one in enumerate(lane) if one >= 0]
    out: list[list[int]] = []
    for before, i in zip([None, *live], live, strict=False):
        if before is None or lane[before] != lane[i]:
            out.append([])
        out[-1].append(i)
    return out


@drawn
@given(st.lists(st.integers(-1, 2), min_size=1, max_size=20), st.sampled_from([1, 3, 4, 32]), st.integers(1, 4))
def test_packed_samples_do_not_meet(lanes: list[int], chunk: int, width: int) -> None:
    """Against each sample alone; what stands in padding (not even a number) reaches nothing."""
    args, s0 = Case(b=1, s=len(lanes)).make()
    lane = torch.tensor([lanes])
    inputs, weight, bias, c0 = normal((1, len(lanes), 6), (6, width), (6,), (1, 6, width - 1))
    dead = lane < 0
    spoiled = [torch.where(dead.view(1, -1, *[1] * (t.dim() - 2)), torch.nan, t) if t.dim() > 1 else t for t in args]
    y, last = ssd_chunked(*spoiled, chunk=chunk, state=s0, lane=lane)
    by_loop, last_by_loop = ssd_recurrent(*args, state=s0, lane=lane)
    conv, tail = causal_conv(inputs.masked_fill(dead[..., None], torch.nan), weight, bias, c0, lane)
    want_y, want_last = torch.zeros_like(y), s0
    want_conv, want_tail = torch.zeros_like(conv), c0
    for number, run in enumerate(runs(lanes)):
        begin, early = (s0, c0) if number == 0 else (None, None)  # the state belongs to the first sample
        want_y[:, run], want_last = ssd_recurrent(*along(args, 0, run), state=begin)
        want_conv[:, run], want_tail = causal_conv(inputs[:, run], weight, bias, early)
    for got, want in [(y, want_y), (last, want_last), (by_loop, want_y), (last_by_loop, want_last)]:
        close(got, want)
    close(conv, want_conv)
    close(tail, want_tail)


def test_lanes_differ_by_row() -> None:
    args, s0 = Case().make()
    y, last = ssd_chunked(*args, 4, s0, LANES)
    for row in range(2):
        alone, end = ssd_chunked(*along(args, row, range(13)), 4, s0[row : row + 1], LANES[row : row + 1])
        close(y[row], alone[0])
        close(last[row], end[0])


# ---- convolution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 9])
def test_the_convolution_is_causal_and_goes_on(width: int, length: int) -> None:
    x, c0, weight, bias = normal((2, length, 6), (2, width - 1, 6), (6, width), (6,))
    y, tail = causal_conv(x, weight, bias, c0.mT)
    full = torch.cat([c0, x], 1).mT
    close(tail, full[..., length:])
    if length:
        close(y, F.conv1d(full, weight[:, None], bias, groups=6).mT)
        close(causal_conv(x, weight, None)[0], F.conv1d(F.pad(x.mT, (width - 1, 0)), weight[:, None], groups=6).mT)
    state = c0.mT
    for t in range(length):
        one, state = conv_step(x[:, t], weight, bias, state)
        close(one, y[:, t])
    close(state, tail)


# ---- trees -----------------------------------------------------------------------------------------------------------


@drawn
@given(trees)
def test_ancestors_are_the_paths(parent: list[int]) -> None:
    seen = ancestors(torch.tensor([parent]))[0]
    for u in range(len(parent)):
        assert seen[u].nonzero().flatten().tolist() == sorted(path_to(parent, u))


@drawn
@given(trees, trees, st.sampled_from([1, 2, 4]), st.sampled_from([1.0, 50.0]))
def test_each_slot_of_a_tree_is_the_end_of_its_path(
    left: list[int], right: list[int], groups: int, decay: float
) -> None:
    """Scan, convolution and replayed states, against the recurrence along every path from the committed states."""
    size = max(len(left), len(right))
    both = [left + [-1] * (size - len(left)), right + [-1] * (size - len(right))]  # smaller trees are filled with roots
    parent = torch.tensor(both)
    args, s0 = Case(s=size, g=groups, decay=decay).make()
    conv_x, weight, bias, c0 = normal((2, size, 6), (6, 4), (6,), (2, 6, 3))
    y = ssd_tree(*args, ancestors(parent), s0)
    conv = tree_conv(conv_x, weight, bias, tree_taps(parent, 4), c0)
    for u in range(size):
        paths = [path_to(tree, u) for tree in both]
        longest = max(map(len, paths))
        padded = torch.tensor([path + [-1] * (longest - len(path)) for path in paths])
        after_conv, after = replay(conv_x, *args[:4], padded, c0, s0)
        for row, path in enumerate(paths):
            want, want_state = ssd_recurrent(*along(args, row, path), state=s0[row : row + 1])
            close(y[row, u], want[0, -1])
            close(after[row], want_state[0])
            want_conv, want_tail = causal_conv(conv_x[row : row + 1, path], weight, bias, c0[row : row + 1])
            close(conv[row, u], want_conv[0, -1])
            close(after_conv[row], want_tail[0])


def test_a_chain_is_a_tree_and_a_shared_tree_is_every_rows() -> None:
    args, s0 = Case().make()
    chain = torch.arange(-1, 12)[None]
    close(ssd_tree(*args, ancestors(chain), s0), ssd_chunked(*args, 4, s0)[0])
    close(ssd_tree(*args, ancestors(chain)), ssd_chunked(*args, 4)[0])
    x, weight, c0 = normal((2, 13, 6), (6, 4), (2, 6, 3))
    close(tree_conv(x, weight, None, tree_taps(chain, 4)), causal_conv(x, weight, None)[0])
    fork = torch.tensor([[-1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 7]])
    close(
        ssd_tree(*args, ancestors(fork), s0),
        ssd_tree(*args, ancestors(fork.expand(2, -1)), s0),
    )
    path = torch.tensor([[0, 1, 4]])
    for one, many in zip(
        replay(x, *args[:4], path, c0, s0),
        replay(x, *args[:4], path.expand(2, -1), c0, s0),
        strict=True,
    ):
        assert torch.equal(one, many)


@pytest.mark.parametrize(
    "path", [torch.zeros(2, 0, dtype=torch.long), torch.full((2, 3), -1)], ids=["empty", "padding"]
)
def test_an_empty_path_rolls_back_bit_for_bit(path: Tensor) -> None:
    for kind in (torch.float64, torch.float32):
        args, s0 = Case().make(kind)
        conv_x, c0 = (t.to(kind) for t in normal((2, 13, 6), (2, 6, 3)))
        conv_state, state = replay(conv_x, *args[:4], path, c0, s0)
        assert torch.equal(conv_state, c0)
        assert torch.equal(state, s0)


def test_layers_are_replayed_at_once() -> None:
    """Three layers folded into the batch, each with its own decay."""
    cases = [Case(seed=i).make() for i in range(3)]
    x, dt, B = (torch.cat([args[i] for args, _ in cases]) for i in (0, 1, 3))
    A = torch.stack([args[2] for args, _ in cases]).repeat_interleave(2, 0)[:, None]
    path = torch.tensor([[0, 2, 5], [1, 7, -1]])
    folded = ssd_replay(x, dt, A, B, path.repeat(3, 1), torch.cat([s0 for _, s0 in cases]))
    close(folded, torch.cat([ssd_replay(*args[:4], path, s0) for args, s0 in cases]))


# ---- how they are called ---------------------------------------------------------------------------------------------


def test_one_graph_without_breaks() -> None:
    args, s0 = Case().make()
    parent = torch.tensor([[-1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 7]])

    def all_of_it(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, s0: Tensor, lane: Tensor) -> Sequence[Tensor]:
        flat = x.flatten(2)
        weight, tail = flat[0, :4].T, s0.flatten(1)[:, :36].reshape(2, 12, 3)
        conv, tail = causal_conv(flat, weight, None, tail, lane)
        tree = tree_conv(flat, weight, None, tree_taps(parent, 4), tail)
        after = replay(flat, x, dt, A, B, torch.tensor([[0, 1, 3, -1]]), tail, s0)
        return (
            *ssd_chunked(x, dt, A, B, C, 4, s0, lane),
            conv,
            tree,
            ssd_tree(x, dt, A, B, C, ancestors(parent)),
            *after,
        )

    compiled = torch.compile(all_of_it, fullgraph=True, backend="eager")
    for got, want in zip(compiled(*args, s0, LANES), all_of_it(*args, s0, LANES), strict=True):
        assert torch.equal(got, want)


def test_inputs_are_left_alone() -> None:
    args, s0 = Case().make()
    before = [t.clone() for t in (*args, s0)]
    ssd_chunked(*args, 4, s0, LANES)
    ssd_tree(*args, ancestors(torch.arange(-1, 12)[None]), s0)
    ssd_step(*(t[:, 0] if t.dim() > 1 else t for t in args), s0)
    replay(args[0].flatten(2), *args[:4], torch.tensor([[0, 1]]), s0.flatten(1)[:, :36].reshape(2, 12, 3), s0)
    assert all(torch.equal(a, b) for a, b in zip(before, (*args, s0), strict=True))


def test_wrong_shapes_are_named() -> None:
    (x, dt, A, B, C), s0 = Case().make()
    with pytest.raises(ValueError, match="dividing h"):
        ssd_chunked(x, dt, A, B[:, :, :1].expand(-1, -1, 3, -1), C[:, :, :1].expand(-1, -1, 3, -1))
    with pytest.raises(ValueError, match="at least one slot"):
        ssd_chunked(x, dt, A, B, C, 0)
    with pytest.raises(ValueError, match="ancestors"):
        ssd_tree(x, dt, A, B, C, torch.arange(-1, 12)[None], s0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width of 3"):
        tree_conv(torch.zeros(1, 2, 6), torch.zeros(6, 4), None, tree_taps(torch.tensor([[-1, 0]]), 3))
