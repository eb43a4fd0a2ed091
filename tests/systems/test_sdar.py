"""SDAR: the bound of blocks by enumeration, what is hidden in training, and a model that begins as another."""

from __future__ import annotations

import itertools

import pytest
import torch

from seriatim.cli.main import main
from seriatim.decoding.loop import decode
from seriatim.decoding.target import Target
from seriatim.laws.case import randomise
from seriatim.objectives.masked import LEAST, by_count, by_time
from seriatim.random import Generator, Keyed
from seriatim.systems.system import Sampling, begin_as
from seriatim.systems.text import mdlm, next_token, sdar
from seriatim.tokenizers.text import ByteTokenizer
from seriatim.verbs.load import load
from seriatim.verbs.train import train

SMALL = {"width": 16, "depth": 1, "heads": 2}
TEXT = "The quick brown fox jumps over the lazy dog.\n\n"


def tiny(block=2, length=4, vocab=2, **settings):
    model = sdar.build(sdar.Config(length=length, vocab=vocab, width=16, depth=2, heads=2, block=block, **settings))
    return randomise(model)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_text(TEXT * 200, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(book):
    """A next-token model in a folder."""
    out = book.parent / "base"
    train("next-token", book, out=out, settings={**SMALL, "length": 32, "steps": 2, "batch": 2})
    return out


# ---- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block, length", [(2, 4), (3, 4), (4, 4)])
def test_the_bound_is_the_mean_over_orders_inside_blocks(block, length):
    """Over every draw of counts and sets, all blocks at once."""
    model = tiny(block, length)
    x = torch.randint(2, (3, length), generator=torch.Generator().manual_seed(0))
    canvas, target = model.canvas({"token": x}), Target(model, cached=False)
    parts = [list(range(s, min(s + block, length))) for s in range(0, length, block)]
    bound = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for part in parts:  # the losses of a block depend on nothing that is hidden elsewhere
            for count in range(1, len(part) + 1):
                sets = list(itertools.combinations(part, count))
                for some in sets:
                    hidden = torch.isin(torch.arange(length), torch.tensor(some)).expand(3, -1)
                    bound += model.hidden_losses(canvas, hidden).sum(1) / count / len(sets)
        surprise = torch.zeros(3, dtype=torch.float64)
        orders = [list(itertools.chain(*o)) for o in itertools.product(*map(itertools.permutations, parts))]
        for order in orders:
            for i, e in enumerate(order):
                known = torch.isin(torch.arange(length), torch.tensor(order[:i], dtype=torch.long)).expand(3, -1)
                present = model.canvas({"token": x}, known)
                rows = target.forward(target.plan(present), present)
                column = rows.element[0].tolist().index(e)
                surprise -= rows.dist.log_prob(x[:, rows.element[0].clamp(min=0)])[:, column] / len(orders)
    assert torch.allclose(bound, surprise, rtol=0, atol=1e-9)


@pytest.mark.parametrize("block, length, given", [(2, 8, 0), (3, 8, 0), (3, 8, 4), (8, 8, 0)])
def test_each_block_is_hidden_at_its_own_time_or_all_at_one(block, length, given):
    model, batch = tiny(block, length), 400
    canvas = model.canvas({"token": torch.zeros(batch, length, dtype=torch.long)}, given)
    for together in (True, False):
        model.together = together
        hidden, weight = model.train().drawn(canvas, Generator(1))
        assert not bool(hidden[:, :given].any()) and hidden.shape == weight.shape == (batch, length)
        t = 1 / weight
        assert bool((t >= LEAST).all()) and bool((t <= 1).all())
        first, last = t[:, 0], t[:, -1]
        assert torch.equal(first, last) == (together or block == length)
        for column in (first, last):  # spread evenly over the batch
            assert torch.allclose(column.sort().values, (torch.arange(batch) + 0.5) / batch, atol=2 / batch + LEAST)
        share = hidden[:, given:].double().mean()
        assert abs(float(share) - 0.5) < 0.06
        expected = (hidden.double() * weight)[:, given:].mean()  # one, whatever the times
        assert abs(float(expected) - 1) < 0.35
    hidden, weight = model.eval().drawn(canvas, Generator(1))
    for start in range(0, length, block):
        free = range(max(start, given), min(start + block, length))
        if len(free):
            count = hidden[:, list(free)].sum(1)
            assert torch.equal(weight[:, free[0]], len(free) / count) and set(count.tolist()) == {
                *range(1, len(free) + 1)
            }


def test_a_draw_of_a_bound_is_no_likelihood():
    model = tiny()
    assert (model.masking, model.judging) == (by_time, by_count)
    with pytest.raises(TypeError, match="no exact likelihood"):
        model.log_prob(model.canvas({"token": torch.zeros(1, 4, dtype=torch.long)}))


# ---- a model that begins as another ----------------------------------------------------------------------------------


def test_it_begins_with_the_weights_of_a_next_token_model(base, book, tmp_path):
    made = train(
        "sdar", book, from_=base, out=tmp_path / "run", settings={"steps": 1, "learning_rate": 1e-9, "block": 4}
    )
    theirs, ours = load(base), load(tmp_path / "run")
    assert isinstance(ours, sdar.SDAR) and ours.config == made.system.config
    assert (ours.config.width, ours.config.length, ours.config.block) == (16, 32, 4)
    taken = {n: x for n, x in theirs.model.state_dict().items() if n != "embed.start"}
    mine = ours.model.state_dict()
    assert set(mine) - set(taken) == {"embed.mask"} and len(taken) > 5
    assert all(torch.allclose(mine[n], x, atol=1e-6) for n, x in taken.items())


def test_an_interrupted_conversion_goes_on_as_if_it_had_not_been(base, book, tmp_path):
    settings = {"steps": 4, "batch": 2}
    whole = train("sdar", book, from_=base, out=tmp_path / "whole", settings=settings)

    class Cut:
        def update(self, step, steps, figures):
            if step == 2:
                raise KeyboardInterrupt

        def close(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        train("sdar", book, from_=base, out=tmp_path / "cut", settings=settings, bar=lambda name: Cut())
    again = train("sdar", book, from_=base, out=tmp_path / "cut", settings=settings, resume=True)
    one, two = whole.system.model.state_dict(), again.system.model.state_dict()
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--length", "64"], "reads 32 tokens, and a length of 64"),
        (["--lora", "4"], "leave out the adapter"),
        (["--size", "small"], "are not chosen anew"),
        (["--width", "32"], "cannot be 32"),
        (["--block", "0"], "a block holds 1 to 32 tokens"),
    ],
)
def test_what_the_base_has_decided_is_not_chosen_anew(base, book, tmp_path, more, said, capsys):
    command = ["train", "sdar", "--from", str(base), "--data", str(book), "--out", str(tmp_path / "run"), *more]
    assert main(command) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_another_system_or_shape_is_refused(book, tmp_path):
    out = tmp_path / "mdlm"
    train("mdlm", book, out=out, settings={**SMALL, "length": 32, "steps": 1, "batch": 2})
    with pytest.raises(ValueError, match="begins as a next-token model"):
        train("sdar", book, from_=out, out=tmp_path / "run")
    base = next_token.NextToken(next_token.Config(length=32, width=32, depth=1, heads=2))
    for other in ({"width": 16, "depth": 1}, {"width": 32, "depth": 2}):
        made = sdar.SDAR(sdar.Config(length=32, heads=2, **other))
        before = {n: x.clone() for n, x in made.model.state_dict().items()}
        with pytest.raises(ValueError, match="no model of the same shape"):
            begin_as(made, base)
        assert all(torch.equal(before[n], x) for n, x in made.model.state_dict().items())


