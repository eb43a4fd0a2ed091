"""A plan decodes to what it trains: one pass = step by step with the cache it derives, and the result is a law.

The network is a small random transformer in float64. The driver uses what any decoder may use: the steps, the labels
of cached slots (`View.over`), what to append to the cache (`kept`) and what to leave there (`retain`).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seriatim.plan import DERIVED, MASK, VALUE, Cost, OrderError, Plan, Reads, Slots, plan_of, reads_at
from seriatim.slots import ragged
from seriatim.view import INF, NEVER, TIMED, View, full, inclusive, join, own_rank, timed, two_stream

UNDECIDED = 10**6  # a value that no table holds: whoever looks at an undecided element fails


class Toy:
    """A random transformer. Layers take the views of a plan in turn; readers of one element are averaged."""

    def __init__(self, vocabulary: int = 3, width: int = 16, layers: int = 4, seed: int = 0):
        torch.manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
        self.vocabulary, self.heads = vocabulary, 2
        self.place, self.source, self.token = draw(64, width), draw(5, width), draw(16, vocabulary, width)
        self.weights = [{w: draw(width, width) / width**0.5 for w in "qkvom"} for _ in range(layers)]
        self.out = draw(width, vocabulary) / width**0.5

    def embed(self, slots: Slots, value: Tensor) -> Tensor:
        """Place + kind of content + the values a slot carries (masks and the like carry none)."""
        carried = slots.element.expand(len(value), -1, -1)
        tells = (carried >= 0) & ((slots.source == VALUE) | (slots.source == DERIVED))[..., None]
        b, s, c = tells.nonzero(as_tuple=True)
        e = carried[b, s, c]
        x = (self.place[slots.coord[..., 0]] + self.source[slots.source]).expand(len(value), -1, -1)
        return x.index_put((b, s), self.token[e, value[b, e]], accumulate=True)

    def forward(self, x: Tensor, plan: Plan, cache: ToyCache) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Hidden states of the plan's slots over the cache, and their keys and values in each layer."""
        split = lambda t: t.unflatten(2, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        norm = lambda t: torch.nn.functional.layer_norm(t, t.shape[2:])  # noqa: E731
        fresh = []
        for i, w in enumerate(self.weights):
            name = list(plan.views)[i % len(plan.views)]
            mask = plan.views[name].over(cache.labels.get(name))
            mine = torch.ones(plan.size, dtype=torch.bool) if plan.layers is None else plan.layers[i]
            computed = torch.cat([cache.layers[i], mine])
            itself = torch.eye(plan.size, dtype=torch.bool)
            mask = mask & computed | torch.nn.functional.pad(itself, (mask.shape[2] - plan.size, 0))
            z = norm(x)
            fresh.append((z @ w["k"], z @ w["v"]))
            k, v = (torch.cat(pair, 1) for pair in zip(cache.entries[i], fresh[-1], strict=True))
            scores = split(z @ w["q"]) @ split(k).transpose(2, 3) / (x.shape[2] / self.heads) ** 0.5
            weight = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
            y = x + (weight @ split(v)).transpose(1, 2).flatten(2) @ w["o"]
            x = torch.where(mine[:, None], y + torch.tanh(norm(y) @ w["m"]), x)
        return norm(x), fresh

    def log_prob(self, hidden: Tensor, reads: Reads, value: Tensor) -> Tensor:
        """Log-probability of the elements that are read, per row."""
        batch, elements = value.shape
        slot, element = reads.slot.expand(batch, -1), reads.element.expand(batch, -1)
        live = (slot >= 0) & (element >= 0)
        logits = hidden.gather(1, slot.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[2])) @ self.out
        where = torch.where(live, element, elements)
        total = logits.new_zeros(batch, elements + 1, self.vocabulary)
        total = total.scatter_add(1, where[..., None].expand_as(logits), logits)
        count = torch.zeros(batch, elements + 1, dtype=torch.long).scatter_add(1, where, live.long())
        log_p = (total / count.clamp(min=1)[..., None]).log_softmax(-1)[:, :elements]
        return (log_p.gather(2, value[..., None])[..., 0] * (count[:, :elements] > 0)).sum(1)


