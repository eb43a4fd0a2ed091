"""Every option of the transformer against a slow reference written out here, slot by slot and head by head, in float64.

All weights are random (norms, biases and zero-initialised gates too), and everything that enters a reference comes from
the definitions in the papers, not from the code under test.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.decoding.guess import Guess
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.layout import grid, line
from seriatim.model import Model
from seriatim.plan import OrderError, Plan, plan_of
from seriatim.view import View, full, inclusive, own_rank, two_stream

WIDTH, DEPTH, HEADS, SLOTS, BATCH, EXTRA = 16, 2, 4, 7, 2, 5
BASE = TransformerConfig(WIDTH, DEPTH, HEADS)


def randomised(config: TransformerConfig, seed: int = 0) -> Transformer:
    model = Transformer(config).double().eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.5)
    return model


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plan_with(views: View | dict[str, View], coord: Tensor | None = None) -> Plan:
    size = (views if isinstance(views, View) else next(iter(views.values()))).size
    return plan_of(views, range(size), range(size), [(0, 0)], coord=coord)


# ---- the reference ---------------------------------------------------------------------------------------------------


def norm_of(config: TransformerConfig, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Root-mean-square or layer norm of one vector."""
    if config.norm == "layer":
        x = x - x.mean()
    y = x / (x.pow(2).mean() + config.eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def turned(x: Tensor, coord: Tensor, rope: RoPE) -> Tensor:
    """Rotary embedding of one head's vector: pair (i, i + half) turns by coordinate * theta^(-2j / d of the axis)."""
    half, out, i = len(x) // 2, x.clone(), 0
    for axis, size in enumerate(rope.axes or (len(x),)):
        for j in range(size // 2):
            angle = float(coord[axis]) * rope.theta ** (-2 * j / size)
            a, b = x[i], x[i + half]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + half] = a * math.sin(angle) + b * math.cos(angle)
            i += 1
    return out


def attended(config: TransformerConfig, w: dict, h: list[Tensor], seen: Tensor, coord: Tensor) -> list[Tensor]:
    """What the heads of each slot bring together."""
    dim, groups = config.dim, config.groups
    q, k, v = [], [], []
    for s, x in enumerate(h):
        y = w["qkv"] @ x if w["qkv_bias"] is None else w["qkv"] @ x + w["qkv_bias"]
        heads = list(y.reshape(-1, dim))
        qs, ks, vs = heads[: config.heads], heads[config.heads : config.heads + groups], heads[config.heads + groups :]
        if config.qk_norm == "rms":
            rms = lambda t: t / (t.pow(2).mean() + config.eps).sqrt()  # noqa: E731
            qs, ks = [rms(t) * w["q_norm"] for t in qs], [rms(t) * w["k_norm"] for t in ks]
        if config.qk_norm == "l2":
            temperature = w["q_norm"].clamp(max=math.log(100)).exp()
            qs = [t / t.norm() * temperature[i] for i, t in enumerate(qs)]
            ks = [t / t.norm() for t in ks]
        if config.rope is not None:
            qs, ks = [turned(t, coord[s], config.rope) for t in qs], [turned(t, coord[s], config.rope) for t in ks]
        q.append(qs), k.append(ks), v.append(vs)
    out = []
    scale = 1.0 if config.qk_norm == "l2" else dim**-0.5
    for s in range(len(h)):
        keys = [t for t in range(len(h)) if seen[s, t]]
        parts = []
        for head in range(config.heads):
            group = head // (config.heads // groups)
            p = torch.stack([q[s][head] @ k[t][group] * scale for t in keys]).softmax(0)
            parts.append(sum(p[i] * v[t][group] for i, t in enumerate(keys)))
        out.append(torch.cat(parts))
    return out


def crossed(config: TransformerConfig, w: dict, x: Tensor, memory: Tensor) -> Tensor:
    """Cross-attention of one slot to a memory (places, e)."""
    dim, heads = config.dim, config.heads
    q = (w["cross_q"] @ norm_of(config, x, w["norm3"], None)).reshape(heads, dim)
    kv = (memory @ w["cross_kv"].T).reshape(len(memory), 2, heads, dim)
    parts = []
    for head in range(heads):
        p = (kv[:, 0, head] @ q[head] / dim**0.5).softmax(0)
        parts.append(p @ kv[:, 1, head])
    return w["cross_out"] @ torch.cat(parts)


def reference(model: Transformer, x: Tensor, plan: Plan, vector=None, memory=None) -> Tensor:
    """The whole transformer, row by row."""
    c, rows = model.config, []
    coord = plan.slots.coord
    for b in range(len(x)):
        xs = list(x[b])
        for i, layer in enumerate(model.layers):
            w = {name: None if p is None else p.detach() for name, p in layer._parameters.items()}
            view = plan.views[c.kinds[i if len(c.kinds) > 1 else 0]]
            seen = view.mask()[b if view.batch > 1 else 0]
            ran = torch.ones(len(xs), dtype=torch.bool) if plan.layers is None else plan.layers[i]
            seen = seen & (ran | torch.eye(len(xs), dtype=torch.bool))
            ada = [None] * len(xs)
            if vector is not None:
                per_slot = vector[b] if vector.dim() == 3 else vector[b].expand(len(xs), -1)
                ada = [(w["ada"] @ torch.nn.functional.silu(v) + w["ada_bias"]).reshape(6, -1) for v in per_slot]
            h = [norm_of(c, t, w["norm1"], w["norm1_bias"]) if i or c.first_norm else t for t in xs]
            h = [t if a is None else t * (1 + a[1]) + a[0] for t, a in zip(h, ada, strict=True)]
            brought = attended(c, w, h, seen, coord[b if len(coord) > 1 else 0])
            after = []
            for s, t in enumerate(xs):
                y = w["out"] @ brought[s] if w["out_bias"] is None else w["out"] @ brought[s] + w["out_bias"]
                t = t + (y if ada[s] is None else ada[s][2] * y)
                if memory is not None:
                    t = t + crossed(c, w, t, memory[b])
                y = norm_of(c, t, w["norm2"], w["norm2_bias"])
                y = y if ada[s] is None else y * (1 + ada[s][4]) + ada[s][3]
                y = w["up"] @ y if w["up_bias"] is None else w["up"] @ y + w["up_bias"]
                if c.activation == "swiglu":
                    gate, up = y.chunk(2)
                    y = gate / (1 + (-gate).exp()) * up
                elif c.activation == "gelu":
                    y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
                else:
                    y = y * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
                y = w["down"] @ y if w["down_bias"] is None else w["down"] @ y + w["down_bias"]
                t = t + (y if ada[s] is None else ada[s][5] * y)
                after.append(t)
            xs = [t if ran[s] else old for s, (t, old) in enumerate(zip(after, xs, strict=True))]
        weight, bias = (None if p is None else p.detach() for p in (model.norm, model.norm_bias))
        last = torch.stack([norm_of(c, t, weight, bias) if c.last_norm else t for t in xs])
        if vector is not None:
            per_slot = vector[b] if vector.dim() == 3 else vector[b].expand(len(xs), -1)
            shift, scale = (torch.nn.functional.silu(per_slot) @ model.ada.detach().T + model.ada_bias.detach()).chunk(
                2, 1
            )
            last = last * (1 + scale) + shift
        rows.append(last)
    return torch.stack(rows)


# ---- what is compared ------------------------------------------------------------------------------------------------

VARIANTS = {
    "llama": replace(BASE, rope=RoPE(50.0)),
    "gelu by its tanh approximation": replace(BASE, activation="gelu_tanh"),
    "layer norm, gelu, biases": replace(BASE, norm="layer", activation="gelu", bias=True, eps=0.1),
    "an epsilon that matters": replace(BASE, eps=0.5),
    "shared key-value heads": replace(BASE, kv_heads=2, rope=RoPE(50.0)),
    "one key-value head": replace(BASE, kv_heads=1, bias=True),
    "heads wider than the width": replace(BASE, head_dim=8, kv_heads=2, rope=RoPE(50.0)),
    "a stated hidden width": replace(BASE, hidden=11),
    "normalised queries and keys": replace(BASE, qk_norm="rms", rope=RoPE(50.0), kv_heads=2, eps=0.1),
    "unit queries and keys": replace(BASE, qk_norm="l2", kv_heads=2),
    "unit queries and keys, rotary": replace(BASE, qk_norm="l2", rope=RoPE(50.0)),
    "no norm in front": replace(BASE, first_norm=False),
    "no norm behind": replace(BASE, last_norm=False, norm="layer"),
}


def grid_coordinates(axes: int) -> Tensor:
    return torch.tensor([[(3 * s + 2 * a) % 5 + a for a in range(axes)] for s in range(SLOTS)])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("view", ["causal", "two streams", "full"])
@torch.no_grad()
def test_each_variant_equals_the_reference(name, view):
    views = {
        "causal": inclusive(range(SLOTS)),
        "two streams": two_stream([0, 0, 1, 2, 0, 1, 2], [1, 1, 1, 1, 0, 0, 0]),
        "full": full(SLOTS),
    }
    model, x = randomised(VARIANTS[name]), noise(BATCH, SLOTS, WIDTH)
    plan = plan_with(views[view])
    assert (model(x, plan) - reference(model, x, plan)).abs().max() < 1e-10


@pytest.mark.parametrize("axes", [(4,), (2, 2), (2, 4, 2)], ids=["1 axis", "2 axes", "3 axes"])
@torch.no_grad()
def test_rotary_positions_follow_explicit_coordinates(axes):
    config = replace(BASE, head_dim=sum(axes), rope=RoPE(30.0, axes))
    model, x = randomised(config), noise(BATCH, SLOTS, WIDTH)
    plan = plan_with(full(SLOTS), grid_coordinates(len(axes)))
    got = model(x, plan)
    assert (got - reference(model, x, plan)).abs().max() < 1e-10
    moved = plan_with(full(SLOTS), grid_coordinates(len(axes)).flip(0))
    assert (got - model(x, moved)).abs().max() > 1e-3
    shifted = plan_with(full(SLOTS), grid_coordinates(len(axes)) + 7)
    assert (got - model(x, shifted)).abs().max() < 1e-10  # only differences of coordinates count


@pytest.mark.parametrize("per", ["sample", "slot"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@torch.no_grad()
def test_adaptive_norms_per_sample_and_per_slot(per, norm):
    model, x = randomised(replace(BASE, vector=EXTRA, norm=norm)), noise(BATCH, SLOTS, WIDTH)
    vector = noise(BATCH, EXTRA, seed=2) if per == "sample" else noise(BATCH, SLOTS, EXTRA, seed=2)
    plan = plan_with(inclusive(range(SLOTS)))
    assert (model(x, plan, None, vector) - reference(model, x, plan, vector)).abs().max() < 1e-10


@torch.no_grad()
def test_a_fresh_adaptive_layer_is_the_identity():
    """AdaLN-zero: gates start at zero, so nothing but the last norm is left (Peebles & Xie 2022, section 3)."""
    model, x = Transformer(replace(BASE, vector=EXTRA)).double(), noise(BATCH, SLOTS, WIDTH)
    got = model(x, plan_with(full(SLOTS)), None, noise(BATCH, EXTRA))
    assert torch.allclose(got, torch.nn.functional.rms_norm(x, (WIDTH,), None, BASE.eps), atol=1e-12)


@pytest.mark.parametrize("rows", [BATCH, 1], ids=["a memory a row", "one memory for all"])
@torch.no_grad()
def test_cross_attention_to_a_memory(rows):
    model, x = randomised(replace(BASE, memory=EXTRA, rope=RoPE(50.0))), noise(BATCH, SLOTS, WIDTH)
    memory = noise(rows, 4, EXTRA, seed=3)
    plan = plan_with(inclusive(range(SLOTS)))
    want = reference(model, x, plan, memory=memory.expand(BATCH, -1, -1))
    assert (model(x, plan, None, None, memory) - want).abs().max() < 1e-10


@torch.no_grad()
def test_cross_attention_follows_another_memory_with_the_same_cache():
    """Keys and values of a memory are remembered, but never those of another one."""
    model, plan = randomised(replace(BASE, memory=EXTRA)), plan_with(full(SLOTS))
    x, cache = noise(1, SLOTS, WIDTH), model.new_cache(1)
    for seed in (3, 4, 3):
        memory = noise(1, 4, EXTRA, seed=seed)
        for _ in range(2):
            got = model(x, plan, cache, None, memory)
            cache.commit(0, plan)
            assert (got - reference(model, x, plan, memory=memory)).abs().max() < 1e-10


@torch.no_grad()
def test_kinds_of_layer_have_views_of_their_own():
    config = replace(BASE, depth=3, kinds=("near", "far", "near"), rope=RoPE(50.0))
    model, x = randomised(config), noise(BATCH, SLOTS, WIDTH)
    views = {"near": inclusive(range(SLOTS)).narrow(window=2), "far": inclusive([0, 0, 1, 1, 2, 2, 3])}
    plan = plan_with(views)
    got = model(x, plan)
    assert (got - reference(model, x, plan)).abs().max() < 1e-10
    swapped = plan_with({"near": views["far"], "far": views["near"]})
    assert (got - model(x, swapped)).abs().max() > 1e-3


@torch.no_grad()
def test_labels_that_differ_by_row():
    rank = torch.stack([torch.randperm(SLOTS, generator=torch.Generator().manual_seed(s)) for s in range(BATCH)])
    model, x = randomised(replace(BASE, kv_heads=2)), noise(BATCH, SLOTS, WIDTH)
    plan = plan_with(inclusive(rank))
    assert (model(x, plan) - reference(model, x, plan)).abs().max() < 1e-10


@pytest.mark.parametrize("groups", [4, 2], ids=["own keys", "shared keys"])
def test_slots_skip_layers(groups):
    """A slot that skips a layer keeps what it has, and is not seen there; a layer that nobody runs is left out. So do
    gradients, also those of slots that see nobody."""
    config = replace(BASE, depth=4, kv_heads=groups, rope=RoPE(50.0))
    model, x = randomised(config), noise(BATCH, SLOTS, WIDTH).requires_grad_()
    layers = torch.rand(4, SLOTS, generator=torch.Generator().manual_seed(5)) < 0.6
    layers[2], layers[1, :3] = False, False
    plan = replace(plan_with(inclusive(range(SLOTS))), layers=layers)
    got, want = model(x, plan), reference(model, x, plan)
    assert (got - want).abs().max() < 1e-10
    weight = noise(BATCH, SLOTS, WIDTH, seed=6)
    grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want)]
    assert (grads[0] - grads[1]).abs().max() < 1e-10


@torch.no_grad()
def test_padding_changes_nothing():
    """Slots in lane -1, whatever they carry, leave the others alone."""
    model, x = randomised(VARIANTS["llama"]), noise(BATCH, SLOTS, WIDTH)
    lane = [0, 0, -1, 0, 0, -1, 0]
    live = [s for s in range(SLOTS) if lane[s] == 0]
    view, coord = inclusive(range(SLOTS)), torch.arange(SLOTS)[:, None]
    padded = model(x, plan_with(view.narrow(lane=lane), coord))
    alone = model(x[:, live], plan_with(inclusive(live), coord[live]))
    assert (padded[:, live] - alone).abs().max() < 1e-12


@torch.no_grad()
def test_learned_positions_by_axis_and_along_a_line():
    """Each axis has a table; a line takes slices of it in decoding, and the same rows in training."""
    embed = TokenEmbed(3, WIDTH, positions=(2, 3)).double()
    layout = grid(2, 3)
    plan = plan_of(full(6), range(6), range(6), [(0, 0)], coord=layout.coord)
    model = Model(layout, Line(1), embed, Transformer(BASE), CategoricalHead(WIDTH, 3))
    ids = torch.tensor([[0, 1, 2, 2, 1, 0]])
    pairs = zip(ids[0], layout.coord, strict=True)
    want = [embed.table[i] + embed.positions[0][r] + embed.positions[1][c] for i, (r, c) in pairs]
    assert torch.equal(embed(model.canvas({"token": ids}), plan)[0], torch.stack(want))

    flat = TokenEmbed(3, WIDTH, positions=(6,)).double()
    model = Model(line(6), Line(1), flat, Transformer(BASE), CategoricalHead(WIDTH, 3))
    packed = flat(model.canvas({"token": ids}), model.factorization.packed(model.canvas({"token": ids})))
    for known in range(6):
        canvas = model.canvas({"token": ids}, known)
        step = model.factorization.step(canvas, None, max(known - 1, 0))
        assert torch.equal(flat(canvas, step)[0], packed[0, max(known - 1, 0) : known + 1])


def test_gradients_reach_every_parameter():
    """Of a model with every option that has parameters, at random weights, and its input, vector and memory."""
    config = replace(
        BASE, norm="layer", activation="gelu", bias=True, qk_norm="l2", vector=EXTRA, memory=EXTRA, rope=RoPE(50.0)
    )
    for c in (config, replace(config, activation="swiglu", qk_norm="rms"), replace(BASE, norm="layer", bias=True)):
        model = randomised(c)
        x = noise(BATCH, SLOTS, WIDTH).requires_grad_()
        vector = noise(BATCH, EXTRA).requires_grad_() if c.vector else None
        memory = noise(BATCH, 3, EXTRA).requires_grad_() if c.memory else None
        out = model(x, plan_with(inclusive(range(SLOTS))), None, vector, memory)
        (out * noise(BATCH, SLOTS, WIDTH, seed=9)).sum().backward()
        leaves = {**dict(model.named_parameters()), "x": x, "vector": vector, "memory": memory}
        for name, leaf in leaves.items():
            if leaf is None or name.endswith("qkv_bias"):
                continue
            assert leaf.grad is not None and bool((leaf.grad != 0).any()), name
        for name, p in model.named_parameters():  # a bias on all keys shifts every score alike, and is rightly idle
            if name.endswith("qkv_bias"):
                keys = c.heads * c.dim
                assert bool((p.grad[:keys] != 0).all()) and bool((p.grad[-c.groups * c.dim :] != 0).all())


@torch.no_grad()
def test_weights_are_never_stale():
    """Parameters that are replaced, moved or computed from others are the ones that are used."""
    model, x, plan = randomised(VARIANTS["llama"]), noise(1, SLOTS, WIDTH), plan_with(full(SLOTS))
    other = randomised(VARIANTS["llama"], seed=8)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(model(x, plan), other(x, plan))
    model.layers[0].qkv = torch.nn.Parameter(torch.zeros_like(model.layers[0].qkv))
    before = model(x, plan)
    assert (before - reference(model, x, plan)).abs().max() < 1e-10
    swapped = torch.func.functional_call(model, dict(other.named_parameters()), (x, plan))
    assert torch.equal(swapped, other(x, plan))

    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(model.layers[1], "out", Doubled())
    doubled = model(x, plan)
    torch.nn.utils.parametrize.remove_parametrizations(model.layers[1], "out", leave_parametrized=True)
    assert torch.equal(doubled, model(x, plan)) and not torch.equal(doubled, before)


def test_decoding_first_leaves_training_possible():
    """Tables and masks that a decoding step makes are fit for a later forward with gradients."""
    model = Model(line(6), Line(1), TokenEmbed(3, WIDTH), Transformer(VARIANTS["llama"]), CategoricalHead(WIDTH, 3))
    canvas = model.canvas({"token": torch.zeros(1, 6, dtype=torch.long)}, 3)
    guess = Guess(torch.tensor([[1, 2]]), (-1, -1))
    with torch.inference_mode():
        model.hidden(model.factorization.step(canvas, guess, 0), canvas, model.new_cache(1), None, guess)
    model.hidden(model.factorization.step(canvas, guess, 0), canvas, None, None, guess).sum().backward()
    assert model.backbone.layers[0].qkv.grad is not None


@pytest.mark.parametrize("order", ["a line", "two streams"])
def test_training_forwards_are_one_graph(order):
    """What `torch.compile(fullgraph=True)` captures, without compiling it: no break, the same for every batch."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = randomised(VARIANTS["shared key-value heads"])
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    canvases = Model(line(SLOTS), Line(1), TokenEmbed(3, WIDTH), model, CategoricalHead(WIDTH, 3))
    for seed in range(3):
        x = noise(BATCH, SLOTS, WIDTH, seed=seed).requires_grad_()
        if order == "a line":
            plan = canvases.factorization.packed(canvases.blank(BATCH))
        else:
            plan = plan_with(two_stream([0, 0, 1, seed, 0, 1, seed], [1, 1, 1, 1, 0, 0, 0]))
        y = compiled(x, plan)
        assert torch.allclose(y, model(x, plan))
        y.sum().backward()
        assert x.grad is not None
    assert len(graphs) == 1


def test_gradients_through_a_step_are_those_of_one_pass_with_the_past_held_still():
    """Over a cache: full gradients through what is computed now, none into what is remembered."""
    model, x = randomised(VARIANTS["shared key-value heads"]), noise(1, SLOTS, WIDTH)
    cache, first, then = model.new_cache(1), plan_with(inclusive(range(4))), plan_with(inclusive(range(4, SLOTS)))
    with torch.no_grad():
        model(x[:, :4], first, cache)
    cache.commit(4, first)
    late = x[:, 4:].clone().requires_grad_()
    coord = torch.arange(4, SLOTS)[None, :, None]
    then = replace(then, slots=replace(then.slots, coord=coord))
    (got,) = torch.autograd.grad((model(late, then, cache) * noise(1, 3, WIDTH, seed=4)).sum(), late)
    whole = x.clone().requires_grad_()
    out = model(whole, plan_with(inclusive(range(SLOTS))))[:, 4:]
    (want,) = torch.autograd.grad((out * noise(1, 3, WIDTH, seed=4)).sum(), whole)
    assert (got - want[:, 4:]).abs().max() < 1e-10


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"heads": 3}, "does not divide into 3 heads"),
        ({"kv_heads": 3}, "cannot share 3 key-value heads"),
        ({"norm": "batch"}, "norm is one of"),
        ({"activation": "sine"}, "activation is one of"),
        ({"qk_norm": "l1"}, "qk_norm is one of"),
        ({"kinds": ("a", "b", "c")}, "one for each of 2 layers"),
        ({"depth": 0}, "depth is at least 1"),
        ({"dropout": 1.0}, "dropout is a share"),
    ],
)
def test_impossible_configurations_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        replace(BASE, **wrong)


def test_a_line_has_one_coordinate():
    model = Transformer(replace(BASE, rope=RoPE(axes=(2, 2))))
    canvas = Model(line(4), Line(1), TokenEmbed(3, WIDTH), model, CategoricalHead(WIDTH, 3)).blank(1)
    with pytest.raises(ValueError, match="over 2 axes met slots along a line"):
        model(torch.zeros(1, 1, WIDTH), Line(1).step(canvas, None, 0))


def test_inputs_that_do_not_fit_are_refused():
    x, plan = torch.zeros(1, SLOTS, WIDTH), plan_with(own_rank(range(SLOTS)))
    model = Transformer(BASE)
    with pytest.raises(ValueError, match=r"needs \(batch, 7, 16\) vectors, got \(1, 6, 16\)"):
        model(x[:, 1:], plan)
    with pytest.raises(ValueError, match=r"got \(1, 7, 15\)"):
        model(x[..., 1:], plan)
    with pytest.raises(ValueError, match="takes no vector"):
        model(x, plan, None, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="attends to no memory"):
        model(x, plan, None, None, torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="needs a conditioning vector"):
        Transformer(replace(BASE, vector=4))(x, plan)
    with pytest.raises(ValueError, match="attends to a memory; pass one"):
        Transformer(replace(BASE, memory=4))(x, plan)
    with pytest.raises(ValueError, match="memory of 2 rows does not fit a batch of 3"):
        Transformer(replace(BASE, memory=4))(x.expand(3, -1, -1), plan, None, None, torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="names 3 layers, the backbone has 2"):
        model(x, replace(plan, layers=torch.ones(3, SLOTS, dtype=torch.bool)))
    with pytest.raises(OrderError, match="layers of kind 'near', the plan has views all"):
        Transformer(replace(BASE, kinds=("near",)))(x, plan)


def test_norms_that_are_left_out_have_no_weights_and_a_vector_drives_the_first():
    bare = Transformer(replace(BASE, first_norm=False, last_norm=False, norm="layer"))
    names = set(dict(bare.named_parameters()))
    assert not names & {"norm", "norm_bias", "layers.0.norm1", "layers.0.norm1_bias"}
    assert {"layers.1.norm1", "layers.1.norm1_bias", "layers.0.norm2"} <= names
    driven = [Transformer(replace(BASE, vector=4, norm="layer", last_norm=last)) for last in (True, False)]
    more, fewer = (set(dict(one.named_parameters())) for one in driven)
    assert fewer < more and all("." not in name for name in more - fewer), "no norm after the last layer"
    with pytest.raises(ValueError, match="drives all norms"):
        replace(BASE, vector=4, first_norm=False)


def test_positions_beyond_the_table_are_named():
    model = Model(line(6), Line(1), TokenEmbed(3, WIDTH, positions=(4,)), Transformer(BASE), CategoricalHead(WIDTH, 3))
    with pytest.raises(ValueError, match="coordinate 5 on axis 0, but there are only 4 positions"):
        model.losses(model.canvas({"token": torch.zeros(1, 6, dtype=torch.long)}))
    two = Model(line(6), Line(1), TokenEmbed(3, WIDTH, positions=(6, 6)), Transformer(BASE), CategoricalHead(WIDTH, 3))
    with pytest.raises(ValueError, match="positions have 2 axes or more, the coordinates of these slots 1"):
        two.losses(two.canvas({"token": torch.zeros(1, 6, dtype=torch.long)}))
