"""VAR: what its paper says of order, feed and guidance, beyond the laws that every system obeys."""

from dataclasses import replace

import pytest
import torch

from seriatim import Generator, Guidance, Keyed, SampleAll, Target, decode, generate
from seriatim.backbones import attention as kernels
from seriatim.random import Forced
from seriatim.systems.image import var
from seriatim.tokenizers.multiscale import MultiScaleConfig


def tiny(scales, vocab=3):
    return var.case(scales, vocab).model


@pytest.mark.parametrize(
    ("scales", "pairs"), [((1, 2, 3), 1 + 4 * 5 + 9 * 14), ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 286_434)]
)
def test_each_scale_sees_itself_and_everything_coarser(scales, pairs):
    model = tiny(scales)
    plan = model.factorization.packed(model.blank(1))
    assert int(plan.views["all"].mask().sum()) == pairs
    assert [p.size for p in plan.steps()] == [s * s for s in scales]


def test_the_last_scale_is_never_cached():
    model = tiny((1, 2, 4))
    target = Target(model, {"class": torch.tensor([0])})
    for _ in decode(target, model.blank(1), SampleAll()):
        pass
    assert target.cache.columns == 0, "after the last step nothing is looked at any more"


def test_a_pyramid_of_single_tokens_is_next_token_over_residual_codes():
    model = tiny((1, 1, 1))
    plan = model.factorization.packed(model.blank(1))
    assert torch.equal(plan.views["all"].mask()[0], torch.ones(3, 3).tril().bool())
    assert [p.size for p in plan.steps()] == [1, 1, 1]


def test_the_first_scale_ignores_linear_guidance():
    model = tiny((1, 2, 4), vocab=16)
    labels = {"class": torch.tensor([0, 1, 2, 1])}

    def ids(scale):
        target = Target(model, labels, Guidance(scale, "linear"))
        return generate(target, model.blank(4), SampleAll(), random=Keyed(1)).value["token"]

    weak, strong = ids(0.0), ids(8.0)
    assert torch.equal(weak[:, 0], strong[:, 0])
    assert not torch.equal(weak[:, 5:], strong[:, 5:])


