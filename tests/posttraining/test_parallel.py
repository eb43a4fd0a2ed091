"""The oracle of parallel decoding, what a filter learns from it, and its training as a user runs it."""

from __future__ import annotations

import json

import pytest
import torch

from seriatim.cli.main import main
from seriatim.data.base import Data, Texts
from seriatim.decoding.learned import TRUSTED, Trusted
from seriatim.decoding.sample import Select
from seriatim.decoding.unmask import Unmask
from seriatim.laws.case import randomise
from seriatim.posttraining.drafting import Base, load_part
from seriatim.posttraining.parallel import (
    Filter,
    FilterConfig,
    Oracle,
    Records,
    begun,
    one_by_one,
    reliability,
    replayed,
    written,
)
from seriatim.systems.decoders import decoder_of
from seriatim.systems.system import Sampling
from seriatim.systems.text.mdlm import MDLM, Config
from seriatim.systems.text.sdar import SDAR
from seriatim.systems.text.sdar import Config as Blocks
from seriatim.verbs import drafting
from seriatim.verbs.load import load
from seriatim.verbs.train import train

SHAPE = {"length": 32, "width": 16, "depth": 2, "heads": 2}
PROMPTS = torch.randint(97, 104, (3, 6), generator=torch.Generator().manual_seed(0))
NEW, BLOCK = 18, 8


def whole(seed=4):
    one = MDLM(Config(**SHAPE, block=None))
    randomise(one.model, seed=seed)
    return one.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["whole", "blocks"])
def setting(request):
    """A model, and the block that is asked of it: of one with its own blocks, none."""
    if request.param == "whole":
        return whole(), BLOCK
    one = SDAR(Blocks(**SHAPE, block=4))
    randomise(one.model, seed=5)
    return one.eval().requires_grad_(False), None


def test_the_oracle_writes_what_it_knows_in_no_more_steps(setting):
    system, block = setting
    answer = one_by_one(system, PROMPTS, NEW, block)
    ids, forwards, records = replayed(system, PROMPTS, answer, block or 4, own=block is None)
    assert torch.equal(ids, answer) and int(forwards.max()) < NEW
    assert len(records) == int(forwards.sum()), "a record for each step of a row at work"
    assert bool((records.right <= records.asked).all()) and bool((records.sure[~records.asked] == 1).all())


def test_where_no_guess_is_right_the_whole_block_is_given():
    """An answer that the model would never write: a step a block, and only the records say so."""
    system = whole()
    answer = torch.cat([PROMPTS, torch.full((3, NEW), 200)], 1)
    ids, forwards, records = replayed(system, PROMPTS, answer, BLOCK)
    assert torch.equal(ids, answer) and forwards.tolist() == [3, 3, 3]
    assert not bool(records.right.any()) and records.asked.sum(1).tolist() == [8] * 6 + [2] * 3


def test_rows_are_replayed_as_if_alone():
    system = whole()
    answer = one_by_one(system, PROMPTS, NEW, BLOCK)
    _, together, _ = replayed(system, PROMPTS, answer, BLOCK)
    alone = [replayed(system, PROMPTS[i : i + 1], answer[i : i + 1], BLOCK)[1] for i in range(3)]
    assert together.tolist() == torch.cat(alone).tolist()


def decided(system, scorer, commit=TRUSTED):
    way = Unmask(Select(commit=commit, scorer=scorer, steps=32))
    return written(system, begun(system, PROMPTS, NEW, BLOCK), way)


def test_a_filter_that_knows_the_label_is_the_oracle():
    """As long as some guess is right at each step; the forwards are the same, too."""
    system = whole()
    answer = one_by_one(system, PROMPTS, NEW, BLOCK)
    oracle = Oracle(answer, BLOCK)
    ids, forwards, _ = written(system, begun(system, PROMPTS, NEW, BLOCK), oracle)
    assert bool(Records.joined(oracle.records).right.any(1).all()), "no block was given away"

    class Knows:
        def __call__(self, canvas, element, x, score):
            self.right = x == answer.gather(1, element.clamp(min=0))
            here = Trusted(lambda sure: torch.where(self._by_place(canvas, element, sure), 9.0, -9.0), BLOCK, 0.96)
            return here(canvas, element, x, score)

        def _by_place(self, canvas, element, sure):
            from seriatim.decoding.learned import by_place

            known = by_place(canvas, element, torch.where(self.right, 1.0, 0.0), sure.shape[1])[0]
            return known == 1

    same, needed, _ = decided(system, Knows())
    assert torch.equal(same, ids) and needed.tolist() == forwards.tolist()


def test_a_filter_that_accepts_nothing_is_one_token_a_step_and_one_that_accepts_all_a_block_a_step():
    system = whole()

    def constant(logit):
        return Trusted(lambda sure: torch.full_like(sure, logit), BLOCK, 0.96)

    ids, forwards, _ = decided(system, constant(-torch.inf))
    assert torch.equal(ids, one_by_one(system, PROMPTS, NEW, BLOCK)) and forwards.tolist() == [NEW] * 3
    _, forwards, _ = decided(system, constant(torch.inf))
    assert forwards.tolist() == [3] * 3


# ---- the filter ------------------------------------------------------------------------------------------------------


def test_a_filter_of_32_places_has_2112_parameters_and_fits_the_blocks_of_its_base():
    part = Filter(FilterConfig(), Base(whole()))
    assert (part.block, sum(p.numel() for p in part.parameters())) == (32, 2112)
    blocks = Base(SDAR(Blocks(**SHAPE, block=4)))
    assert Filter(FilterConfig(), blocks).block == Filter(FilterConfig(4), blocks).block == 4
    with pytest.raises(ValueError, match="leave out --block"):
        Filter(FilterConfig(8), blocks)
    with pytest.raises(ValueError, match="1 place or more"):
        FilterConfig(0)


