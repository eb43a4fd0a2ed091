"""Verifiers: deciders that keep part of a draft and add one token of their own, so that the law stays the target's.

The lemma behind all ratio verifiers (Leviathan et al. 2023, appendix A.1; Chen et al. 2023, theorem 1): where X ~ q
given everything before, accepting X with probability min(1, p(X) / q(X)) and otherwise drawing from
norm(max(0, p - q)) gives exactly p. q may be any function of the past, a point mass included, so every verifier takes
every draft; only the number of accepted tokens differs.

Tokens that a verifier draws itself are draw 0 of their element: under keyed noise a `Walk` emits the very string of
plain sampling, whatever the draft. Verified so: the first tokens of all of them have the target's law by enumeration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas, Set, Truncate
from seriatim.decoding.guess import Guess, children, room
from seriatim.decoding.loop import Step, stop_ids
from seriatim.heads.dist import Categorical
from seriatim.model import Rows
from seriatim.random import COIN, Key, Random, numbered


class Round:
    """One verification: where each row stands in the draft and what it has emitted.

    The read-outs of the forward are that of the last known element, then those of the nodes.
    """

    def __init__(self, canvas: Canvas, guess: Guess | None, rows: Rows, stop: frozenset[int]):
        self.canvas, self.guess, self.dist, self.stop = canvas, guess, rows.dist, stop
        self.batch = canvas.batch
        self.value: list[list[int]] = [[]] * self.batch if guess is None else guess.value.tolist()
        self.below = children(() if guess is None else guess.parents())
        self.before = rows.hidden.shape[1] - len(self.value[0])  # slots in front of the nodes
        self.tokens: list[list[int]] = [[] for _ in range(self.batch)]
        self.node = [-1] * self.batch  # the deepest accepted one
        self.room = room(canvas)
        self.known = [self.before] * self.batch  # slots of known elements
        self.ragged = isinstance(rows.slot, Tensor)
        if self.ragged:
            self.known = (rows.slot[:, 0] + 1).expand(self.batch).tolist()
        if canvas.length is not None:
            self.start = [canvas.length] * self.batch
        else:
            self.start = canvas.lengths().tolist()

    @property
    def alive(self) -> list[int]:
        """Rows that have something left to decide."""
        return [r for r in range(self.batch) if self.room[r] > 0]

    # ---- asking ------------------------------------------------------------------------------------------------------

    def at(self, rows: Sequence[int]) -> Categorical:
        """The target's law where each of these rows stands, (rows, 1, v)."""
        logits = self.dist.logits
        if self.batch == 1:
            j = self.node[0] + 1
            return type(self.dist)(logits[:, j : j + 1])
        where = torch.tensor([[r, self.node[r] + 1] for r in rows])
        return type(self.dist)(logits[where[:, 0], where[:, 1]][:, None])

    def key(self, rows: Sequence[int], draw: int = 0) -> Key:
        """Names a draw of the element that each of these rows decides next."""
        if self.batch == 1:
            return Key(self.canvas.row, self.start[0] + len(self.tokens[0]), draw)
        element = torch.tensor([[self.start[r] + len(self.tokens[r])] for r in rows])
        return Key(self.canvas.row[torch.tensor(rows)], element, draw)

    def drafted(self, row: int, node: int) -> list[int]:
        """The nodes that a row has below a node."""
        return [c for c in self.below[node] if self.value[row][c] >= 0]

    def child(self, row: int, token: int) -> int:
        """The node below where a row stands that carries a token, or -1."""
        return next((c for c in self.below[self.node[row]] if self.value[row][c] == token), -1)

    def toss(self, rows: Sequence[int], probability: Float[Tensor, "n"], random: Random, index: int) -> list[int]:
        """For each of these rows 1 (accepted) or 0, for the `index`-th node that is tried where it stands; the rows
        have emitted equally many tokens."""
        key = self.key(rows, numbered(COIN, len(self.tokens[rows[0]]), index))
        return random.heads(probability[:, None], key).tolist()

    def draw(self, rows: Sequence[int], p: Float[Tensor, "n v"], random: Random) -> list[int]:
        """A token of the verifier's own in each of these rows."""
        return random.categorical(p.log()[:, None], self.key(rows))[:, 0].tolist() if rows else []

    # ---- answering ---------------------------------------------------------------------------------------------------

    def emit(self, row: int, token: int, node: int = -1) -> bool:
        """A row emits a token, the one that `node` carries or (-1) its own. Does it go on from there?"""
        self.tokens[row].append(token)
        if node < 0:
            return False
        self.node[row] = node
        return len(self.tokens[row]) < self.room[row] and token not in self.stop

    def path(self, row: int) -> list[int]:
        """The accepted nodes of a row, from the root."""
        parent = () if self.guess is None else self.guess.parents()
        nodes: list[int] = []
        node = self.node[row]
        while node >= 0:
            nodes.append(node)
            node = parent[node]
        return nodes[::-1]

    def step(self) -> Step:
        """What the loop is told: tokens as edits, the path to keep in the cache, counts."""
        paths = [self.path(r) for r in range(self.batch)]
        step = Step(self._edits(), self._keep(paths))
        if self.batch == 1:
            step.drafted, step.accepted = sum(v >= 0 for v in self.value[0]), len(paths[0])
        else:
            step.drafted = torch.tensor([sum(v >= 0 for v in row) for row in self.value])
            step.accepted = torch.tensor([len(path) for path in paths])
        return step

    def _edits(self) -> tuple:
        lengths = [len(t) for t in self.tokens]
        ended = [bool(t) and t[-1] in self.stop for t in self.tokens]
        if self.canvas.length is not None and not any(ended) and min(lengths) == max(lengths):
            return (Set(torch.tensor(self.tokens)),)
        width = max(lengths)
        value = torch.tensor([t + [0] * (width - len(t)) for t in self.tokens])
        element = torch.tensor([_run(s, n, width) for s, n in zip(self.start, lengths, strict=True)])
        if not any(ended):
            return (Set(value, element),)
        size = self.canvas.layout.size
        cut = [s + n if e else size for s, n, e in zip(self.start, lengths, ended, strict=True)]
        return (Set(value, element), Truncate(torch.tensor(cut)))

    def _keep(self, paths: list[list[int]]) -> int | list[int] | Tensor:
        """The slots of known elements, then the path: a number where they are one behind another."""
        first = paths[0]
        if not self.ragged and all(path == first for path in paths):
            if first == list(range(len(first))):
                return self.before + len(first)
            return list(range(self.before)) + [self.before + i for i in first]
        kept = [
            list(range(known)) + [self.before + i for i in path] for known, path in zip(self.known, paths, strict=True)
        ]
        width = max(len(k) for k in kept)
        return torch.tensor([k + [-1] * (width - len(k)) for k in kept]).reshape(self.batch, width)


