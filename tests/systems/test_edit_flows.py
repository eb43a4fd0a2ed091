"""Edit Flows: rates that are learned lead to the law of the data, by integration over time; what a step does; the
command line.

`Rated` is a model whose rate of every edit of every text is free. A loss u - c log u has the gradients w - c at log u
= 0 and 2 w - c at log u = log 2, which tells the weights w and c of all draws, and with them the optimum c / w of the
very code that trains.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from seriatim.canvas import Delete, Insert, Revise, Set
from seriatim.cli.main import main
from seriatim.decoding.edits import Editing
from seriatim.decoding.filters import Warper
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.target import Target
from seriatim.factorization.insertion import opened
from seriatim.heads.edits import EditHead, Rates
from seriatim.laws.case import randomise
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.tabular import total_variation
from seriatim.layout import line
from seriatim.objectives.edited import DELETION, INSERTION, LEAST, MATCH, Edited, aligned
from seriatim.random import Generator, Keyed
from seriatim.systems.system import Sampling
from seriatim.systems.text import edit_flows
from seriatim.verbs.load import load
from support.insertion_tables import Texts, V, name, parts
from support.insertion_tables import optimum as chosen


class Rated(Texts):
    """A free log-rate of every edit at every text of up to `longest` tokens."""

    def __init__(self, longest, edits):
        super().__init__()
        self.edits, size = edits, 2 * V + 1 if edits else V
        texts = [t for n in range(longest + 1) for t in itertools.product(range(V), repeat=n)]
        self.table = nn.ParameterDict({
            name(t): nn.Parameter(torch.zeros(len(t) + 1, size, dtype=torch.float64)) for t in texts
        })  # fmt: skip

    def dist(self, h, reads, canvas):
        (row,) = h[..., 0].long().tolist()
        text = tuple(x for x in row if x >= 0)
        rates = self.table[name(text)]
        closed = torch.zeros_like(rates, dtype=torch.bool)
        closed[0, V:] = True  # the start is no token
        for slot, token in enumerate(text if self.edits else ()):
            closed[slot + 1, V + token] = True  # no token is put in place of itself
        return Rates(rates.masked_fill(closed, -torch.inf)[None], V)


def rated(longest, start=0):
    return Edited(*parts(Rated(longest + start, start > 0), longest), start=start)


def draws(law, start):
    """Every draw of (text, what it began with, alignment, columns that have jumped) and its probability, but for that
    of the jumps."""
    for text, p in law.items():
        n = len(text)
        for first in itertools.product(range(V), repeat=start):
            for pairs in range(min(n, start) + 1):
                counts = (MATCH, pairs), (DELETION, start - pairs), (INSERTION, n - pairs)
                kinds = {*itertools.permutations([kind for kind, count in counts for _ in range(count)])}
                for kind in kinds:
                    for jumped in itertools.product((False, True), repeat=len(kind)):
                        yield text, first, kind, jumped, p / V**start / (min(n, start) + 1) / len(kinds)


def tallied(law, longest, start=0):
    """For each number of columns that are left and done, and each text: how often it is met (w), and how often each
    edit is a target there (c)."""
    model = rated(longest, start)
    table, found = model.heads["token"].table, {}
    for value in (0.0, math.log(2)):
        for rates in table.values():
            rates.data.fill_(value)
        for text, first, kind, jumped, p in draws(law, start):
            canvas = model.canvas({"token": torch.tensor([text], dtype=torch.long)}, layout=line(len(text)))
            begun, kinds, done = (torch.tensor([x]).reshape(1, len(x)) for x in (first, kind, jumped))
            loss = model.edited_losses(canvas, begun.long(), kinds.long(), done.bool(), torch.tensor([0.5]))
            for rates in table.values():
                rates.grad = None
            (p * loss).sum().backward()
            group = found.setdefault((len(kind) - sum(jumped), sum(jumped)), {0.0: {}, math.log(2): {}})[value]
            for k, rates in table.items():
                if rates.grad is not None:
                    group[k] = group.get(k, 0.0) + rates.grad
    shape = {k: torch.zeros_like(r) for k, r in table.items()}
    low, high = (
        {g: {k: zero + both[v].get(k, 0.0) for k, zero in shape.items()} for g, both in found.items()}
        for v in (0.0, math.log(2))
    )
    return {g: {k: (high[g][k] - low[g][k], high[g][k] - 2 * low[g][k]) for k in shape} for g in found}


def optimum(tally, level):
    """The rates that minimise the expected loss, when a share `level` of the columns has not jumped."""
    best = {}
    for k in next(iter(tally.values())):
        chances = [(level**left * (1 - level) ** done, group[k]) for (left, done), group in tally.items()]
        met, target = (sum(p * pair[i] for p, pair in chances) for i in (0, 1))
        best[k] = torch.where(met > 1e-300, target / met.clamp(min=1e-300), 0.0)
    return best


def after(text, slot, edit):
    """A text once edit `edit` happened at a slot."""
    if edit < V:
        return (*text[:slot], edit, *text[slot:])
    if edit < 2 * V:
        return (*text[: slot - 1], edit - V, *text[slot:])
    return (*text[: slot - 1], *text[slot:])


def flowed(law, longest, start, steps=400, end=12.0):
    """The law at the end of a process with the optimal rates, integrated over -log(level), the time in which columns
    jump at rate 1: a Runge-Kutta step of order 4 each."""
    texts = [t for n in range(longest + start + 1) for t in itertools.product(range(V), repeat=n)]
    number, tally, h = {t: i for i, t in enumerate(texts)}, tallied(law, longest, start), end / steps
    p = torch.tensor([len(t) == start for t in texts]).double() / V**start

    def matrix(time):
        rates, out = optimum(tally, math.exp(-time)), torch.zeros(len(texts), len(texts), dtype=torch.float64)
        for t in texts:
            for slot, edit in (rates[name(t)] > 0).nonzero().tolist():
                u = rates[name(t)][slot, edit]
                out[number[t], number[after(t, slot, edit)]] += u
                out[number[t], number[t]] -= u
        return out

    later = matrix(0.0)
    for n in range(steps):
        now, half, later = later, matrix((n + 0.5) * h), matrix((n + 1) * h)
        k1 = p @ now
        k2 = (p + h / 2 * k1) @ half
        k3 = (p + h / 2 * k2) @ half
        p = p + h / 6 * (k1 + 2 * k2 + 2 * k3 + (p + h * k3) @ later)
    return {t: float(x) for t, x in zip(texts, p, strict=True) if x > 1e-12}


# ---- what is learned -------------------------------------------------------------------------------------------------


def test_one_token_that_is_inserted_has_the_law_of_the_data():
    law = {(0,): 0.3, (1,): 0.7}
    for level in (0.9, 0.3, 0.01):
        rates = optimum(tallied(law, 1), level)
        assert torch.allclose(rates["t"], torch.tensor([[0.3, 0.7]], dtype=torch.float64))
        assert float(rates["t0"].abs().max()) == float(rates["t1"].abs().max()) == 0
    assert total_variation(flowed(law, 1, 0), law) < 2e-5


@pytest.mark.parametrize("law", [{(0,): 0.3, (1,): 0.7}, {(): 0.5, (1,): 0.4, (0,): 0.1}, {(): 1.0}], ids=str)
def test_one_token_that_is_put_deleted_or_inserted_has_the_law_of_the_data(law):
    """Every text begins with a random token, so that all kinds of edits are met; what is present tells less and less
    of what a text began with, so that rates depend on time."""
    tally = tallied(law, 1, 1)
    early, late = (optimum(tally, level)["t0"] for level in (0.9, 0.1))
    assert float(early[1].max()) > float(late[1].max()) > 0 or law == {(): 1.0}
    assert total_variation(flowed(law, 1, 1), law) < 2e-5


def test_insertions_only_are_those_of_ilm():
    """Of texts of one length the optimal rates, at any time, are the expected numbers of missing tokens: their sum is
    how many are missing, and the next insertion is drawn from the choices that ILM learns, whose law is the data's."""
    texts = [*itertools.product(range(V), repeat=2)]
    law = dict(zip(texts, (0.1, 0.2, 0.3, 0.4), strict=True))
    for level in (0.8, 0.05):
        rates = optimum(tallied(law, 2), level)
        for text in [(), (0,), (1,)]:
            assert abs(float(rates[name(text)].sum()) - (2 - len(text))) < 1e-12
    jumped = {}
    for first, p in zip(range(V), rates["t"].flatten().tolist(), strict=True):
        for i, q in enumerate(rates[name((first,))].flatten().tolist()):
            text = after((first,), *divmod(i, V))
            jumped[text] = jumped.get(text, 0.0) + p / 2 * q
    assert total_variation(jumped, law) < 1e-12
    choices = chosen(law, 2, False).heads["token"].choices
    for text in [(), (0,), (1,)]:
        ours = rates[name(text)].flatten() / rates[name(text)].sum()
        assert torch.allclose(ours, choices[name(text)][:-1].exp(), rtol=0, atol=1e-12)


