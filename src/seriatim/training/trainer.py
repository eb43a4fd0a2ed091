"""The one training: draw a batch, take the loss, step; saved, resumed, averaged, spread over processes.

Counter-based: which samples step n sees and all noise in it follow from the seed and n alone, so a resumed training
needs no record of randomness or of the place in the data, and goes on bit for bit. A batch of N parts is the same
whether one process takes them one after another or N processes one each.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, fields, is_dataclass, replace
from hashlib import blake2b
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from seriatim.compiling import why_not_compiled
from seriatim.random import Generator
from seriatim.training.loop import adamw
from seriatim.training.precision import autocast, why_not_bfloat16
from seriatim.training.recipe import Recipe
from seriatim.training.run import RunFolder
from seriatim.training.state import frozen_names, gather, read_safely, restore, write_safely

SAVE_EVERY = 120.0  # seconds
LOOKS_APART = 20  # steps, at least, between two looks at held-out data where nothing else is said
CALIBRATION = 20  # steps that tell how many fit a budget of time


class Examples(Protocol):
    """One side of a data set."""

    def __len__(self) -> int: ...

    def take(self, index: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """These samples as a batch; augmented if a generator is given."""
        ...


class Learner(Protocol):
    """What is trained: an nn.Module whose call gives the sum of a batch's losses and over how many elements."""

    figures: Mapping[str, float]  # of the last batch, beside its loss: to be shown

    def __call__(self, batch: Mapping[str, Tensor], random: Generator, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """`random` is all randomness there is; step and steps are for schedules."""
        ...

    def validate(self, examples: Examples) -> dict[str, float]:
        """Figures on held-out samples, the same samples and noise each time."""
        ...

    def weights_to_keep(self) -> nn.Module:
        """The module that generation loads."""
        ...

    def stored(self, weights: Mapping[str, Tensor]) -> tuple[str, Mapping[str, Tensor]]:
        """The file that generation loads, and what is in it, of that module's weights by name."""
        ...


class Tick(Protocol):
    """Told after every step, for a progress bar."""

    def __call__(self, step: int, steps: int, figures: Mapping[str, float]) -> None: ...


def seeded(*what: int | str) -> torch.Generator:
    """A generator whose state follows from what is named."""
    return torch.Generator().manual_seed(number_of(*what))


def number_of(*what: int | str) -> int:
    """63 bits that follow from what is named."""
    return int.from_bytes(blake2b("/".join(map(str, what)).encode(), digest_size=8).digest(), "big") >> 1


def train(
    learner: Learner,
    examples: Examples,
    recipe: Recipe,
    folder: RunFolder,
    card: Mapping[str, Any],
    held_out: Examples | None = None,
    resume: bool = False,
    minutes: float | None = None,
    tick: Tick | None = None,
) -> list[dict[str, float]]:
    """Train in place, writing to a folder; the figures of every step.

    Raises FloatingPointError where a loss is not finite (the last state is kept), KeyboardInterrupt after the state has
    been saved, ValueError and OSError where the folder does not fit or cannot be written.
    """
    if len(examples) == 0:
        raise ValueError("there is nothing to train on: the data hold no samples")
    first = int(os.environ.get("RANK", "0")) == 0  # of the processes; only this one writes
    with folder.held() if first else nullcontext():
        if first:
            known = {"recipe": recipe, "config": getattr(learner, "config", None)}
            folder.begin(card, resume, {name: defaults_of(x) for name, x in known.items() if name in card})
        return _Training(learner, examples, recipe, folder, held_out, tick).run(resume, minutes)


def defaults_of(settings: Any) -> dict[str, Any]:
    """The defaults of a dataclass of settings; of anything else there are none."""
    if not is_dataclass(settings):
        return {}
    return {f.name: f.default for f in fields(settings) if f.default is not MISSING}


class _Training:
    def __init__(
        self, learner: Any, examples: Examples, recipe: Recipe, folder: RunFolder, held_out: Examples | None,
        tick: Tick | None,
    ):  # fmt: skip
        self.recipe, self.folder, self.examples, self.held_out, self.tick = recipe, folder, examples, held_out, tick
        self.accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
        self.learner = learner
        parts = recipe.accumulate * self.accelerator.num_processes
        if recipe.batch % parts:
            raise ValueError(f"a batch of {recipe.batch} cannot be computed in {parts} equal parts; take a multiple")
        learner.train()
        missing = why_not_bfloat16(self.accelerator.device.type) if recipe.bf16 else None
        if missing is not None:
            warnings.warn(f"training is in float32, which is faster here: {missing}", stacklevel=2)
        if recipe.compile:
            compile_layers(learner.to(self.accelerator.device))
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.accelerator.num_processes > 1
        self.model = self._sharded(learner) if self.sharded else self.accelerator.prepare(learner)
        self.optimizer = adamw(self.model, recipe)
        self.base_rates = [g["lr"] for g in self.optimizer.param_groups]
        self.average = self._fresh_average()
        self.best: dict[str, Tensor] = {}  # weights of the smallest loss on held-out data, where patience has an end
        self.smallest, self.waited = math.inf, 0
        self.history: list[dict[str, float]] = []
        self.asked_to_stop = False

    def _sharded(self, learner: Any) -> Any:
        """Weights, gradients and moments spread over the processes (FSDP2; `accelerate launch --use_fsdp`)."""
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        learner.to(self.accelerator.device)
        fully_shard(learner)
        register_fsdp_forward_method(learner, "validate")
        return learner

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self, resume: bool, minutes: float | None) -> list[dict[str, float]]:
        step = 0
        if resume and self.folder.state.exists():
            step = self._load()
        elif minutes is not None:
            self.recipe = replace(self.recipe, steps=self._steps_in(60 * minutes))
        if self.accelerator.is_main_process:
            self.history = self.folder.forget_after(step)  # type: ignore[assignment]
        steps, saved = self.recipe.steps, time.monotonic()
        first = self.accelerator.is_main_process
        with self._stops_politely(), open(self.folder.metrics if first else os.devnull, "a", encoding="utf-8") as log:
            while step < steps:
                start = time.monotonic()
                figures = self._step(step)
                figures["seconds"] = round(time.monotonic() - start, 4)
                step += 1
                if self._due(step):
                    figures |= self._validate()
                    steps = step if self._is_enough(figures) else steps
                self._note(log, step, figures)
                if self.asked_to_stop or step == steps or self._agreed(time.monotonic() - saved > SAVE_EVERY):
                    log.flush()  # first: what a state has seen is in the log
                    if first:
                        os.fsync(log.fileno())
                    self._save(step)
                    saved = time.monotonic()
                if self.asked_to_stop and step < steps:
                    raise KeyboardInterrupt
        self._use(self.best or self.average)
        self.learner.eval()
        return self.history

    def _step(self, step: int) -> dict[str, float]:
        r, a = self.recipe, self.accelerator
        rate = r.rate(step)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * rate
        parts = self._samples(step).chunk(r.accumulate * a.num_processes)
        mine = range(a.process_index, len(parts), a.num_processes)
        total, count = torch.zeros((), device=a.device), torch.zeros((), device=a.device)
        self.optimizer.zero_grad(set_to_none=True)
        for n in mine:
            loss, elements = self._loss(parts[n], step, n)
            with self._synchronised(n == mine[-1]):
                loss.backward()
            total, count = total + loss.detach(), count + elements
        total, count = a.reduce(total), a.reduce(count)
        value = float(total / count)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {step + 1}: lower the learning rate, or check the data. The last good "
                f"state is kept in {self.folder.path}"
            )
        params = [p for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_([p.grad for p in params], float(a.num_processes / count))  # processes have been averaged
        norm = _whole(nn.utils.clip_grad_norm_(params, r.clip))
        self.optimizer.step()
        if self.average:
            ours = self._trained()
            torch._foreach_lerp_(list(self.average.values()), [ours[k] for k in self.average], 1 - r.decay(step))
        told = {"loss": value, "learning_rate": r.learning_rate * rate, "gradient_norm": float(norm)}
        return told | self.learner.figures

    def _samples(self, step: int) -> Tensor:
        """The numbers of a step's samples: of a pass where there are passes, else drawn anew."""
        r, n = self.recipe, len(self.examples)
        if r.epoch is None:
            return torch.randint(n, (r.batch,), generator=seeded(r.seed, step, "samples"))
        turn, place = divmod(step, max(n // r.batch, 1))
        if self.order is None or self.order[0] != turn:
            self.order = turn, torch.randperm(n, generator=seeded(r.seed, turn, "pass"))
        return self.order[1][place * r.batch : (place + 1) * r.batch]

    order: tuple[int, Tensor] | None = None  # of a pass: its number, and its samples

    def _is_enough(self, figures: Mapping[str, float]) -> bool:
        """Whether the loss on held-out data has stopped falling; the weights of the smallest are remembered."""
        if self.recipe.patience is None:
            return False
        if figures["held_out_loss"] < self.smallest:
            self.smallest, self.waited = figures["held_out_loss"], 0
            self.best = {k: v.clone() for k, v in self._trained().items()}
            return False
        self.waited += 1
        return self.waited >= self.recipe.patience

    def _loss(self, index: Tensor, step: int, part: int) -> tuple[Tensor, Tensor]:
        r = self.recipe
        batch = self.examples.take(index, seeded(r.seed, step, part, "augmentation"))
        batch = {k: v.to(self.accelerator.device) for k, v in batch.items()}
        random = Generator()
        random.generator = seeded(r.seed, step, part, "noise")
        torch.manual_seed(number_of(r.seed, step, part, "dropout"))
        with self._autocast():
            return self.model(batch, random, step, r.steps)

    def _autocast(self) -> torch.autocast:
        return autocast(self.accelerator.device.type, self.recipe.bf16)

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Processes exchange gradients at the last part only."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
            yield
        elif last or self.accelerator.num_processes == 1:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def _due(self, step: int) -> bool:
        every = self.recipe.validate_every or max(self.recipe.steps // 10, LOOKS_APART)
        return self.held_out is not None and (step % every == 0 or step == self.recipe.steps)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        assert self.held_out is not None
        self.learner.eval()
        with torch.random.fork_rng(), self._autocast():
            figures = self.learner.validate(self.held_out)
        self.learner.train()
        return {f"held_out_{k}": float(v) for k, v in figures.items()}

    def _note(self, log: Any, step: int, figures: dict[str, float]) -> None:
        self.history.append({"step": step, **figures})
        log.write(json.dumps({"step": step, **figures}) + "\n")
        if self.tick and self.accelerator.is_main_process:
            self.tick(step, self.recipe.steps, figures)

    # ---- saving and resuming ----------------------------------------------------------------------------------------

    def _save(self, step: int) -> None:
        tensors = gather(self.model, self.optimizer)
        tensors |= {f"average.{k}": _whole(v) for k, v in self.average.items()}
        tensors |= {f"best.{k}": _whole(v) for k, v in self.best.items()}
        if self.accelerator.is_main_process:
            frozen = frozen_names(self.model)  # they are what the training was given
            state = {k: v for k, v in tensors.items() if k not in frozen}
            about: dict[str, Any] = {"step": step, "steps": self.recipe.steps}
            if self.best:
                about |= {"smallest": self.smallest, "waited": self.waited}
            write_safely(self.folder.state, state, about)
            own = self.learner.weights_to_keep()
            prefix = next((f"{n}." for n, m in self.learner.named_modules() if m is own and n), "")
            kind = "best." if self.best else "average." if self.average else "model."
            weights = {k: v for k, v in tensors.items() if k.startswith("model." + prefix)}
            weights |= {k.replace(kind, "model.", 1): v for k, v in tensors.items() if k.startswith(kind)}
            cut = len("model." + prefix)
            name, kept = self.learner.stored({k[cut:]: v for k, v in weights.items()})
            write_safely(self.folder.path / name, kept, {"step": step})
        self.accelerator.wait_for_everyone()

    def _load(self) -> int:
        tensors, about = read_safely(self.folder.state)
        restore(self.model, self.optimizer, tensors, self.folder.state)
        self.recipe = replace(self.recipe, steps=about["steps"])
        average = self._fresh_average()
        for name, x in average.items():
            stored = tensors[f"average.{name}"].to(x.device)
            x.copy_(_like(stored, x))
        self.average = average
        self.smallest, self.waited = about.get("smallest", math.inf), about.get("waited", 0)
        if "smallest" in about:
            self.best = {k: _like(tensors[f"best.{k}"].to(v.device), v) for k, v in self._trained().items()}
        if self.recipe.patience is not None and self.waited >= self.recipe.patience:
            self.recipe = replace(self.recipe, steps=about["step"])  # it had ended
        return about["step"]

    def _trained(self) -> dict[str, Tensor]:
        return {n.removeprefix("module."): p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    def _fresh_average(self) -> dict[str, Tensor]:
        return {} if self.recipe.ema is None else {k: v.clone() for k, v in self._trained().items()}

    def _use(self, kept: Mapping[str, Tensor]) -> None:
        """The averaged weights, or the best, in place of the last."""
        for name, x in self._trained().items():
            if name in kept:
                x.copy_(kept[name])

    # ---- time and interruption --------------------------------------------------------------------------------------

    def _steps_in(self, seconds: float) -> int:
        """How many steps fit: some are taken, timed, and taken back. Their median counts: a machine that was held up
        once is not a slow one."""
        before = {k: v.clone() for k, v in self.model.state_dict().items()}
        self._step(0)  # warms up
        took: list[float] = []
        while len(took) < CALIBRATION - 1:
            start = time.monotonic()
            self._step(1 + len(took))
            took.append(time.monotonic() - start)
            if self._agreed(sum(took) - max(took) > 0.2 * seconds):
                break
        each = self.accelerator.reduce(torch.tensor(statistics.median(took)), "mean")
        self.model.load_state_dict(before)
        self.optimizer.state.clear()
        self.average = self._fresh_average()
        return max(CALIBRATION, int(seconds / float(each)))

    def _agreed(self, mine: bool) -> bool:
        """What the first process sees, on all of them."""
        if self.accelerator.num_processes == 1:
            return mine
        flag = torch.tensor(float(mine and self.accelerator.is_main_process), device=self.accelerator.device)
        return float(self.accelerator.reduce(flag)) > 0

    @contextmanager
    def _stops_politely(self) -> Iterator[None]:
        """Ctrl-C lets the step end and saves; a second one stops at once."""

        def stop(number: int, frame: Any) -> None:
            if self.asked_to_stop:
                raise KeyboardInterrupt
            self.asked_to_stop = True

        try:
            before = signal.signal(signal.SIGINT, stop)
        except ValueError:  # not in the main thread: nobody presses keys there
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def compile_layers(module: nn.Module) -> None:
    """Compile the parts that say how (`compile_training`); where nothing can be compiled, a warning says why."""
    missing = why_not_compiled(next(module.parameters()).device)
    if missing:
        warnings.warn(f"training is not compiled, and takes about twice the time: {missing}", stacklevel=2)
        return
    for part in module.modules():
        compile_part = getattr(part, "compile_training", None)
        if compile_part is not None:
            compile_part()


def _whole(x: Tensor) -> Tensor:
    """A tensor that is spread over processes, gathered."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _like(x: Tensor, other: Tensor) -> Tensor:
    """A whole tensor spread as another one is."""
    if not hasattr(other, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, other.device_mesh, other.placements)  # type: ignore[attr-defined]
