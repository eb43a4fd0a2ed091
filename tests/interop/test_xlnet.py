"""XLNet's format: logits beside `transformers`, golden numbers of the same, caches and drafts, what is refused.

The golden numbers were computed once by `transformers` 5.23.0: XLNetLMHeadModel of CONFIG with the weights of
`weights()`, float32, with the permutation mask and the target mapping of `asked`.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from seriatim.backbones import xlnet as backbone
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.subset import ContextBigrams, InOrder, SelfDraft
from seriatim.decoding.target import Target
from seriatim.interop import xlnet
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.random import Forced, Keyed
from seriatim.verbs.load import load
from tokenizers import Tokenizer, models, pre_tokenizers

CONFIG = {"model_type": "xlnet", "vocab_size": 13, "d_model": 8, "n_layer": 2, "n_head": 2, "d_inner": 12}
IDS = torch.tensor([[3, 7, 1, 12, 5, 0, 9, 4]])
KNOWN = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 0]]).bool()
GOLDEN = [
    [10.1154, -8.0133, -1.4965, -1.8966, 0.4727, -5.0014, 0.6449, 2.9039, -2.3652, 0.0488, 1.4831, 1.4194, 3.6417],
    [8.9771, -8.3737, -3.9368, 1.4039, 3.3609, -8.3882, -3.6208, 7.1650, 1.8498, -0.8001, 3.2597, -1.6377, 4.5655],
    [9.5390, -8.6165, -3.4639, 0.5676, 2.7707, -7.7415, -2.6160, 6.5168, 1.1043, -0.5308, 3.0448, -1.0134, 4.5590],
    [8.4352, -7.3073, -3.0123, 0.9176, 2.7930, -7.3518, -2.3463, 4.8065, -0.0640, -0.6787, 2.1098, -0.5182, 3.7537],
    [6.5761, -6.4817, -4.5411, 3.5595, 4.5689, -9.4898, -5.8872, 7.0868, 2.3187, -1.6900, 2.8033, -2.6289, 3.6431],
]  # fmt: skip


def weights():
    """Telling weights, by a formula: anybody can make them again."""
    d, h, f, v = 8, 2, 12, 13
    shapes = {"transformer.word_embedding.weight": (v, d), "transformer.mask_emb": (1, 1, d), "lm_loss.bias": (v,)}
    for i in range(2):
        own = {f"rel_attn.{x}": (d, h, d // h) for x in ("q", "k", "v", "o", "r")}
        own |= {f"rel_attn.{x}": (h, d // h) for x in ("r_r_bias", "r_s_bias", "r_w_bias")}
        own |= {"rel_attn.seg_embed": (2, h, d // h), "ff.layer_1.weight": (f, d), "ff.layer_1.bias": (f,)}
        own |= {"ff.layer_2.weight": (d, f), "ff.layer_2.bias": (d,)}
        own |= {f"{x}.layer_norm.{y}": (d,) for x in ("rel_attn", "ff") for y in ("weight", "bias")}
        shapes |= {f"transformer.layer.{i}.{x}": shape for x, shape in own.items()}
    out = {}
    for n, (name, shape) in enumerate(shapes.items()):
        x = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
        x = torch.sin(x * x * (0.37 + 0.011 * n) + n) * 1.2
        out[name] = (x + (1.5 if name.endswith("norm.weight") else 0)).float().reshape(shape)
    return out


def asked(known):
    """Who must not see whom, and what is read, in XLNet's terms: row i, column j is 1 where i does not see j."""
    rank = torch.where(known, -1, (~known).long().cumsum(1) - 1)
    hidden = (rank[:, None] >= rank[:, :, None]) & ~(known[:, :, None] & known[:, None])
    place = (~known[0]).nonzero()[:, 0]
    return hidden.float(), torch.nn.functional.one_hot(place, known.shape[1])[None].float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("xlnet")
    (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(weights(), path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def model(folder):
    return xlnet.published(folder, CONFIG).eval().requires_grad_(False)


def logits(model, ids=IDS, known=KNOWN):
    """Of the unknown elements, by one packed forward."""
    canvas = model.canvas({"token": ids}, known, layout=line(ids.shape[1]))
    plan = model.factorization.packed(canvas).check(model.mixers)
    with torch.no_grad():
        return model.dist(model.hidden(plan, canvas), plan, canvas)[0].logits[0]


def gap(model, want):
    got = logits(model)
    return float((got - want).abs().max() / want.abs().max())


# ---- parity ----------------------------------------------------------------------------------------------------------


def test_logits_are_the_golden_ones(model):
    want = torch.tensor(GOLDEN)
    assert 2 < float(want.std()) < 8
    assert gap(model, want) < 1e-4


@pytest.mark.parametrize("known", [[0, 1, 0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]])
def test_logits_are_those_of_transformers(folder, model, known):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.XLNetLMHeadModel.from_pretrained(folder).eval()
    known = torch.tensor([known]).bool()
    hidden, target = asked(known)
    with torch.no_grad():
        want = theirs(IDS, perm_mask=hidden, target_mapping=target)[0][0]
    assert float((logits(model, known=known) - want).abs().max()) < 1e-4 * float(want.abs().max())


TRAPS = {
    "no bias of content": lambda m: [layer.content_bias.zero_() for layer in m.backbone.layers],
    "no bias of places": lambda m: [layer.place_bias.zero_() for layer in m.backbone.layers],
    "outputs the other way round": lambda m: [layer.out.copy_(layer.out.T.clone()) for layer in m.backbone.layers],
    "no mask's vector": lambda m: m.embed.mask.zero_(),
    "no bias of outputs": lambda m: m.heads["token"].bias.zero_(),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_of_the_weights_fails(folder, trap):
    wrong = xlnet.published(folder, CONFIG)
    with torch.no_grad():
        TRAPS[trap](wrong)
    assert gap(wrong, torch.tensor(GOLDEN)) > 1e-3


def test_distances_that_run_the_other_way_fail(model, monkeypatch):
    right = backbone.XLNet._distances
    monkeypatch.setattr(backbone.XLNet, "_distances", lambda self, o, mask, dtype: right(self, -o, mask, dtype))
    assert gap(model, torch.tensor(GOLDEN)) > 1e-3


def test_queries_that_see_themselves_fail(model, monkeypatch):
    monkeypatch.setattr(backbone, "MASK", -9)  # no slot is known as a query
    assert gap(model, torch.tensor(GOLDEN)) > 1e-3


# ---- as an any-subset model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return randomise(xlnet.build(backbone.XLNetConfig(16, 2, 2, 24), 5, 12))


@pytest.mark.parametrize("cached", [True, False])
def test_one_pass_is_the_sum_of_steps_whatever_is_known(tiny, cached):
    g = torch.Generator().manual_seed(0)
    x, known = torch.randint(5, (6, 12), generator=g), torch.rand(6, 12, generator=g) < torch.arange(6)[:, None] / 6
    forced = Forced(x)
    generate(Target(tiny, cached=cached), tiny.canvas({"token": x}, known), SampleAll(), random=forced)
    with torch.no_grad():
        assert torch.allclose(forced.log_prob, tiny.log_prob(tiny.canvas({"token": x}, known)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("decider, proposer", [(InOrder(sure=1), SelfDraft(4)), (InOrder(), ContextBigrams(4))])
def test_drafts_keep_their_promises(tiny, decider, proposer):
    g = torch.Generator().manual_seed(1)
    ids, known = torch.randint(5, (1, 12), generator=g), torch.rand(1, 12, generator=g) < 0.3
    texts = []
    for cached in (True, False):
        canvas = tiny.canvas({"token": ids}, known)
        steps = list(decode(Target(tiny, cached=cached), canvas, decider, proposer, Keyed(0)))
        assert sum(step.forwards for step in steps) <= int((~known).sum())
        texts.append(canvas.value["token"])
    assert torch.equal(*texts)


def test_with_nothing_known_the_first_token_peeks_at_nothing(model):
    """The published code spreads the attention of a query that sees nothing over all that it must not see."""
    other = (IDS + 1) % 13
    none = torch.zeros(1, 8).bool()
    assert torch.equal(logits(model, IDS, none)[0], logits(model, other, none)[0])
    assert bool(torch.isfinite(logits(model, IDS, none)).all())


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_with_its_tokenizer_and_fills_gaps(folder, tmp_path):
    words = {f"w{i}": i for i in range(12)} | {"<mask>": 12}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    system = load(tmp_path)
    assert system.meta.key == "as-arm"
    text = "".join(system.infill("w3 w7 <mask:20> w5", seed=1)).split()
    assert (text[:2], text[-1], len(text)) == (["w3", "w7"], "w5", 23)
    assert "<mask>" not in text


@pytest.mark.parametrize(
    "change, said",
    [
        ({"attn_type": "uni"}, "attn_type"),
        ({"clamp_len": 10}, "clamp_len"),
        ({"ff_activation": "relu"}, "ff_activation"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"n_layer": 3}, "lacks"),
        ({"n_layer": 1}, "does not explain"),
        ({"d_inner": 16}, "shape"),
    ],
)
def test_what_is_not_understood_or_does_not_fit_is_refused(folder, change, said):
    with pytest.raises(ValueError, match=said):
        xlnet.published(folder, CONFIG | change)
