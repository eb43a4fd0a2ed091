"""Verifiers on random transformers: equal strings under keyed noise, caches that hold the emitted text, batches whose
rows differ, end tokens, drafts at the end of the layout; and K-SEQ against optimal transport."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import linprog

from seriatim.canvas import Set
from seriatim.decoding.draft import DraftModel, NGram
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess, branching
from seriatim.decoding.jacobi import Window
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Chain, GreedyMatch, KSeq, Recursive, Verifier, Walk, kseq_rest, kseq_scale
from seriatim.heads.dist import Categorical, FromStates
from seriatim.model import Rows
from seriatim.random import COIN, Keyed, numbered

TREE = branching((3, 2, 1))
GREEDY = Warper(temperature=0)


@pytest.fixture(scope="module")
def model(transformer):
    return transformer()


@pytest.fixture(scope="module")
def near(model, perturbed):
    return perturbed(model, 0.02)


def proposers(near, warp=None):
    return {
        "lookup": lambda: NGram(4),
        "window": lambda: Window(4),
        "chain": lambda: DraftModel(Target(near, warp=warp), 4),
        "top": lambda: DraftModel(Target(near, warp=warp), TREE, "top"),
        "independent": lambda: DraftModel(Target(near, warp=warp), TREE),
        "distinct": lambda: DraftModel(Target(near, warp=warp), TREE, "distinct"),
        "chains": lambda: DraftModel(Target(near, warp=warp), branching((3, 1, 1))),
    }


RATIO = [
    ("lookup", Chain), ("window", Chain), ("chain", Chain), ("chain", Recursive), ("chain", KSeq), ("top", Recursive),
    ("independent", Recursive), ("distinct", Recursive), ("chains", KSeq), ("chains", Recursive),
]  # fmt: skip
EVERY = [*RATIO, *((name, Walk) for name in ("lookup", "window", "chain", "top", "independent", "distinct", "chains"))]


# ---- equal strings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["lookup", "window", "chain", "top", "independent", "distinct"])
def test_greedy_verification_emits_the_greedy_string(model, near, plain, name, batch):
    greedy = plain(Target(model, warp=GREEDY), batch, Keyed(0))
    canvas, accepted = model.blank(batch), 0
    for step in decode(Target(model), canvas, GreedyMatch(), proposers(near)[name](), Keyed(1)):
        accepted += int(torch.as_tensor(step.accepted).sum())
    assert torch.equal(canvas.value["token"], greedy)
    assert accepted > 0


@pytest.mark.parametrize(("name", "verifier"), EVERY)
def test_at_temperature_zero_every_verifier_is_greedy(model, near, plain, name, verifier):
    greedy = plain(Target(model, warp=GREEDY), 1, Keyed(0))
    proposer = proposers(near, GREEDY)[name]()
    assert torch.equal(
        generate(Target(model, warp=GREEDY), model.blank(1), verifier(), proposer).value["token"], greedy
    )


@pytest.mark.parametrize("warp", [None, Warper(top_p=0.9)], ids=["temperature 1", "top-p 0.9"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_walk_emits_the_string_of_plain_sampling(transformer, perturbed, plain, warp, batch):
    """300 tokens, each draft shape in turn; with 3 rows these differ in accepted length and so in length."""
    model = transformer(300, seed=3)
    near = perturbed(model, 0.02)
    want = plain(Target(model, warp=warp), batch, Keyed(11))
    assert len(set(want[0].tolist())) > 3
    ragged = False
    for name in ("lookup", "window", "top"):
        canvas, turns = model.blank(batch), 0
        for _ in decode(Target(model, warp=warp), canvas, Walk(), proposers(near, warp)[name](), Keyed(11)):
            turns += 1
            ragged |= canvas.length is None and len(set(canvas.lengths().tolist())) > 1
        assert torch.equal(canvas.value["token"], want)
        assert turns < 300
    assert ragged == (batch > 1)


def test_a_walk_that_draws_anew_after_a_mismatch_emits_another_string(model, near, plain):
    class Afresh(Walk):
        def verify(self, turn, random):
            going = True
            while going:
                dist = turn.at([0])
                token = int(dist.sample(random, turn.key([0])))
                child = turn.child(0, token)
                token = token if child >= 0 else int(dist.sample(random, turn.key([0], numbered(COIN, 9))))
                going = turn.emit(0, token, child)

    want = plain(Target(model), 1, Keyed(2))
    assert not torch.equal(generate(Target(model), model.blank(1), Afresh(), NGram(4), Keyed(2)).value["token"], want)


def test_a_tree_of_width_one_is_a_chain(model, near):
    """The same drafts as chain and as tree, verified by all three ratio verifiers: one string, token for token."""
    strings = []
    for verifier, tree in ((Chain, False), (Recursive, False), (Recursive, True), (KSeq, True)):
        draft = DraftModel(Target(near), 3)
        if tree:
            propose = draft.propose

            def as_tree(*args, propose=propose):
                guess = propose(*args)
                return guess and Guess(guess.value, guess.parents(), guess.q)

            draft.propose = as_tree
        strings.append(generate(Target(model), model.blank(1), verifier(), draft, Keyed(4)).value["token"])
    assert all(torch.equal(s, strings[0]) for s in strings)


@pytest.mark.parametrize("verifier", [GreedyMatch, Walk, Chain, Recursive, KSeq])
def test_without_drafts_every_verifier_takes_plain_steps(model, plain, verifier):
    want = plain(Target(model, warp=GREEDY if verifier is GreedyMatch else None), 2, Keyed(6))
    for proposer in (None, NGram(0)):
        canvas, steps = model.blank(2), 0
        for step in decode(Target(model), canvas, verifier(), proposer, Keyed(6)):
            assert step.slots == 1 and not torch.as_tensor(step.drafted).any()
            steps += 1
        assert steps == canvas.layout.size
        assert torch.equal(canvas.value["token"], want)


@pytest.mark.parametrize("held", [0, 6])
@pytest.mark.parametrize("batch", [1, 3])
def test_each_node_of_a_tree_is_read_as_by_a_plain_forward_on_its_path(transformer, held, batch):
    """Random trees in float32, behind a cache and without one: to 1e-5 of the logits."""
    model = transformer().float()
    g = torch.Generator().manual_seed(held)
    for _ in range(5):
        parent = tuple(int(torch.randint(-1, i, (1,), generator=g)) if i else -1 for i in range(9))
        text = torch.randint(7, (batch, 40), generator=g)
        target, canvas = Target(model), model.canvas({"token": text}, 8 if not held else 6)
        with torch.inference_mode():
            if held:  # a step commits what is known; the next token is decided
                next(decode(target, canvas, SampleAll(), random=Keyed(0)))
            guess = Guess(torch.randint(7, (batch, 9), generator=g), parent)
            rows = target.forward(target.plan(canvas, guess), canvas, guess)
        assert (target.cache.length > 0) == bool(held)
        for row in range(batch):
            for node in range(-1, 9):
                path, at = [], node
                while at >= 0:
                    path.insert(0, int(guess.value[row, at]))
                    at = parent[at]
                said = [*canvas.value["token"][row, : canvas.length].tolist(), *path]
                fresh = model.canvas({"token": torch.tensor([said + [0] * (40 - len(said))])}, len(said))
                plain = Target(model, cached=False)
                with torch.inference_mode():
                    want = plain.forward(plain.plan(fresh), fresh).dist.logits[0, -1]
                assert float((rows.dist.logits[row, node + 1] - want).abs().max()) < 1e-5 * float(want.abs().max())


# ---- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "verifier"), EVERY)
def test_after_each_round_the_cache_is_that_of_a_fresh_forward(model, near, name, verifier, batch):
    """Keys and values of what was emitted, but for the last token, in reading order; dropped drafts leave no trace."""
    target, canvas, rounds = Target(model), model.blank(batch), 0
    for _ in decode(target, canvas, verifier(), proposers(near)[name](), Keyed(3)):
        rounds += 1
        if rounds not in (2, 4, 7):
            continue
        lengths = canvas.lengths()
        held = torch.as_tensor(target.cache.length).expand(batch)
        assert torch.equal(held, lengths)  # a prefix slot more, the last token less
        for row in range(batch):
            n = int(lengths[row])
            fresh, text = Target(model), model.canvas({"token": canvas.value["token"][row : row + 1]}, n)
            plan = fresh.plan(text)
            with torch.no_grad():
                fresh.forward(plan, text)
            a, b = target.cache.buffer[:, :, row, :, :n], fresh.cache.buffer[:, :, 0, :, :n]
            assert float((a - b).abs().max()) < 1e-9
    assert rounds >= 7


def test_a_round_that_keeps_the_wrong_path_is_caught_by_that(model, near):
    class Misplaced(Recursive):
        def decide(self, *args):
            step = super().decide(*args)
            if isinstance(step.keep, list):
                step.keep = list(range(len(step.keep)))
            return step

    target, canvas = Target(model), model.blank(1)
    worst = 0.0
    for _ in decode(target, canvas, Misplaced(), proposers(near)["distinct"](), Keyed(3)):
        if canvas.done:
            break
        n = canvas.length
        fresh, text = Target(model), model.canvas({"token": canvas.value["token"]}, n)
        with torch.no_grad():
            fresh.forward(fresh.plan(text), text)
        gap = target.cache.buffer[..., :n, :] - fresh.cache.buffer[..., :n, :]
        worst = max(worst, float(gap.abs().max()))
    assert worst > 0.1


# ---- company, end tokens, the end of the layout ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "verifier"), EVERY)
def test_a_row_does_not_depend_on_its_company(model, near, name, verifier):
    together = generate(Target(model), model.blank(3), verifier(), proposers(near)[name](), Keyed(8)).value["token"]
    for row in (0, 2):
        blank = {"token": torch.zeros(1, model.layout.size, dtype=torch.long)}
        canvas = model.canvas(blank, row=torch.tensor([row]))
        alone = generate(Target(model), canvas, verifier(), proposers(near)[name](), Keyed(8)).value["token"]
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("prompts", [[4, 4], [2, 9]], ids=str)
def test_prompts_stay_and_are_continued(model, near, prompts):
    x = torch.randint(7, (2, model.layout.size), generator=torch.Generator().manual_seed(0))
    known = torch.tensor(prompts)
    plain = generate(Target(model), model.canvas({"token": x}, known), SampleAll(), random=Keyed(5)).value["token"]
    for name in ("lookup", "window", "top", "independent"):
        canvas = model.canvas({"token": x}, known)
        generate(Target(model), canvas, Walk(), proposers(near)[name](), Keyed(5))
        assert torch.equal(canvas.value["token"], plain)
    for row, n in enumerate(prompts):
        assert torch.equal(plain[row, :n], x[row, :n])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "verifier"), EVERY)
def test_an_end_token_ends_a_row_also_inside_an_accepted_draft(model, near, name, verifier, batch):
    """The text is that without end tokens, cut after the first; nothing behind it is known."""
    stop = (1,)
    whole = generate(Target(model), model.blank(batch), verifier(), proposers(near)[name](), Keyed(9)).value["token"]
    canvas, counted = model.blank(batch), torch.zeros(batch, dtype=torch.long)
    for step in decode(Target(model), canvas, verifier(stop), proposers(near)[name](), Keyed(9)):
        counted += torch.as_tensor(step.accepted)
    for row, text in enumerate(canvas.read("token")):
        full = whole[row].tolist()
        end = full.index(1) + 1 if 1 in full else len(full)
        assert text.tolist() == full[:end]
        assert int(counted[row]) <= end
    assert not canvas.open.any()


def test_the_end_token_was_met_inside_a_draft(model, near):
    """What the test above is about does happen there: a round that accepts an end token emits no token of its own."""
    met = 0
    for seed in range(12):
        canvas = model.blank(1)
        for step in decode(Target(model), canvas, Recursive((1,)), proposers(near)["distinct"](), Keyed(seed)):
            emitted = step.edits[0].value.shape[1]
            met += emitted == step.accepted
    assert met > 3


@pytest.mark.parametrize(("name", "verifier"), EVERY)
def test_drafts_end_before_the_layout_does(model, near, name, verifier):
    canvas = model.blank(1)
    proposer = proposers(near)[name]()
    propose, size = proposer.propose, canvas.layout.size

    def watched(*args):
        guess = propose(*args)
        assert guess is None or canvas.length + max(guess.depths()) < size
        return guess

    proposer.propose = watched
    generate(Target(model), canvas, verifier(), proposer, Keyed(1))
    assert canvas.done and canvas.layout.size == size


@pytest.mark.parametrize("verifier", [GreedyMatch, Walk, Chain, Recursive, KSeq])
def test_a_draft_that_reaches_beyond_the_layout_is_cut(transformer, plain, verifier):
    """Others' proposers need not know the end: the string stays that of plain decoding."""
    model = transformer(5)
    warp = GREEDY if verifier is not Walk else None
    want = plain(Target(model, warp=warp), 1, Keyed(0))

    class Oracle:
        def propose(self, canvas, target, random):
            if canvas.done:
                return None
            rest = want[:, canvas.length :]
            return Guess(torch.cat([rest, rest[:, :1].expand(-1, 3)], 1))

        def observe(self, canvas, rows, step):
            """Learns nothing."""

    canvas = model.blank(1)
    steps = list(decode(Target(model, warp=warp), canvas, verifier(), Oracle(), Keyed(0)))
    assert torch.equal(canvas.value["token"], want)
    assert [(step.edits[0].value.shape[1], step.accepted) for step in steps] == [(5, 5)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "verifier"), EVERY)
