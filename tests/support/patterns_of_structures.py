"""Published patterns of trees, graphs, edits, axes, words and frames: labels and the rule of each paper."""

from __future__ import annotations

from functools import partial

import torch

from seriatim.plan import plan_of
from seriatim.view import (
    INF,
    NEVER,
    TIMED,
    full,
    inclusive,
    timed,
    tree,
)
from support.patterns import pattern

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
