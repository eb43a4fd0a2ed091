"""Probe `hat` (hierarchical autoregressive transformer, arXiv 2501.10322): bytes inside words, on a layout that grows.

An element is a word, its value the ids of its bytes up to the end symbol. A small bidirectional encoder makes each
word a vector, a causal backbone runs over words, and the head of a word is a small causal model over its bytes.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.conditions.prefix import PrefixCondition
from seriatim.decoding.grow import Growing
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed, gather_values
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.group import GroupHead
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.plan import LEARNED, VALUE, OrderError, Plan, Reads, Slots
from seriatim.random import Forced, Keyed, enumerate_law, numbered
from seriatim.view import full

END, STOP, BYTES = 0, 1, 3  # the end of a word [W]; the first byte of the word that ends a text [S]; how many ids
WIDTH, SMALL = 16, 12

# ---- the composition -------------------------------------------------------------------------------------------------


class WordEmbed(nn.Module):
    """A word as the first output of a small bidirectional transformer over a learned [W] and its bytes. All words of a
    forward stand in one row, each in its own lane; what follows the end symbol is in none."""

    def __init__(self, length):
        super().__init__()
        self.bytes = TokenEmbed(BYTES, SMALL, "byte", positions=(length + 1,))
        self.encoder = Transformer(TransformerConfig(SMALL, 2, 2))
        self.project = nn.Linear(SMALL, WIDTH)
        self.start = nn.Parameter(torch.zeros(WIDTH))

    def lanes(self, words):
        """The lane of [W] and of each byte: the word's number, or none behind its end."""
        live = torch.cat([torch.ones_like(words[..., :1]), (words != END).long().cumprod(-1)], -1) > 0
        return torch.where(live, torch.arange(words.shape[1])[:, None], -1).flatten(1)

    def forward(self, canvas, plan, guess=None, prefix=None):
        words = gather_values(canvas, plan.slots.element, "word")[:, :, 0]
        _, s, n = words.shape
        carried = torch.cat([torch.full((s, 1), -1), torch.arange(s * n).view(s, n)], 1).flatten()
        source = torch.where(carried < 0, LEARNED, VALUE)[None]
        place = torch.arange(n + 1).repeat(s)[None, :, None]
        nothing = torch.zeros(1, 0, dtype=torch.long)
        view = full(s * (n + 1)).narrow(lane=self.lanes(words))
        slots = Slots(carried[None, :, None], source, place, torch.full_like(source, -1))
        inner = Plan(slots, {"all": view}, Reads(nothing, nothing), torch.full((1, s * n), -1))
        text = Canvas(line(s * n, "byte"), {"byte": words.flatten(1)})
        x = self.project(self.encoder(self.bytes(text, inner), inner)[:, :: n + 1])
        return torch.where(plan.slots.element < 0, self.start, x)


def hat(words, length):
    """A text of `words` words of up to `length` bytes, the end symbol included."""
    config = TransformerConfig(SMALL, 2, 2)
    embed = TokenEmbed(BYTES, SMALL, "byte", positions=(length,), start=False)
    state = {"state": PrefixCondition(WIDTH, SMALL)}
    inner = Model(line(length, "byte"), Line(1), embed, Transformer(config), CategoricalHead(SMALL, BYTES), state)
    backbone = Transformer(TransformerConfig(WIDTH, 2, 2, rope=RoPE()))
    return Model(line(words, "word"), Line(1), WordEmbed(length), backbone, GroupHead(inner, END))


# ---- mutants ---------------------------------------------------------------------------------------------------------


class OneLane(WordEmbed):
    """Its visibility is wrong: the bytes of all words see each other."""

    def lanes(self, words):
        return super().lanes(words).clamp(max=0)


class NextWord(WordEmbed):
    """Its feed is wrong: a slot holds the word that it reads, whatever its labels say."""

    def forward(self, canvas, plan, guess=None, prefix=None):
        element = (plan.slots.element + 1).clamp(max=canvas.layout.size - 1)
        return super().forward(canvas, SimpleNamespace(slots=replace(plan.slots, element=element)))


