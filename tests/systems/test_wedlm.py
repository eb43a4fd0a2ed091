"""WeDLM: masks behind what is known, a window that slides on, and keys and values that are final when they are kept."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from seriatim.canvas import Canvas
from seriatim.cli.main import main
from seriatim.data.base import load_data
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import Above, Select
from seriatim.decoding.target import Target
from seriatim.decoding.unmask import Unmask
from seriatim.factorization.beside import Streaming, beside_line
from seriatim.heads.dist import Categorical
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Rows
from seriatim.plan import MASK, OrderError
from seriatim.random import Generator, Keyed
from seriatim.systems.decoders import decoder_of
from seriatim.systems.system import Sampling
from seriatim.systems.text import sdar, wedlm
from seriatim.verbs.evaluate import evaluate
from seriatim.verbs.load import load
from seriatim.verbs.train import train

SMALL = {"width": 16, "depth": 2, "heads": 2}
TEXT = "The quick brown fox jumps over the lazy dog.\n\n"


def tiny(block=4, window=4, length=12, vocab=3, **settings):
    config = wedlm.Config(length=length, vocab=vocab, block=block, window=window, **SMALL, **settings)
    return randomise(wedlm.build(config)).requires_grad_(False)


def text(model, n, rows=1, seed=0):
    return torch.randint(model.heads["token"].vocab, (rows, n), generator=torch.Generator().manual_seed(seed))


def canvas_of(model, x, known):
    """Of these known elements; all others may be decided at any time."""
    mark = torch.zeros_like(x, dtype=torch.bool)
    mark[:, list(known)] = True
    return model.canvas({"token": x}, mark, layout=line(x.shape[1]))


def free(model, n, given=0, rows=1):
    """A canvas whose elements may be decided at any time, as `WeDLM.prompted` makes it."""
    return Canvas(line(n), {"token": text(model, n, rows)}, given, torch.zeros(1, n, dtype=torch.long))


def read(model, canvas):
    """The step behind what is known, and the laws of the elements that it reads."""
    target = Target(model, cached=False)
    plan = target.plan(canvas)
    with torch.no_grad():
        rows = target.forward(plan, canvas)
    return plan, {e: rows.dist.log_probs()[0, i] for i, e in enumerate(rows.element[0].tolist()) if e >= 0}


# ---- what stands where -----------------------------------------------------------------------------------------------


def test_known_tokens_stand_first_and_every_token_keeps_its_place():
    model = tiny(window=4)
    plan, rows = read(model, canvas_of(model, text(model, 12), [0, 1, 3, 5, 9]))
    order = [-1, 0, 1, 3, 5, 9, 2, 4]  # the start, the known front, what is known further on, masks of the window
    assert plan.slots.element[0, :, 0].tolist() == order and list(rows) == [2, 4]
    assert plan.slots.coord[0, :, 0].tolist() == [e + 1 for e in order]
    assert torch.equal(plan.views["all"].mask()[0], torch.ones(8, 8).tril().bool())
    assert plan.kept.tolist() == [[0, 1, 2]]


def test_a_mask_further_back_changes_nothing_before_it():
    x, known = text(tiny(), 12), [0, 1, 4]
    near, far = (read(tiny(window=w), canvas_of(tiny(window=w), x, known))[1] for w in (2, 8))
    assert list(near) == [2, 3] and list(far) == [2, 3, 5, 6, 7, 8, 9]
    assert all(torch.allclose(near[e], far[e], rtol=0, atol=1e-12) for e in near)


def test_every_mask_sees_all_that_is_known():
    model, known = tiny(), [0, 1, 4]
    x = text(model, 12)
    _, before = read(model, canvas_of(model, x, known))
    for e in known:
        y = x.clone()
        y[0, e] = (y[0, e] + 1) % 3
        _, after = read(model, canvas_of(model, y, known))
        assert all(not torch.allclose(before[k], after[k], atol=1e-9) for k in before)


def test_without_masks_it_is_the_next_token_model():
    """The same states, keys and values."""
    model, n = tiny(), 9
    x = text(model, n)
    other = model.next_token()
    canvas = model.canvas({"token": x}, layout=line(n))
    plan, tokens = beside_line(canvas, canvas.open, 4, causal=True)
    with torch.no_grad():
        plain = other.factorization.packed(other.canvas({"token": x}, layout=line(n)))
        want = other.hidden(plain, other.canvas({"token": x}, layout=line(n)))
        assert torch.allclose(model.hidden(plan, canvas)[:, :n], want, rtol=0, atol=1e-12)
        assert tokens.reads.slot.tolist() == plain.reads.slot.tolist()
        ours, theirs = Target(model), Target(other)
        front = model.canvas({"token": x}, n - 1, layout=line(n))
        for target in (ours, theirs):
            canvas = front if target is ours else other.canvas({"token": x}, n - 1, layout=line(n))
            step = target.plan(canvas)
            target.forward(step, canvas)
            target.commit(None if target is ours else n, step)
        assert torch.allclose(ours.cache.buffer[..., :n, :], theirs.cache.buffer[..., :n, :], rtol=0, atol=1e-12)


def test_an_edit_reaches_the_masks_of_later_blocks_and_of_its_own_where_it_is_shown():
    model, block = tiny(), 4
    x = text(model, 12)
    hidden = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1]]).bool()

    def said(x):
        canvas = model.shown(model.canvas({"token": x}, layout=line(12)), hidden)
        plan = model.factorization.packed(canvas).check(model.mixers, canvas.open)
        with torch.no_grad():
            return model.dist(model.hidden(plan, canvas), plan, canvas)[0].log_probs()

    before = said(x)
    for e in range(12):
        y = x.clone()
        y[0, e] = (y[0, e] + 1) % 3
        moved = (before != said(y)).any(-1)[0].tolist()
        own = not bool(hidden[0, e])
        want = [
            bool(hidden[0, k]) and (k // block > e // block or (own and k // block == e // block)) for k in range(12)
        ]
        assert moved == want


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "decider", [Select("random", 12), Unmask(wedlm.filling(1.0)), Unmask(wedlm.filling(-math.inf))]
)
def test_streaming_with_a_cache_is_streaming_without(decider):
    model = tiny(window=5)
    cached, fresh = (
        generate(Target(model, cached=c), free(model, 12, 2, rows=3), decider, random=Keyed(3)) for c in (True, False)
    )
    assert torch.equal(cached.value["token"], fresh.value["token"])


@pytest.mark.parametrize("rule", ["random", "entropy"])
def test_what_is_kept_equals_a_causal_pass_over_the_finished_text(rule):
    model, n = tiny(window=5), 20
    canvas, target = free(model, n, 2), Target(model)
    decider = Select("random", n) if rule == "random" else Unmask(wedlm.filling(0.9))
    with torch.no_grad():
        steps = list(decode(target, canvas, decider, random=Keyed(1)))
        held = target.cache.length
        other, fresh = model.next_token(), Target(model.next_token())
        again = other.canvas({"token": canvas.value["token"]}, n - 1, layout=line(n))
        fresh.forward(fresh.plan(again), again)
    assert target.cache.plain and n - 5 <= held <= n and len(steps) >= (n - 2) // 5
    assert torch.allclose(target.cache.buffer[..., :held, :], fresh.cache.buffer[..., :held, :], rtol=0, atol=1e-9)


def test_what_is_filled_ahead_is_not_final():
    """Its keys and values came after another text than stands before it in the end: kept, they would be wrong."""
    model = tiny(window=4)
    x = text(model, 6)
    with torch.no_grad():
        ahead, whole = Target(model), Target(model.next_token())
        canvas = canvas_of(model, x, [0, 1, 3])
        ahead.forward(ahead.plan(canvas), canvas)
        final = model.next_token().canvas({"token": x}, 5, layout=line(6))
        whole.forward(whole.plan(final), final)
    ours, theirs = ahead.cache.buffer, whole.cache.buffer  # slots: start, 0, 1, then 3; start, 0, 1, 2, 3
    assert torch.allclose(ours[..., :3, :], theirs[..., :3, :], rtol=0, atol=1e-12)
    assert not torch.allclose(ours[1:, ..., 3, :], theirs[1:, ..., 4, :], atol=1e-3)


def test_keeping_what_is_filled_ahead_is_noticed():
    class Hasty(Streaming):
        """Keeps all that it knows."""

        def step(self, canvas, guess, cached):
            plan = super().step(canvas, guess, cached)
            known = None if plan is None else torch.arange(int((plan.slots.source[0] != MASK).sum()))[None]
            return plan and replace(plan, kept=known)

    model = tiny(window=5)
    model.factorization = Hasty(4, 5)
    with pytest.raises(OrderError, match="is unknown again"):
        generate(Target(model), free(model, 12), Select("random", 12), random=Keyed(3))


def test_an_element_that_is_unknown_again_needs_no_cache():
    model = tiny()
    x = text(model, 6)
    with pytest.raises(OrderError, match="what is known from the front stays so"):
        model.factorization.step(canvas_of(model, x, [0]), None, 4)


def test_rows_that_stand_elsewhere_are_decoded_together():
    model = tiny(window=3)
    given = torch.tensor([1, 5, 3])
    x = text(model, 12, 3)
    mark = torch.arange(12) < given[:, None]
    together = model.canvas({"token": x}, mark, layout=line(12))
    together = generate(Target(model), together, Select("random", 12), random=Keyed(5)).value["token"]
    for b in range(3):
        alone = model.canvas({"token": x[b : b + 1]}, mark[b : b + 1], row=torch.tensor([b]), layout=line(12))
        alone = generate(Target(model), alone, Select("random", 12), random=Keyed(5)).value["token"]
        assert torch.equal(together[b], alone[0])


# ---- which are filled ------------------------------------------------------------------------------------------------


def filled(model, canvas, decider, seed=0):
    """Which elements each forward fills, and how many slots it computes."""
    known, made = canvas.known[0].clone(), []
    for step in decode(Target(model), canvas, decider, random=Keyed(seed)):
        now = canvas.known[0].clone()
        made.append(((now & ~known).nonzero()[:, 0].tolist(), step.slots))
        known = now
    return made


@pytest.mark.parametrize(
    "window, decider", [(1, Unmask(wedlm.filling(-9.0))), (2, Unmask(wedlm.filling(-math.inf, 99.0)))]
)
def test_short_windows_go_from_left_to_right(window, decider):
    """One token a forward, which computes the last one anew: as its mask it was read, as itself it is remembered."""
    model = tiny(window=window)
    made = filled(model, free(model, 8), decider)
    assert [f for f, _ in made] == [[e] for e in range(8)]
    assert [s for _, s in made] == [1 + min(window, 8 - e) for e in range(8)]  # the start stands for the first


def test_one_token_a_forward_goes_by_entropy_and_distance():
    model, penalty = tiny(window=5), 0.05
    canvas, orders = free(model, 12), set()
    for step in range(12):
        _, rows = read(model, canvas)
        cost = {e: -float((lp.exp() * lp).sum()) + penalty * (e - min(rows)) for e, lp in rows.items()}
        before = canvas.known[0].clone()
        next(iter(decode(Target(model), canvas, Unmask(wedlm.filling(-math.inf, penalty)), random=Keyed(step))))
        (new,) = (canvas.known[0] & ~before).nonzero()[:, 0].tolist()
        assert new == min(cost, key=cost.get)
        orders.add(new == min(rows))
    assert orders == {True, False}


@pytest.mark.parametrize("penalty", [0.0, 0.03])
def test_all_below_the_threshold_are_filled_or_else_the_least(penalty):
    model, many = tiny(window=5), 0
    threshold = 0.9
    for seed in range(6):
        x = text(model, 12, seed=seed)
        canvas = Canvas(line(12), {"token": x}, 3, torch.zeros(1, 12, dtype=torch.long))
        _, rows = read(model, canvas)
        cost = {e: -float((lp.exp() * lp).sum()) + penalty * (e - min(rows)) for e, lp in rows.items()}
        want = [e for e, c in cost.items() if c < threshold] or [min(cost, key=cost.get)]
        before = canvas.known[0].clone()
        next(iter(decode(Target(model), canvas, Unmask(wedlm.filling(threshold, penalty)), random=Keyed(0))))
        assert (canvas.known[0] & ~before).nonzero()[:, 0].tolist() == want
        many += len(want) > 1
    assert many


def test_distance_is_taken_off_every_score():
    law, element = Categorical(torch.tensor([[[0.0, 3.0], [0.0, 3.1], [0.0, 3.2]]])), torch.tensor([[4, 5, 9]])
    canvas, rows = free(tiny(vocab=2), 12), Rows(law, element, law.logits, None, law)
    picks = []
    for rule, penalty in itertools.product(("confidence", "margin", "entropy"), (0.0, 1.0)):
        step = Select(rule, 12, commit=Above(math.inf), penalty=penalty).decide(canvas, None, rows, Generator(0))
        picks.append(int(step.edits[0].element.max()))
    assert picks[1::2] == [4, 4, 4] and picks[2::2] == [9, 9]


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block, length", [(2, 4), (3, 4), (4, 4)])
def test_the_bound_is_the_mean_over_orders_inside_blocks(block, length):
    """Over every draw of counts and sets; decoded one token at a time, as by a window that ends with the block."""
    model = tiny(block, 4, length, vocab=2)
    x = text(model, length, 3)
    canvas, target = model.canvas({"token": x}), Target(model, cached=False)
    parts = [list(range(s, min(s + block, length))) for s in range(0, length, block)]
    bound, surprise = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for part in parts:
            for count in range(1, len(part) + 1):
                sets = list(itertools.combinations(part, count))
                for some in sets:
                    hidden = torch.isin(torch.arange(length), torch.tensor(some)).expand(3, -1)
                    bound += model.hidden_losses(canvas, hidden).sum(1) / count / len(sets)
        orders = [list(itertools.chain(*o)) for o in itertools.product(*map(itertools.permutations, parts))]
        for order in orders:
            for i, e in enumerate(order):
                known = torch.isin(torch.arange(length), torch.tensor(order[:i], dtype=torch.long)).expand(3, -1)
                present = model.canvas({"token": x}, known)
                rows = target.forward(target.plan(present), present)
                column = rows.element[0].tolist().index(e)
                surprise -= rows.dist.log_prob(x[:, rows.element[0].clamp(min=0)])[:, column] / len(orders)
    assert torch.allclose(bound, surprise, rtol=0, atol=1e-9)


def test_it_is_trained_by_both_streams_and_scored_by_the_masks():
    model = tiny(4, 4)
    x = text(model, 12, 5)
    canvas, plain = model.canvas({"token": x}), model.next_token()
    scored = model.losses(canvas, random=Generator(3))
    hidden, weight = model.drawn(canvas, Generator(3))
    assert torch.allclose(scored, model.hidden_losses(canvas, hidden) * weight, rtol=0, atol=1e-12)
    tokens = plain.losses(plain.canvas({"token": x}))
    for alpha in (0.0, 1.0, 3.0):
        model.alpha = alpha
        trained = model.train().losses(canvas, random=Generator(3))
        model.eval()
        assert torch.allclose(trained, (alpha * tokens + scored) / (1 + alpha), rtol=0, atol=1e-9)
    with pytest.raises(TypeError, match="no likelihood"):
        model.losses(canvas, strict=True)


def test_every_weight_is_trained_and_given_tokens_are_not_learned():
    model = tiny().requires_grad_(True).train()
    losses = model.losses(model.canvas({"token": text(model, 12, 4)}, 3), random=Generator(0))
    assert bool((losses[:, :3] == 0).all()) and bool((losses[:, 3:] > 0).all())
    losses.sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


def test_each_block_hides_a_number_of_its_own():
    model, rows = tiny(4), 400
    hidden, weight = model.train().drawn(model.canvas({"token": text(model, 12, rows)}), Generator(1))
    counts = hidden.unflatten(1, (3, 4)).sum(2)
    assert torch.equal(weight[:, ::4], 4 / counts)  # one over the share that is hidden
    assert all((counts == n).double().mean() == pytest.approx(0.25, abs=0.02) for n in range(1, 5))
    assert bool((counts[:, 0] != counts[:, 1]).any())


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


@pytest.fixture(scope="module")
def made(base, book):
    settings = {"steps": 1, "learning_rate": 1e-9, "block": 8, "batch": 2}
    return train("wedlm", book, from_=base, out=book.parent / "run", settings=settings)


def test_it_begins_as_a_next_token_model_whose_text_it_goes_on_to_read(made, base, book):
    theirs, ours = load(base), load(book.parent / "run")
    taken, mine = theirs.model.state_dict(), ours.model.state_dict()
    assert isinstance(ours, wedlm.WeDLM) and set(mine) - set(taken) == {"embed.mask"}
    assert all(torch.allclose(mine[n], x, atol=1e-6) for n, x in taken.items())
    x, alone = text(theirs.model, 32), ours.model.next_token()
    assert torch.allclose(alone.log_prob(alone.canvas({"token": x})), theirs.log_prob(x), atol=1e-3)
    figures = evaluate(ours, book)
    assert figures["likelihood"] == "bound" and math.isfinite(figures["bits_per_byte"])


def test_text_is_written_until_it_ends(made):
    one = made.system.eval().requires_grad_(False)
    sampling = Sampling(temperature=0.7)
    canvas = one.prompted("The quick", 16)
    list(decode(one.target(None, sampling), canvas, one.decider(sampling), random=Keyed(0)))
    assert canvas.done and len(canvas.read("token")[0]) == 9 + 16
    stop = int(canvas.value["token"][0, 14])
    again = one.prompted("The quick", 16)
    decider = Unmask(wedlm.filling(one.config.threshold, one.config.penalty), (stop,))
    list(decode(one.target(None, sampling), again, decider, random=Keyed(0)))
    ids = again.read("token")[0].tolist()
    assert ids[-1] == stop and stop not in ids[9:-1]


@pytest.mark.parametrize("cls", [wedlm.WeDLM, sdar.SDAR])
def test_what_is_streamed_is_what_stands_behind_the_prompt(cls):
    torch.manual_seed(0)
    one = cls(cls.Config(length=64, **SMALL)).eval()
    canvas = one.prompted("abcdef", 10)
    list(decode(one.target(None, one.sampling), canvas, one.decider(one.sampling), random=Keyed(0)))
    ids = canvas.read("token")[0].tolist()
    assert "".join(one.stream("abcdef", 10)) == one.tokenizer.decode(ids[6:])


@pytest.mark.parametrize("decoder", ["unmask", "fast-dllm"])
def test_decoders_of_tokens_in_any_order_write_by_its_window(decoder):
    torch.manual_seed(0)
    one = wedlm.WeDLM(wedlm.Config(length=64, **SMALL)).eval()
    steps = []
    list(one.stream("abcdef", 20, one.sampling, 0, decoder_of(one, decoder, one.sampling), steps))
    assert sum(int((step.edits[0].element >= 0).sum()) for step in steps) == 20
    assert all(step.slots <= 7 + one.config.window + 6 for step in steps)


def test_a_number_of_steps_is_not_its_choice(made, book, capsys):
    assert main(["generate", str(book.parent / "run"), "--prompt", "The", "--steps", "4"]) == 2
    assert "leave out the steps" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"block": 0}, "a block holds 1 to 512"),
        ({"window": 0}, "a window holds 1 to 512"),
        ({"alpha": -1.0}, "at least 0"),
        ({"penalty": -0.1}, "at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        wedlm.Config(**wrong)


def test_the_claim_measures_what_was_trained(book):
    """Weights that know nothing: as many forwards as it says, and no text that anybody expects."""
    judge = load("zoo:text-base")
    for key, cls in (("wedlm", wedlm.WeDLM), ("sdar", sdar.SDAR)):
        torch.manual_seed(0)
        made = cls(cls.Config(length=64, vocab=4096, block=4, **SMALL), judge.tokenizer)
        trained = SimpleNamespace(system=made, data=load_data(book, "text"))
        figures = wedlm.streams(trained, prompts=2, new_tokens=12, start=20)
        assert figures["tokens"] == 24 and figures["forwards"] == 24  # nothing is sure: one token a forward
        assert figures["tokens_per_forward"] == 1 and 0 < figures["distinct_share"] <= 1
        if (
            key == "wedlm"
        ):  # a text: its start, each token once as itself, and the window, which may be short at the end
            assert 12 / (1 + 12 + 12 * 6) <= figures["cacheability"] <= 12 / (1 + 11 + 12 * 6 - 15)
        assert figures["nats_per_token"] > 7  # chance is 8.3
    assert {arm.system for arm in wedlm.CLAIM.arms.values()} == {"wedlm", "sdar"}
