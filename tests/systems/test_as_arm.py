"""AS-ARM: what is hidden in training, texts with gaps, exact scores, and its claim on tiny inputs."""

from __future__ import annotations

import math

import pytest
import torch

from seriatim.cli.main import main
from seriatim.laws.case import randomise
from seriatim.random import Generator
from seriatim.systems.infill import Gap
from seriatim.systems.system import Sampling, begin_as
from seriatim.systems.text import as_arm, next_token
from seriatim.systems.text.as_arm import ASARM, Config, trial
from seriatim.verbs.load import load

SMALL = {"width": 16, "depth": 1, "heads": 2, "length": 32}
TEXT = "The quick brown fox jumps over the lazy dog.\n\n"


def tiny(**settings):
    system = ASARM(Config(**{**SMALL, **settings})).eval()
    randomise(system.model, std=0.2)
    return system


@pytest.fixture(scope="module")
def system():
    return tiny()


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_share_of_unknown_tokens_grows_to_its_last_bounds():
    c = Config(growth=0.5)
    assert c.unknown(0, 100) == (0.15, 0.15)
    assert c.unknown(25, 100) == pytest.approx((0.5, 0.575))
    assert c.unknown(50, 100) == c.unknown(99, 100) == pytest.approx((0.85, 1.0))
    assert Config(growth=0.0).unknown(1, 100) == (0.85, 1.0)


def test_shares_of_a_batch_are_spread_evenly_and_sets_are_drawn_evenly(system):
    random, often = Generator(0), torch.zeros(40)
    for _ in range(200):
        hidden = system.hidden((8, 40), (0.2, 1.0), random)
        count = hidden.sum(1).sort().values
        low = (0.2 + 0.8 * torch.arange(8) / 8) * 40
        assert bool(((count >= low.floor()) & (count <= (low + 4).ceil())).all())
        often += hidden.sum(0)
    assert float((often / 1600 - 0.6).abs().max()) < 4.5 * (0.25 / 1600) ** 0.5  # error rate 3e-4 over 40 places
    assert system.hidden((3, 40), (0.001, 0.001), random).sum(1).tolist() == [1, 1, 1]
    assert bool(system.hidden((3, 40), (1.0, 1.0), random).all())


def test_the_loss_is_that_of_unknown_tokens_given_the_known_ones(system, monkeypatch):
    ids = torch.randint(200, (4, 32), generator=torch.Generator().manual_seed(0))
    hidden = torch.rand(4, 32, generator=torch.Generator().manual_seed(1)) < 0.7
    monkeypatch.setattr(ASARM, "hidden", lambda *_: hidden)
    with torch.no_grad():
        loss, number = system.forward({"token": ids}, Generator(0), 5, 10)
        exact = system.model.log_prob(system.model.canvas({"token": ids}, ~hidden))
    assert int(number) == int(hidden.sum())
    assert float(loss) == pytest.approx(-float(exact.sum()), abs=1e-9)


@torch.no_grad()
def test_it_is_scored_exactly_as_a_next_token_model(system):
    examples = system.examples([TEXT * 20])
    nats, elements = system.score(examples, 8)
    ids = examples.take(torch.linspace(0, len(examples) - 1, 8).long())["token"]
    assert elements == 8 * 32
    assert nats == pytest.approx(-float(system.model.log_prob(system.model.canvas({"token": ids})).sum()), rel=1e-9)
    whole, size = system.score(examples, 64)[0], system.bytes_in(examples, 64)
    assert system.validate(examples)["bits_per_byte"] == pytest.approx(whole / size / math.log(2))


