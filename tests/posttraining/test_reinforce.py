"""The learner of reinforced masked generators: what its buffers hold, where it starts, that it goes on unchanged."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace

import pytest
import torch

from seriatim.decoding.sample import Select
from seriatim.decoding.target import Target
from seriatim.laws.case import randomise
from seriatim.laws.enumeration import enumerate_rows
from seriatim.posttraining.policy import advantages, log_probs, roll_out, trajectory, weights
from seriatim.posttraining.reinforce import ESTIMATORS, Reinforced, Reinforcement, decoded
from seriatim.random import Generator
from seriatim.studies import cj_grpo as trials
from seriatim.systems.claim import Trial
from seriatim.systems.text import ctrldiff, mdlm, sdar
from seriatim.training.recipe import Recipe
from seriatim.training.run import RunFolder
from seriatim.training.trainer import train

N, V = 4, 3
SMALL = Reinforcement(prompts=3, group=4, inner=2, synchronise=4)


def model(seed=0, n=N):
    return randomise(mdlm.build(mdlm.Config(length=n, vocab=V, width=16, depth=2, heads=2)), seed).float()


def alike(ids, given):
    """All elements should be the same as the first."""
    return (ids == ids[:, :1]).float().mean(1)


@dataclass(frozen=True)
class Prompts:
    """The first element is given."""

    n: int = N
    hidden: int = N - 1

    def __len__(self):
        return 64

    def take(self, index, generator=None):
        ids = (index[:, None] + torch.arange(self.n)) % V
        return {"token": ids, "given": (torch.arange(self.n) < self.n - self.hidden).expand(len(index), -1)}


def learner(config=SMALL, steps=2, rule="random", seed=0, one=None, reward=alike):
    return Reinforced(one or model(seed), lambda: Select(rule, steps), reward, config)


def batch(config=SMALL):
    return Prompts().take(torch.arange(config.prompts))


# ---- what is remembered ----------------------------------------------------------------------------------------------


def test_what_is_remembered_of_samples_is_what_was_done():
    made = learner()
    made(batch(), Generator(0), 0, 8)
    assert made.ids.shape == made.turn.shape == (12, N)
    assert torch.equal(made.ids[:, 0], torch.arange(3).repeat_interleave(4) % V), "groups stand together"
    assert bool((made.turn[:, 0] == -1).all()) and made.turn[:, 1:].sort(1).values.tolist() == [[0, 0, 1]] * 12
    assert torch.equal(made.rewards, alike(made.ids, None))
    assert torch.equal(made.advantage, advantages(made.rewards, 4)) and float(made.advantage.abs().max()) > 0
    with torch.no_grad():
        said = log_probs(made.model, made.ids, trajectory(made.turn, torch.Generator()))
    assert torch.equal(made.old[0], said) and torch.equal(made.reference[0], said)


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_at_the_first_step_the_ratio_is_one_and_nothing_diverges_whatever_is_drawn(estimate):
    config = replace(SMALL, estimate=estimate, inner=3)
    made = learner(config)
    for step in range(3):  # without an update each is as good as the first
        total, count = made(batch(config), Generator(step), step, 8)
        assert int(count) == 12 and made.figures["divergence"] == 0
        torch.testing.assert_close(total, -made.advantage.sum())
        draw = step if estimate in ("diffu", "coupled") else 0
        assert torch.equal(made.said(draw), made.old[draw])
    assert made.old.shape[0] == (3 if estimate in ("diffu", "coupled") else 1)
    if estimate == "diffu":  # what is hidden of the prompt differs
        assert not torch.equal(made.old[0], made.old[1])


def test_samples_are_drawn_anew_after_so_many_steps_and_the_reference_follows_later():
    made = learner()
    optimizer = torch.optim.SGD(made.parameters(), 0.02)
    ids, old, reference, anchors = [], [], [], []
    for step in range(8):
        total, _ = made(batch(), Generator(step), step, 8)
        ids.append(made.ids.clone())
        old.append(made.old.clone())
        reference.append(made.reference.clone())
        anchors.append(made.anchor.clone())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for a in range(0, 8, 2):
        assert torch.equal(ids[a], ids[a + 1]) and torch.equal(old[a], old[a + 1])
    assert not torch.equal(ids[0], ids[2]) or not torch.equal(old[0], old[2])
    assert torch.equal(anchors[0], anchors[3]) and torch.equal(anchors[4], anchors[7])
    assert not torch.equal(anchors[3], anchors[4])
    same = [torch.equal(o, r) for o, r in zip(old, reference, strict=True)]
    assert same == [True, True, False, False, True, True, False, False]


def test_the_model_is_itself_again_after_the_reference_has_spoken():
    made = learner()
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(0.1)
    before = [p.clone() for p in made.model.parameters()]
    places = [p.data_ptr() for p in made.model.parameters()]
    made(batch(), Generator(0), 0, 8)
    assert all(torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
    assert places == [p.data_ptr() for p in made.model.parameters()]
    assert not torch.equal(made.old, made.reference)
    ours = model()
    with torch.no_grad():
        want = log_probs(ours, made.ids, trajectory(made.turn, torch.Generator()))
    torch.testing.assert_close(made.reference[0], want)


# ---- what it computes ------------------------------------------------------------------------------------------------


def gradients(made, steps=3):
    """After some steps on the same samples."""
    optimizer = torch.optim.SGD(made.model.parameters(), 0.005)
    for step in range(steps):
        total, _ = made(batch(made.config), Generator(0), step, 8)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return [p.grad for p in made.model.parameters()]


def test_with_one_step_a_trajectory_is_mean_field_and_with_more_it_is_not():
    config = replace(SMALL, inner=4)
    for steps, same in ((1, True), (2, False)):
        one = gradients(learner(config, steps))
        two = gradients(learner(replace(config, estimate="mean-field"), steps))
        close = all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(one, two, strict=True) if a is not None)
        assert close == same


@pytest.mark.parametrize("rule", ["entropy", "margin"])
def test_where_the_order_does_not_depend_on_what_is_drawn_the_probability_is_the_samplers(rule):
    """By enumeration: the order follows from what is known, and is no part of the law."""
    one = model().double()

    def run(random, rows):
        canvas = one.blank(rows)
        turn = roll_out(Target(one), canvas, Select(rule, 2), random)
        return [(*x, *t) for x, t in zip(canvas.value["token"].tolist(), turn.tolist(), strict=True)]

    law = enumerate_rows(run)
    found = torch.tensor(list(law))
    with torch.no_grad():
        said = log_probs(one, found[:, :N], trajectory(found[:, N:], torch.Generator())).double().sum(1)
    want = torch.tensor(list(law.values()), dtype=torch.float64)
    torch.testing.assert_close(said.exp(), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [sdar._tiny, ctrldiff.tiny])
def test_trajectories_of_blocks_are_exact_as_well(make):
    one = make(2)

    def run(random, rows):
        canvas = one.blank(rows)
        turn = roll_out(Target(one), canvas, Select("entropy", 2), random)
        return [(*x, *t) for x, t in zip(canvas.value["token"].tolist(), turn.tolist(), strict=True)]

    law = enumerate_rows(run)
    found = torch.tensor(list(law))
    with torch.no_grad():
        said = log_probs(one, found[:, :4], trajectory(found[:, 4:], torch.Generator())).double().sum(1)
    torch.testing.assert_close(said.exp(), torch.tensor(list(law.values()), dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_means_weigh_the_elements_of_small_steps_more_visibly_in_ascending_ones():
    """Sums are the policy gradient; the two means are not, and how far they are from it depends on the steps."""
    apart = {}
    for schedule in ("powers", "linear"):
        made = Reinforced(model(n=8), lambda s=schedule: Select("random", 3, s), alike, replace(SMALL, prompts=2))
        made(Prompts(8, 8).take(torch.arange(2)), Generator(0), 0, 8)
        weight = weights(made.turn, by_step=True)
        assert bool((weight.sum(1) - 1).abs().max() < 1e-6)
        apart[schedule] = float(weight.max() / weight.min())
    assert apart["powers"] == pytest.approx(5) and apart["linear"] == pytest.approx(1.5)


# ---- training --------------------------------------------------------------------------------------------------------

RECIPE = Recipe(10, batch=3, learning_rate=1e-2, weight_decay=0.0)


@pytest.mark.parametrize("estimate, bf16", [("trajectory", False), ("diffu", False), ("trajectory", True)])
def test_a_training_that_was_stopped_between_steps_on_the_same_samples_goes_on_bit_for_bit(tmp_path, estimate, bf16):
    config, recipe = replace(SMALL, estimate=estimate, inner=4), replace(RECIPE, bf16=bf16)

    whole, cut, again = (learner(config) for _ in range(3))
    begun = [p.clone() for p in whole.model.parameters()]
    history = train(whole, Prompts(), recipe, RunFolder(tmp_path / "whole"), {}, Prompts())
    with pytest.raises(KeyboardInterrupt):
        train(cut, Prompts(), recipe, RunFolder(tmp_path / "cut"), {}, tick=_Politely(6))
    train(again, Prompts(), recipe, RunFolder(tmp_path / "cut"), {}, resume=True)
    one, two = whole.state_dict(), again.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(a, b) for a, b in zip(begun, whole.model.parameters(), strict=True))
    assert {"reward", "divergence", "forwards", "held_out_reward", "held_out_solved"} <= history[-1].keys()
    assert history[3]["divergence"] > 0 == history[0]["divergence"]


class _Politely:
    """Ctrl-C after a step."""

    def __init__(self, step):
        self.step = step

    def __call__(self, step, steps, figures):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "estimate, rule", [("trajectory", "random"), ("diffu", "random"), ("trajectory", "confidence")]
)
def test_rewards_rise(tmp_path, estimate, rule):
    made = learner(Reinforcement(estimate, prompts=8, group=6, inner=2, kl=0.0), steps=3, rule=rule)
    batch_ = Prompts().take(torch.arange(60))
    before = float(decoded(made.model, batch_, Select(rule, 3), alike, 1.0).mean())
    train(made, Prompts(), Recipe(40, batch=8, learning_rate=1e-2, weight_decay=0.0), RunFolder(tmp_path / "r"), {})
    after = float(decoded(made.model, batch_, Select(rule, 3), alike, 1.0).mean())
    assert after > before + 0.15


def test_only_what_asks_for_gradients_is_trained_and_referred_to():
    one = model()
    one.requires_grad_(False)
    one.heads["token"].weight.requires_grad_(True)
    made = learner(one=one)
    assert made.anchor.shape == (V * 16,)
    total, _ = made(batch(), Generator(0), 0, 4)
    total.backward()
    assert [n for n, p in one.named_parameters() if p.grad is not None] == ["heads.token.weight"]


def test_what_does_not_fit_is_said():
    for wrong, said in (
        ({"estimate": "luck"}, "an estimate is trajectory"), ({"group": 1}, "a group of 2"), ({"clip": 0.0}, "above 0"),
        ({"synchronise": 0}, "synchronised after 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Reinforcement(**wrong)
    with pytest.raises(ValueError, match="batches of 3 prompts of 4 elements"):
        learner()(Prompts().take(torch.arange(2)), Generator(0), 0, 4)


# ---- sudokus ---------------------------------------------------------------------------------------------------------


def test_there_are_288_sudokus_and_every_one_is_right():
    every = trials.sudokus()
    assert every.shape == (288, 16) and len({tuple(x) for x in every.tolist()}) == 288
    assert bool((trials.units_right(every) == 1).all())
    wrong = every.clone()
    wrong[:, 5] = (wrong[:, 5] + 1) % 4
    assert bool((trials.units_right(wrong) == 0.75).all()), "a row, a column and a corner"


def test_puzzles_are_held_out_by_sudoku_and_the_same_each_time_without_a_generator():
    sides = [trials.Puzzles(test=test) for test in (False, True)]
    seen = []
    for side in sides:
        batch_ = side.take(torch.arange(500), torch.Generator().manual_seed(0))
        count = batch_["given"].sum(1)
        assert sorted(set(count.tolist())) == [6, 7, 8, 9, 10]
        seen.append({tuple(x) for x in batch_["token"].tolist()})
        assert torch.equal(side.take(torch.tensor([3, 7]))["given"][1], side.take(torch.tensor([7]))["given"][0])
    assert not seen[0] & seen[1] and len(seen[0]) > 150 and len(seen[1]) > 60


def test_what_the_claim_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "HOME", tmp_path)
    monkeypatch.setattr(trials, "SHAPE", {**trials.SHAPE, "width": 16, "depth": 1, "heads": 2})
    monkeypatch.setattr(trials, "LEARNING", Recipe(2, batch=4))
    monkeypatch.setattr(trials.solver, "__defaults__", (trials.LEARNING,))
    monkeypatch.setattr(trials.reinforced, "__defaults__", (Recipe(9, batch=2, learning_rate=1e-3),))
    for estimate, schedule in (("trajectory", "powers"), (None, "linear")):
        found = trials.solved(estimate, schedule, 16)(None, 0)
        assert 0 <= found["solved"] <= 1 and len(found["curve"]) == (5 if estimate else 0)
    assert all(isinstance(arm, Trial) for arm in trials.CLAIM.arms.values()) and len(trials.CLAIM.arms) == 8
    assert {trials.CLAIM.ours, trials.CLAIM.baseline} <= trials.CLAIM.arms.keys()
