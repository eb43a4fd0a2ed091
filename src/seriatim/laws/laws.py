"""The twelve laws. Each takes a `Case` and returns a note, or raises `Broken` or `NotApplicable` with the reason."""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.target import Target
from seriatim.laws.case import Case, randomise
from seriatim.laws.rows import packed_rows, step_rows
from seriatim.plan import Plan
from seriatim.random import Forced, Keyed, Random, enumerate_law
from seriatim.training.checkpoint import load_weights, save_weights

Law = Callable[[Case], str]


class Broken(AssertionError):
    """A law does not hold."""


class NotApplicable(Exception):
    """A law says nothing about this system, and why."""


def require(condition: bool | Tensor, message: str) -> None:
    if not bool(condition):
        raise Broken(message)


def one_pass(case: Case) -> str:
    """One pass = step by step, with and without the cache; where there is no pass, steps repeated from scratch."""
    x = case.sample(5)
    worst = 0.0
    for cached in (True, False):
        met, log_prob = step_rows(case, x, cached)
        if case.exempt.get(1):
            again, _ = step_rows(case, x, False)
            gap = _gap(met, again)
        else:
            gap = _gap(met, packed_rows(case, x))
        require(gap < 1e-9, f"rows of one pass and of single steps differ by {gap:.1e} (cache: {cached})")
        worst = max(worst, gap)
    single = copy.copy(case)
    single.model = copy.deepcopy(case.model).float()
    met, _ = step_rows(single, x, True)
    reference = step_rows(single, x, False)[0] if case.exempt.get(1) else packed_rows(single, x)
    gap = _gap(met, reference)
    require(gap < 1e-5, f"in float32, rows of one pass and of single steps differ by {gap:.1e}")
    note = f"float64 {worst:.0e}, float32 {gap:.0e}"
    return note if not case.exempt.get(1) else f"steps repeated: {note} ({case.exempt[1]})"


def distribution(case: Case) -> str:
    """exp of the packed log-probability sums to 1 over all samples, and agrees with the enumerated decoder."""
    n = case.model.layout.size - case.given
    require(case.vocab**n <= 4096, f"a case for the laws has at most 4,096 samples, this has {case.vocab}^{n}")
    law = enumerate_law(lambda random: _decoded(case, random))
    total = sum(law.values())
    require(abs(total - 1) < 1e-9, f"the decoder's outcomes sum to {total:.9f}")
    if case.exempt.get(2):
        mean = case.law() or _mean_over_orders(case)
        gap = max(abs(law.get(k, 0.0) - p) for k, p in mean.items())
        require(gap < 1e-9, f"the decoder's law and the mean over orders differ by {gap:.1e}")
        return f"mean over orders, to {gap:.0e} ({case.exempt[2]})"
    values = torch.tensor(list(itertools.product(range(case.vocab), repeat=n)))
    values = torch.cat([case.sample(1)[:, : case.given].expand(len(values), -1), values], 1)
    with torch.no_grad():
        p = case.model.log_prob(case.canvas(values), case.rows(len(values))).exp()
    require(abs(float(p.sum()) - 1) < 1e-9, f"the packed probabilities of all samples sum to {float(p.sum()):.9f}")
    gap = max(abs(float(q) - law.get(tuple(v.tolist()), 0.0)) for v, q in zip(values, p, strict=True))
    require(gap < 1e-9, f"packed and decoded probabilities of one sample differ by {gap:.1e}")
    return f"{len(values)} samples sum to 1, pointwise {gap:.0e}"


def no_peeking(case: Case) -> str:
    """No read-out depends on what is decided with it or later, by the plan and by edits; what is declared visible is
    seen, by gradient."""
    x = case.sample(1)
    plan = case.plan(x)
    plan.check(case.model.mixers)
    if not case.exempt.get(1):
        _check_edits(case, x)
    return _check_gradients(case, x, plan)


def _check_edits(case: Case, x: Tensor) -> None:
    rank = case.canvas(x).rank[0]
    before = packed_rows(case, x)
    for e in range(case.given, x.shape[1]):
        y = x.clone()
        y[0, e] = (y[0, e] + 1) % case.vocab
        after = packed_rows(case, y)
        moved = {k for k in before if _difference(before[k], after[k]) > 1e-12}
        peeking = sorted(k for k in moved if rank[k] <= rank[e])
        require(not peeking, f"element {e} changes what is read of element {peeking[:1]}, which is not decided later")
        later = [k for k in before if rank[k] > rank[e]]
        require(
            bool(moved) or not later, f"element {e} changes nothing of what is decided later: it is not seen at all"
        )


