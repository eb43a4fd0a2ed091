"""Vectors from end to end: canvases, embeddings, orders, guidance and decoding with heads that denoise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas, Revise, Set
from seriatim.conditions.condition import ClassCondition
from seriatim.decoding.filters import Warper
from seriatim.decoding.guidance import Guidance
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll, Select
from seriatim.decoding.target import Target
from seriatim.embed import CodesEmbed, TokenEmbed, VectorEmbed
from seriatim.embed_kinds import ByKind
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.diffusion import DiffusionConfig, DiffusionHead
from seriatim.heads.flow import FlowConfig, FlowHead
from seriatim.laws.case import randomise
from seriatim.layout import Layout, Segment, grid, line
from seriatim.model import Model, by_kind
from seriatim.plan import LEARNED, MASK, NOISE, VALUE, Plan, Reads, reads_at, slots_of
from seriatim.random import Key, Keyed
from seriatim.training.loop import Recipe, fit
from seriatim.view import full

DIM, E, WIDTH, CLASSES = 3, 4, 16, 3
HEADS = {
    "diffusion": lambda: DiffusionHead(WIDTH, DIM, DiffusionConfig(hidden=12, blocks=1, steps=4, draws=2)),
    "flow": lambda: FlowHead(WIDTH, DIM, FlowConfig(hidden=12, blocks=1, steps=4)),
}
every_head = pytest.mark.parametrize("head", HEADS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model_of(head="diffusion", order=None, condition=False):
    """Next vector (or any order) over a line of vectors."""
    order = order or Line(prefix=1)
    embed = VectorEmbed(DIM, WIDTH, positions=(E + 1,), mask=not isinstance(order, Line))
    config = TransformerConfig(WIDTH, 2, 2, rope=RoPE(), vector=WIDTH if condition else None)
    conditions = {"class": ClassCondition(CLASSES, WIDTH, ("vector",))} if condition else None
    return randomise(Model(line(E), order, embed, Transformer(config), HEADS[head](), conditions), std=0.3)


class Watching(SampleAll):
    """Keeps the hidden state at which each element was decided."""

    def __init__(self):
        super().__init__()
        self.hidden = {}

    def decide(self, canvas, guess, rows, random):
        element = torch.as_tensor(rows.element).expand(canvas.batch, -1) if torch.is_tensor(rows.element) else None
        for m in range(rows.dist.states.shape[2]):
            e = rows.element + m if element is None else int(element[0, m])
            self.hidden[e] = rows.dist.states[0, :, m]
        return super().decide(canvas, guess, rows, random)


def decoded(model, rows=2, seed=0, raw=None, watching=None, **more):
    canvas = model.blank(rows)
    for _ in decode(Target(model, raw, **more), canvas, watching or SampleAll(), random=Keyed(seed)):
        pass
    return canvas


# ---- decoding --------------------------------------------------------------------------------------------------------


@every_head
def test_a_blank_canvas_holds_vectors_and_decoding_fills_all_of_them(head):
    model = model_of(head)
    blank = model.blank(2)
    assert blank.value["token"].shape == (2, E, DIM) and blank.value["token"].dtype == torch.float32
    x = decoded(model)
    assert x.done and bool((x.value["token"] != 0).all())
    assert len(x.value["token"].flatten().unique()) == 2 * E * DIM


@every_head
@pytest.mark.parametrize("order", [Line(prefix=1), Blocks(2)], ids=["line", "blocks"])
@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_the_states_that_are_read_step_by_step_are_those_of_one_pass(head, order, cached):
    """What a head is given in decoding equals what it is trained on, number for number."""
    model, watching = model_of(head, order), Watching()
    canvas = decoded(model, watching=watching, cached=cached)
    finished = model.canvas(canvas.value)
    plan = model.factorization.packed(finished)
    h = model.hidden(plan, finished)
    for slot, e in zip(plan.reads.slot[0].tolist(), plan.reads.element[0].tolist(), strict=True):
        torch.testing.assert_close(watching.hidden[e], h[:, slot], rtol=0, atol=1e-12)


@every_head
@torch.no_grad()
def test_a_vector_is_seen_by_what_follows_and_by_nothing_before(head):
    """Not through the float32 canvas either: another vector 2 changes the states that read 3, and none earlier."""
    model, x = model_of(head), normal(2, E, DIM).float()
    plan = model.factorization.packed(model.canvas({"token": x}))
    other = x.clone()
    other[:, 2] += 1
    a, b = (model.hidden(plan, model.canvas({"token": v})) for v in (x, other))
    assert ((a - b).abs().amax((0, 2)) > 1e-9).tolist() == [False, False, False, True]


@every_head
def test_a_row_does_not_depend_on_its_batch(head):
    model = model_of(head)
    x = decoded(model, 3).value["token"]
    for b in range(3):
        canvas = model.canvas({"token": torch.zeros(1, E, DIM)}, row=torch.tensor([b]))
        for _ in decode(Target(model), canvas, SampleAll(), random=Keyed(0)):
            pass
        torch.testing.assert_close(canvas.value["token"][0], x[b], rtol=1e-5, atol=1e-5)


@every_head
def test_given_vectors_stay_and_rows_of_different_lengths_agree_with_themselves_alone(head):
    model, known = model_of(head), torch.tensor([1, 3, 2])
    given = normal(3, E, DIM).float() * (torch.arange(E) < known[:, None])[..., None]
    canvas = model.canvas({"token": given}, known)
    generate(Target(model), canvas, SampleAll(), random=Keyed(0))
    for b in range(3):
        n = int(known[b])
        assert torch.equal(canvas.value["token"][b, :n], given[b, :n])
        alone = model.canvas({"token": given[b : b + 1]}, n, row=torch.tensor([b]))
        generate(Target(model), alone, SampleAll(), random=Keyed(0))
        torch.testing.assert_close(alone.value["token"][0], canvas.value["token"][b], rtol=1e-5, atol=1e-5)


@every_head
def test_masked_generation_decides_every_vector_once(head):
    model = model_of(head, AnyOrder())
    canvas, seen = model.blank(2), torch.zeros(2, E, dtype=torch.long)
    for step in decode(Target(model), canvas, Select("random", steps=3), random=Keyed(0)):
        for edit in step.edits:
            assert isinstance(edit, Set)
            live = edit.element >= 0
            seen[live.nonzero()[:, 0], edit.element[live]] += 1
    assert canvas.done and bool((seen == 1).all()) and bool((canvas.value["token"] != 0).all())


# ---- guidance --------------------------------------------------------------------------------------------------------


@every_head
def test_a_guided_step_mixes_what_two_forwards_say(head):
    """The first vector, from the states of two separate forwards and the mixture by hand."""
    model, raw, w = model_of(head, condition=True), {"class": torch.tensor([0, 2])}, 1.5
    x = decoded(model, 2, 5, raw, guidance=Guidance(w)).value["token"][:, 0]
    canvas = model.blank(2)
    plan = model.factorization.step(canvas, None, 0)
    with torch.no_grad():
        yes, no = (
            model.dist(model.hidden(plan, canvas, None, model.encode(raw, drop)), plan, canvas)[0]
            for drop in (None, torch.ones(2, dtype=torch.bool))
        )
        want = yes.mix([no], [1 + w, -w]).sample(Keyed(5), Key(torch.arange(2), 0))[:, 0]
        wrong = yes.mix([no], [1 - w, w]).sample(Keyed(5), Key(torch.arange(2), 0))[:, 0]
    torch.testing.assert_close(x, want.float(), rtol=1e-6, atol=1e-6)
    assert float((x - wrong).abs().max()) > 1e-3


@every_head
def test_guidance_of_scale_zero_is_unguided(head):
    model, raw = model_of(head, condition=True), {"class": torch.tensor([0, 2])}
    got, want = (decoded(model, 2, 5, raw, guidance=g).value["token"] for g in (Guidance(0.0), None))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@every_head
def test_rows_at_different_progress_are_guided_each_by_its_own(head):
    model, raw, known = model_of(head, condition=True), {"class": torch.tensor([0, 2])}, torch.tensor([0, 2])
    given = normal(2, E, DIM).float() * (torch.arange(E) < known[:, None])[..., None]
    canvas = model.canvas({"token": given}, known)
    generate(Target(model, raw, Guidance(2.0, "linear")), canvas, SampleAll(), random=Keyed(0))
    for b in range(2):
        alone = model.canvas({"token": given[b : b + 1]}, int(known[b]), row=torch.tensor([b]))
        target = Target(model, {"class": raw["class"][b : b + 1]}, Guidance(2.0, "linear"))
        generate(target, alone, SampleAll(), random=Keyed(0))
        torch.testing.assert_close(alone.value["token"][0], canvas.value["token"][b], rtol=1e-5, atol=1e-5)


@every_head
def test_temperature_comes_from_the_warper_and_filters_over_ids_are_refused(head):
    model = model_of(head)
    cold, warm = (decoded(model, seed=0, warp=Warper(t)).value["token"] for t in (0.0, 0.9))
    assert float((cold - warm).abs().max()) > 1e-3
    with pytest.raises(TypeError, match="top_k choose among ids"):
        decoded(model, warp=Warper(top_k=3))


# ---- losses ----------------------------------------------------------------------------------------------------------


@every_head
def test_losses_are_of_elements_that_are_not_given_and_need_a_source_of_noise(head):
    model, x = model_of(head), normal(2, E, DIM).float()
    canvas = model.canvas({"token": x}, 2)
    losses = model.losses(canvas, random=Keyed(0))
    assert losses.shape == (2, E) and bool((losses[:, :2] == 0).all()) and bool((losses[:, 2:] > 0).all())
    assert torch.equal(losses, model.losses(canvas, random=Keyed(0)))
    assert not torch.equal(losses, model.losses(canvas, random=Keyed(1)))
    with pytest.raises(TypeError, match="pass random= to"):
        model.losses(canvas)


@every_head
def test_noise_in_training_belongs_to_row_and_element(head):
    """Keyed noise: the losses of a row are the same in other company."""
    model, x = model_of(head), normal(3, E, DIM).float()
    losses = model.losses(model.canvas({"token": x}), random=Keyed(0))
    for b in range(3):
        alone = model.losses(model.canvas({"token": x[b : b + 1]}, row=torch.tensor([b])), random=Keyed(0))
        torch.testing.assert_close(alone[0], losses[b], rtol=1e-10, atol=1e-12)


@every_head
def test_there_is_no_likelihood(head):
    with pytest.raises(TypeError, match="no log_prob"):
        model_of(head).log_prob(model_of(head).blank(1))


@every_head
def test_it_learns_what_context_decides(head):
    """The second vector repeats the first: drawn so after 100 steps of training, far from it with contexts shuffled."""
    torch.manual_seed(0)
    made = {
        "diffusion": lambda: DiffusionHead(16, DIM, DiffusionConfig(32, 2, steps=20, clip=4.0)),
        "flow": lambda: FlowHead(16, DIM, FlowConfig(32, 2, steps=10, draws=4)),
    }[head]()
    model = Model(line(2), Line(1), VectorEmbed(DIM, 16, std=0.2), Transformer(TransformerConfig(16, 1, 2)), made)

    def draw(rows, generator):
        return model.canvas({"token": torch.randn(rows, 1, DIM, generator=generator).expand(-1, 2, -1)}), None

    fit(model, draw, Recipe(100, batch=64, learning_rate=1e-2))
    first = normal(200, 1, DIM, seed=1000).float()
    canvas = model.canvas({"token": torch.cat([first, torch.zeros(200, 1, DIM)], 1)}, 1)
    generate(Target(model), canvas, SampleAll(), random=Keyed(1))
    x = canvas.value["token"][:, 1]
    error, shuffled = ((x - y).square().mean() for y in (first[:, 0], first.roll(1, 0)[:, 0]))
    assert float(error) < 0.15 and float(shuffled) > 1.5


# ---- several kinds ---------------------------------------------------------------------------------------------------


def two_kinds(first=2, second=2):
    """Ids, then vectors; each kind with an embedding and a head of its own."""
    layout = line(first, "word").then(line(second, "latent", start=first))
    embeds = {
        "word": TokenEmbed(5, WIDTH, "word", start=False),
        "latent": VectorEmbed(DIM, WIDTH, "latent", start=False),
    }
    heads = {"word": CategoricalHead(WIDTH, 5), "latent": HEADS["diffusion"]()}
    backbone = Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE()))
    return randomise(Model(layout, Line(1), ByKind(embeds, WIDTH, learned=1), backbone, heads), std=0.3)


@torch.no_grad()
def test_ids_and_vectors_are_decoded_one_after_another_and_fed_as_in_training():
    model, watching = two_kinds(), {}

    class Both(SampleAll):
        def decide(self, canvas, guess, rows, random):
            where = rows.slot if torch.is_tensor(rows.slot) else torch.tensor([[rows.hidden.shape[1] - 1]])
            watching[int(rows.element[0, 0])] = rows.hidden[:, int(where[0, 0])]
            return super().decide(canvas, guess, rows, random)

    canvas = decoded(model, watching=Both())
    assert canvas.value["word"].dtype == torch.long and canvas.value["latent"].shape == (2, 2, DIM)
    assert canvas.done and bool((canvas.value["latent"] != 0).all())
    finished = model.canvas(canvas.value)
    plan = model.factorization.packed(finished)
    h = model.hidden(plan, finished)
    for slot, e in zip(plan.reads.slot[0].tolist(), plan.reads.element[0].tolist(), strict=True):
        torch.testing.assert_close(watching[e], h[:, slot], rtol=0, atol=1e-12)
    losses = model.losses(finished, random=Keyed(0))
    words = model.heads["word"].dist(h[:, :2], None, finished).log_prob(canvas.value["word"])
    torch.testing.assert_close(losses[:, :2], -words, rtol=0, atol=1e-12)
    assert bool((losses[:, 2:] > 0).all())


def test_each_head_gets_the_readouts_of_its_own_kind_row_by_row():
    """Rows may read elements of different kinds in one column, in orders that differ."""
    layout = line(2, "word").then(line(2, "latent", start=2))
    canvas = Canvas(layout, {"word": torch.zeros(2, 2, dtype=torch.long), "latent": torch.zeros(2, 2, DIM)})
    element = torch.tensor([[0, 2, 3, -1], [3, 1, 2, 0]])
    parts = dict(by_kind(canvas, Reads(torch.arange(4).expand(2, -1), element)))
    assert parts["word"].element.tolist() == [[0, -1, -1], [-1, 1, 0]]
    assert parts["latent"].element.tolist() == [[-1, 2, 3], [3, -1, 2]]
    assert parts["word"].slot.tolist() == [[0, 1, 3]] * 2 and parts["latent"].slot.tolist() == [[0, 1, 2]] * 2


def test_a_kind_that_is_given_needs_no_head():
    layout = Layout((Segment("hint", torch.zeros(2, 1, dtype=torch.long), given=True), *line(2).segments))
    model = Model(
        layout, Line(0), TokenEmbed(3, WIDTH), Transformer(TransformerConfig(WIDTH, 1, 2)),
        {"token": CategoricalHead(WIDTH, 3)},
    )  # fmt: skip
    assert model.blank(2).value["hint"].shape == (2, 2)


# ---- what stands in slots --------------------------------------------------------------------------------------------


def slots_plan(source):
    """Slots that carry elements 0, 1, ... of a line, each as `source` says."""
    rank = torch.arange(len(source))
    slots = slots_of([-1 if s == LEARNED else i for i, s in enumerate(source)], rank, source)
    return Plan(slots, {"all": full(len(source))}, reads_at([], []), rank[None])


def embed_of(**more):
    return randomise(VectorEmbed(DIM, WIDTH, **more))


@torch.no_grad()
def test_a_slot_holds_a_value_a_mask_noise_or_a_learned_vector():
    embed = embed_of(mask=True, noise=True, positions=(E,))
    canvas = Canvas(line(E), {"token": normal(2, E, DIM)})
    canvas.noise["token"] = normal(2, E, DIM, seed=1)
    canvas.level = torch.tensor([[0.0, 0.3, 0.9, 1.0], [0.5, 0.5, 0.2, 0.1]]).double()
    x = embed(canvas, slots_plan([VALUE, MASK, NOISE, LEARNED]))
    place = embed.positions[0]
    torch.testing.assert_close(x[:, 0], embed.project(canvas.value["token"][:, 0]) + place[0])
    torch.testing.assert_close(x[:, 1], (embed.mask + place[1]).expand(2, -1))
    told = embed.levels(canvas.level[:, 2:3])[:, 0]
    torch.testing.assert_close(x[:, 2], embed.project(canvas.noise["token"][:, 2]) + told + place[2])
    torch.testing.assert_close(x[:, 3], (embed.start + place[3]).expand(2, -1))
    assert float((told[0] - told[1]).abs().min()) > 1e-6, "levels must be told apart"


@torch.no_grad()
def test_masks_and_noise_tell_nothing_of_the_value():
    embed = embed_of(mask=True)
    plan, rows = slots_plan([MASK, NOISE, NOISE, MASK]), []
    for seed in (0, 5):
        canvas = Canvas(line(E), {"token": normal(2, E, DIM, seed=seed)})
        canvas.noise["token"] = normal(2, E, DIM, seed=1)
        rows.append(embed(canvas, plan))
    assert torch.equal(*rows)


@torch.no_grad()
def test_revised_noise_is_what_stands_in_the_slot():
    embed, canvas = embed_of(), Canvas(line(E), {"token": torch.zeros(2, E, DIM)})
    canvas.noise["token"] = torch.zeros(2, E, DIM)
    element, value = torch.tensor([[1, -1], [0, 2]]), normal(2, 2, DIM).float()
    canvas.apply([Revise(element, value, torch.tensor(0.5))])
    x = embed(canvas, slots_plan([NOISE] * E))
    want = torch.zeros(2, E, DIM)
    want[0, 1], want[1, 0], want[1, 2] = value[0, 0], value[1, 0], value[1, 1]
    torch.testing.assert_close(x, embed.project(want.double()), rtol=0, atol=1e-6)
    assert not canvas.done


@pytest.mark.parametrize("make", [lambda **m: VectorEmbed(DIM, WIDTH, **m), lambda **m: TokenEmbed(5, WIDTH, **m)])
def test_masks_and_noise_that_are_not_there_are_refused(make):
    """Otherwise the value itself would stand where it must not be seen."""
    canvas = Canvas(line(2), {"token": torch.zeros(1, 2, DIM)})
    if isinstance(make(), TokenEmbed):
        canvas = Canvas(line(2), {"token": torch.zeros(1, 2, dtype=torch.long)})
    with pytest.raises(ValueError, match="use mask=True"):
        make()(canvas, slots_plan([VALUE, MASK]))
    with pytest.raises(ValueError, match="the canvas has none"):
        make(mask=True)(canvas, slots_plan([VALUE, NOISE]))


@torch.no_grad()
def test_codes_are_embedded_by_depth_and_several_elements_add_up():
    embed = randomise(CodesEmbed(4, 2, WIDTH))
    x = torch.tensor([[[1, 3], [2, 2], [0, 1]]])
    slots = slots_of([0, [1, 2]], [0, 1, 2])
    plan = Plan(slots, {"all": full(2)}, reads_at([], []), torch.arange(3)[None])
    got, table = embed(Canvas(line(3), {"token": x}), plan), embed.table
    torch.testing.assert_close(got[0, 0], table[0, 1] + table[1, 3])
    torch.testing.assert_close(got[0, 1], table[0, 2] + table[1, 2] + table[0, 0] + table[1, 1])


def test_a_grid_of_vectors_takes_positions_by_row_and_column():
    model = Model(
        grid(2, 2), Line(1), VectorEmbed(DIM, WIDTH), Transformer(TransformerConfig(WIDTH, 1, 2)), HEADS["flow"]()
    )
    assert decoded(model, 1).value["token"].shape == (1, 4, DIM)


def test_steps_and_sampler_may_be_changed_on_a_trained_head():
    model = model_of("diffusion")
    before = decoded(model).value["token"]
    head = model.heads["token"]
    head.config = replace(head.config, sampler="ddim", steps=7)
    after = decoded(model).value["token"]
    assert float((before - after).abs().max()) > 1e-3
