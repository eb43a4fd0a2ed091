"""Transition kernels: closed forms are products of steps, and what is known on the way back is Bayes' rule."""

from __future__ import annotations

import itertools

import pytest
import torch

from seriatim.heads.kernels import (
    KERNELS,
    Gaussian,
    Mixture,
    Nearest,
    absorbing,
    in_turns,
    kernel_of,
    spelled,
    uniform,
)

V, T = 4, 5
ALL = {
    "absorbing": absorbing(V, T),
    "uniform": uniform(V, T),
    "mixed": Mixture(V, T, 0.3),
    "gaussian": Gaussian(V, T),
    "nearest": Nearest.of(torch.tensor([[0.0], [1.0], [1.5], [4.0]]), T, near=2),
}
every = pytest.mark.parametrize("kernel", ALL.values(), ids=ALL)


def chain(kernel, k):
    """The product of the first k steps, by hand."""
    out = torch.eye(kernel.states, dtype=torch.float64)
    for i in range(1, k + 1):
        out = out @ kernel.step(i)
    return out


def joint(kernel, k):
    """q(x_{k-1}, x_k | x_0) as (x_0, x_{k-1}, x_k)."""
    return chain(kernel, k - 1)[: kernel.vocab, :, None] * kernel.step(k)


@every
def test_rows_are_laws_and_products_of_steps_are_the_closed_form(kernel):
    for k in range(1, T + 1):
        assert (kernel.step(k) >= 0).all()
        torch.testing.assert_close(kernel.step(k).sum(1), torch.ones(kernel.states).double(), atol=1e-12, rtol=0)
        torch.testing.assert_close(kernel.upto(k), chain(kernel, k), atol=1e-12, rtol=0)
    assert torch.allclose(kernel.upto(0), torch.eye(kernel.states).double(), atol=1e-12)


@every
def test_what_is_said_of_many_elements_is_what_the_matrices_say(kernel):
    x, k = torch.randint(V, (3, 6)), torch.tensor([1, 3, T])
    noisy = torch.randint(kernel.states, (3, 6))
    p = torch.rand(3, 6, V).double()
    p = p / p.sum(-1, keepdim=True)
    for row, step in enumerate(k.tolist()):
        upto, last = chain(kernel, step), kernel.step(step)
        torch.testing.assert_close(kernel.rows(x, k)[row], upto[x[row]], atol=1e-12, rtol=0)
        torch.testing.assert_close(kernel.mixed(p, k)[row], p[row] @ upto[:V], atol=1e-12, rtol=0)
        torch.testing.assert_close(kernel.ways(noisy, k)[row], last[:, noisy[row]].T, atol=1e-12, rtol=0)
    assert torch.equal(kernel.mixed(p, torch.zeros(3).long())[..., :V], p)
    assert kernel.rows(x, k, torch.float32).dtype == torch.float32


@every
def test_the_exact_posterior_is_bayes_rule_by_brute_force(kernel):
    for k in range(1, T + 1):
        both = joint(kernel, k)
        for x0 in range(V):
            for xk in range(kernel.states):
                if both[x0, :, xk].sum() <= 0:
                    continue
                want = both[x0, :, xk] / both[x0, :, xk].sum()
                step, one = torch.tensor([k]), torch.tensor([[xk]])
                got = kernel.posterior(one, kernel.rows(torch.tensor([[x0]]), step - 1), step)[0, 0]
                assert abs(float(got.sum()) - 1) < 1e-12
                torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@every
