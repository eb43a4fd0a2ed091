"""Layer plans: what is left out, that it is really left out, and that nothing else changes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import seriatim.backbones.transformer as transformer
from seriatim.backbones.hybrid import Hybrid, HybridConfig
from seriatim.backbones.mamba import Mamba, MambaConfig
from seriatim.backbones.rope import RoPE
from seriatim.decoding.draft import NGram
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.jacobi import Window
from seriatim.decoding.layers import Greedy, PromptRouters, Saturation, Staircase, begun, missing_entries
from seriatim.decoding.loop import decode, select_rows
from seriatim.decoding.policy import FreeCache
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Branch, Target
from seriatim.decoding.verify import Chain, Walk
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.factorization.static import Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.laws.drafts import Guessing, RandomDraft
from seriatim.layout import line
from seriatim.model import Model
from seriatim.random import Keyed, enumerate_law
from support.skipping import DEPTH, NEW, PLANS, PROMPTS, VOCAB, WIDTH, layers_called, routers, system, written

each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
NEUTRAL = {
    "staircase": Staircase((DEPTH,)), "saturation": Saturation(1.5, warmup=0), "routers": routers(threshold=0.0),
    "routers of 1": PromptRouters(torch.zeros(DEPTH, WIDTH), torch.full((DEPTH,), 50.0)),
}  # fmt: skip


@pytest.fixture(scope="module")
def made():
    return system()


def alone(made, plan, **more):
    """Texts and laws of each prompt by itself."""
    found = [written(made, [row], plan, names=[i], **more) for i, row in enumerate(PROMPTS)]
    return [texts[0] for texts, _, _ in found], [torch.cat(laws) for _, laws, _ in found]


# ---- what holds of every plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", NEUTRAL.values(), ids=NEUTRAL)
def test_at_its_neutral_setting_a_plan_is_the_plain_model(made, plan):
    texts, laws = alone(made, plan)
    want, plain = alone(made, None)
    assert texts == want
    assert max(float((a - b).abs().max()) for a, b in zip(laws, plain, strict=True)) == 0


@each_plan
def test_a_plan_leaves_something_out_and_changes_the_law(made, plan):
    _, laws, target = written(made, PROMPTS[:1], plan)
    _, plain, _ = written(made, PROMPTS[:1], None)
    assert target.skipping.tally.share < 0.9
    assert max(float((a - b).abs().max()) for a, b in zip(laws, plain, strict=True)) > 0.01


@each_plan
def test_cached_decoding_equals_full_recomputation_under_the_same_plan(made, plan):
    texts, laws = alone(made, plan)
    want, fresh = alone(made, plan, cached=False)
    assert texts == want
    assert max(float((a - b).abs().max()) for a, b in zip(laws, fresh, strict=True)) < 1e-10


@each_plan
def test_rows_of_a_batch_equal_rows_alone(made, plan):
    """Prompts of four lengths, so that rows stand at different places; also prefilled in pieces, and recomputed."""
    texts, laws = alone(made, plan)
    for more in ({}, {"chunk": 2}, {"cached": False}):
        together, met, _ = written(made, PROMPTS, plan, **more)
        assert together == texts
        assert (torch.stack(met, 1) - torch.stack(laws)).abs().max() < 1e-10


@each_plan
@pytest.mark.parametrize("rows", [PROMPTS[:1], PROMPTS], ids=["one row", "ragged batch"])
def test_drafts_change_nothing_under_a_plan(made, plan, rows):
    """Chains, windows and trees are verified by the model with the layers of each drafted place; rows accept
    differently."""
    want, _, _ = written(made, rows, plan)
    proposers = [NGram(4, (2, 1)), Window(3), *([Guessing(VOCAB, 1)] if len(rows) == 1 else [])]
    for proposer in proposers:
        for chunk in (None, 2):
            texts, _, target = written(made, rows, plan, decider=Walk(), proposer=proposer, chunk=chunk)
            assert texts == want
            assert target.skipping.tally.share < 1


@pytest.mark.parametrize("name", ["staircase", "saturation, always", "routers"])
def test_chains_drawn_at_random_are_exact_under_a_plan(made, name):
    """By ratio, so equal in law: that of the two next tokens, enumerated."""

    def law(draft: bool):
        def run(random):
            proposer = RandomDraft(VOCAB, random) if draft else None
            texts, _, _ = written(
                made, PROMPTS[:1], PLANS[name], new=2, random=random, decider=Chain(), proposer=proposer
            )
            return texts[0]

        return enumerate_law(run)

    plain, drafted = law(False), law(True)
    assert max(abs(drafted.get(text, 0.0) - p) for text, p in plain.items()) < 1e-12


@each_plan
def test_rows_are_copied_dropped_and_admitted(made, plan):
    """A row that comes later is decided by its own prompt, and those that stay keep their decisions."""
    texts, _ = alone(made, plan)
    canvas = made._begun(PROMPTS[:2], NEW)
    target = Target(made.model, layers=plan)
    with torch.inference_mode():
        steps = decode(target, canvas, SampleAll(), None, Keyed(3))
        for _ in range(4):
            next(steps)
        new = made._begun(PROMPTS[2:3], NEW - 2)
        new.row = torch.tensor([2])
        padded = made.model.canvas(
            {"token": torch.nn.functional.pad(new.value["token"], (0, canvas.layout.size - new.layout.size))},
            torch.tensor([len(PROMPTS[2])]), row=new.row, layout=canvas.layout,
        )  # fmt: skip
        select_rows(target, canvas, torch.tensor([1, -1]), padded)
        for _ in decode(target, canvas, SampleAll(), None, Keyed(3)):
            pass
    value, size = canvas.value["token"].tolist(), canvas.layout.size
    for got, i in zip(value, (1, 2), strict=True):
        assert got[: min(size, len(texts[i]))] == texts[i][: min(size, len(texts[i]))]


@each_plan
def test_plans_work_in_bfloat16_and_with_integer_weights(plan):
    from seriatim.backbones.quantize import quantize

    for weights in (None, "int8"):
        small = system().to(torch.bfloat16)
        if weights:
            quantize(small.model, weights)
        texts, laws, target = written(small, PROMPTS[:1], plan)
        assert len(texts[0]) == len(PROMPTS[0]) + NEW and all(bool(x.isfinite().any()) for x in laws)
        assert target.skipping.tally.share < 1


def test_without_a_plan_nothing_is_asked(made):
    _, _, target = written(made, PROMPTS[:1], None)
    assert target.skipping is None and target.cache.layers == tuple(range(DEPTH))
    assert target.plan(made._begun(PROMPTS[:1], 3)).route is None


# ---- fewer layers, token by token ------------------------------------------------------------------------------------

SCHEDULES = [
    Staircase.linear(most, least, length, warmup)
    for most, least, length, warmup in itertools.product((6, 5), (5, 3, 2), (1, 3, 16), (0, 1, 2))
]


def looked_for_in_vain(table: Tensor) -> Tensor:
    """(layer, token, earlier token) where a token goes through a layer in which an earlier one has left no entry."""
    earlier = torch.ones(table.shape[1], table.shape[1], dtype=torch.bool).tril(-1)
    return table[:, :, None] & ~table[:, None] & earlier


@pytest.mark.parametrize("plan", SCHEDULES, ids=str)
def test_schedules_never_lack_an_entry(plan):
    """As it is asserted when a plan begins, and pair by pair."""
    table = plan.begin(DEPTH).table
    assert missing_entries(table) is None and not bool(looked_for_in_vain(table).any())
    assert table.sum(0).tolist() == list(plan.counts)
    assert bool(table[: plan.warmup].all()) and table[plan.warmup :].int().diff(dim=0).min() >= 0


def test_an_increasing_schedule_is_refused_and_names_what_is_missing():
    table = torch.tensor([Staircase((1,)).stair(count, DEPTH) for count in (4, 2, 3)]).T
    assert missing_entries(table) == (4, 2)
    assert looked_for_in_vain(table).nonzero().tolist() == [[4, 2, 1]]
    with pytest.raises(ValueError, match="token 2 behind the prompt goes through layer 4, where the one before"):
        Staircase((4, 2, 3)).begin(DEPTH)


def test_a_schedule_goes_down_in_a_line():
    """L_t = max - (max - min) (t - t_prompt) / (T - t_prompt), rounded, and the least from there on."""
    assert Staircase.linear(12, 6, 4).counts == (12, 11, 9, 8, 6)
    assert Staircase.linear(12, 6, 12).counts == (12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6)
    assert Staircase((6, 3), warmup=1).stair(3, 6) == [True, False, False, False, True, True]
    assert Staircase((6, 3), warmup=2).stair(3, 6) == [True, True, False, False, False, True]


@pytest.fixture
def calls(made, monkeypatch):
    return layers_called(made, monkeypatch)


def test_the_layers_that_are_computed_are_those_of_the_schedule(made, calls):
    plan = PLANS["staircase"]
    _, _, target = written(made, PROMPTS[:1], plan)
    counts = [plan.counts[min(n, len(plan.counts) - 1)] for n in range(1, NEW)]  # the last token is read by nobody
    want = list(range(DEPTH)) + [i for c in counts for i, runs in enumerate(plan.stair(c, DEPTH)) if runs]
    assert calls == want
    assert (target.skipping.tally.entered, target.skipping.tally.met) == (sum(counts), DEPTH * len(counts))


def test_a_draft_is_computed_by_the_layers_of_its_first_place(made, calls):
    """A layer that some drafted places skip is computed for all; one that all skip is not."""
    plan = Staircase((6, 6, 4, 2))
    _, _, target = written(made, PROMPTS[:1], plan, decider=Walk(), proposer=NGram(3, (1,)), new=12)
    route = target.skipping.last
    assert [run is False for run in route.ran] == [False, True, True, True, True, False]
    assert 2 in calls and target.skipping.tally.share < 1


def test_skipped_layers_are_neither_read_nor_seen(made, monkeypatch):
    """From the third token on the middle layers may hold anything, and so may the cache there."""
    plan = Staircase((6, 6, 2))
    want, _, _ = written(made, PROMPTS[:1], plan)
    spoilt = system()
    canvas, target = spoilt._begun(PROMPTS[:1], NEW), Target(spoilt.model, layers=plan)
    with torch.inference_mode():
        for n, _ in enumerate(decode(target, canvas, SampleAll(), None, Keyed(3))):
            if n == 1:
                for i in range(1, 5):
                    for p in spoilt.model.backbone.layers[i].parameters():
                        p.fill_(torch.nan)
                    target.cache.buffer[i].fill_(torch.nan)
    assert canvas.value["token"].tolist() == want


def through_masks(made, ids: Tensor, prompt: int, plan: Staircase) -> Tensor:
    """The laws behind every token in one pass in which layers say which slots they have: those they have not are seen
    by nobody there, whether or not anybody would look (`Plan.layers`)."""
    canvas = made.model.canvas({"token": ids}, prompt, layout=line(ids.shape[1]))
    packed = made.model.factorization.packed(canvas)
    counts = [plan.counts[max(min(e - prompt + 1, len(plan.counts) - 1), 0)] for e in range(-1, ids.shape[1] - 1)]
    layers = torch.tensor([plan.stair(count, DEPTH) for count in counts]).T
    with torch.no_grad():
        h = made.model.hidden(replace(packed, layers=layers), canvas)
        return torch.log_softmax(made.model.heads["token"].logits(h), -1)


@pytest.mark.parametrize("name", ["staircase", "staircase, shorter prompts"])
def test_one_pass_with_masks_equals_one_pass_without_and_decoding_at_every_place(made, name):
    plan, prompt = PLANS[name], PROMPTS[2]
    texts, laws, _ = written(made, [prompt], plan)
    ids = torch.tensor(texts)
    masked = through_masks(made, ids, len(prompt), plan)
    assert (masked[0, len(prompt) :] - torch.cat(laws)).abs().max() < 1e-10
    canvas = made.model.canvas({"token": ids}, len(prompt), layout=line(ids.shape[1]))
    packed = begun(plan, made.model).along(made.model.factorization.packed(canvas), canvas)
    with torch.no_grad():
        h = made.model.hidden(packed, canvas)
    assert (torch.log_softmax(made.model.heads["token"].logits(h), -1) - masked).abs().max() < 1e-10


def test_masks_and_entries_part_where_a_schedule_increases(made):
    """What the refusal of such schedules spares: without masks a token sees entries that decoding does not have."""
    plan, ids = Staircase((4, 2, 4)), torch.tensor([[1, 0, 1, 2, 2, 0]])
    canvas = made.model.canvas({"token": ids}, 2, layout=line(6))
    skipping = Staircase((4, 2)).begin(DEPTH)
    skipping.table = torch.tensor([plan.stair(count, DEPTH) for count in plan.counts]).T
    with torch.no_grad():
        h = made.model.hidden(skipping.along(made.model.factorization.packed(canvas), canvas), canvas)
    unmasked = torch.log_softmax(made.model.heads["token"].logits(h), -1)
    assert (unmasked - through_masks(made, ids, 2, plan)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Staircase(()), "at least 1 layer"), (lambda: Staircase((3, 1), warmup=2), "at least 1 layer"),
        (lambda: Staircase((3, 0), warmup=0), "at least 1 layer"), (lambda: Staircase((7,)).begin(6), "7 layers of 6"),
        (lambda: Staircase.linear(6, 2, 0), "expected length of at least 1"),
        (lambda: Saturation(0.9, run=0), "at least 1 network"), (lambda: Saturation(0.9, top=-1), "less than 0"),
        (lambda: Saturation(0.9, bottom=4, top=3).begin(6), "more than the 6 there are"),
        (lambda: routers(prompt="jumps"), "skips layers or runs"), (lambda: routers().begin(5), "another model's"),
    ],
)  # fmt: skip
def test_plans_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- feed-forward networks -------------------------------------------------------------------------------------------


def expected(run: int, bottom: int, top: int) -> list[bool]:
    """Which networks are computed where every cosine is above the threshold."""
    pattern, left = [], 0
    for i in range(DEPTH):
        if not bottom <= i < DEPTH - top:
            pattern.append(True)
        elif left:
            pattern.append(False)
            left -= 1
        else:
            pattern.append(True)
            left = run
    return pattern


@pytest.mark.parametrize("run", [1, 2, 3, 9])
@pytest.mark.parametrize(("bottom", "top"), [(0, 0), (1, 1), (2, 0)])
def test_below_every_cosine_the_pattern_is_that_of_the_runs(made, run, bottom, top, monkeypatch):
    """By layers, and counted: products with the second matrix of a network, and the tally."""
    computed: list[int] = []
    down = {id(layer.down): i for i, layer in enumerate(made.model.backbone.layers)}
    product = transformer.linear

    def spy(x, weight, bias=None):
        if id(weight) in down:
            computed.append(down[id(weight)])
        return product(x, weight, bias)

    monkeypatch.setattr(transformer, "linear", spy)
    patterns: list[list[bool]] = []
    warmup, plan = 2, Saturation(-1.0, run, bottom, top, warmup=2)
    canvas, target = made._begun(PROMPTS[:1], NEW), Target(made.model, layers=plan)
    with torch.inference_mode():
        for _ in decode(target, canvas, SampleAll(), None, Keyed(3)):
            if target.skipping.last is not None:
                patterns.append([bool(ran) for ran in target.skipping.last.ran])
    want = [[True] * DEPTH] * warmup + [expected(run, bottom, top)] * (NEW - 1 - warmup)
    assert patterns == want
    assert computed == [i for pattern in want for i, runs in enumerate(pattern) if runs]
    assert target.skipping.tally.entered == len(computed) and target.skipping.tally.met == DEPTH * len(want)


def test_a_skipped_network_leaves_the_stream_as_it_is_and_is_not_read(made):
    """Whatever it holds; attention of the same layer runs, and leaves its entries."""
    plan = Saturation(-1.0, run=9, bottom=1, top=0, warmup=0)  # layers 2 to 5 skip
    want, _, _ = written(made, PROMPTS[:1], plan)
    spoilt = system()
    canvas, target = spoilt._begun(PROMPTS[:1], NEW), Target(spoilt.model, layers=plan)
    with torch.inference_mode():
        for n, _ in enumerate(decode(target, canvas, SampleAll(), None, Keyed(3))):
            if n == 0:
                for i in range(2, DEPTH):
                    for name in ("up", "down", "norm2"):
                        getattr(spoilt.model.backbone.layers[i], name).fill_(torch.nan)
    assert canvas.value["token"].tolist() == want
    entries = target.cache.buffer[..., : target.cache.columns, :]
    assert target.cache.columns == len(PROMPTS[0]) + NEW and bool((entries.abs().sum((0, 1, 2, 3, 5)) > 0).all())
    assert bool((entries.flatten(1, 3).abs().sum((1, 3)) > 0).all())  # in every layer at every place


def test_each_slot_finds_its_own_way(made):
    """Of four slots: one of the prompt, one that has not warmed up, and two whose cosines differ."""
    plan = Saturation(0.5, run=1, bottom=0, top=1, warmup=1)
    route = Greedy(plan.begin(4), [False, False, True, True], [True] * 4)
    x = torch.ones(1, 4, 2)
    turned = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, -1.0]])[None]  # the last cosine is 0
    assert route.enters(0, x) and torch.equal(route.leaves(0, x, turned), turned)
    assert route.enters(1, x) and route.leaves(1, x, 2 * x)[0, :, 0].tolist() == [2, 2, 1, 2]
    assert route.enters(2, x) and route.leaves(2, x, 2 * x)[0, :, 0].tolist() == [2, 2, 2, 1]
    assert route.enters(3, x) and torch.equal(route.leaves(3, x, 2 * x), 2 * x)  # the last layer always runs
    assert [run if isinstance(run, bool) else run[0].tolist() for run in route.ran] == [
        True, [True, True, False, True], [True, True, True, False], True,
    ]  # fmt: skip


def test_the_cosine_is_taken_behind_the_residual(made):
    """A network that adds next to nothing is near its input, however its own branch is turned."""
    route = Greedy(Saturation(0.99, run=1, bottom=0, top=0).begin(2), [True], [True])
    x, branch = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[-0.01, 0.01]]])
    route.enters(0, x)
    route.leaves(0, x, x + branch)
    assert not route.enters(1, x)


# ---- what cannot be --------------------------------------------------------------------------------------------------


def of(backbone, order, **conditions) -> Model:
    embed = TokenEmbed(VOCAB, WIDTH, mask=not isinstance(order, Line))
    return randomise(Model(line(8), order, embed, backbone, CategoricalHead(WIDTH, VOCAB), conditions or None))


MIXER = MambaConfig(WIDTH, 2, head_dim=8, state=5, groups=2, chunk=4)
HYBRID = HybridConfig(WIDTH, 4, 4, kv_heads=2, rope=RoPE(100.0, dims=2), hidden=20, attends=(1, 3), mixer=MIXER)


def test_states_cannot_leave_out_layers_but_networks_between_them():
    hybrid = of(Hybrid(HYBRID), Line(prefix=1))
    for plan in (Staircase((4, 2)), PromptRouters(torch.zeros(4, WIDTH), torch.zeros(4))):
        with pytest.raises(ValueError, match="skips whole layers, which Hybrid cannot leave out"):
            Target(hybrid, layers=plan)
        with pytest.raises(ValueError, match="which Mamba cannot leave out"):
            Target(of(Mamba(replace(MIXER, depth=4)), Line(prefix=1)), layers=plan)

    def text(plan, cached=True):
        canvas, target = hybrid.canvas({"token": torch.zeros(1, 8, dtype=torch.long)}, 2), None
        target = Target(hybrid, layers=plan, cached=cached)
        with torch.inference_mode():
            for _ in decode(target, canvas, SampleAll(), None, Keyed(1)):
                pass
        return canvas.value["token"].tolist(), target.skipping

    saturation = Saturation(-1.0, run=1, bottom=0, top=0, warmup=0)
    (skipped, skipping), (fresh, _) = text(saturation), text(saturation, cached=False)
    assert skipped == fresh and skipping.tally.share == 0.5
    assert text(Saturation(2.0))[0] == text(None)[0]


def test_orders_guidance_and_policies_that_layers_do_not_go_with_are_refused(made):
    backbone = made.model.backbone
    with pytest.raises(ValueError, match="Blocks has another order"):
        Target(of(transformer.Transformer(backbone.config), Blocks(2)), layers=Staircase((2,)))
    with pytest.raises(ValueError, match="without guidance and without a cache policy"):
        Target(made.model, guidance=[Branch(Guidance(1.0), hide="given")], layers=Staircase((2,)))
    with pytest.raises(ValueError, match="without guidance and without a cache policy"):
        Target(made.model, policy=FreeCache(2), layers=Staircase((2,)))