def _check_gradients(case: Case, x: Tensor, plan: Plan) -> str:
    model = case.model
    embedded = case.embed(plan, x).detach().requires_grad_(True)
    condition = model.encode(case.rows(1))
    vector = model.driving(plan, case.canvas(x), condition.vector)
    h = model.backbone(embedded, plan, None, vector, condition.memory)
    weight = torch.randn(h.shape[-1], dtype=h.dtype, generator=torch.Generator().manual_seed(0))
    influence = torch.zeros(plan.size, plan.size, dtype=torch.bool)
    for q in range(plan.size):
        (g,) = torch.autograd.grad(h[0, q] @ weight, embedded, retain_graph=True)
        influence[q] = g[0].abs().amax(-1) > 0
    direct = plan.seen()[0]
    reachable = direct
    for _ in range(plan.size):
        reachable = (reachable.float() @ direct.float()) > 0
    stray = (influence & ~reachable).nonzero()
    require(len(stray) == 0, f"slot {stray[:1].tolist()} is influenced by one that it does not see")
    blind = (direct & ~influence).nonzero()
    require(len(blind) == 0, f"slot {blind[:1].tolist()} sees another that does not influence it")
    return f"{int(direct.sum())} visible pairs influence, {int((~reachable).sum())} unreachable ones do not"


def lossless(case: Case) -> str:
    """Drafts change nothing: equal strings under keyed noise, and the exact law by enumeration."""
    if not case.model.factorization.draftable:
        raise NotApplicable("no draft can be verified in this order")
    from seriatim.decoding.verify import Chain, Walk
    from seriatim.laws.drafts import Guessing, RandomDraft

    plain = case.generated(Keyed(3), rows=1)
    for seed in range(4):
        drafted = case.generated(Keyed(3), 1, case.verifier(Walk), Guessing(case.vocab, seed))
        require(
            torch.equal(plain, drafted), f"with drafts the same noise gives {drafted.tolist()}, not {plain.tolist()}"
        )
    exact = enumerate_law(lambda random: _decoded(case, random))
    drafted_law = enumerate_law(
        lambda random: tuple(
            case.generated(random, 1, case.verifier(Chain), RandomDraft(case.vocab, random))[0].tolist()
        )
    )
    gap = max(abs(drafted_law.get(k, 0.0) - p) for k, p in exact.items())
    require(gap < 1e-9, f"a chain of random drafts changes the probability of a sample by {gap:.1e}")
    return f"equal strings; random drafts exact to {gap:.0e}"


def invisible_cache(case: Case) -> str:
    """The exact cache changes no row and holds what the plan says; a dropped draft leaves no trace."""
    x = case.sample(3)
    cached, _ = step_rows(case, x, True)
    fresh, _ = step_rows(case, x, False)
    gap = _gap(cached, fresh)
    require(gap < 1e-9, f"with the cache, rows change by {gap:.1e}")
    if not case.model.factorization.draftable:
        return f"rows equal to {gap:.0e}"
    from seriatim.decoding.verify import Walk
    from seriatim.laws.drafts import Guessing

    met = Forced(x[:1])
    target = Target(case.model, case.rows(1))
    generate(target, case.blank(x[:1]), case.verifier(Walk)(), Guessing(case.vocab, 1), met)
    gap = max(gap, max(_difference(met.met[k], fresh[k][:1]) for k in met.met))
    require(gap < 1e-9, f"after drafts were verified and dropped, rows change by {gap:.1e}")
    return f"rows equal to {gap:.0e}, also after dropped drafts"


def company(case: Case) -> str:
    """A row's result depends neither on batch mates nor on the order of rows."""
    n = 4
    together = case.generated(Keyed(5), n)
    for order in ([2, 0, 3, 1], [1], [3, 2]):
        rows = torch.tensor(order)
        apart = case.generated(Keyed(5), len(order), row=rows)
        require(torch.equal(apart, together[rows]), f"rows {order} alone give other samples than among {n}")
    x = case.sample(n)
    with torch.no_grad():
        both = case.total(x)
        alone = torch.cat([case.total(x[i : i + 1]) for i in range(n)])
    gap = float((both - alone).abs().max())
    require(gap < 1e-9, f"a row's log-probability changes by {gap:.1e} in company")
    return f"samples equal, log-probabilities to {gap:.0e}"


