"""Weights as integers, or laid out for the processor: products, the nearest matrices, and models that keep them."""

import pytest
import torch

from seriatim.backbones.hybrid import Hybrid, HybridConfig
from seriatim.backbones.mamba import Mamba, MambaConfig
from seriatim.backbones.quantize import GROUP, Int4, Int8, Packed, linear, packs, quantize
from seriatim.canvas import Canvas
from seriatim.systems.text.next_token import Config, NextToken
from seriatim.tokenizers.text import ByteTokenizer

PROMPT = "abcabcab"


def letters(text: str) -> list[int]:
    return ByteTokenizer().encode(text)


def matrix(rows: int = 48, columns: int = 64, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("kind", (Int8, Int4))
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_are_those_of_the_nearest_matrix(kind, rows):
    w, x = matrix(), matrix(rows, 64) / 8
    kept = kind.of(w)
    exact = kept.times(torch.eye(64)).T  # the matrix that is kept, row by row
    step = kept.scale[:, None] if kind is Int8 else kept.scales[..., 0].T.repeat_interleave(GROUP, 1)
    assert ((exact - w).abs() <= step * 0.5001 + 1e-4).all()
    torch.testing.assert_close(linear(x, kept, None), x @ exact.T, rtol=1e-4, atol=1e-4)
    bias = torch.arange(48.0)
    torch.testing.assert_close(linear(x, kept, bias), x @ exact.T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not packs(), reason="a processor without bfloat16")
@pytest.mark.parametrize("rows", [1, 2, 8, 13, 64])
def test_packed_products_are_those_of_the_matrix_itself(rows):
    w, x, bias = matrix(48, 72, torch.bfloat16), matrix(rows, 72, torch.bfloat16), matrix(1, 48, torch.bfloat16)[0]
    for given in (x, matrix(72, rows, torch.bfloat16).T, x[:, None], torch.stack([x, x])[:, -1:]):
        exact = given.float() @ w.float().T
        for b, expected in ((None, exact), (bias, exact + bias.float())):
            said = linear(given, Packed.of(w), b)
            assert said.shape == expected.shape and said.dtype == torch.bfloat16
            assert ((said.float() - expected).abs() <= 0.004 * expected.abs() + 0.004).all()


@pytest.mark.skipif(not packs(), reason="a processor without bfloat16")
def test_a_packed_model_writes_what_the_model_writes():
    torch.manual_seed(0)
    made = NextToken(Config(length=64, width=64, depth=2, heads=2)).bfloat16().eval().requires_grad_(False)
    ids = torch.tensor([letters(PROMPT * 4)])
    before, text = made.logits(ids), made.generate(PROMPT, "prompt-lookup", temperature=0, max_new_tokens=30).ids
    quantize(made.model, "packed")
    with pytest.raises(ValueError, match="not compiled"):
        made.model.compile_decoding()
    assert (made.logits(ids) - before).abs().max() < 0.02 * before.abs().max()
    assert made.generate(PROMPT, "prompt-lookup", temperature=0, max_new_tokens=30).ids == text


def test_only_bfloat16_is_packed():
    with pytest.raises(ValueError, match="bfloat16"):
        Packed.of(matrix())


@pytest.mark.parametrize("columns", [72, 80, 88])
def test_rows_of_any_length_are_multiplied_in_bfloat16(columns):
    """torch's product takes rows in sixteens, and reads beyond others."""
    w, x = matrix(48, columns, torch.bfloat16), matrix(3, columns, torch.bfloat16)
    kept = Int8.of(w)
    exact = x.float() @ (kept.weight.float() * kept.scale.float()[:, None]).T
    assert (kept.times(x).float() - exact).abs().max() < 0.02 * exact.abs().max()


def test_rows_of_zeros_stay_zeros():
    for kind in (Int8, Int4):
        w = matrix()
        w[3] = 0
        assert kind.of(w).times(matrix(2, 64))[:, 3].abs().max() < 1e-6


@pytest.mark.parametrize("name", ("int8", "int4"))
def test_a_quantised_model_is_near_the_model_and_decodes_as_it_scores(name):
    torch.manual_seed(0)
    plain = NextToken(Config(length=64, width=64, depth=2, heads=2)).eval().requires_grad_(False)
    small = NextToken(Config(length=64, width=64, depth=2, heads=2)).eval().requires_grad_(False)
    small.load_state_dict(plain.state_dict())
    quantize(small.model, name)
    ids = torch.tensor([letters(PROMPT * 4)])
    ours, theirs = small.logits(ids), plain.logits(ids)
    error = (ours - theirs).norm() / theirs.norm()
    assert 1e-5 < error < {"int8": 0.01, "int4": 0.15}[name]
    made = small.generate(PROMPT, temperature=0, max_new_tokens=20)
    scored = small.logits(torch.tensor([letters(PROMPT) + made.ids]))[0, len(PROMPT) - 1 : -1]
    assert scored.argmax(-1).tolist() == made.ids


def test_formats_and_models_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="packed, int8, int4"):
        quantize(torch.nn.Linear(4, 4), "int3")
    with pytest.raises(ValueError, match="no layers"):
        quantize(torch.nn.Linear(4, 4), "int8")
    with pytest.raises(ValueError, match="groups of 32"):
        Int4.of(torch.zeros(16, 33))


