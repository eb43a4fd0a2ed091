"""Text systems and decoders by what they do: states, orders, tokens a step, cache, post-training. Nothing is typed in.

Each is built at toy size and watched while it writes: what stands in its slots and how its canvas changes, in how many
orders its elements are decided, how many together when it is sure of all of them and when of none, and whether it
computes less than it would without a cache. The rest are capabilities that its parts declare.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch

from seriatim.canvas import DECIDED, Canvas, Edit, Insert, Revise, Set, Unset
from seriatim.decoding.loop import Step, decode
from seriatim.decoding.target import Target
from seriatim.laws.case import Case, randomise
from seriatim.laws.unmasking import UnmaskingCase
from seriatim.objectives.masked import Masked
from seriatim.plan import MASK
from seriatim.posttraining.reinforce import ESTIMATORS
from seriatim.random import Generator, Keyed
from seriatim.systems.decoders import FAMILIES
from seriatim.systems.meta import catalogue, load
from seriatim.systems.system import Sampling, config_from
from seriatim.systems.text_system import TextSystem
from seriatim.view import INF

PROMPT, NEW = (1, 0, 1, 0), 28
SHAPE = {"length": len(PROMPT) + NEW, "vocab": 3, "width": 16, "depth": 2, "heads": 2}
RUNS = 512  # in which orders are looked for
SURE = (0.0, 1e3)  # factors on what a model reads out: of all values alike, and certain of one
Cache = Literal["exact", "approximate", "none"]


@dataclass(frozen=True)
class Row:
    """One system or decoder. states: what the canvas holds on the way; orders: in how many orders elements are decided,
    out of all (a decoder has its model's); commits: least and most tokens that a forward decides, the last one apart;
    fills: gaps of known or unknown length, or none; likelihood: exact or a bound, or whether a decoder is lossless;
    begins: the system whose weights it may begin with, or the part that is trained beside a model; estimates: of
    log-probabilities that reinforcement may take."""

    key: str
    title: str
    family: str
    states: str
    orders: str
    commits: tuple[int, int]
    cache: Cache
    fills: str
    likelihood: str
    begins: str
    estimates: tuple[str, ...]


def taxonomy(keys: Iterable[str] | None = None) -> list[Row]:
    """The rows of all text systems and decoders, or of these. Raises KeyError for one that there is not."""
    families = ("text", *FAMILIES)
    found = {key: meta for key, (meta, _) in catalogue().items() if meta.family in families}
    wanted = found if keys is None else {key: found[key] for key in keys}
    return [(system_row if meta.family == "text" else decoder_row)(key) for key, meta in wanted.items()]


def system_row(key: str) -> Row:
    """The row of a system of text, by its own way to decode."""
    system, case = toy(key), load(key).case()
    return row_of(system, case, *watched(system.model, lambda: begun(system)))


def row_of(system: TextSystem, case: Case, written: list[Watched], exact: bool, policy: bool) -> Row:
    """The row of a system whose writing was watched."""
    meta, model = system.meta, system.model
    estimates = tuple(ESTIMATORS) if isinstance(model, Masked) and model.factorization.free else ()
    if meta.likelihood == "exact":
        estimates = ("exact", *estimates)
    return Row(
        meta.key, meta.title, meta.family, states(written), orders(case), commits(written), cache_of(exact, policy),
        system.fills or "none", meta.likelihood, system.begins_as or "", estimates,
    )  # fmt: skip


def decoder_row(key: str) -> Row:
    """The row of a decoder, on the model that the laws run it on."""
    meta, module = catalogue()[key][0], load(key)
    case = module.case()
    system = case.systems[0] if isinstance(case, UnmaskingCase) else case.system
    sampling = Sampling(temperature=0) if getattr(case, "greedy", False) else Sampling()

    def start() -> tuple[Canvas, Any, Any, dict[str, Any]]:
        way = (
            case.decoding(system, sampling, False)
            if isinstance(case, UnmaskingCase)
            else case.decoding(sampling, False)
        )
        canvas = system.begun(PROMPT, min(NEW, system.model.layout.size - len(PROMPT)))
        if way.block is not None:
            canvas = system.blocked(canvas, way.block)
        return canvas, way.decider, way.proposer, {"warp": sampling.warp, **way.target}

    written, exact, policy = watched(system.model, start)
    part = "a trained part" if hasattr(module, "Part") else ""
    return Row(
        meta.key, meta.title, meta.family, states(written), "", commits(written), cache_of(exact, policy),
        "", meta.likelihood, part, (),
    )  # fmt: skip


# ---- watching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """One text as it was written: whether there were masks, and the steps."""

    masks: bool
    steps: list[Step]
    cost: int


Start = Callable[[], tuple[Canvas, Any, Any, dict[str, Any]]]


def toy(key: str) -> TextSystem:
    """A system at the smallest size, with random weights."""
    cls: Any = load(key)
    cls = next(c for c in vars(cls).values() if isinstance(c, type) and getattr(c, "meta", None) is cls.META)
    torch.manual_seed(0)
    system = cls(config_from(cls, SHAPE), SimpleNamespace(special={}, vocab=SHAPE["vocab"]))
    randomise(system.model, 4)
    return system.double().eval().requires_grad_(False)


def begun(system: TextSystem) -> tuple[Canvas, Any, Any, dict[str, Any]]:
    """A canvas, and the system's own way to decode it."""
    s = Sampling()
    target = system.target(None, s)
    more = {} if target.policy is None else {"policy": target.policy}
    return system.begun(PROMPT, NEW), system.decider(s), system.proposer(s), {"warp": s.warp, **more}


@torch.inference_mode()
def watched(model: Any, start: Start) -> tuple[list[Watched], bool, bool]:
    """A text by a model that is sure of nothing, and one that is of everything; whether an exact cache saves slots, and
    whether there is an approximate one."""
    policy = "policy" in start()[3]
    written = [_write(model, start, factor) for factor in SURE]
    exact = not policy and any(_write(model, start, f, False).cost > w.cost for f, w in zip(SURE, written, strict=True))
    return written, exact, policy


def _write(model: Any, start: Start, factor: float, cached: bool = True) -> Watched:
    heads = copy.deepcopy(dict(model.heads.state_dict()))
    for p in model.heads.parameters():
        p.data.mul_(factor)
    try:
        canvas, decider, proposer, more = start()
        plan = model.factorization.step(canvas, None, 0)
        masks = bool((plan.slots.source == MASK).any()) or bool(getattr(plan, "masks", 0))
        target = Target(model, **{"cached": cached, **more})
        steps = list(decode(target, canvas, decider, proposer, Keyed(0)))
    finally:
        model.heads.load_state_dict(heads)
    return Watched(masks, steps, sum(step.slots for step in steps))


def committed(step: Step) -> int:
    """How many tokens a step decides in the first row."""
    count = 0
    for edit in step.edits:
        if isinstance(edit, Set):
            count += edit.value.shape[1] if edit.element is None else int((edit.element[0] >= 0).sum())
        elif isinstance(edit, Insert):
            count += int((edit.after.reshape(len(edit.after), -1)[0] >= -1).sum())
    return count


# ---- what follows ----------------------------------------------------------------------------------------------------


def states(written: Iterable[Watched]) -> str:
    """What a canvas holds on the way."""
    edits = {type(edit) for one in written for step in one.steps for edit in step.edits if _moves(edit)}
    said = ["tokens and masks" if any(one.masks for one in written) else "tokens"]
    said += [
        name for kind, name in ((Insert, "insertions"), (Revise, "revisions"), (Unset, "withdrawals")) if kind in edits
    ]
    return ", ".join(said)


def _moves(edit: Edit) -> bool:
    """Not one that only says that time goes on."""
    return not (isinstance(edit, Revise) and edit.level is not None)


def commits(written: Iterable[Watched]) -> tuple[int, int]:
    """Least and most tokens of a step that decides some, the last one apart."""
    counts = [[n for step in one.steps if (n := committed(step))] for one in written]
    every = [n for some in counts for n in (some[:-1] or some)]
    return min(every, default=0), max(every, default=0)


def cache_of(exact: bool, policy: bool) -> Cache:
    return "approximate" if policy else "exact" if exact else "none"


@torch.inference_mode()
def orders(case: Case) -> str:
    """In how many orders the elements of the case's samples are decided, of all that there are: texts of the greatest
    length, in reading order, by the turn that decided each token for good."""
    canvas = case.blank(case.sample(RUNS))
    canvas.row = torch.arange(RUNS)
    turn = torch.zeros(RUNS, 0, dtype=torch.long)
    target = Target(case.model, case.rows(RUNS))
    for i, _ in enumerate(decode(target, canvas, case.decider(), None, Generator(0))):
        decided = (canvas.status == DECIDED).expand(RUNS, -1)
        turn = torch.nn.functional.pad(turn, (0, decided.shape[1] - turn.shape[1]), value=-1)
        turn = torch.where(decided, torch.where(turn < 0, i, turn), -1)
    count = (turn >= 0).sum(1)
    n = int(count.max())
    read = canvas.place.expand(RUNS, -1).masked_fill(turn < 0, INF).argsort(dim=1, stable=True)[:, :n]
    whole = count == n
    at = turn.gather(1, read)[whole]
    ranks = (at[:, :, None] > at[:, None]).sum(2)
    return f"{len(ranks.unique(dim=0))} of {math.factorial(n)}"
