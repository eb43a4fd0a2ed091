"""ParallelBench: a system that knows the laws meets the ceilings by every decoder; figures, picture and claim."""

from __future__ import annotations

import json
import math
import random
import statistics
from itertools import pairwise

import pytest
import torch
from torch import nn

from seriatim.cli.main import main
from seriatim.data.list_tasks import BLANK, LISTS, Problem, asked, vocabulary
from seriatim.decoding.sample import Select
from seriatim.evaluation.parallel_chart import save_parallel
from seriatim.heads.dist import Categorical
from seriatim.laws.case import randomise
from seriatim.studies import parallelbench as study
from seriatim.systems import meta
from seriatim.systems.text.mdlm import MDLM, Config
from seriatim.systems.text.next_token import Config as LineConfig
from seriatim.systems.text.next_token import NextToken
from seriatim.tokenizers.text import WordTokenizer

TOKENIZER = WordTokenizer.of(vocabulary())
SMALL = {"length": 40, "vocab": TOKENIZER.vocab, "width": 16, "depth": 1, "heads": 2}
Z99 = 2.576


class Told(nn.Module):
    """In place of a network: what stands on the canvas is read as a prompt, and answered by the true conditionals."""

    exact, continuous, value_shape, vocab = True, False, (), TOKENIZER.vocab

    def dist(self, h, reads, canvas):
        out = torch.full((canvas.batch, reads.element.shape[1], self.vocab), -math.inf, dtype=torch.float64)
        known, value = canvas.known, canvas.value["token"]
        for b in range(canvas.batch):
            words = [TOKENIZER.decode([i]) for i in value[b].tolist()]
            end = words.index("=")
            task, word, index, *items = words[:end]
            while task in LISTS and items[-1] == "-":
                items.pop()
            listed = torch.tensor(
                [TOKENIZER.encode(" ".join(x)) for x in Problem(task, tuple(items), word, index).answers()]
            )
            start, n = end + 1, listed.shape[1]
            said, shown = value[b, start : start + n], known[b, start : start + n]
            agree = listed[((listed == said) | ~shown).all(1)]
            for m, e in enumerate(reads.element.expand(canvas.batch, -1)[b].tolist()):
                if e >= 0:
                    own = (
                        agree[:, e - start].bincount(minlength=self.vocab).double()
                        if len(agree)
                        else torch.ones(self.vocab)
                    )
                    out[b, m] = own.log()
        return Categorical(out)


@pytest.fixture(scope="module")
def knowing():
    """A masked model with the true conditionals of every task, by the whole path from prompt to score."""
    system = MDLM(Config(**SMALL), TOKENIZER).eval().requires_grad_(False)
    system.model.heads = nn.ModuleDict({"token": Told()})
    return system


@pytest.fixture(scope="module")
def untrained():
    system = MDLM(Config(**SMALL), TOKENIZER)
    randomise(system.model)
    return system.eval().requires_grad_(False)


def near(share, p, count):
    return abs(share - p) <= Z99 * math.sqrt(p * (1 - p) / count) + 1e-12


@pytest.mark.parametrize("task", LISTS)
def test_true_conditionals_meet_the_ceilings(knowing, task):
    """300 answers each, an interval of 99%."""
    problems = study.held_out(task, 4, 300)
    n = len(problems[0].answer(random.Random(0)))
    for k in (1, n):
        said = study.answers(knowing, problems, study.FIXED["random"](k, n), seed=1)
        share = statistics.fmean(study.rights(knowing, problems, said))
        assert near(share, study.possible(problems[0], k), 300), (k, share)
        assert said.tokens_per_step == k


@pytest.mark.parametrize("name", [*study.FIXED, *study.ADAPTIVE])
def test_a_decoder_of_true_conditionals_is_as_good_as_the_ideal(knowing, name):
    problems = study.held_out("shuffle", 3, 200)
    make, setting = (study.FIXED[name], 2) if name in study.FIXED else (study.ADAPTIVE[name], 0.5)
    said = study.answers(knowing, problems, make(setting, 3), seed=4)
    share = statistics.fmean(study.rights(knowing, problems, said))
    ideal = study.Ideal(problems[0]).accuracy(make(setting, 3), draws=4000, seed=1)
    assert abs(share - ideal) <= Z99 * math.sqrt(ideal * (1 - ideal) * (1 / 200 + 1 / 4000)) + 1e-12


def test_a_threshold_copies_in_one_step_and_shuffles_one_by_one(knowing):
    """Flat marginals never exceed it until what is left is certain."""
    tokens = {}
    for task in ("copy", "shuffle"):
        problems = study.held_out(task, 4, 50)
        said = study.answers(knowing, problems, study.ADAPTIVE["threshold"](0.9, 4))
        assert all(study.rights(knowing, problems, said))
        tokens[task] = said.tokens_per_step
    assert tokens["copy"] == 4 and tokens["shuffle"] < 4 / 3


def test_always_the_same_answer_beats_the_ceiling_and_is_betrayed_by_its_entropy(knowing):
    """Greedily the first of tied answers is given every time, right or wrong; at temperature 1 as often as the data."""
    problem = study.held_out("replace-random", 4, 1)[0]
    spread = study._entropies(knowing, problem, (1,), 1.0, 400, 0)
    assert abs(spread["1"] - spread["data"]) < 0.05 and abs(spread["data"] - math.log(4)) < 0.02
    assert study._entropies(knowing, problem, (1, 4), 0.0, 20, 0)["4"] == 0


