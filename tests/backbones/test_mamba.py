"""Mamba-2 over plans: one pass = step by step, drafts kept and dropped, rows that do not meet, the published model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seriatim.backbones import mamba, state
from seriatim.backbones.mamba import Mamba, MambaConfig
from seriatim.backbones.ssd import replay, ssd_replay
from seriatim.backbones.state import StateCache
from seriatim.canvas import Canvas
from seriatim.conditions.condition import ClassCondition
from seriatim.decoding.draft import DraftModel
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode, generate, select_rows
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Chain, GreedyMatch, KSeq, Recursive, Verifier, Walk
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.static import Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, randomise
from seriatim.laws.laws import LAWS, Broken
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import Plan, plan_of
from seriatim.random import Forced, Keyed
from seriatim.view import inclusive, timed
from support.lines import path_to, run

WIDTH, VOCAB = 16, 3
CONFIG = MambaConfig(WIDTH, 2, head_dim=8, state=5, groups=2, chunk=4)
drawn = settings(deadline=None, max_examples=25, derandomize=True)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def backbone(config: MambaConfig = CONFIG, seed: int = 0) -> Mamba:
    return randomise(Mamba(config), seed)  # type: ignore[arg-type, return-value]


def language(length: int, order: object = None, seed: int = 0, vocab: int = VOCAB, **parts: object) -> Model:
    embed = TokenEmbed(vocab, WIDTH, mask=isinstance(order, Blocks))
    model = Model(line(length), order or Line(1), embed, Mamba(CONFIG), CategoricalHead(WIDTH, vocab), **parts)  # type: ignore[arg-type]
    return randomise(model, seed)


def alone(m: Mamba, x: Tensor) -> Tensor:
    """Each row as one sequence, from nothing."""
    return m(x, run(x.shape[1]))


trees = st.integers(1, 8).flatmap(lambda n: st.tuples(*[st.integers(-1, i - 1) for i in range(n)]))


# ---- one pass = step by step -----------------------------------------------------------------------------------------


@drawn
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.sampled_from([1, 2, 4]))
@torch.no_grad()
def test_steps_of_any_size_meet_the_rows_of_one_pass(sizes: list[int], kernel: int) -> None:
    m = backbone(replace(CONFIG, kernel=kernel))
    x = normal(2, sum(sizes), WIDTH)
    cache, out = m.new_cache(2), []
    for size in sizes:
        base = cache.columns
        plan = run(size, base)
        out.append(m(x[:, base : base + size], plan, cache))
        cache.commit(size, plan)
    close(torch.cat(out, 1), alone(m, x))
    assert cache.length == sum(sizes)


@pytest.mark.parametrize("prefix", [0, 1])
@torch.no_grad()
def test_probabilities_sum_to_one_and_are_those_of_forced_decoding(prefix: int) -> None:
    model, known = language(4, Line(prefix)), 1 - prefix
    rows = torch.tensor(list(itertools.product(range(VOCAB), repeat=4 - known)))
    x = torch.cat([torch.ones(len(rows), known, dtype=torch.long), rows], 1)
    packed = model.log_prob(model.canvas({"token": x}, known))
    assert abs(packed.exp().sum() - 1) < 1e-12
    forced = Forced(x)
    generate(Target(model), model.canvas({"token": x.clone()}, known), SampleAll(), random=forced)
    close(forced.log_prob, packed)


@torch.no_grad()
def test_two_streams_over_blocks_of_one_are_a_tree_and_so_exact() -> None:
    """Each query goes on from the clean values before it: a fork at every element."""
    model = language(4, Blocks(1))
    x = torch.tensor(list(itertools.product(range(VOCAB), repeat=4)))
    packed = model.log_prob(model.canvas({"token": x}))
    assert abs(packed.exp().sum() - 1) < 1e-12
    forced = Forced(x)
    generate(Target(model), model.canvas({"token": x.clone()}), SampleAll(), random=forced)
    close(forced.log_prob, packed)


def law_case(model: Model | None = None) -> Case:
    return Case(model or language(3, vocab=2), vocab=2)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 9, 10, 11])
def test_the_laws_hold(number: int) -> None:
    LAWS[number][1](law_case())


def forgets_the_convolution(cache: StateCache) -> None:
    cache.states = [(torch.zeros_like(conv), state) for conv, state in cache.states]


def forgets_the_state(cache: StateCache) -> None:
    cache.states = [(conv, torch.zeros_like(state)) for conv, state in cache.states]


def keeps_the_other_order_of_layers(cache: StateCache) -> None:
    cache.states = cache.states[::-1]


@pytest.mark.parametrize("wrong", [forgets_the_convolution, forgets_the_state, keeps_the_other_order_of_layers])
def test_a_cache_with_one_mistake_breaks_the_first_law(
    wrong: Callable[[StateCache], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = StateCache.commit

    def commit_wrongly(self: StateCache, keep: object, plan: Plan) -> None:
        commit(self, keep, plan)  # type: ignore[arg-type]
        wrong(self)

    monkeypatch.setattr(StateCache, "commit", commit_wrongly)
    with pytest.raises(Broken):
        LAWS[1][1](law_case())


# ---- drafts: pending, committed, dropped -----------------------------------------------------------------------------


@drawn
@given(trees, st.integers(0, 5), st.integers(1, 3), st.data())
@torch.no_grad()
def test_a_committed_path_of_a_tree_equals_a_fresh_forward(
    parent: tuple[int, ...], before: int, known: int, data: st.DataObject
) -> None:
    """Each node reads as the end of its own path, whatever is cached; then one path stays, and decoding goes on."""
    m, size = backbone(), known + len(parent)
    x = normal(2, before + size + 2, WIDTH)
    cache = m.new_cache(2)
    if before:
        m(x[:, :before], run(before), cache)
        cache.commit(before, run(before))
    plan = run(known, before, parent)
    y = m(x[:, before : before + size], plan, cache)
    trunk, ends = x[:, : before + known], data.draw(st.integers(-1, len(parent) - 1))
    for node in range(len(parent)):
        path = [before + known + i for i in path_to(parent, node)]
        close(y[:, known + node], alone(m, torch.cat([trunk, x[:, path]], 1))[:, -1])
    keep = [*range(known), *(known + i for i in path_to(parent, ends))]
    cache.commit(keep, plan)
    assert cache.length == before + len(keep)
    text = torch.cat([x[:, :before], x[:, [before + i for i in keep]], x[:, -2:]], 1)
    later = []
    for next_ in (x[:, -2:-1], x[:, -1:]):
        plan = run(1, cache.columns)
        later.append(m(next_, plan, cache))
        cache.commit(1, plan)
    close(torch.cat(later, 1), alone(m, text)[:, -2:])


LONG, FORK = 55, (-1, 0, 0, -1, 3)


def after_a_draft(m: Mamba) -> float:
    """How far what follows a long prompt, a draft and the commit of one of its paths is from a fresh forward."""
    x = normal(2, LONG + len(FORK) + 1, WIDTH)
    cache, plan = m.new_cache(2), run(LONG, 0, FORK)
    y = m(x[:, : plan.size], plan, cache)
    keep = [*range(LONG), LONG, LONG + 2]
    cache.commit(keep, plan)
    want = alone(m, x[:, [*keep, -1]])
    got = torch.cat([y[:, keep], m(x[:, -1:], run(1, LONG + 2), cache)], 1)
    return float((got - want).abs().max())


@pytest.mark.parametrize("limit", [0, 32, 1000])
@torch.no_grad()
def test_a_prompt_is_scanned_before_its_draft_or_taken_along(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba, "TREE", limit)
    assert after_a_draft(backbone()) < 1e-9


@pytest.mark.parametrize("parent", [None, (-1, -1, 0)])
@torch.no_grad()
def test_all_but_the_end_of_a_long_forward_is_settled(
    parent: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt leaves little pending; what is left may be dropped, and rows that keep nothing are rolled back."""
    monkeypatch.setattr(mamba, "OPEN", 6)
    m, before, size = backbone(), 5, 40
    x = normal(3, before + size + 3, WIDTH)
    plan = run(size, before, parent)

    def after(keep: object) -> StateCache:
        cache = m.new_cache(3)
        m(x[:, :before], run(before), cache)
        cache.commit(before, run(before))
        y = m(x[:, before : before + plan.size], plan, cache)
        close(y[:, :size], alone(m, x[:, : before + size])[:, before:])
        if parent is not None:
            close(y[:, -1], alone(m, x[:, [*range(before + size + 1), -1]])[:, -1])
        for left in cache._replay:
            assert left is not None
            assert left.x.shape[1] == 6 + len(parent or ())
            for t in (left.conv_x, left.x, left.dt, left.B):
                assert t.untyped_storage().nbytes() == t.nbytes  # no view of the whole forward
        cache.commit(keep, plan)  # type: ignore[arg-type]
        return cache

    def settled(row: int, count: int, *nodes: int) -> list[tuple[Tensor, Tensor]]:
        text = x[row : row + 1, [*range(count), *nodes]]
        cache = m.new_cache(1)
        m(text, run(text.shape[1]), cache)
        cache.commit(text.shape[1], run(text.shape[1]))
        return cache.states

    def agree(cache: StateCache, row: int, want: list[tuple[Tensor, Tensor]]) -> None:
        for (conv, state_), (conv_, want_) in zip(cache.states, want, strict=True):
            close(conv[row], conv_[0])
            close(state_[row], want_[0])

    for count in (0, 34, 36, 40):
        agree(after(count), 1, settled(1, before + count))
    counts = [0, 35, 40]
    each = torch.tensor([[i if i < n else -1 for i in range(40)] for n in counts])
    cache = after(each)
    for row, count in enumerate(counts):
        agree(cache, row, settled(row, before + count))
    if parent is not None:
        agree(after([*range(40), 40, 42]), 2, settled(2, before + 40, before + 40, before + 42))
    with pytest.raises(ValueError, match=f"keeps all, nothing, or all but some of the last {plan.size - 34}; 33"):
        after(33)


