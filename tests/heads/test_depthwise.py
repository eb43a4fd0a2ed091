"""A head of several codes an element: one law, in one pass and code by code, guided and filtered at every depth."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.conditions.condition import ClassCondition
from seriatim.decoding.filters import Warper
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import CodesEmbed
from seriatim.factorization.line import Line
from seriatim.heads.depthwise import Depthwise, DepthwiseHead
from seriatim.heads.dist import Categorical
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.random import Generator, Key, Keyed, enumerate_law

WIDTH, V = 8, 3
PLAIN, ADALN = TransformerConfig(12, 2, 2), TransformerConfig(12, 2, 2, vector=6, rope=RoPE())
SHAPES = [(depth, feed, config) for depth in (1, 2, 3) for feed in ("sum", "last") for config in (PLAIN, ADALN)]
every_shape = pytest.mark.parametrize("depth, feed, config", SHAPES)


def head_of(depth=3, feed="sum", config=PLAIN, kind=DepthwiseHead):
    return randomise(kind(WIDTH, V, depth, config, feed))


def states(b=2, m=3, seed=0):
    return torch.randn(b, m, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dist_of(head, seed=0, b=2, m=3):
    return head.dist(states(b, m, seed), None, None)


def codes(depth, b=2, m=3, seed=1):
    return torch.randint(V, (b, m, depth), generator=torch.Generator().manual_seed(seed))


def key(b=2, element=0):
    return Key(torch.arange(b), element)


def every_value(depth):
    return torch.tensor(list(itertools.product(range(V), repeat=depth)))


def mass(dist):
    """The probability of all values of each read-out together."""
    _, b, m, _ = dist.states.shape
    return sum(dist.log_prob(x.expand(b, m, -1)).exp() for x in every_value(dist.head.depth))


def gap(dist, forced_codes):
    """How far the law of drawing code by code is from that of one pass, on some values."""
    worst = 0.0
    for seed in range(5):
        x = codes(dist.head.depth, seed=seed)
        random = forced_codes(x)
        assert torch.equal(dist.sample(random, key()), x)
        worst = max(worst, float((random.log_prob - dist.log_prob(x).sum(1)).abs().max()))
    return worst


def row(dist, x, depth):
    """log p(code `depth` | codes above it in x), for all its values."""
    options = []
    for v in range(V):
        y = x.clone()
        y[..., depth] = v
        options.append(dist.log_probs(y)[..., depth])
    return torch.stack(options, -1)


# ---- one law ---------------------------------------------------------------------------------------------------------


@every_shape
@torch.no_grad()
def test_one_pass_equals_code_by_code(depth, feed, config, forced_codes):
    assert gap(dist_of(head_of(depth, feed, config)), forced_codes) < 1e-12


@every_shape
@torch.no_grad()
def test_the_probabilities_of_all_values_sum_to_one(depth, feed, config):
    torch.testing.assert_close(
        mass(dist_of(head_of(depth, feed, config))), torch.ones(2, 3).double(), rtol=0, atol=1e-12
    )


@every_shape
@torch.no_grad()
def test_the_law_of_the_sampler_is_that_of_log_prob(depth, feed, config):
    dist = dist_of(head_of(depth, feed, config), b=1, m=1)
    law = enumerate_law(lambda random: tuple(dist.sample(random, key(1)).flatten().tolist()))
    want = dist_of(dist.head, b=1, m=1)
    got = torch.tensor([law[tuple(x.tolist())] for x in every_value(depth)], dtype=torch.float64)
    exact = torch.stack([want.log_prob(x[None, None]).exp()[0, 0] for x in every_value(depth)])
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)


@torch.no_grad()
def test_values_drawn_at_random_come_with_their_probabilities():
    """A chi-squared test over 9 values, 20,000 draws, error rate 0.001."""
    dist = dist_of(head_of(depth=2), b=1, m=1)
    many = Depthwise(dist.head, dist.states.expand(1, 1, 20_000, -1))
    x = many.sample(Generator(0), key(1))[0]
    count = torch.bincount(x[:, 0] * V + x[:, 1], minlength=9).double()
    want = 20_000 * torch.stack([dist.log_prob(v[None, None]).exp()[0, 0] for v in every_value(2)])
    assert float(((count - want).square() / want).sum()) < 26.12


@pytest.mark.parametrize("feed", ["sum", "last"])
@torch.no_grad()
def test_a_code_depends_on_all_codes_above_it_and_on_none_below(feed):
    depth = 4
    dist = dist_of(head_of(depth, feed))
    x = codes(depth)
    for j in range(depth):
        y = x.clone()
        y[..., j] = (y[..., j] + 1) % V
        changed = (dist.log_probs(y) - dist.log_probs(x)).abs().amin((0, 1))
        assert bool((changed[:j] == 0).all()), f"code {j} reached a code above it"
        assert bool((changed[j + 1 :] > 1e-6).all()), f"code {j} reached not all codes below it"


@torch.no_grad()
def test_every_code_depends_on_the_hidden_state():
    head, x = head_of(), codes(3)
    changed = (dist_of(head, 0).log_probs(x) - dist_of(head, 5).log_probs(x)).abs().amin((0, 1))
    assert bool((changed > 1e-6).all())


@torch.no_grad()
def test_one_code_is_a_categorical_with_the_same_logits(forced_codes):
    head = head_of(depth=1)
    a, b = dist_of(head, 0), dist_of(head, 5)
    flat = [Categorical(row(d, codes(1), 0)) for d in (a, b)]
    x = codes(1)
    torch.testing.assert_close(a.log_prob(x), flat[0].log_prob(x[..., 0]), rtol=0, atol=1e-12)
    assert torch.equal(a.sample(Keyed(3), key())[..., 0], flat[0].sample(Keyed(3), key()))
    mixed = (a.mix([b], [2.5, -1.5]), flat[0].mix([flat[1]], [2.5, -1.5]))
    torch.testing.assert_close(mixed[0].log_prob(x), mixed[1].log_prob(x[..., 0]), rtol=0, atol=1e-12)
    warp = Warper(temperature=0.7, top_k=2)
    y = a.warped(warp).sample(Keyed(4), key())
    assert torch.equal(y[..., 0], warp(flat[0]).sample(Keyed(4), key()))


@pytest.mark.parametrize("feed", ["sum", "last"])
@torch.no_grad()
def test_a_slot_carries_the_hidden_state_or_the_codes_above_it(feed):
    """All of them added up (a residual quantizer's partial reconstruction), or the last; and its place."""
    head, x = head_of(4, feed), codes(4)
    got = head.feed(head.state(states())[None], x, slice(0, 4))[0]
    for b, m in itertools.product(range(2), range(3)):
        vectors = [head.table[i, x[b, m, i]] for i in range(3)]
        torch.testing.assert_close(got[b, m, 0], head.state(states()[b, m]) + head.place[0])
        for j in range(1, 4):
            want = sum(vectors[:j]) if feed == "sum" else vectors[j - 1]
            torch.testing.assert_close(got[b, m, j], want + head.place[j])
            alone = head.feed(head.state(states())[None], x, slice(j, j + 1))[0]
            torch.testing.assert_close(alone[b, m, 0], got[b, m, j])


# ---- training --------------------------------------------------------------------------------------------------------


@every_shape
def test_the_loss_is_the_negative_log_probability_and_reaches_every_parameter(depth, feed, config):
    head = head_of(depth, feed, config)
    h, x = states().requires_grad_(), codes(depth)
    loss = head.loss(h, None, x)
    assert torch.equal(loss, -dist_of(head).log_prob(x))
    loss.square().sum().backward()
    assert h.grad is not None and bool((h.grad.abs().sum(-1) > 0).all())
    starved = [name for name, p in head.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert starved == [], f"no gradient reaches {', '.join(starved)}"


# ---- guidance and filters --------------------------------------------------------------------------------------------


@every_shape
@torch.no_grad()
def test_branches_are_mixed_at_every_depth(depth, feed, config, forced_codes):
    head = head_of(depth, feed, config)
    yes, no, w = dist_of(head, 0), dist_of(head, 5), 1.7
    mixed = yes.mix([no], [1 + w, -w])
    x = codes(depth)
    for j in range(depth):
        hand = torch.log_softmax((1 + w) * row(yes, x, j) - w * row(no, x, j), -1)
        torch.testing.assert_close(row(mixed, x, j), hand, rtol=0, atol=1e-12)
    torch.testing.assert_close(mass(mixed), torch.ones(2, 3).double(), rtol=0, atol=1e-12)
    assert gap(mixed, forced_codes) < 1e-12


@torch.no_grad()
def test_mixtures_may_be_mixed_again():
    head, x = head_of(), codes(3)
    a, b, c = (dist_of(head, seed) for seed in (0, 5, 6))
    nested = a.mix([b], [3.0, -2.0]).mix([c], [0.5, 0.5])
    flat = a.mix([b, c], [1.5, -1.0, 0.5])
    torch.testing.assert_close(nested.log_prob(x), flat.log_prob(x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_rows_may_be_guided_with_different_weights(forced_codes):
    head, x, w = head_of(), codes(3), torch.tensor([1.7, 0.4]).double()[:, None, None]
    yes, no = dist_of(head, 0), dist_of(head, 5)
    mixed = yes.mix([no], [1 + w, -w])
    for b in range(2):
        alone = yes.mix([no], [1 + float(w[b]), -float(w[b])])
        torch.testing.assert_close(mixed.log_prob(x)[b], alone.log_prob(x)[b], rtol=0, atol=1e-12)
    assert gap(mixed, forced_codes) < 1e-12


@torch.no_grad()
def test_a_weight_of_zero_leaves_the_law_as_it_is():
    head, x = head_of(), codes(3)
    a, b = dist_of(head, 0), dist_of(head, 5)
    torch.testing.assert_close(a.mix([b], [1.0, 0.0]).log_prob(x), a.log_prob(x), rtol=0, atol=1e-12)
    assert torch.equal(a.mix([b], [1.0, 0.0]).sample(Keyed(0), key()), a.sample(Keyed(0), key()))


@pytest.mark.parametrize("warp", [Warper(0.6), Warper(top_k=2), Warper(1.5, top_p=0.7), Warper(min_p=0.3)], ids=str)
@torch.no_grad()
def test_temperature_and_filters_apply_at_every_depth(warp, forced_codes):
    plain = dist_of(head_of())
    dist = plain.warped(warp)
    x = codes(3)
    for j in range(3):
        want = warp(Categorical(row(plain, x, j))).log_probs()
        torch.testing.assert_close(row(dist, x, j), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(mass(dist), torch.ones(2, 3).double(), rtol=0, atol=1e-12)
    likely = dist.sample(Keyed(0), key())
    assert bool((dist.log_prob(likely) > -torch.inf).all())


@torch.no_grad()
def test_temperature_zero_takes_the_likeliest_code_at_every_depth():
    plain = dist_of(head_of())
    x = plain.warped(Warper(temperature=0)).sample(Keyed(0), key())
    for j in range(3):
        assert torch.equal(row(plain, x, j).argmax(-1), x[..., j])


# ---- company and bookkeeping -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_draw_does_not_depend_on_company():
    head = head_of()
    both = dist_of(head).mix([dist_of(head, 5)], [2.0, -1.0])
    x = both.sample(Keyed(7), key())
    for b, m in itertools.product(range(2), range(3)):
        alone = Depthwise(head, both.states[:, b : b + 1, m : m + 1], both.weights)
        assert torch.equal(alone.sample(Keyed(7), Key(torch.tensor([b]), m))[0, 0], x[b, m])


@torch.no_grad()
def test_take_picks_the_distributions_of_some_readouts():
    dist, x = dist_of(head_of()), codes(3)
    index = torch.tensor([[2, 0], [1, 1]])
    picked = torch.stack([x[b, i] for b, i in enumerate(index)])
    torch.testing.assert_close(dist.take(index).log_prob(picked), dist.log_prob(x).gather(1, index), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_copied_head_says_the_same():
    head = head_of()
    assert torch.equal(dist_of(copy.deepcopy(head)).log_prob(codes(3)), dist_of(head).log_prob(codes(3)))


# ---- in a model ------------------------------------------------------------------------------------------------------


def model_of(length=2, depth=2, vocab=2):
    head = DepthwiseHead(16, vocab, depth, TransformerConfig(12, 1, 2))
    backbone = Transformer(TransformerConfig(16, 2, 2, rope=RoPE(), vector=16))
    condition = {"class": ClassCondition(3, 16)}
    return randomise(Model(line(length), Line(prefix=1), CodesEmbed(vocab, depth, 16), backbone, head, condition))


def forced_total(model, x, forced_codes, guidance=None, label=(1,)):
    """log p of values under the decoder's own steps."""
    random, canvas = forced_codes(x), model.blank(len(x))
    for _ in decode(Target(model, {"class": torch.tensor(label)}, guidance), canvas, SampleAll(), random=random):
        pass
    assert torch.equal(canvas.value["token"], x)
    return random.log_prob


@torch.no_grad()
def test_a_model_of_codes_is_a_distribution_and_scores_as_it_decodes(forced_codes):
    model, total = model_of(), 0.0
    for values in itertools.product(range(2), repeat=4):
        x = torch.tensor(values).view(1, 2, 2)
        want = model.log_prob(model.canvas({"token": x}), {"class": torch.tensor([1])})
        torch.testing.assert_close(forced_total(model, x, forced_codes), want, rtol=0, atol=1e-12)
        total += float(want.exp())
    assert abs(total - 1) < 1e-12


@torch.no_grad()
def test_guidance_of_a_model_of_codes_is_two_forwards_mixed_by_hand(forced_codes):
    model, x, w = model_of(), codes(2, 3, 2) % 2, 1.5
    label, canvas = torch.tensor([0, 1, 2]), model.canvas({"token": x})
    plan = model.factorization.packed(canvas)
    yes, no = (
        model.dist(model.hidden(plan, canvas, None, model.encode({"class": label}, drop)), plan, canvas)[0]
        for drop in (None, torch.ones(3, dtype=torch.bool))
    )
    want = yes.mix([no], [1 + w, -w]).log_prob(x).sum(1)
    got = forced_total(model, x, forced_codes, Guidance(w), label.tolist())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    off = forced_total(model, x, forced_codes, Guidance(0.0), label.tolist())
    torch.testing.assert_close(off, yes.log_prob(x).sum(1), rtol=0, atol=1e-12)
    assert float((off - got).abs().min()) > 1e-3


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, says",
    [
        (lambda: DepthwiseHead(8, 0, 2, PLAIN), "at least 1 code of at least 1 value"),
        (lambda: DepthwiseHead(8, 3, 0, PLAIN), "at least 1 code of at least 1 value"),
        (lambda: DepthwiseHead(8, 3, 2, PLAIN, feed="mean"), "'sum' or 'last'"),
        (lambda: DepthwiseHead(8, 3, 2, TransformerConfig(8, 1, 2, memory=4)), "no memory"),
        (lambda: dist_of(head_of()).log_prob(codes(2)), r"\(2, 3, 3\) codes, got \(2, 3, 2\)"),
        (lambda: dist_of(head_of()).mix([dist_of(head_of())], [1.0]), "as many weights"),
        (lambda: dist_of(head_of()).warped(Warper(0.5)).warped(Warper(0.5)), "already warped"),
        (lambda: dist_of(head_of()).warped(Warper(0.5)).mix([dist_of(head_of())], [2, -1]), "mix first"),
    ],
)
def test_mistakes_are_named(build, says):
    with pytest.raises(ValueError, match=says):
        build()


# ---- mutants that the laws above must catch --------------------------------------------------------------------------


class SeesItself(DepthwiseHead):
    """Each slot is fed the codes up to the one that it reads."""

    def feed(self, prefix, codes, slots):
        return super().feed(prefix, torch.cat([codes[..., 1:], codes[..., :1]], -1), slots)


class StandsStill(DepthwiseHead):
    """When drawing, every code takes the place of the first."""

    def feed(self, prefix, codes, slots):
        x = super().feed(prefix, codes, slots)
        return x if slots.start == 0 else x - self.place[slots] + self.place[:1]


class GuidesFirstOnly(Depthwise):
    """Branches are mixed at the first depth only."""

    __slots__ = ()

    def combine(self, x):
        y = super().combine(x)
        return torch.cat([y[..., :1, :], x[0][..., 1:, :]], -2) if y.dim() == 4 else y


@torch.no_grad()
def test_mutant_a_shift_by_one_depth_is_caught():
    dist = dist_of(head_of(kind=SeesItself))
    assert float((mass(dist) - 1).abs().max()) > 1e-2


@torch.no_grad()
def test_mutant_a_place_that_stands_still_is_caught(forced_codes):
    assert gap(dist_of(head_of(kind=StandsStill)), forced_codes) > 1e-2


@torch.no_grad()
def test_mutant_guidance_of_the_first_code_only_is_caught(forced_codes):
    head = head_of()
    two = torch.cat([dist_of(head).states, dist_of(head, 5).states])
    assert gap(GuidesFirstOnly(head, two, [2.7, -1.7]), forced_codes) > 1e-2
