"""Trials of systems that denoise in place, as claims state them: what a wrong context costs, what pictures cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seriatim.factorization.trajectory import Moments
from seriatim.model import pick_slots
from seriatim.objectives.denoised import Denoising
from seriatim.random import Generator
from seriatim.systems.pyramid_trials import fd_s, trained_seed
from seriatim.systems.system import evenly

NOISES = (0.0, 0.25, 0.5, 1.0)  # deviations of what is added to a context, in those of the vectors
EXAMPLES = 512


def context_trial(trained: Any, samples: int = 620) -> Mapping[str, Any]:
    """The loss of all groups but the first behind contexts of growing error (`loss_0.5`: with noise of deviation 0.5),
    as decoding reads them, and the quality of pictures."""
    system, data = trained.system, trained.data
    return {f"loss_{s:g}": behind_noise(system, data.test, s) for s in NOISES} | quality(trained, samples)


STEPS = ((25, 0.5), (50, 0.5), (50, 0.0))  # of sampling, and how strongly they are guided


def remembering(trained: Any, samples: int = 300) -> Mapping[str, Any]:
    """Quality of pictures that are drawn in so many steps (`fd_s_25`; `fd_s_50_free` without guidance), and, of systems
    whose steps remember earlier ones, of the same with every step on its own (`fd_s_25_erased`). `fd_s` and what goes
    with it is that of as many steps as is usual."""
    system, seed = trained.system, trained_seed(trained)
    figures: dict[str, Any] = dict(quality(trained, samples))
    order = system.model.factorization
    ways = {"": order} | ({} if type(order) is Moments else {"_erased": Moments(order.size)})
    for (way, how), (steps, guidance) in itertools.product(ways.items(), STEPS):
        system.model.factorization = how
        said = fd_s(system, trained.data, replace(system.sampling, steps=steps, guidance=guidance), seed, samples)
        figures[f"fd_s_{steps}{'' if guidance else '_free'}{way}"] = said["fd_s"]
    system.model.factorization = order
    return figures


def quality(trained: Any, samples: int = 620) -> dict[str, Any]:
    """Of pictures, and the seconds that one takes."""
    start = time.perf_counter()
    said = fd_s(trained.system, trained.data, trained.system.sampling, trained_seed(trained), samples)
    return {**said, "seconds_a_picture": (time.perf_counter() - start) / samples}


FEW = (4, 8, 16, 32)


def few_steps(trained: Any, samples: int = 620) -> dict[str, Any]:
    """Of pictures by the number of decoding steps, as far as the system leaves a choice (`fd_s_4`, ...)."""
    system, seed = trained.system, trained_seed(trained)
    figures: dict[str, Any] = {}
    for n in FEW:
        said = fd_s(system, trained.data, replace(system.sampling, steps=n), seed, samples)
        figures |= {f"fd_s_{n}": said["fd_s"], f"accuracy_{n}": said.get("accuracy")}
    return figures


def splits(trained: Any, samples: int = 620) -> dict[str, Any]:
    """Of pictures of a system that draws in stages, and the operations that one takes; the same with ever fewer of the
    steps in the last stage, as many in all (`fd_s_last_5`, ...)."""
    head = trained.system.head
    whole, count = head.config, len(head.cells.sides)
    figures = {**quality(trained, samples), "gflops": gflops(trained.system)}
    total, seed = whole.steps * count, trained_seed(trained)
    for last in (5, 2) if count > 1 else ():
        rest = total - last
        first = [rest // (count - 1)] * (count - 1)
        first[0] += rest - sum(first)
        head.config = replace(whole, split=(*first, last))
        said = fd_s(trained.system, trained.data, trained.system.sampling, seed, samples)
        figures |= {f"fd_s_last_{last}": said["fd_s"], f"gflops_last_{last}": gflops(trained.system)}
    head.config = whole
    return figures


def gflops(system: Any) -> float:
    """Operations that one picture takes, in thousand millions: those of matrix products and attention, all branches of
    guidance included, counted."""
    from torch.utils.flop_counter import FlopCounterMode

    labels = torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        system.draw(labels)
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def behind_noise(system: Any, examples: Any, deviation: float, seed: int = 0) -> float:
    """The mean loss of the groups behind the first, when what stands in the groups before them is the true value plus
    noise, and is taken for true. The same examples and noise each time."""
    model: Denoising = system.model
    batch = examples.take(evenly(len(examples), EXAMPLES))
    canvas, condition = system.canvas(batch)
    noisy, g = model.noised(canvas, Generator(seed)), torch.Generator().manual_seed(seed)
    wrong = noisy.copy()
    value = wrong.value["token"]
    wrong.value["token"] = value + deviation * torch.randn(value.shape, generator=g)
    losses = context_losses(model, noisy, wrong, condition)
    return float(losses[:, model.factorization.of(canvas.layout) > 0].mean())


def context_losses(model: Denoising, canvas: Any, context: Any, condition: Mapping[str, Tensor] | None) -> Tensor:
    """The loss of each element of `canvas`, whose noise is on it, behind the values of `context`."""
    plan = model.factorization.packed(context)
    h = model.hidden(plan, context, None, model.encode(condition))
    head: Any = model.heads["token"]
    return head.dist(pick_slots(h, plan.reads.slot), plan.reads, canvas).loss(canvas.value["token"])
