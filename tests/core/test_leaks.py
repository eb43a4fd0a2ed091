"""Planted leaks are found before anything is trained, and named: who reads what, and through whom it peeks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seriatim.layout import Layout, Segment, line
from seriatim.plan import DERIVED, LEARNED, MASK, NOISE, VALUE, OrderError, Plan, plan_of
from seriatim.view import INF, full, inclusive, own_rank, timed, two_stream


def itself(n: int) -> list[tuple[int, int]]:
    return [(i, i) for i in range(n)]


def first_leak(plan: Plan, mixers: dict[str, str] | None = None) -> str:
    """What `check` says, without its introduction."""
    with pytest.raises(OrderError) as error:
        plan.check(mixers)
    return str(error.value).removeprefix("this order peeks: ")


SCALE = [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2]


# ---- the feed -------------------------------------------------------------------------------------------------------


def test_next_token_without_the_shift():
    plan = plan_of(inclusive(range(5)), range(5), range(5), itself(5))
    assert first_leak(plan) == "slot 0 reads element 0, but sees element 0 through itself (and 4 more)"


def test_next_scale_fed_its_own_scale():
    """A slot that carries its own token, and sees the others of its scale."""
    plan = plan_of(inclusive(SCALE), SCALE, range(14), itself(14))
    assert first_leak(plan) == "slot 0 reads element 0, but sees element 0 through itself (and 13 more)"


def test_one_slot_of_a_scale_is_fed_a_token_of_the_same_scale():
    """Only slot 3 is wrong; the others of its scale, and nobody before, see it."""
    carries = [[e for e in range(14) if SCALE[e] < k] for k in SCALE]
    carries[3] = [0, 2]
    plan = plan_of(inclusive(SCALE), SCALE, carries, itself(14), source=DERIVED)
    assert [str(leak) for leak in plan.leaks()] == [
        "slot 1 reads element 1, but sees element 2 through slot 3",
        "slot 2 reads element 2, but sees element 2 through slot 3",
        "slot 3 reads element 3, but sees element 2 through itself",
        "slot 4 reads element 4, but sees element 2 through slot 3",
    ]


def test_a_derived_slot_that_does_not_list_its_elements_is_named_by_rank():
    scale = SCALE[:5]
    plan = plan_of(inclusive(scale), scale, [-1] * 5, itself(5), source=DERIVED, needs=[-1, 0, 0, 1, 0])
    assert first_leak(plan) == (
        "slot 1 reads element 1 of rank 1, but sees content of rank 1 through slot 3 (and 3 more)"
    )


def test_the_element_itself_is_named_before_its_company():
    """Of two slots that are equally near, the one that carries what is read."""
    plan = plan_of(full(3), [0, 0], [0, 1, -1], [(2, 1)])
    assert first_leak(plan) == "slot 2 reads element 1, but sees element 1 through slot 1"


def test_a_leak_through_several_layers_names_its_source():
    """Slot 0 sees only slot 1, slot 1 sees slot 2, slot 2 carries the answer: two layers are enough to peek."""
    pairs = {(0, 1), (1, 2)}
    relation = [[2 if q == k or (q, k) in pairs else 0 for k in range(3)] for q in range(3)]
    view = timed([0, 0, 0], group=[0, 1, 2], relation=relation)
    plan = plan_of(view, [0], [-1, -1, 0], [(0, 0)])
    assert first_leak(plan) == "slot 0 reads element 0, but sees element 0 through slot 2"


def test_given_elements_are_not_read_out():
    """Which is no peeking: it is a read-out too many."""
    plan = plan_of(inclusive(range(2)), [-1, 0], [-1, 0], itself(2))
    assert plan.leaks() == []
    with pytest.raises(
        OrderError, match=r"^slot 0 reads element 0, which is given and must not be read; let it read -1"
    ):
        plan.check()


def test_a_label_that_denies_what_a_slot_carries_hides_nothing():
    """`needs` may say more than the values in a slot, never less."""
    honest = plan_of(inclusive(range(4)), range(4), [-1, 0, 1, 2], itself(4))
    wrong = plan_of(inclusive(range(4)), range(4), range(4), itself(4), needs=[-1] * 4)
    assert first_leak(wrong) == "slot 0 reads element 0, but sees element 0 through itself (and 3 more)"
    denied = replace(honest, slots=replace(honest.slots, needs=torch.full((1, 4), -1)))
    assert denied.check() is denied and torch.equal(denied.step, honest.step)
    late = replace(honest, views={"all": full(4)}, slots=denied.slots)
    assert first_leak(late).startswith("slot 0 reads element 0, but sees element 0 through slot 1")
    with pytest.raises(OrderError, match="not computable"):
        late.steps()


def test_nodes_of_a_draft_stand_for_themselves():
    """Several may carry one element, which a text of their own puts behind what they read."""
    plan = plan_of(full(2), [0, 1], [0, 0], [(0, 1), (1, 0)], needs=[-1, -1])
    assert first_leak(plan).startswith("slot 1 reads element 0")
    drafted = replace(plan, slots=replace(plan.slots, node=torch.tensor([[0, 1]])))
    assert drafted.check() is drafted


def test_an_element_that_nobody_reads_is_named():
    """In a packed plan all that is to be decided has a read-out; a step of it has not."""
    plan = plan_of(inclusive(range(4)), [-1, 0, 1, 2], range(4), [(0, 1), (2, 3)])
    assert plan.check() is plan
    with pytest.raises(OrderError, match=r"^no slot reads element 2, which is to be decided; every element that is"):
        plan.check(due=plan.rank >= 0)
    assert plan.check(due=(plan.rank >= 0) & (torch.arange(4) != 2)) is plan


def test_what_is_given_may_be_seen_by_all():
    plan = plan_of(full(3), [-1, -1, 0], [0, 1, -1], [(2, 2)])
    assert plan.check() is plan


# ---- two streams ----------------------------------------------------------------------------------------------------

BLOCK = [0, 0, 1, 1, 2, 2]


def test_loose_two_stream_attention():
    """Noisy blocks see clean blocks up to and including their own: one clock tick too late."""
    query = [True] * 6 + [False] * 6
    clock = [2 * b + 1 for b in BLOCK] * 2
    dies = [t + 1 if q else INF for t, q in zip(clock, query, strict=True)]
    plan = plan_of(timed(clock, clock, dies), BLOCK, [*range(6)] * 2, itself(6), [MASK] * 6 + [VALUE] * 6)
    assert first_leak(plan) == "slot 0 reads element 0, but sees element 0 through slot 6 (and 5 more)"


def test_two_stream_values_that_see_queries_are_harmless():
    """A mask tells nothing: reading it too late is not a leak."""
    clock = [2 * b for b in BLOCK] + [2 * b + 1 for b in BLOCK]
    plan = plan_of(timed(clock), BLOCK, [*range(6)] * 2, itself(6), [MASK] * 6 + [VALUE] * 6)
    assert plan.leaks() == []


def test_the_content_stream_read_in_place_of_the_query_stream():
    view = two_stream([*range(4)] * 2, [True] * 4 + [False] * 4)
    plan = plan_of(view, range(4), [*range(4)] * 2, [(i + 4, i) for i in range(4)], [MASK] * 4 + [VALUE] * 4)
    assert first_leak(plan) == "slot 4 reads element 0, but sees element 0 through itself (and 3 more)"


# ---- layers that cannot honour a mask -------------------------------------------------------------------------------


def block_diffusion(clean_first: bool) -> Plan:
    query = [i < 6 for i in range(12)]
    order = [*range(6, 12), *range(6)] if clean_first else list(range(12))
    element = [i % 6 for i in order]
    view = two_stream([BLOCK[e] for e in element], [query[i] for i in order])
    source = [MASK if query[i] else VALUE for i in order]
    reads = [(s, e) for s, (i, e) in enumerate(zip(order, element, strict=True)) if query[i]]
    return plan_of({"attention": view, "mixer": view}, BLOCK, element, reads, source)


@pytest.mark.parametrize(
    ("clean_first", "message"),
    [
        (True, "slot 6 reads element 0, but sees element 0 through slot 0"),
        # a clean slot looks back at the noisy ones of later blocks, which attend to later clean blocks
        (False, "slot 2 reads element 2, but sees element 2 through slot 8"),
    ],
)
def test_layers_that_look_back_over_both_streams_peek_in_either_order(clean_first, message):
    """A layer that lets every slot see all earlier ones of the array, over [clean; noisy] and over [noisy; clean]."""
    plan = block_diffusion(clean_first)
    assert plan.check() is plan
    assert first_leak(plan, {"mixer": "causal"}).startswith(message)


@pytest.mark.parametrize("clean_first", [True, False])
def test_a_scan_over_both_streams_is_refused(clean_first):
    """A recurrence cannot leave anything out of its state, so it cannot train in two streams: in either order."""
    with pytest.raises(OrderError, match="layers of kind 'mixer': a recurrent layer cannot honour this view"):
        block_diffusion(clean_first).check({"mixer": "scan"})


def test_a_bidirectional_layer_over_a_causal_plan():
    plan = plan_of(inclusive(range(4)), range(4), [-1, 0, 1, 2], itself(4))
    assert plan.check({"all": "scan"}) is plan
    assert first_leak(plan, {"all": "full"}) == (
        "slot 0 reads element 0, but sees element 0 through slot 1 (and 2 more)"
    )


def test_a_scan_stays_in_its_lane():
    """Two samples in one row: a scan that starts anew at each of them does not peek, one that runs through does."""
    lane = [0, 0, 1, 1]
    rank, carries, reads = [0, 1, 0, 1], [-1, 0, -1, 2], itself(4)
    apart = plan_of(inclusive([0, 1, 0, 1]).narrow(lane=lane), rank, carries, reads)
    through = plan_of(inclusive([0, 1, 2, 3]), rank, carries, reads)
    assert apart.leaks({"all": "scan"}) == []
    assert through.leaks({"all": "scan"}) != []


def test_a_scan_inside_a_scale_is_no_leak_but_one_over_its_own_tokens_is():
    """M-VAR: inputs of scale k are functions of earlier scales; fed the scale's own tokens, shifted, they are not."""
    views = {"attention": own_rank(SCALE), "scan": inclusive(range(14))}
    below = [k - 1 for k in SCALE]
    fed = plan_of(views, SCALE, [-1] * 14, itself(14), source=DERIVED, needs=below)
    assert fed.check({"scan": "scan"}) is fed
    raster = plan_of(views, SCALE, [-1, *range(13)], itself(14))
    assert first_leak(raster, {"scan": "scan"}).startswith("slot 1 reads element 1, but sees element 1 through slot 2")


