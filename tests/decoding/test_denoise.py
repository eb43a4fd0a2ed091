"""The reverse of discrete diffusion: one that knows the law writes it, whatever the noise; time is on the canvas."""

from __future__ import annotations

import itertools

import pytest
import torch

from seriatim.canvas import DELETED, GUESSED, Revise, Set
from seriatim.decoding.denoise import Denoise, steps_left
from seriatim.decoding.filters import Warper
from seriatim.decoding.guess import Guess
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.remask import ReMDM
from seriatim.decoding.sample import Select
from seriatim.decoding.target import Target
from seriatim.heads.kernels import Gaussian, Mixture, Nearest, absorbing, uniform
from seriatim.laws.enumeration import enumerate_rows
from seriatim.laws.noised import law_of, noised_oracle
from seriatim.laws.tabular import total_variation
from seriatim.random import Generator, Keyed
from seriatim.systems.text.d3pm import Config, Forgetful, build

LAW = {(0, 0, 1): 0.5, (1, 0, 0): 0.2, (0, 1, 1): 0.1, (1, 1, 1): 0.2}
START = torch.zeros(3, dtype=torch.long)
MAKE = {
    "absorbing": absorbing,
    "uniform": uniform,
    "mixed": lambda v, t: Mixture(v, t, 0.4),
    "gaussian": Gaussian,
    "nearest": lambda v, t: Nearest.of(torch.arange(v)[:, None], t, 1),
}
every = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def decoded(model, decider, given=0):
    def run(random, rows):
        canvas = model.canvas({"token": torch.zeros(rows, 3, dtype=torch.long)}, given)
        canvas = generate(Target(model), canvas, decider(), random=random)
        return [tuple(x) for x in canvas.value["token"].tolist()]

    return enumerate_rows(run)


@every
def test_with_exact_posteriors_more_steps_come_as_close_to_the_law_as_one_likes(make):
    gaps = [total_variation(law_of(noised_oracle(LAW, make(2, t)), START), LAW) for t in (1, 4, 16, 32)]
    assert gaps[0] > 0.4 and all(b < a for a, b in itertools.pairwise(gaps))
    assert gaps[3] < 0.04 and gaps[3] < 0.6 * gaps[2]  # as 1/T


@every
def test_the_decider_is_the_chain(make):
    model = noised_oracle(LAW, make(2, 2))
    chain, met = law_of(model, START), decoded(model, lambda: Denoise(model.kernel))
    assert total_variation(chain, met) < 1e-12


def test_one_that_forgets_what_stands_there_writes_another_law():
    model = noised_oracle(LAW, Mixture(2, 2, 0.4))
    right, wrong = (decoded(model, lambda c=c: c(model.kernel)) for c in (Denoise, Forgetful))
    assert total_variation(law_of(model, START), right) < 1e-12
    assert total_variation(right, wrong) > 0.01


def test_what_is_given_stays_and_counts():
    model = noised_oracle(LAW, uniform(2, 2))
    law = decoded(model, lambda: Denoise(model.kernel), given=1)
    assert all(x[0] == 0 for x in law) and abs(sum(law.values()) - 1) < 1e-12


def tiny(noise="mixed", turns=4, **more):
    torch.manual_seed(0)
    return build(Config(length=6, vocab=5, width=16, depth=2, heads=2, noise=noise, turns=turns, **more)).eval()


@pytest.mark.parametrize("noise", ["absorbing", "uniform", "mixed", "gaussian", "nearest"])
def test_time_runs_down_on_the_canvas_and_ends_in_values(noise):
    model = tiny(noise)
    canvas, seen = model.blank(3), []
    for step in decode(Target(model), canvas, Denoise(model.kernel), random=Generator(1)):
        seen.append((steps_left(canvas, 4).tolist(), type(step.edits[0])))
        assert len(seen) == 4 or bool((canvas.status == GUESSED).all())
    assert seen == [([3] * 3, Revise), ([2] * 3, Revise), ([1] * 3, Revise), ([1] * 3, Set)]
    assert canvas.done and int(canvas.value["token"].max()) < 5


