"""Proposers of drafts: a small model that drafts chains and trees, and lookup of what followed before.

Each follows one canvas at a time and starts afresh with another. Drafts end one element before the end of the layout:
the verifier adds an element of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seriatim.canvas import Canvas
from seriatim.decoding.growth import Choices, Tree, likeliest
from seriatim.decoding.guess import Guess, branching, depths, levels, moved, room
from seriatim.decoding.loop import Step
from seriatim.decoding.target import Target
from seriatim.heads.dist import Categorical
from seriatim.model import Rows
from seriatim.random import DRAFT, Key, Random, numbered

Siblings = Literal["independent", "distinct", "top"]
SIBLINGS: tuple[Siblings, ...] = get_args(Siblings)


class Drafting:
    """What proposers share that ask a small model: its cache, which follows one canvas, and where it ends.

    draft: the small model with its own filters (best those of the target) and its own cache. That holds known elements
    only, and as many as it has seen: after a fully accepted draft the last token is new to it, and is fed with the
    next. Drafted tokens are fed again with each new depth, so that caches which keep paths only will do; a few rows
    more cost next to nothing beside the weights. Where a text outgrows the draft's longest, nothing is drafted any
    more.
    """

    def __init__(self, draft: Target):
        self.draft = draft
        self._canvas: Canvas | None = None
        self._row = torch.zeros(0, dtype=torch.long)

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        self._follow(canvas, step.select)

    def _begin(self, canvas: Canvas, target: Target) -> Int[Tensor, "b 1"]:
        """Follow the canvas. How many elements each row has left to decide; a draft has one less."""
        if canvas is not self._canvas:
            _same_ids(self.draft, target, canvas.layout.kinds[0])
            self._canvas, self._row = canvas, canvas.row
            asked = self.draft.conditions[0].rows
            if asked not in (None, canvas.batch) and canvas.batch % asked == 0:  # several texts of each prompt
                self.draft.select(torch.arange(asked).repeat_interleave(canvas.batch // asked), asked)
            self.draft.prefill(canvas)
        self._follow(canvas, moved(self._row, canvas.row))
        left = torch.tensor(room(canvas))[:, None]
        most = self.draft.model.layout.size
        if canvas.layout.size > most:
            left = torch.minimum(left, most - canvas.lengths().amax())
        return left

    def _follow(self, canvas: Canvas, rows: Int[Tensor, "b"] | None) -> None:
        """Rows were copied, dropped or admitted."""
        if rows is not None:
            self.draft.select(rows, len(self._row))
            self._row = canvas.row

    def _behind(self, canvas: Canvas, guess: Guess | None, nodes: Sequence[int]) -> Float[Tensor, "b m v"]:
        """Log-probabilities of what follows each of these nodes of a guess (-1: the last known element)."""
        return self._said(canvas, guess, nodes).log_probs()

    def _said(self, canvas: Canvas, guess: Guess | None, nodes: Sequence[int]) -> Categorical:
        """The law of what follows each of these nodes."""
        plan = self.draft.plan(canvas, guess)
        assert plan is not None
        rows = self.draft.forward(plan, canvas, guess)
        if guess is None:  # known elements enter the cache, but for the last one, from which drafts start
            keep: int | Tensor = plan.size - 1
            if isinstance(rows.slot, Tensor):
                slots = torch.arange(plan.size)[None]
                keep = torch.where(slots < rows.slot[:, :1], slots, -1)
            self.draft.commit(keep, plan)
        if len(nodes) == 1:
            return type(rows.dist)(rows.dist.logits[:, nodes[0] + 1, None])
        return type(rows.dist)(rows.dist.logits[:, [n + 1 for n in nodes]])


class DraftModel(Drafting):
    """A small model drafts a chain or a tree of fixed shape (Leviathan et al. 2023; SpecInfer, Miao et al. 2023).

    shape: the length of a chain, or the parents of a tree, depth by depth (`branching`); siblings: children of a node
    are drawn independently, drawn without replacement ("distinct"), or are the likeliest tokens, without randomness
    ("top").
    """

    def __init__(self, draft: Target, shape: int | Sequence[int], siblings: Siblings = "independent"):
        super().__init__(draft)
        if siblings not in SIBLINGS:
            raise ValueError(f"siblings are {', '.join(SIBLINGS[:-1])} or {SIBLINGS[-1]}, not {siblings!r}")
        if isinstance(shape, int) and shape < 0:
            raise ValueError(f"a draft has 0 or more tokens, got {shape}")
        parent = branching((1,) * shape) if isinstance(shape, int) else tuple(shape)
        depth = depths(parent)
        if list(depth) != sorted(depth):
            raise ValueError(f"a draft tree is listed depth by depth, got parents {parent} at depths {depth}")
        self.parent, self.siblings = parent, siblings

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        left = self._begin(canvas, target)
        depth = depths(self.parent)
        size = sum(d < int(left.max()) for d in depth)
        if size == 0:
            return None
        parent = self.parent[:size]
        value = torch.full((canvas.batch, size), -1)
        laws: list[Float[Tensor, "b n v"]] = []
        for first, end in levels(parent):
            above = self._guess(canvas, value[:, :first]) if first else None
            p = self._behind(canvas, above, parent[first:end])
            there = left > depth[first]  # rows that have room for this depth
            node = torch.tensor(parent[first:end])
            live = there & ((node < 0) | (value[:, node.clamp(min=0)] >= 0))
            value[:, first:end] = self._children(canvas, p, live, first, depth[first], random)
            laws.append(p)
        q = None if self.siblings == "top" else Categorical(torch.cat(laws, 1))
        return self._guess(canvas, value, q)

    def _guess(self, canvas: Canvas, value: Int[Tensor, "b n"], q: Categorical | None = None) -> Guess:
        parent = self.parent[: value.shape[1]]
        chain = parent == tuple(range(-1, len(parent) - 1))
        return Guess(beside(canvas, value), None if chain else parent, q, self.siblings)

    def _children(
        self, canvas: Canvas, p: Float[Tensor, "b n v"], live: Tensor, first: int, depth: int, random: Random
    ) -> Int[Tensor, "b n"]:
        """Tokens for nodes `first`, ... of one depth, given the laws behind their parents; -1 where there is no node.
        On return `p` holds what each was drawn from."""
        parent = self.parent[first : first + p.shape[1]]
        birth = [parent[:j].count(parent[j]) for j in range(len(parent))]
        start = torch.full((1, 1), canvas.length) if canvas.length is not None else canvas.lengths()[:, None]
        value = torch.full(live.shape, -1)
        for turn in range(max(birth) + 1):  # eldest siblings first
            now = [j for j, b in enumerate(birth) if b == turn]
            possible = live[:, now] & (p[:, now] > -torch.inf).any(-1).cpu()
            law = p[:, now].masked_fill(~possible[..., None].to(p.device), 0.0)
            if self.siblings == "top":
                x = law.argmax(-1)
            else:
                element = torch.where(possible, start + depth - 1, -1)
                draw = torch.tensor([numbered(DRAFT, depth, first + j) for j in now])
                x = random.categorical(law, Key(canvas.row, element, draw))
            value[:, now] = torch.where(possible, x.cpu(), -1)
            if self.siblings != "independent":
                for i, j in enumerate(now):
                    later = [k for k in range(j + 1, len(parent)) if parent[k] == parent[j]]
                    p[:, later] = p[:, later].scatter(-1, x[:, i, None, None].expand(-1, len(later), 1), -torch.inf)
        return value


class DraftTree(Drafting):
    """A small model drafts a tree of tokens that it holds likely, without randomness: `Walk` verifies it at any
    temperature. tree: how it grows; `growth.Dynamic` needs a draft that says how sure it is (no greedy one)."""

    def __init__(self, draft: Target, tree: Tree):
        super().__init__(draft)
        self.tree = tree

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        deepest = (self._begin(canvas, target)[:, 0] - 1).tolist()
        if max(deepest) < 1:
            return None
        value = torch.zeros(canvas.batch, 0, dtype=torch.long)
        parent: list[int] = []
        level = [-1]  # the nodes that were expanded last

        def expand(token: Int[Tensor, "b k"], rows: Sequence[int]) -> Choices:
            nonlocal value, level
            value = torch.cat([beside(canvas, value), token], 1)
            parent.extend(level[r] for r in rows)
            level = list(range(len(parent) - len(rows), len(parent)))
            return likeliest(self._said(canvas, Guess(value, tuple(parent)), level).logits, self.tree.width)

        first = likeliest(self._said(canvas, None, level).logits, self.tree.width)
        return self.tree.grow(first, expand, deepest)


def _same_ids(draft: Target, target: Target, kind: str) -> None:
    """Refuse a draft of other ids than the target's."""
    heads = [dict(t.model.heads.items()).get(kind) for t in (draft, target)]
    if None in heads:
        who, model = ("draft", draft.model) if heads[0] is None else ("target", target.model)
        raise ValueError(f"the {who} model has no head for {kind!r}, which is drafted; it has {', '.join(model.heads)}")
    ours, theirs = (getattr(head, "vocab", None) for head in heads)
    if ours != theirs:
        raise ValueError(
            f"the draft predicts {ours} ids and the target {theirs}: a draft model shares the vocabulary of its target"
        )