def test_the_class_matters():
    model = tiny((1, 2), vocab=2)
    x = torch.randint(2, (4, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = (model.log_prob(model.canvas({"token": x}), {"class": torch.full((4,), c)}) for c in (0, 1))
    assert (one - two).abs().min() > 1e-3


def test_teacher_inputs_are_those_of_the_tokenizer():
    model = tiny((1, 2, 4))
    quantizer = model.embed.quantizer
    ids = torch.randint(3, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plan = model.factorization.packed(model.canvas({"token": ids}))
        slots = model.embed(model.canvas({"token": ids}), plan)
        scale = model.embed.scale[plan.slots.coord[0, 1:, 0]]
        want = model.embed.project(quantizer.teacher_inputs(ids)) + model.embed.position[1:] + scale
    torch.testing.assert_close(slots[:, 1:], want, atol=1e-12, rtol=0)


def test_the_tokenizer_is_frozen_and_not_trained():
    model = var.build(var.Config(MultiScaleConfig(scales=(1, 2), vocab=4, dim=3, width=8), width=16, depth=1, heads=2))
    assert not any(p.requires_grad for p in model.embed.quantizer.parameters())
    ids = torch.randint(4, (2, 5), generator=torch.Generator().manual_seed(0))
    model.losses(model.canvas({"token": ids}), {"class": torch.tensor([0, 1])}).sum().backward()
    assert all(p.grad is None for p in model.embed.quantizer.parameters())


def test_samples_repeat_with_their_seed():
    model, labels = tiny((1, 2)), {"class": torch.tensor([0, 1])}
    a, b = (
        generate(Target(model, labels), model.blank(2), SampleAll(), random=Generator(5)).value["token"] for _ in "ab"
    )
    assert torch.equal(a, b)


# ---- the formulas of the paper, one slot and one head at a time ------------------------------------------------------

SCALES = (1, 2, 3)
IDS = torch.randint(11, (3, 14), generator=torch.Generator().manual_seed(4))
LABELS = {"class": torch.tensor([0, 1, 2])}


def sharp():
    """A tiny model whose logits spread, with one head's temperature beyond the clamp."""
    model = tiny(SCALES, vocab=11)
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.q_norm.copy_(torch.tensor([[1.2], [6.0]]))
    return model


def plain_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-6).sqrt()


def unit(x):
    return x / (x * x).sum().sqrt()


def attention(layer, x, scale_of):
    """softmax(tau cos(q, k)) v, tau at most 100; a slot sees its own scale and the coarser ones."""
    n, width = x.shape
    q, k, v = (x @ layer.qkv.T + layer.qkv_bias).view(n, 3, 2, width // 2).unbind(1)
    out = torch.zeros(n, 2, width // 2, dtype=x.dtype)
    for head in range(2):
        tau = min(float(layer.q_norm[head, 0].exp()), 100.0)
        for i in range(n):
            seen = [j for j in range(n) if scale_of[j] <= scale_of[i]]
            weight = torch.stack([tau * (unit(q[i, head]) @ unit(k[j, head])) for j in seen]).exp()
            out[i, head] = sum(w * v[j, head] for w, j in zip(weight / weight.sum(), seen, strict=True))
    return out.reshape(n, width) @ layer.out.T + layer.out_bias


def reference(model, ids, label):
    """Logits (elements, vocab) of one picture; `label` is a row of the class table, the last one for no class."""
    embed, head = model.embed, model.heads["token"]
    scale_of = [k for k, side in enumerate(SCALES) for _ in range(side * side)]
    c = model.conditions["class"].table[label]
    feed = embed.project(embed.quantizer.teacher_inputs(ids[None])[0])
    x = torch.cat([(c + embed.start)[None], feed]) + embed.position + embed.scale[scale_of]
    c = c * torch.sigmoid(c)
    for layer in model.backbone.layers:
        shift1, scale1, gate1, shift2, scale2, gate2 = (layer.ada @ c + layer.ada_bias).view(6, -1)
        x = x + gate1 * attention(layer, plain_norm(x) * (1 + scale1) + shift1, scale_of)
        h = (plain_norm(x) * (1 + scale2) + shift2) @ layer.up.T + layer.up_bias
        h = h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))) / 2
        x = x + gate2 * (h @ layer.down.T + layer.down_bias)
    shift, scale = (model.backbone.ada @ c + model.backbone.ada_bias).view(2, -1)
    return (plain_norm(x) * (1 + scale) + shift) @ head.weight.T + head.bias


def expected():
    """Log-probabilities of every element by the formulas: plain, and guided by t = 3 k / (K - 1) at scale k."""
    model = sharp()
    with torch.no_grad():
        full = torch.stack([reference(model, x, i) for i, x in enumerate(IDS)])
        null = torch.stack([reference(model, x, 3) for x in IDS])
    t = torch.tensor([0.0] + [1.5] * 4 + [3.0] * 9, dtype=torch.float64)[:, None]
    assert 2 < full.std() < 5
    return full.log_softmax(-1), ((1 + t) * full - t * null).log_softmax(-1)


def error(model):
    """How far teacher forcing, and guided decoding forced to the same ids, are from the formulas; nats."""
    plain, guided = expected()
    with torch.no_grad():
        canvas = model.canvas({"token": IDS})
        plan = model.factorization.packed(canvas)
        h = model.hidden(plan, canvas, None, model.encode(LABELS))
        packed = model.dist(h, plan, canvas)[0].log_probs()
    forced = Forced(IDS)
    generate(Target(model, LABELS, Guidance(3.0, "linear")), model.blank(3), SampleAll(), random=forced)
    stepwise = torch.stack([forced.met[e] for e in range(14)], 1)
    return max(float((packed - plain).abs().max()), float((stepwise - guided).abs().max()))


def test_forced_and_guided_decoding_are_the_papers_formulas():
    assert error(sharp()) < 1e-10


def swap(owner, parts):
    shift, scale, *rest = owner.ada.data.chunk(parts)
    owner.ada.data = torch.cat([scale, shift, *rest])


MUTANTS = {
    "shift and scale change places in a layer": lambda m, _: swap(m.backbone.layers[1], 6),
    "shift and scale change places before the head": lambda m, _: swap(m.backbone, 2),
    "no adaptive norm before the head": lambda m, _: (m.backbone.ada.data.zero_(), m.backbone.ada_bias.data.zero_()),
    "no clamp of the temperature": lambda _, patch: patch.setattr(kernels, "LOG_100", 99.0),
    "guidance a scale early": lambda _, patch: patch.setattr(
        Guidance, "weight", lambda g, done: g.scale * (done + 0.5)
    ),
    "another epsilon": lambda m, _: setattr(m.backbone, "config", replace(m.backbone.config, eps=1e-5)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_stack_is_not_the_papers(name, monkeypatch):
    model = sharp()
    MUTANTS[name](model, monkeypatch)
    assert error(model) > 1e-4


def test_fresh_weights_are_those_of_the_released_code():
    config = var.Config(MultiScaleConfig(scales=(1, 2, 4), vocab=64, dim=16), width=96, depth=3, heads=4)
    torch.manual_seed(0)
    model = var.build(config)
    std, d, layer = (3 * 96) ** -0.5, 96, model.backbone.layers[2]
    sizes = {
        1: [layer.qkv, layer.up, model.embed.project.weight, model.embed.position, model.conditions["class"].table]
    }
    sizes[6**-0.5] = [layer.out, layer.down]
    sizes[0.5] = [model.backbone.ada, layer.ada[: 2 * d], layer.ada[3 * d : 5 * d]]
    sizes[1e-5] = [layer.ada[2 * d : 3 * d], layer.ada[5 * d :]]
    sizes[0.02] = [model.heads["token"].weight]
    for size, tables in sizes.items():
        assert all(abs(float(x.detach().std()) / (std * size) - 1) < 0.1 for x in tables)
    assert all(not p.any() for name, p in model.backbone.named_parameters() if name.endswith("bias"))
    assert torch.allclose(layer.q_norm.exp(), torch.tensor(4.0)) and not model.embed.project.bias.any()
