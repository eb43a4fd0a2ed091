"""The laws of a forecaster: nothing of the future reaches what is forecast, windows and variates keep to themselves.

A forecast is a number, not a distribution, so the laws of enumeration do not apply. What a forecaster compares in
training (`Predictions`) says upon how many rows each value may depend; it is held to that by edits.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seriatim.laws.case import Limit
from seriatim.laws.laws import LAWS, NotApplicable, require
from seriatim.random import Generator
from seriatim.tokenizers.series import Scale
from seriatim.training.checkpoint import load_weights, save_weights

STEPS, MARKS, HOUR = 60, 2, 3_600_000
Batch = dict[str, Tensor]


@dataclass
class SeriesCase:
    """A tiny system of series, for the laws: weights are drawn anew, in float64.

    channels: of the windows it is tried on; limits: checks of law 8; segment: steps that a roll decides; starved:
    parameters that get no gradient at this size, with the reason in the system's file; rate: of learning, in law 12.
    """

    system: Any
    channels: int = 3
    limits: tuple[Callable[[], Limit], ...] = ()
    segment: int | None = None
    starved: tuple[str, ...] = ()
    rate: float = 1e-2

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.system.model.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * (0.4 if p.dim() > 1 else 0.3))
        self.system.double().eval()

    def batch(self, rows: int = 3, horizon: int | None = None, seed: int = 0) -> Batch:
        """Windows of noise."""
        c, g = self.system.config, torch.Generator().manual_seed(seed)
        horizon = horizon or c.horizon

        def drawn(steps: int, columns: int) -> Tensor:
            return torch.randn(rows, steps, columns, generator=g, dtype=torch.float64)

        return {
            "past": drawn(c.lookback, self.channels), "future": drawn(horizon, self.channels),
            "past_marks": drawn(c.lookback, MARKS), "future_marks": drawn(horizon, MARKS),
            **hours(torch.randint(0, 99, (rows, 1, 1), generator=g), c.lookback, horizon),
        }  # fmt: skip

    def forecast(self, batch: Batch) -> Tensor:
        return self.system.forecast(*self.system.given(batch))


def hours(begin: Tensor, lookback: int, horizon: int) -> Batch:
    """Times of windows (b, 1, 1) that begin at some hour."""
    time = HOUR * (begin + torch.arange(lookback + horizon)[None, :, None])
    return {"past_time": time[:, :lookback], "future_time": time[:, lookback:]}


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def rolling(case: SeriesCase) -> str:
    """A long forecast is rolled from short ones: each segment from what was known and forecast before."""
    if not case.system.rolls:
        raise NotApplicable("all steps are forecast in one forward")
    assert case.segment is not None
    n, c = case.segment, case.system.config
    whole = case.batch(horizon=2 * n)
    past, told, ahead = case.system.given(whole)
    one = case.system.forecast(past, told, ahead[:, :n])
    past, told = (torch.cat(both, 1)[:, -c.lookback :] for both in ((past, one), (told, ahead[:, :n])))
    two = case.system.forecast(past, told, ahead[:, n:])
    gap = _gap(torch.cat([one, two], 1), case.forecast(whole))
    require(gap < 1e-9, f"{2 * n} steps and two times {n} differ by {gap:.1e}")
    return f"{2 * n} steps are two rolls of {n}, to {gap:.0e}"


def no_peeking(case: SeriesCase) -> str:
    """What is compared in training depends on no row that it should not know, and on every row that it may."""
    batch = case.batch(1)
    rows = torch.cat([batch["past"], batch["future"]], 1)
    length = batch["past"].shape[1]
    scale = Scale.of(batch["past"])
    with torch.no_grad():
        before = case.system.predictions(batch, scale)
        seen = torch.zeros(rows.shape[1], dtype=torch.bool)
        for t in range(rows.shape[1]):
            edited = rows.clone()
            edited[:, t] += 0.7
            after = case.system.predictions({**batch, "past": edited[:, :length], "future": edited[:, length:]}, scale)
            moved = (after.value - before.value).abs().amax((0, 2)) > 1e-12
            wrong = moved & (before.known <= t)
            place = int(wrong.long().argmax())
            require(
                not wrong.any(),
                f"row {t} changes value {place}, which may depend on the first {int(before.known[place])} rows alone",
            )
            seen[t] = bool(moved.any())
    most = int(before.known.max())
    require(seen[:most].all(), f"row {int((~seen[:most]).long().argmax())} of the lookback changes nothing")
    return f"{len(before.known)} values, by edits of {rows.shape[1]} rows"


def company(case: SeriesCase) -> str:
    """A window's forecast depends on no other window; in another order of variates it is the same, in that order."""
    batch = case.batch()
    together = case.forecast(batch)
    for i in range(len(together)):
        alone = case.forecast({k: v[i : i + 1] for k, v in batch.items()})
        require(_gap(alone[0], together[i]) < 1e-9, f"window {i} alone is forecast otherwise")
    order = torch.randperm(case.channels, generator=torch.Generator().manual_seed(1))
    turned = case.forecast({**batch, "past": batch["past"][..., order]})
    gap = _gap(turned, together[..., order])
    require(gap < 1e-9, f"variates in another order are forecast otherwise, by {gap:.1e}")
    return "windows alone and together, variates in two orders"


