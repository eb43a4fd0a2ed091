"""The released weights of LlamaGen in our parts: names and shapes of its files, numbers of its code, and what would
break them.

The golden numbers were computed once by the released code (FoundationVision/LlamaGen, in float32) with the weights that
`released` makes from names and shapes alone: ids of a picture, the first numbers of what some ids decode to, logits of
a training forward (the first four, the last four, the largest), and the first ids of a picture drawn greedily under
guidance, `uncond + 2 (cond - uncond)`.
"""

from __future__ import annotations

import pytest
import torch

from seriatim.backbones.rope import RoPE, RotaryTable
from seriatim.systems.image.raster_ar import RasterAR
from seriatim.verbs.load import load
from support.llama_checks import (
    class_is_turned,
    gap,
    gate_and_value_swapped,
    greedy,
    larger_eps,
    logits,
    other_null,
    other_pairs,
    places,
)
from support.released_llamagen import CLASSES, DEPTH, generator_shapes, ids, sharper, tokenizer_shapes
from support.released_var import pictures, released

LOGITS = (-2.12746, -7.11798, 3.6371, -5.78756, 0.9201, -1.3279, -1.10124, 0.77368)
LARGEST = 13.15042
IDS = [1, 6, 45, 8, 1, 4, 24, 3, 3, 11, 27, 14, 16, 3, 2, 14, 12, 15, 12, 41, 3, 1, 2, 11]
DECODED = (-0.14672, 0.43653, -1.10968, -0.55873, 1.05859, 1.29489)  # of the first picture: row 30, columns 20 and 21
DRAWN = [
    1, 19, 19, 19, 19, 19, 19, 36, 27, 14, 28, 23, 5, 36, 14, 36, 14, 36, 14, 36, 14, 36, 14, 36, 27, 28, 23, 5, 25, 4,
    32, 0, 5, 36, 7, 14, 36, 25, 1, 36, 18, 21, 36, 27, 8, 14, 36, 27, 23, 21, 23, 27, 8, 8, 14, 36, 18, 21, 36, 23, 23,
    23, 21, 24,
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A generator beside its tokenizer."""
    place = tmp_path_factory.mktemp("released")
    torch.save({"model": released(tokenizer_shapes())}, place / "vq_ds16_c2i.pt")
    torch.save({"model": sharper(released(generator_shapes()))}, place / "c2i_B_256.pt")
    return place


@pytest.fixture
def system(files):
    return load(files / "c2i_B_256.pt")


def test_the_tokenizer_is_the_released_one(system):
    assert system.tokenizer.encode(pictures())[1, : len(IDS)].tolist() == IDS
    drawn = system.tokenizer.decode(ids())[0, :, 30, 20:22].flatten()
    assert torch.allclose(drawn, torch.tensor(DECODED).clamp(-1, 1), atol=1e-4)


def test_what_is_said_is_what_the_released_code_says(system):
    assert gap(logits(system.model, ids()), LOGITS, LARGEST) < 1e-4


def test_ids_under_guidance_are_those_of_the_released_code(system, monkeypatch):
    drawn, forwards = greedy(system, monkeypatch, 1.0)
    assert forwards == 256 and drawn[1, : len(DRAWN)].tolist() == DRAWN


def one_place_on(model):
    places(model, raster=(0, 16))


def other_grid(model):
    places(model, raster=(1, 15))


TRAPS = [other_pairs, class_is_turned, one_place_on, other_grid, gate_and_value_swapped, other_null, larger_eps]


@pytest.mark.parametrize("wrong", TRAPS)
def test_each_trap_fails_the_same_test(system, wrong):
    wrong(system.model)
    assert gap(logits(system.model, ids()), LOGITS, LARGEST) > 1e-3


def test_it_is_sampled_as_published_and_has_its_sizes(system):
    c = system.config
    assert isinstance(system, RasterAR) and (c.form, c.side, c.depth, c.classes) == ("llama", 16, DEPTH, CLASSES)
    assert (system.sampling.top_k, system.sampling.top_p, system.sampling.guidance) == (None, None, 0.75)


def test_larger_pictures_are_told_by_the_name_of_the_file(files, tmp_path):
    for name, new in (("vq_ds16_c2i.pt", "vq_ds16_c2i.pt"), ("c2i_B_256.pt", "c2i_B_384.pt")):
        (tmp_path / new).write_bytes((files / name).read_bytes())
    assert load(tmp_path / "c2i_B_384.pt").tokenizer.grid == (24, 24)


def test_generators_of_texts_and_tokenizers_alone_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match="load the generator beside it"):
        load(files / "vq_ds16_c2i.pt")
    texts = released(generator_shapes())
    texts["cls_embedding.cap_proj.fc1.weight"] = texts.pop("cls_embedding.embedding_table.weight")
    torch.save({"model": texts}, tmp_path / "t2i_XL_stage1_256.pt")
    with pytest.raises(ValueError, match="what texts say"):
        load(tmp_path / "t2i_XL_stage1_256.pt")


def test_a_line_becomes_a_grid_of_two_axes():
    with pytest.raises(ValueError, match="two axes"):
        RoPE(raster=(1, 4))
    table = RotaryTable(RoPE(axes=(4, 4), raster=(1, 3)), 8)
    cos, sin = table.run(0, 8, torch.float32, torch.device("cpu"))
    assert not cos[0].any() and not sin[0].any()
    explicit = RotaryTable(RoPE(axes=(4, 4)), 8).at(torch.tensor([[[0, 0], [0, 1], [0, 2], [1, 0]]]), torch.float32)
    assert torch.equal(cos[1:5], explicit[0][0]) and torch.equal(sin[1:5], explicit[1][0])
