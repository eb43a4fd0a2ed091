"""HMAR in two stages: what each of them trains, and what the second leaves as it is."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import torch

from seriatim.backbones.forked import Forked
from seriatim.backbones.layer import TransformerConfig
from seriatim.objectives.scales import scale_weights
from seriatim.random import Generator
from seriatim.systems import pyramid_trials
from seriatim.systems.image import hmar
from seriatim.systems.system import Sampling
from seriatim.tokenizers import MultiScaleConfig, MultiScaleTokenizer
from seriatim.training.checkpoint import save_json
from seriatim.training.run import RunFolder
from seriatim.verbs.load import load
from seriatim.verbs.train import train

# ---- training --------------------------------------------------------------------------------------------------------


def system(mask_layers=0, scales=(1, 2, 4)):
    torch.manual_seed(0)
    settings = MultiScaleConfig(scales=scales, vocab=8, dim=4, width=8)
    tokenizer = MultiScaleTokenizer(settings).eval()
    c = hmar.Config(settings, classes=3, width=16, depth=4, heads=2, dropout=0.0, mask_layers=mask_layers)
    return hmar.HMAR(c, tokenizer).eval()


def stages():
    """A first stage with weights drawn at random, and a second behind it."""
    first = system()
    with torch.no_grad():
        for p in first.model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    settings = hmar.HMAR.inherited(first, {})
    second = hmar.HMAR(hmar.Config(**settings), first.tokenizer).eval()
    second.take_over(first)
    return first, second


def batch(n=6):
    images = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"image": images, "label": torch.arange(n) % 3}


def test_the_first_stage_weighs_scales():
    made = system()
    total, count = made.train().losses(batch(), Generator(0), 0.0)
    canvas, condition = made.canvas(batch())
    with torch.no_grad():
        each = made.model.losses(canvas, condition)
    means = torch.stack([part.mean() for part in each.split([1, 4, 16], 1)])
    want = (means * torch.tensor(scale_weights((1, 2, 4)))).sum()
    torch.testing.assert_close((total / count).detach(), want)
    nats, number = made.eval().losses(batch(), Generator(0), 0.0)
    assert int(number) == 6 * 21
    torch.testing.assert_close(nats.detach(), each.sum())


def test_a_share_of_each_scale_is_hidden_rounded_up():
    scale = hmar.case((1, 2, 4)).model.layout.coord[:, 0]
    for share, want in ((0.0, (0, 0, 0)), (0.3, (0, 2, 5)), (0.999, (0, 4, 16))):
        hidden = hmar.hidden_elements(scale, share, torch.Generator().manual_seed(0))
        assert tuple(int(part.sum()) for part in hidden.split([1, 4, 16])) == want
    draws = torch.stack(
        [hmar.hidden_elements(scale, 0.5, torch.Generator().manual_seed(i)) for i in range(400)]
    ).float()
    assert bool(((draws[:, 1:].mean(0) - 0.5).abs() < 0.1).all())


def test_nothing_hidden_is_no_loss_and_not_nan():
    _, second = stages()
    canvas, condition = second.canvas(batch())
    loss, count = second.train()._masked(canvas, condition, None, 0.0, Generator(0))
    assert float(loss.detach()) == 0 and int(count) == 1
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in second.parameters())


def test_the_second_stage_begins_as_a_copy_and_trains_nothing_else():
    first, second = stages()
    assert second.config.mask_layers == 2
    model = second.model
    for mine, theirs in zip(model.backbone.fork, model.backbone.layers[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert torch.equal(model.heads["token"].fork.weight, model.heads["token"].weight)
    second.train()
    loss, count = second.losses(batch(), Generator(1), 0.0)
    (loss / count).backward()
    trained = {n for n, p in second.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in second.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n.split(".")[1] for n in trained} == {"backbone", "heads", "embed"}
    assert all("fork" in n or n == "model.embed.mask" for n in trained)
    before = first.losses(batch(), Generator(0), 0.0)[0]
    with torch.no_grad():
        for p in second.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape))
    assert torch.equal(second.eval().losses(batch(), Generator(0), 0.0)[0], before), "the likelihood is another"


def test_the_second_stage_learns_what_its_scale_shows():
    """Pictures whose codes are all alike in each scale, whatever the coarser ones are: only what is shown tells."""
    torch.manual_seed(0)
    c = hmar.Config(MultiScaleConfig(scales=(1, 2), vocab=4, dim=4, width=8, phi_ratio=0.0), 1, 32, 2, 2, 0.0, 1)
    model = hmar.build(c)
    with torch.no_grad():
        model.embed.quantizer.codebook.copy_(2 * torch.eye(4))
        model.embed.project.weight.copy_(torch.randn(32, 4) * 0.5)
        for layer in (*model.backbone.layers, *model.backbone.fork):  # open gates, which begin nearly closed
            layer.ada_bias.copy_(torch.cat([torch.zeros(64), torch.ones(32)] * 2))
    optimizer, g, losses = torch.optim.Adam(model.parameters(), 1e-2), torch.Generator().manual_seed(0), []
    for _ in range(50):
        ids = torch.randint(4, (32, 2), generator=g)[:, [0, 1, 1, 1, 1]]
        hidden = hmar.hidden_elements(model.layout.coord[:, 0], 0.6, g)
        label = {"class": torch.zeros(32, dtype=torch.long)}
        loss = hmar.masked_losses(model, model.canvas({"token": ids}), hidden, label).sum() / (32 * hidden.sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.2 and losses[0] > 1.2


def test_stages_are_not_confused():
    first, second = stages()
    with pytest.raises(ValueError, match="second stage: seriatim train hmar --from"):
        first.draw(torch.arange(2), sampling=Sampling(steps=3))
    with pytest.raises(ValueError, match="behind a trained first stage"):
        system(mask_layers=1).train().losses(batch(), Generator(0), 0.0)
    with pytest.raises(ValueError, match="at least 1"):
        system().take_over(first)
    with pytest.raises(ValueError, match="0 to 4 come twice"):
        system(mask_layers=5)
    assert hmar.HMAR.inherited(second, {"mask_layers": 1})["mask_layers"] == 2


def test_forwards_of_each_scale_are_chosen_at_sampling():
    first, second = stages()
    assert first.draw(torch.arange(2)).forwards == 3
    for steps, forwards in ((None, 1 + 2 + 3), (1, 3), (2, 5), (4, 9)):
        out = second.draw(torch.arange(2), sampling=Sampling(steps=steps, guidance=1.0), film=True)
        assert out.forwards == forwards and torch.equal(out.frames[-1], out.images)
    same = (one.draw(torch.arange(3), sampling=Sampling(steps=1), seed=4).images for one in (first, second))
    assert torch.equal(*same)


def test_held_out_figures_are_of_what_is_trained():
    first, second = stages()

    class Examples:
        def __len__(self):
            return 6

        def take(self, index):
            return {k: v[index] for k, v in batch().items()}

    one, again = second.validate(Examples()), second.validate(Examples())
    assert one == again and one != first.validate(Examples())


@pytest.mark.parametrize(
    ("config", "fork", "message"),
    [
        (TransformerConfig(16, 2, 2, vector=8), 3, "1 to 2 may come twice"),
        (TransformerConfig(16, 2, 2), 1, "a conditioning vector drives"),
    ],
)
def test_impossible_forks_are_refused(config, fork, message):
    with pytest.raises(ValueError, match=message):
        Forked(config, fork)


def test_the_claims_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(
        pyramid_trials, "fd_s", lambda system, data, sampling, seed, samples: {"fd_s": 10.0 / sampling.steps + seed}
    )
    save_json({"recipe": {"seed": 2}}, tmp_path / "run.json")
    made = SimpleNamespace(system=SimpleNamespace(sampling=Sampling()), data=None, folder=tmp_path)
    figures = pyramid_trials.refined(made)
    assert [figures[f"fd_s_{n}"] for n in (0, 1, 2, 4)] == [12.0, 7.0, 10 / 3 + 2, 4.0] and figures["fd_s"] == 4.0
    assert pyramid_trials.one_pass(made.system, 1)["fd_s"] == 11.0


@pytest.mark.slow
def test_a_second_stage_stopped_and_resumed_is_the_one_never_stopped(tmp_path):
    """By the verb, from a run of the first stage, whose data and tokenizer it takes over."""
    train("hmar", "digits", out=tmp_path / "first", settings={"steps": 4, "tokenizer_steps": 6})
    settings = {"steps": 6, "batch": 8, "mask_layers": 1, "bf16": False}
    whole = train("hmar", from_=tmp_path / "first", out=tmp_path / "whole", settings=settings)

    class Stopping:
        def __init__(self, name):
            pass

        def update(self, step, steps, figures):
            if step == 3:
                signal.raise_signal(signal.SIGINT)

        def close(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        train("hmar", from_=tmp_path / "first", out=tmp_path / "parted", settings=settings, bar=Stopping)
    parted = train("hmar", from_=tmp_path / "first", out=tmp_path / "parted", settings=settings, resume=True)
    one, other = (load(t.folder).model.state_dict() for t in (whole, parted))
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    assert whole.system.config.mask_layers == 1 and RunFolder(whole.folder).read_card()["data"] == "digits"
    base = load(tmp_path / "first").model.state_dict()
    assert all(torch.equal(x, one[name]) for name, x in base.items()), "the first stage was changed"
    assert not torch.equal(one["heads.token.fork.weight"], base["heads.token.weight"]), "nothing was learned"


def test_hmar_can_be_trained_with_all_elements_weighing_alike():
    made = {}
    for weighted in (True, False):
        torch.manual_seed(0)
        tokenizer = MultiScaleTokenizer(MultiScaleConfig(scales=(1, 2, 4), vocab=8, dim=4, width=8)).eval()
        system = hmar.HMAR(hmar.Config(tokenizer.config, 3, 32, 2, 2, 0.0, weighted=weighted), tokenizer).train()
        batch = {"image": torch.rand(4, 1, tokenizer.config.side, tokenizer.config.side), "label": torch.arange(4) % 3}
        total, count = system.losses(batch, Generator(0), 0.0)
        made[weighted] = total / count
        plain = system.model.losses(*system.canvas(batch)).mean()
    assert float(made[False]) == pytest.approx(float(plain), rel=1e-6)
    assert float(made[True]) != pytest.approx(float(made[False]), rel=1e-5)
