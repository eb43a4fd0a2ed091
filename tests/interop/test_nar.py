"""The released weights of NAR in our parts: names and shapes of its files, numbers of its code, and what would break
them.

The golden numbers were computed once by the released code (ThisisBillhe/NAR, in float32) with the weights that
`released` makes from names and shapes alone: logits of a training forward (the first four, the last four, the largest),
and the first ids of a picture drawn greedily under guidance, `uncond + 2 (cond - uncond)`; all 512 were equal.
"""

from __future__ import annotations

import pytest
import torch

from seriatim.systems.image.nar import NAR
from seriatim.verbs.load import load
from support.llama_checks import gap, greedy, larger_eps, logits, other_pairs, places
from support.released_llamagen import (
    CLASSES,
    DEPTH,
    HIDDEN,
    VOCAB,
    WIDTH,
    generator_shapes,
    ids,
    sharper,
    tokenizer_shapes,
)
from support.released_var import released

LOGITS = (-0.73145, -1.17853, 3.45704, -5.197, -2.28156, -0.4908, -1.52421, 0.36705)
LARGEST = 14.45806
DRAWN = [
    24, 19, 14, 0, 3, 32, 44, 24, 6, 45, 41, 35, 8, 41, 35, 29, 39, 29, 5, 36, 1, 36, 31, 0, 9, 4, 43, 21, 41, 42, 19,
    41, 9, 5, 5, 16, 29, 43, 9, 24, 6, 13, 29, 27, 16, 37, 8, 16, 6, 21, 27, 32, 44, 24, 47, 47, 9, 32, 31, 47, 6, 24,
    6, 26,
]  # fmt: skip


def weights():
    """LlamaGen's, with one more layer and the norm and matrix of the head below."""
    below = {"medusa_norm.weight": (WIDTH,), "medusa_output.weight": (VOCAB, WIDTH)}
    made = sharper(released(generator_shapes(depth=DEPTH + 1) | below))
    return made | {"medusa_output.weight": 2 * made["medusa_output.weight"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A generator beside its tokenizer."""
    place = tmp_path_factory.mktemp("released")
    torch.save({"model": released(tokenizer_shapes())}, place / "vq_ds16_c2i.pt")
    torch.save({"model": weights()}, place / "c2i_B.pt")
    return place


@pytest.fixture
def system(files):
    return load(files / "c2i_B.pt")


def test_what_is_said_is_what_the_released_code_says(system):
    assert gap(logits(system.model, ids()), LOGITS, LARGEST) < 1e-4


def test_ids_under_guidance_are_those_of_the_released_code(system, monkeypatch):
    drawn, forwards = greedy(system, monkeypatch, 1.0)
    assert forwards == 31 and drawn[1, : len(DRAWN)].tolist() == DRAWN


def class_is_turned(model):
    places(model, still=False)


def heads_swapped(model):
    head = model.heads["token"]
    head.weight.data = head.weight.data.roll(VOCAB, 0)


def one_norm(model):
    """That of the head to the right for both."""
    scales = torch.cat([weights()["norm.weight"] / weights()["medusa_norm.weight"], torch.ones(WIDTH)])
    head = model.heads["token"]
    head.weight.data = head.weight.data * scales.view(2, 1, -1).expand(-1, VOCAB, -1).flatten(0, 1)


def branch_left_out(model):
    layer = model.backbone.layers[-1]
    layer.out.data.zero_()
    layer.down.data.zero_()


TRAPS = [other_pairs, class_is_turned, heads_swapped, one_norm, branch_left_out, larger_eps]


@pytest.mark.parametrize("wrong", TRAPS)
def test_each_trap_fails_the_same_test(system, wrong):
    wrong(system.model)
    assert gap(logits(system.model, ids()), LOGITS, LARGEST) > 1e-3


def test_it_is_sampled_as_published_and_has_its_sizes(system):
    c, s = system.config, system.sampling
    assert isinstance(system, NAR) and (c.form, c.side, c.depth, c.hidden) == ("llama", 16, DEPTH, HIDDEN)
    assert (c.classes, s.top_k, s.top_p, s.guidance) == (CLASSES, None, None, 1.0)


def test_generators_of_texts_and_missing_weights_are_refused(files, tmp_path):
    (tmp_path / "vq_ds16_c2i.pt").write_bytes((files / "vq_ds16_c2i.pt").read_bytes())
    texts = weights()
    texts["cls_embedding.cap_proj.fc1.weight"] = texts.pop("cls_embedding.embedding_table.weight")
    torch.save(texts, tmp_path / "t2i_XL_stage1_256.pt")
    with pytest.raises(ValueError, match="what texts say"):
        load(tmp_path / "t2i_XL_stage1_256.pt")
    some = weights()
    del some["layers.2.ffn_norm.weight"]
    torch.save(some, tmp_path / "c2i_B.pt")
    with pytest.raises(ValueError, match=r"backbone\.layers\.2\.norm2"):
        load(tmp_path / "c2i_B.pt")