def test_only_what_was_asked_is_learned():
    part = Filter(FilterConfig(4, 8), Base(whole()))
    learner = part.learner(Base(whole()))
    batch = {"sure": torch.rand(5, 4), "right": torch.rand(5, 4) < 0.5, "asked": torch.rand(5, 4) < 0.5}
    batch["asked"][0] = True
    learner.requires_grad_(False)
    total, count = learner(batch, None, 0, 1)
    other = {**batch, "right": torch.where(batch["asked"], batch["right"], ~batch["right"])}
    assert float(learner(other, None, 0, 1)[0]) == float(total) and int(count) == int(batch["asked"].sum())
    other["right"] = ~other["right"]
    assert float(learner(other, None, 0, 1)[0]) != float(total)


def test_reliability_is_how_often_guesses_of_a_score_are_right():
    right = torch.tensor([[True, False, True, True, False]])
    records = Records(torch.ones(1, 5), right, torch.tensor([[True, True, True, False, True]]))
    score = torch.tensor([[0.95, 0.92, 0.31, 0.5, 0.2]])
    assert reliability(score, records, 2) == [(pytest.approx(0.255), 0.5), (pytest.approx(0.935), 0.5)]
    assert [share for _, share in reliability(score, records)] == [0, 1, 0, 1]


# ---- as a user trains it ---------------------------------------------------------------------------------------------

TEXT = "the cat sat on the mat and the dog sat on the log; " * 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny masked model, and a filter for it."""
    place, data = tmp_path_factory.mktemp("learn2pd"), Data("mine", "text", Texts([TEXT] * 2), Texts([TEXT]))
    (place / "texts").mkdir()
    for i in range(3):
        (place / "texts" / f"{i}.txt").write_text(TEXT[i:])
    patch = pytest.MonkeyPatch()
    patch.setattr(drafting, "HELD_OUT", 4)
    settings = {"steps": 30, "batch": 4, "learning_rate": 1e-2, "compile": False, **SHAPE}
    train("mdlm", data, out=place / "base", settings=settings)
    command = ["train", "learn2pd", "--base", str(place / "base"), "--data", str(place / "texts"), "--block", "8"]
    asked = ["--steps", "60", "--tokens", "512", "--window", "32", "--hidden", "16", "--out", str(place / "part")]
    assert main([*command, *asked]) == 0
    patch.undo()
    return place


def test_a_training_leaves_a_filter_and_something_to_look_at(trained):
    card = json.loads((trained / "part" / "draft.json").read_text())
    assert card["key"] == "learn2pd" and card["config"] == {"block": 8, "hidden": 16}
    assert card["training"]["held_out_loss"] < 0.69 and card["training"]["reading"]["window"] == 32
    assert (trained / "part" / "draft.safetensors").stat().st_size < 4000
    for name in ("reliability.png", "order.png", "loss.png"):
        assert (trained / "part" / name).read_bytes()[:4] == b"\x89PNG"
    told = json.loads((trained / "part" / "summary.json").read_text())
    assert (
        told["oracle_agreement"] == 1 and told["oracle_tokens_per_forward"] >= told["threshold_tokens_per_forward"] > 0
    )


def test_it_decodes_its_base_and_no_other(trained, capsys):
    system = load(trained / "base")
    part = load_part(trained / "part", Base(system), Filter)
    assert part.block == 8
    for more, least in (("", 1), ("+threshold=1.0", 20), ("+cache=dual+floor=0.5", 1)):
        trace = []
        way = decoder_of(system, f"learn2pd:{trained / 'part'}{more}", Sampling(temperature=0))
        list(system.stream("the cat", 20, Sampling(temperature=0), decoding=way, trace=trace))
        assert least <= len(trace) <= 20
    assert (
        main(
            [
                "generate",
                str(trained / "base"),
                "--prompt",
                "the",
                "--length",
                "9",
                "--decoder",
                f"learn2pd:{trained / 'part'}",
            ]
        )
        == 0
    )
    capsys.readouterr()
    with pytest.raises(ValueError, match="was trained for"):
        decoder_of(whole(), f"learn2pd:{trained / 'part'}", Sampling())


def test_a_filter_at_a_threshold_of_one_writes_what_is_written_one_token_at_a_time(trained):
    system = load(trained / "base")
    texts = [
        "".join(
            system.stream(
                "the cat", 20, Sampling(temperature=0), decoding=decoder_of(system, spec, Sampling(temperature=0))
            )
        )
        for spec in (f"learn2pd:{trained / 'part'}+threshold=1.0+cut=false", "unmask+block=8")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("options", "message"), [
    ("threshold=1.5", "lies in 0 to 1"), ("floor=-1.0", "not below 0"), ("cache=both", "none, prefix or dual"),
])  # fmt: skip
def test_mistaken_options_are_named(trained, options, message):
    with pytest.raises(ValueError, match=message):
        decoder_of(load(trained / "base"), f"learn2pd:{trained / 'part'}+{options}", Sampling())


def test_mistaken_trainings_are_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="beside models of tokens in any order"):
        train("learn2pd", trained / "texts", from_="zoo:var", out=tmp_path / "run")
    with pytest.raises(ValueError, match="is trained beside next-token models"):
        train("medusa", trained / "texts", from_=trained / "base", out=tmp_path / "run")
    with pytest.raises(ValueError, match="a window of 1000 is asked for"):
        train("learn2pd", trained / "texts", from_=trained / "base", out=tmp_path / "run", settings={"window": 1000})
    assert not (tmp_path / "run").exists()
