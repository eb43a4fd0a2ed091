"""TiDAR: two orders in one forward, drafts by its own masks, and the law of its next-token half whatever is drafted."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import decode
from seriatim.decoding.own_masks import OwnMasks
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Chain
from seriatim.factorization.beside import beside_line
from seriatim.factorization.line import Line
from seriatim.heads.dist import Categorical
from seriatim.laws.case import randomise
from seriatim.laws.decoders import OF_DECODERS, Credulous, DecoderCase, distance
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.laws import NotApplicable
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import OrderError
from seriatim.random import Generator, Keyed
from seriatim.systems import trials
from seriatim.systems.claim import Arm
from seriatim.systems.decoders import Decoding
from seriatim.systems.text import next_token, tidar
from seriatim.verbs.evaluate import evaluate
from seriatim.verbs.load import load
from seriatim.verbs.train import train
from seriatim.view import inclusive

SMALL = {"width": 16, "depth": 2, "heads": 2}
TEXT = "The quick brown fox jumps over the lazy dog.\n\n"


def tiny(block=3, length=12, vocab=3, **settings):
    model = tidar.build(tidar.Config(length=length, vocab=vocab, block=block, **SMALL, **settings))
    return randomise(model).requires_grad_(False)


def system(**settings):
    made = tidar.TiDAR(tidar.Config(length=64, **SMALL, **settings))
    randomise(made.model)
    return made.eval().requires_grad_(False)


def text(model, n, seed=0):
    vocab = model.heads["token"].vocab
    return torch.randint(vocab, (1, n), generator=torch.Generator().manual_seed(seed))


def looked_at(model, known, drafted=(), masks=3, cached=False):
    """The rows of a forward behind these known ids, with a chain of drafted ones and blocks of masks."""
    value = torch.tensor([[*known, *[0] * 8]])
    canvas = model.canvas({"token": value}, len(known), layout=line(value.shape[1]))
    guess = Guess(torch.tensor([list(drafted)], dtype=torch.long).reshape(1, -1), masks=masks)
    target = Target(model, cached=cached)
    with torch.no_grad():
        return target.forward(target.plan(canvas, guess), canvas, guess)


# ---- one forward that verifies and drafts ----------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [1, 2, 4])
def test_each_block_of_masks_is_a_separate_forward(masks):
    model, known, drafted = tiny(), [1, 0, 2], [2, 2, 1]
    blocks = looked_at(model, known, drafted, masks).spawned.unflatten(1, (masks, -1))
    assert blocks.shape[2] == 1 + len(drafted)
    for j in range(1 + len(drafted)):
        alone = looked_at(model, known + drafted[:j], (), masks).spawned
        assert torch.allclose(blocks[:, :, j], alone, rtol=0, atol=1e-12)


def test_no_mask_reaches_what_is_verified():
    model, known, drafted = tiny(), [1, 0, 2], [2, 2, 1]
    plain, masked = (looked_at(model, known, drafted, n) for n in (0, 3))
    assert plain.spawned is None and torch.allclose(plain.hidden, masked.hidden, rtol=0, atol=1e-12)
    before = masked.spawned.clone()
    with torch.no_grad():
        model.embed.mask.add_(1.0)
    again = looked_at(model, known, drafted, 3)
    assert torch.equal(again.hidden, masked.hidden) and not torch.allclose(again.spawned, before)


def test_a_draft_tree_has_its_blocks_of_masks():
    model, known = tiny(), [1, 0, 2]
    value = torch.tensor([[*known, *[0] * 8]])
    canvas = model.canvas({"token": value}, 3, layout=line(11))
    guess, target = Guess(torch.tensor([[2, 1, 0]]), (-1, -1, 0), masks=2), Target(model, cached=False)
    with torch.no_grad():
        blocks = target.forward(target.plan(canvas, guess), canvas, guess).spawned.unflatten(1, (2, -1))
    for j, path in enumerate([[], [2], [1], [2, 0]]):
        assert torch.allclose(blocks[:, :, j], looked_at(model, known + path, (), 2).spawned, rtol=0, atol=1e-12)


def test_rows_of_different_lengths_have_the_masks_that_each_has_alone():
    model = tiny()
    rows, drafted = [[1, 0, 2], [2], [0, 1, 2, 2, 1]], [[2, 2], [1, -1], [0, 1]]
    value = torch.tensor([row + [0] * (9 - len(row)) for row in rows])
    canvas = model.canvas({"token": value}, torch.tensor([len(r) for r in rows]), layout=line(9))
    guess, target = Guess(torch.tensor(drafted), masks=3), Target(model, cached=False)
    with torch.no_grad():
        spawned = target.forward(target.plan(canvas, guess), canvas, guess).spawned.unflatten(1, (3, -1))
    for b, (row, nodes) in enumerate(zip(rows, drafted, strict=True)):
        for j in range(1 + sum(x >= 0 for x in nodes)):
            alone = looked_at(model, row + nodes[:j], (), 3).spawned
            assert torch.allclose(spawned[b : b + 1, :, j], alone, rtol=0, atol=1e-12)


def test_masks_see_their_block_and_nothing_sees_them():
    """The published mask, slot by slot."""
    model = tiny()
    plan = model.factorization.step(model.blank(1), Guess(torch.tensor([[0, 1]]), masks=3), 0)
    mask, fed, groups = plan.views["all"].mask()[0], 3, 3
    group = [(i - fed) % groups for i in range(fed, plan.size)]
    for q in range(plan.size):
        for k in range(plan.size):
            if q < fed:
                sees = k <= q
            else:
                sees = k <= group[q - fed] if k < fed else group[k - fed] == group[q - fed]
            assert bool(mask[q, k]) == sees, (q, k)


def test_a_model_without_a_mask_says_so():
    model = next_token.build(next_token.Config(length=8, vocab=3, **SMALL))
    with pytest.raises(ValueError, match="has no mask: use mask=True"):
        looked_at(model, [1, 2])


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 3, 4, 12])
def test_greedy_text_is_the_next_token_halfs_whatever_is_drafted(block):
    one = system(block=block)
    for prompt in ("", "abc", "xyxyxyxy"):
        ours = one.generate(prompt, "own", max_new_tokens=24, temperature=0)
        plain = one.generate(prompt, max_new_tokens=24, temperature=0, decoder="ancestral")
        assert ours.ids == plain.ids and ours.forwards <= plain.forwards
        assert block > 1 or ours.forwards == len(ours.ids)


@pytest.mark.parametrize("verify", ["match", "ratio"])
@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_what_is_sampled_has_its_law_by_enumeration(verify, block):
    model = tiny()
    ours = tidar.law(model, lambda: tidar.own(tidar.Config(block=block, verify=verify)))
    plain = tidar.law(model, lambda: tidar.PLAIN)
    assert abs(sum(ours.values()) - 1) < 1e-12 and len(plain) == 27
    assert distance(ours, plain) < 1e-12


def test_known_wrong_verifiers_write_another_law():
    class Lying(OwnMasks):
        """Says that its drafts were drawn from another law."""

        def propose(self, canvas, target, random):
            guess = super().propose(canvas, target, random)
            if guess is not None and guess.q is not None:
                guess.q = Categorical(guess.q.logits.flip(-1))
            return guess

    model = tiny()
    plain = tidar.law(model, lambda: tidar.PLAIN)
    for way in (lambda: Decoding(Chain(), Lying(3)), lambda: Decoding(Credulous(), OwnMasks(3))):
        assert distance(tidar.law(model, way), plain) > 0.01


class Own(DecoderCase):
    """TiDAR on a tiny model of its own, as a decoder for the laws."""

    @property
    def system(self):
        if "_system" not in self.__dict__:
            made = tidar.TiDAR(tidar.Config(length=32, vocab=3, **SMALL), SimpleNamespace(special={}))
            randomise(made.model, seed=4)
            self.__dict__["_system"] = made.eval().requires_grad_(False)
        return self.__dict__["_system"]


@pytest.mark.parametrize("verify", ["match", "ratio"])
@pytest.mark.parametrize("law", [4, 5, 6, 9, 11])
def test_it_is_held_to_the_laws_of_decoders(law, verify):
    options = tidar.Config(block=3, verify=verify)
    case = Own(lambda ask: tidar.own(options, ask.stop), options, coupled=verify == "match", short=3)
    try:
        assert OF_DECODERS[law][1](case)
    except NotApplicable:
        assert (law, verify) == (11, "ratio")


def test_a_draft_is_accepted_as_often_as_its_verifier_says():
    """The first token drafted, behind each first token: the sum of p q by matching, of min(p, q) by the ratio."""
    model = tiny(block=2)
    first = looked_at(model, [], (), 2)
    head = model.heads["token"]
    q = head.dist(first.spawned[:, 1:], None, None).probs()[0, 0]
    expected = {"match": 0.0, "ratio": 0.0}
    for x, chance in enumerate(first.dist.probs()[0, 0].tolist()):
        p = looked_at(model, [x], (), 0).dist.probs()[0, 0]
        expected["match"] += chance * float((p * q).sum())
        expected["ratio"] += chance * float(torch.minimum(p, q).sum())
    assert expected["ratio"] > expected["match"] + 0.01
    for verify, chance in expected.items():

        def run(random, rows, verify=verify):
            way, canvas = tidar.own(tidar.Config(block=2, verify=verify)), model.blank(rows, layout=line(4))
            steps = decode(Target(model), canvas, way.decider, way.proposer, random)
            with torch.no_grad():
                next(steps)
                taken = torch.as_tensor(next(steps).accepted).expand(rows)
            return taken.tolist()

        assert abs(enumerate_rows(run)[1] - chance) < 1e-12


def test_the_cache_holds_what_a_fresh_pass_over_the_text_computes():
    model, way = tiny(4), tidar.own(tidar.Config(block=4))
    canvas, target = model.blank(1, layout=line(40)), Target(model)
    with torch.no_grad():
        accepted = sum(s.accepted for s in decode(target, canvas, way.decider, way.proposer, Keyed(1)))
        held = target.cache.length
        fresh = Target(model)
        ids = canvas.value["token"][:, : held - 1]
        again = model.canvas({"token": torch.nn.functional.pad(ids, (0, 1))}, held - 1, layout=line(held))
        fresh.forward(fresh.plan(again), again)
    assert accepted > 5 and target.cache.plain and held >= 36
    ours, theirs = (t.cache.buffer[..., :held, :] for t in (target, fresh))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)


# ---- trust -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["match", "ratio"])
@pytest.mark.parametrize("trust", [0.0, 0.4])
def test_with_less_trust_it_writes_by_a_law_of_its_own_whatever_is_drafted(trust, verify):
    """Each token by the mixed logits behind the text before it: of the last token, and of the first of its masks."""
    block = 2
    model = tiny(block, trust=trust)
    want = {}
    for ids in itertools.product(range(3), repeat=3):
        chance = 1.0
        for i, x in enumerate(ids):
            rows = looked_at(model, ids[:i], (), block)
            mask = model.heads["token"].dist(rows.spawned[:, :1], None, None)
            said = looked_at(model, ids[:i], (), 0).dist
            chance *= float(said.mix([mask], [trust, 1 - trust]).probs()[0, 0, x])
        want[ids] = chance
    options = tidar.Config(block=block, verify=verify, trust=trust)
    ours = tidar.law(model, lambda: tidar.own(options))
    assert options.relaxed and distance(ours, want) < 1e-12
    assert distance(ours, tidar.law(model, lambda: tidar.PLAIN)) > 0.01


def test_full_trust_is_the_next_token_half():
    assert not tidar.Config().relaxed
    rows = [looked_at(tiny(trust=t), [1, 2], (0,), 3).dist.logits for t in (1.0, 0.5)]
    plain = looked_at(tiny(), [1, 2], (0,), 0).dist.logits
    assert torch.allclose(rows[0], plain, rtol=0, atol=1e-12) and not torch.allclose(rows[1], plain, atol=1e-3)


# ---- training --------------------------------------------------------------------------------------------------------


def both(model, x, block, given=0):
    canvas = model.canvas({"token": x}, given, layout=line(x.shape[1]))
    plan, tokens = beside_line(canvas, torch.ones(1, x.shape[1], dtype=torch.bool), block)
    with torch.no_grad():
        h = model.hidden(plan, canvas)
        return plan, tokens, h, [model.dist(h, p, canvas)[0].log_probs() for p in (plan, tokens)]


@pytest.mark.parametrize("length", [8, 9, 11])
def test_masks_say_in_training_what_they_say_in_decoding(length):
    """Whole blocks, and one that reaches beyond the end of the text."""
    model, block = tiny(4), 4
    x = text(model, length)
    plan, _, h, (masks, _) = both(model, x, block)
    assert plan.size == length + -(-length // block) * block
    for start in range(0, length, block):
        rows = looked_at(model, x[0, :start].tolist(), (), block)
        here = masks[:, start : start + block]
        decoded = model.heads["token"].dist(rows.spawned, None, None).log_probs()
        assert torch.allclose(here, decoded[:, : here.shape[1]], rtol=0, atol=1e-12)


def test_the_next_token_half_is_trained_as_if_no_masks_were_there():
    model = tiny()
    x = text(model, 9)
    other = Model(model.layout, Line(prefix=1), model.embed, model.backbone, model.heads["token"])
    canvas = model.canvas({"token": x}, layout=line(9))
    with torch.no_grad():
        plain = other.losses(other.canvas({"token": x}, layout=line(9)))
        assert torch.allclose(model.losses(canvas, strict=True), plain, rtol=0, atol=1e-12)
        masks, tokens = (-both(model, x, 3)[3][i].gather(-1, x[..., None])[..., 0] for i in (0, 1))
        assert torch.allclose(tokens, plain, rtol=0, atol=1e-12)
        for alpha in (0.0, 1.0, 3.0):
            model.alpha = alpha
            want = (alpha * plain + masks) / (1 + alpha)
            assert torch.allclose(model.losses(canvas), want, rtol=0, atol=1e-12)


def test_an_edit_reaches_later_tokens_and_the_masks_of_later_blocks_only():
    model, block = tiny(), 3
    x = text(model, 9)
    *_, (masks, tokens) = both(model, x, block)
    for e in range(9):
        y = x.clone()
        y[0, e] = (y[0, e] + 1) % 3
        *_, (other_masks, other_tokens) = both(model, y, block)
        moved = (masks != other_masks).any(-1)[0].tolist(), (tokens != other_tokens).any(-1)[0].tolist()
        assert moved[0] == [k // block > e // block for k in range(9)]
        assert moved[1] == [k > e for k in range(9)]


def test_an_order_that_peeks_is_refused_before_it_is_trained():
    model = tiny()
    plan, tokens, *_ = both(model, text(model, 6), 3)
    for right in (plan, tokens):
        right.check(model.mixers)
        assert right.slots is plan.slots and right.views is plan.views
        wrong = replace(right, views={"all": inclusive([0] * right.size)})
        with pytest.raises(OrderError, match="this order peeks"):
            wrong.check(model.mixers)
    late = replace(plan, reads=tokens.reads)  # the line read by the ranks of the blocks
    with pytest.raises(OrderError, match="this order peeks"):
        late.check(model.mixers)


def test_given_tokens_are_not_learned_and_every_weight_is():
    model = tiny().train().requires_grad_(True)
    canvas = model.canvas({"token": text(model, 9)}, 2, layout=line(9))
    losses = model.losses(canvas)
    assert bool((losses[:, :2] == 0).all()) and bool((losses[:, 2:] > 0).all())
    losses.sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


# ---- as a system -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_text(TEXT * 200, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(book):
    out = book.parent / "base"
    train("next-token", book, out=out, settings={**SMALL, "length": 32, "steps": 2, "batch": 2})
    return out


def test_it_begins_as_a_next_token_model_that_it_goes_on_to_be(base, book, tmp_path):
    settings = {"steps": 1, "learning_rate": 1e-9, "block": 4, "batch": 2}
    train("tidar", book, from_=base, out=tmp_path / "run", settings=settings)
    theirs, ours = load(base), load(tmp_path / "run")
    taken, mine = theirs.model.state_dict(), ours.model.state_dict()
    assert isinstance(ours, tidar.TiDAR) and set(mine) - set(taken) == {"embed.mask"}
    assert all(torch.allclose(mine[n], x, atol=1e-6) for n, x in taken.items())  # the learned start among them
    x = text(theirs.model, 32)
    assert torch.allclose(ours.log_prob(x), theirs.log_prob(x), atol=1e-3)
    figures = evaluate(ours, book)
    assert figures["likelihood"] == "exact"
    assert abs(figures["bits_per_byte"] - evaluate(theirs, book)["bits_per_byte"]) < 1e-3


def test_it_is_trained_by_both_halves_and_scored_by_one():
    one = tidar.TiDAR(tidar.Config(length=16, **SMALL))
    batch = {"token": text(one.model, 16)}
    with torch.no_grad():
        scored, _ = one.eval().losses(batch, Generator(0), 0.0)
        trained, _ = one.train().losses(batch, Generator(0), 0.0)
        exact = -one.log_prob(batch["token"])
    assert torch.allclose(scored, exact) and not torch.allclose(trained, exact, rtol=1e-4)


def test_batches_samples_and_stops_are_those_of_plain_decoding():
    one, prompts = system(block=4), ["abcabc", "x", "1, 2, 3"]
    for settings in ({"temperature": 0}, {"temperature": 0.8, "top_k": 20}, {"n": 2, "seed": 3}, {"stop": [17, 200]}):
        ours, plain = (one.generate(prompts, way, max_new_tokens=16, **settings) for way in ("own", "ancestral"))
        assert [g.ids for g in ours] == [g.ids for g in plain]


def test_the_text_that_is_streamed_is_the_text_that_is_generated():
    one = system(block=4)
    sampling = replace(one.sampling, temperature=1.0, top_p=None)
    assert (
        "".join(one.stream("abc", 20, sampling, seed=2)) == one.generate("abc", "own", max_new_tokens=20, seed=2).text
    )


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"block": 0}, "a block holds 1 to 512"),
        ({"alpha": -1.0}, "a weight of at least 0"),
        ({"verify": "luck"}, "verify is match or ratio"),
        ({"trust": 1.5}, "trust is a share"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        tidar.Config(**wrong)


def test_the_claim_measures_what_was_trained(base, book, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "held_out", lambda system, count, length: [[65, 66, 67 + n] for n in range(count)])
    made = train("tidar", book, from_=base, out=tmp_path / "run", settings={"steps": 1, "batch": 2, "block": 3})
    figures = tidar.drafting(made, prompts=2, new_tokens=8)
    assert figures["tokens"] == 16 - figures["looping_tokens"]
    assert figures["tokens_per_forward"] >= 1 or not figures["tokens"]
    assert figures["ratio_tokens_per_forward"] >= 0 and made.system.config.verify == "match"
    assert abs(figures["bits_per_byte"] - evaluate(made.system, book)["bits_per_byte"]) < 0.1
    assert {arm.system for arm in tidar.CLAIM.arms.values() if isinstance(arm, Arm)} == {"tidar"}
