"""ILM: what it learns, by enumeration on tiny vocabularies; gaps; and its text through the command line."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from seriatim.cli.main import main
from seriatim.decoding.insert import Inserting
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.target import Target
from seriatim.evaluation.cost import parameters
from seriatim.laws.case import randomise
from seriatim.laws.tabular import total_variation
from seriatim.layout import line
from seriatim.objectives.inserted import with_gap
from seriatim.random import Generator, Keyed, enumerate_law
from seriatim.systems.infill import Gap
from seriatim.systems.meta import load as module_of
from seriatim.systems.system import Sampling
from seriatim.systems.text import ilm
from seriatim.verbs.load import load, system_class
from seriatim.verbs.train import train
from support.insertion_tables import V, optimum


def decoded(model, longest):
    def run(random):
        canvas = model.canvas({"token": torch.zeros(1, 1, dtype=torch.long)}, layout=line(1))
        generate(Target(model, cached=False), canvas, Inserting(longest + 1), random=random)
        return tuple(canvas.read("token")[0].tolist())

    return enumerate_law(run)


def a_law(lengths, seed=0):
    texts = [t for n in lengths for t in itertools.product(range(V), repeat=n)]
    p = (2 * torch.randn(len(texts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(0)
    return dict(zip(texts, p.tolist(), strict=True))


# ---- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length_weight", [False, True])
def test_the_optimum_is_the_law_of_data_of_one_length(length_weight):
    """Repeated tokens included: "aa" and "aba" add up over all ways to insert."""
    law = a_law([3])
    assert total_variation(decoded(optimum(law, 3, length_weight), 3), law) < 1e-12


def test_with_lengths_that_differ_it_is_so_only_if_texts_weigh_by_length():
    """Without, the optimum stops too early: all that is too probable is short."""
    law = a_law([0, 1, 2, 3])
    assert total_variation(decoded(optimum(law, 3, True), 3), law) < 1e-12
    early = decoded(optimum(law, 3, False), 3)
    assert total_variation(early, law) > 0.05

    def mean(p):
        return sum(len(t) * q for t, q in p.items())

    assert mean(early) < mean(law) - 0.1


def small(length=5, vocab=3, **settings):
    return randomise(ilm.build(ilm.Config(length=length, vocab=vocab, width=16, depth=1, heads=2, **settings)))


def said_of(model, canvas, dropped):
    """The choices of the very canvas that decoding would see, by hand: (slots x vocabulary, stopping)."""
    shown, _ = with_gap(canvas, dropped)
    plan = model.factorization.step(shown, None, 0)
    with torch.no_grad():
        return model.dist(model.hidden(plan, shown), plan, shown)[0].logits[:, 0]


@pytest.mark.parametrize("text", [(0, 1, 2, 1, 0), (1, 1, 1, 1, 1), (2, 0, 0, 2), (1,)])
def test_targets_are_counts_of_what_is_missing_behind_each_slot(text):
    """Against counting by brute force, over all sets that can be dropped."""
    model, n = small(), len(text)
    canvas = model.canvas({"token": torch.tensor([text])}, layout=line(n))
    for dropped in itertools.product((False, True), repeat=n):
        mask = torch.tensor([dropped])
        slots = n - sum(dropped) + 1
        target, slot = torch.zeros(slots * 3 + 1, dtype=torch.float64), 0
        for token, gone in zip(text, dropped, strict=True):
            slot += not gone
            target[3 * slot + token] += gone
        if any(dropped):
            target /= sum(dropped)
        else:
            target[-1] = 1.0
        said = said_of(model, canvas, mask)[0]
        want = -(target * said.masked_fill(target == 0, 0.0)).sum()
        with torch.no_grad():
            got = model.dropped_losses(canvas, mask)[0]
        assert abs(float(got - want)) < 1e-12


def test_where_nothing_is_missing_only_stopping_is_learned():
    model = small()
    canvas = model.canvas({"token": torch.tensor([[0, 1, 2, 1, 0]])})
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    model.dropped_losses(canvas, nothing).sum().backward()
    head = model.heads["token"]
    assert float(head.weight.grad.abs().max()) == 0 and float(head.stop.grad.abs().max()) > 0


def test_every_number_of_tokens_is_dropped_equally_often_and_every_set():
    model = small()
    canvas = model.canvas({"token": torch.zeros(6000, 5, dtype=torch.long)}, 1, layout=line(5))
    dropped = model.drawn(canvas, Generator(0))
    assert not bool(dropped[:, 0].any())
    counts = dropped.sum(1).bincount(minlength=5)
    assert counts.tolist() == [1200] * 5
    pairs = dropped[dropped.sum(1) == 2].long() @ (2 ** torch.arange(5))
    met = pairs.unique(return_counts=True)[1]
    assert len(met) == 6 and bool(((met - 200).abs() < 5 * 13).all())  # five standard deviations: 1 in 100,000 fails


def test_rows_of_any_length_and_with_prompts_are_those_texts_alone():
    """Neither padding, nor the prompt of another row, is seen or dropped."""
    model = small(8)
    rows = [([2, 0], [1, 1, 2]), ([], [0, 2]), ([1], [2, 2, 0, 1])]
    value, given = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.bool)
    counts = torch.zeros(3, 6, dtype=torch.bool)
    for b, (prompt, answer) in enumerate(rows):
        value[b, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        given[b, : len(prompt)] = True
        counts[b, len(prompt) : len(prompt) + len(answer)] = True
    system = ilm.ILM(ilm.Config(length=8, width=16, depth=1, heads=2)).double()
    canvas = system.canvas({"token": value, "counts": counts})[0]
    assert canvas.status.eq(0).tolist() == given.tolist() and canvas.open.tolist() == counts.tolist()
    g = torch.Generator().manual_seed(0)
    for _ in range(8):
        dropped = counts & (torch.rand(3, 6, generator=g) < 0.5)
        together = model.dropped_losses(canvas, dropped).detach()
        for b, (prompt, answer) in enumerate(rows):
            n = len(prompt) + len(answer)
            alone = model.canvas({"token": value[b : b + 1, :n]}, len(prompt), layout=line(n))
            loss = model.dropped_losses(alone, dropped[b : b + 1, :n]).detach()
            assert abs(float(loss - together[b])) < 1e-12
            at = said_of(model, alone, dropped[b : b + 1, :n])[0, :-1].view(-1, 3) > -torch.inf
            assert at.any(1).nonzero()[:, 0].tolist() == [*range(len(prompt), len(at))]


def test_the_bound_is_above_the_surprise_of_a_text():
    made = ilm.case()
    law = made.law()
    x = torch.tensor([t for t in law if -1 not in t])
    model, total = made.model, torch.zeros(len(x), dtype=torch.float64)
    canvas = model.canvas({"token": x})
    for dropped in itertools.product((False, True), repeat=3):
        mask = torch.tensor(dropped).expand(len(x), -1)
        with torch.no_grad():
            total += model.dropped_losses(canvas, mask) / math.comb(3, sum(dropped))
    bound = total - math.lgamma(4)
    surprise = torch.tensor([-math.log(law[tuple(t)]) for t in x.tolist()], dtype=torch.float64)
    assert bool((bound > surprise + 1e-6).all()) and float((bound - surprise).max()) < 2
    draws = torch.stack([model.bound(canvas, Generator(i)) for i in range(3)])
    assert draws.shape == (3, len(x)) and draws.dtype == torch.float64


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_the_order_of_the_array_is_immaterial():
    """A text whose elements stand anywhere in the array gives the same choices, slot by slot."""
    made = ilm.case()
    model, text = small(6), torch.tensor([[2, 0, 1, 1, 2]])
    want = None
    for order in itertools.islice(itertools.permutations(range(5)), 0, None, 7):
        case = ilm.InsertionsOf(model, vocab=3)
        canvas = case.holding(text[:, list(order)])
        canvas.place[:, 1:] = 1 + torch.tensor(order)
        assert canvas.read("token")[0].tolist() == text[0].tolist()
        plan = model.factorization.step(canvas, None, 0)
        with torch.no_grad():
            said = model.dist(model.hidden(plan, canvas), plan, canvas)[0].logits
        want = said if want is None else want
        assert torch.equal(said, want) or float((said - want).abs().max()) < 1e-12
    assert made.vocab == 2


def system(**settings):
    torch.manual_seed(0)
    made = ilm.ILM(ilm.Config(length=40, width=16, depth=2, heads=2, **settings))
    randomise(made.model, std=0.3)
    return made.double().eval().requires_grad_(False)


@pytest.mark.parametrize("before, after", [("ab", "yz"), ("", "yz"), ("ab", ""), ("", "")])
def test_a_gap_between_texts_is_filled_and_nothing_else(before, after):
    one, trace = system(stop=0.999), []
    one.model.heads["token"].stop_bias -= 30.0  # never complete of itself
    canvas = one.gapped([before, Gap(), after])
    for step in decode(one.target(None, one.sampling), canvas, one.inserter(one.sampling, len(before + after) + 6)):
        trace.append(step)
        text = canvas.read("token")[0].tolist()
        assert text[: len(before)] == list(before.encode())
        assert text[len(text) - len(after) :] == list(after.encode())
    assert len(text) == len(before + after) + 6 and len(trace) == 7  # insertions, and the end
    texts = ["".join(one.infill([before, Gap(), after], Sampling(), seed=s)) for s in (1, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) > 1
    assert all(text.startswith(before) and text.endswith(after) for text in texts)


def test_several_gaps_are_filled_and_given_text_stays_together():
    one = system(stop=0.999)
    one.model.heads["token"].stop_bias -= 30.0
    text = "".join(one.infill("ab<fill>cd<fill>ef", Sampling(), seed=1))
    assert text.startswith("ab") and text.endswith("ef") and "cd" in text and len(text) > 8


def test_a_text_is_as_long_as_its_insertions():
    one = system(stop=None)
    for seed in range(4):
        trace: list = []
        canvas = one.prompted("ab", 20)
        for step in decode(one.target(None, Sampling()), canvas, one.inserter(Sampling(), 22), random=Keyed(seed)):
            trace.append(step)
        inserted = sum(type(e).__name__ == "Insert" for step in trace for e in step.edits)
        assert len(canvas.read("token")[0]) == 2 + inserted <= 22


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="this model takes 40 in all"):
        list(system().infill("a" * 30 + "<fill>" + "b" * 10))
    with pytest.raises(ValueError, match="are asked for"):
        system().write("a", 40)
    with pytest.raises(ValueError, match="share of the windows"):
        ilm.Config(short=2)
    with pytest.raises(ValueError, match="stop is a probability"):
        ilm.Config(stop=1.5)


# ---- the command line, and the claim ---------------------------------------------------------------------------------


def test_it_trains_and_writes_by_the_command_line(tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200, encoding="utf-8")
    shape = ["--width", "16", "--depth", "1", "--heads", "2", "--length", "24", "--batch", "4"]
    run = str(tmp_path / "run")
    assert main(["train", "ilm", "--data", str(book), "--out", run, "--steps", "3", *shape]) == 0
    assert main(["generate", run, "--prompt", "The ", "--length", "8"]) == 0
    assert "The " in capsys.readouterr().out
    made = load(run)
    assert isinstance(made, ilm.ILM) and "".join(made.infill("The <fill> fox")).startswith("The ")
    nats, tokens = made.score(made.examples([book.read_text(encoding="utf-8")]), 4)
    assert tokens == 4 * 24 and 0 < nats / tokens < 10


def test_arms_of_the_claim_are_alike_and_are_measured_by_exact_paths(tmp_path):
    sizes = {}
    for key, arm in ilm.CLAIM.arms.items():
        settings = {**arm.settings, "width": 16, "depth": 1, "heads": 2, "batch": 2, "steps": 1}
        made = train(
            arm.system, "stars", out=tmp_path / key, tokenizer="words", settings=settings, count=60, **arm.options
        )
        figures = ilm.paths_found(made, 2)
        assert 0 <= figures["exact_paths"] <= figures["first_steps"] <= 1
        cls = system_class(arm.system)
        own = {k: v for k, v in arm.settings.items() if k not in ilm.TRAINING}
        sizes[key] = parameters(cls(cls.Config(**own, vocab=40)).model)
    assert max(sizes.values()) < 1.02 * min(sizes.values()), sizes
    assert module_of("ilm").CLAIM.baseline == "next-token"


def test_exact_paths_are_counted():
    """A system that knows the answers, and one that always takes the first letters of a graph."""

    class Knows:
        tokenizer = type("T", (), {"encode": staticmethod(lambda text: text.split())})
        model = type("M", (), {"layout": line(60)})

        def __init__(self, answers):
            self.answers = answers

        def write(self, prompt, length, sampling, seed=0):
            assert sampling.temperature == 0 and sampling.steps is None
            return self.answers[prompt]

    from seriatim.data.base import load_data

    data = load_data("stars", "text", count=60)
    pairs = data.test.pairs
    right = type("Trained", (), {"system": Knows(dict(pairs)), "data": data})
    assert ilm.paths_found(right) == {"exact_paths": 1.0, "first_steps": 1.0}
    cut = type("Trained", (), {"system": Knows({p: a[:-1] for p, a in pairs}), "data": data})
    assert ilm.paths_found(cut)["exact_paths"] == 0.0
