"""The survey: cells reached by names alone, costs that are counted by hand, arms that are not run twice, one page."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from seriatim.data.base import Data, Texts
from seriatim.data.list_tasks import vocabulary
from seriatim.evaluation.survey_page import save_survey
from seriatim.factorization.static import Blocks
from seriatim.laws.case import randomise
from seriatim.model import Model
from seriatim.studies import dlm_survey as study
from seriatim.studies import parallelbench as bench
from seriatim.systems import meta
from seriatim.systems.claim import Claim, Trial
from seriatim.systems.decoders import decoder_names, named
from seriatim.systems.system import Sampling, config_from
from seriatim.systems.taxonomy import system_row
from seriatim.systems.text import sdar
from seriatim.systems.text.mdlm import MDLM
from seriatim.systems.text_system import TextSystem
from seriatim.tokenizers.text import ByteTokenizer, WordTokenizer
from seriatim.verbs import claim as verb
from seriatim.verbs.load import system_class

PROMPT, NEW = "abcd", 12
TINY = {"length": 20, "width": 16, "depth": 1, "heads": 2}
DOCUMENTS = ("def spam(eggs):\n    return spam(eggs)\n" * 8,)


class Endless(ByteTokenizer):
    """Bytes of which none ends a text."""

    special = {}  # noqa: RUF012


def tiny(name, **more):
    objective = study.OBJECTIVES[name]
    never = {"stop": 1 - 1e-9} if name == "insertion" else {}  # of being complete: goes on as long as it may
    cls = system_class(objective.system)
    torch.manual_seed(0)
    system = cls(config_from(cls, {**TINY, **objective.settings, **never, **more}, vocab=272), Endless())
    randomise(system.model, 1)
    return system.eval().requires_grad_(False)


# ---- cells -----------------------------------------------------------------------------------------------------------

CELLS = [(n, w, k) for n, o in study.OBJECTIVES.items() for w, several in o.ways.items() for k in several]


BY_CHANCE = [c for c in CELLS if c[0] == "edit flows" or c[:2] == ("any subset", "own")]  # how many at once


def test_objectives_ways_and_decoders_are_names_of_the_registry():
    assert {o.system for o in study.OBJECTIVES.values()} <= set(meta.catalogue())
    assert {named(make(4).decoder)[0] for make in study.WAYS.values()} <= set(decoder_names())
    assert set(study.ON_LISTS) <= set(study.OBJECTIVES)
    assert {w for _, w, _ in CELLS} == set(study.WAYS)
    kinds = {o.system for o in study.OBJECTIVES.values()}
    assert {"next-token", "mdlm", "sdar", "as-arm", "ilm"} <= kinds


def by_hand(name, way, k, tokens):
    """Forwards and slots of so many new tokens behind 4."""
    n, p = tokens, len(PROMPT)
    if name == "next-token":  # a learned start and the prompt, then the last token each time
        return n, 1 + p + n - 1
    if name == "insertion":  # all that is there each time, and once to see that it is done
        return n + 1, sum(1 + p + i for i in range(n + 1))
    if name == "mdlm" or name == "blocks of 16":  # everything each time (the texts fill one block of 16)
        forwards = -(-n // k)
        return forwards, forwards * (p + n)
    if name == "any subset":  # what was decided last, and as many masks as are read
        forwards = -(-n // k)
        return forwards, p + n - (n - k * (forwards - 1)) + n  # each value once, but for the last ones; each mask once
    size = int(name.removeprefix("blocks of "))  # the block before, which is final; then the block, each time
    forwards = size // min(k, size)
    return n // size * forwards, p + (n - size) + n // size * forwards * size


@pytest.mark.parametrize(("name", "way", "k"), [c for c in CELLS if c not in BY_CHANCE])
def test_costs_of_twelve_tokens_are_those_counted_by_hand(name, way, k):
    made = study.write(tiny(name), PROMPT, NEW, study.WAYS[way](k), k)
    assert (made.forwards, made.slots) == by_hand(name, way, k, made.tokens)
    assert made.tokens == NEW


@pytest.mark.parametrize(("name", "way", "k"), BY_CHANCE)
def test_other_cells_are_written_by_the_same_way(name, way, k):
    made = study.write(tiny(name), PROMPT, NEW, study.WAYS[way](k), k)
    assert made.forwards > 0 and made.slots >= made.forwards and made.tokens <= NEW


def test_cost_columns_are_means_of_texts():
    made = [study.Written("", 3, 30, 12), study.Written("", 6, 90, 12)]
    assert study.means(made) == {"forwards": 4.5, "slots": 60.0, "tokens_per_forward": 24 / 9}


# ---- next-token prediction is block diffusion in blocks of one -------------------------------------------------------


class Queried(TextSystem):
    """A next-token model that the study has never heard of: a mask in place of each token, exact."""

    meta = replace(sdar.META, key="queried", likelihood="exact")
    Config = sdar.Config

    @staticmethod
    def build(config, tokenizer):
        m = sdar.build(config)
        return Model(m.layout, Blocks(1), m.embed, m.backbone, m.heads["token"])


def twins(size):
    blocks = tiny("blocks of 1", block=size)
    line = Queried(blocks.config, Endless())
    line.model.load_state_dict(blocks.model.state_dict())
    return line.double().eval().requires_grad_(False), blocks


@pytest.mark.parametrize("way", ["random", "confidence", "left to right"])
def test_the_row_of_next_token_prediction_is_that_of_blocks_of_one(way):
    line, blocks = twins(1)
    greedy = Sampling(temperature=0.0)
    for sampling in (greedy, study.AS_IT_IS)[: 1 if way == "confidence" else 2]:  # its noise is another
        ours = study.write(blocks, PROMPT, NEW, study.WAYS[way](1), 1, 3, sampling)
        assert ours == study.write(line, PROMPT, NEW, study.WAYS["own"](1), 1, 3, sampling)
    one, other = (study.bits(s, DOCUMENTS) for s in (line, blocks))
    assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], abs=1e-9)
    assert (one["likelihood"], other["likelihood"]) == ("exact", "bound")


def test_blocks_of_two_are_another_row():
    line, blocks = twins(2)
    one, other = (study.bits(s, DOCUMENTS)["bits_per_byte"] for s in (line, blocks))
    assert abs(one - other) > 1e-3
    ours = study.write(blocks, PROMPT, NEW, study.WAYS["random"](2), 2)
    assert ours.forwards == NEW // 2


# ---- gaps ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_data(monkeypatch):
    text = "".join(f"def name_{i}(self):\n    return name_{i}(other) + value.name_{i}\n" for i in range(40))
    data = Data("stdlib", "text", Texts((text,)), Texts((text,)))
    monkeypatch.setattr(study, "load_data", lambda *a, **k: data)
    monkeypatch.setattr(study, "held_out", lambda system, count, length: [[97 + n] * length for n in range(count)])
    return data


def test_blanks_are_identifiers_that_stand_elsewhere_in_view(small_data):
    some = study.blanks(20, side=60)
    text = small_data.test.documents[0]
    for blank in some:
        assert blank.word.strip().isidentifier() and blank.left + blank.word + blank.right in text
        assert blank.word.strip() in blank.left or blank.word.strip() in blank.right
    assert study.blanks(20, side=60) == some and study.blanks(20, side=60, seed=1) != some


class Filler:
    """Knows the middle, from both sides, from the left alone, or not."""

    tokenizer = ByteTokenizer()

    def __init__(self, fills, said):
        self.fills, self.said, self.asked = fills, said, []

    def infill(self, parts, sampling):
        if self.fills is None:
            raise ValueError("it fills none")
        self.asked.append(parts[1].tokens)
        yield from (parts[0], self.said, parts[2])

    def write(self, left, tokens, sampling):
        return self.said


@pytest.mark.parametrize(("fills", "sides", "asked"), [("known", 1, [4]), ("unknown", 1, [None]), (None, 0, [])])
@pytest.mark.parametrize("right", [True, False])
def test_gaps_count_where_they_are_filled_exactly(fills, sides, asked, right):
    filler = Filler(fills, "spam" if right else "spa")
    found = study.filled(filler, [study.Blank("x = ", "spam", "(1)")])
    assert found == {"infilled": float(right), "both_sides": float(sides)} and filler.asked == asked


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_what_is_lost_is_what_several_tokens_a_step_cost_above_one():
    assert study.fall([1.0, 2.0, 3.0]) == {"lost": 1.5, "rise": 1.5, "steady": True}
    assert study.fall([1.0, 0.0, 0.5]) == {"lost": 0.0, "rise": -0.75, "steady": False}


def test_the_claim_needs_random_order_to_lose():
    """Losing nothing in either order is no support, and neither is a random order that loses less than twice that."""
    said = study.CLAIM.verdict
    assert said([0.1, 0.1], [1.0, 1.1, 0.9, 1.0, 1.0]) == "holds"
    assert said([0.0, 0.0], [0.0, 0.1, 0.0, 0.1, 0.0]) == "within noise"
    assert said([0.9, 0.9], [1.0, 1.1, 0.9, 1.0, 1.0]) == "fails"


class Judge:
    """Finds each letter as likely as its place in the alphabet says."""

    tokenizer = ByteTokenizer()

    def scores(self, ids, last):
        return [-float(i % 7) for i in ids[-last:]]


def test_texts_are_judged_by_nats_less_entropy():
    found = study.texts(tiny("mdlm"), Judge(), study.WAYS["random"](4), 4, [[97] * 4, [98] * 4], NEW)
    assert found["excess"] == pytest.approx(found["nats_per_token"] - found["entropy"] * math.log(2))
    assert found["tokens_per_forward"] == 4 and found["forwards"] == 3 and found["slots"] == 48


def test_the_true_law_loses_nothing_one_by_one_and_all_orders_alike_at_once():
    found = {(c["way"], c["k"]): c for c in study.ideal(("insert-random", "copy"), 200)(None, 0)["cells"]}
    assert all(found[way, 1]["exact"] == 1 for way in ("random", "confidence", "left to right"))
    assert found["random", 1]["tokens_per_forward"] == 1 and found["random", 8]["tokens_per_forward"] == 6.5
    at_once = [found[way, 8]["exact"] for way in ("random", "confidence", "left to right")]
    assert max(at_once) < 0.65 and max(at_once) - min(at_once) < 0.15


def test_where_all_places_are_equally_unsure_the_surest_first_are_neighbours_and_cost_more():
    """Of a Latin square's 16 places two at a time: they begin in one row by confidence, seldom by chance."""
    model = bench.Ideal(bench.held_out("latin-square", 0, 1)[0])
    sure, chance = (model.accuracy(bench.FIXED[rule](2, 16), draws=64) for rule in ("confidence", "random"))
    assert sure < chance - 0.2


