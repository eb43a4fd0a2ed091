"""Pictures by the words of a prompt: what is said, what is understood, and what the model does with it."""

import pytest
import torch

from seriatim.backbones.flanked import Flanked
from seriatim.conditions.text import TextPrefix
from seriatim.data.base import load_data
from seriatim.data.fonts import FAMILIES, described
from seriatim.laws.laws import LAWS
from seriatim.random import Generator
from seriatim.systems.image import raster_ar, token_shuffle
from seriatim.systems.prompts import Prompts, styles_of
from seriatim.systems.system import Sampling
from seriatim.tokenizers.pixels import PixelConfig, PixelTokenizer
from seriatim.verbs.generate import generate

STYLES, NAMES = ("bold serif", "bold italic sans", "mono"), ("a", "A", "7")
TINY = {"vocab": 2, "classes": 3, "width": 16, "depth": 2, "heads": 2, "dropout": 0.0, "blocks": 1}


def system(**changes):
    config = token_shuffle.Config(**TINY, side=4, told="text", styles=STYLES, names=NAMES, **changes)
    torch.manual_seed(0)
    return token_shuffle.TokenShuffle(config, PixelTokenizer(PixelConfig(side=4, levels=2))).eval()


def words(prompts, ids):
    return [" ".join(prompts.words[i] for i in row if i >= 0) for row in ids.tolist()]


def test_styles_and_classes_are_said_in_words():
    prompts = Prompts(STYLES, NAMES)
    ids = prompts.of(torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2]))
    assert words(prompts, ids) == ["bold italic sans letter a", "bold serif letter A", "mono digit 7"]
    assert ids.shape == (3, 5) and ids[2].tolist()[3:] == [-1, -1]
    assert words(prompts, prompts.of(torch.tensor([1]))) == ["letter A"]
    keep = torch.tensor([[False, True, False, True, True]])
    assert words(prompts, prompts.of(torch.tensor([0]), torch.tensor([1]), keep)) == ["italic letter a"]


def test_prompts_are_read_as_people_write_them():
    prompts = Prompts(STYLES, NAMES)
    texts = ["a bold serif letter A", "The Bold Letter a", "digit 7", "a"]
    assert words(prompts, prompts.read(texts)) == ["bold serif letter A", "bold letter a", "digit 7", "a"]
    same = prompts.of(torch.tensor([1]), torch.tensor([0]))
    assert torch.equal(prompts.read(["bold serif letter A"]), same), "as it was trained"


@pytest.mark.parametrize(
    ("text", "said"),
    [("bald letter a", "did you mean bold"), ("letter z", "no picture was called 'z'"), (" ", "asks for nothing"),
     ("bold bold bold bold bold a", "at most 5")],
)  # fmt: skip
def test_words_that_nothing_was_called_by_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        Prompts(STYLES, NAMES).read([text])


def test_the_fonts_of_glyphs_are_all_described():
    said = styles_of(load_data("glyphs", "image"))
    assert len(said) == sum(map(len, FAMILIES.values())) == len(set(said)) and all(said)
    assert {"bold italic serif", "bold sans", "typewriter", "italic times"} <= set(said)
    assert described("Roboto-BoldItalic") == "bold italic roboto" and described("arial") == "arial"


def test_words_stand_in_the_slots_in_front_and_dropped_ones_are_the_null():
    told = TextPrefix(3, 8, ("prefix", "vector"))
    out = told(torch.tensor([[2, 0, -1], [1, -1, -1], [-1, -1, -1]]), torch.tensor([False, True, False]))
    table = told.table
    assert torch.equal(out.prefix[0], table[[2, 0, 3]]) and torch.equal(out.prefix[1], table[[4, 4, 4]])
    torch.testing.assert_close(out.vector, torch.stack([table[[2, 0]].mean(0), table[4], table[3]]))
    assert TextPrefix(3, 8)(torch.tensor([[0]])).vector is None
    for wrong in (torch.tensor([[3]]), torch.tensor([[0.5]]), torch.tensor([0])):
        with pytest.raises(ValueError, match="ids"):
            told(wrong)


@pytest.mark.parametrize("number", sorted(LAWS))
def test_laws_hold_where_text_stands_in_front(number):
    case = token_shuffle.told_by_text()
    if number not in (4, 7, 8, 11, 12):  # of drafts, of this order's feed, of limits and files: those of the class form
        LAWS[number][1](case)