@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 2), (4, 3), (5, 2), (6, 4), (7, 7)])
def test_sizes_are_those_of_the_decoder(knowing, n, k):
    model = study.Ideal(Problem("copy", tuple("abcdefg"[:n])))
    sizes = study.sizes_of(n, k)
    assert sum(sizes) == n and max(sizes) <= k and len(sizes) == -(-n // k)
    from seriatim.decoding.loop import decode
    from seriatim.decoding.target import Target

    canvas, left = model.model.blank(1), [n]
    for _ in decode(Target(model.model), canvas, Select("random", study.steps_of(n, k))):
        left.append(int(canvas.open.sum()))
    assert tuple(a - b for a, b in pairwise(left)) == sizes


def test_held_out_problems_are_none_of_the_training():
    from seriatim.data.base import share

    assert all(share(" ".join(p.prompt)) < 0.05 for p in study.held_out("copy", 4, 20))
    assert study.held_out("copy", 4, 5, 1) != study.held_out("copy", 4, 5, 2)


def test_what_is_measured(untrained, tmp_path):
    told = []
    result = study.measure(
        untrained, ("shuffle", "sudoku"), (3,), ("random", "threshold"), problems=4, draws=8, said=told.append
    )
    assert told == ["shuffle 3", "sudoku"] and json.loads(json.dumps(result)) == result
    shape = result["tasks"]["shuffle"]["3"]
    assert [(r["decoder"], r["setting"]) for r in shape["runs"][:3]] == [("random", 1), ("random", 2), ("random", 3)]
    assert shape["runs"][0]["ceiling"] == 1.0 > shape["runs"][2]["ceiling"]
    assert all(0 <= r["accuracy"] <= 1 and 1 <= r["tokens_per_step"] <= 3 for r in shape["runs"])
    assert set(shape["entropy"]) == {"data", "1", "2", "3"} and len(shape["order"]["random"]) == 3
    assert result["tasks"]["sudoku"]["0"]["tokens"] == 16
    assert result["tasks"]["sudoku"]["0"]["runs"][0]["ceiling"] is None
    picture = save_parallel(result, tmp_path / "a.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_given_cells_of_a_sudoku_are_in_the_prompt_and_decided_anew(knowing):
    p, _ = asked(5, ("sudoku",), (0,), test=True)
    said = study.answers(knowing, [p], study.FIXED["random"](1, 16))
    assert study.rights(knowing, [p], said) == [True] and BLANK in p.prompt


def test_a_next_token_model_writes_one_token_at_a_time():
    system = NextToken(LineConfig(**SMALL), TOKENIZER)
    randomise(system.model)
    result = study.measure(system.eval(), ("copy",), (3,), problems=3, draws=8)
    runs = result["tasks"]["copy"]["3"]["runs"]
    assert [(r["decoder"], r["tokens_per_step"], r["kendall"]) for r in runs] == [
        ("left-to-right", 1.0, pytest.approx(1))
    ]


def test_problems_of_several_lengths_are_refused(untrained):
    problems = [Problem("copy", ("Ada", "Ben")), Problem("copy", ("Ada", "Ben", "Carl"))]
    with pytest.raises(ValueError, match="several lengths"):
        study.answers(untrained, problems, Select())


def test_trials_of_the_claim_say_what_its_rule_needs(knowing):
    independent, dependent = (arm.measure for arm in study.CLAIM.arms.values())
    assert set(study.INDEPENDENT) | set(study.DEPENDENT) == set(LISTS)
    tiny = study.kept(("copy",))(knowing, 0), study.kept(("replace-random",))(knowing, 0)
    assert tiny[0]["kept"] == 1.0 and tiny[0]["tokens_per_step"] > 4.5
    assert tiny[1]["one"] == 1.0 and 0.25 < tiny[1]["kept"] < 0.6
    assert callable(independent) and callable(dependent) and study.CLAIM.metric in tiny[0]
    assert study.CLAIM.verdict([1.0, 1.0], [0.2, 0.21, 0.19, 0.2, 0.2]) == "holds"
    assert study.CLAIM.verdict([0.3, 0.3], [0.2, 0.21, 0.19, 0.2, 0.2]) == "fails"


# ---- studies are found as systems are --------------------------------------------------------------------------------


def test_studies_are_no_systems():
    assert "parallelbench" in meta.studies() and not meta.studies().keys() & meta.catalogue().keys()
    assert meta.load("parallelbench") is study and all(m.family == "study" for m, _ in meta.studies().values())


def test_a_study_is_listed_and_shown(capsys):
    assert main(["list", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["parallelbench"]["family"] == "study"
    assert main(["show", "parallelbench"]) == 0
    assert "total correlation" in capsys.readouterr().out


def test_a_claim_of_a_study_is_queued():
    from seriatim.verbs.claim import claim_of, claimed

    assert claim_of("parallelbench") is study.CLAIM
    assert any(r["key"] == "parallelbench" for r in claimed())