def test_the_loss_of_true_rates_is_the_surprise_of_a_text():
    """The bound is tight for one token, whatever the time: the divergence is that of a Poisson process from itself,
    and - log p where it happens."""
    law = {(0,): 0.3, (1,): 0.7}
    model = rated(1)
    model.heads["token"].table["t"].data = torch.tensor([[0.3, 0.7]], dtype=torch.float64).log()
    model.heads["token"].table["t0"].data.fill_(-torch.inf)
    model.heads["token"].table["t1"].data.fill_(-torch.inf)
    for token, p in law.items():
        canvas = model.canvas({"token": torch.tensor([token])})
        none, kinds = torch.zeros(1, 0, dtype=torch.long), torch.tensor([[INSERTION]])
        for level in (0.9, 0.2):
            with torch.no_grad():
                left, done = (
                    float(model.edited_losses(canvas, none, kinds, torch.tensor([[j]]), torch.tensor([level])))
                    for j in (False, True)
                )
            assert abs(left + math.log(p)) < 1e-12 and done == 0  # over all levels: left * level / level


@pytest.mark.parametrize("start", [0, 2])
def test_draws_have_the_expectation_that_the_levels_promise(start):
    """Half of the levels are uniform, half uniform in their logarithm; the weights undo it."""
    model = edit_flows.build(edit_flows.Config(length=3, vocab=2, width=16, depth=1, heads=2, start=start))
    levels = []

    def met(canvas, first, kinds, jumped, level, condition, drop):
        levels.append(level)
        return level.double() ** 2  # its integral over 1 / level is a half

    model.edited_losses = met
    canvas = model.canvas({"token": torch.zeros(4000, 3, dtype=torch.long)})
    total = model.losses(canvas, random=Generator(0)).sum() / 4000
    assert abs(float(total) - 0.5) < 0.02
    assert float(levels[0].min()) >= LEAST - 1e-6 and float(levels[0].max()) <= 1
    assert abs(float((levels[0] < 0.1).float().mean()) - (0.5 * 0.1 + 0.5 * 2 / 3)) < 0.03


