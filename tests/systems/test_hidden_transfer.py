"""Hidden transfer: what a pseudo state is, whom it sees, that nothing of it stays, and what its maps learn."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seriatim.backbones.norm import normalise
from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.decoding.guess import Guess, Transfer, spawning
from seriatim.decoding.judge import Look
from seriatim.decoding.loop import decode
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.templates import Template
from seriatim.decoding.transfer import TransferredStates
from seriatim.decoding.verify import Walk
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.laws.drafts import untrained
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import OrderError
from seriatim.posttraining.drafting import Base, load_part, save_part
from seriatim.posttraining.states import States
from seriatim.posttraining.transfer import HiddenTransfer, TransferConfig, similarities, transferred
from seriatim.random import Generator, Keyed
from seriatim.systems.decoders import Decoding
from seriatim.systems.system import Sampling
from seriatim.systems.text.next_token import Config, NextToken

torch.set_num_threads(1)
VOCAB, WIDTH, DEPTH, PROMPT = 23, 32, 4, [3, 1, 4, 1, 5]
TREE = (-1, -1, 0, 0, 1, 2)
AT = (1, 2, 2)


def maps(at: Sequence[int] = AT, dtype: torch.dtype = torch.float64, std: float = 0.3) -> tuple[Transfer, ...]:
    g = torch.Generator().manual_seed(7)
    return tuple(Transfer(i, (std * torch.randn(WIDTH, WIDTH, generator=g)).to(dtype)) for i in at)


def model(prefix: int = 1, windows: dict[str, int] | None = None, **changes: Any) -> Model:
    kinds = ("all",) if windows is None else ("all", "near") * (DEPTH // 2)
    backbone = Transformer(TransformerConfig(WIDTH, DEPTH, 4, rope=RoPE(), kinds=kinds, **changes))
    order = Line(prefix, windows or {})
    return randomise(Model(line(96), order, TokenEmbed(VOCAB, WIDTH), backbone, CategoricalHead(WIDTH, VOCAB)), 1, 0.35)


MODELS = {
    "plain": {}, "shared keys": {"kv_heads": 2}, "no learned start": {"prefix": 0}, "windows": {"windows": {"near": 4}},
    "capped scores": {"softcap": 3.0}, "norms behind": {"place": "both", "norm": "layer", "activation": "gelu"},
}  # fmt: skip


def canvas_of(of: Model, rows: Sequence[Sequence[int]], room: int = 20) -> Any:
    known = [len(r) for r in rows]
    value = torch.zeros(len(rows), max(known) + room, dtype=torch.long)
    for v, row in zip(value, rows, strict=True):
        v[: len(row)] = torch.tensor(row)
    first = known[0] if len(set(known)) == 1 else torch.tensor(known)
    return of.canvas({"token": value}, first, layout=line(value.shape[1]))


def looked(of: Model, rows: Sequence[Sequence[int]], guess: Guess, cached: int | None = None) -> Any:
    """Rows of a forward that looks at a guess, with the text in the cache (None: without a cache)."""
    target, canvas = Target(of, cached=cached is not None), canvas_of(of, rows)
    with torch.no_grad():
        if cached:
            target.prefill(canvas, chunk=cached, shared=True)
        if of.factorization.windows:  # type: ignore[union-attr]
            target._follow(canvas)
            target._turn = 1  # draft trees have no labels in windows, by which the first forward is checked
        plan = target.plan(canvas, guess)
        assert plan is not None
        return target.forward(plan, canvas, guess)


def draft(rows: int = 1, spawn: tuple[Transfer, ...] = (), parent: tuple[int, ...] = TREE) -> Guess:
    g = torch.Generator().manual_seed(2)
    return Guess(torch.randint(VOCAB, (rows, len(parent)), generator=g), parent, spawn=spawn)


# ---- the forward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[PROMPT], [PROMPT, [2, 2]], [[9, 8, 7], [1, 2, 3]]], ids=["one", "ragged", "two"])
@pytest.mark.parametrize("cached", [None, 2])
@pytest.mark.parametrize("name", MODELS)
def test_real_rows_are_the_same_with_and_without_pseudo_states(name, cached, rows):
    if name == "windows" and len({len(r) for r in rows}) > 1:
        pytest.skip("draft trees of rows of different lengths have no labels in windows")
    of = model(**MODELS[name]).float()
    for parent in (TREE, (), (-1, 0, 1)):
        plain = looked(of, rows, draft(len(rows), parent=parent), cached)
        ours = looked(of, rows, draft(len(rows), maps(dtype=torch.float32), parent), cached)
        assert plain.spawned is None and ours.spawned.shape == (len(rows), 3 * (len(parent) + 1), WIDTH)
        assert torch.allclose(ours.hidden, plain.hidden, atol=1e-5)
        assert torch.allclose(ours.dist.logits, plain.dist.logits, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_pseudo_states_of_a_tree_are_those_of_a_forward_for_each_node(name):
    of, guess = model(**MODELS[name]), draft(1, maps())
    rows = looked(of, [PROMPT], guess, 2)
    together = rows.spawned.unflatten(1, (3, -1))[0]  # (k, nodes and the last known, d)
    for node in range(-1, guess.size):
        path, at = [], node
        while at >= 0:
            path.append(int(guess.value[0, at]))
            at = TREE[at]
        alone = looked(of, [PROMPT + path[::-1]], Guess(torch.zeros(1, 0, dtype=torch.long), spawn=maps()), 2)
        assert torch.allclose(together[:, node + 1], alone.spawned[0], atol=1e-10)


def test_a_ragged_batch_has_the_pseudo_states_of_its_rows_alone():
    of, texts = model(), [PROMPT, [2, 2], [9, 1, 1, 7, 3, 3, 0]]
    guess = draft(3, maps())
    guess.value[1, 3:] = -1  # a row with fewer nodes
    together = looked(of, texts, guess)
    for r, text in enumerate(texts):
        alone = looked(of, [text], Guess(guess.value[r : r + 1].clamp(min=0), TREE, spawn=maps()))
        there = torch.cat([torch.tensor([True]), guess.value[r] >= 0]).repeat(3)
        assert torch.allclose(together.spawned[r, there], alone.spawned[0, there], atol=1e-10)


def test_with_maps_of_zeros_only_what_is_seen_matters_not_whose_state_was_moved():
    """Another source, in the same place, is no difference then; with other maps it is."""
    of, guess = model(), draft(1, maps(std=0.0))

    def states(std: float, shift: int) -> Tensor:
        guess.spawn = maps(std=std)
        target, canvas = Target(of, cached=False), canvas_of(of, [PROMPT])
        plan = target.plan(canvas, guess)
        for spawn in plan.spawns:
            object.__setattr__(spawn, "source", spawn.source.roll(shift, 1))
        with torch.no_grad():
            return target.forward(plan, canvas, guess).spawned

    assert torch.equal(states(0.0, 0), states(0.0, 3))
    assert not torch.allclose(states(0.3, 0), states(0.3, 3), atol=1e-3)
    other = guess.value.clone()
    other[0, 0] += 1  # a token that some of them see: attention brings it there
    before = states(0.0, 0).unflatten(1, (3, -1))
    guess.value = other % VOCAB
    changed = (states(0.0, 0).unflatten(1, (3, -1)) - before).abs().amax((0, 1, 3)) > 1e-9
    below = [n for n in range(len(TREE)) if n == 0 or TREE[n] == 0 or (TREE[n] >= 0 and TREE[TREE[n]] == 0)]
    assert (changed.nonzero()[:, 0] - 1).tolist() == below


def test_a_state_that_is_moved_behind_the_last_layer_is_a_medusa_head_without_its_block():
    """No layer is left in which anything could be seen: the model's norm and head read W h, h in front of the norm."""
    of, guess = model(norm="layer"), draft(1, maps((DEPTH,) * 3))
    rows = looked(of, [PROMPT], guess)
    target, canvas, look = Target(of, cached=False), canvas_of(of, [PROMPT]), Look(DEPTH - 1)
    plan = target.plan(canvas, draft()).along(look)
    with torch.no_grad():
        target.forward(plan, canvas, draft())
    h = look.states[:, -len(TREE) - 1 :]
    for j, (_, matrix) in enumerate(maps((DEPTH,) * 3)):
        b: Any = of.backbone
        want = normalise("layer", h @ matrix.T, b.norm, b.norm_bias, b.config.eps)
        assert torch.allclose(rows.spawned.unflatten(1, (3, -1))[:, j], want, atol=1e-10)


