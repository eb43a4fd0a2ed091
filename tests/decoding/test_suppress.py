"""Tokens that are not written, or not as the first new one: the law that is left, in any order and by every decoder."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from seriatim.cli.main import main
from seriatim.decoding.filters import Suppress
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import Above, SampleAll, Select
from seriatim.decoding.target import Target
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder, Blocks
from seriatim.heads.dist import Categorical
from seriatim.interop.grammar import Grammar
from seriatim.laws.decoders import DecoderCase
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.interface import small
from seriatim.laws.tabular import tabular
from seriatim.laws.unmasking import PROMPT, UnmaskingCase
from seriatim.layout import line
from seriatim.random import Keyed
from seriatim.systems.decoders import Ask, decoder_names
from seriatim.systems.meta import load as module_of
from seriatim.systems.system import Sampling
from seriatim.systems.text import ilm, mdlm
from seriatim.systems.tokens import token_ids
from seriatim.tokenizers.text import ByteTokenizer, WordTokenizer
from seriatim.verbs.generate import sampling_of

V, SIZE = 3, 3
ORDERS = {"line": lambda: Line(1), "any order": AnyOrder, "blocks": lambda: Blocks(2, "any")}


def law_of(model, suppress, known=0, start=(0, 0, 0)):
    """The law of texts, decoded one token at a time, at random where there is a choice."""
    decider = SampleAll if isinstance(model.factorization, Line) else lambda: Select("random", SIZE)

    def run(random, rows):
        canvas = model.canvas({"token": torch.tensor([start]).expand(rows, -1)}, known)
        generate(Target(model, suppress=suppress), canvas, decider(), random=random)
        return [tuple(text) for text in canvas.value["token"].tolist()]

    return enumerate_rows(run)


def by_hand(model, never, first, known=0, start=(0, 0, 0)):
    """The same, each factor from the model's own law without the tokens: the mean over the orders there are."""
    order = model.factorization
    free = list(range(known, SIZE))
    orders = {
        Line: [free], AnyOrder: list(itertools.permutations(free)),
        Blocks: [[*a, *b] for a in itertools.permutations([e for e in free if e < 2])
                 for b in itertools.permutations([e for e in free if e >= 2])],
    }[type(order)]  # fmt: skip
    law, target = {}, Target(model, cached=False)
    for text in itertools.product(range(V), repeat=SIZE - known):
        x = torch.tensor([[*start[:known], *text]])
        for turns in orders:
            p = 1.0
            for i, e in enumerate(turns):
                shown = [*range(known), *turns[:i]]
                canvas = model.canvas({"token": x}, known + i if order.draftable else _marks(shown))
                rows = target.forward(target.plan(canvas), canvas)
                column = 0 if order.draftable else rows.element[0].tolist().index(e)
                said = rows.dist.probs()[0, column].clone()
                said[list(never)] = 0
                said[list(first) if e == known else []] = 0
                p *= float(said[x[0, e]] / said.sum())
            law[tuple(x[0].tolist())] = law.get(tuple(x[0].tolist()), 0.0) + p / len(orders)
    return law


def _marks(shown):
    return torch.isin(torch.arange(SIZE), torch.tensor(shown, dtype=torch.long))[None]


def gap(a, b):
    return sum(abs(a.get(x, 0.0) - b.get(x, 0.0)) for x in {*a, *b}) / 2


@pytest.mark.parametrize(("order", "known"), [("line", 0), ("line", 1), ("blocks", 0), ("blocks", 1), ("any order", 1)])
@pytest.mark.parametrize(("never", "first"), [((1,), ()), ((), (2,)), ((0,), (1,))])
def test_what_is_left_is_the_models_law_without_them(order, known, never, first):
    """By enumeration of all texts and orders. The first new one is that behind the prompt, whenever it is decided."""
    model = tabular(line(SIZE), ORDERS[order](), V, 2)
    want = by_hand(model, never, first, known, (2, 0, 0))
    assert gap(law_of(model, Suppress(never, first), known, (2, 0, 0)), want) < 1e-12
    assert gap(law_of(model, None, known, (2, 0, 0)), want) > 0.05
    if first and order != "line":  # the first that is decided is another one
        assert gap(law_of(model, Suppress((*never, *first)), known, (2, 0, 0)), want) > 0.02


