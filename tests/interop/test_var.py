"""The released weights of VAR in our parts: names and shapes of its files, numbers of its code, and what would break
them.

The golden numbers were computed once by the released code (FoundationVision/VAR, in float32) with the weights that
`released` makes from names and shapes alone, and the inputs of `pictures`: ids of a picture, the first numbers of what
they decode to, logits of a training forward (the first four, the last four, the largest), and a picture drawn greedily
under guidance.
"""

from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import save_file

from seriatim.cli.main import main
from seriatim.systems.image.var import VAR
from seriatim.systems.system import Sampling
from seriatim.verbs.load import load
from support.released_var import CLASSES, HEADS, SCALES, WIDTH, generator_shapes, pictures, released, tokenizer_shapes

LABEL = torch.tensor([1, 4])
IDS = [2, 2, 2, 1, 7, 9, 16, 9, 2, 26, 9, 26, 30, 9, 7, 6, 18, 14, 30, 4, 7, 26, 7, 16, 4, 14, 6, 3, 2, 18]
DECODED = (-1.0, -0.81956, -0.39869, -0.32739, 0.87018, 0.71635)  # of the first picture: row 30, columns 20 and 21
GOLDEN = {  # by whether layers share a matrix of scales and shifts
    False: {
        "logits": (4.25592, -7.42371, -1.39845, 8.53155, -2.5295, -2.92835, -9.37748, 3.18098), "largest": 12.82787,
        "drawn": (-0.04916, -0.39447, -1.0, -1.0, 1.0, 1.0),
    },
    True: {
        "logits": (3.95126, -1.34322, 2.54535, 3.39708, -0.28027, 7.89287, -1.38529, -0.74795), "largest": 11.92972,
        "drawn": (-0.19632, -0.31731, -0.23427, -0.56951, 0.50374, 0.45929),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Both kinds of released files, each in a folder with its tokenizer."""
    place = tmp_path_factory.mktemp("released")
    tokenizer = released(tokenizer_shapes())
    for shared in (False, True):
        folder = place / ("d36" if shared else "d16")
        folder.mkdir()
        torch.save(tokenizer, folder / "vae_ch160v4096z32.pth")
        torch.save(released(generator_shapes(shared)), folder / "var.pth")
    return place


@pytest.fixture(scope="module", params=[False, True], ids=["d16", "d36"])
def system(request, files):
    made = load(files / ("d36" if request.param else "d16") / "var.pth")
    made.shared = request.param
    return made


def logits(system):
    canvas, condition = system.canvas({"image": pictures(), "label": LABEL})
    plan = system.model.factorization.packed(canvas)
    with torch.no_grad():
        h = system.model.hidden(plan, canvas, None, system.model.encode(condition))
        return system.model.dist(h, plan, canvas)[0].logits


def gap(system):
    said, golden = logits(system), GOLDEN[system.shared]
    found = torch.cat([said[0, 0, :4], said[1, -1, -4:], said.abs().max()[None]])
    return float((found - torch.tensor([*golden["logits"], golden["largest"]])).abs().max()) / golden["largest"]


def test_the_tokenizer_is_the_released_one(system):
    ids = system.tokenizer.encode(pictures())
    assert ids[1].tolist() == IDS
    picture = system.tokenizer.decode(ids)[0, :, 30, 20:22]
    assert torch.allclose(picture.flatten(), torch.tensor(DECODED), atol=1e-4)


def test_what_is_said_is_what_the_released_code_says(system):
    assert gap(system) < 1e-4


def test_a_picture_under_guidance_is_that_of_the_released_code(system):
    drawn = system.draw(LABEL, sampling=Sampling(temperature=0.0, guidance=1.5))
    assert drawn.forwards == len(SCALES)
    expected = torch.tensor(GOLDEN[system.shared]["drawn"])
    assert torch.allclose(drawn.images[1, :, 40, 11:13].flatten(), expected, atol=1e-3)


def unordered_norms(model):
    for layer in model.backbone.layers:
        layer.ada.data = layer.ada.data.clone().view(6, -1, WIDTH).flip(0).reshape_as(layer.ada)


def swapped_head(model):
    model.backbone.ada.data = model.backbone.ada.data.roll(WIDTH, 0)


def biased_keys(model):
    for layer in model.backbone.layers:
        layer.qkv_bias.data[WIDTH : 2 * WIDTH] = layer.qkv_bias.data[:WIDTH]


def plain_temperature(model):
    for layer in model.backbone.layers:
        layer.q_norm.data.zero_()


def other_phi(model):
    model.embed.quantizer.phi_of_scale = (0, 0, 0, 0)


@pytest.mark.parametrize("wrong", [unordered_norms, swapped_head, biased_keys, plain_temperature, other_phi])
def test_each_trap_fails_the_same_test(files, wrong):
    made = load(files / "d16" / "var.pth")
    made.shared = False
    wrong(made.model)
    assert gap(made) > 1e-3


def test_it_is_sampled_as_published_and_has_its_sizes(system):
    assert isinstance(system, VAR) and system.config.heads == HEADS and system.config.classes == CLASSES
    assert (system.sampling.top_k, system.sampling.top_p, system.sampling.guidance) == (900, 0.96, 1.5)


def test_a_namespace_beside_the_weights_is_read_and_a_trainer_file_too(files, tmp_path):
    folder = tmp_path / "training"
    folder.mkdir()
    whole = {
        "trainer": {"model_ema": None, "state_dict": released(generator_shapes(False))},
        "args": argparse.Namespace(lr=1),
    }
    torch.save(whole, folder / "ar-ckpt-best.pth")
    torch.save(released(tokenizer_shapes()), folder / "vae_ch160v4096z32.pth")
    made = load(folder / "ar-ckpt-best.pth")
    made.shared = False
    assert gap(made) < 1e-4


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


def broken(files, folder, what):
    """A file with one thing wrong, and what is said of it."""
    weights = released(generator_shapes(False))
    path = folder / "var.pth"
    torch.save(released(tokenizer_shapes()), folder / "vae_ch160v4096z32.pth")
    if what == "harmful":
        torch.save({"model": Harmful(), **weights}, path)
    elif what == "cut short":
        path.write_bytes((files / "d16" / "var.pth").read_bytes()[:5000])
    elif what == "no tokenizer":
        (folder / "vae_ch160v4096z32.pth").unlink()
        torch.save(weights, path)
    elif what == "a weight is missing":
        torch.save({k: v for k, v in weights.items() if k != "head.bias"}, path)
    elif what == "another shape":
        torch.save(weights | {"head.bias": torch.zeros(3)}, path)
    elif what == "other scales":
        torch.save(weights | {"pos_1LC": torch.zeros(1, 7, WIDTH)}, path)
    elif what == "something else":
        torch.save({"encoder.weight": torch.zeros(2)}, path)
    elif what == "numbers":
        torch.save([1, 2, 3], path)
    elif what == "the tokenizer":
        path = folder / "vae_ch160v4096z32.pth"
    elif what == "safetensors by another name":
        save_file(weights, path)
    return path


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("harmful", "might run anything"),
        ("cut short", "cut short"),
        ("no tokenizer", "needs its tokenizer beside it"),
        ("a weight is missing", "does not hold the weights"),
        ("another shape", "does not hold the weights"),
        ("other scales", "no released VAR has"),
        ("something else", "not read here"),
        ("numbers", "no weights by name"),
        ("the tokenizer", "load the generator"),
        ("safetensors by another name", "no whole file of weights|might run"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(files, tmp_path, capsys, what, said):
    path = broken(files, tmp_path, what)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load(path)
    assert main(["generate", str(path), "--label", "1"]) != 0
    assert "this must not run" not in capsys.readouterr().out
