"""What generation costs: forwards, slots, seconds, peak memory of a fresh process, parameters.

Seconds mean something only beside the machine's load and interleaved with what they are compared with; peak memory only
of a process that does nothing else. Counts (forwards, slots, parameters) are exact anywhere.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from seriatim.decoding.loop import Step

DISTURBED = 0.2  # of a processor used by others: figures taken beside that are marked
PROC = Path("/proc")


# ---- counts ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Spent:
    """What decoding one batch took.

    forwards: passes of the model that each sample waited for (not divided by the batch); slots: rows of these passes
    for one sample; seconds: of the whole batch.
    """

    steps: int
    forwards: int
    slots: int
    samples: int
    seconds: float

    @property
    def seconds_per_sample(self) -> float:
        """Wall-clock seconds divided by the batch: depends on its size, which must be said."""
        return self.seconds / self.samples


def drain(steps: Iterable[Step], samples: int) -> Spent:
    """Run a stream of `decode` to its end and count. Guidance branches and a proposer's own models are not in it."""
    if samples < 1:
        raise ValueError(f"a batch has at least 1 sample, got {samples}")
    count = forwards = slots = 0
    start = time.perf_counter()
    for step in steps:
        count, forwards, slots = count + 1, forwards + step.forwards, slots + step.slots
    return Spent(count, forwards, slots, samples, time.perf_counter() - start)


def parameters(module: nn.Module) -> int:
    """Numbers in all parameters, shared ones once; buffers are none."""
    return sum(p.numel() for p in module.parameters())


# ---- seconds ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one arm; `disturbed` if other processes used over 20% of a processor meanwhile."""

    rounds: tuple[float, ...]
    load_average: float
    disturbed: bool | None  # None: this system does not say

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def time_interleaved(arms: Mapping[str, Callable[[], object]], rounds: int = 5, warm_up: int = 1) -> dict[str, Timing]:
    """Time the arms in turn, round by round, so that a slow minute meets all of them; compare ratios of medians."""
    if not arms or rounds < 1 or warm_up < 0:
        raise ValueError(f"at least one arm and one round, got {len(arms)} arms, rounds={rounds}, warm_up={warm_up}")
    for arm in list(arms.values()) * warm_up:
        arm()
    taken: dict[str, list[float]] = {name: [] for name in arms}
    others = Others()
    for _ in range(rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            taken[name].append(time.perf_counter() - start)
    used, load = others.share(), load_average()
    return {name: Timing(tuple(s), load, None if used is None else used > DISTURBED) for name, s in taken.items()}


class Others:
    """How much of a processor all other processes have used since this was made (Linux; elsewhere unknown)."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """1.0 is one whole processor; None where the system does not say, or in under a tenth of a second."""
        now = self._now()
        if now is None or self._start is None or now[0] - self._start[0] < 0.1:
            return None
        return max(0.0, (now[1] - self._start[1]) / (now[0] - self._start[0]))

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """Wall-clock time, and seconds that all processors have worked for others."""
        try:
            fields = [int(x) for x in (PROC / "stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
            busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf(
                "SC_CLK_TCK"
            )  # without idle and waiting for disks
        except (OSError, ValueError, IndexError):
            return None
        return time.perf_counter(), busy - sum(os.times()[:4])


def load_average() -> float:
    """Processes that ran or wanted to, mean of the last minute; nan where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return float("nan")


# ---- memory ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fresh:
    """What a function did in a process of its own.

    result: its return value, through JSON; peak: the most memory the process ever held, in bytes, interpreter and
    libraries included; before: what it held when the function was called, its module imported; seconds: of the call.
    """

    result: Any
    peak: int
    before: int
    seconds: float


def fresh_process(function: str, arguments: Mapping[str, Any] | None = None, timeout: float | None = None) -> Fresh:
    """Call "module:function" with these keyword arguments in a new interpreter and measure its peak memory.

    Arguments and result pass through JSON; the module is found as it would be here (`sys.path` is handed on).
    Raises ValueError for a malformed name or arguments that JSON cannot hold, RuntimeError with the last lines of
    its standard error where the process failed, TimeoutError where it took longer than `timeout` seconds.
    """
    if function.count(":") != 1 or not all(part for part in function.split(":")):
        raise ValueError(f"name the function as 'module:function', got {function!r}")
    try:
        task = json.dumps({"function": function, "arguments": dict(arguments or {}), "path": sys.path})
    except (TypeError, ValueError) as error:
        raise ValueError(f"arguments of {function} must fit in JSON: {error}") from None
    with tempfile.TemporaryDirectory(prefix="seriatim-") as folder:
        answer = Path(folder) / "answer.json"
        code = (
            "import json, sys; task = json.loads(sys.stdin.read()); sys.path[:] = task['path']; "
            "from seriatim.evaluation.cost import answer; answer(task, sys.argv[1])"
        )
        command = [sys.executable, "-P", "-c", code, str(answer)]
        try:
            done = subprocess.run(command, input=task, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{function} took longer than {timeout:g} seconds in its own process") from None
        if done.returncode != 0 or not answer.is_file():
            last = "\n".join(done.stderr.strip().splitlines()[-8:])
            raise RuntimeError(f"{function} failed in its own process (exit code {done.returncode}):\n{last}")
        return Fresh(**json.loads(answer.read_text(encoding="utf-8")))


def answer(task: Mapping[str, Any], path: str) -> None:
    """The other side of `fresh_process`: call, measure, write the answer."""
    module, name = task["function"].split(":")
    function = getattr(importlib.import_module(module), name)
    before = peak_memory()
    start = time.perf_counter()
    result = function(**task["arguments"])
    seconds = time.perf_counter() - start
    figures = {"result": result, "peak": peak_memory(), "before": before, "seconds": seconds}
    Path(path).write_text(json.dumps(figures), encoding="utf-8")


def peak_memory() -> int:
    """The most memory this process has ever held in RAM, in bytes.

    Linux's own high-water mark: `ru_maxrss` there is inherited from the process that started this one.
    """
    try:
        for line in (PROC / "self" / "status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
