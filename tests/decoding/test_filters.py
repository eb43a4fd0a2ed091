"""Temperature and filters against their definitions, token by token, and against Hugging Face's warpers."""

from __future__ import annotations

import itertools

import pytest
import torch

from seriatim.decoding.filters import Warper
from seriatim.heads.dist import Categorical, Greedy
from seriatim.random import Enumerator, Key, Keyed

NEG = -torch.inf


def logits(rows=60, vocab=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(1, rows, vocab, generator=g, dtype=torch.float64)
    x[0, :10] = x[0, :10].round()  # ties
    x[0, 10:20, :4] = NEG  # impossible tokens
    x[0, 10:20] = x[0, 10:20][:, torch.randperm(vocab, generator=g)]
    return x


def kept(warper, x):
    """The tokens that stay, as sets."""
    return [set(row.nonzero()[:, 0].tolist()) for row in (warper(Categorical(x)).probs()[0] > 0)]


# ---- definitions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.2, 1.0, 1.7])
def test_temperature_raises_probabilities_to_a_power(temperature):
    x = logits()
    p = torch.softmax(x, -1) ** (1 / temperature)
    assert torch.allclose(Warper(temperature)(Categorical(x)).probs(), p / p.sum(-1, keepdim=True), rtol=0, atol=1e-12)


def test_temperature_zero_is_the_first_of_the_likeliest():
    x = logits()
    dist = Warper(temperature=0, top_p=0.1)(Categorical(x))
    assert isinstance(dist, Greedy)
    first = [next(i for i, v in enumerate(row) if v == max(row)) for row in x[0].tolist()]
    assert dist.sample(Keyed(0), Key(torch.arange(1), 0))[0].tolist() == dist.mode()[0].tolist() == first
    assert torch.equal(dist.probs()[0].argmax(-1), dist.mode()[0]) and bool((dist.probs().sum(-1) == 1).all())


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 5e-324])
def test_low_temperatures_approach_it(temperature):
    x = logits()[:, 10:].float()
    gap = Warper(temperature)(Categorical(x)).probs() - Warper(0)(Categorical(x)).probs()
    assert float(gap.abs().max()) < 1e-9


@pytest.mark.parametrize("k", [1, 2, 5, 9, 100])
def test_top_k_keeps_exactly_k_the_first_of_equals(k):
    x = logits()
    want = []
    for row in x[0].tolist():
        best = sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:k]
        want.append({i for i in best if row[i] > NEG})
    assert kept(Warper(top_k=k), x) == want
    ties = torch.zeros(1, 1, 9)
    assert kept(Warper(top_k=k), ties) == [set(range(min(k, 9)))]


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_of_likeliest_tokens_with_the_mass(mass):
    """Brute force over all subsets; of equals any will do."""
    x = logits(24, 7)
    for row, got in zip(torch.softmax(x, -1)[0].tolist(), kept(Warper(top_p=mass), x), strict=True):
        total = lambda s, row=row: sum(row[i] for i in s)  # noqa: E731
        enough = [set(s) for n in range(1, 8) for s in itertools.combinations(range(7), n) if total(s) >= mass - 1e-12]
        smallest = min(map(len, enough))
        assert total(got) >= mass - 1e-12 and len(got) == smallest
        assert total(got) >= max(total(s) for s in enough if len(s) == smallest) - 1e-12


@pytest.mark.parametrize("share", [0.01, 0.1, 0.7, 1.0])
def test_min_p_keeps_what_has_a_share_of_the_largest_probability(share):
    x = logits()
    want = [{i for i, p in enumerate(row) if p >= share * max(row)} for row in torch.softmax(x, -1)[0].tolist()]
    assert kept(Warper(min_p=share), x) == [{i for i in s} for s in want]


@pytest.mark.parametrize("mass", [0.2, 0.6, 0.95])
def test_typical_keeps_the_least_surprising_surprises(mass):
    """Tokens by |surprise - entropy| until they have the mass, the one that crosses it included."""
    x = logits()[:, 20:]
    for row, got in zip(torch.softmax(x, -1)[0], kept(Warper(typical=mass), x), strict=True):
        entropy = -(row * row.log()).sum()
        order = (-row.log() - entropy).abs().argsort().tolist()
        want, total = set(), 0.0
        for i in order:
            want.add(i)
            total += float(row[i])
            if total >= mass:
                break
        assert got == want


def test_typical_may_drop_the_likeliest_token():
    x = torch.tensor([[[0.4, *[0.1] * 6]]], dtype=torch.float64).log()
    got = kept(Warper(typical=0.35), x)[0]
    assert len(got) == 4 and 0 not in got