def beside(canvas: Canvas, value: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """On the device of the ids of a canvas."""
    return value.to(canvas.value[canvas.layout.kinds[0]].device)


class NGram:
    """Prompt lookup (Saxena 2023): the last n tokens stood here before, so draft what followed then.

    The longest n of `sizes` that occurs before decides; of several occurrences the most recent. A copy may run into
    itself: a text of period P is drafted without end. `earliest` and `whole` (only where all `length` tokens followed)
    give the choice of the Spec-Bench implementation. An index of n-grams costs O(1) a token.
    """

    def __init__(self, length: int = 10, sizes: Sequence[int] = (3, 2, 1), earliest: bool = False, whole: bool = False):
        if length < 0 or not sizes or min(sizes) < 1:
            raise ValueError(f"a draft has 0 or more tokens, an n-gram 1 or more; got {length} and {tuple(sizes)}")
        self.length, self.sizes = length, tuple(sorted(sizes, reverse=True))
        self.earliest, self.whole = earliest, whole
        self._canvas: Canvas | None = None
        self._row = torch.zeros(0, dtype=torch.long)
        self._text: list[list[int]] = []
        self._index: list[dict[tuple[int, ...], int]] = []  # n-gram -> where what followed it stands

    def propose(self, canvas: Canvas, target: Target, random: Random) -> Guess | None:
        if canvas is not self._canvas:
            self._canvas, self._row = canvas, canvas.row[:0]
        self._follow(canvas, moved(self._row, canvas.row))
        drafts = [self._draft(row, canvas, left - 1) for row, left in enumerate(room(canvas))]
        width = max(len(d) for d in drafts)
        if width == 0:
            return None
        return Guess(beside(canvas, torch.tensor([d + [-1] * (width - len(d)) for d in drafts])))

    def observe(self, canvas: Canvas, rows: Rows, step: Step) -> None:
        self._follow(canvas, step.select)

    def _follow(self, canvas: Canvas, rows: Int[Tensor, "b"] | None) -> None:
        """Rows were copied, dropped or admitted."""
        if rows is not None:
            old = rows.tolist()
            self._text = [list(self._text[r]) if r >= 0 else [] for r in old]
            self._index = [dict(self._index[r]) if r >= 0 else {} for r in old]
            self._row = canvas.row

    def _draft(self, row: int, canvas: Canvas, most: int) -> list[int]:
        text, index = self._text[row], self._index[row]
        self._read(text, index, canvas, row)
        most = min(most, self.length)
        if most < 1:
            return []
        for n in self.sizes:
            at = index.get(tuple(text[-n:])) if n <= len(text) else None
            if at is None or (self.whole and (at + self.length > len(text) or at >= len(text) - n)):
                continue
            draft: list[int] = []
            for i in range(at, at + most):
                draft.append(text[i] if i < len(text) else draft[i - len(text)])
            return draft
        return []

    def _read(self, text: list[int], index: dict[tuple[int, ...], int], canvas: Canvas, row: int) -> None:
        """Take in what is new: the n-grams that end before each new token are followed by it."""
        kind = canvas.layout.kinds[0]
        known = canvas.length if canvas.length is not None else int(canvas.lengths()[row])
        for token in canvas.value[kind][row, len(text) : known].tolist():
            for n in self.sizes:
                if n <= len(text):
                    gram = tuple(text[-n:])
                    if not (self.earliest and gram in index):
                        index[gram] = len(text)
            text.append(token)
