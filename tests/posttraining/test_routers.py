"""Routers: soft gates teach them and the printed formula does not, prices set how much is skipped, and what was trained
is kept, found again and fits its base only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seriatim.decoding.layers import begun
from seriatim.posttraining.drafting import CARD, Base, load_part, save_part
from seriatim.posttraining.routers import Gating, RouterConfig, RouterLearner, Routers
from seriatim.posttraining.skipping import skipping_loss, skipping_losses
from seriatim.posttraining.states import Tokens
from seriatim.random import Generator
from seriatim.systems.decoders import decoder_of
from seriatim.systems.system import Sampling
from seriatim.training.loop import adamw
from seriatim.training.recipe import Recipe
from seriatim.verbs.load import load
from seriatim.verbs.train import train
from support.skipping import DEPTH, PROMPTS, VOCAB, system, written

IDS = torch.randint(VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))
BATCH = {"token": IDS}


@pytest.fixture(scope="module")
def base():
    return Base(system())


def made(base, seed: int | None = 0, **config) -> Routers:
    """Routers of arbitrary weights; None: as training begins with them."""
    part = Routers(RouterConfig(**config), base)
    if seed is not None:
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in part.parameters():
                p.copy_(torch.randn(p.shape, generator=g))
    return part


class Printed(Gating):
    """The formula of the review copy: h + rho f(h) + (1 - rho) f(h)."""

    def leaves(self, i, x, y):
        rho = self.rho[-1].to(x.dtype)[:, None, None]
        return x + rho * (y - x) + (1 - rho) * (y - x)


def gradient(base, gating, part) -> torch.Tensor:
    losses = skipping_losses(base.model, IDS, torch.full((4,), 5), gating)
    found = torch.autograd.grad(losses.sum(), [part.weight, part.bias])
    return torch.cat([found[0], found[1][:, None]], 1).abs().amax(1)  # of each router


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_the_loss_of_the_text_teaches_every_router_by_soft_gates(base, hard):
    """Also where gates are hard and pass the soft ones' gradient; protected layers have nothing to learn."""
    part = made(base, always=1)
    reached = gradient(base, Gating(part, hard), part) > 1e-8
    assert reached.tolist() == [False, *[True] * (DEPTH - 2), False]


def test_the_formula_as_printed_teaches_them_nothing(base):
    part = made(base, always=0)
    assert float(gradient(base, Printed(part, False), part).max()) < 1e-12
    assert float(gradient(base, Gating(part, False), part).min()) > 1e-8


def test_wide_open_gates_are_the_plain_model_and_hard_ones_the_decoder(base):
    part, prompts = made(base, always=0), torch.full((4,), 5)
    with torch.no_grad():
        hard = skipping_losses(base.model, IDS, prompts, Gating(part, True))
        decided = skipping_losses(base.model, IDS, prompts, begun(part.plan(), base.model))
        assert (hard - decided).abs().max() < 1e-12
        part.bias.fill_(80.0)
        open_ = skipping_losses(base.model, IDS, prompts, Gating(part, False))
        plain = base.model.losses(base.model.canvas(BATCH, prompts, layout=base.system.canvas(BATCH)[0].layout))
    assert (open_ - plain).abs().max() < 1e-9


def test_gates_look_at_the_prompt_alone(base):
    """Tokens behind it change nothing."""
    part, prompts, other = made(base), torch.tensor([3, 4, 5, 6]), IDS.clone()
    behind = torch.arange(12) >= prompts[:, None]
    other[behind] = (other[behind] + 1) % VOCAB
    found = []
    for ids in (IDS, other):
        gating = Gating(part, False)
        with torch.no_grad():
            skipping_losses(base.model, ids, prompts, gating)
        found.append(torch.stack(gating.rho))
    assert (found[0] - found[1]).abs().max() < 1e-12


def test_the_price_is_paid_for_each_token_and_layer(base):
    """The loss is that of the text and, a token, the penalty times the sum of rho."""
    cheap, dear = made(base, penalty=0.0), made(base, penalty=0.5)
    without, count, figures = cheap.loss(base, BATCH, Generator(3), False)
    with_, _, _ = dear.loss(base, BATCH, Generator(3), False)
    rho = figures["rho"] * (DEPTH - 2)
    assert float((with_ - without).detach()) == pytest.approx(0.5 * int(count) * rho, rel=1e-6)
    assert figures["nats"] == pytest.approx(float(without.detach()) / int(count), rel=1e-6)


