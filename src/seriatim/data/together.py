"""Samples that are drawn several at a time: different ones of one class, or the same one again and again."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from seriatim.data.base import Examples

READ = 256  # samples that are looked at together where labels are not at hand


def labels_of(examples: Examples) -> Int[Tensor, " n"]:
    """The label of every sample of a side; 0 where there are no classes. Samples are read only where the side does not
    hold its labels apart (`labels`)."""
    held: Any = getattr(examples, "labels", None)
    if held is not None:
        return torch.as_tensor(held).long() if len(held) else torch.zeros(len(examples), dtype=torch.long)
    parts = [examples.take(part) for part in torch.arange(len(examples)).split(READ)]
    return torch.cat([p.get("label", torch.zeros(len(p["image"]), dtype=torch.long)) for p in parts])


class OfOneClass:
    """Sequences of `count` different samples of one class (of fewer, where a class has fewer, some of them again).

    A batch of n numbers has n / count sequences, rounded down: of every `count` numbers the first says with which
    sample a sequence begins. So a batch holds as many samples whatever the count.
    """

    def __init__(self, examples: Examples, count: int):
        if count < 1:
            raise ValueError(f"a sequence has at least one sample, got {count}")
        self.examples, self.count = examples, count
        self._order = labels_of(examples).argsort(stable=True)  # samples class by class
        labels = labels_of(examples)[self._order]
        _, size = labels.unique_consecutive(return_counts=True)
        begin = size.cumsum(0) - size
        self._place = self._order.argsort()  # of each sample among them
        self._begin, self._size = (x.repeat_interleave(size)[self._place] for x in (begin, size))

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, index: Int[Tensor, " n"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Everything that a sample has, (sequences, count, ...); "label" (sequences,). The others of a class are drawn
        by the generator; without one they are those that come next in it. Raises ValueError for fewer numbers than a
        sequence is long."""
        if len(index) < self.count:
            raise ValueError(
                f"a batch, or a part of it, of {len(index)} samples holds no sequence of {self.count}; take a "
                "larger one"
            )
        first = index[: len(index) // self.count * self.count : self.count]
        chosen = self.chosen(first, generator)
        batch = self.examples.take(chosen.flatten(), generator)
        found = {name: x.unflatten(0, chosen.shape) for name, x in batch.items()}
        if "label" in found:
            found["label"] = found["label"][:, 0]
        return found

    def chosen(self, first: Int[Tensor, " n"], generator: torch.Generator | None) -> Int[Tensor, "n count"]:
        """The samples of each sequence."""
        begin, size = self._begin[first], self._size[first]
        step = torch.arange(self.count).expand(len(first), -1)
        if generator is not None:
            step = step.clone()
            for row, most in enumerate(size.tolist()):
                others = 1 + torch.randperm(max(most - 1, 1), generator=generator)
                step[row, 1:] = others[torch.arange(self.count - 1) % len(others)]
        place = begin[:, None] + (self._place[first] - begin)[:, None].add(step) % size[:, None]
        return self._order[place]


class Copies(OfOneClass):
    """Sequences of one sample, augmented once, `count` times."""

    def take(self, index: Int[Tensor, " n"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        if len(index) < self.count:
            return super().take(index, generator)  # refuses
        first = index[: len(index) // self.count * self.count : self.count]
        batch = self.examples.take(first, generator)
        return {
            name: x if name == "label" else x[:, None].expand(-1, self.count, *x.shape[1:]) for name, x in batch.items()
        }
