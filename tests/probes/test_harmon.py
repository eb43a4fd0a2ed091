"""Probe `harmon` (Wu et al. 2025): one plan with a view for each kind of layer, and layers that skip slots.

A masked autoregressive image model's encoder (visible places and registers), a causal language model in the middle
(prompt, visible places, then the registers), the image model's decoder (where the masks join). Painting decides the
image in any order under a given prompt; describing reads a given image and answers word by word.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import UNKNOWN, Set
from seriatim.decoding.loop import Step, decode, generate
from seriatim.decoding.sample import SampleAll, Select
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.embed_kinds import ByKind
from seriatim.factorization.base import Factorization
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.layout import Layout, Segment, grid, line
from seriatim.model import Model
from seriatim.plan import LEARNED, MASK, VALUE, OrderError, Plan, Reads, Slots
from seriatim.random import Forced, Key, Keyed
from seriatim.slots import ragged
from seriatim.view import timed

KINDS = ("encoder", "encoder", "language", "language", "decoder", "decoder")
WORDS, PIXELS, WIDTH, PROMPT, SIDE, REGISTERS = 3, 2, 16, 3, 2, 2

# ---- the composition -------------------------------------------------------------------------------------------------

LAYERS = {"encoder": (1, 2), "language": (0, 1, 2, 4), "decoder": (1, 2, 3)}  # the parts that each kind computes


class Harmon(Factorization):
    """Parts: prompt, registers, visible places, masks, answer. Array order is no clock: in the language model visible
    places stand right behind the prompt, then the registers, then the answer."""

    def starts(self, t, v):
        """When each part starts in the language model, after a prompt of t words, with v visible places."""
        return torch.cat([0 * v, t + v, t + 0 * v, 0 * v, t + v + REGISTERS], 1)

    def packed(self, canvas):
        hidden = canvas.rank[:1, canvas.layout.elements("image")] >= 0
        return None if bool(hidden.any()) else self.plan(canvas, hidden, 0)

    def step(self, canvas, guess, cached):
        unknown = canvas.status[:, canvas.layout.elements("image")] == UNKNOWN
        return self.plan(canvas, unknown, cached) if bool(unknown.any()) else super().step(canvas, guess, cached)

    def plan(self, canvas, unknown, cached, hidden=MASK):
        layout, b, paint = canvas.layout, unknown.shape[0], bool(unknown.any())
        t, end = int(layout.elements("image")[0]), int(layout.elements("image")[-1]) + 1
        answer = torch.arange(end, end if paint else layout.size)[None]
        seen, masks = (torch.where(x < 0, -1, x + t) for x in (ragged(~unknown), ragged(unknown)))
        parts = [torch.arange(0 if cached else t)[None], torch.full((1, REGISTERS), -1), seen, masks, answer[:, :-1]]
        element = torch.cat([p.expand(b, -1) for p in parts], 1)
        part = torch.cat([torch.full(p.shape[1:], i) for i, p in enumerate(parts)])
        index = torch.cat([torch.arange(p.shape[1]) for p in parts])
        at = self.starts(t, (seen >= 0).sum(1, keepdim=True))[:, part] + index
        live = (element >= 0) | (part == 1)
        source = torch.tensor([VALUE, LEARNED, VALUE, hidden, VALUE])[part].expand(b, -1)
        rank = torch.where(canvas.status == UNKNOWN, 0, -1) if paint else canvas.rank[:1]
        needs = torch.where(live & (source == VALUE), rank.gather(1, element.clamp(min=0)), -1)
        place = torch.where(part[:, None] == 1, index[:, None], layout.coord[element.clamp(min=0)])
        takes = {kind: torch.isin(part, torch.tensor(LAYERS[kind])) for kind in LAYERS}
        views = {k: timed(at if k == "language" else 0 * at, lane=torch.where(live & takes[k], 0, -1)) for k in LAYERS}
        layers = torch.stack([takes[kind] & (paint or kind != "decoder") for kind in KINDS])
        columns = torch.where(element >= 0, torch.arange(len(part)), -1)
        reads = Reads(columns[:, part == 3], masks)
        if not paint:
            last = (part == 1).nonzero()[-1:, 0]
            reads = Reads(torch.cat([last, columns[0, part == 4]])[None], answer)
        slots = Slots(element[..., None], source, torch.cat([place, at[..., None]], -1), needs)
        kept = torch.arange(0 if cached else t)[None] if paint else None
        return Plan(slots, views, reads, rank, layers, layout, kept=kept)


def harmon(layout):
    text = TokenEmbed(WORDS, WIDTH, "text", positions=(8,))
    image = TokenEmbed(PIXELS, WIDTH, "image", positions=(SIDE, SIDE), mask=True)
    embed = ByKind({"text": text, "image": image}, WIDTH, learned=REGISTERS)
    heads = {"text": CategoricalHead(WIDTH, WORDS), "image": CategoricalHead(WIDTH, PIXELS)}
    return Model(layout, Harmon(), embed, Transformer(TransformerConfig(WIDTH, len(KINDS), 2, kinds=KINDS)), heads)


PAINT = line(PROMPT, "text", given=True).then(grid(SIDE, SIDE, kind="image"))
DESCRIBE = line(PROMPT, "text", given=True).then(
    Layout((Segment("image", grid(SIDE, SIDE).coord, given=True),)).then(line(3, "text", start=PROMPT))
)


# ---- mutants ---------------------------------------------------------------------------------------------------------


class RegistersFirst(Harmon):
    """Its visibility is wrong: registers stand before the visible places."""

    def starts(self, t, v):
        return torch.cat([0 * v, t + 0 * v, t + REGISTERS + 0 * v, 0 * v, t + v + REGISTERS], 1)


class FedContent(Harmon):
    """Its feed is wrong: what stands at a masked place is fed there."""

    def plan(self, canvas, unknown, cached, hidden=VALUE):
        return super().plan(canvas, unknown, cached, hidden)


class FedInSecret(TokenEmbed):
    """The same, while the labels speak of masks."""

    def forward(self, canvas, plan, guess=None, prefix=None):
        source = torch.where(plan.slots.source == MASK, VALUE, plan.slots.source)
        return super().forward(canvas, replace(plan, slots=replace(plan.slots, source=source)), guess, prefix)


# ---- laws ------------------------------------------------------------------------------------------------------------

IMAGES = torch.tensor(list(itertools.product(range(PIXELS), repeat=SIDE**2)))
ANSWERS = torch.tensor(list(itertools.product(range(WORDS), repeat=3)))


def model_of(layout, order=Harmon, embed=TokenEmbed):
    model = randomise(harmon(layout), std=0.4)
    model.factorization = order()
    model.embed.embeds["image"].__class__ = embed
    return model


def painting(model, images, unknown=None, prompt=(0, 2, 1)):
    """A canvas that holds whole images, of which `unknown` (None: all) is still to be decided."""
    words = torch.tensor(prompt).expand(len(images), -1).clone()
    canvas = model.canvas({"text": words, "image": images.clone()})
    if unknown is not None:
        canvas.apply([Set(images, torch.where(unknown, -1, PROMPT + torch.arange(SIDE**2)))])
    return canvas


def describing(model, answers, image=(0, 1, 1, 0), prompt=(0, 2, 1)):
    n = len(answers)
    words = torch.cat([torch.tensor(prompt).expand(n, -1), answers], 1)
    return model.canvas({"text": words, "image": torch.tensor(image).expand(n, -1).clone()})


@torch.no_grad()
def said(model, canvas, plan=None):
    """(elements, log-probabilities) that one forward from here reads."""
    plan = plan or model.factorization.step(canvas, None, 0)
    dist, element, _ = model.dist(model.hidden(plan, canvas), plan, canvas)
    return element, dist.log_probs()


@torch.no_grad()
def inside(model, canvas, plan, kinds):
    """Hidden states when only these kinds of layer run."""
    run = torch.tensor([kind in kinds for kind in KINDS])[:, None]
    return model.hidden(replace(plan, layers=plan.layers & run), canvas)


class InOrder:
    """Decide one element a step, in a stored order."""

    def __init__(self, order):
        self.left = list(order)

    def decide(self, canvas, guess, rows, random):
        element = torch.tensor([[self.left.pop(0)]])
        column = (rows.element[:1] == element).nonzero()[:, 1:]
        x = rows.dist.take(column).sample(random, Key(canvas.row, element))
        return Step((Set(x, element.expand(canvas.batch, -1)),))


def forced(model, canvas, decider, cached=True):
    """Log-probability of what stands on the canvas, under its own decoding steps."""
    words, image = canvas.value["text"], canvas.value["image"]
    random = Forced(torch.cat([words[:, :PROMPT], image, words[:, PROMPT:]], 1))
    generate(Target(model, cached=cached), canvas, decider, random=random)
    return random.log_prob


def painted_mass(model, order):
    """The total probability of all images painted in a stored order; the canvas holds each before it is painted."""
    return forced(model, painting(model, IMAGES), InOrder(PROMPT + i for i in order)).exp().sum()


HALF = torch.tensor([[True, False, True, True], [False, False, True, False], [True, True, False, True]])


def test_static_check_passes_and_names_what_is_fed_at_a_masked_place():
    for unknown in (None, HALF):
        model = model_of(PAINT)
        canvas = painting(model, IMAGES[3:6], unknown)
        model.factorization.step(canvas, None, 0).check(model.mixers)
        with pytest.raises(OrderError, match=r"reads element (\d+), but sees element \1 through itself"):
            FedContent().step(canvas, None, 0).check(model.mixers)
    model = model_of(DESCRIBE)
    model.factorization.packed(describing(model, ANSWERS)).check(model.mixers)


@pytest.mark.parametrize(("embed", "holds"), [(TokenEmbed, True), (FedInSecret, False)])
def test_no_prediction_at_a_masked_place_changes_with_content_of_masked_places(embed, holds):
    model = model_of(PAINT, embed=embed)
    a = painting(model, IMAGES[5:8], HALF)
    b = painting(model, torch.where(HALF, 1 - IMAGES[5:8], IMAGES[5:8]), HALF)
    assert torch.equal(said(model, a)[1], said(model, b)[1]) == holds


def test_prompt_and_every_visible_place_reach_every_masked_place():
    model = model_of(PAINT)
    before = said(model, painting(model, IMAGES[9:12], HALF))
    for place in range(SIDE**2):
        changed = IMAGES[9:12].clone()
        changed[:, place] = 1 - changed[:, place]
        moved = (said(model, painting(model, changed, HALF))[1] - before[1]).abs().amax(-1) > 1e-6
        live = before[0] >= 0
        assert torch.equal(moved & live, live & ~HALF[:, place, None])
    for prompt in ((1, 2, 1), (0, 0, 1), (0, 2, 2)):
        moved = (said(model, painting(model, IMAGES[9:12], HALF, prompt))[1] - before[1]).abs().amax(-1) > 1e-6
        assert bool(moved[before[0] >= 0].all())


@pytest.mark.parametrize(("order", "holds"), [(Harmon, True), (RegistersFirst, False)])
def test_a_visible_place_cannot_see_a_register_in_the_language_model_and_a_register_sees_all(order, holds):
    model = model_of(PAINT, order)
    canvas = painting(model, IMAGES[5:6], torch.tensor([[True, False, False, True]]))
    plan = model.factorization.step(canvas, None, 0)
    registers, visible = slice(PROMPT, PROMPT + REGISTERS), slice(PROMPT + REGISTERS, PROMPT + REGISTERS + 2)
    sees = plan.views["language"].mask()[0]
    assert (not bool(sees[visible, registers].any())) == holds
    assert bool(sees[registers, :PROMPT].all() and sees[registers, visible].all()) == holds
    before = inside(model, canvas, plan, ("language",))
    with torch.no_grad():
        model.embed.learned[0] += 1  # the first register
    after = inside(model, canvas, plan, ("language",))
    assert torch.equal(before[:, visible], after[:, visible]) == holds
    assert not torch.equal(before[:, PROMPT + 1], after[:, PROMPT + 1])  # the second register sees the first


def test_masks_are_absent_before_the_decoder():
    model = model_of(PAINT)
    canvas = painting(model, IMAGES[5:8], HALF)
    plan = model.factorization.step(canvas, None, 0)
    there = plan.slots.source != MASK
    masks = (plan.slots.source == MASK).any(0)
    alone = plan.take((~masks).nonzero()[:, 0][None])
    a, b = inside(model, canvas, plan, ("encoder", "language")), inside(model, canvas, alone, ("encoder", "language"))
    live = (there & ((plan.slots.element[..., 0] >= 0) | (plan.slots.source == LEARNED)))[:, ~masks]
    assert (a[:, ~masks] - b).abs()[live].max() < 1e-12
    assert (inside(model, canvas, plan, KINDS)[:, ~masks] - a[:, ~masks]).abs()[live].max() > 1e-3  # the decoder adds


def test_array_order_is_no_clock():
    model = model_of(PAINT)
    canvas = painting(model, IMAGES[7:8], HALF[:1])
    plan = model.factorization.step(canvas, None, 0)
    shuffled = plan.take(torch.randperm(plan.size, generator=torch.Generator().manual_seed(1))[None])
    (e1, p1), (e2, p2) = said(model, canvas), said(model, canvas, shuffled)
    assert not torch.equal(plan.slots.element, shuffled.slots.element)
    order = e2[0].argsort()
    assert torch.equal(e1[0], e2[0][order])
    assert (p1 - p2[:, order]).abs().max() < 1e-12


@pytest.mark.parametrize(("embed", "holds"), [(TokenEmbed, True), (FedInSecret, False)])
def test_painting_in_a_stored_order_is_a_distribution(embed, holds):
    total = painted_mass(model_of(PAINT, embed=embed), (2, 0, 3, 1))
    assert (abs(float(total) - 1) < 1e-12) == holds


def test_painting_forced_equals_the_sum_of_separate_forwards():
    model, order, image = model_of(PAINT), (2, 0, 3, 1), IMAGES[11:12]
    total = 0.0
    for turn, place in enumerate(order):
        unknown = torch.tensor([[p in order[turn:] for p in range(SIDE**2)]])
        element, log_probs = said(model, painting(model, image, unknown))
        total += float(log_probs[0, (element[0] == PROMPT + place).nonzero()[0, 0], image[0, place]])
    for cached in (True, False):
        got = forced(model, painting(model, image), InOrder(PROMPT + i for i in order), cached)
        assert abs(float(got) - total) < 1e-9


@pytest.mark.parametrize("rule", ["random", "confidence"])
def test_the_prompt_is_cached_untouched_and_the_cache_is_invisible(rule):
    model = model_of(PAINT)
    blank = torch.zeros(3, SIDE**2, dtype=torch.long)
    target, canvas, first = Target(model), painting(model, blank), None
    slots = []
    for step in decode(target, canvas, Select(rule, steps=4), random=Keyed(7)):
        held = target.cache.buffer[2:4, ..., : target.cache.columns, :].clone()
        first = held if first is None else first
        assert target.cache.length == PROMPT
        assert torch.equal(first, held)
        slots.append(step.slots)
    assert slots == [PROMPT + REGISTERS + SIDE**2] + [REGISTERS + SIDE**2] * 3
    bytes_a_layer = 2 * 3 * PROMPT * WIDTH * 8
    assert target.cache.nbytes() == bytes_a_layer * KINDS.count("language")
    fresh = generate(Target(model, cached=False), painting(model, blank), Select(rule, steps=4), random=Keyed(7))
    assert torch.equal(canvas.value["image"], fresh.value["image"])


def test_rows_with_different_masks_keep_to_themselves():
    model = model_of(PAINT)
    element, together = said(model, painting(model, IMAGES[4:7], HALF))
    for row in range(3):
        e, alone = said(model, painting(model, IMAGES[4 + row : 5 + row], HALF[row : row + 1]))
        live = element[row] >= 0
        assert torch.equal(element[row][live], e[0])
        assert (together[row][live] - alone[0]).abs().max() < 1e-12


def test_without_its_language_layers_it_is_an_unconditional_masked_model():
    model = model_of(PAINT)
    small = Transformer(TransformerConfig(WIDTH, 4, 2, kinds=("encoder",) * 2 + ("decoder",) * 2)).double()
    for mine, theirs in zip(small.layers, [model.backbone.layers[i] for i in (0, 1, 4, 5)], strict=True):
        mine.load_state_dict(theirs.state_dict())
    small.norm.data.copy_(model.backbone.norm)
    canvas = painting(model, IMAGES[5:8], HALF)
    element, with_language = said(model, canvas)
    live = element >= 0
    with torch.no_grad():
        for i in (2, 3):
            model.backbone.layers[i].out.zero_()
            model.backbone.layers[i].down.zero_()
    plan = model.factorization.step(canvas, None, 1)  # without its prompt
    plan = replace(plan, layers=plan.layers[[0, 1, 4, 5]])
    full = said(model, canvas)[1]
    model.backbone = small
    without = said(model, canvas, plan)[1]
    assert (full - without)[live].abs().max() < 1e-12
    assert (with_language - full)[live].abs().max() > 1e-3


@pytest.mark.parametrize("cached", [True, False])
def test_describing_in_one_pass_is_word_by_word(cached):
    model = model_of(DESCRIBE)
    canvas = describing(model, ANSWERS)
    with torch.no_grad():
        packed = model.log_prob(canvas)
    assert abs(float(packed.exp().sum()) - 1) < 1e-12
    assert (forced(model, canvas, SampleAll(), cached) - packed).abs().max() < 1e-9


def test_a_described_word_depends_on_image_prompt_and_earlier_words_only():
    model = model_of(DESCRIBE)
    words = torch.tensor([[0, 1, 2]])

    def terms(**change):
        canvas = describing(model, **{"answers": words, **change})
        return said(model, canvas, model.factorization.packed(canvas))[1]

    before = terms()
    for j in range(3):
        changed = words.clone()
        changed[0, j] = (changed[0, j] + 1) % WORDS
        moved = (terms(answers=changed) - before)[0].abs().amax(-1)
        assert torch.equal(moved > 1e-6, torch.arange(3) > j)
        assert bool((moved[: j + 1] == 0).all())
    for i in range(SIDE**2):
        image = [0, 1, 1, 0]
        image[i] = 1 - image[i]
        assert bool(((terms(image=image) - before).abs().amax(-1) > 1e-6).all())
    assert bool(((terms(prompt=(1, 2, 1)) - before).abs().amax(-1) > 1e-6).all())