def test_no_noise_is_used_twice(model, near, accountant, name, verifier, batch):
    generate(Target(model), model.blank(batch), verifier(), proposers(near)[name](), accountant(0))


def test_noise_used_twice_is_noticed(model, accountant):
    class Twice(Walk):
        def verify(self, turn, random):
            turn.at(turn.alive).sample(random, turn.key(turn.alive))
            super().verify(turn, random)

    with pytest.raises(AssertionError, match="used twice"):
        generate(Target(model), model.blank(1), Twice(), None, accountant(0))


# ---- counts, errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "verifier"), EVERY)
def test_counts_add_up_to_the_text(model, near, name, verifier):
    """At batch 1 plain integers; each round emits what it accepted and one token of its own."""
    canvas, text = model.blank(1), 0
    for step in decode(Target(model), canvas, verifier(), proposers(near)[name](), Keyed(2)):
        assert isinstance(step.drafted, int) and isinstance(step.accepted, int) and not torch.is_tensor(step.keep)
        (edit,) = step.edits
        assert isinstance(edit, Set) and edit.element is None
        assert edit.value.shape[1] == step.accepted + 1 and step.accepted <= step.drafted
        text += edit.value.shape[1]
    assert text == canvas.layout.size


def test_a_chain_verifier_refuses_a_tree(model, near):
    with pytest.raises(ValueError, match="Recursive, KSeq or Walk"):
        generate(Target(model), model.blank(1), Chain(), proposers(near)["top"]())


