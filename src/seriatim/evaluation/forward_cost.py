"""What a forward over several rows costs beside one over a single row: the curve t(n) by which drafts pay or do not.

Generation reads all weights for every forward, however few rows it has, so some rows more cost little, and where they
begin to cost depends on machine, number format and threads. Measured once for each of these and kept under
SERIATIM_HOME; a measurement beside other busy processes is used, and not kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from seriatim.backbones.quantize import Quantizable
from seriatim.canvas import Canvas
from seriatim.decoding.guess import Guess
from seriatim.decoding.target import Target
from seriatim.evaluation.cost import DISTURBED, PROC, Others
from seriatim.home import HOME
from seriatim.layout import line
from seriatim.posttraining.drafting import Base
from seriatim.training.checkpoint import save_json

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)  # products of few rows go up by steps, which differ by machine
LEAST, MOST = 3, 9  # rounds of a measurement
SHORTEST = 64  # tokens; behind fewer the context makes no difference


@dataclass(frozen=True)
class ForwardCost:
    """Seconds of a forward over so many rows (one sequence, a chain) behind a context of so many tokens: medians.

    about: what was measured where: weights, format, compiled, threads, device, processor, torch; disturbed: by other
    processes (None: the system does not say). Raises ValueError for a curve that is none.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    context: int
    about: Mapping[str, Any]
    disturbed: bool | None = None

    def __post_init__(self) -> None:
        grows = all(a < b for a, b in zip(self.rows, self.rows[1:], strict=False))
        sound = all(0 < s < math.inf for s in self.seconds)
        if not self.rows or self.rows[0] != 1 or not grows or len(self.rows) != len(self.seconds) or not sound:
            raise ValueError(f"a curve has seconds for 1 row and for more, got {self.rows} and {self.seconds}")

    def at(self, rows: float) -> float:
        """Seconds of a forward over so many rows: linear between what was measured, and beyond the last as before
        it."""
        if len(self.rows) == 1 or rows <= 1:
            return self.seconds[0]
        i = min(sum(n < rows for n in self.rows), len(self.rows) - 1)
        (a, b), (x, y) = self.rows[i - 1 : i + 1], self.seconds[i - 1 : i + 1]
        return max(x + (y - x) * (rows - a) / (b - a), self.seconds[0] if rows > b else 0.0)

    def t(self, rows: float) -> float:
        """How many forwards over one row it costs."""
        return self.at(rows) / self.seconds[0]

    def predict(self, tokens: float, rows: float, drafting: float = 0.0) -> float:
        """How much faster than plain decoding: E / (t(N) + draft), for E tokens a forward over N rows, its draft
        included that takes so many seconds (Leviathan et al. 2023, theorem 3.8, for any curve)."""
        return tokens * self.seconds[0] / (self.at(rows) + drafting)


def forward_cost(system: Any, context: int = 512, home: Path = HOME) -> ForwardCost:
    """The curve of a language model as it is now (format, compiled steps, threads), from disk where it was measured
    before, else measured here: seconds. Contexts are rounded up to powers of two, as far as the model goes."""
    context = _fitting(system, 2 ** math.ceil(math.log2(max(context, SHORTEST))))
    about = what(system)
    said = json.dumps([about, context], sort_keys=True)
    path = home / "forward-cost" / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.json"
    kept = _read(path)
    if kept is not None and kept.about == about and kept.context == context and set(_rows(system)) <= set(kept.rows):
        return kept
    cost = measured(system, context)
    if not cost.disturbed:
        save_json(asdict(cost), path)
    return cost


def measured(system: Any, context: int = 512, rows: Sequence[int] = ROWS, budget: float = 4.0) -> ForwardCost:
    """The curve of a language model behind a context of random tokens (of an encoder-decoder: an answer of one token to
    such a prompt): the forward that decoding takes, logits included. All numbers of rows in turn, in random order,
    round after round for about `budget` seconds. Fewer rows and a shorter context where the model takes no more.
    """
    context = _fitting(system, context)
    rows = _rows(system, rows)
    with torch.inference_mode():
        forward = _forwards(system, context)
        for n in rows:
            forward(n)  # compiles, and fills what is made once
        taken: dict[int, list[float]] = {n: [] for n in rows}
        order, others, start = random.Random(0), Others(), time.perf_counter()
        for turn in range(MOST):
            if turn >= LEAST and time.perf_counter() - start > budget:
                break
            for n in order.sample(rows, len(rows)):
                taken[n].append(forward(n))
        used = others.share()
    seconds = tuple(statistics.median(taken[n]) for n in rows)
    return ForwardCost(rows, seconds, context, what(system), None if used is None else used > DISTURBED)


def what(system: Any) -> dict[str, Any]:
    """Everything that seconds of a forward depend on, but the context."""
    model, base = system.model, Base(system)
    parts = [part for part in model.modules() if isinstance(part, Quantizable)]
    formats = {kind.__name__.lower() for part in parts for kind in part._formats.values()}
    return {
        "weights": base.exact_fingerprint,
        "format": " ".join([str(base.dtype).removeprefix("torch."), *sorted(formats)]),
        "compiled": getattr(model.backbone, "_compiled_layer", None) is not None,
        "threads": torch.get_num_threads(), "device": str(base.device), "processor": processor(),
        "torch": torch.__version__,
    }  # fmt: skip


def processor() -> str:
    """What this machine computes with."""
    name = platform.processor() or platform.machine()
    try:
        lines = (PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((text.partition(":")[2].strip() for text in lines if text.startswith("model name")), name)
    except OSError:
        pass
    return f"{os.cpu_count()} x {name}"


def _rows(system: Any, rows: Sequence[int] = ROWS) -> tuple[int, ...]:
    """Those that the model takes, one among them."""
    return tuple(n for n in sorted({1, *rows}) if n < system.model.layout.size)


def _fitting(system: Any, context: int) -> int:
    """As much of a context as the model takes with the most rows behind it."""
    return max(1, min(context, system.model.layout.size - max(ROWS) - 1))


def _forwards(system: Any, context: int) -> Callable[[int], float]:
    """A function that takes a forward over so many rows and says how long it took; the cache stays as it is."""
    model = system.model
    ids = torch.randint(model.heads["token"].vocab, (1, context), generator=torch.Generator().manual_seed(0))
    answers = "text" in model.conditions
    given = ids[:, :1] if answers else ids
    target = Target(model, {"text": ids} if answers else None)
    size = given.shape[1] + max(ROWS) + 1
    value = torch.nn.functional.pad(given, (0, size - given.shape[1]))
    canvas: Canvas = model.canvas({"token": value}, given.shape[1], layout=line(size))
    target.prefill(canvas, shared=True)

    def forward(rows: int) -> float:
        guess = None if rows == 1 else Guess(torch.zeros(1, rows - 1, dtype=torch.long))
        plan = target.plan(canvas, guess)
        assert plan is not None
        start = time.perf_counter()
        target.forward(plan, canvas, guess)
        return time.perf_counter() - start

    return forward


def _read(path: Path) -> ForwardCost | None:
    """A curve from disk; None where there is none that can be read."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return ForwardCost(**{**kept, "rows": tuple(kept["rows"]), "seconds": tuple(kept["seconds"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
