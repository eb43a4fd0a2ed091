"""Probe `hybrid-vla` (Liu et al. 2025, arXiv 2503.10631): one backbone denoises an action and then writes it as ids.

An instruction is given; a pose (a chunk of action vectors) is denoised in place, all of it at once, behind the
instruction; behind the decided pose its ids are written one by one. The noise is seen by nobody but the pose itself.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.decoding.kinds import PerKind
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.solver import SolverStep
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed, VectorEmbed
from seriatim.embed_kinds import ByKind
from seriatim.factorization.base import Factorization
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.in_place import Cosine, Denoised, InPlaceHead, Straight, noised, pure_noise
from seriatim.laws.case import randomise
from seriatim.layout import Layout, Segment, line
from seriatim.model import Model, by_kind, pick_slots
from seriatim.plan import LEARNED, NOISE, VALUE, OrderError, plan_of
from seriatim.random import Forced, Key, Keyed
from seriatim.view import INF, timed

WORDS, BINS, WIDTH, TEXT, POSES, DIM, IDS = 4, 3, 16, 3, 2, 2, 3

# ---- the composition -------------------------------------------------------------------------------------------------


class PoseThenIds(Factorization):
    """Slots: text | noise of the pose | the decided pose | a marker, then the ids. The noise is born and dies in its
    own step, so that what follows sees the decided pose only."""

    def order(self, layout, random=None):
        kind = torch.tensor([("text", "pose", "action").index(k) for k in layout.kinds])[layout.kind]
        return torch.where(kind == 2, layout.index + 1, 0)[None]

    def packed(self, canvas):
        rank = canvas.rank[0]
        text, pose, ids = (canvas.layout.elements(kind).tolist() for kind in ("text", "pose", "action"))
        noise = [e for e in pose if rank[e] >= 0]  # none where the pose is given
        t, p, q, n = len(text), len(pose), len(noise), len(ids)
        carries = [*text, *noise, *pose, -1, *ids[:-1]]
        source = [VALUE] * t + [NOISE] * q + [VALUE] * p + [LEARNED] + [VALUE] * (n - 1)
        at = [*range(t), *[t] * q, *[t + 1] * p, *range(t + 2, t + 2 + n)]
        dies = [INF] * t + [t + 1] * q + [INF] * (p + n)
        place = [*range(t), *range(t, t + q), *range(t, t + p + n)]
        coord = [[0, i] if s == LEARNED else [i, i] for i, s in zip(place, source, strict=True)]
        reads = [*zip(range(t, t + q), noise, strict=True), *zip(range(t + q + p, t + q + p + n), ids, strict=True)]
        reads = [(s, e) for s, e in reads if rank[e] >= 0]
        return plan_of(timed(at, at, dies), rank, carries, reads, source, coord=coord, layout=canvas.layout)


def hybrid_vla(layout, path=None, predicts="noise"):
    embeds = {
        "text": TokenEmbed(WORDS, WIDTH, "text", start=False),
        "pose": VectorEmbed(DIM, WIDTH, "pose", noise=True, start=False),
        "action": TokenEmbed(BINS, WIDTH, "action", start=False),
    }
    heads = {"pose": InPlaceHead(WIDTH, DIM, path, predicts), "action": CategoricalHead(WIDTH, BINS)}
    backbone = Transformer(TransformerConfig(WIDTH, 3, 2, rope=RoPE(axes=(0, WIDTH // 2))))
    return Model(layout, PoseThenIds(), ByKind(embeds, WIDTH, learned=1), backbone, heads)


LAYOUT = Layout(
    (
        *line(TEXT, "text", given=True).segments,
        *line(POSES, "pose").segments,
        Segment("action", torch.arange(IDS)[:, None], same_as="pose"),
    )
)


# ---- mutants ---------------------------------------------------------------------------------------------------------


class LastingNoise(PoseThenIds):
    """Its visibility is wrong: the noise outlives its step, and the ids see it."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        view = plan.views["all"]
        return replace(plan, views={"all": replace(view, dies=torch.full_like(view.dies, INF))})