@pytest.mark.parametrize("name", ["top", "distinct"])
def test_k_seq_refuses_drafts_that_are_not_independent(model, near, name):
    with pytest.raises(ValueError, match="independently"):
        generate(Target(model), model.blank(1), KSeq(), proposers(near)[name]())


def test_what_is_not_categorical_is_refused(model):
    rows = Rows(FromStates(None, torch.zeros(1, 1, 1, 4)), 0, torch.zeros(1, 1, 4))
    with pytest.raises(TypeError, match="FromStates"):
        GreedyMatch().decide(model.blank(1), None, rows, Keyed(0))


def test_the_base_class_alone_decides_nothing(model):
    with pytest.raises(NotImplementedError):
        generate(Target(model), model.blank(1), Verifier())


# ---- K-SEQ -----------------------------------------------------------------------------------------------------------


def laws(n: int, v: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.softmax(3 * torch.randn(n, v, generator=g, dtype=torch.float64), -1)  # noqa: E731
    return draw(), draw(), torch.randint(1, 6, (n,), generator=g)


def accepted(p, q, k):
    """P = 1 - (1 - b)^k, the probability that one of k drafts is accepted."""
    scale = kseq_scale(p, q, k)
    return 1 - (1 - torch.minimum(q, p / scale[:, None]).sum(-1)) ** k, scale


def best(p, q, k):
    """The most any lossless rule can accept: the smallest p(S) + 1 - q(S)^k over sets of tokens (sheet's min-cut)."""
    v = p.shape[-1]
    sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=v)), dtype=p.dtype)
    return (p @ sets.T + 1 - (q @ sets.T) ** k[:, None]).amin(-1)