def test_a_mixer_that_does_not_exist_is_refused():
    plan = plan_of(inclusive(range(2)), range(2), [-1, 0], itself(2))
    with pytest.raises(ValueError, match="layers 'all' honour 'bidirectional'; a mixer is one of any, causal, scan"):
        plan.check({"all": "bidirectional"})


# ---- the same datum in two forms ------------------------------------------------------------------------------------


def action_layout() -> Layout:
    """An observation, an action as a vector, and the same action as ids."""
    place = torch.zeros(2, 1, dtype=torch.long)
    return Layout(
        (
            Segment("frame", place, given=True),
            Segment("action", place),
            Segment("ids", place, same_as="action"),
        )
    )


def hybrid_vla(noisy_first: bool, apart: bool) -> Plan:
    """Frame, noisy action, ids in one sequence; `apart`: ids do not see the noisy action."""
    rank = [-1, -1, 0, 0, 1, 2] if noisy_first else [-1, -1, 2, 2, 0, 1]
    frame = [(0, VALUE), (1, VALUE)]
    noisy, ids = [(2, NOISE), (3, NOISE)], [(-1, LEARNED), (4, VALUE)]
    slots = [*frame, *noisy, *ids] if noisy_first else [*frame, *ids, *noisy]
    first = 2 if noisy_first else 4
    reads = [(first, 2), (first + 1, 3), (6 - first, 4), (7 - first, 5)]
    view = inclusive([0, 0, 1, 1, 2, 3] if noisy_first else [0, 0, 1, 2, 3, 3])
    if apart:
        part = [1 if s == NOISE else 2 if s == LEARNED or e >= 4 else 0 for e, s in slots]
        view = replace(view, group=torch.tensor([part]), relation=torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]))
    carries, source = [e for e, _ in slots], [s for _, s in slots]
    return plan_of(view, rank, carries, reads, source, layout=action_layout())