# ---- decoding --------------------------------------------------------------------------------------------------------


def system(**settings):
    torch.manual_seed(0)
    made = sdar.SDAR(sdar.Config(length=64, width=16, depth=2, heads=2, **settings))
    return made.double().eval().requires_grad_(False)


@pytest.mark.parametrize("prompt", ["", "abcd", "abcdef"])
def test_blocks_are_decided_from_left_to_right_whatever_the_prompt(prompt):
    one, seen = system(block=4, threshold=1.0), []
    canvas = one.prompted(prompt, 15)
    for _ in decode(one.target(None, one.sampling), canvas, one.decider(one.sampling), random=Keyed(0)):
        seen.append(canvas.known[0].clone())
    assert canvas.done and len(seen) == 15  # nothing is as sure as 1: one token a step
    for known in seen:
        whole = [bool(known[s : s + 4].all()) for s in range(0, len(known), 4)]
        begun = [bool(known[s : s + 4].any()) for s in range(max(len(prompt), 1) // 4 * 4, len(known), 4)]
        assert begun == sorted(begun, reverse=True)
        assert sum(begun) <= sum(whole[-len(begun) :]) + 1


def test_a_lower_threshold_and_fewer_steps_take_fewer_forwards():
    one = system(block=4)

    def forwards(**sampling):
        done: list = []
        list(one.stream("abc", 21, Sampling(temperature=0, **sampling), trace=done))
        return len(done)

    one.config = sdar.Config(length=64, width=16, depth=2, heads=2, threshold=1e-9)
    assert forwards() == 6  # a block a forward
    assert forwards(steps=12) == 11 and forwards(steps=24) == 21  # the prompt leaves one place of a block


def test_the_rule_is_one_of_selection():
    with pytest.raises(ValueError, match="rule is random, confidence"):
        sdar.Config(rule="luck")
    assert mdlm.MDLM.decider is sdar.SDAR.decider


def test_a_prompt_is_not_streamed_again():
    torch.manual_seed(0)
    one = sdar.SDAR(sdar.Config(length=32, **SMALL), ByteTokenizer()).eval()
    for prompt in ("", "a", "abcde"):
        text = "".join(one.stream(prompt, 12))
        assert len(text) <= 12 and not (prompt and text.startswith(prompt))


def test_a_window_shorter_than_the_model_takes_is_trained_and_longer_texts_are_written():
    one = sdar.SDAR(sdar.Config(length=32, window=8, width=16, depth=1, heads=2), ByteTokenizer())
    examples = one.examples(["abcdefgh" * 20])
    assert examples.take(torch.arange(2))["token"].shape == (2, 8)
    total, count = one.train()(examples.take(torch.arange(2)), Generator(0), 0, 1)
    assert int(count) == 16 and bool(torch.isfinite(total))
    assert len(list(one.eval().stream("ab", 20))) > 0
    with pytest.raises(ValueError, match="window up to 32"):
        sdar.Config(length=32, window=64)
