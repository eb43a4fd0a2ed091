"""Figures of quality: distances between sets of features, diversity, copying, bits, statistics of texts.

Pure functions of tensors and lists; what features they are computed on is the caller's affair and must be said with
them. What each figure means, and what it must not be compared with, stands in docs/evaluation.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from seriatim.data.base import Examples

Kind = Literal["exact", "bound"]
LOOPING = 0.3  # a text with a smaller share of distinct tokens repeats itself


# ---- sets of features ------------------------------------------------------------------------------------------------
def frechet_distance(generated: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, Eq. 6).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) with unbiased covariances and no shrinkage, in float64. The trace of
    the square root is the sum of the singular values of S1^(1/2) S2^(1/2), so that nothing is squared and rooted
    again. Biased upwards at few samples, and more so in many dimensions: compare equal numbers only.
    """
    a, b = _pair(generated, real, least=2)
    (mean_a, root_a, trace_a), (mean_b, root_b, trace_b) = _moments(a), _moments(b)
    overlap = float(torch.linalg.svdvals(root_a @ root_b).sum())
    return max(0.0, float((mean_a - mean_b).square().sum()) + trace_a + trace_b - 2 * overlap)


def _moments(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"], float]:
    """Mean, symmetric square root of the covariance, and its trace."""
    mean = x.mean(0)
    centred = x - mean
    covariance = centred.mT @ centred / (len(x) - 1)
    values, vectors = torch.linalg.eigh(covariance)
    return mean, (vectors * values.clamp(min=0).sqrt()) @ vectors.mT, float(covariance.trace())


@dataclass(frozen=True)
class Support:
    """How two clouds of features cover each other: quality in precision and density, variety in recall and coverage.

    All lie in [0, 1] except density, which may exceed 1.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def support(
    generated: Float[Tensor, "n d"],
    real: Float[Tensor, "m d"],
    neighbours: int = 3,
    coverage_neighbours: int = 5,
    chunk: int = 2048,
) -> Support:
    """Precision and recall (Kynkaanniemi et al. 2019, Eq. 1 and 2), density and coverage (Naeem et al. 2020, Eq. 4, 7).

    A set's manifold is the union of closed balls around its points, each as far as the k-th nearest other point:
    `neighbours` for precision and recall, `coverage_neighbours` for density and coverage (both papers' values).
    """
    k, j = neighbours, coverage_neighbours
    if min(k, j) < 1:
        raise ValueError(f"neighbours are at least 1, got {k} and {j}")
    a, b = _pair(generated, real, least=max(k, j) + 1)
    centre = b.mean(0)  # products of small numbers lose fewer digits than those of large ones
    a, b = a - centre, b - centre
    own, wide, narrow = _radii(a, (k,), chunk)[0], *_radii(b, (j, k), chunk)
    precise, dense = 0, 0
    recalled, covered = torch.zeros(len(b), dtype=torch.bool), torch.zeros(len(b), dtype=torch.bool)
    for part, radius in zip(a.split(chunk), own.split(chunk), strict=True):
        apart = torch.cdist(part, b)
        precise += int((apart <= narrow).any(1).sum())
        recalled |= (apart <= radius[:, None]).any(0)
        inside = apart <= wide
        dense += int(inside.sum())
        covered |= inside.any(0)
    n, m = len(a), len(b)
    return Support(precise / n, int(recalled.sum()) / m, dense / (j * n), int(covered.sum()) / m)


def _radii(x: Float[Tensor, "n d"], neighbours: Sequence[int], chunk: int) -> list[Float[Tensor, " n"]]:
    """For each k the distance of each point to its k-th nearest other point."""
    parts = []
    for start, part in zip(range(0, len(x), chunk), x.split(chunk), strict=True):
        apart = torch.cdist(part, x)
        apart[torch.arange(len(part)), start + torch.arange(len(part))] = math.inf  # itself
        parts.append(apart.topk(max(neighbours), largest=False).values)
    nearest = torch.cat(parts)
    return [nearest[:, k - 1] for k in neighbours]


def _pair(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or a.shape[1] == 0:
        raise ValueError(f"want features (n, d) and (m, d), got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < least:
        raise ValueError(f"at least {least} samples on each side, got {len(a)} and {len(b)}: generate more")
    for x, name in ((a, "generated"), (b, "real")):
        if not x.isfinite().all():
            raise ValueError(f"{int((~x.isfinite()).any(1).sum())} of {len(x)} {name} samples have NaN or inf features")
    return a.detach().cpu().double(), b.detach().cpu().double()


# ---- pictures --------------------------------------------------------------------------------------------------------
def spread(images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> float:
    """Diversity within classes: the mean, over classes and pixels, of the standard deviation over a class's pictures.

    In units of the pixels. Compare with real pictures; classes with a single picture are left out.
    """
    if images.dim() != 4 or labels.shape != images.shape[:1] or len(images) == 0:
        raise ValueError(f"want (n, c, h, w) and (n,), n > 0; got {tuple(images.shape)} and {tuple(labels.shape)}")
    groups = [images[labels == label] for label in labels.unique()]
    deviations = [group.float().std(dim=0).mean() for group in groups if len(group) > 1]
    if not deviations:
        raise ValueError("spread needs a class with at least two pictures")
    return torch.stack(deviations).mean().item()


def nearest_distances(
    images: Float[Tensor, "n c h w"], reference: Float[Tensor, "m c h w"], chunk: int = 1024
) -> Float[Tensor, " n"]:
    """Euclidean distance of each picture to the nearest one of `reference` (the training set): 0 is a copy.

    Compare the mean with that of real held-out pictures; much smaller means copying.
    """
    if images.shape[1:] != reference.shape[1:] or len(reference) == 0:
        raise ValueError(f"shapes differ or nothing to compare with: {tuple(images.shape)}, {tuple(reference.shape)}")
    flat = reference.flatten(1)
    pieces = [torch.cdist(part.flatten(1), flat).amin(dim=1) for part in images.split(chunk)]
    return torch.cat(pieces)


def nearest_examples(
    images: Float[Tensor, "n c h w"], examples: Examples, chunk: int = 1024
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Distance to, and number of, the nearest of all training pictures, which are read `chunk` at a time."""
    best = torch.full((len(images),), math.inf)
    which = torch.zeros(len(images), dtype=torch.long)
    flat = images.flatten(1)
    for rows in torch.arange(len(examples)).split(chunk):
        part = examples.take(rows)["image"]
        if part.shape[1:] != images.shape[1:]:
            raise ValueError(f"pictures {tuple(images.shape[1:])} and training pictures {tuple(part.shape[1:])} differ")
        distance, row = torch.cdist(flat, part.flatten(1)).min(dim=1)
        which = torch.where(distance < best, rows[row], which)
        best = torch.minimum(best, distance)
    return best, which


def psnr(images: Float[Tensor, "n c h w"], originals: Float[Tensor, "n c h w"]) -> float:
    """Peak signal to noise ratio in dB of pictures in [-1, 1], from the squared error over all of them."""
    if images.shape != originals.shape:
        raise ValueError(f"pictures and originals differ in shape: {tuple(images.shape)}, {tuple(originals.shape)}")
    error = F.mse_loss(images, originals).item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)


# ---- bits ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bits:
    """A negative log-likelihood in bits, and whether it is the model's own or an upper bound on it."""

    value: float
    unit: Literal["byte", "dimension"]
    kind: Kind
    count: int  # bytes or dimensions that were scored
    per_id: float | None = None  # bits per token: depends on the vocabulary, never compared between them

    def __str__(self) -> str:
        return f"{'≤ ' if self.kind == 'bound' else ''}{self.value:.3f} bits per {self.unit}"


def bits_per_byte(nats: float | Tensor, ids: int, bytes: int, kind: Kind) -> Bits:
    """Total nats of a text as bits per byte of UTF-8: nats / (ln 2 * bytes), whatever the tokens were.

    nats: summed over the text (a tensor is summed here); ids: how many tokens were scored; bytes: how many bytes of
    UTF-8 these spell (given tokens count in neither); kind: "exact" for a likelihood, "bound" for an upper bound.
    """
    total, _ = _nats(nats, bytes, kind), _count(ids, "ids")
    return Bits(total / bytes, "byte", kind, bytes, total / ids)


def bits_per_dimension(nats: float | Tensor, dimensions: int, kind: Kind) -> Bits:
    """Total nats as bits per dimension (pixel channel) of discrete data: nats / (ln 2 * dimensions).

    Densities of continuous values are another thing (they depend on units and may be negative): not for these.
    """
    return Bits(_nats(nats, dimensions, kind) / dimensions, "dimension", kind, dimensions)


def _nats(nats: float | Tensor, count: int, kind: Kind) -> float:
    """Total bits, checked."""
    if kind not in ("exact", "bound"):
        raise ValueError(f"a likelihood is 'exact' or a 'bound', got {kind!r}")
    _count(count, "bytes or dimensions")
    total = float(nats.double().sum()) if isinstance(nats, Tensor) else float(nats)
    if not math.isfinite(total) or total < 0:
        raise ValueError(f"the negative log-likelihood of discrete data is finite and not below 0, got {total} nats")
    return total / math.log(2)


def _count(count: int, name: str) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"a whole number of {name} above 0, got {count!r}")
    return count


