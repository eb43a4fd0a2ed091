"""What layer plans are compared with leaves out what it says, and nothing where nothing is to be left out."""

from __future__ import annotations

import pytest
import torch

from seriatim.decoding.layers import Staircase, begun, missing_entries
from seriatim.evaluation.skipping import AtRandom, TopExit, always, best_layers, network_share, text_windows
from seriatim.laws.interface import small
from seriatim.posttraining.skipping import judged
from seriatim.systems.layer_trials import tightened
from seriatim.verbs.claim import claim_of
from support.skipping import DEPTH, VOCAB, routers, system

IDS = torch.randint(VOCAB, (10, 40), generator=torch.Generator().manual_seed(1))
PROMPT = 4


@pytest.fixture(scope="module")
def made():
    return system()


@pytest.fixture(scope="module")
def plain(made):
    return judged(made.model, IDS, PROMPT, Staircase((DEPTH,)))


def test_the_plain_model_computes_everything(made, plain):
    assert plain.share == 1 and plain.nats.shape == (10, 36) and plain.computed.shape == (DEPTH, 35)
    want = made.model.losses(*made.canvas({"token": IDS}))[:, PROMPT:]
    assert (plain.nats - want).abs().max() < 1e-10


@pytest.mark.parametrize("blocks", ["layer", "feedforward"])
def test_what_is_left_out_at_random_is_as_much_as_asked_for(made, plain, blocks):
    """3 free blocks of 6, 350 tokens: within four standard deviations; protected blocks and first tokens apart."""
    plan = AtRandom(0.75, blocks, bottom=2, top=1, warmup=5)
    found = judged(made.model, IDS, PROMPT, plan)
    assert bool((found.computed[[0, 1, 5]] == 1).all()) and bool((found.computed[:, :5] == 1).all())
    free = found.computed[2:5, 5:]
    assert float(free.mean()) == pytest.approx(0.5, abs=4 * 0.5 / (free.numel() * 10) ** 0.5)
    assert torch.equal(judged(made.model, IDS, PROMPT, plan).computed, found.computed)
    assert not torch.equal(judged(made.model, IDS, PROMPT, AtRandom(0.75, blocks, 2, 1, 5, seed=1)).nats, found.nats)
    whole = judged(made.model, IDS, PROMPT, AtRandom(1.0, blocks))
    assert torch.equal(whole.nats, plain.nats) and whole.share == 1
    with pytest.raises(ValueError, match="the share is no less"):
        begun(AtRandom(0.4, blocks, 2, 1), made.model)


def test_leaving_at_the_top_takes_as_many_layers(made):
    stairs = Staircase.linear(DEPTH, 2, 8)
    top = TopExit(stairs.counts)
    table = top.begin(DEPTH).table
    assert table.sum(0).tolist() == list(stairs.counts) and bool(table[0].all()) and not bool(table[-1, -1])
    assert missing_entries(table) is None
    ours, theirs = (judged(made.model, IDS, PROMPT, plan) for plan in (stairs, top))
    assert ours.share == theirs.share and not torch.equal(ours.nats, theirs.nats)


def test_fixed_layers_are_those_of_every_text(made, plain):
    found = judged(made.model, IDS, PROMPT, always([0, 3, 5], made.model))
    assert found.computed[:, 0].tolist() == [1, 0, 0, 1, 0, 1] and found.share == 0.5
    assert torch.equal(judged(made.model, IDS, PROMPT, always(range(DEPTH), made.model)).nats, plain.nats)


def test_the_layers_that_are_left_lose_least(made):
    """One taken out: the best of all ways to do so; two: the best of all ways to go on from there."""

    def loss(layers) -> float:
        return judged(made.model, IDS, PROMPT, always(layers, made.model)).loss

    five = best_layers(made.model, IDS, PROMPT, 5)
    assert loss(five) == min(loss([i for i in range(DEPTH) if i != out]) for out in range(DEPTH))
    four = best_layers(made.model, IDS, PROMPT, 4, kept=(0, 5))
    first = best_layers(made.model, IDS, PROMPT, 5, kept=(0, 5))
    assert {0, 5} < set(four) < set(first)
    assert loss(four) == min(loss([i for i in first if i != out]) for out in first if out not in (0, 5))
    with pytest.raises(ValueError, match="are always kept"):
        best_layers(made.model, IDS, PROMPT, 1, kept=(0, 5))


def test_routers_are_tightened_to_a_share(made):
    ids = torch.randint(VOCAB, (6, 72), generator=torch.Generator().manual_seed(2))
    for kept in (0.9, 0.6):
        plan = tightened(routers(), made.model, ids, kept)
        assert kept <= judged(made.model, ids, 64, plan).share < kept + 0.2


def test_networks_are_two_thirds_of_a_layer_or_so():
    layer = small().model.backbone.layers[0]
    want = (layer.up.numel() + layer.down.numel()) / sum(p.numel() for p in layer.parameters())
    assert network_share(small().model) == pytest.approx(want)


def test_windows_are_of_the_text(made):
    windows = text_windows(small(), ["abcdefgh" * 20, "ijkl" * 30], 4, 16)
    assert windows.shape == (4, 16) and windows.dtype == torch.long
    with pytest.raises(ValueError, match="the text has"):
        text_windows(small(), ["abc"], 4, 16)


@pytest.mark.parametrize("key", ["skipdecode", "ffn-skipllm", "first"])
def test_claims_can_be_queued(key):
    claim = claim_of(key)
    assert {claim.ours, claim.baseline} <= set(claim.arms) and len(claim.queue()) >= 7
