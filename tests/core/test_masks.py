"""Published attention patterns come out exact from three integers a slot, a lane and a relation between groups.

Each pattern is one function: the labels, and the rule of the paper's sentence (its docstring) written by brute force.
From the same labels follow the decoding steps, the cache and the cost, given where the papers state them.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask, flex_attention

from seriatim.plan import MASK, VALUE, OrderError, Plan, plan_of
from seriatim.view import (
    View,
    own_rank,
    two_stream,
)
from support.patterns import PATTERNS, SIDES, Pattern, Rule, pyramid
from support.patterns_of_streams import (
    any_subset,
    block_diffusion,
    m_var,
    nar,
    next_token,
    packed_samples,
    tidar_training,
    var,
)
from support.patterns_of_structures import (
    axial_transformer,
    draft_tree,
    edit_history,
    frame_causal,
    set_based_prompting,
    two_resolutions,
)

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