MIXER = MambaConfig(64, 2, head_dim=16, state=16)


@pytest.mark.parametrize("backbone", ["mamba", "hybrid"])
@pytest.mark.parametrize("name", ("int8", "int4"))
def test_layers_that_keep_states_are_quantised_too(backbone, name):
    from seriatim.decoding.loop import generate
    from seriatim.decoding.target import Target
    from seriatim.decoding.verify import GreedyMatch
    from seriatim.embed import TokenEmbed
    from seriatim.factorization.line import Line
    from seriatim.heads.categorical import CategoricalHead
    from seriatim.layout import line
    from seriatim.model import Model

    torch.manual_seed(0)
    made = Mamba(MIXER) if backbone == "mamba" else Hybrid(HybridConfig(64, 3, 4, attends=(1,), mixer=MIXER))
    embed = TokenEmbed(97, 64)
    model = Model(line(40), Line(), embed, made, CategoricalHead(64, 97, tied=embed.table)).eval().requires_grad_(False)
    canvas: Canvas = model.canvas({"token": torch.randint(97, (2, 40))}, 1)
    before = model.log_prob(canvas)
    quantize(model, name)
    kept = [n for layer in made.layers for n in layer._formats]
    assert kept.count("into") == 2 and kept.count("out") == len(made.layers)
    after = model.log_prob(canvas)
    assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()
    begun = model.canvas({"token": canvas.value["token"][:1]}, 30)
    said = generate(Target(model), begun, GreedyMatch()).value["token"]
    packed = model.canvas({"token": said}, 1)
    logits = model.dist(model.hidden(plan := model.factorization.packed(packed), packed), plan, packed)[0].logits
    assert logits.argmax(-1)[0, 29:].tolist() == said[0, 30:].tolist()  # step by step as in one pass


def test_layers_that_some_slots_skip_are_quantised_too():
    from dataclasses import replace

    torch.manual_seed(0)
    made = NextToken(Config(length=16, width=64, depth=2, heads=2)).eval().requires_grad_(False)
    model = made.model
    canvas = model.canvas({"token": torch.tensor([letters(PROMPT * 2)])})
    plan = model.factorization.packed(canvas)
    skipping = replace(plan, layers=torch.tensor([[True] * 16, [True, False] * 8]))
    before = model.hidden(skipping, canvas)
    quantize(model, "int8")
    after = model.hidden(skipping, canvas)
    assert 0 < (after - before).norm() < 0.02 * before.norm()