def test_a_belief_about_the_value_is_weighed_by_what_stands_there(kernel):
    """It is the mean of exact posteriors under the law of x_0 given x_k, which is belief times likelihood."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for k in range(1, T + 1):
        both = joint(kernel, k)
        for xk in range(kernel.states):
            after = p * both[:, :, xk].sum(1)
            if after.sum() <= 0:
                continue
            each = both[:, :, xk] / both[:, :, xk].sum(1, keepdim=True).clamp(min=1e-300)
            want = (after / after.sum()) @ each
            step = torch.tensor([k])
            got = kernel.posterior(torch.tensor([[xk]]), kernel.mixed(p[None, None], step - 1), step)[0, 0]
            torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_rows_in_place_of_columns_are_no_posterior():
    """The trap: all kernels but those with masks are symmetric, and forgive it."""

    class Turned(Mixture):
        def ways(self, x, k, dtype=torch.float64):
            return torch.stack([self.step(int(i)).to(dtype)[x[b]] for b, i in enumerate(k)])

    x, k = torch.tensor([[V]]), torch.tensor([3])
    for share, same in ((1.0, True), (0.3, False)):
        right, wrong = Mixture(V, T, share), Turned(V, T, share)
        noisy = x if right.masks else x - 1
        before = right.rows(torch.tensor([[1]]), k - 1)
        assert torch.allclose(right.posterior(noisy, before, k), wrong.posterior(noisy, before, k)) == same


@pytest.mark.parametrize("k", range(1, T + 1))
def test_a_mixture_of_nothing_is_one_of_the_ends(k):
    keep = (T - k) / (T - k + 1)
    masks, eye = absorbing(V, T), torch.eye(V, dtype=torch.float64)
    want = torch.zeros(V + 1, V + 1).double()
    want[:V, :V], want[:V, V], want[V, V] = keep * eye, 1 - keep, 1
    torch.testing.assert_close(masks.step(k), want, atol=1e-12, rtol=0)
    torch.testing.assert_close(uniform(V, T).step(k), keep * eye + (1 - keep) / V, atol=1e-12, rtol=0)
    near = Mixture(V, T, 1 - 1e-9)  # masks that hardly ever come, but in the last step, where nothing is left
    if k < T:
        torch.testing.assert_close(near.step(k)[:V, :V], uniform(V, T).step(k), atol=1e-6, rtol=0)
    torch.testing.assert_close(Mixture(V, T, 1e-12).step(k), want, atol=1e-6, rtol=0)


@every
def test_in_the_end_there_is_nothing_but_noise(kernel):
    last = kernel.upto(T)[:V]
    want = (last * (last.clamp(min=1e-300) / kernel.prior.clamp(min=1e-300)).log()).sum(1)
    torch.testing.assert_close(kernel.prior_loss(), want.clamp(min=0), atol=1e-10, rtol=0)
    assert float(kernel.prior_loss().max()) < 0.01
    assert abs(float(kernel.prior.sum()) - 1) < 1e-12
    if isinstance(kernel, Mixture):
        assert float(kernel.prior_loss().max()) == 0


def test_gaussian_noise_goes_to_near_levels_and_further_and_further():
    kernel = Gaussian(17, 32)
    level = torch.arange(17).double()
    spread = [float(((level - 8) ** 2 * kernel.upto(k)[8]).sum()) for k in range(1, 33)]
    assert all(b > a for a, b in itertools.pairwise(spread))
    for k in (1, 8, 16):
        row = kernel.upto(k)[8]
        assert all(row[8 + d] >= row[9 + d] and row[8 - d] >= row[7 - d] for d in range(8))
    assert float(kernel.step(1)[8, 8]) > 0.8
    finer = Gaussian(17, 256)  # as much noise in all, however many steps
    assert float(finer.prior_loss().max()) < 1e-3 and float(finer.step(1)[8, 8]) > 0.97


def test_nearest_noise_goes_to_neighbours_first():
    embedding = torch.tensor([[0.0, 0], [0, 1], [9, 9], [9, 8], [0, 0.4], [9, 9.3]])
    kernel = Nearest.of(embedding, 16, near=2)
    assert kernel.near == ((4, 1), (4, 0), (5, 3), (2, 5), (0, 1), (2, 3))
    early = kernel.upto(4)[0]
    assert float(early[[1, 4]].min()) > 3 * float(early[[2, 3, 5]].max())
    assert torch.allclose(kernel.step(3), kernel.step(3).T)


def test_letters_are_alike_by_what_they_are():
    texts = ["a", "A", "e", "b", "7", "3", "(", " ", None, None]
    kernel = Nearest.of(spelled(texts), 8, near=1)
    nearest = {texts[i]: texts[n[0]] for i, n in enumerate(kernel.near) if texts[i]}
    assert nearest["a"] == "A" and nearest["A"] == "a" and nearest["7"] == "3" and kernel.near[8] == (9,)


def test_kernels_have_names_and_other_numbers_of_steps():
    assert len({kernel_of(name, V, T) for name in KERNELS}) == len(KERNELS)
    assert kernel_of("mixed", V, T, share=0.3) == ALL["mixed"]
    assert in_turns(ALL["gaussian"], 9) == Gaussian(V, 9) and in_turns(ALL["gaussian"], None) is ALL["gaussian"]
    torch.testing.assert_close(in_turns(uniform(V, 10), 5).upto(2), uniform(V, 10).upto(4), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: kernel_of("fog", V, T), "noise is absorbing"),
        (lambda: absorbing(1, T), "at least 2 values"),
        (lambda: Gaussian(V, 0), "at least 1 step"),
        (lambda: Gaussian(V, T, noise=0), "noise of all steps"),
        (lambda: Mixture(V, T, 1.5), "a share of the noise"),
        (lambda: Nearest.of(torch.zeros(3, 1), T, near=3), "1 to 2 neighbours"),
        (lambda: Nearest(V, T, ((1,), (0,), (3,), (2,)), anywhere=0), "goes anywhere"),
        (lambda: Nearest(V, T, ((1,),)), "equally many neighbours"),
        (lambda: uniform(V, T).step(T + 1), f"from 1 to {T}"),
        (lambda: Gaussian(5000, 64).rows(torch.zeros(1, 1).long(), torch.ones(1).long()), "too large for 5000 ids"),
    ],
)
def test_what_is_no_kernel_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
