"""Speculative decoders emit the target's law, exactly: every outcome of every draw is enumerated in float64.

A table of conditionals over three tokens (laws/tabular.py) drives the real loop, orders and caches. Each verifier meets
chains and trees, drafts of every kind, and verifiers that are known to be wrong must fail the same test.
"""

from __future__ import annotations

import pytest
import torch

from seriatim.decoding.draft import DraftModel, DraftTree, NGram
from seriatim.decoding.filters import Warper
from seriatim.decoding.growth import Dynamic
from seriatim.decoding.guess import Guess, branching, room
from seriatim.decoding.loop import decode
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.decoding.verify import Chain, KSeq, Recursive, Verifier, Walk, kseq_scale
from seriatim.factorization.line import Line
from seriatim.heads.dist import Categorical
from seriatim.laws.drafts import RandomDraft
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.tabular import decoded_law, tabular, total_variation, true_law
from seriatim.layout import line
from seriatim.random import Key, enumerate_law, numbered

V = 3
WRONG = 0.01  # total variation that a wrong verifier must exceed


def model_of(seed: int, size: int = 4, spread: float = 3.0):
    return tabular(line(size), Line(1), V, seed, spread)


MODEL = model_of(1)
DRAFTS = {
    "other": (model_of(2), None),
    "uniform": (model_of(2, spread=0.0), None),
    "same": (MODEL, None),
    "point": (model_of(2), Warper(temperature=0)),
}


def drafting(shape, siblings="independent", kind="other"):
    model, warp = DRAFTS[kind]
    return lambda: DraftModel(Target(model, warp=warp), shape, siblings)


def gap(decider, proposer=None, warp=None, model=MODEL, batch=512) -> float:
    law = decoded_law(model, 3, decider, proposer, warp, batch)
    assert abs(sum(law.values()) - 1) < 1e-12
    return total_variation(law, true_law(model, 3, warp))


# ---- the reference itself --------------------------------------------------------------------------------------------


def test_the_table_is_a_distribution_that_depends_on_everything_before():
    law = true_law(MODEL, 3)
    assert abs(sum(law.values()) - 1) < 1e-12
    assert len({round(p, 12) for p in law.values()}) == V**3
    assert gap(SampleAll) < 1e-12
    assert total_variation(law, true_law(model_of(2), 3)) > 0.2


@pytest.mark.parametrize("shape", [2, (-1, -1, 0)])
def test_outcomes_side_by_side_and_one_by_one_have_the_same_law(shape):
    """A batch of one takes the path without labels, hundreds of rows that of rows of different lengths."""
    model = model_of(1, 3)
    one, many = (decoded_law(model, 2, Recursive, drafting(shape), None, batch) for batch in (1, 512))
    assert one.keys() == many.keys()
    assert max(abs(one[x] - many[x]) for x in one) < 1e-12


# ---- chains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("verifier", [Chain, Recursive, KSeq])
def test_chains_are_exact(verifier, length, kind):
    assert gap(verifier, drafting(length, kind=kind)) < 1e-12


@pytest.mark.parametrize(("length", "kind"), [(1, "other"), (2, "other"), (3, "point")])
def test_a_walk_is_exact_for_drafts_of_every_kind(length, kind):
    assert gap(Walk, drafting(length, kind=kind)) < 1e-12


@pytest.mark.parametrize("verifier", [Chain, Recursive])
def test_chains_are_exact_without_company(verifier):
    assert gap(verifier, drafting(1), model=model_of(1, 3), batch=1) < 1e-12


@pytest.mark.parametrize("verifier", [Chain, Recursive, Walk, KSeq])
def test_copied_text_is_exact(verifier):
    assert gap(verifier, lambda: NGram(2)) < 1e-12


@pytest.mark.parametrize("warp", [Warper(temperature=0.6), Warper(top_k=2), Warper(1.5, top_p=0.7)], ids=str)
@pytest.mark.parametrize("verifier", [Chain, Recursive, KSeq])
def test_the_law_is_that_of_the_filtered_target(verifier, warp):
    """The draft may be filtered otherwise: its recorded law counts."""
    assert gap(verifier, drafting(2), warp) < 1e-12
    same = lambda: DraftModel(Target(DRAFTS["other"][0], warp=warp), 2)  # noqa: E731
    assert gap(verifier, same, warp) < 1e-12


