"""Figures of quality against closed forms and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import sqrtm

from seriatim.data import load_digits
from seriatim.evaluation.metrics import (
    bits_per_byte,
    bits_per_dimension,
    distinct,
    frechet_distance,
    nearest_distances,
    nearest_examples,
    support,
    text_statistics,
    token_entropy,
)


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean: torch.Tensor, root: torch.Tensor, n: int = 200, seed: int = 0) -> torch.Tensor:
    """A sample whose mean is `mean` and whose covariance is root @ root.T, exactly."""
    x = normal(n, len(mean), seed)
    x = x - x.mean(0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(x.mT @ x / (n - 1)))
    return x @ whiten.mT @ root.mT + mean


# ---- Frechet distance ------------------------------------------------------------------------------------------------
def test_frechet_distance_of_diagonal_gaussians_has_its_closed_form() -> None:
    a, b = torch.tensor([0.5, 2.0, 3.0, 1e-4]).double(), torch.tensor([1.5, 2.0, 0.1, 1e4]).double()
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    got = frechet_distance(with_moments(torch.zeros(4).double(), a.diag()), with_moments(shift, b.diag(), 300, seed=1))
    assert got == pytest.approx(float(shift.square().sum() + (a - b).square().sum()), rel=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute_is_that_of_the_matrix_square_root() -> None:
    x, y = normal(60, 8, 0) @ normal(8, 8, 1), normal(50, 8, 2) @ normal(8, 8, 3) + 0.3
    s1, s2 = x.T.cov(), y.T.cov()
    root = torch.from_numpy(sqrtm((s1 @ s2).numpy()).real)
    by_hand = (x.mean(0) - y.mean(0)).square().sum() + (s1 + s2 - 2 * root).trace()
    assert frechet_distance(x, y) == pytest.approx(float(by_hand), rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(float(by_hand), rel=1e-9)


def test_frechet_distance_is_zero_between_equal_sets_with_fewer_samples_than_dimensions() -> None:
    x = 100 * normal(10, 64, 0)
    assert frechet_distance(x, x.flip(0)) / float(x.T.cov().trace()) < 1e-9


def test_frechet_distance_refuses_what_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(normal(1, 3, 0), normal(5, 3, 0))
    with pytest.raises(ValueError, match="want features"):
        frechet_distance(normal(5, 3, 0), normal(5, 4, 0))
    with pytest.raises(ValueError, match="1 of 5 generated samples have NaN"):
        frechet_distance(normal(5, 3, 0).index_fill(0, torch.tensor([2]), math.nan), normal(5, 3, 0))


# ---- support ---------------------------------------------------------------------------------------------------------
def support_by_hand(x: list[list[float]], y: list[list[float]], k: int, j: int) -> tuple[float, float, float, float]:
    def radius(points: list[list[float]], i: int, k: int) -> float:
        return sorted(math.dist(points[i], p) for n, p in enumerate(points) if n != i)[k - 1]

    def inside(p: list[float], points: list[list[float]], k: int) -> int:
        return sum(math.dist(p, q) <= radius(points, i, k) for i, q in enumerate(points))

    precision = sum(inside(p, y, k) > 0 for p in x) / len(x)
    recall = sum(inside(q, x, k) > 0 for q in y) / len(y)
    density = sum(inside(p, y, j) for p in x) / (j * len(x))
    coverage = sum(min(math.dist(p, q) for p in x) <= radius(y, i, j) for i, q in enumerate(y)) / len(y)
    return precision, recall, density, coverage


@pytest.mark.parametrize("seed", range(4))
def test_support_is_what_its_definitions_say(seed: int) -> None:
    x, y = 0.7 * normal(23, 2, seed) + 0.5, normal(31, 2, seed + 10)
    for k, j in ((3, 5), (5, 2)):
        got = support(x, y, k, j, chunk=7)
        wanted = support_by_hand(x.tolist(), y.tolist(), k, j)
        assert (got.precision, got.recall, got.density, got.coverage) == pytest.approx(wanted, abs=1e-12)
        assert len(set(wanted)) > 2, "a case in which the figures agree shows nothing"


def test_coverage_and_density_of_the_same_distribution_meet_their_expectations() -> None:
    """Naeem et al. 2020, Lemma 1 and 2: whatever the distribution. 60 sets; the bound is 4 standard errors."""
    n, m, k = 50, 40, 5
    sets = [support(normal(m, 6, 2 * s), normal(n, 6, 2 * s + 1), 3, k) for s in range(60)]
    expected = 1 - math.prod((n - i) / (n + m - i) for i in range(1, k + 1))
    for values, mean in (([s.coverage for s in sets], expected), ([s.density for s in sets], 1.0)):
        spread = torch.tensor(values).double()
        assert abs(float(spread.mean()) - mean) < 4 * float(spread.std()) / math.sqrt(len(sets))


def test_a_lost_mode_costs_recall_and_coverage_but_not_precision() -> None:
    real = torch.cat([normal(100, 3, 0), normal(100, 3, 1) + 20])
    lost = support(normal(200, 3, 2) * 0.8, real)
    assert lost.precision > 0.95 and lost.recall < 0.55 and lost.coverage < 0.55
    far = support(normal(50, 3, 3) + 100, real)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    collapsed = support(real[:1].repeat(50, 1), real)
    assert collapsed.precision == 1 and collapsed.recall <= 1 / 200 + 1e-12 and collapsed.coverage < 0.1


def test_support_needs_as_many_samples_as_neighbours() -> None:
    with pytest.raises(ValueError, match="at least 6 samples"):
        support(normal(5, 2, 0), normal(50, 2, 0))


# ---- copies ----------------------------------------------------------------------------------------------------------
def test_the_nearest_training_picture_is_found_in_whatever_chunk() -> None:
    digits = load_digits()

    class Train:
        def __len__(self) -> int:
            return len(digits.train)

        def take(self, index: torch.Tensor, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
            return {"image": digits.train.images[index]}

    images = torch.cat([digits.test.images[:5], digits.train.images[[3, 1200]]])
    distance, which = nearest_examples(images, Train(), chunk=100)
    torch.testing.assert_close(distance, nearest_distances(images, digits.train.images), rtol=1e-3, atol=2e-3)
    assert which[-2:].tolist() == [3, 1200] and float(distance[-2:].max()) < 2e-3 < float(distance[:5].min())
    with pytest.raises(ValueError, match="differ"):
        nearest_examples(images[:, :, :4], Train())


# ---- bits ------------------------------------------------------------------------------------------------------------
def test_a_uniform_guess_of_bytes_takes_eight_bits_per_byte_however_they_are_cut_into_tokens() -> None:
    text = "héllo, wörld"
    size = len(text.encode("utf-8"))
    for ids in (3, size):
        nats = torch.full((ids,), size * math.log(256) / ids)
        bits = bits_per_byte(nats, ids, size, "exact")
        assert bits.value == pytest.approx(8, rel=1e-6) and bits.per_id == pytest.approx(8 * size / ids, rel=1e-6)
    assert str(bits) == "8.000 bits per byte"


def test_a_bound_says_so_and_bits_per_dimension_count_dimensions() -> None:
    bits = bits_per_dimension(64 * math.log(17), 64, "bound")
    assert bits.value == pytest.approx(math.log2(17)) and str(bits) == "≤ 4.087 bits per dimension"


@pytest.mark.parametrize(
    ("nats", "count", "kind", "message"),
    [
        (-1.0, 3, "exact", "not below 0"),
        (math.nan, 3, "exact", "finite"),
        (1.0, 0, "exact", "above 0"),
        (1.0, 2.0, "exact", "whole number"),
        (1.0, 3, "approximate", "'exact' or a 'bound'"),
    ],
)
def test_bits_of_nonsense_are_refused(nats: float, count: int, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bits_per_byte(nats, 3, count, kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        bits_per_dimension(nats, count, kind)  # type: ignore[arg-type]


# ---- texts -----------------------------------------------------------------------------------------------------------
def test_distinct_counts_n_grams_within_samples_only() -> None:
    samples = [[1, 2, 1, 2], [1, 2]]
    assert distinct(samples, 1) == 2 / 6
    assert distinct(samples, 2) == 2 / 4  # 12 21 12 and 12; no 21 from one sample to the next
    assert distinct(samples, 3) == 2 / 2
    assert math.isnan(distinct(samples, 5))


def test_entropy_of_equal_shares_is_the_logarithm_of_their_number() -> None:
    assert token_entropy([[0, 1, 2, 3], [4, 5, 6, 7]]) == pytest.approx(3)
    assert token_entropy([[7, 7, 7]]) == 0


def test_a_looping_text_is_found() -> None:
    loop, text = [1, 2] * 10, list(range(20))
    statistics = text_statistics([loop, text, []])
    assert (statistics.looping, statistics.samples, statistics.tokens) == (0.5, 2, 40)
    assert statistics.share == pytest.approx((2 / 20 + 1) / 2)
    assert statistics.distinct[0] == 20 / 40  # the pool shares tokens 1 and 2
    with pytest.raises(ValueError, match="no sample with a token among 1"):
        text_statistics([[]])
