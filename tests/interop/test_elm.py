"""The released binary autoencoder of ELM in our parts: names and shapes of its file, numbers of its code, and what
would break them.

The golden numbers were computed once by the released code (BinaryAutoEncoder of Pepper-lll/LMforImageGeneration, in
float32, with the weights that `released` makes from names and shapes alone): logits of the bits of two pictures, the
ids of the second one, and what random ids decode to (the first four numbers, the largest), pixels from 0 to 1; the
last also of a decoder that begins with a norm (`NORMED`).
"""

from __future__ import annotations

import pytest
import torch

import seriatim.tokenizers.conv as conv
from seriatim.interop.elm import bae_of, read_bae
from support.released_elm import autoencoder_shapes
from support.released_var import released

BITS, INNER = 6, 24
LOGITS, LARGEST = (1.02320, 1.60227, 1.42404, -0.12944), 1.74299
IDS = [57, 57, 49, 16, 25, 29, 51, 19, 57, 29, 57, 1, 17, 9, 17, 17]
NORMED, NORMED_MOST = (0.53323, 0.24597, 0.10035, 0.20859), 2.17151
DRAWN, MOST = (-0.32704, -0.53055, -0.68807, -0.88695), 2.07341


def shapes():
    return autoencoder_shapes(BITS, INNER, normed=False)


def pictures():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1


def gap(tokenizer):
    """Of logits and of pictures, in shares of their largest."""
    ids = torch.randint(2**BITS, (2, 16), generator=torch.Generator().manual_seed(7))
    logits = tokenizer.latents(pictures()).transpose(1, 2)
    drawn = (tokenizer.draw(tokenizer.quantizer.decode_ids(ids)) + 1) / 2
    out = []
    for x, first, largest in ((logits, LOGITS, LARGEST), (drawn, DRAWN, MOST)):
        found = torch.cat([x.flatten()[:4], x.abs().max()[None]])
        out.append(float((found - torch.tensor([*first, largest])).abs().max()) / largest)
    return out


def test_what_is_read_and_drawn_is_what_the_released_code_reads_and_draws(tmp_path):
    torch.save(released(shapes()), tmp_path / "binaryae_ema.th")
    tokenizer = read_bae(tmp_path / "binaryae_ema.th", side=16)
    assert max(gap(tokenizer)) < 1e-5
    assert tokenizer.encode(pictures())[1].tolist() == IDS
    assert tokenizer.vocab == 2**BITS and tokenizer.grid == (4, 4) and not tokenizer.training


def test_an_activation_behind_the_last_norms_would_break_both():
    tokenizer = bae_of(released(shapes()), 16)
    tokenizer.encoder.layers[-2], tokenizer.decoder.layers[-2] = torch.nn.SiLU(), torch.nn.SiLU()
    assert min(gap(tokenizer)) > 1e-2


def test_pixels_from_minus_one_would_break_what_is_read(monkeypatch):
    monkeypatch.setattr(conv.FromZero, "forward", lambda self, x: x)
    read, drawn = gap(bae_of(released(shapes()), 16))
    assert read > 1e-2 and drawn < 1e-5


def test_a_decoder_may_begin_with_a_norm():
    weights = released(autoencoder_shapes(BITS, 32))
    tokenizer, ids = bae_of(weights, 16), torch.randint(2**BITS, (2, 16), generator=torch.Generator().manual_seed(7))

    def wrong():
        drawn = (tokenizer.draw(tokenizer.quantizer.decode_ids(ids)) + 1) / 2
        found = torch.cat([drawn.flatten()[:4], drawn.abs().max()[None]])
        return float((found - torch.tensor([*NORMED, NORMED_MOST])).abs().max()) / NORMED_MOST

    assert wrong() < 1e-5
    tokenizer.decoder.layers[0] = torch.nn.Identity()
    assert wrong() > 1e-2


@pytest.mark.parametrize("change", ["ae.quantize.embed.weight", "ae.encoder.blocks.3.conv.weight", "ae.more.weight"])
def test_weights_of_something_else_are_refused(change):
    weights = released(shapes())
    if change in weights:
        del weights[change]
    else:
        weights[change] = torch.zeros(3)
    with pytest.raises(ValueError, match="no weights of ELM"):
        bae_of(weights, 16)