def test_layers_below_the_maps_compute_no_more_than_the_draft():
    of, seen = model(), []
    layer = Transformer._layer

    def counted(self, i, w, x, sight, context):
        seen.append(x.shape[1])
        return layer(self, i, w, x, sight, context)

    of.backbone._layer = counted.__get__(of.backbone)  # type: ignore[method-assign]
    rows = looked(of, [PROMPT], draft(1, maps((1, 2, 2))), 2)
    n = len(TREE) + 1
    assert seen[-DEPTH:] == [n, 2 * n, 4 * n, 4 * n]
    assert rows.hidden.shape[1] == n


def test_a_spawning_tree_lists_chains_behind_its_nodes():
    assert spawning((-1, 0), 2) == (-1, 0, -1, 0, 1, 2, 3, 4)
    assert spawning((), 3) == (-1, 0, 1)
    assert spawning((-1, -1), 0) == (-1, -1)


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def system() -> NextToken:
    made = NextToken(Config(length=160, vocab=VOCAB, width=WIDTH, depth=DEPTH, heads=2), SimpleNamespace(special={}))
    randomise(made.model, seed=2, std=0.6)
    made.__dict__["tokenizer"] = None
    return made.eval().requires_grad_(False)


def proposer(of: Any, at: Sequence[int] = AT, template: Template | None = None, seed: int = 7) -> TransferredStates:
    part, base = untrained(HiddenTransfer, TransferConfig(heads=len(at), at=tuple(at)), of, seed)
    return TransferredStates(part, base, template or Template((-1, -1, 0, 2), (0, 1, 0, 0)))


