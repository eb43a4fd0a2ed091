"""ELM: bits, sub-codes and their law, beyond the laws that every system obeys."""

import itertools

import pytest
import torch

from seriatim.laws.case import randomise
from seriatim.random import Generator
from seriatim.systems.image import elm
from seriatim.systems.system import Sampling
from seriatim.tokenizers.bernoulli import Bernoulli, from_parts, to_parts
from seriatim.tokenizers.pixels import PixelConfig, PixelTokenizer
from seriatim.tokenizers.vq import VQConfig, VQTokenizer


@pytest.mark.parametrize(("bits", "parts"), [(12, 1), (12, 2), (12, 3), (4, 4)])
def test_ids_and_sub_codes_are_the_same(bits, parts):
    ids, vocab = torch.arange(2**bits), 2 ** (bits // parts)
    codes = to_parts(ids, parts, vocab)
    assert codes.shape == (2**bits, parts) and 0 <= int(codes.min()) <= int(codes.max()) < vocab
    assert torch.equal(from_parts(codes, vocab), ids)
    assert to_parts(torch.tensor(0b1101_0010), 2, 16).tolist() == [0b1101, 0b0010]


def test_every_id_is_the_sum_of_the_rows_of_its_bits():
    quantizer = Bernoulli(6)
    bits = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)))
    torch.testing.assert_close(quantizer.decode_ids(torch.arange(64)[None])[0], bits @ quantizer.table)


def test_without_training_bits_are_set_above_one_half():
    quantizer = Bernoulli(3).eval()
    out = quantizer.quantize(torch.tensor([[[0.1, -0.1, 9.0], [-3.0, 0.2, -0.3]]]))
    assert out.ids.tolist() == [[0b101, 0b010]]
    assert torch.equal(quantizer.decode_ids(out.ids), out.z_q)


def test_drawn_codes_are_on_average_the_sigmoid_of_the_logits():
    """Each mean bit of 40,000 draws within 5 standard errors: false alarm in less than 1 of 100,000 seeds."""
    quantizer, z = Bernoulli(4), torch.tensor([-2.0, -0.3, 0.5, 1.5])
    torch.manual_seed(0)
    out = quantizer.quantize(z.expand(1, 40_000, 4))
    p = z.sigmoid()
    share = to_parts(out.ids[0], 4, 2).double().mean(0)
    assert bool(((share - p).abs() < 5 * (p * (1 - p) / 40_000).sqrt()).all())
    assert torch.equal(quantizer.decode_ids(out.ids), out.z_q), "what was drawn is what is decoded"
    error = 5 * (quantizer.table.square().T @ (p * (1 - p) / 40_000)).sqrt()
    assert bool(((out.z_q[0].mean(0) - p @ quantizer.table).abs() < error).all())


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_the_sigmoid(training):
    quantizer = Bernoulli(4, entropy=0.0).train(training)
    z = torch.randn(2, 3, 4, requires_grad=True)
    weight = torch.randn(2, 3, 4)
    (got,) = torch.autograd.grad((quantizer.quantize(z).z_q * weight).sum(), z)
    (want,) = torch.autograd.grad(((z.sigmoid() @ quantizer.table) * weight).sum(), z)
    torch.testing.assert_close(got, want)


def test_the_regulariser_is_zero_for_sure_bits_and_largest_at_one_half():
    quantizer = Bernoulli(2, entropy=1.0)
    losses = [float(quantizer.quantize(torch.full((1, 5, 2), x)).loss) for x in (-60.0, -1.0, 0.0, 1.0, 60.0)]
    assert [losses[0], losses[4]] == pytest.approx([0, 0], abs=1e-12)
    assert losses[2] == 0.25 and max(losses[1], losses[3]) < 0.25


def test_a_binary_autoencoder_is_a_tokenizer():
    config = VQConfig(side=8, vocab=16, quantizer="bernoulli", width=8, halvings=1, inner=8)
    tokenizer = VQTokenizer(config).eval()
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = tokenizer.encode(images)
    assert ids.shape == (2, 16) and tokenizer.vocab == 16
    assert tokenizer.decode(ids).shape == images.shape
    loss, _ = tokenizer.train().loss(images, 0, 9, torch.Generator().manual_seed(0))
    loss.backward()
    assert all(p.grad is not None for p in tokenizer.parameters())


def test_sub_codes_of_a_place_are_independent_and_all_is_one_law():
    model = randomise(elm.build(elm.Config(bits=2, **elm._TINY), 2))
    x = torch.tensor(list(itertools.product(range(2), repeat=4)))
    with torch.no_grad():
        p = model.log_prob(model.canvas({"token": x}), {"class": torch.ones(16, dtype=torch.long)}).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    p = p.view(4, 2, 2) / p.view(4, 4).sum(1)[:, None, None]  # the second place, given the first
    torch.testing.assert_close(p, p.sum(2, keepdim=True) * p.sum(1, keepdim=True), rtol=0, atol=1e-12)
    assert (p[0] - p[1]).abs().max() > 1e-3, "and it depends on both parts of the first"
    assert (p[0] - p[2]).abs().max() > 1e-3


def test_losses_are_counted_over_places_and_pictures_come_back():
    tokenizer = PixelTokenizer(PixelConfig(side=4, levels=16))
    system = elm.ELM(elm.Config(side=4, **elm._TINY), tokenizer).eval()
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"image": images, "label": torch.tensor([0, 1, 2])}
    assert int(system.losses(batch, Generator(0), 0.0)[1]) == 3 * 16
    codes = system.canvas(batch)[0].value["token"]
    assert torch.equal(system.picture(codes), tokenizer.decode(tokenizer.encode(images)))
    out = system.draw(torch.tensor([1]), sampling=Sampling(guidance=1.0), film=True)
    assert out.forwards == 16 and torch.equal(out.frames[-1], out.images)


def test_bits_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="cannot be cut"):
        elm.Config(bits=5, parts=2)
