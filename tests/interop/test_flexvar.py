"""The released weights of FlexVAR and SAR in our parts: names and shapes of their files, numbers of their code, and
what would break them.

The golden numbers were computed once by the released code (GengzeZhou/SAR, whose model is that of FlexVAR, in float32)
with the weights that `released` makes from names and shapes alone, over the ids of `pictures`: ids of the first scales,
logits of a training forward (the first four, the last four, four of a place inside the last map, the largest), and a
picture drawn greedily under guidance.
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from seriatim.systems.image.flexvar import FlexVAR
from seriatim.systems.image.sar import SAR
from seriatim.systems.system import Sampling
from seriatim.tokenizers.conv import map_to_rows, rows_to_map
from seriatim.verbs.load import load
from support.released_flexvar import CLASSES, DEPTH, DIM, GRID, WIDTH
from support.released_flexvar import weights as made
from support.released_llamagen import VOCAB, tokenizer_shapes
from support.released_var import pictures, released

LABEL = torch.tensor([1, 4])
IDS = [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 16, 4, 1, 7, 7, 4, 7, 4, 7, 4, 4, 7, 4, 4, 4, 4]
DECODED = (-0.51133, 0.22623, 0.06607, -1.0, 0.93715, 0.62463)  # of the first picture: row 30, columns 20 and 21
LOGITS = (3.58234, -6.46858, -0.84088, 8.62824, -1.48974, 3.02947, 0.31628, 2.01743)
INSIDE = (4.90677, -5.97734, 1.39074, 5.05464)
LARGEST = 12.77501
DRAWN = (-0.64763, -0.94202, -0.05218, 0.29302, 1, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Generators beside their tokenizer."""
    place = tmp_path_factory.mktemp("released")
    torch.save({"model": released(tokenizer_shapes(DIM))}, place / "FlexVAE.pth")
    weights = made()
    torch.save({"trainer": {"var_wo_ddp": weights}}, place / "SARd16-epo179.pth")
    torch.save(weights, place / "FlexVARd16-epo179.pth")
    return place


@pytest.fixture(params=["FlexVARd16-epo179.pth", "SARd16-epo179.pth"])
def system(request, files):
    return load(files / request.param)


def gap(system):
    canvas, condition = system.canvas({"image": pictures(), "label": LABEL})
    plan = system.model.factorization.packed(canvas)
    with torch.no_grad():
        h = system.model.hidden(plan, canvas, None, system.model.encode(condition))
        said = system.model.dist(h, plan, canvas)[0].logits
    found = torch.cat([said[0, 0, :4], said[1, -1, -4:], said[0, -10, :4], said.abs().max()[None]])
    return float((found - torch.tensor([*LOGITS, *INSIDE, LARGEST])).abs().max()) / LARGEST


def test_the_tokenizer_is_the_released_one(system):
    ids = system.tokenizer.encode(pictures())
    assert ids[1, : len(IDS)].tolist() == IDS
    picture = system.tokenizer.decode(ids)[0, :, 30, 20:22]
    assert torch.allclose(picture.flatten(), torch.tensor(DECODED), atol=1e-4)


def test_what_is_said_is_what_the_released_code_says(system):
    assert gap(system) < 1e-4


def test_a_picture_under_guidance_is_that_of_the_released_code(system):
    drawn = system.draw(LABEL, sampling=Sampling(temperature=0.0, guidance=2.2))
    assert drawn.forwards == 10
    assert torch.allclose(drawn.images[1, :, 40, 11:13].flatten(), torch.tensor(DRAWN), atol=1e-3)


def places_turned(model):
    model.embed.position.data = model.embed.position.data.transpose(1, 2).contiguous()


def a_map_enlarged_otherwise(model):
    def nearest(codes, known, shapes, first, last):
        begin = (0, *accumulate(rows * columns for rows, columns in shapes))
        maps = [codes.decode_ids(known[:, begin[k - 1] : begin[k]]) for k in range(max(first, 1), last + 1)]
        maps = [rows_to_map(x, shapes[k - 1]) for k, x in enumerate(maps, max(first, 1))]
        return [map_to_rows(F.interpolate(x, shapes[k])) for k, x in enumerate(maps, max(first, 1))]

    model.embed.feed = nearest


def codes_of_any_length(model):
    decode = model.embed.quantizer.decode_ids
    model.embed.quantizer.decode_ids = lambda ids: 1.5 * decode(ids)


def gates_first(model):
    for layer in model.backbone.layers:
        layer.ada.data = layer.ada.data.view(6, -1, WIDTH).flip(0).reshape_as(layer.ada)


def plain_temperature(model):
    for layer in model.backbone.layers:
        layer.q_norm.data.zero_()


def other_null_is_no_null(model):
    model.conditions["class"].table.data = model.conditions["class"].table.data.roll(1, 0)


TRAPS = [
    places_turned,
    a_map_enlarged_otherwise,
    codes_of_any_length,
    gates_first,
    plain_temperature,
    other_null_is_no_null,
]


@pytest.mark.parametrize("wrong", TRAPS)
def test_each_trap_fails_the_same_test(files, wrong):
    system = load(files / "FlexVARd16-epo179.pth")
    wrong(system.model)
    assert gap(system) > 1e-3


def test_the_name_tells_which_it_is_and_it_is_sampled_as_published(files):
    flex, further = load(files / "FlexVARd16-epo179.pth"), load(files / "SARd16-epo179.pth")
    assert isinstance(flex, FlexVAR) and not isinstance(flex, SAR) and isinstance(further, SAR)
    for system in (flex, further):
        c, s = system.config, system.sampling
        assert (c.width, c.depth, c.heads, c.classes, c.vocab, c.dim) == (WIDTH, DEPTH, 2, CLASSES, VOCAB, DIM)
        assert (c.grid, len(c.scales), s.top_k, s.top_p, s.guidance) == (GRID, 10, 900, 0.95, 2.5)


def test_pictures_of_other_sizes_and_steps_are_drawn(files):
    drawn = load(files / "FlexVARd16-epo179.pth").draw(LABEL, sampling=Sampling(size=(96, 64), steps=6))
    assert drawn.forwards == 6 and drawn.images.shape == (2, 3, 64, 96)


def test_a_missing_weight_and_a_missing_tokenizer_are_named(tmp_path):
    weights = {name: x for name, x in made().items() if name != "blocks.1.ffn.fc2.bias"}
    torch.save(weights, tmp_path / "FlexVARd16-epo179.pth")
    with pytest.raises(FileNotFoundError, match=r"put FlexVAE\.pth into"):
        load(tmp_path / "FlexVARd16-epo179.pth")
    torch.save({"model": released(tokenizer_shapes(DIM))}, tmp_path / "FlexVAE.pth")
    with pytest.raises(ValueError, match=r"backbone\.layers\.1\.down_bias"):
        load(tmp_path / "FlexVARd16-epo179.pth")
