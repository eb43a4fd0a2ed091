"""The released weights of DetailFlow in our parts: names and shapes of its files, numbers of its code, and what would
break them.

The golden numbers were computed once by the released code (ByteFlow-AI/DetailFlow, in float32, SigLIP2's layers of
`transformers`) with the weights that `released_detailflow` makes from names and shapes alone: ids and latents of
pictures, what they and a prefix of 8 ids at 24 pixels decode to (row 9, columns 3 and 4 of the second picture), latents
that repair 8 wrong ids, logits of a forward over random ids (the first four, the last four), each with the largest; and
the ids that are drawn greedily under guidance, `uncond + 2 (cond - uncond)`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.interop.detailflow import detail_of, is_detailflow
from seriatim.systems.image.detailflow import DetailFlow
from seriatim.tokenizers.files import load_tokenizer, save_tokenizer
from seriatim.tokenizers.queries import query_plan
from seriatim.verbs.load import load
from support.llama_checks import class_is_turned, gap, greedy, larger_eps, logits, other_null, other_pairs, places
from support.released_detailflow import (
    DECODER,
    DEPTH,
    DIM,
    ENCODER,
    GROUP,
    INNER,
    PATCH,
    QUERIES,
    SIDE,
    VOCAB,
    generator_weights,
    tokenizer_weights,
)
from support.released_llamagen import CLASSES, HIDDEN, WIDTH

IDS = [2, 2, 61, 2, 2, 18, 2, 2, 2, 3, 2, 51, 2, 2, 61, 2]
GOLDEN = {
    "latents": ((5.18161, 0.87586, 2.64782, -1.5562), 5.4029),
    "decoded": ((2.45367, -3.36701, 2.57529, -1.45622, 3.16436, -1.5941), 5.97892),
    "prefix": ((4.62547, -4.37038, 2.24685, -0.83899, 1.81456, -0.57798), 6.62197),
    "again": ((2.82763, 0.22092, 4.61103, -0.85414, -0.42486, -1.64761, 0.76962, -1.63143), 5.13163),
}
LOGITS = (-2.12746, -7.11799, 3.63709, -5.78757, 2.29936, 1.80836, -1.09926, 0.11722)
LARGEST = 10.77723
DRAWN = [
    [5, 5, 5, 5, 27, 28, 19, 35, 32, 47, 45, 38, 9, 35, 32, 35],
    [1, 19, 19, 19, 29, 29, 16, 28, 14, 23, 12, 38, 39, 14, 41, 0],
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A generator beside its tokenizer, as trainings wrote them."""
    place = tmp_path_factory.mktemp("released")
    training = {"repa_model.blocks.0.weight": torch.zeros(2, 2), "projection.0.bias": torch.zeros(2)}
    torch.save({"model": tokenizer_weights() | training, "steps": 250000}, place / "tokenizer.pt")
    torch.save({"model": {}, "ema": generator_weights()}, place / "DetailFlow-GPT-L.pt")
    return place


@pytest.fixture
def system(files):
    return load(files / "DetailFlow-GPT-L.pt")


def given():
    return torch.randint(VOCAB, (2, QUERIES), generator=torch.Generator().manual_seed(7))


def pictures():
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5)) * 2 - 1


@torch.no_grad()
def said(tokenizer, name):
    """The numbers that are golden."""
    ids, decode = torch.tensor([IDS, IDS]), tokenizer.quantizer.decode_ids
    if name == "latents":
        return tokenizer.latents(pictures())[0, 0, :4]
    if name == "again":
        wrong = (tokenizer.encode(pictures())[:, :8] + 1) % VOCAB
        return tokenizer.encoder(pictures(), decode(wrong))[1, -1]
    drawn = tokenizer.draw(decode(ids)) if name == "decoded" else tokenizer.decoder(decode(ids[:, :8]), 24)
    return drawn[1, :, 9, 3:5].flatten()


def gap_of(tokenizer, name):
    numbers, largest = GOLDEN[name]
    return float((said(tokenizer, name) - torch.tensor(numbers)).abs().max()) / largest


@pytest.mark.parametrize("name", GOLDEN)
def test_the_tokenizer_is_the_released_one(system, name):
    assert gap_of(system.tokenizer, name) < 5e-6


def test_ids_of_pictures_are_those_of_the_released_code(system):
    assert system.tokenizer.encode(pictures())[1].tolist() == IDS


def test_what_is_said_is_what_the_released_code_says(system):
    assert gap(logits(system.model, given()), LOGITS, LARGEST) < 1e-5


def test_ids_under_guidance_are_those_of_the_released_code(system, monkeypatch):
    ids, forwards = greedy(system, monkeypatch, 1.0)
    assert ids.tolist() == DRAWN and forwards == GROUP + QUERIES // GROUP - 1


def learned_tokens_reversed(model):
    model.embed.pads.data = model.embed.pads.data.flip(0)


def class_before_the_second_group(model):
    model.embed.pads.data = model.conditions["class"].table.data[1].expand(GROUP - 1, -1)


def counted_along_the_line(model):
    places(model, raster=(1, QUERIES))


