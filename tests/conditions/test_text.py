"""A text as a condition: read as a whole, padding neither read nor attended to, the same in steps as in one pass."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from seriatim.backbones.layer import TransformerConfig
from seriatim.backbones.relative import Relative
from seriatim.backbones.transformer import Transformer
from seriatim.conditions.condition import Condition
from seriatim.conditions.text import TextEncoder
from seriatim.decoding.loop import decode, generate, select_rows
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import Case, randomise
from seriatim.laws.laws import LAWS
from seriatim.layout import line
from seriatim.model import Model
from seriatim.random import Forced, Keyed

WIDTH, VOCAB = 16, 3
ENCODER = TransformerConfig(WIDTH, 2, 2, hidden=20, relative=Relative(8, 5, both=True))
DECODER = TransformerConfig(WIDTH, 2, 2, hidden=20, relative=Relative(6, 5), memory=WIDTH)
TEXTS = torch.tensor([[0, 1, 2, 2, 1], [2, 0, -1, -1, -1], [1, -1, -1, -1, -1]])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def language(length: int, vocab: int = VOCAB) -> Model:
    embed = TokenEmbed(vocab, WIDTH)
    text = TextEncoder(ENCODER, embed.table)
    head = CategoricalHead(WIDTH, vocab)
    return randomise(Model(line(length), Line(1), embed, Transformer(DECODER), head, {"text": text}))


def encoder() -> TextEncoder:
    return randomise(TextEncoder(ENCODER, torch.nn.Parameter(torch.zeros(VOCAB, WIDTH))))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 9, 11])
def test_the_laws_hold(number: int) -> None:
    LAWS[number][1](Case(language(3, vocab=2), vocab=2, condition={"text": torch.tensor([[0, 1, 1, -1]])}))


@torch.no_grad()
def test_a_text_is_read_as_if_alone_and_as_a_whole() -> None:
    e = encoder()
    together = e(TEXTS)
    assert together.there is not None and torch.equal(together.there, TEXTS >= 0)
    for b, n in enumerate((5, 2, 1)):
        alone = e(TEXTS[b : b + 1, :n])
        assert alone.there is None
        close(together.memory[b, :n], alone.memory[0])
    changed = TEXTS.clone()
    changed[0, 4] = 2
    assert bool((e(changed).memory[0] - together.memory[0]).abs().amax(-1).gt(1e-3).all())


@torch.no_grad()
def test_what_follows_a_text_does_not_depend_on_its_company() -> None:
    model = language(4)
    x = torch.tensor(list(itertools.product(range(VOCAB), repeat=4)))
    for b, n in enumerate((5, 2, 1)):
        rows = TEXTS[b : b + 1].expand(len(x), -1)
        padded = model.log_prob(model.canvas({"token": x}), {"text": rows})
        close(padded, model.log_prob(model.canvas({"token": x}), {"text": rows[:, :n]}))
        assert abs(padded.exp().sum() - 1) < 1e-12
    forced, mine = Forced(x[:3]), model.canvas({"token": x[:3].clone()})
    want = model.log_prob(mine, {"text": TEXTS})
    generate(Target(model, {"text": TEXTS}), model.canvas({"token": x[:3].clone()}, 0), SampleAll(), random=forced)
    close(forced.log_prob, want)


@torch.no_grad()
def test_rows_take_their_texts_along() -> None:
    model = language(6)

    def started(rows: list[int]):
        canvas = model.blank(len(rows))
        canvas.row = torch.tensor(rows)
        return canvas

    def alone(row: int) -> Tensor:
        canvas = started([row])
        target = Target(model, {"text": TEXTS[row : row + 1]})
        return generate(target, canvas, SampleAll(), random=Keyed(3)).value["token"][0]

    target, canvas = Target(model, {"text": TEXTS}), started([0, 1, 2])
    select_rows(target, canvas, torch.tensor([2, 0]))
    generate(target, canvas, SampleAll(), random=Keyed(3))
    assert canvas.row.tolist() == [2, 0]
    for row, value in zip((2, 0), canvas.value["token"], strict=True):
        assert torch.equal(value, alone(row))


@pytest.mark.parametrize("news", [[0, 1, 2, 2, 1], [2, 2], [2, 1, 0, 1, 2, 0, 1]])
@torch.no_grad()
def test_a_text_of_any_length_is_admitted_beside_others(news: list[int]) -> None:
    """Shorter or longer than those that are being answered, which have padding or not."""
    model = language(6)

    def started(row: int):
        canvas = model.blank(1)
        canvas.row = torch.tensor([row])
        return canvas

    def alone(row: int, text: list[int]) -> Tensor:
        target = Target(model, {"text": torch.tensor([text])})
        return generate(target, started(row), SampleAll(), random=Keyed(3)).value["token"][0]

    old = [[1, 0, 1], [2, 0, 1, 2, 2]]
    for texts in (old[:1], old):
        padded = torch.tensor([[*t, *[-1] * (max(map(len, texts)) - len(t))] for t in texts])
        canvas, rows = model.blank(len(texts)), torch.arange(len(texts))
        canvas.row = rows
        target = Target(model, {"text": padded})
        for _, _ in zip(range(2), decode(target, canvas, SampleAll(), random=Keyed(3)), strict=False):
            pass
        more = {"text": torch.tensor([news])}
        select_rows(target, canvas, torch.cat([rows, torch.tensor([-1])]), started(9), more)
        generate(target, canvas, SampleAll(), random=Keyed(3))
        for row, value, text in zip([*rows.tolist(), 9], canvas.value["token"], [*texts, news], strict=True):
            assert torch.equal(value, alone(row, text))


def test_what_is_no_text_is_refused() -> None:
    e = encoder()
    for wrong in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"ids \(batch, places\), integers"):
            e(wrong)
    for empty in (torch.tensor([[0], [-1]]), torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match="at least one token, in every row"):
            e(empty)
    with pytest.raises(ValueError, match=r"ids lie in 0..2, got 3"):
        e(torch.tensor([[3]]))
    with pytest.raises(ValueError, match="no null"):
        language(3).encode({"text": TEXTS}, torch.ones(3, dtype=torch.bool))
    for there in (torch.ones(2, 3, dtype=torch.bool), None):
        memory = torch.zeros(2, 4, WIDTH) if there is not None else None
        with pytest.raises(ValueError, match=r"`there` says of each place"):
            Condition(memory=memory, there=torch.ones(2, 3, dtype=torch.bool))
