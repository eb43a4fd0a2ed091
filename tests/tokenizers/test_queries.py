"""Queries over patches: who sees whom, and what of a line stays when its end is left out."""

from __future__ import annotations

import pytest
import torch

from seriatim.tokenizers.queries import QueryEncoder, axial, from_patches, query_plan, to_patches, vit

TURN = torch.tensor([0, 1, 2, 2, 3])


def encoder(turn=TURN, **more):
    torch.manual_seed(0)
    made = QueryEncoder(1, 8, 4, vit(16, 2, 2, rope=axial(16, 2)), turn, 3, **more).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype) * 0.4)
    return made


def pictures(n=2):
    return torch.randn(n, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_patches_see_each_other_and_queries_see_patches_and_turns_up_to_their_own():
    mask = query_plan(2, TURN).views["all"].mask()[0]
    assert mask[:4, :4].all() and not mask[:4, 4:].any() and mask[4:, :4].all()
    assert torch.equal(mask[4:, 4:], TURN[None] <= TURN[:, None])


def test_a_latent_is_the_same_when_later_queries_are_left_out():
    whole = encoder()
    for keep in (1, 2, 4):
        short = encoder(TURN[:keep])
        short.load_state_dict({k: v[:keep] if k == "queries" else v for k, v in whole.state_dict().items()})
        torch.testing.assert_close(short(pictures()), whole(pictures())[:, :keep], rtol=0, atol=1e-12)
    no_order = encoder(torch.zeros(5, dtype=torch.long))
    assert (no_order(pictures())[:, 0] - whole(pictures())[:, 0]).abs().max() > 1e-3, (
        "where all see all it would not be"
    )


def test_each_latent_depends_on_the_queries_of_its_turn_and_before_and_on_the_whole_picture():
    made, images = encoder(), pictures(1)
    jacobian = torch.autograd.functional.jacobian(lambda q: _with(made, q, images), made.queries.detach())
    felt = jacobian.abs().amax((1, 3)) > 1e-12
    assert torch.equal(felt, TURN[None] <= TURN[:, None])
    seen = torch.autograd.functional.jacobian(lambda x: made(x)[0].sum(1), images)
    assert (seen.abs() > 0).flatten(1).all()


def _with(made, queries, images):
    return torch.func.functional_call(made, {"queries": queries}, (images,))[0]


def test_places_of_patches_are_told_apart_and_queries_stand_nowhere():
    made, images = encoder(), pictures(1)
    swapped = from_patches(to_patches(images, 4)[:, [1, 0, 2, 3]], 4, 2)
    assert (made(images) - made(swapped)).abs().max() > 1e-3
    alone = encoder(torch.zeros(2, dtype=torch.long))
    with torch.no_grad():
        alone.queries[1] = alone.queries[0]
        said = alone(images)
    torch.testing.assert_close(said[:, 0], said[:, 1], rtol=0, atol=1e-12)


def test_behind_a_prefix_other_queries_see_it():
    made, images = encoder(again=True), pictures(1)
    prefix = torch.randn(1, 2, 3, dtype=torch.float64)
    said = made(images, prefix)
    assert (made(images, prefix + 1)[:, 2:] - said[:, 2:]).abs().max() > 1e-3
    assert (made(images)[:, 2:] - said[:, 2:]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="again=True"):
        encoder()(images, prefix)


def test_patches_that_do_not_tile_and_heads_that_are_not_shared_are_refused():
    with pytest.raises(ValueError, match="do not tile"):
        QueryEncoder(1, 10, 4, vit(16, 1, 2), TURN, 3)
    with pytest.raises(ValueError, match="multiple of 4"):
        axial(12, 2)
