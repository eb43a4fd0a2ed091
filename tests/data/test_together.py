"""Sequences of samples of one class."""

from __future__ import annotations

import pytest
import torch

from seriatim.data.base import load_data
from seriatim.data.together import Copies, OfOneClass, labels_of


class Numbered:
    """Samples whose picture is their number; 7 of class 0, 2 of class 1, 1 of class 2, mixed."""

    label = torch.tensor([0, 1, 0, 0, 2, 0, 1, 0, 0, 0])

    def __len__(self):
        return 10

    def take(self, index, generator=None):
        more = 0.0 if generator is None else torch.rand(len(index), generator=generator) / 10
        return {"image": (index + more).float().view(-1, 1, 1, 1), "label": self.label[index]}


def numbers(batch):
    return batch["image"].flatten(1).floor().long()


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_sequence_begins_with_the_sample_asked_for_and_goes_on_with_others_of_its_class(seed):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found = OfOneClass(Numbered(), 4).take(torch.tensor([2, 9, 9, 9, 5, 0, 0, 0, 8]), generator)
    assert found["image"].shape == (2, 4, 1, 1, 1) and found["label"].tolist() == [0, 0]
    rows = numbers(found)
    assert rows[:, 0].tolist() == [2, 5]
    assert all(len(set(row)) == 4 for row in rows.tolist()) and bool((Numbered.label[rows] == 0).all())


def test_the_others_are_drawn_by_the_generator_alone():
    side, index = OfOneClass(Numbered(), 3), torch.zeros(30, dtype=torch.long)
    a, b, c = (numbers(side.take(index, torch.Generator().manual_seed(s))) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert set(a[:, 1:].flatten().tolist()) == {2, 3, 5, 7, 8, 9}
    assert torch.equal(*(numbers(side.take(index)) for _ in range(2)))


def test_small_classes_repeat_their_samples():
    side = OfOneClass(Numbered(), 5)
    for generator in (None, torch.Generator().manual_seed(0)):
        rows = numbers(side.take(torch.tensor([1] * 5 + [4] * 5), generator))
        assert set(rows[0].tolist()) == {1, 6} and set(rows[1].tolist()) == {4}


def test_copies_are_augmented_alike():
    found = Copies(Numbered(), 3).take(torch.tensor([2, 0, 0, 4, 0, 0]), torch.Generator().manual_seed(0))
    assert found["image"].shape == (2, 3, 1, 1, 1) and found["label"].tolist() == [0, 2]
    assert bool((found["image"] == found["image"][:, :1]).all())


def test_batches_shorter_than_a_sequence_are_refused():
    for kind in (OfOneClass, Copies):
        with pytest.raises(ValueError, match="take a larger one"):
            kind(Numbered(), 4).take(torch.tensor([0, 1, 2]))
        with pytest.raises(ValueError, match="at least one"):
            kind(Numbered(), 0)


def test_labels_are_found_wherever_they_are():
    digits = load_data("digits", "image").train
    assert torch.equal(labels_of(digits), digits.labels)
    assert torch.equal(labels_of(Numbered()), Numbered.label)
    unlabelled = type("Unlabelled", (Numbered,), {"labels": ()})()
    assert not bool(labels_of(unlabelled).any())
