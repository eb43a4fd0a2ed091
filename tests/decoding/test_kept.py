"""What is known of a sample beforehand is taken as it comes in the order."""

import pytest
import torch

import seriatim as s
from seriatim.canvas import Canvas, Set, Unset
from seriatim.decoding.kept import Kept
from seriatim.decoding.loop import Step
from seriatim.decoding.sample import SampleAll
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.random import Forced, Generator
from seriatim.systems.image.raster_ar import Config, RasterAR

SIDE, VOCAB = 3, 5


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    c = Config(side=SIDE, vocab=VOCAB, classes=2, width=16, depth=2, heads=2)
    return randomise(RasterAR.build(c, None)).eval()


def drawn(model, value, keep, seed=0):
    canvas = model.blank(len(value), Generator(seed))
    target = s.Target(model, {"class": torch.zeros(len(value), dtype=torch.long)})
    with torch.inference_mode():
        for _ in s.decode(target, canvas, Kept(SampleAll(), {"token": value}, keep), random=Generator(seed)):
            pass
    return canvas.value["token"]


def test_known_elements_keep_their_values_and_the_rest_varies(model):
    value, keep = torch.randint(VOCAB, (8, SIDE * SIDE)), torch.tensor([True, False, True] * 3)
    one, other = (drawn(model, value, keep, seed) for seed in (0, 1))
    assert torch.equal(one[:, keep], value[:, keep]) and torch.equal(other[:, keep], value[:, keep])
    assert not torch.equal(one[:, ~keep], other[:, ~keep])


def test_what_follows_has_seen_the_known_values(model):
    """The law of the element behind a known one is that of teacher forcing with the known value (enumerated)."""
    value = torch.randint(VOCAB, (1, SIDE * SIDE), generator=torch.Generator().manual_seed(3)).expand(4_000, -1)
    keep = torch.arange(SIDE * SIDE) != SIDE * SIDE - 1
    got = drawn(model, value, keep)[:, -1]
    canvas = model.blank(VOCAB)
    want = value[:VOCAB].clone()
    want[:, -1] = torch.arange(VOCAB)
    forced = Forced(want)
    target = s.Target(model, {"class": torch.zeros(VOCAB, dtype=torch.long)})
    with torch.inference_mode():
        for _ in s.decode(target, canvas, SampleAll(), random=forced):
            pass
    law = (forced.log_prob - forced.log_prob.logsumexp(0)).exp()
    share = torch.bincount(got, minlength=VOCAB).double() / len(got)
    assert float((share - law).abs().max()) < 4.5 * 0.5 / len(got) ** 0.5  # 4.5 deviations: error rate below 1e-4


def test_what_is_known_is_never_made_unknown_again():
    canvas = Canvas(line(4), {"token": torch.zeros(2, 4, dtype=torch.long)})
    keep, value = torch.tensor([True, False, False, True]), torch.tensor([[7, 7, 7, 7], [8, 8, 8, 8]])

    class Remasks:
        def decide(self, canvas, guess, rows, random):
            element = torch.tensor([[0, 1, 3], [3, 2, -1]])
            return Step((Set(torch.ones(2, 3, dtype=torch.long), element), Unset(element)))

    done, undone = Kept(Remasks(), {"token": value}, keep).decide(canvas, None, None, None).edits
    assert done.value.tolist() == [[7, 1, 7], [8, 1, 1]]
    assert undone.element.tolist() == [[-1, 1, -1], [-1, 2, -1]]
