"""The released weights of VAR in our parts: names and shapes of its files, numbers of its code, and what would break
them.

The golden numbers were computed once by the released code (FoundationVision/VAR, in float32) with the weights that
`released` makes from names and shapes alone, and the inputs of `pictures`: ids of a picture, the first numbers of what
they decode to, logits of a training forward (the first four, the last four, the largest), and a picture drawn greedily
under guidance.
"""

from __future__ import annotations

import argparse
import hashlib

import pytest
import torch
from safetensors.torch import save_file

from seriatim.cli.main import main
from seriatim.systems.image.var import VAR
from seriatim.systems.system import Sampling
from seriatim.verbs.load import load

WIDTH, HEADS, DEPTH, CLASSES, VOCAB, DIM, CH = 64, 2, 2, 5, 32, 32, 32
SCALES = (1, 2, 3, 4)  # of pictures of 64 x 64 pixels
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


def tokenizer_shapes():
    out = {"quantize.embedding.weight": (VOCAB, DIM), "quantize.ema_vocab_hit_SV": (len(SCALES), VOCAB)}

    def conv(name, after, before, size):
        out[f"{name}.weight"], out[f"{name}.bias"] = (after, before, size, size), (after,)

    def norm(name, width):
        out[f"{name}.weight"], out[f"{name}.bias"] = (width,), (width,)

    def block(name, before, after):
        norm(f"{name}.norm1", before)
        conv(f"{name}.conv1", after, before, 3)
        norm(f"{name}.norm2", after)
        conv(f"{name}.conv2", after, after, 3)
        if before != after:
            conv(f"{name}.nin_shortcut", after, before, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        conv(f"{name}.qkv", 3 * width, width, 1)
        conv(f"{name}.proj_out", width, width, 1)

    widths = [CH * m for m in (1, 1, 2, 2, 4)]
    for i in range(4):
        conv(f"quantize.quant_resi.qresi_ls.{i}", DIM, DIM, 3)
    conv("quant_conv", DIM, DIM, 3)
    conv("post_quant_conv", DIM, DIM, 3)
    for side, edge, before in (("encoder", "down", CH), ("decoder", "up", widths[-1])):
        conv(f"{side}.conv_in", before, 3 if side == "encoder" else DIM, 3)
        for i in range(5) if side == "encoder" else reversed(range(5)):
            for j in range(2 + (side == "decoder")):
                block(f"{side}.{edge}.{i}.block.{j}", before, widths[i])
                before = widths[i]
                if i == 4:
                    attention(f"{side}.{edge}.{i}.attn.{j}", before)
            if i != (4 if side == "encoder" else 0):
                conv(f"{side}.{edge}.{i}.{edge}sample.conv", before, before, 3)
        block(f"{side}.mid.block_1", widths[-1], widths[-1])
        attention(f"{side}.mid.attn_1", widths[-1])
        block(f"{side}.mid.block_2", widths[-1], widths[-1])
        norm(f"{side}.norm_out", before)
        conv(f"{side}.conv_out", DIM if side == "encoder" else 3, before, 3)
    return out


def generator_shapes(shared):
    w, total = WIDTH, sum(n * n for n in SCALES)
    out = {
        "pos_start": (1, 1, w), "pos_1LC": (1, total, w), "lvl_1L": (1, total),
        "attn_bias_for_masking": (1, 1, total, total), "word_embed.weight": (w, DIM), "word_embed.bias": (w,),
        "class_emb.weight": (CLASSES + 1, w), "lvl_embed.weight": (len(SCALES), w),
        "head_nm.ada_lin.1.weight": (2 * w, w), "head_nm.ada_lin.1.bias": (2 * w,), "head.weight": (VOCAB, w),
        "head.bias": (VOCAB,),
    }  # fmt: skip
    if shared:
        out |= {"shared_ada_lin.1.weight": (6 * w, w), "shared_ada_lin.1.bias": (6 * w,)}
    for i in range(DEPTH):
        b = f"blocks.{i}."
        out |= {
            b + "attn.scale_mul_1H11": (1, HEADS, 1, 1), b + "attn.q_bias": (w,), b + "attn.v_bias": (w,),
            b + "attn.zero_k_bias": (w,), b + "attn.mat_qkv.weight": (3 * w, w), b + "attn.proj.weight": (w, w),
            b + "attn.proj.bias": (w,), b + "ffn.fc1.weight": (4 * w, w), b + "ffn.fc1.bias": (4 * w,),
            b + "ffn.fc2.weight": (w, 4 * w), b + "ffn.fc2.bias": (w,),
        }  # fmt: skip
        out |= {b + "ada_gss": (1, 1, 6, w)} if shared else {}
        out |= {} if shared else {b + "ada_lin.1.weight": (6 * w, w), b + "ada_lin.1.bias": (6 * w,)}
    return out


def released(shapes):
    """Weights as large as those that were trained, gates among them; each drawn by its own name."""
    out = {}
    for name, shape in shapes.items():
        g = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        x = torch.randn(shape, generator=g)
        last = name.rsplit(".", 2)[-2] if "." in name else ""
        if name in ("lvl_1L", "attn_bias_for_masking") or name.endswith(("zero_k_bias", "ema_vocab_hit_SV")):
            x = torch.zeros(shape)
        elif name.endswith("scale_mul_1H11"):
            x = 1.2 + 0.4 * x
        elif "norm" in last and name.endswith("weight"):
            x = 1 + 0.2 * x
        elif len(shape) == 4:
            x = 1.4 * x / x[0].numel() ** 0.5
        elif len(shape) == 2 and "emb" not in name.replace("word_embed", ""):
            x = 1.6 * x / shape[1] ** 0.5
        elif "emb" not in name.replace("word_embed", ""):
            x = 0.3 * x
        out[name] = x
    return out


def pictures():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1


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
