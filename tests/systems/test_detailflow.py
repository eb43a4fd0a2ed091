"""DetailFlow: its order, its forwards, and targets that repair, beyond the laws (test_detail.py has its tokenizer)."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from seriatim import Keyed, SampleAll, Target, decode
from seriatim.factorization.opened import OpenedGroups, opened_turns
from seriatim.laws.case import randomise
from seriatim.random import Generator
from seriatim.systems.image import detailflow
from seriatim.systems.query_trials import prefixes_and_repairs
from seriatim.systems.system import Sampling, config_from
from seriatim.tokenizers import PixelConfig, PixelTokenizer
from seriatim.tokenizers.detail import DetailConfig, DetailTokenizer
from seriatim.verbs.load import load
from seriatim.verbs.train import train

SHAPE = DetailConfig(
    side=8, vocab=8, dim=4, queries=6, group=2, patch=2, width=16, heads=2, depth=1, draw_depth=1, near=3
)
DATA = SimpleNamespace(classes=("a", "b", "c"))


def model(groups, size, vocab=2):
    c = detailflow.Config(groups, size, vocab=vocab, classes=3, width=16, depth=2, heads=2, dropout=0.0)
    return randomise(detailflow.build(c))


def system(**settings):
    torch.manual_seed(0)
    tokenizer = DetailTokenizer(SHAPE).eval()
    c = detailflow.Config(**detailflow.DetailFlow.known(tokenizer, DATA), width=16, depth=2, heads=2, dropout=0.0)
    c = detailflow.Config(**c.__dict__ | settings)
    made = detailflow.DetailFlow(c, tokenizer).eval()
    with torch.no_grad():
        for p in (*made.model.parameters(), *tokenizer.parameters()):
            p.copy_(torch.randn(p.shape) * 0.3)
    return made


def batch(n=6):
    return {
        "image": torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1,
        "label": torch.arange(n) % 3,
    }


# ---- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "size"), [(2, 2), (3, 4), (4, 1), (1, 3)])
def test_as_many_forwards_as_ids_of_the_first_group_and_groups_behind_it(groups, size):
    made = model(groups, size)
    target = Target(made, {"class": torch.tensor([1])})
    steps = list(decode(target, made.blank(1), SampleAll(), random=Keyed(0)))
    assert sum(step.forwards for step in steps) == size + groups - 1


def test_published_line_takes_23_forwards():
    assert int(opened_turns(128, 8).max()) + 1 == 23


def test_slots_see_what_the_released_mask_shows():
    """Its rule: rows of the first group see up to themselves, others all of their group and what is before."""
    n, g = 12, 4
    canvas = model(3, 4).canvas({"token": torch.zeros(1, n, dtype=torch.long)})
    got = OpenedGroups(n, g).packed(canvas).views["all"].mask()[0]
    want = torch.tensor([[j <= i if i < g else j // g <= i // g for j in range(n)] for i in range(n)])
    assert torch.equal(got, want)


def test_slots_carry_what_the_released_code_feeds():
    """Its input: class, first group, g - 1 learned vectors, then all other groups but the last."""
    canvas = model(4, 3).canvas({"token": torch.zeros(1, 12, dtype=torch.long)})
    plan = OpenedGroups(12, 3).packed(canvas)
    assert plan.slots.element[0, :, 0].tolist() == [-1, 0, 1, 2, -1, -1, 3, 4, 5, 6, 7, 8]
    assert torch.equal(plan.reads.element, plan.reads.slot) and plan.reads.slot[0].tolist() == list(range(12))


def test_ids_of_a_later_group_are_independent_given_those_before():
    made = model(2, 2)
    x = torch.tensor(list(itertools.product(range(2), repeat=4)))
    with torch.no_grad():
        p = made.log_prob(made.canvas({"token": x}), {"class": torch.ones(16, dtype=torch.long)}).exp().view(4, 2, 2)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    later = p / p.sum((1, 2), keepdim=True)
    torch.testing.assert_close(later, later.sum(2, keepdim=True) * later.sum(1, keepdim=True))
    first = p.sum((1, 2)).view(2, 2)
    product = first.sum(1, keepdim=True) * first.sum(0, keepdim=True)
    assert (first - product).abs().max() > 1e-3, "those of the first group are not"


def test_learned_vectors_are_told_apart_and_matter():
    made = model(3, 4)
    x = {"token": torch.zeros(1, 12, dtype=torch.long)}, {"class": torch.tensor([1])}
    with torch.no_grad():
        before = made.losses(made.canvas(x[0]), x[1])
        made.embed.pads[1] += 1
        moved = (made.losses(made.canvas(x[0]), x[1]) - before)[0].abs() > 1e-9
    assert not moved[:4].any() and moved[4:8].all()


def test_lines_that_are_not_whole_groups_are_refused():
    for count, group in ((5, 2), (4, 0), (0, 1)):
        with pytest.raises(ValueError, match="whole groups"):
            opened_turns(count, group)


# ---- targets that repair ---------------------------------------------------------------------------------------------


def test_losses_are_of_what_is_said_in_view_of_what_is_fed():
    made = system().train()
    images = batch()
    lines = made.tokenizer.corrupted(images["image"], 2, torch.Generator().manual_seed(0))
    raw = made.condition(images["label"], 6)
    losses, _ = made.told(lines.fed, lines.said, raw)
    clean, _ = made.told(lines.clean, lines.clean, raw)
    torch.testing.assert_close(losses[:, :4], clean[:, :4])
    assert (losses[:, 4:] - clean[:, 4:]).abs().max() > 1e-3
    fed = made.model.canvas({"token": lines.fed})
    plan = made.model.factorization.packed(fed)
    h = made.model.hidden(plan, fed, None, made.model.encode(raw))
    dist, element, _ = made.model.dist(h, plan, fed)
    torch.testing.assert_close(losses.float(), -dist.log_prob(lines.said)[:, element[0].argsort()].float())


def test_all_pictures_are_corrupted_at_one_and_none_at_zero(monkeypatch):
    for share in (0.0, 1.0):
        made, told = system(correction=share).train(), []
        real = made.told
        monkeypatch.setattr(
            made, "told", lambda fed, said, *more, r=real, k=told: k.append((fed, said)) or r(fed, said, *more)
        )
        total, count = made.losses(batch(), Generator(3), 0.0)
        assert bool(told) == (share > 0)
        if share == 0:
            made.eval()
            want = made.losses(batch(), Generator(3), 0.0)
            torch.testing.assert_close((total, count), want)
        else:
            clean = made.tokenizer.encode(batch()["image"])
            assert (told[0][0] != clean).any() and (told[0][0] != told[0][1]).any()


def test_held_out_pictures_are_judged_by_their_true_ids():
    made = system(correction=1.0)
    total, count = made.losses(batch(), Generator(0), 0.0)
    canvas, raw = made.canvas(batch())
    torch.testing.assert_close(total.float(), made.model.losses(canvas, raw).sum().float())
    assert int(count) == 36


def test_it_learns_the_ids_of_its_tokenizer():
    made = system(correction=0.3).train()
    optimizer, losses = torch.optim.Adam(made.model.parameters(), 1e-2), []
    for step in range(30):
        total, count = made.losses(batch(), Generator(step), 0.0)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(float((total / count).detach()))
    assert losses[-1] < 0.8 * losses[0]


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_a_film_grows_in_resolution_and_ends_in_the_picture():
    made = system()
    out = made.draw(torch.arange(2), sampling=Sampling(guidance=0.5), film=True)
    assert out.forwards == 4 and len(out.frames) == 4 and torch.equal(out.frames[-1], out.images)
    assert all(frame.shape == out.images.shape for frame in out.frames)
    first = out.frames[0]
    assert torch.equal(first[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3), first), "2x2, blown up"


class Four:
    """Four pictures."""

    def __len__(self):
        return 4

    def take(self, index):
        return {"image": batch(len(index))["image"]}


def test_prefixes_and_repairs_are_measured():
    said = prefixes_and_repairs(SimpleNamespace(model=system().tokenizer), 0, SimpleNamespace(test=Four()))
    assert said["of"] == 3 and {f"error_{n}" for n in (1, 2, 4, 6)} <= set(said)
    assert said["error_wrong"] > 0 and said["error_repaired"] > 0


def test_other_tokenizers_and_shares_are_refused():
    with pytest.raises(ValueError, match="detailflow needs a detail tokenizer: a run of image-detail"):
        detailflow.DetailFlow.known(PixelTokenizer(PixelConfig()), DATA)
    with pytest.raises(ValueError, match="correction of 2"):
        detailflow.Config(correction=2)


def test_a_config_follows_from_the_tokenizer_at_every_size():
    known = detailflow.DetailFlow.known(system().tokenizer, DATA)
    for size in detailflow.DetailFlow.sizes:
        assert config_from(detailflow.DetailFlow, {}, size, **known).group_size == 2


@pytest.mark.slow
def test_it_is_trained_and_loaded_with_its_tokenizer(tmp_path):
    made = train("detailflow", "digits", out=tmp_path / "run", settings={"steps": 3, "tokenizer_steps": 6})
    again = load(tmp_path / "run")
    assert isinstance(again.tokenizer, DetailTokenizer) and again.config == made.system.config
    assert torch.equal(again.draw(torch.arange(2)).images, made.system.draw(torch.arange(2)).images)