def test_rows_with_prompts_of_other_lengths_begin_each_where_its_prompt_ends():
    model = tabular(line(6), Line(1), V, 1)
    x = torch.zeros(64, 6, dtype=torch.long)
    known = torch.arange(64) % 3
    canvas = model.canvas({"token": x}, known)
    generate(Target(model, suppress=Suppress(first=(0, 1))), canvas, SampleAll(), random=Keyed(0))
    made = canvas.value["token"]
    begins = made.gather(1, known[:, None])
    assert bool((begins == 2).all()) and int((made[:, 3:] != 2).sum()) > 50


@pytest.mark.parametrize("rule", ["confidence", "margin", "entropy"])
def test_confidence_is_that_of_the_law_without_them(rule):
    """As where LLaDA gives the ends of text no logit: what they took from the others is not doubt about the others."""
    model = tabular(line(8), AnyOrder(), V, 4)
    canvas, target = model.blank(1), Target(model, suppress=Suppress((1,)))
    rows = target.forward(target.plan(canvas), canvas)
    said = Categorical(Target(model).forward(Target(model).plan(canvas), canvas).dist.logits.clone())
    said.logits[..., 1] = -torch.inf
    torch.testing.assert_close(rows.said.log_probs(), said.log_probs())
    kept, all_ids = (
        [s.edits[0].element[0].max().item() for s in decode(t, model.blank(1), Select(rule, 8), random=Keyed(1))]
        for t in (Target(model, suppress=Suppress((1,))), Target(model))
    )
    assert sorted(kept) == list(range(8)) and kept != all_ids
    sure = Select("confidence", commit=Above(0.6))
    first = next(decode(Target(model, suppress=Suppress((1,))), model.blank(1), sure, random=Keyed(2)))
    assert (first.edits[0].element >= 0).sum() > 1, "sure of two that are left"


# ---- every decoder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", decoder_names("unmasking"))
def test_no_decoder_of_masks_writes_them(key):
    """At the options of its case and at the neutral ones, of models in any order and of blocks."""
    case: UnmaskingCase = module_of(key).case()
    sampling = Sampling(temperature=1.0)

    def texts(system, neutral, suppress=None):
        out = []
        for seed in range(3):
            way = case.decoding(system, sampling, neutral)
            way = way if suppress is None else replace(way, target={**way.target, "suppress": suppress})
            canvas, _ = case.write(system, sampling, way, seed=seed)
            out.append(canvas.read("token")[0].tolist()[len(PROMPT) :])
        return out

    for system, neutral in itertools.product(case.systems, (False, True)):
        plain = [i for text in texts(system, neutral) for i in text]
        common = max(range(3), key=plain.count)
        never, begun = (texts(system, neutral, s) for s in (Suppress((common,)), Suppress(first=(common,))))
        assert common in plain and not any(common in text for text in never)
        assert all(text[0] != common for text in begun) and any(common in text for text in begun)


@pytest.mark.parametrize("key", ["bild", "judge-decoding", "beam", "skipdecode", "first", "ffn-skipllm", "gear"])
def test_relaxed_decoders_do_not_write_them_either(key):
    """At the options of their cases, which are not the neutral ones (those are a column of the table of decoders)."""
    case: DecoderCase = module_of(key).case()
    system, prompt = small(case.depth), "the cat"
    own = system.generate(prompt, "ancestral", max_new_tokens=12, temperature=0.0).ids
    never, first = tuple({*own[1:6]} - {own[0]}), (own[0],)
    sampling = Sampling(temperature=0.0, suppress_tokens=never, begin_suppress_tokens=first)
    way = case.decoder(Ask(system, sampling, system.stop, None, case.options))
    more = {"suppress_tokens": never, "begin_suppress_tokens": first}
    made = system.generate(prompt, way, max_new_tokens=12, temperature=0.0, **more).ids
    assert made[0] not in first and not {*made} & {*never}


# ---- by name ---------------------------------------------------------------------------------------------------------


