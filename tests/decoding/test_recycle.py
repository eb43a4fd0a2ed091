"""Token recycling: the matrix holds what rows said last, the tree is filled from it, the text is the model's own."""

from __future__ import annotations

import gc
import random as stdlib

import pytest
import torch

from seriatim.backbones.cache import KVCache
from seriatim.canvas import Truncate
from seriatim.decoding.draft import NGram
from seriatim.decoding.loop import decode
from seriatim.decoding.ranking import MANY, RUN, ranked
from seriatim.decoding.recycle import Adjacency, Recycler, _accepted
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.templates import RECYCLED, of_paths, standard
from seriatim.decoding.verify import GreedyMatch, Walk
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.interface import small
from seriatim.layout import line
from seriatim.model import Model
from seriatim.random import Generator, Keyed
from seriatim.systems.decoders import LEARNED, decoder_of, forget
from seriatim.systems.system import Sampling

TREE = of_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])


def filled(vocab: int, width: int, seed: int = 0, holes: float = 0.0) -> Adjacency:
    """A matrix of random candidates; some rows end early."""
    rng, matrix = stdlib.Random(seed), Adjacency(vocab, width)
    for token in range(vocab):
        known = rng.randrange(width) if rng.random() < holes else width
        row = rng.sample(range(vocab), known)
        if row:
            matrix.write([token], torch.tensor([row]))
    return matrix


# ---- the matrix ------------------------------------------------------------------------------------------------------


def test_the_matrix_has_eight_candidates_of_each_token_and_one_empty_row_in_two_megabytes():
    matrix = Adjacency(49152)
    assert tuple(matrix.next.shape) == (49153, 8)
    assert matrix.next.dtype == torch.int32
    assert matrix.next.nbytes < 2e6
    assert bool((matrix.next == -1).all())


@pytest.mark.parametrize("template", [RECYCLED, TREE, standard(12)])
@pytest.mark.parametrize("holes", [0.0, 0.6])
def test_a_filled_tree_is_that_of_a_naive_recursion(template, holes):
    matrix = filled(30, 8, 3, holes)

    def below(token: int, path: tuple[int, ...]) -> int:
        for child in path:
            token = int(matrix.next[token, child]) if token >= 0 else -1
        return token

    for root in (0, 7, 29):
        assert matrix.fill(template, root) == [below(root, path) for path in template.paths]
    assert matrix.fill(template, -1) == [-1] * template.size


def test_writing_changes_exactly_the_tokens_that_are_named_and_the_last_of_equals_counts():
    matrix = filled(20, 4)
    before = matrix.next.clone()
    best = torch.arange(12).view(3, 4)
    matrix.write([5, 9, 5], best)
    assert matrix.next[5].tolist() == [8, 9, 10, 11]
    assert matrix.next[9].tolist() == [4, 5, 6, 7]
    others = [i for i in range(21) if i not in (5, 9)]
    assert torch.equal(matrix.next[others], before[others])
    matrix.write([], best[:0])
    assert bool((matrix.next[-1] == -1).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [5, 300, MANY, 5 * MANY + 17])
