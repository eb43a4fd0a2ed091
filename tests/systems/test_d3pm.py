"""Discrete diffusion by any noise: its bound by brute force and beside others, text and pixels."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from seriatim.data.base import load_data
from seriatim.decoding.denoise import Denoise
from seriatim.decoding.loop import decode
from seriatim.decoding.target import Target
from seriatim.evaluation.noise_strips import back, forth, moments, save_picture_strips, save_text_strips
from seriatim.heads.kernels import KERNELS, Gaussian, Mixture, Nearest, absorbing, uniform
from seriatim.laws.case import randomise
from seriatim.laws.noised import everything, noised_oracle
from seriatim.objectives.masked import by_time
from seriatim.objectives.noised import Noised, NoisedEmbed, divergence, masked_score_entropy, score_entropy
from seriatim.random import Generator, Keyed
from seriatim.systems.decoders import decoder_of
from seriatim.systems.image import d3pm_pixels
from seriatim.systems.meta import load as load_module
from seriatim.systems.system import Sampling
from seriatim.systems.text import d3pm, mdlm
from seriatim.tokenizers.files import make_tokenizer

LAW = {(0, 0, 1): 0.5, (1, 0, 0): 0.2, (0, 1, 1): 0.1, (1, 1, 1): 0.2}
X = torch.tensor(list(LAW))
P = torch.tensor(list(LAW.values()), dtype=torch.float64)
TINY = {"length": 8, "vocab": 5, "width": 16, "depth": 2, "heads": 2}


def tiny(noise="mixed", turns=4, **more):
    return randomise(d3pm.build(d3pm.Config(**TINY, noise=noise, turns=turns, **more)), std=0.4)


@torch.no_grad()
def exact_bound(model, x):
    """The bound of each row, over every draw of its noise."""
    kernel, n = model.kernel, x.shape[1]
    total = kernel.prior_loss()[x].sum(1)
    states = everything(kernel.states, n)
    for k in range(1, kernel.steps + 1):
        for row in range(len(x)):
            rows, steps = x[row].expand(len(states), -1), torch.full((len(states),), k)
            law = kernel.upto(k)[rows, states].prod(1)
            live = law > 0
            canvas = model.canvas({"token": rows[live]})
            losses = model.noised_losses(canvas, states[live], steps[live]).sum(1)
            total[row] += (law[live] * losses).sum()
    return total


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", KERNELS)
def test_a_loss_is_the_divergence_of_two_posteriors_by_brute_force(noise):
    kernel = d3pm.kernel_of(noise, 4, 3)
    logits = torch.randn(1, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = torch.softmax(logits[0, 0], 0)
    for k, x0, xk in itertools.product((1, 2, 3), range(4), range(kernel.states)):
        before, last = kernel.upto(k - 1)[:4], kernel.step(k)[:, xk]
        wanted, said = before[x0] * last, (p @ before) * last
        if wanted.sum() <= 0:
            continue
        wanted, said = wanted / wanted.sum(), said / said.sum()
        live = wanted > 0
        want = (wanted[live] * (wanted[live] / said[live]).log()).sum()
        got = divergence(kernel, logits, torch.tensor([[x0]]), torch.tensor([[xk]]), torch.tensor([k]))[0, 0]
        assert float(got) == pytest.approx(float(want), abs=1e-10)
        if k == 1:  # -log p(x_0 | x_1), where what stands there is weighed in
            after = p * kernel.step(1)[:4, xk]
            assert float(got) == pytest.approx(-math.log(float(after[x0] / after.sum())), abs=1e-10)


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_absorbing_noise_has_the_bound_of_masked_diffusion_in_so_many_steps(turns):
    """Weight 1/k for what is hidden at k/T, with true conditionals, to 1e-6 (F1)."""
    model = noised_oracle(LAW, absorbing(2, turns))
    want = torch.zeros(len(X), dtype=torch.float64)
    for row, x in enumerate(X.tolist()):
        for k, hide in itertools.product(range(1, turns + 1), itertools.product((0, 1), repeat=3)):
            fits = [(p, y) for y, p in LAW.items() if all(h or a == b for h, a, b in zip(hide, x, y, strict=True))]
            whole = sum(p for p, _ in fits)
            nats = sum(-math.log(sum(p for p, y in fits if y[i] == x[i]) / whole) for i in range(3) if hide[i])
            want[row] += (k / turns) ** sum(hide) * (1 - k / turns) ** (3 - sum(hide)) * nats / k
    torch.testing.assert_close(exact_bound(model, X), want, atol=1e-6, rtol=0)


KINDS = {"absorbing": absorbing, "uniform": uniform, "mixed": lambda v, t: Mixture(v, t, 0.4),
         "nearest": lambda v, t: Nearest.of(torch.arange(v)[:, None], t, 1), "gaussian": Gaussian}  # fmt: skip


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_the_bound_is_one_and_falls_to_the_entropy_with_more_steps(make):
    entropy = -float((P * P.log()).sum())
    shares = [sum(p for x, p in LAW.items() if x[i]) for i in range(3)]
    marginal = -sum(q * math.log(q) for share in shares for q in (share, 1 - share))
    bounds = [float((P * exact_bound(noised_oracle(LAW, make(2, t)), X)).sum()) for t in (1, 2, 6)]
    assert all(a > b for a, b in itertools.pairwise(bounds)) and bounds[-1] > entropy
    if make in (absorbing, uniform):  # one step decides all at once: it costs the total correlation
        assert bounds[0] == pytest.approx(marginal, abs=1e-9)


@pytest.mark.parametrize("kernel", [Mixture(2, 3, 0.1), Gaussian(2, 3, noise=0.02)], ids=["mixed", "faint"])
def test_drawn_losses_have_the_bound_as_their_mean(kernel):
    """Faint noise does not forget the values, and what it has not forgotten counts."""
    model = randomise(d3pm.build(d3pm.Config(**{**TINY, "length": 3, "vocab": 2}, noise="mixed", turns=3)), std=0.4)
    model.kernel = kernel
    assert float(kernel.prior_loss().sum()) > 0.2 or kernel.masks
    x = torch.tensor([[0, 1, 1]])
    with torch.no_grad():
        rows = model.canvas({"token": x.expand(4000, -1)})
        drawn = model.losses(rows, random=Generator(0)).sum(1)
    want = float(exact_bound(model, x)[0])
    assert abs(float(drawn.mean()) - want) < 4 * float(drawn.std()) / 4000**0.5  # error rate below 1e-4


def test_what_is_given_costs_nothing_and_stands_as_it_is():
    model = tiny()
    x = torch.randint(5, (4, 8), generator=torch.Generator().manual_seed(0))
    canvas = model.canvas({"token": x}, 3)
    with torch.no_grad():
        losses = model.losses(canvas, random=Generator(0))
    assert bool((losses[:, :3] == 0).all()) and bool((losses[:, 3:] > 0).any())
    shown = model.noised(canvas, torch.zeros_like(x), torch.tensor([1, 2, 3, 4]))
    assert bool(shown.known[:, :3].all()) and not bool(shown.known[:, 3:].any())
    assert torch.equal(shown.value["token"][:, :3], x[:, :3])
    with pytest.raises(TypeError, match="no likelihood"):
        model.losses(canvas, strict=True)


def test_training_feeds_what_decoding_feeds():
    model = tiny("uniform")
    x = torch.randint(5, (2, 8), generator=torch.Generator().manual_seed(0))
    canvas = model.blank(2)
    for turn, _ in enumerate(decode(Target(model), canvas, Denoise(model.kernel), random=Keyed(1))):
        k = torch.full((2,), 3 - turn)
        if turn < 3:
            shown = model.noised(model.canvas({"token": x}), canvas.noise["token"].clone(), k)
            plan, other = (model.factorization.step(c, None, 0) for c in (canvas, shown))
            assert torch.equal(plan.slots.source, other.slots.source)
            with torch.no_grad():
                assert torch.equal(model.embed(canvas, plan), model.embed(shown, other))
    begun, plan = model.noised(model.canvas({"token": x}), x, torch.tensor([4, 4])), None
    plan = model.factorization.step(begun, None, 0)
    with torch.no_grad():
        assert torch.equal(model.embed(begun, plan), model.embed(model.blank(2), plan))


def test_the_network_is_told_the_time_only_if_it_is_to_be():
    for told in (True, False):
        model = tiny("uniform", told=told)
        x = torch.zeros(1, 8, dtype=torch.long)
        canvas = model.canvas({"token": x})
        with torch.no_grad():
            shown = [model.noised(canvas, x, torch.tensor([k])) for k in (1, 2)]
            plan = model.factorization.step(shown[0], None, 0)
            early, late = (model.embed(c, plan) for c in shown)
        assert torch.equal(early, late) != told
    fresh = NoisedEmbed(5, 16)
    assert not bool(fresh.levels(torch.rand(1, 3)).any())  # at first nothing is added


def test_noise_of_another_vocabulary_is_refused():
    model = tiny()
    parts = (model.layout, model.factorization, model.embed, model.backbone, model.heads["token"])
    with pytest.raises(ValueError, match="noise is of 9 ids"):
        Noised(*parts, kernel=uniform(9, 2))


# ---- score entropy ---------------------------------------------------------------------------------------------------


def test_score_entropy_is_zero_at_the_ratios_and_positive_elsewhere():
    ratio = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    exact = torch.tensor([0.5, 2.0, 1e-300], dtype=torch.float64).log()
    assert float(score_entropy(exact, ratio)) == pytest.approx(0, abs=1e-12)
    assert float(score_entropy(exact + torch.tensor([0.1, -0.1, 0.0]), ratio)) > 1e-3


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_score_entropy_of_masks_is_masked_diffusion_in_value_and_gradient(t):
    model = randomise(mdlm.build(mdlm.Config(**TINY)))
    x = torch.randint(5, (4, 8), generator=torch.Generator().manual_seed(0))
    canvas = model.canvas({"token": x})
    hidden = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) < t
    hidden[:, 0] = True

    def scores():
        shown = model.canvas({"token": x}, ~hidden)
        plan = model.factorization.step(shown, None, 0)
        logits = model.dist(model.hidden(plan, shown), plan, shown)[0].logits
        rate = 1 / (1 - t)  # -shown' / shown, where 1 - t is shown
        return rate * (masked_score_entropy(logits, x, 1 - t) * hidden).sum()

    def masked():
        return (model.hidden_losses(canvas, hidden) / t).sum()

    weights = list(model.parameters())
    (a, b) = (f() for f in (scores, masked))
    assert float(a.detach()) == pytest.approx(float(b.detach()), abs=1e-9)
    for mine, theirs in zip(*(torch.autograd.grad(v, weights) for v in (a, b)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)
    assert by_time(torch.ones(1, 1).bool(), torch.tensor([t]), torch.ones(1, 1))[1].item() == pytest.approx(
        1 / t, rel=0.02
    )


# ---- the systems -----------------------------------------------------------------------------------------------------


def writer(noise="mixed", **more):
    torch.manual_seed(0)
    system = d3pm.D3PM(d3pm.Config(length=32, width=16, depth=1, heads=2, noise=noise, turns=4, **more))
    return system.eval()


@pytest.mark.parametrize("noise", KERNELS)
def test_text_is_learned_scored_written_and_filled_in(noise):
    system = writer(noise)
    examples = system.examples(["A short text of some length, often repeated. " * 20])
    batch = examples.take(torch.arange(4))
    nats, tokens = system.train().losses(batch, Generator(0), 0.0)
    nats.backward()
    assert tokens == 128 and math.isfinite(float(nats.detach()))
    system.eval()
    assert 4 < system.validate(examples)["bits_per_byte"] < 20
    text = system.write("ab", 12)
    assert text == system.write("ab", 12) and len(system.tokenizer.encode(text)) <= 36
    assert system.write("ab", 12, Sampling(steps=2)) is not None
    assert "".join(system.infill("xy<mask:4>zw")).startswith("xy")
    assert math.isfinite(system.bound(system.tokenizer.encode("abc"), 1, draws=8))


def test_decoders_of_masks_say_that_this_is_another_order():
    with pytest.raises(ValueError, match="needs a model of tokens in any order"):
        decoder_of(writer(), "unmask", Sampling())


def test_nearest_noise_of_text_goes_by_letters():
    kernel = writer("nearest").model.kernel
    assert isinstance(kernel, Nearest) and ord("A") in kernel.near[ord("a")]


@pytest.mark.parametrize("noise", ["gaussian", "absorbing"])
def test_pictures_are_learned_and_drawn_and_their_film_shows_the_noise(noise):
    torch.manual_seed(0)
    tokenizer = make_tokenizer("pixels", {"side": 8, "channels": 1, "levels": 17})
    config = d3pm_pixels.Config(width=16, depth=1, heads=2, noise=noise, turns=4, dropout=0.0)
    system = d3pm_pixels.D3PMPixels(config, tokenizer)
    data = load_data("digits", "image")
    nats, pixels = system.losses(data.train.take(torch.arange(4)), Generator(0), 0.5)
    nats.backward()
    assert pixels == 256 and math.isfinite(float(nats.detach()))
    system.eval()
    made = system.draw(torch.tensor([3, 7]), film=True)
    assert made.images.shape == (2, 1, 8, 8) and made.forwards == 4 and len(made.frames) == 4
    first, last = made.frames[0], made.frames[-1]
    assert torch.equal(last, made.images) and not torch.equal(first, last)
    grey = float((first == 0).double().mean())
    assert grey > 0.5 if noise == "absorbing" else grey < 0.2  # masks are grey, noise is what it is


def test_claims_can_be_run_within_their_budget():
    for module in (d3pm, d3pm_pixels):
        claim = module.CLAIM
        assert len(claim.queue()) == 8 and {a.system for a in claim.arms.values()} == {module.META.key}
        assert len({(a.steps, a.settings.get("batch")) for a in claim.arms.values()}) == 1
        assert {a.settings["noise"] for a in claim.arms.values()} == set(KERNELS)
        for arm in claim.arms.values():
            fields = module.Config.__dataclass_fields__
            replace(module.Config(), **{k: v for k, v in arm.settings.items() if k in fields})


def test_settings_that_are_none_are_refused():
    for module in (d3pm, d3pm_pixels):
        with pytest.raises(ValueError, match="noise is absorbing"):
            module.Config(noise="fog")
        with pytest.raises(ValueError, match="at least 1 step"):
            module.Config(turns=0)
    assert load_module("d3pm") is d3pm


# ---- strips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", KERNELS)
def test_strips_go_from_a_sample_to_noise_and_from_noise_to_a_sample(noise, tmp_path):
    model = tiny(noise, turns=6)
    value = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    there = forth(model.kernel, value, frames=4)
    assert torch.equal(there.states[0], value) and torch.equal(there.whole, value) and len(there.states) == 4
    target = Target(model)
    again = back(target, model.blank(1), frames=4)
    assert bool((again.states[0] == 5).all()) and torch.equal(again.states[-1], again.whole)
    assert bool((again.whole < 5).all())
    if noise == "absorbing":  # what is masked stays so on the way there, and never comes back on the way here
        assert bool((there.states[-1] == 5).all())
        for early, late in itertools.pairwise(again.states):
            assert bool(((early == 5) | (early == late)).all())
    strips = {"forward": there, "reverse": again}
    path = save_text_strips(strips, ["a", "b", None, "d", "e"], tmp_path / "text.png")
    assert path.stat().st_size > 500


def test_strips_of_pictures_show_masks_in_blue(tmp_path):
    from PIL import Image

    value = torch.arange(16)
    strips = {name: forth(d3pm.kernel_of(name, 16, 4), value, frames=3) for name in ("absorbing", "gaussian")}
    picture = Image.open(save_picture_strips(strips, 4, 16, tmp_path / "p.png")).convert("RGB")
    blue = [c for _, c in picture.getcolors(1 << 20) if c[2] > c[0] + 20]
    assert len(blue) == 1
    only = {"gaussian": strips["gaussian"]}
    picture = Image.open(save_picture_strips(only, 4, 16, tmp_path / "q.png")).convert("RGB")
    assert not [c for _, c in picture.getcolors(1 << 20) if c[2] != c[0]]


def test_strips_that_do_not_fit_are_refused(tmp_path):
    model = tiny()
    a, b = (forth(model.kernel, torch.zeros(8, dtype=torch.long), frames=n) for n in (2, 3))
    with pytest.raises(ValueError, match="equally many moments"):
        save_picture_strips({"a": a, "b": b}, 2, 5, tmp_path / "x.png")
    with pytest.raises(ValueError, match="d3pm or d3pm-pixels"):
        back(Target(mdlm.build(mdlm.Config(**TINY))), mdlm.build(mdlm.Config(**TINY)).blank(1))
    assert moments(6, 4) == [0, 2, 4, 6] and moments(2, 9) == [0, 1, 2]