def feed(case: SeriesCase) -> str:
    """The values that training compares with the horizon are those that are forecast."""
    batch = case.batch(horizon=case.segment or None)
    with torch.no_grad():
        made = case.system.predictions(batch)
    n = batch["future"].shape[1]
    want = case.forecast(batch)
    gap = _gap(made.value[:, -n:], want)
    require(gap < 1e-9, f"training compares values that differ from the forecast by {gap:.1e}")
    require(_gap(made.target[:, -n:], batch["future"]) < 1e-9, "training compares them with something else")
    return f"{n} steps, to {gap:.0e}"


def limits(case: SeriesCase) -> str:
    """What is moved and stretched is forecast moved and stretched, where windows are seen on their own scale; and the
    pairs that the system names."""
    notes = []
    if case.system.scales:
        batch = case.batch()
        batch["past"] = 50 * batch["past"]  # so that what is added to variances counts for nothing
        factor, shift = torch.tensor([2.0, 0.5, 3.0]).double()[: case.channels], 7.0
        moved = case.forecast({**batch, "past": factor * batch["past"] + shift})
        gap = _gap(moved, factor * case.forecast(batch) + shift)
        require(gap < 1e-2, f"a stretched series is forecast otherwise, by {gap:.1e}")
        notes.append("a stretched series")
    for limit in case.limits:
        name, got, want, tolerance = limit()
        require(_gap(got, want) <= tolerance, f"{name}: they differ by {_gap(got, want):.1e}")
        notes.append(name)
    if not notes:
        raise NotApplicable("it is the limit of no other composition")
    return "; ".join(notes)


def bookkeeping(case: SeriesCase) -> str:
    """As many steps as are asked for, none of them empty; the beginning of a longer forecast is the shorter one."""
    c = case.system.config
    batch = case.batch()
    whole = case.forecast(batch)
    require(whole.shape == batch["future"].shape, f"{tuple(whole.shape)} for {tuple(batch['future'].shape)}")
    require(bool(whole.isfinite().all()), "a forecast is not finite")
    past, told, ahead = case.system.given(batch)
    short = case.system.forecast(past, told, ahead[:, : c.horizon - 1])
    gap = _gap(short, whole[:, :-1])
    require(gap < 1e-9, f"a shorter forecast differs from the beginning of a longer one by {gap:.1e}")
    return f"{c.horizon} and {c.horizon - 1} steps"


def gradients(case: SeriesCase) -> str:
    """Some to every trainable parameter, none to frozen ones."""
    system = copy.deepcopy(case.system)
    system.train()
    loss, _ = system(case.batch(4, case.segment), Generator(0), 0, 1)
    loss.backward()
    named = dict(system.named_parameters())
    live = {n for n, p in named.items() if p.grad is not None and bool((p.grad != 0).any())}
    fed = live | {n for n in named if n.endswith(case.starved or ("\0",))}
    starving = [n for n, p in named.items() if p.requires_grad and n not in fed]
    require(not starving, f"no gradient reaches {', '.join(starving[:3])}")
    frozen = [n for n, p in named.items() if not p.requires_grad and p.grad is not None]
    require(not frozen, f"a gradient reaches {', '.join(frozen[:3])}, which are frozen")
    return f"{len(live)} parameters, {sum(not p.requires_grad for p in named.values())} frozen"