def tail_forgotten(conv_x: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, path: Tensor, *old: Tensor):
    return old[0], ssd_replay(x, dt, A, B, path, old[1])


def last_slot_forgotten(*args: Tensor):
    return replay(*args[:5], args[5][:, :-1], *args[6:])


def sibling_instead(*args: Tensor):
    return replay(*args[:5], torch.where(args[5] == LONG + 2, LONG + 1, args[5]), *args[6:])


def layers_swapped(*args: Tensor):
    return tuple(t.unflatten(0, (2, -1)).flip(0).flatten(0, 1) for t in replay(*args))


def one_decay_for_all_layers(*args: Tensor):
    return replay(*args[:3], args[3][:1].expand_as(args[3]), *args[4:])


@pytest.mark.parametrize(
    "wrong", [tail_forgotten, last_slot_forgotten, sibling_instead, layers_swapped, one_decay_for_all_layers]
)
@torch.no_grad()
def test_a_replay_with_one_mistake_is_noticed(wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "replay", wrong)
    assert after_a_draft(backbone()) > 1e-3


# ---- rows ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_rows_are_copied_dropped_and_admitted() -> None:
    m = backbone()
    x = normal(2, 6, WIDTH)
    cache = m.new_cache(2)
    m(x[:, :4], run(4), cache)
    cache.commit(torch.tensor([[0, 1, -1, -1], [0, 1, 2, 3]]), run(4))
    cache.select(torch.tensor([1, 0, 1, -1]))
    assert cache.length.tolist() == [4, 2, 4, 0]  # type: ignore[union-attr]
    texts = [x[1, :4], x[0, :2], x[1, :4], x[0, :0]]
    news = normal(4, 1, WIDTH, seed=2)
    plan = plan_of(timed([9], lane=[0]), [0], [0], [])
    y = m(news, plan, cache)
    for row, text in enumerate(texts):
        close(y[row], alone(m, torch.cat([text, news[row]])[None])[0, -1:])
    cache.commit(torch.tensor([[0], [-1], [-1], [0]]), plan)
    assert cache.length.tolist() == [5, 2, 4, 1]  # type: ignore[union-attr]
    cache.select(torch.tensor([2]))
    assert cache.length == 4
    with pytest.raises(ValueError, match="cannot be selected of 1"):
        cache.select(torch.tensor([0, 1]))