def test_a_higher_price_skips_more():
    """Trained on the same text with nothing changed but the price, which tells how many layers are worth it."""
    base = Base(system().float())
    skipped = []
    for penalty in (0.0, 0.3, 30.0):
        part = made(base, None, penalty=penalty)
        optimizer = adamw(part, Recipe(20, learning_rate=0.4, weight_decay=0.0))
        for step in range(20):
            total, count, _ = part.loss(base, BATCH, Generator(step), step > 14)
            optimizer.zero_grad()
            (total / count).backward()
            optimizer.step()
        skipped.append(RouterLearner(part, base).validate(Tokens(IDS))["skipped"])
    assert skipped == sorted(skipped) and skipped[0] < skipped[1] < skipped[2]
    assert skipped[2] == pytest.approx((DEPTH - 2) / DEPTH)


def test_training_changes_the_routers_alone(base):
    learner = made(base, None).learner(base)
    assert {n for n, p in learner.named_parameters() if p.requires_grad} == {"part.weight", "part.bias"}
    total, count = learner(BATCH, Generator(0), 0, 10)
    total.backward()
    assert all(p.grad is None for p in base.model.parameters())
    assert int(count) > 0 and set(learner.figures) == {"nats", "rho", "skipped"}


def test_gates_are_hard_late_in_training(base):
    learner = made(base, hard=0.5).learner(base)
    soft, hard = (float(learner(BATCH, Generator(0), step, 10)[0].detach()) for step in (4, 5))
    part = learner.part
    assert soft == float(part.loss(base, BATCH, Generator(0), False)[0].detach())
    assert hard == float(part.loss(base, BATCH, Generator(0), True)[0].detach()) != soft


def test_held_out_figures_are_those_of_decoding(base):
    """The loss with the layers that each prompt decides on, and the share of layers that is skipped."""
    part = made(base)
    figures, skipping = RouterLearner(part, base).validate(Tokens(IDS)), begun(part.plan(), base.model)
    with torch.no_grad():
        total, count = skipping_loss(base.model, BATCH, skipping, Generator(0))
    assert figures["loss"] == pytest.approx(float(total) / int(count), rel=1e-9)
    assert figures["skipped"] == pytest.approx(float((~skipping.runs).double().mean()), rel=1e-9)


# ---- kept and found again --------------------------------------------------------------------------------------------


def test_routers_are_kept_and_decide_the_same(base, tmp_path: Path):
    part = made(base)
    save_part(part, base, tmp_path)
    again = load_part(tmp_path, base, Routers)
    want, _, target = written(base.system, PROMPTS, part.plan())
    got, _, other = written(base.system, PROMPTS, again.plan())
    assert got == want and torch.equal(target.skipping.runs, other.skipping.runs)
    way = decoder_of(base.system, f"first:{tmp_path}+prompt=runs+draft=prompt-lookup", Sampling())
    assert way.target["layers"].prompt == "runs" and way.proposer is not None


def test_routers_of_another_base_or_kind_are_refused(base, tmp_path: Path):
    save_part(made(base), base, tmp_path)
    with pytest.raises(ValueError, match="was trained for"):
        decoder_of(system(seed=9), f"first:{tmp_path}", Sampling())
    card = json.loads((tmp_path / CARD).read_text())
    (tmp_path / CARD).write_text(json.dumps(card | {"key": "medusa"}))
    with pytest.raises(ValueError, match="a part of medusa"):
        decoder_of(base.system, f"first:{tmp_path}", Sampling())
    with pytest.raises(ValueError, match="name the folder"):
        decoder_of(base.system, "first", Sampling())
    with pytest.raises(FileNotFoundError):
        decoder_of(base.system, f"first:{tmp_path / 'nothing'}", Sampling())


@pytest.mark.parametrize(
    ("config", "message"),
    [({"penalty": -1.0}, "not below 0"), ({"hard": 1.5}, "is a share"), ({"always": 3}, "nothing to skip of 6")],
)
def test_settings_that_mean_nothing_are_refused(base, config, message):
    with pytest.raises(ValueError, match=message):
        Routers(RouterConfig(**config), base)


def test_both_phases_by_name(tmp_path: Path):
    """Routers beside a frozen model, then an adapter with their skips in place; the model with both generates."""
    text = tmp_path / "text.txt"
    text.write_text("abcd " * 400)
    tiny = {"length": 32, "width": 16, "depth": 4, "heads": 2, "steps": 4, "batch": 2}
    train("next-token", text, out=tmp_path / "base", settings=tiny)
    few = {"steps": 3, "batch": 2, "bf16": False}
    train("first", text, from_=tmp_path / "base", out=tmp_path / "routers", settings={**few, "window": 16})
    spec = f"first:{tmp_path / 'routers'}"
    train(
        "next-token", text, from_=tmp_path / "base", out=tmp_path / "adapter", lora=2,
        settings={**few, "decoder": spec},
    )  # fmt: skip
    model = load(tmp_path / "adapter")
    assert model.generate(["abcd ab", "d"], spec, max_new_tokens=8, temperature=0)[0].ids
