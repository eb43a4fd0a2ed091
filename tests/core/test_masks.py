"""Published attention patterns come out exact from three integers a slot, a lane and a relation between groups.

Each pattern is one function: the labels, and the rule of the paper's sentence (its docstring) written by brute force.
From the same labels follow the decoding steps, the cache and the cost, given where the papers state them.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask, flex_attention

from seriatim.plan import DERIVED, LEARNED, MASK, NOISE, VALUE, OrderError, Plan, plan_of
from seriatim.view import (
    INF,
    NEVER,
    TIMED,
    View,
    earlier,
    full,
    inclusive,
    join,
    local,
    own_rank,
    timed,
    tree,
    two_stream,
)

Rule = Callable[[int, int], bool]


@dataclass
class Pattern:
    """A function that returns (plan or view, rule), and what is known of its decoding."""

    build: Callable
    cost: dict[str, int] = field(default_factory=dict)
    view: str | None = None  # the kind of layer that `cost` counts
    mixers: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.build.__name__


PATTERNS: list[Pattern] = []


def pattern(view: str | None = None, mixers: dict[str, str] | None = None, **cost: int):
    def note(build):
        PATTERNS.append(Pattern(build, cost, view, mixers or {}))
        return build

    return note


def itself(n: int) -> list[tuple[int, int]]:
    """Slot i reads element i."""
    return [(i, i) for i in range(n)]


def pyramid(sides: tuple[int, ...]) -> list[int]:
    """The scale of each token."""
    return [k for k, side in enumerate(sides) for _ in range(side * side)]


SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


# ---- one stream -----------------------------------------------------------------------------------------------------


@pattern(forwards=9, slots=9, pairs=45, peak_cache=9, kept=8)
def next_token():
    """A token sees itself and what is before it; slot i is fed token i-1 and predicts token i."""
    n = 9
    plan = plan_of(inclusive(range(n)), range(n), [-1, *range(n - 1)], itself(n))
    return plan, lambda q, k: k <= q


@pattern(forwards=5, slots=8, pairs=42, peak_cache=8, kept=7)
def prefix_lm():
    """The prompt sees all of itself, what follows is causal."""
    n, prompt = 9, 4
    at = [max(i, prompt - 1) for i in range(n)]
    born = [0 if i < prompt else i for i in range(n)]
    rank = [-1] * prompt + list(range(n - prompt))
    plan = plan_of(timed(at, born), rank, range(n), [(i - 1, i) for i in range(prompt, n)])
    return plan, lambda q, k: k <= q or (q < prompt and k < prompt)


@pattern(forwards=12, slots=12, pairs=1 + 2 + 3 + 9 * 4, peak_cache=4, kept=3)
def sliding_window():
    """A token sees itself and the three before it; slot i is fed token i-1."""
    n, window = 12, 4
    plan = plan_of(inclusive(range(n)).narrow(window=window), range(n), [-1, *range(n - 1)], itself(n))
    return plan, lambda q, k: 0 <= q - k < window


@pattern()
def local_window():
    """A token sees its two neighbours on either side."""
    return local(12, radius=2), lambda q, k: abs(q - k) <= 2


@pattern()
def everything():
    """No causality: everybody sees everybody."""
    return full(7), lambda q, k: True


@pattern()
def packed_samples():
    """Three texts in one row, each causal, none sees another."""
    lengths = [3, 1, 4]
    sample = [s for s, n in enumerate(lengths) for _ in range(n)]
    views = [inclusive(range(n)).narrow(lane=[s] * n) for s, n in enumerate(lengths)]
    return join(views), lambda q, k: sample[q] == sample[k] and k <= q


# ---- images: scales, neighbours, groups -----------------------------------------------------------------------------


@pattern(forwards=10, slots=680, pairs=286_434, peak_cache=680, kept=424)
def var():
    """A token sees all tokens of its own and lower scales; its input is derived from all lower scales."""
    scale = pyramid(SIDES)
    n, below = len(scale), [k - 1 for k in scale]
    plan = plan_of(inclusive(scale), scale, [-1] * n, itself(n), source=DERIVED, needs=below)
    return plan, lambda q, k: scale[k] <= scale[q]


@pattern(forwards=10, slots=680, pairs=110_468, peak_cache=256, kept=0)
def hmar():
    """Scale k attends to itself only: its input already carries everything earlier."""
    scale = pyramid(SIDES)
    n, below = len(scale), [k - 1 for k in scale]
    plan = plan_of(own_rank(scale), scale, [-1] * n, itself(n), source=DERIVED, needs=below)
    return plan, lambda q, k: scale[k] == scale[q]


@pattern(view="attention", mixers={"scan": "scan"}, forwards=10, pairs=110_468, kept=0)
def m_var():
    """Attention within each scale; a scan over the whole coarse-to-fine sequence is the only path between scales."""
    scale = pyramid(SIDES)
    n, below = len(scale), [k - 1 for k in scale]
    views = {"attention": own_rank(scale), "scan": inclusive(range(n))}
    plan = plan_of(views, scale, [-1] * n, itself(n), source=DERIVED, needs=below)
    return plan, {"attention": lambda q, k: scale[k] == scale[q], "scan": lambda q, k: k <= q}


@pattern()
def dd1_student():
    """Strictly earlier scales (the class token is one more, in front) plus itself, no other token of its scale."""
    level = [0, *(1 + k for k in pyramid((1, 2, 3, 4)))]
    return earlier(level), lambda q, k: q == k or level[k] < level[q]


@pattern()
def csd_var():
    """Learned keys in front: the first set is visible to queries before the second chosen scale, the second after."""
    scale, split = pyramid((1, 2, 3, 4)), 2
    memory = timed([-1] * 4, born=[0, 0, split, split], dies=[split, split, INF, INF])

    def rule(q, k):
        if q < 4 or k >= 4:
            return q == k or (q >= 4 and scale[k - 4] <= scale[q - 4])
        return scale[q - 4] < split if k < 2 else scale[q - 4] >= split

    return join([memory, inclusive(scale)]), rule


@pattern(forwards=31, slots=256)
def nar():
    """A token sees all tokens with a distance from the corner up to its own, and the class token; it predicts its
    right neighbour by one head and the one below by another."""
    n = 16
    distance = [-1, *(i + j for i in range(n) for j in range(n))]
    right = [(1 + n * i + j, n * i + j + 1) for i in range(n) for j in range(n - 1)]
    below = [(1 + n * i + j, n * (i + 1) + j) for i in range(n - 1) for j in range(n)]
    plan = plan_of(inclusive(distance), distance[1:], [-1, *range(n * n)], [(0, 0), *right, *below])
    return plan, lambda q, k: distance[k] <= distance[q]


@pattern(forwards=8 + 128 // 8 - 1, slots=128)
def detailflow():
    """The first group token by token, then a whole group a step from the group before; block-causal inputs, with g-1
    learned tokens at the junction."""
    n, g = 128, 8
    rank = [i if i < g else g + i // g - 1 for i in range(n)]
    feed = [-1, *range(g), *[-1] * (g - 1), *range(g, n - g)]
    plan = plan_of(inclusive(rank), rank, feed, itself(n))
    return plan, lambda q, k: rank[k] <= rank[q]


@pattern(forwards=24 + 13 * 2, slots=14 * 24)
def diagonal_decoding():
    """Row r+1 starts when row r holds w tokens; a token sees what has a lower rank and a lower raster index; the first
    of a row is fed a stand-in."""
    height, width, w = 14, 24, 2
    row = [i // width for i in range(height * width)]
    rank = [i % width + w * (i // width) for i in range(height * width)]
    feed = [i - 1 if i % width else -1 for i in range(height * width)]
    upper = TIMED * torch.ones(height, height, dtype=torch.long).tril()
    plan = plan_of(timed(rank, group=row, relation=upper), rank, feed, itself(len(rank)))
    return plan, lambda q, k: k <= q and rank[k] <= rank[q]


# ---- two streams ----------------------------------------------------------------------------------------------------


@pattern(forwards=3, slots=10, pairs=36, peak_cache=6, kept=2)
def block_diffusion():
    """[noisy; clean]: noisy sees its own noisy block and clean blocks strictly before; clean sees clean up to its own
    block; clean never sees noisy."""
    n, size = 6, 2
    block, noisy = [i % n // size for i in range(2 * n)], [i < n for i in range(2 * n)]
    source = [MASK if x else VALUE for x in noisy]
    plan = plan_of(two_stream(block, noisy), block[:n], [*range(n), *range(n)], itself(n), source)

    def rule(q, k):
        if noisy[q]:
            return block[k] == block[q] if noisy[k] else block[k] < block[q]
        return not noisy[k] and block[k] <= block[q]

    return plan, rule


@pattern(forwards=4, slots=4 * 3 + 3 * 3, peak_cache=3 * 3 + 3, kept=2 * 3)
def acdit():
    """[clean; noised], skip-causal: clean i sees clean <= i; noised i sees clean < i and itself, both ways."""
    n, size = 12, 3
    block, noised = [i % n // size for i in range(2 * n)], [i >= n for i in range(2 * n)]
    source = [NOISE if x else VALUE for x in noised]
    reads = [(n + i, i) for i in range(n)]
    plan = plan_of(two_stream(block, noised), block[:n], [*range(n), *range(n)], reads, source)

    def rule(q, k):
        if noised[k]:
            return noised[q] and block[k] == block[q]
        return block[k] < block[q] or (block[k] == block[q] and not noised[q])

    return plan, rule


@pattern(forwards=4, slots=9)
def any_subset():
    """AS-ARM: known tokens see each other; the query of an unknown sees known ones and unknowns of lower rank, its
    content also itself."""
    known, unknown = [1, 4], [0, 2, 3, 5]
    rank = [unknown.index(e) if e in unknown else -1 for e in range(6)]
    element = [*range(6), *unknown]
    query = [i >= 6 for i in range(10)]
    view = two_stream([rank[e] for e in element], query)
    reads = [(6 + r, e) for r, e in enumerate(unknown)]
    plan = plan_of(view, rank, element, reads, [VALUE] * 6 + [MASK] * 4)

    def rule(q, k):
        lower = not query[k] and (element[k] in known or rank[element[k]] < rank[element[q]])
        return lower or q == k

    return plan, rule


@pattern(forwards=4, slots=9)
def energy_based():
    """EBT, [t; o; y]: o rows are causal over o; the guess y_i of o_(i+1) sees t, o_1..o_i and itself only."""
    n = 4
    at = [0, *(2 * i + 1 for i in range(n)), *(2 * i + 2 for i in range(n))]
    guess = [i > n for i in range(2 * n + 1)]
    dies = [t + 1 if y else INF for t, y in zip(at, guess, strict=True)]
    carries = [-1, *range(n), *range(1, n + 1)]
    source = [LEARNED] + [VALUE] * n + [NOISE] * n
    plan = plan_of(timed(at, at, dies), [-1, *range(n)], carries, [(n + i, i) for i in range(1, n + 1)], source)
    return plan, lambda q, k: q == k or (not guess[k] and k <= (q - n if guess[q] else q))


@pattern()
def tidar_training():
    """Clean tokens are causal; mask slots, in blocks, see their block and the clean tokens strictly before it."""
    n, size = 6, 2
    clock = [2 * i + 1 for i in range(n)] + [2 * (i // size * size) for i in range(n)]
    mask = [i >= n for i in range(2 * n)]
    view = timed(clock, clock, [t + 1 if m else INF for t, m in zip(clock, mask, strict=True)])
    reads = [(i, i + 1) for i in range(n - 1)] + [(n + i, i) for i in range(n)]
    plan = plan_of(view, range(n), [*range(n), *range(n)], reads, [VALUE] * n + [MASK] * n)

    def rule(q, k):
        if not mask[q]:
            return not mask[k] and k <= q
        start = (q - n) // size * size
        return start <= k - n < start + size if mask[k] else k < start

    return plan, rule


@pattern()
def tidar_decoding():
    """Behind the cache: drafts d_0.. are causal; group j of masks sees the cache, d_0..d_(j-1) and itself."""
    cached, b = 3, 4
    group = [0] * b + [j for j in range(1, b + 1) for _ in range(b)]  # 0: the drafts
    clock = [2 * i for i in range(b)] + [2 * j - 1 for j in group[b:]]
    dies = [INF] * b + [t + 1 for t in clock[b:]]
    view = inclusive(range(cached)).then(timed(clock, clock, dies))

    def rule(q, k):
        if k < cached or q < cached:
            return k <= q
        i, j = group[q - cached], group[k - cached]
        return (k <= q if i == 0 else k - cached < i) if j == 0 else i == j

    return view, rule


@pattern()
def wedlm_training():
    """The memory stream is causal; a prediction slot sees clean memory of earlier blocks and, causally, its block."""
    n, size = 8, 4
    block, predicts = [i % n // size for i in range(2 * n)], [i >= n for i in range(2 * n)]
    clock = [(2 * block[i] + (not predicts[i])) * size + i % size for i in range(2 * n)]
    dies = [(2 * block[i] + 1) * size if predicts[i] else INF for i in range(2 * n)]

    def rule(q, k):
        if not predicts[q]:
            return not predicts[k] and k <= q
        return block[k] == block[q] and k <= q if predicts[k] else block[k] < block[q]

    return timed(clock, clock, dies), rule


@pattern(forwards=6, slots=11, pairs=66, peak_cache=11, kept=9)
def twins():
    """Uni-3DAR: each element twice, first a mask copy that says where, then its value; one full causal mask."""
    n = 6
    plan = plan_of(
        inclusive(range(2 * n)),
        range(n),
        [i // 2 for i in range(2 * n)],
        [(2 * i, i) for i in range(n)],
        [MASK, VALUE] * n,
    )
    return plan, lambda q, k: k <= q


# ---- trees, graphs, edits -------------------------------------------------------------------------------------------


def ancestors(parent: list[int], node: int) -> set[int]:
    """A node and all above it."""
    return set() if node < 0 else {node} | ancestors(parent, parent[node])


@pattern()
def draft_tree(parent=(-1, 0, 0, 1, 1, 2, 4, 4)):
    """Behind the cache, node u sees v iff v is u or an ancestor of u; all cached positions are visible."""
    cached = 5
    view = inclusive(range(cached)).then(tree(parent))

    def rule(q, k):
        if q < cached or k < cached:
            return k <= q
        return k - cached in ancestors(parent, q - cached)

    return view, rule


@pattern()
def hidden_transfer():
    """Every node u spawns pseudo states; pseudo (u, j) sees the ancestors of u, u, and pseudo (u, < j)."""
    parent, spawned = [-1, 0, 0, 1], 2
    chain = [u if j == 0 else 4 + spawned * u + j - 1 for u in range(4) for j in range(spawned)]
    node = [*range(4), *(u for u in range(4) for _ in range(spawned))]

    def rule(q, k):
        if k < 4:
            return k in ancestors(parent, node[q])
        return q >= 4 and node[q] == node[k] and k <= q

    return tree(parent + chain), rule


@pattern()
def edit_history(types=(1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1)):
    """SequenceMatch: each typed token (1) is a slot; it sees the tokens that no backspace (0) had deleted by then."""
    born, dies, text, seen = [], [], [], []
    for now, typed in enumerate(types):
        if typed:
            text.append(len(born))
            seen.append(set(text))  # the text as it stands: replayed, not labelled
            born.append(now)
            dies.append(INF)
        elif text:
            dies[text.pop()] = now
    return timed(born, born, dies), lambda q, k: k in seen[q]


@pattern()
def set_based_prompting():
    """Causal, but a token of one option cannot see any other option; the suffix sees everything."""
    part = [0] * 3 + [1] * 2 + [2] * 3 + [3] * 2 + [4] * 4
    option = [1 <= p <= 3 for p in part]
    relation = [[NEVER if q != k and 0 < q < 4 and 0 < k < 4 else TIMED for k in range(5)] for q in range(5)]
    view = timed(range(len(part)), group=part, relation=relation)
    return view, lambda q, k: k <= q and not (option[q] and option[k] and part[q] != part[k])


@pattern()
def diagram_of_thought():
    """A record sees its ancestors in the graph of thoughts, and itself causally."""
    parents = {0: [], 1: [0], 2: [0], 3: [1, 2], 4: [2]}
    above = {}
    for u in parents:  # parents come first
        above[u] = {u}.union(*(above[p] for p in parents[u]))
    record = [i // 2 for i in range(10)]
    relation = [[TIMED if k in above[q] else NEVER for k in parents] for q in parents]
    view = timed(range(10), group=record, relation=relation)
    return view, lambda q, k: k <= q and record[k] in above[record[q]]


# ---- lanes: axes, words, frames -------------------------------------------------------------------------------------


@pattern()
def frame_causal():
    """Lumos-1, two prompts of different length in one batch: text is causal, a frame sees all of itself and everything
    before it."""
    prompts, frames, size = [2, 4], 2, 3
    whole = max(prompts) + frames * size
    clock = [[i if i < p else p + (i - p) // size for i in range(whole)] for p in prompts]
    lane = [[0 if i < p + frames * size else -1 for i in range(whole)] for p in prompts]
    view = timed(torch.tensor(clock), lane=torch.tensor(lane))

    def rule(p, q, k):
        if max(q, k) >= p + frames * size:  # padding
            return q == k
        return k <= q or (min(q, k) >= p and (q - p) // size == (k - p) // size)

    return view, [partial(rule, p) for p in prompts]


@pattern(forwards=2, slots=8)
def space_and_time():
    """Epona: causal attention over time for every place, then full attention within each frame; a frame's features
    predict the next frame."""
    frames, places = 3, 4
    frame = [i // places for i in range(frames * places)]
    place = [i % places for i in range(frames * places)]
    views = {"time": inclusive(frame).narrow(lane=place), "space": full(len(frame)).narrow(lane=frame)}
    reads = [(i, i + places) for i in range((frames - 1) * places)]
    plan = plan_of(views, [f - 1 for f in frame], range(len(frame)), reads)
    rules = {
        "time": lambda q, k: place[k] == place[q] and frame[k] <= frame[q],
        "space": lambda q, k: frame[k] == frame[q],
    }
    return plan, rules


@pattern(forwards=12, slots=8 + 12)
def axial_transformer():
    """Outer: unmasked row attention, masked column attention, shifted down by one row. Inner: masked row attention over
    the pixel before. Together the exact raster order."""
    height, width = 3, 4
    n = height * width
    row, column = [i // width for i in range(n)], [i % width for i in range(n)]
    no = [-1] * n  # takes no part
    views = {
        "row": full(2 * n).narrow(lane=row + no),
        "column": inclusive(row + row).narrow(lane=column + no),
        "shift": inclusive([0] * n + [1] * n).narrow(lane=[*range(width, n + width), *range(n)]),
        "inner": inclusive(column + column).narrow(lane=no + row),
    }
    feed = [i - 1 if column[i] else -1 for i in range(n)]
    plan = plan_of(views, range(n), [*range(n), *feed], [(n + i, i) for i in range(n)])
    rules = {
        "row": lambda q, k: q == k or (q < n and k < n and row[q] == row[k]),
        "column": lambda q, k: q == k or (q < n and k < n and column[q] == column[k] and row[k] <= row[q]),
        "shift": lambda q, k: q == k or (k < n <= q and k == q - n - width),
        "inner": lambda q, k: q == k or (q >= n and k >= n and row[q - n] == row[k - n] and k <= q),
    }
    return plan, rules


@pattern(forwards=7, slots=12)
def bytes_in_words():
    """HAT: the encoder is full inside a word (with its [W]), the backbone causal over words, the decoder causal inside
    the next word, behind that word's predictive embedding; it also predicts the closing [W]."""
    start, size = [0, 3, 7], [2, 3, 2]  # of each word: its bytes, then its closing symbol; the first word is given
    slots = [("byte", w, b) for w in range(3) for b in range(size[w])] + [("word", w, -1) for w in range(3)]
    slots += [("next", w, b) for w in (1, 2) for b in range(size[w])]
    part, word, byte = zip(*slots, strict=True)
    views = {
        "encoder": full(len(slots)).narrow(lane=[-1 if p == "next" else w for p, w, _ in slots]),
        "backbone": inclusive(word).narrow(lane=[0 if p == "word" else -1 for p in part]),
        "decoder": inclusive(byte).narrow(lane=[{"byte": -1, "word": w + 1, "next": w}[p] for p, w, _ in slots]),
    }
    carries = [-1 if p == "word" else start[w] + b for p, w, b in slots]
    reads = [(7 + w, start[w + 1]) for w in (0, 1)]
    reads += [(s, start[w] + b + 1) for s, (p, w, b) in enumerate(slots) if p == "next"]
    plan = plan_of(views, [max(e - 3, -1) for e in range(10)], carries, reads)
    rules = {
        "encoder": lambda q, k: q == k or (word[q] == word[k] and "next" not in (part[q], part[k])),
        "backbone": lambda q, k: q == k or (part[q] == part[k] == "word" and word[k] <= word[q]),
        "decoder": lambda q, k: (
            q == k
            or (part[q] == part[k] == "next" and word[q] == word[k] and byte[k] <= byte[q])
            or (part[q] == "next" and part[k] == "word" and word[k] == word[q] - 1)
        ),
    }
    return plan, rules