def test_a_model_that_there_is_answers_in_every_order_of_the_grid():
    tokenizer = WordTokenizer.of(vocabulary())
    config = config_from(MDLM, {**TINY, "block": 2}, vocab=tokenizer.vocab)
    cells = study.of_base(1)(MDLM(config, tokenizer).eval(), 0)["cells"]
    assert {(c["way"], c["k"]) for c in cells} == {
        (way, k) for way in ("random", "confidence", "left to right") for k in (1, 2, 4, 8)
    }
    at_once = [c for c in cells if c["k"] == 8]
    assert all(c["forwards"] == 1 and c["exact"] <= 1 for c in at_once), "not in blocks of its own"


@pytest.fixture
def judged(monkeypatch, small_data):
    monkeypatch.setattr("seriatim.verbs.load.load", lambda name: Judge())


def test_the_curse_is_measured_at_each_number_of_tokens_in_one_order(judged):
    """In blocks of a system's own, too: all of the text is one."""
    for way in ("random", "left to right"):
        found = study.curse(way, 1)(tiny("mdlm", length=112, block=32), 0)
        assert [c["k"] for c in found["cells"]] == list(study.TOKENS)
        assert [c["tokens_per_forward"] for c in found["cells"]] == list(study.TOKENS)
        assert found["rise"] == study.fall([c["excess"] for c in found["cells"]])["rise"]


