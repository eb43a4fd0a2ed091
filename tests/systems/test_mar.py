"""MAR: which vectors are hidden, how they are revealed and guided, and that both heads read what they may."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from seriatim.canvas import Set
from seriatim.data.base import Data, load_data
from seriatim.data.digits import digits
from seriatim.decoding.guidance import Ahead, Guidance
from seriatim.decoding.loop import decode, generate
from seriatim.decoding.sample import Select, schedule
from seriatim.decoding.target import Target
from seriatim.laws.case import randomise
from seriatim.objectives.masked import ByRate, fewest
from seriatim.random import Generator, Key, Keyed
from seriatim.systems.image import mar
from seriatim.systems.system import Sampling
from seriatim.tokenizers.patches import PatchConfig, PatchTokenizer
from seriatim.tokenizers.pixels import PixelConfig, PixelTokenizer
from seriatim.training.loop import Recipe, fit

TINY = mar.Config(width=16, depth=2, heads=2, dropout=0.0, head_width=16, head_depth=1, head_steps=4)
HEADS = ("diffusion", "mse")
every_head = pytest.mark.parametrize("head", HEADS)


def model_of(head="diffusion", seed=0):
    return randomise(mar.build(replace(TINY, head=head)), seed, std=0.3)


def system_of(head="diffusion"):
    torch.manual_seed(0)
    system = mar.MAR(replace(TINY, head=head), PatchTokenizer(PatchConfig(side=8, channels=1, patch=2))).eval()
    randomise(system.model, std=0.3).float()
    return system


def vectors(n, seed=0):
    return torch.randn(n, 16, 4, generator=torch.Generator().manual_seed(seed)).double()


def labels(n):
    return {"class": torch.arange(n) % 10}


# ---- what is hidden --------------------------------------------------------------------------------------------------


def test_the_hidden_share_follows_the_cut_normal_law():
    """Mean 1, deviation 0.25, cut to 0.7 .. 1: quantiles by hand, and the mean 1 - 0.25 (phi(0) - phi(1.2)) / mass."""
    n, rows = 5000, 300
    unit = (torch.arange(rows) + 0.5) / rows
    hidden, weight = ByRate()(torch.ones(rows, n, dtype=torch.bool), unit, torch.rand(rows, n))
    share = hidden.sum(1) / n
    normal = torch.distributions.Normal(0.0, 1.0)
    low = normal.cdf(torch.tensor(-1.2))
    want = 1 + 0.25 * normal.icdf(low + (0.5 - low) * unit)
    assert float((share - want).abs().max()) < 3e-4
    density = lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    mean = 1 - 0.25 * (density(0) - density(1.2)) / (0.5 - float(low))
    assert float(share.mean()) == pytest.approx(mean, abs=3e-4)
    torch.testing.assert_close(weight * share, torch.ones(rows))


def test_counts_are_rounded_up_as_in_the_released_code():
    free = torch.ones(1, 16, dtype=torch.bool)
    hidden, _ = ByRate()(free, torch.tensor([0.0]), torch.rand(1, 16))
    assert int(hidden.sum()) == math.ceil(0.7 * 16)
    hidden, _ = ByRate()(free, torch.tensor([1 - 1e-7]), torch.rand(1, 16))
    assert int(hidden.sum()) == 16


def test_every_set_of_a_size_is_equally_likely():
    """10 pairs of 5 elements, 20,000 draws: chi-squared with 9 degrees of freedom below its 0.99999 quantile."""
    free = torch.ones(20_000, 5, dtype=torch.bool)
    noise = torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0))
    hidden = fewest(free, torch.full((20_000,), 2), noise)
    assert bool((hidden.sum(1) == 2).all())
    code = (hidden * 2 ** torch.arange(5)).sum(1)
    counts = code.bincount()
    counts = counts[counts > 0].double()
    assert len(counts) == 10 and float(((counts - 2000) ** 2 / 2000).sum()) < 39.3


@every_head
def test_the_loss_is_the_mean_over_hidden_vectors_of_the_heads_loss(head):
    model, x = model_of(head), vectors(6)
    canvas = model.canvas({"token": x})
    with torch.no_grad():
        losses = model.losses(canvas, labels(6), random=Generator(3))
        shown = losses == 0
        plain = model.hidden_losses(canvas, ~shown, labels(6), random=_after_masks(6))
    hidden = (~shown).sum(1)
    assert bool(((hidden >= 12) & (hidden <= 16)).all())
    torch.testing.assert_close(losses.sum(1) / 16, plain.sum(1) / hidden, rtol=1e-5, atol=1e-6)


def _after_masks(rows):
    """The generator as it stands when the masks are drawn."""
    random = Generator(3)
    key = Key(torch.arange(rows), 0)
    random.uniform((rows, 1), key)
    random.uniform((rows, 16), key)
    return random


# ---- what is seen ----------------------------------------------------------------------------------------------------


def states(model, x, hidden, label):
    """Hidden states at the hidden places."""
    shown = model.canvas({"token": x}, ~hidden)
    plan = model.factorization.step(shown, None, 0).check(model.mixers, hidden)
    with torch.no_grad():
        return model.hidden(plan, shown, None, model.encode(label))[hidden]


def test_hidden_vectors_are_seen_by_nobody_and_shown_ones_and_the_class_by_all():
    model, x = model_of(), vectors(1)
    hidden = torch.rand(1, 16, generator=torch.Generator().manual_seed(1)) < 0.7
    base = states(model, x, hidden, {"class": torch.tensor([3])})
    other = x + hidden[..., None] * vectors(1, 5)
    assert torch.equal(states(model, other, hidden, {"class": torch.tensor([3])}), base)
    moved = x + (~hidden)[..., None] * vectors(1, 5)
    for changed in (
        states(model, moved, hidden, {"class": torch.tensor([3])}),
        states(model, x, hidden, {"class": torch.tensor([4])}),
    ):
        assert bool(((changed - base).abs().amax(1) > 1e-3).all())


@every_head
def test_a_gradient_reaches_every_parameter(head):
    model = model_of(head).train()
    drop = torch.arange(20) == 0
    model.losses(model.canvas({"token": vectors(20)}), labels(20), drop, random=Generator(0)).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@every_head
def test_fresh_weights_learn_to_use_what_is_shown(head):
    """Pictures of one vector in every place: after 100 steps the loss is well below 1, that of seeing nothing."""
    torch.manual_seed(0)
    model = mar.build(replace(TINY, head=head, head_width=32))

    def draw(n, generator):
        x = torch.randn(n, 1, 4, generator=generator).expand(-1, 16, -1)
        return model.canvas({"token": x}), labels(n)

    history = fit(model, draw, Recipe(100, 32, 1e-2, weight_decay=0.0))
    assert sum(history[-10:]) / 10 < 0.8


def test_both_heads_are_of_about_one_size():
    small, large = (
        sum(p.numel() for p in mar.build(mar.Config(head=head)).parameters()) for head in ("mse", "diffusion")
    )
    assert 0.98 < small / large < 1.02


@every_head
def test_a_row_does_not_depend_on_its_company(head):
    model = model_of(head)
    together = generate(Target(model, labels(3)), model.blank(3), Select("random", 4, "cosine"), random=Keyed(0))
    blank = model.canvas({"token": torch.zeros(1, 16, 4)}, row=torch.tensor([2]))
    alone = generate(Target(model, {"class": torch.tensor([2])}), blank, Select("random", 4, "cosine"), random=Keyed(0))
    torch.testing.assert_close(alone.value["token"][0], together.value["token"][2], rtol=1e-5, atol=1e-5)


# ---- how they are revealed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5, 8, 16])
def test_counts_follow_the_cosine_and_every_vector_is_decided_once(steps):
    system = system_of()
    canvas, seen, counts = system.model.blank(3), torch.zeros(3, 16, dtype=torch.long), []
    sampling = Sampling(steps=steps)
    for step in decode(system.target(labels(3), sampling), canvas, system.decider(sampling), random=Keyed(0)):
        (edit,) = step.edits
        assert isinstance(edit, Set)
        row, column = (edit.element >= 0).nonzero(as_tuple=True)
        seen[row, edit.element[row, column]] += 1
        counts.append(int((edit.element[0] >= 0).sum()))
    left = (16, *schedule(16, steps, "cosine"))
    assert counts == [a - b for a, b in itertools.pairwise(left)]
    assert bool((seen == 1).all()) and len(counts) == steps


def test_orders_differ_between_pictures():
    system = system_of()
    canvas = system.model.blank(8)
    next(iter(decode(system.target(labels(8), Sampling()), canvas, Select("random", 2), random=Keyed(0))))
    assert len({tuple(row) for row in canvas.known.tolist()}) > 4


@every_head
def test_guidance_grows_linearly_with_the_share_that_is_known(head):
    """A step from 6 known of 16 vectors, against two separate forwards mixed by hand with weight 6/15 of the scale."""
    model, x, known = model_of(head), vectors(2).float().double(), torch.arange(16) < 6
    canvas = model.canvas({"token": x})
    element = torch.where(known, torch.arange(16), -1).expand(2, -1)
    canvas.apply([Set(x, element)])
    w = 3.0 * 6 / 15
    plan = model.factorization.step(canvas, None, 0)
    with torch.no_grad():
        yes, no = (
            model.dist(model.hidden(plan, canvas, None, model.encode(labels(2), drop)), plan, canvas)[0]
            for drop in (None, torch.ones(2, dtype=torch.bool))
        )
        key = Key(canvas.row, plan.reads.element)
        want = yes.mix([no], [1 + w, -w]).sample(Keyed(5), key)
        target = Target(model, labels(2), Guidance(3.0, "linear"))
        got = target.forward(target.plan(canvas), canvas).dist.sample(Keyed(5), key)
    torch.testing.assert_close(got[:, ~known], want[:, ~known], rtol=1e-6, atol=1e-6)


def test_the_squared_head_says_one_value_whatever_the_noise_and_temperature():
    system = system_of("mse")
    a, b = (
        system.draw(torch.arange(4), sampling=Sampling(steps=1, temperature=t), seed=s).images
        for t, s in ((1, 0), (0.3, 1))
    )
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    c, d = (system_of().draw(torch.arange(4), sampling=Sampling(steps=1), seed=s).images for s in (0, 1))
    assert float((c - d).abs().max()) > 0.1


# ---- the system ------------------------------------------------------------------------------------------------------


def test_digits_become_vectors_of_about_unit_variance_and_come_back():
    data, patches = digits(), PatchTokenizer(PatchConfig(side=8, channels=1, patch=2))
    system = mar.MAR(replace(TINY, **mar.MAR.known(patches, data)), patches)
    batch = data.train.take(torch.arange(len(data.train)))
    canvas, condition = system.canvas(batch)
    x = canvas.value["token"]
    assert abs(float(x.mean())) < 0.02 and abs(float(x.std()) - 1) < 0.02
    torch.testing.assert_close(system.picture(x), batch["image"], rtol=0, atol=1e-5)
    assert torch.equal(condition["class"], batch["label"])


def test_pictures_and_their_film():
    system = system_of()
    made = system.draw(torch.tensor([0, 1, 2]), sampling=Sampling(steps=4, guidance=1.0), seed=1, film=True)
    again = system.draw(torch.tensor([0, 1, 2]), sampling=Sampling(steps=4, guidance=1.0), seed=1)
    assert made.images.shape == (3, 1, 8, 8) and float(made.images.abs().max()) <= 1
    assert torch.equal(made.images, again.images) and made.forwards == 4
    grey = [float((frame == 0).float().mean()) for frame in made.frames]
    assert grey == sorted(grey, reverse=True) and torch.equal(made.frames[-1], made.images)


def test_filters_over_ids_are_refused():
    with pytest.raises(TypeError, match="top_p choose among ids"):
        system_of().draw(torch.tensor([0]), sampling=Sampling(top_p=0.9))


def test_what_follows_from_the_tokenizer():
    patches = PatchTokenizer(PatchConfig(side=32, channels=3, patch=4))
    images = torch.rand(6, 3, 32, 32) - 0.2
    side = type("Side", (), {"__len__": lambda self: 6, "take": lambda self, index: {"image": images[index]}})()
    said = mar.MAR.known(patches, Data("two", "image", side, side, ("a", "b")))
    unit = {k: said.pop(k) for k in ("mean", "deviation")}
    assert said == {"side": 8, "dim": 48, "classes": 2}
    assert unit["mean"] == pytest.approx(float(images.mean()), abs=1e-4)
    assert unit["deviation"] == pytest.approx(float(images.std()), abs=1e-4)
    with pytest.raises(ValueError, match="needs a tokenizer of vectors"):
        mar.MAR.known(PixelTokenizer(PixelConfig(side=8)), load_data("digits", "image"))


@pytest.mark.parametrize(
    ("wrong", "message"), [({"head": "flow"}, "diffusion or mse"), ({"deviation": 0.0}, "positive")]
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        mar.Config(**wrong)


# ---- the released form -----------------------------------------------------------------------------------------------


def released_form():
    return randomise(mar.build(replace(TINY, buffer=3)), std=0.3)


def states_of(model, value, known, condition):
    canvas = model.canvas({"token": value}, known)
    plan = model.factorization.step(canvas, None, 0)
    with torch.no_grad():
        return model.hidden(plan, canvas, None, model.encode(condition))


def test_states_of_the_released_form_depend_on_what_is_shown_alone():
    model, x = released_form(), vectors(2)
    known = torch.arange(16)[None].expand(2, -1) % 3 == 0
    h = states_of(model, x, known, labels(2))
    assert torch.equal(states_of(model, torch.where(known[..., None], x, 7.0), known, labels(2)), h)
    other = x.clone()
    other[:, 3] += 1
    assert (states_of(model, other, known, labels(2)) - h).abs().amax((0, 2)).min() > 0
    assert (states_of(model, x, known, {"class": torch.tensor([4, 5])}) - h).abs().amax((0, 2)).min() > 0


def test_rows_of_the_released_form_that_know_unequally_much_are_as_if_alone():
    model, x = released_form(), vectors(3)
    known = torch.arange(16)[None] < torch.tensor([[0], [5], [16 - 1]])
    together = states_of(model, x, known, labels(3))
    for row in range(3):
        one = {"class": labels(3)["class"][row : row + 1]}
        alone = states_of(model, x[row : row + 1], known[row : row + 1], one)
        assert torch.allclose(together[row], alone[0], atol=1e-10)


def test_the_released_form_learns_and_has_gradients_everywhere():
    model, x = released_form(), vectors(4)
    canvas = model.canvas({"token": x})
    model.losses(canvas, labels(4), torch.tensor([False, False, False, True]), random=Generator(0)).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_guidance_counts_what_is_known_behind_a_step():
    """As in the released code: 1 + (cfg - 1) (n - m) / n, m unknown after the step, at least one."""
    left = schedule(16, 5, "cosine")
    weights = [
        Ahead(2.0, "linear", total=16, left=left).weight(done / 15) for done in (0, *(16 - n for n in left[:-1]))
    ]
    assert weights == pytest.approx([2.0 * (16 - max(n, 1)) / 16 for n in left])


def test_a_buffer_is_of_no_negative_size():
    with pytest.raises(ValueError, match="0 or more class tokens"):
        replace(TINY, buffer=-1)
