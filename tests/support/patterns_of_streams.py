"""Published patterns of one stream, of pictures, and of two streams: labels and the rule of each paper."""

from __future__ import annotations

import torch

from seriatim.plan import DERIVED, LEARNED, MASK, NOISE, VALUE, plan_of
from seriatim.view import (
    INF,
    TIMED,
    earlier,
    full,
    inclusive,
    join,
    local,
    own_rank,
    timed,
    two_stream,
)
from support.patterns import SIDES, itself, pattern, pyramid

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