def test_every_decoder_that_needs_no_part_is_tried(judged):
    found = study.every_decoder(1)(tiny("mdlm", length=112), 0)
    assert {"unmask", "fast-dllm"} <= {c["way"] for c in found["cells"]} <= set(decoder_names("unmasking"))


# ---- the queue, and the page -----------------------------------------------------------------------------------------


@pytest.fixture
def in_small(monkeypatch, tmp_path, small_data):
    """The study at toy size: three rows that are really trained, for two steps each."""
    names = ("next-token", "mdlm")
    objectives = {n: study.OBJECTIVES[n] for n in names}
    objectives["mdlm"] = replace(objectives["mdlm"], ways={"random": (1, 4), "confidence": (4,)})
    short = {"length": 192, "batch": 2, "steps": 2}
    text = tmp_path / "text.txt"
    text.write_text(small_data.train.documents[0] * 3)
    monkeypatch.setattr(study, "OBJECTIVES", objectives)
    monkeypatch.setattr(study, "SHAPE", {"width": 16, "depth": 1, "heads": 2})
    monkeypatch.setattr(study, "MATERIALS", {
        "text": study.Material(str(text), short),
        "lists": study.Material("list-tasks", {"length": 20, "batch": 4, "steps": 2}),
    })  # fmt: skip
    monkeypatch.setattr(study, "HOME", tmp_path / "home")
    monkeypatch.setattr(verb, "HOME", tmp_path / "home")
    monkeypatch.setattr(verb, "load", lambda name: Judge())
    return tmp_path