@torch.no_grad()
def test_a_fork_does_not_touch_the_row_that_it_came_from() -> None:
    m = backbone()
    x = normal(1, 8, WIDTH)
    cache = m.new_cache(1)
    m(x[:, :4], run(4), cache)
    cache.commit(4, run(4))
    cache.select(torch.tensor([0, 0]))
    y = m(torch.cat([x[:, 4:7], x[:, 5:8]]), run(3, 4), cache)
    cache.commit(torch.tensor([[0, 1, 2], [0, -1, -1]]), run(3, 4))
    close(y[0], alone(m, x[:, :7])[0, 4:])
    close(y[1], alone(m, x[:, [0, 1, 2, 3, 5, 6, 7]])[0, 4:])
    news = normal(2, 1, WIDTH, seed=2)
    y = m(news, plan_of(timed([9]), [0], [0], []), cache)
    close(y[1], alone(m, torch.cat([x[0, [0, 1, 2, 3, 5]], news[1]])[None])[0, -1:])


@drawn
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 3))
@torch.no_grad()
def test_packed_samples_do_not_meet(lengths: list[int], padding: int) -> None:
    m = backbone()
    lane = [i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * padding
    x = normal(1, len(lane), WIDTH)
    y = m(x, plan_of(inclusive(range(len(lane))).narrow(lane=lane), [0], [-1] * len(lane), []))
    start = 0
    for n in lengths:
        close(y[:, start : start + n], alone(m, x[:, start : start + n]))
        start += n
    assert y.isfinite().all()


@torch.no_grad()
def test_a_row_that_is_admitted_between_steps_decodes_as_if_alone() -> None:
    model = language(9)

    def started(rows: Sequence[int]) -> Canvas:
        value = torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(5))[list(rows)]
        return model.canvas({"token": value}, 2, row=torch.tensor(rows))

    def decoded(canvas: Canvas) -> Tensor:
        return generate(Target(model), canvas, SampleAll(), random=Keyed(3)).value["token"]

    target, canvas = Target(model), started([0, 1, 2])
    for _, _ in zip(range(3), decode(target, canvas, SampleAll(), random=Keyed(3)), strict=False):
        pass
    select_rows(target, canvas, torch.tensor([2, -1, 0]), started([3]))
    generate(target, canvas, SampleAll(), random=Keyed(3))
    assert canvas.row.tolist() == [2, 3, 0]
    for row, value in zip(canvas.row.tolist(), canvas.value["token"], strict=True):
        assert torch.equal(value, decoded(started([row]))[0])


