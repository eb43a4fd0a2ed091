"""The released generators of ELM in our parts: names and shapes of their files, numbers of their code, and what would
break them.

The golden numbers were computed once by the released code (Pepper-lll/LMforImageGeneration, in float32) with the
weights that `released_elm` makes from names and shapes alone: logits of a forward over random sub-codes (the first
four, the last four, the largest), for two sub-codes of a place and for one, and the first ids of the second picture
drawn greedily under guidance that grows up to 4 in its scale; all 512 were equal.
"""

from __future__ import annotations

import pytest
import torch

from seriatim.decoding.guidance import Guidance
from seriatim.interop.elm import is_elm, named_elm, sizes_of
from seriatim.systems.image.elm import ELM
from seriatim.verbs.load import load
from support.llama_checks import (
    class_is_turned,
    gap,
    gate_and_value_swapped,
    greedy,
    larger_eps,
    logits,
    other_pairs,
    places,
)
from support.released_elm import BITS, CLASSES, DEPTH, HIDDEN, PARTS, WIDTH, autoencoder_weights, generator_weights

LOGITS = (3.5757, 2.78239, -3.01569, 2.23723, 2.00549, 2.72953, -0.29061, -3.26556)
LARGEST = 12.48887
ALONE = (-2.12746, -7.11799, 3.63709, -5.78757, -2.70974, -1.77128, 2.54386, 1.19634)  # of one sub-code
MOST = 12.64254
DRAWN = [
    105, 159, 97, 202, 72, 190, 181, 166, 171, 175, 193, 198, 202, 11, 144, 81, 133, 161, 193, 194, 212, 52, 193, 194,
    251, 6, 153, 118, 6, 201, 127, 192, 23, 134, 15, 161, 129, 175, 15, 1, 55, 65, 15, 161, 166, 9, 191, 31, 255, 143,
    143, 143, 175, 143, 143, 133, 175, 175, 175, 175, 239, 175, 233, 143,
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A generator beside its autoencoder."""
    place = tmp_path_factory.mktemp("released")
    torch.save(autoencoder_weights(), place / "binaryae_ema.th")
    torch.save(generator_weights(), place / "L-2-4.pth")
    return place


@pytest.fixture
def system(files):
    return load(files / "L-2-4.pth")


def given(parts=PARTS):
    return torch.randint(2**BITS, (2, 256, parts), generator=torch.Generator().manual_seed(7)).flatten(1)


def test_what_is_said_is_what_the_released_code_says(system):
    assert gap(logits(system.model, given()), LOGITS, LARGEST) < 1e-5


def test_one_sub_code_has_no_matrix_behind_its_table(tmp_path):
    torch.save(autoencoder_weights(BITS), tmp_path / "binaryae_ema.th")
    torch.save(generator_weights(1), tmp_path / "L-1-4.pth")
    system = load(tmp_path / "L-1-4.pth")
    assert (system.config.parts, system.config.bits, system.sampling.top_k) == (1, BITS, 2**BITS)
    assert gap(logits(system.model, given(1)), ALONE, MOST) < 1e-5


def test_ids_under_guidance_are_those_of_the_released_code(system, monkeypatch):
    ids, forwards = greedy(system, monkeypatch, 3.0)
    assert ids[1, : len(DRAWN)].tolist() == DRAWN and forwards == 256


def tables_swapped(model):
    model.embed.table.data = model.embed.table.data.roll(2**BITS, 0)


def matrices_swapped(model):
    model.heads["token"].weight.data = model.heads["token"].weight.data.roll(2**BITS, 0)


def one_table(model):
    model.embed.table.data = model.embed.table.data[: 2**BITS].repeat(PARTS, 1)


def other_grid(model):
    places(model, raster=(1, 15))


TRAPS = [
    tables_swapped, matrices_swapped, one_table, other_grid, class_is_turned, other_pairs, gate_and_value_swapped,
    larger_eps,
]  # fmt: skip


@pytest.mark.parametrize("wrong", TRAPS)
def test_each_trap_fails_the_same_test(system, wrong):
    wrong(system.model)
    assert gap(logits(system.model, given()), LOGITS, LARGEST) > 1e-3


def test_constant_guidance_draws_something_else(system, monkeypatch):
    system.guidance = lambda sampling: Guidance(sampling.guidance)
    assert greedy(system, monkeypatch, 3.0)[0][1, : len(DRAWN)].tolist() != DRAWN


def test_it_is_sampled_as_published_and_has_its_sizes(system):
    c, s = system.config, system.sampling
    assert isinstance(system, ELM) and (c.form, c.side, c.bits, c.parts) == ("llama", 16, PARTS * BITS, PARTS)
    assert (c.classes, c.width, c.depth, c.hidden) == (CLASSES, WIDTH, DEPTH, HIDDEN)
    assert (s.temperature, s.top_k, s.guidance) == (1.0, 2**BITS, 3.0)  # of 1,000, as many as there are
    assert system.guidance(s).weight(0.0) == pytest.approx(3 / 256) and system.guidance(s).weight(1.0) == 3.0


def test_tables_are_multiplied_out():
    weights = generator_weights()
    table = named_elm(weights)["embed.table"]
    alone = weights["tok_embedder.1.weight"][3] @ weights["proj.weight"][:, WIDTH:].T
    assert torch.allclose(table[2**BITS + 3], alone, atol=1e-5)


def test_what_fills_masks_or_has_other_ids_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match="is an autoencoder"):
        load(files / "binaryae_ema.th")
    masked = generator_weights(1)
    masked["tok_embedder.weight"] = torch.zeros(2**BITS + 1, WIDTH)
    assert is_elm(masked)
    with pytest.raises(ValueError, match="fills masks"):
        sizes_of(masked)
    torch.save(autoencoder_weights(), tmp_path / "binaryae_ema.th")
    torch.save(generator_weights(1), tmp_path / "L-1-4.pth")
    with pytest.raises(ValueError, match="ids of 4 bits, and the autoencoder beside it has 256 ids"):
        load(tmp_path / "L-1-4.pth")