def _run(start: int, n: int, width: int) -> list[int]:
    """n elements from `start`, then -1."""
    return list(range(start, start + n)) + [-1] * (width - n)


class Verifier:
    """A decider that verifies drafts along a line. `stop` ids end a row, also inside an accepted draft.

    Without a guess it takes one plain step. Subclasses say in `verify` what each row emits.
    """

    def __init__(self, stop: Iterable[int] = ()):
        self.stop = stop_ids(stop)

    def decide(self, canvas: Canvas, guess: Guess | None, rows: Rows, random: Random) -> Step:
        if not isinstance(rows.dist, Categorical):
            raise TypeError(f"drafts of ids can be verified, not what {type(rows.dist).__name__} is a distribution of")
        turn = Round(canvas, guess, rows, self.stop)
        self.verify(turn, random)
        return turn.step()

    def verify(self, turn: Round, random: Random) -> None:
        raise NotImplementedError


class GreedyMatch(Verifier):
    """Accept while a node carries the likeliest token: the string of greedy decoding. Draws nothing."""

    def verify(self, turn: Round, random: Random) -> None:
        best = turn.dist.mode().tolist()
        for r in turn.alive:
            going = True
            while going:
                token = best[r][turn.node[r] + 1]
                going = turn.emit(r, token, turn.child(r, token))


