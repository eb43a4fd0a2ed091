"""The released generators of D-AR in our parts: names and shapes of their files, numbers of their code, and what would
break them.

The golden numbers were computed once by the released code (showlab/D-AR, in float32) with the weights that
`released_d_ar` makes from names and shapes alone: logits of a forward over random ids (the first four, the last four,
the largest), and the first ids of the second picture drawn greedily under guidance that grows from 1.2 to 8.0 in its
scale; all 512 were equal.
"""

from __future__ import annotations

import pytest
import torch

from seriatim.backbones.rope import RoPE, RotaryTable
from seriatim.decoding.guidance import Guidance
from seriatim.systems.image.d_ar import DAR
from seriatim.systems.image.raster_ar import RasterAR
from seriatim.tokenizers.sequential import SequentialTokenizer
from seriatim.verbs.load import load
from support.llama_checks import gap, gate_and_value_swapped, greedy, larger_eps, logits, other_pairs
from support.released_d_ar import VOCAB, generator_weights, tokenizer_weights
from support.released_llamagen import CLASSES, DEPTH, HEADS, HIDDEN, WIDTH, tokenizer_shapes
from support.released_var import released

LOGITS = (-2.12746, -7.11799, 3.63709, -5.78757, -2.21243, 1.34923, -4.31108, 1.65014)
LARGEST = 15.10465
DRAWN = [
    1, 19, 19, 19, 19, 19, 19, 19, 19, 19, 19, 19, 19, 19, 19, 19, 19, 19, 29, 29, 29, 5, 29, 8, 14, 6, 0, 5, 29, 5, 29,
    29, 29, 29, 5, 29, 5, 29, 29, 29, 29, 29, 29, 29, 29, 29, 29, 29, 5, 29, 29, 29, 29, 29, 29, 29, 29, 29, 29, 29, 14,
    3, 14, 22,
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A generator beside its tokenizer, as trainings wrote them: compiled, and with what only training needs."""
    place = tmp_path_factory.mktemp("released")
    compiled = {f"_orig_mod.{name}": x for name, x in generator_weights().items()}
    torch.save({"model": compiled, "steps": 360000}, place / "D-AR-L-360K.pt")
    torch.save({"model": {}, "ema": tokenizer_weights()}, place / "D-AR-tokenizer_v1.pt")
    return place


@pytest.fixture
def system(files):
    return load(files / "D-AR-L-360K.pt")


def given():
    return torch.randint(VOCAB, (2, 256), generator=torch.Generator().manual_seed(7))


def test_what_is_said_is_what_the_released_code_says(system):
    assert gap(logits(system.model, given()), LOGITS, LARGEST) < 1e-5


def test_ids_under_guidance_are_those_of_the_released_code(system, monkeypatch):
    ids, forwards = greedy(system, monkeypatch, 7.0)
    assert ids[1, : len(DRAWN)].tolist() == DRAWN and forwards == 256


def turned(model, rope):
    model.backbone.rotary = {"all": RotaryTable(rope, WIDTH // HEADS)}


def on_a_grid(model):
    """As LlamaGen's, which has the same names."""
    turned(model, RoPE(axes=(WIDTH // HEADS // 2, WIDTH // HEADS // 2), raster=(1, 16)))


def in_groups(model):
    """As those of DetailFlow."""
    turned(model, RoPE(axes=(WIDTH // HEADS // 2, WIDTH // HEADS // 2), raster=(1, 32)))


def other_base(model):
    turned(model, RoPE(theta=5_000.0))


TRAPS = [on_a_grid, in_groups, other_base, other_pairs, gate_and_value_swapped, larger_eps]


@pytest.mark.parametrize("wrong", TRAPS)
def test_each_trap_fails_the_same_test(system, wrong):
    wrong(system.model)
    assert gap(logits(system.model, given()), LOGITS, LARGEST) > 1e-3


def test_constant_guidance_draws_something_else(system, monkeypatch):
    system.guidance = lambda sampling: Guidance(sampling.guidance)
    assert greedy(system, monkeypatch, 7.0)[0][1, : len(DRAWN)].tolist() != DRAWN


def test_it_is_sampled_as_published_and_has_its_sizes(system):
    c, t, s = system.config, system.tokenizer, system.sampling
    assert isinstance(system, DAR) and isinstance(t, SequentialTokenizer)
    assert (c.form, c.groups, c.group_size, c.vocab, c.classes) == ("llama", 8, 32, VOCAB, CLASSES)
    assert (c.width, c.depth, c.heads, c.hidden, t.side) == (WIDTH, DEPTH, HEADS, HIDDEN, 64)
    assert (s.temperature, s.top_k, s.top_p, s.guidance) == (1.0, None, None, 7.0)
    assert system.guidance(s) == Guidance(7.0, "linear", 0.2)


def test_guidance_grows_from_where_it_begins():
    weights = [Guidance(7.0, "linear", 0.2).weight(i / 255) for i in (0, 51, 255)]
    assert weights == pytest.approx([0.2, 0.2 + 6.8 / 5, 7.0])
    with pytest.raises(ValueError, match="linear guidance begins at a finite number"):
        Guidance(7.0, "constant", 0.2)
    with pytest.raises(ValueError, match="linear guidance begins at a finite number"):
        Guidance(7.0, "linear", float("inf"))


def test_files_are_told_by_their_names_and_tokenizers_alone_refused(files, tmp_path):
    with pytest.raises(ValueError, match="load the generator beside it"):
        load(files / "D-AR-tokenizer_v1.pt")
    torch.save(released(tokenizer_shapes()), tmp_path / "vq_ds16_c2i.pt")
    torch.save(generator_weights(), tmp_path / "c2i_L_256.pt")
    assert isinstance(load(tmp_path / "c2i_L_256.pt"), RasterAR)
    torch.save(generator_weights(), tmp_path / "D-AR-L-360K.pt")
    with pytest.raises(FileNotFoundError, match=r"D-AR-tokenizer_v1\.pt"):
        load(tmp_path / "D-AR-L-360K.pt")