def test_the_likeliest_ids_are_those_of_a_plain_sort(vocab, dtype):
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab), dtype=torch.float64).to(dtype)
    logits[0, -1] = logits[1, vocab // RUN * RUN - 1] = 50.0  # at the end of everything, and of the last whole run
    logits[2, : vocab // 2] = -torch.inf
    ids = ranked(logits, 8)
    assert torch.equal(logits.gather(1, ids), logits.topk(min(8, vocab)).values)
    assert all(len(set(row)) == len(row) for row in ids.tolist())


# ---- what is drafted and learned, step by step -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(transformer):
    return transformer(vocab=11, std=0.6)


def begun(model: Model, rows: list[list[int]], new: int):
    known = torch.tensor([len(r) for r in rows])
    size = int(known.max()) + new
    value = torch.zeros(len(rows), size, dtype=torch.long)
    for b, row in enumerate(rows):
        value[b, : len(row)] = torch.tensor(row)
    alike = len(set(known.tolist())) == 1
    return model.canvas({"token": value}, int(known[0]) if alike else known, layout=line(size))


def said_behind(model: Model, texts: list[list[int]]) -> list[list[int]]:
    """The ids that the model holds likely behind each of these texts, the likeliest first, by plain forwards."""
    out = []
    for text in texts:
        target, canvas = Target(model, cached=False), begun(model, [text], 1)
        plan = target.plan(canvas)
        assert plan is not None
        out.append(target.forward(plan, canvas).dist.logits[0, -1].argsort(descending=True).tolist())
    return out


@torch.inference_mode()
@pytest.mark.parametrize("rows", [[[1, 4, 2]], [[1, 4, 2], [3, 3, 0]], [[1, 4, 2], [5], [0, 2, 2, 7]]])
def test_each_step_writes_what_was_said_behind_the_root_and_every_node_and_nothing_else(model, rows):
    """Against plain forwards over each path; the accepted path is written last, before it the rejected nodes from the
    deepest to the first."""
    matrix, canvas, target = filled(11, 4, 1), begun(model, rows, 8), Target(model)
    recycler, expected = Recycler(matrix, TREE), None
    stream = decode(target, canvas, Walk(), recycler, Keyed(1))
    expected = matrix.next.clone()
    for _ in range(4):
        lengths = canvas.lengths().tolist()
        texts = [canvas.value["token"][b, :n].tolist() for b, n in enumerate(lengths)]
        drafts = [matrix.fill(TREE, text[-1]) for text in texts]
        next(stream)
        for b, (text, draft) in enumerate(zip(texts, drafts, strict=True)):
            new = canvas.value["token"][b, len(text) : int(canvas.lengths()[b])].tolist()
            paths = [[draft[TREE.paths.index(p[: i + 1])] for i in range(len(p))] for p in TREE.paths]
            on_the_way = [i for i, p in enumerate(paths) if p == new[: len(p)]]
            order = [i for i in reversed(range(TREE.size)) if i not in on_the_way]
            written = [*([*text, *paths[i]] for i in order), text, *([*text, *paths[i]] for i in on_the_way)]
            for whole, best in zip(written, said_behind(model, written), strict=True):
                expected[whole[-1]] = torch.tensor(best[:4])
        assert torch.equal(matrix.next, expected)


class Identity(torch.nn.Module):
    """A backbone that sees nothing but the token itself: what follows is a first-order Markov chain."""

    mixers = {"all": "any"}  # noqa: RUF012

    def new_cache(self, batch: int, capacity: int = 256) -> KVCache:
        return KVCache(1, batch, 1, 1, torch.float64, capacity=32)

    def forward(self, x, plan, cache=None, vector=None, memory=None):
        if cache is not None:
            cache.begin(plan)
            cache.append(0, x[:, None, :, :1], x[:, None, :, :1])
        return x


def markov(vocab: int) -> tuple[Model, torch.Tensor]:
    """A Markov chain and its transitions."""
    embed, head = TokenEmbed(vocab, vocab), CategoricalHead(vocab, vocab)
    logits = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model = Model(line(12), Line(), embed, Identity(), head).double()
    with torch.no_grad():
        embed.table.copy_(torch.eye(vocab))
        head.weight.copy_(logits.T)
    return model.requires_grad_(False), logits.softmax(-1)


@torch.inference_mode()
def test_on_a_markov_chain_as_much_is_accepted_as_the_tree_covers():
    """With the true candidates in the matrix a node stands with the probability of its path."""
    vocab, root = 6, 2
    model, p = markov(vocab)
    best = p.argsort(descending=True, dim=1)
    covered = 0.0
    for path in TREE.paths:
        token, worth = root, 1.0
        for child in path:
            worth *= float(p[token, best[token, child]])
            token = int(best[token, child])
        covered += worth

    def run(random, rows):
        matrix = Adjacency(vocab, 3)
        matrix.write(range(vocab), best[:, :3])
        canvas = begun(model, [[root]] * rows, 6)
        canvas.row = torch.arange(rows)
        step = next(decode(Target(model), canvas, Walk(), Recycler(matrix, TREE), random))
        return torch.as_tensor(step.accepted).expand(rows).tolist()

    law = enumerate_rows(run)
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    assert sum(n * q for n, q in law.items()) == pytest.approx(covered, abs=1e-12)


@torch.inference_mode()
def test_a_token_without_candidates_drafts_nothing_and_costs_one_row(model):
    canvas, recycler = begun(model, [[1, 4, 2]], 10), Recycler(Adjacency(11, 8), standard(12))
    stream = decode(Target(model), canvas, Walk(), recycler, Keyed(0))
    first, second = next(stream), next(stream)
    assert int(canvas.value["token"][0, 3]) != 2  # of which the first forward learned candidates
    assert (first.slots, first.drafted) == (4, 0)  # a learned start and three tokens
    assert (second.slots, second.drafted) == (1, 0)


@torch.inference_mode()
def test_drafts_end_where_the_text_ends_and_leave_out_what_nobody_knows(model):
    matrix = filled(11, 4, 1)
    for left, depth in ((1, 0), (2, 1), (3, 2), (9, 3)):
        guess = Recycler(matrix, TREE).propose(begun(model, [[1, 2, 3]], left), Target(model), Generator(0))
        assert (0 if guess is None else max(guess.depths())) == depth
    guess = Recycler(matrix, TREE).propose(begun(model, [[1, 2, 3, 4], [5]], 3), Target(model), Generator(0))
    deepest = [max(d for d, v in zip(guess.depths(), row, strict=True) if v >= 0) for row in guess.value.tolist()]
    assert deepest == [2, 3]  # one has 3 tokens left, the other 6
    barren = Adjacency(11, 4)
    barren.write([3], torch.tensor([[7, 8, 9]]))
    guess = Recycler(barren, TREE).propose(begun(model, [[3]], 9), Target(model), Generator(0))
    assert guess.value.tolist() == [[7, 8, 9]]
    assert guess.parent == (-1, -1, -1)


@torch.inference_mode()
def test_a_row_that_has_ended_writes_nothing(model):
    matrix, canvas = filled(11, 4, 1), begun(model, [[1, 4, 2], [5]], 8)
    canvas.apply([Truncate(torch.tensor([11, 1]))])
    before = matrix.next[5].clone()
    matrix.write([2], torch.tensor([[2, 2, 2, 2]]))  # so that 5 is not drafted
    next(decode(Target(model), canvas, Walk(), Recycler(matrix, TREE), Keyed(0)))
    assert matrix.next[2].tolist() != [2, 2, 2, 2]
    assert torch.equal(matrix.next[5], before)


class Between:
    """Drafts n-grams in place of what it asks for; what comes of them is told."""

    def __init__(self, proposer):
        self.proposer, self.lookup = proposer, NGram(3, (1,))

    def propose(self, canvas, target, random):
        self.proposer.propose(canvas, target, random)
        return self.lookup.propose(canvas, target, random)

    def observe(self, canvas, rows, step):
        self.proposer.observe(canvas, rows, step)


@torch.inference_mode()
def test_the_rows_of_drafts_that_others_made_are_recycled_too(model):
    """What was verified is told with the rows: the tokens of that draft are written, and no visits are counted."""
    canvas, recycler = begun(model, [[1, 4, 2, 1, 4, 2]], 6), Recycler(filled(11, 4, 1), TREE)
    before = recycler.matrix.next.clone()
    step = next(decode(Target(model), canvas, Walk(), Between(recycler), Keyed(0)))
    assert step.drafted == 3  # 1, 4, 2 again
    changed = (recycler.matrix.next != before).any(1).nonzero()[:, 0].tolist()
    assert changed == [1, 2, 4]
    assert sum(recycler.visits) == 0


@torch.inference_mode()
def test_visits_count_how_often_each_node_was_accepted(model):
    recycler, canvas = Recycler(filled(11, 4, 1), TREE), begun(model, [[1, 4, 2], [5]], 30)
    accepted = sum(int(torch.as_tensor(s.accepted).sum()) for s in decode(
        Target(model), canvas, Walk(), recycler, Keyed(3)))  # fmt: skip
    assert sum(recycler.visits) == accepted > 10
    TREE.pruned(recycler.visits, 3)  # none counts more than its parent


@torch.inference_mode()
@pytest.mark.parametrize("rows", [[[1, 4, 2, 1, 9]], [[1, 4, 2, 1, 9], [3, 3]]])
def test_the_rows_of_a_prompt_are_recycled_if_that_is_asked_for(model, rows):
    recycler = Recycler(Adjacency(11, 4), TREE, prompt=True)
    assert recycler.reads_prompt
    next(decode(Target(model), begun(model, rows, 4), Walk(), recycler, Keyed(0)))
    expected = Adjacency(11, 4).next
    for row in rows:
        ends = [row[: i + 1] for i in range(len(row))]
        for text, best in zip(ends, said_behind(model, ends), strict=True):
            expected[text[-1]] = torch.tensor(best[:4])
    assert torch.equal(recycler.matrix.next, expected)


# ---- the text --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_under_the_same_noise_the_text_is_that_of_plain_decoding_whatever_the_matrix_holds(transformer, temperature):
    model = transformer(length=100, vocab=11, std=0.6)
    target = lambda: Target(model, warp=Sampling(temperature=temperature).warp)  # noqa: E731
    plain = begun(model, [[1, 4, 2]], 96)
    for _ in decode(target(), plain, SampleAll(), None, Keyed(9)):
        pass
    for matrix, template in ((Adjacency(11, 8), standard(12)), (filled(11, 8, 5), standard(16)), (filled(11, 8), TREE)):
        canvas, decider = begun(model, [[1, 4, 2]], 96), Walk() if temperature else GreedyMatch()
        forwards = sum(1 for _ in decode(target(), canvas, decider, Recycler(matrix, template), Keyed(9)))
        assert torch.equal(canvas.value["token"], plain.value["token"])
        assert forwards < 96


@pytest.mark.slow
def test_a_trained_model_writes_500_tokens_of_plain_sampling():
    from seriatim.verbs.load import load

    system = load("zoo:text-base")
    prompt = "import re\n\n\nclass Template:\n"
    for temperature in (0.0, 0.8):
        ask = {"max_new_tokens": 500, "temperature": temperature, "seed": 3}
        plain = system.generate(prompt, "ancestral", **ask)
        ours = system.generate(prompt, "token-recycling", **ask)
        assert ours.ids == plain.ids
        assert ours.forwards < 0.75 * plain.forwards


# ---- from one text to the next ---------------------------------------------------------------------------------------


def test_the_matrix_goes_on_to_the_next_text_unless_a_cold_start_is_asked_for():
    """A second time the same text is drafted better; options and models have matrices of their own."""
    system = small()
    forget(system)

    def forwards(decoder: str) -> int:
        return system.generate([1, 2, 3], decoder, max_new_tokens=24, temperature=0.0).forwards

    cold = [forwards("token-recycling+hot=false") for _ in range(2)]
    assert cold[0] == cold[1]
    assert system.model not in LEARNED
    first, second = forwards("token-recycling"), forwards("token-recycling")
    assert first == cold[0]
    assert second < first
    assert forwards("token-recycling+nodes=13") > second  # a decoder with other options learned nothing from it
    forget(system)
    assert forwards("token-recycling") == first


def test_what_was_learned_is_forgotten_with_its_model():
    system = small()
    before = len(LEARNED)
    copy = type(system)(system.config, system.tokenizer)
    decoder_of(copy, "token-recycling", Sampling())
    assert len(LEARNED) == before + 1
    del copy
    gc.collect()
    assert len(LEARNED) == before


def test_mistaken_sizes_are_refused():
    with pytest.raises(ValueError, match="asks for 8 candidates of a token, and the matrix keeps 4"):
        Recycler(Adjacency(11, 4), RECYCLED)
    with pytest.raises(ValueError, match="1 or more candidates"):
        Adjacency(11, 0)
    for spec, message in (
        ("token-recycling+nodes=0", "1 to 80 nodes"), ("token-recycling+width=1", "the matrix keeps 1"),
        ("token-recycling:zoo:text-draft", "needs no other model"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"decoder token-recycling: .*{message}"):
            decoder_of(small(), spec, Sampling())


def test_what_a_verifier_keeps_is_read_alike_as_a_number_a_list_or_rows():
    assert _accepted(2, 2, 1) == [[]]
    assert _accepted(4, 2, 2) == [[0, 1], [0, 1]]
    assert _accepted([0, 1, 3, 6], 2, 1) == [[1, 4]]
    assert _accepted(torch.tensor([[0, 2, 4, -1], [0, 1, -1, -1]]), 2, 2) == [[0, 2], []]