class Walk(Verifier):
    """Sample, then match: draw the target's token at a node once, emit it, go on where a child carries it.

    Each token is a plain sample of its conditional, so any draft is exact; the best verifier for drafts without
    randomness (n-grams, top-k trees, heads).
    """

    def verify(self, turn: Round, random: Random) -> None:
        alive = turn.alive
        while alive:
            tokens = turn.at(alive).sample(random, turn.key(alive))[:, 0].tolist()
            alive = [r for r, token in zip(alive, tokens, strict=True) if turn.emit(r, token, turn.child(r, token))]


class Ratio(Verifier):
    """What verifiers by the ratio p / q share; a relaxed one overrides `acceptance`."""

    def acceptance(self, p: Float[Tensor, "*n"], q: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The probability of accepting a token to which target and draft give probabilities p and q > 0."""
        return (p / q.clamp(min=torch.finfo(q.dtype).tiny)).clamp(max=1)

    def rest(self, p: Float[Tensor, "*n v"], q: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
        """norm(max(0, p - q)), what is left of p where a token drawn from q was rejected."""
        left = (p - q).clamp(min=0)
        total = left.sum(-1, keepdim=True)
        return torch.where(total > 0, left / total, p)  # nothing is left where p = q: there nothing is rejected


class Chain(Ratio):
    """Speculative sampling of one chain (Leviathan et al. 2023; Chen et al. 2023): accept each drafted token with
    min(1, p / q); at the first rejection draw from what is left of p; after the last acceptance draw one more."""

    def verify(self, turn: Round, random: Random) -> None:
        guess, dist, rows = turn.guess, turn.dist, torch.arange(turn.batch)
        own = torch.zeros(turn.batch, dtype=torch.long)  # accepted tokens, and the read-out of the row's own token
        if guess is not None:
            if guess.parents() != tuple(range(-1, guess.size - 1)):
                raise ValueError("Chain verifies one chain of drafted tokens; for a tree use Recursive, KSeq or Walk")
            own = self._accepted(turn, guess, random).cpu()
        last = type(dist)(dist.logits[rows, own][:, None]).probs()[:, 0]
        if guess is not None:
            rejects = own < (guess.value >= 0).sum(1).cpu()
            if bool(rejects.any()):
                q = guess.laws(rows.tolist(), own.clamp(max=guess.size - 1).tolist(), last)
                last = torch.where(rejects[:, None].to(last.device), self.rest(last, q), last)
        element: Tensor | int = turn.start[0] + int(own[0])
        if turn.batch > 1:
            element = torch.tensor(turn.start)[:, None] + own[:, None]
            element = torch.where(torch.tensor(turn.room)[:, None] > 0, element, -1)
        token = random.categorical(last.log()[:, None], Key(turn.canvas.row, element))[:, 0].tolist()
        for r in turn.alive:
            if all(turn.emit(r, turn.value[r][i], i) for i in range(int(own[r]))):
                turn.emit(r, token[r])

    def chances(self, turn: Round, guess: Guess) -> Float[Tensor, "b n"]:
        """The probability of accepting each drafted token, once all before it are."""
        node = guess.value.clamp(min=0).to(turn.dist.logits.device)
        wanted = type(turn.dist)(turn.dist.logits[:, : guess.size]).log_prob(node).exp()
        offered = torch.ones_like(wanted) if guess.q is None else guess.q.log_prob(node).exp()
        return self.acceptance(wanted, offered)

    def _accepted(self, turn: Round, guess: Guess, random: Random) -> Int[Tensor, "b"]:
        """How many drafted tokens each row accepts."""
        n, chances = guess.size, self.chances(turn, guess)
        accepted = chances.masked_fill((guess.value < 0).to(chances.device), 0.0)
        element: Tensor | int = turn.start[0]
        if turn.batch > 1:
            element = torch.where(guess.value.cpu() >= 0, torch.tensor(turn.start)[:, None] + torch.arange(n), -1)
        return random.heads(accepted, Key(turn.canvas.row, element, _coins(n)))


@lru_cache(maxsize=64)
def _coins(n: int) -> Int[Tensor, "n"]:
    """The draws that decide on the first node of n depths."""
    return torch.tensor([numbered(COIN, depth) for depth in range(n)], dtype=torch.long)


@dataclass(slots=True)
class Level:
    """One element of a verification: the rows at work, the nodes that each may try, what is left of p, and the node
    that each row has accepted (-1: none yet)."""

    rows: list[int]
    nodes: list[list[int]]
    p: Float[Tensor, "n v"]
    accepted: list[int]

    @property
    def tries(self) -> int:
        return max(len(nodes) for nodes in self.nodes)


class Children(Ratio):
    """What verifiers of trees share: where a row stands, the nodes below are tried one after another; one that is
    accepted is emitted and verification goes on below it, otherwise a token from what is left of p is emitted."""

    def verify(self, turn: Round, random: Random) -> None:
        here = [[-1] for _ in range(turn.batch)]  # the nodes that stand for what a row has emitted
        alive = turn.alive
        while alive:
            nodes = [[c for node in here[r] for c in turn.drafted(r, node)] for r in alive]
            level = Level(alive, nodes, turn.at(alive).probs()[:, 0], [-1] * len(alive))
            if turn.guess is not None and level.tries:
                self.choose(turn, turn.guess, level, random)
            none = [j for j, node in enumerate(level.accepted) if node < 0]
            own = iter(turn.draw([alive[j] for j in none], level.p[none], random))
            alive = []
            for r, node, tried in zip(level.rows, level.accepted, nodes, strict=True):
                token = turn.value[r][node] if node >= 0 else next(own)
                if turn.emit(r, token, node):
                    alive.append(r)
                    here[r] = self.together(node, tried, turn.value[r])

    def choose(self, turn: Round, guess: Guess, level: Level, random: Random) -> None:
        """Fill in which node each row accepts, and what is left of p where it accepts none."""
        raise NotImplementedError

    def together(self, node: int, tried: list[int], value: list[int]) -> list[int]:
        """The nodes below which verification goes on once one is accepted."""
        return [node]

    def attempt(
        self, turn: Round, guess: Guess, level: Level, index: int, scale: Float[Tensor, "n"] | None, random: Random
    ) -> tuple[list[int], Float[Tensor, "m v"], Float[Tensor, "m v"]]:
        """Toss for the `index`-th node of each row that has accepted none, and note what is accepted. Which rows
        rejected theirs, what is left of p there, and the laws from which those nodes were drawn."""
        trying = [j for j, n in enumerate(level.nodes) if level.accepted[j] < 0 and index < len(n)]
        if not trying:
            return [], level.p[:0], level.p[:0]
        rows, tried = [level.rows[j] for j in trying], [level.nodes[j][index] for j in trying]
        token = torch.tensor([turn.value[r][n] for r, n in zip(rows, tried, strict=True)])[:, None]
        left = level.p if len(trying) == len(level.rows) else level.p[trying]
        token = token.to(left.device)
        q = guess.laws(rows, tried, left)
        offered = q.gather(-1, token)[:, 0]
        chance = self.acceptance(left.gather(-1, token)[:, 0], offered if scale is None else scale[trying] * offered)
        heads = turn.toss(rows, chance, random, index)
        for j, node, head in zip(trying, tried, heads, strict=True):
            if head:
                level.accepted[j] = node
        if any(heads):
            stay = [i for i, head in enumerate(heads) if not head]
            trying, left, q = [trying[i] for i in stay], left[stay], q[stay]
        return trying, left, q


class Recursive(Children):
    """Verification of a tree of random children (SpecInfer, Miao et al. 2023; Sequoia, Chen et al. 2024): each child is
    tried against what the earlier ones have left of p.

    Children drawn with or without replacement, or without randomness: the draft's `q` says what each was drawn from.
    """

    def choose(self, turn: Round, guess: Guess, level: Level, random: Random) -> None:
        for i in range(level.tries):
            rejected, left, q = self.attempt(turn, guess, level, i, None, random)
            if len(rejected) == len(level.rows):
                level.p = self.rest(left, q)
            elif rejected:
                level.p[rejected] = self.rest(left, q)


class KSeq(Children):
    """K-SEQ (SpecTr, Sun et al. 2023, algorithm 3): k drafts drawn independently are tried against p / (g q), where
    g >= 1 makes up for the number of tries; at least 1 - 1/e of the best possible acceptance. Drafts that carry the
    accepted token go on together, so the next element has as many candidates as drafts survived."""

    def choose(self, turn: Round, guess: Guess, level: Level, random: Random) -> None:
        if level.tries > 1 and (guess.q is None or guess.siblings != "independent"):
            raise ValueError("KSeq verifies drafts that were drawn independently from one law; use Recursive or Walk")
        q = guess.laws(level.rows, [n[0] if n else 0 for n in level.nodes], level.p)
        k = torch.tensor([len(n) for n in level.nodes], device=q.device)
        scale = kseq_scale(level.p, q, k)
        for i in range(level.tries):
            self.attempt(turn, guess, level, i, scale, random)
        none = [j for j, n in enumerate(level.nodes) if n and level.accepted[j] < 0]
        if none:
            level.p[none] = kseq_rest(level.p[none], q[none], k[none], scale[none])

    def together(self, node: int, tried: list[int], value: list[int]) -> list[int]:
        return [c for c in tried if value[c] == value[node]]


HALVINGS = 64  # close the gap between two numbers of any format


def kseq_scale(p: Float[Tensor, "n v"], q: Float[Tensor, "n v"], k: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """The smallest valid g, between 1 and k: that with 1 - (1 - b)^k = g b, b = sum_x min(q, p / g) (SpecTr, theorem 2;
    their p and q are the other way round). Approached from above, where every g is valid.

    With f(g) = (1 - (1 - b)^k) / b, which grows with g, it is the fixed point: f closes in on it from either side. In
    float64: with many drafts f is as good as g over a wide range.
    """
    kind, p, q = p.dtype, p.double(), q.double()

    def f(g: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        b = torch.minimum(q, p / g[:, None]).sum(-1, keepdim=True)
        return _tries(b, k[:, None])[:, 0].clamp(min=1)

    low, high = f(p.new_ones(len(k))), f(k.to(p.dtype).clamp(min=1))
    for _ in range(HALVINGS):  # where rounding keeps the two apart, the upper one will do
        going = high - low > 1e-9 * high  # a row that has arrived stays, whatever its company
        if not bool(going.any()):
            break
        middle = (low + high) / 2
        new = f(middle)
        low = torch.where(going & (new > middle), new, low)
        high = torch.where(going & (new <= middle), new, high)
    return high.to(kind)


def _tries(b: Float[Tensor, "*n"], k: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """(1 - (1 - b)^k) / b: how much likelier than at one try it is to be accepted at one of k."""
    b = b.clamp(max=1)
    return torch.where(b > 0, -torch.expm1(k * torch.log1p(-b)) / b, k.to(b.dtype))


def kseq_rest(
    p: Float[Tensor, "n v"], q: Float[Tensor, "n v"], k: Int[Tensor, "n"], scale: Float[Tensor, "n"]
) -> Float[Tensor, "n v"]:
    """What is left of p where none of k drafts was accepted: [p - min(q, p / g) P / b] / (1 - P), P = 1 - (1 - b)^k."""
    common = torch.minimum(q, p / scale[:, None])
    left = (p - common * _tries(common.sum(-1, keepdim=True), k[:, None])).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total, p)