def groups_and_places_swapped(model):
    table = model.backbone.rotary["all"]
    at, groups = table.at, QUERIES // GROUP
    table.at = lambda coord, dtype, near=False: at(
        torch.where(coord > 0, 1 + (coord - 1) % GROUP * groups + (coord - 1) // GROUP, 0), dtype, near
    )


GENERATOR = [
    learned_tokens_reversed, class_before_the_second_group, counted_along_the_line, groups_and_places_swapped,
    class_is_turned, other_pairs, larger_eps,
]  # fmt: skip


@pytest.mark.parametrize("wrong", GENERATOR)
def test_each_trap_of_the_generator_fails_the_same_test(system, wrong):
    wrong(system.model)
    assert gap(logits(system.model, given()), LOGITS, LARGEST) > 1e-3


def test_another_null_draws_something_else(system, monkeypatch):
    other_null(system.model)
    assert greedy(system, monkeypatch, 1.0)[0].tolist() != DRAWN


def channels_outermost(tokenizer):
    """Both sides: patches as they were stored."""
    order = torch.arange(3 * PATCH**2).view(3, PATCH**2).T.flatten()
    tokenizer.encoder.from_patch.weight.data = tokenizer.encoder.from_patch.weight.data[:, order]
    tokenizer.decoder.to_patch.weight.data = tokenizer.decoder.to_patch.weight.data[order]


def exact_gelu(tokenizer):
    for net in (tokenizer.encoder.net, tokenizer.decoder.net):
        net.config = replace(net.config, activation="gelu")


def larger_eps_of_both(tokenizer):
    for net in (tokenizer.encoder.net, tokenizer.decoder.net):
        net.config = replace(net.config, eps=1e-2)


def queries_nowhere(tokenizer):
    tokenizer.encoder.queries.data = tokenizer.encoder.queries.data - tokenizer.encoder.follow.place.data
    tokenizer.decoder.place.data.zero_()


def columns_first(tokenizer):
    side = SIDE // PATCH
    places = tokenizer.encoder.places
    places.data = places.data.unflatten(0, (side, side)).transpose(0, 1).flatten(0, 1)
    tokenizer.decoder.grid.data = tokenizer.decoder.grid.data.transpose(1, 2)


@pytest.mark.parametrize("wrong", [channels_outermost, exact_gelu, larger_eps_of_both, queries_nowhere, columns_first])
def test_each_trap_of_the_tokenizer_fails_the_same_tests(system, wrong):
    wrong(system.tokenizer)
    assert min(gap_of(system.tokenizer, name) for name in ("latents", "decoded")) > 2e-5


def test_positions_of_smaller_pictures_are_interpolated_as_published(system):
    system.tokenizer.decoder.released = False  # means over areas
    assert gap_of(system.tokenizer, "prefix") > 1e-3 and gap_of(system.tokenizer, "decoded") < 1e-5


def test_queries_of_the_first_group_take_turns(system):
    system.tokenizer.encoder.plan = query_plan(SIDE // PATCH, torch.arange(QUERIES) // GROUP)
    assert gap_of(system.tokenizer, "latents") > 1e-3


def test_queries_that_follow_have_the_places_of_the_others(system):
    system.tokenizer.encoder.follow.place.data.zero_()
    assert gap_of(system.tokenizer, "again") > 1e-3 and gap_of(system.tokenizer, "latents") < 1e-5


def test_it_is_sampled_as_published_and_has_its_sizes(system):
    c, t, s = system.config, system.tokenizer.config, system.sampling
    assert isinstance(system, DetailFlow) and (c.form, c.groups, c.group_size) == ("llama", QUERIES // GROUP, GROUP)
    assert (c.vocab, c.classes, c.width, c.depth, c.hidden) == (VOCAB, CLASSES, WIDTH, DEPTH, HIDDEN)
    assert (t.side, t.patch, t.vocab, t.dim, t.width, t.encoder_width) == (SIDE, PATCH, VOCAB, DIM, DECODER, ENCODER)
    assert (t.encoder_hidden, t.depth, t.draw_depth, t.form) == (INNER, DEPTH, DEPTH, "released")
    assert (s.temperature, s.top_k, s.top_p, s.guidance) == (1.0, None, None, 0.5)


def test_a_tokenizer_of_the_form_is_kept_in_files_of_ours(system, tmp_path):
    save_tokenizer(system.tokenizer, tmp_path)
    kept = load_tokenizer(tmp_path)
    assert kept.config == system.tokenizer.config
    assert torch.equal(said(kept, "decoded"), said(system.tokenizer, "decoded"))


def test_tokenizers_alone_and_weights_of_something_else_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match="load the generator beside it"):
        load(files / "tokenizer.pt")
    weights = generator_weights()
    assert not is_detailflow({n: x for n, x in weights.items() if not n.startswith("spe_")})
    weights["layers.0.other.weight"] = weights.pop("layers.0.attention.wo.weight")
    torch.save(weights, tmp_path / "GPT-L.pt")
    (tmp_path / "tokenizer.pt").write_bytes((files / "tokenizer.pt").read_bytes())
    with pytest.raises(ValueError, match=r"layers\.0\.o"):
        load(tmp_path / "GPT-L.pt")
    named = detail_of(tokenizer_weights() | {"decoder.more.weight": torch.zeros(1)}, GROUP)[1]
    assert "decoder.more.weight" in named


def test_of_two_tokenizers_none_is_taken_unsaid(files, tmp_path):
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).symlink_to(files / "tokenizer.pt")
    (tmp_path / "DetailFlow-GPT-L.pt").symlink_to(files / "DetailFlow-GPT-L.pt")
    with pytest.raises(ValueError, match=r"several tokenizers \(a.pt, b.pt\): call the one that is meant tokenizer.pt"):
        load(tmp_path / "DetailFlow-GPT-L.pt")
    (tmp_path / "b.pt").rename(tmp_path / "tokenizer.pt")
    assert load(tmp_path / "DetailFlow-GPT-L.pt").tokenizer is not None
