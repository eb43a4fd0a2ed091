"""Fast-dLLM v2: two views of complementary masks, where the first of a block is read, and parts with their cache."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from seriatim.decoding.loop import decode, generate
from seriatim.decoding.policy import InsideBlock
from seriatim.decoding.sample import Above, Select
from seriatim.decoding.target import Target
from seriatim.decoding.unmask import Unmask
from seriatim.factorization.static import Blocks
from seriatim.laws.case import randomise
from seriatim.laws.laws import LAWS, Broken
from seriatim.layout import line
from seriatim.objectives.masked import MaskedBlocks
from seriatim.plan import OrderError
from seriatim.random import Generator, Keyed
from seriatim.systems.decoders import decoder_of
from seriatim.systems.masked_text import in_parts
from seriatim.systems.system import Sampling, begin_as
from seriatim.systems.text import fast_dllm_v2, next_token, sdar
from seriatim.systems.text.fast_dllm_v2 import Config, FastDLLMv2, NoisySide, tiny

GREEDY = Sampling(temperature=0)


def ids(rows, length, vocab=2, seed=0):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def system(seed=0, **settings):
    one = FastDLLMv2(Config(**{"length": 48, "width": 16, "depth": 2, "heads": 2, "block": 8, "part": 4, **settings}))
    randomise(one.model, seed, std=0.4)
    return one.eval().requires_grad_(False)


# ---- two views -------------------------------------------------------------------------------------------------------


def views(model, canvas, monkeypatch, seed=1):
    """What the views of one draw hide (2, b, E)."""
    seen, plain = [], MaskedBlocks.hidden_losses

    def watched(self, canvas, hidden, *rest, **more):
        seen.append(hidden)
        return plain(self, canvas, hidden, *rest, **more)

    monkeypatch.setattr(MaskedBlocks, "hidden_losses", watched)
    losses = model.train().losses(canvas, random=Generator(seed))
    (hidden,) = seen
    return hidden.view(2, canvas.batch, -1), losses


@pytest.mark.parametrize("block, length, given", [(2, 8, 0), (3, 8, 0), (4, 8, 3), (8, 8, 0)])
def test_each_token_is_a_target_of_exactly_one_view(block, length, given, monkeypatch):
    model = tiny(block, length)
    canvas = model.canvas({"token": ids(50, length)}, given)
    (first, second), losses = views(model, canvas, monkeypatch)
    assert torch.equal(first ^ second, canvas.open) and not bool((first & second).any())
    assert bool((losses[:, given:] > 0).all()) and not bool(losses[:, :given].any())
    share = first[:, given:].double().mean()
    assert abs(float(share) - 0.5) < 0.08


def test_views_of_their_own_leave_tokens_out_and_read_others_twice(monkeypatch):
    model = tiny(4, 8, complementary=False)
    canvas = model.canvas({"token": ids(50, 8)})
    (first, second), losses = views(model, canvas, monkeypatch)
    assert bool((first & second).any()) and bool((canvas.open & ~first & ~second).any())
    with torch.no_grad():
        read = sum(model.hidden_losses(canvas, hidden) for hidden in (first, second))
    assert torch.allclose(losses.mean(), read.sum() / (first.sum() + second.sum()))  # the mean of what is read


def test_the_expected_loss_of_a_pair_is_the_bound_with_a_weight_of_two(monkeypatch):
    """By every set that a time, drawn evenly, may hide: of one block of 4, a set of k has probability 1 / 5 / C(4, k).
    The bound weighs it by 1/t: by C(4, k) ways, 4/k times a mean over counts from 1."""
    model, n = tiny(4), 4
    canvas = model.canvas({"token": ids(3, n)})
    pair = weighed = bound = torch.zeros(3, dtype=torch.float64)
    for k in range(n + 1):
        sets = list(itertools.combinations(range(n), k))
        for some in sets:
            hidden = torch.isin(torch.arange(n), torch.tensor(some)).expand(3, -1)
            monkeypatch.setattr(model, "drawn", lambda canvas, random, hidden=hidden: (hidden, None))
            with torch.no_grad():
                one = model.hidden_losses(canvas, hidden).sum(1)
                pair = pair + model.train().losses(canvas).sum(1) / (n + 1) / len(sets)
            weighed = weighed + 2 * one / (n + 1) / len(sets)
            bound = bound + (one / k / len(sets) if k else 0)
    assert torch.allclose(pair, weighed, rtol=0, atol=1e-10)
    assert float((pair - bound).abs().max()) > 1e-2


def test_in_evaluation_the_loss_is_the_bound_of_block_diffusion():
    model = tiny(2).eval()
    canvas = model.canvas({"token": ids(4, 4)})
    plain = MaskedBlocks(
        model.layout, model.factorization, model.embed, model.backbone, model.heads["token"], masking=model.judging
    ).eval()
    with torch.no_grad():
        assert torch.equal(model.losses(canvas, random=Generator(2)), plain.losses(canvas, random=Generator(2)))
    with pytest.raises(TypeError, match="no likelihood"):
        model.train().losses(canvas, strict=True)


# ---- where the first of a block is read ------------------------------------------------------------------------------


def test_reading_the_first_of_a_block_in_the_noisy_stream_is_caught():
    """As official training does; decoding reads the finished block before."""
    assert isinstance(fast_dllm_v2.mutant().model.factorization, NoisySide)
    with pytest.raises(Broken, match="read in decoding = read in training"):
        LAWS[8][1](fast_dllm_v2.mutant())
    assert "read in training" in LAWS[8][1](fast_dllm_v2.case())


def test_the_first_of_a_block_is_predicted_as_by_a_next_token_model():
    """Of what was hidden in the block before, and of its own block, it knows nothing but the tokens."""
    model, x = tiny(4, 8), ids(2, 8)
    canvas, first = model.canvas({"token": x}), torch.arange(8) == 4
    with torch.no_grad():
        alone = model.hidden_losses(canvas, first.expand(2, -1))
        among = model.hidden_losses(canvas, torch.ones(2, 8, dtype=torch.bool))
    assert torch.allclose(alone[:, 4], among[:, 4], rtol=0, atol=1e-12)
    other = x.clone()
    other[:, 5:] = 1 - x[:, 5:]
    with torch.no_grad():
        after = model.hidden_losses(model.canvas({"token": other}), first.expand(2, -1))
    assert torch.allclose(alone[:, 4], after[:, 4], rtol=0, atol=1e-12)


def test_the_step_that_decides_it_alone_feeds_no_masks():
    model = tiny(4, 8)
    for rank, slots in (([0] * 4 + [1] * 4, 5), (in_parts(8, 4, 2, True).tolist(), 1), ([0] * 4 + [1, 1, 2, 2], 5)):
        canvas = model.canvas({"token": ids(1, 8)}, 4)
        canvas = type(canvas)(canvas.layout, canvas.value, canvas.known, torch.tensor([rank]))
        plan = model.factorization.step(canvas, None, 3).check(model.mixers)
        assert plan.size == slots
    with pytest.raises(OrderError, match="the cache holds 4"):
        model.factorization.step(canvas, None, 4)


def test_what_follows_a_block_changes_nothing_in_it():
    """Longer texts, whatever stands there: nothing has to be padded."""
    model, x = tiny(3, 12), ids(2, 12)
    hidden = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        whole = model.hidden_losses(model.canvas({"token": x}), hidden)
        for length in (6, 9):
            short = model.canvas({"token": x[:, :length]}, layout=line(length))
            part = model.hidden_losses(short, hidden[:, :length])
            assert torch.allclose(part, whole[:, :length], rtol=0, atol=1e-12)
        short = model.canvas({"token": x[:, :8]}, layout=line(8))  # the last block is cut: others see less
        cut = model.hidden_losses(short, hidden[:, :8])
    assert torch.allclose(cut[:, :6], whole[:, :6], rtol=0, atol=1e-12) and bool((cut[:, 7] > 0).eq(hidden[:, 7]).all())


# ---- decoding --------------------------------------------------------------------------------------------------------


def steps_of(one, prompt=(1, 2, 3), new=29, sampling=GREEDY, seed=0, **more):
    """The text, the elements that each step decided, and its slots."""
    canvas = one.begun(prompt, new)
    known, decided, slots = canvas.known[0].clone(), [], []
    for step in decode(one.target(None, sampling, **more), canvas, one.decider(sampling), random=Keyed(seed)):
        decided.append((canvas.known[0] & ~known).nonzero()[:, 0].tolist())
        known = canvas.known[0].clone()
        slots.append(step.slots)
    return canvas.value["token"][0].tolist(), decided, slots


@pytest.mark.parametrize("size, block, part, shift, turns", [
    (8, 4, 2, True, [0, 1, 2, 2, 3, 4, 5, 5]), (8, 4, 2, False, [0, 0, 1, 1, 2, 2, 3, 3]),
    (6, 4, 4, True, [0, 1, 1, 1, 2, 3]), (5, 4, 4, False, [0, 0, 0, 0, 1]), (4, 1, 1, True, [0, 1, 2, 3]),
])  # fmt: skip
def test_parts_are_decided_one_after_another(size, block, part, shift, turns):
    assert in_parts(size, block, part, shift).tolist() == turns


def test_with_a_threshold_of_one_tokens_are_decided_one_by_one_the_surest_of_a_part_first():
    one = system(threshold=1.0)
    text, decided, _ = steps_of(one)
    assert [len(d) for d in decided] == [1] * 29
    turn = in_parts(32, 8, 4, True)
    order = [int(turn[e]) for (e,) in decided]
    assert order == sorted(order)
    plain = Unmask(Select("confidence", 1000))  # one token a step, without a threshold
    canvas = one.begun((1, 2, 3), 29)
    generate(one.target(None, GREEDY), canvas, plain, random=Keyed(0))
    assert canvas.value["token"][0].tolist() == text
    assert [e for (e,) in decided] != list(range(3, 32))


@pytest.mark.parametrize("part", [1, 2, 4, 8])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8)])
def test_the_cache_of_blocks_is_exact(part, sampling):
    one = system(part=part, threshold=0.3)
    cached, decided, slots = steps_of(one, sampling=sampling)
    fresh, again, more = steps_of(one, sampling=sampling, cached=False)
    assert (cached, decided) == (fresh, again)
    assert sum(slots) < sum(more) / 2


def test_the_cache_inside_a_block_is_exact_where_a_part_is_a_block_and_drifts_where_it_is_not():
    changed = 0
    for seed in range(3):
        one = system(seed, threshold=0.3)
        for part, exact in ((8, True), (2, False)):
            one.config = replace(one.config, part=part, reuse=False)
            plain = steps_of(one, sampling=GREEDY)
            one.config = replace(one.config, reuse=True)
            reused = steps_of(one, sampling=GREEDY)
            assert not exact or reused[:2] == plain[:2]
            assert sum(reused[2]) <= sum(plain[2])
            changed += reused[0] != plain[0]
    assert changed


def test_the_rows_that_are_read_inside_a_block_are_those_of_a_whole_forward_where_a_part_is_a_block():
    model, x = tiny(4, 12), ids(2, 12)
    rank = in_parts(12, 4, 4, True)[None]

    def rows(**more):
        met = []

        class Watched(Unmask):
            def decide(self, canvas, guess, rows, random):
                element = rows.element.expand(canvas.batch, -1)
                met.append(rows.dist.log_probs()[element >= 0])
                return super().decide(canvas, guess, rows, random)

        plain = model.canvas({"token": x.clone()}, 2)
        canvas = type(plain)(plain.layout, plain.value, plain.known, rank)
        generate(Target(model, **more), canvas, Watched(Select(commit=Above(1.0))), random=Keyed(0))
        return met

    fresh, reused = rows(cached=False), rows(policy=InsideBlock(4, 4))
    assert len(fresh) == len(reused)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(fresh, reused, strict=True))


def test_only_the_part_at_work_is_computed_once_its_first_token_is_known():
    """While it is not, the whole block is: it is read in the part before. A finished block is computed once more by the
    step that decides the first of the next one."""
    one = system(threshold=1.0, reuse=True)
    _, decided, slots = steps_of(one, prompt=(1, 2, 3, 4, 5, 6, 7, 8), new=16)
    want, known = [8], {8, *range(8)}
    for (e,) in decided[1:]:
        first = min(i for i in range(24) if i not in known)
        if first % 8 == 0:
            want.append(8)  # the block before, and no mask
        elif first % 4 == 0 or (first // 8, "whole") not in known:
            want.append(8)
        else:
            want.append(4)
        known |= {e, (first // 8, "whole")} if first % 8 else {e}
    assert slots == want and 4 in slots


def test_parts_of_one_write_from_left_to_right_with_masks_in_sight():
    """As a next-token model would that sees the masks of its block behind: each token by one forward over two streams,
    as in training."""
    one = system(part=1, block=4)
    text, decided, _ = steps_of(one, prompt=(1, 2, 3), new=13)
    assert [e for (e,) in decided] == list(range(3, 16))
    x = torch.tensor([text])
    x[:, 3:] = 0
    for e in range(3, 16):
        hidden = (torch.arange(16) >= e)[None]
        shown = one.model.shown(one.model.canvas({"token": x.clone()}, layout=line(16)), hidden)
        plan = one.model.factorization.packed(shown)
        said = one.model.dist(one.model.hidden(plan, shown), plan, shown)[0].log_probs()
        x[0, e] = said[0, plan.reads.element[0] == e].argmax()
    assert x[0].tolist() == text


def test_rows_of_a_batch_are_as_alone_whatever_the_cache():
    model, rank = tiny(4, 12), in_parts(12, 4, 2, True)[None]
    known = torch.arange(12) < torch.tensor([[1], [4], [7]])
    x = ids(3, 12, seed=4)

    def text(rows):
        plain = model.canvas({"token": x[rows].clone()}, known[rows], row=torch.tensor(rows))
        canvas = type(plain)(plain.layout, plain.value, plain.known, rank, row=plain.row)
        target = Target(model, policy=InsideBlock(4, 2))
        generate(target, canvas, Unmask(Select(commit=Above(0.6))), random=Keyed(3))
        return canvas.value["token"].tolist()

    assert text([0, 1, 2]) == [text([i])[0] for i in range(3)]


# ---- decoders of other block models ----------------------------------------------------------------------------------


def test_other_models_of_blocks_are_decided_in_parts_too():
    one = sdar.SDAR(sdar.Config(length=32, width=16, depth=2, heads=2, block=8))
    randomise(one.model)
    one.eval().requires_grad_(False)

    def trace(spec):
        steps: list = []
        text = "".join(one.stream([1, 2, 3], 29, GREEDY, decoding=decoder_of(one, spec, GREEDY), trace=steps))
        return text, [s.slots for s in steps]

    plain, exact = trace("unmask+block=4+threshold=0.5"), trace("fast-dllm+block=4+cache=none+threshold=0.5")
    assert plain == exact
    reused = trace("fast-dllm+block=4+threshold=0.5")[1]
    assert sum(reused) < sum(exact[1]) and 4 in reused
    with pytest.raises(ValueError, match="parts fill a block of 8"):
        trace("fast-dllm+block=3")
    with pytest.raises(ValueError, match="blocks of 8 tokens"):
        trace("unmask+block=3")


# ---- the system ------------------------------------------------------------------------------------------------------


def test_it_begins_with_the_weights_of_a_next_token_model():
    base = next_token.NextToken(next_token.Config(length=32, width=16, depth=1, heads=2))
    one = FastDLLMv2(Config(length=32, width=16, depth=1, heads=2))
    begin_as(one, base)
    mine, theirs = one.model.state_dict(), base.model.state_dict()
    assert set(mine) - set(theirs) == {"embed.mask"}
    assert all(torch.equal(mine[n], theirs[n]) for n in mine if n in theirs)


def test_begun_so_it_predicts_the_first_of_each_block_as_well_as_its_base():
    """Which reads it at the same place, from the same tokens: that part needs no learning."""
    base = next_token.NextToken(next_token.Config(length=12, width=16, depth=2, heads=2, vocab=5))
    randomise(base.model, std=0.3)
    one = FastDLLMv2(Config(length=12, width=16, depth=2, heads=2, vocab=5, block=1, part=1)).double().eval()
    begin_as(one, base)
    x = ids(2, 12, 5)
    with torch.no_grad():
        ours = one.model.hidden_losses(one.model.canvas({"token": x}, 1), torch.ones(2, 12, dtype=torch.bool))
        plain = fast_dllm_v2.Model(one.model.layout, fast_dllm_v2.Line(), *(one.model.embed, one.model.backbone),
                                   one.model.heads["token"])  # fmt: skip
        theirs = plain.losses(plain.canvas({"token": x}, 1))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"part": 3}, "parts fill a block of 8 elements"), ({"part": 0}, "parts fill"), ({"part": 16}, "parts fill"),
        ({"block": 64, "part": 64}, "a block holds 1 to 48 tokens"), ({"rule": "luck"}, "rule is random"),
        ({"window": 64}, "window up to 48"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        system(**settings)


def test_the_claims_figures_are_measured(monkeypatch):
    from types import SimpleNamespace

    one, texts = system(threshold=0.9), ["a line of a text, and another one of it, and so on" * 3] * 4
    monkeypatch.setattr(fast_dllm_v2, "held_out", lambda system, count, length: [[65, 66, 67, 68]] * count)
    trained = SimpleNamespace(system=one, data=SimpleNamespace(test=SimpleNamespace(documents=texts)))
    got, order = fast_dllm_v2.figures(trained, 2, 12), one.model.factorization
    assert isinstance(order, Blocks) and order.size == 8 and one.config.threshold == 0.9 and not one.config.reuse
    assert got["tokens_per_forward_1"] == 1.0 <= got["tokens_per_forward_0.9"] <= got["tokens_per_forward_0.7"]
    assert got["slots_per_token_reuse"] < got["slots_per_token"] and 0 <= got["changed_by_reuse"] <= 1
    assert got["bits_per_byte"] > 0 and got["bits_per_byte_other_block"] != got["bits_per_byte"]
    claim = fast_dllm_v2.CLAIM
    assert claim.arms[claim.ours].settings["batch"] == claim.arms[claim.baseline].settings["batch"]