def test_what_k_seq_leaves_is_a_distribution_and_restores_the_target():
    """p = (accepted part) + (1 - P) x rest, for thousands of random laws; the rest is nowhere negative."""
    p, q, k = laws(3000, 6)
    passed, scale = accepted(p, q, k)
    b = torch.minimum(q, p / scale[:, None])
    taken = b * (passed / b.sum(-1))[:, None]
    assert float((p - taken).min()) > -1e-12
    rest = kseq_rest(p, q, k, scale)
    assert float((rest.sum(-1) - 1).abs().max()) < 1e-12
    assert float((taken + (1 - passed)[:, None] * rest - p).abs().max()) < 1e-12


def test_k_seq_accepts_nearly_as_often_as_possible():
    """Between 1 - 1/e of the optimum and the optimum; more drafts never hurt; one draft: the laws' overlap."""
    p, q, k = laws(300, 4, seed=1)
    passed, _ = accepted(p, q, k)
    bound = best(p, q, k)
    assert bool((passed <= bound + 1e-9).all())
    assert float((passed / bound).min()) > 1 - 1 / torch.e
    more = torch.stack([accepted(p, q, torch.full_like(k, n))[0] for n in range(1, 7)])
    assert float((more[1:] - more[:-1]).min()) > -1e-6
    assert float((more[0] - torch.minimum(p, q).sum(-1)).abs().max()) < 1e-12


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_optimum_is_that_of_the_transport_problem(k):
    """The formula over sets equals the linear programme over couplings of k drafts and an output."""
    v = 3
    p, q, _ = laws(4, v, seed=2)
    drafts = list(itertools.product(range(v), repeat=k))
    for row in range(4):
        weight = [float(torch.stack([q[row, i] for i in draft]).prod()) for draft in drafts]
        hit = [-1.0 if y in draft else 0.0 for draft in drafts for y in range(v)]
        equal = [[1.0 if i == d else 0.0 for i in range(len(drafts)) for _ in range(v)] for d in range(len(drafts))]
        equal += [[1.0 if y == t else 0.0 for _ in drafts for y in range(v)] for t in range(v - 1)]
        solved = linprog(hit, A_eq=equal, b_eq=weight + p[row, :-1].tolist())
        assert abs(-solved.fun - float(best(p[row : row + 1], q[row : row + 1], torch.tensor([k])))) < 1e-9


