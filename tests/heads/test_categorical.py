"""Categorical distributions and their head: normalised, mixed, residual, picked; tied and with several roles."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seriatim.decoding.filters import Warper
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.dist import Categorical, Greedy, largest
from seriatim.laws.case import randomise
from seriatim.plan import Reads
from seriatim.random import Key, Keyed, enumerate_law

INF = float("inf")


def logits(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ---- the distribution ------------------------------------------------------------------------------------------------


def test_log_prob_is_the_law_that_is_sampled():
    dist = Categorical(logits(1, 2, 3))
    law = enumerate_law(lambda random: tuple(dist.sample(random, Key(torch.arange(1), 0))[0].tolist()))
    for x, p in law.items():
        assert p == pytest.approx(float(dist.log_prob(torch.tensor([x])).sum().exp()), abs=1e-12)
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)


def test_entropy_counts_impossible_values_as_nothing():
    x = torch.tensor([[[0.0, 0.0, -INF], [-INF, 3.0, -INF]]]).double()
    close(Categorical(x).entropy(), torch.tensor([[2.0, 1.0]]).double().log())


def test_mixtures_are_normalised_weighted_products():
    a, b = Categorical(logits(2, 3, 5)), Categorical(logits(2, 3, 5, seed=1))
    product = a.probs() ** 2.5 * b.probs() ** -1.5
    close(a.mix([b], [2.5, -1.5]).probs(), product / product.sum(-1, keepdim=True))
    rows = torch.tensor([1.5, 0.0]).double()[:, None, None]
    by_row = a.mix([b], [1 + rows, -rows]).logits
    close(by_row[0], a.mix([b], [2.5, -1.5]).logits[0])
    close(by_row[1], a.logits[1])


def test_what_one_branch_excludes_stays_excluded_under_guidance():
    a, b = torch.tensor([[[1.0, -INF, 0.0, 2.0]]]), torch.tensor([[[0.0, -INF, -INF, 1.0]]])
    for w in (0.0, 2.0):
        p = Categorical(a).mix([Categorical(b)], [1 + w, -w]).probs()
        assert bool(torch.isfinite(p).all()) and p[0, 0, 1:3].tolist() == [0, 0]


def test_draft_and_residual_make_up_the_target():
    """p = min(p, q) + (share rejected) * residual, and a draft that equals its target leaves the target."""
    p, q = Categorical(logits(2, 3, 5)), Categorical(logits(2, 3, 5, seed=1))
    accepted = torch.minimum(p.probs(), q.probs())
    close(accepted + (1 - accepted.sum(-1, keepdim=True)) * p.residual(q).probs(), p.probs())
    close(p.residual(p).probs(), p.probs())
    assert float((p.residual(q).probs() - p.probs()).abs().max()) > 0.01, "an unchanged target must be seen"


def test_take_picks_some_readouts_and_keeps_what_greedy_is():
    x, index = logits(2, 3, 5), torch.tensor([[2, 0], [1, 1]])
    for kind in (Categorical, Greedy):
        got = kind(x).take(index)
        assert type(got) is kind
        assert torch.equal(got.logits, torch.stack([x[b, i] for b, i in enumerate(index)]))
        assert torch.equal(kind(x).take(index[:1]).logits, x[:, index[0]])


def test_greedy_is_the_limit_of_low_temperature():
    x = logits(2, 3, 5)
    close(Greedy(x).probs(), Warper(temperature=1e-3)(Categorical(x)).probs())
    assert torch.equal(Greedy(x).sample(Keyed(0), Key(torch.arange(2), 0)), x.argmax(-1))


# ---- the head --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_negative_log_probability():
    head, h = randomise(CategoricalHead(6, 5, bias=True)), logits(2, 3, 6)
    x = torch.randint(5, (2, 3), generator=torch.Generator().manual_seed(0))
    close(head.loss(h, None, x), -head.dist(h, None, None).log_prob(x))


def test_a_tied_head_reads_with_the_table_itself():
    table = torch.nn.Parameter(logits(5, 6))
    head, h = CategoricalHead(6, 5, tied=table), logits(2, 3, 6)
    assert head.weight is table
    close(head.logits(h), h @ table.T)


def test_reading_one_slot_of_many_is_one_product_of_matrices():
    """torch takes a slice of slots for a batch of matrices, for which it copies the whole weight."""
    head, called = CategoricalHead(8, 500).double().requires_grad_(False), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            called.append(str(op))
            return op(*args, **(kwargs or {}))

    for h in (logits(1, 40, 8), logits(3, 40, 8)):
        with torch.no_grad(), Watch():
            said = head.logits(h[:, -1:])
        close(said, h[:, -1:] @ head.weight.T)
    assert called.count("aten.mm.default") == 2 and not any("bmm" in op for op in called)


def test_each_role_reads_with_a_matrix_of_its_own():
    head, h = randomise(CategoricalHead(6, 5, roles=2, bias=True)), logits(2, 3, 6)
    role = torch.tensor([[0, 1, -1], [1, 0, 0]])  # -1: padding, read by nobody
    got = head.logits(h, Reads(torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), role))
    for b, m in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        if role[b, m] >= 0:
            part = slice(5 * int(role[b, m]), 5 * int(role[b, m]) + 5)
            close(got[b, m], head.weight[part] @ h[b, m] + head.bias[part])


@pytest.mark.parametrize(
    "build, error, says",
    [
        (lambda: CategoricalHead(6, 0), ValueError, "at least 1 id"),
        (lambda: CategoricalHead(6, 5, roles=0), ValueError, "at least 1 role"),
        (lambda: CategoricalHead(6, 5, tied=torch.nn.Parameter(torch.zeros(6, 5))), ValueError, r"\(5, 6\), got"),
        (lambda: CategoricalHead(6, 5, roles=2).logits(torch.zeros(1, 1, 6)), ValueError, "2 roles"),
        (lambda: Warper(temperature=0.5)(object()), TypeError, "has no `warped`"),
    ],
)
def test_mistakes_are_named(build, error, says):
    with pytest.raises(error, match=says):
        build()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [10, 8192, 8200, 49152])
def test_the_likeliest_is_the_first_of_equals_however_many_there_are(dtype, vocab):
    """16-bit numbers are often equal; drafts and plain decoding must choose the same."""
    x = torch.randn(2, 3, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    x[:, 1] = x[:, 1].clamp(max=1.0)  # hundreds of equals
    x[1, 2] = -torch.inf
    x[1, 2, 7] = 0.0
    x[0, 2, [3, vocab - 1]] = torch.inf
    assert torch.equal(largest(x), x.argmax(-1))
    assert int(largest(x)[0, 1]) == int((x[0, 1] == x[0, 1].max()).nonzero()[0, 0])