@pytest.mark.parametrize("count, start", [(0, 2), (3, 0), (2, 2), (1, 3)])
def test_alignments_hold_all_tokens_of_both_texts(count, start):
    g = torch.Generator().manual_seed(0)
    n = 600
    kinds = aligned(torch.full((n,), count), start, 6, torch.rand(n, generator=g), torch.rand(n, 6, generator=g))
    match, delete, insert = ((kinds == k).sum(1) for k in (MATCH, DELETION, INSERTION))
    assert bool((match + delete == start).all()) and bool((match + insert == count).all())
    assert bool(((kinds >= 0).long().diff(dim=1) <= 0).all())  # nothing stands behind the end
    most = min(count, start)
    met = match.bincount(minlength=most + 1)
    assert len(met) == most + 1 and bool(((met - n / (most + 1)).abs() < 5 * (n / 4) ** 0.5).all())


# ---- what a step does ------------------------------------------------------------------------------------------------


def small(start=1, **settings):
    made = edit_flows.build(edit_flows.Config(length=6, vocab=3, width=16, depth=1, heads=2, start=start, **settings))
    return randomise(made, std=0.4)


def test_the_law_of_two_steps_is_that_of_all_outcomes_of_each_slot(monkeypatch):
    """With room for two tokens, in batches: the hand-made law of the case against the decoder's."""
    monkeypatch.setattr(edit_flows, "LIMIT", 2)
    case = edit_flows.case()

    def run(random, rows):
        canvas = case.holding(torch.zeros(rows, 1, dtype=torch.long))
        generate(Target(case.model), canvas, Editing(2, 2), random=random)
        return [tuple(row) for row in case.read(canvas).tolist()]

    law, want = enumerate_rows(run), case.law()
    assert abs(sum(law.values()) - 1) < 1e-9 and total_variation(law, want) < 1e-9
    assert {len([x for x in t if x >= 0]) for t in law} == {0, 1, 2}