# ---- trees -----------------------------------------------------------------------------------------------------------

BELOW_ONE = (-1, -1, -1, 0, 0, 0)  # three children, and three more below the first
BELOW_LAST = (-1, -1, -1, 2, 2, 2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 2), BELOW_ONE, BELOW_LAST], ids=str)
def test_children_drawn_independently_are_exact(shape, once):
    parent = branching(shape) if -1 not in shape else shape
    draft = drafting(parent)
    assert gap(Recursive, lambda: once(draft())) < 1e-12


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (3, 2), BELOW_ONE], ids=str)
def test_children_drawn_without_replacement_are_exact(shape, kind, once):
    parent = branching(shape) if -1 not in shape else shape
    draft = drafting(parent, "distinct", kind)
    assert gap(Recursive, lambda: once(draft())) < 1e-12


@pytest.mark.parametrize("verifier", [Walk, Recursive])
@pytest.mark.parametrize("tree", [Dynamic(1, 1, 1), Dynamic(4, 2, 2), Dynamic(6, 3, 3)], ids=str)
def test_trees_that_grow_where_the_draft_is_sure_are_exact(verifier, tree):
    assert gap(verifier, lambda: DraftTree(Target(DRAFTS["other"][0]), tree)) < 1e-12


@pytest.mark.parametrize("shape", [(2,), (3,)], ids=str)
@pytest.mark.parametrize("siblings", ["independent", "distinct"])
def test_trees_in_every_round_are_exact(shape, siblings):
    assert gap(Recursive, drafting(branching(shape), siblings), model=model_of(1, 3)) < 1e-12


@pytest.mark.parametrize("verifier", [Recursive, Walk])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), BELOW_LAST], ids=str)
def test_trees_of_the_likeliest_tokens_are_exact(verifier, shape):
    parent = branching(shape) if -1 not in shape else shape
    assert gap(verifier, drafting(parent, "top")) < 1e-12


def test_trees_are_exact_without_company(once):
    draft = drafting(branching((2, 1)), "distinct")
    assert gap(Recursive, lambda: once(draft()), batch=1) < 1e-12
    assert gap(Walk, drafting(branching((2, 2)), "top"), batch=1) < 1e-12


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((1, 1), "other"), ((2, 1), "other"), ((3, 1), "other"), ((2, 2), "other"), ((2, 1), "uniform"), ((2, 1), "same")],
    ids=str,
)
def test_k_seq_is_exact(shape, kind, once):
    draft = drafting(branching(shape), kind=kind)
    assert gap(KSeq, lambda: once(draft())) < 1e-12


def test_k_seq_in_every_round_is_exact():
    assert gap(KSeq, drafting(branching((2,))), model=model_of(1, 3)) < 1e-12


# ---- the counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRAFTS)
def test_one_drafted_token_is_accepted_as_often_as_the_laws_overlap(kind):
    """1 - TV(p, q) = sum of min(p, q), as counted by the verifier."""
    accepted = {}

    def run(random, rows):
        canvas = MODEL.blank(rows)
        step = next(decode(Target(MODEL), canvas, Chain(), drafting(1, kind=kind)(), random))
        assert torch.as_tensor(step.drafted).expand(rows).tolist() == [1] * rows
        return torch.as_tensor(step.accepted).expand(rows).tolist()

    accepted = enumerate_rows(run)
    p, (model, warp) = true_law(MODEL, 1), DRAFTS[kind]
    q = true_law(model, 1, warp)
    assert abs(accepted.get(1, 0.0) - (1 - total_variation(p, q))) < 1e-12