def feed(case: Case) -> str:
    """What stands in slots in training stands there in decoding, number for number."""
    if case.exempt.get(1):
        raise NotApplicable(f"training and decoding take the same step ({case.exempt[1]})")
    x = case.sample(2)
    packed: dict[tuple, Tensor] = {}
    _record(packed, case.plan(x), case.embed(case.plan(x), x))
    target = Target(case.model, case.rows(2), cached=True)
    canvas, random, met = case.blank(x), Forced(x), 0
    with torch.no_grad():
        while (plan := target.plan(canvas)) is not None:
            seen: dict[tuple, Tensor] = {}
            _record(seen, plan, case.embed(plan, canvas))
            for key, vector in seen.items():
                require(key in packed, f"decoding feeds a slot {key} that training never sees")
                require(torch.equal(vector, packed[key]), f"slot {key} is fed otherwise in decoding than in training")
            met += len(seen)
            rows = target.forward(plan, canvas)
            step = case.decider().decide(canvas, None, rows, random)
            canvas.apply(step.edits)
            target.commit(step.keep, plan)
    return f"{met} slots equal, number for number"


def limits(case: Case) -> str:
    """At the ends of its settings the system is another composition."""
    if not case.limits:
        raise NotApplicable("it is the limit of others, not the other way round")
    notes = []
    for make in case.limits:
        limit = make()
        gap = _difference(limit.got, limit.want)
        require(gap <= limit.tolerance, f"{limit.name}: differs by {gap:.1e}")
        notes.append(f"{limit.name} ({gap:.0e})")
    return "; ".join(notes)


def bookkeeping(case: Case) -> str:
    """Given elements never change, every step progresses, and what is counted is what the plan predicted."""
    x = case.sample(1)
    canvas = case.blank(x)
    target = Target(case.model, case.rows(1))
    forwards = slots = peak = 0
    for step in decode(target, canvas, case.decider(), random=Keyed(1)):
        forwards, slots = forwards + step.forwards, slots + step.slots
        require(len(step.edits) > 0, "a step decides nothing")
        require(forwards <= 10 * canvas.layout.size, "decoding does not come to an end")
        if target.cache is not None:
            peak = max(peak, target.cache.columns)
    first = canvas.value[canvas.layout.kinds[0]][:, : case.given]
    require(torch.equal(first, x[:, : case.given]), "a given element changed")
    if case.exempt.get(1):
        return f"{forwards} forwards, {slots} slots (no packed plan to predict them)"
    cost = case.plan(x).cost()
    require((forwards, slots) == (cost.forwards, cost.slots), f"counted {forwards} forwards, {slots} slots; {cost}")
    require(peak <= cost.peak_cache, f"the cache held {peak} entries, predicted at most {cost.peak_cache}")
    return f"{forwards} forwards, {slots} slots, at most {cost.peak_cache} entries as predicted"


def gradients(case: Case) -> str:
    """Some gradient to every trainable parameter, none to frozen ones."""
    model = copy.deepcopy(case.model)
    x = case.sample(8)
    drop = torch.arange(8) == 0 if model.conditions else None
    rows = case.rows(8)
    if rows is not None:
        rows = {
            k: v if k not in case.spread else case.spread[k][torch.arange(8) % len(case.spread[k])]
            for k, v in rows.items()
        }
    model.losses(case.canvas(x, model), rows, drop).sum().backward()
    starved = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())]
    require(set(starved) <= set(case.starved), f"no gradient reaches {', '.join(starved[:3])}")
    fed = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    require(not fed, f"a gradient reaches the frozen {', '.join(fed[:3])}")
    count = sum(1 for p in model.parameters() if p.requires_grad)
    return f"{count} tensors trained" + (f", idle at this size: {', '.join(starved)}" if starved else "")


