"""The released weights of HMAR in our parts: names and shapes of its files, numbers of its code, and what would break
them.

The golden numbers were computed once by the released code (NVlabs/HMAR, in float32) with the weights that `weights`
makes from names and shapes alone, over the ids of `pictures`: logits of a training forward by each end (the first four,
the last four, the largest; of mask passes at every third place behind the first scale, which are hidden), and a picture
drawn under guidance, where its sampling takes the likeliest ids, by mask passes and without.
"""

from __future__ import annotations

import pytest
import torch

from seriatim.canvas import Revise, Set
from seriatim.systems.image.hmar import COUNTS, HMAR
from seriatim.systems.system import Sampling
from seriatim.verbs.load import load
from support.released_hmar import FORK, SHARED, weights
from support.released_var import CLASSES, HEADS, WIDTH, pictures, released, tokenizer_shapes

LABEL = torch.tensor([1, 4])
PLAIN = ((0.43353, -2.53327, 3.42425, -0.2689, 2.87296, -1.62319, 4.99723, -2.23072), 8.49703)
MASKED = ((0.82055, -0.04327, 5.30309, 5.23588, 1.96538, -3.9314, 6.77709, 1.68102), 9.50022)
DRAWN = (-0.3358, -0.71091, 0.61443, 1.0, 0.42089, 0.36438)
ONE_PASS = (-0.80655, -0.21145, 0.09896, -0.18059, 1.0, 1.0)
GREEDY = Sampling(temperature=0.0, guidance=1.7)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    place = tmp_path_factory.mktemp("released")
    torch.save(released(tokenizer_shapes()), place / "vae_ch160v4096z32.pth")
    torch.save(weights(), place / "hmar-d16.pth")
    return place / "hmar-d16.pth"


@pytest.fixture
def system(file):
    return load(file)


def said(system, plan, canvas, condition):
    with torch.no_grad():
        h = system.model.hidden(plan, canvas, None, system.model.encode(condition))
        dist, element, _ = system.model.dist(h, plan, canvas)
    return dist.logits[:, element[0] >= 0]


def gap(logits, golden):
    first, largest = golden
    found = torch.cat([logits[0, 0, :4], logits[1, -1, -4:], logits.abs().max()[None]])
    return float((found - torch.tensor([*first, largest])).abs().max()) / largest


def plain(system):
    canvas, condition = system.canvas({"image": pictures(), "label": LABEL})
    return gap(said(system, system.model.factorization.packed(canvas), canvas, condition), PLAIN)


def masked(system):
    """A mask pass over all scales, in which what is hidden stands as a guess."""
    canvas, condition = system.canvas({"image": pictures(), "label": LABEL})
    ids = canvas.value["token"].clone()
    element = torch.arange(ids.shape[1]).expand(2, -1)
    hidden = (element > 0) & (element % 3 == 1)
    canvas.apply([Set(ids, torch.where(hidden, -1, element)), Revise(torch.where(hidden, element, -1), ids)])
    plan = system.model.factorization.masked(canvas, canvas.layout.coord[:, 0] > 0)
    return gap(said(system, plan, canvas, condition), MASKED)


def off(system, sampling, golden):
    drawn = system.draw(LABEL, sampling=sampling)
    return float((drawn.images[1, :, 40, 11:13].flatten() - torch.tensor(golden)).abs().max()), drawn.forwards


def test_what_both_ends_say_is_what_the_released_code_says(system):
    assert plain(system) < 1e-4 and masked(system) < 1e-4


def test_a_picture_under_guidance_is_that_of_the_released_code(system):
    distance, forwards = off(system, GREEDY, DRAWN)
    assert distance < 1e-3 and forwards == 1 + 2 + 4 + 1
    distance, forwards = off(system, Sampling(temperature=0.0, guidance=1.7, steps=1), ONE_PASS)
    assert distance < 1e-3 and forwards == 4


def swapped_ends(system):
    backbone = system.model.backbone
    for i in range(FORK):
        backbone.fork[i], backbone.layers[SHARED + i] = backbone.layers[SHARED + i], backbone.fork[i]


def one_head(system):
    system.model.heads["token"].fork.weight.data.copy_(system.model.heads["token"].weight)


def one_norm(system):
    system.model.backbone.fork_ada.data.copy_(system.model.backbone.ada)


def no_mask(system):
    system.model.embed.mask.data.zero_()


def silent_guesses(system):
    q = system.model.embed.quantizer
    plain = q.own_part
    shown = torch.tensor([e % 3 != 1 for e in range(30)])
    q.own_part = lambda ids, k, _: plain(ids, k, shown.split(q.sizes)[k].expand(len(ids), -1))


@pytest.mark.parametrize("wrong", [swapped_ends, one_head, one_norm, no_mask, silent_guesses])
def test_each_trap_shows_in_a_mask_pass(system, wrong):
    wrong(system)
    assert masked(system) > 1e-3


@pytest.mark.parametrize("change", [{"reaching": False}, {"mask_layers": FORK}])
def test_drawing_as_in_our_own_second_stage_gives_another_picture(system, change, monkeypatch):
    """Without guesses that reach their neighbours; and with other counts."""
    if "reaching" in change:
        object.__setattr__(system.config, "reaching", False)
    else:
        monkeypatch.setattr("seriatim.systems.image.hmar.COUNTS", ((1,), (3, 1), (5, 2, 1, 1)))
    assert off(system, GREEDY, DRAWN)[0] > 1e-2


def test_it_has_its_sizes_and_is_sampled_as_published(system):
    c, s = system.config, system.sampling
    assert isinstance(system, HMAR) and (c.width, c.depth, c.heads) == (WIDTH, SHARED + FORK, HEADS)
    assert (c.classes, c.mask_layers, c.reaching) == (CLASSES, FORK, True)
    assert (s.top_k, s.top_p, s.guidance) == (1000, 0.99, 1.7)
    assert [sum(counts) for counts in COUNTS] == [1, 4, 9]


def test_a_missing_weight_is_named(tmp_path):
    torch.save(released(tokenizer_shapes()), tmp_path / "vae_ch160v4096z32.pth")
    torch.save({k: v for k, v in weights().items() if k != "mask_head.bias"}, tmp_path / "hmar-d16.pth")
    with pytest.raises(ValueError, match=r"heads\.token\.fork\.bias"):
        load(tmp_path / "hmar-d16.pth")