@pytest.mark.parametrize("rows", [[PROMPT], [PROMPT, [2], [7, 7, 7]]], ids=["one", "ragged"])
def test_what_is_remembered_is_what_plain_decoding_remembers(system, rows):
    """Keys and values of pseudo states are forgotten: the cache holds what it held without them, and no more."""
    canvas, target = system._begun(rows, 40), system.target(None, Sampling())
    steps = list(decode(target, canvas, Walk(), proposer(system), Keyed(3)))
    assert sum(int(torch.as_tensor(s.accepted).sum()) for s in steps) > 0
    plain, other = system._begun(rows, 40), system.target(None, Sampling())
    list(decode(other, plain, SampleAll(), None, Keyed(3)))
    assert torch.equal(canvas.value["token"], plain.value["token"])
    ours, theirs = target.cache, other.cache
    assert not ours.skips and ours.pending == 0
    lengths = [torch.as_tensor(c.length).expand(len(rows)).tolist() for c in (ours, theirs)]
    for r, (n, m) in enumerate(zip(*lengths, strict=True)):
        held = min(n, m)
        assert held >= len(rows[r]) + 38  # but for the last tokens, which nobody went on from
        assert torch.allclose(ours.buffer[:, :, r, :, :held], theirs.buffer[:, :, r, :, :held], atol=1e-10)


def test_a_forward_counts_as_many_slots_as_it_computes(system):
    canvas = system._begun([PROMPT], 60)
    steps = list(decode(system.target(None, Sampling()), canvas, Walk(), proposer(system), Keyed(3)))
    assert [s.slots for s in steps[:2]] == [len(PROMPT) + 1, 1 * (1 + 3)]  # the prompt spawns nothing, then one token
    full = [s.slots for s in steps if s.drafted == 4]
    assert full and all(n == (4 + 1) * (1 + 3) for n in full[:-3])
    assert steps[-1].slots <= 2  # no draft would follow


def test_wherever_a_path_ends_its_draft_is_ready(system):
    """After every step the next draft is that of the pseudo states of a fresh forward over the text so far."""
    drafter = proposer(system, template=Template((-1, -1, -1, 0, 1, 2, 3), (0, 1, 2, 0, 0, 0, 0)))
    canvas, target = system._begun([PROMPT], 70), system.target(None, Sampling())
    ends = set()
    for step in decode(target, canvas, Walk(), drafter, Keyed(3)):
        known = canvas.length
        if drafter._state is None:
            continue
        ends.add(step.accepted)
        ids = canvas.value["token"][:, : known - 1]
        fresh = transferred(system.model, ids, drafter.spawn, known - 2)[1]
        assert torch.allclose(drafter._state, fresh[:, 0], atol=1e-10)
    assert len(ends) >= 3


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_texts_are_those_of_plain_decoding_string_for_string(system, temperature):
    """Prompts of different lengths, several samples of one, filters, stop ids."""
    settings: dict[str, Any] = {"max_new_tokens": 40, "temperature": temperature, "top_k": 9, "seed": 4, "stop": (5,)}
    for prompt, n in (([PROMPT, [2], [7, 7, 7]], 1), (PROMPT, 3), (PROMPT, 1)):
        ours = system.generate(prompt, Decoding(Walk((5,)), proposer(system)), n=n, **settings)
        plain = system.generate(prompt, n=n, **settings)
        for a, b in zip(*([x] if not isinstance(x, list) else x for x in (ours, plain)), strict=True):
            assert a.ids == b.ids