def test_k_seq_always_accepts_where_draft_and_target_agree():
    p, _, k = laws(100, 5, seed=3)
    passed, scale = accepted(p, p, k)
    assert float((1 - passed).max()) < 1e-10 and float((scale - 1).max()) < 1e-2


def test_a_smaller_scale_would_not_be_valid():
    """Just below the chosen g something would be left negative: the scale is the smallest."""
    p, q, k = laws(200, 5, seed=4)
    scale = kseq_scale(p, q, k)
    inner = scale > 1.01
    assert int(inner.sum()) > 50
    low = scale * 0.99
    b = torch.minimum(q, p / low[:, None]).sum(-1)
    assert bool((1 - (1 - b) ** k > low * b)[inner].all())


# ---- what a node was drawn from --------------------------------------------------------------------------------------


def test_the_law_of_a_node_without_randomness_is_its_token():
    guess = Guess(torch.tensor([[2, 0], [1, 1]]))
    like = torch.zeros(2, 3, dtype=torch.float64)
    assert guess.laws([0, 1], [0, 1], like).tolist() == [[0, 0, 1], [0, 1, 0]]


def test_a_guess_with_laws_gives_those_of_rows_and_nodes():
    q = Categorical(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)))
    guess = Guess(torch.zeros(2, 3, dtype=torch.long), None, q)
    got = guess.laws([1, 0, 1], [2, 0, 0], torch.zeros(3, 4))
    assert torch.equal(got, torch.stack([q.probs()[1, 2], q.probs()[0, 0], q.probs()[1, 0]]))


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("k", "v", "spread"), [(64, 50, 3.0), (64, 1000, 1.0), (1000, 1000, 1.0), (4000, 50, 8.0)])
def test_the_scale_of_many_drafts_is_found_in_single_precision(k, v, spread):
    """Rounding used to keep the search going for ever. Here it ends at a valid scale: 1 - (1 - b)^k <= g b."""
    g = torch.Generator().manual_seed(0)
    p, q = (torch.softmax(spread * torch.randn(8, v, generator=g), -1) for _ in range(2))
    drafts = torch.full((8,), k)
    scale = kseq_scale(p, q, drafts)
    assert scale.dtype == torch.float32 and bool(((scale >= 1) & (scale <= k)).all())
    b = torch.minimum(q, p / scale[:, None]).double().sum(-1)
    assert float((1 - (1 - b) ** k - scale * b).max()) < 1e-6
    rest = kseq_rest(p, q, drafts, scale)
    assert bool(rest.isfinite().all()) and float((rest.sum(-1) - 1).abs().max()) < 1e-5
