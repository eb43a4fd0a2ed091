"""Training in passes: no sample twice in one, the rate halves by turns, and the best look at held-out data stays."""

import pytest
import torch
from torch import nn

from seriatim.training.recipe import Recipe
from seriatim.training.run import RunFolder
from seriatim.training.trainer import train


class Numbers:
    """Samples that are their own numbers."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def take(self, index, generator=None):
        return {"number": index}


class Learner(nn.Module):
    """One weight; held-out losses are those that it is told."""

    def __init__(self, looks=()):
        super().__init__()
        self.figures: dict[str, float] = {}
        self.model = nn.Linear(1, 1, bias=False)
        self.seen, self.looks, self.weights = [], list(looks), []

    def forward(self, batch, random, step, steps):
        self.seen.append(batch["number"].tolist())
        return self.model.weight.sum() * len(batch["number"]), torch.tensor(len(batch["number"]))

    def validate(self, examples):
        self.weights.append(self.model.weight.detach().clone())
        return {"loss": self.looks.pop(0)}

    def weights_to_keep(self):
        return self.model

    def stored(self, weights):
        return "model.safetensors", weights


def test_no_sample_comes_twice_in_a_pass_and_the_rest_of_one_is_left(tmp_path):
    learner = Learner()
    train(learner, Numbers(11), Recipe(9, batch=3, epoch=4), RunFolder(tmp_path / "run"), {"a": 1})
    for turn in range(3):
        once = [number for some in learner.seen[3 * turn : 3 * turn + 3] for number in some]
        assert len(set(once)) == 9 and set(once) <= set(range(11))
    assert learner.seen[:3] != learner.seen[3:6]


def test_fewer_samples_than_a_batch_are_all_taken(tmp_path):
    learner = Learner()
    train(learner, Numbers(2), Recipe(3, batch=4, epoch=1), RunFolder(tmp_path / "run"), {"a": 1})
    assert [sorted(some) for some in learner.seen] == [[0, 1]] * 3


def test_the_rate_halves_after_every_turn_but_the_first():
    recipe = Recipe(50, epoch=10, halving=True, warm_up=0.0)
    assert [recipe.rate(step) for step in (0, 9, 10, 19, 20, 29, 30)] == [1, 1, 1, 1, 0.5, 0.5, 0.25]


def test_the_weights_of_the_best_look_are_kept(tmp_path):
    learner = Learner(looks=[3.0, 1.0, 2.0, 1.5, 9.0])
    recipe = Recipe(50, batch=2, learning_rate=0.1, warm_up=0.0, epoch=5, validate_every=5, patience=2)
    history = train(learner, Numbers(10), recipe, RunFolder(tmp_path / "run"), {"a": 1}, held_out=Numbers(1))
    assert len(history) == 20 and learner.looks == [9.0], "two looks without a gain"
    assert torch.equal(learner.model.weight, learner.weights[1])
    again = Learner()
    train(again, Numbers(10), recipe, RunFolder(tmp_path / "run"), {"a": 1}, held_out=Numbers(1), resume=True)
    assert not again.seen and torch.equal(again.model.weight, learner.weights[1])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"halving": True}, "turns"), ({"patience": 0}, "at least 1"), ({"patience": 1, "ema": 0.9}, "leave out")],
)
def test_what_does_not_go_together_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Recipe(5, **wrong)