def round_trip(case: SeriesCase) -> str:
    """Saved weights give the same forecast."""
    batch = case.batch()
    want = case.forecast(batch)
    other = copy.deepcopy(case)
    with torch.no_grad():
        for p in other.system.model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    require(_gap(other.forecast(batch), want) > 1e-6, "other weights give the same forecast")
    with tempfile.TemporaryDirectory() as folder:
        path = save_weights(case.system.weights_to_keep(), Path(folder) / "weights.safetensors")
        load_weights(other.system.weights_to_keep(), path)
    require(_gap(other.forecast(batch), want) == 0, "saved weights give another forecast")
    return "saved and loaded"


def learns(case: SeriesCase) -> str:
    """Waves whose phase and size the lookback tells are forecast far better than by the mean; not, where the lookback
    is of another wave."""
    errors = [_learned(case, shuffled) for shuffled in (False, True)]
    require(errors[0] < 0.5, f"after {STEPS} steps the squared error is {errors[0]:.2f} of the variance")
    require(errors[1] > 0.7, f"lookbacks of other waves give an error of {errors[1]:.2f} of the variance")
    return f"{errors[0]:.2f} of the variance; {errors[1]:.2f} from lookbacks of other waves"


def _learned(case: SeriesCase, shuffled: bool) -> float:
    system = copy.deepcopy(case.system).float()
    system.train()
    trained = [p for p in system.parameters() if p.requires_grad]
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained:
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
    optimizer = torch.optim.Adam(trained, case.rate)
    for _ in range(STEPS):
        loss, count = system(_waves(case, 32, g, shuffled), Generator(0), 0, 1)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    system.eval()
    batch = _waves(case, 128, g, shuffled)
    error = (system.forecast(*system.given(batch)) - batch["future"]).square()
    return float(error.mean() / batch["future"].var())


def _waves(case: SeriesCase, rows: int, g: torch.Generator, shuffled: bool) -> Batch:
    c = case.system.config
    period = max(c.lookback / 1.5, 4)
    t = torch.arange(c.lookback + c.horizon)[None, :, None]
    phase, size = torch.rand(2, rows, 1, case.channels, generator=g)
    wave = (0.5 + size) * torch.sin(2 * math.pi * (t / period + phase))
    past, future = wave[:, : c.lookback], wave[:, c.lookback :]
    if shuffled:
        past = past[torch.randperm(rows, generator=g)]
    zeros = torch.zeros(rows, c.lookback + c.horizon, MARKS)
    return {
        "past": past, "future": future, "past_marks": zeros[:, : c.lookback], "future_marks": zeros[:, c.lookback :],
        **hours(torch.zeros(rows, 1, 1, dtype=torch.int64), c.lookback, c.horizon),
    }  # fmt: skip


def _point(case: SeriesCase) -> str:
    raise NotApplicable("a forecast is a number for each step: there is no distribution to draw from, and no cache")


OF_SERIES = {
    1: (LAWS[1][0], rolling), 2: (LAWS[2][0], _point), 3: (LAWS[3][0], no_peeking), 4: (LAWS[4][0], _point),
    5: (LAWS[5][0], _point), 6: (LAWS[6][0], company), 7: (LAWS[7][0], feed), 8: (LAWS[8][0], limits),
    9: (LAWS[9][0], bookkeeping), 10: (LAWS[10][0], gradients), 11: (LAWS[11][0], round_trip),
    12: (LAWS[12][0], learns),
}  # fmt: skip


# ---- wrong on purpose ------------------------------------------------------------------------------------------------


def shifted(case: SeriesCase) -> SeriesCase:
    """For mutants: in training the lookback ends one step late."""
    right = case.system.predictions

    def predictions(batch: Batch, scale: Scale | None = None) -> Any:
        past = torch.cat([batch["past"][:, 1:], batch["future"][:, :1]], 1)
        return right({**batch, "past": past}, scale)

    case.system.predictions = predictions
    return case