def round_trip(case: Case) -> str:
    """Saved and loaded elsewhere, the same rows; stopped and taken up again, the same sample."""
    x = case.sample(2)
    other = copy.copy(case)
    other.model = randomise(copy.deepcopy(case.model), seed=99)
    with tempfile.TemporaryDirectory() as folder:
        load_weights(other.model, save_weights(case.model, Path(folder) / "model.safetensors"))
    gap = _gap(step_rows(case, x, True)[0], step_rows(other, x, True)[0])
    require(gap < 1e-12, f"after loading, rows differ by {gap:.1e}")
    whole = case.generated(Keyed(7), 2)
    canvas = case.blank(x)
    for _ in decode(Target(case.model, case.rows(2)), canvas, case.decider(), random=Keyed(7)):
        break
    generate(Target(case.model, case.rows(2)), canvas, case.decider(), random=Keyed(7))
    require(torch.equal(case.read(canvas), whole), "stopped and taken up again, the sample is another")
    return f"rows equal to {gap:.0e}, stopped = never stopped"


def learns(case: Case) -> str:
    """On samples whose elements are all alike, it learns to use its context."""
    loss, chance = case.learn()
    require(loss < 0.5 * chance, f"after training, elements with context cost {loss:.2f} nats, chance is {chance:.2f}")
    return f"{loss:.2f} of {chance:.2f} nats left where context decides"


LAWS: dict[int, tuple[str, Law]] = {
    1: ("one pass = step by step", one_pass),
    2: ("a distribution", distribution),
    3: ("no peeking, and seeing", no_peeking),
    4: ("lossless", lossless),
    5: ("invisible cache", invisible_cache),
    6: ("company", company),
    7: ("feed", feed),
    8: ("limits", limits),
    9: ("bookkeeping", bookkeeping),
    10: ("gradients", gradients),
    11: ("round trip", round_trip),
    12: ("it learns", learns),
}


# ---- shared ----------------------------------------------------------------------------------------------------------


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference; equal infinities are equal."""
    a, b = a.detach(), b.detach()
    gap = (a.double() - b.double()).abs()
    return float(torch.where(a == b, torch.zeros_like(gap), gap).nan_to_num(math.inf).max()) if a.numel() else 0.0


def _gap(a: dict[int, Tensor], b: dict[int, Tensor]) -> float:
    """Largest difference between the rows of the same elements."""
    require(set(a) == set(b), f"elements {sorted(set(a) ^ set(b))} are read on one side only")
    return max(_difference(a[k], b[k]) for k in a)


def _decoded(case: Case, random: Random) -> tuple[int, ...]:
    return tuple(case.generated(random, 1)[0].tolist())


def _mean_over_orders(case: Case) -> dict[tuple[int, ...], float]:
    """Brute force: the mean over all orders, within blocks where there are any, of the product of one-element steps."""
    n, model = case.model.layout.size, case.model
    rank = model.factorization.order(model.layout)[0].tolist()
    orders = list(itertools.permutations(range(case.given, n)))
    if len(set(rank)) < n:  # else each element has a rank of its own, and the choice is the decider's
        orders = [o for o in orders if all(rank[a] <= rank[b] for a, b in itertools.pairwise(o))]
    start = case.sample(1)
    mean: dict[tuple[int, ...], float] = {}
    target = Target(model, case.rows(1), cached=False)
    for values in itertools.product(range(case.vocab), repeat=n - case.given):
        x = torch.cat([start[:, : case.given], torch.tensor([values], dtype=torch.long)], 1)
        for order in orders:
            total = 0.0
            for i, e in enumerate(order):
                known = torch.ones(1, n, dtype=torch.bool)
                known[0, list(order[i:])] = False
                canvas = model.canvas({model.layout.kinds[0]: x.clone()}, known)
                total += _log_prob_of(target, canvas, e, int(x[0, e]))
            key = tuple(x[0].tolist())
            mean[key] = mean.get(key, 0.0) + math.exp(total) / len(orders)
    return mean


def _log_prob_of(target: Target, canvas: Canvas, element: int, value: int) -> float:
    plan = target.plan(canvas)
    assert plan is not None
    with torch.no_grad():
        rows = target.forward(plan, canvas)
    column = int((torch.as_tensor(rows.element)[0] == element).nonzero()[0])
    return float(rows.dist.log_probs()[0, column, value])


def _record(store: dict[tuple, Tensor], plan: Plan, vectors: Tensor) -> None:
    """Slot vectors by what identifies a slot: source, coordinate, what it carries."""
    slots = plan.slots
    for s in range(plan.size):
        key = (int(slots.source[0, s]), *slots.coord[0, s].tolist(), *slots.element[0, s].tolist())
        store[key] = vectors[:, s]
