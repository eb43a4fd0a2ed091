"""CtrlDiff: blocks of any lengths, a policy that chooses them, and how it learns."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from seriatim.canvas import Canvas, Reorder, Set
from seriatim.decoding.lengths import Blind, Chosen, InLengths, LengthPolicy, Written, begun
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import Select, schedule
from seriatim.decoding.target import Target
from seriatim.factorization.static import Blocks
from seriatim.factorization.varying import VaryingBlocks, in_blocks
from seriatim.laws.case import randomise
from seriatim.laws.enumeration import enumerate_rows
from seriatim.objectives.masked import by_time
from seriatim.plan import OrderError
from seriatim.posttraining.lengths import Cut, Pacing, cut
from seriatim.random import Generator, Keyed
from seriatim.systems.system import Sampling
from seriatim.systems.text import ctrldiff, mdlm, sdar
from seriatim.tokenizers.text import ByteTokenizer
from seriatim.verbs.load import load
from seriatim.verbs.train import train

LISTS = [(1, 1, 1, 1), (2, 2), (1, 3), (3, 1), (1, 2, 1), (4,)]
SMALL = {"width": 16, "depth": 1, "heads": 2, "length": 32, "batch": 2}


def tiny(most=4, length=4, vocab=2, seed=0):
    return ctrldiff.tiny(most, length, vocab, seed)


def blank(model, lengths, rows=1, row=None):
    n = model.layout.size
    rank = in_blocks(torch.tensor(lengths).view(-1, len(lengths)) if isinstance(lengths, tuple) else lengths, n)
    return Canvas(model.layout, {"token": torch.zeros(rows, n, dtype=torch.long)}, 0, rank, row)


def texts(length=4, vocab=2):
    return torch.tensor(list(itertools.product(range(vocab), repeat=length)))


def bound_of(model, x, lengths):
    """The mean over every draw of what is hidden of each block, by enumeration."""
    canvas, start = ctrldiff.cut_into(model, x, lengths), 0
    total = torch.zeros(len(x), dtype=torch.float64)
    with torch.no_grad():
        for n in lengths:
            for count in range(1, n + 1):
                sets = list(itertools.combinations(range(start, start + n), count))
                for some in sets:
                    hidden = torch.isin(torch.arange(x.shape[1]), torch.tensor(some)).expand(len(x), -1)
                    total += model.hidden_losses(canvas, hidden).sum(1) / count / len(sets)
            start += n
    return total


# ---- blocks of any lengths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_constant_lengths_are_fixed_blocks_in_mask_slots_and_steps(size):
    n = 6
    fixed, varying = Blocks(size, "any"), VaryingBlocks(6)
    lengths = tuple(min(size, n - s) for s in range(0, n, size))
    one = tiny(6, n)
    for known in ([], [0], [0, 1, 4], list(range(size))):
        mask = torch.isin(torch.arange(n), torch.tensor(known, dtype=torch.long))[None]
        ours = blank(one, lengths)
        theirs = Canvas(one.layout, ours.value, 0, fixed.order(one.layout))
        for canvas in (ours, theirs):
            canvas.apply([Set(canvas.value["token"], torch.where(mask, torch.arange(n), -1))])
        steps = varying.step(ours, None, 0), fixed.step(theirs, None, 0)
        for a, b in ((varying.packed(ours), fixed.packed(theirs)), steps):
            assert torch.equal(a.views["all"].mask(), b.views["all"].mask())
            for name in ("element", "source", "needs", "coord"):
                assert torch.equal(getattr(a.slots, name), getattr(b.slots, name)), name
            assert torch.equal(a.rank, b.rank)
            live_a, live_b = a.reads.element >= 0, b.reads.element >= 0
            assert torch.equal(a.reads.element[live_a], b.reads.element[live_b])
            assert torch.equal(a.reads.slot[live_a], b.reads.slot[live_b])
        assert torch.equal(steps[0].kept, steps[1].kept)


def test_without_ranks_of_its_own_a_canvas_has_fixed_blocks_behind_any_prompt():
    fixed, varying, one = Blocks(3, "any"), VaryingBlocks(3), tiny(3, 8)
    for given in range(8):
        canvas = one.canvas({"token": torch.zeros(1, 8, dtype=torch.long)}, given)
        assert torch.equal(varying.block(canvas), fixed.block(canvas)), given


@pytest.mark.parametrize("lengths", LISTS)
def test_no_block_peeks(lengths):
    one = tiny()
    canvas = blank(one, lengths)
    assert not one.factorization.packed(canvas).leaks(one.mixers)


@pytest.mark.parametrize("lengths", LISTS)
def test_the_bound_is_at_least_the_samplers_surprise_and_equal_for_blocks_of_one(lengths):
    """The sampler decides one token at a time, in random order inside blocks; its law by enumeration."""
    one = tiny()

    def run(random, rows):
        canvas = blank(one, lengths, rows)
        generate(Target(one), canvas, Select("random", 4), random=random)
        return [tuple(x) for x in canvas.value["token"].tolist()]

    law = enumerate_rows(run)
    x = torch.tensor(list(law))
    surprise = -torch.tensor(list(law.values()), dtype=torch.float64).log()
    gap = bound_of(one, x, lengths) - surprise
    assert len(law) == 16 and float(gap.min()) > -1e-9
    assert (float(gap.abs().max()) < 1e-9) == (max(lengths) == 1)


def test_rows_with_blocks_of_their_own_are_decided_as_alone_with_and_without_the_cache():
    one = tiny(8, 12, 3)

    def decider():  # at random: all masks of a first block are alike, and rounding would say which is the surest
        return Select("random", 2)

    lengths = torch.tensor([[2, 4, 1, 5], [3, 3, 3, 3], [1, 1, 8, 2]])
    slots = {}
    for cached in (True, False):
        canvas = blank(one, lengths, 3)
        steps = list(decode(Target(one, cached=cached), canvas, decider(), random=Keyed(1)))
        slots[cached] = sum(step.slots for step in steps)
        assert len(steps) == 8  # of the row with four blocks
        for row in range(3):
            alone = blank(one, lengths[row : row + 1], 1, torch.tensor([row]))
            generate(Target(one, cached=cached), alone, decider(), random=Keyed(1))
            assert torch.equal(alone.value["token"][0], canvas.value["token"][row])
    assert slots[True] < 0.8 * slots[False]


@pytest.mark.parametrize("lengths", LISTS)
def test_each_block_is_hidden_at_a_time_of_its_own(lengths):
    model, batch = tiny().train(), 400
    canvas = ctrldiff.cut_into(model, torch.zeros(batch, 4, dtype=torch.long), lengths)
    hidden, weight = model.drawn(canvas, Generator(1))
    block = model.factorization.block(canvas)[0].tolist()
    t = 1 / weight
    for i, j in itertools.combinations(range(4), 2):
        assert torch.equal(t[:, i], t[:, j]) == (block[i] == block[j])
    assert torch.allclose(t[:, 0].sort().values, (torch.arange(batch) + 0.5) / batch, atol=2 / batch + 1e-3)
    assert model.masking is by_time and abs(float((hidden * weight).double().mean()) - 1) < 0.35


def test_ranks_that_fall_and_lengths_that_do_not_reach_are_refused():
    one = tiny()
    canvas = Canvas(one.layout, {"token": torch.zeros(1, 4, dtype=torch.long)}, 0, torch.tensor([[1, 1, 0, 0]]))
    with pytest.raises(OrderError, match="ranks fall"):
        one.factorization.packed(canvas)
    with pytest.raises(ValueError, match="and 4 in all"):
        in_blocks(torch.tensor([[2, 1]]), 4)
    canvas = blank(one, (2, 2))
    with pytest.raises(OrderError, match="finished stay"):
        one.factorization.step(canvas, None, 2)


# ---- lengths chosen on the way ---------------------------------------------------------------------------------------


class Noted:
    """All sizes alike; notes what it was shown."""

    memory = 3

    def __init__(self, sizes):
        self.sizes, self.seen = sizes, []

    def logits(self, written):
        self.seen.append(written)
        return torch.zeros(len(written.there), len(self.sizes))


def test_what_is_chosen_stands_on_the_canvas_and_rows_differ():
    one, log = tiny(4, 24, 3), []
    sizes = (1, 2, 4)
    rank = begun(sizes, 24)
    canvas = Canvas(one.layout, {"token": torch.zeros(8, 24, dtype=torch.long)}, 0, rank)
    steps = list(decode(Target(one), canvas, InLengths(Select("random", 2), Noted(sizes), log=log), random=Keyed(0)))
    assert canvas.done
    block = one.factorization.block(canvas)
    lengths = [[int((b == k).sum()) for k in range(int(b.max()) + 1)] for b in block]
    assert len({tuple(x) for x in lengths}) > 4
    for row, found in enumerate(lengths):
        chosen = [sizes[int(c.option[i])] for c in log for i in (c.row == row).nonzero()[:, 0].tolist()]
        blocks = [int(c.block[i]) for c in log for i in (c.row == row).nonzero()[:, 0].tolist()]
        assert found[0] == 1 and blocks == list(range(1, len(found)))
        assert found[1:-1] == chosen[:-1] and found[-1] <= chosen[-1]
    assert len(steps) == max(sum(min(n, 2) for n in found) for found in lengths)


def test_a_policy_sees_states_and_entropies_of_the_steps_that_decided_a_block():
    """Against a forward of its own for each step."""
    one, lengths = tiny(4, 8, 3), Noted((2,))
    canvas, noted = blank(one, (2, 2, 2, 2)), []

    class Watched(Select):
        def decide(self, canvas, guess, rows, random):
            step = super().decide(canvas, guess, rows, random)
            element = int(step.edits[0].element.max())
            column = rows.element[0].tolist().index(element)
            noted.append((element, rows.hidden[0, int(rows.slot[0, column])], float(rows.said.entropy()[0, column])))
            return step

    generate(Target(one), canvas, InLengths(Watched("random", 2), lengths), random=Keyed(0))
    assert len(noted) == 8 and len(lengths.seen) == 3
    for n, written in enumerate(lengths.seen):
        assert written.there.tolist() == [n + 1]
        for back in range(n + 1):
            two = noted[2 * (n - back) : 2 * (n - back) + 2]
            assert {e for e, _, _ in two} == {2 * (n - back), 2 * (n - back) + 1}
            state = torch.nn.functional.layer_norm((two[0][1] + two[1][1]).float() / 2, (16,))
            torch.testing.assert_close(written.blocks[0, back, :16], state)
            entropies = [h for _, _, h in two]
            want = torch.tensor([sum(entropies) / 2, max(entropies)])
            torch.testing.assert_close(written.blocks[0, back, 16:], want)


def test_a_fresh_policy_finds_all_sizes_alike_and_pools_only_blocks_that_there_are():
    policy = LengthPolicy(6, (1, 2, 4), memory=3)
    blocks = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    there = torch.tensor([1, 2, 3, 4, 9])
    assert bool((policy.logits(Written(blocks, there)) == 0).all())
    torch.nn.init.normal_(policy.outer.weight, generator=torch.Generator().manual_seed(0))
    other = blocks.clone()
    other[0, 1:], other[1, 2:] = 7, 7
    torch.testing.assert_close(policy.logits(Written(blocks, there)), policy.logits(Written(other, there)))
    assert not torch.equal(policy.logits(Written(blocks, there)), policy.logits(Written(blocks + 1, there)))


def test_an_end_behind_what_is_decided_may_move_and_what_is_known_keeps_its_rank():
    one = tiny(4, 6)
    canvas = blank(one, (2, 4))
    generate_one = decode(Target(one), canvas, Select("random", 1), random=Keyed(0))
    next(generate_one)
    canvas.apply([Reorder(torch.tensor([[5, 5, 1, 2, 2, 2]]))])
    assert canvas.rank.tolist() == [[0, 0, 1, 2, 2, 2]]
    next(generate_one)
    assert canvas.known.tolist() == [[True] * 3 + [False] * 3]


# ---- how it learns ---------------------------------------------------------------------------------------------------


def test_a_text_that_is_cut_costs_what_its_steps_say():
    one = tiny(4, 8, 3)
    x = torch.randint(3, (5, 8), generator=torch.Generator().manual_seed(0))
    made = cut(one, x, Blind((1, 2, 4), (0.2, 0.4, 0.4)), 2, Generator(3))
    assert made.length.sum(1).tolist() == [8] * 5
    for row in range(5):
        lengths = [n for n in made.length[row].tolist() if n]
        assert made.forwards[row].tolist()[: len(lengths)] == [min(n, 2) for n in lengths]
        assert made.block[row].tolist() == [k for k, n in enumerate(lengths) for _ in range(n)]
    cost = made.cost(0.25)
    assert torch.allclose(cost.sum(1), made.nats.sum(1) + 0.25 * made.forwards.sum(1))


@pytest.mark.parametrize("lengths, steps", [((4,), 2), ((4,), 4), ((2,), 1)])
def test_what_a_cut_text_costs_is_the_samplers_bound_in_the_mean(lengths, steps):
    """Over many draws, against the mean over every draw of the steps' groups; one in 1e4 such tests fails by chance."""
    one, (size,) = tiny(), lengths
    x = torch.tensor([[0, 1, 1, 0]])
    rows = 4000
    made = cut(one, x.expand(rows, -1), Blind(lengths), steps, Generator(0))
    canvas, want = ctrldiff.cut_into(one, x, (size,) * (4 // size)), 0.0
    left = (size, *schedule(size, steps, "linear"))
    with torch.no_grad():
        for start in range(0, 4, size):
            for before, after in itertools.pairwise(left):
                sets = list(itertools.combinations(range(start, start + size), before))
                for some in sets:
                    hidden = torch.isin(torch.arange(4), torch.tensor(some))[None]
                    want += float(one.hidden_losses(canvas, hidden).sum()) * (before - after) / before / len(sets)
    each = made.nats.sum(1)
    error = float(each.std()) / math.sqrt(rows)
    assert abs(float(each.mean()) - want) < 4 * error + 1e-9


def alone(made, row):
    """One of several texts."""
    choices = []
    for c in made.choices:
        mine = c.row == row
        choices.append(Chosen(torch.zeros_like(c.row[mine]), c.block[mine], c.option[mine], c.written.take(mine)))
    return Cut(*(part[row : row + 1] for part in made[:4]), choices)


def test_the_policys_gradient_is_that_of_the_expected_cost():
    """Two sizes, texts of five tokens, one forward a block: every way to cut is enumerated, and so is the gradient's
    expectation; finite differences along random directions."""
    torch.manual_seed(0)
    one, sizes, price = tiny(2, 5), (1, 2), 0.7
    pacing = Pacing(LengthPolicy(16, sizes, memory=2, hidden=4).double(), 1, price, 1.0)
    for p in pacing.policy.parameters():
        torch.nn.init.normal_(p, std=0.7)
    x = torch.tensor([[0, 1, 1, 0, 1]])

    def ways():
        """Every way to cut with its probability, its costs and choices."""
        found = {}

        def run(random, rows):
            made = cut(one, x.expand(rows, -1), pacing.policy, 1, random)
            every = [alone(made, row) for row in range(rows)]
            names = [(*one.block[0].tolist(), *(int(o) for c in one.choices for o in c.option)) for one in every]
            found.update(zip(names, every, strict=True))
            return names

        return [(p, found[way]) for way, p in enumerate_rows(run).items()]

    def expected():
        return sum(p * float(made.cost(price).sum()) for p, made in ways())

    every = ways()
    assert len(every) == 8 and abs(sum(p for p, _ in every) - 1) < 1e-12  # one token, then ones and twos
    for mean in (0.0, 1.3):  # whatever the baseline
        pacing.zero_grad()
        total = sum(p * pacing.surrogate(made, pacing.advantages(made, mean)).sum() for p, made in every)
        total.backward()
        g = torch.Generator().manual_seed(1)
        for _ in range(3):
            direction = [torch.randn(q.shape, generator=g, dtype=q.dtype) for q in pacing.policy.parameters()]
            values = []
            for sign in (1, -1, 0):
                with torch.no_grad():
                    for q, d in zip(pacing.policy.parameters(), direction, strict=True):
                        q.add_(d, alpha=sign * 1e-5)
                    values.append(expected() if sign else 0.0)
                    for q, d in zip(pacing.policy.parameters(), direction, strict=True):
                        q.sub_(d, alpha=sign * 1e-5)
            slope = (values[0] - values[1]) / 2e-5
            mine = sum(float((q.grad * d).sum()) for q, d in zip(pacing.policy.parameters(), direction, strict=True))
            assert abs(mine - slope) < 1e-5 * max(abs(slope), 0.1)


def test_a_policy_learns_long_blocks_where_forwards_are_dear_and_short_ones_where_they_cost_nothing():
    one = tiny(4, 12).float()
    ids = torch.zeros(8, 12, dtype=torch.long)
    with torch.no_grad():
        short, long = (float(cut(one, ids, Blind((n,)), 1, Generator(9)).nats.mean()) for n in (1, 4))
    assert long > short + 0.3  # the tokens tell of each other
    for price, tokens in ((20.0, 3.0), (0.0, 1.0)):  # of a block, the first of which has one
        torch.manual_seed(0)
        pacing = Pacing(LengthPolicy(16, (1, 4)), 1, price, 0.5)
        optimizer = torch.optim.Adam(pacing.parameters(), 0.1)
        for step in range(20):
            loss, figures = pacing.loss(one, ids, Generator(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert abs(figures["tokens_per_block"] - tokens) < 0.3


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200, encoding="utf-8")
    return path


def test_base_and_policy_are_trained_together_kept_together_and_resumed_bit_for_bit(book, tmp_path):
    settings = {**SMALL, "steps": 6, "learns": 0.3, "paced": 24}
    whole = train("ctrldiff", book, out=tmp_path / "whole", settings=settings)
    assert [("tokens_per_block" in h) for h in whole.history] == [False, False, True, True, True, True]

    class Cutting:
        def update(self, step, steps, figures):
            if step == 4:
                raise KeyboardInterrupt

        def close(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        train("ctrldiff", book, out=tmp_path / "cut", settings=settings, bar=lambda name: Cutting())
    again = train("ctrldiff", book, out=tmp_path / "cut", settings=settings, resume=True)
    loaded = load(tmp_path / "cut")
    for other in (again.system, loaded):
        one, two = whole.system.state_dict(), other.state_dict()
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert float(loaded.pacing.seen) > 0 and bool((loaded.pacing.policy.outer.weight != 0).any())


def test_the_policy_leaves_the_loss_and_gradients_of_the_base_alone(book):
    torch.manual_seed(0)
    system = ctrldiff.CtrlDiff(ctrldiff.Config(length=32, width=16, depth=1, heads=2), ByteTokenizer())
    batch = {"token": torch.randint(272, (2, 32), generator=torch.Generator().manual_seed(0))}
    found = []
    for step in (0, 9):
        system.zero_grad()
        total, count = system.train()(batch, Generator(1), step, 10)
        total.backward()
        found.append((float(total.detach()), int(count), [p.grad.clone() for p in system.model.parameters()]))
        heard = any(bool((p.grad != 0).any()) for p in system.pacing.parameters())
        assert heard == (step == 9)
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))


def test_it_begins_as_a_next_token_model_and_writes_in_blocks_of_any_choice(book, tmp_path):
    base = tmp_path / "base"
    train("next-token", book, out=base, settings={**SMALL, "length": 64, "steps": 1})
    made = train("ctrldiff", book, from_=base, out=tmp_path / "run", settings={"steps": 2, "batch": 2, "window": 32})
    system = load(tmp_path / "run")
    assert made.system.config.width == 16 and system.config.window == 32
    for prompt in ("", "abc", "a" * 16, "b" * 20):
        trace = []
        "".join(system.stream(prompt, 30, Sampling(temperature=1.0), trace=trace))
        assert 3 <= len(trace) <= 30
    canvas = system.prompted("abcde", 40)
    assert system.model.factorization.block(canvas)[0].tolist() == [0] * 16 + [1] * 16 + [2] * 13
    canvas = system.blocked(canvas, 4)
    assert system.model.factorization.block(canvas)[0].tolist()[:20] == [0] * 16 + [1] * 4
    canvas = system.blocked(canvas, (11, 3, 30))
    assert system.model.factorization.block(canvas)[0].tolist() == [0] * 16 + [1] * 3 + [2] * 26


def test_a_config_says_what_is_wrong():
    assert ctrldiff.Config(lengths="1, 2,8").lengths == (1, 2, 8)  # type: ignore[arg-type]
    for wrong, said in (
        ({"lengths": (0, 2)}, "1 to 512 tokens"), ({"lengths": (2, 64), "window": 32}, "1 to 32"),
        ({"learns": 2.0}, "share of the training"), ({"steps": 0}, "at least one step"), ({"rule": "luck"}, "rule is"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            ctrldiff.Config(**wrong)
    with pytest.raises(ValueError, match="each with a share"):
        Blind((2, 4))
    with pytest.raises(ValueError, match="at least 1 element"):
        LengthPolicy(4, (0,))
    with pytest.raises(ValueError, match="discount a share"):
        Pacing(LengthPolicy(4, (2,)), 1, 1.0, 2.0)
    assert mdlm.MDLM.bound is sdar.SDAR.bound is ctrldiff.CtrlDiff.bound


@pytest.mark.slow  # it reads the standard library
def test_what_the_claim_measures():
    """On a tiny model and its own tokenizer: figures of each kind of lengths."""
    torch.manual_seed(0)
    system = ctrldiff.CtrlDiff(ctrldiff.Config(length=32, width=16, depth=1, heads=2), ByteTokenizer())
    randomise(system.pacing.policy, std=3.0).float()
    system.eval().requires_grad_(False)
    policy = ctrldiff.written(system, system.pacing.policy, 0, windows=6)
    assert abs(sum(policy["shares"]) - 1) < 1e-6 and 1 <= policy["tokens_per_forward"] <= 8
    four = ctrldiff.written(system, Blind((4,)), 0, windows=6)
    assert four["tokens_per_forward"] == 2 and four["shares"] == [1.0]
    nats = four["cost"] - system.config.price / 2
    assert four["bits_per_byte"] == pytest.approx(nats / math.log(2), rel=0.02)  # a token is a byte, ends aside
