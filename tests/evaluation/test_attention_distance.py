"""How far attention reaches: weights as they are, distances as they can be counted."""

import pytest
import torch
import torch.nn.functional as F

from seriatim.evaluation.attention_distance import (
    attention_distance,
    distances,
    save_attention_distance,
    uniform_distance,
    watched_attention,
)
from seriatim.laws.case import randomise
from seriatim.systems.image import elm, maskgit, nar, raster_ar, token_shuffle
from seriatim.systems.image_taxonomy import toy
from seriatim.tokenizers.pixels import PixelConfig, PixelTokenizer

TINY = {"classes": 3, "width": 16, "depth": 2, "heads": 2, "dropout": 0.0}


def system(cls, config, levels=2):
    made = cls(config, PixelTokenizer(PixelConfig(side=4, levels=levels))).eval()
    randomise(made.model).float()
    return made


def batch():
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    return {"image": images, "label": torch.tensor([0, 1, 2])}


def test_distances_are_means_over_what_is_attended_to():
    places = torch.tensor([[0, 0], [0, 0], [0, 3], [4, 0]])  # the first slot is a class
    placed = torch.tensor([False, True, True, True])
    weights = torch.tensor([[[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0.2, 0.2, 0.2, 0.4]]])[None]
    want = (0 + 1.5 + (0.2 * 4 + 0.2 * 5) / 0.8) / 3
    assert distances(weights, places, placed).tolist() == pytest.approx([want])
    even = torch.full((1, 1, 16, 16), 1 / 16)
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    assert float(distances(even, grid, torch.ones(16, dtype=torch.bool))) == pytest.approx(uniform_distance(4, 4))


@pytest.mark.parametrize("driven", ["driven", "llama"])
def test_watched_weights_are_those_that_attention_uses(driven):
    """With them the layers' outputs come out again, and nothing is watched afterwards."""
    model = system(raster_ar.RasterAR, raster_ar.Config(side=4, vocab=2, form=driven, **TINY)).model
    canvas = model.canvas({"token": torch.randint(2, (2, 16), generator=torch.Generator().manual_seed(0))})
    plan, kept = model.factorization.packed(canvas), []
    plain = F.scaled_dot_product_attention

    def spy(q, k, v, *rest, **more):
        kept.append((v, plain(q, k, v, *rest, **more)))
        return kept[-1][1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), watched_attention(model.backbone) as seen:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        before = model.hidden(plan, canvas, None, model.encode({"class": torch.tensor([0, 1])}))
    assert sorted(seen) == [0, 1]
    for i, (v, out) in enumerate(kept):
        torch.testing.assert_close(seen[i] @ v, out, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        after = model.hidden(plan, canvas, None, model.encode({"class": torch.tensor([0, 1])}))
    assert torch.equal(before, after) and model.backbone.watch is None


@pytest.mark.parametrize(
    "made",
    [
        system(nar.NAR, nar.Config(side=4, vocab=2, **TINY)),
        system(elm.ELM, elm.Config(side=4, bits=2, **TINY), levels=4),
        system(maskgit.MaskGIT, maskgit.Config(side=4, vocab=2, **TINY)),
        system(token_shuffle.TokenShuffle, token_shuffle.Config(side=4, vocab=2, **TINY)),
    ],
    ids=["nar", "elm", "maskgit", "token-shuffle"],
)
def test_every_order_is_measured_in_places(made):
    layers = attention_distance(made, batch())
    assert len(layers) == len(made.model.backbone.layers) and all(len(heads) == 2 for heads in layers)
    assert all(0 < float(x) < 3 * 2**0.5 for heads in layers for x in heads)


def test_without_queries_all_that_is_seen_is_attended_to_alike():
    made = system(raster_ar.RasterAR, raster_ar.Config(side=4, vocab=2, **TINY))
    seen = attention_distance(made, batch())
    with torch.no_grad():
        for layer in made.model.backbone.layers:  # no queries: all that is seen is attended to alike
            layer.qkv[:16] = 0
            layer.ada.zero_()
    even = attention_distance(made, batch())
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4)).double()
    apart = torch.cdist(grid, grid).tril()
    want = float(
        (apart.sum(1) / torch.arange(1, 17))[:15].mean()
    )  # nothing is read from the last one, so it is no slot
    assert [float(x) for heads in even for x in heads] == pytest.approx([want] * 4)
    assert float(seen[0][0]) != pytest.approx(want)


def test_elements_without_a_place_are_refused():
    images = {"image": torch.zeros(2, 1, 16, 16), "label": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="no place each"):
        attention_distance(toy("var", 16), images)
    with pytest.raises(ValueError, match="can be watched"), watched_attention(torch.nn.Identity()):
        pass


def test_a_picture_of_them_is_written(tmp_path):
    found = {"a": [torch.tensor([1.0, 2.0])], "b": [torch.tensor([1.0]), torch.tensor([3.0])]}
    assert save_attention_distance(found, tmp_path / "far.png", 2.5).read_bytes()[:4] == b"\x89PNG"