# ---- texts -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TextStatistics:
    """What a set of generated token sequences shows without a reference.

    distinct: distinct n-grams over all n-grams, for n = 1, 2, 3, of all samples together; entropy: of the pooled
    distribution of tokens, in bits; share: distinct tokens over tokens within a sample, mean over samples; looping:
    share of samples in which that is under 0.3.
    """

    distinct: tuple[float, float, float]
    entropy: float
    share: float
    looping: float
    samples: int
    tokens: int


def text_statistics(samples: Sequence[Sequence[int]]) -> TextStatistics:
    """Statistics of token sequences; empty ones are left out. All depend on the length: compare equal ones only."""
    rows = [list(map(int, row)) for row in samples if len(row) > 0]
    if not rows:
        raise ValueError(f"no sample with a token among {len(samples)}")
    shares = [len(set(row)) / len(row) for row in rows]
    return TextStatistics(
        distinct=(distinct(rows, 1), distinct(rows, 2), distinct(rows, 3)),
        entropy=token_entropy(rows),
        share=sum(shares) / len(rows),
        looping=sum(share < LOOPING for share in shares) / len(rows),
        samples=len(rows),
        tokens=sum(map(len, rows)),
    )


def distinct(samples: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of all samples (Li et al. 2016); none crosses from one sample to the next."""
    if n < 1:
        raise ValueError(f"n-grams have at least 1 token, got n={n}")
    grams = [tuple(row[i : i + n]) for row in samples for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def token_entropy(samples: Sequence[Sequence[int]]) -> float:
    """Entropy in bits of the distribution of all samples' tokens together: 0 for one repeated token."""
    counts = Counter(token for row in samples for token in row)
    total = sum(counts.values())
    if total == 0:
        raise ValueError("no token in any sample")
    return max(0.0, -sum(c / total * math.log2(c / total) for c in counts.values()))