@pattern(forwards=6, slots=6 * 4 + 3, kept=2 * 4 + 3)
def two_resolutions():
    """FAR: a frame sees all of the last three frames in full and, of each earlier one, its compressed token; compressed
    tokens are causal among themselves. A frame predicts the next."""
    frames, size, window = 7, 4, 3
    frame = [f for f in range(frames) for _ in range(size)] + list(range(frames))
    short = [i < frames * size for i in range(len(frame))]
    at = [f if s else f + window for f, s in zip(frame, short, strict=True)]
    dies = [t + window if s else INF for t, s in zip(at, short, strict=True)]
    view = timed(at, at, dies, group=[0 if s else 1 for s in short], relation=[[TIMED, TIMED], [NEVER, TIMED]])
    carries = [*range(frames * size), *(range(size * f, size * f + size) for f in range(frames))]
    reads = [(i, i + size) for i in range((frames - 1) * size)]
    plan = plan_of(view, [f - 1 for f in frame[: frames * size]], carries, reads)

    def rule(q, k):
        if not short[q]:
            return not short[k] and frame[k] <= frame[q]
        return 0 <= frame[q] - frame[k] < window if short[k] else frame[k] <= frame[q] - window

    return plan, rule


@pattern(forwards=48, slots=79 * 16, pairs=16 * 16 * 79 * 80 // 2)
def next_block():
    """NBP: causal by rows of 16 tokens, full inside; slot i of a row predicts slot i of the next. 32 of 80 rows are
    given (frame prediction at the paper's shapes)."""
    rows, width, given_rows = 80, 16, 32
    row = [i // width for i in range(rows * width)]
    rank = [max(r - given_rows, -1) for r in row]
    fed = range((rows - 1) * width)
    plan = plan_of(inclusive(row[: len(fed)]), rank, fed, [(i, i + width) for i in fed if rank[i + width] >= 0])
    return plan, lambda q, k: row[k] <= row[q]


# ---- the laws -------------------------------------------------------------------------------------------------------

BY_NAME = pytest.mark.parametrize("p", PATTERNS, ids=lambda p: p.name)


def views_and_rules(p: Pattern) -> list[tuple[View, list[Rule]]]:
    """Each view of a pattern with the rule of each row of its batch."""
    made, rule = p.build()
    views = made.views if isinstance(made, Plan) else {"all": made}
    rules = rule if isinstance(rule, dict) else {"all": rule}
    assert views.keys() == rules.keys()
    return [(views[name], r if isinstance(r, list) else [r]) for name, r in rules.items()]


def by_hand(rule: Rule, size: int) -> torch.Tensor:
    """The mask that a rule describes, pair by pair."""
    return torch.tensor([[bool(rule(q, k)) for k in range(size)] for q in range(size)])


@BY_NAME
def test_the_labels_give_the_mask_of_the_paper(p):
    for view, rules in views_and_rules(p):
        expected = torch.stack([by_hand(rule, view.size) for rule in rules])
        assert torch.equal(view.mask(), expected)


@BY_NAME
def test_no_pattern_peeks(p):
    made, _ = p.build()
    if isinstance(made, Plan):
        assert made.leaks(p.mixers) == []


@pytest.mark.parametrize("p", [p for p in PATTERNS if p.cost], ids=lambda p: p.name)
def test_the_cost_is_what_the_papers_state(p):
    made, _ = p.build()
    cost = made.cost(p.view)
    assert {name: getattr(cost, name) for name in p.cost} == p.cost


@BY_NAME
def test_no_pattern_needs_more_than_15_lines(p):
    """The promise of the core: a published order is a few lines of labels, and no new kind of label."""
    assert lines_of_labels(p.build) <= 15


def lines_of_labels(build: Callable) -> int:
    """Lines of a pattern without its signature, its docstring and its rule."""
    body = ast.parse(inspect.getsource(build)).body[0].body[1:]  # type: ignore[attr-defined]
    is_rule = [
        (isinstance(x, ast.FunctionDef) and x.name == "rule")
        or (isinstance(x, ast.Assign) and getattr(x.targets[0], "id", "") == "rules")
        for x in body
    ]
    return sum(x.end_lineno - x.lineno + 1 for x, rule in zip(body, is_rule, strict=True) if not rule)


# ---- FlexAttention: the same labels ---------------------------------------------------------------------------------


@BY_NAME
def test_flex_attention_gets_the_same_mask(p):
    for view, _ in views_and_rules(p):
        rule = view.block_mask().mask_mod
        dense = create_mask(rule, view.batch, 1, view.size, view.size, device="cpu")
        assert torch.equal(dense[:, 0], view.mask())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "build",
    [next_token, packed_samples, block_diffusion, any_subset, set_based_prompting, frame_causal, two_resolutions],
)
def test_flex_attention_equals_dense_attention(build):
    torch.manual_seed(0)
    for view, _ in views_and_rules(Pattern(build)):
        q, k, v = torch.randn(3, view.batch, 2, view.size, 8)
        flex = flex_attention(q, k, v, block_mask=view.block_mask())
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=view.mask()[:, None])
        torch.testing.assert_close(flex, dense, atol=1e-6, rtol=1e-5)


