"""The autoencoder of Stable Diffusion in our parts.

The golden numbers were computed once by diffusers 0.42's `AutoencoderKL` (in float32) with the weights that `released`
makes from names and shapes alone: latents of a picture, in patches of 2 x 2, and what they decode to.
"""

from __future__ import annotations

import pytest
import torch

from seriatim.interop.sd_vae import sd_vae_of
from seriatim.tokenizers.kl import KLConfig, KLTokenizer
from support.released_sd_vae import DIM, autoencoder_shapes
from support.released_var import pictures, released

LATENT = (-0.10625, -0.00562, 0.43569, 0.11585, -0.09262, -0.64453, -0.28202, -0.333)
LARGEST = 0.8244
DECODED = (0.03406, -0.66417, 0.55791, 0.20732, 0.17321, -0.51835)  # of the second picture: row 30, columns 20 and 21


def tokenizer(weights=None, patch=2):
    config, named = sd_vae_of(weights or released(autoencoder_shapes()), 64, patch)
    made = KLTokenizer(config).eval()
    left = made.load_state_dict(named, strict=False)
    assert not left.unexpected_keys and all(n.startswith(("picture_loss", "sums")) for n in left.missing_keys)
    return made


def gap(made):
    return float((made.encode(pictures())[1, 5, :8] - torch.tensor(LATENT)).abs().max()) / LARGEST


def off(made):
    picture = made.decode(made.encode(pictures()))[1, :, 30, 20:22].flatten()
    return float((picture - torch.tensor(DECODED)).abs().max())


def test_latents_and_pictures_are_those_of_diffusers():
    made = tokenizer()
    assert gap(made) < 1e-4 and off(made) < 1e-4
    assert made.grid == (4, 4) and made.dim == 4 * DIM


def swapped(weights, one, other):
    return {name.replace(one, "#").replace(other, one).replace("#", other): x for name, x in weights.items()}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda w: swapped(w, "attentions.0.to_q", "attentions.0.to_v"),
        lambda w: swapped(w, "mid_block.resnets.0", "mid_block.resnets.1"),
    ],
)
def test_each_confusion_shows(wrong):
    made = tokenizer(wrong(released(autoencoder_shapes())))
    assert gap(made) > 1e-3 and off(made) > 1e-3


def test_a_middle_alone_attends_and_latents_are_scaled():
    made = tokenizer()
    made.scale.fill_(1.0)
    assert gap(made) > 0.1
    with pytest.raises(RuntimeError, match="Missing key"):
        KLTokenizer(KLConfig(side=64, channels=3, dim=4, body="residual", width=32, halvings=3)).load_state_dict(
            sd_vae_of(released(autoencoder_shapes()), 64, 1)[1]
        )


def test_names_of_older_files_are_read():
    """In which queries, keys and values had other names."""
    new = ("to_q", "to_k", "to_v", "to_out.0")
    weights = released(autoencoder_shapes())
    older = {}
    for name, x in weights.items():
        for now, then in zip(new, ("query", "key", "value", "proj_attn"), strict=True):
            name = name.replace(f".{now}.", f".{then}.")
        older[name] = x
    assert older.keys() != weights.keys() and gap(tokenizer(older)) < 1e-4


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_are_cut_row_by_row_and_joined_again(patch):
    made, whole = tokenizer(patch=patch), tokenizer(patch=1)
    rows = made.encode(pictures())
    n = 8 // patch
    assert rows.shape == (2, n * n, patch * patch * DIM)
    latent = whole.encode(pictures()).view(2, 8, 8, DIM)
    second = latent[1, patch : 2 * patch, patch : 2 * patch]
    assert torch.equal(rows[1, n + 1].view(patch, patch, DIM), second)
    assert torch.equal(made.decode(rows), whole.decode(latent.flatten(1, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attends": "nowhere"}, "attends is one of"), ({"multipliers": (1, 2)}, "4 widths, and 2 are given"),
        ({"patch": 3}, "multiple of 24"), ({"patch": 0}, "patches of 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        KLConfig(**{"side": 64, "channels": 3, "body": "residual", "width": 32, "halvings": 3} | change)