def test_noise_of_an_action_reaches_the_ids_of_the_same_action():
    """HybridVLA trains its ids behind a noisy *true* action: at small noise that is the answer."""
    plan = hybrid_vla(noisy_first=True, apart=False)
    assert [str(leak) for leak in plan.leaks()] == [
        "slot 4 reads element 4, but sees element 2, which is the same datum in another form, through slot 2",
        "slot 5 reads element 5, but sees element 2, which is the same datum in another form, through slot 2",
    ]


def test_ids_before_the_noisy_action_let_denoising_read_the_answer():
    plan = hybrid_vla(noisy_first=False, apart=False)
    assert first_leak(plan) == (
        "slot 4 reads element 2, but sees element 4, which is the same datum in another form, through slot 3 "
        "(and 1 more)"
    )


def test_ids_may_see_the_value_of_the_action_that_they_are_made_from():
    """Once it is decided: behind the denoised vector, not its noise, and never the other way round."""
    rank, carries = [-1, -1, 0, 0, 1, 2], [0, 1, 2, 3, 4]
    behind = plan_of(inclusive(range(5)), rank, carries, [(3, 4), (4, 5)], layout=action_layout())
    assert behind.leaks() == []
    noisy = replace(behind, slots=replace(behind.slots, source=torch.tensor([[VALUE, VALUE, NOISE, NOISE, VALUE]])))
    assert first_leak(noisy).startswith("slot 3 reads element 4, but sees element 2, which is the same datum")


