"""Acceptance of several drafts: by formula as by counting every outcome, and never above what any rule can reach."""

from __future__ import annotations

import itertools

import pytest
import torch

from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import decode
from seriatim.decoding.target import Target
from seriatim.decoding.verify import KSeq, Recursive
from seriatim.evaluation.acceptance import best_acceptance, kseq_acceptance, recursive_acceptance
from seriatim.factorization.line import Line
from seriatim.heads.dist import Categorical
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.tabular import tabular, true_law
from seriatim.layout import line
from seriatim.random import Key

V = 4
MODEL = tabular(line(3), Line(1), V, 2)


def laws(n: int, v: int = V, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.softmax(3 * torch.randn(n, v, generator=g, dtype=torch.float64), -1) for _ in range(2))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_thresholds_find_the_best_of_all_sets(k):
    p, q = laws(200)
    p[0, 0], q[0, 1] = 0.0, 0.0  # impossible for one of the two
    sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=V)), dtype=p.dtype)
    want = (p @ sets.T + 1 - (q @ sets.T) ** k).amin(-1)
    assert float((best_acceptance(p, q, k) - want).abs().max()) < 1e-12


@pytest.mark.parametrize("k", [1, 2, 4])
def test_no_rule_accepts_more_than_the_best_and_one_draft_is_the_overlap(k):
    p, q = laws(500, 30, 1)
    best = best_acceptance(p, q, k)
    for rule in (kseq_acceptance, recursive_acceptance):
        assert float((rule(p, q, k) - best).max()) < 1e-9
        assert float((rule(p, q, 1) - torch.minimum(p, q).sum(-1)).abs().max()) < 1e-12
        assert float((rule(p, p, k) - 1).abs().max()) < 1e-9
    assert float((kseq_acceptance(p, q, k) / best).min()) > 1 - 1 / torch.e


class Siblings:
    """k first tokens, drawn independently from one law."""

    def __init__(self, logits, k: int):
        self.logits, self.k = logits, k

    def propose(self, canvas, target, random):
        logits = self.logits.expand(canvas.batch, self.k, -1)
        draw = torch.arange(self.k) * 4 + 2
        value = random.categorical(logits, Key(canvas.row, torch.zeros(1, self.k, dtype=torch.long), draw))
        return Guess(value, (-1,) * self.k, Categorical(logits))

    def observe(self, canvas, rows, step):
        """Learns nothing."""


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(("rule", "verifier"), [(kseq_acceptance, KSeq), (recursive_acceptance, Recursive)])
def test_the_formulas_are_what_the_verifiers_count(rule, verifier, k):
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    law = true_law(MODEL, 1)
    p = torch.tensor([[law[x,] for x in range(V)]], dtype=torch.float64)

    def run(random, rows):
        canvas = MODEL.blank(rows)
        step = next(decode(Target(MODEL), canvas, verifier(), Siblings(q.log(), k), random))
        return torch.as_tensor(step.accepted).expand(rows).tolist()

    counted = enumerate_rows(run).get(1, 0.0)
    assert abs(counted - float(rule(p, q, k))) < 1e-9 and 0.1 < counted < 0.999