class NoiseFed(PoseThenIds):
    """Its feed is wrong: behind the pose stands its noise again, in place of what was decided."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        source = plan.slots.source.clone()
        source[:, TEXT + POSES : TEXT + 2 * POSES] = NOISE
        return replace(plan, slots=replace(plan.slots, source=source))


class IdsFirst(PoseThenIds):
    """Its order is reversed: the ids are written first, and the pose is denoised behind them."""

    def order(self, layout, random=None):
        rank = super().order(layout)
        return torch.where(rank > 0, rank - 1, IDS)

    def packed(self, canvas):
        text, pose, ids = (canvas.layout.elements(kind).tolist() for kind in ("text", "pose", "action"))
        source = [VALUE] * TEXT + [LEARNED] + [VALUE] * IDS + [NOISE] * POSES
        at = [*range(TEXT + 1 + IDS), *[TEXT + 1 + IDS] * POSES]
        reads = zip(range(TEXT, TEXT + IDS + 1 + POSES), [*ids, None, *pose], strict=True)
        coord = [[0 if s == LEARNED else i, i] for i, s in enumerate(source)]
        carries, reads = [*text, -1, *ids, *pose], [(s, e) for s, e in reads if e is not None]
        return plan_of(timed(at), canvas.rank[0], carries, reads, source, coord=coord, layout=canvas.layout)


UNDECLARED = Layout(tuple(replace(s, same_as=None) for s in LAYOUT.segments))

# ---- laws ------------------------------------------------------------------------------------------------------------

NOISE_AND_COSINE, FLOW = (Cosine(100), "noise"), (Straight(), "velocity")
ALL_IDS = torch.tensor(list(itertools.product(range(BINS), repeat=IDS)))


def model_of(order=PoseThenIds, layout=LAYOUT, path=NOISE_AND_COSINE):
    model = randomise(hybrid_vla(layout, *path), std=0.4)
    model.factorization = order()
    return model


def canvas_of(model, rows=2, seed=0, ids=None, text=(0, 2, 1), known=0):
    g = torch.Generator().manual_seed(seed)
    value = {
        "text": torch.tensor(text).expand(rows, -1),
        "pose": torch.randn(rows, POSES, DIM, dtype=torch.float64, generator=g),
        "action": torch.randint(BINS, (rows, IDS), generator=g) if ids is None else ids,
    }
    return model.canvas(value, known)


def noisy(model, canvas, level=0.3, seed=5):
    return noised(canvas, "pose", torch.full((canvas.batch, POSES), level), model.heads["pose"].path, Keyed(seed))


@torch.no_grad()
def packed_says(model, canvas):
    """What one pass reads of the pose (noise or velocity) and of the ids (log-probabilities)."""
    plan = model.factorization.packed(canvas)
    h = model.hidden(plan, canvas)
    said = {}
    for kind, reads in by_kind(canvas, plan.reads):
        dist = model.heads[kind].dist(pick_slots(h, reads.slot), reads, canvas)
        said[kind] = dist.said if isinstance(dist, Denoised) else dist.log_probs()
    return said["pose"], said["action"]


def decider(steps=4):
    return PerKind({"pose": SolverStep(steps), "action": SampleAll()})


def test_the_packed_order_is_honest_and_steps_follow_from_it():
    model = model_of()
    plan = model.factorization.packed(canvas_of(model)).check(model.mixers)
    assert [step.size for step in plan.steps()] == [TEXT + POSES, POSES + 1] + [1] * (IDS - 1)
    kept = torch.ones(plan.size, dtype=torch.bool)
    kept[TEXT : TEXT + POSES] = False  # noise is never cached
    kept[-1] = False
    assert torch.equal(plan.keep()[0], kept)


SAME = "which is the same datum in another form"


@pytest.mark.parametrize(
    ("order", "names"),
    [
        (LastingNoise, f"reads element 5, but sees element [34], {SAME}, through slot [34]"),
        (NoiseFed, f"reads element 5, but sees element [34], {SAME}, through slot [56]"),
        (IdsFirst, f"reads element 3, but sees element 5, {SAME}, through slot 4"),
    ],
)
def test_planted_leaks_between_the_two_forms_are_named(order, names):
    model = model_of(order)
    with pytest.raises(OrderError, match=names):
        model.factorization.packed(canvas_of(model)).check(model.mixers)
    with pytest.raises(OrderError, match=names):
        generate(Target(model), pure_noise(canvas_of(model), "pose", Keyed()), decider())


@pytest.mark.parametrize(("order", "holds"), [(PoseThenIds, True), (IdsFirst, False)])
def test_denoising_is_bit_equal_whatever_the_ids(order, holds):
    """Where the two forms are not declared one datum, the static check is silent: this law is not."""
    model = model_of(order, UNDECLARED)
    model.factorization.packed(canvas_of(model)).check(model.mixers)
    first = packed_says(model, noisy(model, canvas_of(model, 27, ids=ALL_IDS)))[0]
    other = packed_says(model, noisy(model, canvas_of(model, 27, ids=ALL_IDS.flip(0))))[0]
    assert torch.equal(first, other) == holds


@pytest.mark.parametrize(("order", "holds"), [(PoseThenIds, True), (LastingNoise, False), (NoiseFed, False)])
def test_ids_see_the_decided_pose_and_not_its_noise(order, holds):
    model = model_of(order, UNDECLARED)
    model.factorization.packed(canvas_of(model)).check(model.mixers)
    ids = ALL_IDS[5:7]
    before = packed_says(model, noisy(model, canvas_of(model, ids=ids)))[1]
    for level, seed in ((0.3, 6), (0.9, 5)):
        after = packed_says(model, noisy(model, canvas_of(model, ids=ids), level, seed))[1]
        assert torch.equal(before, after) == holds
    canvas = canvas_of(model, seed=1, ids=ids)  # another pose, under the same noisy content
    canvas.noise, canvas.level = noisy(model, canvas_of(model, ids=ids)).noise, torch.full((2, LAYOUT.size), 0.3)
    moved = (packed_says(model, canvas)[1] - before).abs().amax(-1) > 1e-6
    assert bool(moved.all()) == (order is not NoiseFed)


def test_every_id_depends_on_earlier_ids_and_both_forms_on_the_instruction():
    model = model_of()
    base = canvas_of(model, ids=ALL_IDS[5:7])
    pose, ids = packed_says(model, noisy(model, base))
    for j in range(IDS):
        changed = base.value["action"].clone()
        changed[:, j] = (changed[:, j] + 1) % BINS
        moved = (packed_says(model, noisy(model, canvas_of(model, ids=changed)))[1] - ids).abs().amax(-1)
        assert bool((moved[:, : j + 1] == 0).all() and (moved[:, j + 1 :] > 1e-6).all())
    for text in ((1, 2, 1), (0, 0, 1), (0, 2, 2)):
        p, i = packed_says(model, noisy(model, canvas_of(model, ids=ALL_IDS[5:7], text=text)))
        assert bool(((p - pose).abs().amax(-1) > 1e-6).all() and ((i - ids).abs().amax(-1) > 1e-6).all())


def test_ids_are_a_distribution_given_the_pose():
    model = model_of()
    known = torch.tensor([False] * TEXT + [True] * POSES + [False] * IDS).expand(27, -1)
    canvas = canvas_of(model, 27, ids=ALL_IDS, known=known)
    canvas.value["pose"] = canvas.value["pose"][:1].expand(27, -1, -1).contiguous()
    with torch.no_grad():
        packed = model.log_prob(canvas)
    assert abs(float(packed.exp().sum()) - 1) < 1e-12
    forced = Forced(torch.cat([torch.zeros(27, TEXT + POSES, dtype=torch.long), ALL_IDS], 1))
    generate(Target(model), canvas, decider(), random=forced)
    assert (forced.log_prob - packed).abs().max() < 1e-9


@pytest.mark.parametrize("path", [NOISE_AND_COSINE, FLOW])
def test_one_pass_meets_the_same_numbers_as_denoising_and_writing_step_by_step(path):
    model = model_of(path=path)
    target, canvas = Target(model), pure_noise(canvas_of(model, 3), "pose", Keyed(4))
    met, ids = [], []
    with torch.inference_mode():
        while (plan := target.plan(canvas)) is not None:
            rows = target.forward(plan, canvas)
            if isinstance(rows.dist, Denoised):
                met.append((rows.dist.said, canvas.copy()))
            else:
                ids.append(rows.dist.log_probs())
            step = decider(3).decide(canvas, None, rows, Keyed(2))
            canvas.apply(step.edits)
            target.commit(step.keep, plan)
    assert len(met) == 3
    for said, then in met:
        assert (packed_says(model, then)[0] - said).abs().max() < 1e-9
    assert (packed_says(model, canvas)[1] - torch.cat(ids, 1)).abs().max() < 1e-9


@pytest.mark.parametrize("path", [NOISE_AND_COSINE, FLOW])
def test_the_cached_denoising_loop_equals_the_uncached_one(path):
    model = model_of(path=path)
    results, slots = [], []
    for cached in (True, False):
        canvas = pure_noise(canvas_of(model, 3), "pose", Keyed(4))
        steps = list(decode(Target(model, cached=cached), canvas, decider(4), random=Keyed(9)))
        results.append(canvas)
        slots.append([step.slots for step in steps])
    assert slots[0] == [TEXT + POSES] + [POSES] * 3 + [POSES + 1] + [1] * (IDS - 1)
    assert min(slots[1]) == TEXT + POSES
    assert (results[0].value["pose"] - results[1].value["pose"]).abs().max() < 1e-9
    assert torch.equal(results[0].value["action"], results[1].value["action"])
    assert results[0].done


class Oracle(InPlaceHead):
    """Knows the pose, and says which noise makes it what stands there."""

    def dist(self, h, reads, canvas):
        dist = super().dist(h, reads, canvas)
        alpha, sigma = (k[..., None] for k in self.path.at(dist.level))
        noise = (dist.x - alpha * self.pose) / sigma
        dist.said = noise if self.predicts == "noise" else self.pose - noise
        return dist


@pytest.mark.parametrize("path", [NOISE_AND_COSINE, FLOW])
@pytest.mark.parametrize("steps", [1, 2, 7, 25])
def test_an_oracle_returns_the_action_exactly_in_any_number_of_steps(path, steps):
    model = model_of(path=path)
    oracle = Oracle(WIDTH, DIM, *path).double()
    oracle.pose = torch.randn(2, POSES, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    model.heads["pose"] = oracle
    canvas = pure_noise(canvas_of(model), "pose", Keyed(1))
    turns = list(decode(Target(model), canvas, decider(steps), random=Keyed()))
    assert len(turns) == steps + IDS
    assert (canvas.value["pose"] - oracle.pose).abs().max() < 1e-9


def test_rows_keep_to_themselves():
    model = model_of(path=FLOW)
    together = generate(Target(model), pure_noise(canvas_of(model, 3), "pose", Keyed(4)), decider(), random=Keyed(9))
    for row in range(3):
        canvas = canvas_of(model, 3).select(torch.tensor([row]))
        alone = generate(Target(model), pure_noise(canvas, "pose", Keyed(4)), decider(), random=Keyed(9))
        assert (alone.value["pose"][0] - together.value["pose"][row]).abs().max() < 1e-12
        assert torch.equal(alone.value["action"][0], together.value["action"][row])


def test_both_losses_train_every_part():
    model = model_of().train()
    canvas = noisy(model, canvas_of(model, 4), level=0.5)
    losses = model.losses(canvas)
    assert bool((losses[:, :TEXT] == 0).all() and (losses[:, TEXT:] > 0).all())
    said = packed_says(model, canvas)[0]
    noise = Keyed(5).normal((4, POSES, DIM), Key(canvas.row, torch.arange(TEXT, TEXT + POSES)[None]))
    assert (losses[:, TEXT : TEXT + POSES] - (said - noise).square().mean(-1)).abs().max() < 1e-9
    for part, share in (("pose", losses[:, TEXT : TEXT + POSES]), ("action", losses[:, TEXT + POSES :])):
        grads = torch.autograd.grad(share.sum(), list(model.parameters()), retain_graph=True, allow_unused=True)
        named = zip(model.named_parameters(), grads, strict=True)
        missed = {name for (name, _), g in named if g is None or not bool(g.abs().max() > 0)}
        assert {n.split(".")[1] for n in missed if n.startswith("heads")} == {"pose", "action"} - {part}
        assert not any(n.startswith("backbone") for n in missed)
    assert all(p.grad is None for p in model.parameters())
    losses.sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.parameters())