@pytest.mark.parametrize("noisy_first", [True, False])
def test_noise_may_reach_its_own_read_out(noisy_first):
    assert hybrid_vla(noisy_first, apart=True).leaks() == []


def test_without_a_declared_datum_noise_is_free():
    plan = replace(hybrid_vla(noisy_first=True, apart=False), layout=line(6))
    assert plan.leaks() == []


# ---- batches --------------------------------------------------------------------------------------------------------


def test_a_leak_in_one_row_names_the_row():
    """Two rows in opposite orders, both fed as if the first order held."""
    plan = plan_of(inclusive(range(3)), range(3), [-1, 0, 1], itself(3))
    ranks = torch.tensor([[0, 1, 2], [2, 1, 0]])
    needs = torch.tensor([[-1, 0, 1], [-1, 2, 1]])
    plan = replace(plan, rank=ranks, slots=replace(plan.slots, needs=needs))
    assert [str(leak) for leak in plan.leaks()] == [
        "slot 1 reads element 1, but sees element 0 through itself (row 1 of the batch)",
        "slot 2 reads element 2, but sees element 1 through itself (row 1 of the batch)",
    ]


def test_padded_read_outs_do_not_count():
    plan = plan_of(inclusive(range(2)), range(2), [-1, 0], [(0, 0), (-1, 0), (1, -1), (1, 1)])
    assert plan.leaks() == []