def test_tokens_are_ids_or_names_or_what_one_token_says():
    spelled = ByteTokenizer()
    assert token_ids(spelled, [7, "<eos>", "a"]) == (7, spelled.special["eos"], ord("a"))
    words = WordTokenizer.of(["red", "blue"])
    assert token_ids(words, ["blue", "<eos>"]) == (17, words.special["eos"])
    for tokenizer, wrong, said in (
        (spelled, "<end>", "'<end>' is 5 tokens"), (spelled, "", "'' is no token"), (None, "a", "without a tokenizer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            token_ids(tokenizer, [wrong])
    with pytest.raises(ValueError, match="a list of ids and names"):
        token_ids(spelled, "<eos>")


def test_ends_of_text_that_are_suppressed_end_nothing():
    system = small()
    with torch.no_grad():
        system.model.heads["token"].weight[system.stop[0]] = 3 * system.model.heads["token"].weight.abs().sum(0)
    ended = [len(system.generate("ab", max_new_tokens=20, seed=n).ids) for n in range(4)]
    whole = [len(system.generate("ab", max_new_tokens=20, seed=n, suppress_tokens=["<eos>"]).ids) for n in range(4)]
    assert min(ended) < 20 and whole == [20] * 4
    assert sampling_of(system, suppress_tokens=["<eos>"]).suppress_tokens == system.stop


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (
            lambda s: s.generate("ab", suppress_tokens=[272]),
            "id 272 cannot be suppressed: .* ids are 0 to 271",
        ),
        (lambda s: s.generate("ab", begin_suppress_tokens=[-1]), "id -1 cannot be suppressed"),
        (lambda s: s.generate("ab", suppress_tokens=list(range(272))), "nothing is left"),
        (lambda s: s.generate("ab", suppress_tokens=["nonsense"]), "'nonsense' is 8 tokens"),
        (lambda s: s.generate("ab", suppress_tokens=[5], grammar=Grammar("regex", "a+")), "leave one out"),
        (lambda s: Target(tabular(line(3), Line(1), V), suppress=Suppress((V,))), "ids are 0 to 2"),
    ],
)
def test_tokens_that_there_are_not_are_named(run, said):
    with pytest.raises(ValueError, match=said):
        run(small())


def test_systems_that_choose_places_refuse():
    one = ilm.ILM(ilm.Config(length=16, width=8, depth=1, heads=1), ByteTokenizer()).eval()
    for wrong in ({"suppress_tokens": (5,)}, {"presence_penalty": 1.0}):
        with pytest.raises(ValueError, match="chooses a token together with its place"):
            list(one.stream("ab", 4, Sampling(**wrong)))


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of masks in a folder, that writes little else than x, y and ends."""
    from seriatim.verbs.train import train

    place = tmp_path_factory.mktemp("run")
    book = place / "book.txt"
    book.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 100, encoding="utf-8")
    tiny = {"width": 16, "depth": 1, "heads": 2, "length": 64, "steps": 1, "batch": 2}
    for key in ("mdlm", "next-token"):
        train(key, book, out=place / key, settings=tiny)
    return place


@pytest.mark.parametrize("key", ["mdlm", "next-token"])
def test_the_command_takes_ids_and_texts(run, key, capsys):
    command = ["generate", str(run / key), "--prompt", "ab", "--length", "24", "--temperature", "2", "--top-p", "1"]
    assert main([*command, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["text"].removeprefix("ab")
    letters = sorted({c for c in plain if c.isascii()})[:6]
    digits = [str(ord(c)) if c.isdigit() else c for c in letters]
    tokens = [x for c in digits for x in ("--suppress-tokens", c)]
    begin = ["--begin-suppress-tokens", str(plain.encode()[0])] if plain[0].isascii() else []
    assert main([*command, *tokens, *begin, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["text"].removeprefix("ab")
    assert made and not {*made} & {*letters} and made[0] != plain[0]


@pytest.mark.parametrize("option", ["--suppress-tokens", "--begin-suppress-tokens"])
@pytest.mark.parametrize(("token", "said"), [("999", "ids are 0 to 271"), ("<nothing>", "is 9 tokens")])
@pytest.mark.parametrize("key", ["mdlm", "next-token"])
def test_the_command_names_what_is_no_token(run, key, option, token, said, capsys):
    assert main(["generate", str(run / key), "--prompt", "ab", "--length", "4", option, token]) == 2
    told = capsys.readouterr()
    assert said in " ".join(told.err.split()) and told.out == ""


def test_the_film_says_what_was_suppressed(run, tmp_path, capsys):
    page = tmp_path / "film.html"
    command = ["generate", str(run / "mdlm"), "--prompt", "ab", "--length", "4", "--suppress-tokens", "<eos>"]
    assert main([*command, "--record", str(page)]) == 0
    assert "suppress tokens" in page.read_text(encoding="utf-8") and mdlm.META.title in page.read_text(encoding="utf-8")