def test_what_stays_keeps_its_proportions():
    x = logits()
    for warper in (Warper(top_k=3), Warper(top_p=0.7), Warper(min_p=0.2), Warper(typical=0.5)):
        p, q = torch.softmax(x, -1), warper(Categorical(x)).probs()
        alive = q > 0
        share = (p * alive).sum(-1, keepdim=True)
        assert torch.allclose(q, p * alive / share, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "warper", [Warper(top_k=2), Warper(top_p=0.5), Warper(min_p=0.3), Warper(0.5, top_p=0.8)], ids=str
)
def test_the_likeliest_token_always_stays(warper):
    x = logits()
    assert all(int(best) in s for best, s in zip(x[0].argmax(-1), kept(warper, x), strict=True))


def test_filters_apply_one_after_another():
    """Temperature first, then top-k, top-p of what is left, min-p, typical."""
    x = Categorical(logits())
    whole = Warper(1.3, 6, 0.9, 0.05, 0.9)(x).probs()
    parts = x
    for part in (Warper(1.3), Warper(top_k=6), Warper(top_p=0.9), Warper(min_p=0.05), Warper(typical=0.9)):
        parts = part(parts)
    assert torch.allclose(whole, parts.probs(), rtol=0, atol=1e-12)
    other = Warper(1.3)(Warper(typical=0.9)(Warper(min_p=0.05)(Warper(top_p=0.9)(Warper(top_k=6)(x)))))
    assert float((whole - other.probs()).abs().max()) > 1e-3


def test_neutral_settings_change_nothing():
    x = Categorical(logits())
    assert Warper().neutral and not Warper(top_k=3).neutral and not Warper(0.9).neutral
    for warper in (Warper(), Warper(top_k=9), Warper(top_p=1.0), Warper(typical=1.0)):
        assert torch.allclose(warper(x).probs(), x.probs(), rtol=0, atol=1e-12)


def test_what_is_filtered_out_is_never_drawn():
    """Enumerated: as many outcomes as tokens stay."""
    dist = Warper(top_k=3)(Categorical(logits()[:, 30:31]))
    random = Enumerator()
    dist.sample(random, Key(torch.arange(1), 0))
    assert random.branch == [(0, 3)]


def test_half_precision_is_filtered_in_float32():
    x = torch.tensor([[[1.0, 1.0078125, 0.0]]]).bfloat16()
    assert Warper(0.5)(Categorical(x)).logits.dtype == torch.float32
    assert Warper(0.5)(Categorical(x.double())).logits.dtype == torch.float64


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign():
    return pytest.importorskip("transformers.generation.logits_process")


@pytest.mark.parametrize(
    ("name", "setting", "warper"),
    [
        ("TemperatureLogitsWarper", 0.7, Warper(0.7)),
        ("TopKLogitsWarper", 3, Warper(top_k=3)),
        ("TopPLogitsWarper", 0.8, Warper(top_p=0.8)),
        ("TopPLogitsWarper", 0.05, Warper(top_p=0.05)),
        ("MinPLogitsWarper", 0.1, Warper(min_p=0.1)),
        ("TypicalLogitsWarper", 0.8, Warper(typical=0.8)),
        ("TypicalLogitsWarper", 0.3, Warper(typical=0.3)),
    ],
)
def test_parity_with_hugging_face(foreign, name, setting, warper):
    """Where no two tokens are equally likely (of equals both keep some, not the same)."""
    x = logits(200, 50, seed=3)[:, 20:]
    want = getattr(foreign, name)(setting)(None, x[0].clone())
    got = warper(Categorical(x))
    assert torch.allclose(got.probs()[0], torch.softmax(want, -1), rtol=0, atol=1e-12)


def test_parity_of_all_together(foreign):
    x = logits(200, 50, seed=4)[:, 20:]
    want = x[0].clone()
    for name, setting in [("Temperature", 0.8), ("TopK", 20), ("TopP", 0.9), ("MinP", 0.02), ("Typical", 0.9)]:
        want = getattr(foreign, f"{name}LogitsWarper")(setting)(None, want)
    assert torch.allclose(
        Warper(0.8, 20, 0.9, 0.02, 0.9)(Categorical(x)).probs()[0], torch.softmax(want, -1), atol=1e-12
    )


# ---- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": 0}, {"top_p": 0.0},
     {"top_p": 1.1}, {"min_p": -0.1}, {"typical": 0.0}],
    ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Warper(**wrong)


def test_what_is_not_categorical_is_refused():
    with pytest.raises(TypeError, match="float"):
        Warper(0.5)(1.0)
