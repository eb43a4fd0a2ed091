"""The sampler layer of adjusted sampling: what it begins as, whom it sees, what it learns on, and that it learns."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from seriatim.canvas import DECIDED, GIVEN
from seriatim.decoding.adjust import Adjusted, described
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import Select
from seriatim.decoding.target import Target
from seriatim.decoding.unmask import Unmask
from seriatim.factorization.static import AnyOrder, KnownFirst
from seriatim.laws.case import randomise
from seriatim.laws.drafts import untrained
from seriatim.layout import line
from seriatim.plan import MASK, VALUE
from seriatim.posttraining.adjust import Adjust, AdjustConfig, begun, walked
from seriatim.posttraining.drafting import Base, load_part, save_part
from seriatim.random import Generator, Keyed, enumerate_law
from seriatim.systems.text.mdlm import MDLM, Config
from seriatim.systems.text.sdar import SDAR
from seriatim.systems.text.sdar import Config as Blocks
from seriatim.training.loop import fit
from seriatim.training.recipe import Recipe

VOCAB, LENGTH, WIDTH = 5, 12, 16


def system_of(cls=MDLM, config=Config, block=4, length=LENGTH, vocab=VOCAB, **more):
    shape = {"length": length, "vocab": vocab, "width": WIDTH, "depth": 2, "heads": 2} | more
    return cls(config(**shape, block=block), SimpleNamespace(special={}, vocab=vocab))


@pytest.fixture(scope="module")
def base():
    system = system_of()
    randomise(system.model)
    return Base(system.eval())


def ids(rows=3, seed=1):
    return torch.randint(VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def at(base, known, rows=1):
    """A canvas of which these elements are given, its plan, what stands in its slots, and their states."""
    mask = torch.zeros(rows, LENGTH, dtype=torch.bool)
    mask[:, list(known)] = True
    canvas = base.model.canvas({"token": ids(rows)}, mask)
    plan = base.model.factorization.step(canvas, None, 0)
    with torch.no_grad():
        return canvas, plan, base.model.vectors(plan, canvas), base.model.hidden(plan, canvas)


# ---- the layer -------------------------------------------------------------------------------------------------------


def test_at_first_nothing_changes_and_every_weight_but_the_gain_waits_for_it(base):
    part, (_, plan, e, h) = Adjust(AdjustConfig(), base).double(), at(base, [0, 3])
    assert torch.equal(part(e, h, plan), h)
    part(e, h, plan).square().sum().backward()
    assert float(part.gain.grad.abs().min()) > 0


def test_it_is_what_the_paper_says(base):
    """h + RMSNorm(layer(W [RMSNorm(e); RMSNorm(h)])), computed by hand but for the layer."""
    part, _ = untrained(Adjust, AdjustConfig(), base.system)
    _, plan, e, h = at(base, [0, 3])

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    pair = torch.cat([norm(e, part.token_gain), norm(h, part.state_gain)], -1)
    expected = h + norm(part.layer(pair @ part.fuse.T, plan), part.gain)
    assert torch.allclose(part(e, h, plan), expected, rtol=0, atol=1e-9)


def test_masked_places_that_change_places_change_their_states(base):
    """Permuting two slots together with their coordinates permutes what comes out: the order of slots means nothing."""
    part, _ = untrained(Adjust, AdjustConfig(), base.system)
    _, plan, e, h = at(base, [0, 3])
    order = torch.arange(LENGTH)
    order[[5, 9]] = order[[9, 5]]
    moved = part(e[:, order], h[:, order], plan.take(order[None]))
    assert torch.allclose(moved, part(e, h, plan)[:, order], rtol=0, atol=1e-9)
    assert not torch.allclose(part(e[:, order], h[:, order], plan), moved, rtol=0, atol=1e-3)  # coordinates count


def test_every_place_sees_every_other(base):
    part, _ = untrained(Adjust, AdjustConfig(), base.system)
    _, plan, e, h = at(base, [0, 3])
    for changed in (0, 3, 7, LENGTH - 1):
        other = e.clone()
        other[:, changed] += 1
        assert float((part(other, h, plan) - part(e, h, plan)).abs().amax(-1).min()) > 1e-6


def test_a_model_in_which_not_everybody_sees_everybody_is_refused():
    with pytest.raises(ValueError, match="everybody sees everybody"):
        Adjust(AdjustConfig(), Base(system_of(SDAR, Blocks)))
    causal = system_of()
    causal.model.factorization = KnownFirst()
    with pytest.raises(ValueError, match="everybody sees everybody"):
        Adjust(AdjustConfig(), Base(causal))
    for wrong in ({"unroll": 0}, {"rule": "surest"}):
        with pytest.raises(ValueError, match=r"at least once|rule is random"):
            AdjustConfig(**wrong)


def test_saved_and_loaded_it_is_the_same_and_fits_no_other_model(base, tmp_path):
    part, _ = untrained(Adjust, AdjustConfig(unroll=2), base.system)
    save_part(part, base, tmp_path)
    again, (_, plan, e, h) = load_part(tmp_path, base, Adjust), at(base, [0, 3])
    assert torch.equal(again(e, h, plan), part(e, h, plan))
    assert again.config == part.config
    other = system_of()
    randomise(other.model, 7)
    with pytest.raises(ValueError, match="fits the base it was trained for; seriatim train adjust --base"):
        load_part(tmp_path, Base(other), Adjust)


# ---- what it learns on -----------------------------------------------------------------------------------------------


def test_the_layer_is_unrolled_nearly_equally_often():
    """A softmax of the weights 1, 1/2, 1/4, and not the weights, of which the first would be 4/7."""
    lengths = AdjustConfig(unroll=3).lengths
    weights = [math.exp(0.5**i) for i in range(3)]
    assert torch.allclose(lengths, torch.tensor(weights, dtype=torch.float64) / sum(weights), rtol=0, atol=1e-12)
    assert float(lengths[0]) < 0.5


@pytest.mark.parametrize("block", [4, None])
def test_a_way_begins_anywhere_with_any_share_of_the_block_shown(block):
    system = system_of(block=block)
    randomise(system.model)
    one, x = Base(system), ids(8)
    starts, shares = set(), set()
    for seed in range(40):
        canvas = begun(one, x, 3, Generator(seed))
        given = (canvas.status == GIVEN).sum(1)
        shown = canvas.status == DECIDED
        assert len(set(given.tolist())) == 1
        assert bool((canvas.open.sum(1) >= 3).all())
        assert torch.equal(canvas.value["token"], x)  # of the text, nothing else
        within = (torch.arange(LENGTH) - given[:, None]) < (block or LENGTH)
        assert not bool((shown & ~within).any())
        assert bool((canvas.rank == 0).any(1).all())
        starts.add(int(given[0]))
        shares |= set(shown.sum(1).tolist())
    assert starts == set(range(LENGTH - 2))
    assert shares >= ({0, 1, 2, 3} if block else set(range(7)))
    with pytest.raises(ValueError, match="longer --window"):
        begun(one, x, LENGTH + 1, Generator(0))


def test_a_way_is_the_models_own_a_token_a_step(base):
    """States and vectors are those of canvases that plain unmasking meets; what it is to say next is of the block."""
    x = ids()
    canvas, plain = (begun(base, x, 4, Generator(5)) for _ in range(2))
    way = walked(base, canvas, 3, "entropy", Generator(2))
    target, random, one = Target(base.model, cached=False), Generator(2), Unmask(Select("entropy", LENGTH))
    for turn in range(4):
        plan = target.plan(plain)
        rows = target.forward(plan, plain)
        assert torch.equal(way.state[turn], rows.hidden)
        if turn:
            assert torch.equal(way.vectors[turn - 1], base.model.vectors(plan, plain))
        if turn < 3:
            plain.apply(one.decide(plain, None, rows, random).edits)
    assert torch.equal(canvas.status, plain.status)
    ranks = torch.where(plain.open, plain.rank, 99)
    assert torch.equal(way.next, plain.open & (ranks == ranks.amin(1, keepdim=True)))
    assert set(plan.slots.source.unique().tolist()) == {VALUE, MASK}


def test_the_loss_is_the_divergence_after_the_last_unroll_and_the_distance_of_states(base, monkeypatch):
    """By hand, for two unrolls; the base gets no gradient."""
    part = Adjust(AdjustConfig(unroll=2, feature=0.3), base)
    randomise(part)
    monkeypatch.setattr(AdjustConfig, "lengths", torch.tensor([0.0, 1.0]))
    total, count, figures = part.loss(base, ids(), Generator(3))
    random = Generator(3)
    torch.multinomial(torch.tensor([0.0, 1.0]), 1, generator=random.generator)
    way = walked(base, begun(base, ids(), 3, random), 2, "entropy", random)
    with torch.no_grad():
        h = part(way.vectors[1], part(way.vectors[0], way.state[0], way.plan), way.plan)
    kl = far = 0.0
    for b, s in way.next.nonzero().tolist():
        p, q = (torch.softmax(base.logits(state[b, s]).detach(), -1) for state in (way.state[2], h))
        kl += float((p * (p / q).log()).sum())
        gap = (h - way.state[2])[b, s].abs()
        far += float(torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean())
    assert int(count) == int(way.next.sum())
    assert abs(float(total.detach()) - (kl + 0.3 * far)) < 1e-4
    assert abs(figures["kl"] - kl / int(count)) < 1e-5
    learner = part.learner(base)
    total, _ = learner({"token": ids()}, Generator(3), 0, 1)
    total.backward()
    assert all(p.grad is None for p in base.model.parameters())
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in part.parameters())


def test_of_a_shifted_model_states_stand_where_they_are_read():
    """Each element is read one slot before its own: with the model itself as sampler, several tokens a forward are one
    a forward, and ways hold states by the elements that they describe."""
    system = system_of(block=None)
    system.model.factorization = AnyOrder(shift=True)
    randomise(system.model)
    system.eval()

    def text(sampler, tokens):
        canvas = system.blocked(system.model.canvas({"token": ids(1)}, 2), LENGTH)
        way = Adjusted(Unmask(Select("entropy", LENGTH)), sampler, tokens)
        return generate(Target(system.model), canvas, way, way, Keyed(1)).value["token"].tolist()

    def itself(e, h, plan):
        return described(system.model.backbone(e, plan), system.model)

    plain = text(None, 1)
    assert text(itself, 4) == plain
    assert text(lambda e, h, plan: system.model.backbone(e, plan), 4) != plain
    way = walked(Base(system), begun(Base(system), ids(), 3, Generator(0)), 2, "entropy", Generator(1))
    raw = system.model.backbone(way.vectors[-1], way.plan)
    assert torch.allclose(way.state[-1][:, 1:], raw[:, :-1], rtol=0, atol=1e-9)
    assert torch.allclose(way.state[-1][:, 0], raw[:, 0], rtol=0, atol=1e-9)


# ---- that it learns --------------------------------------------------------------------------------------------------


def divergence(p, q):
    return sum(x * math.log(x / q[k]) for k, x in p.items() if x > 0)


def test_after_training_several_tokens_a_forward_come_near_the_joint_law():
    """Texts of three tokens that are all alike, of three kinds: independent tokens cost their total correlation, about
    2 ln 3 = 2.2 nats, and adjusted ones a tenth of that. One token a forward is what it was. Enumerated exactly."""
    system, size = system_of(block=None, length=3, vocab=3), 3

    def texts(n, generator):
        return torch.randint(3, (n, 1), generator=generator).expand(n, size).contiguous()

    recipe = Recipe(120, 32, 1e-2, weight_decay=0.0)
    fit(system.model, lambda n, g: (system.model.canvas({"token": texts(n, g)}), None), recipe)
    base = Base(system.eval())
    torch.manual_seed(0)
    part = Adjust(AdjustConfig(unroll=2), base)

    def law(tokens, sampler):
        def run(random):
            canvas = system.blocked(
                system.model.canvas({"token": torch.zeros(1, size).long()}, layout=line(size)), size
            )
            way = Adjusted(Unmask(Select("entropy", size)), sampler, tokens)
            return tuple(generate(Target(system.model), canvas, way, way, random).value["token"][0].tolist())

        return enumerate_law(run)

    joint = law(1, part)
    independent = divergence(joint, law(3, part))  # as it begins
    assert abs(independent - divergence(joint, law(3, lambda e, h, plan: h))) < 1e-9
    learner, g = part.learner(base), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(part.parameters(), 1e-2, weight_decay=0.0)
    for step in range(100):
        total, count = learner({"token": texts(32, g)}, Generator(step), step, 100)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    part.eval().requires_grad_(False)
    assert independent > 1.5
    assert divergence(joint, law(3, part)) < 0.15 * independent
    assert law(1, part) == joint