def test_known_letters_of_masked_noise_stay_as_they_are():
    model = tiny("absorbing", 8)
    canvas, before = model.blank(4), torch.full((4, 6), 5)
    warp = Warper(0.5, top_k=1)  # excludes most values, which must not undo what stands there
    for _ in decode(Target(model, warp=warp), canvas, Denoise(model.kernel), random=Generator(3)):
        now = canvas.value["token"] if canvas.done else canvas.noise["token"]
        assert bool(((before == 5) | (now == before)).all())
        before = now.clone()
    assert bool((before < 5).all())


def test_it_can_be_stopped_and_taken_up_again_and_rows_do_not_mind_company():
    model = tiny()
    whole = generate(Target(model), model.blank(3), Denoise(model.kernel), random=Keyed(2)).value["token"]
    canvas = model.blank(3)
    for _ in itertools.islice(decode(Target(model), canvas, Denoise(model.kernel), random=Keyed(2)), 2):
        pass
    alone = canvas.select(torch.tensor([2, 0]))
    again = generate(Target(model), alone, Denoise(model.kernel), random=Keyed(2)).value["token"]
    assert torch.equal(again, whole[[2, 0]])


def test_rows_at_different_times_go_together_and_end_by_themselves():
    model = tiny()
    whole = generate(Target(model), model.blank(2), Denoise(model.kernel), random=Keyed(2)).value["token"]
    rows = [model.blank(2).select(torch.tensor([i])) for i in range(2)]
    for _ in itertools.islice(decode(Target(model), rows[0], Denoise(model.kernel), random=Keyed(2)), 3):
        pass
    rows[1]._write_out()
    both = rows[0].select(torch.tensor([0, -1]), rows[1])
    lengths = []
    for _ in decode(Target(model), both, Denoise(model.kernel), random=Keyed(2)):
        lengths.append(both.known.all(1).tolist())
    assert torch.equal(both.value["token"], whole)
    assert lengths == [[True, False]] * 3 + [[True, True]]


def test_elements_of_a_row_at_different_times_are_refused():
    model = tiny()
    canvas = model.blank(1)
    canvas.apply([Revise(torch.tensor([[0, 1]]), torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.25]]))])
    with pytest.raises(ValueError, match="denoised together"):
        generate(Target(model), canvas, Denoise(model.kernel))


def test_a_row_ends_at_its_first_stop_id():
    model = tiny("uniform", 2)
    free = generate(Target(model), model.blank(8), Denoise(model.kernel), random=Keyed(0))
    ended = generate(Target(model), model.blank(8), Denoise(model.kernel, [3]), random=Keyed(0))
    assert torch.equal(free.value["token"], ended.value["token"])
    for row, status in zip(free.value["token"].tolist(), ended.status.tolist(), strict=True):
        end = row.index(3) + 1 if 3 in row else 6
        assert [s == DELETED for s in status] == [i >= end for i in range(6)]
    assert bool((ended.status == DELETED).any())


def test_other_deciders_and_other_models_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="verifies nothing"):
        Denoise(model.kernel).decide(model.blank(1), Guess(torch.zeros(1, 1).long()), None, Generator())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="noise is of 7 ids"):
        generate(Target(model), model.blank(1), Denoise(uniform(7, 4)))
    assert not model.factorization.free  # so no decoder of masks takes it
    assert Select.redraws is False and Denoise.redraws is True


# ---- ReMDM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("steps", [2, 5, 8])
def test_remdm_keeps_the_marginal_for_any_allowed_sigma(most, steps):
    """At `most` 1 sigma is the largest that is allowed; at half-way it changes from one bound to the other."""
    decider, known, bound = ReMDM(steps, most), 0.0, set()
    for turn in range(steps):
        t = torch.tensor([[turn]])
        before, after = turn / steps, (turn + 1) / steps
        sigma, decide = float(decider._times(t)[2]) if turn else 0.0, float(decider._kept(t))
        allowed = min(1.0, (1 - after) / before) if turn else 1.0
        assert 0 <= sigma <= allowed + 1e-12 and 0 <= decide <= 1
        bound.add(sigma == pytest.approx(allowed))
        wrong = known + (1 - known) * (after - before) / (1 - before) - known * sigma  # hides, and does not make up
        known = known * (1 - sigma) + (1 - known) * decide
        assert known == pytest.approx(after, abs=1e-12)
        assert sigma == 0 or wrong < after - 1e-3
    if most == 1.0:
        assert True in bound