RAGGED = torch.tensor([3, 6, 1])


def prompts(model: Model, rows: Sequence[int] = (0, 1, 2), value: Tensor | None = None):
    size = model.layout.size
    x = torch.randint(VOCAB, (3, size), generator=torch.Generator().manual_seed(5)) if value is None else value
    index = torch.tensor(list(rows))
    known = int(RAGGED[index]) if len(index) == 1 else torch.arange(size) < RAGGED[index, None]
    return model.canvas({"token": x[index].clone()}, known, row=index)


@torch.no_grad()
def test_prompts_of_different_lengths_meet_the_rows_of_one_pass() -> None:
    model = language(9)
    x = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(6))
    forced = Forced(x)
    generate(Target(model), prompts(model, value=x), SampleAll(), random=forced)
    close(forced.log_prob, model.log_prob(prompts(model, value=x)))


def drafting(kind: str, seed: int = 1) -> DraftModel:
    """A smaller, other model drafts."""
    shape = {"chain": (-1, 0, 1), "tree": (-1, -1, 0, 0, 1), "bush": (-1, -1, 0, 0, 1, 1, 2)}[kind]
    siblings = "top" if kind == "tree" else "independent"
    return DraftModel(Target(language(9, seed=seed)), shape, siblings)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["chain", "tree", "bush"])