class Unshifted(Line):
    """Its feed is wrong, and its labels say so: a slot holds the element that it reads."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        element = plan.slots.element + 1
        needs = canvas.rank[:, element[0, :, 0]]
        source = torch.full_like(plan.slots.source, VALUE)
        return replace(plan, slots=replace(plan.slots, element=element, needs=needs, source=source))


# ---- laws ------------------------------------------------------------------------------------------------------------


def all_words(length):
    """Every word of up to `length` bytes: it ends with the end symbol or at full length, and 0 follows."""
    words = [[b for b in w if b != END] for k in range(length + 1) for w in itertools.product((1, 2), repeat=k)]
    return torch.tensor([(w + [END] * length)[:length] for w in words])


def all_texts(words, length):
    return torch.stack([torch.stack(t) for t in itertools.product(all_words(length), repeat=words)])


def model_of(words, length, embed=WordEmbed):
    model = randomise(hat(words, length), std=0.4)
    other = embed(length).double()
    other.load_state_dict(model.embed.state_dict())
    model.embed = other
    return model


@torch.no_grad()
def byte_terms(model, texts):
    """Log-probability of every byte of every word in one pass, (texts, words, length)."""
    canvas = model.canvas({"word": texts})
    plan = model.factorization.packed(canvas)
    dist, _, _ = model.dist(model.hidden(plan, canvas), plan, canvas)
    return dist.log_probs(texts)


class ForcedBytes(Forced):
    """A given text, byte by byte: byte j of a word is draw j of its element."""

    def categorical(self, logits, key):
        one = Forced(self.value[..., key.draw // numbered(0, 0, 1)])
        x = one.categorical(logits, key)
        self.log_prob += one.log_prob
        return x


TEXT = torch.tensor([[[2, 1, 0], [1, 2, 2], [0, 0, 0], [2, 0, 0]], [[1, 0, 0], [2, 2, 0], [2, 1, 2], [1, 1, 0]]])
STOP_WORD = torch.tensor([STOP, END, END])


def test_both_levels_are_honest_and_an_unshifted_feed_is_named():
    model = model_of(4, 3)
    model.factorization.packed(model.canvas({"word": TEXT})).check(model.mixers)
    inner = model.heads["word"].model
    canvas = inner.canvas({"byte": TEXT.flatten(0, 1)})
    inner.factorization.packed(canvas).check(inner.mixers)
    for order, target in ((Unshifted(1), model.canvas({"word": TEXT})), (Unshifted(1), canvas)):
        with pytest.raises(OrderError, match="slot 0 reads element 0, but sees element 0 through itself"):
            order.packed(target).check()


@pytest.mark.parametrize("length", [1, 2, 3, 6, 9])
def test_the_head_is_a_distribution_over_words_of_any_length(length):
    """All words of up to `length` bytes have total mass 1; those that end by the end symbol have ever more of it."""
    head = model_of(1, length).heads["word"]
    words = all_words(length)
    with torch.no_grad():
        h = torch.randn(1, 1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        mass = head.dist(h.expand(len(words), -1, -1), None, None).log_prob(words[:, None]).exp()
    assert abs(float(mass.sum()) - 1) < 1e-12
    ended = [float(mass[(words == END).any(1) & ((words != END).sum(1) < k)].sum()) for k in range(1, length + 1)]
    assert ended == sorted(ended)
    assert length < 9 or ended[-1] > 0.95


@pytest.mark.parametrize(("embed", "holds"), [(WordEmbed, True), (OneLane, False), (NextWord, False)])
def test_one_pass_over_texts_is_a_distribution(embed, holds):
    model = model_of(3, 2, embed)
    with torch.no_grad():
        total = model.log_prob(model.canvas({"word": all_texts(3, 2)})).exp().sum()
    assert (abs(float(total) - 1) < 1e-12) == holds


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("embed", "holds"), [(WordEmbed, True), (OneLane, False), (NextWord, False)])
def test_one_pass_over_words_equals_the_growing_loop_byte_by_byte(embed, holds, cached):
    model = model_of(4, 3, embed)
    with torch.no_grad():
        packed = model.log_prob(model.canvas({"word": TEXT}))
    start = model.canvas({"word": torch.zeros(2, 1, 3, dtype=torch.long)}, layout=line(1, "word"))
    random = ForcedBytes(TEXT)
    generate(Target(model, cached=cached), start, Growing(SampleAll(), torch.tensor([2, 2, 2]), 4), random=random)
    assert torch.equal(start.value["word"], TEXT)
    assert ((random.log_prob - packed).abs().max() < 1e-9) == holds


def test_one_pass_equals_a_loop_that_knows_nothing_of_lanes_or_masks():
    """Each word is encoded alone, each next word is read behind a text that ends there, each byte behind its prefix."""
    model = model_of(4, 3)
    inner = model.heads["word"].model
    packed = byte_terms(model, TEXT)
    with torch.no_grad():
        for row, i in itertools.product(range(2), range(4)):
            vectors = [model.embed.start[None, None]]
            for word in TEXT[row, :i]:
                alone = Canvas(line(2, "word"), {"word": torch.stack([word, word])[None]}, 1)
                vectors.append(model.embed(alone, Line(0).step(alone, None, 0)))
            causal = Line(1).packed(Canvas(line(i + 1, "word"), {"word": torch.zeros(1, i + 1, 3, dtype=torch.long)}))
            h = model.backbone(torch.cat(vectors, 1), causal)[:, -1]
            for j in range(3):
                if bool((TEXT[row, i, :j] == END).any()):
                    assert packed[row, i, j] == 0
                    continue
                ids = inner.canvas({"byte": TEXT[row : row + 1, i]}, j)
                plan = inner.factorization.step(ids, None, 0)
                dist, _, _ = inner.dist(inner.hidden(plan, ids, None, inner.encode({"state": h[:, None]})), plan, ids)
                assert abs(float(dist.log_probs()[0, -1, TEXT[row, i, j]] - packed[row, i, j])) < 1e-9


def test_the_sampled_law_is_the_scored_one():
    """Every outcome of the nested loops, with its probability, against one pass: a text of one or two words."""
    model = model_of(2, 2)
    stop = torch.tensor([STOP, END])

    def run(random):
        canvas = model.canvas({"word": torch.zeros(1, 1, 2, dtype=torch.long)}, layout=line(1, "word"))
        generate(Target(model), canvas, Growing(SampleAll(), stop, 2), random=random)
        return tuple(map(tuple, canvas.read("word")[0].tolist()))

    law = enumerate_law(run)
    assert abs(sum(law.values()) - 1) < 1e-12
    assert len(law) == 6 * 7 + 1  # seven words; a text that begins with the stop word is over
    for text, p in law.items():
        words = torch.tensor([list(text)])
        canvas = model.canvas({"word": words}, layout=line(len(text), "word"))
        with torch.no_grad():
            assert abs(float(model.log_prob(canvas).exp()) - p) < 1e-12


@pytest.mark.parametrize(("embed", "holds"), [(WordEmbed, True), (OneLane, False), (NextWord, False)])
def test_no_byte_reaches_an_earlier_byte_or_word_and_every_byte_reaches_what_follows(embed, holds):
    model = model_of(4, 3, embed)
    texts = torch.tensor([[[2, 1, 2], [1, 2, 1], [2, 2, 1], [2, 1, 1]]])  # no end symbol: all bytes are read
    before = byte_terms(model, texts)
    order = torch.arange(12).view(4, 3)
    honest, seen = True, True
    for i, j in itertools.product(range(4), range(3)):
        changed = texts.clone()
        changed[0, i, j] = 3 - changed[0, i, j]
        moved = (byte_terms(model, changed) - before)[0].abs()
        honest &= bool((moved[order < order[i, j]] == 0).all())
        seen &= bool((moved[order > order[i, j]] > 1e-9).all())
    assert honest == holds
    assert seen


def test_what_stands_behind_the_end_of_a_word_is_nowhere():
    model = model_of(4, 3)
    behind = (TEXT == END).long().cumsum(-1) - (TEXT == END).long() > 0
    other = torch.where(behind, 2, TEXT)
    assert not torch.equal(other, TEXT)
    assert torch.equal(byte_terms(model, TEXT), byte_terms(model, other))


def test_growth_ends_by_the_stop_word_row_by_row_and_the_cache_is_invisible():
    model, limit = model_of(1, 3), 8
    texts, slots = [], []
    for cached in (True, False):
        canvas = model.canvas({"word": torch.zeros(4, 1, 3, dtype=torch.long)})
        decider = Growing(SampleAll(), STOP_WORD, limit)
        steps = list(decode(Target(model, cached=cached), canvas, decider, random=Keyed(1)))
        texts.append(canvas.read("word"))
        slots.append([step.slots for step in steps])
        assert canvas.done
    assert all(torch.equal(a, b) for a, b in zip(*texts, strict=True))
    lengths = [len(t) for t in texts[0]]
    for text, length in zip(texts[0], lengths, strict=True):
        said = (text == STOP_WORD).all(1)
        assert not bool(said[:-1].any())
        assert bool(said[-1]) or length == limit
    assert len(set(lengths)) == 3  # rows end at different words, and go on to the limit
    assert slots[0] == [1] * limit  # one slot a word, once
    assert slots[1] == [*range(1, limit + 1)]
    for row in range(4):
        alone = model.canvas({"word": torch.zeros(1, 1, 3, dtype=torch.long)}, row=torch.tensor([row]))
        generate(Target(model), alone, Growing(SampleAll(), STOP_WORD, limit), random=Keyed(1))
        assert torch.equal(alone.read("word")[0], texts[0][row])


def test_a_prompt_is_given_and_stays():
    model = model_of(1, 3)
    canvas = model.canvas({"word": torch.cat([TEXT[:, :2], TEXT[:, :1] * 0], 1)}, 2, layout=line(3, "word"))
    generate(Target(model), canvas, Growing(SampleAll(), STOP_WORD, 5), random=Keyed(3))
    for row, text in enumerate(canvas.read("word")):
        assert torch.equal(text[:2], TEXT[row, :2])
        assert len(text) == 5 or torch.equal(text[-1], STOP_WORD)