def test_flex_attention_skips_whole_blocks_without_a_visible_pair():
    view = own_rank(pyramid(SIDES))
    blocks = view.block_mask().to_dense()[0, 0].bool()
    padded = torch.nn.functional.pad(view.mask()[0], (0, 768 - 680, 0, 768 - 680))
    assert torch.equal(blocks, padded.reshape(6, 128, 6, 128).any(3).any(1))


# ---- families of patterns -------------------------------------------------------------------------------------------

trees = st.integers(1, 24).flatmap(lambda n: st.tuples(*(st.integers(-1, i - 1) for i in range(n))))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(parent=trees)
def test_any_draft_tree_behind_a_cache(parent):
    view, rule = draft_tree(parent)
    assert torch.equal(view.mask()[0], by_hand(rule, view.size))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(types=st.lists(st.integers(0, 1), max_size=40).filter(any))
def test_any_history_of_edits(types):
    view, rule = edit_history(types)
    assert torch.equal(view.mask()[0], by_hand(rule, view.size))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(order=st.permutations(range(6)), known=st.integers(0, 6), group=st.integers(1, 3))
def test_any_order_of_any_unknown_elements_in_groups_of_any_size(order, known, group):
    """Two-stream attention over any ranks: a query sees its own rank's queries and what is decided before."""
    rank = [-1] * 6
    for i, e in enumerate(order[known:]):
        rank[e] = i // group
    unknown = order[known:]
    element, query = [*range(6), *unknown], [False] * 6 + [True] * len(unknown)
    reads = [(6 + i, e) for i, e in enumerate(unknown)]
    source = [MASK if q else VALUE for q in query]
    plan = plan_of(two_stream([rank[e] for e in element], query), rank, element, reads, source)

    def rule(q, k):
        earlier_value = not query[k] and rank[element[k]] < rank[element[q]]
        return earlier_value or (query[q] == query[k] and rank[element[q]] == rank[element[k]])

    assert torch.equal(plan.views["all"].mask()[0], by_hand(rule, len(element)))
    assert plan.leaks() == []
    assert plan.cost().forwards == -(-len(unknown) // group)


# ---- figures of the papers that need more than one number -----------------------------------------------------------


def test_nar_decodes_anti_diagonals_of_1_2_to_n_to_1():
    plan, _ = nar()
    groups = [step.reads.element.unique().numel() for step in plan.steps()]
    assert groups == [*range(1, 17), *range(15, 0, -1)]


def test_nar_reads_each_token_once_for_each_neighbour_that_is_decided():
    plan, _ = nar()
    readers = torch.bincount(plan.reads.element[0]).reshape(16, 16)
    expected = torch.full((16, 16), 2)
    expected[0], expected[:, 0] = 1, 1
    assert torch.equal(readers, expected)


def test_m_var_scans_inside_a_scale_without_a_leak_although_its_attention_is_markov():
    plan, _ = m_var()
    assert plan.check({"scan": "scan"}) is plan
    assert not plan.keep("attention").any()  # no keys and values between scales
    assert torch.equal(plan.reach({"scan": "scan"}), plan.slots.needs)


def test_axial_attention_gives_each_pixel_exactly_all_pixels_before_it():
    plan, _ = axial_transformer()
    assert plan.reach()[0, 12:].tolist() == list(range(-1, 11))
    # the outer context of a row is computed once, with the first pixel of the next row
    assert [step.size for step in plan.steps()] == [1, 1, 1, 1, 5, 1, 1, 1, 5, 1, 1, 1]


def test_tidar_trains_two_orders_in_one_pass_so_it_cannot_be_decoded_as_one():
    plan, _ = tidar_training()
    with pytest.raises(OrderError, match="not computable"):
        plan.steps()


def test_block_diffusion_appends_a_block_together_with_the_queries_of_the_next():
    """ACDiT and SDAR's fused trick is derived: the last clean block is never computed, the one before not kept."""
    plan, _ = block_diffusion()
    clean, noisy = [VALUE, VALUE], [MASK, MASK]
    assert [step.slots.source[0].tolist() for step in plan.steps()] == [noisy, noisy + clean, noisy + clean]
    assert plan.keep()[0].nonzero()[:, 0].tolist() == [6, 7]


def test_two_resolutions_evict_a_frame_when_it_leaves_the_window():
    plan, _ = two_resolutions()
    assert [step.retain is not None for step in plan.steps()] == [False, False, True, True, True, True]


@pytest.mark.parametrize(("depth", "share"), [(16, 0.596), (8, 0.365), (4, 0.249), (2, 0.192)])
def test_variant_keeps_entries_only_in_layers_that_compute_them(depth, share):
    """VARiant: scales 1-6 run all 30 layers, later ones `depth`; cache relative to full as in the paper's table."""
    plan, _ = var()
    scale = torch.tensor(pyramid(SIDES))
    subnet = torch.zeros(30, dtype=torch.bool)
    subnet[[i * 29 // (depth - 1) for i in range(depth)]] = True
    plan = Plan(plan.slots, plan.views, plan.reads, plan.rank, layers=subnet[:, None] | (scale < 6))
    entries = sum(int(step.layers.sum()) for step in plan.steps())
    assert round(entries / (680 * 30), 3) == share