def test_drafts_change_no_string_whatever_the_company(kind: str) -> None:
    """A state-space model drafts, another verifies; rows of different lengths, and each of them alone."""
    model = language(9)
    plain = generate(Target(model), prompts(model), SampleAll(), random=Keyed(4)).value["token"]
    together = generate(Target(model), prompts(model), Walk(), drafting(kind), Keyed(4)).value["token"]
    assert torch.equal(plain, together)
    for row in range(3):
        by_itself = generate(Target(model), prompts(model, [row]), Walk(), drafting(kind), Keyed(4)).value["token"]
        assert torch.equal(by_itself[0], plain[row])


@pytest.mark.parametrize(
    ("verifier", "kind"),
    [(Walk, "tree"), (GreedyMatch, "tree"), (Chain, "chain"), (Recursive, "bush"), (KSeq, "bush")],
)
@torch.no_grad()
def test_every_verifier_leaves_the_states_of_its_text(verifier: type[Verifier], kind: str) -> None:
    model = language(9)
    target, canvas = Target(model), model.blank(3)
    steps = list(decode(target, canvas, verifier(), drafting(kind, seed=0), Keyed(2)))
    assert sum(int(torch.as_tensor(step.accepted).sum()) for step in steps) > 3
    for row, count in enumerate(torch.as_tensor(target.cache.length).expand(3).tolist()):
        fresh = Target(model)
        text = model.canvas({"token": canvas.value["token"][row : row + 1]}, count - 1)
        plan = fresh.plan(text)
        assert plan is not None
        fresh.forward(plan, text)
        fresh.commit(None, plan)
        assert fresh.cache.length == count
        for got, want in zip(target.cache.states, fresh.cache.states, strict=True):
            close(got[0][row], want[0][0])
            close(got[1][row], want[1][0])


@torch.no_grad()
def test_branches_of_guidance_do_not_meet() -> None:
    """Two rows of the cache for each row of the canvas, and drafts verified over both."""
    model = language(9, conditions={"class": ClassCondition(3, WIDTH, ("prefix",))})
    canvas = model.blank(1)
    x = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(6))
    forced = Forced(x)
    generate(Target(model, {"class": torch.tensor([1])}, Guidance(1.5)), canvas, Walk(), drafting("tree", 0), forced)
    full_canvas = model.canvas({"token": x})
    plan = model.factorization.packed(full_canvas)
    assert plan is not None
    raw = {"class": torch.tensor([1])}
    yes, no = (
        model.dist(model.hidden(plan, full_canvas, None, model.encode(raw, drop)), plan, full_canvas)[0]
        for drop in (None, {"class": torch.tensor([True])})
    )
    close(forced.log_prob, yes.mix([no], [2.5, -1.5]).log_prob(x).sum(1))


@torch.no_grad()
def test_guided_rows_of_different_lengths_do_not_meet() -> None:
    model = language(9, conditions={"class": ClassCondition(3, WIDTH, ("prefix",))})

    def sampled(rows: list[int]) -> Tensor:
        target = Target(model, {"class": torch.tensor(rows)}, Guidance(1.5))
        return generate(target, prompts(model, rows), Walk(), drafting("tree", 0), Keyed(4)).value["token"]

    together = sampled([0, 1, 2])
    for row in range(3):
        assert torch.equal(sampled([row])[0], together[row])


def test_training_in_mixed_precision_is_near_to_float32() -> None:
    model = language(12).float()
    canvas = model.canvas({"token": torch.randint(VOCAB, (4, 12), generator=torch.Generator().manual_seed(6))})
    gradients = []
    for mixed in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            model.losses(canvas).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert 0 < (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()