@pytest.mark.slow
def test_five_hundred_tokens_of_a_trained_model_are_the_same_strings():
    import seriatim

    base = seriatim.load("zoo:text-base", dtype=torch.float32)
    part, seen = HiddenTransfer(TransferConfig(), Base(base)), Base(base)
    for temperature in (0.0, 0.8):
        drafter = TransferredStates(part, seen, Template((-1, -1, 0), (0, 1, 0)))
        settings: dict[str, Any] = {"max_new_tokens": 500, "temperature": temperature, "seed": 1, "stop": ()}
        ours = base.generate("def read(path):", Decoding(Walk(), drafter), **settings)
        assert ours.ids == base.generate("def read(path):", **settings).ids and ours.accepted > 20


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_meets_the_states_that_decoding_meets(system):
    """Each place of one packed forward, beside a decoding forward that ends there; a run of places beside all."""
    of, spawn = system.model, maps()
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    real, packed = transferred(of, ids, spawn, 0)
    assert torch.allclose(real, system.states(ids), atol=1e-10)
    for t in range(12):
        rows = looked(of, ids[:, : t + 1].tolist(), Guess(torch.zeros(2, 0, dtype=torch.long), spawn=spawn), 3)
        assert torch.allclose(rows.spawned, packed[:, t], atol=1e-10)
    assert torch.allclose(transferred(of, ids[:, :9], spawn, 4)[1], packed[:, 4:9], atol=1e-10)