class ToyCache:
    """Keys and values of each layer, labels of each view, and which layers computed an entry."""

    def __init__(self, net: Toy, batch: int):
        layers, width = len(net.weights), net.place.shape[1]
        empty = torch.zeros(batch, 0, width, dtype=torch.float64)
        self.entries = [(empty, empty) for _ in range(layers)]
        self.labels: dict[str, View] = {}
        self.layers = torch.zeros(layers, 0, dtype=torch.bool)
        self.held = torch.zeros(1, 0, dtype=torch.bool)

    @property
    def size(self) -> int:
        return self.layers.shape[1]

    def append(self, step: Plan, fresh: list[tuple[Tensor, Tensor]]) -> None:
        """Put what the plan keeps right behind what each row holds, then drop what nobody looks at any more."""
        kept, retain = step.kept, step.retain
        assert kept is not None
        for i, pairs in enumerate(zip(self.entries, fresh, strict=True)):
            old, new = pairs
            self.entries[i] = tuple(torch.cat([o, _pick(n, kept)], 1) for o, n in zip(old, new, strict=True))
        for name, view in step.views.items():
            new = view.take(kept)
            self.labels[name] = join([self.labels[name], new]) if name in self.labels else new
        layers = torch.ones(len(fresh), step.size, dtype=torch.bool) if step.layers is None else step.layers
        self.layers = torch.cat([self.layers, layers[:, kept[0]]], 1)
        self.held = torch.cat([self.held.expand(len(kept), -1), kept >= 0], 1)
        self._take(ragged(self.held))
        if retain is not None:
            self._take(retain)

    def _take(self, columns: Tensor) -> None:
        self.entries = [(_pick(k, columns), _pick(v, columns)) for k, v in self.entries]
        self.labels = {name: view.take(columns) for name, view in self.labels.items()}
        self.layers = self.layers[:, columns[0]]
        self.held = columns >= 0


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, j]]; what stands at padding is arbitrary."""
    return x[torch.arange(len(x))[:, None], index.clamp(min=0)]


def packed(net: Toy, plan: Plan, value: Tensor) -> Tensor:
    """Log-probability of each sample by teacher forcing: one forward."""
    hidden, _ = net.forward(net.embed(plan.slots, value), plan, ToyCache(net, len(value)))
    return net.log_prob(hidden, plan.reads, value)


def stepwise(net: Toy, plan: Plan, value: Tensor) -> tuple[Tensor, Cost]:
    """The same step by step, undecided values hidden; and what it cost (one sample, one layer of each kind)."""
    cache, total = ToyCache(net, len(value)), torch.zeros(len(value), dtype=torch.float64)
    forwards = slots = pairs = peak = kept = 0
    for step in plan.steps():
        known = value.masked_fill(plan.rank >= step.decides, UNDECIDED)
        pairs += sum(int(view.over(cache.labels.get(name))[0].sum()) for name, view in step.views.items())
        forwards, slots, peak = forwards + 1, slots + step.size, max(peak, cache.size + step.size)
        hidden, fresh = net.forward(net.embed(step.slots, known), step, cache)
        total += net.log_prob(hidden, step.reads, value)
        cache.append(step, fresh)
        kept = max(kept, cache.size)
    return total, Cost(forwards, slots, pairs, peak, kept)


def all_samples(elements: int, vocabulary: int = 3, unknown: list[int] | None = None) -> Tensor:
    """Every value of the unknown elements; given ones are 0."""
    unknown = list(range(elements)) if unknown is None else unknown
    choices = [range(vocabulary) if e in unknown else [0] for e in range(elements)]
    return torch.tensor(list(itertools.product(*choices)))


# ---- orders, each with the elements that its slots carry ------------------------------------------------------------


def itself(n: int) -> list[tuple[int, int]]:
    return [(i, i) for i in range(n)]


def next_token(window: int | None = None):
    view = inclusive(range(6)).narrow(window=window)
    return plan_of(view, range(6), [-1, *range(5)], itself(6))


def next_scale(visibility=inclusive):
    """Each slot is fed a sum over all coarser tokens."""
    scale = [0, 1, 1, 2, 2, 2]
    coarser = [[e for e in range(6) if scale[e] < k] for k in scale]
    return plan_of(visibility(scale), scale, coarser, itself(6), source=DERIVED)


def skipped_layers():
    """VARiant: the last scale leaves out a layer."""
    layers = torch.ones(4, 6, dtype=torch.bool)
    layers[1, 3:] = False
    return replace(next_scale(), layers=layers)


def neighbours():
    """NAR on 2 x 3: right neighbour and the one below; two readers where both exist."""
    distance = [-1, 0, 1, 2, 1, 2, 3]
    reads = [(0, 0), (1, 1), (2, 2), (4, 4), (5, 5), (1, 3), (2, 4), (3, 5)]
    return plan_of(inclusive(distance), distance[1:], [-1, *range(6)], reads)


def blocks():
    """Block diffusion with all-mask queries."""
    block, query = [0, 0, 1, 1, 2, 2] * 2, [True] * 6 + [False] * 6
    return plan_of(two_stream(block, query), block[:6], [*range(6)] * 2, itself(6), [MASK] * 6 + [VALUE] * 6)


def any_subset():
    """AS-ARM: elements 1 and 4 are given."""
    unknown = [0, 2, 3, 5]
    rank = [0, -1, 1, 2, -1, 3]
    element, query = [*range(6), *unknown], [False] * 6 + [True] * 4
    reads = [(6 + i, e) for i, e in enumerate(unknown)]
    return plan_of(two_stream([rank[e] for e in element], query), rank, element, reads, [VALUE] * 6 + [MASK] * 4)


def twins():
    carries = [i // 2 for i in range(12)]
    return plan_of(inclusive(range(12)), range(6), carries, [(2 * i, i) for i in range(6)], [MASK, VALUE] * 6)


def diagonal():
    """MineWorld, 2 x 3, two ahead."""
    rank, row = [0, 1, 2, 2, 3, 4], [0, 0, 0, 1, 1, 1]
    view = timed(rank, group=row, relation=[[TIMED, NEVER], [TIMED, TIMED]])
    return plan_of(view, rank, [-1, 0, 1, -1, 3, 4], itself(6))


def two_resolutions():
    """FAR: frames of one token, the last two in full, older ones compressed."""
    at = [*range(5), *range(2, 7)]
    dies = [t + 2 for t in range(5)] + [INF] * 5
    view = timed(at, at, dies, group=[0] * 5 + [1] * 5, relation=[[TIMED, TIMED], [NEVER, TIMED]])
    return plan_of(view, range(6), [-1, 0, 1, 2, 3, -1, 0, 1, 2, 3], [(i, i) for i in range(5)])


def axial():
    """2 x 3 pixels: rows in full and columns causal above, the pixel before in the row."""
    row, column, no = [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2], [-1] * 6
    views = {
        "row": full(12).narrow(lane=row + no),
        "column": inclusive(row + row).narrow(lane=column + no),
        "shift": inclusive([0] * 6 + [1] * 6).narrow(lane=[*range(3, 9), *range(6)]),
        "inner": inclusive(column + column).narrow(lane=no + row),
    }
    return plan_of(views, range(6), [*range(6), -1, 0, 1, -1, 3, 4], [(6 + i, i) for i in range(6)])


def words():
    """HAT: two words of two bytes and a closing symbol each; the first is given."""
    views = {
        "encoder": full(8).narrow(lane=[0, 0, 1, 1, 0, 1, -1, -1]),
        "backbone": inclusive([0, 0, 0, 0, 0, 1, 0, 0]).narrow(lane=[-1, -1, -1, -1, 0, 0, -1, -1]),
        "decoder": inclusive([0, 0, 0, 0, 0, 0, 1, 2]).narrow(lane=[-1, -1, -1, -1, 1, 2, 1, 1]),
    }
    carries = [0, 1, 3, 4, -1, -1, 3, 4]
    return plan_of(views, [-1, -1, -1, 0, 1, 2], carries, [(4, 3), (6, 4), (7, 5)])


ORDERS = {
    "next token": next_token(),
    "sliding window": next_token(window=3),
    "next scale": next_scale(),
    "own scale": next_scale(own_rank),
    "layers by scale": skipped_layers(),
    "neighbours": neighbours(),
    "blocks": blocks(),
    "any subset": any_subset(),
    "twins": twins(),
    "diagonal": diagonal(),
    "two resolutions": two_resolutions(),
    "axial": axial(),
    "words": words(),
}
BY_NAME = pytest.mark.parametrize("plan", ORDERS.values(), ids=ORDERS.keys())


@BY_NAME
def test_one_pass_equals_step_by_step(plan):
    net = Toy()
    value = all_samples(6, unknown=plan.reads.element.unique().tolist())
    torch.testing.assert_close(stepwise(net, plan, value)[0], packed(net, plan, value), atol=1e-9, rtol=0)


@BY_NAME
def test_probabilities_of_all_samples_sum_to_one(plan):
    value = all_samples(6, unknown=plan.reads.element.unique().tolist())
    assert float(packed(Toy(), plan, value).exp().sum()) == pytest.approx(1, abs=1e-9)


@BY_NAME
def test_the_predicted_cost_is_the_cost_that_is_counted(plan):
    assert stepwise(Toy(), plan, torch.zeros(1, 6, dtype=torch.long))[1] == plan.cost()


@BY_NAME
def test_every_visible_pair_that_is_used_does_influence(plan):
    """Seeing, not only no peeking: what a read-out may know changes it (unless averaging over layers hides it)."""
    net, slots = Toy(layers=8), plan.slots
    x = net.embed(slots, torch.zeros(1, 6, dtype=torch.long)).requires_grad_()
    hidden, _ = net.forward(x, replace(plan, layers=None), ToyCache(net, 1))
    several_layers = torch.eye(plan.size, dtype=torch.bool)
    for name in [list(plan.views)[i % len(plan.views)] for i in range(8)]:
        several_layers = (plan.views[name].mask()[0].float() @ several_layers.float()) > 0
    for s in plan.reads.slot[0].unique().tolist():
        (gradient,) = torch.autograd.grad(hidden[0, s, 0], x, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(1) > 0, several_layers[s])


def test_peeking_breaks_the_law_in_the_packed_form():
    """The law has teeth: fed its own scale, next-scale generation is no distribution any more."""
    scale = [0, 1, 1, 2, 2, 2]
    peeking = plan_of(inclusive(scale), scale, range(6), itself(6))
    assert abs(float(packed(Toy(), peeking, all_samples(6)).exp().sum()) - 1) > 0.01


# ---- rows of one batch in different orders --------------------------------------------------------------------------


def orders_of_rows(rank: Tensor, window: int | None = None) -> Plan:
    """Two-stream attention where each row has ranks of its own (-1: given)."""
    elements = torch.arange(rank.shape[1])
    n = len(elements)
    query = torch.arange(2 * n) < n
    needs = torch.cat([torch.full_like(rank, -1), rank], 1)
    slots = Slots(
        torch.cat([elements, elements])[None, :, None],
        torch.where(query, MASK, VALUE)[None],
        torch.cat([elements, elements])[None, :, None],
        needs,
    )
    reads = Reads(elements[None], torch.where(rank >= 0, elements, -1))
    view = two_stream(torch.cat([rank, rank], 1), query).narrow(window=window)
    return Plan(slots, {"all": view}, reads, rank)


RANKS = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 0, 0], [-1, 1, 0, 1], [2, -1, -1, 5], [-1, 7, -1, -1]])


@pytest.mark.parametrize("window", [None, 4])
def test_rows_in_different_orders_with_groups_of_different_sizes(window):
    """Six orders in one batch, each with every sample: ragged steps, padding, and (with a window) ragged evictions."""
    net, value = Toy(vocabulary=2), all_samples(4, 2)
    rank, value = RANKS.repeat_interleave(len(value), 0), value.repeat(len(RANKS), 1)
    plan = orders_of_rows(rank, window)
    log_p = packed(net, plan, value)
    torch.testing.assert_close(stepwise(net, plan, value)[0], log_p, atol=1e-9, rtol=0)
    total = log_p.exp().reshape(len(RANKS), -1).sum(1)
    free = 2.0 ** (RANKS < 0).sum(1)  # given elements are counted with each of their values
    torch.testing.assert_close(total / free, torch.ones(len(RANKS), dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_row_does_not_depend_on_its_company():
    net = Toy(vocabulary=2)
    value = torch.tensor([[0, 1, 1, 0]]).repeat(len(RANKS), 1)
    plan = orders_of_rows(RANKS)
    together, _ = stepwise(net, plan, value)
    alone = [stepwise(net, plan.row(b), value[b : b + 1])[0] for b in range(len(RANKS))]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-12, rtol=0)


def test_the_cost_of_a_batch_is_that_of_its_first_row():
    assert orders_of_rows(RANKS).cost() == orders_of_rows(RANKS[:1]).cost()


def test_rows_without_anything_to_do_are_padded():
    plan = orders_of_rows(torch.tensor([[0, 1], [0, 0]]))
    first, second = plan.steps()
    assert first.reads.element.tolist() == [[0, -1], [0, 1]]
    assert second.reads.element.tolist() == [[1], [-1]]
    assert second.slots.element[1].unique().tolist() == [-1]
    assert not second.views["all"].mask()[1].fill_diagonal_(False).any()


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_a_step_decides_one_rank():
    assert [(s.decides, s.reads.element[0].tolist()) for s in next_scale().steps()] == [
        (0, [0]),
        (1, [1, 2]),
        (2, [3, 4, 5]),
    ]


def test_what_is_given_costs_no_forward_of_its_own():
    """Ranks may leave numbers out (a given scale): what becomes computable in between joins the next step."""
    scale = [-1, 2, 2, 5]
    plan = plan_of(inclusive(scale), scale, [[], [0], [0], [0, 1, 2]], [(1, 1), (2, 2), (3, 3)], source=DERIVED)
    assert [(s.decides, s.size) for s in plan.steps()] == [(2, 3), (5, 1)]


def test_a_step_appends_only_what_a_later_one_looks_at():
    assert [s.kept.shape[1] for s in next_scale().steps()] == [1, 2, 0]
    markov = next_scale(own_rank).steps()
    assert [s.kept.shape[1] for s in markov] == [0, 0, 0]
    assert [s.retain for s in markov] == [None, None, None]  # nothing is evicted, for nothing was there


def test_slots_that_nobody_reads_or_sees_are_not_computed():
    plan = plan_of(inclusive(range(4)), range(4), [-1, 0, 1, 2], [(0, 0), (1, 1)])
    assert plan.used().tolist() == [[True, True, False, False]]
    assert [s.size for s in plan.steps()] == [1, 1]


def test_a_plan_without_read_outs_has_no_steps():
    plan = plan_of(inclusive(range(3)), [], [-1] * 3, [])
    assert plan.steps() == []
    assert plan.cost() == Cost(0, 0, 0, 0, 0)


def test_a_slot_may_read_ahead():
    """Further heads that predict element i+1 at slot i: computed when the first element is due."""
    plan = plan_of(inclusive(range(3)), range(3), [-1, 0, 1], [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)])
    assert plan.check().step.tolist() == [[0, 1, 2]]
    assert [s.reads.element[0].tolist() for s in plan.steps()] == [[0, 1], [1, 2], [2]]


def test_padding_is_never_computed():
    view = inclusive([0, 1, 2]).narrow(lane=[0, 0, -1])
    plan = plan_of(view, range(2), [-1, 0, -1], [(0, 0), (1, 1)])
    assert plan.step.tolist() == [[0, 1, INF]]


def test_a_slot_outside_one_kind_of_layer_is_not_padding():
    views = {"all": inclusive([0, 1]), "words": full(2).narrow(lane=[0, -1])}
    plan = plan_of(views, range(2), [-1, 0], [(0, 0), (1, 1)])
    assert plan.step.tolist() == [[0, 1]]


def test_steps_are_as_cheap_for_long_lines_as_they_look():
    """Deriving 1,000 steps is linear in them (it was cubic once), also where influence takes many layers."""
    n = 1000
    plan = plan_of(inclusive(range(n)).narrow(window=4), range(n), [-1, *range(n - 1)], itself(n))
    steps = plan.steps()
    assert len(steps) == n
    assert plan.cost() == Cost(n, n, 4 * n - 6, 4, 3)
    assert plan.reach()[0].tolist() == list(range(-1, n - 1))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            plan_of(full(3), range(3), [-1] * 3, itself(3)),
            "not computable: slot 0 reads element 0 of rank 0, but can only be computed at step 2: it sees a slot "
            "that is read or decided later",
        ),
        (
            plan_of(inclusive(range(3)), range(3), range(3), itself(3)),
            "not computable: slot 0 reads element 0 of rank 0, but can only be computed at step 1",
        ),
        (
            plan_of(inclusive([0, 0, 1]), [0, 0, 1], [-1, 2, -1], [(0, 0), (2, 2)]),
            "not computable: slot 0 reads element 0 of rank 0, but can only be computed at step 2",
        ),
    ],
    ids=["full visibility", "no shift", "through another slot"],
)
def test_orders_that_cannot_be_computed_are_refused(plan, message):
    with pytest.raises(OrderError) as error:
        plan.steps()
    assert str(error.value).startswith(message)


# ---- taking slots ---------------------------------------------------------------------------------------------------


def test_take_reorders_slots_and_renumbers_what_reads_there():
    plan = replace(next_token(), reads=reads_at([0, 3, 5, 3], [0, 3, 5, 4], role=[0, 0, 0, 1]))
    part = plan.take(torch.tensor([[3, -1, 0]]))
    assert part.slots.element[0, :, 0].tolist() == [2, -1, -1]
    assert part.slots.needs.tolist() == [[2, -1, -1]]
    assert part.reads.slot.tolist() == [[2, 0, 0]]
    assert part.reads.element.tolist() == [[0, 3, 4]]
    assert part.reads.role.tolist() == [[0, 0, 1]]
    assert part.views["all"].mask()[0].tolist() == [[True, False, True], [False, True, False], [False, False, True]]


def test_nothing_reads_at_padding():
    plan = replace(next_token(), reads=reads_at([0, -1, 3], [0, 1, 3]))
    part = plan.take(torch.tensor([[3, -1]]))
    assert part.reads.element.tolist() == [[3]]


def test_take_may_differ_by_row():
    part = next_token().take(torch.tensor([[0, 1, 2], [5, 4, -1]]))
    assert part.reads.element.tolist() == [[0, 1, 2], [4, 5, -1]]
    assert part.reads.slot.tolist() == [[0, 1, 2], [1, 0, -1]]
    assert part.batch == 2


def test_take_forgets_the_cache_plan_of_a_step():
    step = next_token().steps()[2]
    assert step.kept is not None and step.take(torch.tensor([[0]])).kept is None


def test_layers_follow_their_slots():
    plan = skipped_layers()
    assert torch.equal(plan.take(torch.tensor([[5, 0]])).layers, plan.layers[:, [5, 0]])
    with pytest.raises(OrderError, match="same order in every row"):
        plan.take(torch.tensor([[0, 1], [1, 0]]))