def test_more_steps_come_nearer_to_the_law_in_continuous_time():
    """Rates of a true law of two tokens: at first too few insertions fit into a step."""
    law = {(0, 1): 0.25, (1, 0): 0.75}
    model = rated(2)
    for key, rates in optimum(tallied(law, 2), 0.5).items():
        model.heads["token"].table[key].data = rates.log().clamp(min=-60)  # as good as never

    def decoded(steps):
        def run(random, rows):
            canvas = model.canvas({"token": torch.zeros(1, 1, dtype=torch.long)}, layout=line(1))
            generate(Target(model, cached=False), canvas, Editing(steps, 2), random=random)
            return [tuple(canvas.read("token")[0].tolist())]

        return enumerate_rows(run, batch=1)

    gaps = [total_variation(decoded(n), law) for n in (1, 3, 9)]
    assert gaps[0] == pytest.approx(1.0) and gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.2


def test_time_runs_to_its_end_and_given_tokens_stay():
    model = small()
    canvas = model.canvas(
        {"token": torch.tensor([[0, 1, 2]] * 2)}, torch.tensor([[True, True, True]] * 2), layout=line(3)
    )

    opened(canvas, torch.tensor([1, 1]))
    levels = []
    for step in decode(Target(model), canvas, Editing(4, 6), random=Keyed(0)):
        assert all(isinstance(e, Insert | Set | Delete | Revise) for e in step.edits)
        levels.append(float(canvas.level[0].max()))
        for text in canvas.read("token"):
            assert text[:2].tolist() == [0, 1] and text[-1] == 2 and len(text) <= 6
    assert levels == pytest.approx([1 - (k / 4) ** 3 for k in (1, 2, 3, 3)]) and canvas.done


def test_no_noise_is_used_twice_and_company_is_immaterial():
    model = small()
    canvas = model.canvas({"token": torch.zeros(5, 1, dtype=torch.long)}, layout=line(1))
    generate(Target(model), canvas, Editing(6, 5), random=Keyed(3))
    texts = [t.tolist() for t in canvas.read("token")]
    assert len({tuple(t) for t in texts}) > 2
    for row, text in enumerate(texts):
        alone = model.canvas({"token": torch.zeros(1, 1, dtype=torch.long)}, row=torch.tensor([row]), layout=line(1))
        generate(Target(model), alone, Editing(6, 5), random=Keyed(3))
        assert alone.read("token")[0].tolist() == text


def test_filters_change_which_token_and_not_how_often():
    rates = Rates(torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 4)
    rates.logits[0, 0, 4:] = -torch.inf
    for warper in (Warper(0.5), Warper(0), Warper(top_k=1), Warper(top_p=0.5)):
        warped = warper(rates)
        for a, b in [(0, 4), (4, 8), (8, 9)]:
            before, now = (x.logits[..., a:b].logsumexp(-1) for x in (rates, warped))
            assert torch.allclose(before, now)
        assert not torch.allclose(rates.logits, warped.logits)
    one = Warper(0)(rates).logits[1, 1, :4]
    assert int((one > -torch.inf).sum()) == 1 and int(one.argmax()) == int(rates.logits[1, 1, :4].argmax())


def test_only_inserted_tokens_are_edited_and_none_is_put_in_place_of_itself():
    model, head = small(), EditHead(16, 3).double()
    case = edit_flows.EditsOf(model, vocab=3)
    canvas = case.holding(torch.tensor([[2, 0]]))
    plan = model.factorization.step(canvas, None, 0)
    rates = head.dist(torch.randn(1, 3, 16, dtype=torch.float64), plan.reads, canvas).logits[0] > -torch.inf
    assert rates.long().tolist() == [
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 1],
        [1, 1, 1, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize("wrong", [(0, 3), (2, -1), (2, 3, 0.0)])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 1 step"):
        Editing(*wrong)
    with pytest.raises(ValueError, match="begins with 0 to 4 tokens"):
        edit_flows.Config(length=4, start=5)
    with pytest.raises(ValueError, match="at least 2 ids"):
        EditHead(8, 1)


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 3])
def test_it_trains_and_writes_by_the_command_line(start, tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200, encoding="utf-8")
    shape = ["--width", "16", "--depth", "1", "--heads", "2", "--length", "24", "--batch", "4", "--start", str(start)]
    run = str(tmp_path / "run")
    assert main(["train", "edit-flows", "--data", str(book), "--out", run, "--steps", "2", *shape]) == 0
    assert main(["generate", run, "--prompt", "The ", "--length", "8", "--steps", "4"]) == 0
    assert "The " in capsys.readouterr().out
    made = load(run)
    text = "".join(made.infill("The <fill> fox", Sampling(steps=5), seed=2))
    assert text.startswith("The ") and text.endswith(" fox") and len(made.tokenizer.encode(text)) <= 24