@pytest.mark.parametrize("length", [1, 2, 3])
def test_tokens_a_round_follow_from_the_acceptance_of_one(length):
    """E = (1 - a^(g + 1)) / (1 - a) where every token is accepted with a (Leviathan et al. 2023, equation 1): the
    target is flat, and the draft has the same law everywhere."""
    flat = model_of(1, 5, spread=0.0)
    emitted = {}

    def run(random, rows):
        canvas = flat.blank(rows)
        step = next(decode(Target(flat), canvas, Chain(), RandomDraft(V, random, length), random))
        return (torch.as_tensor(step.accepted).expand(rows) + 1).tolist()

    emitted = enumerate_rows(run)
    q = torch.softmax(torch.linspace(0, 1, V, dtype=torch.float64), -1)
    a = float(q.clamp(max=1 / V).sum())
    assert 0.5 < a < 0.99
    assert abs(sum(n * p for n, p in emitted.items()) - (1 - a ** (length + 1)) / (1 - a)) < 1e-12


def test_all_tokens_drafted_without_replacement_are_never_all_rejected():
    def run(random, rows):
        canvas = MODEL.blank(rows)
        draft = drafting(branching((3,)), "distinct")()
        step = next(decode(Target(MODEL), canvas, Recursive(), draft, random))
        return torch.as_tensor(step.accepted).expand(rows).tolist()

    law = enumerate_rows(run)
    assert law.get(0, 0.0) < 1e-12 and abs(law[1] - 1) < 1e-12


def test_drafts_that_carry_the_accepted_token_go_on_together(fixed):
    """Two drafts agree on the first token, so both are tried at the second: by hand from the rule of K-SEQ."""
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    value, parent = [0, 0, 1, 2], (-1, -1, 0, 1)
    draft = lambda: fixed(value, parent, Categorical(q.log().expand(1, 4, V)))  # noqa: E731

    def run(random):
        return next(decode(Target(MODEL), MODEL.blank(1), KSeq(), draft(), random)).accepted

    law, p = enumerate_law(run), true_law(MODEL, 2)
    second = torch.tensor([p[0, x] for x in range(V)], dtype=torch.float64)
    second = second / second.sum()
    scale = float(kseq_scale(second[None], q[None], torch.tensor([2])))
    one, two = (min(1.0, float(second[x]) / (scale * float(q[x]))) for x in (1, 2))
    assert 0 < one < 1 and 0 < two < 1
    assert abs(law[2] / (law[1] + law[2]) - (1 - (1 - one) * (1 - two))) < 1e-9


# ---- known to be wrong -----------------------------------------------------------------------------------------------


class Inverted(Chain):
    """The ratio upside down."""

    def acceptance(self, p, q):
        return (q / p).clamp(max=1)


class FromTarget(Chain):
    """After a rejection a token of the target, not of what is left of it."""

    def rest(self, p, q):
        return p


class Afresh(Walk):
    """Samples to test the children, and when none matches, samples anew."""

    def verify(self, turn, random):
        for r in turn.alive:
            going = True
            while going:
                dist = turn.at([r])
                token = int(dist.sample(random, turn.key([r])))
                child = turn.child(r, token)
                if child < 0:
                    token = int(dist.sample(random, turn.key([r], numbered(1, 9))))
                going = turn.emit(r, token, child)


class PathByPath(Walk):
    """Every path from the root is walked with samples of its own, and the longest is kept: as if shared nodes had
    several tries (Medusa- and ADED-style code with top-p)."""

    def verify(self, turn, random):
        below = turn.below
        leaves = [n for n in below if n >= 0 and not below[n]]
        for r in turn.alive:
            best = None
            for i, leaf in enumerate(leaves):
                path = [leaf]
                while (parent := turn.guess.parents()[path[0]]) >= 0:
                    path.insert(0, parent)
                walked, node = [], -1
                for depth, wanted in enumerate([*path, None]):
                    law = type(turn.dist)(turn.dist.logits[r : r + 1, node + 1 : node + 2])
                    key = Key(
                        turn.canvas.row[r : r + 1], torch.tensor([[turn.start[r] + depth]]), numbered(1, depth, i)
                    )
                    walked.append(int(law.sample(random, key)))
                    if wanted is None or turn.value[r][wanted] != walked[-1]:
                        break
                    node = wanted
                if best is None or len(walked) > len(best[0]):
                    best = (walked, path)
            if best is None:
                turn.emit(r, int(turn.at([r]).sample(random, turn.key([r]))))
                continue
            walked, path = best
            for token, node in zip(walked, [*path[: len(walked) - 1], -1], strict=True):
                if not turn.emit(r, token, node):
                    break