def test_it_may_begin_as_a_next_token_model():
    base = next_token.NextToken(next_token.Config(**{**SMALL, "tied": True}))
    system = ASARM(Config(**{**SMALL, "tied": True}))
    begin_as(system, base)
    assert torch.equal(system.model.embed.table, base.model.embed.table)
    assert torch.equal(system.model.backbone.layers[0].out, base.model.backbone.layers[0].out)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"least": 0.1}, "share <= least"),
        ({"most": 1.5}, "<= 1"),
        ({"growth": 2.0}, "growth"),
        ({"decode": "parallel"}, "sequential, assd"),
        ({"draft": 0}, "at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Config(**settings)


# ---- texts with gaps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["sequential", "assd", "assd-bigram", "independent"])
def test_what_is_known_stays_where_it_is_and_gaps_are_filled(system, way):
    canvas = system.gapped(["def ", Gap(5), "(x):", Gap(7)])
    assert canvas.status[0].tolist() == [0] * 4 + [3] * 5 + [0] * 4 + [3] * 7
    steps = []
    text, again = (
        "".join(system.infill(parts, Sampling(), 3, system.decoding(Sampling(), way, ()), trace))
        for parts, trace in (("def <mask:5>(x):<mask:7>", steps), (["def ", Gap(5), "(x):", Gap(7)], []))
    )
    assert text == again
    assert text.startswith("def ") and "(x):" in text
    assert sum(s.forwards for s in steps) <= 12
    if way == "independent":
        assert sum(s.forwards for s in steps) == 2  # of 12 tokens, 10 at a time


def test_gaps_that_do_not_fit_are_refused(system):
    with pytest.raises(ValueError, match="takes 33 tokens"):
        list(system.infill(["a", Gap(32)]))
    for text in ("", "all known"):
        with pytest.raises(ValueError, match="nothing is to be filled"):
            list(system.infill(text))


def test_penalties_decode_sequentially_and_refuse_independence(system):
    penalised = Sampling(repetition_penalty=1.3)
    assert system.decoding(penalised).proposer is None
    sequential = system.decoding(penalised, "sequential", ())
    filled, one_by_one = (list(system.infill("ab<mask:9>", penalised, 1, way)) for way in (None, sequential))
    assert filled == one_by_one
    with pytest.raises(ValueError, match="penalties"):
        system.decoding(penalised, "independent")


@pytest.mark.parametrize("way", ["sequential", "assd", "assd-bigram"])
def test_a_text_is_continued_from_a_prompt_or_from_nothing(way):
    system = tiny(decode=way)
    for prompt in ("", "def "):
        trace = []
        text = "".join(system.stream(prompt, 12, Sampling(), 1, trace=trace))
        assert sum(step.forwards for step in trace) <= 12
        assert len(trace) == 12 or way != "sequential"
        assert text == "".join(system.stream(prompt, 12, Sampling(), 1))


# ---- by the command line ---------------------------------------------------------------------------------------------


def test_it_trains_generates_and_fills_gaps(tmp_path, capsys):
    book, out = tmp_path / "book.txt", tmp_path / "run"
    book.write_text(TEXT * 100, encoding="utf-8")
    sizes = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    assert (
        main(["train", "as-arm", "--data", str(book), "--out", str(out), "--steps", "3", "--batch", "2", *sizes]) == 0
    )
    assert main(["generate", str(out), "--prompt", "The ", "--length", "8"]) == 0
    assert "bits_per_byte" in capsys.readouterr().out.replace(" ", "_")
    system = load(out)
    assert "".join(system.infill("The <mask:6> fox")).endswith(" fox")


# ---- the claim -------------------------------------------------------------------------------------------------------


def test_the_claim_measures_forwards_likelihood_and_entropy():
    system, judge = tiny(), next_token.NextToken(next_token.Config(**SMALL)).eval()
    found = {way: trial(way)(system, 0, texts=2, judge=judge) for way in as_arm.CLAIM.arms}
    assert found["sequential"]["tokens_per_forward"] == 1
    assert found["assd"]["tokens_per_forward"] >= 1
    assert found["assd-bigram"]["tokens_per_forward"] >= 1
    assert found["independent"]["tokens_per_forward"] == pytest.approx(29 / 3)
    for figures in found.values():
        assert figures["nats_per_token"] > 0
        assert 0 < figures["entropy"] <= math.log(32)
    with pytest.raises(ValueError, match="other ids"):
        trial("assd")(system, 0, texts=1)  # of bytes, and the judge reads merged ones
    assert set(as_arm.CLAIM.arms) == {"sequential", "assd", "assd-bigram", "independent"}
