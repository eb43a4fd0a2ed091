"""State-space mixers and attention in one stack, over plans: one pass = step by step, drafts kept and dropped, rows
that do not meet; and a cache of two halves that go together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seriatim.backbones.hybrid import Hybrid, HybridCache, HybridConfig
from seriatim.backbones.mamba import MambaConfig
from seriatim.backbones.rope import RoPE
from seriatim.conditions.condition import ClassCondition
from seriatim.decoding.beam import Beam
from seriatim.decoding.draft import DraftModel
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode, generate, select_rows
from seriatim.decoding.policy import FreeCache
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Chain, GreedyMatch, Recursive, Verifier, Walk
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, randomise
from seriatim.laws.laws import LAWS, Broken
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import OrderError, Plan, plan_of
from seriatim.random import Forced, Keyed
from seriatim.view import inclusive, timed
from support.lines import path_to, run

WIDTH, VOCAB = 16, 3
MIXER = MambaConfig(WIDTH, 2, head_dim=8, state=5, groups=2, chunk=4)
CONFIG = HybridConfig(
    WIDTH, 4, 4, kv_heads=2, rope=RoPE(100.0, dims=2), hidden=20, attends=(1, 3), mixer=MIXER
)  # fmt: skip
drawn = settings(deadline=None, max_examples=20, derandomize=True)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def backbone(config: HybridConfig = CONFIG) -> Hybrid:
    return randomise(Hybrid(config), 0)  # type: ignore[arg-type, return-value]


def language(length: int, order: Line | None = None, seed: int = 0, vocab: int = VOCAB, **parts: object) -> Model:
    embed, head = TokenEmbed(vocab, WIDTH), CategoricalHead(WIDTH, vocab)
    return randomise(Model(line(length), order or Line(1), embed, Hybrid(CONFIG), head, **parts), seed)  # type: ignore[arg-type]


def alone(m: Hybrid, x: Tensor) -> Tensor:
    """Each row as one sequence, from nothing."""
    return m(x, run(x.shape[1]))


trees = st.integers(1, 6).flatmap(lambda n: st.tuples(*[st.integers(-1, i - 1) for i in range(n)]))


# ---- laws ------------------------------------------------------------------------------------------------------------


def law_case() -> Case:
    return Case(language(3, vocab=2), vocab=2)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 9, 10, 11])
def test_the_laws_hold(number: int) -> None:
    LAWS[number][1](law_case())


@pytest.mark.parametrize("half", ["keys", "states"])
def test_a_cache_that_forgets_one_half_breaks_the_first_law(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = HybridCache.commit

    def commit_wrongly(self: HybridCache, keep: object, plan: Plan) -> None:
        commit(self, keep, plan)  # type: ignore[arg-type]
        if half == "keys":
            self.keys.buffer[..., self.keys.columns - 1, :] = 0
        else:
            self.states.states = [(conv, torch.zeros_like(state)) for conv, state in self.states.states]

    monkeypatch.setattr(HybridCache, "commit", commit_wrongly)
    with pytest.raises(Broken):
        LAWS[1][1](law_case())


@drawn
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.sampled_from([(1, 3), (0,), ()]))
@torch.no_grad()
def test_steps_of_any_size_meet_the_rows_of_one_pass(sizes: list[int], attends: tuple[int, ...]) -> None:
    m = backbone(replace(CONFIG, attends=attends, mixer=replace(MIXER, depth=4 - len(attends))))
    x = normal(2, sum(sizes), WIDTH)
    cache, out = m.new_cache(2, 4), []
    for size in sizes:
        plan = run(size, cache.columns)
        out.append(m(x[:, plan.base : plan.base + size], plan, cache))
        cache.commit(size, plan)
    close(torch.cat(out, 1), alone(m, x))
    assert cache.length == cache.keys.length == sum(sizes)


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


# ---- drafts: pending, committed, dropped -----------------------------------------------------------------------------


@drawn
@given(trees, st.integers(0, 4), st.integers(1, 3), st.data())
@torch.no_grad()
def test_a_committed_path_of_a_tree_equals_a_fresh_forward(
    parent: tuple[int, ...], before: int, known: int, data: st.DataObject
) -> None:
    m, size = backbone(), known + len(parent)
    x = normal(2, before + size + 1, WIDTH)
    cache = m.new_cache(2, 2)
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
    text = torch.cat([x[:, :before], x[:, [before + i for i in keep]], x[:, -1:]], 1)
    close(m(x[:, -1:], run(1, cache.columns), cache), alone(m, text)[:, -1:])


@torch.no_grad()
def test_what_is_dropped_leaves_no_trace_and_what_is_no_path_is_refused_whole() -> None:
    m, x = backbone(), normal(1, 6, WIDTH)
    cache = m.new_cache(1)
    m(x[:, :3], run(3), cache)
    cache.commit(3, run(3))
    draft = run(1, 3, (-1, -1))
    m(x[:, 3:6], draft, cache)
    with pytest.raises(ValueError, match="no path"):
        cache.commit([0, 1, 2], draft)
    assert cache.length == cache.keys.length == 3
    m(x[:, 3:6], draft, cache)
    cache.commit(0, draft)
    close(m(x[:, 3:4], run(1, 3), cache), alone(m, x[:, :4])[:, -1:])


def drafting(parent: tuple[int, ...], seed: int = 1, siblings: str = "independent") -> DraftModel:
    return DraftModel(Target(language(9, seed=seed)), parent, siblings)  # type: ignore[arg-type]


CHAIN, BUSH = (-1, 0, 1), (-1, -1, 0, 0, 1)


@pytest.mark.parametrize(
    ("verifier", "parent", "siblings"),
    [(Walk, BUSH, "top"), (GreedyMatch, BUSH, "top"), (Chain, CHAIN, "independent"), (Recursive, BUSH, "independent")],
)
@torch.no_grad()
def test_every_verifier_leaves_the_cache_of_its_text(
    verifier: type[Verifier], parent: tuple[int, ...], siblings: str
) -> None:
    model = language(9)
    target, canvas = Target(model), model.blank(3)
    steps = list(decode(target, canvas, verifier(), drafting(parent, 0, siblings), Keyed(2)))
    assert sum(int(torch.as_tensor(step.accepted).sum()) for step in steps) > 3
    held = torch.as_tensor(target.cache.length).expand(3).tolist()
    assert torch.as_tensor(target.cache.keys.length).expand(3).tolist() == held
    for row, count in enumerate(held):
        fresh = Target(model)
        text = model.canvas({"token": canvas.value["token"][row : row + 1]}, count - 1)
        plan = fresh.plan(text)
        assert plan is not None
        fresh.forward(plan, text)
        fresh.commit(None, plan)
        for got, want in zip(target.cache.states.states, fresh.cache.states.states, strict=True):
            close(got[0][row], want[0][0])
            close(got[1][row], want[1][0])
        close(target.cache.keys.buffer[:, :, row, :, :count], fresh.cache.keys.buffer[:, :, 0, :, :count])


# ---- rows ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_rows_are_copied_dropped_and_admitted() -> None:
    m, x = backbone(), normal(2, 6, WIDTH)
    cache = m.new_cache(2)
    m(x[:, :4], run(4), cache)
    cache.commit(torch.tensor([[0, 1, -1, -1], [0, 1, 2, 3]]), run(4))
    cache.select(torch.tensor([1, 0, 1, -1]))
    assert cache.length.tolist() == cache.keys.length.tolist() == [4, 2, 4, 0]  # type: ignore[union-attr]
    texts = [x[1, :4], x[0, :2], x[1, :4], x[0, :0]]
    news, place = normal(4, 1, WIDTH, seed=2), torch.tensor([[4], [2], [4], [0]])
    plan = plan_of(timed(place, lane=[0]), [0], [0], [])
    plan = replace(plan, slots=replace(plan.slots, coord=place[..., None]))
    y = m(news, plan, cache)
    for row, text in enumerate(texts):
        close(y[row], alone(m, torch.cat([text, news[row]])[None])[0, -1:])


@torch.no_grad()
def test_packed_samples_do_not_meet() -> None:
    m, lengths = backbone(), [3, 1, 5]
    lane = [i for i, n in enumerate(lengths) for _ in range(n)] + [-1, -1]
    place = [[j] for n in lengths for j in range(n)] + [[0], [0]]
    x = normal(1, len(lane), WIDTH)
    y = m(x, plan_of(inclusive(range(len(lane))).narrow(lane=lane), [0], [-1] * len(lane), [], coord=place))
    for start, n in ((0, 3), (3, 1), (4, 5)):
        close(y[:, start : start + n], alone(m, x[:, start : start + n]))
    assert y.isfinite().all()


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


@pytest.mark.parametrize("parent", [CHAIN, BUSH])
def test_drafts_change_no_string_whatever_the_company(parent: tuple[int, ...]) -> None:
    model = language(9)
    plain = generate(Target(model), prompts(model), SampleAll(), random=Keyed(4)).value["token"]
    together = generate(Target(model), prompts(model), Walk(), drafting(parent), Keyed(4)).value["token"]
    assert torch.equal(plain, together)
    for row in range(3):
        by_itself = generate(Target(model), prompts(model, [row]), Walk(), drafting(parent), Keyed(4)).value["token"]
        assert torch.equal(by_itself[0], plain[row])


@torch.no_grad()
def test_a_row_that_is_admitted_between_steps_decodes_as_if_alone() -> None:
    model = language(9)

    def started(rows: Sequence[int]):
        value = torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(5))[list(rows)]
        return model.canvas({"token": value}, 2, row=torch.tensor(rows))

    target, canvas = Target(model), started([0, 1, 2])
    for _, _ in zip(range(3), decode(target, canvas, SampleAll(), random=Keyed(3)), strict=False):
        pass
    select_rows(target, canvas, torch.tensor([2, -1, 0]), started([3]))
    generate(target, canvas, SampleAll(), random=Keyed(3))
    for row, value in zip(canvas.row.tolist(), canvas.value["token"], strict=True):
        want = generate(Target(model), started([row]), SampleAll(), random=Keyed(3)).value["token"][0]
        assert torch.equal(value, want)


def test_beams_with_a_cache_are_those_without() -> None:
    model = language(6)
    found = [
        generate(Target(model, cached=cached), model.blank(1), Beam(3), random=Keyed(1)).value["token"]
        for cached in (True, False)
    ]
    assert torch.equal(*found)


@torch.no_grad()
def test_branches_of_guidance_do_not_meet() -> None:
    model = language(9, conditions={"class": ClassCondition(3, WIDTH, ("prefix",))})
    raw = {"class": torch.tensor([1])}
    x = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(6))
    forced = Forced(x)
    generate(Target(model, raw, Guidance(1.5)), model.blank(1), Walk(), drafting(BUSH, 0, "top"), forced)
    canvas = model.canvas({"token": x})
    plan = model.factorization.packed(canvas)
    assert plan is not None
    yes, no = (
        model.dist(model.hidden(plan, canvas, None, model.encode(raw, drop)), plan, canvas)[0]
        for drop in (None, {"class": torch.tensor([True])})
    )
    close(forced.log_prob, yes.mix([no], [2.5, -1.5]).log_prob(x).sum(1))


def test_a_conditioning_vector_drives_layers_of_both_kinds() -> None:
    """AdaLN around attention and mixers alike, in steps as in one pass."""
    m = backbone(replace(CONFIG, vector=5))
    x, vector = normal(1, 5, WIDTH), normal(1, 5, seed=3)
    with torch.no_grad():
        want = m(x, run(5), None, vector)
        assert float((m(x, run(5), None, vector + 1) - want).abs().max()) > 1e-3
        cache = m.new_cache(1)
        for i in range(5):
            close(m(x[:, i : i + 1], run(1, i), cache, vector), want[:, i : i + 1])
            cache.commit(1, run(1, i))


@torch.no_grad()
def test_layers_of_another_kind_see_a_window() -> None:
    """In steps as in one pass; beyond the window only states remember."""
    config = replace(CONFIG, kinds=("all", "local", "all", "local"))
    embed, head = TokenEmbed(VOCAB, WIDTH), CategoricalHead(WIDTH, VOCAB)
    model = randomise(Model(line(9), Line(1, {"local": 3}), embed, Hybrid(config), head))
    x = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(6))
    forced = Forced(x)
    generate(Target(model), prompts(model, value=x), SampleAll(), random=forced)
    close(forced.log_prob, model.log_prob(prompts(model, value=x)))
    wide = Model(line(9), Line(1), model.embed, model.backbone, head)
    assert (
        float((wide.log_prob(wide.canvas({"token": x})) - model.log_prob(model.canvas({"token": x}))).abs().min())
        > 1e-3
    )


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


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_what_a_state_cannot_honour_is_refused_before_anything_is_computed() -> None:
    m, model = backbone(), language(6)
    x = normal(1, 3, WIDTH)
    with pytest.raises(OrderError, match="recurrent layer cannot honour"):
        m(x, plan_of(inclusive([0, 0, 0]), [0], [-1] * 3, []))
    plan = plan_of(inclusive(range(3)), [0], [-1] * 3, [])
    with pytest.raises(OrderError, match="slots that skip layers"):
        m(x, replace(plan, layers=torch.ones(4, 3, dtype=torch.bool)))
    with pytest.raises(ValueError, match="needs a cache that can evict and subset; that of Hybrid cannot"):
        Target(model, policy=FreeCache(2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attends": (1, 4)}, "different numbers below 4"),
        ({"attends": (1, 1)}, "different numbers below 4"),
        ({"attends": (1,)}, "3 of 4 layers mix by states"),
        ({"mixer": None}, "give a mixer of that depth"),
        ({"mixer": replace(MIXER, width=8)}, "16 wide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(CONFIG, **changes)


def test_the_size_of_a_cache_is_that_of_both_halves() -> None:
    m = backbone()
    cache = m.new_cache(2)
    states = 2 * 2 * (4 * 8 * 5 + (32 + 2 * 2 * 5) * 3) * 8
    assert cache.nbytes() == states
    m(normal(2, 3, WIDTH), run(3), cache)
    cache.commit(3, run(3))
    assert cache.nbytes() == states + 2 * 2 * 2 * 2 * 3 * 4 * 8  # layers, keys and values, rows, heads, slots, dim
