"""What a codec costs is measured against the exact cache, on the same tokens."""

from __future__ import annotations

import math

import pytest
import torch

from seriatim.backbones.compressed import Codec
from seriatim.evaluation.compression import contexts, costs
from seriatim.laws.interface import small

torch.set_num_threads(1)
PART, LENGTH = 8, 48
TEXTS = [torch.randint(2, 250, (LENGTH,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(2)]


@pytest.fixture(scope="module")
def system():
    return small()


def test_the_exact_cache_costs_nothing_and_its_perplexity_is_that_of_one_pass(system):
    cost = costs(system, TEXTS, {"exact": None}, PART)["exact"]
    figures = cost.figures()
    assert abs(figures["divergence"]) < 1e-6 and figures["excess nats"] == 0 and figures["greedy agreement"] == 1
    assert figures["times exact"] == 1 and figures["bits a number"] == 16
    start = PART - system._prefix + 1  # the first token that the second part reads
    said = sum(math.fsum(system.scores(ids, LENGTH - start)) for ids in TEXTS)
    assert cost.tokens == len(TEXTS) * (LENGTH - start)
    assert cost.nats == pytest.approx(-said, rel=1e-5)


def test_fewer_bits_cost_more_and_take_less(system):
    codecs = {bits: Codec(bits, outliers=0, rank=0, buffer=PART) for bits in (8, 4, 2)}
    found = costs(system, TEXTS, codecs, PART)
    divergences, sizes, peaks = zip(*((c.divergence, c.kept, c.peak) for c in found.values()), strict=True)
    assert 0 < divergences[0] < divergences[1] < divergences[2]
    assert sizes[0] > sizes[1] > sizes[2] and peaks[0] > peaks[1] > peaks[2]
    assert all(peak > size for peak, size in zip(peaks, sizes, strict=True))


def test_bytes_are_those_of_blocks_and_of_what_is_exact(system):
    """2 bits, and two bounds of 16 bits: of 8 tokens, or 16 channels; what is no whole block yet stands in 16 bits."""
    cost = costs(system, TEXTS, {"": Codec(2, outliers=0, rank=0, buffer=PART)}, PART)[""]
    slots = LENGTH - 1 + system._prefix
    blocks, rest = slots // PART * PART, slots % PART
    half = cost.numbers // slots // 2  # keys, or values, of a slot
    assert cost.parts["codes"] == blocks * 2 * half * 2 // 8
    assert cost.parts["bounds"] == blocks * half * 4 // PART + blocks * half * 4 // 16
    assert cost.parts["exact"] == rest * 2 * half * 2
    assert cost.kept == sum(cost.parts.values())


def test_contexts_are_beginnings_of_long_documents_drawn_by_a_seed(system):
    documents = ["short", "x" * 90, "y" * 100, "abc" * 40]
    every = contexts(system, documents, 30, 9)
    assert sorted(every) == sorted(system.tokenizer.encode(d)[:30] for d in documents[1:])
    assert contexts(system, documents, 30, 2, seed=5) == contexts(system, documents, 30, 2, seed=5)
    assert len({tuple(contexts(system, documents, 30, 1, seed=n)[0]) for n in range(9)}) == 3


def test_texts_with_nothing_behind_their_first_part_are_refused(system):
    with pytest.raises(ValueError, match="more than 48 tokens"):
        costs(system, TEXTS, {"exact": None}, LENGTH)
    with pytest.raises(ValueError, match="more than 8 tokens"):
        costs(system, [], {"exact": None}, PART)