def test_a_queue_that_was_cut_off_goes_on_arm_by_arm_and_ends_in_a_page(in_small, monkeypatch):
    run = []

    def noted(name, measure, cut=()):
        def trial(system, seed):
            run.append(name)
            if run.count(name) in cut:
                raise KeyboardInterrupt
            return measure(system, seed)

        return Trial("judge", trial)

    def loses(much):
        return lambda system, seed: {"lost": much + 0.01 * seed, "cells": []}

    arms = {
        "confidence": noted("confidence", loses(0.1)), "random": noted("random", loses(1.0)),
        "text, next-token": noted("text, next-token", study.row("next-token", 2, 2)),
        "text, mdlm": noted("text, mdlm", study.row("mdlm", 2, 2), cut=(1,)),
        "lists, mdlm": noted("lists, mdlm", study.list_row("mdlm", 1)),
    }  # fmt: skip
    small = replace(study.CLAIM, arms=arms, spread_seeds=(0, 1), seeds=(0,))
    monkeypatch.setattr(verb, "claim_of", lambda key: small)
    with pytest.raises(KeyboardInterrupt):
        verb.measure("dlm-survey", in_small)
    done = list(run)
    result = verb.measure("dlm-survey", in_small)
    assert done == ["random", "random", "confidence", "text, next-token", "text, mdlm"]
    assert run[len(done) :] == ["text, mdlm", "lists, mdlm"], "what is finished is not measured again"
    trained = result["arms"]["text, mdlm"][0]
    assert result["verdict"] == "holds" and trained["train_seconds"] > 0
    assert [(c["way"], c["k"]) for c in trained["cells"]] == [("random", 1), ("random", 4), ("confidence", 4)]
    found = study.trained("mdlm", "text")
    assert study.costs(found)["train_seconds"] == trained["train_seconds"], "a finished run is found"

    estimates = {"coupled": [{"tie": 0.0, "bias": 0.0, "error": 0.0}, {"tie": 0.5, "bias": 0.1, "error": 0.3}]}
    page = save_survey(result, [system_row("mdlm")], estimates, in_small / "page.html").read_text()
    for said in ("≤", "tokens and masks", "6 of 6", "exact answers", "random, 4 a step", "nats missed", "both sides"):
        assert said in page, said
    assert "<script" not in page and "coupled" in page


def test_the_grid_is_in_the_queue_once():
    queue = study.CLAIM.queue()
    assert isinstance(study.CLAIM, Claim) and all(isinstance(arm, Trial) for arm in study.CLAIM.arms.values())
    assert {f"text, {name}" for name in study.OBJECTIVES} <= {name for name, _ in queue}
    assert len(queue) == len(set(queue)) and sum(name.startswith("text,") for name, _ in queue) == len(study.OBJECTIVES)


def test_a_copy_of_a_system_is_decoded_and_the_system_stays_as_it_is():
    system = tiny("any subset")
    before = copy.copy(system.config)
    study.write(system, PROMPT, NEW, study.WAYS["independent"](4), 4)
    assert system.config == before
    with pytest.raises(ValueError, match="needs a model of tokens in any order"):
        study.write(tiny("next-token"), PROMPT, NEW, study.WAYS["random"](4), 4)
