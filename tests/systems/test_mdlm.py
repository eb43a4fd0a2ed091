"""MDLM: the figures of absorbing diffusion, by enumeration on tiny vocabularies, and how its text is decoded.

A law p of L = 4 tokens out of V = 2 is known; `Knows` is a model that holds its true conditionals. A sum over all masks
and texts takes the place of every expectation.
"""

from __future__ import annotations

import itertools
import math
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import nn

from seriatim.canvas import Set
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import Select
from seriatim.decoding.target import Target
from seriatim.decoding.unmask import Unmask
from seriatim.factorization.static import AnyOrder
from seriatim.heads.dist import Categorical
from seriatim.laws.case import randomise
from seriatim.laws.enumeration import enumerate_rows
from seriatim.layout import line
from seriatim.objectives.masked import LEAST, Masked, by_count, by_time
from seriatim.random import Generator, Keyed
from seriatim.systems.decoders import Decoding
from seriatim.systems.system import Sampling
from seriatim.systems.text import mdlm
from seriatim.systems.text_system import Windows
from seriatim.tokenizers.text import ByteTokenizer

L, V = 4, 2
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=L)))
MASKS = torch.tensor(list(itertools.product((False, True), repeat=L)))


def law(seed=0):
    """Probabilities of all texts, far from independent."""
    logits = 1.5 * torch.randn(len(TEXTS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.softmax(0)


class Knows(nn.Module):
    """Embedding, backbone and head in one: its states are the true log-probabilities of tokens given those shown."""

    mixers = MappingProxyType({"all": "any"})
    exact, continuous, value_shape = True, False, ()

    def __init__(self, p):
        super().__init__()
        self.p = nn.Parameter(p)

    def embed(self, canvas, plan, guess=None, prefix=None):
        source = plan.slots.source.expand(canvas.batch, -1)
        return torch.where(source == 0, canvas.value["token"], -1)[..., None].double()

    def contextualise(self, x, plan, cache=None, vector=None, memory=None):
        shown = x[..., 0].long()
        agrees = ((shown[:, None] == TEXTS) | (shown[:, None] < 0)).all(2)  # (batch, texts)
        mass = torch.where(agrees, self.p, 0.0)
        chosen = torch.nn.functional.one_hot(TEXTS, V).double()
        return (torch.einsum("bt,tev->bev", mass, chosen) / mass.sum(1)[:, None, None]).clamp(min=1e-300).log()

    def dist(self, h, reads, canvas):
        return Categorical(h)

    def loss(self, h, reads, value, random=None, key=None):
        return -h.gather(-1, value[..., None])[..., 0]


class Part(nn.Module):
    """One face of `Knows` as a module."""

    def __init__(self, forward):
        super().__init__()
        self.forward = forward


def knowing(p):
    """A model with the true conditionals of p."""
    whole = Knows(p)
    backbone = Part(whole.contextualise)
    backbone.mixers, backbone.new_cache = whole.mixers, lambda batch: None
    return Masked(line(L), AnyOrder(), Part(whole.embed), backbone, whole, masking=by_time, judging=by_count)


def learned():
    return randomise(mdlm.build(mdlm.Config(length=L, vocab=V, width=16, depth=2, heads=2)))


def hidden_sums(model):
    """Summed losses of the hidden tokens: (masks, texts)."""
    canvas = model.canvas({"token": TEXTS})
    with torch.no_grad():
        return torch.stack([model.hidden_losses(canvas, m.expand(len(TEXTS), -1)).sum(1) for m in MASKS])


COUNTS = MASKS.sum(1).double()


def bound(sums):
    """NELBO of each text: the integral over t of (1/t) t^l (1-t)^(L-l), for l hidden, is 1 / (l C(L, l))."""
    weight = torch.tensor([1 / (k * math.comb(L, int(k))) if k else 0.0 for k in COUNTS.tolist()], dtype=torch.float64)
    return (weight[:, None] * sums).sum(0)


def bound_in_steps(sums, steps):
    """The T-step bound: weight 1/k at t = k/T."""
    total = torch.zeros(len(TEXTS), dtype=torch.float64)
    for k in range(1, steps + 1):
        t = k / steps
        total += (t**COUNTS * (1 - t) ** (L - COUNTS) / k) @ sums
    return total


def mean_over_orders(model):
    """Mean over all L! orders of the negative log-likelihood of each text, decoded one token at a time."""
    target, orders = Target(model, cached=False), list(itertools.permutations(range(L)))
    total = torch.zeros(len(TEXTS), dtype=torch.float64)
    for order in orders:
        canvas = model.canvas({"token": torch.zeros_like(TEXTS)})
        for e in order:
            rows = target.forward(target.plan(canvas), canvas)
            total -= rows.dist.log_prob(TEXTS)[:, e].detach()
            canvas.apply([Set(TEXTS[:, e : e + 1], torch.full((len(TEXTS), 1), e))])
    return total / len(orders)


def entropy(p):
    return float(-(p * p.log()).sum())


def total_correlation(p, group, given):
    """Sum of the entropies of a group's tokens minus that of the group, given others; the mean over p."""

    def conditional(elements):
        return joint([*given, *elements]) - joint(given)

    def joint(elements):
        mass = {}
        for text, q in zip(TEXTS[:, list(elements)].tolist(), p.tolist(), strict=True):
            mass[tuple(text)] = mass.get(tuple(text), 0.0) + q
        return -sum(q * math.log(q) for q in mass.values())

    return sum(conditional([e]) for e in group) - conditional(group)


def parallel_kl(p, steps):
    """Divergence from p of sampling T groups one after another, each at once, every token in a group drawn evenly."""
    total = 0.0
    for groups in itertools.product(range(steps), repeat=L):
        given: list[int] = []
        for g in range(steps):
            group = [e for e in range(L) if groups[e] == g]
            total += total_correlation(p, group, given) if len(group) > 1 else 0.0
            given += group
    return total / steps**L


# ---- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [learned, lambda: knowing(law())], ids=["any model", "true conditionals"])
def test_the_bound_is_the_mean_over_all_orders(make):
    model = make()
    torch.testing.assert_close(bound(hidden_sums(model)), mean_over_orders(model), rtol=1e-12, atol=1e-12)


def test_the_bound_by_counts_is_the_bound_by_times():
    """E over t of 1/t, and L E over l of 1/l, agree text by text; the latter through `by_count` itself."""
    model = learned()
    sums = hidden_sums(model)
    free, orders = torch.ones(1, L, dtype=torch.bool), list(itertools.permutations(range(L)))
    total = torch.zeros(len(TEXTS), dtype=torch.float64)
    for order, count in itertools.product(orders, range(L)):
        hidden, weight = by_count(free, torch.tensor([(count + 0.5) / L]), torch.tensor([order]) / L)
        assert int(hidden.sum()) == count + 1
        which = int((hidden == MASKS).all(1).nonzero())
        total += float(weight) * sums[which] / (L * len(orders))
    torch.testing.assert_close(total, bound(sums), rtol=1e-6, atol=1e-6)


def test_with_the_true_conditionals_the_bound_is_tight_for_every_text():
    p = law()
    torch.testing.assert_close(bound(hidden_sums(knowing(p))), -p.log(), rtol=1e-12, atol=1e-12)


def test_a_model_without_them_is_not_tight():
    p = law()
    with torch.no_grad():
        gap = float((p * bound(hidden_sums(learned()))).sum()) - entropy(p)
    assert gap > 0.1


def test_the_bound_of_t_steps_falls_to_its_limit():
    p = law()
    sums = hidden_sums(knowing(p))
    values = [bound_in_steps(sums, t) for t in (1, 2, 4, 8, 64, 1024)]
    means = [float((p * v).sum()) for v in values]
    assert all(a > b for a, b in itertools.pairwise(means)) and means[-1] > entropy(p)
    assert means[-1] - entropy(p) < 2e-3
    torch.testing.assert_close(values[-1], bound(sums), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_gap_of_t_steps_is_the_divergence_of_sampling_as_many_parallel_groups(steps):
    p = law(1)
    gap = float((p * bound_in_steps(hidden_sums(knowing(p)), steps)).sum()) - entropy(p)
    assert gap == pytest.approx(parallel_kl(p, steps), abs=1e-12)
    if steps == 1:
        assert gap == pytest.approx(total_correlation(p, list(range(L)), []), abs=1e-12)


def test_one_token_a_step_at_random_samples_the_law_itself():
    """With the true conditionals every order gives p, and so does the decoder, enumerated."""
    p, model = law(), knowing(law())

    def run(random, rows):
        canvas = generate(Target(model, cached=False), model.blank(rows), Select("random", L), random=random)
        return [tuple(text) for text in canvas.value["token"].tolist()]

    found = enumerate_rows(run)
    for text, q in zip(TEXTS.tolist(), p.tolist(), strict=True):
        assert found[tuple(text)] == pytest.approx(q, abs=1e-12)


def test_training_by_time_and_judging_by_count_estimate_the_bound():
    """Means of 100 batches, within 4.5 standard errors (both miss with a chance below 2e-5); counts vary less."""
    model = learned()
    p = torch.full((len(TEXTS),), 1 / len(TEXTS), dtype=torch.float64)
    want = float((p * bound(hidden_sums(model))).sum())
    spreads = []

    def shuffled(n):
        """Eight times every text: which part of the range of times a row is given follows from its place."""
        order = torch.randperm(128, generator=torch.Generator().manual_seed(1000 + n))
        return model.canvas({"token": TEXTS.repeat(8, 1)[order]})

    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            means = torch.stack([model.losses(shuffled(n), random=Generator(n)).sum(1).mean() for n in range(100)])
        spreads.append(float(means.std()))
        assert abs(float(means.mean()) - want) < 4.5 * spreads[-1] / 100**0.5 + LEAST * want
    assert spreads[1] < 0.7 * spreads[0]


@pytest.mark.parametrize("masking", [by_time, by_count])
def test_only_what_is_to_be_decided_is_hidden(masking):
    free = torch.rand(64, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    unit, noise = torch.rand(64), torch.rand(64, 9)
    hidden, weight = masking(free, unit, noise)
    assert not bool((hidden & ~free).any())
    assert bool(torch.isfinite(weight).all())


def test_a_batch_in_which_nothing_is_hidden_trains_nothing_and_breaks_nothing():
    model = learned()
    canvas = model.canvas({"token": TEXTS[:2]})
    loss = model.hidden_losses(canvas, torch.zeros(2, L, dtype=torch.bool)).sum()
    loss.backward()
    assert float(loss.detach()) == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_mask_is_no_id_and_known_tokens_are_not_read():
    """SUBS: the head has the vocabulary's ids and no more; a step reads hidden places only."""
    model = learned()
    canvas = model.canvas({"token": TEXTS[:1]}, torch.tensor([[True, False, True, False]]))
    plan = model.factorization.step(canvas, None, 0)
    assert model.heads["token"].vocab == model.embed.vocab == V
    assert plan.reads.element.tolist() == [[-1, 1, -1, 3]]


# ---- the system ------------------------------------------------------------------------------------------------------


def system(**changes):
    torch.manual_seed(0)
    config = mdlm.Config(**{"length": 24, "width": 16, "depth": 1, "heads": 2, "block": 8, **changes})
    return mdlm.MDLM(config, ByteTokenizer()).eval()


def test_the_score_is_the_bound_and_the_same_each_time():
    """An untrained head of zeros: every token costs log V, whatever is hidden."""
    one = system()
    with torch.no_grad():
        one.model.heads["token"].weight.zero_()
    windows = Windows(torch.arange(200) % 256, 24)
    nats, tokens = one.score(windows, 16)
    assert tokens == 16 * 24 and nats / tokens == pytest.approx(math.log(272), rel=1e-5)
    other = system()
    assert other.score(windows, 16) == other.score(windows, 16)


def test_a_share_of_the_training_batches_is_short():
    one = system(short=0.5).train()
    windows = Windows(torch.arange(200) % 256, 24).take(torch.arange(4))
    lengths = [int(one(windows, Generator(n), 0, 1)[1]) // 4 for n in range(40)]
    assert 8 < sum(n < 24 for n in lengths) < 32 and min(lengths) >= 1
    assert all(int(system(short=0.0).train()(windows, Generator(n), 0, 1)[1]) == 96 for n in range(5))


@pytest.mark.parametrize(("block", "steps", "forwards"), [(8, 6, 6), (8, 24, 16), (None, 4, 4), (1, 1, 16)])
def test_blocks_are_decoded_one_after_another_and_share_the_steps(block, steps, forwards):
    """16 tokens after a prompt of 3."""
    one = system(block=block)
    canvas = one.prompted("abc", 16)
    decider = Unmask(Select(steps=steps))
    seen = []
    for _ in decode(one.target(None, one.sampling), canvas, decider, random=Keyed(0)):
        seen.append(canvas.known[0, 3:].clone())
    assert len(seen) == forwards and canvas.done
    if block:
        for known in seen:
            ends = [bool(known[k : k + block].all()) for k in range(0, 16, block)]
            begun = [bool(known[k : k + block].any()) for k in range(0, 16, block)]
            assert all(ends[i] or not begun[i + 1] for i in range(len(ends) - 1))


def test_a_text_ends_at_the_end_of_text_and_streams_from_the_front():
    one = system(block=4)
    eos = one.tokenizer.special["eos"]

    class Writes(Unmask):
        """Decides like the system, but writes "x", and <eos> in place 10."""

        def decide(self, canvas, guess, rows, random):
            step = super().decide(canvas, guess, rows, random)
            for edit in step.edits:
                if isinstance(edit, Set):
                    edit.value = torch.where(edit.element == 10, eos, ord("x"))
            return step

    pieces = list(one.stream("ab", 20, Sampling(), decoding=Decoding(Writes(Select(steps=20), (eos,)))))
    assert "".join(pieces) == "x" * 8 and len(pieces) > 1
    whole = "".join(one.stream("ab", 20, Sampling(), decoding=Decoding(Writes(Select(steps=20)))))
    assert len(whole) == 19, "without stop ids nothing ends"


def test_the_same_seed_writes_the_same_text_and_steps_are_those_of_sampling():
    one = system()
    a, b, c = (one.write("def ", 16, seed=seed) for seed in (1, 1, 2))
    assert a == b != c
    for steps, forwards in ((1, 2), (8, 8)):
        done: list = []
        list(one.stream("def ", 16, Sampling(steps=steps), trace=done))
        assert len(done) == forwards


@pytest.mark.parametrize("wrong", [{"short": 1.5}, {"block": 0}, {"rule": "luck"}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"got|not 'luck'"):
        mdlm.Config(**wrong)


def test_the_small_size_is_that_of_the_next_token_base():
    c = mdlm.Config(**mdlm.MDLM.sizes["small"], vocab=4096)
    assert (c.depth, c.width, c.hidden, c.vocab, c.length) == (8, 256, 640, 4096, 1024)


def test_a_bound_by_draws_is_that_of_all_orders_in_the_mean():
    """Of the last two tokens of three, the first given: 2,000 draws, within four standard errors."""
    one = mdlm.MDLM(mdlm.Config(length=L, vocab=V, width=16, depth=2, heads=2), SimpleNamespace(special={}, vocab=V))
    one.model = learned()
    x, known = torch.tensor([[1] * L]), torch.arange(L) < 1
    canvas, free = one.model.canvas({"token": x}, known), L - 1
    want, spread = 0.0, []
    with torch.no_grad():
        for mask in itertools.product((False, True), repeat=free):
            hidden = torch.tensor([[False, *mask]])
            if count := sum(mask):
                share = 1 / (free * math.comb(free, count))  # of the draws
                nats = float(one.model.hidden_losses(canvas, hidden).sum()) * free / count
                want += share * nats
                spread.append((share, nats))
    deviation = math.sqrt(sum(s * (n - want) ** 2 for s, n in spread))
    assert abs(one.bound([1] * L, 1, draws=2000) - want) < 4 * deviation / math.sqrt(2000)
    assert one.bound([1] * L, 1, draws=64) == one.bound([1] * L, 1, draws=64), "the same draws each time"
    for ids, given in (([1] * L, L), ([1] * (L + 1), 0), ([], 0)):
        with pytest.raises(ValueError, match="at least one is scored"):
            one.bound(ids, given)
