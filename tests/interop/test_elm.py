"""The released binary autoencoder of ELM in our parts: names and shapes of its file, numbers of its code, and what
would break them.

The golden numbers were computed once by the released code (BinaryAutoEncoder of Pepper-lll/LMforImageGeneration, in
float32, with the weights that `released` makes from names and shapes alone): logits of the bits of two pictures, the
ids of the second one, and what random ids decode to (the first four numbers, the largest), pixels from 0 to 1.
"""

from __future__ import annotations

import pytest
import torch

import seriatim.tokenizers.conv as conv
from seriatim.interop.elm import bae_of, read_bae
from support.released_var import released

CH, BITS, INNER, MULTIPLIERS = 32, 6, 24, (1, 2, 4)
LOGITS, LARGEST = (1.02320, 1.60227, 1.42404, -0.12944), 1.74299
IDS = [57, 57, 49, 16, 25, 29, 51, 19, 57, 29, 57, 1, 17, 9, 17, 17]
DRAWN, MOST = (-0.32704, -0.53055, -0.68807, -0.88695), 2.07341


def shapes():
    """Names and shapes of the tensors of a file, at this size."""
    out = {}

    def part(name, *shape):
        out[f"{name}.weight"], out[f"{name}.bias"] = shape, shape[:1]

    def block(name, before, after):
        part(f"{name}.norm1", before)
        part(f"{name}.conv1", after, before, 3, 3)
        part(f"{name}.norm2", after)
        part(f"{name}.conv2", after, after, 3, 3)
        part(f"{name}.conv_out", after, before, 1, 1)

    def attention(name, width):
        part(f"{name}.norm", width)
        for one in ("q", "k", "v", "proj_out"):
            part(f"{name}.{one}", width, width, 1, 1)

    def middle(side, n, width):
        block(f"{side}.blocks.{n}", width, width)
        attention(f"{side}.blocks.{n + 1}", width)
        block(f"{side}.blocks.{n + 2}", width, width)
        return n + 3

    def levels(side, n, before, widths):
        for width in widths:
            for _ in range(2):
                block(f"{side}.blocks.{n}", before, width)
                n, before = n + 1, width
                if width == max(widths):
                    attention(f"{side}.blocks.{n}", width)
                    n += 1
            if width != widths[-1]:
                part(f"{side}.blocks.{n}.conv", width, width, 3, 3)
                n += 1
        return n

    widths = [CH * m for m in MULTIPLIERS]
    side = "ae.encoder"
    part(f"{side}.blocks.0", CH, 3, 3, 3)
    n = middle(side, levels(side, 1, CH, widths), widths[-1])
    part(f"{side}.blocks.{n}", widths[-1])
    part(f"{side}.blocks.{n + 1}", INNER, widths[-1], 3, 3)
    part("ae.quantize.proj.0", BITS, INNER, 1, 1)
    out["ae.quantize.embed.weight"] = (BITS, INNER)
    side = "ae.generator"
    part(f"{side}.blocks.0", widths[-1], INNER, 3, 3)
    n = levels(side, middle(side, 1, widths[-1]), widths[-1], widths[::-1])
    part(f"{side}.blocks.{n}", CH)
    part(f"{side}.blocks.{n + 1}", 3, CH, 3, 3)
    part(f"{side}.logsigma.0", CH, CH, 3, 3)
    part(f"{side}.logsigma.2", 3, CH, 1, 1)
    return out


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


@pytest.mark.parametrize("change", ["ae.quantize.embed.weight", "ae.encoder.blocks.3.conv.weight", "ae.more.weight"])
def test_weights_of_something_else_are_refused(change):
    weights = released(shapes())
    if change in weights:
        del weights[change]
    else:
        weights[change] = torch.zeros(3)
    with pytest.raises(ValueError, match="no weights of ELM"):
        bae_of(weights, 16)