class Padded(Walk):
    """Where a row has fewer nodes than the others, token 0 stands in their places, and may be matched (Medusa)."""

    def verify(self, turn, random):
        turn.value = [[max(token, 0) for token in row] for row in turn.value]
        super().verify(turn, random)


class Unscaled(KSeq):
    """Tries k drafts as if there were one."""

    def choose(self, turn, guess, level, random):
        first = guess.laws(level.rows, [n[0] if n else 0 for n in level.nodes], level.p)
        for i in range(level.tries):
            self.attempt(turn, guess, level, i, None, random)
        none = [j for j, n in enumerate(level.nodes) if n and level.accepted[j] < 0]
        if none:
            level.p[none] = self.rest(level.p[none], first[none])


def eldest(guess: Guess) -> Guess:
    """As if every child had been drawn from the law of the first."""
    kids = guess.children()
    first = {c: below[0] for below in kids.values() for c in below}
    return Guess(guess.value, guess.parent, guess.q.take(torch.tensor([[first[i] for i in range(guess.size)]])))


def warmed(guess: Guess) -> Guess:
    """As if the draft had not been sharpened by a temperature of 0.5."""
    return Guess(guess.value, guess.parent, Categorical(guess.q.logits * 0.5))


SHARP = Warper(temperature=0.5)


@pytest.mark.parametrize(
    ("verifier", "right", "draft"),
    [
        (Inverted, Chain, drafting(1)),
        (FromTarget, Chain, drafting(1)),
        (Afresh, Walk, drafting(branching((1, 1)), "top")),
        (PathByPath, Walk, drafting(branching((2, 1)), "top")),
        (Unscaled, KSeq, drafting(branching((2, 1)))),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_wrong_verifier_fails_where_the_right_one_passes(verifier: type[Verifier], right, draft, once):
    assert gap(right, lambda: once(draft())) < 1e-12
    assert gap(verifier, lambda: once(draft())) > WRONG


def test_drafts_without_replacement_verified_with_the_law_of_the_first_fail(once, altered):
    draft = drafting(branching((2, 1)), "distinct")
    assert gap(Recursive, lambda: once(draft())) < 1e-12
    assert gap(Recursive, lambda: once(altered(draft(), eldest))) > WRONG


class Holey:
    """Two children in every round, of which no row has the first: padding, as for rows that draft less than others."""

    def propose(self, canvas, target, random):
        return None if max(room(canvas)) < 2 else Guess(torch.tensor([[-1, 1]]).expand(canvas.batch, -1), (-1, -1))

    def observe(self, canvas, rows, step):
        """Learns nothing."""


def test_padding_that_can_be_matched_fails():
    assert gap(Walk, Holey) < 1e-12
    wrong = decoded_law(MODEL, 3, Padded, Holey)  # rows depend on their company, so it need not even sum to 1
    assert total_variation(wrong, true_law(MODEL, 3)) > WRONG


def test_a_filtered_draft_verified_as_if_unfiltered_fails(altered):
    draft = lambda: DraftModel(Target(DRAFTS["other"][0], warp=SHARP), 1)  # noqa: E731
    assert gap(Chain, draft, SHARP) < 1e-12
    assert gap(Chain, lambda: altered(draft(), warmed), SHARP) > WRONG


def test_a_bonus_token_that_skips_the_filters_fails():
    """As in the first EAGLE code: exact only at temperature 1."""

    class Unfiltered(Chain):
        def decide(self, canvas, guess, rows, random):
            if guess is not None:
                rows = rows._replace(dist=Categorical(torch.cat([rows.dist.logits[:, :-1], self.raw(rows)], 1)))
            return super().decide(canvas, guess, rows, random)

        def raw(self, rows):
            return rows.dist.logits[:, -1:] * SHARP.temperature

    assert gap(Chain, drafting(1), SHARP) < 1e-12
    assert gap(Unfiltered, drafting(1), SHARP) > WRONG
