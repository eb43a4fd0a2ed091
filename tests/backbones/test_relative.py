"""Scores that depend on distance: the buckets, one pass = step by step, drafts, rows of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.relative import Relative
from seriatim.backbones.transformer import Transformer
from seriatim.decoding.draft import DraftModel
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Walk
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line, LinePlan, LineShape
from seriatim.factorization.static import Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, randomise
from seriatim.laws.laws import LAWS
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import OrderError, plan_of
from seriatim.random import Forced, Keyed
from seriatim.view import full, inclusive

WIDTH, VOCAB = 16, 3
CONFIG = TransformerConfig(WIDTH, 2, 2, hidden=20, relative=Relative(6, 5))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def backbone(config: TransformerConfig = CONFIG) -> Transformer:
    return randomise(Transformer(config), 0)  # type: ignore[arg-type, return-value]


def language(length: int, seed: int = 0, vocab: int = VOCAB, order: Line | None = None) -> Model:
    embed, head = TokenEmbed(vocab, WIDTH), CategoricalHead(WIDTH, vocab)
    return randomise(Model(line(length), order or Line(1), embed, Transformer(CONFIG), head), seed)


def run(known: int, base: int = 0, parent: tuple[int, ...] | None = None) -> LinePlan:
    return LinePlan(LineShape(known, len(parent or ()), parent), base, 0, 1000)


def test_buckets_are_single_near_and_widen_far() -> None:
    """By hand from the paper's description: 32 buckets up to 128, half of them single distances."""
    r = Relative()
    behind = r.bucket[:129].flip(0).tolist()
    assert behind[:16] == list(range(16))
    firsts = [behind.index(b) for b in range(16, 32)]
    assert firsts == [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert r.bucket[129:].tolist() == [0] * 128  # ahead: as if at the query
    both = Relative(both=True).bucket
    assert both[128].item() == 0 and both[127].item() == 1 and both[129].item() == 17
    assert both[:128].max() < 16 <= both[129:].min()


@pytest.mark.parametrize("sizes", [(3, 1, 1, 4), (1,) * 12])
@torch.no_grad()
def test_steps_of_any_size_meet_the_rows_of_one_pass(sizes: Sequence[int]) -> None:
    m, x = backbone(), normal(2, sum(sizes), WIDTH)
    cache, out = m.new_cache(2, 4), []
    for size in sizes:
        plan = run(size, cache.columns)
        out.append(m(x[:, plan.base : plan.base + size], plan, cache))
        cache.commit(size, plan)
    close(torch.cat(out, 1), m(x, run(x.shape[1])))


@torch.no_grad()
def test_a_committed_path_of_a_tree_equals_a_fresh_forward() -> None:
    m, x, parent = backbone(), normal(1, 9, WIDTH), (-1, -1, 0, 2)
    cache, plan = m.new_cache(1), run(4, 0, parent)
    y = m(x[:, :8], plan, cache)
    keep = [0, 1, 2, 3, 4, 6, 7]
    cache.commit(keep, plan)
    want = m(x[:, [*keep, 8]], run(8))
    close(y[:, keep], want[:, :-1])
    close(m(x[:, 8:], run(1, 7), cache), want[:, -1:])


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 9, 10, 11])
def test_the_laws_hold(number: int) -> None:
    LAWS[number][1](Case(language(3, vocab=2), vocab=2))


RAGGED = torch.tensor([3, 6, 1])


def prompts(model: Model, x: Tensor):
    return model.canvas({"token": x.clone()}, torch.arange(x.shape[1]) < RAGGED[:, None])


@torch.no_grad()
def test_rows_of_different_lengths_and_drafts_meet_the_rows_of_one_pass() -> None:
    model = language(9)
    x = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(6))
    forced = Forced(x)
    generate(Target(model), prompts(model, x), SampleAll(), random=forced)
    close(forced.log_prob, model.log_prob(prompts(model, x)))
    plain = generate(Target(model), prompts(model, x), SampleAll(), random=Keyed(4)).value["token"]
    for parent in ((-1, 0, 1), (-1, -1, 0, 0, 1)):
        draft = DraftModel(Target(language(9, seed=1)), parent, "independent")
        assert torch.equal(generate(Target(model), prompts(model, x), Walk(), draft, Keyed(4)).value["token"], plain)


@torch.no_grad()
def test_only_distance_counts() -> None:
    """Slots moved along the line together see the same; moved apart they do not."""
    m, x = backbone(), normal(1, 4, WIDTH)
    view = inclusive(range(4))

    def at(*places: int) -> Tensor:
        return m(x, plan_of(view, [0], [-1] * 4, [], coord=[[p] for p in places]))

    close(at(7, 8, 9, 10), at(0, 1, 2, 3))
    close(at(0, 10, 20, 30), at(0, 20, 40, 60))  # all beyond the last bucket
    assert float((at(0, 1, 2, 4) - at(0, 1, 2, 3)).abs().max()) > 1e-3


@torch.no_grad()
def test_sides_are_told_apart_where_both_are_seen() -> None:
    x, plan = normal(1, 4, WIDTH), plan_of(full(4), [0], [-1] * 4, [], coord=[[0], [1], [2], [3]])
    back = plan_of(full(4), [0], [-1] * 4, [], coord=[[3], [2], [1], [0]])
    one, both = backbone(), backbone(replace(CONFIG, relative=Relative(8, 5, both=True)))
    assert float((both(x, plan) - both(x, back)).abs().max()) > 1e-3
    assert float((one(x, plan) - one(x, back)).abs().max()) > 1e-3


def test_every_bucket_learns() -> None:
    m = backbone()
    m(normal(1, 8, WIDTH), run(8)).pow(2).sum().backward()
    assert m.relative is not None and m.relative.grad is not None
    assert bool((m.relative.grad.abs().sum(1) > 0).all())


def test_what_has_no_distance_is_refused() -> None:
    m, x = backbone(), normal(1, 4, WIDTH)
    blocks = plan_of(inclusive([0, 0, 1, 1]), [0], [-1] * 4, [], coord=[[0], [1], [2], [3]])
    m(x, blocks)  # without a cache coordinates are at hand
    with pytest.raises(OrderError, match="known along a line only"):
        m(x, blocks, m.new_cache(1))
    with pytest.raises(OrderError, match="this plan skips some"):
        m(x, replace(blocks, layers=torch.ones(2, 4, dtype=torch.bool)))
    with pytest.raises(OrderError, match="known along a line only"):
        model = randomise(Model(line(4), Blocks(2), TokenEmbed(3, WIDTH, mask=True), m, CategoricalHead(WIDTH, 3)))
        generate(Target(model), model.blank(1), SampleAll())
    with pytest.raises(ValueError, match="keys of their own"):
        replace(CONFIG, heads=4, kv_heads=2)
    for wrong in ({"buckets": 5}, {"buckets": 6, "both": True}, {"distance": 16}):
        with pytest.raises(ValueError, match=r"buckets halve|far distances begin"):
            Relative(**wrong)
