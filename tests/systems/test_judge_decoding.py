"""Judge decoding: when a drafted token stands, whose state is judged, what a judge learns from answers with errors."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seriatim.backbones.mamba import Mamba, MambaConfig
from seriatim.data.base import load_data
from seriatim.data.questions import KINDS, WORDINGS, asked
from seriatim.decoding.draft import DraftModel
from seriatim.decoding.guess import Guess
from seriatim.decoding.judge import Judged, Look, Watch
from seriatim.decoding.loop import decode
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Chain
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.case import randomise
from seriatim.layout import line
from seriatim.model import Model
from seriatim.posttraining.drafting import Base, load_part, save_part
from seriatim.posttraining.judge import (
    GOOD,
    UNASKED,
    WRONG,
    Judge,
    JudgeConfig,
    Verdicts,
    figures,
    judged_states,
    train_judge,
    verdict_loss,
    verdicts,
)
from seriatim.random import Keyed
from seriatim.systems.decoder.judge_decoding import Options, accuracy, between, examples
from seriatim.systems.decoders import Ask, Decoding, decoder_of
from seriatim.systems.system import Sampling
from seriatim.systems.text.next_token import Config, NextToken
from seriatim.tokenizers.text import ByteTokenizer, PairTokenizer, WordTokenizer

torch.set_num_threads(1)
VOCAB, PROMPT = 23, [3, 1, 4, 1, 5]
GREEDY, WARM = Sampling(temperature=0), Sampling(temperature=0.8, top_k=12)


def made(seed: int, std: float = 0.6, **changes: Any) -> NextToken:
    system = NextToken(
        Config(**{"length": 160, "vocab": VOCAB, "width": 32, "depth": 3, "heads": 2, **changes}),
        SimpleNamespace(special={}),
    )
    randomise(system.model, seed, std)
    system.__dict__["tokenizer"] = None
    return system.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pair() -> tuple[NextToken, NextToken]:
    """A large model, and a small one that rarely agrees."""
    return made(2), made(3, depth=1, width=16)


class Says:
    """A judge that looks at nothing: the same of every token."""

    def __init__(self, logit: float, layer: int = 2):
        self.logit, self.layer = logit, layer

    def __call__(self, h: Tensor) -> Tensor:
        return torch.full(h.shape[:-1], self.logit, dtype=h.dtype)


def way(pair: tuple[Any, Any], judge: Any, sampling: Sampling, **options: Any) -> Decoding:
    return between(Ask(pair[0], sampling, (), None, Options(**options)), pair[1], judge)


def written(pair: tuple[Any, Any], decoding: Decoding, sampling: Sampling, new: int = 30, rows: Any = (PROMPT,)) -> Any:
    canvas = pair[0]._begun(rows, new)
    target = pair[0].target(None, sampling, **decoding.target)
    with torch.inference_mode():
        steps = list(decode(target, canvas, decoding.decider, decoding.proposer, Keyed(1)))
    return canvas.value["token"], steps


# ---- when a token stands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_a_judge_that_is_never_heard_leaves_speculative_sampling_string_for_string(pair, sampling):
    rows = [PROMPT, [7], [2, 2, 9, 0]]
    ours = way(pair, Says(50.0), sampling, delta=1.0, draft_length=4)
    usual = Decoding(Chain(), way(pair, Says(0.0), sampling, draft_length=4).proposer)
    text, steps = written(pair, ours, sampling, rows=rows)
    want, others = written(pair, usual, sampling, rows=rows)
    assert torch.equal(text, want)
    assert [s.accepted.tolist() for s in steps] == [s.accepted.tolist() for s in others]
    if sampling is GREEDY:
        plain = pair[0].generate(rows, max_new_tokens=30, temperature=0.0, stop=())
        assert [v[len(r) : len(r) + 30].tolist() for v, r in zip(text, rows, strict=True)] == [g.ids for g in plain]


def test_a_judge_that_finds_everything_good_gives_the_drafts_text_with_a_token_of_the_target_behind_each_block(pair):
    large, small = pair
    text, steps = written(pair, way(pair, Says(9.0), GREEDY, draft_length=6), GREEDY, 28)
    ids = text[0].tolist()
    assert [(s.drafted, s.accepted) for s in steps] == [(6, 6)] * 4
    for start in range(len(PROMPT), len(PROMPT) + 28, 7):
        assert ids[start : start + 6] == small.generate(ids[:start], max_new_tokens=6, temperature=0.0, stop=()).ids
        end = start + 6
        assert ids[end : end + 1] == large.generate(ids[:end], max_new_tokens=1, temperature=0.0, stop=()).ids


def test_a_token_stands_by_the_usual_rule_or_by_the_judge_up_to_the_first_that_has_neither(pair):
    """By hand: a chain of eight, of which the target would have written some and the judge likes others."""
    large, _ = pair
    best = large.generate(PROMPT, max_new_tokens=1, temperature=0.0, stop=()).ids[0]

    def one(first_by_target: bool, liked: list[int]) -> int:
        """How many stand of a draft that begins as the target would, or not, and goes on with strange tokens."""
        draft = [best if first_by_target else (best + 1) % VOCAB]
        while len(draft) < 8:  # every further token is one that the target would not write
            said = large.logits(torch.tensor([PROMPT + draft]))[0, -1]
            draft.append(int(said.argmin()))

        class Likes:
            layer = 2

            def __call__(self, h: Tensor) -> Tensor:
                assert h.shape[1] == 8
                return torch.tensor([[4.0 if i in liked else -4.0 for i in range(8)]], dtype=h.dtype)

        watch = Watch(2)
        judged, canvas = Judged(Likes(), watch, 0.5), large._begun([PROMPT], 20)
        target, guess = large.target(None, GREEDY, layers=watch), Guess(torch.tensor([draft]))
        plan = target.plan(canvas, guess)
        with torch.inference_mode():
            step = judged.decide(canvas, guess, target.forward(plan, canvas, guess), Keyed(0))
        said = large.logits(torch.tensor([PROMPT + draft[: step.accepted]]))[0, -1]
        value = step.edits[0].value[0].tolist()
        assert value == [*draft[: step.accepted], int(said.argmax())]  # then the usual correction
        return step.accepted

    assert one(True, []) == 1
    assert one(False, []) == 0
    assert one(True, [0]) == 1
    assert one(False, [0]) == 1
    assert one(True, [1, 2, 4, 5]) == 3  # the fourth has neither
    assert one(False, [1, 2, 3]) == 0
    assert one(True, [1, 2, 3, 4, 5, 6, 7]) == 8


@pytest.mark.parametrize("rows", [[PROMPT], [PROMPT, [7], [2, 2, 9]]], ids=["one", "ragged"])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_judge_reads_the_state_of_the_token_itself(pair, layer, rows):
    """Shift test: what it is given is the state behind a fresh reading of the text that ends with that very token."""
    large, small = pair
    seen: list[Tensor] = []

    class Notes(Says):
        def __call__(self, h: Tensor) -> Tensor:
            seen.append(h)
            return super().__call__(h)

    decoding = way(pair, Notes(0.0, layer), GREEDY, draft_length=5)
    guesses: list[Guess] = []
    propose = decoding.proposer.propose
    decoding.proposer.propose = lambda *a: guesses.append(propose(*a)) or guesses[-1]  # type: ignore[method-assign]
    canvas, texts = large._begun(rows, 30), [list(r) for r in rows]
    for _ in decode(large.target(None, GREEDY, **decoding.target), canvas, decoding.decider, decoding.proposer):
        for r, text in enumerate(texts):
            draft = [] if guesses[-1] is None else [x for x in guesses[-1].value[r].tolist() if x >= 0]
            if draft:
                look = Look(layer)
                large.states(torch.tensor([text + draft]), look)
                want = look.states[0, -len(draft) :]
                assert torch.allclose(seen[-1][r, : len(draft)], want, atol=1e-10)
                before = look.states[0, -len(draft) - 1 : -1]
                assert not torch.allclose(seen[-1][r, : len(draft)], before, atol=1e-3)
            end = int(canvas.lengths()[r])
            texts[r] = canvas.value["token"][r, :end].tolist()
        if len(guesses) == 4:
            break
    assert sum(g is not None for g in guesses) >= 3


def test_a_judge_of_the_token_before_is_told_apart(pair):
    """A judge that has learned to know one token by its state accepts it, and not what follows it."""
    large, _ = pair
    texts = torch.randint(VOCAB, (40, 9), generator=torch.Generator().manual_seed(0)).tolist()
    marked = [Verdicts(t, [GOOD if x == 7 else WRONG for x in t]) for t in texts]
    judge, told = train_judge(Base(large), marked, JudgeConfig(layer=0), decay=1e-6)
    assert told["good_accepted"] > 0.95 and told["wrong_refused"] > 0.95
    asked_about = [Verdicts([*PROMPT, 7, 3], [UNASKED] * 5 + [GOOD, WRONG])]
    states, labels = judged_states(Base(large), asked_about, judge.layer)
    assert (judge(states) > 0).tolist() == [True, False] == (labels == GOOD).tolist()


def test_what_is_excluded_never_stands_however_sure_the_judge_is(pair):
    few = Sampling(temperature=1.0, top_k=2)
    text, steps = written(pair, way(pair, Says(50.0), few, delta=0.0, draft_length=5), few, 30)
    said = pair[0].logits(text[:, :-1])[0, len(PROMPT) - 1 :]
    rank = (said > said.gather(1, text[0, len(PROMPT) :, None])).sum(1)
    assert int(rank.max()) < 2 and sum(s.accepted for s in steps) > 0


def test_rows_of_a_batch_are_as_they_are_alone(pair):
    large, _ = pair
    judge = Judge(JudgeConfig(), Base(large)).double()
    judge.weight.data.copy_(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    rows = [PROMPT, [7], [2, 2, 9, 0]]
    together, steps = written(pair, way(pair, judge, GREEDY, draft_length=4), GREEDY, 24, rows)
    for r, row in enumerate(rows):
        alone, _ = written(pair, way(pair, judge, GREEDY, draft_length=4), GREEDY, 24, [row])
        assert torch.equal(together[r, : len(row) + 24], alone[0])
    assert torch.stack([s.accepted for s in steps]).sum() > 0


def test_a_longer_leash_accepts_more(pair):
    judge = Judge(JudgeConfig(), Base(pair[0])).double()
    judge.weight.data.copy_(torch.randn(32, generator=torch.Generator().manual_seed(0)) * 0.3)

    def accepted(delta: float) -> float:
        _, steps = written(pair, way(pair, judge, GREEDY, delta=delta, draft_length=6), GREEDY, 36)
        return sum(s.accepted for s in steps) / len(steps)

    assert accepted(1.0) < accepted(0.5) < accepted(0.0)


# ---- training --------------------------------------------------------------------------------------------------------


def test_tokens_before_an_error_are_good_those_of_it_wrong_and_what_follows_is_not_asked():
    tokenizer = ByteTokenizer()
    ids, labels = verdicts(tokenizer, "Q?\n", "It is 47.", (7, 8))
    assert tokenizer.decode(ids) == "Q?\nIt is 47."
    assert labels == [UNASKED] * 3 + [GOOD] * 7 + [WRONG] + [UNASKED]
    assert verdicts(tokenizer, "Q?\n", "It is 42.").labels == [UNASKED] * 3 + [GOOD] * 9
    pairs = PairTokenizer.train(["It is 47. It is 42. It is 4."] * 50, 300)
    ids, labels = verdicts(pairs, "Q?\n", "It is 47.", (7, 8))
    wrong = [pairs.decode([i]) for i, label in zip(ids, labels, strict=True) if label == WRONG]
    assert len(wrong) == 1 and "7" in wrong[0]  # a token of several letters is wrong if one of them is
    words = WordTokenizer.train(["It is 47 ."], 300)
    with pytest.raises(ValueError, match="loses letters"):
        verdicts(words, "Q?", "It  is 47.", (7, 8))


def test_the_loss_weighs_good_and_wrong_tokens_equally():
    logits = torch.tensor([2.0, 2.0, 2.0, -1.0])
    labels = torch.tensor([GOOD, GOOD, WRONG, GOOD])
    of = torch.nn.functional.softplus
    want = ((of(-logits[:2]).sum() + of(torch.tensor(1.0))) / 3 + of(logits[2])) / 2
    assert torch.allclose(verdict_loss(logits, labels), want)
    many = verdict_loss(torch.cat([logits, logits[:2].repeat(50)]), torch.cat([labels, labels[:2].repeat(50)]))
    assert float(many - of(torch.tensor(2.0)) / 2) < float(of(-torch.tensor(2.0)))  # the wrong one is not outvoted


def test_training_touches_the_judge_alone(pair):
    large, _ = pair
    before = [p.clone() for p in large.parameters()]
    for p in large.parameters():
        p.requires_grad_(True)
    texts = torch.randint(VOCAB, (12, 8), generator=torch.Generator().manual_seed(0)).tolist()
    judge, told = train_judge(Base(large), [Verdicts(t, [GOOD if x % 2 else WRONG for x in t]) for t in texts])
    for p, old in zip(large.parameters(), before, strict=True):
        assert p.grad is None and torch.equal(p, old)
        p.requires_grad_(False)
    assert not any(p.requires_grad for p in judge.parameters()) and float(judge.weight.abs().max()) > 0
    states, labels = judged_states(Base(large), [Verdicts(t, [1 - x % 2 for x in t]) for t in texts], judge.layer)
    logits = judge.requires_grad_(True)(states)
    verdict_loss(logits, labels).backward()
    assert judge.weight.grad is not None and all(p.grad is None for p in large.parameters())
    assert told == figures(judge, states, 1 - labels) | {"loss": told["loss"]} or told["tokens"] == 96


def test_states_of_texts_do_not_depend_on_the_company_they_are_padded_for(pair):
    base = Base(pair[0])
    some = [Verdicts(list(range(n)), [GOOD] * n) for n in (3, 9, 5)]
    together, _ = judged_states(base, some, 1)
    alone = torch.cat([judged_states(base, [e], 1)[0] for e in sorted(some, key=lambda e: len(e.ids))])
    assert torch.allclose(together, alone, atol=1e-6)


def test_a_judge_learns_what_can_be_seen_and_a_random_one_knows_nothing():
    """Two of the tokens are wrong wherever they stand; held-out texts."""
    base, g = Base(made(5, 0.5, depth=2)), torch.Generator().manual_seed(0)
    texts = torch.randint(VOCAB, (300, 8), generator=g).tolist()
    marked = [Verdicts(t, [WRONG if x in (3, 7) else GOOD for x in t]) for t in texts]
    judge, _ = train_judge(base, marked[:200], JudgeConfig(layer=0))
    held = judged_states(base, marked[200:], judge.layer)
    told = figures(judge, *held)
    assert told["good_accepted"] > 0.8 and told["wrong_refused"] > 0.8
    blind = Judge(JudgeConfig(layer=0), base)
    blind.weight.data.copy_(torch.randn(32, generator=g))
    other = figures(blind, *held)
    assert other["good_accepted"] + other["wrong_refused"] < 1.4


def test_a_judge_is_kept_with_the_fingerprint_of_its_model(pair, tmp_path):
    large, small = pair
    judge = Judge(JudgeConfig(layer=1), Base(large))
    judge.weight.data.copy_(torch.randn(32))
    save_part(judge, Base(large), tmp_path)
    again = load_part(tmp_path, Base(large), Judge)
    assert again.layer == 1 and torch.allclose(again.weight, judge.weight.double())
    with pytest.raises(ValueError, match="was trained for"):
        load_part(tmp_path, Base(small), Judge)


def test_a_judge_is_named_with_a_draft(tmp_path):
    """The whole way of a user: train, keep, name, generate."""
    torch.manual_seed(0)
    large, small = (
        NextToken(Config(length=96, width=32, depth=d, heads=2)).eval().requires_grad_(False) for d in (2, 1)
    )
    judge, _ = train_judge(Base(large), examples(large.tokenizer, 20))
    save_part(judge, Base(large), tmp_path / "judge")
    from seriatim.training.checkpoint import save_json
    from seriatim.training.state import write_safely

    folder = tmp_path / "small"
    folder.mkdir()
    write_safely(folder / "model.safetensors", small.model.state_dict(), {})
    save_json({"system": "next-token", "config": vars(small.config)}, folder / "run.json")
    save_json(small.tokenizer.to_json(), folder / "tokenizer.json")
    spec = f"judge-decoding:{tmp_path / 'judge'}+draft={folder}+draft_length=5"
    text = large.generate("Q: What is 2 plus 2?\nA:", spec, max_new_tokens=20, temperature=0.0)
    assert len(text.ids) == 20 and text.drafted > 0
    exact = large.generate("Q: What is 2 plus 2?\nA:", spec + "+delta=1.0", max_new_tokens=20, temperature=0.0)
    assert exact.ids == large.generate("Q: What is 2 plus 2?\nA:", max_new_tokens=20, temperature=0.0).ids
    for wrong, said in (
        (f"judge-decoding:{tmp_path / 'judge'}", "name a small model"),
        (f"judge-decoding+draft={folder}", "name the folder of a judge"),
        (spec + "+delta=1.5", "from 0 to 1"),
        (spec.replace("length=5", "length=0"), "draft_length is at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            decoder_of(large, wrong, GREEDY)
    with pytest.raises(FileNotFoundError, match="no trained judge-decoding"):
        decoder_of(large, f"judge-decoding:{tmp_path / 'nowhere'}+draft={folder}", GREEDY)


def test_mistakes_are_named(pair):
    large, _ = pair
    base = Base(large)
    with pytest.raises(ValueError, match="are 0 to 2, and a judge of layer 3"):
        Judge(JudgeConfig(layer=3), base)
    with pytest.raises(ValueError, match="layers are counted from 0 to 2"):
        Target(large.model, layers=Watch(7))
    with pytest.raises(ValueError, match="learns from both kinds"):
        train_judge(base, [Verdicts([1, 2, 3], [GOOD] * 3)])
    with pytest.raises(ValueError, match="nothing to learn from"):
        train_judge(base, [Verdicts([1, 2, 3], [UNASKED] * 3)])
    of = Model(line(32), Line(1), TokenEmbed(VOCAB, 32), Mamba(MambaConfig(32, 2, 4)), CategoricalHead(32, VOCAB))
    with pytest.raises(ValueError, match="cannot be looked at"):
        Judge(JudgeConfig(), Base(SimpleNamespace(model=of, meta=SimpleNamespace(key="a state-space model"))))


# ---- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_wording_is_right_and_every_error_is_found(kind):
    rng = random.Random(kind)
    for _ in range(200):
        question = KINDS[kind](rng)
        assert len(set(question.wordings)) == WORDINGS
        for wording in range(WORDINGS):
            said = question.said(wording)
            assert question.right(said + "\nQ: What is 99 plus 99?")
            bad, first, last = question.spoilt(wording, rng)
            assert not question.right(bad) and len(bad) == len(said)
            assert bad[:first] == said[:first] and bad[last:] == said[last:]
            assert bad[first] != said[first] and bad[last - 1] != said[last - 1]
        assert not question.right("I do not know.")


def test_sides_of_questions_are_apart_and_follow_from_the_seed():
    data = load_data("questions", "text", count=400, wording=1, seed=3)
    asks = [{d.partition("\n")[0] for d in side.documents} for side in (data.train, data.test)]
    assert not asks[0] & asks[1] and len(data.train) == 380 and len(data.test) == 20
    again = load_data("questions", "text", count=400, wording=1, seed=3)
    assert again.train.documents == data.train.documents
    assert load_data("questions", "text", count=400, seed=4).train.documents != data.train.documents
    sums = [d for d in data.train.documents if " plus " in d]
    share = sum("The sum of" in d for d in sums) / len(sums)
    assert 0.7 < share < 1.0  # four of five, and a third of the rest
    known = {q.prompt: q for q in asked(3, 380)}
    wrong = load_data("questions", "text", count=400, wrong=0.4, seed=3).train.documents
    bad = [not known[d.partition("A:")[0] + "A:"].right(d.partition("A:")[2]) for d in wrong]
    assert 0.3 < sum(bad) / len(bad) < 0.5
    for options, said in (({"wording": 3}, "wordings 0 to 2"), ({"wrong": 1.5}, "a share from 0 to 1")):
        with pytest.raises(ValueError, match=said):
            load_data("questions", "text", **options)


def test_accuracy_counts_right_answers_and_tokens_a_forward():
    class Writes:
        def generate(self, prompt: str, decoding: Any, **settings: Any) -> Any:
            assert settings["stop"] == ["\n"] and decoding == "way"
            question = next(q for q in some if q.prompt == prompt)
            right = some.index(question) % 4
            return SimpleNamespace(text=question.wordings[0] if right else "It is 0.", ids=[0] * 6, forwards=2)

    some = asked(0, 8)
    assert accuracy(Writes(), lambda: "way", some) == {"accuracy": 0.75, "tokens_per_forward": 3.0}


def test_examples_have_an_error_in_every_other_answer():
    marked = examples(ByteTokenizer(), 30, seed=1)
    assert [WRONG in e.labels for e in marked] == [False, True] * 30
    text = ByteTokenizer().decode(marked[1].ids)
    assert text.startswith("Q: ") and replace(Options(), delta=1.0).delta == 1.0

    def prompts(some: list[Verdicts]) -> set[tuple[int, ...]]:
        return {tuple(x for x, label in zip(*e, strict=True) if label == UNASKED) for e in some[::2]}

    assert not prompts(marked) & prompts(examples(ByteTokenizer(), 30, seed=1, test=True))


def test_the_draft_is_greedy_where_the_target_is(pair):
    for sampling, siblings in ((GREEDY, "top"), (WARM, "independent")):
        proposer = way(pair, Says(0.0), sampling).proposer
        assert isinstance(proposer, DraftModel) and proposer.siblings == siblings