def test_windows_depend_on_every_word_and_words_on_nothing_behind_them():
    model = token_shuffle.told_by_text().model
    x, text = torch.zeros(1, 8, dtype=torch.long), torch.tensor([[0, 1, 2]])
    canvas = model.canvas({"token": x})
    plan = model.factorization.packed(canvas)
    with torch.no_grad():
        before = model.hidden(plan, canvas, None, model.encode({"text": text}))
        for i in range(3):
            other = text.clone()
            other[0, i] = 3
            raw = model.encode({"text": other})
            raw = type(raw)(prefix=raw.prefix, vector=model.encode({"text": text}).vector)  # norms as before
            moved = (model.hidden(plan, canvas, None, raw) - before).abs().amax(2)[0] > 1e-9
            assert moved.tolist() == [place >= i for place in range(4)]


def test_networks_in_front_leave_words_untouched(monkeypatch):
    model, seen = token_shuffle.told_by_text().model, []
    monkeypatch.setattr(Flanked.__mro__[1], "forward", lambda self, x, *rest: seen.append(x) or x)
    canvas = model.canvas({"token": torch.zeros(1, 8, dtype=torch.long)})
    plan, told = model.factorization.packed(canvas), model.encode({"text": torch.tensor([[0, 1, 2]])})
    x = model.vectors(plan, canvas, told)
    model.backbone(x, plan)
    assert torch.equal(seen[0][:, :3], x[:, :3]) and not torch.equal(seen[0][:, 3:], x[:, 3:])


def test_words_of_a_style_are_left_out_in_training_alone(monkeypatch):
    made, seen = system(), []
    of = Prompts.of
    monkeypatch.setattr(Prompts, "of", lambda *args: seen.append(args[-1]) or of(*args))
    images = torch.zeros(64, 1, 4, 4)
    batch = {"image": images, "label": torch.arange(64) % 3, "style": torch.arange(64) % 3}
    made.losses(batch, Generator(0), 0.0)
    made.train().losses(batch, Generator(0), 0.1)
    assert seen[0] is None
    assert 0.5 < float(seen[1].double().mean()) < 0.85  # 320 draws of 2/3: 6 standard deviations


def test_pictures_are_asked_for_by_prompts_and_guided_from_the_null():
    made = system()
    with torch.no_grad():
        made.model.conditions["text"].table.mul_(3)
    sampling = Sampling(guidance=2.0)
    out = generate(made, prompt="a bold letter A, digit 7", count=3, seed=1, guidance=2.0)
    assert out.labels.tolist() == [0, 0, 0, 1, 1, 1] and out.forwards == 4
    again = made.prompted(["bold letter A", "digit 7"]).draw(out.labels, sampling=sampling, seed=1)
    swapped = made.prompted(["digit 7", "bold letter A"]).draw(1 - out.labels, sampling=sampling, seed=1)
    assert torch.equal(swapped.images, again.images), "labels count prompts"
    plain = made.draw(torch.tensor([1] * 6), sampling=sampling, seed=1)
    asked = made.prompted(["letter A"]).draw(torch.tensor([0] * 6), sampling=sampling, seed=1)
    assert torch.equal(plain.images, asked.images), "a class is asked for by its name"
    assert made.asked is None


def test_prompts_are_refused_where_classes_were_learned():
    other = raster_ar.RasterAR(raster_ar.Config(side=4, vocab=2), None)
    with pytest.raises(ValueError, match="trained by classes"):
        generate(other, prompt="letter A")
    with pytest.raises(ValueError, match="give one of them"):
        generate(system(), prompt="letter A", labels=[1])
    with pytest.raises(ValueError, match="names of classes"):
        token_shuffle.Config(told="text")
    with pytest.raises(ValueError, match="told is"):
        token_shuffle.Config(told="sound")


def test_the_rank_of_a_table_is_that_of_its_directions():
    assert token_shuffle.effective_rank(torch.eye(4)) == pytest.approx(1)
    flat = torch.outer(torch.arange(1.0, 5), torch.ones(8))
    assert token_shuffle.effective_rank(flat) == pytest.approx(1 / 4)