def test_the_loss_is_the_divergence_from_the_bases_own_laws_and_moves_the_maps_alone(system):
    part, base = HiddenTransfer(TransferConfig(heads=2, at=(1, 3), places=None), Base(system)), Base(system)
    part.double()
    ids = torch.randint(VOCAB, (3, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        part.maps += 0.1 * torch.randn(part.maps.shape, dtype=torch.float64)
        h = system.states(ids)
        law = torch.softmax(base.logits(h), -1)
        entropy = -(law * law.log()).sum(-1)
    total, count, _ = part.loss(base, h, ids, Generator(0))
    x, want, n = part.reads(base, h, ids), torch.zeros((), dtype=torch.float64), 0
    for j in (1, 2):  # the state of t that stands for t + j, beside what the base says with t + j known
        for t in range(10 - 1 - j):  # token t + j + 1 is still of the text
            guess = torch.log_softmax(base.logits(x[:, t, j - 1]), -1)
            want = want + F.kl_div(guess, law[:, t + j], reduction="none").sum() + entropy[:, t + j].sum()
            n += 3
    assert torch.allclose(total, want, atol=1e-9) and float(count) == n
    total.backward()
    assert part.maps.grad is not None and bool((part.maps.grad.abs().amax((1, 2)) > 0).all())
    assert [name for name, p in part.named_parameters() if p.requires_grad] == ["maps"]
    assert all(p.grad is None for p in system.parameters())


def test_a_run_of_places_is_an_unbiased_look_at_all(system):
    part, base = HiddenTransfer(TransferConfig(heads=2, at=(1, 3), places=4), Base(system)).double(), Base(system)
    ids = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        h = system.states(ids)
        some = [part.loss(base, h, ids, Generator(seed)) for seed in range(40)]
        counts = {float(count) for _, count, _ in some}
        assert len(counts) == 1 and len({round(float(total), 6) for total, _, _ in some}) > 8
        known = system.model.factorization._shapes
        assert not any(key[-1] == 2 for key in known if len(key) == 4)  # the model remembers no shape of training


def test_maps_learn(system):
    """On texts of the model's own: the loss falls, and first choices are the text's more often."""
    base = Base(system)
    texts = system.generate([[i] for i in range(8)], max_new_tokens=15, temperature=0.0, stop=())
    ids = torch.tensor([[i, *g.ids] for i, g in enumerate(texts)])
    data = States(ids, system.states(ids).bfloat16())
    part = HiddenTransfer(TransferConfig(heads=2, at=(1, 2), places=None), base).double()
    learner, optimizer = part.learner(base), torch.optim.Adam(part.parameters(), 5e-3)
    with torch.no_grad():
        before = learner.validate(data)
    for step in range(20):
        total, count = learner(data.take(torch.arange(len(ids))), Generator(step), step, 20)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    with torch.no_grad():
        after = learner.validate(data)
    assert after["loss"] < before["loss"] - 0.3
    assert after["top1_1"] > before["top1_1"] + 0.1 and after["top1_2"] > before["top1_2"] + 0.1


def test_similarities_begin_as_those_of_moved_states_and_end_as_those_of_the_last_layer(system):
    part, base = HiddenTransfer(TransferConfig(heads=2, at=(1, 2)), Base(system)).double(), Base(system)
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    found = similarities(part, base, ids)
    assert [list(f) for f in found] == [[1, 2, 3, 4], [2, 3, 4]]
    for j, layer in enumerate((1, 2)):  # the maps are the identity: at first a state beside one further on
        look = Look(layer - 1)
        system.states(ids, look)
        h = look.states[:, -12:]
        first = F.cosine_similarity(h[:, : -j - 1], h[:, j + 1 :], -1).mean()
        assert found[j][layer] == pytest.approx(float(first), abs=1e-5)


# ---- files and mistakes ----------------------------------------------------------------------------------------------


def test_maps_are_kept_with_the_fingerprint_of_their_base(system, tmp_path):
    part, base = untrained(HiddenTransfer, TransferConfig(heads=2, at=(1, 3)), system)
    save_part(part, base, tmp_path)
    again = load_part(tmp_path, base, HiddenTransfer)
    assert again.layers == (1, 3) and torch.equal(again.maps, part.maps)
    other = NextToken(system.config, SimpleNamespace(special={}))
    randomise(other.model, 5)
    with pytest.raises(ValueError, match="was trained for"):
        load_part(tmp_path, Base(other), HiddenTransfer)


def test_layers_are_chosen_evenly_where_none_are_named():
    assert TransferConfig().layers(8) == (4, 5, 6)
    assert TransferConfig(heads=2).layers(12) == (6, 9)
    assert TransferConfig(heads=1).layers(30) == (15,)
    assert TransferConfig(heads=1, at=3).layers(4) == (3,)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [(2, 1), (1,), (1, 5), (-1, 2)])
def test_layers_that_do_not_fit_are_refused(system, at):
    with pytest.raises(ValueError, match="names a layer for each of 2 states"):
        HiddenTransfer(TransferConfig(heads=2, at=at), Base(system))


def test_mistakes_are_named(system):
    with pytest.raises(ValueError, match="at least 1 token is looked ahead"):
        TransferConfig(heads=0)
    with pytest.raises(ValueError, match="decay lies above 0"):
        TransferConfig(decay=0.0)
    of = model()
    with pytest.raises(OrderError, match="in front of layers 0 to 4"):
        looked(of, [PROMPT], draft(1, maps((1, 5, 5))))
    with pytest.raises(OrderError, match="in their order"):
        looked(of, [PROMPT], draft(1, maps((2, 1, 2))))
    target, canvas, guess = Target(of), canvas_of(of, [PROMPT]), draft(1, maps())
    plan = target.plan(canvas, guess)
    with pytest.raises(OrderError, match="skips no layers"):
        target.forward(plan.along(Look(0)), canvas, guess)


def test_a_model_of_states_is_refused_with_the_reason():
    from seriatim.backbones.mamba import Mamba, MambaConfig

    backbone = Mamba(MambaConfig(WIDTH, 2, 4))
    of = Model(line(32), Line(1), TokenEmbed(VOCAB, WIDTH), backbone, CategoricalHead(WIDTH, VOCAB))
    base = Base(SimpleNamespace(model=of, meta=SimpleNamespace(key="a state-space model")))
    with pytest.raises(ValueError, match="a state cannot be moved ahead in a state-space model"):
        HiddenTransfer(TransferConfig(), base)
    with pytest.raises(OrderError, match="skip layers"):
        looked(of, [PROMPT], draft(1, maps((1, 1, 1), torch.float32)))
